"""The loops behind reading: numbering dense integers, and sorting events by user and time.

Compiled by numba and cached. Those that take `low` and `high` work on users `low … high - 1` alone
and release the interpreter, so that threads share the work by ranges of users. They carry
`no_type_check` because numba must see the plain function.

Shape legend: E events, U users, N values of one chunk.
"""

from typing import no_type_check

import numba
import numpy as np

SHORT = 256
"""Histories up to this length are sorted by insertion; a power of two."""


@numba.njit(cache=True, nogil=True)
@no_type_check
def mark_present(value_N, lowest, present):
    """Set `present[v - lowest]` for each value."""
    for value in value_N:
        present[value - lowest] = True


@numba.njit(cache=True, nogil=True)
@no_type_check
def look_up(value_N, lowest, row_of, out_N):
    """Write `row_of[v - lowest]` for each value."""
    for n in range(value_N.shape[0]):
        out_N[n] = row_of[value_N[n] - lowest]


@numba.njit(cache=True, nogil=True)
@no_type_check
def group_by_user(user_E, offsets_U1, order_E):
    """Fill the CSR offsets and the stable order of events by user: a counting sort."""
    for event in range(user_E.shape[0]):
        offsets_U1[user_E[event] + 1] += 1
    for user in range(offsets_U1.shape[0] - 1):
        offsets_U1[user + 1] += offsets_U1[user]
    next_U = offsets_U1[:-1].copy()
    for event in range(user_E.shape[0]):
        user = user_E[event]
        order_E[next_U[user]] = event
        next_U[user] += 1


@numba.njit(cache=True, nogil=True)
@no_type_check
def sort_by_time(offsets_U1, low, high, time_E, order_E, sorted_E, unsorted_U):
    """Sort each user's part of `order_E` by `time_E`, ties as they stand, and write the times so.

    A part already in order costs one look. Another of up to `SHORT` events is sorted by insertion,
    each time and its place in the part packed into one integer, so that no two are alike. A longer
    one is left as it stands and marked in `unsorted_U`: insertion takes quadratic time.

    Times are in [0, 2**55).
    """
    key_L = np.empty(SHORT, np.int64)
    event_L = np.empty(SHORT, order_E.dtype)
    for user in range(low, high):
        start = offsets_U1[user]
        length = offsets_U1[user + 1] - start
        rising = True
        latest = 0
        for place in range(length):
            time = time_E[order_E[start + place]]
            sorted_E[start + place] = time
            rising &= latest <= time
            latest = time
        if rising:
            continue
        if length > SHORT:
            unsorted_U[user] = True
            continue
        for place in range(length):
            event_L[place] = order_E[start + place]
            key = sorted_E[start + place] * SHORT + place
            hole = place
            while hole > 0 and key_L[hole - 1] > key:
                key_L[hole] = key_L[hole - 1]
                hole -= 1
            key_L[hole] = key
        for place in range(length):
            sorted_E[start + place] = key_L[place] // SHORT
            order_E[start + place] = event_L[key_L[place] % SHORT]


@numba.njit(cache=True, nogil=True)
@no_type_check
def gather(value_E, order_E, low, high, out_E):
    """Write `value_E[order_E]` for positions `low … high - 1`."""
    for at in range(low, high):
        out_E[at] = value_E[order_E[at]]


@numba.njit(cache=True, nogil=True)
@no_type_check
def count_repeats(offsets_U1, low, high, item_E, time_E, seen_I, repeat_E):
    """Count events whose user, item and time an earlier event has too, and mark them.

    An empty `time_E` means no times: then user and item decide. An empty `repeat_E`: only count.

    Events of one user and time stand together; each such run has a number, and `seen_I` (-1 at
    first) remembers for each item the number of the run that it was last seen in.
    """
    found = 0
    run = 0
    for user in range(low, high):
        for at in range(offsets_U1[user], offsets_U1[user + 1]):
            if at == offsets_U1[user] or (time_E.shape[0] > 0 and time_E[at] != time_E[at - 1]):
                run += 1
            if seen_I[item_E[at]] == run:
                found += 1
                if repeat_E.shape[0] > 0:
                    repeat_E[at] = True
            seen_I[item_E[at]] = run
    return found


@numba.njit(cache=True, nogil=True)
@no_type_check
def _count(item, time, start, end, wanted, moment):
    """Count events of one user that are of an item, and of a time where there are times."""
    found = 0
    if time.shape[0] > 0:
        place = start + np.searchsorted(time[start:end], moment)
        while place < end and time[place] == moment:
            found += item[place] == wanted
            place += 1
        return found
    for place in range(start, end):
        found += item[place] == wanted
    return found


@numba.njit(cache=True, nogil=True)
@no_type_check
def mark_trained_on(own, past, time_N, seen_N):
    """Mark events that training holds more often than the events before them do.

    Users' events are sorted by time, so that a time is found by halving.
    """
    own_item, own_time, own_start, own_end, own_wanted = own
    item, time, start, end, wanted = past
    for n in range(seen_N.shape[0]):
        trained = _count(own_item, own_time, own_start[n], own_end[n], own_wanted[n], time_N[n])
        if trained > 0:
            before = _count(item, time, start[n], end[n], wanted[n], time_N[n])
            seen_N[n] = trained > before

"""Compiled loops: numbering ids, sorting events, finding repeats, walks, a batch's nodes, codes.

Numba compiles and caches them. Functions with `low` and `high` work only on these rows (users or
nodes) and release the interpreter, so that threads share the work. They have `no_type_check`
because numba must see the plain function.

Shape legend: E events or directed edges, U users, N values of one chunk or requested nodes,
V nodes, T neighbours, S slots of a table. Scoring by codes, where a row's score is a sum of one
number for each of its codes: R rows, M codes of a row, C numbers that a code chooses among, N all
codes or numbers in one row, B queries, K list length, X left out, F found. Positions are unsigned
if possible, because numba then skips the check for negative ones.
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
    """Sort each user's part of `order_E` by `time_E`, a stable sort, and write the times.

    A part that is already sorted costs one pass. A part of up to `SHORT` events is sorted by
    insertion, with each time and its position packed into one integer, so that no two are equal. A
    longer part is not changed and is marked in `unsorted_U`, because insertion takes quadratic
    time.

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

    An empty `time_E` means no times: only user and item are compared. With an empty `repeat_E`,
    repeats are only counted.

    Events of one user and time are adjacent; each such run has a number, and `seen_I` (initially
    -1) keeps for each item the number of the run in which it was last seen.
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
def _count_equal(item, time, start, end, wanted, moment):
    """Count one user's events of an item, at a given time if there are times."""
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
    """Mark events that training holds more often than the preceding events do.

    Each user's events are sorted by time, so that a time is found by binary search.
    """
    own_item, own_time, own_start, own_end, own_wanted = own
    item, time, start, end, wanted = past
    for n in range(seen_N.shape[0]):
        trained = _count_equal(
            own_item, own_time, own_start[n], own_end[n], own_wanted[n], time_N[n]
        )
        if trained > 0:
            before = _count_equal(item, time, start[n], end[n], wanted[n], time_N[n])
            seen_N[n] = trained > before


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@numba.njit(cache=True, nogil=True, inline="always")
@no_type_check
def _mixed(word):
    """Scramble 64 bits: the last steps of SplitMix64 (Steele et al., OOPSLA 2014)."""
    word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return word ^ (word >> np.uint64(31))


@numba.njit(cache=True, nogil=True)
@no_type_check
def most_visited(
    node_N,
    low,
    high,
    offsets_V1,
    neighbour_E,
    total_E,
    walks,
    hops,
    threshold,
    seed,
    first,
    last,
    out_NT,
    weight_NT,
):
    """Fill rows `low … high - 1`.

    Visits are counted in a hash table with twice as many slots, which fits in the core's cache.
    """
    slots = 2
    while slots < 2 * walks * hops:
        slots *= 2
    key_S = np.full(slots, -1, np.int32)
    count_S = np.zeros(slots, np.int32)
    used = np.empty(walks * hops, np.int64)
    here_W = np.empty(walks, np.int32)
    best_T = np.empty(out_NT.shape[1], np.int64)
    times_T = np.empty(out_NT.shape[1], np.int32)
    for row in range(low, high):
        start = node_N[row]
        if offsets_V1[start + 1] == offsets_V1[start]:
            continue
        stream = _mixed(seed + _mixed(np.uint64(start) * _GOLDEN + np.uint64(1)))
        here_W[:] = start
        num_used = 0
        for _hop in range(hops):
            stream = _hop_all(here_W, start, stream, threshold, offsets_V1, neighbour_E, total_E)
            num_used = _count(here_W, start, first, last, key_S, count_S, used, num_used)
        found = _keep_best(key_S, count_S, used[:num_used], best_T, times_T)
        total = times_T[:found].sum()
        for place in range(found):
            out_NT[row, place] = best_T[place]
            weight_NT[row, place] = times_T[place] / total


@numba.njit(cache=True, nogil=True)
@no_type_check
def _hop_all(here_W, start, stream, threshold, offsets_V1, neighbour_E, total_E):
    """Move each walk by one hop; return the new state of the random numbers."""
    half, low_bits = np.uint64(32), np.uint64(0xFFFFFFFF)
    for walk in range(here_W.shape[0]):
        stream += _GOLDEN
        random = _mixed(stream)
        here = start if (random & low_bits) < threshold else here_W[walk]
        begin, end = offsets_V1[here], offsets_V1[here + 1]
        if total_E.shape[0] > 0:
            aim = np.float64(random >> half) * 2.0**-32 * total_E[end - 1]
            begin += np.searchsorted(total_E[begin : end - 1], aim, side="right")
        else:
            begin += np.int64((random >> half) * np.uint64(end - begin) >> half)
        here_W[walk] = neighbour_E[begin]
    return stream


@numba.njit(cache=True, nogil=True)
@no_type_check
def _count(here_W, start, first, last, key_S, count_S, used, num_used):
    """Count the positions of the walks; return the number of used slots of the table."""
    slots, shift = key_S.shape[0], np.uint64(64)
    while slots > 1:
        slots, shift = slots >> 1, shift - np.uint64(1)
    for walk in range(here_W.shape[0]):
        here = here_W[walk]
        if here == start or here < first or here >= last:
            continue
        slot = np.int64((np.uint64(here) * _GOLDEN) >> shift)
        while key_S[slot] != here and key_S[slot] != -1:
            slot = (slot + 1) & (key_S.shape[0] - 1)
        if key_S[slot] == -1:
            key_S[slot] = here
            used[num_used] = slot
            num_used += 1
        count_S[slot] += 1
    return num_used


@numba.njit(cache=True, nogil=True)
@no_type_check
def _keep_best(key_S, count_S, used, best_T, times_T):
    """Write the most visited nodes in order and empty the table; return their number."""
    top, found = best_T.shape[0], 0
    for slot in used:
        node, times = key_S[slot], count_S[slot]
        key_S[slot], count_S[slot] = -1, 0
        if found == top and not _before(times, node, times_T[top - 1], best_T[top - 1]):
            continue
        found = min(found + 1, top)
        hole = found - 1
        while hole > 0 and _before(times, node, times_T[hole - 1], best_T[hole - 1]):
            best_T[hole], times_T[hole] = best_T[hole - 1], times_T[hole - 1]
            hole -= 1
        best_T[hole], times_T[hole] = node, times
    return found


@numba.njit(cache=True, nogil=True, inline="always")
@no_type_check
def _before(times, node, other_times, other_node):
    """Return whether a node comes first: more visits, or equal visits and a lower number."""
    return times > other_times or (times == other_times and node < other_node)


@numba.njit(cache=True, nogil=True)
@no_type_check
def uniform(node_N, low, high, offsets_V1, neighbour_E, seed, first, last, out_NT, weight_NT):
    """Fill rows `low … high - 1` by selection sampling (Fan et al., JASA 1962)."""
    top = out_NT.shape[1]
    for row in range(low, high):
        node = node_N[row]
        left = 0
        for at in range(offsets_V1[node], offsets_V1[node + 1]):
            if first <= neighbour_E[at] < last:
                left += 1
        wanted = min(top, left)
        state = _mixed(seed + _mixed(np.uint64(node) * _GOLDEN + np.uint64(1)))
        found = 0
        for at in range(offsets_V1[node], offsets_V1[node + 1]):
            if not first <= neighbour_E[at] < last:
                continue
            state += _GOLDEN
            if (_mixed(state) >> np.uint64(32)) * np.uint64(left) < (
                np.uint64(wanted - found) << np.uint64(32)
            ):
                out_NT[row, found] = neighbour_E[at]
                weight_NT[row, found] = 1 / wanted
                found += 1
            left -= 1


@numba.njit(cache=True, nogil=True)
@no_type_check
def nodes_below(node_R, neighbour_VT):
    """Return the start of each row's edges, the distinct nodes below, and each node's row there."""
    row_of_V = np.full(neighbour_VT.shape[0], -1, np.int32)
    offsets_R1 = np.zeros(node_R.shape[0] + 1, np.int32)
    for row in range(node_R.shape[0]):
        node = node_R[row]
        row_of_V[node] = 0
        place = 0
        while place < neighbour_VT.shape[1] and neighbour_VT[node, place] >= 0:
            row_of_V[neighbour_VT[node, place]] = 0
            place += 1
        offsets_R1[row + 1] = offsets_R1[row] + place
    node_S = np.flatnonzero(row_of_V == 0).astype(np.int32)
    for row in range(node_S.shape[0]):
        row_of_V[node_S[row]] = row
    return offsets_R1, node_S, row_of_V


@numba.njit(cache=True, nogil=True)
@no_type_check
def edges_below(node_R, offsets_R1, row_of_V, neighbour_VT, weight_VT):
    """Return the row below and the weight of each edge."""
    source_E = np.empty(offsets_R1[-1], np.int32)
    weight_E = np.empty(offsets_R1[-1], np.float32)
    for row in range(node_R.shape[0]):
        begin = offsets_R1[row]
        for place in range(offsets_R1[row + 1] - begin):
            source_E[begin + place] = row_of_V[neighbour_VT[node_R[row], place]]
            weight_E[begin + place] = weight_VT[node_R[row], place]
    return source_E, weight_E


@numba.njit(cache=True, nogil=True)
@no_type_check
def turned(offsets_R1, source_E, weight_E, num_below):
    """Return the edges sorted by their row below, with a counting sort."""
    back_S1 = np.zeros(num_below + 1, np.int32)
    for source in source_E:
        back_S1[source + 1] += 1
    for below in range(num_below):
        back_S1[below + 1] += back_S1[below]
    next_S = back_S1[:-1].copy()
    target_E = np.empty_like(source_E)
    back_weight_E = np.empty_like(weight_E)
    for row in range(offsets_R1.shape[0] - 1):
        for edge in range(offsets_R1[row], offsets_R1[row + 1]):
            at = next_S[source_E[edge]]
            target_E[at], back_weight_E[at] = row, weight_E[edge]
            next_S[source_E[edge]] = at + 1
    return target_E, back_weight_E, back_S1


CODES = 256
BLOCK = 1024
"""Number of rows scored at a time; their scores fit in the first-level cache."""
_U = np.uint64


@numba.njit(cache=True, nogil=True)
@no_type_check
def _eight(code_N, part_N, num_parts, m, first, sum_b):
    """Add the numbers of codes m … m + 7 of the rows from `first` on; with m = 0, write them."""
    p = part_N[CODES * m :]
    p1, p2, p3, p4 = p[CODES:], p[2 * CODES :], p[3 * CODES :], p[4 * CODES :]
    p5, p6, p7 = p[5 * CODES :], p[6 * CODES :], p[7 * CODES :]
    n = _U(first * num_parts + m)
    for row in range(sum_b.shape[0]):
        low = p[code_N[n]] + p1[code_N[n + _U(1)]] + (p2[code_N[n + _U(2)]] + p3[code_N[n + _U(3)]])
        high = p4[code_N[n + _U(4)]] + p5[code_N[n + _U(5)]]
        high += p6[code_N[n + _U(6)]] + p7[code_N[n + _U(7)]]
        sum_b[row] = low + high + sum_b[row] if m else low + high
        n += _U(num_parts)


@numba.njit(cache=True, nogil=True)
@no_type_check
def _sum_block(code_RM, part_MC, first, sum_b):
    """Write the sums of the rows from `first` on."""
    num_parts, code_N, part_N = code_RM.shape[1], code_RM.ravel(), part_MC.ravel()
    whole = num_parts // 8 * 8
    if not whole:
        sum_b[:] = 0.0
    for m in range(0, whole, 8):
        _eight(code_N, part_N, num_parts, m, first, sum_b)
    for m in range(whole, num_parts):
        part_C, n = part_N[CODES * m :], _U(first * num_parts + m)
        for row in range(sum_b.shape[0]):
            sum_b[row] += part_C[code_N[n]]
            n += _U(num_parts)


@numba.njit(cache=True, nogil=True)
@no_type_check
def code_sums(code_RM, part_BMC, sum_BR):
    """Write every row's sum for each query."""
    num_rows = code_RM.shape[0]
    for query in range(part_BMC.shape[0]):
        for first in range(0, num_rows, BLOCK):
            last = min(first + BLOCK, num_rows)
            _sum_block(code_RM, part_BMC[query], first, sum_BR[query, first:last])


@numba.njit(cache=True, nogil=True)
@no_type_check
def best_by_codes(code_RM, part_BMC, left_out_R, left_out_BX, score_BK, row_BK):
    """Write the best K rows for each query, ties to the lower row, in the order of the rows.

    If fewer are left, the rest is not changed. `left_out_R` is changed and restored.
    """
    for query in range(part_BMC.shape[0]):
        before_X = _leave_out(left_out_R, left_out_BX[query])
        _best(code_RM, part_BMC[query], left_out_R, score_BK[query], row_BK[query])
        for x in range(before_X.shape[0]):
            if not before_X[x]:
                left_out_R[left_out_BX[query, x]] = False


@numba.njit(cache=True, nogil=True)
@no_type_check
def _leave_out(left_out_R, row_X):
    """Mark rows (-1 is skipped); return the rows that were marked before."""
    before_X = np.ones(row_X.shape[0], np.bool_)
    for x in range(row_X.shape[0]):
        if row_X[x] >= 0:
            before_X[x] = left_out_R[row_X[x]]
            left_out_R[row_X[x]] = True
    return before_X


@numba.njit(cache=True, nogil=True)
@no_type_check
def _best(code_RM, part_MC, left_out_R, score_K, row_K):
    """Write the best K rows: gather rows above the K-th best so far, and prune them."""
    num_rows, k = code_RM.shape[0], score_K.shape[0]
    full = max(2 * k, 256)
    found_F, row_F = np.empty(full + BLOCK, np.float32), np.empty(full + BLOCK, np.int64)
    sum_b = np.empty(BLOCK, np.float32)
    num, lowest = 0, np.float32(-np.inf)
    for first in range(0, num_rows, BLOCK):
        last = min(first + BLOCK, num_rows)
        _sum_block(code_RM, part_MC, first, sum_b[: last - first])
        above = 0
        for place in range(last - first):
            above += sum_b[place] > lowest
        for place in range(last - first if above else 0):
            if sum_b[place] > lowest and not left_out_R[first + place]:
                found_F[num], row_F[num] = sum_b[place], first + place
                num += 1
        if num >= full:
            lowest, num = _keep_best_codes(found_F, row_F, num, k), k
    if num > k:
        _keep_best_codes(found_F, row_F, num, k)
        num = k
    score_K[:num], row_K[:num] = found_F[:num], row_F[:num]


@numba.njit(cache=True, nogil=True)
@no_type_check
def _keep_best_codes(found_F, row_F, num, k):
    """Move the best k of `num` to the front, rows in ascending order; return the lowest score."""
    lowest = np.partition(found_F[:num], num - k)[num - k]
    equal = k
    for place in range(num):
        equal -= found_F[place] > lowest
    kept = 0
    for place in range(num):
        take = found_F[place] > lowest
        if not take and equal > 0 and found_F[place] == lowest:
            take, equal = True, equal - 1
        if take:
            found_F[kept], row_F[kept] = found_F[place], row_F[place]
            kept += 1
    return lowest

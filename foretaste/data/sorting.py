"""From events in file order to events by user and time: the CSR that `Interactions` holds.

Shape legend: E events, U users, I items.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from jaxtyping import Bool, Int32, Int64, Integer, Shaped

from foretaste.data.read_config import Duplicates
from foretaste.later import later

if TYPE_CHECKING:
    from foretaste.data import csr
else:
    csr = later("foretaste.data.csr")

_T = TypeVar("_T")
_PARTS = min(8, os.cpu_count() or 1)


@dataclass(frozen=True, eq=False, kw_only=True)
class Sorting:
    """Where every event goes: sorted position p holds the event that stood at `order_E[p]`."""

    offsets_U1: Int64[np.ndarray, " U1"]
    order_E: Integer[np.ndarray, " E"]
    time_E: Int64[np.ndarray, " E"] | None
    """Already sorted; None where there are no times."""

    def apply(self, value_E: Shaped[np.ndarray, " N"]) -> Shaped[np.ndarray, " E"]:
        """Return a column of the file's events in sorted order."""
        out_E = np.empty(len(self.order_E), value_E.dtype)
        bounds = np.linspace(0, len(out_E), _PARTS + 1).astype(np.int64)
        _in_parts(bounds, lambda low, high: csr.gather(value_E, self.order_E, low, high, out_E))
        return out_E

    def keep(self, keep_E: Bool[np.ndarray, " E"]) -> "Sorting":
        """Return the sorting without the positions where `keep_E` is false."""
        kept_before = np.concatenate([[0], np.cumsum(keep_E, dtype=np.int64)])
        return replace(
            self,
            offsets_U1=kept_before[self.offsets_U1],
            order_E=self.order_E[keep_E],
            time_E=None if self.time_E is None else self.time_E[keep_E],
        )


def compile_loops() -> None:
    """Have the loops that reading needs compiled, or loaded from numba's cache.

    Done beside the reading of a large table, which leaves the interpreter to others.
    """
    ids_N, row_N = frozen(np.zeros(1, np.int64)), np.zeros(1, np.int32)
    csr.mark_present(ids_N, 0, np.zeros(1, np.bool_))
    csr.look_up(ids_N, 0, np.zeros(1, np.int32), row_N)
    sorting = sort_by_time(group_events(row_N, num_users=1), ids_N)
    find_repeats(sorting, sorting.apply(row_N), num_items=1, keep="keep")


def frozen(array: Shaped[np.ndarray, " N"]) -> Shaped[np.ndarray, " N"]:
    """Return a read-only view, as Polars gives most columns: one compilation serves all."""
    view = array.view()
    view.flags.writeable = False
    return view


def group_events(user_E: Int32[np.ndarray, " E"], *, num_users: int) -> Sorting:
    """Bring each user's events together, in the order of the file.

    Args:
        user_E: In `[0, num_users)`.
        num_users: How many users there are, those without an event included.
    """
    offsets_U1 = np.zeros(num_users + 1, np.int64)
    order_E = np.empty(len(user_E), np.int32 if len(user_E) < 2**31 else np.int64)
    csr.group_by_user(user_E, offsets_U1, order_E)
    return Sorting(offsets_U1=offsets_U1, order_E=order_E, time_E=None)


def sort_by_time(grouped: Sorting, time_E: Int64[np.ndarray, " E"]) -> Sorting:
    """Put each user's events in order of time, oldest first, ties as they stand.

    Args:
        grouped: From `group_events`; its `order_E` is changed in place.
        time_E: Of the events in the order of the file, in any unit, in `[0, 2**55)`.
    """
    offsets_U1, order_E = grouped.offsets_U1, grouped.order_E
    sorted_E, unsorted_U = np.empty_like(time_E), np.zeros(len(offsets_U1) - 1, np.bool_)
    _in_parts(
        _user_bounds(offsets_U1),
        lambda low, high: csr.sort_by_time(
            offsets_U1, low, high, time_E, order_E, sorted_E, unsorted_U
        ),
    )
    for user in np.flatnonzero(unsorted_U):
        part = slice(offsets_U1[user], offsets_U1[user + 1])
        oldest_first = np.argsort(sorted_E[part], kind="stable")
        sorted_E[part], order_E[part] = sorted_E[part][oldest_first], order_E[part][oldest_first]
    return replace(grouped, time_E=sorted_E)


def find_repeats(
    sorting: Sorting, item_E: Int32[np.ndarray, " E"], *, num_items: int, keep: Duplicates
) -> tuple[int, Bool[np.ndarray, " E"] | None]:
    """Count the events that repeat another's user, item and time (user and item without times).

    Args:
        sorting: Of the events.
        item_E: Sorted like it, in `[0, num_items)`.
        num_items: How many items there are.
        keep: "first" or "last" marks all but the first or last of those that are alike.

    Returns:
        How many there are beyond the first of each, and, unless `keep` is "keep", a mask that is
        true for them.
    """
    offsets_U1, time_E = sorting.offsets_U1, sorting.time_E
    time_E = np.empty(0, np.int64) if time_E is None else time_E
    if keep == "last":  # the last is the first of the reverse
        item_E, time_E = item_E[::-1].copy(), time_E[::-1].copy()
        offsets_U1 = (offsets_U1[-1] - offsets_U1)[::-1].copy()
    repeat_E = np.zeros(0 if keep == "keep" else len(item_E), np.bool_)
    found = _in_parts(
        _user_bounds(offsets_U1),
        lambda low, high: csr.count_repeats(
            offsets_U1, low, high, item_E, time_E, np.full(num_items, -1, np.int64), repeat_E
        ),
    )
    mask = {"keep": None, "first": repeat_E, "last": repeat_E[::-1]}[keep]
    return sum(found), mask


def _user_bounds(offsets_U1: Int64[np.ndarray, " U1"]) -> Int64[np.ndarray, " parts1"]:
    """Cut the users into ranges of about as many events each, one for each thread."""
    targets = np.linspace(0, offsets_U1[-1], _PARTS + 1).astype(np.int64)
    bounds = np.searchsorted(offsets_U1, targets, side="left")
    bounds[0], bounds[-1] = 0, len(offsets_U1) - 1
    return np.maximum.accumulate(bounds)


def _in_parts(bounds: Int64[np.ndarray, " parts1"], work: Callable[[int, int], _T]) -> list[_T]:
    """Call `work(low, high)` for each range between two bounds, each in a thread of its own."""
    with ThreadPoolExecutor(len(bounds) - 1) as pool:
        return list(pool.map(work, bounds[:-1].tolist(), bounds[1:].tolist()))

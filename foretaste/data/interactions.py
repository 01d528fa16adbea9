"""Events of users and items, in order of time: the one data object of foretaste."""

import hashlib
import math
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TypeVar

import numpy as np
import polars as pl
from jaxtyping import Bool, Int32, Int64, Integer, Shaped

from foretaste.arguments import checked, checked_class
from foretaste.data.arrays import count_before, pick
from foretaste.data.columns import kept
from foretaste.data.read_config import Duplicates
from foretaste.data.vocabulary import Vocabulary, check_rows, text_buffers
from foretaste.errors import ConfigError, DataError, nearest
from foretaste.later import later
from foretaste.shown import Shown

_BLOCK = 1 << 24
_EACH_USER = 1 << 24
"""Up to this many events, the user of each is kept in memory after its first use."""


@checked_class
@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Interactions(Shown):
    """Events in columns, sorted by user and, within a user, oldest first (CSR).

    User `u` owns rows `offsets[u]` to `offsets[u + 1]` of every column. Columns may be memory
    maps. Both vocabularies may hold ids without an event here: the parts of a split share them.

    Shape legend: E events, U users, I items, P links of users, Q of items.
    """

    users: Vocabulary
    items: Vocabulary
    offsets: Int64[np.ndarray, " U1"]
    """U + 1 positions, from 0 to E, non-decreasing."""
    item_idx: Int32[np.ndarray, " E"]
    """In [0, I)."""
    timestamp_s: Int64[np.ndarray, " E"] | None = None
    """Unix seconds; None where the table has no times and the order of the file counts as time."""
    columns: Mapping[str, Shaped[np.ndarray, " E"]] = field(default_factory=dict)
    """Further columns of numbers, such as `rating` (float32): what is to be predicted."""
    context: pl.DataFrame | None = None
    """One row per event; the caller's other columns of the context, such as the hour or the
    place: what is known at a request. Columns here and in the two tables below are brought
    into the types of `column_types`."""
    user_table: pl.DataFrame | None = None
    """One row per user_idx; the caller's other columns about users."""
    item_table: pl.DataFrame | None = None
    """One row per item_idx; the caller's other columns about items (a `title`, say)."""
    user_links: Int32[np.ndarray, "2 P"] | None = None
    """Pairs of user_idx: the first trusts the second. They belong to no event, so every part keeps
    all of them."""
    item_links: Int32[np.ndarray, "2 Q"] | None = None
    """Pairs of item_idx that belong together; every part keeps all of them."""
    positive: str = ""
    """The column whose values above 0 mark positive events. Models recommend from these, and
    histories and the targets of tests hold only these. "": every event is positive."""
    notes: tuple[str, ...] = ()
    """Notes with counts on what reading dropped, merged or assumed."""

    def __post_init__(self) -> None:
        self._check_lengths()
        given = list(self.notes)
        for name in ("context", "user_table", "item_table"):
            table = getattr(self, name)
            if table is not None:
                brought = kept(table, name.replace("_table", " table"))
                given += brought.notes
                object.__setattr__(self, name, brought.frame if brought.frame.width else None)
        object.__setattr__(self, "notes", tuple(given))

    def _check_lengths(self) -> None:
        """Raise an error if parts do not belong to one table.

        Raises:
            DataError: They differ in length.
        """
        num = len(self.item_idx)
        parts: list[tuple[str, np.ndarray | pl.DataFrame | None, int]] = [
            ("offsets", self.offsets, self.num_users + 1),
            ("timestamp_s", self.timestamp_s, num),
            ("context", self.context, num),
            ("user_table", self.user_table, self.num_users),
            ("item_table", self.item_table, self.num_items),
            *((f"columns[{name!r}]", column, num) for name, column in self.columns.items()),
        ]
        for name, part, length in parts:
            if part is not None and len(part) != length:
                raise DataError(
                    f"{name} has {len(part):,} rows where {num:,} events of {self.num_users:,} "
                    f"users and {self.num_items:,} items need {length:,}",
                    name=name,
                    value=len(part),
                )

    def __len__(self) -> int:
        return len(self.item_idx)

    @property
    def num_users(self) -> int:
        return len(self.users)

    @property
    def num_items(self) -> int:
        return len(self.items)

    @cached_property
    def user_idx(self) -> Int32[np.ndarray, " E"]:
        """The user of each event, in [0, U)."""
        return np.repeat(np.arange(self.num_users, dtype=np.int32), np.diff(self.offsets))

    @checked
    def users_at(self, place_B: Int64[np.ndarray, " B"]) -> Int64[np.ndarray, " B"]:
        """Return the user_idx of some events, without a column of all events in memory."""
        if len(self) <= _EACH_USER:
            user_B: np.ndarray = self.user_idx[place_B].astype(np.int64)
        else:
            user_B = np.searchsorted(self.offsets, place_B, side="right") - 1
        return user_B

    @cached_property
    def item_count(self) -> Int64[np.ndarray, " I"]:
        """Number of events of each item here."""
        count_I = np.zeros(self.num_items, dtype=np.int64)
        for first in range(0, len(self), _BLOCK):
            count_I += np.bincount(self.item_idx[first : first + _BLOCK], minlength=self.num_items)
        return count_I

    @checked
    def select(self, keep: Bool[np.ndarray, " E"]) -> "Interactions":
        """Return the events where `keep` is true, under the same vocabularies and tables.

        Memory-mapped columns become maps of temporary files, so memory does not grow.

        Raises:
            DataError: `keep` has another length, or the disk has no room for the temporary files.
        """
        if len(keep) != len(self):
            raise DataError(
                f"keep has {len(keep):,} values, but there are {len(self):,} events",
                name="keep",
                value=len(keep),
            )
        return replace(
            self,
            offsets=count_before(keep, self.offsets),
            item_idx=pick(self.item_idx, keep),
            timestamp_s=None if self.timestamp_s is None else pick(self.timestamp_s, keep),
            columns={name: pick(column, keep) for name, column in self.columns.items()},
            context=None if self.context is None else self.context.filter(pl.Series(keep)),
        )

    @cached_property
    def positive_E(self) -> Bool[np.ndarray, " E"]:
        """Which events are positive."""
        if not self.positive:
            return np.ones(len(self), np.bool_)
        positive_E: Bool[np.ndarray, " E"] = np.asarray(self.columns[self.positive] > 0)
        return positive_E

    @checked
    def history(self, user_idx: int) -> Int32[np.ndarray, " L"]:
        """Return one user's items, oldest first.

        Raises:
            DataError: The row does not exist; `users.find(user_id)` returns the row of an id.
        """
        check_rows(np.array([user_idx]), self.num_users, name="user_idx")
        return self.item_idx[self.offsets[user_idx] : self.offsets[user_idx + 1]]

    @checked
    def fingerprint(self) -> str:
        """Return a SHA-256 of ids, order, times, columns, context and links.

        Equal events have equal fingerprints: the source file, the tables of users and items, and
        the notes do not count.
        """
        digest = hashlib.sha256()
        for part in (*_id_parts(self.users), *_id_parts(self.items)):
            digest.update(part)
        for column in (self.offsets, self.item_idx, self.timestamp_s):
            digest.update(b"-" if column is None else np.ascontiguousarray(column).data)
        for name in sorted(self.columns):
            digest.update(f"{name} {self.columns[name].dtype}\0".encode())
            digest.update(np.ascontiguousarray(self.columns[name]).data)
        for part in () if self.context is None else _context_parts(self.context):
            digest.update(part)
        if self.positive:
            digest.update(f"positive {self.positive}\0".encode())
        for side, links in (("user", self.user_links), ("item", self.item_links)):
            if links is not None:
                digest.update(f"{side}_links {links.shape[1]}\0".encode())
                digest.update(np.ascontiguousarray(links, np.int32).data)
        return digest.hexdigest()

    def _facts(self) -> dict[str, object]:
        columns = [*self.columns, *([] if self.context is None else self.context.columns)]
        counts = {"events": len(self), "users": self.num_users, "items": self.num_items}
        return counts | ({"columns": ", ".join(columns)} if columns else {})


def _id_parts(vocabulary: Vocabulary) -> Iterator[bytes | memoryview]:
    yield f"{vocabulary.ids.dtype} {len(vocabulary)}\0".encode()
    if vocabulary.is_integer:
        yield np.ascontiguousarray(vocabulary.ids.to_numpy()).data
    else:
        yield from (buffer.data for buffer in text_buffers(vocabulary.ids))


def _context_parts(context: pl.DataFrame) -> Iterator[bytes]:
    for column in context.iter_columns():
        yield f"context {column.name} {column.dtype}\0".encode()
        yield from _parts(column)


def _parts(column: pl.Series) -> Iterator[bytes]:
    """Yield the content of a column of any type, independent of its layout in memory."""
    yield column.is_null().to_numpy().tobytes()
    if isinstance(column.dtype, pl.Array):
        column = column.arr.to_list()
    if isinstance(column.dtype, pl.List):
        yield column.list.len().fill_null(0).to_numpy().tobytes()
        yield from _parts(column.drop_nulls().explode())
    elif column.dtype.is_numeric():
        yield column.fill_null(0).to_numpy().tobytes()
    elif column.dtype in (pl.Duration, pl.Time):
        yield column.cast(pl.Int64).fill_null(0).to_numpy().tobytes()
    else:
        for buffer in text_buffers(column.cast(pl.String).fill_null("")):
            yield buffer.tobytes()


loops = later("foretaste.data.loops")

_T = TypeVar("_T")
_PARTS = min(8, os.cpu_count() or 1)


@dataclass(frozen=True, eq=False, kw_only=True)
class Sorting:
    """The new position of every event: sorted position p holds the event at `order_E[p]`."""

    offsets_U1: Int64[np.ndarray, " U1"]
    order_E: Integer[np.ndarray, " E"]
    time_E: Int64[np.ndarray, " E"] | None
    """Already sorted; None if there are no times."""

    def apply(self, value_E: Shaped[np.ndarray, " N"]) -> Shaped[np.ndarray, " E"]:
        """Return a column of the file's events in sorted order."""
        out_E = np.empty(len(self.order_E), value_E.dtype)
        bounds = np.linspace(0, len(out_E), _PARTS + 1).astype(np.int64)
        _in_parts(bounds, lambda low, high: loops.gather(value_E, self.order_E, low, high, out_E))
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
    """Compile the loops that reading needs, or load them from numba's cache.

    This runs beside the reading of a large table, which releases the interpreter.
    """
    ids_N, row_N = frozen(np.zeros(1, np.int64)), np.zeros(1, np.int32)
    loops.mark_present(ids_N, 0, np.zeros(1, np.bool_))
    loops.look_up(ids_N, 0, np.zeros(1, np.int32), row_N)
    sorting = sort_by_time(group_events(row_N, num_users=1), ids_N)
    find_repeats(sorting, sorting.apply(row_N), num_items=1, keep="keep")


def frozen(array: Shaped[np.ndarray, " N"]) -> Shaped[np.ndarray, " N"]:
    """Return a read-only view, like most columns of Polars, so that one compilation serves all."""
    view = array.view()
    view.flags.writeable = False
    return view


def group_events(user_E: Int32[np.ndarray, " E"], *, num_users: int) -> Sorting:
    """Bring each user's events together, in the order of the file.

    Args:
        user_E: In `[0, num_users)`.
        num_users: Number of users, including those without an event.
    """
    offsets_U1 = np.zeros(num_users + 1, np.int64)
    order_E = np.empty(len(user_E), np.int32 if len(user_E) < 2**31 else np.int64)
    loops.group_by_user(user_E, offsets_U1, order_E)
    return Sorting(offsets_U1=offsets_U1, order_E=order_E, time_E=None)


def sort_by_time(grouped: Sorting, time_E: Int64[np.ndarray, " E"]) -> Sorting:
    """Sort each user's events by time, oldest first; ties keep their order.

    Args:
        grouped: From `group_events`; its `order_E` is changed in place.
        time_E: Times in the order of the file, in any unit, in `[0, 2**55)`.
    """
    offsets_U1, order_E = grouped.offsets_U1, grouped.order_E
    sorted_E, unsorted_U = np.empty_like(time_E), np.zeros(len(offsets_U1) - 1, np.bool_)
    _in_parts(
        _user_bounds(offsets_U1),
        lambda low, high: loops.sort_by_time(
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
        sorting: The sorting of the events.
        item_E: Sorted like it, in `[0, num_items)`.
        num_items: How many items there are.
        keep: "first" or "last" marks all but the first or last of equal events.

    Returns:
        The number of repeats beyond the first of each, and, unless `keep` is "keep", a mask of the
        repeats.
    """
    offsets_U1, time_E = sorting.offsets_U1, sorting.time_E
    time_E = np.empty(0, np.int64) if time_E is None else time_E
    if keep == "last":  # the last is the first of the reverse
        item_E, time_E = item_E[::-1].copy(), time_E[::-1].copy()
        offsets_U1 = (offsets_U1[-1] - offsets_U1)[::-1].copy()
    repeat_E = np.zeros(0 if keep == "keep" else len(item_E), np.bool_)
    found = _in_parts(
        _user_bounds(offsets_U1),
        lambda low, high: loops.count_repeats(
            offsets_U1, low, high, item_E, time_E, np.full(num_items, -1, np.int64), repeat_E
        ),
    )
    mask = {"keep": None, "first": repeat_E, "last": repeat_E[::-1]}[keep]
    return sum(found), mask


def _user_bounds(offsets_U1: Int64[np.ndarray, " U1"]) -> Int64[np.ndarray, " parts1"]:
    """Cut the users into one range per thread with about equal numbers of events."""
    targets = np.linspace(0, offsets_U1[-1], _PARTS + 1).astype(np.int64)
    bounds = np.searchsorted(offsets_U1, targets, side="left")
    bounds[0], bounds[-1] = 0, len(offsets_U1) - 1
    return np.maximum.accumulate(bounds)


def _in_parts(bounds: Int64[np.ndarray, " parts1"], work: Callable[[int, int], _T]) -> list[_T]:
    """Call `work(low, high)` for each range between two bounds, each in a thread of its own."""
    with ThreadPoolExecutor(len(bounds) - 1) as pool:
        return list(pool.map(work, bounds[:-1].tolist(), bounds[1:].tolist()))


def no_column(events: Interactions, column: str, wanted: str) -> ConfigError:
    """Return the error for a column of numbers that events do not have.

    Args:
        events: The events, which may have other columns.
        column: Its name.
        wanted: What needs it, as the beginning of the sentence.
    """
    start = f"{wanted}, and "
    if events.context is not None and column in events.context.columns:
        return ConfigError(
            f"{start}that is in the context of the events: name it with columns= when reading",
            name="columns",
            column=column,
            value=column,
        )
    if not events.columns:
        return ConfigError(
            f"{start}the events have none: name it with columns= when reading",
            name="columns",
            column=column,
            value=column,
        )
    near = nearest(column, events.columns)
    advice = f"did you mean {near!r}?" if near else "name it with columns= when reading"
    return ConfigError(
        f"{start}the events have {', '.join(map(repr, events.columns))}: {advice}",
        name="columns",
        column=column,
        value=column,
    )


def mean_count(events: Interactions) -> float:
    """Return the geometric mean of the events per user and per item, of those with events."""
    num_users = np.count_nonzero(np.diff(events.offsets))
    num_items = np.count_nonzero(events.item_count)
    return len(events) / math.sqrt(num_users * num_items) if num_users else 0.0


def positives_of(events: Interactions, positive: str = "") -> Interactions:
    """Return the positive events, which have a value above 0 in a column.

    Args:
        events: Any.
        positive: The column; "": `Interactions.positive` of the events.

    Raises:
        ConfigError: There is no such column.
    """
    if not (positive or events.positive):
        return events
    return events.select(is_positive(events, positive))


def is_positive(events: Interactions, positive: str) -> Bool[np.ndarray, " E"]:
    """Return a mask of the events with a value above 0 in a column; "": `Interactions.positive`."""
    if not positive:
        return events.positive_E
    if positive not in events.columns:
        raise no_column(events, positive, f"positive is column {positive!r}")
    happened_E: Bool[np.ndarray, " E"] = events.columns[positive] > 0
    return happened_E

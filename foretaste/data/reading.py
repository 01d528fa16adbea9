"""Reading a table of events into `Interactions`: checks, encodes, and sorts by user and time.

Shape legend: E events, U users, I items.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import polars as pl
from jaxtyping import Int32, Int64, Shaped

from foretaste.arguments import settings_as_arguments
from foretaste.data.columns import canonical_ids, canonical_numbers, kept
from foretaste.data.conditions import check_some, columns_in, left_out, positive_note, rows_where
from foretaste.data.interactions import (
    Interactions,
    Sorting,
    compile_loops,
    find_repeats,
    frozen,
    group_events,
    sort_by_time,
)
from foretaste.data.read_config import Duplicates, ReadConfig, ReadTables
from foretaste.data.side_tables import Side, aligned, notes_about, read_side, same_type, with_links
from foretaste.data.tables import Source, find_column, open_source
from foretaste.data.times import Times, canonical_times
from foretaste.data.vocabulary import Vocabulary, number_ids
from foretaste.errors import ConfigError, DataError

EVENTS = "the event table"
"""The name of a table of events in memory, in messages."""
ONE_ITEM = "row"
"""The item of every row in a table without items."""


@settings_as_arguments(ReadTables)
def read_interactions(source: object, read: ReadTables) -> Interactions:
    """Read events from any table and sort each user's by time, ties in the order of the table.

    Integer ids stay integers; ids of every other type become text. Rows of the vocabularies are in
    ascending order of ids. `notes` count what was dropped, merged or assumed.

    Args:
        source: A path or list of paths of text (such as CSV, also gzipped), Parquet or Arrow files;
            or a pandas, Polars, pyarrow or DuckDB table.
        (settings)

    Raises:
        ConfigError: A setting is unknown or has a wrong type.
        DataError: The table cannot be read, lacks a column, holds no event, or holds a value that
            is missing, infinite, or out of range; the message names the value, its row and the fix.
    """
    opened = open_source(
        source,
        separator=read.separator,
        header=read.header,
        encoding=read.encoding,
        missing=read.missing,
        role=EVENTS,
    )
    names = choose_columns(opened, read)
    asked = [
        column
        for name, condition in (("where", read.where), ("positive", read.positive))
        if condition
        for column in columns_in(condition, name, opened.columns)
    ]
    with ThreadPoolExecutor(1) as pool:
        pool.submit(compile_loops)
        wanted = list(dict.fromkeys((*names.all, *asked)))
        frame, notes = opened.read(wanted, names.ids, numbers=names.measured)
    if not frame.height:
        raise DataError(
            f"{opened.name} holds no events: it has columns but no rows", name=opened.name
        )
    chosen, choices = _chosen(frame, read)
    try:
        events = _check(chosen, names, read, [*notes, *choices])
        events.drop_incomplete(opened.name, allowed=read.drop_incomplete)
    except DataError as error:
        if chosen is not frame and error.row is not None:
            error.args = (f"{error} (rows are counted among those that where keeps)",)
        raise
    del frame, chosen
    users, items = _sides(events, read)
    arranged = _arrange(events, users, items, read.duplicates, events.notes)
    arranged = replace(arranged, positive=read.positive)
    has_links = read.user_links is not None or read.item_links is not None
    return with_links(arranged, read) if has_links else arranged


class Names(NamedTuple):
    """Columns of the event table, by role."""

    user: str | None
    item: str | None
    timestamp: str | None
    numbers: Mapping[str, str]
    """The name of a column in the result, and its name in the table."""
    context: tuple[str, ...]

    @property
    def ids(self) -> list[str]:
        return [name for name in (self.user, self.item) if name is not None]

    @property
    def measured(self) -> list[str]:
        """The columns that hold only numbers or times."""
        time = () if self.timestamp is None else (self.timestamp,)
        others = (*self.ids, *self.context)
        return [name for name in (*self.numbers.values(), *time) if name not in others]

    @property
    def all(self) -> list[str]:
        time = () if self.timestamp is None else (self.timestamp,)
        others = (*self.numbers.values(), *self.context)
        return list(dict.fromkeys((*self.ids, *time, *others)))


def choose_columns(source: Source, read: ReadConfig) -> Names:
    """Find the columns that the settings name.

    Raises:
        DataError: A column does not exist, or is named twice.
    """
    numbers = {}
    for wanted in read.columns:
        name = find_column(source, wanted, argument="columns")
        numbers[name] = name
    if read.rating is not None:
        if "rating" in numbers and read.rating != "rating":
            raise DataError(
                "two columns would be called 'rating': leave one out, or rename it", column="rating"
            )
        numbers["rating"] = find_column(source, read.rating, argument="rating")
    names = Names(
        user=_find(source, read.user, "user"),
        item=_find(source, read.item, "item"),
        timestamp=_find(source, read.timestamp, "timestamp"),
        numbers=numbers,
        context=tuple(
            dict.fromkeys(find_column(source, name, argument="context") for name in read.context)
        ),
    )
    named = [name for name in names[:3] if name is not None]
    if len(set(named)) < len(named):
        raise DataError(
            f"user, item and timestamp must be three columns, not {names[:3]}",
            name="columns",
            value=names[:3],
        )
    if not names.all:
        raise DataError(
            "no column is named: set user=, item=, columns= or context=", name="columns"
        )
    return names


def _chosen(frame: pl.DataFrame, read: ReadConfig) -> tuple[pl.DataFrame, list[str]]:
    """Keep only the rows that meet `where`; return them with notes."""
    notes: list[str] = []
    if read.where:
        keep_E = rows_where(frame, read.where, "where")
        check_some(keep_E, read.where, "where")
        notes += left_out(keep_E, read.where)
        frame = frame if keep_E.all() else frame.filter(pl.Series(keep_E))
    if read.positive:
        positive_E = rows_where(frame, read.positive, "positive")
        check_some(positive_E, read.positive, "positive")
        notes.append(positive_note(positive_E, read.positive))
    return frame, notes


def _find(source: Source, wanted: str | int | None, argument: str) -> str | None:
    return None if wanted is None else find_column(source, wanted, argument=argument)


@dataclass(kw_only=True)
class _Events:
    """Checked columns in the order of the table; they are freed once used, to save memory."""

    names: Names
    user: pl.Series
    item: pl.Series
    times: Times | None
    numbers: dict[str, pl.Series]
    context: pl.DataFrame
    """A missing column is left out."""
    notes: list[str] = field(default_factory=list)

    def drop_incomplete(self, source: str, *, allowed: bool) -> None:
        """Leave out empty rows, and incomplete rows if the settings allow it."""
        needed = self._needed()
        if not any(column.null_count() for column in needed.values()):
            return
        every = [*needed.values(), *self.numbers.values(), *self.context.iter_columns()]
        empty = pl.select(pl.all_horizontal(c.is_null().alias(str(n)) for n, c in enumerate(every)))
        empty_E = empty.to_series()
        for name, column in needed.items():
            gaps = column.is_null() & ~empty_E
            if gaps.any() and not allowed:
                others = _true(gaps) - 1
                more = f", and so are {others} more" if others else ""
                why = [note for note in self.notes if note.startswith(f"column {name!r}: ")]
                row = 1 + (gaps.arg_max() or 0)
                raise DataError(
                    f"{source}: column {name!r}, row {row}: the value is missing{more}: "
                    + "; ".join(["fix it, or give drop_incomplete=True", *why]),
                    column=name,
                    row=row,
                )
        keep = pl.select(pl.all_horizontal(c.is_not_null().alias(n) for n, c in needed.items()))
        keep_E = keep.to_series()
        self._filter(keep_E)
        if num_empty := _true(empty_E):
            self.notes.append(f"{num_empty} empty rows were left out")
        if dropped := _true(~keep_E) - num_empty:
            self.notes.append(f"{dropped} incomplete rows were left out")
        if not len(self.user):
            raise DataError(
                f"{source} holds no events: every row is empty or incomplete", name=str(source)
            )

    def _needed(self) -> dict[str, pl.Series]:
        """Return the columns that every event needs."""
        needed = {
            name: ids
            for name, ids in ((self.names.user, self.user), (self.names.item, self.item))
            if name is not None
        }
        if self.times is not None and self.names.timestamp is not None:
            needed[self.names.timestamp] = self.times.ticks
        if "rating" in self.numbers:
            needed[self.names.numbers["rating"]] = self.numbers["rating"]
        return needed

    def _filter(self, keep_E: pl.Series) -> None:
        self.user, self.item = self.user.filter(keep_E), self.item.filter(keep_E)
        if self.times is not None:
            self.times = self.times._replace(ticks=self.times.ticks.filter(keep_E))
        self.numbers = {name: column.filter(keep_E) for name, column in self.numbers.items()}
        self.context = self.context.filter(keep_E) if self.context.width else self.context


def _true(mask: pl.Series) -> int:
    return int(mask.sum() or 0)


def _check(
    frame: pl.DataFrame, names: Names, read: ReadConfig, read_notes: Sequence[str]
) -> _Events:
    notes, times = list(read_notes), None
    if names.timestamp is not None:
        times = canonical_times(
            frame[names.timestamp], read.timestamp_unit, drop_unknown=read.drop_incomplete
        )
    numbers = {
        called: _number_column(frame[name], is_rating=called == "rating")
        for called, name in names.numbers.items()
    }
    if read.positive and read.positive not in numbers:
        numbers[read.positive] = pl.Series(rows_where(frame, read.positive, "positive"))
    if names.user is None:
        notes.append("there is no column of users: every row is its own user")
    if names.item is None:
        notes.append(f"there is no column of items: all rows belong to one item, {ONE_ITEM!r}")
    context, given = kept(frame.select(names.context), "the event table", needed=True)
    return _Events(
        names=names,
        user=pl.int_range(frame.height, dtype=pl.Int64, eager=True)
        if names.user is None
        else canonical_ids(frame[names.user]),
        item=pl.repeat(ONE_ITEM, frame.height, eager=True)
        if names.item is None
        else canonical_ids(frame[names.item]),
        times=times,
        numbers=numbers,
        context=context,
        notes=[*notes, *given],
    )


def _number_column(column: pl.Series, *, is_rating: bool) -> pl.Series:
    numbers = canonical_numbers(column, what="ratings" if is_rating else "kept columns")
    return numbers.cast(pl.Float32) if is_rating else numbers


def _sides(events: _Events, read: ReadTables) -> tuple[Side | None, Side | None]:
    """Read the tables of users and of items, where there are any.

    Raises:
        ConfigError: A key of a table is named, and there is no table.
    """
    found = []
    for role, source, key, like, ids in (
        ("users", read.users, read.user_key, events.names.user, events.user),
        ("items", read.items, read.item_key, events.names.item, events.item),
    ):
        if source is None and key is not None:
            raise ConfigError(
                f"{role[:-1]}_key={key!r} names a column of the table of {role}, and there is "
                f"none: give {role}=, or leave {role[:-1]}_key out",
                name=f"{role[:-1]}_key",
                value=key,
            )
        found.append(None if source is None else read_side(source, key, like, role, read, ids=ids))
    return found[0], found[1]


def _arrange(
    events: _Events,
    users: Side | None,
    items: Side | None,
    duplicates: Duplicates,
    notes: list[str],
) -> Interactions:
    """Number the ids, then sort; a thread groups users while items are numbered."""
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(_number_items, events, items)
        user_vocabulary, user_E = _number(events.user, users)
        events.user = pl.Series()
        sorting = group_events(user_E, num_users=len(user_vocabulary))
        del user_E
        item_vocabulary, row_E, time_E = other.result()
    if time_E is not None:
        sorting = sort_by_time(sorting, time_E)
        del time_E
    sorting = replace(sorting, time_E=_seconds(sorting.time_E, events.times, notes))
    item_E = sorting.apply(row_E)
    found, repeat_E = find_repeats(sorting, item_E, num_items=len(item_vocabulary), keep=duplicates)
    if found:
        what = "user and item" if events.times is None else "user, item and second"
        fate = "kept" if repeat_E is None else f"left out, the {duplicates} of each kept"
        notes.append(f"{found} events repeat the {what} of another: {fate}")
    if found and repeat_E is not None:
        sorting, item_E = sorting.keep(~repeat_E), item_E[~repeat_E]
    user_table = item_table = None
    if users is not None:
        notes += notes_about(user_vocabulary, np.diff(sorting.offsets_U1), users, "users")
        user_table = aligned(user_vocabulary, users)
    if items is not None:
        item_count = np.bincount(item_E, minlength=len(item_vocabulary))
        notes += notes_about(item_vocabulary, item_count, items, "items")
        item_table = aligned(item_vocabulary, items)
    return Interactions(
        users=user_vocabulary,
        items=item_vocabulary,
        offsets=sorting.offsets_U1,
        item_idx=item_E,
        timestamp_s=sorting.time_E,
        columns={name: sorting.apply(_array(column)) for name, column in events.numbers.items()},
        context=_sorted(events.context, sorting),
        user_table=user_table,
        item_table=item_table,
        notes=tuple(notes),
    )


def _number(ids: pl.Series, side: Side | None) -> tuple[Vocabulary, Int32[np.ndarray, " E"]]:
    return number_ids(ids) if side is None else number_ids(*same_type(ids, side))


def _number_items(
    events: _Events, items: Side | None
) -> tuple[Vocabulary, Int32[np.ndarray, " E"], Int64[np.ndarray, " E"] | None]:
    """Number the items, and make the times contiguous."""
    vocabulary, row_E = _number(events.item, items)
    events.item = pl.Series()
    if events.times is None:
        return vocabulary, row_E, None
    time_E = frozen(events.times.ticks.to_numpy())
    events.times = events.times._replace(ticks=pl.Series())
    return vocabulary, row_E, time_E


def _sorted(context: pl.DataFrame, sorting: Sorting) -> pl.DataFrame | None:
    """Put the context's rows in the order of the events."""
    if not context.width:
        return None
    return context.select(pl.all().gather(pl.Series(sorting.order_E)))


def _seconds(
    time_E: Int64[np.ndarray, " E"] | None, times: Times | None, notes: list[str]
) -> Int64[np.ndarray, " E"] | None:
    if time_E is None or times is None:
        return time_E
    notes += times.notes
    if times.per_second == 1:
        return time_E
    if fractions := int(np.count_nonzero(time_E % times.per_second)):
        notes.append(f"{fractions} times had fractions of a second: used for order, not kept")
    return time_E // times.per_second


def _array(column: pl.Series) -> Shaped[np.ndarray, " E"]:
    return (column.fill_null(np.nan) if column.dtype.is_float() else column).to_numpy()

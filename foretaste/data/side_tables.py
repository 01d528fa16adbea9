"""Side tables: one row for each user or item, or links between two of them."""

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import polars as pl
from jaxtyping import Int32, Int64

from foretaste.data.columns import canonical_ids, kept
from foretaste.data.interactions import Interactions
from foretaste.data.read_config import Column, ReadConfig, ReadTables
from foretaste.data.tables import Source, find_column, open_source
from foretaste.data.vocabulary import Vocabulary
from foretaste.errors import DataError


def read_links(
    source: object, vocabulary: Vocabulary, *, role: str, read: ReadConfig
) -> tuple[Int32[np.ndarray, "2 P"], tuple[str, ...]]:
    """Read a table of two columns of ids: users who trust others, or items that go together.

    Args:
        source: Any kind of table; its first two columns count.
        vocabulary: The vocabulary of the ids in both columns.
        role: "users" or "items", for messages.
        read: The settings of the table of events; header, encoding and missing values apply here
            too.

    Returns:
        The rows of both ends, each directed link once; and notes that count what was left out.

    Raises:
        DataError: The table cannot be read, has fewer than two columns, or no known id.
    """
    opened = open_source(
        source,
        header=read.header,
        encoding=read.encoding,
        missing=read.missing,
        role=f"the links of {role}",
    )
    if len(opened.columns) < 2:
        raise DataError(
            f"{opened.name} has one column, but links of {role} need two columns of ids",
            column=opened.columns[0],
        )
    ends = opened.columns[:2]
    frame, notes = opened.read(ends, ends)
    if more := opened.columns[2:]:
        unread = ", ".join(map(repr, more))
        notes = (
            *notes,
            f"of the links of {role} {unread} is not read: all links have the same weight",
        )
    ids = [canonical_ids(frame[end]) for end in ends]
    one_P, other_P = (vocabulary.encode(column) for column in ids)
    known_P, own_P = (one_P >= 0) & (other_P >= 0), one_P == other_P
    if len(known_P) and max(one_P.max(), other_P.max()) < 0:
        raise DataError(
            f"none of the ids in {opened.name} is known: columns {ends[0]!r} and {ends[1]!r} begin "
            f"with {ids[0][0]!r} and {ids[1][0]!r}, the ids of {role} with {vocabulary.ids[0]!r}; "
            "give a table whose first two columns hold these ids",
            column=ends[0],
            row=1,
            value=ids[0][0],
        )
    pair_P2 = np.stack([one_P, other_P], axis=1)[known_P & ~own_P]
    links_P2 = np.unique(pair_P2, axis=0)
    counts = {
        "name an unknown id": int((~known_P).sum()),
        "link an id to itself": int((known_P & own_P).sum()),
        "are repeated": len(pair_P2) - len(links_P2),
    }
    said = [f"{count:,} links of {role} {what} and were left out" for what, count in counts.items()]
    kept = [note for note, count in zip(said, counts.values(), strict=True) if count]
    return np.ascontiguousarray(links_P2.T.astype(np.int32)), (*notes, *kept)


def with_links(events: Interactions, read: ReadTables) -> Interactions:
    """Return the events with links read from tables; their notes say what was left out.

    Raises:
        DataError: A table cannot be read or has fewer than two columns.
    """
    if read.user_links is not None:
        links_2P, notes = read_links(read.user_links, events.users, role="users", read=read)
        events = replace(events, user_links=links_2P, notes=(*events.notes, *notes))
    if read.item_links is not None:
        links_2P, notes = read_links(read.item_links, events.items, role="items", read=read)
        events = replace(events, item_links=links_2P, notes=(*events.notes, *notes))
    return events


_INTEGER = r"^-?(0|[1-9][0-9]*)$"
_ENOUGH = 0.5
"""A table of users or items matches the events if it holds this share of their ids."""
_DISTINCT = 0.9
"""A column may be a key if at least this share of its values is distinct."""


class Side(NamedTuple):
    """A table about users or items."""

    name: str
    """Its name in messages."""
    key: str
    """The column of ids."""
    is_named: bool
    """Whether the caller named the key."""
    ids: pl.Series
    """Distinct."""
    table: pl.DataFrame | None
    """The other columns, in the same order; None if there are none."""
    notes: list[str]


def read_side(
    source: object,
    key: Column | None,
    like: str | None,
    role: str,
    read: ReadConfig,
    *,
    ids: pl.Series,
) -> Side:
    """Read a table of users or items.

    Args:
        source: Any kind of source.
        key: Its column of ids. None: the column named `like`, or else the one that holds the ids of
            the events.
        like: The event table's column of these ids; it is the key if the table has a column of this
            name.
        role: "users" or "items", for messages.
        read: The settings. With `drop_incomplete`, rows without an id are left out.
        ids: The ids of the events.

    Raises:
        DataError: The table cannot be read or is empty, no column is the key, or a row has no id.
    """
    notes = list[str]()
    opened = open_source(
        source,
        header=read.header,
        encoding=read.encoding,
        missing=read.missing,
        role=f"the table of {role}",
    )
    if key is not None:
        name = find_column(opened, key, argument=_setting(role))
    elif like is not None and read.header and like in opened.columns:
        name = find_column(opened, like, argument=_setting(role))
    else:
        name = _find_key(opened, like, ids, role)
        notes.append(f"column {name!r} of {opened.name} holds the ids of the events: it is the key")
    frame, read_notes = opened.read(opened.columns, [name], optional=set(opened.columns) - {name})
    side_ids = canonical_ids(frame[name])
    others, given = kept(frame.drop(name), opened.name)
    notes += [*read_notes, *given]
    if missing := side_ids.null_count():
        if not read.drop_incomplete:
            row = 1 + int(side_ids.is_null().arg_max() or 0)
            raise DataError(
                f"{opened.name}: column {name!r}, row {row}: the value is missing: fix it, or give "
                "drop_incomplete=True",
                column=name,
                row=row,
            )
        others, side_ids = others.filter(side_ids.is_not_null()), side_ids.drop_nulls()
        notes.append(f"{missing} rows of {opened.name} without an id were left out")
    others, side_ids = _first_of_each(others, side_ids, opened.name, notes)
    if ids.dtype == pl.Int64 and (text := _not_integers(side_ids)):
        notes.append(f"the ids of {role} are kept as text, because {opened.name} has {text[0]!r}")
    return Side(
        name=opened.name,
        key=name,
        is_named=key is not None,
        ids=side_ids,
        table=others if others.width else None,
        notes=notes,
    )


def _setting(role: str) -> str:
    return f"{role.removesuffix('s')}_key"


def _first_of_each(
    others: pl.DataFrame, ids: pl.Series, name: str, notes: list[str]
) -> tuple[pl.DataFrame, pl.Series]:
    """Keep the first row of each id; count the repeated rows, and those with different values.

    Raises:
        DataError: The table has no rows.
    """
    if not len(ids):
        raise DataError(
            f"{name} has no rows: leave it out, or give the table of these ids", name=name
        )
    first = ids.is_first_distinct()
    if first.all():
        return others, ids
    rows = others.with_columns(ids.alias("id of the row"))
    differing = rows.unique().height - int(first.sum())
    also = f", and {differing} of them differ from it" if differing else ""
    notes.append(f"{(~first).sum()} rows of {name} repeat an id: its first row was taken{also}")
    return others.filter(first) if others.width else others, ids.filter(first)


def _not_integers(ids: pl.Series) -> list[str]:
    """Return the first id that is not an integer, if there is one."""
    if ids.dtype != pl.String:
        return []
    return ids.filter(~ids.str.contains(_INTEGER)).head(1).to_list()


def _find_key(opened: Source, like: str | None, ids: pl.Series, role: str) -> str:
    """Return the column that holds the ids of the events; if two columns do, the first.

    Raises:
        DataError: No column holds them, or several later columns do.
    """
    columns = opened.columns
    if not columns:
        raise DataError(f"{opened.name} has no columns: leave it out", name=opened.name)
    fitting = _fitting(
        kept(opened.read(columns, columns, optional=columns).frame, "the table").frame, ids
    )
    best = [name for name, share in fitting.items() if share == max(fitting.values())]
    if columns[0] in best or len(best) == 1:
        return columns[0] if columns[0] in best else best[0]
    has = "" if like is None else f"no column {like!r}, and "
    fits = (
        f"{' and '.join(map(repr, best))} each hold the ids of the events"
        if best
        else f"none of its columns holds the ids of the events, which are like {ids[0]!r}"
    )
    raise DataError(
        f"{opened.name} has {has}{fits}: set {_setting(role)}=NAME, one of "
        f"{', '.join(map(repr, columns[:30]))}",
        name=_setting(role),
        value=ids[0],
    )


def _fitting(frame: pl.DataFrame, ids: pl.Series) -> dict[str, float]:
    """Return the columns that may be a key, and the share of the events' ids that each holds."""
    wanted, shares = ids.unique().cast(pl.String), {}
    for column in frame.iter_columns():
        if not (column.dtype.is_integer() or column.dtype in (pl.String, pl.Date)):
            continue
        texts = column.cast(pl.String).drop_nulls()
        values = texts.unique()
        share = wanted.is_in(values.implode()).mean()
        if len(values) > _DISTINCT * len(texts) and isinstance(share, float) and share >= _ENOUGH:
            shares[column.name] = share
    return shares


def same_type(ids: pl.Series, side: Side) -> tuple[pl.Series, pl.Series]:
    """Convert the ids of events and of a side table to one type: integers if both can be."""
    if ids.dtype == side.ids.dtype:
        return ids, side.ids
    if ids.dtype == pl.Int64 and side.ids.str.contains(_INTEGER).all():
        return ids, side.ids.cast(pl.Int64)
    return ids.cast(pl.String), side.ids.cast(pl.String)


def notes_about(
    vocabulary: Vocabulary, count: Int64[np.ndarray, " N"], side: Side, role: str
) -> list[str]:
    """Return notes on rows that were left out, and on ids that only one of the two tables has.

    Raises:
        DataError: The key holds none of the ids with events; or the caller did not name the key, it
            holds fewer than half of them, and another column holds more.
    """
    active, cold = int((count > 0).sum()), int((count == 0).sum())
    bare, notes = len(vocabulary) - len(side.ids), list(side.notes)
    if bare > (1 - _ENOUGH) * active:
        fitting = _fitting(
            side.table if side.table is not None else pl.DataFrame(),
            vocabulary.ids.filter(pl.Series(count > 0)),
        )
        if bare == active or (fitting and not side.is_named):
            raise _unfit(side, vocabulary.ids[int(count.argmax())], active - bare, fitting, role)
    if cold:
        notes.append(f"{cold} {role} of the table of {role} have no event")
    if bare:
        notes.append(f"{bare} of {active} {role} with events are not in the table of {role}")
    return notes


def _unfit(side: Side, seen: object, found: int, fitting: dict[str, float], role: str) -> DataError:
    """Return the error for a table whose key holds few of the events' ids."""
    setting = _setting(role)
    if fitting:
        better = max(fitting, key=lambda name: fitting[name])
        advice = f"set {setting}={better!r}, which holds more of them"
    else:
        advice = f"set {setting}=NAME if another column holds them, or give the table of these ids"
    if found:
        advice += f", or {setting}={side.key!r} if it is right nevertheless"
    return DataError(
        f"column {side.key!r} of {side.name} was taken for the ids of {role}, such as "
        f"{side.ids[0]!r}, and holds {found or 'none'} of those with events, such as {seen!r}: "
        f"{advice}",
        name=setting,
        column=side.key,
        value=side.ids[0],
    )


def aligned(vocabulary: Vocabulary, side: Side) -> pl.DataFrame | None:
    """Put a side table's rows in the order of the vocabulary; missing rows are null."""
    if side.table is None:
        return None
    row_of = np.full(len(vocabulary), -1, np.int64)
    row_of[vocabulary.encode(side.ids)] = np.arange(len(side.ids))
    rows = pl.Series(row_of)
    return side.table.select(pl.all().gather(rows.set(rows < 0, None)))

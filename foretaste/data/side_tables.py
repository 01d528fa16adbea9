"""Tables about users and items, beside the table of events.

Shape legend: N users, or items.
"""

from typing import NamedTuple

import numpy as np
import polars as pl
from jaxtyping import Int64

from foretaste.data.columns import at_row, canonical_ids, storable
from foretaste.data.read_config import ReadConfig
from foretaste.data.tables import find_column, open_source
from foretaste.data.vocabulary import Vocabulary
from foretaste.errors import DataError

_INTEGER = r"^-?(0|[1-9][0-9]*)$"


class Side(NamedTuple):
    """A table about users or items."""

    ids: pl.Series
    """Distinct."""
    table: pl.DataFrame | None
    """The other columns, in the same order; None where there are none."""
    notes: list[str]


def read_side(source: object, key: str | None, role: str, read: ReadConfig) -> Side | None:
    """Read one; None where there is none.

    Args:
        source: Any kind of source.
        key: The event table's column of these ids; where the table has none so named, its first.
        role: "users" or "items", for messages.
        read: How; where it drops incomplete rows, those without an id are left out.

    Raises:
        DataError: It cannot be read, or a row has no id.
    """
    if source is None:
        return None
    opened = open_source(
        source,
        header=read.header,
        encoding=read.encoding,
        missing=read.missing,
        role=f"the table of {role}",
    )
    columns = opened.columns
    key = key if key is not None and read.header and key in columns else columns[0]
    frame, read_notes = opened.read(
        columns, [find_column(opened, key, argument=role)], optional=set(columns) - {key}
    )
    ids, notes = canonical_ids(frame[key]), list(read_notes)
    if missing := ids.null_count():
        if not read.drop_incomplete:
            raise DataError(
                f"{opened.name}: column {key!r}, {at_row(ids, ids.is_null())} is missing: fix it, "
                "or say drop_incomplete=True"
            )
        frame, ids = frame.filter(ids.is_not_null()), ids.drop_nulls()
        notes.append(f"{missing} rows of {opened.name} without an id were left out")
    first = ids.is_first_distinct()
    if not first.all():
        notes.append(
            f"{(~first).sum()} rows of {opened.name} repeat an id: its first row was taken"
        )
        frame, ids = frame.filter(first), ids.filter(first)
    others = storable(frame.drop(key))
    return Side(ids, others if others.width else None, notes)


def alike(ids: pl.Series, side: Side | None) -> tuple[pl.Series, pl.Series | None]:
    """Bring the ids of events and of a side table to one type: integers if both can be."""
    if side is None:
        return ids, None
    if ids.dtype == side.ids.dtype:
        return ids, side.ids
    if ids.dtype == pl.Int64 and side.ids.str.contains(_INTEGER).all():
        return ids, side.ids.cast(pl.Int64)
    return ids.cast(pl.String), side.ids.cast(pl.String)


def notes_about(
    vocabulary: Vocabulary, count: Int64[np.ndarray, " N"], side: Side | None, role: str
) -> list[str]:
    """Say what reading the table left out, and who stands in it or among the events alone."""
    if side is None:
        return []
    cold, bare = int((count == 0).sum()), len(vocabulary) - len(side.ids)
    notes = list(side.notes)
    if cold:
        notes.append(f"{cold} {role} of the table of {role} have no event")
    if bare:
        notes.append(f"{bare} {role} with events are not in the table of {role}")
    return notes


def aligned(vocabulary: Vocabulary, side: Side | None) -> pl.DataFrame | None:
    """Put a side table's rows in the order of the vocabulary; a missing one is all null."""
    if side is None or side.table is None:
        return None
    row_of = np.full(len(vocabulary), -1, np.int64)
    row_of[vocabulary.encode(side.ids)] = np.arange(len(side.ids))
    rows = pl.Series(row_of)
    return side.table.select(pl.all().gather(rows.set(rows < 0, None)))

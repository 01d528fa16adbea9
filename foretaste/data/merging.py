"""Merging sets of events under one vocabulary, and translating rows between vocabularies.

Row numbers depend on the events that were read: one more user shifts all later rows. So a request
with rows of other events is translated before the model reads it.

Shape legend: E events of all sets, S sets. In a translation: U users and I items of the other
events; X items of these and then those that only the model has; M items of the model; B queries, C
items per query.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import polars as pl
from jaxtyping import Int32, Int64, Shaped, UInt8

from foretaste.data.columns import kept
from foretaste.data.features_values import texts_of
from foretaste.data.interactions import Interactions
from foretaste.data.vocabulary import Vocabulary
from foretaste.errors import DataError


def concatenate(
    sets: Sequence[Interactions], names: Sequence[str] | None = None
) -> tuple[Interactions, UInt8[np.ndarray, " E"]]:
    """Merge sets of events, each user's oldest first.

    Ids keep their rows of the first set; ids of later sets follow. If times tie or are missing,
    events of earlier sets come first. A column that not all sets have is left out and named in the
    notes. Each value of a side table comes from the first set that has it; the notes count
    different values in later sets.

    Args:
        sets: 1 to 255 sets.
        names: Names of the sets in notes; None numbers them.

    Returns:
        The events, and the number of each event's set.

    Raises:
        DataError: There is no set, or a column holds lists in one set and single values in another.
    """
    if not 0 < len(sets) <= 255:
        raise DataError(
            f"{len(sets)} sets of events to put together: give 1 to 255",
            name="sets",
            value=len(sets),
        )
    names = names or [f"set {n}" for n, _ in enumerate(sets, 1)]
    notes = [f"{name}: {said}" for name, s in zip(names, sets, strict=True) for said in s.notes]
    users = _merge([s.users for s in sets], [s.user_table for s in sets], "users", notes)
    items = _merge([s.items for s in sets], [s.item_table for s in sets], "items", notes)
    user_E = np.concatenate([new[s.user_idx] for new, s in zip(users.row_of, sets, strict=True)])
    source_E = np.repeat(np.arange(len(sets), dtype=np.uint8), [len(s) for s in sets])
    time_E, timed = _times(sets)
    order_E = np.lexsort((time_E, user_E) if timed else (user_E,))
    counts_U = np.bincount(user_E, minlength=len(users.vocabulary))
    columns = _columns(sets, order_E, notes)
    item_E = np.concatenate([new[s.item_idx] for new, s in zip(items.row_of, sets, strict=True)])
    merged = Interactions(
        users=users.vocabulary,
        items=items.vocabulary,
        offsets=np.concatenate([[0], np.cumsum(counts_U)]).astype(np.int64),
        item_idx=item_E[order_E],
        timestamp_s=time_E[order_E] if timed else None,
        columns=columns,
        context=_context(sets, order_E, notes),
        user_table=users.table,
        item_table=items.table,
        user_links=_links([s.user_links for s in sets], users.row_of),
        item_links=_links([s.item_links for s in sets], items.row_of),
        positive=_positive(sets),
        notes=tuple(notes),
    )
    return merged, source_E[order_E]


def _positive(sets: Sequence[Interactions]) -> str:
    """Return the column that marks positive events, which is the same in all sets."""
    said = {s.positive for s in sets}
    if len(said) > 1:
        raise DataError(
            f"positive is {' and '.join(map(repr, sorted(said)))} in different sets of events: "
            "read all of them with the same positive=",
            name="positive",
        )
    return said.pop()


@dataclass(frozen=True, eq=False)
class _Side:
    """The users or the items of all sets."""

    vocabulary: Vocabulary
    table: pl.DataFrame | None
    row_of: list[Int32[np.ndarray, " _"]]
    """For each set, the new row of each of its rows."""


def _merge(
    vocabularies: list[Vocabulary],
    tables: list[pl.DataFrame | None],
    role: str,
    notes: list[str],
) -> _Side:
    ids = _of_one_kind([v.ids for v in vocabularies], role, notes)
    vocabulary = Vocabulary(pl.concat(ids).unique(maintain_order=True))
    row_of = [vocabulary.encode(part).astype(np.int32) for part in ids]
    known = [
        _spread(table, rows, len(vocabulary))
        for table, rows in zip(tables, row_of, strict=True)
        if table is not None
    ]
    names = dict.fromkeys(name for table in known for name in table.columns)
    columns = [
        _filled(name, [t[name] for t in known if name in t.columns], role, notes) for name in names
    ]
    return _Side(vocabulary, pl.DataFrame(columns) if columns else None, row_of)


def _of_one_kind(ids: list[pl.Series], role: str, notes: list[str]) -> list[pl.Series]:
    """Return the ids of all sets as integers if all of them are, as text otherwise."""
    if len({part.dtype for part in ids}) == 1:
        return ids
    notes.append(
        f"the ids of {role} are integers in some parts and text in others: they are kept as text"
    )
    return [part.cast(pl.String) for part in ids]


def _spread(table: pl.DataFrame, rows: Int32[np.ndarray, " _"], num_rows: int) -> pl.DataFrame:
    """Move rows to their places in a larger table; the other rows are missing."""
    place = np.full(num_rows, -1, np.int64)
    place[rows] = np.arange(len(rows))
    wanted = pl.Series(place)
    return table.select(pl.all().gather(wanted.set(wanted < 0, None)))


def _filled(name: str, parts: list[pl.Series], role: str, notes: list[str]) -> pl.Series:
    """Return one column of a side table: each row from the first part that has a value there."""
    first, *later = _of_one_type(parts, f"of the table of {role}", notes)
    other = 0
    for part in later:
        other += int((first != part).sum() or 0)  # null where one is missing
        first = pl.select(pl.coalesce(first, part).alias(name)).to_series()
    if other:
        notes.append(
            f"{other:,} {role} have one {name!r} in one part and another in a later part: the "
            "first was kept"
        )
    return first


def _of_one_type(parts: list[pl.Series], where: str, notes: list[str]) -> list[pl.Series]:
    """Return a column of all parts in one type, as text if their types differ.

    Raises:
        DataError: It holds lists in one part and single values in another.
    """
    name, families = parts[0].name, {_family(part) for part in parts} - {"nothing"}
    if len(families) > 1 and "lists" in families:
        raise DataError(
            f"column {name!r} {where} holds lists in one part and single values in another: use "
            "one form in all of them",
            column=name,
        )
    if len(families) > 1:
        notes.append(f"column {name!r} {where} is of several types: kept as text")
        parts = [texts_of(part) for part in parts]
    frames = [part.to_frame(name) for part in parts]
    together = kept(pl.concat(frames, how="vertical_relaxed"), "all parts").frame[name]
    if together.dtype.is_float():
        together = together.fill_nan(None)
    ends = np.cumsum([0, *map(len, parts)]).tolist()
    return [together[start:end] for start, end in pairwise(ends)]


def _family(column: pl.Series) -> str:
    dtype = column.dtype
    if dtype == pl.Null:
        return "nothing"
    if dtype.is_nested():
        return "lists"
    if dtype in (pl.Time, pl.Duration):
        return str(dtype.base_type())
    if dtype.is_temporal():
        return "times"
    return "numbers" if dtype.is_numeric() or dtype == pl.Boolean else "text"


def _links(
    links: list[Int32[np.ndarray, "2 _"] | None], row_of: list[Int32[np.ndarray, " _"]]
) -> Int32[np.ndarray, "2 P"] | None:
    """Return the links of all sets, each once."""
    moved = [new[part] for part, new in zip(links, row_of, strict=True) if part is not None]
    return np.unique(np.concatenate(moved, axis=1), axis=1) if moved else None


def _times(sets: Sequence[Interactions]) -> tuple[Int64[np.ndarray, " E"], bool]:
    times = [s.timestamp_s for s in sets if s.timestamp_s is not None]
    if len(times) < len(sets):
        return np.zeros(sum(len(s) for s in sets), dtype=np.int64), False
    return np.concatenate(times), True


def _columns(
    sets: Sequence[Interactions], order_E: Int64[np.ndarray, " E"], notes: list[str]
) -> dict[str, Shaped[np.ndarray, " E"]]:
    """Return the columns of numbers that all sets have, with notes on the others."""
    shared = set.intersection(*(set(s.columns) for s in sets))
    left_out = sorted(set.union(*(set(s.columns) for s in sets)) - shared)
    notes += [f"column {name!r} is not in all parts and is left out" for name in left_out]
    if any(s.timestamp_s is not None for s in sets) and any(s.timestamp_s is None for s in sets):
        notes.append("not all parts have times: their order is the order in time")
    return {
        name: _narrow(np.concatenate([s.columns[name] for s in sets])[order_E])
        for name in sets[0].columns
        if name in shared
    }


def _narrow(column_E: Shaped[np.ndarray, " E"]) -> Shaped[np.ndarray, " E"]:
    """Return a mixture of integers and 32-bit floats as 32-bit floats, as reading does."""
    return column_E.astype(np.float32) if column_E.dtype == np.float64 else column_E


def _context(
    sets: Sequence[Interactions], order_E: Int64[np.ndarray, " E"], notes: list[str]
) -> pl.DataFrame | None:
    """Return the context columns that all sets share, and notes on the other columns."""
    frames = [pl.DataFrame() if s.context is None else s.context for s in sets]
    shared = [n for n in frames[0].columns if all(n in frame.columns for frame in frames)]
    left_out = sorted({n for frame in frames for n in frame.columns} - set(shared))
    notes += [f"context {name!r} is not in all parts and is left out" for name in left_out]
    if not shared:
        return None
    parts = [_of_one_type([frame[n] for frame in frames], "of the context", notes) for n in shared]
    together = pl.DataFrame([pl.concat(part) for part in parts])
    return together.select(pl.all().gather(pl.Series(order_E)))

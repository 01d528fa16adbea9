"""Several sets of events as one, under one vocabulary.

Shape legend: E events of all, S sets.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
from jaxtyping import Int32, Int64, Shaped, UInt8

from foretaste.data.interactions import Interactions
from foretaste.data.vocabulary import Vocabulary
from foretaste.errors import DataError


def concatenate(
    sets: Sequence[Interactions],
) -> tuple[Interactions, UInt8[np.ndarray, " E"]]:
    """Put sets of events together, each user's oldest first.

    Ids keep the rows they have in the first set; those that only later sets know follow. Where
    times tie, or one set has none, events of earlier sets stand first. A column, of numbers or of
    the context, that not all sets have is left out and named in the notes; a row of a side table is
    taken from the first set that knows its id.

    Args:
        sets: One at least, 255 at most.

    Returns:
        The events, and for each the number of the set that it came from.

    Raises:
        DataError: There is no set.
    """
    if not 0 < len(sets) <= 255:
        raise DataError(f"{len(sets)} sets of events to put together: give 1 to 255")
    users = _merge([s.users for s in sets], [s.user_table for s in sets])
    items = _merge([s.items for s in sets], [s.item_table for s in sets])
    user_E = np.concatenate([new[s.user_idx] for new, s in zip(users.row_of, sets, strict=True)])
    source_E = np.repeat(np.arange(len(sets), dtype=np.uint8), [len(s) for s in sets])
    time_E, timed = _times(sets)
    order_E = np.lexsort((time_E, user_E) if timed else (user_E,))
    counts_U = np.bincount(user_E, minlength=len(users.vocabulary))
    columns, notes = _columns(sets, order_E)
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
        notes=tuple(dict.fromkeys([note for s in sets for note in s.notes] + notes)),
    )
    return merged, source_E[order_E]


@dataclass(frozen=True, eq=False)
class _Side:
    """One side, users or items, of all sets."""

    vocabulary: Vocabulary
    table: pl.DataFrame | None
    row_of: list[Int32[np.ndarray, " _"]]
    """For each set: the new row of each of its rows."""


def _merge(vocabularies: list[Vocabulary], tables: list[pl.DataFrame | None]) -> _Side:
    kind = pl.Int64 if all(v.is_integer for v in vocabularies) else pl.String
    ids = [v.ids.cast(kind) for v in vocabularies]
    vocabulary = Vocabulary(pl.concat(ids).unique(maintain_order=True))
    row_of = [vocabulary.encode(part).astype(np.int32) for part in ids]
    if all(table is None for table in tables):
        return _Side(vocabulary, None, row_of)
    rows = [
        (pl.DataFrame() if table is None else table).with_columns(
            pl.Series("__row", rows, dtype=pl.Int32)
        )
        for table, rows in zip(tables, row_of, strict=True)
    ]
    table = pl.concat(rows, how="diagonal_relaxed").unique("__row", keep="first").sort("__row")
    return _Side(vocabulary, table.drop("__row"), row_of)


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
    sets: Sequence[Interactions], order_E: Int64[np.ndarray, " E"]
) -> tuple[dict[str, Shaped[np.ndarray, " E"]], list[str]]:
    shared = set.intersection(*(set(s.columns) for s in sets))
    left_out = sorted(set.union(*(set(s.columns) for s in sets)) - shared)
    notes = [f"column {name!r} is not in all parts and is left out" for name in left_out]
    if any(s.timestamp_s is not None for s in sets) and any(s.timestamp_s is None for s in sets):
        notes.append("not all parts have times: their order stands for time")
    columns = {
        name: np.concatenate([s.columns[name] for s in sets])[order_E]
        for name in sets[0].columns
        if name in shared
    }
    return columns, notes


def _context(
    sets: Sequence[Interactions], order_E: Int64[np.ndarray, " E"], notes: list[str]
) -> pl.DataFrame | None:
    """Return the context of all sets, of the columns that they share; say which they do not."""
    frames = [pl.DataFrame() if s.context is None else s.context for s in sets]
    shared = [n for n in frames[0].columns if all(n in frame.columns for frame in frames)]
    left_out = sorted({n for frame in frames for n in frame.columns} - set(shared))
    notes += [f"context {name!r} is not in all parts and is left out" for name in left_out]
    if not shared:
        return None
    together = pl.concat([frame.select(shared) for frame in frames], how="vertical_relaxed")
    return together.select(pl.all().gather(pl.Series(order_E)))

"""What ties users to users, items to items, and items to what they have in common.

Shape legend: P pairs.
"""

from dataclasses import replace

import numpy as np
import polars as pl
from jaxtyping import Int32, Int64

from foretaste.data.columns import canonical_ids
from foretaste.data.interactions import Interactions
from foretaste.data.read_config import ReadConfig, ReadTables
from foretaste.data.tables import open_source
from foretaste.data.vocabulary import Vocabulary
from foretaste.errors import DataError


def read_links(
    source: object, vocabulary: Vocabulary, *, role: str, read: ReadConfig
) -> tuple[Int32[np.ndarray, "2 P"], tuple[str, ...]]:
    """Read a table of two columns of ids: who trusts whom, or which item goes with which.

    Args:
        source: Any kind of table; its first two columns count.
        vocabulary: Of the ids in both columns.
        role: "users" or "items", for messages.
        read: How the table of events was read: header, encoding and missing values hold here too.

    Returns:
        The rows of both ends, each link once as it stands; and what was left out, with counts.

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
            f"{opened.name} has one column: a link of {role} takes two, of ids",
            column=opened.columns[0],
        )
    ends = opened.columns[:2]
    frame, notes = opened.read(ends, ends)
    if more := opened.columns[2:]:
        unread = ", ".join(map(repr, more))
        notes = (*notes, f"of the links of {role} {unread} is not read: all links weigh the same")
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
        "tie an id to itself": int((known_P & own_P).sum()),
        "stand twice": len(pair_P2) - len(links_P2),
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


def attribute_ties(
    events: Interactions, name: str
) -> tuple[Int64[np.ndarray, " P"], Int64[np.ndarray, " P"], int]:
    """Number the values of a column of the item table, and tie each item to those it has.

    A column of lists holds many values an item. Missing and empty values tie nothing, nor does a
    value that only one item has.

    Args:
        events: With an item table.
        name: The column: text, integers, true and false, or lists of these.

    Returns:
        item_idx and value of each pair, and how many values there are.

    Raises:
        DataError: There is no such column, it holds fractions or other things that are no names,
            or no two items share a value of it.
    """
    table = events.item_table
    if table is None or name not in table.columns:
        there = [] if table is None else table.columns
        raise DataError(
            f"the items have no column {name!r} to make nodes of; there are {there}: name one of "
            "them, or give a table of items when reading"
        )
    column = table[name]
    pairs = pl.DataFrame({"item": np.arange(len(column)), "value": column})
    while isinstance(pairs.schema["value"], pl.List | pl.Array):
        pairs = pairs.explode("value")
    kind = pairs.schema["value"]
    is_name = kind in (pl.String, pl.Categorical, pl.Enum, pl.Boolean, pl.Null)
    if not (is_name or kind.is_integer()):
        raise DataError(
            f"column {name!r} of the items is {kind}, which hardly two items share: give it in "
            "classes, as text or integers, or leave it out of the attributes"
        )
    pairs = pairs.with_columns(pl.col("value").cast(pl.String))
    pairs = pairs.filter(pl.col("value").is_not_null() & (pl.col("value") != "")).unique()
    pairs = pairs.filter(pl.len().over("value") > 1).sort("value", "item")
    if pairs.is_empty():
        raise DataError(
            f"no two items share a value of column {name!r}: it ties nothing, leave it out of the "
            "attributes"
        )
    value_P = pairs["value"].rank("dense").to_numpy().astype(np.int64) - 1
    return pairs["item"].to_numpy(), value_P, int(value_P.max(initial=-1)) + 1

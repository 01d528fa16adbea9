"""External ids and the rows they stand for."""

import re
from bisect import bisect_left
from collections.abc import Callable, Sequence
from datetime import datetime
from decimal import Decimal
from functools import cached_property
from typing import final

import numpy as np
import polars as pl
from jaxtyping import Int32, Int64, UInt8

from foretaste.data.csr import look_up, mark_present
from foretaste.errors import DataError

_INTEGER = re.compile(r"[+-]?[0-9]+")
_INT64 = range(-(2**63), 2**63)
_SMALL = 2**18
"""Up to so many ids a dictionary costs little; beyond, ids are bisected."""
_FEW = 32
"""Fewer ids than a 32nd of the vocabulary are looked up one by one, more of them in one join."""


@final
class Vocabulary:
    """A two-way map between the caller's ids and rows `0 … len - 1`.

    Ids are kept as 64-bit integers where every one of them is an integer, and as text
    otherwise. A look-up accepts either: `42` and `"42"` find the same integer id. Small
    vocabularies keep a dictionary; large ones bisect their sorted ids, in place.
    """

    def __init__(self, ids: pl.Series) -> None:
        """Number `ids` in the order given.

        Args:
            ids: Distinct, of type Int64 or String, without nulls.

        Raises:
            DataError: An id is missing or stands twice, or the type is another.
        """
        if ids.dtype not in (pl.Int64, pl.String):
            raise DataError(f"ids are Int64 or String, not {ids.dtype}: cast them first")
        if ids.null_count():
            raise DataError(f"{ids.null_count()} ids are missing: give every row an id")
        if ids.n_unique() != len(ids):
            twice = ids.filter(ids.is_duplicated())[0]
            raise DataError(f"id {twice!r} stands twice in a vocabulary: keep one of them")
        self._number(lambda: ids, len(ids), is_integer=ids.dtype == pl.Int64)

    @classmethod
    def trusted(
        cls, load: Callable[[], pl.Series], *, length: int, is_integer: bool
    ) -> "Vocabulary":
        """Take ids that were checked when they were written, and load them when first asked for.

        Args:
            load: Returns `length` distinct ids, Int64 if `is_integer` and String otherwise.
            length: How many ids there are.
            is_integer: Whether they are integers.
        """
        vocabulary = cls.__new__(cls)
        vocabulary._number(load, length, is_integer=is_integer)
        return vocabulary

    def _number(self, load: Callable[[], pl.Series], length: int, *, is_integer: bool) -> None:
        self._load, self._length, self._is_integer = load, length, is_integer

    def __len__(self) -> int:
        return self._length

    @property
    def is_integer(self) -> bool:
        """Whether the ids are integers (text otherwise)."""
        return self._is_integer

    @cached_property
    def ids(self) -> pl.Series:
        """The ids, Int64 or String, row by row."""
        return self._load().alias("id")

    def find(self, external_id: object) -> int:
        """Return the row of one id, -1 if it is unknown."""
        wanted = self._canonical(external_id)
        if wanted is None or not len(self):
            return -1
        return self._row_of.get(wanted, -1) if len(self) <= _SMALL else self._bisect(wanted)

    def encode(self, external_ids: Sequence[object] | pl.Series) -> Int64[np.ndarray, " N"]:
        """Return the row of each id, -1 where it is unknown."""
        if isinstance(external_ids, pl.Series) and len(external_ids) * _FEW > len(self):
            return self._encode_many(external_ids)
        return np.fromiter(map(self.find, external_ids), np.int64, len(external_ids))

    def decode(self, idx: Int64[np.ndarray, " N"]) -> list[int | str]:
        """Return the ids of rows.

        Raises:
            DataError: A row is not in `[0, len)`.
        """
        if idx.size and (idx.min() < 0 or idx.max() >= len(self)):
            raise DataError(f"rows reach from {idx.min()} to {idx.max()}, not in [0, {len(self)})")
        return self.ids.gather(idx).to_list()

    def _encode_many(self, external_ids: pl.Series) -> Int64[np.ndarray, " N"]:
        wanted = self._canonical_series(external_ids)
        if wanted is None:
            return np.fromiter(map(self.find, external_ids), np.int64, len(external_ids))
        rows = pl.DataFrame({"id": self.ids, "row": np.arange(len(self))})
        joined = (
            wanted.alias("id").to_frame().join(rows, on="id", how="left", maintain_order="left")
        )
        return joined["row"].fill_null(-1).to_numpy()

    def _canonical_series(self, ids: pl.Series) -> pl.Series | None:
        """Return ids in the vocabulary's type, or None where each must be looked at by itself."""
        if not self.is_integer:
            return ids.cast(pl.String) if ids.dtype.is_integer() or ids.dtype == pl.String else None
        if ids.dtype.is_integer():
            return ids.cast(pl.Int64, strict=False)
        return None

    def _bisect(self, wanted: int | str) -> int:
        if isinstance(wanted, str):
            at = bisect_left(self._ordered_text, wanted.encode("utf-8", "surrogatepass"))
        else:
            at = bisect_left(self._ordered_integers, wanted)
        if at == len(self):
            return -1
        row = at if self._order is None else int(self._order[at])
        return row if self.ids[row] == wanted else -1

    def _canonical(self, external_id: object) -> int | str | None:
        """Return an id as the vocabulary would hold it; None for one that it cannot hold."""
        if external_id is None:
            return None
        if not self.is_integer:
            return id_text(external_id)
        match external_id:
            case bool():
                return None
            case str():
                whole = int(external_id) if _INTEGER.fullmatch(external_id.strip()) else None
            case int() | np.integer():
                whole = int(external_id)
            case float() | np.floating() | Decimal() if float(external_id).is_integer():
                whole = int(external_id)
            case _:
                whole = None
        return whole if whole is not None and whole in _INT64 else None

    @cached_property
    def _row_of(self) -> dict[int | str, int]:
        return {value: row for row, value in enumerate(self.ids.to_list())}

    @cached_property
    def _order(self) -> Int64[np.ndarray, " I"] | None:
        """The rows in ascending order of their ids; None where they stand so already."""
        if self.ids.is_sorted():
            return None
        return self.ids.arg_sort().cast(pl.Int64).to_numpy()

    @property
    def _ascending(self) -> pl.Series:
        return self.ids if self._order is None else self.ids.gather(self._order)

    @cached_property
    def _ordered_integers(self) -> memoryview:
        return self._ascending.to_numpy().data

    @cached_property
    def _ordered_text(self) -> "_TextRows":
        return _TextRows(*text_buffers(self._ascending))


@final
class _TextRows:
    """Texts one after the other in one buffer, as Arrow keeps them."""

    def __init__(self, ends: Int64[np.ndarray, " I1"], text: UInt8[np.ndarray, " bytes"]) -> None:
        self._ends, self._text = ends.data, text.data  # these give plain integers, and fast

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, row: int) -> bytes:
        return bytes(self._text[self._ends[row] : self._ends[row + 1]])


def text_buffers(
    text: pl.Series,
) -> tuple[Int64[np.ndarray, " I1"], UInt8[np.ndarray, " bytes"]]:
    """Return where each text starts and ends, and the UTF-8 of all of them, without a copy each."""
    ends = np.zeros(len(text) + 1, np.int64)
    np.cumsum(text.str.len_bytes().to_numpy(), out=ends[1:])
    values = text.rechunk().to_arrow(compat_level=pl.CompatLevel.oldest())
    first = np.frombuffer(values.buffers()[1], np.int64)[values.offset] if len(text) else 0
    data = values.buffers()[2]
    return ends, np.frombuffer(data or b"", np.uint8)[first : first + ends[-1]]


def id_text(external_id: object) -> str:
    """Return an id as the text that reading makes of it: `true`, `2024-05-01`, `a1`."""
    if isinstance(external_id, bool | np.bool_):
        return str(external_id).lower()
    if isinstance(external_id, datetime):
        return str(pl.Series([external_id]).dt.cast_time_unit("us").cast(pl.String)[0])
    return str(external_id)


def number_ids(
    ids: pl.Series, also: pl.Series | None = None
) -> tuple[Vocabulary, Int32[np.ndarray, " E"]]:
    """Give every distinct id a row, in ascending order, and say the row of each event's id.

    Args:
        ids: One id per event, Int64 or String, without nulls. May stand in many chunks.
        also: Further ids of the same type that get a row too.

    Returns:
        The vocabulary, and the row of each of `ids`.
    """
    spread = _spread(ids, also) if ids.dtype == pl.Int64 else None
    if spread is None:
        known = ids.unique() if also is None else pl.concat([ids.unique(), also]).unique()
        vocabulary = _sorted_vocabulary(known.sort())
        return vocabulary, vocabulary._encode_many(ids).astype(np.int32)
    lowest, span = spread
    present = np.zeros(span, np.bool_)
    for series in (ids,) if also is None else (ids, also):
        for chunk in series.get_chunks():
            mark_present(chunk.to_numpy(), lowest, present)
    found = np.flatnonzero(present)
    row_of = np.zeros(span, np.int32)
    row_of[found] = np.arange(len(found), dtype=np.int32)
    row_E, start = np.empty(len(ids), np.int32), 0
    for chunk in ids.get_chunks():
        look_up(chunk.to_numpy(), lowest, row_of, row_E[start : start + len(chunk)])
        start += len(chunk)
    return _sorted_vocabulary(pl.Series("id", found + lowest, dtype=pl.Int64)), row_E


def _sorted_vocabulary(ids: pl.Series) -> Vocabulary:
    ids = ids.set_sorted()
    return Vocabulary.trusted(lambda: ids, length=len(ids), is_integer=ids.dtype == pl.Int64)


def _spread(ids: pl.Series, also: pl.Series | None) -> tuple[int, int] | None:
    """Return the lowest id and how far they reach, where a table over that range pays."""
    parts = [part for part in (ids, also) if part is not None and len(part)]
    lows, highs = [part.min() for part in parts], [part.max() for part in parts]
    lowest = min(low for low in lows if isinstance(low, int))
    span = max(high for high in highs if isinstance(high, int)) - lowest + 1
    return (lowest, span) if span <= 2 * sum(map(len, parts)) + 1_000_000 else None

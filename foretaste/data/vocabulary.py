"""External ids and the rows they stand for."""

from collections.abc import Sequence
from functools import cached_property
from typing import final

import numpy as np
import polars as pl
from jaxtyping import Int64

from foretaste.errors import DataError


@final
class Vocabulary:
    """A two-way map between the caller's ids and rows `0 … len - 1`.

    Ids are kept as 64-bit integers where every one of them is an integer, and as text
    otherwise. A look-up accepts either: `42` and `"42"` find the same integer id.
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
            raise DataError(f"{ids.null_count()} ids are missing")
        if ids.n_unique() != len(ids):
            twice = ids.filter(ids.is_duplicated())[0]
            raise DataError(f"id {twice!r} stands twice in a vocabulary")
        self.ids = ids.alias("id")

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def is_integer(self) -> bool:
        """Whether the ids are integers (text otherwise)."""
        return bool(self.ids.dtype == pl.Int64)

    @cached_property
    def _row_of(self) -> dict[object, int]:
        return {value: row for row, value in enumerate(self.ids.to_list())}

    def find(self, external_id: object) -> int:
        """Return the row of one id, -1 if it is unknown."""
        return self._row_of.get(self._canonical(external_id), -1)

    def encode(self, external_ids: Sequence[object] | pl.Series) -> Int64[np.ndarray, " N"]:
        """Return the row of each id, -1 where it is unknown."""
        values = external_ids.to_list() if isinstance(external_ids, pl.Series) else external_ids
        return np.fromiter((self.find(value) for value in values), np.int64, len(values))

    def decode(self, idx: Int64[np.ndarray, " N"]) -> list[int | str]:
        """Return the ids of rows.

        Raises:
            DataError: A row is not in `[0, len)`.
        """
        if idx.size and (idx.min() < 0 or idx.max() >= len(self)):
            raise DataError(f"rows reach from {idx.min()} to {idx.max()}, not in [0, {len(self)})")
        return self.ids.gather(idx).to_list()

    def _canonical(self, external_id: object) -> object:
        if isinstance(external_id, bool):
            return str(external_id).lower()
        if not self.is_integer:
            return str(external_id)
        if isinstance(external_id, float) and external_id.is_integer():
            return int(external_id)
        if isinstance(external_id, str):
            try:
                return int(external_id)
            except ValueError:
                return external_id
        return external_id

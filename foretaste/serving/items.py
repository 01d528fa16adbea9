"""The items of a request: from ids to rows and back, and what the item table says of them."""

from collections.abc import Mapping
from functools import cached_property
from typing import final

import numpy as np
import polars as pl
import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from foretaste.data.interactions import Interactions

KEPT_AS_LISTS = 200_000
"""Item tables up to this long are kept as Python lists: ten times faster to read rows from."""


@final
class KnownItems:
    """The catalogue that a model ranks; an id outside of it is as unknown as one never heard of."""

    def __init__(self, events: Interactions, known_I: Bool[np.ndarray, " I"]) -> None:
        """Take ids and attributes from events, and which items are ranked."""
        self._events, self._known_I = events, known_I

    @cached_property
    def num_known(self) -> int:
        """How many items are ranked."""
        return int(self._known_I.sum())

    @property
    def num_items(self) -> int:
        """How many the catalogue has, ranked or not."""
        return self._events.num_items

    def mask_of(
        self, name: str, item_ids: object, unknown: dict[int | str, None]
    ) -> Bool[Tensor, " I"]:
        """Return True for the known of some ids; arguments and errors are those of `rows_of`."""
        mask_I = torch.zeros(self.num_items, dtype=torch.bool)
        mask_I[torch.from_numpy(self.rows_of(name, item_ids, unknown))] = True
        return mask_I

    def rows_of(
        self, name: str, item_ids: object, unknown: dict[int | str, None]
    ) -> Int64[np.ndarray, " N"]:
        """Return the item_idx of the known ids, and add the others to `unknown`, each once.

        Args:
            name: What the ids are called in the request, for errors.
            item_ids: What a caller gave; see `Ids`. None is none.
            unknown: Grows.

        Raises:
            DataError: It holds no ids one after the other, or one of them is no id.
        """
        if item_ids is None:
            return np.empty(0, dtype=np.int64)
        plain, row_N = self.find(name, item_ids)
        unknown.update({plain[at]: None for at in np.flatnonzero(row_N < 0)})
        return row_N[row_N >= 0]

    def find(self, name: str, item_ids: object) -> tuple[list[int | str], Int64[np.ndarray, " N"]]:
        """Return ids as answers show them and their item_idx, -1 for those that are not ranked.

        Arguments and errors are those of `rows_of`.
        """
        plain, row_N = self._events.items.find_all_given(item_ids, name=name)
        row_N[(row_N >= 0) & ~self._known_I[row_N]] = -1
        return plain, row_N

    def row_of(self, name: str, item_id: object) -> int:
        """Return the item_idx of one id, ranked or not; -1 if the catalogue has it not.

        Raises:
            DataError: It is no id.
        """
        return self._events.items.find_given(item_id, name=name)

    def ranks(self, row: int) -> bool:
        """Whether an item_idx, or -1 for none, is of an item that is ranked."""
        return row >= 0 and bool(self._known_I[row])

    def ids_of(self, item_idx: list[int]) -> list[int | str]:
        """Return the external ids of rows."""
        ids = self._ids
        return [ids[row] for row in item_idx]

    def attributes(self, item_idx: list[int]) -> list[Mapping[str, object]]:
        """Return what the item table says of each row; empty mappings without a table."""
        table = self._flat_table
        if table is None:
            return [{} for _ in item_idx]
        if len(table) > KEPT_AS_LISTS:
            return list(table[item_idx].to_dicts())
        columns = self._columns
        return [{name: column[row] for name, column in columns.items()} for row in item_idx]

    @cached_property
    def _ids(self) -> list[int | str]:
        ids: list[int | str] = self._events.items.ids.to_list()
        return ids

    @cached_property
    def _flat_table(self) -> pl.DataFrame | None:
        """The columns that a row of an answer can show: no vectors, no nested values."""
        table = self._events.item_table
        if table is None:
            return None
        flat = [
            name
            for name, dtype in table.schema.items()
            if not dtype.is_nested() and dtype != pl.Binary
        ]
        return table.select(flat) if flat else None

    @cached_property
    def _columns(self) -> dict[str, list[object]]:
        table = self._flat_table
        return {} if table is None else {name: table[name].to_list() for name in table.columns}

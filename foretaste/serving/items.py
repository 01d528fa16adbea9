"""The items of a request: from ids to rows and back, and what the item table or, of new
items, the request says of them.
"""

from collections.abc import Mapping
from functools import cached_property
from typing import Any, NamedTuple, final

import numpy as np
import polars as pl
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from foretaste.data.features import FieldTable
from foretaste.data.interactions import Interactions
from foretaste.models.catalogue import Judged
from foretaste.retrieval.index import TopK

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


Told = Mapping[Any, Mapping[str, object]]
"""From an item's id, a text or a number, to what is known of it: column of the item table to
value."""


class NewItems(NamedTuple):
    """Those of which a feature says something, in the order of the request."""

    told: Told
    """As the request has it."""
    table: FieldTable
    """The same, encoded; R rows."""

    def only(self, keep_R: Bool[np.ndarray, " R"]) -> "NewItems":
        """Return some of them."""
        kept = zip(self.told.items(), keep_R.tolist(), strict=True)
        return NewItems(
            {item_id: said for (item_id, said), keep in kept if keep},
            self.table.rows(torch.from_numpy(np.flatnonzero(keep_R))),
        )


def beside(
    found: TopK, score_BR: Float[Tensor, "B R"], *, num_items: int, at: int | None = None
) -> TopK:
    """Put new items into a ranking, behind its first `at`; None: behind all."""
    at = found.item_BK.shape[1] if at is None else at
    item_BR = torch.arange(num_items, num_items + score_BR.shape[1]).expand_as(score_BR)
    return TopK(
        item_BK=_into(found.item_BK, item_BR, at), score_BK=_into(found.score_BK, score_BR, at)
    )


def both(judged: Judged, new: Judged) -> Judged:
    """Put what is said of new items behind what is said of others."""
    return Judged(
        torch.cat([judged.score_BC, new.score_BC], dim=1),
        {
            name: torch.cat([value_BC, new.prediction[name]], dim=1)
            for name, value_BC in judged.prediction.items()
        },
    )


def best_of(found: TopK, k: int) -> TopK:
    """Return the K best of a ranking, equal ones in its order."""
    score_BK, order_BK = found.score_BK.sort(dim=1, descending=True, stable=True)
    return TopK(item_BK=found.item_BK.gather(1, order_BK[:, :k]), score_BK=score_BK[:, :k])


def _into(first_BC: Tensor, new_BR: Tensor, at: int) -> Tensor:
    return torch.cat([first_BC[:, :at], new_BR, first_BC[:, at:]], dim=1)

"""Items that no table has, named in a request with their features, and ranked beside the catalogue.

Within an answer they are rows past the catalogue's.

Shape legend: B queries, R new items, C items found, K list length.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from foretaste.data.features import FieldTable
from foretaste.models.catalogue import Judged
from foretaste.retrieval.index import TopK

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

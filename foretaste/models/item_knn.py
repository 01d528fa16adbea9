r"""Item-kNN, a catalogue scorer: an item's score is its likeness to the items of the history.

.. math:: s_{uj} = \sum_{i \in u,\ j \in N_K(i)} \mathrm{sim}(i, j), \quad
          \mathrm{sim}(i, j) = \frac{\sum_{u \ni i, j} |u|^{-d}}{n_i^{a} n_j^{1 - a} + h}

n is the number of an item's users, K `neighbours`, a `asymmetry`, d `damping`, h `shrinkage`.

Deshpande and Karypis, "Item-Based Top-N Recommendation Algorithms", TOIS 2004,
https://doi.org/10.1145/963770.963776; asymmetric cosine: Aiolli, "Efficient Top-N
Recommendation for Very Large Scale Binary Rated Datasets", RecSys 2013.

Departures: a history counts as a set, however often and in whatever order it was done.

Shape legend: B queries, I items, K neighbours, M distinct (query, item) pairs, R rows of a
block, W the longest row.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal, final

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from foretaste.config import Count, RangeConfig, Space, Usual
from foretaste.data.batch import Queries
from foretaste.data.interactions import Interactions
from foretaste.later import later
from foretaste.models.base import Scorer
from foretaste.models.item_sets import (
    Strength,
    StrengthConfig,
    check_events,
    distinct_items,
    interaction_matrix,
)

if TYPE_CHECKING:
    from scipy import sparse
else:
    sparse = later("scipy.sparse")

_BLOCK_PAIRS = 2**23
_BLOCK_EVENTS = 2**14


class ItemKNNConfig(StrengthConfig):
    """Settings of item-kNN."""

    kind: Literal["item_knn"] = "item_knn"
    tuning: ClassVar[Space] = {
        "neighbours": RangeConfig(low=10, high=500, log=True),
        "asymmetry": RangeConfig(low=0.0, high=1.0),
        "damping": RangeConfig(low=0.0, high=1.0),
    }
    usual: ClassVar[Usual] = Usual()
    strengths: ClassVar[Mapping[str, tuple[float, ...]]] = {"shrinkage": (10.0, 0.0, 100.0)}
    neighbours: Count = 100
    """How many of the most similar items are kept for each item."""
    asymmetry: float = Field(default=0.5, ge=0, le=1)
    """0.5 is the cosine; 1 is the share of an item's users who also have the other item. In
    between, larger values favour popular items."""
    shrinkage: Strength = "auto"
    """Added to the denominator, so that a similarity from few users counts less. "auto": chosen by
    validation from 0 to 100."""
    damping: float = Field(default=0.5, ge=0, le=10)
    """How much less users with long histories count: each is weighted by length^-damping."""


@final
class ItemKNN(Scorer):
    """Scores an item by adding up the likeness of the history's items to it."""

    learns_by = "events"

    def __init__(self, config: ItemKNNConfig, *, num_items: int) -> None:
        super().__init__()
        self.config = config
        self.num_items = num_items
        shape = num_items, min(config.neighbours, num_items)
        self.neighbour_IK: Tensor
        self.similarity_IK: Tensor
        self.register_buffer("neighbour_IK", torch.zeros(shape, dtype=torch.int64))
        self.register_buffer("similarity_IK", torch.zeros(shape))

    @torch.no_grad()
    def learn(self, events: Interactions) -> None:
        """Find each item's neighbours, a block of items at a time.

        Raises:
            DataError: There is no event, or the catalogue has another size than the model.
        """
        check_events(events, num_items=self.num_items)
        matrix = interaction_matrix(events)
        length_U = np.maximum(np.diff(matrix.indptr), 1).astype(np.float32)
        damped = sparse.diags_array(length_U**-self.config.damping) @ matrix
        transposed = matrix.T.tocsr()
        count_I = np.diff(transposed.indptr)
        order_I = np.argsort(count_I, kind="stable")  # rows of like length share a block
        pairs_I = np.minimum(transposed @ np.diff(matrix.indptr), self.num_items)[order_I]
        block_I = np.cumsum(pairs_I) // _BLOCK_PAIRS
        for item_R in np.split(order_I, np.flatnonzero(np.diff(block_I)) + 1):
            shared = (transposed[item_R] @ damped).tocsr()
            self._keep_best(item_R, shared, np.maximum(count_I, 1))

    def _keep_best(
        self, item_R: np.ndarray, shared: "sparse.csr_array", count_I: np.ndarray
    ) -> None:
        length_R = np.diff(shared.indptr)
        row_P = np.repeat(np.arange(len(item_R)), length_R)
        own_P, other_P, a = item_R[row_P], shared.indices, self.config.asymmetry
        below_P = count_I[own_P] ** a * count_I[other_P] ** (1 - a) + self.config.strength(
            "shrinkage"
        )
        similarity_P = np.where(own_P == other_P, 0, shared.data / below_P)
        place_P = np.arange(len(row_P)) - shared.indptr[row_P]
        width = max(int(length_R.max()), self.neighbour_IK.shape[1])
        similarity_RW = torch.zeros(len(item_R), width)
        other_RW = torch.zeros(len(item_R), width, dtype=torch.int64)
        at = torch.from_numpy(row_P), torch.from_numpy(place_P)
        similarity_RW[at] = torch.from_numpy(similarity_P).float()
        other_RW[at] = torch.from_numpy(other_P).long()
        best = similarity_RW.topk(self.neighbour_IK.shape[1], dim=1)
        self.similarity_IK[torch.from_numpy(item_R)] = best.values
        self.neighbour_IK[torch.from_numpy(item_R)] = other_RW.gather(1, best.indices)

    @torch.no_grad()
    def score(self, queries: Queries) -> Float[Tensor, "B I"]:
        """Return each item's score, 0 for all where the history is empty."""
        item_M, offsets_B1 = distinct_items(queries, num_items=self.num_items)
        start_M = torch.repeat_interleave(offsets_B1.diff()) * self.num_items
        score = torch.zeros(len(queries) * self.num_items)
        for item, start in zip(
            item_M.split(_BLOCK_EVENTS), start_M.split(_BLOCK_EVENTS), strict=True
        ):
            place = self.neighbour_IK[item] + start.unsqueeze(1)
            score.index_add_(0, place.flatten(), self.similarity_IK[item].flatten())
        return score.view(len(queries), self.num_items)

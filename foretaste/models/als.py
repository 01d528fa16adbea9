r"""Implicit ALS, a retriever: weighted matrix factorisation by alternating least squares.

.. math:: \min_{X,Y} \sum_{u,i} c_{ui} (p_{ui} - x_u \cdot y_i)^2
          + \lambda \big(\sum_u |x_u|^2 + \sum_i |y_i|^2\big), \quad c_{ui} = 1 + \alpha p_{ui}

Hu, Koren and Volinsky, "Collaborative Filtering for Implicit Feedback Datasets", ICDM 2008,
https://doi.org/10.1109/ICDM.2008.22. Item factors are learned by the `implicit` package
(conjugate gradients: Takács et al., RecSys 2011).

Departures: p is 0 or 1, however often a user did an item. A query's vector is solved for from
its history, in closed form, for users of training too: all are answered alike.

Shape legend: B queries, I items, M distinct (query, item) pairs, L positions, D factors.
"""

from collections.abc import Iterator, Mapping
from typing import ClassVar, Literal, final

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from foretaste.config import (
    ChoiceConfig,
    Count,
    Positive,
    RangeConfig,
    Rounds,
    Space,
    Usual,
)
from foretaste.data.batch import Queries
from foretaste.data.interactions import Interactions
from foretaste.later import later
from foretaste.models.base import Retriever
from foretaste.models.baselines import (
    ItemSets,
    Strength,
    StrengthConfig,
    check_events,
    distinct_items,
    interaction_matrix,
)

implicit_als, sparse = later("implicit.cpu.als"), later("scipy.sparse")
threadpoolctl = later("threadpoolctl")

_BLOCK_QUERIES = 64
_START_SCALE = 0.01


class ImplicitALSConfig(StrengthConfig):
    """Settings of implicit ALS."""

    kind: Literal["als"] = "als"
    tuning: ClassVar[Space] = {
        "factors": ChoiceConfig(choices=(16, 32, 64, 128)),
        "regularization": RangeConfig(low=0.001, high=10.0, log=True),
        "alpha": RangeConfig(low=1.0, high=100.0, log=True),
    }
    usual: ClassVar[Usual] = Usual()
    strengths: ClassVar[Mapping[str, tuple[float, ...]]] = {
        "alpha": (10.0, 2.0, 40.0),
        "regularization": (10.0, 1.0, 0.1, 50.0),
    }
    factors: Count = 64
    """Width of the vectors."""
    regularization: Positive | Literal["auto"] = "auto"
    """λ: weight of the squared factors in the loss. "auto": chosen by validation from 0.1 to 50."""
    alpha: Strength = "auto"
    """How much more an observed pair counts than an unobserved one. "auto": chosen by validation
    from 2 to 40."""
    iterations: Rounds = 15
    """Number of iterations, each of which solves for all users and all items."""


@final
class ImplicitALS(Retriever):
    """Item factors, and the least-squares answer to a history."""

    learns_by = "events"

    def __init__(self, config: ImplicitALSConfig, *, num_items: int) -> None:
        """Draw the factors that `learn` starts from out of torch's global generator."""
        super().__init__()
        self.config, self.num_items = config, num_items
        self.item_ID: Tensor
        self.gram_DD: Tensor
        start_ID = torch.rand(num_items, config.factors) * _START_SCALE
        self.register_buffer("item_ID", start_ID)
        self.register_buffer("gram_DD", _gram(start_ID))

    def learn(self, events: Interactions) -> None:
        """Alternate between users and items, starting from the present factors.

        Raises:
            DataError: There is no event, or the catalogue has another size than the model.
        """
        num_items, factors = self.item_ID.shape
        check_events(events, num_items=num_items)
        pairs = sparse.csr_matrix(interaction_matrix(events))
        with threadpoolctl.threadpool_limits(
            limits=1, user_api="blas"
        ):  # implicit runs threads of its own
            als = implicit_als.AlternatingLeastSquares(
                factors=factors,
                regularization=self.config.strength("regularization"),
                alpha=1 + self.config.strength("alpha"),  # implicit's alpha is the whole confidence
                iterations=self.config.iterations,
            )
            als.item_factors = self.item_ID.numpy().copy()
            als.user_factors = np.zeros((events.num_users, factors), np.float32)
            als.fit(pairs, show_progress=False)
        self.item_ID.copy_(torch.from_numpy(als.item_factors))
        self.gram_DD.copy_(_gram(self.item_ID))

    @torch.no_grad()
    def encode(self, queries: Queries) -> Float[Tensor, "B D"]:
        """Solve for each query's factors; zeros where the history is empty."""
        sets = distinct_items(queries, num_items=len(self.item_ID))
        query_BD = self.item_ID.new_zeros(len(queries), self.config.factors)
        if len(sets.item_M) == 0:
            return query_BD
        of_like_length_B = sets.offsets_B1.diff().argsort(stable=True)
        for row_b in of_like_length_B.split(_BLOCK_QUERIES):
            query_BD[row_b] = self._fold_in(sets, row_b).float()
        return query_BD

    def _fold_in(self, sets: ItemSets, row_B: Tensor) -> Tensor:
        start_B = sets.offsets_B1[row_B]
        length_B = sets.offsets_B1[row_B + 1] - start_B
        position_L = torch.arange(int(length_B.max()))
        index_BL = (start_B.unsqueeze(1) + position_L).clamp(max=len(sets.item_M) - 1)
        valid_BL = position_L < length_B.unsqueeze(1)
        y_BLD = self.item_ID[sets.item_M[index_BL]].double() * valid_BL.unsqueeze(2)
        alpha = self.config.strength("alpha")
        left_BDD = self.gram_DD + alpha * y_BLD.mT @ y_BLD
        left_BDD.diagonal(dim1=1, dim2=2).add_(self.config.strength("regularization"))
        right_BD = (1 + alpha) * y_BLD.sum(dim=1)
        solved_BD: Tensor = torch.linalg.solve(left_BDD, right_BD)
        return solved_BD

    def items(self, item_V: Int64[Tensor, " V"]) -> Float[Tensor, "V D"]:
        """Return some items' factors, zeros for items without a training event."""
        return self.item_ID[item_V]

    def item_blocks(self) -> Iterator[tuple[int, Float[Tensor, "V D"]]]:
        yield 0, self.item_ID


def _gram(item_ID: Tensor) -> Tensor:
    return item_ID.double().T @ item_ID.double()

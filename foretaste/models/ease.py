r"""EASE, a catalogue scorer: a linear model from items to items, in closed form.

.. math:: P = (X^\top X + \lambda I)^{-1}, \quad B = I - P\,\mathrm{diag}(1 / \mathrm{diag}(P))

Steck, "Embarrassingly Shallow Autoencoders for Sparse Data", WWW 2019,
https://arxiv.org/abs/1905.03375

Departures: X is 0 or 1, however often a user did an item; float32 throughout.

Shape legend: B queries, I items, M distinct (query, item) pairs.
"""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal, final

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field, PositiveInt
from torch import Tensor

from foretaste.config import RangeConfig, Space, Usual
from foretaste.data.arrays import available_bytes, check_fits
from foretaste.data.batch import Queries
from foretaste.data.interactions import Interactions
from foretaste.errors import NonFiniteError
from foretaste.models.base import Scorer
from foretaste.models.item_sets import (
    StrengthConfig,
    check_events,
    distinct_items,
    interaction_matrix,
)

_BLOCK_ITEMS = 1024
_MATRICES = 3
"""Item × item matrices alive at once while the model is learned."""


class EASEConfig(StrengthConfig):
    """Settings of EASE."""

    kind: Literal["ease"] = "ease"
    tuning: ClassVar[Space] = {
        "l2": RangeConfig(low=1.0, high=5000.0, log=True),
    }
    usual: ClassVar[Usual] = Usual()
    strengths: ClassVar[Mapping[str, tuple[float, ...]]] = {
        "l2": (200.0, 50.0, 100.0, 500.0, 1000.0)
    }
    most_items: ClassVar[int] = 4_000
    l2: Annotated[float, Field(gt=0, le=1e12)] | Literal["auto"] = "auto"
    """Weight of the squared weights in the loss. "auto": chosen by validation from 50 to 1000."""
    max_bytes: PositiveInt | Literal["auto"] = "auto"
    """Most memory that learning may take (12 bytes times items squared). "auto": three quarters of
    what is available."""


@final
class EASE(Scorer):
    """Scores an item by the sum of learned weights from the items of the history to it."""

    learns_by = "events"

    def __init__(self, config: EASEConfig, *, num_items: int) -> None:
        """Make room for the weights.

        Raises:
            TooLargeError: The weights alone would not fit.
        """
        super().__init__()
        self.config = config
        self.num_items = num_items
        self._refuse_beyond_limit(matrices=1)
        self.weight_II: Tensor
        lazily_zero = np.zeros((num_items, num_items), np.float32)  # takes memory once written to
        self.register_buffer("weight_II", torch.from_numpy(lazily_zero))

    def _refuse_beyond_limit(self, *, matrices: int) -> None:
        limit = self.config.max_bytes
        check_fits(
            matrices * 4 * self.num_items**2,
            f"EASE over {self.num_items:,} items",
            "leave rare items out, raise model.max_bytes, or take item_knn",
            name="max_bytes",
            value=limit,
            limit_bytes=available_bytes() * 3 // 4 if limit == "auto" else limit,
        )

    @torch.no_grad()
    def learn(self, events: Interactions) -> None:
        """Solve for the weights.

        Raises:
            DataError: There is no event, or the catalogue has another size than the model.
            NonFiniteError: The weight of squared weights is too small for float32.
            TooLargeError: Learning would not fit in memory; said before it is tried.
        """
        check_events(events, num_items=self.num_items)
        self._refuse_beyond_limit(matrices=_MATRICES)
        factor_II, broken = torch.linalg.cholesky_ex(self._gram(events))
        if broken:
            raise NonFiniteError(
                f"EASE has no solution with l2 {self.config.strength('l2'):g}: raise model.l2",
                name="l2",
                value=self.config.strength("l2"),
            )
        inverse_II = torch.cholesky_inverse(factor_II)
        del factor_II
        self.weight_II.copy_(inverse_II.div_(-inverse_II.diagonal().clone()))
        self.weight_II.fill_diagonal_(0)

    def _gram(self, events: Interactions) -> Tensor:
        matrix = interaction_matrix(events)
        transposed = matrix.T.tocsr()
        gram_II = torch.empty(self.num_items, self.num_items)
        for start in range(0, self.num_items, _BLOCK_ITEMS):
            block = (transposed[start : start + _BLOCK_ITEMS] @ matrix).toarray()
            gram_II[start : start + _BLOCK_ITEMS] = torch.from_numpy(block)
        gram_II.diagonal().add_(self.config.strength("l2"))
        return gram_II

    @torch.no_grad()
    def score(self, queries: Queries) -> Float[Tensor, "B I"]:
        """Return each item's score, 0 for all where the history is empty."""
        item_M, offsets_B1 = distinct_items(queries, num_items=self.num_items)
        return F.embedding_bag(
            item_M, self.weight_II, offsets_B1, mode="sum", include_last_offset=True
        )

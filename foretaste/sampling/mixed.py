"""Negatives from two sources: some of the one, the others of the other.

Shape legend: B pairs, N negatives of a pair.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Int64
from torch import Tensor

from foretaste.data.draw_items import DrawItems


@dataclass(frozen=True, eq=False, kw_only=True)
class MixedNegatives:
    """A `DrawItems` that asks one source with a probability, and else another."""

    first: DrawItems
    share: float
    """Probability, in [0, 1], that a negative is of the first source."""
    second: DrawItems

    def __call__(
        self,
        user_B: Int64[Tensor, " B"],
        positive_B: Int64[Tensor, " B"],
        num: int,
        *,
        generator: torch.Generator,
    ) -> Int64[Tensor, "B N"]:
        """Return item_idx; the pair's own where its source found nothing."""
        first_BN, second_BN = (
            draw(user_B, positive_B, num, generator=generator) for draw in (self.first, self.second)
        )
        is_first_BN = torch.rand(first_BN.shape, generator=generator) < self.share
        return first_BN.where(is_first_BN, second_BN)

"""What a retriever offered beside each training row, and what it said of all of them.

Shape legend: E rows, B rows of a batch, R rows that a ranker learns from, T items
offered for each, N drawn of them.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float32, Int32, Int64
from torch import Tensor


class DrawnOffer(NamedTuple):
    """Some of what was offered for a batch's rows."""

    item_BN: Int64[Tensor, "B N"]
    """item_idx; the row's own where too few were offered: it is hidden, and gets no label."""
    first_BC: Float32[Tensor, "B C"]
    """The retriever's say of the row's own item, then of those drawn; C is N + 1."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Offered:
    """Items to compare with each training row's own, by a retriever that never saw the row."""

    item_ET: Int32[Tensor, "E T"]
    """item_idx, -1 where there is none; never the row's own."""
    first_ET: Float32[Tensor, "E T"]
    """What the retriever says of them, as it will count beside the ranker's logit."""
    own_E: Float32[Tensor, " E"]
    """What it says of the row's own item, NaN where that was no candidate."""

    @property
    def asked(self) -> Int64[Tensor, " R"]:
        """The rows whose own item was a candidate: of others no ranker would have been asked."""
        return (~self.own_E.isnan()).nonzero().squeeze(1)

    def draw(
        self,
        row_B: Int64[Tensor, " B"],
        own_B: Int64[Tensor, " B"],
        num: int,
        *,
        generator: torch.Generator,
    ) -> DrawnOffer:
        """Draw without replacement from what was offered for some rows.

        Args:
            row_B: Which rows.
            own_B: Their own item_idx.
            num: N.
            generator: Source of all randomness.
        """
        item_BT = self.item_ET[row_B].long()
        chance_BT = torch.rand(item_BT.shape, generator=generator).masked_fill(item_BT < 0, -1.0)
        place_BN = chance_BT.topk(min(num, item_BT.shape[1])).indices
        item_BN = item_BT.gather(1, place_BN)
        first_BN = self.first_ET[row_B].gather(1, place_BN)
        return DrawnOffer(
            item_BN=item_BN.where(item_BN >= 0, own_B.unsqueeze(1)),
            first_BC=torch.cat([self.own_E[row_B].unsqueeze(1), first_BN], dim=1),
        )

"""Learn from pairs: the item that a user did should score above those it is compared with.

Shape legend: B pairs, V distinct items, D width, R rows.
"""

from typing import Literal, final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from foretaste.data.batch import PairBatch
from foretaste.data.interactions import Interactions
from foretaste.models.interface import PairModel
from foretaste.training.objectives.candidates import CandidateConfig, CandidateLoss, Loss


class PairsConfig(CandidateConfig):
    """Settings of learning from pairs."""

    kind: Literal["pairs"] = "pairs"
    loss: Loss = "sampled_softmax"
    l2: float = Field(default=0.0, ge=0)
    """Weight of half the squared length of the base vectors that a pair uses: user, item and, for
    each, the mean over its batch of candidates."""
    contrast: float = Field(default=0.0, ge=0)
    """Weight of the agreement of a model's two views of the same users and items, if it has any."""
    contrast_temperature: float = Field(default=0.2, gt=0)


@final
class Pairs(nn.Module):
    """The objective: call it with a model and a batch for the mean loss over the pairs."""

    def __init__(self, config: PairsConfig, events: Interactions) -> None:
        """Prepare to draw.

        Raises:
            DataError: There is no event.
        """
        super().__init__()
        self.config, self.loss = config, CandidateLoss(config, events)

    def forward(self, model: PairModel, batch: PairBatch) -> Float[Tensor, ""]:
        candidates = self.loss.draw(batch.queries.user_B, batch.item_B, batch.hard_BH)
        vectors = model(batch.queries, candidates.item_V)
        loss: Tensor = self.loss(candidates, vectors.query_BD, vectors.item_VD)
        if self.config.l2:
            squares = [_half_square(base_RD) for base_RD in vectors.base]
            loss = loss + self.config.l2 * torch.stack(squares).sum()
        if self.config.contrast:
            views = [_agreement(a, b, self.config.contrast_temperature) for a, b in vectors.views]
            loss = loss + self.config.contrast * torch.stack(views).sum()
        return loss


def _half_square(base_RD: Tensor) -> Tensor:
    return base_RD.square().sum() / (2 * len(base_RD))


def _agreement(one_RD: Tensor, other_RD: Tensor, temperature: float) -> Float[Tensor, ""]:
    """Return InfoNCE of two views: each row should know its own row of the other view."""
    one_RD, other_RD = F.normalize(one_RD, dim=1), F.normalize(other_RD, dim=1)
    own_R = torch.arange(len(one_RD), device=one_RD.device)
    return F.cross_entropy(one_RD @ other_RD.T / temperature, own_R)

"""Learn from pairs: the positive item of a user should score above its candidates.

Shape legend: B pairs, V distinct items, D width, R rows.
"""

from dataclasses import dataclass
from typing import Literal, final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import model_validator
from torch import Tensor, nn

from foretaste.config import Count, CountOrZero, Positive, Weight
from foretaste.data.batch import PairBatch, Prepared
from foretaste.data.interactions import Interactions
from foretaste.errors import ConfigError
from foretaste.models.base import PairVectors, Retriever
from foretaste.training import processes
from foretaste.training.objectives.candidates import (
    CandidateConfig,
    CandidateLoss,
    Candidates,
    Loss,
)


class PairsConfig(CandidateConfig):
    """Settings of learning from pairs."""

    kind: Literal["pairs"] = "pairs"
    loss: Loss = "sampled_softmax"
    """"softmax": cross-entropy over the whole catalogue. The others compare with negatives."""
    l2: Weight = 0.0
    """Weight of half the squared norm of the base vectors that a pair uses: those of its user, of
    its item and, averaged over the batch, of its candidates."""
    contrast: Weight = 0.0
    """Weight of the contrastive loss between a model's two views of the same users and items, for
    models that produce such views."""
    contrast_temperature: Positive = 0.2
    """Divisor of the similarities in the contrastive loss."""
    hard_negatives: CountOrZero = 0
    """Maximum number of hard negatives of each pair: items that its user has not interacted
    with."""
    hard_from: Literal["walks", "index"] = "walks"
    """Where hard negatives come from: "walks", items that random walks from the pair's item visit
    often; "index", items that the current model scores high for the pair's user."""
    hard_refresh: Count = 1
    """Epochs between two searches of the "index", each with the weights at that time."""
    hard_refresh_steps: CountOrZero = 0
    """Steps between two searches of the "index" in a thread alongside training. The results of a
    search are used this many steps after it began, for as many steps, so that a run depends only on
    its seed. 0: the search runs at the start of an epoch, and training waits."""
    hard_from_epoch: Count = 2
    """The first epoch with hard negatives, counted from 1. It has one for each pair, and each later
    epoch has one more."""
    hard_ranks: tuple[CountOrZero, Count] = (10, 100)
    """The nearest and the farthest rank of hard negatives, by visits or by score. A window of half
    this range moves from the farthest ranks to the nearest."""
    hard_epochs: Count = 10
    """Epochs in which the window reaches the nearest ranks."""

    @model_validator(mode="after")
    def _ranks_rise(self) -> "PairsConfig":
        if self.hard_ranks[0] >= self.hard_ranks[1]:
            raise ValueError(
                f"hard_ranks {self.hard_ranks}: the farthest rank must be above the nearest"
            )
        if self.hard_negatives and self.loss == "softmax":
            raise ValueError(
                "the loss softmax uses all items as negatives: leave out hard_negatives"
            )
        return self


@dataclass(frozen=True, kw_only=True)
class Hardness:
    """State of the hard-negative curriculum in one epoch."""

    num: int
    """Number of hard negatives of each pair; 0: none yet."""
    ranks: tuple[int, int]
    """The first rank and the one after the last."""


def hardness(config: PairsConfig, epoch: int) -> Hardness:
    """Return the curriculum's state in an epoch, counted from 0."""
    since = epoch + 1 - config.hard_from_epoch
    nearest, farthest = config.hard_ranks
    width = max(1, (farthest - nearest) // 2)
    way = min(1.0, max(0, since) / max(1, config.hard_epochs - 1))
    low = round(farthest - width + way * (nearest - (farthest - width)))
    num = min(config.hard_negatives, since + 1) if since >= 0 else 0
    return Hardness(num=num, ranks=(low, low + width))


@dataclass(frozen=True, eq=False, kw_only=True)
class DrawnPairs:
    """A batch with everything for its step that needs no weights; producers make it in advance."""

    batch: PairBatch
    candidates: Candidates
    prepared: Prepared | None
    """The result of `Retriever.prepare`."""
    generator_state: Tensor
    """State of the step's generator after the draw."""

    def __len__(self) -> int:
        return len(self.batch)

    def to(self, device: torch.device) -> "DrawnPairs":
        """Return the batch on a device."""
        return DrawnPairs(
            batch=self.batch.to(device),
            candidates=self.candidates.to(device),
            prepared=None if self.prepared is None else self.prepared.to(device),
            generator_state=self.generator_state,
        )


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

    def draw(self, model: Retriever, batch: PairBatch, *, seed: int) -> DrawnPairs:
        """Draw the candidates of a batch in advance, with the seed of its step.

        The result is the same as if the step drew the candidates itself.
        """
        generator = torch.Generator().manual_seed(seed)
        candidates = self.loss.draw(
            batch.queries.user_B, batch.item_B, batch.hard_BH, generator=generator
        )
        return DrawnPairs(
            batch=batch,
            candidates=candidates,
            prepared=model.prepare(batch.queries, candidates.own_item_X),
            generator_state=generator.get_state(),
        )

    def forward(
        self,
        model: Retriever,
        batch: PairBatch | DrawnPairs,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, ""]:
        """Return the loss; draws use `generator`, or torch's global one if it is None."""
        generator = generator or torch.default_generator
        if isinstance(batch, PairBatch):
            candidates = self.loss.draw(
                batch.queries.user_B, batch.item_B, batch.hard_BH, generator=generator
            )
            queries, prepared = batch.queries, None
        else:
            candidates, queries, prepared = batch.candidates, batch.batch.queries, batch.prepared
            generator.set_state(batch.generator_state)
        ahead = () if prepared is None else (prepared,)
        vectors: PairVectors = model(queries, candidates.own_item_X, *ahead)
        loss: Tensor = self.loss(candidates, vectors.query_BD, vectors.item_VD)
        if self.config.l2:
            squares = [_half_square(base_RD) for base_RD in vectors.base]
            loss = loss + self.config.l2 * torch.stack(squares).sum()
        if self.config.contrast:
            if not vectors.views:
                raise ConfigError(
                    f"objective.contrast is {self.config.contrast:g}, but this model produces no "
                    "contrastive views: set it to 0, or LightGCN's contrast_layer to 1 or more",
                    name="objective.contrast",
                    value=self.config.contrast,
                )
            views = [_agreement(a, b, self.config.contrast_temperature) for a, b in vectors.views]
            loss = loss + self.config.contrast * torch.stack(views).sum()
        return loss


def _half_square(base_RD: Tensor) -> Tensor:
    return processes.mean_of_all(base_RD.square().sum() / 2, len(base_RD))


def _agreement(one_RD: Tensor, other_RD: Tensor, temperature: float) -> Float[Tensor, ""]:
    """Return InfoNCE of two views: each row should match the same row of the other view."""
    one_RD, other_RD = F.normalize(one_RD, dim=1), F.normalize(other_RD, dim=1)
    own_R = torch.arange(len(one_RD), device=one_RD.device)
    return F.cross_entropy(one_RD @ other_RD.T / temperature, own_R)

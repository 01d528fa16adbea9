"""Learn to predict each event of a history from those before it.

Shape legend: B rows, L positions, N events of the batch, M negatives, D width, I items.
"""

import math
from functools import partial
from typing import Literal, NamedTuple, final

import torch
from jaxtyping import Float, Int64
from pydantic import Field, PositiveInt
from torch import Tensor

from foretaste.config import Config
from foretaste.data.batch import SequenceBatch
from foretaste.errors import DataError
from foretaste.losses.bce import bce_loss_gradient, gbce_power
from foretaste.losses.chunked import LossGradient, chunked_loss
from foretaste.losses.softmax import softmax_loss_gradient
from foretaste.models.sasrec import SASRec


class NextItemConfig(Config):
    """Settings of next-item prediction."""

    kind: Literal["next_item"] = "next_item"
    loss: Literal["softmax", "sampled_softmax", "bce", "gbce"] = "softmax"
    """"softmax": cross-entropy over the whole catalogue. The others draw negatives."""
    negatives: PositiveInt = 512
    """How many items a batch draws, distinct, shared by all its events."""
    popularity_power: float = Field(default=0.0, ge=0)
    """Negatives are drawn with probability ~ count^power; 0 is uniform."""
    log_q: bool = True
    """Sampled softmax corrects each negative by its expected number of draws."""
    calibration: float = Field(default=0.75, ge=0, le=1)
    """gBCE's t: 0 is BCE, 1 calibrates probabilities fully."""
    windows: Literal["last", "all"] = "all"
    """"last": a user's last max_len events, as in the SASRec paper; "all": every event, long
    histories cut into windows."""


class Negatives(NamedTuple):
    """Items drawn for a batch."""

    item_M: Int64[Tensor, " M"]
    column_I: Int64[Tensor, " I"]
    """Where an item stands among them, -1 for nowhere."""
    offset_M: Float[Tensor, " M"] | None
    """The correction for how they were drawn, to be added to their logits."""


@final
class NextItem:
    """The objective: call it with a model and a batch for the mean loss over the events.

    Each event of a history is predicted from the state before it. Negatives are shared by the
    batch: one matrix product scores them all. **Departure** from the papers' BCE and gBCE, which
    draw for each event: the expected gradient is the same.
    """

    def __init__(self, config: NextItemConfig, count_I: Int64[Tensor, " I"]) -> None:
        """Prepare to draw.

        Args:
            config: The settings.
            count_I: Training events of each item; items without any are no candidates.
        """
        self.config = config
        self.known = count_I.nonzero().squeeze(1)
        if len(self.known) == 0:
            raise DataError("no item has a training event")
        self.num_negatives = min(config.negatives, len(self.known))
        self.weight = count_I[self.known].double().pow(config.popularity_power)
        self.num_items = len(count_I)

    def __call__(self, model: SASRec, batch: SequenceBatch) -> Float[Tensor, ""]:
        state_BLD: Tensor = model(batch)
        state_ND = state_BLD[:, :-1][batch.valid_BL]
        target_N = batch.item_BL[batch.valid_BL]
        table_ID = model.item_table()
        drawn = self._candidates(table_ID.device)
        whole = len(drawn.item_M) == self.num_items
        loss = chunked_loss(
            state_ND,
            table_ID[target_N],
            table_ID if whole else table_ID[drawn.item_M],
            self._loss_gradient(len(drawn.item_M)),
            offset_M=drawn.offset_M,
            column_N=drawn.column_I[target_N],
        )
        return loss / len(target_N)

    def _candidates(self, device: torch.device) -> Negatives:
        if self.config.loss == "softmax" or self.num_negatives == len(self.known):
            item_M, offset_M = self.known.to(device), None
        else:
            item_M, offset_M = self._draw(device)
        column_I = torch.full((self.num_items,), -1, device=device)
        column_I[item_M] = torch.arange(len(item_M), device=device)
        return Negatives(item_M, column_I, offset_M)

    def _draw(self, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """Draw distinct items; the chance to be among them makes the correction.

        Uniformly, that chance is M over the number of known items. By popularity, items race:
        each arrives after an exponential time of rate w, the first M are taken, and given the
        arrival t of the next one the chance is exactly 1 - exp(-w t) (bottom-k sampling, Cohen
        and Kaplan, PODC 2007, https://doi.org/10.1145/1281100.1281133).
        """
        known, num = self.known.to(device), self.num_negatives
        correct = self.config.loss == "sampled_softmax" and self.config.log_q
        if self.config.popularity_power == 0:
            chosen = torch.randperm(len(known), device=device)[:num]
            offset = torch.full((num,), math.log(len(known) / num), device=device)
            return known[chosen], offset if correct else None
        weight = self.weight.to(device)
        arrival = torch.empty_like(weight).exponential_() / weight
        first, order = arrival.topk(num + 1, largest=False)
        chosen = order[:num]
        inclusion = -torch.expm1(-weight[chosen] * first[-1])
        return known[chosen], -inclusion.log().float() if correct else None

    def _loss_gradient(self, num_candidates: int) -> LossGradient:
        if self.config.loss in ("softmax", "sampled_softmax"):
            return softmax_loss_gradient
        if self.config.loss == "bce":
            return partial(bce_loss_gradient, negative_weight=1 / num_candidates)
        rate = min(1.0, num_candidates / max(1, len(self.known) - 1))
        power = gbce_power(sampling_rate=rate, calibration=self.config.calibration)
        return partial(bce_loss_gradient, positive_power=power)

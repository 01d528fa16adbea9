"""Learn to predict each event of a history from those before it.

Shape legend: B rows, L positions, N events of the batch, M negatives, D width, I items.
"""

from functools import partial
from typing import Literal, final

import torch
from jaxtyping import Float, Int64
from pydantic import Field, PositiveInt
from torch import Tensor

from foretaste.config import Config
from foretaste.data.batch import SequenceBatch
from foretaste.losses.bce import bce_loss_gradient, gbce_power
from foretaste.losses.chunked import LossGradient, chunked_loss
from foretaste.losses.softmax import softmax_loss_gradient
from foretaste.models.sasrec import SASRec
from foretaste.sampling.distinct import DistinctSampler


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

        Raises:
            DataError: No item has a training event.
        """
        self.config = config
        self.sampler = DistinctSampler(count_I, power=config.popularity_power)
        self.num_known = len(self.sampler.known)
        self.num_negatives = self.num_known if config.loss == "softmax" else config.negatives

    def __call__(self, model: SASRec, batch: SequenceBatch) -> Float[Tensor, ""]:
        state_BLD: Tensor = model(batch)
        target_N = batch.item_BL[batch.valid_BL]
        table_ID = model.item_table()
        drawn = self.sampler.draw(self.num_negatives, device=table_ID.device)
        column_I = torch.full((len(table_ID),), -1, device=table_ID.device)
        column_I[drawn.item_M] = torch.arange(len(drawn.item_M), device=table_ID.device)
        corrected = self.config.loss == "sampled_softmax" and self.config.log_q
        loss = chunked_loss(
            state_BLD[:, :-1][batch.valid_BL],
            table_ID[target_N],
            table_ID if len(drawn.item_M) == len(table_ID) else table_ID[drawn.item_M],
            self._loss_gradient(len(drawn.item_M)),
            offset_M=-drawn.log_chance_M if corrected else None,
            column_N=column_I[target_N],
        )
        return loss / len(target_N)

    def _loss_gradient(self, num_candidates: int) -> LossGradient:
        if self.config.loss in ("softmax", "sampled_softmax"):
            return softmax_loss_gradient
        if self.config.loss == "bce":
            return partial(bce_loss_gradient, negative_weight=1 / num_candidates)
        rate = min(1.0, num_candidates / max(1, self.num_known - 1))
        power = gbce_power(sampling_rate=rate, calibration=self.config.calibration)
        return partial(bce_loss_gradient, positive_power=power)

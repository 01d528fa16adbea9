"""Learn from histories: predict each event from earlier ones, or predict masked events.

Shape legend: B rows, L positions, T masked positions of a row, N events of the batch or masked
positions, X distinct items, D width.
"""

from typing import Literal, final

import torch
from jaxtyping import Bool, Float, Int64
from pydantic import Field
from torch import Tensor, nn

from foretaste.data.batch import SequenceBatch
from foretaste.data.interactions import Interactions
from foretaste.data.plans import Windows
from foretaste.models.base import Retriever
from foretaste.training import processes
from foretaste.training.objectives.candidates import CandidateConfig, CandidateLoss


class NextItemConfig(CandidateConfig):
    """Settings of next-item prediction."""

    kind: Literal["next_item"] = "next_item"
    windows: Windows = "all"
    """"last": a user's last max_len events, as in SASRec's paper. "all": every event; long
    histories are cut into windows."""


@final
class NextItem(nn.Module):
    """The objective: call it with a model and a batch for the mean loss over the events.

    Each event of a history is predicted from the state before it. The batch shares its negatives,
    so one matrix product scores them all. **Departure**: the papers draw the negatives of BCE and
    gBCE for each event (as `row_negatives` does); the expected gradient is the same.
    """

    def __init__(self, config: NextItemConfig, events: Interactions) -> None:
        """Prepare to draw.

        Raises:
            DataError: No item has a training event.
        """
        super().__init__()
        self.loss = CandidateLoss(config, events)

    def forward(
        self, model: Retriever, batch: SequenceBatch, generator: torch.Generator | None = None
    ) -> Float[Tensor, ""]:
        """Return the loss; draws use `generator`, or torch's global one if it is None."""
        state_BLD: Tensor = model(batch)
        user_N = batch.user_B.unsqueeze(1).expand_as(batch.item_BL)[batch.valid_BL]
        candidates = self.loss.draw(user_N, batch.item_BL[batch.valid_BL], generator=generator)
        item_XD = model.items(candidates.own_item_X)
        loss: Tensor = self.loss(candidates, state_BLD[:, :-1][batch.valid_BL], item_XD)
        return loss


class MaskedItemConfig(CandidateConfig):
    """Settings of masked-item prediction."""

    kind: Literal["masked_item"] = "masked_item"
    mask_ratio: float = Field(default=0.2, gt=0, lt=1)
    """Share of a row's events that are masked, rounded; at least one event is masked."""
    last_share: float = Field(default=0.1, ge=0, le=1)
    """Share of rows in which only the last event is masked, as for a recommendation; 1 in 11 in the
    paper."""
    windows: Windows = "all"
    """"last": a user's last max_len events, as in the paper. "all": every event; long histories are
    cut into windows."""


@final
class MaskedItem(nn.Module):
    """The objective: call it with a model and a batch for the mean loss over masked events.

    **Departure** from the paper: the masked events are drawn again at each step, and the rows that
    mask only the last event are mixed with the others instead of following them.
    """

    def __init__(self, config: MaskedItemConfig, events: Interactions) -> None:
        """Prepare to draw.

        Raises:
            DataError: No item has a training event.
        """
        super().__init__()
        self.config, self.loss = config, CandidateLoss(config, events)

    def forward(
        self, model: Retriever, batch: SequenceBatch, generator: torch.Generator | None = None
    ) -> Float[Tensor, ""]:
        """Return the loss; draws use `generator`, or torch's global one if it is None."""
        (length_B,), own = processes.all_rows(batch.valid_BL.sum(dim=1))
        place_BT, real_BT = draw_places(
            length_B,
            mask_ratio=self.config.mask_ratio,
            last_share=self.config.last_share,
            generator=generator,
        )
        place_BT, real_BT = place_BT[own], real_BT[own]
        state_BTD: Tensor = model(batch, place_BT)
        target_N = batch.item_BL.gather(1, place_BT)[real_BT]
        user_N = batch.user_B.unsqueeze(1).expand_as(place_BT)[real_BT]
        candidates = self.loss.draw(user_N, target_N, generator=generator)
        item_XD = model.items(candidates.own_item_X)
        loss: Tensor = self.loss(candidates, state_BTD[real_BT], item_XD)
        return loss


def draw_places(
    length_B: Int64[Tensor, " B"],
    *,
    mask_ratio: float,
    last_share: float,
    generator: torch.Generator | None = None,
) -> tuple[Int64[Tensor, "B T"], Bool[Tensor, "B T"]]:
    """Draw the masked positions of each row, on the CPU.

    Args:
        length_B: Number of events of each row, at least 1.
        mask_ratio: Share of the events that are masked, rounded, at least one event.
        last_share: Probability that only the last event of a row is masked.
        generator: Source of all randomness; None: torch's own.

    Returns:
        Positions in [0, length), distinct within a row, and which of them are real: rows with fewer
        positions than others repeat their first one as padding.
    """
    device, width = length_B.device, int(length_B.max())
    last_B = torch.rand(len(length_B), generator=generator).to(device) < last_share
    num_B = (length_B * mask_ratio).round().long().clamp(min=1).where(~last_B, 1)
    place_L = torch.arange(width, device=device)
    last_BL = place_L == length_B.unsqueeze(1) - 1
    key_BL = torch.rand(len(length_B), width, generator=generator).to(device)
    key_BL[place_L >= length_B.unsqueeze(1)] = 2
    key_BL[last_BL & last_B.unsqueeze(1)] = -1
    most = int(num_B.max())
    place_BT = key_BL.topk(most, dim=1, largest=False).indices
    real_BT = torch.arange(most, device=device) < num_B.unsqueeze(1)
    return place_BT.where(real_BT, place_BT[:, :1]), real_BT

"""Learn to predict each event of a history from those before it.

Shape legend: B rows, L positions, N events of the batch, V distinct items, D width.
"""

from typing import Literal, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from foretaste.data.batch import SequenceBatch
from foretaste.data.interactions import Interactions
from foretaste.data.sequences import Windows
from foretaste.models.base import Retriever
from foretaste.training.objectives.candidates import CandidateConfig, CandidateLoss


class NextItemConfig(CandidateConfig):
    """Settings of next-item prediction."""

    kind: Literal["next_item"] = "next_item"
    windows: Windows = "all"
    """"last": a user's last max_len events, as in the SASRec paper; "all": every event, long
    histories cut into windows."""


@final
class NextItem(nn.Module):
    """The objective: call it with a model and a batch for the mean loss over the events.

    Each event of a history is predicted from the state before it. Negatives are shared by the
    batch: one matrix product scores them all. **Departure** from the papers' BCE and gBCE, which
    draw for each event (`row_negatives` does so): the expected gradient is the same.
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
        """Return the loss; what is drawn is drawn from `generator`, None: torch's own."""
        state_BLD: Tensor = model(batch)
        user_N = batch.user_B.unsqueeze(1).expand_as(batch.item_BL)[batch.valid_BL]
        candidates = self.loss.draw(user_N, batch.item_BL[batch.valid_BL], generator=generator)
        item_VD = model.items(candidates.item_V)
        loss: Tensor = self.loss(candidates, state_BLD[:, :-1][batch.valid_BL], item_VD)
        return loss

r"""How much each event of a history matters to the item that is judged.

.. math:: a_j = f([e_j; e_t; e_j \odot e_t]), \quad u = \sum_j w_j e_j

with w the softmax of a over the history's events, or a itself. The first layer of f is linear, so
its share of the events, and that of the items, are worked out once and not for every pair.

Shape legend: B rows, A rows of items (B, or 1 where all rows have the same), C items of each, L
positions, K width of an item, H width of a hidden layer.
"""

from collections.abc import Sequence
from typing import Literal, final

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from foretaste.models.layers.mlp import Activation, Dice, activate


@final
class TargetAttention(nn.Module):
    """The activation unit f, and the weights that it gives."""

    def __init__(
        self,
        width: int,
        hidden: Sequence[int],
        *,
        weights: Literal["softmax", "unnormalised"],
        activation: Activation,
    ) -> None:
        """Make untrained weights.

        Args:
            width: K.
            hidden: Widths of the unit's hidden layers, one or more.
            weights: Whether those of a history sum to 1, or also say how strongly it speaks.
            activation: What follows each hidden layer.
        """
        super().__init__()
        self.width, self.normalised = width, weights == "softmax"
        self.joint = nn.Linear(3 * width, hidden[0])
        self.layers = nn.ModuleList(
            nn.Linear(before, after) for before, after in zip(hidden, [*hidden[1:], 1], strict=True)
        )
        self.activations = nn.ModuleList(activate(activation, width) for width in hidden)

    def forward(
        self,
        event_BLK: Float[Tensor, "B L K"],
        item_ACK: Float[Tensor, "A C K"],
        valid_BL: Bool[Tensor, "B L"],
    ) -> Float[Tensor, "B C L"]:
        """Return the weight of each event for each item, 0 where none is valid.

        Args:
            event_BLK: The history's items.
            item_ACK: Those that are judged.
            valid_BL: True = a real event.
        """
        first = self._of_items if item_ACK.shape[1] > self.joint.out_features else self._of_pairs
        state_BCLH = first(event_BLK, item_ACK)
        valid_BCL = valid_BL.unsqueeze(1).expand(state_BCLH.shape[:3])
        for activation, layer in zip(self.activations, self.layers, strict=True):
            if isinstance(activation, Dice):
                state_BCLH = layer(activation(state_BCLH, valid_BCL))
            else:
                state_BCLH = layer(activation(state_BCLH))
        logit_BCL = state_BCLH.squeeze(3)
        if self.normalised:
            lowest = torch.finfo(logit_BCL.dtype).min
            logit_BCL = logit_BCL.masked_fill(~valid_BCL, lowest).softmax(dim=2)
        return logit_BCL * valid_BCL

    def _of_pairs(self, event_BLK: Tensor, item_ACK: Tensor) -> Float[Tensor, "B C L H"]:
        """Return the first layer pair by pair."""
        of_event_KH, of_item_KH, of_both_KH = self.joint.weight.T.split(self.width)
        of_item_AC1H = (item_ACK @ of_item_KH + self.joint.bias).unsqueeze(2)
        of_event_B1LH = (event_BLK @ of_event_KH).unsqueeze(1)
        both_BCLK = item_ACK.unsqueeze(2) * event_BLK.unsqueeze(1)
        state_BCLH: Tensor = both_BCLK @ of_both_KH + of_item_AC1H + of_event_B1LH
        return state_BCLH

    def _of_items(self, event_BLK: Tensor, item_ACK: Tensor) -> Float[Tensor, "B C L H"]:
        """Return the same, for more items than H: an event is a layer over items."""
        of_event_KH, of_item_KH, of_both_KH = self.joint.weight.T.split(self.width)
        bias_BLH = event_BLK @ of_event_KH + self.joint.bias
        weight_BKLH = torch.addcmul(
            of_item_KH.unsqueeze(1), event_BLK.mT.unsqueeze(3), of_both_KH.unsqueeze(1)
        )
        item_BCK = item_ACK.expand(len(event_BLK), -1, -1)
        state_BCX = torch.baddbmm(
            bias_BLH.flatten(1).unsqueeze(1), item_BCK, weight_BKLH.flatten(2)
        )
        return state_BCX.view(*state_BCX.shape[:2], *bias_BLH.shape[1:])


def pool(
    weight_BCL: Float[Tensor, "B C L"], event_BLK: Float[Tensor, "B L K"]
) -> Float[Tensor, "B C K"]:
    """Return the weighted sum of each history's events."""
    return torch.bmm(weight_BCL.to(event_BLK.dtype), event_BLK)


def mean_weights(valid_BL: Bool[Tensor, "B L"]) -> Float[Tensor, "B 1 L"]:
    """Return weights that are alike for all events of a history."""
    return F.normalize(valid_BL.float(), p=1, dim=1).unsqueeze(1)

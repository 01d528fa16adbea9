"""Distinct items for a whole batch, each with its chance to be among them.

Shape legend: M items drawn, I items.
"""

from typing import NamedTuple, final

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from foretaste.errors import DataError


class Drawn(NamedTuple):
    """Items drawn for a batch."""

    item_M: Int64[Tensor, " M"]
    """No two alike."""
    chance_I: Float[Tensor, " I"]
    """Each item's chance to be among them, given where the draw ended; drawn or not."""


@final
class DistinctSampler:
    r"""Draws M different items, uniformly or in favour of the popular ones.

    Items race: item j arrives after an exponential time of rate :math:`w_j`, the first M are
    taken. Given the arrival t of the one after them, j is among them with chance exactly
    :math:`1 - e^{-w_j t}`. So :math:`\sum_{j \in M} x_j / \text{chance}_j` is an unbiased
    estimate of the sum over all items; with all items drawn it is that sum.

    References:
        Cohen and Kaplan, "Summarizing Data Using Bottom-k Sketches", PODC 2007,
        https://doi.org/10.1145/1281100.1281133
    """

    def __init__(self, count_I: Int64[Tensor, " I"], *, power: float = 0.0) -> None:
        """Prepare to draw.

        Args:
            count_I: Training events of each item; items without any are never drawn.
            power: Rates are count^power: 0 draws uniformly, 0.75 as word2vec does.

        Raises:
            DataError: No item has a training event.
        """
        self.known = count_I.nonzero().squeeze(1)
        if len(self.known) == 0:
            raise DataError("no item has a training event: there is nothing to draw from")
        self.power, self.num_items = power, len(count_I)
        self._rate = count_I[self.known].double().pow(power)

    def draw(
        self, num: int, *, device: torch.device, generator: torch.Generator | None = None
    ) -> Drawn:
        """Return `num` items, or all there are.

        Args:
            num: How many.
            device: Where to draw.
            generator: Source of all randomness; None: torch's own of the device.
        """
        known = self.known.to(device)
        chance_I = torch.zeros(self.num_items, device=device)
        if num >= len(known):
            return Drawn(known, chance_I.index_fill_(0, known, 1.0))
        if self.power == 0:
            item_M = known[torch.randperm(len(known), device=device, generator=generator)[:num]]
            return Drawn(item_M, chance_I.index_fill_(0, known, num / len(known)))
        rate = self._rate.to(device)
        arrival = torch.empty_like(rate).exponential_(generator=generator) / rate
        first, order = arrival.topk(num + 1, largest=False)
        chance_I[known] = -torch.expm1(-rate * first[-1]).float()
        return Drawn(known[order[:num]], chance_I)

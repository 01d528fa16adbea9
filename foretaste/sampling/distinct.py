"""Distinct items for a whole batch, each with its chance to be among them.

Shape legend: M items drawn, I items, X any items, N draws.
"""

from collections.abc import Callable
from typing import NamedTuple, final

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from foretaste.errors import DataError
from foretaste.sampling.popularity import PopularitySampler

SHUFFLED_BELOW = 2**15
"""Known items up to which all of them are shuffled, or race, at every draw: under a millisecond."""


class Drawn(NamedTuple):
    """Items drawn for a batch."""

    item_M: Int64[Tensor, " M"]
    """No two alike."""
    chance: Callable[[Int64[Tensor, "*X"]], Float[Tensor, "*X"]]
    """Gives items' chances to be among them, given where the draw ended; drawn or not."""


@final
class DistinctSampler:
    r"""Draws M different items, uniformly or in favour of the popular ones.

    Items race: item j arrives after an exponential time of rate :math:`w_j`, the first M are
    taken. Given the arrival t of the one after them, j is among them with chance exactly
    :math:`1 - e^{-w_j t}`. So :math:`\sum_{j \in M} x_j / \text{chance}_j` is an unbiased
    estimate of the sum over all items; with all items drawn it is that sum.

    Of many items only those that arrive are worked out: the next to arrive is j with probability
    :math:`w_j / \sum_i w_i` at any time, so items are drawn one after the other, repeats left
    out, until there are enough. The law is the same, the draws are others.

    References:
        Cohen and Kaplan, "Summarizing Data Using Bottom-k Sketches", PODC 2007,
        https://doi.org/10.1145/1281100.1281133
    """

    def __init__(
        self,
        count_I: Int64[Tensor, " I"],
        *,
        power: float = 0.0,
        shuffled_below: int = SHUFFLED_BELOW,
    ) -> None:
        """Prepare to draw.

        Args:
            count_I: Training events of each item; items without any are never drawn.
            power: Rates are count^power: 0 draws uniformly, 0.75 as word2vec does.
            shuffled_below: Known items from which on only those that arrive are worked out.

        Raises:
            DataError: No item has a training event.
        """
        self.known = count_I.nonzero().squeeze(1)
        if len(self.known) == 0:
            raise DataError("no item has a training event: there is nothing to draw from")
        self.power = power
        self._rate_I = count_I.double().pow(power).where(count_I > 0, 0.0)
        self._there = self.known, self._rate_I  # on the device that was asked for last
        self._rates = float(self._rate_I.sum())
        self._many = len(self.known) >= shuffled_below
        self._popular = (
            PopularitySampler(count_I.numpy(), alpha=power) if self._many and power else None
        )
        self._few_repeats: dict[int, bool] = {}

    def draw(
        self, num: int, *, device: torch.device, generator: torch.Generator | None = None
    ) -> Drawn:
        """Return `num` items, or all there are.

        Args:
            num: How many.
            device: Where the answer goes; the draws are the same on each.
            generator: Source of all randomness, of the CPU; None: torch's own.
        """
        if self._there[0].device != device:
            self._there = self.known.to(device), self._rate_I.to(device)
        known = self.known
        if num >= len(known):
            return Drawn(self._there[0], self._share(1.0))
        if self._many and self._repeats_are_few(num):
            return self._arrive(num, device=device, generator=generator)
        if self.power == 0:
            item_M = known[torch.randperm(len(known), generator=generator)[:num]]
            return Drawn(item_M.to(device), self._share(num / len(known)))
        rate = self._rate_I[known]
        arrival = torch.empty_like(rate).exponential_(generator=generator) / rate
        first, order = arrival.topk(num + 1, largest=False)
        return Drawn(known[order[:num]].to(device), self._before(first[-1].to(device)))

    def _arrive(
        self, num: int, *, device: torch.device, generator: torch.Generator | None
    ) -> Drawn:
        """Draw items one after the other until there are enough, and one more for the time."""
        if self._popular is None:
            item_N = self._uniform(num + num // 16 + 8, generator)
            while len(first_N := _first_places(item_N)) < num:
                item_N = torch.cat([item_N, self._uniform(num, generator)])
            return Drawn(item_N[first_N[:num]].to(device), self._share(num / len(self.known)))
        source = generator or torch.default_generator
        item_N = self._popular.draw((2 * num + 8,), generator=source)
        while len(first_N := _first_places(item_N)) <= num:
            item_N = torch.cat([item_N, self._popular.draw((num,), generator=source)])
        place = int(first_N[num])  # of the one after those that are taken
        wait_N = torch.empty(place + 1, dtype=torch.float64).exponential_(generator=source)
        time = wait_N.sum().to(device) / self._rates
        return Drawn(item_N[first_N[:num]].to(device), self._before(time))

    def _repeats_are_few(self, num: int) -> bool:
        """Whether eight times as many draws are likely to hold enough different items."""
        if num not in self._few_repeats:
            share_I = self._rate_I / self._rates
            distinct = float(-torch.expm1(-8 * num * share_I).sum())
            self._few_repeats[num] = distinct > 1.5 * num
        return self._few_repeats[num]

    def _uniform(self, num: int, generator: torch.Generator | None) -> Tensor:
        return self.known[torch.randint(len(self.known), (num,), generator=generator)]

    def _share(self, share: float) -> Callable[[Tensor], Tensor]:
        return lambda item_X: (self._there[1][item_X] > 0).to(torch.get_default_dtype()) * share

    def _before(self, time: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda item_X: -torch.expm1(-self._there[1][item_X] * time).float()


def _first_places(item_N: Int64[Tensor, " N"]) -> Int64[Tensor, " M"]:
    """Return where each different item stands first, in order."""
    sorted_N, order_N = item_N.sort(stable=True)
    is_first_N = torch.ones_like(sorted_N, dtype=torch.bool)
    is_first_N[1:] = sorted_N[1:] != sorted_N[:-1]
    return order_N[is_first_N].sort().values

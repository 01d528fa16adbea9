"""Samplers of items, with the probability of each draw.

Shape legend: N or R draws, M distinct items, I items, X any items, K hashes, C cells.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple, final

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor, nn

from foretaste.config import Seed
from foretaste.errors import DataError


class Sampler(ABC):
    """Draws items in bulk, with replacement, from one distribution.

    Shape legend: I items.
    """

    probability_I: Float[Tensor, " I"]
    """Probability of each item in one draw, float64; 0 for items that are never drawn."""

    @abstractmethod
    def draw(self, shape: tuple[int, ...], *, generator: torch.Generator) -> Int64[Tensor, "..."]:
        """Return a tensor of `shape`, in which each entry is an independently drawn item_idx."""


@final
class UniformSampler(Sampler):
    """Draws from the known items uniformly.

    Shape legend: I items.
    """

    def __init__(self, num_items: int, *, known_I: Bool[Tensor, " I"] | None = None) -> None:
        """Prepare to draw from `[0, num_items)`.

        Args:
            num_items: Size of the catalogue, 1 or more.
            known_I: True = may be drawn, such as items with a training event; None: all may.

        Raises:
            DataError: No item may be drawn, or `known_I` has another length.
        """
        known_I = torch.ones(num_items, dtype=torch.bool) if known_I is None else known_I
        if len(known_I) != num_items or not known_I.any():
            raise DataError(
                f"{int(known_I.sum())} of {len(known_I)} items may be drawn from a catalogue of "
                f"{num_items}: a sampler needs one flag per item, and one that is true"
            )
        self.probability_I = known_I.double() / known_I.sum()
        self._num_known = int(known_I.sum())
        self._known = None if known_I.all() else known_I.nonzero().squeeze(1)

    def draw(self, shape: tuple[int, ...], *, generator: torch.Generator) -> Int64[Tensor, "..."]:
        """Return a tensor of `shape`, in which each entry is an independently drawn item_idx."""
        drawn = torch.randint(self._num_known, shape, generator=generator)
        if self._known is None:
            return drawn
        return self._known.index_select(0, drawn.flatten()).view(shape)


_BLOCK_DRAWS = 2**15
"""Number of draws at a time; a block fits in the processor's cache, which doubles the speed."""


@final
class PopularitySampler(Sampler):
    r"""Draws popular items more often: :math:`P(j) \propto n_j^\alpha`, n the events of item j.

    An item without events is never drawn. Draws come from an alias table (Walker, "An Efficient
    Method for Generating Discrete Random Variables", TOMS 1977): each of I equal cells is split
    between two items, so that one random number picks the cell and, by its fraction, the item: O(1)
    per draw. The table is filled by a sweep in the form of prefix sums (Hübschle-Schneider and
    Sanders, "Parallel Weighted Random Sampling", TOMS 2022), without a loop over items.
    """

    def __init__(self, item_count_I: Int64[np.ndarray, " I"], *, alpha: float = 0.75) -> None:
        """Fill the table.

        Args:
            item_count_I: Training events of each item, 0 or more.
            alpha: Exponent of the count: 0 draws known items uniformly, 1 in proportion to their
                events.

        Raises:
            DataError: No item has an event.
        """
        if not (item_count_I > 0).any():
            raise DataError(f"none of {len(item_count_I)} items has an event: nothing can be drawn")
        weight_I = np.power(
            item_count_I, alpha, where=item_count_I > 0, out=np.zeros(len(item_count_I))
        )
        probability_I = weight_I / weight_I.sum()
        share_I, alias_I = _alias_table(probability_I)
        self.probability_I = torch.from_numpy(probability_I)
        self._share_I, self._alias_I = torch.from_numpy(share_I), torch.from_numpy(alias_I)

    def draw(self, shape: tuple[int, ...], *, generator: torch.Generator) -> Int64[Tensor, "..."]:
        """Return a tensor of `shape`, in which each entry is an independently drawn item_idx."""
        drawn = torch.empty(shape, dtype=torch.int64)
        for drawn_R in drawn.view(-1).split(_BLOCK_DRAWS):
            point_R = torch.rand(len(drawn_R), generator=generator, dtype=torch.float64)
            point_R *= len(self._share_I)
            cell_R = point_R.long()
            point_R -= cell_R
            own_R = point_R < self._share_I.index_select(0, cell_R)  # far faster than [cell_R]
            torch.where(own_R, cell_R, self._alias_I.index_select(0, cell_R), out=drawn_R)
        return drawn


def _alias_table(
    probability_I: Float64[np.ndarray, " I"],
) -> tuple[Float64[np.ndarray, " I"], Int64[np.ndarray, " I"]]:
    """Return the share of each cell that belongs to its own item, and the item of the rest.

    Light items (less than a cell) give the rest of their cell to the heavy ones in order. A heavy
    item that is used up gives the rest of its own cell to the next heavy one.
    """
    share_I, alias_I = probability_I * len(probability_I), np.arange(len(probability_I))
    is_heavy_I = share_I >= min(1.0, share_I.max())  # equal weights may all round to less than 1
    light, heavy = np.flatnonzero(~is_heavy_I), np.flatnonzero(is_heavy_I)
    room, excess = np.cumsum(1 - share_I[light]), np.cumsum(share_I[heavy] - 1)
    room_before = np.concatenate([[0.0], room])
    giver = np.searchsorted(excess, room_before[:-1], side="right").clip(max=len(heavy) - 1)
    alias_I[light] = heavy[giver]
    num_served = np.searchsorted(giver, np.arange(len(heavy)), side="right")
    share_I[heavy] = (1 + excess - room_before[num_served]).clip(0, 1)
    share_I[heavy[-1]] = 1
    alias_I[heavy[:-1]] = heavy[1:]
    return share_I, alias_I


SHUFFLED_BELOW = 2**15
"""Up to this many known items, every draw shuffles or races all of them, in under a millisecond."""


class Drawn(NamedTuple):
    """Items drawn for a batch."""

    item_M: Int64[Tensor, " M"]
    """Each once."""
    chance: Callable[[Int64[Tensor, "*X"]], Float[Tensor, "*X"]]
    """Returns the inclusion probability of any items, given the time at which the draw ended."""


@final
class DistinctSampler:
    r"""Draws M different items, uniformly or in favour of the popular ones.

    Items race: item j arrives after an exponential time of rate :math:`w_j`, and the first M are
    taken. Given the arrival time t of the next item, j is among them with probability exactly
    :math:`1 - e^{-w_j t}`. So :math:`\sum_{j \in M} x_j / \text{chance}_j` is an unbiased estimate
    of the sum over all items; with all items drawn it is that sum.

    For many items, only those that arrive are computed: the next to arrive is j with probability
    :math:`w_j / \sum_i w_i` at any time, so items are drawn one after another, without repeats,
    until there are enough. The distribution is the same, but the draws differ.

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
            shuffled_below: Number of known items from which only arriving items are computed.

        Raises:
            DataError: No item has a training event.
        """
        self.known = count_I.nonzero().squeeze(1)
        if len(self.known) == 0:
            raise DataError("no item has a training event: there is nothing to draw from")
        self.power = power
        self._rate_I = count_I.double().pow(power).where(count_I > 0, 0.0)
        self._there = self.known, self._rate_I  # on the device of the last call
        self._rates = float(self._rate_I.sum())
        self._many = len(self.known) >= shuffled_below
        self._popular = (
            PopularitySampler(count_I.numpy(), alpha=power) if self._many and power else None
        )
        self._few_repeats: dict[int, bool] = {}

    def draw(
        self, num: int, *, device: torch.device, generator: torch.Generator | None = None
    ) -> Drawn:
        """Return `num` items, or all known items if there are fewer.

        Args:
            num: Number of items.
            device: Device of the result; the draws are the same on all devices.
            generator: Source of all randomness, on the CPU; None: torch's own.
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
        """Draw items one after another until there are enough, and one more for the time."""
        if self._popular is None:
            item_N = self._uniform(num + num // 16 + 8, generator)
            while len(first_N := _first_places(item_N)) < num:
                item_N = torch.cat([item_N, self._uniform(num, generator)])
            return Drawn(item_N[first_N[:num]].to(device), self._share(num / len(self.known)))
        source = generator or torch.default_generator
        item_N = self._popular.draw((2 * num + 8,), generator=source)
        while len(first_N := _first_places(item_N)) <= num:
            item_N = torch.cat([item_N, self._popular.draw((num,), generator=source)])
        place = int(first_N[num])  # the time of the first item that is not taken
        wait_N = torch.empty(place + 1, dtype=torch.float64).exponential_(generator=source)
        time = wait_N.sum().to(device) / self._rates
        return Drawn(item_N[first_N[:num]].to(device), self._before(time))

    def _repeats_are_few(self, num: int) -> bool:
        """Return whether eight times as many draws likely contain enough different items."""
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
    """Return the first place of each different item, in order."""
    sorted_N, order_N = item_N.sort(stable=True)
    is_first_N = torch.ones_like(sorted_N, dtype=torch.bool)
    is_first_N[1:] = sorted_N[1:] != sorted_N[:-1]
    return order_N[is_first_N].sort().values


@final
class InBatchSampler:
    r"""Returns the distinct items of a batch, each with its probability of being in the batch.

    A batch is N of the E training events, drawn without replacement. For one of its rows, an item
    with c events is among the other N - 1 with probability

    .. math:: \pi_j = 1 - \binom{E - 1 - c_j}{N - 1} \Big/ \binom{E - 1}{N - 1}

    exactly, if the row's own item is another one. Batches of sequences hold many events of few
    users; for them, this is an approximation.

    References:
        Yi et al., "Sampling-Bias-Corrected Neural Modeling for Large Corpus Item
        Recommendations", RecSys 2019, https://doi.org/10.1145/3298689.3346996. Departure: each item
        is listed once, however often the batch has it, and frequencies are counted;
        `StreamedFrequency` estimates them if they cannot be counted.
    """

    def __init__(self, count_I: Int64[Tensor, " I"]) -> None:
        """Prepare the probabilities.

        Args:
            count_I: Training events of each item.

        Raises:
            DataError: No item has a training event.
        """
        if not (count_I > 0).any():
            raise DataError("no item has a training event: all batches would be empty")
        self._count_I, self._events = count_I, float(count_I.sum())

    def draw(self, target_N: Int64[Tensor, " N"]) -> Drawn:
        """Return the distinct items of a batch."""
        if self._count_I.device != target_N.device:
            self._count_I = self._count_I.to(target_N.device)
        num_rows = len(target_N)
        return Drawn(target_N.unique(), lambda item_X: self._chances(item_X, num_rows))

    def _chances(self, item_X: Int64[Tensor, "*X"], num_rows: int) -> Float[Tensor, "*X"]:
        count_X = self._count_I[item_X].double()
        events, others = self._events - 1, float(num_rows - 1)
        rest_X = events - count_X
        possible_X = rest_X >= others
        rest_X = rest_X.where(possible_X, others)
        log_miss_X = (
            torch.lgamma(rest_X + 1)
            - torch.lgamma(rest_X - others + 1)
            - torch.lgamma(torch.tensor(events + 1).double())
            + torch.lgamma(torch.tensor(events - others + 1).double())
        )
        chance_X = -torch.expm1(log_miss_X.clamp(max=0))
        return chance_X.where(possible_X, 1.0).where(count_X > 0, 0.0).float()


_PRIME = 2**31 - 1


@final
class StreamedFrequency(nn.Module):
    r"""Returns the distinct items of a batch, with probabilities estimated from the stream.

    An item that occurs every :math:`\delta` steps is in a batch with probability
    :math:`1 / \delta`. For each item a cell keeps the step when it was last seen and a moving
    average of the gaps:

    .. math:: \delta \leftarrow (1 - \alpha) \delta + \alpha (t - t_{last})

    Items are hashed to cells, so memory does not grow with the catalogue. Two items in one cell
    look more frequent than they are, so the largest gap of several hashes is used.

    The state is kept in buffers, so a checkpoint restores it.

    References:
        Yi et al., "Sampling-Bias-Corrected Neural Modeling for Large Corpus Item
        Recommendations", RecSys 2019, algorithms 2 and 3,
        https://doi.org/10.1145/3298689.3346996. Departures: the first :math:`1/\alpha` gaps of a
        cell have equal weights, so that the first guess fades; before an item's first gap, the
        number of steps so far is used; and a cell is updated once per step, however many of its
        items the batch has.
    """

    def __init__(
        self,
        num_items: int,
        *,
        num_cells: int,
        num_hashes: int = 2,
        rate: float = 0.01,
        seed: Seed = 0,
    ) -> None:
        """Prepare the cells.

        Args:
            num_items: Size of the catalogue.
            num_cells: Number of cells per hash; as many as items, or fewer.
            num_hashes: Number of hashes, 1 or more.
            rate: alpha, in (0, 1]: weight of the newest gap.
            seed: The seed of the hashes.
        """
        super().__init__()
        self.rate = rate
        generator = torch.Generator().manual_seed(seed)
        factor_K1 = torch.randint(1, _PRIME, (num_hashes, 1), generator=generator)
        shift_K1 = torch.randint(_PRIME, (num_hashes, 1), generator=generator)
        cell_KI = (factor_K1 * torch.arange(num_items) + shift_K1) % _PRIME % num_cells
        self.cell_KI: Tensor
        self.step: Tensor
        self.last_KC: Tensor
        self.gap_KC: Tensor
        self.num_gaps_KC: Tensor
        first_K1 = torch.arange(num_hashes).unsqueeze(1) * num_cells
        self.register_buffer("cell_KI", cell_KI + first_K1, persistent=False)
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.register_buffer("last_KC", torch.zeros(num_hashes, num_cells, dtype=torch.int64))
        self.register_buffer("gap_KC", torch.zeros(num_hashes, num_cells, dtype=torch.float64))
        self.register_buffer("num_gaps_KC", torch.zeros(num_hashes, num_cells, dtype=torch.int64))

    def draw(self, target_N: Int64[Tensor, " N"]) -> Drawn:
        """Take one step of the stream; return the batch's distinct items."""
        item_M = target_N.unique()
        self.watch(item_M)
        return Drawn(item_M, self.chance)

    @torch.no_grad()
    def watch(self, item_M: Int64[Tensor, " M"]) -> None:
        """Record the items of a step."""
        self.step += 1
        cell = self.cell_KI[:, item_M].flatten().unique()
        last, gap, num = self.last_KC.view(-1), self.gap_KC.view(-1), self.num_gaps_KC.view(-1)
        again = cell[last[cell] > 0]
        num[again] += 1
        weight = num[again].double().reciprocal().clamp(min=self.rate)
        gap[again] = gap[again].lerp((self.step - last[again]).double(), weight)
        last[cell] = self.step

    @torch.no_grad()
    def chance(self, item_X: Int64[Tensor, "*X"]) -> Float[Tensor, "*X"]:
        """Return the probability of items to be in a batch, in [0, 1]; 0 for items never seen."""
        cell_KX = self.cell_KI[:, item_X]
        last, gap, num = (
            kept.view(-1)[cell_KX] for kept in (self.last_KC, self.gap_KC, self.num_gaps_KC)
        )
        gap_KX = gap.where(num > 0, self.step.double()).where(last > 0, torch.inf)
        return gap_KX.amax(dim=0).clamp(min=1).reciprocal().float()

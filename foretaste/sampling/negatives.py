"""Negatives: items a user has not interacted with, from any sampler or, hard ones, from a ranking.

Hard negatives come from walks in the graph (here), an index over the model's own items, or a
retriever's candidates; training calls all of them as a `DrawItems`.

Shape legend: B rows or pairs, N negatives of each, E distinct (user, item) pairs, P pairs of a
batch, R rows of a ranking, T ranks, I items, U users.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import final

import numpy as np
import torch
from jaxtyping import Bool, Int32, Int64
from torch import Tensor

from foretaste.data.arrays import check_fits, distinct, user_blocks
from foretaste.data.batch import DrawItems
from foretaste.data.graph import Graph
from foretaste.data.interactions import Interactions
from foretaste.data.walks import most_visited
from foretaste.errors import ConfigError, DataError
from foretaste.sampling.samplers import Sampler

_ROUNDS = 8
_BLOCK_ROWS, _BLOCK_WEIGHTS = 64, 2**24
"""Number of rows with item weights in memory at once."""
_MOST_FLAGS = 1 << 26


@dataclass(frozen=True, eq=False, kw_only=True)
class Seen:
    """The items that each user has interacted with, for bulk look-ups."""

    num_items: int
    key_E: Int64[Tensor, " E"]
    """user_idx · num_items + item_idx, ascending."""
    offsets_U1: Int64[Tensor, " U1"]
    """Start and end of each user's keys."""

    @staticmethod
    def of(events: Interactions) -> "Seen":
        """Collect the distinct pairs of some events."""
        key_E = _keys(events)
        bounds = np.arange(events.num_users + 1) * events.num_items
        return Seen(
            num_items=events.num_items,
            key_E=torch.from_numpy(key_E),
            offsets_U1=torch.from_numpy(np.searchsorted(key_E, bounds)),
        )

    def contains(
        self, user_B: Int64[Tensor, "*B"], item_B: Int64[Tensor, "*B"]
    ) -> Bool[Tensor, "*B"]:
        """Return whether each user has interacted with the item in the same row."""
        if len(self.key_E) == 0:
            return torch.zeros_like(item_B, dtype=torch.bool)
        key_B = user_B * self.num_items + item_B
        if self._flags is not None:
            return self._flags[key_B]
        place_B = torch.searchsorted(self.key_E, key_B).clamp_(max=len(self.key_E) - 1)
        return self.key_E[place_B] == key_B

    @cached_property
    def _flags(self) -> Bool[Tensor, " pairs"] | None:
        """One byte per possible pair, for look-ups without a search; None if there are too many."""
        num_pairs = (len(self.offsets_U1) - 1) * self.num_items
        if num_pairs > _MOST_FLAGS:
            return None
        flags = torch.zeros(num_pairs, dtype=torch.bool)
        flags[self.key_E] = True
        return flags

    def items_of(
        self, user_B: Int64[Tensor, " B"]
    ) -> tuple[Int64[Tensor, " P"], Int64[Tensor, " P"]]:
        """Return all pairs of a row and an item of its user, row by row."""
        start_B, end_B = self.offsets_U1[user_B], self.offsets_U1[user_B + 1]
        length_B = end_B - start_B
        row_P = torch.repeat_interleave(length_B)
        first_B = length_B.cumsum(0) - length_B
        index_P = torch.arange(len(row_P)) + (start_B - first_B)[row_P]
        return row_P, self.key_E[index_P] - user_B[row_P] * self.num_items


def _keys(events: Interactions) -> Int64[np.ndarray, " E"]:
    """Return the distinct pairs as ascending numbers, one range per user."""
    key_E, num = np.empty(len(events), np.int64), 0
    for first, last in user_blocks(events.offsets):
        user_N = np.repeat(np.arange(first, last), np.diff(events.offsets[first : last + 1]))
        item_N = events.item_idx[events.offsets[first] : events.offsets[last]]
        of_block = distinct(user_N * events.num_items + item_N)
        key_E[num : num + len(of_block)] = of_block
        num += len(of_block)
    return key_E[:num]


def draw_unseen(
    sampler: Sampler,
    user_B: Int64[Tensor, " B"],
    num_negatives: int,
    *,
    seen: Seen,
    generator: torch.Generator,
) -> Int64[Tensor, "B N"]:
    """Draw items that a row's user has not interacted with, by the sampler's probabilities.

    For a user with nearly all items, one exact draw over the whole catalogue is made, so the number
    of rounds is bounded.

    Args:
        sampler: The distribution, without the user's items.
        user_B: user_idx of each row.
        num_negatives: Number of draws per row, with replacement.
        seen: Items that may not be drawn.
        generator: Source of all randomness.

    Returns:
        item_idx. Their log probabilities are the sampler's up to a constant per user.

    Raises:
        DataError: A user has interacted with every item that can be drawn.
    """
    item_BN = sampler.draw((len(user_B), num_negatives), generator=generator)
    row_R, column_R = seen.contains(user_B.unsqueeze(1).expand_as(item_BN), item_BN).nonzero().T
    for _ in range(_ROUNDS):
        if len(row_R) == 0:
            return item_BN
        item_R = sampler.draw((len(row_R),), generator=generator)
        item_BN[row_R, column_R] = item_R
        again_R = seen.contains(user_B[row_R], item_R)
        row_R, column_R = row_R[again_R], column_R[again_R]
    size = max(1, min(_BLOCK_ROWS, _BLOCK_WEIGHTS // seen.num_items))
    for rows, columns in zip(row_R.split(size), column_R.split(size), strict=True):
        item_BN[rows, columns] = _draw_exactly(sampler, user_B[rows], seen, generator)
    return item_BN


def _draw_exactly(
    sampler: Sampler, user_R: Tensor, seen: Seen, generator: torch.Generator
) -> Int64[Tensor, " R"]:
    row_P, item_P = seen.items_of(user_R)
    weight_RI = sampler.probability_I.repeat(len(user_R), 1)
    weight_RI[row_P, item_P] = 0
    if not (weight_RI.sum(dim=1) > 0).all():
        user_idx = int(user_R[weight_RI.sum(dim=1).argmin()])
        raise DataError(
            f"the user in row {user_idx} has had all {int((sampler.probability_I > 0).sum())} "
            "items that can be drawn: leave such users out, or set exclude_known = false"
        )
    # Draws as `multinomial` does, which refuses more than 2^24 items.
    race_RI = torch.empty_like(weight_RI).exponential_(generator=generator)
    return torch.div(weight_RI, race_RI, out=race_RI).argmax(dim=1)


_TRIES = 4
"""Number of attempts before a position is left empty."""


def check_ranks(num_rows: int, ranks: int) -> None:
    """Raise an error for more ranks than fit in memory.

    Raises:
        TooLargeError: They do not.
    """
    check_fits(
        num_rows * ranks * 20,  # during a search: 8-byte ids, scores, and 4-byte ids
        f"{ranks:,} ranks of each of {num_rows:,} rows",
        "lower the farthest of objective.hard_ranks",
        name="hard_ranks",
        value=ranks,
    )


@final
@dataclass(frozen=True, eq=False)
class RankedNegatives:
    """Lists of items, the hardest first, from which negatives are drawn by rank."""

    ranked_RT: Int32[Tensor, "R T"]
    """item_idx; rows may end early, with -1."""
    seen: Seen
    """Items that may not be drawn."""
    of_items: bool = False
    """Whether rows belong to positive items; otherwise they belong to users."""

    def draw(
        self,
        user_B: Int64[Tensor, " B"],
        positive_B: Int64[Tensor, " B"],
        num: int,
        *,
        ranks: tuple[int, int],
        generator: torch.Generator,
    ) -> Int64[Tensor, "B N"]:
        """Draw from a window of ranks, and draw again if the user has interacted with the item.

        With fixed ranks, this is a `DrawItems`.

        Args:
            user_B: user_idx of each pair.
            positive_B: Its observed item_idx.
            num: N, the number of draws per pair, with replacement.
            ranks: First and last-plus-one rank to draw from; a shorter row gives its last ones.
            generator: Source of all randomness.

        Returns:
            item_idx; the pair's own item if no item was found that the user has not interacted
            with.

        Raises:
            ConfigError: The range of ranks is empty, or exceeds the kept ranks.
        """
        ranked_RT, row_B = self.ranked_RT, positive_B if self.of_items else user_B
        low, high = ranks
        if not 0 <= low < high <= ranked_RT.shape[1]:
            raise ConfigError(
                f"hard negatives of ranks {low} to {high}, but {ranked_RT.shape[1]} ranks are "
                "kept: give a range within them",
                name="hard_ranks",
                value=(low, high),
            )
        end_B = (ranked_RT[row_B] >= 0).sum(dim=1).clamp(max=high)
        start_B = (end_B - (high - low)).clamp(min=0, max=low)
        width_P, start_P, row_P, user_P, drawn_P = (
            index_B.repeat_interleave(num)
            for index_B in (end_B - start_B, start_B, row_B, user_B, positive_B)
        )
        open_P = width_P.nonzero().squeeze(1)
        for _ in range(_TRIES):
            share_P = torch.rand(len(open_P), generator=generator, dtype=torch.float64)
            rank_P = start_P[open_P] + (share_P * width_P[open_P]).long()
            found_P = ranked_RT[row_P[open_P], rank_P].long()
            is_new_P = ~self.seen.contains(user_P[open_P], found_P)
            drawn_P[open_P[is_new_P]] = found_P[is_new_P]
            open_P = open_P[~is_new_P]
        return drawn_P.view(len(user_B), num)


_WALKS, _HOPS = 1000, 4
"""Walks from each item: they make about 2,000 visits, enough to rank a few hundred items."""


def nearby_negatives(graph: Graph, seen: Seen, *, ranks: int, seed: int) -> RankedNegatives:
    """Rank, for each item, the items that random walks from it visit most.

    Args:
        graph: Users and items.
        seen: Items that may not be drawn for a user.
        ranks: Number of ranks kept per item.
        seed: Decides the walks.

    Raises:
        TooLargeError: The ranks would not fit in memory.

    References:
        Ying et al., "Graph Convolutional Neural Networks for Web-Scale Recommender Systems", KDD
        2018, https://arxiv.org/abs/1806.01973, section 3.3.
    """
    check_ranks(graph.num_items, ranks)
    first, last = graph.num_users, graph.num_users + graph.num_items
    found = most_visited(
        graph,
        top=ranks,
        seed=seed,
        walks=_WALKS,
        hops=_HOPS,
        nodes=np.arange(first, last),
        counted=(first, last),
    )
    item_IT = np.maximum(found.neighbour_VT - np.int32(first), np.int32(-1))
    return RankedNegatives(torch.from_numpy(item_IT), seen, of_items=True)


@dataclass(frozen=True, eq=False, kw_only=True)
class MixedNegatives:
    """A `DrawItems` that calls one source with a probability, and otherwise another."""

    first: DrawItems
    share: float
    """Probability, in [0, 1], that a negative comes from the first source."""
    second: DrawItems

    def __call__(
        self,
        user_B: Int64[Tensor, " B"],
        positive_B: Int64[Tensor, " B"],
        num: int,
        *,
        generator: torch.Generator,
    ) -> Int64[Tensor, "B N"]:
        """Return item_idx; the pair's own item if its source found nothing."""
        first_BN, second_BN = (
            draw(user_B, positive_B, num, generator=generator) for draw in (self.first, self.second)
        )
        is_first_BN = torch.rand(first_BN.shape, generator=generator) < self.share
        return first_BN.where(is_first_BN, second_BN)


@final
class RowNegatives:
    """A `DrawItems` that is independent of the model and draws from one distribution."""

    def __init__(self, sampler: Sampler, seen: Seen | None) -> None:
        """Prepare.

        Args:
            sampler: The distribution.
            seen: Each user's items, which are never drawn; None excludes only the row's own item.
        """
        self.sampler, self.seen = sampler, seen
        if seen is not None:
            drawable_I = sampler.probability_I > 0
            done_U = torch.bincount(
                seen.key_E.div(seen.num_items, rounding_mode="floor"),
                drawable_I[seen.key_E % seen.num_items].double(),
                minlength=len(seen.offsets_U1) - 1,
            )
            self._full_U = done_U == drawable_I.sum()

    def __call__(
        self,
        user_B: Int64[Tensor, " B"],
        positive_B: Int64[Tensor, " B"],
        num: int,
        *,
        generator: torch.Generator,
    ) -> Int64[Tensor, "B N"]:
        """Return item_idx; the row's own item if nothing can be drawn."""
        own_BN = positive_B.unsqueeze(1).expand(-1, num)
        if self.seen is None:
            return self._other(own_BN, generator)
        full_B = self._full_U[user_B]
        drawn_BN = own_BN.clone()
        drawn_BN[~full_B] = draw_unseen(
            self.sampler, user_B[~full_B], num, seen=self.seen, generator=generator
        )
        return drawn_BN

    def _other(self, own_BN: Tensor, generator: torch.Generator) -> Int64[Tensor, "B N"]:
        drawn_BN = self.sampler.draw(tuple(own_BN.shape), generator=generator)
        for _ in range(_ROUNDS):
            again_BN = drawn_BN == own_BN
            num_again = int(again_BN.sum())
            if not num_again:
                break
            drawn_BN[again_BN] = self.sampler.draw((num_again,), generator=generator)
        return drawn_BN

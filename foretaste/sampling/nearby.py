"""Hard negatives by personalised PageRank: items near the observed one that the user has not done.

Shape legend: B pairs, H hard negatives of a pair, N draws, I items, T ranks.
"""

from typing import final

import numpy as np
import torch
from jaxtyping import Int32, Int64, UInt64
from torch import Tensor

from foretaste.data.graph import Graph
from foretaste.data.walks import most_visited
from foretaste.errors import ConfigError
from foretaste.sampling.unseen import Seen

_WALKS, _HOPS = 1000, 4
"""From each item: about 2,000 visits to other items, enough to rank a few hundred."""
_TRIES = 4
"""Draws before a place is left empty."""


@final
class NearbyNegatives:
    """Ranks, for each item, the items that random walks from it visit most; draws by rank.

    What is drawn depends on (seed, epoch, user, item) alone: batches may be made in any order.

    References:
        Ying et al., "Graph Convolutional Neural Networks for Web-Scale Recommender Systems", KDD
        2018, https://arxiv.org/abs/1806.01973, section 3.3.
    """

    def __init__(self, graph: Graph, seen: Seen, *, ranks: int, seed: int) -> None:
        """Walk from every item.

        Args:
            graph: Users and items.
            seen: What may not be drawn for a user.
            ranks: How many ranks are kept of each item.
            seed: Decides walks and draws.
        """
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
        self.seen, self.seed = seen, seed
        self._ranked_IT: Int32[np.ndarray, "I T"] = found.neighbour_VT - np.int32(first)
        self._length_I: Int64[np.ndarray, " I"] = (found.neighbour_VT >= 0).sum(axis=1)

    def draw(
        self,
        user_B: Int64[Tensor, " B"],
        item_B: Int64[Tensor, " B"],
        num: int,
        *,
        ranks: tuple[int, int],
        epoch: int,
    ) -> Int64[Tensor, "B H"]:
        """Draw hard negatives.

        Args:
            user_B: user_idx of each pair.
            item_B: Its observed item_idx.
            num: H, draws per pair, with replacement.
            ranks: First and last-plus-one rank to draw from, 0 is the nearest; an item of fewer
                ranks gives its last ones.
            epoch: Which epoch it is: each draws anew.

        Returns:
            item_idx; the pair's own where nothing was found that the user has not done.

        Raises:
            ConfigError: The ranks are none, or beyond those kept.
        """
        low, high = ranks
        if not 0 <= low < high <= self._ranked_IT.shape[1]:
            raise ConfigError(
                f"hard negatives of ranks {low} to {high}, but {self._ranked_IT.shape[1]} ranks "
                "are kept: give a range within them"
            )
        user, item = (np.repeat(index_B.numpy(), num) for index_B in (user_B, item_B))
        end = np.minimum(high, self._length_I[item])
        start = np.maximum(0, np.minimum(low, end - (high - low)))
        key = _hashed(np.uint64(self.seed % 2**64), np.uint64(epoch))
        key = _hashed(_hashed(key, user.astype(np.uint64)), item.astype(np.uint64))
        key = _hashed(key, np.tile(np.arange(num, dtype=np.uint64), len(user_B)))
        drawn = item.copy()
        open_N = np.flatnonzero(end > start)
        for turn in range(_TRIES):
            word = _hashed(key[open_N], np.uint64(turn)) >> np.uint64(32)
            width = (end - start)[open_N].astype(np.uint64)
            rank = start[open_N] + (word * width >> np.uint64(32)).astype(np.int64)
            found = self._ranked_IT[item[open_N], rank].astype(np.int64)
            seen = self.seen.contains(torch.from_numpy(user[open_N]), torch.from_numpy(found))
            new = ~seen.numpy()
            drawn[open_N[new]] = found[new]
            open_N = open_N[~new]
        return torch.from_numpy(drawn).view(len(user_B), num)


def _hashed(
    key: UInt64[np.ndarray, " _"] | np.uint64, word: UInt64[np.ndarray, " _"] | np.uint64
) -> UInt64[np.ndarray, " N"]:
    """Mix a word into a key: SplitMix64 (Steele et al., OOPSLA 2014)."""
    mixed = np.atleast_1d(key) + (np.atleast_1d(word) + np.uint64(1)) * np.uint64(
        0x9E3779B97F4A7C15
    )
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    out: UInt64[np.ndarray, " N"] = mixed ^ (mixed >> np.uint64(31))
    return out

"""Training pairs: every event is a user and an item, in random order, in batches.

Shape legend: E events, B pairs of a batch, N events of all their histories, H hard negatives.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from foretaste.data.batch import PairBatch, Queries
from foretaste.data.interactions import Interactions

Reads = Literal["nothing", "before", "others"]
"""What of a user's history goes with a pair: nothing; the last events before it; or other events
of the user drawn at random, where the order means nothing."""

FindHard = Callable[[Tensor, Tensor, torch.Generator], Tensor]
"""From user_idx (B,), their observed item_idx (B,) and a source of randomness to hard negatives
(B, H)."""


@dataclass(frozen=True, eq=False, kw_only=True)
class PairPlan:
    """One epoch's batches, decided by (seed, epoch) alone and made one by one when asked for."""

    events: Interactions
    order_E: Int64[np.ndarray, " E"]
    """Positions in `events`."""
    batch_events: int
    reads: Reads
    max_len: int
    seed: int
    """Decides which other events are read, and which hard negatives are drawn."""
    find_hard: FindHard | None = None

    def __len__(self) -> int:
        return -(-len(self.order_E) // self.batch_events)

    @property
    def num_events(self) -> int:
        """Pairs in the epoch."""
        return len(self.order_E)

    def batch(self, index: int) -> PairBatch:
        """Gather one batch."""
        place_B = self.order_E[index * self.batch_events : (index + 1) * self.batch_events]
        user_B = torch.from_numpy(self.events.user_idx[place_B].astype(np.int64))
        item_B = torch.from_numpy(self.events.item_idx[place_B].astype(np.int64))
        history_N, offsets_B1 = self._histories(place_B, user_B.numpy(), index)
        return PairBatch(
            queries=Queries(
                user_B=user_B,
                history_N=torch.from_numpy(history_N),
                offsets_B1=torch.from_numpy(offsets_B1),
            ),
            item_B=item_B,
            hard_BH=self._hard(user_B, item_B, index),
        )

    def _hard(self, user_B: Tensor, item_B: Tensor, index: int) -> Int64[Tensor, "B H"]:
        if self.find_hard is None:
            return item_B.new_empty(len(item_B), 0)
        word = np.random.default_rng([self.seed, index, 1]).integers(2**63)
        return self.find_hard(user_B, item_B, torch.Generator().manual_seed(int(word)))

    def _histories(
        self, place_B: Int64[np.ndarray, " B"], user_B: Int64[np.ndarray, " B"], index: int
    ) -> tuple[Int64[np.ndarray, " N"], Int64[np.ndarray, " B1"]]:
        if self.reads == "nothing":
            return np.empty(0, np.int64), np.zeros(len(place_B) + 1, np.int64)
        start_B, end_B = self.events.offsets[user_B], self.events.offsets[user_B + 1]
        if self.reads == "before":
            first_B = np.maximum(start_B, place_B - self.max_len)
            index_N, offsets_B1 = _ranges(first_B, place_B - first_B)
            return self.events.item_idx[index_N].astype(np.int64), offsets_B1
        # A run of the user's events from a random place, once around, without the pair's own.
        others_B = end_B - start_B - 1
        length_B = np.minimum(others_B, self.max_len)
        step_N, offsets_B1 = _ranges(np.zeros_like(length_B), length_B)
        turn = np.random.default_rng([self.seed, index]).integers(0, np.maximum(1, others_B))
        row_N = np.repeat(np.arange(len(place_B)), length_B)
        ahead_N = 1 + (turn[row_N] + step_N) % others_B[row_N]
        size_N = others_B[row_N] + 1
        index_N = start_B[row_N] + (place_B[row_N] - start_B[row_N] + ahead_N) % size_N
        return self.events.item_idx[index_N].astype(np.int64), offsets_B1


def plan_pairs(
    events: Interactions,
    *,
    batch_events: int,
    generator: np.random.Generator,
    reads: Reads = "nothing",
    max_len: int = 50,
    find_hard: FindHard | None = None,
) -> PairPlan:
    """Put all events into batches, in random order.

    Args:
        events: Each is a pair, repeated ones too.
        batch_events: Pairs of a batch; the last one of an epoch may be smaller.
        generator: Decides the order.
        reads: What of each user's history is read along.
        max_len: How many events of it at most.
        find_hard: Finds hard negatives of a batch beforehand.
    """
    return PairPlan(
        events=events,
        order_E=generator.permutation(len(events)),
        batch_events=batch_events,
        reads=reads,
        max_len=max_len,
        seed=int(generator.integers(2**31)),
        find_hard=find_hard,
    )


def _ranges(
    first_B: Int64[np.ndarray, " B"], length_B: Int64[np.ndarray, " B"]
) -> tuple[Int64[np.ndarray, " N"], Int64[np.ndarray, " B1"]]:
    """Lay ranges `first, first + 1, …` of given lengths one after the other."""
    offsets_B1 = np.concatenate([[0], np.cumsum(length_B)])
    index_N = np.arange(offsets_B1[-1]) + np.repeat(first_B - offsets_B1[:-1], length_B)
    return index_N, offsets_B1

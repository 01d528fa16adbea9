"""Training pairs: every event is a user and an item, in random order, in batches.

Shape legend: E events, B pairs of a batch, H hard negatives.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from foretaste.data.batch import WHOLE, PairBatch, Queries, Reads, Share, read_histories
from foretaste.data.interactions import Interactions

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
    share: Share = WHOLE

    def __len__(self) -> int:
        return -(-len(self.order_E) // self.batch_events)

    @property
    def num_events(self) -> int:
        """Pairs in the epoch, of all processes together."""
        return len(self.order_E)

    def batch(self, index: int) -> PairBatch:
        """Gather one batch, or this process's share of it."""
        place_B = self.order_E[index * self.batch_events : (index + 1) * self.batch_events]
        share = self.share.of(len(place_B))
        user_B = torch.from_numpy(self.events.user_idx[place_B].astype(np.int64))
        item_B = torch.from_numpy(self.events.item_idx[place_B].astype(np.int64))
        history = read_histories(
            self.events,
            user_B.numpy(),
            reads=self.reads,
            max_len=self.max_len,
            end_B=place_B,
            own_B=place_B,
            generator=np.random.default_rng([self.seed, index]),
            share=share,
        )
        return PairBatch(
            queries=Queries(user_B=user_B[share], **history._asdict()),
            item_B=item_B[share],
            hard_BH=self._hard(user_B, item_B, index)[share],
        )

    def _hard(self, user_B: Tensor, item_B: Tensor, index: int) -> Int64[Tensor, "B H"]:
        if self.find_hard is None:
            return item_B.new_empty(len(item_B), 0)
        word = np.random.default_rng([self.seed, index, 1]).integers(2**63)
        return self.find_hard(user_B, item_B, torch.Generator().manual_seed(int(word)))


def plan_pairs(
    events: Interactions,
    *,
    batch_events: int,
    generator: np.random.Generator,
    reads: Reads = "nothing",
    max_len: int = 50,
    find_hard: FindHard | None = None,
    share: Share = WHOLE,
) -> PairPlan:
    """Put all events into batches, in random order.

    Args:
        events: Each is a pair, repeated ones too.
        batch_events: Pairs of a batch; the last one of an epoch may be smaller.
        generator: Decides the order.
        reads: What of each user's history is read along.
        max_len: How many events of it at most.
        find_hard: Finds hard negatives of a batch beforehand, of all its pairs.
        share: What of each batch this process reads.
    """
    return PairPlan(
        events=events,
        order_E=generator.permutation(len(events)),
        batch_events=batch_events,
        reads=reads,
        max_len=max_len,
        seed=int(generator.integers(2**31)),
        find_hard=find_hard,
        share=share,
    )

"""Cutting events into what is learned from, what is chosen by, and what is reported on.

Every split gives each event one part; the rest follows from that. A split says what leaks.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from jaxtyping import Int32, Int64, UInt8

from foretaste.data.batch import Queries
from foretaste.data.interactions import Interactions

TRAIN, VALIDATION, TEST, UNUSED = 0, 1, 2, 3
"""The values of `Split.part_E`."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Holdout:
    """What is to be predicted, and for each prediction what may be known.

    Query `q` is user `user_Q[q]` having done `events.item_idx[events.offsets[user] : end_Q[q]]`;
    its targets are `target_item[target_offsets[q] : target_offsets[q + 1]]`, one or more.

    Shape legend: Q queries, N targets of all queries.
    """

    name: str
    """Which part it is: "validation", "test"."""
    events: Interactions
    user_Q: Int64[np.ndarray, " Q"]
    end_Q: Int64[np.ndarray, " Q"]
    """Position in `events` where the query's history ends."""
    target_offsets: Int64[np.ndarray, " Q1"]
    target_item: Int32[np.ndarray, " N"]

    def __len__(self) -> int:
        return len(self.user_Q)

    def queries(self, rows: Int64[np.ndarray, " B"]) -> Queries:
        """Return some of the queries as one block."""
        start, end = self.events.offsets[self.user_Q[rows]], self.end_Q[rows]
        offsets = np.concatenate([[0], np.cumsum(end - start)])
        index = np.arange(offsets[-1]) + np.repeat(start - offsets[:-1], end - start)
        return Queries(
            user_B=torch.from_numpy(self.user_Q[rows]),
            history_N=torch.from_numpy(self.events.item_idx[index].astype(np.int64)),
            offsets_B1=torch.from_numpy(offsets),
        )


@dataclass(frozen=True, eq=False, kw_only=True)
class Split:
    """Events and the part that each belongs to.

    Shape legend: E events.
    """

    kind: Literal["temporal", "leave_last", "ratio", "random", "given"]
    events: Interactions
    part_E: UInt8[np.ndarray, " E"]
    rolling: bool
    """True: each held-out event is a query of its own, predicted from everything its user did
    before it. False: a user's held-out events are predicted together from the parts before."""
    leaks: tuple[str, ...] = ()
    """One sentence for each way in which this split lets the future into training."""

    @cached_property
    def train(self) -> Interactions:
        return self.events.select(self.part_E == TRAIN)

    @cached_property
    def validation(self) -> Holdout:
        return self._holdout(VALIDATION, "validation")

    @cached_property
    def test(self) -> Holdout:
        return self._holdout(TEST, "test")

    def refit(self) -> "Split":
        """Return the same split with its validation events moved into training."""
        part_E = np.where(self.part_E == VALIDATION, TRAIN, self.part_E).astype(np.uint8)
        return Split(
            kind=self.kind, events=self.events, part_E=part_E, rolling=self.rolling, leaks=self.leaks
        )

    def _holdout(self, part: int, name: str) -> Holdout:
        if self.rolling:
            events = self.events.select(self.part_E <= part)
            part_of = self.part_E[self.part_E <= part]
            end_Q = np.flatnonzero(part_of == part)
            user_Q = events.user_idx[end_Q].astype(np.int64)
            targets, counts = events.item_idx[end_Q], np.ones(len(end_Q), np.int64)
        else:
            events, wanted = (
                self.events.select(self.part_E < part),
                self.events.select(self.part_E == part),
            )
            counts = np.diff(wanted.offsets)
            user_Q = np.flatnonzero(counts)
            end_Q, counts = events.offsets[user_Q + 1], counts[user_Q]
            targets = wanted.item_idx
        return Holdout(
            name=name,
            events=events,
            user_Q=user_Q,
            end_Q=end_Q,
            target_offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
            target_item=targets,
        )

"""What goes through a model in one piece: typed, ragged where users differ in length."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float32, Int64
from torch import Tensor

from foretaste.data.features import FieldTable

NO_TIME = -(2**63)
"""The time of an event of which none is known."""

Times = Callable[[], Tensor]
"""Gathers the times of events in unix seconds (int64), `NO_TIME` where one is not known: they cost
nothing where nothing asks for them."""


def times_at(
    timestamp_s: Int64[np.ndarray, " E"] | None, index: Int64[np.ndarray, "*X"]
) -> Times | None:
    """Return what gathers the times of some events; None where there are no times."""
    if timestamp_s is None:
        return None
    return lambda: torch.from_numpy(timestamp_s[index])


@dataclass(frozen=True, kw_only=True)
class Queries:
    """A block of users to recommend for, and what each has done, oldest first.

    Shape legend: B users, N events of all their histories, one after the other.
    """

    user_B: Int64[Tensor, " B"]
    """user_idx, -1 for somebody whom training never saw."""
    history_N: Int64[Tensor, " N"]
    """item_idx of all histories, concatenated."""
    offsets_B1: Int64[Tensor, " B1"]
    """History of row b: `history_N[offsets_B1[b] : offsets_B1[b + 1]]`; may be empty."""
    profile: FieldTable | None = None
    """Features of each row's user, read where training never saw the user; None: none are known."""
    context: FieldTable | None = None
    """Features of the moment, a row each, such as the hour or the place; None: none are known."""
    times: Times | None = None
    """Gathers the time of each event of `history_N` (N); None: none is known."""

    def __len__(self) -> int:
        return len(self.user_B)

    def to(self, device: torch.device) -> "Queries":
        """Return the block on a device."""
        return Queries(
            user_B=self.user_B.to(device),
            history_N=self.history_N.to(device),
            offsets_B1=self.offsets_B1.to(device),
            profile=None if self.profile is None else self.profile.to(device),
            context=None if self.context is None else self.context.to(device),
            times=_on(device, self.times),
        )

    def part(self, start: int, end: int) -> "Queries":
        """Return the rows from `start` up to `end`."""
        row_b = torch.arange(start, min(end, len(self)), device=self.user_B.device)
        offsets_b1 = self.offsets_B1[start : start + len(row_b) + 1]
        first, end, times = int(offsets_b1[0]), int(offsets_b1[-1]), self.times
        return Queries(
            user_B=self.user_B[row_b],
            history_N=self.history_N[first:end],
            offsets_B1=offsets_b1 - first,
            times=None if times is None else lambda: times()[first:end],
            profile=None if self.profile is None else self.profile.rows(row_b),
            context=None if self.context is None else self.context.rows(row_b),
        )

    @staticmethod
    def of_histories(histories: list[list[int]]) -> "Queries":
        """Make queries of users unknown to training from their histories alone."""
        lengths = torch.tensor([len(history) for history in histories], dtype=torch.int64)
        return Queries(
            user_B=torch.full((len(histories),), -1, dtype=torch.int64),
            history_N=torch.tensor([i for h in histories for i in h], dtype=torch.int64),
            offsets_B1=torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]),
        )


@dataclass(frozen=True, kw_only=True)
class SequenceBatch:
    """Histories of like length side by side, first event first, padding at the end.

    Under causal attention an event sees only what stands before it, so padding at the end is
    never attended by an event, and no mask is needed.

    Shape legend: B rows, L positions.
    """

    user_B: Int64[Tensor, " B"]
    """user_idx of each row, -1 for somebody whom training never saw."""
    item_BL: Int64[Tensor, "B L"]
    """item_idx; 0 under padding."""
    valid_BL: Bool[Tensor, "B L"]
    """True = a real event."""
    times: Times | None = None
    """Gathers the time of each event (B, L), anything under padding; None: none is known."""

    def __len__(self) -> int:
        return len(self.item_BL)

    def to(self, device: torch.device) -> "SequenceBatch":
        """Return the batch on a device."""
        return SequenceBatch(
            user_B=self.user_B.to(device),
            item_BL=self.item_BL.to(device),
            valid_BL=self.valid_BL.to(device),
            times=_on(device, self.times),
        )


class Prepared(ABC):
    """What a model made of a batch before its step, without its weights."""

    @abstractmethod
    def to(self, device: torch.device) -> "Prepared":
        """Return it on a device."""


@dataclass(frozen=True, kw_only=True)
class PairBatch:
    """Observed pairs: users, with what else they have done, and the item that each did.

    Shape legend: B pairs, H hard negatives.
    """

    queries: Queries
    """The users; histories never hold the pair's own event, and are empty for models that do
    not read them."""
    item_B: Int64[Tensor, " B"]
    """The observed item_idx."""
    hard_BH: Int64[Tensor, "B H"]
    """Hard negatives found beforehand, such as an item's neighbours in the graph; H may be 0."""

    def __len__(self) -> int:
        return len(self.item_B)

    def to(self, device: torch.device) -> "PairBatch":
        """Return the batch on a device."""
        return PairBatch(
            queries=self.queries.to(device),
            item_B=self.item_B.to(device),
            hard_BH=self.hard_BH.to(device),
        )


@dataclass(frozen=True, kw_only=True)
class RowBatch:
    """Labelled rows: a user at a moment and an item, with items drawn to be compared with it.

    Shape legend: B rows, C items of each (the row's own first), T tasks.
    """

    queries: Queries
    """Users, what they had done before the row, and the row's context."""
    item_BC: Int64[Tensor, "B C"]
    """item_idx; column 0 is the row's own, the others were drawn for it."""
    label_BCT: Float32[Tensor, "B C T"]
    """NaN where a task has no label; a regression's in the label's own unit."""
    first_BC: Float32[Tensor, "B C"] | None = None
    """What a retriever says of each item, to be added to the ranker's logit; None: nothing."""

    def __len__(self) -> int:
        return len(self.item_BC)

    def to(self, device: torch.device) -> "RowBatch":
        """Return the batch on a device."""
        return RowBatch(
            queries=self.queries.to(device),
            item_BC=self.item_BC.to(device),
            label_BCT=self.label_BCT.to(device),
            first_BC=None if self.first_BC is None else self.first_BC.to(device),
        )


def last_events(
    queries: Queries, max_len: int, *, rows: Int64[Tensor, " B"] | None = None
) -> SequenceBatch:
    """Cut each history to its last `max_len` events and pad to the longest of them.

    A user without history becomes a row of padding; L is at least 1.

    Args:
        queries: Users and histories.
        max_len: How many events of each at most.
        rows: Which of the queries, in which order; None: all.
    """
    start_B, end_B, user_B = queries.offsets_B1[:-1], queries.offsets_B1[1:], queries.user_B
    if rows is not None:
        start_B, end_B, user_B = start_B[rows], end_B[rows], user_B[rows]
    length_B = (end_B - start_B).clamp(max=max_len)
    width = max(1, int(length_B.max())) if len(length_B) else 1
    position_L = torch.arange(width, device=end_B.device)
    valid_BL = position_L < length_B.unsqueeze(1)
    index_BL = (end_B - length_B).unsqueeze(1) + position_L
    item_BL, times, times_N = torch.zeros_like(index_BL), None, queries.times
    if len(queries.history_N):
        index_BL.clamp_(max=len(queries.history_N) - 1)
        item_BL = queries.history_N[index_BL].where(valid_BL, 0)
        times = None if times_N is None else lambda: times_N()[index_BL]
    return SequenceBatch(user_B=user_B, item_BL=item_BL, valid_BL=valid_BL, times=times)


def _on(device: torch.device, times: Times | None) -> Times | None:
    return None if times is None else lambda: times().to(device)

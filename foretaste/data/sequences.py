"""Training windows over histories, in batches of like length: no work on padding.

Shape legend: W windows, B rows, L positions.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from jaxtyping import Int64

from foretaste.data.batch import WHOLE, SequenceBatch, Share, times_at
from foretaste.data.interactions import Interactions

Windows = Literal["last", "all"]


@dataclass(frozen=True, eq=False, kw_only=True)
class SequencePlan:
    """One epoch's batches, decided by (seed, epoch) alone and made one by one when asked for."""

    events: Interactions
    start_W: Int64[np.ndarray, " W"]
    """Position in `events` where each window starts."""
    length_W: Int64[np.ndarray, " W"]
    batch_offsets: Int64[np.ndarray, " batches1"]
    """Batch b holds windows `batch_offsets[b]` to `batch_offsets[b + 1]`."""
    share: Share = WHOLE

    def __len__(self) -> int:
        return len(self.batch_offsets) - 1

    @cached_property
    def num_events(self) -> int:
        """Targets in the epoch, of all processes together."""
        return int(self.length_W.sum())

    def batch(self, index: int) -> SequenceBatch:
        """Gather one batch or this process's share of it, padded to the batch's longest window."""
        first, end = self.batch_offsets[index : index + 2].tolist()
        position_L = np.arange(self.length_W[first:end].max())
        share = self.share.of(end - first)
        rows = slice(first + share.start, first + share.stop)
        start_B1, length_B1 = self.start_W[rows, None], self.length_W[rows, None]
        valid_BL = position_L < length_B1
        index_BL = np.where(valid_BL, start_B1 + position_L, start_B1)
        item_BL = self.events.item_idx[index_BL]
        return SequenceBatch(
            user_B=torch.from_numpy(self.events.user_idx[self.start_W[rows]].astype(np.int64)),
            item_BL=torch.from_numpy(np.where(valid_BL, item_BL, 0).astype(np.int64)),
            valid_BL=torch.from_numpy(valid_BL),
            times=times_at(self.events.timestamp_s, index_BL),
        )


def plan_sequences(
    events: Interactions,
    *,
    max_len: int,
    batch_events: int,
    windows: Windows,
    generator: np.random.Generator,
    share: Share = WHOLE,
) -> SequencePlan:
    """Cut histories into windows and put windows of like length into batches, in random order.

    Args:
        events: Users without an event give no window.
        max_len: The longest window.
        batch_events: About how many events a batch holds, padding included; a batch holds one
            window at least.
        windows: "last": each user's last `max_len` events, as in the SASRec paper. "all": every
            event once, long histories cut at a random place into pieces of `max_len`.
        generator: Decides cuts and order.
        share: What of each batch this process reads.
    """
    user = np.flatnonzero(np.diff(events.offsets))
    start_W, end_W = events.offsets[user], events.offsets[user + 1]
    if windows == "last":
        start_W = np.maximum(start_W, end_W - max_len)
    else:
        start_W, end_W = _cut(start_W, end_W, max_len, generator)
    length_W = end_W - start_W
    order = np.lexsort((generator.random(len(length_W)), length_W))
    batches = _fill(length_W[order], batch_events)
    shuffled = generator.permutation(len(batches) - 1)
    sizes = np.diff(batches)[shuffled]
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    within = np.arange(len(order)) + np.repeat(batches[:-1][shuffled] - offsets[:-1], sizes)
    chosen = order[within]
    return SequencePlan(
        events=events,
        start_W=start_W[chosen],
        length_W=length_W[chosen],
        batch_offsets=offsets,
        share=share,
    )


def _cut(
    start_U: Int64[np.ndarray, " U"],
    end_U: Int64[np.ndarray, " U"],
    max_len: int,
    generator: np.random.Generator,
) -> tuple[Int64[np.ndarray, " W"], Int64[np.ndarray, " W"]]:
    """Cut each user's range at `start + r, start + r + max_len, …` with r random for long ones."""
    length_U = end_U - start_U
    first_U = np.where(
        length_U > max_len, generator.integers(1, max_len + 1, len(start_U)), length_U
    )
    pieces_U = 1 + -((first_U - length_U) // max_len)
    piece_W = np.arange(pieces_U.sum()) - np.repeat(np.cumsum(pieces_U) - pieces_U, pieces_U)
    cut_W = np.repeat(start_U + first_U, pieces_U) + piece_W * max_len
    end_W = np.minimum(cut_W, np.repeat(end_U, pieces_U))
    start_W = np.where(piece_W == 0, np.repeat(start_U, pieces_U), cut_W - max_len)
    return start_W, end_W


def _fill(length_W: Int64[np.ndarray, " W"], batch_events: int) -> Int64[np.ndarray, " batches1"]:
    """Cut windows, sorted by length, where the padded batch would outgrow `batch_events`."""
    offsets = [0]
    while offsets[-1] < len(length_W):
        first = offsets[-1]
        # The batch [first, end) is as wide as its last window: find the last end that fits.
        most = first + max(1, batch_events // int(length_W[first]))
        padded = length_W[first:most] * np.arange(1, len(length_W[first:most]) + 1)
        offsets.append(first + max(1, int(np.searchsorted(padded, batch_events, side="right"))))
    return np.array(offsets, dtype=np.int64)

"""Plans of an epoch: which pairs, windows of a history, or rows each batch holds, in random order.

Shape legend: E events or rows, W windows, L positions, B rows of a batch, H hard negatives, R rows
that a ranker learns from, T candidates of the first stage for each row, N drawn of them; C is
N + 1.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Generic, Literal, NamedTuple, TypeVar, final

import numpy as np
import torch
from jaxtyping import Float32, Int32, Int64
from torch import Tensor

from foretaste.data.batch import (
    DrawItems,
    PairBatch,
    Queries,
    Reads,
    RowBatch,
    SequenceBatch,
    check_drawn,
    read_histories,
    times_at,
)
from foretaste.data.draws import WHOLE, Share, mixed, torch_generator
from foretaste.data.interactions import Interactions
from foretaste.data.rows import Rows
from foretaste.errors import ConfigError

FindHard = Callable[[Tensor, Tensor, int, torch.Generator], Tensor]
"""Maps user_idx (B,), their observed item_idx (B,), the batch's number in the epoch and a source of
randomness to hard negatives (B, H)."""


Batch = TypeVar("Batch", covariant=True)


class Plan(ABC, Generic[Batch]):
    """An epoch's batches, made one by one on demand."""

    @property
    @abstractmethod
    def num_events(self) -> int:
        """Number of training events in the epoch, over all processes."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def batch(self, index: int) -> Batch:
        """Make one batch, or this process's share of it."""


WHOLE_ORDER = 1 << 24
"""Up to this many events, the order of an epoch is one permutation, of 8 bytes per event."""
_RUN, _SHUFFLED = 1 << 10, 1 << 20
"""For more events: the length of a run in the files, and the number of events shuffled together."""


@final
class BlockOrder:
    """The order of an epoch with very many events: shuffled runs of adjacent events.

    Runs of 1,024 events, adjacent in a memory map, are put in random order, and the events of 1,024
    runs are shuffled together. Any part of the order can be computed without the others, so a
    resumed run continues at its position, and memory does not grow with the events.
    """

    def __init__(self, num: int, seed: int, *, run: int = _RUN, shuffled: int = _SHUFFLED) -> None:
        """Draw the order of the runs.

        Args:
            num: Number of events.
            seed: Decides the order.
            run: Number of events in a run.
            shuffled: Number of events that are shuffled together, a multiple of `run`.
        """
        self.num, self.seed, self.run, self.runs = num, seed, run, shuffled // run
        whole = num // run
        self.run_R = np.random.default_rng([seed, 0]).permutation(whole)
        self._part = lru_cache(maxsize=4)(self._shuffled)

    def __len__(self) -> int:
        return self.num

    def __getitem__(self, places: slice) -> Int64[np.ndarray, " B"]:
        start, stop, _ = places.indices(self.num)
        size, found = self.run * self.runs, [np.empty(0, np.int64)]
        for number in range(start // size, -(-stop // size)):
            first = number * size
            found.append(self._part(number)[max(0, start - first) : stop - first])
        return np.concatenate(found)

    def _shuffled(self, number: int) -> Int64[np.ndarray, " S"]:
        """Return the shuffled events of one part; the last has those after the last run too."""
        first = self.run_R[number * self.runs : (number + 1) * self.runs] * self.run
        event_S = (first[:, None] + np.arange(self.run)).ravel()
        if (number + 1) * self.runs * self.run >= self.num:
            event_S = np.concatenate([event_S, np.arange(len(self.run_R) * self.run, self.num)])
        shuffled_S: np.ndarray = np.random.default_rng([self.seed, 1, number]).permutation(event_S)
        return shuffled_S


def _order(num: int, generator: np.random.Generator) -> Int64[np.ndarray, " E"] | BlockOrder:
    if num <= WHOLE_ORDER:
        return generator.permutation(num)
    return BlockOrder(num, int(generator.integers(2**31)))


@dataclass(frozen=True, eq=False, kw_only=True)
class ShuffledPlan(Plan[Batch]):
    """Batches of events in random order, with histories; they depend only on (seed, epoch)."""

    order_E: Int64[np.ndarray, " E"] | BlockOrder
    """Positions of the events or rows, in the order of the epoch."""
    batch_events: int
    reads: Reads
    max_len: int
    seed: int
    """Decides the draws of other events, items and hard negatives."""
    share: Share = WHOLE

    def __len__(self) -> int:
        return -(-len(self.order_E) // self.batch_events)

    @property
    def num_events(self) -> int:
        """Number of pairs or rows in the epoch, over all processes."""
        return len(self.order_E)


@final
@dataclass(frozen=True, eq=False, kw_only=True)
class PairPlan(ShuffledPlan[PairBatch]):
    """One epoch's batches of users and their items."""

    events: Interactions
    find_hard: FindHard | None = None

    def batch(self, index: int) -> PairBatch:
        """Gather one batch, or this process's share of it."""
        place_B = self.order_E[index * self.batch_events : (index + 1) * self.batch_events]
        share = self.share.of(len(place_B))
        user_B = torch.from_numpy(self.events.users_at(place_B))
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
        return self.find_hard(user_B, item_B, index, torch.Generator().manual_seed(int(word)))


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
        events: Each event is a pair, even a repeated one.
        batch_events: Number of pairs in a batch; the last batch of an epoch may be smaller.
        generator: Decides the order.
        reads: Which events of each user's history are read.
        max_len: Maximum number of these events.
        find_hard: Finds hard negatives for all pairs of a batch.
        share: The part of each batch that this process reads.
    """
    return PairPlan(
        events=events,
        order_E=_order(len(events), generator),
        batch_events=batch_events,
        reads=reads,
        max_len=max_len,
        seed=int(generator.integers(2**31)),
        find_hard=find_hard,
        share=share,
    )


Windows = Literal["last", "all"]


@final
@dataclass(frozen=True, eq=False, kw_only=True)
class SequencePlan(Plan[SequenceBatch]):
    """One epoch's batches, which depend only on (seed, epoch) and are made one by one on demand."""

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
        """Number of targets in the epoch, over all processes."""
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
            user_B=torch.from_numpy(self.events.users_at(self.start_W[rows])),
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
    """Cut histories into windows and put windows of similar length into batches, in random order.

    Args:
        events: Users without an event give no window.
        max_len: The longest window.
        batch_events: Approximate number of events in a batch, including padding; a batch has at
            least one window.
        windows: "last": each user's last `max_len` events, as in the SASRec paper. "all": every
            event once; long histories are cut at a random position into pieces of `max_len`.
        generator: Decides the cuts and the order.
        share: The part of each batch that this process reads.
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
    """Cut each user's range at `start + r, start + r + max_len, …`; r is random for long ones."""
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
    """Divide windows, sorted by length, so that no padded batch exceeds `batch_events`."""
    offsets = [0]
    while offsets[-1] < len(length_W):
        first = offsets[-1]
        # The batch [first, end) is as wide as its last window: find the last end that fits.
        most = first + max(1, batch_events // int(length_W[first]))
        padded = length_W[first:most] * np.arange(1, len(length_W[first:most]) + 1)
        offsets.append(first + max(1, int(np.searchsorted(padded, batch_events, side="right"))))
    return np.array(offsets, dtype=np.int64)


class DrawnOffer(NamedTuple):
    """Candidates drawn for a batch's rows."""

    item_BN: Int64[Tensor, "B N"]
    """item_idx; the row's own item if there are too few candidates, which is masked and gets no
    label."""
    first_BC: Float32[Tensor, "B C"]
    """The retriever's scores of the row's own item and of the drawn items; C is N + 1."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Offered:
    """Candidates for each training row, from a retriever that was not trained on the row."""

    item_ET: Int32[Tensor, "E T"]
    """item_idx, -1 for none; never the row's own item."""
    first_ET: Float32[Tensor, "E T"]
    """The retriever's scores of the candidates, which are added to the ranker's logit."""
    own_E: Float32[Tensor, " E"]
    """The retriever's score of the row's own item, NaN if that was not a candidate."""

    @property
    def asked(self) -> Int64[Tensor, " R"]:
        """The rows whose own item was a candidate; a ranker would never score the others."""
        return (~self.own_E.isnan()).nonzero().squeeze(1)

    def draw(
        self,
        row_B: Int64[Tensor, " B"],
        own_B: Int64[Tensor, " B"],
        num: int,
        *,
        generator: torch.Generator,
    ) -> DrawnOffer:
        """Draw candidates of some rows without replacement.

        Args:
            row_B: The rows.
            own_B: The item_idx of each row.
            num: N.
            generator: Source of all randomness.
        """
        item_BT = self.item_ET[row_B].long()
        chance_BT = torch.rand(item_BT.shape, generator=generator).masked_fill(item_BT < 0, -1.0)
        place_BN = chance_BT.topk(min(num, item_BT.shape[1])).indices
        item_BN = item_BT.gather(1, place_BN)
        first_BN = self.first_ET[row_B].gather(1, place_BN)
        return DrawnOffer(
            item_BN=item_BN.where(item_BN >= 0, own_B.unsqueeze(1)),
            first_BC=torch.cat([self.own_E[row_B].unsqueeze(1), first_BN], dim=1),
        )


@final
@dataclass(frozen=True, eq=False, kw_only=True)
class RowPlan(ShuffledPlan[RowBatch]):
    """One epoch's batches of rows that a ranker learns from."""

    rows: Rows
    num_drawn: int = 0
    draw: DrawItems | None = None
    offered: Offered | None = None
    """A retriever's candidates for each row; None: `draw` draws."""

    def batch(self, index: int) -> RowBatch:
        """Gather one batch, or this process's share; items are drawn for the complete batch."""
        row_B = self.order_E[index * self.batch_events : (index + 1) * self.batch_events]
        drawn_BN = torch.empty(len(row_B), 0, dtype=torch.int64)
        first_BC: Tensor | None = None
        if self.offered is not None:
            drawn_BN, first_BC = self.offered.draw(
                torch.from_numpy(row_B),
                self.rows.item_E[row_B],
                self.num_drawn,
                generator=torch_generator(self.seed, index),
            )
        elif self.draw is not None and self.num_drawn:
            check_drawn(len(row_B), self.num_drawn)
            drawn_BN = self.draw(
                torch.from_numpy(self.rows.user_E[row_B]),
                self.rows.item_E[row_B],
                self.num_drawn,
                generator=torch_generator(self.seed, index),
            )
        batch = self.rows.batch(
            row_B,
            reads=self.reads,
            max_len=self.max_len,
            seed=mixed(self.seed, index),
            drawn_BN=drawn_BN,
            share=(share := self.share.of(len(row_B))),
        )
        return batch if first_BC is None else replace(batch, first_BC=first_BC[share])


def plan_rows(
    rows: Rows,
    *,
    batch_events: int,
    generator: np.random.Generator,
    reads: Reads = "before",
    max_len: int = 50,
    num_drawn: int = 0,
    draw: DrawItems | None = None,
    offered: Offered | None = None,
    share: Share = WHOLE,
) -> RowPlan:
    """Put rows into batches, in random order.

    Args:
        rows: The training rows.
        batch_events: Number of rows in a batch; the last batch of an epoch may be smaller.
        generator: Decides the order.
        reads: Which events of each user's history are read.
        max_len: Maximum number of these events.
        num_drawn: Number of items drawn for each row: label 0 in every binary task, no label in
            other tasks.
        draw: The source of drawn items.
        offered: A retriever's candidates for each row, drawn from instead of `draw`; rows without
            candidates are left out.
        share: The part of each batch that this process reads.

    Raises:
        ConfigError: Items are to be drawn and `draw` is missing.
    """
    if num_drawn and draw is None and offered is None:
        raise ConfigError(
            f"{num_drawn} items are to be drawn for each row: set how they are drawn", name="draw"
        )
    return RowPlan(
        rows=rows,
        order_E=_order(len(rows), generator)
        if offered is None
        else generator.permutation(offered.asked.numpy()),
        batch_events=batch_events,
        reads=reads,
        max_len=max_len,
        seed=int(generator.integers(2**31)),
        num_drawn=num_drawn,
        draw=draw,
        offered=offered,
        share=share,
    )

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
"""From user_idx (B,), their observed item_idx (B,), the batch's number in the epoch and a source of
randomness to hard negatives (B, H)."""


Batch = TypeVar("Batch", covariant=True)


class Plan(ABC, Generic[Batch]):
    """An epoch's batches, made one by one when asked for."""

    @property
    @abstractmethod
    def num_events(self) -> int:
        """What is learned from in the epoch, of all processes together."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def batch(self, index: int) -> Batch:
        """Make one batch, or this process's share of it."""


WHOLE_ORDER = 1 << 24
"""Events up to which the order of an epoch is one permutation, which takes 8 bytes an event."""
_RUN, _SHUFFLED = 1 << 10, 1 << 20
"""Of more events: how many lie together in the files, and among how many they are shuffled."""


@final
class BlockOrder:
    """The order of an epoch of very many events: runs of neighbours, then events of many runs.

    Runs of 1,024 events, which lie together in a memory map, are put in random order, and the
    events of 1,024 runs are shuffled among each other. Any part of the order is found without the
    others, so a resumed run reads on where it was, and memory does not grow with the events.
    """

    def __init__(self, num: int, seed: int, *, run: int = _RUN, shuffled: int = _SHUFFLED) -> None:
        """Draw the order of the runs.

        Args:
            num: How many events.
            seed: Decides all of it.
            run: Events of a run.
            shuffled: Events that are shuffled among each other, a multiple of `run`.
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
        """Return the events of one part, shuffled; the last part has those behind the last run."""
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
    """Batches of events in random order, with histories; (seed, epoch) alone decides them."""

    order_E: Int64[np.ndarray, " E"] | BlockOrder
    """Positions of the events or rows, in the order of the epoch."""
    batch_events: int
    reads: Reads
    max_len: int
    seed: int
    """Decides which other events are read, and which items or hard negatives are drawn."""
    share: Share = WHOLE

    def __len__(self) -> int:
        return -(-len(self.order_E) // self.batch_events)

    @property
    def num_events(self) -> int:
        """Pairs or rows in the epoch, of all processes together."""
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


class DrawnOffer(NamedTuple):
    """Some of what was offered for a batch's rows."""

    item_BN: Int64[Tensor, "B N"]
    """item_idx; the row's own where too few were offered: it is hidden, and gets no label."""
    first_BC: Float32[Tensor, "B C"]
    """The retriever's score of the row's own item, then of those drawn; C is N + 1."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Offered:
    """Items to compare with each training row's own, by a retriever that never saw the row."""

    item_ET: Int32[Tensor, "E T"]
    """item_idx, -1 where there is none; never the row's own."""
    first_ET: Float32[Tensor, "E T"]
    """The retriever's scores of them, as they are added to the ranker's logit."""
    own_E: Float32[Tensor, " E"]
    """Its score of the row's own item, NaN where that was not a candidate."""

    @property
    def asked(self) -> Int64[Tensor, " R"]:
        """The rows whose own item was a candidate: of others no ranker would have been asked."""
        return (~self.own_E.isnan()).nonzero().squeeze(1)

    def draw(
        self,
        row_B: Int64[Tensor, " B"],
        own_B: Int64[Tensor, " B"],
        num: int,
        *,
        generator: torch.Generator,
    ) -> DrawnOffer:
        """Draw without replacement from what was offered for some rows.

        Args:
            row_B: Which rows.
            own_B: Their own item_idx.
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
    """What a retriever offered for each row; None: `draw` draws."""

    def batch(self, index: int) -> RowBatch:
        """Gather one batch, or this process's share of it; items are drawn for all of it."""
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
        rows: Those of training.
        batch_events: Rows of a batch; the last one of an epoch may be smaller.
        generator: Decides the order.
        reads: What of each user's history is read along.
        max_len: How many events of it at most.
        num_drawn: Items drawn for each row: a 0 for every binary task, without a label for others.
        draw: What draws them.
        offered: What a retriever offered for each row, drawn from in its place; rows that it
            offered nothing are left out.
        share: What of each batch this process reads.

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

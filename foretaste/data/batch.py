"""One batch: encoded features, queries, drawn items and histories.

The content of a batch depends only on a seed and the batch's number. It is decided before the batch
is divided among processes, so several processes learn from the same batches as one.

Shape legend: R rows, B picked rows, C single-valued fields (codes), G bags, N values of all bags
(in `DrawItems`, items drawn for each row), M numbers, F fields of all kinds, H events of all
histories.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor

from foretaste.data.arrays import check_fits
from foretaste.data.interactions import Interactions


def ranges(
    first_B: Int64[np.ndarray, " B"], length_B: Int64[np.ndarray, " B"]
) -> tuple[Int64[np.ndarray, " H"], Int64[np.ndarray, " B1"]]:
    """Return `first, first + 1, …` of each range, and the start and end of each in the result."""
    offsets_B1 = np.concatenate([[0], np.cumsum(length_B)])
    index_H = np.arange(offsets_B1[-1]) + np.repeat(first_B - offsets_B1[:-1], length_B)
    return index_H, offsets_B1


@dataclass(frozen=True, eq=False, kw_only=True)
class FieldTable:
    """Rows of encoded features. Fields are ordered: codes, bags, numbers, vectors."""

    code_RC: Int64[Tensor, "R C"]
    """One code of the side's space for each single-valued field."""
    bag_N: Int64[Tensor, " N"]
    """Codes of all bags, row by row and, within a row, bag by bag; no bag is empty."""
    bag_offsets_RG1: Int64[Tensor, "R G1"]
    """Bag g of row r: `bag_N[bag_offsets_RG1[r, g] : bag_offsets_RG1[r, g + 1]]`."""
    number_RM: Float32[Tensor, "R M"]
    """Standardised; 0 where missing."""
    vectors: tuple[Float32[Tensor, "R _"], ...]
    """One matrix per vector field; zeros where missing."""
    present_RF: Bool[Tensor, "R F"]
    """Which fields are known: neither missing nor unseen in training."""

    def __len__(self) -> int:
        return len(self.code_RC)

    @property
    def known_R(self) -> Bool[Tensor, " R"]:
        """True for rows with at least one known feature."""
        return self.present_RF.any(dim=1)

    def rows(self, row_B: Int64[Tensor, " B"]) -> "FieldTable":
        """Return some rows, in the order given; each in `[0, R)`."""
        offsets_BG1 = self.bag_offsets_RG1.index_select(0, row_B)
        start_B = offsets_BG1[:, 0]
        length_B = offsets_BG1[:, -1] - start_B
        first_B = length_B.cumsum(0) - length_B
        shift_B = start_B - first_B
        place_N = torch.arange(int(length_B.sum()), device=row_B.device)
        return FieldTable(
            code_RC=self.code_RC.index_select(0, row_B),
            bag_N=self.bag_N[place_N + shift_B.repeat_interleave(length_B)],
            bag_offsets_RG1=offsets_BG1 - shift_B.unsqueeze(1),
            number_RM=self.number_RM.index_select(0, row_B),
            vectors=tuple(vector.index_select(0, row_B) for vector in self.vectors),
            present_RF=self.present_RF.index_select(0, row_B),
        )

    def to(self, device: torch.device) -> "FieldTable":
        """Return the table on a device."""
        tensors = {name: tensor.to(device) for name, tensor in self.tensors().items()}
        return of_tensors(tensors, len(self.vectors))

    def tensors(self) -> dict[str, Tensor]:
        """Return every tensor under a unique name."""
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "vectors"}
        return plain | {f"vector-{n}": vector for n, vector in enumerate(self.vectors)}


def concat_rows(tables: Sequence[FieldTable]) -> FieldTable:
    """Concatenate tables of one side; there is at least one."""
    parts = [table.tensors() for table in tables]
    before = 0
    for part in parts:
        part["bag_offsets_RG1"] = part["bag_offsets_RG1"] + before
        before += len(part["bag_N"])
    together = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return of_tensors(together, len(tables[0].vectors))


def of_tensors(tensors: Mapping[str, Tensor], num_vectors: int) -> FieldTable:
    """Make a table from the result of `FieldTable.tensors`."""
    return FieldTable(
        code_RC=tensors["code_RC"],
        bag_N=tensors["bag_N"],
        bag_offsets_RG1=tensors["bag_offsets_RG1"],
        number_RM=tensors["number_RM"],
        vectors=tuple(tensors[f"vector-{n}"] for n in range(num_vectors)),
        present_RF=tensors["present_RF"],
    )


NO_TIME = -(2**63)
"""Marks an event without a known time."""

Times = Callable[[], Tensor]
"""Gathers the times of events in unix seconds (int64), `NO_TIME` if unknown. They cost nothing if
they are not read."""


def times_at(
    timestamp_s: Int64[np.ndarray, " E"] | None, index: Int64[np.ndarray, "*X"]
) -> Times | None:
    """Return a function that gathers the times of some events; None if there are no times."""
    if timestamp_s is None:
        return None
    return lambda: torch.from_numpy(timestamp_s[index])


@dataclass(frozen=True, kw_only=True)
class Queries:
    """A block of users to recommend for, with their histories, oldest first.

    Shape legend: B users, N events of all their histories, one after the other.
    """

    user_B: Int64[Tensor, " B"]
    """user_idx, -1 for a new user."""
    history_N: Int64[Tensor, " N"]
    """item_idx of all histories, concatenated."""
    offsets_B1: Int64[Tensor, " B1"]
    """History of row b: `history_N[offsets_B1[b] : offsets_B1[b + 1]]`; may be empty."""
    profile: FieldTable | None = None
    """Features of each row's user, read for users without training events; None: none are known."""
    context: FieldTable | None = None
    """Features of each row's context, such as the hour or the place; None: none are known."""
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
    """Histories of similar length in one matrix, oldest event first, padding at the end.

    Under causal attention an event attends only to earlier events, never to padding at the end, so
    no mask is needed.

    Shape legend: B rows, L positions.
    """

    user_B: Int64[Tensor, " B"]
    """user_idx of each row, -1 for a new user."""
    item_BL: Int64[Tensor, "B L"]
    """item_idx; 0 under padding."""
    valid_BL: Bool[Tensor, "B L"]
    """True = a real event."""
    times: Times | None = None
    """Gathers the time of each event (B, L), arbitrary under padding; None: none is known."""

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
    """The model's preparation of a batch that needs no weights."""

    @abstractmethod
    def to(self, device: torch.device) -> "Prepared":
        """Return it on a device."""


@dataclass(frozen=True, kw_only=True)
class PairBatch:
    """Observed pairs: users, their other events, and each pair's item.

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
    """Labelled rows: a user in a context and an item, with drawn items to compare it with.

    Shape legend: B rows, C items per row (its own first), T tasks.
    """

    queries: Queries
    """Users, their histories before the row, and the row's context."""
    item_BC: Int64[Tensor, "B C"]
    """item_idx; column 0 is the row's own, the others were drawn for it."""
    label_BCT: Float32[Tensor, "B C T"]
    """NaN where a task has no label; labels of a regression are in their own unit."""
    first_BC: Float32[Tensor, "B C"] | None = None
    """The retriever's score of each item, which is added to the ranker's logit; None: none."""

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
        max_len: Maximum number of events of each.
        rows: The queries to use, in this order; None: all.
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


_NEWEST = 8


def newest_events(
    queries: Queries, recency: float
) -> tuple[Int64[Tensor, " N"], Int64[Tensor, " B1"], Float[Tensor, " N"]]:
    r"""Return each history's 8 newest events, and weights to add to their usual weight of 1.

    .. math:: (\text{recency} - 1)\, 2^{-r}

    for the event with r newer ones.

    Returns:
        The items, the offsets of the queries, and the weights.
    """
    length_B = queries.offsets_B1.diff().clamp(max=_NEWEST)
    offsets_B1 = torch.cat([length_B.new_zeros(1), length_B.cumsum(0)])
    row_N = torch.repeat_interleave(length_B)
    newer_N = offsets_B1[1:][row_N] - 1 - torch.arange(len(row_N), device=row_N.device)
    item_N = queries.history_N[queries.offsets_B1[1:][row_N] - 1 - newer_N]
    return item_N, offsets_B1, (recency - 1) * torch.exp2(-newer_N.float())


def _on(device: torch.device, times: Times | None) -> Times | None:
    return None if times is None else lambda: times().to(device)


def check_drawn(num_rows: int, num: int) -> None:
    """Refuse to draw more items than fit in memory.

    Raises:
        TooLargeError: They do not.
    """
    check_fits(
        num_rows * num * 32,
        f"{num:,} items drawn for each of {num_rows:,} rows",
        "lower objective.negatives or training.batch_events",
        name="negatives",
        value=num,
    )


@runtime_checkable
class DrawItems(Protocol):
    """Draws items that a row's user has not interacted with, easy or hard ones."""

    def __call__(
        self,
        user_B: Int64[Tensor, " B"],
        positive_B: Int64[Tensor, " B"],
        num: int,
        *,
        generator: torch.Generator,
    ) -> Int64[Tensor, "B N"]:
        """Draw.

        Args:
            user_B: user_idx of each row.
            positive_B: The item_idx that was observed.
            num: N, draws for each row, with replacement.
            generator: Source of all randomness.

        Returns:
            item_idx; if nothing was found, the row's own item, which is masked and gets no label.
        """
        ...


Reads = Literal["nothing", "before", "others"]
"""The history of a row: none; the last events before it; or other events of the user drawn at
random, if the order has no meaning."""

ALL_ROWS = slice(None)


class History(NamedTuple):
    """The histories of a batch's rows, with the names of `Queries`."""

    history_N: Int64[Tensor, " H"]
    offsets_B1: Int64[Tensor, " B1"]
    times: Times | None


def read_histories(
    past: Interactions,
    user_B: Int64[np.ndarray, " B"],
    *,
    reads: Reads,
    max_len: int,
    end_B: Int64[np.ndarray, " B"],
    own_B: Int64[np.ndarray, " B"],
    generator: np.random.Generator,
    share: slice = ALL_ROWS,
) -> History:
    """Return each row's history.

    Args:
        past: The events of histories.
        user_B: user_idx of each row.
        reads: Which of them are read.
        max_len: Maximum number of events.
        end_B: For "before": position in `past` where the row's history ends.
        own_B: For "others": position in `past` of the row's own event, -1 if it is not there.
        generator: For "others": decides the draw, for all rows before `share` selects some.
        share: The rows whose histories are returned.
    """
    if reads == "nothing":
        nothing_B1 = np.zeros(len(user_B[share]) + 1, np.int64)
        return _at(past, np.empty(0, np.int64), nothing_B1)
    start_B = past.offsets[user_B]
    if reads == "before":
        start_B, end_B = start_B[share], end_B[share]
        first_B = np.maximum(start_B, end_B - max_len)
        index_H, offsets_B1 = ranges(first_B, end_B - first_B)
        return _at(past, index_H, offsets_B1)
    # The user's events from a random position on, wrapping around, without the row's own.
    size_B = past.offsets[user_B + 1] - start_B
    others_B = size_B - (own_B >= 0)
    turn_B = generator.integers(0, np.maximum(1, others_B))
    start_B, size_B, others_B, turn_B, own_B = (
        all_B[share] for all_B in (start_B, size_B, others_B, turn_B, own_B)
    )
    length_B = np.minimum(others_B, max_len)
    step_H, offsets_B1 = ranges(np.zeros_like(length_B), length_B)
    behind_B = np.where(own_B >= 0, own_B - start_B, -1)
    ahead_H = 1 + _once_around(step_H + np.repeat(turn_B, length_B), np.repeat(others_B, length_B))
    place_H = _once_around(ahead_H + np.repeat(behind_B, length_B), np.repeat(size_B, length_B))
    return _at(past, place_H + np.repeat(start_B, length_B), offsets_B1)


def _at(
    past: Interactions, index_H: Int64[np.ndarray, " H"], offsets_B1: Int64[np.ndarray, " B1"]
) -> History:
    return History(
        history_N=torch.from_numpy(past.item_idx[index_H].astype(np.int64)),
        offsets_B1=torch.from_numpy(offsets_B1),
        times=times_at(past.timestamp_s, index_H),
    )


def _once_around(
    place_H: Int64[np.ndarray, " H"], size_H: Int64[np.ndarray, " H"]
) -> Int64[np.ndarray, " H"]:
    """Wrap positions in `[0, 2 size)` into `[0, size)`, ten times as fast as a division."""
    around_H: Int64[np.ndarray, " H"] = place_H - size_H * (place_H >= size_H)
    return around_H

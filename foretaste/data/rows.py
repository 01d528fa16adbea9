"""Labelled rows: every event is a user in a context, an item, and the labels of some tasks.

A row's history holds the user's earlier events, never the row's own event or a later one. If only
some events are positive, histories hold only positive events and exclude the row's own second,
because items shown together are scored together.

Shape legend: E rows, B rows of a batch, N drawn items a row, T tasks.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated, Literal

import numpy as np
import torch
from annotated_types import Ge
from jaxtyping import Float32, Int64
from torch import Tensor

from foretaste.arguments import checked
from foretaste.config import CountOrZero
from foretaste.data.batch import (
    ALL_ROWS,
    DrawItems,
    FieldTable,
    Queries,
    Reads,
    RowBatch,
    check_drawn,
    read_histories,
)
from foretaste.data.draws import torch_generator
from foretaste.data.features import Features
from foretaste.data.interactions import Interactions, is_positive, positives_of
from foretaste.data.splits import TEST, TRAIN, VALIDATION, Split
from foretaste.data.tasks import Task, labels_of
from foretaste.data.vocabulary import check_rows
from foretaste.errors import DataError
from foretaste.shown import Shown

PartName = Literal["train", "validation", "test"]
_PARTS = {"train": TRAIN, "validation": VALIDATION, "test": TEST}
AnySeed = Annotated[int, Ge(0)]
"""A run's seed, or a 64-bit seed derived from it."""
_DRAWN_AT_ONCE = 1 << 16


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Rows(Shown):
    """Labelled rows of one part of a split, with each user's history before the row."""

    name: str
    """"train", "validation" or "test"."""
    events: Interactions
    """One event per row, in this order."""
    tasks: tuple[Task, ...]
    label_ET: Float32[np.ndarray, "E T"]
    """Labels in their own unit, NaN where missing."""
    context: FieldTable | None
    """Context features of the rows; None if there are none."""
    past: Interactions
    """The events that histories are made of."""
    end_E: Int64[np.ndarray, " E"]
    """Position in `past` where each row's history ends; it starts at the user's first event."""
    own_E: Int64[np.ndarray, " E"]
    """Position in `past` of the row's own event, -1 if it is not there."""
    drawn_EN: Int64[np.ndarray, "E N"]
    """item_idx of items drawn once for each row, to compare with its own; N may be 0."""

    def __len__(self) -> int:
        return len(self.events)

    @property
    def every(self) -> Int64[np.ndarray, " E"]:
        """The indices of all rows, to gather them in blocks."""
        return np.arange(len(self))

    @checked
    def draw(self, num: CountOrZero, draw: DrawItems, *, seed: AnySeed) -> "Rows":
        """Return the rows with drawn items, the same for equal seeds.

        If the data hold only positive events, the drawn items are the negatives of a measurement.

        Args:
            num: N, the number of items per row.
            draw: The source of drawn items.
            seed: Decides the draws.

        Raises:
            TooLargeError: They would not fit in memory.
        """
        check_drawn(len(self), num)
        drawn = [np.empty((0, num), np.int64)]
        for start in range(0, len(self), _DRAWN_AT_ONCE):
            rows = slice(start, start + _DRAWN_AT_ONCE)
            user_B = torch.from_numpy(self.events.user_idx[rows].astype(np.int64))
            item_B = torch.from_numpy(self.events.item_idx[rows].astype(np.int64))
            generator = torch_generator(seed, start)
            drawn.append(draw(user_B, item_B, num, generator=generator).numpy())
        return replace(self, drawn_EN=np.concatenate(drawn))

    @checked
    def batch(
        self,
        row_B: Int64[np.ndarray, " B"],
        *,
        reads: Reads = "before",
        max_len: CountOrZero = 50,
        seed: AnySeed = 0,
        drawn_BN: Int64[Tensor, "B N"] | None = None,
        share: slice = ALL_ROWS,
    ) -> RowBatch:
        """Gather some rows.

        Args:
            row_B: The rows to gather.
            reads: Which events of each user's history are read; for held-out rows, "others" means
                the last events before, because later ones are unknown.
            max_len: Maximum number of these events.
            seed: Decides which "others" are read.
            drawn_BN: Items drawn for these rows; None takes the result of `draw`.
            share: The part of `row_B` to return; the draw of "others" is made for all rows.

        Raises:
            DataError: The row does not exist.
        """
        check_rows(row_B, len(self), name="row_B")
        user_B = self.user_E[row_B]
        if reads == "others" and self.name != "train":
            reads = "before"
        history = read_histories(
            self.past,
            user_B,
            reads=reads,
            max_len=max_len,
            end_B=self.end_E[row_B],
            own_B=self.own_E[row_B],
            generator=np.random.default_rng(seed),
            share=share,
        )
        if drawn_BN is None:
            drawn_BN = torch.from_numpy(self.drawn_EN[row_B])
        row_B, drawn_BN = row_B[share], drawn_BN[share]
        rows_B = torch.from_numpy(row_B)
        item_B1 = self.item_E[row_B].unsqueeze(1)
        return RowBatch(
            queries=Queries(
                user_B=torch.from_numpy(user_B[share]),
                **history._asdict(),
                context=None if self.context is None else self.context.rows(rows_B),
            ),
            item_BC=torch.cat([item_B1, drawn_BN], dim=1),
            label_BCT=self._labels(rows_B, item_B1, drawn_BN),
        )

    @cached_property
    def user_E(self) -> Int64[np.ndarray, " E"]:
        """user_idx of each row."""
        return self.events.user_idx.astype(np.int64)

    @cached_property
    def item_E(self) -> Int64[Tensor, " E"]:
        """item_idx of each row."""
        return torch.from_numpy(self.events.item_idx.astype(np.int64))

    @cached_property
    def _label_of_drawn_T(self) -> Float32[Tensor, " T"]:
        label_T = [0.0 if task.kind == "binary" else np.nan for task in self.tasks]
        return torch.tensor(label_T, dtype=torch.float32)

    def _labels(
        self, rows_B: Int64[Tensor, " B"], item_B1: Int64[Tensor, "B 1"], drawn_BN: Tensor
    ) -> Float32[Tensor, "B C T"]:
        own_B1T = torch.from_numpy(self.label_ET)[rows_B].unsqueeze(1)
        if not drawn_BN.shape[1]:
            return own_B1T
        not_found_BN1 = (drawn_BN == item_B1).unsqueeze(2)
        drawn_BNT = self._label_of_drawn_T.expand(*drawn_BN.shape, -1)
        return torch.cat([own_B1T, drawn_BNT.masked_fill(not_found_BN1, np.nan)], dim=1)

    def _facts(self) -> dict[str, object]:
        tasks = ", ".join(task.name for task in self.tasks)
        return {"": repr(self.name), "rows": len(self), "tasks": tasks}


def training_rows(
    events: Interactions,
    *,
    tasks: Sequence[Task],
    context: FieldTable | None = None,
    positive: str = "",
) -> Rows:
    """Make a row of every event, with histories of the events before it.

    Raises:
        ConfigError: A column does not exist.
        DataError: A label does not fit its task.
    """
    if context is not None and len(context) != len(events):
        raise DataError(
            f"the context has {len(context)} rows for {len(events)} events: encode the "
            "context of these events first",
            name="context",
            value=len(context),
        )
    happened_E = is_positive(events, positive)
    past = positives_of(events, positive)
    before_E = np.cumsum(happened_E, dtype=np.int64) - happened_E
    end_E = before_E
    if (positive or events.positive) and events.timestamp_s is not None:
        end_E = before_E[_first_of_its_second(events)]
    return Rows(
        name="train",
        events=events,
        tasks=tuple(tasks),
        label_ET=labels_of(events, tasks),
        context=context,
        past=past,
        end_E=end_E,
        own_E=np.where(happened_E, before_E, -1),
        drawn_EN=np.empty((len(events), 0), np.int64),
    )


@checked
def rows_of(
    split: Split,
    part: PartName,
    *,
    tasks: Sequence[Task],
    features: Features | None = None,
    positive: str = "",
) -> Rows:
    """Make a row from every event of a part, with the history known at that time.

    In a rolling split, a row's history holds all earlier events of its user; otherwise it holds the
    user's events of the earlier parts.

    Args:
        split: A split.
        part: "train", "validation" or "test".
        tasks: The tasks whose labels are read.
        features: The features fitted to training, which encode the rows' context.
        positive: Column whose values above 0 mark the events of histories; "":
            `Interactions.positive`.

    Raises:
        ConfigError: A column does not exist.
        DataError: A label does not fit its task, or the context does not have its kind.
    """
    code = _PARTS[part]
    if split.rolling or part == "train":
        known_E = split.part_E <= code
        whole = training_rows(split.events.select(known_E), tasks=(), positive=positive)
        here_E = split.part_E[known_E] == code
        events, past = whole.events.select(here_E), whole.past
        end_E, own_E = whole.end_E[here_E], whole.own_E[here_E]
    else:
        events = split.events.select(split.part_E == code)
        past = positives_of(split.events.select(split.part_E < code), positive)
        end_E = past.offsets[events.user_idx.astype(np.int64) + 1]
        own_E = np.full(len(events), -1)
    return Rows(
        name=part,
        events=events,
        tasks=tuple(tasks),
        label_ET=labels_of(events, tasks),
        context=None if features is None else features.context_of(events),
        past=past,
        end_E=end_E,
        own_E=own_E,
        drawn_EN=np.empty((len(events), 0), np.int64),
    )


def _first_of_its_second(events: Interactions) -> Int64[np.ndarray, " E"]:
    """Return, for each event, the first event of its user in the same second."""
    place_E = np.arange(len(events))
    if events.timestamp_s is None or not len(events):
        return place_E
    new_E = np.ones(len(events), np.bool_)
    new_E[1:] = (np.diff(events.timestamp_s) != 0) | (np.diff(events.user_idx) != 0)
    first_E: Int64[np.ndarray, " E"] = np.maximum.accumulate(np.where(new_E, place_E, 0))
    return first_E

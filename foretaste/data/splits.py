"""Splits: the training part, the held-out parts, and the leaks between them.

This file also has the settings of a split; splitting.py makes the split.

Every split gives each event one part, and reports its leaks.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated, Literal

import numpy as np
import polars as pl
import torch
from jaxtyping import Bool, Int32, Int64, UInt8
from pydantic import Field, model_validator

from foretaste.arguments import checked, checked_class
from foretaste.config import Config, Seed
from foretaste.data.arrays import user_blocks
from foretaste.data.batch import Queries, ranges, times_at
from foretaste.data.features import FieldSide
from foretaste.data.interactions import Interactions, is_positive
from foretaste.data.vocabulary import check_rows
from foretaste.errors import DataError
from foretaste.shown import Shown

TRAIN, VALIDATION, TEST, UNUSED, NEGATIVE = 0, 1, 2, 3, 4
"""The values of `Split.part_E`. An UNUSED event is neither in training nor in any history. A
NEGATIVE is not an event but a pair that a published protocol compares with the user's test
events."""

LearnedFrom = Literal["train", "train and validation", "all events"]
"""The parts that a model was trained on."""

SplitKind = Literal[
    "temporal", "leave_last", "ratio", "random", "given", "cold_items", "cold_users"
]


_BY_ORDER: tuple[SplitKind, ...] = ("temporal", "leave_last", "ratio")
"""Splits that use the order of events as time if events have no times."""


Share = Annotated[float, Field(ge=0, lt=1)]


class SharesConfig(Config):
    """Two shares of the events, which together leave events to train on."""

    validation: Share = 0.1
    """Share of the events for validation; 0 for none."""
    test: Share = 0.1
    """Share of the events for the test; 0 for none: then nothing is measured."""

    @model_validator(mode="after")
    def _leave_something(self) -> "SharesConfig":
        if self.validation + self.test >= 1:
            raise ValueError(
                f"validation {self.validation:g} and test {self.test:g} leave nothing to train on"
            )
        return self


class TemporalSplitConfig(SharesConfig):
    """All users are cut at the same two times; the test is rolling."""

    kind: Literal["temporal"] = "temporal"
    stop_on: Literal["time", "leave_last"] = "time"
    """What validation is: the events between the two cuts; or each user's last event before the
    test, and then the model also trains on the other events between the cuts."""


class LeaveLastSplitConfig(Config):
    """Each user's last event is the test."""

    kind: Literal["leave_last"] = "leave_last"
    validation: bool = True
    """Whether each user's last event but one is held out for validation."""


class RatioSplitConfig(SharesConfig):
    """The last share of each user's own events is the test."""

    kind: Literal["ratio"] = "ratio"
    test: Share = 0.2
    """Share of each user's events, the last ones, for the test."""


class RandomSplitConfig(SharesConfig):
    """Events are held out at random, regardless of user and time."""

    kind: Literal["random"] = "random"
    seed: Seed = 0
    """Decides the draws; equal seeds give equal splits."""


class GivenSplitConfig(Config):
    """A column of the data holds each event's part."""

    kind: Literal["given"] = "given"
    column: str = "part"
    """Column of the part: train, validation, test or unused, or 0, 1, 2 or 3."""
    validation: Share = 0.0
    """Share of the training events that are drawn for validation if the data have no validation
    part."""
    validation_by: Literal["events", "blocks"] = "events"
    """"events": each event is drawn on its own. "blocks": for each user, a group of items that have
    users in common, which is closer to a test of users' last events if the data have no times."""
    seed: Seed = 0
    """Decides the draws; equal seeds give equal splits."""


class ColdItemsSplitConfig(SharesConfig):
    """All events of some items are held out, so that training has none of them."""

    kind: Literal["cold_items"] = "cold_items"
    test: Share = 0.2
    """Share of the items, not of the events; the same holds for validation."""
    seed: Seed = 0
    """Decides the draws; equal seeds give equal splits."""


class ColdUsersSplitConfig(SharesConfig):
    """All events of some users are held out, so that training has none of them."""

    kind: Literal["cold_users"] = "cold_users"
    test: Share = 0.2
    """Share of the users, not of the events; the same holds for validation."""
    seed: Seed = 0
    """Decides the draws; equal seeds give equal splits."""


SplitConfig = Annotated[
    TemporalSplitConfig
    | LeaveLastSplitConfig
    | RatioSplitConfig
    | RandomSplitConfig
    | GivenSplitConfig
    | ColdItemsSplitConfig
    | ColdUsersSplitConfig,
    Field(discriminator="kind"),
]


def find_leaks(
    kind: SplitKind, events: Interactions, part_E: UInt8[np.ndarray, " E"]
) -> tuple[str, ...]:
    """Return one sentence, with its numbers, for each leak of the future into training.

    Nothing leaks from a temporal split of events that never share a second.
    """
    train_E, test_E = part_E == TRAIN, part_E == TEST
    if not (train_E.any() and test_E.any()):
        return ()
    found = [_own_future(events, train_E, test_E)]
    if events.timestamp_s is None:
        return (*filter(None, found), _UNTIMED[kind])
    train_N = events.timestamp_s[train_E]
    train_N.sort()
    found = [
        _older_than_training("test", train_N, events.timestamp_s[test_E]),
        _older_than_training("validation", train_N, events.timestamp_s[part_E == VALIDATION]),
        *found,
        "" if kind in ("random", "cold_items", "cold_users") else _same_second(events, test_E),
    ]
    return tuple(filter(None, found))


def newer_than_own(
    events: Interactions, newer_E: Bool[np.ndarray, " E"], older_E: Bool[np.ndarray, " E"]
) -> int:
    """Count the `newer_E` events after the first `older_E` event of their user.

    Without times, a user's order counts as time; with times, the same second does not count as
    after.
    """
    time_E = events.timestamp_s if events.timestamp_s is not None else np.arange(len(events))
    first_U = np.full(events.num_users, np.iinfo(np.int64).max)
    older_N, newer = np.flatnonzero(older_E), 0
    np.minimum.at(first_U, events.users_at(older_N), time_E[older_N])
    for first, last in user_blocks(events.offsets):
        here = slice(*events.offsets[[first, last]])
        first_B = np.repeat(first_U[first:last], np.diff(events.offsets[first : last + 1]))
        newer += int((newer_E[here] & (time_E[here] > first_B)).sum())
    return newer


_UNTIMED: dict[SplitKind, str] = {
    "temporal": "no times: it is unknown how much of training is newer than the test",
    "leave_last": "no times: the order of rows is the order in time within a user, and how much "
    "of training is newer than other users' test events cannot be said",
    "ratio": "no times: the order of rows is the order in time within a user, and how much of "
    "training is newer than other users' test events cannot be said",
    "random": "no times: the order of rows is the order in time, and events were held out "
    "whatever their order",
    "given": "no times: it is unknown what was known when, because the parts were given",
    "cold_items": "no times: the order of rows is the order in time, and items were held out "
    "whatever their order",
    "cold_users": "no times: users were held out regardless of time",
}


def _older_than_training(
    name: str, train_N: Int64[np.ndarray, " N"], held_T: Int64[np.ndarray, " T"]
) -> str:
    """Compare all held-out events with all training events, `train_N` sorted."""
    older = int((held_T < train_N[-1]).sum())
    if not older:
        return ""
    newer_T = len(train_N) - np.searchsorted(train_N, held_T, side="right")
    return (
        f"{_share(older, len(held_T))} of the {name} events are older than the newest training "
        f"event; on average {newer_T.mean() / len(train_N):.1%} of training is newer than a "
        f"{name} event"
    )


def _own_future(
    events: Interactions, train_E: Bool[np.ndarray, " E"], test_E: Bool[np.ndarray, " E"]
) -> str:
    newer = newer_than_own(events, train_E, test_E)
    if not newer:
        return ""
    return (
        f"{_share(newer, int(train_E.sum()))} of the training events came after a test event of "
        "the same user"
    )


def _same_second(events: Interactions, test_E: Bool[np.ndarray, " E"]) -> str:
    """Count test events that are ordered after their predecessor only by the order of the file."""
    if events.timestamp_s is None:
        return ""
    test_T = np.flatnonzero(test_E)
    later_T = test_T[~np.isin(test_T, events.offsets)]  # not the first event of their user
    tied = int((events.timestamp_s[later_T] == events.timestamp_s[later_T - 1]).sum())
    if not tied:
        return ""
    return (
        f"{_share(tied, len(test_T))} of the test events share a second with the event of "
        "their user before them: which came first is the order of the file"
    )


def _share(count: int, total: int) -> str:
    return f"{count / total:.1%} ({count:,} of {total:,})"


@checked_class
@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Holdout(Shown):
    """A held-out part: the targets, and the known history before each of them.

    Query `q` is user `user_Q[q]` with the history `events.item_idx[events.offsets[user] :
    end_Q[q]]`; its targets are `target_item[target_offsets[q] : target_offsets[q + 1]]`, one or
    more.

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
    target_timestamp_s: Int64[np.ndarray, " N"] | None = None
    """Unix seconds of each target; None if the events have no times."""
    context: pl.DataFrame | None = None
    """The context of each query's first target, which is the context of the request."""
    listed: Interactions | None = None
    """The items that each user's targets are compared with, if the data list them."""

    def __len__(self) -> int:
        return len(self.user_Q)

    @cached_property
    def has_history_Q(self) -> Bool[np.ndarray, " Q"]:
        """True if the user has earlier events; the other queries are counted separately."""
        begun_Q: Bool[np.ndarray, " Q"] = self.end_Q > self.events.offsets[self.user_Q]
        return begun_Q

    @checked
    def queries(self, rows: Int64[np.ndarray, " B"], moment: FieldSide | None = None) -> Queries:
        """Return some of the queries as one block, with their context encoded by `moment`.

        Raises:
            DataError: There is no such row.
        """
        check_rows(rows, len(self), name="rows")
        given = None if moment is None or self.context is None else self.context[rows]
        start, end = self.events.offsets[self.user_Q[rows]], self.end_Q[rows]
        index, offsets = ranges(start, end - start)
        return Queries(
            user_B=torch.from_numpy(self.user_Q[rows]),
            history_N=torch.from_numpy(self.events.item_idx[index].astype(np.int64)),
            offsets_B1=torch.from_numpy(offsets),
            times=times_at(self.events.timestamp_s, index),
            context=None if moment is None or given is None else moment.encode(given),
        )

    def _facts(self) -> dict[str, object]:
        return {"": repr(self.name), "queries": len(self), "targets": len(self.target_item)}


@dataclass(frozen=True)
class PartSize:
    """The size of a part of a split, and how much of it is unknown in training."""

    name: str
    """"train", "validation" or "test"."""
    events: int
    users: int
    users_in_training: int
    """Users of this part with a training event."""
    queries: int
    queries_without_history: int
    """Queries without any history, which are counted separately."""
    events_of_new_items: int
    """Targets without a training event."""


@checked_class
@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Split(Shown):
    """Events and the part of each.

    Shape legend: E events.
    """

    kind: SplitKind
    events: Interactions
    part_E: UInt8[np.ndarray, " E"]
    rolling: bool
    """True: each held-out event is its own query, predicted from all earlier events of its user.
    False: a user's held-out events are predicted together from the earlier parts."""
    leaks: tuple[str, ...] = ()
    """One sentence for each leak of the future into training."""
    notes: tuple[str, ...] = ()
    """Notes with counts on events that the split could not hold out, such as users with too few
    events."""
    learned_from: LearnedFrom = "train"
    """The original parts of the split that are now in training."""

    def __post_init__(self) -> None:
        if len(self.part_E) != len(self.events):
            raise DataError(
                f"part_E has {len(self.part_E):,} values, and there are {len(self.events):,}",
                name="part_E",
                value=len(self.part_E),
            )

    @property
    def ordered(self) -> bool:
        """Whether the order of a user's events has a meaning, by their times or by the split."""
        return self.events.timestamp_s is not None or self.kind in _BY_ORDER

    @cached_property
    def train(self) -> Interactions:
        return self.events.select(self.part_E == TRAIN)

    @cached_property
    def validation(self) -> Holdout:
        return self._holdout(VALIDATION, "validation")

    @cached_property
    def test(self) -> Holdout:
        return self._holdout(TEST, "test")

    @checked
    def refit(self) -> "Split":
        """Return the same split with its validation events moved into training."""
        return self._with_in_training((VALIDATION,), "train and validation")

    @checked
    def everything(self) -> "Split":
        """Return the same split with its validation and test events moved into training.

        A model that is trained on it is for serving: it has every user's newest events, and no
        events are left to measure it. Unused events stay unused.
        """
        return self._with_in_training((VALIDATION, TEST), "all events")

    @property
    def has_test(self) -> bool:
        """Whether any event is held out for the test."""
        return bool((self.part_E == TEST).any())

    def _with_in_training(self, parts: tuple[int, ...], learned_from: LearnedFrom) -> "Split":
        part_E = np.where(np.isin(self.part_E, parts), TRAIN, self.part_E).astype(np.uint8)
        leaks = find_leaks(self.kind, self.events, part_E)
        return replace(self, part_E=part_E, leaks=leaks, learned_from=learned_from)

    @checked
    def sizes(self) -> tuple[PartSize, ...]:
        """Return the sizes of training, validation and test, for a table or a report."""
        trained_U = np.diff(self.train.offsets) > 0
        users = int(trained_U.sum())
        train = PartSize("train", len(self.train), users, users, 0, 0, 0)
        return (train, *(self._size(part, trained_U) for part in (self.validation, self.test)))

    def _size(self, part: Holdout, trained_U: Bool[np.ndarray, " U"]) -> PartSize:
        return PartSize(
            name=part.name,
            events=len(part.target_item),
            users=len(np.unique(part.user_Q)),
            users_in_training=int(trained_U[np.unique(part.user_Q)].sum()),
            queries=len(part),
            queries_without_history=int((~part.has_history_Q).sum()),
            events_of_new_items=int((self.train.item_count[part.target_item] == 0).sum()),
        )

    def _holdout(self, part: int, name: str) -> Holdout:
        if (positives := happened_split(self)) is not self:
            return positives._holdout(part, name)
        if self.rolling:
            events = self.events.select(self.part_E <= part)
            part_of = self.part_E[self.part_E <= part]
            end_Q = np.flatnonzero(part_of == part)
            user_Q = events.users_at(end_Q)
            targets, counts = events.item_idx[end_Q], np.ones(len(end_Q), np.int64)
            time_N = None if events.timestamp_s is None else events.timestamp_s[end_Q]
            context = None if events.context is None else events.context[end_Q]
        else:
            events, wanted = (
                self.events.select(self.part_E < part),
                self.events.select(self.part_E == part),
            )
            counts = np.diff(wanted.offsets)
            user_Q = np.flatnonzero(counts)
            end_Q, counts = events.offsets[user_Q + 1], counts[user_Q]
            targets, context = wanted.item_idx, wanted.context
            time_N = wanted.timestamp_s
            context = None if context is None else context[wanted.offsets[user_Q]]
        return Holdout(
            name=name,
            events=events,
            user_Q=user_Q,
            end_Q=end_Q,
            target_offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
            target_item=targets,
            target_timestamp_s=time_N,
            context=context,
            listed=self._listed if part == TEST else None,
        )

    @cached_property
    def _listed(self) -> Interactions | None:
        listed_E = self.part_E == NEGATIVE
        return self.events.select(listed_E) if listed_E.any() else None

    def _facts(self) -> dict[str, object]:
        train, validation, test, *_ = np.bincount(self.part_E, minlength=3).tolist()
        counts = {"events to train": train, "to validate": validation, "to test": test}
        return {"": repr(self.kind), **counts}

    def _rows(self) -> list[tuple[object, ...]]:
        heads = ("part", "events", "users", "queries", "queries without a history")
        sizes = [
            (size.name, size.events, size.users, size.queries, size.queries_without_history)
            for size in self.sizes()
        ]
        return [heads, *sizes]


def happened_split(split: Split, positive: str = "") -> Split:
    """Return a split of only the positive events, which are the targets of lists.

    Negatives that the data list for the test are kept, even those with a positive label.

    Raises:
        ConfigError: The column does not exist.
    """
    if not (positive or split.events.positive):
        return split
    keep_E = is_positive(split.events, positive) | (split.part_E == NEGATIVE)
    if keep_E.all():
        return split
    return replace(split, events=split.events.select(keep_E), part_E=split.part_E[keep_E])

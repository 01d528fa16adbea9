"""Tasks, the labels of events that they are trained on, and a synthetic log with a known answer.

Shape legend of the synthetic log: E events, U users, N impressions.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
import polars as pl
from jaxtyping import Bool, Float, Float32
from pydantic import Field, model_validator
from torch import Tensor

from foretaste.config import Config, Seed, Weight
from foretaste.data.arrays import check_fits, flattening
from foretaste.data.interactions import Interactions, no_column
from foretaste.errors import ConfigError, DataError

Weights = Mapping[str, float | int]
"""The weight in the score of one unit of each task's prediction, by name; 0 for other tasks. The
unit is the label's own: a probability, a second, a level."""


_OF_ONE_KIND = (
    ("above", "binary", None),
    ("levels", "ordinal", ()),
    ("transform", "regression", "none"),
    ("loss", "regression", "squared"),
)
"""Settings that have no effect for a task of another kind, with their defaults."""


class Task(Config):
    """One thing to predict: a click, a purchase, minutes watched, stars."""

    name: str = Field(min_length=1)
    """Name of the task; its metrics and its weight in a request carry it."""
    kind: Literal["binary", "regression", "ordinal"] = "binary"
    """"binary": whether an event happens; "regression": a quantity, 0 or more if `transform` is
    "log1p"; "ordinal": one of several ordered levels."""
    column: str = ""
    """The events' column that holds the labels, NaN where one is missing. If it is empty, every
    event of a binary task has label 1, and drawn items have label 0."""
    above: float | None = None
    """For a binary task: a label is 1 if the column's value is above this, else 0. None: the column
    already holds 0 and 1."""
    levels: tuple[float, ...] = ()
    """For an ordinal task: the values that a label may have, ascending."""
    transform: Literal["none", "log1p"] = "none"
    """For a regression: whether the network learns the label or the logarithm of 1 plus it.
    Predictions are in the label's own unit either way."""
    loss: Literal["squared", "huber"] = "squared"
    """For a regression: the squared error, or the Huber loss, which outliers change less."""
    weight: Weight = 1.0
    """Weight of the task in the sum of losses, and in the score that orders a list. In that score
    each task is between 0 and 1: a probability; the place of the expected level between the lowest
    and the highest; or, for a quantity, about the share of training labels below the prediction."""
    list_weight: Weight | None = None
    """Weight in the score that orders a list, if it is not `weight`. If it is 0 for all tasks but
    one, that task alone decides the order."""

    @model_validator(mode="after")
    def _is_whole(self) -> "Task":
        if self.kind != "binary" and not self.column:
            raise ValueError(f"task {self.name!r} is {self.kind}: name the column of its labels")
        if self.kind == "ordinal" and (
            len(self.levels) < 2 or list(self.levels) != sorted(set(self.levels))
        ):
            raise ValueError(
                f"task {self.name!r} is ordinal: give its levels, two or more, ascending, as in "
                "[1, 2, 3, 4, 5]"
            )
        for setting, kind, default in _OF_ONE_KIND:
            if self.kind != kind and getattr(self, setting) != default:
                raise ValueError(
                    f"task {self.name!r} is {self.kind}, and `{setting}` is of {kind} tasks alone: "
                    f'leave it out, or set kind = "{kind}"'
                )
        if self.above is not None and not self.column:
            raise ValueError(f"task {self.name!r} has a limit in `above` and no column: name one")
        return self


class LabelScale(NamedTuple):
    """Mean and standard deviation of a regression's labels, after the task's transform."""

    mean: float
    std: float
    """Above 0; 1 where all labels are equal."""


def label_scale(task: Task, label_E: Float[np.ndarray, " E"]) -> LabelScale:
    """Return the mean and the standard deviation (of the whole, not of a sample) of labels.

    Args:
        task: A regression.
        label_E: Training labels in their own unit, NaN where one is missing.

    Raises:
        DataError: There is no label.
    """
    found_E = label_E[~np.isnan(label_E)].astype(np.float64)
    if len(found_E) == 0:
        raise DataError(
            f"task {task.name!r} has no label in training (column {task.column!r}): leave it out",
            column=task.column,
            name=task.name,
        )
    learned_E = np.log1p(found_E) if task.transform == "log1p" else found_E
    return LabelScale(float(learned_E.mean()), float(learned_E.std()) or 1.0)


def standardised(task: Task, label: Tensor, scale: LabelScale) -> Tensor:
    """Return the standardised labels of a regression; NaN stays NaN."""
    learned = label.log1p() if task.transform == "log1p" else label
    return (learned - scale.mean) / scale.std


def in_own_unit(task: Task, value: Tensor, scale: LabelScale) -> Tensor:
    """Undo `standardised`: convert the output of a regression's head to the label's own unit."""
    learned = value * scale.std + scale.mean
    return learned.expm1() if task.transform == "log1p" else learned


_LOG = ', or set transform = "log1p"'


def labels_of(events: Interactions, tasks: Sequence[Task]) -> Float32[np.ndarray, "E T"]:
    """Return the label of each event for each task, in the label's own unit, NaN where missing.

    Raises:
        ConfigError: A task names a column that the events do not have.
        DataError: A label does not fit its task; the message names the value.
    """
    label_ET = np.empty((len(events), len(tasks)), np.float32)
    for place, task in enumerate(tasks):
        label_ET[:, place] = _labels(events, task)
    return label_ET


def check_learnable(
    label_ET: Float32[np.ndarray, "E T"], tasks: Sequence[Task], *, num_drawn: int = 0
) -> None:
    """Raise an error for labels from which a task cannot be learned.

    Args:
        label_ET: The training labels.
        tasks: Their tasks.
        num_drawn: Number of items drawn for each event, with label 0 in every binary task.

    Raises:
        DataError: A task has no label at all, or a binary one only one class.
    """
    for task, label_E in zip(tasks, label_ET.T, strict=True):
        known_E = label_E[~np.isnan(label_E)]
        if not len(known_E):
            raise DataError(
                f"task {task.name!r} has no label on any of {len(label_E):,} training events: "
                "leave the task out, or give its column values",
                column=task.column,
                name=task.name,
            )
        if task.kind != "binary":
            continue
        low, high = float(known_E.min()), float(known_E.max())
        if high == 0 or (low == 1 and not num_drawn):
            missing = "negatives to draw, or events with label 0" if low else "events with label 1"
            raise DataError(
                f"task {task.name!r} has one class only: every label of training is {high:g}; "
                f"give it {missing}, or leave it out",
                column=task.column,
                name=task.name,
                value=float(high),
            )


def notes_about_labels(events: Interactions, tasks: Sequence[Task]) -> tuple[str, ...]:
    """Return a note for each regression whose outliers make its other labels nearly equal.

    Raises:
        ConfigError: A task names a column that the events do not have.
        DataError: A label does not fit its task.
    """
    said = []
    for task in tasks:
        if task.kind != "regression":
            continue
        label_E = _labels(events, task).astype(np.float64)
        label_E = label_E[~np.isnan(label_E)]
        furthest = flattening(np.log1p(label_E) if task.transform == "log1p" else label_E)
        if furthest is not None:
            log = task.transform == "none" and label_E.min() >= 0
            helps = log and flattening(np.log1p(label_E)) is None
            said.append(
                f"task {task.name!r}: column {task.column!r} has a label so far away, "
                f"{label_E[furthest]:g}, that nearly all of the {len(label_E):,} become equal: "
                f"correct it, or leave out its row{_LOG if helps else ''}"
            )
    return tuple(said)


def zeros_in_histories(
    events: Interactions, tasks: Sequence[Task], *, positive: str = ""
) -> tuple[str, int] | None:
    """Return the column that marks events as not positive, and the number of such events.

    This is for a log of impressions without `positive`. None if some task has no column, so that
    every event is positive, or if a column has values other than 0 and 1.

    Args:
        events: The training events.
        tasks: The tasks of the model.
        positive: Column that marks the positive events; "": `Interactions.positive`.
    """
    if positive or events.positive or not all(task.column for task in tasks):
        return None
    for task in tasks:
        if task.kind == "binary" and task.above is None:
            num_zeros = int((labels_of(events, [task]) == 0).sum())
            return (task.column, num_zeros) if num_zeros else None
    return None


def notes_about_histories(
    events: Interactions, tasks: Sequence[Task], *, reads: bool
) -> tuple[str, ...]:
    """Return a note that histories would contain events that are not positive.

    Args:
        events: The events of histories.
        tasks: The tasks of the ranker.
        reads: Whether the ranker reads histories.
    """
    found = zeros_in_histories(events, tasks)
    if found is None or np.diff(events.offsets).max(initial=0) < 2:
        return ()
    column, num_zeros = found
    rows = f"{num_zeros:,} of {len(events):,} events have {column!r} = 0"
    advice = f"give positive = {column!r} when reading"
    if reads:
        return (f"{rows} and are in histories like all others: {advice}, if they should not",)
    return (f"no histories are read, as {rows}: {advice}, and histories are of the others",)


def _labels(events: Interactions, task: Task) -> Float32[np.ndarray, " E"]:
    if not task.column:
        return events.positive_E.astype(np.float32)
    if task.column not in events.columns:
        raise no_column(
            events, task.column, f"task {task.name!r} takes its labels from column {task.column!r}"
        )
    value_E = events.columns[task.column].astype(np.float32)
    if task.kind == "binary" and task.above is not None:
        return np.where(np.isnan(value_E), value_E, value_E > task.above).astype(np.float32)
    if task.kind == "binary":
        allowed_E = (value_E == 0) | (value_E == 1)
        _refuse(
            task, value_E, allowed_E, "0 or 1: set `above` to divide other values into two classes"
        )
    elif task.kind == "ordinal":
        levels = ", ".join(f"{level:g}" for level in task.levels)
        allowed_E = np.isin(value_E, np.array(task.levels, np.float32))
        _refuse(task, value_E, allowed_E, f"its levels {levels}: name all of them")
    elif task.transform == "log1p":
        _refuse(task, value_E, value_E >= 0, "0 or more under log1p: take another transform")
    return value_E


def _refuse(
    task: Task,
    value_E: Float32[np.ndarray, " E"],
    allowed_E: Bool[np.ndarray, " E"],
    what: str,
) -> None:
    wrong_E = ~allowed_E & ~np.isnan(value_E)
    if wrong_E.any():
        raise DataError(
            f"task {task.name!r}: column {task.column!r} holds {value_E[wrong_E][0]:g} (and "
            f"{int(wrong_E.sum()) - 1:,} more such), but labels of this {task.kind} task are "
            f"{what}, or fix them",
            column=task.column,
            name=task.name,
            value=float(value_E[wrong_E][0]),
        )


class MediaLog(NamedTuple):
    """The tables of a synthetic media site, for `read_interactions`."""

    events: pl.DataFrame
    """One row per impression: `user`, `item`, `time`, `click`, and for clicks `minutes` and
    `like`."""
    items: pl.DataFrame
    """The `topic` of each `item`."""


def media_log(
    *,
    history: bool,
    num_users: int = 3_000,
    num_items: int = 1_200,
    num_topics: int = 6,
    impressions: int = 30,
    effect: float = 3.0,
    seed: Seed = 0,
) -> MediaLog:
    """Make a log of impressions whose clicks depend on a user's temporary interest, or do not.

    A user is interested in one topic for about 20 impressions, then in another. Items of the topic
    are clicked, read for longer and liked more often. Without `history`, an interest lasts for one
    impression only, so that earlier events are uninformative; all else is the same.

    Args:
        history: Whether interests last for several impressions.
        num_users: U.
        num_items: Number of items; each has a topic and a quality.
        num_topics: Number of topics, with equal numbers of items.
        impressions: N.
        effect: The increase of a click's logit by an interest.
        seed: Decides all draws.

    Raises:
        ConfigError: There are too few items for the topics, or a number is below 1.
        TooLargeError: The rows would not fit in memory.
    """
    if min(num_users, num_topics, impressions) < 1 or num_items < num_topics:
        raise ConfigError(
            f"{num_users} users, {num_items} items, {num_topics} topics and {impressions} "
            "impressions: give 1 or more of each, and an item for each topic",
            name="num_items",
            value=num_items,
        )
    num_rows = num_users * impressions
    check_fits(num_rows * 200, f"{num_rows:,} rows", "make fewer", name="num_users")
    draw = np.random.default_rng(seed)
    topic_I, quality_I = np.arange(num_items) % num_topics, draw.normal(0, 0.5, num_items)
    item_UN = (num_items * draw.random((num_users, impressions)) ** 1.5).astype(np.int64)
    changes_UN = draw.random(item_UN.shape) < (0.05 if history else 1.0)
    since_UN = np.maximum.accumulate(np.where(changes_UN, np.arange(impressions), 0), axis=1)
    drawn_UN = draw.integers(num_topics, size=item_UN.shape)
    matches_UN = topic_I[item_UN] == np.take_along_axis(drawn_UN, since_UN, axis=1)
    logit_UN = quality_I[item_UN] + effect * matches_UN
    chance_UN = draw.random((2, *item_UN.shape)) < 1 / (1 + np.exp(1.5 - logit_UN))
    minutes_UN = np.exp(1 + 0.4 * logit_UN + 0.5 * draw.normal(size=item_UN.shape)).round(2)
    times_UN = np.sort(draw.integers(30 * 86_400, size=item_UN.shape), axis=1)
    click_E = chance_UN[0].ravel()
    events = pl.DataFrame(
        {
            "user": np.repeat(np.arange(num_users), impressions),
            "item": item_UN.ravel(),
            "time": 1_700_000_000 + times_UN.ravel(),
            "click": click_E.astype(np.int64),
            "minutes": minutes_UN.ravel(),
            "like": chance_UN[1].ravel().astype(np.int64),
        }
    ).with_columns(pl.when(pl.col("click") == 1).then(pl.col("minutes", "like")))
    topics = [f"topic {topic}" for topic in topic_I]
    return MediaLog(events, pl.DataFrame({"item": np.arange(num_items), "topic": topics}))


def metric_name(metric: str, task: str, tasks: tuple[Task, ...], suffix: str) -> str:
    """Return the full name of a metric, with its task if there are several."""
    return f"{metric}_{task}{suffix}" if len(tasks) > 1 else f"{metric}{suffix}"

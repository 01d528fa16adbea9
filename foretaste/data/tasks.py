"""What a ranking model is asked of a user and an item: tasks, each with labels of its own.

Shape legend: E events.
"""

from collections.abc import Mapping
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor

from foretaste.config import Config, Weight
from foretaste.errors import DataError

Weights = Mapping[str, float | int]
"""How much one unit of each task's prediction counts in a score, by name; 0 for those that are not
named. The unit is the label's own: a probability, a second, a level."""


_OF_ONE_KIND = (
    ("above", "binary", None),
    ("levels", "ordinal", ()),
    ("transform", "regression", "none"),
    ("loss", "regression", "squared"),
)
"""Settings that would be without effect for a task of another kind, with their defaults."""


class Task(Config):
    """One thing to predict: a click, a purchase, minutes watched, stars."""

    name: str = Field(min_length=1)
    """Also the key of its figures, and of its weight when lists are made."""
    kind: Literal["binary", "regression", "ordinal"] = "binary"
    """Whether it happens; how much of it, 0 or more where `transform` is "log1p"; or which of some
    ordered levels."""
    column: str = ""
    """The events' column that holds the labels, NaN where one is missing. Empty, of a binary
    task: every event is a 1, and what is drawn is a 0."""
    above: float | None = None
    """Of a binary task: a label is 1 above this value of the column, else 0; none: the column
    holds 0 and 1 already."""
    levels: tuple[float, ...] = ()
    """Of an ordinal task: the values that a label may have, ascending."""
    transform: Literal["none", "log1p"] = "none"
    """Of a regression: what is learned is the label, or the logarithm of 1 plus it; predictions
    are in the label's own unit either way."""
    loss: Literal["squared", "huber"] = "squared"
    """Of a regression: Huber's is less moved by far-out labels."""
    weight: Weight = 1.0
    """In the sum of the tasks' losses; and in the score that orders a list of several tasks, where
    each answers between 0 and 1: its probability, the expected level's place between the lowest and
    the highest, or about the share of training labels below the quantity that it predicts."""
    list_weight: Weight | None = None
    """In the score that orders a list, where it is another than `weight`: with 0 for all tasks but
    one, that one alone orders."""

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
    """Where a regression's labels lie and how far they spread, after the task's transform."""

    mean: float
    std: float
    """Above 0; 1 where all labels are alike."""


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
            f"task {task.name!r} has no label in training (column {task.column!r}): leave it out"
        )
    learned_E = np.log1p(found_E) if task.transform == "log1p" else found_E
    return LabelScale(float(learned_E.mean()), float(learned_E.std()) or 1.0)


def standardised(task: Task, label: Tensor, scale: LabelScale) -> Tensor:
    """Return what a regression learns from labels in their own unit: NaN stays NaN."""
    learned = label.log1p() if task.transform == "log1p" else label
    return (learned - scale.mean) / scale.std


def in_own_unit(task: Task, value: Tensor, scale: LabelScale) -> Tensor:
    """Undo `standardised`: from what a regression's head gives to the label's own unit."""
    learned = value * scale.std + scale.mean
    return learned.expm1() if task.transform == "log1p" else learned

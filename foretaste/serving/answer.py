"""What a recommender answers: rows with external ids, and where each came from."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from foretaste.serving.stages import Stage

Source = Literal["model", "fold-in", "features", "popular"]
"""Where a row came from. "model": a user (or, for similar items, an item) of training;
"fold-in": a history of somebody whom training never saw; "features": a profile, or the features of
a new item; "popular": the most popular items, for somebody of whom nothing is known."""


@dataclass(frozen=True, slots=True)
class Recommendation:
    """One row of an answer."""

    item_id: int | str
    score: float
    """Higher is better; to be compared within one answer only."""
    source: Source
    attributes: Mapping[str, object] = field(default_factory=dict)
    """The item's row of the item table, such as its `title`; empty without one."""
    predictions: Mapping[str, float] = field(default_factory=dict)
    """What a ranker predicts, by the task's name: a probability, a value in the label's own unit,
    or the expected level; calibrated where the model keeps a calibration, which orders nothing.
    Empty for a model without tasks, and for what was not ranked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What was found for one user or item, best first."""

    rows: tuple[Recommendation, ...]
    source: Source
    unknown_items: tuple[object, ...] = ()
    """Item ids of the request that training never saw; they had no influence."""
    user_known: bool = False
    """Whether training saw an event of the user."""
    notes: tuple[str, ...] = ()
    """What a person should know about this answer, in sentences."""
    seconds: Mapping[Stage, float] = field(default_factory=dict, compare=False)
    """How long each stage took."""

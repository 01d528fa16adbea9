"""What a recommender answers: rows with external ids, and where each came from."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from foretaste.serving.stages import Stage
from foretaste.shown import Shown

Source = Literal["model", "fold-in", "features", "popular"]
"""Where a row came from. "model": a user (or, for similar items, an item) of training;
"fold-in": a history of somebody whom training never saw; "features": a profile, or the features of
a new item; "popular": the most popular items, for somebody of whom nothing is known."""


TITLE_COLUMNS = (
    *("title", "name", "item_title", "item_name", "movie_title", "book_title"),
    *("product_title", "product_name", "track_name", "headline"),
)


def title_column(columns: Iterable[str]) -> str | None:
    """Return the column of titles: the first of `TITLE_COLUMNS` that is there, in any case.

    Args:
        columns: Of the item table, those with one value an item.
    """
    by_name = {name.casefold(): name for name in reversed(list(columns))}
    return next((by_name[name] for name in TITLE_COLUMNS if name in by_name), None)


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

    @property
    def title(self) -> str:
        """The item's title, where its table has one; empty otherwise."""
        one_value = {n: v for n, v in self.attributes.items() if not isinstance(v, list)}
        column = title_column(one_value)
        value = None if column is None else self.attributes[column]
        return "" if value is None else str(value)


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Answer(Shown):
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

    def _facts(self) -> dict[str, object]:
        ids = ", ".join(repr(row.item_id) for row in self.rows[:5])
        more = ", …" if len(self.rows) > 5 else ""
        return {"rows": len(self.rows), "from": self.source, "item_ids": f"[{ids}{more}]"}

    def _rows(self) -> list[tuple[object, ...]]:
        rows = [
            (str(place), str(row.item_id), row.title, row.score, row.source)
            for place, row in enumerate(self.rows, 1)
        ]
        return [("", "item_id", "title", "score", "source"), *rows]

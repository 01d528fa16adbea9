"""What a ranking model is asked of a user and an item: tasks, each with labels of its own."""

from typing import Literal

from pydantic import Field, model_validator

from foretaste.config import Config


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
    weight: float = Field(default=1.0, ge=0)
    """In the sum of the tasks' losses, and in the score that orders a list."""

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
        if self.above is not None and not self.column:
            raise ValueError(f"task {self.name!r} has a limit in `above` and no column: name one")
        return self

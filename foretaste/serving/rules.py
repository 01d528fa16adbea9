"""What a list may hold, whoever scored it: filters on attributes, caps on categories, diversity."""

from typing import Annotated, Literal

from pydantic import (
    BeforeValidator,
    Field,
    PositiveInt,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
    model_validator,
)

from foretaste.config import Config, Count


def _as_many(values: object) -> object:
    return (values,) if isinstance(values, str | bool | int | float) else values


Value = StrictBool | StrictInt | StrictFloat | StrictStr
Values = Annotated[tuple[Value, ...], BeforeValidator(_as_many), Field(min_length=1)]
Bound = StrictInt | StrictFloat | StrictStr


class Condition(Config):
    """A condition on one column of an item; all parts that are given must hold.

    Values are compared as text, so 1994 and "1994" are equal. A missing value meets `none_of` and
    nothing else. A column of several values holds lists, or texts with a separator, such as
    "Action|Comedy".
    """

    equals: Value | None = None
    """The value, in a column of one value an item."""
    one_of: Values | None = None
    """At least one of these values."""
    none_of: Values | None = None
    """None of these values."""
    contains: Values | None = None
    """All of these values, in a column of several."""
    at_least: Bound | None = None
    """The lowest number; in a column of dates or times, the earliest, as ISO text."""
    at_most: Bound | None = None
    """The highest number, or the latest date or time."""

    @model_validator(mode="after")
    def _says_something(self) -> "Condition":
        if not self.model_dump(exclude_none=True):
            names = ", ".join(type(self).model_fields)
            raise ValueError(f"a condition is empty: give one of {names}")
        return self


class Diversity(Config):
    """Maximal marginal relevance: each place goes to an item with a high score that differs from
    those above it.

    The next item is the one with the greatest `relevance` times its score minus
    (1 - `relevance`) times its similarity to the most similar of those chosen.
    """

    relevance: float = Field(default=0.7, ge=0, le=1)
    """Weight of the score: 1 keeps the order of scores, 0 looks at difference alone."""
    pool: PositiveInt = Field(default=100, le=10_000)
    """How many of the best items are considered; later ones are used only if these cannot fill the
    list."""
    by: Literal["vectors"] | tuple[str, ...] = Field(default="vectors", min_length=1)
    """What makes two items similar: "vectors", the cosine of the model's item vectors; or columns
    of the item table, by the share of their values that two items have in common."""


class Rules(Config):
    """What a list may hold, besides seen items and those allowed or denied by id."""

    where: dict[str, Condition] = Field(default_factory=dict, max_length=100)
    """From a column of the item table to the condition that it must meet."""
    caps: dict[str, Count] = Field(default_factory=dict, max_length=100)
    """From a column of the item table to how many items of a list may share a value of it. Items
    without a value do not count."""
    diversity: Diversity | None = None
    """How different the items of a list should be; without it, the score alone decides the
    order."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of the item table that they look at, each once."""
        by = () if self.diversity is None or self.diversity.by == "vectors" else self.diversity.by
        return tuple(dict.fromkeys((*self.where, *self.caps, *by)))

    @property
    def reorder(self) -> bool:
        """Whether what stands above an item decides about it."""
        return bool(self.caps) or self.diversity is not None


NO_RULES = Rules()
"""Nothing is filtered, capped or reordered."""

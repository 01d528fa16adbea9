"""A schema of features: the columns that a model reads and their kinds; a proposal for a table."""

import tomllib
from collections.abc import Iterator
from typing import Annotated, Literal

import numpy as np
import polars as pl
from jaxtyping import Bool
from pydantic import Field, model_validator

from foretaste.arguments import checked
from foretaste.config import Config, Count, parse_settings
from foretaste.data.columns import in_words
from foretaste.data.features_values import (
    NEARLY_ALL,
    Held,
    held_by,
    is_text,
    numbers_of,
    separator_of,
    texts_of,
)
from foretaste.data.interactions import Interactions
from foretaste.errors import ConfigError
from foretaste.shown import toml_key, toml_value


class CategoricalField(Config):
    """One of several values: text, numbers, truth values, dates. `42` and `"42"` are one."""

    kind: Literal["categorical"] = "categorical"
    min_count: Count = 1
    """Values on fewer training rows share one bucket with values that are not in training."""
    max_values: Count = 100_000
    """The most frequent values up to this number have a code; the others share the same bucket."""
    why: str = ""
    """Why this kind was chosen: a note for people, which foretaste does not read."""


class MultiField(Config):
    """Several values at once, in no order: a list column, or text cut at a separator."""

    kind: Literal["multi"] = "multi"
    separator: str | None = Field(default=None, min_length=1)
    """Separator of the values of a text, "|" in "Action|Comedy"; lists need none."""
    min_count: Count = 1
    """Values on fewer training rows share one bucket with values that are not in training."""
    max_values: Count = 100_000
    """The most frequent values up to this number have a code; the others share the same bucket."""
    why: str = ""
    """Why this kind was chosen: a note for people, which foretaste does not read."""


class NumericField(Config):
    """A number. Dates and times count as days since 1970, durations and times of day as seconds."""

    kind: Literal["numeric"] = "numeric"
    transform: Literal["standardise", "bucketise", "log1p_standardise"] = "standardise"
    """"standardise": subtract the mean and divide by the standard deviation. "bucketise": the code
    of a bucket between quantiles. "log1p_standardise": the logarithm of 1 plus the absolute number,
    with the number's sign, then standardised."""
    num_buckets: int = Field(default=10, ge=2, le=10_000)
    """Buckets of `bucketise`. Each has the same number of training rows, as far as equal numbers
    allow."""
    why: str = ""
    """Why this kind was chosen: a note for people, which foretaste does not read."""


class VectorField(Config):
    """A list of numbers, of the same length in every row: an embedding of a text or an image."""

    kind: Literal["vector"] = "vector"
    normalise: bool = True
    """Whether each vector is divided by its own length; otherwise all are divided by the root mean
    square of the lengths in training."""
    centre: bool = False
    """Whether the mean of training is subtracted, after normalisation if there is any. Encoders of
    images and texts often give all vectors one direction in common."""
    why: str = ""
    """Why this kind was chosen: a note for people, which foretaste does not read."""


class TextField(Config):
    """Free text, which a sentence encoder on this machine turns into a vector of length 1.

    Needs the extra `text` (sentence-transformers), in training and in serving.
    """

    kind: Literal["text"] = "text"
    encoder: str
    """Folder or name of a sentence-transformers model that is already on this machine."""
    batch_size: Count = 1
    """Texts that are encoded at a time. More is faster, but the last digits of a vector may then
    depend on the other texts of its batch, so that serving differs from training in these
    digits."""
    why: str = ""
    """Why this kind was chosen: a note for people, which foretaste does not read."""


class CrossField(Config):
    """The values of several columns together, as one category: "evening" and "phone" at once.

    The field has a name of its own; the columns it crosses may be fields too.
    """

    kind: Literal["cross"] = "cross"
    of: tuple[str, ...] = Field(min_length=2)
    """Columns of the same table, each read as a category. If one is missing, the cross is
    missing."""
    min_count: Count = 1
    """Combinations on fewer training rows share one bucket with combinations that are not in
    training."""
    max_values: Count = 100_000
    """The most frequent combinations up to this number have a code; the others share the same
    bucket."""
    why: str = ""
    """Why these columns are crossed: a note for people, which foretaste does not read."""


FieldConfig = Annotated[
    CategoricalField | MultiField | NumericField | VectorField | TextField | CrossField,
    Field(discriminator="kind"),
]


class FeatureSchema(Config):
    """Which columns of users, items and the context are features, and of which kind."""

    user: dict[str, FieldConfig] = Field(default_factory=dict)
    """From a column of the table of users to its kind and settings."""
    item: dict[str, FieldConfig] = Field(default_factory=dict)
    """From a column of the table of items to its kind and settings."""
    context: dict[str, FieldConfig] = Field(default_factory=dict)
    """From a column of the events' context to its kind and settings; rankers read it."""
    left_out: dict[str, str] = Field(default_factory=dict)
    """Columns that inspection left out, such as `item.title`, and why: a note for people, which
    foretaste does not read."""

    @model_validator(mode="after")
    def _no_name_is_empty(self) -> "FeatureSchema":
        if any("" in fields for fields in (self.user, self.item, self.context)):
            raise ValueError("a field has an empty name: name a column")
        return self


_SHOWN = ("kind", "min_count", "transform", "normalise")
"""Settings that are written even if they have their default value."""
_HEAD = """\
# Which columns of users, items and the context are features: correct it where it is wrong.
# A recipe takes this file as features = "FILE", or its sections as [features.item.genres].
# A section is a field, named after its side and column; delete one to leave the column out.
# kind = "categorical"  one of several values; those rarer than min_count share a bucket
#        "multi"        several values: a list, or text with a separator
#        "numeric"      transform = "standardise", "bucketise" (num_buckets) or "log1p_standardise"
#        "vector"       numbers, as many in every row; normalise = true gives all length 1,
#                       centre = true subtracts the mean of training
#        "text"         free text; encoder = the folder of a sentence-transformers model
#        "cross"        several columns at once: of = ["city", "device"], under a new name
"""


@checked
def schema_to_toml(schema: FeatureSchema) -> str:
    """Write a schema as commented TOML, to be corrected by hand and read back."""
    lines = [_HEAD]
    sides = (("user", schema.user), ("item", schema.item), ("context", schema.context))
    for side, fields in sides:
        for name, field in fields.items():
            lines.append(f"[{side}.{toml_key(name)}]")
            settings = field.model_dump(exclude_defaults=True)
            shown = {name: getattr(field, name) for name in _SHOWN if hasattr(field, name)}
            lines += [
                f"{key} = {toml_value(key, value)}" for key, value in (shown | settings).items()
            ]
            lines.append("")
    if schema.left_out:
        lines += ["[left_out]", "# Nothing reads these: to use a column, give it a section above."]
        lines += [f"{toml_key(n)} = {toml_value(n, why)}" for n, why in schema.left_out.items()]
    return "\n".join(lines).strip() + "\n"


@checked
def schema_from_toml(text: str, *, source: str = "the schema") -> FeatureSchema:
    """Read a schema that was written by `schema_to_toml` or by hand.

    Args:
        text: In TOML.
        source: Where it came from, for messages.

    Raises:
        ConfigError: It is not TOML, or a setting is missing, unknown or out of range.
    """
    try:
        settings = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{source} is not TOML: {error}", name=source) from error
    return parse_settings(FeatureSchema, settings, source=source)


_FEW = 32
"""Whole numbers with at most this many values become categories."""
_WHY: dict[Held, str] = {"time": "times", "clock": "times of day", "duration": "durations"}
_LONG_TAIL = 2.0
"""Ratio of mean to median of positive numbers from which a logarithm is proposed."""


@checked
def inspect_schema(events: Interactions) -> FeatureSchema:
    """Choose a kind for each column about users, items and the context, with a reason.

    Only rows of users and items with an event count. Constant columns, ids, titles and free text
    are left out, and `left_out` has the reasons.
    """
    left_out: dict[str, str] = {}
    sides: dict[str, dict[str, FieldConfig]] = {"user": {}, "item": {}, "context": {}}
    for role, frame, trained_R in (
        ("user", events.user_table, np.diff(events.offsets) > 0),
        ("item", events.item_table, events.item_count > 0),
        ("context", events.context, np.ones(len(events), np.bool_)),
    ):
        for column in _columns(frame, trained_R):
            chosen = _choose(column)
            if isinstance(chosen, str):
                left_out[f"{role}.{column.name}"] = chosen
            else:
                sides[role][column.name] = chosen
    return FeatureSchema(left_out=left_out, **sides)


def _columns(frame: pl.DataFrame | None, trained_R: Bool[np.ndarray, " R"]) -> Iterator[pl.Series]:
    return iter(()) if frame is None else frame.filter(trained_R).iter_columns()


def _choose(column: pl.Series) -> FieldConfig | str:
    """Return a field, or the reason why there is none."""
    dtype = column.dtype
    if isinstance(dtype, pl.List | pl.Array):
        return _of_lists(column)
    if dtype.is_nested() or dtype in (pl.Binary, pl.Object):
        return f"holds {in_words(column)}, which cannot be a feature"
    known = (column.fill_nan(None) if dtype.is_float() else column).drop_nulls()
    distinct = known.n_unique()
    if not len(known):
        return "has no value"
    if distinct == 1 and len(known) == len(column):
        return f"is {known[0]!r} in every row"
    if dtype.is_temporal() or held_by(known) == "time":
        return NumericField(transform="bucketise", why=_WHY[held_by(known)])
    if dtype == pl.Boolean:
        return CategoricalField(why="true or false")
    return _of_texts(texts_of(known)) if is_text(known) else _of_numbers(known, distinct)


def _of_lists(column: pl.Series) -> FieldConfig | str:
    lists = column.arr.to_list() if isinstance(column.dtype, pl.Array) else column
    lists = lists.filter((lists.list.len() > 0).fill_null(value=False))
    if not len(lists):
        return "has no value"
    lengths, values = lists.list.len().to_numpy(), lists.explode()
    if values.dtype.is_float() or (
        isinstance(column.dtype, pl.Array) and values.dtype.is_numeric()
    ):
        if lengths.min() < lengths.max():
            return f"lists of {lengths.min()} to {lengths.max()} numbers: a vector has one length"
        return VectorField(why=f"{lengths[0]} numbers in every list")
    if values.dtype.is_nested() or values.dtype in (pl.Binary, pl.Object):
        return f"holds lists of {in_words(values)}, which cannot be a feature"
    return _of_bags(values, len(lists), separator=None)


def _of_bags(values: pl.Series, num_rows: int, *, separator: str | None) -> FieldConfig | str:
    values = texts_of(values).drop_nulls()
    distinct = values.n_unique()
    if not len(values):
        return "has no value"
    if distinct > NEARLY_ALL * len(values) and distinct > _FEW:
        return f"{distinct:,} distinct values in {len(values):,}: too few rows for any value"
    return MultiField(
        separator=separator,
        min_count=_min_count(values),
        why=f"{distinct:,} distinct values, {len(values) / num_rows:.1f} a row",
    )


def _of_texts(text: pl.Series) -> FieldConfig | str:
    text = text.drop_nulls()
    distinct = text.n_unique()
    if not len(text):
        return "has no value"
    separator = separator_of(text)
    if separator is not None:
        parts = text.str.split(separator).explode().str.strip_chars()
        return _of_bags(parts.filter(parts != ""), len(text), separator=separator)
    if distinct > NEARLY_ALL * len(text) and distinct > 2:
        return f"{distinct:,} distinct texts in {len(text):,} rows: an id, a title or free text"
    return CategoricalField(min_count=_min_count(text), why=f"{distinct:,} distinct texts")


def _of_numbers(known: pl.Series, distinct: int) -> FieldConfig | str:
    whole = known.dtype.is_integer() or (
        known.dtype.is_float() and bool((known == known.round()).all())
    )
    if whole and distinct <= _FEW:
        return CategoricalField(
            min_count=_min_count(texts_of(known)), why=f"{distinct} distinct whole numbers"
        )
    number_R = numbers_of(known)
    low, high = float(number_R.min()), float(number_R.max())
    reach = f"{low:g} to {high:g}"
    if whole and distinct == len(known) and high - low < 2 * distinct:
        return f"another whole number in every row, {reach}: an id"
    if low >= 0 and number_R.mean() > _LONG_TAIL * np.median(number_R):
        return NumericField(transform="log1p_standardise", why=f"{reach}, most of them small")
    if whole:
        return NumericField(transform="bucketise", why=f"{distinct:,} whole numbers, {reach}")
    return NumericField(transform="standardise", why=f"{distinct:,} numbers, {reach}")


def _min_count(values: pl.Series) -> int:
    """Return 2 if some values occur once: they share a bucket with unseen values."""
    return 2 if values.is_unique().any() else 1

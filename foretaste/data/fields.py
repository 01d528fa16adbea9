"""The columns that describe users, items and moments, typed: what a recipe's `[features]` says.

A field is one column; its kind says how its values become numbers. What is fitted to training data
stands in `features`, how a schema is found in a table in `features_inspect`.
"""

import tomllib
from typing import Annotated, Literal

from pydantic import Field, model_validator

from foretaste.arguments import checked
from foretaste.config import Config, Count, parse_settings
from foretaste.data.toml_text import toml_key, toml_value
from foretaste.errors import ConfigError


class CategoricalField(Config):
    """One of several values: text, numbers, truth values, dates. `42` and `"42"` are one."""

    kind: Literal["categorical"] = "categorical"
    min_count: Count = 1
    """Values on fewer training rows share one bucket with values that training never saw."""
    max_values: Count = 100_000
    """Beyond so many, the most frequent are kept and the others join the same bucket."""
    why: str = ""
    """Why the column is taken so; nothing reads it but people."""


class MultiField(Config):
    """Several values at once, in no order: a list column, or text cut at a separator."""

    kind: Literal["multi"] = "multi"
    separator: str | None = Field(default=None, min_length=1)
    """What stands between the values of a text, "|" in "Action|Comedy"; lists need none."""
    min_count: Count = 1
    """Values that stand in training rows fewer times share one bucket with those never seen."""
    max_values: Count = 100_000
    """Beyond so many, the most frequent are kept and the others join the same bucket."""
    why: str = ""
    """Why the column is taken so; nothing reads it but people."""


class NumericField(Config):
    """A number; of dates and times the days since 1970, of durations and times of day seconds."""

    kind: Literal["numeric"] = "numeric"
    transform: Literal["standardise", "bucketise", "log1p_standardise"] = "standardise"
    """Minus the mean, by the standard deviation; or one of the buckets between quantiles; or the
    logarithm of 1 plus the absolute number, under the number's sign, then standardised."""
    num_buckets: int = Field(default=10, ge=2, le=10_000)
    """Buckets of `bucketise`, with as many training rows each as equal numbers allow."""
    why: str = ""
    """Why the column is taken so; nothing reads it but people."""


class VectorField(Config):
    """A list of numbers, as long in every row: an embedding of a text or an image."""

    kind: Literal["vector"] = "vector"
    normalise: bool = True
    """Divide each vector by its own length; otherwise all by the root mean square of the lengths
    in training."""
    centre: bool = False
    """Take the mean of training away before, of vectors of length 1 where they are normalised.
    Encoders of images and texts often give all things one direction in common."""
    why: str = ""
    """Why the column is taken so; nothing reads it but people."""


class TextField(Config):
    """Free text, made a vector of length 1 by a sentence encoder on this machine.

    Needs the extra `text` (sentence-transformers), in training and in serving.
    """

    kind: Literal["text"] = "text"
    encoder: str
    """Folder or name of a sentence-transformers model that is on this machine already."""
    batch_size: Count = 1
    """Texts encoded at a time. More is faster; then a vector's last digits may depend on what
    stood beside its text, and serving may differ from training by them."""
    why: str = ""
    """Why the column is taken so; nothing reads it but people."""


class CrossField(Config):
    """The values of several columns together, as one category: "evening" and "phone" at once.

    The field has a name of its own; the columns it crosses may be fields too.
    """

    kind: Literal["cross"] = "cross"
    of: tuple[str, ...] = Field(min_length=2)
    """Columns of the same table, each taken as a category; where one is missing, all are."""
    min_count: Count = 1
    """Pairs of values on fewer training rows share one bucket with those that training never
    saw."""
    max_values: Count = 100_000
    """Beyond so many, the most frequent are kept and the others join the same bucket."""
    why: str = ""
    """Why the columns are crossed; nothing reads it but people."""


FieldConfig = Annotated[
    CategoricalField | MultiField | NumericField | VectorField | TextField | CrossField,
    Field(discriminator="kind"),
]


class FeatureSchema(Config):
    """Which columns about users, items and moments are features, and of which kind."""

    user: dict[str, FieldConfig] = Field(default_factory=dict)
    """From a column of the table of users to its kind and settings."""
    item: dict[str, FieldConfig] = Field(default_factory=dict)
    """From a column of the table of items to its kind and settings."""
    context: dict[str, FieldConfig] = Field(default_factory=dict)
    """From a column of the events' context to its kind and settings; rankers read it."""
    left_out: dict[str, str] = Field(default_factory=dict)
    """Columns that inspection left out, such as `item.title`, and why; nothing reads it."""

    @model_validator(mode="after")
    def _no_name_is_empty(self) -> "FeatureSchema":
        if any("" in fields for fields in (self.user, self.item, self.context)):
            raise ValueError("a field has an empty name: it is the name of a column")
        return self


_SHOWN = ("kind", "min_count", "transform", "normalise")
"""Settings that are written out though they have their usual value."""
_HEAD = """\
# Which columns about users, items and moments are features: correct it where it is wrong.
# A recipe takes this file as features = "FILE", or its sections as [features.item.genres].
# A section is a field, named after its side and column; delete one to leave the column out.
# kind = "categorical"  one of several values; those rarer than min_count share a bucket
#        "multi"        several values: a list, or text cut at separator
#        "numeric"      transform = "standardise", "bucketise" (num_buckets) or "log1p_standardise"
#        "vector"       numbers, as many in every row; normalise = true gives all the same length,
#                       centre = true takes away what all have in common
#        "text"         free text; encoder = the folder of a sentence-transformers model
#        "cross"        several columns at once: of = ["city", "device"], under a name of its own
"""


@checked
def schema_to_toml(schema: FeatureSchema) -> str:
    """Write a schema as commented TOML that a person corrects; it parses back to the same."""
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
    """Read a schema that `schema_to_toml` or a person wrote.

    Args:
        text: In TOML.
        source: Where it came from, for messages.

    Raises:
        ConfigError: It is not TOML, or a setting is missing, unknown or out of range.
    """
    try:
        settings = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{source} is not TOML: {error}") from error
    return parse_settings(FeatureSchema, settings, source=source)

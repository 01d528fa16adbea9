"""Fitting one field to the rows that training has.

Shape legend: R rows, N known values, W width of a vector.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import polars as pl
from jaxtyping import Bool, Float32, Float64

from foretaste.data.features_columns import bags_of, joint_of, numbers_of, texts_of, vectors_of
from foretaste.data.features_fitted import (
    BLOCK,
    Bag,
    Buckets,
    Categories,
    Cross,
    Fitted,
    Number,
    Sentence,
    Values,
    Vector,
    log1p,
    unit,
)
from foretaste.data.features_text import embed_texts
from foretaste.data.fields import (
    CategoricalField,
    CrossField,
    FieldConfig,
    MultiField,
    NumericField,
    TextField,
    VectorField,
)


class Outcome(NamedTuple):
    """What fitting came to."""

    fitted: Fitted | None
    """None where no training row has a value."""
    note: str = ""
    """What a person should know of it; follows the field's name."""


_NOTHING = Outcome(None, "has no value on a training row: it was left out")


def columns_of(name: str, field: FieldConfig) -> tuple[str, ...]:
    """Return the columns that a field is made of: its own, or those that it crosses."""
    return field.of if isinstance(field, CrossField) else (name,)


def fit_field(
    name: str,
    field: FieldConfig,
    columns: Sequence[pl.Series],
    trained_R: Bool[np.ndarray, " R"],
) -> Outcome:
    """Fit a field to the rows that training has; the others are only checked.

    Args:
        name: The field's.
        field: Its kind and settings.
        columns: Those that `columns_of` names.
        trained_R: Which rows training has.

    Raises:
        DataError: The column is not of the field's kind; the message names the row.
        ConfigError: A text needs an encoder that is not there.
    """
    column = columns[0]
    match field:
        case CrossField():
            return _fit_cross(name, field, joint_of(columns).filter(trained_R))
        case CategoricalField():
            return _fit_categories(name, field, texts_of(column).filter(trained_R))
        case MultiField():
            text_N, row_N = bags_of(column, separator=field.separator)
            return _fit_bag(name, field, text_N.filter(trained_R[row_N]))
        case NumericField():
            number_R = numbers_of(column)[trained_R]
            return _fit_number(name, field, number_R[~np.isnan(number_R)])
        case VectorField():
            value_RW, present_R = vectors_of(column)
            return _fit_vector(name, field, value_RW[present_R & trained_R])
        case TextField():
            return _fit_text(name, field, texts_of(column).filter(trained_R))


def _fit_categories(name: str, field: CategoricalField, text: pl.Series) -> Outcome:
    if not text.count():
        return _NOTHING
    values, note = _fit_values(text.drop_nulls(), field.min_count, field.max_values)
    if not text.null_count() and len(values.texts) == 1 and not values.rare:
        note = f"is {text[0]!r} on every training row: it tells nothing"
    elif len(values.texts) == text.count() > 1:
        note = "has another value on every training row: it tells a row by nothing that others have"
    return Outcome(Categories(name=name, values=values), note)


def _fit_cross(name: str, field: CrossField, text: pl.Series) -> Outcome:
    if not text.count():
        return _NOTHING
    values, note = _fit_values(text.drop_nulls(), field.min_count, field.max_values)
    return Outcome(Cross(name=name, of=field.of, values=values), note)


def _fit_bag(name: str, field: MultiField, text_N: pl.Series) -> Outcome:
    values, note = _fit_values(text_N, field.min_count, field.max_values)
    if not len(text_N):
        return _NOTHING
    return Outcome(Bag(name=name, separator=field.separator, values=values), note)


def _fit_values(text_N: pl.Series, min_count: int, max_values: int) -> tuple[Values, str]:
    counted = text_N.alias("text").value_counts(name="rows")
    often = counted.filter(pl.col("rows") >= min_count)
    kept = often.sort("rows", "text", descending=[True, False]).head(max_values)
    note = (
        f"has {len(often):,} values, more than max_values: the {max_values:,} most frequent were "
        "kept, the others share a bucket"
        if len(often) > max_values
        else ""
    )
    if len(counted) and not len(often):
        note = f"has no value on {min_count} training rows: all share one bucket"
    rare = len(text_N) - int(kept["rows"].sum())
    return Values(texts=tuple(kept["text"].to_list()), rare=rare), note


def _fit_number(name: str, field: NumericField, number_N: Float64[np.ndarray, " N"]) -> Outcome:
    if not len(number_N):
        return _NOTHING
    low, high = number_N.min(), number_N.max()
    note = f"is {low:g} wherever it is known in training: it tells little" if low == high else ""
    if field.transform == "bucketise":
        share = np.arange(1, field.num_buckets) / field.num_buckets
        edges = np.unique(np.quantile(number_N, share, method="inverted_cdf"))
        return Outcome(Buckets(name=name, edges=tuple(edges[edges < high].tolist())), note)
    logarithm = field.transform == "log1p_standardise"
    scaled_N = log1p(number_N) if logarithm else number_N
    mean, std = float(scaled_N.mean()), float(scaled_N.std())
    if low == high or std == 0:
        mean, std = float(scaled_N[0]), 1.0
    return Outcome(Number(name=name, log1p=logarithm, mean=mean, std=std), note)


def _fit_vector(name: str, field: VectorField, value_NW: Float32[np.ndarray, "N W"]) -> Outcome:
    if not len(value_NW):
        return _NOTHING
    num, width = value_NW.shape
    blocks = [value_NW[start : start + BLOCK] for start in range(0, num, BLOCK)]
    length, mean_W = None, np.zeros(width)
    if field.centre:
        scaled = (unit(block) if field.normalise else block.astype(np.float64) for block in blocks)
        mean_W = sum((block_NW.sum(axis=0) for block_NW in scaled), mean_W) / num
    if not field.normalise:
        total = sum(float(((block.astype(np.float64) - mean_W) ** 2).sum()) for block in blocks)
        length = float(np.sqrt(total / num)) or 1.0
    mean = tuple(mean_W.tolist()) if field.centre else ()
    return Outcome(Vector(name=name, width=width, length=length, mean=mean))


def _fit_text(name: str, field: TextField, text: pl.Series) -> Outcome:
    if not text.count():
        return _NOTHING
    width = embed_texts([text.drop_nulls()[0]], field.encoder, batch_size=1).shape[1]
    return Outcome(
        Sentence(name=name, encoder=field.encoder, batch_size=field.batch_size, width=width)
    )

"""Fitting one field to the rows that training has.

Shape legend: R rows, N known values, W width of a vector.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import polars as pl
from jaxtyping import Bool, Float32, Float64

from foretaste.data.features_columns import bags_of, joint_of, vectors_of
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
from foretaste.data.features_values import Held, held_by, numbers_of, texts_of
from foretaste.data.fields import (
    CategoricalField,
    CrossField,
    FieldConfig,
    MultiField,
    NumericField,
    TextField,
    VectorField,
)
from foretaste.data.outliers import flattening
from foretaste.errors import DataError


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
            return _fit_cross(name, field, columns, trained_R)
        case CategoricalField():
            return _fit_categories(name, field, column, trained_R)
        case MultiField():
            return _fit_bag(name, field, column, trained_R)
        case NumericField():
            return _fit_number(name, field, column, trained_R)
        case VectorField():
            value_RW, present_R = vectors_of(column)
            return _fit_vector(name, field, value_RW[present_R & trained_R])
        case TextField():
            return _fit_text(name, field, texts_of(column).filter(trained_R))


def _fit_categories(
    name: str, field: CategoricalField, column: pl.Series, trained_R: Bool[np.ndarray, " R"]
) -> Outcome:
    holds = held_by(column.filter(trained_R))
    text = texts_of(column, holds=holds).filter(trained_R)
    if not text.count():
        return _NOTHING
    values, note = _fit_values(text.drop_nulls(), field, holds)
    if not text.null_count() and len(values.texts) == 1 and not values.rare:
        note = f"is {text[0]!r} on every training row: it tells nothing"
    elif len(values.texts) == text.count() > 1:
        note = "has another value on every training row: it tells a row by nothing that others have"
    return Outcome(Categories(name=name, values=values), note)


def _fit_cross(
    name: str, field: CrossField, columns: Sequence[pl.Series], trained_R: Bool[np.ndarray, " R"]
) -> Outcome:
    holds = tuple(held_by(column.filter(trained_R)) for column in columns)
    text = joint_of(columns, holds=holds).filter(trained_R)
    if not text.count():
        return _NOTHING
    values, note = _fit_values(text.drop_nulls(), field, "text")
    return Outcome(Cross(name=name, of=field.of, values=values, holds=holds), note)


def _fit_bag(
    name: str, field: MultiField, column: pl.Series, trained_R: Bool[np.ndarray, " R"]
) -> Outcome:
    holds = held_by(column)
    text_N, row_N = bags_of(column, separator=field.separator, holds=holds)
    text_N = text_N.filter(trained_R[row_N])
    if not len(text_N):
        return _NOTHING
    if holds == "text":  # what its parts hold
        holds = held_by(text_N)
        text_N = texts_of(text_N, holds=holds)
    values, note = _fit_values(text_N, field, holds)
    return Outcome(Bag(name=name, separator=field.separator, values=values), note)


def _fit_values(
    text_N: pl.Series, field: CategoricalField | CrossField | MultiField, holds: Held
) -> tuple[Values, str]:
    counted = text_N.alias("text").value_counts(name="rows")
    often = counted.filter(pl.col("rows") >= field.min_count)
    kept = often.sort("rows", "text", descending=[True, False]).head(field.max_values)
    note = (
        f"has {len(often):,} values, more than max_values: the {field.max_values:,} most frequent "
        "were kept, the others share a bucket"
        if len(often) > field.max_values
        else ""
    )
    if len(counted) and not len(often):
        note = f"has no value on {field.min_count} training rows: all share one bucket"
    rare = len(text_N) - int(kept["rows"].sum())
    return Values(texts=tuple(kept["text"].to_list()), rare=rare, holds=holds), note


def _fit_number(
    name: str, field: NumericField, column: pl.Series, trained_R: Bool[np.ndarray, " R"]
) -> Outcome:
    holds = held_by(column.filter(trained_R), as_number=True)
    number_R = numbers_of(column, holds=holds)
    row_N = np.flatnonzero(trained_R & ~np.isnan(number_R))
    number_N = number_R[row_N]
    if not len(number_N):
        return _NOTHING
    low, high = number_N.min(), number_N.max()
    note = f"is {low:g} wherever it is known in training: it tells little" if low == high else ""
    if field.transform == "bucketise":
        share = np.arange(1, field.num_buckets) / field.num_buckets
        edges = np.unique(np.quantile(number_N, share, method="inverted_cdf"))
        kept = tuple(edges[edges < high].tolist())
        return Outcome(Buckets(name=name, edges=kept, holds=holds), note)
    logarithm = field.transform == "log1p_standardise"
    scaled_N = log1p(number_N) if logarithm else number_N
    with np.errstate(over="ignore", invalid="ignore"):  # what overflows is refused
        mean, std = float(scaled_N.mean()), float(scaled_N.std())
    if not np.isfinite([mean, std]).all():
        raise _too_large(column, int(row_N[np.abs(number_N).argmax()]))
    if low == high or std == 0:
        mean, std = float(scaled_N[0]), 1.0
    note = note or _flattened(field, number_N, column.gather(row_N))
    return Outcome(Number(name=name, log1p=logarithm, mean=mean, std=std, holds=holds), note)


def _too_large(column: pl.Series, row: int) -> DataError:
    return DataError(
        f"column {column.name!r}, row {1 + row}: {column[row]!r} is too large to standardise: "
        'correct it, or set transform = "log1p_standardise" or "bucketise"',
        column=column.name,
        row=1 + row,
        value=column[row],
    )


def _flattened(field: NumericField, number_N: Float64[np.ndarray, " N"], shown: pl.Series) -> str:
    """Say if outliers make the others nearly equal, with a transform that helps."""
    log_N = log1p(number_N)
    furthest = flattening(number_N if field.transform == "standardise" else log_N)
    if furthest is None:
        return ""
    helps = [] if flattening(log_N) is not None else ['"log1p_standardise"']
    fixes = " or ".join([*helps, '"bucketise"'])
    return (
        f"has a value so far away, {shown[furthest]!r}, that nearly all of the {len(number_N):,} "
        f"become equal: correct it, or set transform = {fixes}"
    )


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

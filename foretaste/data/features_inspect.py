"""From tables of users and items, and the context of events, to a schema that a person corrects.

Shape legend: R rows.
"""

from collections.abc import Iterator

import numpy as np
import polars as pl
from jaxtyping import Bool

from foretaste.arguments import checked
from foretaste.data.columns import in_words
from foretaste.data.features_values import Held, held_by, is_text, numbers_of, texts_of
from foretaste.data.fields import (
    CategoricalField,
    FeatureSchema,
    FieldConfig,
    MultiField,
    NumericField,
    VectorField,
)
from foretaste.data.interactions import Interactions

_FEW = 32
"""Whole numbers with at most so many values are taken for categories."""
_NEARLY_ALL = 0.5
"""A column with more distinct texts than this share of its rows is an id, a title or free text."""
_SEPARATORS = ("|", ";", ",")
_CUT = 0.05
"""A separator stands in at least this share of texts."""
_WHY: dict[Held, str] = {"time": "times", "clock": "times of day", "duration": "durations"}
_LONG_TAIL = 2.0
"""The mean of positive numbers over their median from which a logarithm is taken."""


@checked
def inspect_schema(events: Interactions) -> FeatureSchema:
    """Choose a kind for each column about users, items and moments, and say why.

    Only rows of users and items with an event are looked at. Columns that are the same everywhere,
    ids, titles and free text are left out, and `left_out` says why.
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
    """Return a field, or why there is none."""
    dtype = column.dtype
    if isinstance(dtype, pl.List | pl.Array):
        return _of_lists(column)
    if dtype.is_nested() or dtype in (pl.Binary, pl.Object):
        return f"holds {in_words(column)}, which is no feature"
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
        return f"holds lists of {in_words(values)}, which is no feature"
    return _of_bags(values, len(lists), separator=None)


def _of_bags(values: pl.Series, num_rows: int, *, separator: str | None) -> FieldConfig | str:
    values = texts_of(values).drop_nulls()
    distinct = values.n_unique()
    if not len(values):
        return "has no value"
    if distinct > _NEARLY_ALL * len(values) and distinct > _FEW:
        return f"{distinct:,} distinct values in {len(values):,}: too few rows to learn any from"
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
    if distinct > _NEARLY_ALL * len(text) and distinct > 2:
        return f"{distinct:,} distinct texts in {len(text):,} rows: an id, a title or free text"
    return CategoricalField(min_count=_min_count(text), why=f"{distinct:,} distinct texts")


def separator_of(text: pl.Series) -> str | None:
    """Return what stands between the values of each text, "|" in "Action|Comedy"; None if nothing.

    Args:
        text: Texts, null where missing.
    """
    text = text.drop_nulls()
    for separator in _SEPARATORS:
        holds = text.str.contains(separator, literal=True)
        if not len(text) or holds.sum() < _CUT * len(text):
            continue
        parts = text.str.split(separator).explode().str.strip_chars()
        # a comma may be part of a name, as in "Seven Samurai, The": it must make far fewer values
        wholes = min(text.n_unique(), len(parts)) if separator == "," else len(parts)
        if parts.n_unique() <= _NEARLY_ALL * wholes:
            return separator
    return None


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
    """Return 2 where some values stand alone: what they share is learned for unseen ones too."""
    return 2 if values.is_unique().any() else 1

"""A column of features, checked and brought into the one form of its kind.

A message names the column, the row and the value. Rows are counted from 1, header not counted.

Shape legend: R rows, N values of all bags, W width of a vector.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import polars as pl
from jaxtyping import Bool, Float32, Float64, Int64

from foretaste.data.columns import at_row
from foretaste.errors import DataError

_SECONDS_PER_DAY = 86_400
_BETWEEN = "\x1f"
"""Between crossed values; no text that people write holds it."""
_WHOLE = 2.0**53
"""Up to here a 64-bit float holds every whole number."""


def texts_of(column: pl.Series) -> pl.Series:
    """Return categories as text, null where missing.

    Whole numbers are the text of their digits, whatever their type, so that 42, 42.0 and "42" are
    one category; truth values are `true` and `false`, dates ISO text. NaN and empty text are
    missing.

    Raises:
        DataError: The column holds lists, bytes or the like, or an infinite number.
    """
    dtype = column.dtype
    if dtype == pl.Object or dtype == pl.Binary or dtype.is_nested():
        raise DataError(
            f"column {column.name!r} holds {dtype}, and a category is text, a number or a date: "
            'set its kind to "multi" or "vector", or leave the column out'
        )
    if dtype.is_decimal():
        column, dtype = column.cast(pl.Float64), pl.Float64()
    if dtype.is_float():
        return _texts_of_floats(column)
    text = column.cast(pl.String)
    return text.set(text == "", None)


def _texts_of_floats(column: pl.Series) -> pl.Series:
    column = column.cast(pl.Float64).fill_nan(None)
    _refuse(column, column.is_infinite(), "is not a category: mend it, or leave it missing")
    whole = ((column == column.round()) & (column.abs() <= _WHOLE)).fill_null(value=False)
    digits = column.set(~whole, None).cast(pl.Int64).cast(pl.String)
    return digits.zip_with(whole, column.cast(pl.String))


def joint_of(columns: Sequence[pl.Series]) -> pl.Series:
    """Return several categories of each row as one text, null where any is missing.

    Raises:
        DataError: A column holds lists, bytes or the like, or an infinite number.
    """
    texts = [texts_of(column).alias(str(n)) for n, column in enumerate(columns)]
    return pl.select(pl.concat_str(texts, separator=_BETWEEN)).to_series()


class Bags(NamedTuple):
    """The values of all rows, one after the other."""

    text_N: pl.Series
    """Categories as text, none missing."""
    row_N: Int64[np.ndarray, " N"]
    """The row of each, never falling."""


def bags_of(column: pl.Series, *, separator: str | None) -> Bags:
    """Return the values of each row's bag; spaces around the parts of a text do not count.

    Raises:
        DataError: It is neither lists nor text, or text and there is no separator.
    """
    if column.dtype == pl.String and separator is not None:
        column = column.str.split(separator)
        parts = bags_of(column, separator=None)
        trimmed = parts.text_N.str.strip_chars()
        kept = trimmed != ""
        return Bags(trimmed.filter(kept), parts.row_N[kept.to_numpy()])
    if column.dtype == pl.Null:
        return Bags(pl.Series(column.name, [], dtype=pl.String), np.empty(0, np.int64))
    if isinstance(column.dtype, pl.Array):
        column = column.arr.to_list()
    if not isinstance(column.dtype, pl.List):
        raise DataError(
            f"column {column.name!r} holds {column.dtype}, and a bag is a list, or text cut at a "
            'separator: set separator, or kind = "categorical"'
        )
    length_R = column.list.len().fill_null(0).to_numpy()
    values = column.filter(length_R > 0).explode() if length_R.any() else column.clear().explode()
    text = texts_of(values)
    present = text.is_not_null()
    row_N = np.repeat(np.arange(len(column)), length_R)
    return Bags(text.filter(present), row_N[present.to_numpy()])


def numbers_of(column: pl.Series) -> Float64[np.ndarray, " R"]:
    """Return numbers, NaN where missing; dates and times as days since 1970.

    Raises:
        DataError: It is not of numbers, or one is infinite.
    """
    dtype = column.dtype
    if dtype == pl.Date:
        numbers = column.cast(pl.Int32).cast(pl.Float64)
    elif dtype == pl.Datetime:
        numbers = column.dt.epoch("s").cast(pl.Float64) / _SECONDS_PER_DAY
    elif dtype.is_numeric() or dtype in (pl.String, pl.Boolean, pl.Null):
        numbers = column.cast(pl.Float64, strict=False)
        empty = (
            column == ""
            if dtype == pl.String
            else pl.repeat(value=False, n=len(column), eager=True)
        )
        broken = numbers.is_null() & column.is_not_null() & ~empty
        _refuse(column, broken, 'is not a number: mend it, or set kind = "categorical"')
    else:
        raise DataError(
            f"column {column.name!r} holds {dtype}, and a numeric field numbers or dates: set "
            "another kind, or leave the column out"
        )
    _refuse(column, numbers.is_infinite(), "is infinite: mend it, or leave it missing")
    return numbers.fill_null(np.nan).to_numpy(writable=True)


class Vectors(NamedTuple):
    """One vector a row; zeros where it is missing."""

    value_RW: Float32[np.ndarray, "R W"]
    present_R: Bool[np.ndarray, " R"]


def vectors_of(column: pl.Series, *, width: int | None = None) -> Vectors:
    """Return vectors. An empty list, and a vector of zeros, say nothing: they are missing.

    Args:
        column: Lists or arrays of numbers.
        width: How long each must be; None takes the length of the first.

    Raises:
        DataError: It holds no lists of numbers, one is of another length, or holds a number that
            is missing, NaN or infinite.
    """
    if isinstance(column.dtype, pl.Array):
        column = column.arr.to_list()
    if column.dtype == pl.Null:
        column = column.cast(pl.List(pl.Float32))
    inner = column.explode().dtype if isinstance(column.dtype, pl.List) else pl.String()
    if not (inner.is_numeric() or inner == pl.Null):
        raise DataError(
            f"column {column.name!r} holds {column.dtype}, and a vector is a list of numbers: set "
            "another kind, or leave the column out"
        )
    length_R = column.list.len().fill_null(0).to_numpy()
    present_R = length_R > 0
    width = width or (int(length_R[present_R][0]) if present_R.any() else 0)
    wrong_R = present_R & (length_R != width)
    if wrong_R.any():
        row = int(wrong_R.argmax())
        raise DataError(
            f"column {column.name!r}, row {1 + row} holds a vector of {length_R[row]} numbers, not "
            f"{width}: all must be as long, a missing one null"
        )
    value_RW = np.zeros((len(column), width), np.float32)
    if present_R.any():
        flat = column.filter(present_R).explode().cast(pl.Float32).fill_null(np.nan)
        value_RW[present_R] = flat.to_numpy().reshape(-1, width)
    broken_R = ~np.isfinite(value_RW).all(axis=1)
    if broken_R.any():
        raise DataError(
            f"column {column.name!r}, row {1 + int(broken_R.argmax())} holds a vector with a "
            "number that is missing, NaN or infinite: mend it, or make the whole vector null"
        )
    return Vectors(value_RW, present_R & (value_RW != 0).any(axis=1))


def _refuse(column: pl.Series, wrong: pl.Series, why: str) -> None:
    wrong = wrong.fill_null(value=False)
    if wrong.any():
        raise DataError(f"column {column.name!r}, {at_row(column, wrong)} {why}")

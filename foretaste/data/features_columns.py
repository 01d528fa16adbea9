"""A column of several values, or of vectors, checked and brought into the one form of its kind.

A message names the column, the row and the value. Rows are counted from 1, header not counted.

Shape legend: R rows, N values of all bags, W width of a vector.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import polars as pl
from jaxtyping import Bool, Float32, Int64

from foretaste.data.columns import in_words
from foretaste.data.features_values import Held, at_row, moved, single_of, texts_of
from foretaste.errors import DataError

BETWEEN = "\x1f"
"""Between crossed values; no text that people write holds it."""


def joint_of(columns: Sequence[pl.Series], *, holds: Sequence[Held] = ()) -> pl.Series:
    """Return several categories of each row as one text, null where any is missing.

    Args:
        columns: One for each category.
        holds: What each held in training; empty: text.

    Raises:
        DataError: A column holds lists, bytes or the like, or an infinite number.
    """
    kinds = holds or ["text"] * len(columns)
    texts = [
        texts_of(column, holds=kind).alias(str(n))
        for n, (column, kind) in enumerate(zip(columns, kinds, strict=True))
    ]
    return pl.select(pl.concat_str(texts, separator=BETWEEN)).to_series()


class Bags(NamedTuple):
    """The values of all rows, one after the other."""

    text_N: pl.Series
    """Categories as text, none missing."""
    row_N: Int64[np.ndarray, " N"]
    """The row of each, never falling."""


def bags_of(column: pl.Series, *, separator: str | None, holds: Held = "text") -> Bags:
    """Return the values of each row's bag; spaces around the parts of a text do not count.

    A single value that is no text is a bag of one.

    Raises:
        DataError: It is text and there is no separator, or it holds what is no category.
    """
    if column.dtype == pl.Null:
        return Bags(pl.Series(column.name, [], dtype=pl.String), np.empty(0, np.int64))
    if isinstance(column.dtype, pl.Array):
        column = column.arr.to_list()
    if not isinstance(column.dtype, pl.List):
        return _bags_of_single(single_of(column), separator, holds)
    length_R = column.list.len().fill_null(0).to_numpy()
    values = column.filter(length_R > 0).explode() if length_R.any() else column.clear().explode()
    row_N = np.repeat(np.arange(len(column)), length_R)
    try:
        text = texts_of(values, holds=holds)
    except DataError as error:
        if error.row is None:
            raise
        row = 1 + int(row_N[error.row - 1])
        raise moved(error, f"row {row}", row=row) from error
    present = text.is_not_null()
    return Bags(text.filter(present), row_N[present.to_numpy()])


def _bags_of_single(column: pl.Series, separator: str | None, holds: Held) -> Bags:
    text = column if column.dtype == pl.String else texts_of(column, holds=holds)
    if separator is not None:
        parts = text.str.split(separator)
        trimmed = parts.list.eval(pl.element().str.strip_chars())
        return bags_of(trimmed.alias(column.name), separator=None, holds=holds)
    if column.dtype == pl.String and holds == "text" and text.count():
        raise DataError(
            f"column {column.name!r} holds text, such as {text.drop_nulls()[0]!r}, and a feature "
            'of kind "multi" is a list, such as ["a", "b"], or text that its separator cuts: give '
            'lists, or set separator, or kind = "categorical"',
            column=column.name,
            value=text.drop_nulls()[0],
        )
    one = text.reshape((-1, 1)).arr.to_list()
    return bags_of(one.alias(column.name), separator=None, holds=holds)


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
            f"column {column.name!r} holds {in_words(column)}, and a vector is a list of numbers: "
            "set another kind, or leave the column out",
            column=column.name,
        )
    length_R = column.list.len().fill_null(0).to_numpy()
    present_R = length_R > 0
    width = width or (int(length_R[present_R][0]) if present_R.any() else 0)
    wrong_R = present_R & (length_R != width)
    if wrong_R.any():
        row = int(wrong_R.argmax())
        raise DataError(
            f"column {column.name!r}{at_row(column, row)} holds a vector of {length_R[row]} "
            f"numbers, not {width}: all must be as long, a missing one null",
            column=column.name,
            row=1 + row,
            value=column[row].to_list(),
        )
    value_RW = np.zeros((len(column), width), np.float32)
    if present_R.any():
        flat = column.filter(present_R).explode().cast(pl.Float32).fill_null(np.nan)
        value_RW[present_R] = flat.to_numpy().reshape(-1, width)
    broken_R = ~np.isfinite(value_RW).all(axis=1)
    if broken_R.any():
        row = int(broken_R.argmax())
        raise DataError(
            f"column {column.name!r}{at_row(column, row)} holds a vector with a number that is "
            "missing, NaN, infinite or too large for 32 bits: correct it, or make the whole vector "
            "null",
            column=column.name,
            row=1 + row,
            value=column[row].to_list(),
        )
    return Vectors(value_RW, present_R & (value_RW != 0).any(axis=1))

"""What training said about each field, and how its values become codes and numbers by it.

Local codes of a field: 0 is missing; 1 is a value that training did not have, or had too rarely;
the values follow. Buckets have no 1: they start there.

Shape legend: R rows, N values of all bags, W width of a vector.
"""

from functools import cached_property
from typing import Annotated, Literal, NamedTuple

import numpy as np
import polars as pl
from jaxtyping import Bool, Float32, Float64, Int64, Shaped
from pydantic import Field, NonNegativeInt, PositiveInt

from foretaste.config import Config
from foretaste.data.features_columns import bags_of, numbers_of, texts_of, vectors_of
from foretaste.data.features_text import embed_texts
from foretaste.data.fields import (
    CategoricalField,
    MultiField,
    NumericField,
    TextField,
    VectorField,
)
from foretaste.data.vocabulary import Vocabulary

MISSING, UNSEEN, FIRST = 0, 1, 2
"""Local codes: missing; unseen or rare; the first value."""

_FURTHEST = 10.0
"""Standardised numbers beyond so many standard deviations are held there."""
_BLOCK = 1 << 14
"""Vectors scaled at a time."""


class Values(Config):
    """The categories that training had often enough, the most frequent first."""

    texts: tuple[str, ...]
    rare: NonNegativeInt
    """Training rows of values left out of `texts`: what the bucket of the unseen learns from."""

    @cached_property
    def _vocabulary(self) -> Vocabulary:
        ids = pl.Series("id", self.texts, dtype=pl.String)
        return Vocabulary.trusted(lambda: ids, length=len(ids), is_integer=False)

    @property
    def num_codes(self) -> int:
        """Missing and unseen included."""
        return FIRST + len(self.texts)

    def codes(self, text: pl.Series) -> Int64[np.ndarray, " N"]:
        """Return local codes."""
        row_N = self._vocabulary.encode(text)
        code_N = np.where(row_N < 0, UNSEEN, row_N + FIRST)
        return np.where(text.is_null().to_numpy(), MISSING, code_N)

    def says(self, code_N: Int64[np.ndarray, " N"]) -> Bool[np.ndarray, " N"]:
        """Return which codes say something: neither missing nor a bucket that nothing taught."""
        return code_N >= (UNSEEN if self.rare else FIRST)


class Categories(Config):
    """A single value, as a code."""

    kind: Literal["categorical"] = "categorical"
    name: str
    values: Values

    @property
    def num_codes(self) -> int:
        """How many codes the field has."""
        return self.values.num_codes

    @property
    def untaught(self) -> tuple[int, ...]:
        """Codes that stand for no value."""
        return (MISSING, UNSEEN)

    def encode(self, column: pl.Series) -> Int64[np.ndarray, " R"]:
        """Return local codes."""
        return self.values.codes(texts_of(column))

    def says(self, code_R: Int64[np.ndarray, " R"]) -> Bool[np.ndarray, " R"]:
        """Return which codes say something."""
        return self.values.says(code_R)


class Buckets(Config):
    """A number, as the code of its bucket between quantiles."""

    kind: Literal["buckets"] = "buckets"
    name: str
    edges: tuple[float, ...]
    """Bucket b holds numbers from `edges[b - 1]` on and below `edges[b]`."""

    @property
    def num_codes(self) -> int:
        """How many codes the field has."""
        return 2 + len(self.edges)

    @property
    def untaught(self) -> tuple[int, ...]:
        """Codes that stand for no value."""
        return (MISSING,)

    def encode(self, column: pl.Series) -> Int64[np.ndarray, " R"]:
        """Return local codes."""
        number_R = numbers_of(column)
        bucket_R = np.searchsorted(np.array(self.edges), number_R, side="right")
        return np.where(np.isnan(number_R), MISSING, bucket_R + 1)

    def says(self, code_R: Int64[np.ndarray, " R"]) -> Bool[np.ndarray, " R"]:
        """Return which codes say something."""
        says_R: Bool[np.ndarray, " R"] = code_R != MISSING
        return says_R


class Bag(Config):
    """Several values, as codes; an empty bag is a missing one."""

    name: str
    separator: str | None
    values: Values

    def encode(self, column: pl.Series) -> tuple[Int64[np.ndarray, " N"], Int64[np.ndarray, " N"]]:
        """Return the local codes of all rows and the row of each; a missing bag holds one code."""
        text_N, row_N = bags_of(column, separator=self.separator)
        code_N = self.values.codes(text_N)
        empty = np.flatnonzero(np.bincount(row_N, minlength=len(column)) == 0)
        row_N = np.concatenate([row_N, empty])
        order = np.argsort(row_N, kind="stable")
        return np.concatenate([code_N, np.full(len(empty), MISSING)])[order], row_N[order]


class Number(Config):
    """A number, standardised."""

    name: str
    log1p: bool
    mean: float
    std: float = Field(gt=0)

    def encode(self, column: pl.Series) -> tuple[Float32[np.ndarray, " R"], Bool[np.ndarray, " R"]]:
        """Return numbers, 0 where missing, and which are there."""
        number_R = numbers_of(column)
        present_R = ~np.isnan(number_R)
        scaled_R = (_log1p(number_R) if self.log1p else number_R) - self.mean
        held_R = np.clip(scaled_R / self.std, -_FURTHEST, _FURTHEST)
        return np.where(present_R, held_R, 0.0).astype(np.float32), present_R


class Vector(Config):
    """A vector of given width."""

    kind: Literal["vector"] = "vector"
    name: str
    width: PositiveInt
    length: float | None = Field(gt=0)
    """What all are divided by; None divides each by its own length."""

    def encode(
        self, column: pl.Series
    ) -> tuple[Float32[np.ndarray, "R W"], Bool[np.ndarray, " R"]]:
        """Return vectors, zeros where missing, and which are there."""
        value_RW, present_R = vectors_of(column, width=self.width)
        for start in range(0, len(value_RW), _BLOCK):
            block = value_RW[start : start + _BLOCK].astype(np.float64)
            length_R = _lengths(block) if self.length is None else self.length
            value_RW[start : start + _BLOCK] = block / np.reshape(length_R, (-1, 1))
        return value_RW, present_R


class Sentence(Config):
    """A text, as the vector of a sentence encoder."""

    kind: Literal["text"] = "text"
    name: str
    encoder: str
    batch_size: PositiveInt
    width: PositiveInt

    def encode(
        self, column: pl.Series
    ) -> tuple[Float32[np.ndarray, "R W"], Bool[np.ndarray, " R"]]:
        """Return vectors, zeros where the text is missing, and which are there."""
        text = texts_of(column)
        value_RW = np.zeros((len(text), self.width), np.float32)
        present_R = text.is_not_null().to_numpy(writable=True)
        if present_R.any():
            told = text.drop_nulls()
            distinct = told.unique(maintain_order=True)
            vector_NW = embed_texts(distinct.to_list(), self.encoder, batch_size=self.batch_size)
            places = pl.DataFrame({"text": distinct, "place": np.arange(len(distinct))})
            place_N = (
                told.alias("text")
                .to_frame()
                .join(places, on="text", how="left", maintain_order="left")["place"]
            )
            value_RW[present_R] = vector_NW[place_N.to_numpy()]
        return value_RW, present_R


Codes = Annotated[Categories | Buckets, Field(discriminator="kind")]
Vectorised = Annotated[Vector | Sentence, Field(discriminator="kind")]
Fitted = Categories | Buckets | Bag | Number | Vector | Sentence


class Outcome(NamedTuple):
    """What fitting came to."""

    fitted: Fitted | None
    """None where no training row has a value."""
    note: str = ""
    """What a person should know of it; follows the field's name."""


_NOTHING = Outcome(None, "has no value on a training row: it was left out")


def fit_field(
    name: str,
    field: CategoricalField | MultiField | NumericField | VectorField | TextField,
    column: pl.Series,
    trained_R: Bool[np.ndarray, " R"],
) -> Outcome:
    """Fit a field to the rows that training has; the others are only checked.

    Raises:
        DataError: The column is not of the field's kind; the message names the row.
        ConfigError: A text needs an encoder that is not there.
    """
    match field:
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
    values, note = _fit_values(text.drop_nulls(), field.min_count, field.max_values)
    if not text.count():
        return _NOTHING
    return Outcome(Categories(name=name, values=values), note)


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
        return Outcome(Buckets(name=name, edges=tuple(edges[edges > low].tolist())), note)
    log1p = field.transform == "log1p_standardise"
    scaled_N = _log1p(number_N) if log1p else number_N
    std = 1.0 if low == high else float(scaled_N.std()) or 1.0
    return Outcome(Number(name=name, log1p=log1p, mean=float(scaled_N.mean()), std=std), note)


def _fit_vector(name: str, field: VectorField, value_NW: Float32[np.ndarray, "N W"]) -> Outcome:
    if not len(value_NW):
        return _NOTHING
    length = None
    if not field.normalise:
        total = sum(
            float((value_NW[start : start + _BLOCK].astype(np.float64) ** 2).sum())
            for start in range(0, len(value_NW), _BLOCK)
        )
        length = float(np.sqrt(total / len(value_NW)))
    return Outcome(Vector(name=name, width=value_NW.shape[1], length=length))


def _fit_text(name: str, field: TextField, text: pl.Series) -> Outcome:
    if not text.count():
        return _NOTHING
    width = embed_texts([text.drop_nulls()[0]], field.encoder, batch_size=1).shape[1]
    return Outcome(
        Sentence(name=name, encoder=field.encoder, batch_size=field.batch_size, width=width)
    )


def _log1p(number_R: Float64[np.ndarray, " R"]) -> Float64[np.ndarray, " R"]:
    scaled_R: Float64[np.ndarray, " R"] = np.copysign(np.log1p(np.abs(number_R)), number_R)
    return scaled_R


def _lengths(value_RW: Shaped[np.ndarray, "R W"]) -> Float64[np.ndarray, " R"]:
    """Return each row's length, 1 for zeros."""
    length_R = np.sqrt((value_RW**2).sum(axis=1))
    return np.where(length_R > 0, length_R, 1.0)

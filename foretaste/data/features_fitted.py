"""Fitted fields: their state from training, and the encoding of values as codes and numbers.

Local codes of a field: 0 is missing, 1 is unseen or rare in training, and the values follow.
Buckets need no code for unseen values, so they start at 1.

Shape legend: R rows, N values of all bags, W width of a vector.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Annotated, Literal, NamedTuple

import numpy as np
import polars as pl
from jaxtyping import Bool, Float32, Float64, Int64, Shaped
from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from foretaste.config import Config
from foretaste.data.columns import in_words
from foretaste.data.features_values import (
    Held,
    at_row,
    embed_texts,
    held_by,
    moved,
    numbers_of,
    single_of,
    texts_of,
)
from foretaste.data.vocabulary import Vocabulary
from foretaste.errors import ConfigError, DataError

BETWEEN = "\x1f"
"""Separates crossed values; it does not occur in ordinary text."""


def joint_of(columns: Sequence[pl.Series], *, holds: Sequence[Held] = ()) -> pl.Series:
    """Return several categories of each row as one text, null if any is missing.

    Args:
        columns: One per category.
        holds: The type of each in training; empty: text.

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
    """The values of all rows, concatenated."""

    text_N: pl.Series
    """Categories as text, none missing."""
    row_N: Int64[np.ndarray, " N"]
    """The row of each value, non-decreasing."""


def bags_of(column: pl.Series, *, separator: str | None, holds: Held = "text") -> Bags:
    """Return the values of each row's bag; spaces around the parts of a text do not count.

    A single value that is not a text is a bag of one.

    Raises:
        DataError: It is text and there is no separator, or a value is not a category.
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
            "lists",
            column=column.name,
            value=text.drop_nulls()[0],
        )
    one = text.reshape((-1, 1)).arr.to_list()
    return bags_of(one.alias(column.name), separator=None, holds=holds)


class Vectors(NamedTuple):
    """One vector per row; zeros where it is missing."""

    value_RW: Float32[np.ndarray, "R W"]
    present_R: Bool[np.ndarray, " R"]


def vectors_of(column: pl.Series, *, width: int | None = None) -> Vectors:
    """Return vectors. An empty list and a vector of zeros count as missing.

    Args:
        column: Lists or arrays of numbers.
        width: The required length; None takes the length of the first vector.

    Raises:
        DataError: It holds no lists of numbers, a list has another length, or a number is missing,
            NaN or infinite.
    """
    if isinstance(column.dtype, pl.Array):
        column = column.arr.to_list()
    if column.dtype == pl.Null:
        column = column.cast(pl.List(pl.Float32))
    inner = column.explode().dtype if isinstance(column.dtype, pl.List) else pl.String()
    if not (inner.is_numeric() or inner == pl.Null):
        raise DataError(
            f"column {column.name!r} holds {in_words(column)}, and a vector is a list of numbers: "
            "give lists, or leave it missing",
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
            f"numbers, not {width}: all must have the same length, and a missing one is null",
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


MISSING, UNSEEN, FIRST = 0, 1, 2
"""Local codes: missing; unseen or rare; the first value."""

_FURTHEST = 10.0
"""Standardised numbers are clipped at this many standard deviations."""
_FEW = 256
"""Up to this many texts are looked up one by one, because a join of tables costs more."""
_OFTEN = 4
"""Whole numbers with at least this many rows each, on average, are looked up by distinct value."""
BLOCK = 1 << 14
"""Number of vectors that are scaled at a time."""


class Values(Config):
    """The categories that are frequent enough in training, the most frequent first."""

    texts: tuple[str, ...]
    """The categories, most frequent first."""
    rare: NonNegativeInt
    """Number of training rows with values that `texts` leaves out; they train the bucket of unseen
    values."""
    holds: Held = "text"
    """Type of the column in training, by which a text is read later; of a cross, text."""

    @model_validator(mode="before")
    @classmethod
    def _of_before(cls, stored: object) -> object:
        """Read the format of an earlier version, which kept times in the spelling of Polars."""
        if not isinstance(stored, dict) or "holds" in stored:
            return stored
        texts, holds = _iso(pl.Series("", stored["texts"], dtype=pl.String))
        return stored | {"texts": tuple(texts), "holds": holds}

    @cached_property
    def _vocabulary(self) -> Vocabulary:
        ids = pl.Series("id", self.texts, dtype=pl.String)
        return Vocabulary.trusted(lambda: ids, length=len(ids), is_integer=False)

    @property
    def num_codes(self) -> int:
        """Number of codes, including missing and unseen."""
        return FIRST + len(self.texts)

    def codes(self, text: pl.Series) -> Int64[np.ndarray, " N"]:
        """Return local codes."""
        few = text.to_list() if len(text) <= _FEW else text
        row_N = self._vocabulary.encode(few)
        code_N = np.where(row_N < 0, UNSEEN, row_N + FIRST)
        return np.where(text.is_null().to_numpy(), MISSING, code_N)

    def says(self, code_N: Int64[np.ndarray, " N"]) -> Bool[np.ndarray, " N"]:
        """Return which codes are known: neither missing nor a bucket without training rows."""
        return code_N >= (UNSEEN if self.rare else FIRST)


class _Coded(Config):
    """A field with one code per row, out of the values in training."""

    name: str
    """Name of the field."""
    values: Values
    """The categories, or combinations of them, that have a code."""

    @property
    def num_codes(self) -> int:
        """Number of codes of the field."""
        return self.values.num_codes

    @property
    def untaught(self) -> tuple[int, ...]:
        """Codes without a training value."""
        return (MISSING, UNSEEN)

    def says(self, code_R: Int64[np.ndarray, " R"]) -> Bool[np.ndarray, " R"]:
        """Return which codes are known."""
        return self.values.says(code_R)


class Categories(_Coded):
    """A single value, as a code."""

    kind: Literal["categorical"] = "categorical"

    def encode(self, column: pl.Series) -> Int64[np.ndarray, " R"]:
        """Return local codes; each distinct whole number is converted to text once."""
        if column.dtype.is_integer() and len(column) > _FEW:
            distinct = column.unique()
            if len(distinct) * _OFTEN < len(column):
                codes = pl.DataFrame([distinct, pl.Series("code", self._codes(distinct))])
                of_row = column.to_frame().join(
                    codes, on=column.name, how="left", maintain_order="left", nulls_equal=True
                )
                return of_row["code"].to_numpy()
        return self._codes(column)

    def _codes(self, column: pl.Series) -> Int64[np.ndarray, " R"]:
        return self.values.codes(texts_of(column, holds=self.values.holds))


class Cross(_Coded):
    """The values of several columns together, as a code."""

    kind: Literal["cross"] = "cross"
    of: tuple[str, ...]
    """The columns that are crossed."""
    holds: tuple[Held, ...] = ()
    """Type of each column in training; empty: text."""

    @model_validator(mode="before")
    @classmethod
    def _of_before(cls, stored: object) -> object:
        """Read the format of an earlier version, which kept times in the spelling of Polars."""
        if (
            not isinstance(stored, dict)
            or "holds" in stored
            or not isinstance(stored["values"], dict)
        ):
            return stored
        values = stored["values"]
        parts = pl.DataFrame(
            [text.split(BETWEEN) for text in values["texts"]],
            orient="row",
            schema=dict.fromkeys(stored["of"], pl.String),
        )
        columns = [_iso(column) for column in parts]
        texts = joint_of([text for text, _ in columns])
        return stored | {
            "values": values | {"texts": tuple(texts)},
            "holds": tuple(holds for _, holds in columns),
        }

    def encode(self, *columns: pl.Series) -> Int64[np.ndarray, " R"]:
        """Return local codes, from the crossed columns in the order of `of`."""
        return self.values.codes(joint_of(columns, holds=self.holds))


class Buckets(Config):
    """A number, as the code of its bucket between quantiles."""

    kind: Literal["buckets"] = "buckets"
    name: str
    """Name of the field."""
    edges: tuple[float, ...]
    """Bucket b holds numbers above `edges[b - 1]` and up to `edges[b]`."""
    holds: Held | None = None
    """Type of the column in training; None: numbers or times."""

    @property
    def num_codes(self) -> int:
        """Number of codes of the field."""
        return 2 + len(self.edges)

    @property
    def untaught(self) -> tuple[int, ...]:
        """Codes without a training value."""
        return (MISSING,)

    def encode(self, column: pl.Series) -> Int64[np.ndarray, " R"]:
        """Return local codes."""
        number_R = numbers_of(column, holds=self.holds)
        bucket_R = np.searchsorted(np.array(self.edges), number_R, side="left")
        return np.where(np.isnan(number_R), MISSING, bucket_R + 1)

    def says(self, code_R: Int64[np.ndarray, " R"]) -> Bool[np.ndarray, " R"]:
        """Return which codes are known."""
        says_R: Bool[np.ndarray, " R"] = code_R != MISSING
        return says_R


class Bag(Config):
    """Several values, as codes; an empty bag counts as missing."""

    name: str
    """Name of the field."""
    separator: str | None
    """Separator of the values of a text; None for lists."""
    values: Values
    """The categories that have a code."""

    def encode(self, column: pl.Series) -> tuple[Int64[np.ndarray, " N"], Int64[np.ndarray, " N"]]:
        """Return the local codes of all rows and the row of each; a missing bag holds one code."""
        text_N, row_N = bags_of(column, separator=self.separator, holds=self.values.holds)
        code_N = self.values.codes(text_N)
        empty = np.flatnonzero(np.bincount(row_N, minlength=len(column)) == 0)
        row_N = np.concatenate([row_N, empty])
        order = np.argsort(row_N, kind="stable")
        return np.concatenate([code_N, np.full(len(empty), MISSING)])[order], row_N[order]


class Number(Config):
    """A number, standardised."""

    name: str
    """Name of the field."""
    log1p: bool
    """Whether the logarithm of 1 plus the absolute number is taken, with the number's sign."""
    mean: float
    """Mean over the training rows, which is subtracted."""
    std: float = Field(gt=0)
    """Standard deviation over the training rows, by which the difference is divided."""
    holds: Held | None = None
    """Type of the column in training; None: numbers or times."""

    def encode(self, column: pl.Series) -> tuple[Float32[np.ndarray, " R"], Bool[np.ndarray, " R"]]:
        """Return numbers, 0 where missing, and which are present."""
        number_R = numbers_of(column, holds=self.holds)
        present_R = ~np.isnan(number_R)
        with np.errstate(over="ignore"):  # overflows are clipped too
            scaled_R = (log1p(number_R) if self.log1p else number_R) - self.mean
            held_R = np.clip(scaled_R / self.std, -_FURTHEST, _FURTHEST)
        return np.where(present_R, held_R, 0.0).astype(np.float32), present_R


class Vector(Config):
    """A vector of given width."""

    kind: Literal["vector"] = "vector"
    name: str
    """Name of the field."""
    width: PositiveInt
    """Numbers in the vector."""
    length: float | None = Field(gt=0)
    """Divisor of all vectors; None divides each by its own length."""
    mean: tuple[float, ...] = ()
    """Mean of the training vectors, which is subtracted first (after each vector is divided by its
    own length, if it is); empty: nothing is subtracted."""

    def encode(
        self, column: pl.Series
    ) -> tuple[Float32[np.ndarray, "R W"], Bool[np.ndarray, " R"]]:
        """Return vectors, zeros where missing, and which are present."""
        value_RW, present_R = vectors_of(column, width=self.width)
        for start in range(0, len(value_RW), BLOCK):
            rows = slice(start, start + BLOCK)
            value_RW[rows] = self._scaled(value_RW[rows].astype(np.float64))
            value_RW[rows][~present_R[rows]] = 0.0
        return value_RW, present_R

    def _scaled(self, value_RW: Float64[np.ndarray, "R W"]) -> Float64[np.ndarray, "R W"]:
        if not self.mean:
            return unit(value_RW) if self.length is None else value_RW / self.length
        if self.length is None:
            return unit(unit(value_RW) - np.array(self.mean))
        centred_RW: np.ndarray = (value_RW - np.array(self.mean)) / self.length
        return centred_RW


class Sentence(Config):
    """A text, as the vector of a sentence encoder."""

    kind: Literal["text"] = "text"
    name: str
    """Name of the field."""
    encoder: str
    """Folder or name of the sentence encoder."""
    batch_size: PositiveInt
    """Number of texts that are encoded at a time."""
    width: PositiveInt
    """Numbers in the encoder's vectors."""

    def encode(
        self, column: pl.Series
    ) -> tuple[Float32[np.ndarray, "R W"], Bool[np.ndarray, " R"]]:
        """Return vectors, zeros where the text is missing, and which are present."""
        text = texts_of(column)
        value_RW = np.zeros((len(text), self.width), np.float32)
        present_R = text.is_not_null().to_numpy(writable=True)
        if present_R.any():
            given = text.drop_nulls()
            distinct = given.unique(maintain_order=True)
            vector_NW = embed_texts(distinct.to_list(), self.encoder, batch_size=self.batch_size)
            places = pl.DataFrame({"text": distinct, "place": np.arange(len(distinct))})
            place_N = (
                given.alias("text")
                .to_frame()
                .join(places, on="text", how="left", maintain_order="left")["place"]
            )
            if vector_NW.shape[1] != self.width:
                raise ConfigError(
                    f"encoder {self.encoder!r} gives {vector_NW.shape[1]} numbers, and gave "
                    f"{self.width} in training: use the encoder of training",
                    name="encoder",
                    value=self.encoder,
                )
            value_RW[present_R] = vector_NW[place_N.to_numpy()]
        return value_RW, present_R


def _iso(texts: pl.Series) -> tuple[pl.Series, Held]:
    """Return distinct texts in the current spelling, and their type."""
    holds = held_by(texts)
    spelled = texts_of(texts, holds=holds)
    if spelled.n_unique() < texts.n_unique():
        return texts, "text"
    return spelled, holds


Codes = Annotated[Categories | Buckets | Cross, Field(discriminator="kind")]
Vectorised = Annotated[Vector | Sentence, Field(discriminator="kind")]
Fitted = Categories | Buckets | Cross | Bag | Number | Vector | Sentence


def log1p(number_R: Float64[np.ndarray, " R"]) -> Float64[np.ndarray, " R"]:
    """Return ln(1 + |x|) with the sign of x."""
    scaled_R: Float64[np.ndarray, " R"] = np.copysign(np.log1p(np.abs(number_R)), number_R)
    return scaled_R


def unit(value_RW: Shaped[np.ndarray, "R W"]) -> Float64[np.ndarray, "R W"]:
    """Divide each row by its length; zeros stay."""
    value_RW = value_RW.astype(np.float64)
    length_R1 = np.sqrt((value_RW**2).sum(axis=1, keepdims=True))
    scaled_RW: np.ndarray = value_RW / np.where(length_R1 > 0, length_R1, 1.0)
    return scaled_RW

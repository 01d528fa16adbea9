"""The fitted fields of users or items, which turn the caller's columns into rows of features.

All categories of a side share one space of codes, so that a model keeps one table and one look-up
serves a batch. Training and serving use the same encoders, and the encoding of a row does not
depend on other rows.

Shape legend: R rows, G bags, N values of all bags, F fields of all kinds.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
import polars as pl
import torch
from jaxtyping import Bool, Float32, Float64, Int64

from foretaste.config import Config
from foretaste.data.arrays import flattening
from foretaste.data.batch import FieldTable
from foretaste.data.features_fitted import (
    BLOCK,
    Bag,
    Buckets,
    Categories,
    Codes,
    Cross,
    Fitted,
    Number,
    Sentence,
    Values,
    Vector,
    Vectorised,
    bags_of,
    joint_of,
    log1p,
    unit,
    vectors_of,
)
from foretaste.data.features_schema import (
    CategoricalField,
    CrossField,
    FieldConfig,
    MultiField,
    NumericField,
    TextField,
    VectorField,
)
from foretaste.data.features_values import Held, embed_texts, held_by, numbers_of, texts_of
from foretaste.data.tables import open_source
from foretaste.errors import DataError, nearest

_MANY = 1_000
"""At most this many categories, the most frequent ones, are compared letter by letter."""


class FieldSide(Config):
    """The fitted fields of users or items, which turn the caller's columns into a `FieldTable`."""

    codes: tuple[Codes, ...] = ()
    """Single-valued fields: categories, bucketised numbers and crosses."""
    bags: tuple[Bag, ...] = ()
    """Fields of several values."""
    numbers: tuple[Number, ...] = ()
    """Standardised numbers."""
    vectors: tuple[Vectorised, ...] = ()
    """Vectors and encoded texts."""

    @property
    def names(self) -> tuple[str, ...]:
        """The fields' names, in the order of `FieldTable.present_RF`."""
        return tuple(field.name for field in self._fields)

    @property
    def columns(self) -> tuple[str, ...]:
        """The caller's columns that the fields read, each once."""
        return tuple(dict.fromkeys(c for field in self._fields for c in _columns_of(field)))

    @property
    def num_fields(self) -> int:
        """Number of fields of all kinds."""
        return len(self._fields)

    @property
    def num_codes(self) -> int:
        """Number of codes of all fields together."""
        return self._starts[-1]

    @property
    def num_numbers(self) -> int:
        """Standardised numbers."""
        return len(self.numbers)

    @property
    def vector_widths(self) -> tuple[int, ...]:
        """The width of each vector field."""
        return tuple(vector.width for vector in self.vectors)

    @property
    def untaught_codes(self) -> tuple[int, ...]:
        """Codes without a training value: missing, and unseen or rare."""
        codes = [
            start + code
            for field, start in zip(self.codes, self._starts, strict=False)
            for code in field.untaught
        ]
        bags = [start + code for start in self._starts[len(self.codes) : -1] for code in (0, 1)]
        return (*codes, *bags)

    @property
    def _fields(self) -> tuple[Fitted, ...]:
        return (*self.codes, *self.bags, *self.numbers, *self.vectors)

    @cached_property
    def _starts(self) -> list[int]:
        """The first code of each single-valued field and of each bag, and the total at the end."""
        sizes = [field.num_codes for field in self.codes]
        sizes += [bag.values.num_codes for bag in self.bags]
        return [0, *np.cumsum(sizes, dtype=np.int64).tolist()]

    def encode(self, frame: object) -> FieldTable:
        """Encode rows; a row's result does not depend on the others.

        A column that the frame lacks counts as missing in every row; further columns are ignored.

        Args:
            frame: Any table: Polars, pandas, Arrow.

        Raises:
            DataError: A column does not have its field's kind; the message names row and value.
            ConfigError: A text needs an encoder that is missing.
        """
        if not isinstance(frame, pl.DataFrame):
            opened = open_source(frame, role="the table of features")
            frame = opened.read([name for name in opened.columns if name in self.columns], []).frame
        num_rows = frame.height
        columns = {
            name: frame[name] if name in frame.columns else _missing(name, num_rows)
            for name in self.columns
        }
        present = np.zeros((num_rows, self.num_fields), np.bool_)
        code_RC = np.zeros((num_rows, len(self.codes)), np.int64)
        for place, field in enumerate(self.codes):
            local_R = field.encode(*(columns[name] for name in _columns_of(field)))
            present[:, place] = field.says(local_R)
            code_RC[:, place] = local_R + self._starts[place]
        bag_N, offsets_RG1 = self._encode_bags(columns, present)
        number_RM = np.zeros((num_rows, len(self.numbers)), np.float32)
        after = len(self.codes) + len(self.bags)
        for place, number in enumerate(self.numbers):
            number_RM[:, place], present[:, after + place] = number.encode(columns[number.name])
        after += len(self.numbers)
        vectors = []
        for place, vector in enumerate(self.vectors):
            value_RW, present[:, after + place] = vector.encode(columns[vector.name])
            vectors.append(torch.from_numpy(value_RW))
        return FieldTable(
            code_RC=torch.from_numpy(code_RC),
            bag_N=torch.from_numpy(bag_N),
            bag_offsets_RG1=torch.from_numpy(offsets_RG1),
            number_RM=torch.from_numpy(number_RM),
            vectors=tuple(vectors),
            present_RF=torch.from_numpy(present),
        )

    def columns_read(self, table: FieldTable) -> frozenset[str]:
        """Return the columns in which a row has a known value, neither missing nor unseen.

        Args:
            table: One row of this side.
        """
        present = zip(self._fields, table.present_RF[0].tolist(), strict=True)
        return frozenset(column for field, says in present if says for column in _columns_of(field))

    def nearest_value(self, column: str, text: str) -> str | None:
        """Return the category that a text likely means, such as the same text in other case."""
        values = [
            field.values.texts
            for field in (*self.codes, *self.bags)
            if isinstance(field, Categories | Bag) and field.name == column
        ]
        texts = values[0] if values else ()
        same = [known for known in texts if known.strip().casefold() == text.strip().casefold()]
        return same[0] if same else nearest(text, texts[:_MANY], likeness=0.8)

    def unknown(self, num_rows: int) -> FieldTable:
        """Return rows without known features."""
        name = self.columns[0] if self._fields else "nothing"
        return self.encode(pl.DataFrame([_missing(name, num_rows)]))

    def _encode_bags(
        self, columns: Mapping[str, pl.Series], present: Bool[np.ndarray, "R F"]
    ) -> tuple[Int64[np.ndarray, " N"], Int64[np.ndarray, "R G1"]]:
        """Encode all bags, laid out row by row, and mark the present ones."""
        num_rows, num_bags = len(present), len(self.bags)
        codes, places = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        for g, bag in enumerate(self.bags):
            local_N, row_N = bag.encode(columns[bag.name])
            says_N = bag.values.says(local_N)
            present[row_N[says_N], len(self.codes) + g] = True
            codes.append(local_N + self._starts[len(self.codes) + g])
            places.append(row_N * num_bags + g)
        place_N = np.concatenate(places)
        length_P = np.bincount(place_N, minlength=num_rows * num_bags)
        end_RG = np.cumsum(length_P).reshape(num_rows, num_bags)
        offsets_RG1 = np.zeros((num_rows, num_bags + 1), np.int64)
        offsets_RG1[:, 1:] = end_RG
        if num_bags and num_rows:
            offsets_RG1[1:, 0] = end_RG[:-1, -1]
        return np.concatenate(codes)[np.argsort(place_N, kind="stable")], offsets_RG1


def _columns_of(field: Fitted) -> tuple[str, ...]:
    return field.of if isinstance(field, Cross) else (field.name,)


def _missing(name: str, num_rows: int) -> pl.Series:
    return pl.Series(name, [None], dtype=pl.Null).new_from_index(0, num_rows)


class Outcome(NamedTuple):
    """The result of fitting."""

    fitted: Fitted | None
    """None if no training row has a value."""
    note: str = ""
    """A note on the field; it follows the field's name."""


_NOTHING = Outcome(None, "has no value on a training row: it was left out")


def columns_of(name: str, field: FieldConfig) -> tuple[str, ...]:
    """Return the columns that a field reads: its own, or those that it crosses."""
    return field.of if isinstance(field, CrossField) else (name,)


def fit_field(
    name: str,
    field: FieldConfig,
    columns: Sequence[pl.Series],
    trained_R: Bool[np.ndarray, " R"],
) -> Outcome:
    """Fit a field to the rows that occur in training; the others are only checked.

    Args:
        name: The field's name.
        field: Its kind and settings.
        columns: The columns of `columns_of`.
        trained_R: True for rows that occur in training.

    Raises:
        DataError: The column does not have the field's kind; the message names the row.
        ConfigError: A text needs an encoder that is missing.
    """
    try:
        return _fit(name, field, columns, trained_R)
    except DataError as error:
        error.args = (f"{error}; or {_OTHER_SETTINGS[field.kind]}, or leave the column out",)
        raise


_OTHER_SETTINGS = {
    "categorical": 'set its kind to "multi" or "vector"',
    "cross": "cross other columns",
    "multi": 'set its separator, or kind = "categorical"',
    "numeric": 'set kind = "categorical"',
    "vector": "set another kind",
    "text": "set another kind",
}
"""Further advice for a schema; it does not apply once a model reads the features."""


def _fit(
    name: str,
    field: FieldConfig,
    columns: Sequence[pl.Series],
    trained_R: Bool[np.ndarray, " R"],
) -> Outcome:
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
        note = f"is {text[0]!r} on every training row: it contributes nothing"
    elif len(values.texts) == text.count() > 1:
        note = "has another value on every training row: no two rows have anything in common"
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
    if holds == "text":  # the type of its parts
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
    note = (
        f"is {low:g} wherever it is known in training: it contributes little" if low == high else ""
    )
    if field.transform == "bucketise":
        share = np.arange(1, field.num_buckets) / field.num_buckets
        edges = np.unique(np.quantile(number_N, share, method="inverted_cdf"))
        kept = tuple(edges[edges < high].tolist())
        return Outcome(Buckets(name=name, edges=kept, holds=holds), note)
    logarithm = field.transform == "log1p_standardise"
    scaled_N = log1p(number_N) if logarithm else number_N
    with np.errstate(over="ignore", invalid="ignore"):  # an overflow raises an error
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
    """Return a note if outliers make the others nearly equal, with a transform that helps."""
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

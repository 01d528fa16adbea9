"""The fitted fields of users or of items: from the caller's columns to rows of features.

All categories of a side share one space of codes, so that a model keeps one table and looks a
batch up in one pass. Training and serving encode by the same code, and a row's bytes do not depend
on the rows beside it.

Shape legend: R rows, G bags, N values of all bags, F fields of all kinds.
"""

from collections.abc import Mapping
from functools import cached_property

import numpy as np
import polars as pl
import torch
from jaxtyping import Bool, Int64

from foretaste.config import Config
from foretaste.data.features_fitted import (
    Bag,
    Categories,
    Codes,
    Cross,
    Fitted,
    Number,
    Vectorised,
)
from foretaste.data.features_table import FieldTable
from foretaste.data.tables import open_source
from foretaste.errors import nearest

_MANY = 1_000
"""So many categories, the most frequent, are compared letter by letter."""


class FieldSide(Config):
    """The fitted fields of users or of items: from the caller's columns to a `FieldTable`."""

    codes: tuple[Codes, ...] = ()
    """Single-valued fields: categories, bucketised numbers and crosses."""
    bags: tuple[Bag, ...] = ()
    numbers: tuple[Number, ...] = ()
    vectors: tuple[Vectorised, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The fields' names, in the order of `FieldTable.present_RF`."""
        return tuple(field.name for field in self._fields)

    @property
    def columns(self) -> tuple[str, ...]:
        """The caller's columns that the fields are made of, each once."""
        return tuple(dict.fromkeys(c for field in self._fields for c in _columns_of(field)))

    @property
    def num_fields(self) -> int:
        """Fields of all kinds."""
        return len(self._fields)

    @property
    def num_codes(self) -> int:
        """Codes of all fields together."""
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
        """Codes that stand for no value: missing, and unseen or rare."""
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
        """The first code of each single-valued field and of each bag, and the end."""
        sizes = [field.num_codes for field in self.codes]
        sizes += [bag.values.num_codes for bag in self.bags]
        return [0, *np.cumsum(sizes, dtype=np.int64).tolist()]

    def encode(self, frame: object) -> FieldTable:
        """Encode rows; a row's result does not depend on the others.

        A column that the frame lacks is missing in every row; further columns do not matter.

        Args:
            frame: Any table: Polars, pandas, Arrow.

        Raises:
            DataError: A column is not of its field's kind; the message names row and value.
            ConfigError: A text needs an encoder that is not there.
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
        """Return the columns of which a row says something: neither missing nor unknown.

        Args:
            table: A row of this side.
        """
        present = zip(self._fields, table.present_RF[0].tolist(), strict=True)
        return frozenset(column for field, says in present if says for column in _columns_of(field))

    def nearest_value(self, column: str, text: str) -> str | None:
        """Return the category of a column that a text most likely means: in another case, say."""
        values = [
            field.values.texts
            for field in (*self.codes, *self.bags)
            if isinstance(field, Categories | Bag) and field.name == column
        ]
        texts = values[0] if values else ()
        same = [known for known in texts if known.strip().casefold() == text.strip().casefold()]
        return same[0] if same else nearest(text, texts[:_MANY], likeness=0.8)

    def unknown(self, num_rows: int) -> FieldTable:
        """Return rows of which nothing is known."""
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

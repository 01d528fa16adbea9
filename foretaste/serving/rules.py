"""Rules for lists, with any model: filters on attributes, caps on categories, diversity.

Also: the values of items in the item table, or in a request with new items, that rules use.

Shape legend: I items, E labels of all items, N labels of some, M items found.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, date, datetime
from functools import cached_property
from typing import Annotated, Literal, NamedTuple, final

import numpy as np
import polars as pl
from jaxtyping import Bool, Float64, Int64
from pydantic import (
    BeforeValidator,
    Field,
    PositiveInt,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
    model_validator,
)

from foretaste.config import Config, Count
from foretaste.data.batch import ranges
from foretaste.data.columns import in_words
from foretaste.data.features_fitted import bags_of
from foretaste.data.features_values import numbers_of, separator_of, texts_of
from foretaste.data.vocabulary import number_ids
from foretaste.errors import DataError, did_you_mean
from foretaste.serving.profiles import Sent


def _as_many(values: object) -> object:
    return (values,) if isinstance(values, str | bool | int | float) else values


Value = StrictBool | StrictInt | StrictFloat | StrictStr
Values = Annotated[
    tuple[Value, ...],
    Field(min_length=1, max_length=1000, fail_fast=True),
    BeforeValidator(_as_many),
]
Bound = StrictInt | StrictFloat | StrictStr


class Condition(Config):
    """A condition on one column of an item; all given parts must be satisfied.

    Values are compared as text, so 1994 and "1994" are equal. A missing value satisfies only
    `none_of`. A column of several values has lists, or texts with a separator, such as
    "Action|Comedy".
    """

    equals: Value | None = None
    """The value, in a column with one value per item."""
    one_of: Values | None = None
    """At least one of these values."""
    none_of: Values | None = None
    """None of these values."""
    contains: Values | None = None
    """All of these values, in a column of several."""
    at_least: Bound | None = None
    """The lowest number; in a column of dates or times, the earliest, as ISO text."""
    at_most: Bound | None = None
    """The highest number, or the latest date or time."""

    @model_validator(mode="after")
    def _says_something(self) -> "Condition":
        if not self.model_dump(exclude_none=True):
            names = ", ".join(type(self).model_fields)
            raise ValueError(f"a condition is empty: give one of {names}")
        return self


class Diversity(Config):
    """Maximal marginal relevance: each position gets an item with a high score that differs from
    those above it.

    The next item is the one with the greatest `relevance` times its score minus
    (1 - `relevance`) times its similarity to the most similar of those chosen.
    """

    relevance: float = Field(default=0.7, ge=0, le=1)
    """Weight of the score: 1 keeps the order of scores, 0 considers only the difference."""
    pool: PositiveInt = Field(default=100, le=10_000)
    """Number of best items that are considered; later ones are used only if these cannot fill the
    list."""
    by: Literal["vectors"] | tuple[str, ...] = Field(
        default="vectors", min_length=1, max_length=100
    )
    """The similarity of two items: "vectors", the cosine of the model's item vectors; or columns of
    the item table, by the share of values that two items have in common."""


class Rules(Config):
    """Rules for a list, in addition to seen items and to items allowed or denied by id."""

    where: dict[str, Condition] = Field(default_factory=dict, max_length=100)
    """Conditions by column of the item table."""
    caps: dict[str, Count] = Field(default_factory=dict, max_length=100)
    """Maximum number of items in a list with the same value, by column of the item table. Items
    without a value do not count."""
    diversity: Diversity | None = None
    """How different the items of a list should be; without it, the score alone decides the
    order."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of the item table that the rules read, without duplicates."""
        by = () if self.diversity is None or self.diversity.by == "vectors" else self.diversity.by
        return tuple(dict.fromkeys((*self.where, *self.caps, *by)))

    @property
    def reorder(self) -> bool:
        """Whether an item's position depends on the items above it."""
        return bool(self.caps) or self.diversity is not None


NO_RULES = Rules()
"""No rules: nothing is filtered, capped or reordered."""

_NONE = np.empty(0, dtype=np.int64)
_WHOLE = re.compile(r"[+-]?[0-9]{1,20}")


class Carried(NamedTuple):
    """The labels of some items."""

    row_N: Int64[np.ndarray, " N"]
    """The position of each label's item, in non-decreasing order."""
    code_N: Int64[np.ndarray, " N"]


@final
class Labels:
    """The values of one column as codes, with look-ups from items to codes and back."""

    def __init__(self, column: pl.Series, separator: str | None = None) -> None:
        """Read a column.

        Args:
            column: A value, or several, for each item.
            separator: Separates several values in a text; see `separator_of`.

        Raises:
            DataError: The column has an infinite number, or a value that cannot be a label.
        """
        self.name, self.dtype, self.separator = column.name, column.dtype, separator
        self.several = separator is not None or isinstance(column.dtype, pl.List | pl.Array)
        if self.several:
            text_E, row_E = bags_of(column, separator=separator)
        else:
            text = texts_of(column)
            row_E = np.flatnonzero(text.is_not_null().to_numpy())
            text_E = text.drop_nulls()
        self.texts, code_E = number_ids(text_E)
        pairs = pl.DataFrame({"row": row_E, "code": code_E.astype(np.int64)}).unique()
        by_item, by_code = pairs.sort("row", "code"), pairs.sort("code", "row")
        self._code_N, self._item_N = by_item["code"].to_numpy(), by_code["row"].to_numpy()
        self._first_I1 = np.searchsorted(by_item["row"].to_numpy(), np.arange(len(column) + 1))
        self._first_V1 = np.searchsorted(by_code["code"].to_numpy(), np.arange(len(self.texts) + 1))

    @property
    def ordered(self) -> bool:
        """Whether the column has numbers or times, which can be compared."""
        return self.dtype.is_numeric() or self.dtype in (pl.Date, pl.Datetime)

    def most_frequent(self, num: int) -> list[str]:
        """Return the labels of most items; ties are sorted by text."""
        order_V = np.argsort(-np.diff(self._first_V1), kind="stable")
        return self.texts.ids.gather(order_V[:num]).to_list()

    def of(self, item_M: Int64[np.ndarray, " M"]) -> Carried:
        """Return the labels of some items."""
        start_M, end_M = self._first_I1[item_M], self._first_I1[item_M + 1]
        row_N = np.repeat(np.arange(len(item_M)), end_M - start_M)
        index_N, _ = ranges(start_M, end_M - start_M)
        return Carried(row_N, self._code_N[index_N])

    def items_with(self, value: Value) -> Int64[np.ndarray, " M"]:
        """Return the items that have a value as a label; the value may be unknown.

        Raises:
            DataError: A column of this type cannot have such a value.
        """
        code = self.texts.find(self._spelled(value))
        if code < 0:
            return _NONE
        start, end = self._first_V1[code : code + 2]
        return self._item_N[start:end]

    def _spelled(self, value: Value) -> str:
        inner = self.dtype.inner if isinstance(self.dtype, pl.List | pl.Array) else self.dtype
        if isinstance(value, float):
            text = str(texts_of(pl.Series([value])).fill_null("")[0])
        else:
            text = str(value).lower() if isinstance(value, bool) else str(value)
        try:
            if inner == pl.Boolean and text not in ("true", "false"):
                raise ValueError
            if inner == pl.Date:
                return date.fromisoformat(text).isoformat()
            if inner.is_numeric():
                if _WHOLE.fullmatch(text):
                    return str(int(text))
                return str(texts_of(pl.Series([float(text)]))[0])
        except ValueError:
            held = in_words(pl.Series(dtype=inner))
            message = f"column {self.name!r} holds {held}, and {value!r} is not one"
            raise DataError(message, column=self.name, value=value) from None
        return text


@final
class ItemLabels:
    """The item table by columns, each of which is read at its first use."""

    def __init__(
        self,
        table: pl.DataFrame | None,
        *,
        num_items: int,
        separators: Mapping[str, str | None] | None = None,
    ) -> None:
        """Take a table.

        Args:
            table: One row per item; None: there is no table.
            num_items: I.
            separators: The separator of several values in a text, by column; None: inferred.
        """
        self._table, self._num_items, self._separators = table, num_items, separators
        self._labels: dict[str, Labels] = {}
        self._numbers: dict[str, Float64[np.ndarray, " I"]] = {}

    @cached_property
    def columns(self) -> tuple[str, ...]:
        """The columns that rules may name, which excludes vectors and bytes."""
        columns = [] if self._table is None else self._table.iter_columns()
        return tuple(column.name for column in columns if _is_readable(column))

    @property
    def readable(self) -> tuple[str, ...]:
        """The columns of which all values can be read."""
        return tuple(name for name in self.columns if self._can_read(name))

    def labels(self, name: str) -> Labels:
        """Return a column's labels.

        Raises:
            DataError: There is no such column, or it has no labels.
        """
        if name not in self._labels:
            column = self._column(name)
            self._labels[name] = Labels(column, self._separator(column))
        return self._labels[name]

    def numbers(self, name: str) -> Float64[np.ndarray, " I"]:
        """Return a column's numbers, NaN where missing; dates and times as days since 1970.

        Raises:
            DataError: There is no such column, or it has neither numbers nor times.
        """
        if name not in self._numbers:
            column = self._column(name)
            if not self.labels(name).ordered:
                raise DataError(
                    f"column {name!r} holds {in_words(column)}: at_least and at_most need numbers, "
                    "dates or times",
                    column=name,
                )
            self._numbers[name] = numbers_of(column)
        return self._numbers[name]

    def matching(self, where: Mapping[str, Condition]) -> Bool[np.ndarray, " I"]:
        """Return the items that satisfy all conditions.

        Raises:
            DataError: A column is unknown, or a condition cannot be asked of it.
        """
        matching_I = np.ones(self._num_items, dtype=np.bool_)
        for name, condition in where.items():
            matching_I &= self._meeting(name, condition)
        return matching_I

    def _separator(self, column: pl.Series) -> str | None:
        if self._separators is not None:
            return self._separators[column.name]
        return separator_of(texts_of(column)) if column.dtype == pl.String else None

    def _can_read(self, name: str) -> bool:
        try:
            self.labels(name)
        except DataError:  # an infinite number, which training did not read
            return False
        return True

    def _meeting(self, name: str, asked: Condition) -> Bool[np.ndarray, " I"]:
        meeting_I = np.ones(self._num_items, dtype=np.bool_)
        if asked.at_least is not None:
            meeting_I &= self.numbers(name) >= self._bound(name, asked.at_least)
        if asked.at_most is not None:
            meeting_I &= self.numbers(name) <= self._bound(name, asked.at_most)
        if asked.equals is not None:
            self._refuse_unless(name, several=False, asked="equals", instead="contains")
            meeting_I &= self._with_any(name, [asked.equals])
        if asked.contains is not None:
            self._refuse_unless(name, several=True, asked="contains", instead="equals or one_of")
            for value in asked.contains:
                meeting_I &= self._with_any(name, [value])
        if asked.one_of is not None:
            meeting_I &= self._with_any(name, asked.one_of)
        if asked.none_of is not None:
            meeting_I &= ~self._with_any(name, asked.none_of)
        return meeting_I

    def _with_any(self, name: str, values: Sequence[Value]) -> Bool[np.ndarray, " I"]:
        found_I = np.zeros(self._num_items, dtype=np.bool_)
        for value in values:
            found_I[self.labels(name).items_with(value)] = True
        return found_I

    def _refuse_unless(self, name: str, *, several: bool, asked: str, instead: str) -> None:
        if self.labels(name).several != several:
            holds = "one value" if several else "several values"
            raise DataError(
                f"column {name!r} holds {holds} per item: use {instead}, not {asked}", column=name
            )

    def _bound(self, name: str, bound: Bound) -> float:
        dtype = self._column(name).dtype
        is_time = dtype in (pl.Date, pl.Datetime)
        if isinstance(bound, str) != is_time:
            wanted = "an ISO date or time, such as 2024-02-29" if is_time else "a number"
            raise DataError(
                f"column {name!r} holds {in_words(self._column(name))}: a bound is {wanted}, not "
                f"{bound!r}",
                column=name,
                value=bound,
            )
        if not isinstance(bound, str):
            return float(bound)
        return _days(name, bound)

    def _column(self, name: str) -> pl.Series:
        if self._table is None:
            raise DataError(
                f"rules name the column {name!r}, but this model has no item table: train it on "
                "events that have one",
                column=name,
            )
        if name in self.columns:
            return self._table[name]
        if name in self._table.columns:
            raise DataError(
                f"column {name!r} holds {in_words(self._table[name])}: rules cannot use such a "
                "column",
                column=name,
            )
        raise DataError(
            f"rules name the column {name!r}, but the item table has "
            f"{', '.join(self.columns) or 'none for rules'}{did_you_mean(name, self.columns)}",
            column=name,
        )


def _is_readable(column: pl.Series) -> bool:
    is_list = isinstance(column.dtype, pl.List | pl.Array)
    inner = column.dtype.inner if is_list else column.dtype  # type: ignore[attr-defined]  # a list's
    is_vector = is_list and inner.is_float()
    return not is_vector and not inner.is_nested() and inner not in (pl.Binary, pl.Object)


def _days(name: str, text: str) -> float:
    """Return a time as days since 1970; without a time zone, it is in UTC."""
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        raise DataError(
            f"column {name!r} holds times, but {text!r} is not a time: write it as 2024-02-29 or "
            "2024-02-29T12:00:00",
            column=name,
            value=text,
        ) from None
    return time.replace(tzinfo=time.tzinfo or UTC).timestamp() / 86_400


def labels_of_new(labels: ItemLabels, sent: Sent, columns: Collection[str]) -> ItemLabels:
    """Return a table of new items like the catalogue's; values that are not given are missing.

    Args:
        labels: The labels of the catalogue, which determine the type of each column.
        sent: The given values of each of R new items.
        columns: The columns that rules name.

    Raises:
        DataError: A column is unknown, or a value does not fit its type; the error names the item.
    """
    table, separators = {}, {}
    for name in columns:
        own = labels.labels(name)
        separators[name] = own.separator
        is_list = isinstance(own.dtype, pl.List | pl.Array)
        like = pl.Series(name, [], dtype=own.dtype)
        like = like.explode() if is_list else like
        values = [_as_told(item_id, said.get(name), own, like) for item_id, said in sent.items()]
        dtype = pl.List(pl.String) if is_list else _held(like).dtype
        table[name] = pl.Series(name, values, dtype=dtype)
    return ItemLabels(pl.DataFrame(table), num_items=len(sent), separators=separators)


def carried_beside(
    own: Labels, new: Labels, item_M: Int64[np.ndarray, " M"], first: int
) -> Carried:
    """Return the labels of items in the catalogue and of new items, with the same codes.

    Args:
        own: A column of the item table.
        new: The same column of new items.
        item_M: Rows of items; those from `first` on are new.
        first: The first new row.
    """
    is_new_M = item_M >= first
    known, added = own.of(item_M[~is_new_M]), new.of(item_M[is_new_M] - first)
    code_V = own.texts.encode(new.texts.ids)
    code_V = np.where(code_V < 0, len(own.texts) + np.arange(len(code_V)), code_V)
    row_N = np.concatenate(
        [np.flatnonzero(~is_new_M)[known.row_N], np.flatnonzero(is_new_M)[added.row_N]]
    )
    order_N = np.argsort(row_N, kind="stable")
    return Carried(row_N[order_N], np.concatenate([known.code_N, code_V[added.code_N]])[order_N])


def _held(like: pl.Series) -> pl.Series:
    """Return an empty column for single values that `_as_one` returns."""
    if like.dtype.is_numeric():
        return like.cast(pl.Float64)
    typed = like.dtype in (pl.Boolean, pl.Date, pl.Datetime)
    return like if typed else pl.Series(like.name, [], dtype=pl.String)


def _as_told(item_id: object, value: object, own: Labels, like: pl.Series) -> object:
    """Return a value in the type of its column, None if it is missing."""
    if value is None or value == "" or value != value:
        return None
    try:
        if isinstance(own.dtype, pl.List | pl.Array):
            parts = value if isinstance(value, list | tuple) else [value]
            return texts_of(pl.Series([_as_one(part, like) for part in parts])).to_list()
        if own.separator is not None and isinstance(value, list | tuple):
            return own.separator.join(str(_as_one(part, like)) for part in value)
        return _as_one(value, like)
    except (ValueError, TypeError, OverflowError, DataError, pl.exceptions.PolarsError):
        raise DataError(
            f"rules read the column {own.name!r}, which holds "
            f"{in_words(pl.Series(dtype=own.dtype))}; the new item {item_id!r} has {value!r} "
            "there, which is not one",
            column=own.name,
            value=value,
        ) from None


def _as_one(value: object, like: pl.Series) -> object:
    """Return a single value in the type of the column `like`, where all numbers are floats."""
    text = texts_of(pl.Series([value]))[0]
    if text is None or (like.dtype == pl.Boolean and text not in ("true", "false")):
        raise ValueError
    if like.dtype == pl.Boolean:
        return text == "true"
    if like.dtype.is_numeric():
        return float(text)
    if like.dtype == pl.Date:
        return date.fromisoformat(text)
    if like.dtype == pl.Datetime:
        time = datetime.fromisoformat(text)
        time = time.replace(tzinfo=time.tzinfo or UTC).astimezone(UTC).replace(tzinfo=None)
        return pl.Series([time]).cast(like.dtype)[0]
    return str(text)

"""Vocabularies: external ids and their rows.

The same rules hold in Python, on the command line and over HTTP. A whole number of any type is an
integer: 3, 3.0, NumPy's and `Decimal`'s. Texts are compared letter by letter; an integer id is also
found by its text, "3", but not by "03" or " 3". Anything else becomes the text that reading gives
it. Missing, empty and multiple values are not ids.
"""

import hashlib
import math
import re
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from datetime import date, datetime, time
from decimal import Decimal
from functools import cached_property
from typing import TYPE_CHECKING, final
from uuid import UUID

import numpy as np
import polars as pl
from jaxtyping import Int32, Int64, UInt8

from foretaste.arguments import as_list, checked
from foretaste.config import shown
from foretaste.errors import DataError
from foretaste.later import later

loops = later("foretaste.data.loops")

if TYPE_CHECKING:
    Ids = Iterable[object]
else:
    Ids = object  # `listed` checks it, with an error of its own
"""A sequence of ids: a list, a tuple, a set, a generator, a dictionary's view, or an array or a
column of NumPy, pandas, Polars or Arrow."""

_INTEGER = re.compile(r"0|-?[1-9][0-9]{0,18}")
_CLEAR = (str, date, time, UUID, np.datetime64)
"""Types of ids besides whole numbers."""
INT64 = range(-(2**63), 2**63)
"""The integers that a column of ids can hold."""
_INT2000 = range(-(2**2000), 2**2000)
"""Longer numbers are not ids; Python does not even print numbers of 4300 digits."""
_SMALL = 2**18
"""Up to this many ids, a dictionary is used; beyond, a binary search."""
_FEW = 32
"""Fewer ids than a 32nd of the vocabulary are looked up one by one, more ids in one join."""


@final
class Vocabulary:
    """A two-way map between the caller's ids and rows `0 … len - 1`.

    Ids are kept as 64-bit integers if all of them are integers, and as text otherwise. A look-up
    accepts either: `42` and `"42"` find the same id. Small vocabularies keep a dictionary; large
    ones use a binary search in their sorted ids.
    """

    @checked
    def __init__(self, ids: pl.Series) -> None:
        """Number `ids` in the order given.

        Args:
            ids: Distinct, of type Int64 or String, without nulls.

        Raises:
            DataError: An id is missing or repeated, or the type is wrong.
        """
        if ids.dtype not in (pl.Int64, pl.String):
            raise DataError(
                "ids of a vocabulary are 64-bit integers or text: cast them first", name="ids"
            )
        if ids.null_count():
            raise DataError(f"{ids.null_count()} ids are missing: give every row an id", name="ids")
        if ids.n_unique() != len(ids):
            twice = ids.filter(ids.is_duplicated())[0]
            raise DataError(
                f"id {twice!r} occurs twice in a vocabulary: keep one of them",
                name="ids",
                value=twice,
            )
        self._number(lambda: ids, len(ids), is_integer=ids.dtype == pl.Int64)

    @classmethod
    def trusted(
        cls, load: Callable[[], pl.Series], *, length: int, is_integer: bool
    ) -> "Vocabulary":
        """Take ids that were checked when they were written, and load them at first use.

        Args:
            load: Returns `length` distinct ids, Int64 if `is_integer` and String otherwise.
            length: Number of ids.
            is_integer: Whether they are integers.
        """
        vocabulary = cls.__new__(cls)
        vocabulary._number(load, length, is_integer=is_integer)
        return vocabulary

    def _number(self, load: Callable[[], pl.Series], length: int, *, is_integer: bool) -> None:
        self._load, self._length, self._is_integer = load, length, is_integer

    def __getstate__(self) -> dict[str, object]:
        """Return the content of a pickle: the loaded ids, without the look-up structures."""
        return {"_length": self._length, "_is_integer": self._is_integer, "ids": self.ids}

    def __len__(self) -> int:
        return self._length

    @property
    def is_integer(self) -> bool:
        """Whether the ids are integers (text otherwise)."""
        return self._is_integer

    @cached_property
    def ids(self) -> pl.Series:
        """The ids, Int64 or String, row by row."""
        return self._load().alias("id")

    @checked
    def same_as(self, other: "Vocabulary") -> bool:
        """Return whether another vocabulary has equal ids in equal rows."""
        if self is other:
            return True
        is_alike = len(self) == len(other) and self.is_integer == other.is_integer
        return is_alike and self.ids.equals(other.ids)

    @cached_property
    def digest(self) -> str:
        """A SHA-256 of the ids, row by row."""
        sha = hashlib.sha256(f"{self.ids.dtype} {len(self)}\0".encode())
        if self.is_integer:
            sha.update(np.ascontiguousarray(self.ids.to_numpy()).data)
        else:
            for buffer in text_buffers(self.ids):
                sha.update(buffer.data)
        return sha.hexdigest()

    @checked
    def find(self, external_id: object) -> int:
        """Return the row of one id, -1 if it is unknown or not an id."""
        return self._find(plain_id(external_id))

    def find_given(self, external_id: object, *, name: str, position: int | None = None) -> int:
        """Return the row of an id that a caller gave, -1 if it is unknown.

        Args:
            external_id: The id.
            name: The caller's name for it, for the error.
            position: Its position in a list of that name, from 0.

        Raises:
            DataError: It is not an id: missing, empty, a list, or a truth value, a fraction or
                another object that is no known id.
        """
        plain = plain_id(external_id)
        row = self._find(plain)
        clear = isinstance(plain, int) or isinstance(external_id, _CLEAR)
        if row < 0 and (plain is None or plain == "" or not clear):
            where = name if position is None else f"{name}[{position}]"
            raise DataError(
                f"{where} is {shown(external_id)}: an id is a whole number or a text"
                f"{' that is not empty' if plain == '' else ''}",
                name=name,
                row=None if position is None else position + 1,
                value=external_id,
            )
        return row

    def find_all_given(
        self, external_ids: object, *, name: str
    ) -> tuple[list[int | str], Int64[np.ndarray, " N"]]:
        """Return a caller's ids as answers show them, and their rows, -1 if unknown.

        Args:
            external_ids: The ids of a caller; see `Ids`.
            name: The caller's name for it, for errors.

        Raises:
            DataError: It is not a sequence of ids, or one of its values is not an id.
        """
        ids = listed(external_ids, name=name)
        plain = [plain_id(one) for one in ids]
        rows = [self._find(one) for one in plain]
        for position, row in enumerate(rows):
            if row < 0:
                self.find_given(ids[position], name=name, position=position)
        return [one for one in plain if one is not None], np.array(rows, dtype=np.int64)

    def _find(self, plain: int | str | None) -> int:
        wanted = None if plain is None else self._as_kept(plain)
        if wanted is None or not len(self):
            return -1
        return self._row_of.get(wanted, -1) if len(self) <= _SMALL else self._bisect(wanted)

    @checked
    def encode(self, external_ids: pl.Series | Sequence[object]) -> Int64[np.ndarray, " N"]:
        """Return the row of each id, -1 if it is unknown or missing."""
        if isinstance(external_ids, pl.Series) and len(external_ids) * _FEW > len(self):
            return self._encode_many(external_ids)
        return np.fromiter(map(self.find, external_ids), np.int64, len(external_ids))

    @checked
    def decode(self, idx: Int64[np.ndarray, " N"]) -> list[int | str]:
        """Return the ids of rows.

        Raises:
            DataError: A row is not in `[0, len)`.
        """
        check_rows(idx, len(self), name="idx")
        return self.ids.gather(idx).to_list()

    def _encode_many(self, external_ids: pl.Series) -> Int64[np.ndarray, " N"]:
        wanted = self._kept_series(external_ids)
        if wanted is None:
            return np.fromiter(map(self.find, external_ids), np.int64, len(external_ids))
        rows = pl.DataFrame({"id": self.ids, "row": np.arange(len(self))})
        joined = (
            wanted.alias("id").to_frame().join(rows, on="id", how="left", maintain_order="left")
        )
        return joined["row"].fill_null(-1).to_numpy()

    def _kept_series(self, ids: pl.Series) -> pl.Series | None:
        """Return ids in the vocabulary's type, or None if each must be checked on its own."""
        if not (ids.dtype.is_integer() or ids.dtype == pl.String):
            return None
        if not self.is_integer:
            return ids.cast(pl.String)
        whole = ids.cast(pl.Int64, strict=False)
        if ids.dtype == pl.String:  # only the text that prints the integer
            whole = whole.set((whole.cast(pl.String) != ids).fill_null(value=False), None)
        return whole

    def _bisect(self, wanted: int | str) -> int:
        if isinstance(wanted, str):
            at = bisect_left(self._ordered_text, wanted.encode("utf-8", "surrogatepass"))
        else:
            at = bisect_left(self._ordered_integers, wanted)
        if at == len(self):
            return -1
        row = at if self._order is None else int(self._order[at])
        return row if self.ids[row] == wanted else -1

    def _as_kept(self, plain: int | str) -> int | str | None:
        """Return an id as the vocabulary would hold it; None if it cannot hold it."""
        if not self.is_integer:
            return str(plain)
        if isinstance(plain, str):
            if not _INTEGER.fullmatch(plain):
                return None
            plain = int(plain)
        return plain if plain in INT64 else None

    @cached_property
    def _row_of(self) -> dict[int | str, int]:
        return {value: row for row, value in enumerate(self.ids.to_list())}

    @cached_property
    def _order(self) -> Int64[np.ndarray, " I"] | None:
        """The rows in ascending order of their ids; None if they are already sorted."""
        if self.ids.is_sorted():
            return None
        return self.ids.arg_sort().cast(pl.Int64).to_numpy()

    @checked
    def spelled_like(self, external_id: object) -> int | str | None:
        """Return an id that differs from an unknown one only in case and blanks, if there is one.

        A zero or a sign before a number counts as a blank.
        """
        text = str(plain_id(external_id)).strip()
        if self.is_integer:
            number = re.fullmatch(r"([+-]?)0*([0-9]{1,18})(\.0*)?", text)
            near = "" if number is None else f"{number[1]}{number[2]}".removeprefix("+")
            return int(near) if near and self.find(near) >= 0 else None
        equal = self.ids.str.strip_chars().str.to_lowercase() == text.lower()
        return self.ids[int(equal.arg_max() or 0)] if equal.any() else None

    @property
    def _ascending(self) -> pl.Series:
        return self.ids if self._order is None else self.ids.gather(self._order)

    @cached_property
    def _ordered_integers(self) -> memoryview:
        return self._ascending.to_numpy().data

    @cached_property
    def _ordered_text(self) -> "_TextRows":
        return _TextRows(*text_buffers(self._ascending))


@final
class _TextRows:
    """Texts in one buffer, in Arrow's layout."""

    def __init__(self, ends: Int64[np.ndarray, " I1"], text: UInt8[np.ndarray, " bytes"]) -> None:
        self._ends, self._text = ends.data, text.data  # these give plain integers, and fast

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, row: int) -> bytes:
        return bytes(self._text[self._ends[row] : self._ends[row + 1]])


def text_buffers(
    text: pl.Series,
) -> tuple[Int64[np.ndarray, " I1"], UInt8[np.ndarray, " bytes"]]:
    """Return start and end of each text, and the UTF-8 bytes of all texts, without copying each."""
    ends = np.zeros(len(text) + 1, np.int64)
    np.cumsum(text.str.len_bytes().to_numpy(), out=ends[1:])
    values = text.rechunk().to_arrow(compat_level=pl.CompatLevel.oldest())
    first = np.frombuffer(values.buffers()[1], np.int64)[values.offset] if len(text) else 0
    data = values.buffers()[2]
    return ends, np.frombuffer(data or b"", np.uint8)[first : first + ends[-1]]


def listed(external_ids: object, *, name: str) -> list[object]:
    """Return a sequence of ids as a list.

    Args:
        external_ids: The ids of a caller; see `Ids`.
        name: The caller's name for it, for errors.

    Raises:
        DataError: It is a single id, a table or a dictionary.
    """
    found = as_list(external_ids)
    if found is not None:
        return found
    match external_ids:
        case str() | bytes():
            what = f"the text {shown(external_ids)}"
        case int() | float():
            what = f"the number {external_ids}"
        case Mapping():
            what = "a dictionary"
        case _ if hasattr(type(external_ids), "columns"):
            what = "a table"
        case _:
            what = shown(external_ids)
    fix = 'one of its columns, such as table["user_id"]' if what == "a table" else "a list of ids"
    raise DataError(f"{name} is {what}: give {fix}", name=name, value=external_ids)


def plain_id(external_id: object) -> int | str | None:
    """Return an id as answers show it: a whole number as an integer, anything else as text.

    None for what is not an id: missing, infinite, bytes, or several values.
    """
    match external_id:
        case str():
            return str.__str__(external_id)  # for an enumeration's member too, its text
        case bool() | np.bool_():
            return id_text(external_id)
        case int():
            return external_id if external_id in _INT2000 else None
        case np.integer() | float() | np.floating() | Decimal():
            whole = _whole(external_id)
            if whole is not None:
                return whole if whole in _INT2000 else None
            return id_text(external_id) if _is_finite(external_id) else None
        case object(ndim=0, item=item) if not isinstance(external_id, np.generic):
            return plain_id(item())  # an array or a tensor of one number
        case object(as_py=as_py):
            return plain_id(as_py())  # Arrow's
        case _:
            no_id = isinstance(external_id, Collection) or is_missing(external_id)  # bytes too
            return None if no_id else id_text(external_id)


def _whole(number: object) -> int | None:
    """Return a number without a fraction as an integer; None for any other value."""
    match number:
        case bool() | np.bool_():
            return None
        case int() | np.integer():
            return int(number)
        case float() | np.floating() | Decimal() if _is_finite(number):
            whole, parts = number.as_integer_ratio()
            return whole if parts == 1 else None
    return None


def _is_finite(number: int | float | np.number | Decimal) -> bool:
    return number.is_finite() if isinstance(number, Decimal) else math.isfinite(number)


def is_missing(value: object) -> bool:
    """Return whether a single value is missing: None, NaN, NaT, or pandas' NA."""
    if value is None:
        return True
    try:
        return bool(value != value)
    except (TypeError, ArithmeticError):  # pandas' NA, and the signalling NaN of `Decimal`
        return True


def id_text(external_id: object) -> str:
    """Return an id as the text that reading gives it: `true`, `2024-05-01`, `a1`."""
    match external_id:
        case bool() | np.bool_():
            return str(external_id).lower()
        case np.datetime64():
            value = external_id.item()  # a date, a datetime, or nanoseconds
            whole = external_id.astype("datetime64[us]").item()
            return id_text(whole if isinstance(value, int) else value)
        case datetime() | date() | time():
            return str(time_text(pl.Series([external_id]))[0])
        case _:
            whole = _whole(external_id)
            return str(external_id if whole is None else whole)


def time_text(times: pl.Series) -> pl.Series:
    """Return dates and times as text, to the microsecond; times with a zone are in UTC."""
    if isinstance(times.dtype, pl.Datetime):
        times = times.dt.cast_time_unit("us")
        if times.dtype.time_zone is not None:  # type: ignore[attr-defined]  # Datetime has it
            times = times.dt.convert_time_zone("UTC")
    return times.cast(pl.String)


def number_ids(
    ids: pl.Series, also: pl.Series | None = None
) -> tuple[Vocabulary, Int32[np.ndarray, " E"]]:
    """Give every distinct id a row, in ascending order, and return the row of each event's id.

    Args:
        ids: One id per event, Int64 or String, without nulls. May be in many chunks.
        also: Further ids of the same type that get a row too.

    Returns:
        The vocabulary, and the row of each of `ids`.
    """
    spread = _spread(ids, also) if ids.dtype == pl.Int64 else None
    if spread is None:
        known = ids.unique() if also is None else pl.concat([ids.unique(), also]).unique()
        vocabulary = _sorted_vocabulary(known.sort())
        return vocabulary, vocabulary._encode_many(ids).astype(np.int32)
    lowest, span = spread
    present = np.zeros(span, np.bool_)
    for series in (ids,) if also is None else (ids, also):
        for chunk in series.get_chunks():
            loops.mark_present(chunk.to_numpy(), lowest, present)
    found = np.flatnonzero(present)
    row_of = np.zeros(span, np.int32)
    row_of[found] = np.arange(len(found), dtype=np.int32)
    row_E, start = np.empty(len(ids), np.int32), 0
    for chunk in ids.get_chunks():
        loops.look_up(chunk.to_numpy(), lowest, row_of, row_E[start : start + len(chunk)])
        start += len(chunk)
    return _sorted_vocabulary(pl.Series("id", found + lowest, dtype=pl.Int64)), row_E


def _sorted_vocabulary(ids: pl.Series) -> Vocabulary:
    ids = ids.set_sorted()
    return Vocabulary.trusted(lambda: ids, length=len(ids), is_integer=ids.dtype == pl.Int64)


def _spread(ids: pl.Series, also: pl.Series | None) -> tuple[int, int] | None:
    """Return the lowest id and the range of ids, if a table over that range is worthwhile."""
    parts = [part for part in (ids, also) if part is not None and len(part)]
    lows, highs = [part.min() for part in parts], [part.max() for part in parts]
    lowest = min(low for low in lows if isinstance(low, int))
    span = max(high for high in highs if isinstance(high, int)) - lowest + 1
    return (lowest, span) if span <= 2 * sum(map(len, parts)) + 1_000_000 else None


def check_rows(row_B: Int64[np.ndarray, " B"], num: int, *, name: str) -> None:
    """Raise an error for rows that do not exist.

    Args:
        row_B: Rows that a caller requests.
        num: Number of rows.
        name: The argument's name, for the message.

    Raises:
        DataError: A row is not in `[0, num)`.
    """
    outside_B = (row_B < 0) | (row_B >= num)
    if outside_B.any():
        value = int(row_B[outside_B.argmax()])
        raise DataError(
            f"{name}: there is no row {value}: rows are counted from 0, and there are {num:,}",
            name=name,
            value=value,
        )

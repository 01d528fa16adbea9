"""Columns of a caller's table: the types that are kept, and the reading of ids and numbers."""

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import NamedTuple

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from foretaste.data.vocabulary import id_text, is_missing, time_text
from foretaste.errors import DataError

_UNKNOWN_TO_POLARS = (
    *(pa.types.is_union, pa.types.is_interval, pa.types.is_decimal256),
    *(pa.types.is_list_view, pa.types.is_large_list_view, pa.types.is_run_end_encoded),
)
_KEPT = (
    *(pl.Int8, pl.Int16, pl.Int32, pl.Int64, pl.UInt8, pl.UInt16, pl.UInt32, pl.UInt64),
    *(pl.Float32, pl.Float64, pl.Null, pl.Boolean, pl.String, pl.Date, pl.Time, pl.Duration),
)
_AS_STORED = "holds an extension type: kept in its storage type"


class Kept(NamedTuple):
    """A table of columns that every part of foretaste can read."""

    frame: pl.DataFrame
    notes: tuple[str, ...] = ()
    """Columns that were converted with a loss, or left out."""


class _Change(NamedTuple):
    column: pl.Series | None
    """None if foretaste does not read such a column."""
    why: str = ""
    """A note on the change; it follows the column's name."""


def kept(frame: pl.DataFrame, what: str, *, needed: bool = False) -> Kept:
    """Convert every column to a type that is kept, and leave out the others.

    Args:
        frame: The caller's columns.
        what: The table's name in messages.
        needed: Refuse a column that would be left out.

    Raises:
        DataError: A column that is needed would be left out.
    """
    if all(_is_kept(column) for column in frame.iter_columns()):
        return Kept(frame)
    columns, notes = [], []
    for column in frame.iter_columns():
        changed, why = _changed(column)
        if changed is not None:
            columns.append(changed.alias(column.name))
        elif needed:
            raise DataError(
                f"column {column.name!r} of {what} {why}: cast it to text or numbers, or leave it "
                "out",
                column=column.name,
            )
        if why:
            fate = ": it was left out" if changed is None else ""
            notes.append(f"column {column.name!r} of {what} {why}{fate}")
    return Kept(pl.DataFrame(columns), tuple(notes))


def without_extensions(frame: pl.DataFrame) -> pl.DataFrame:
    """Return a table with columns of an extension type in their storage type."""
    wrapped = [c for c in frame.iter_columns() if isinstance(c.dtype, pl.BaseExtension)]
    return frame.with_columns(_stored(column) for column in wrapped)


def _stored(column: pl.Series) -> pl.Series:
    is_truth = column.dtype.ext_name() == "arrow.bool8"  # type: ignore[attr-defined]  # an extension's
    stored = column.ext.storage()
    return stored.cast(pl.Boolean) if is_truth else stored


def _is_kept(column: pl.Series) -> bool:
    dtype = column.dtype
    while isinstance(dtype, pl.List | pl.Array):
        if isinstance(dtype, pl.Array) and 0 in dtype.shape:
            return False  # no store can be read with such a column
        dtype = dtype.inner  # type: ignore[assignment]  # a type, or the class of one
    return dtype in _KEPT or (isinstance(dtype, pl.Datetime) and dtype.time_zone is None)


def _changed(column: pl.Series) -> _Change:
    """Return a column in a type that is kept, and notes on it."""
    if _is_kept(column):
        return _Change(column)
    if isinstance(column.dtype, pl.BaseExtension):
        inner = _changed(_stored(column))
        return _Change(inner.column, inner.why or _AS_STORED)
    return _CHANGES.get(type(column.dtype), _left_out)(column)


def _left_out(column: pl.Series) -> _Change:
    what = "bytes" if column.dtype == pl.Binary else "records of several fields"
    return _Change(None, f"holds {what}, which foretaste does not read")


def _small_floats(column: pl.Series) -> _Change:
    return _Change(column.cast(pl.Float32))


def _names(column: pl.Series) -> _Change:
    return _Change(column.cast(pl.String))


def _utc(column: pl.Series) -> _Change:
    zone = column.dtype.time_zone  # type: ignore[attr-defined]  # a datetime's
    utc = column.dt.convert_time_zone("UTC").dt.replace_time_zone(None)
    return _Change(utc, "" if zone == "UTC" else f"holds times of the zone {zone}: kept in UTC")


def _number(column: pl.Series) -> _Change:
    """Return large or decimal numbers as Int64 or Float64; as text if they would change."""
    has_fractions = getattr(column.dtype, "scale", 0) > 0  # a decimal's
    number = column.cast(pl.Float64 if has_fractions else pl.Int64, strict=False)
    if number.cast(column.dtype, strict=False).equals(column):
        return _Change(number)
    return _Change(
        column.cast(pl.String), "holds numbers of more digits than 64 bits have: kept as text"
    )


def _objects_as_text(column: pl.Series) -> _Change:
    texts = [None if _is_missing(value) else id_text(value) for value in column]
    text = pl.Series(column.name, texts, dtype=pl.String)
    return _Change(text, "holds values of several types: kept as text")


def _is_missing(value: object) -> bool:
    return value is None or (isinstance(value, float | np.floating) and bool(np.isnan(value)))


def _lists(column: pl.Series) -> _Change:
    """Return lists with their values converted to a type that is kept."""
    if isinstance(column.dtype, pl.Array):
        column = column.arr.to_list()
    length_R = column.list.len().fill_null(0)
    flat = column.filter(length_R > 0).explode() if length_R.sum() else column.clear().explode()
    values, why = _changed(flat)
    if values is None:
        return _Change(None, why.replace("holds", "holds lists of", 1))
    lists = pa.LargeListArray.from_arrays(
        pa.array(np.concatenate([[0], np.cumsum(length_R.to_numpy())]), pa.int64()),
        values.to_arrow(compat_level=pl.CompatLevel.oldest()),
        mask=pa.array(column.is_null().to_numpy()),
    )
    return _Change(pl.Series(column.name, lists), why)


_CHANGES: Mapping[type, Callable[[pl.Series], _Change]] = {
    pl.Categorical: _names,
    pl.Enum: _names,
    pl.Float16: _small_floats,
    pl.Datetime: _utc,
    pl.Int128: _number,
    pl.UInt128: _number,
    pl.Decimal: _number,
    pl.Object: _objects_as_text,
    pl.List: _lists,
    pl.Array: _lists,
}
"""The conversion of types that are not kept; columns of other types are left out."""


def of_arrow(name: str, column: pa.ChunkedArray) -> pl.Series:
    """Return an Arrow column; types that Polars lacks are converted to types that it has.

    Raises:
        TypeError: There is no such type.
    """
    kind = column.type
    if getattr(kind, "extension_name", "") == "arrow.uuid":
        values = column.to_pylist()
        column = pa.array([None if v is None else str(v) for v in values], pa.large_string())
    elif isinstance(kind, pa.BaseExtensionType):
        if not kind.extension_name.startswith("arrow."):  # a period's number differs in meaning
            raise TypeError(kind.extension_name)
        storage = [chunk.storage for chunk in column.chunks]
        stored = of_arrow(name, pa.chunked_array(storage, kind.storage_type))
        return stored.cast(pl.Boolean) if kind.extension_name == "arrow.bool8" else stored
    elif pa.types.is_run_end_encoded(kind):
        decoded = [pc.run_end_decode(chunk) for chunk in column.chunks]
        return of_arrow(name, pa.chunked_array(decoded, kind.value_type))
    elif pa.types.is_decimal256(kind):
        column = column.cast(pa.decimal128(38, kind.scale))
    elif pa.types.is_list_view(kind) or pa.types.is_large_list_view(kind):
        # value by value: Arrow's own cast of views loses rows
        column = pa.array(column.to_pylist(), pa.large_list(kind.value_type))
    if unknown := _unknown_to_polars(column.type):
        raise TypeError(str(unknown))
    return pl.Series(name, column)


def _unknown_to_polars(kind: pa.DataType) -> pa.DataType | None:
    """Return the first part of a type at which Polars stops or panics; None if it knows all."""
    if isinstance(kind, pa.BaseExtensionType):
        return _unknown_to_polars(kind.storage_type)
    if any(is_unknown(kind) for is_unknown in _UNKNOWN_TO_POLARS):
        return kind
    inner = [kind.value_type] if pa.types.is_dictionary(kind) else []
    inner += [kind.field(n).type for n in range(kind.num_fields)]
    return next((found for part in inner if (found := _unknown_to_polars(part))), None)


_CODE = r"^[+-]?0[0-9]"
_FLOAT_ID = r"^-?(0|[1-9][0-9]*)\.0+$"
_LOOK_ROWS = 10_000
_EXACT = {pl.Float16: (16, 2**11), pl.Float32: (32, 2**24), pl.Float64: (64, 2**53)}
"""The bits of a float, and the limit above which it cannot hold every whole number."""


def without_markers(
    frame: pl.DataFrame, missing: Collection[str]
) -> tuple[pl.DataFrame, tuple[str, ...]]:
    """Return a table in which texts that mean a missing value are null, and notes that count them.

    Blanks around such a text do not matter. An empty text is missing and needs no note. A text of a
    number, such as -1, also stands for that number.
    """
    markers = {padded for text in missing for padded in (text, " " + text, text + " ")}
    if "" in markers:
        markers |= {" " * length for length in range(1, 9)}
    numbers = pl.Series(sorted(missing), dtype=pl.String).cast(pl.Float64, strict=False)
    numbers = numbers.filter(numbers.is_finite())
    columns, notes = [], list[str]()
    for column in frame.iter_columns():
        if column.dtype.is_numeric() and numbers.len():
            without, note = _without_numbers(column, numbers)
            columns.append(without)
            notes += note
            continue
        texts = _texts(column)
        found = None if texts is None else texts.is_in(list(markers)).fill_null(value=False)
        if texts is None or found is None or not found.any():
            columns.append(column)
            continue
        columns.append(_set_missing(column, found))
        named = sorted({text.strip() for text in texts.filter(found).unique()} - {""})
        if named:
            count = int((found & ~texts.str.strip_chars().is_in([""])).sum())
            notes.append(_taken_as_missing(column.name, count, map(repr, named)))
    return pl.DataFrame(columns), tuple(notes)


def _taken_as_missing(name: str, count: int, values: Iterable[str]) -> str:
    return (
        f"column {name!r}: {count:,} values were taken as missing ({', '.join(values)}); the "
        "setting `missing` lists such texts"
    )


def _without_numbers(column: pl.Series, numbers: pl.Series) -> tuple[pl.Series, tuple[str, ...]]:
    """Return a column of numbers in which those that mean a missing value are null, and a note."""
    found = column.cast(pl.Float64).is_in(numbers.implode()).fill_null(value=False)
    if not found.any():
        return column, ()
    values = sorted(column.filter(found).unique().to_list())
    note = _taken_as_missing(column.name, int(found.sum()), map(str, values))
    return _set_missing(column, found), (note,)


def _texts(column: pl.Series) -> pl.Series | None:
    """Return the texts of a column; other values are null."""
    if column.dtype == pl.Object:
        texts = [value if isinstance(value, str) else None for value in column]
        return pl.Series(column.name, texts, dtype=pl.String)
    if column.dtype in (pl.Categorical, pl.Enum):
        return column.cast(pl.String)
    return column if column.dtype == pl.String else None


def _set_missing(column: pl.Series, where: pl.Series) -> pl.Series:
    if column.dtype == pl.Object:
        values = [None if gone else value for value, gone in zip(column, where, strict=True)]
        return pl.Series(column.name, values, dtype=pl.Object)
    return pl.select(pl.when(~where).then(column).alias(column.name)).to_series()


def plain_integers(text: pl.Series) -> pl.Series | None:
    """Return all texts as integers if they are written plainly; None if one is not."""
    look = text.head(_LOOK_ROWS)
    if look.cast(pl.Int64, strict=False).null_count() > look.null_count():
        return None
    whole = text.cast(pl.Int64, strict=False)
    return whole if _is_plain(text, whole) else None


def ids_of_text(text: pl.Series) -> pl.Series:
    """Return ids as integers if all are plain integers, or if all end with `.0`."""
    digits, look = text, text.head(_LOOK_ROWS)
    if look.str.contains(_FLOAT_ID).all() and text.str.contains(_FLOAT_ID).all():
        digits = text.str.replace(r"\.0+$", "")
    whole = plain_integers(digits)
    return text if whole is None else whole


def _is_plain(text: pl.Series, whole: pl.Series) -> bool:
    """Return whether all texts are the shortest form of their integers, by counting bytes."""
    if whole.null_count() > text.null_count():
        return False
    low, high = (bound if isinstance(bound, int) else 0 for bound in (whole.min(), whole.max()))
    num_bytes = whole.count() + int((whole < 0).sum())
    power = 10
    while power <= max(high, -low):
        num_bytes += int((whole >= power).sum()) + int((whole <= -power).sum() if low < 0 else 0)
        power *= 10
    return num_bytes == int(text.str.len_bytes().sum())


def narrowed(column: pl.Series) -> pl.Series:
    """Convert text to integers, other numbers or truth values, if all values allow it."""
    is_text = column.dtype == pl.String and column.null_count() < len(column)
    if not is_text or column.str.contains(_CODE).any():
        return column
    for text in (column, column.str.strip_chars()):
        for dtype in (pl.Int64, pl.Float64):
            numbers = text.cast(dtype, strict=False)
            if numbers.null_count() == text.null_count():
                return numbers
    lower = column.str.to_lowercase()
    return (lower == "true") if lower.is_in(["true", "false"]).all() else column


def canonical_ids(ids: pl.Series) -> pl.Series:
    """Return ids as Int64 if all are integers by type or value, as text otherwise.

    Text stays text, even if it consists of digits: only the reader of text files converts it. Truth
    values become `true` and `false`, dates become ISO text, and values of mixed types the text of
    each. An empty text is a missing id.

    Raises:
        DataError: An id is a fraction, or the column holds lists, bytes or the like.
    """
    dtype = ids.dtype
    if dtype == pl.Decimal:
        ids = _whole_decimals(ids)
        dtype = ids.dtype
    if dtype.is_integer():
        small = ids.cast(pl.Int64, strict=False)
        return small if small.null_count() == ids.null_count() else ids.cast(pl.String)
    if dtype.is_float():
        return _whole_ids(ids.fill_nan(None))
    if dtype == pl.Object:
        texts = [None if is_missing(value) else id_text(value) for value in ids]
        ids = pl.Series(ids.name, texts, dtype=pl.String)
    if dtype.is_temporal() and dtype != pl.Duration:
        ids = time_text(ids)
    if dtype in (pl.Binary, pl.Duration) or dtype.is_nested():
        raise DataError(
            f"column {ids.name!r} holds {in_words(ids)}: ids are integers or text, make text of it",
            column=ids.name,
        )
    return _no_blanks(ids.cast(pl.String))


def in_words(column: pl.Series) -> str:
    """Return what a column holds, for a message."""
    dtype = column.dtype
    named = {pl.Binary: "bytes", pl.List: "lists", pl.Array: "lists", pl.Struct: "records"}
    named |= {pl.Boolean: "truth values", pl.Duration: "durations", pl.Time: "times of day"}
    named |= {pl.Date: "dates", pl.Datetime: "times", pl.Object: "a mixture of types"}
    named |= {pl.String: "text", pl.Categorical: "text", pl.Enum: "text"}
    other = "numbers" if dtype.is_numeric() else "values of another type"
    return next((words for kind, words in named.items() if dtype == kind), other)


def _no_blanks(text: pl.Series) -> pl.Series:
    """Return text in which empty values are missing."""
    return text.set(text == "", None)


def _whole_decimals(ids: pl.Series) -> pl.Series:
    whole = ids.cast(pl.Int128, strict=False)
    fractions = (ids != whole.cast(ids.dtype, strict=False)).fill_null(value=False)
    if fractions.any():
        why = "is a fraction: ids are integers or text, cast the column to text if it is meant"
        raise refusal(ids, fractions, why)
    return whole


def _whole_ids(ids: pl.Series) -> pl.Series:
    bits, limit = next(found for kind, found in _EXACT.items() if ids.dtype == kind)
    broken = ((ids != ids.round()) | (ids.abs() >= limit)).fill_null(value=False)
    if broken.any():
        raise refusal(
            ids,
            broken,
            "is not a whole number that a float can hold: ids are integers or text, cast the "
            f"column to text if it is meant (of {bits}-bit floats only those "
            f"below {limit:,} are exact)",
        )
    return ids.cast(pl.Int64)


def canonical_numbers(column: pl.Series, *, what: str) -> pl.Series:
    """Return a column of numbers as Int64, Float32 or Boolean; NaN becomes null.

    Integers with missing values, and decimals, become floats.

    Raises:
        DataError: It does not hold numbers, or a number is infinite or too large for a 32-bit
            float.
    """
    if column.dtype == pl.Boolean and not column.null_count():
        return column
    if column.dtype.is_integer() and not column.null_count():
        whole = column.cast(pl.Int64, strict=False)
        if not whole.null_count():
            return whole
    if column.dtype in (pl.Object, pl.Categorical, pl.Enum):
        column = canonical_ids(column)
    column = _no_blanks(column) if column.dtype == pl.String else column
    numbers = _as_floats(column)
    if numbers is None:
        raise DataError(
            f"column {column.name!r} holds {in_words(column)}: {what} must be numbers",
            column=column.name,
        )
    broken = numbers.is_null() & column.is_not_null()
    if broken.any():
        raise refusal(
            column,
            broken,
            f"is not a number: {what} must be, written like 1234.5; fix it, or list it in the "
            "setting `missing`",
        )
    small = numbers.fill_nan(None).cast(pl.Float32)
    infinite = small.is_infinite().fill_null(value=False)
    if infinite.any():
        why = "is not a finite 32-bit number: fix it, or leave out the row"
        raise refusal(numbers, infinite, why)
    return small


def _as_floats(column: pl.Series) -> pl.Series | None:
    """Return numbers, null for texts that are not numbers; None if the type has no numbers."""
    if column.dtype.is_numeric() or column.dtype in (pl.Boolean, pl.Null):
        return column.cast(pl.Float64)
    if column.dtype != pl.String:
        return None
    numbers = column.cast(pl.Float64, strict=False)
    if numbers.null_count() > column.null_count():
        numbers = column.str.strip_chars().cast(pl.Float64, strict=False)
    return numbers


def at_row(column: pl.Series, where: pl.Series) -> str:
    """Return the number and the value of the first marked row, for a message."""
    row = where.arg_max() or 0
    return f"row {1 + row}: {column[row]!r}"


def refusal(column: pl.Series, where: pl.Series, why: str) -> DataError:
    """Return an error that names the first marked row of a column."""
    row = where.arg_max() or 0
    return DataError(
        f"column {column.name!r}, {at_row(column, where)} {why}",
        column=column.name,
        row=1 + row,
        value=column[row],
    )

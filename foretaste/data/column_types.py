"""The types in which a column about users, items or the moment of an event is kept.

Whatever reads such a column later (features, rules, the server, a store) knows these types alone:
true and false, whole numbers of up to 64 bits, floats, text, dates, times in UTC, times of day,
durations, and lists of these. A column of another type is brought into one of them when it is read,
or left out, and a note says so.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from foretaste.data.vocabulary import id_text
from foretaste.errors import DataError

_UNKNOWN_TO_POLARS = (
    *(pa.types.is_union, pa.types.is_interval, pa.types.is_decimal256),
    *(pa.types.is_list_view, pa.types.is_large_list_view, pa.types.is_run_end_encoded),
)
_KEPT = (
    *(pl.Int8, pl.Int16, pl.Int32, pl.Int64, pl.UInt8, pl.UInt16, pl.UInt32, pl.UInt64),
    *(pl.Float32, pl.Float64, pl.Null, pl.Boolean, pl.String, pl.Date, pl.Time, pl.Duration),
)
_AS_STORED = "holds an extension type: kept as what it is stored as"


class Kept(NamedTuple):
    """A table of columns that every part of foretaste can read."""

    frame: pl.DataFrame
    notes: tuple[str, ...] = ()
    """What was turned into another type with a loss, or left out."""


class _Change(NamedTuple):
    column: pl.Series | None
    """None where no part of foretaste reads such a column."""
    why: str = ""
    """What a person should know; follows the column's name."""


def kept(frame: pl.DataFrame, what: str, *, needed: bool = False) -> Kept:
    """Bring every column into a type that is kept, and leave out those that have none.

    Args:
        frame: The caller's columns.
        what: What messages call the table.
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
    """Return a table with the columns of an extension type as what they are stored as."""
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
    """Return a column in a type that is kept, and what is said of it."""
    if _is_kept(column):
        return _Change(column)
    if isinstance(column.dtype, pl.BaseExtension):
        inner = _changed(_stored(column))
        return _Change(inner.column, inner.why or _AS_STORED)
    return _CHANGES.get(type(column.dtype), _left_out)(column)


def _left_out(column: pl.Series) -> _Change:
    what = "bytes" if column.dtype == pl.Binary else "records of several fields"
    return _Change(None, f"holds {what}, which nothing reads")


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


def _texts(column: pl.Series) -> _Change:
    texts = [None if _is_missing(value) else id_text(value) for value in column]
    text = pl.Series(column.name, texts, dtype=pl.String)
    return _Change(text, "holds values of several types: kept as text")


def _is_missing(value: object) -> bool:
    return value is None or (isinstance(value, float | np.floating) and bool(np.isnan(value)))


def _lists(column: pl.Series) -> _Change:
    """Return lists whose values are brought into a type that is kept."""
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
    pl.Object: _texts,
    pl.List: _lists,
    pl.Array: _lists,
}
"""What becomes of a type that is not kept; one that is not named here is left out."""


def of_arrow(name: str, column: pa.ChunkedArray) -> pl.Series:
    """Return an Arrow column; types that Polars lacks are brought to those that it has.

    Raises:
        TypeError: There is no such type.
    """
    kind = column.type
    if getattr(kind, "extension_name", "") == "arrow.uuid":
        values = column.to_pylist()
        column = pa.array([None if v is None else str(v) for v in values], pa.large_string())
    elif isinstance(kind, pa.BaseExtensionType):
        if not kind.extension_name.startswith("arrow."):  # a period's number means another thing
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

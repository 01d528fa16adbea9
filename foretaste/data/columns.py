"""One column of the caller's, checked and brought into the one form that foretaste keeps.

A message names the column, the row and the value. Rows are counted from 1, header not counted.
Missing values pass through as nulls: whether they may be dropped is for `reading` to decide.
"""

from typing import NamedTuple

import polars as pl

from foretaste.data.read_config import TimestampUnit
from foretaste.data.vocabulary import id_text, is_missing, time_text
from foretaste.errors import DataError

_TICKS = {"s": 1, "ms": 1_000, "us": 1_000_000, "ns": 1_000_000_000}
_YEAR_1990_S, _YEAR_2200_S = 631_152_000, 7_258_118_400
_ISO = (
    "%Y-%m-%dT%H:%M:%S%.f%#z",
    "%Y-%m-%dT%H:%M%#z",
    "%Y-%m-%dT%H:%M:%S%.f",
    "%Y-%m-%dT%H:%M",
    "%Y-%m-%d",
)


class Times(NamedTuple):
    """Times at the column's own resolution, so that order within a second is kept."""

    ticks: pl.Series
    """Int64 since 1970, null where missing."""
    per_second: int


def canonical_ids(ids: pl.Series) -> pl.Series:
    """Return ids as Int64 where all are integers by type or value, as text otherwise.

    Text stays text, even of digits: only a text file's reader may take it for numbers. Truth
    values become `true` and `false`, dates ISO text, a mixture the text of each value. An empty
    text is a missing id.

    Raises:
        DataError: An id is a fraction, or the column holds lists, bytes or the like.
    """
    dtype = ids.dtype
    if dtype == pl.Decimal:
        ids = _whole_decimals(ids)
        dtype = ids.dtype
    if dtype.is_integer():
        whole = ids.cast(pl.Int64, strict=False)
        return whole if whole.null_count() == ids.null_count() else ids.cast(pl.String)
    if dtype.is_float():
        return _whole_ids(ids.fill_nan(None))
    if dtype == pl.Object:
        texts = [None if is_missing(value) else id_text(value) for value in ids]
        ids = pl.Series(ids.name, texts, dtype=pl.String)
    if dtype.is_temporal() and dtype != pl.Duration:
        ids = time_text(ids)
    if dtype == pl.Binary or dtype.is_nested():
        raise DataError(
            f"column {ids.name!r} holds {dtype}: ids are integers or text, cast it to text"
        )
    return _no_blanks(ids.cast(pl.String))


def _no_blanks(text: pl.Series) -> pl.Series:
    """Return text in which what is empty is missing."""
    return text.set(text == "", None)


def _whole_decimals(ids: pl.Series) -> pl.Series:
    whole = ids.cast(pl.Int128, strict=False)
    fractions = (ids != whole.cast(ids.dtype, strict=False)).fill_null(value=False)
    if fractions.any():
        raise DataError(
            f"column {ids.name!r}, {at_row(ids, fractions)} is a fraction: ids are integers or "
            "text, cast the column to text if it is meant",
            column=ids.name,
            row=1 + (fractions.arg_max() or 0),
            value=ids.filter(fractions)[0],
        )
    return whole


def _whole_ids(ids: pl.Series) -> pl.Series:
    fractions = ((ids != ids.round()) | (ids.abs() > 2**53)).fill_null(value=False)
    if fractions.any():
        raise DataError(
            f"column {ids.name!r}, {at_row(ids, fractions)} is not a whole number that a float can "
            "hold: ids are integers or text, cast the column to text if it is meant"
        )
    return ids.cast(pl.Int64)


def canonical_times(times: pl.Series, unit: TimestampUnit) -> Times:
    """Return times from numbers (in `unit` since 1970), datetimes, dates or ISO 8601 text.

    A datetime or text without a zone is taken as UTC.

    Raises:
        DataError: A time cannot be read, or lies before 1970 or after 2200; where another unit
            would make sense of it, the message says which.
    """
    dtype = times.dtype
    if dtype == pl.String:
        times = _no_blanks(times)
        numbers = times.cast(pl.Float64, strict=False)
        if numbers.null_count() > times.null_count():
            return _bounded(times, _parse_iso(times), None)
        whole = times.cast(pl.Int64, strict=False)
        times = whole if whole.null_count() == times.null_count() else numbers
    elif dtype == pl.Date:
        return _bounded(times, Times(times.cast(pl.Int64) * 86_400, 1), None)
    elif dtype == pl.Datetime:
        return _bounded(times, Times(times.dt.epoch("us"), _TICKS["us"]), None)
    elif dtype == pl.Decimal:
        times = times.cast(pl.Float64)
    elif not dtype.is_numeric() and dtype != pl.Null:
        raise DataError(
            f"column {times.name!r} holds {dtype}: times are numbers, datetimes, dates or ISO text"
        )
    return _numbers_to_times(times, unit)


def _numbers_to_times(times: pl.Series, unit: TimestampUnit) -> Times:
    if times.dtype.is_float():
        times = times.fill_nan(None)
    low, high = times.min(), times.max()
    scale = _TICKS[unit]
    low, high = (0 if not isinstance(bound, int | float) else bound for bound in (low, high))
    if low < 0 or high > _YEAR_2200_S * scale:
        outside = ((times < 0) | (times > _YEAR_2200_S * scale)).fill_null(value=False)
        raise DataError(_outside(times, outside, unit))
    _refuse_coarser(times, low, high, unit)
    if times.dtype.is_float():
        if (times == times.round()).all():  # nulls pass
            times = times.cast(pl.Int64)
        else:
            micros = (times * (1_000_000 / scale)).round().cast(pl.Int64)
            return Times(micros, 1_000_000)
    ticks = times.cast(pl.Int64)
    return Times(ticks // 1_000, 1_000_000) if unit == "ns" else Times(ticks, scale)


def _refuse_coarser(
    times: pl.Series, low: int | float, high: int | float, unit: TimestampUnit
) -> None:
    """Refuse times that lie in the 1970s and 80s, and would not in a coarser unit: all, or some."""
    if high >= _YEAR_1990_S * _TICKS[unit]:
        _refuse_mixed(times, low, unit)
        return
    for coarser, scale in _TICKS.items():
        if coarser == unit:
            return
        if low >= _YEAR_1990_S * scale and high <= _YEAR_2200_S * scale:
            raise DataError(
                f"column {times.name!r} lies before 1990 in {unit}, as {low:g} does, but is sane "
                f'in {coarser}: say timestamp_unit="{coarser}"'
            )


def _refuse_mixed(times: pl.Series, low: int | float, unit: TimestampUnit) -> None:
    """Refuse a column where some times count another unit than the rest, as 1970 gives away."""
    if low >= _YEAR_1990_S * _TICKS[unit]:
        return
    for coarser, scale in _TICKS.items():
        if coarser == unit:
            return
        mixed = times.is_between(
            _YEAR_1990_S * scale, min(_YEAR_2200_S * scale, _YEAR_1990_S * _TICKS[unit] - 1)
        ).fill_null(value=False)
        if mixed.any():
            raise DataError(
                f"column {times.name!r}, {at_row(times, mixed)} lies before 1990 in {unit}, but is "
                f"sane in {coarser}, and so are {int(mixed.sum()) - 1:,} more rows, while others "
                "are not: the column mixes units; bring all of it to one"
            )


def _parse_iso(times: pl.Series) -> Times:
    name, text = times.name, times.str.strip_chars().str.replace(" ", "T", literal=True)
    parsed = pl.select(
        pl.coalesce(
            pl.lit(text).str.to_datetime(form, time_unit="us", strict=False, time_zone="UTC")
            if form.endswith("z")
            else pl.lit(text)
            .str.to_datetime(form, time_unit="us", strict=False)
            .dt.replace_time_zone("UTC")
            for form in _ISO
        ).alias(name)
    )[name]
    broken = parsed.is_null() & times.is_not_null()
    if broken.any():
        raise DataError(
            f"column {name!r}, {at_row(times, broken)} is not a time: give unix seconds or "
            "ISO 8601 text such as 2024-05-01T12:30:00Z"
        )
    return Times(parsed.dt.epoch("us"), _TICKS["us"])


def _bounded(shown: pl.Series, times: Times, unit: TimestampUnit | None) -> Times:
    outside = (times.ticks < 0) | (times.ticks > _YEAR_2200_S * times.per_second)
    if outside.any():
        raise DataError(_outside(shown, outside.fill_null(value=False), unit))
    return times


def _outside(times: pl.Series, outside: pl.Series, unit: TimestampUnit | None) -> str:
    value = times.filter(outside)[0]
    place = f"column {times.name!r}, {at_row(times, outside)}"
    if unit is None:
        return f"{place} lies before 1970 or after 2200: mend the time, or leave out the row"
    if value < 0:
        return f"{place} is a negative time, before 1970: mend it, or leave out the row"
    for other, scale in _TICKS.items():
        if other != unit and _YEAR_1990_S * scale <= value <= _YEAR_2200_S * scale:
            return (
                f"{place} is after the year 2200 in {unit}, but sane in {other}: say "
                f'timestamp_unit="{other}"'
            )
    return f"{place} is after the year 2200 in {unit}: mend it, or say another timestamp_unit"


def storable(frame: pl.DataFrame) -> pl.DataFrame:
    """Return a table with its columns of mixed types, which no store could keep, as text."""
    mixed = [name for name, dtype in frame.schema.items() if dtype == pl.Object]
    return frame.with_columns(canonical_ids(frame[name]) for name in mixed)


def canonical_numbers(column: pl.Series, *, what: str) -> pl.Series:
    """Return a column of numbers as Int64, Float32 or Boolean; NaN becomes null.

    Integers with missing values, and decimals, become floats.

    Raises:
        DataError: It is not of numbers, or a number is infinite or too large for a 32-bit float.
    """
    if column.dtype == pl.Boolean and not column.null_count():
        return column
    if column.dtype.is_integer() and not column.null_count():
        whole = column.cast(pl.Int64, strict=False)
        if not whole.null_count():
            return whole
    column = _no_blanks(column) if column.dtype == pl.String else column
    numbers = column.cast(pl.Float64, strict=False) if _may_be_number(column) else None
    if numbers is None:
        raise DataError(f"column {column.name!r} holds {column.dtype}: {what} must be numbers")
    broken = numbers.is_null() & column.is_not_null()
    if broken.any():
        raise DataError(
            f"column {column.name!r}, {at_row(column, broken)} is not a number: {what} must be"
        )
    small = numbers.fill_nan(None).cast(pl.Float32)
    infinite = small.is_infinite().fill_null(value=False)
    if infinite.any():
        raise DataError(
            f"column {column.name!r}, {at_row(numbers, infinite)} is not a finite 32-bit number: "
            "mend it, or leave out the row"
        )
    return small


def _may_be_number(column: pl.Series) -> bool:
    return column.dtype.is_numeric() or column.dtype in (pl.String, pl.Boolean, pl.Null)


def at_row(column: pl.Series, where: pl.Series) -> str:
    """Return the first marked row's number and value, for a message."""
    row = where.arg_max() or 0
    return f"row {1 + row}: {column[row]!r}"

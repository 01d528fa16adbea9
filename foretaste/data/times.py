"""Converts a column of times to whole ticks since 1970, in UTC.

Numbers have a unit. Numbers that lie in 1970 or far in the future in the given unit, and are
plausible in another, raise an error that names the other unit. Numbers that are small in every unit
only order the events, with a note.
"""

import math
from typing import NamedTuple

import polars as pl

from foretaste.data.columns import canonical_ids, in_words, refusal
from foretaste.data.read_config import TimestampUnit
from foretaste.errors import DataError

_DAY_S = 86_400
_YEAR_1971_S, YEAR_1990_S, YEAR_2200_S = 31_536_000, 631_152_000, 7_258_118_400
_PER_SECOND = {"s": 1, "ms": 1_000, "us": 1_000_000, "ns": 1_000_000_000, "order": 1}
_LINEAR = {
    "minutes": (60, 0),
    "hours": (3_600, 0),
    "days": (_DAY_S, 0),
    "excel": (_DAY_S, -25_569 * _DAY_S),
}
"""Seconds per unit, and the unix second of zero."""
_SANE = {
    "years": (1970, 2100),
    "YYYYMM": (1970_01, 2100_12),
    "YYYYMMDD": (1970_01_01, 2100_12_31),
    "YYYYMMDDHHMM": (1970_01_01_00_00, 2100_12_31_23_59),
    "YYYYMMDDHHMMSS": (1970_01_01_00_00_00, 2100_12_31_23_59_59),
    "days": (7_305, 25_567),
    "excel": (32_874, 51_136),
    "hours": (175_320, 613_608),
    "minutes": (10_519_200, 36_816_480),
} | {
    unit: (YEAR_1990_S * scale, YEAR_2200_S * scale)
    for unit, scale in _PER_SECOND.items()
    if unit != "order"
}
_SANE["ns"] = (644 * 10**15, _SANE["ns"][1])  # smaller numbers are .NET's ticks since the year 1
"""Numbers that are plausible in a unit: the years 1990 to 2040; no two units overlap."""
_UNKNOWN_S = (-62_135_596_800, -2_208_988_800, -1, 253_402_214_400, 253_402_300_799)
"""Years 1, 1900 and 9999, and a second before 1970, which programs write for unknown times."""
_ISO_ZONED = ("%Y-%m-%dT%H:%M:%S%.f%#z", "%Y-%m-%dT%H:%M%#z")
_ISO_NAIVE = ("%Y-%m-%dT%H:%M:%S%.f", "%Y-%m-%dT%H:%M", "%Y-%m-%d")
_DATES = {"DD.MM.YYYY": "%d.%m.%Y", "DD/MM/YYYY": "%d/%m/%Y", "MM/DD/YYYY": "%m/%d/%Y"}


class Times(NamedTuple):
    """Times at the column's own resolution, so that order within a second is kept."""

    ticks: pl.Series
    """Int64 since 1970, null where missing."""
    per_second: int
    notes: tuple[str, ...] = ()


def canonical_times(times: pl.Series, unit: TimestampUnit, *, drop_unknown: bool = False) -> Times:
    """Return times from numbers (in `unit`), datetimes, dates or ISO 8601 text.

    A datetime or text without a zone is taken as UTC, and noted.

    Args:
        times: A column of any type.
        unit: The unit of numbers.
        drop_unknown: Take 0, -1 and dates such as 1970-01-01 or 9999-12-31 among times of today as
            missing, and count them; otherwise they are an error.

    Raises:
        DataError: A time cannot be read, or lies before 1970 or after 2200; the message names
            another unit in which it is plausible.
    """
    if times.dtype in (pl.Categorical, pl.Enum, pl.Object):
        times = canonical_ids(times)
    if times.dtype == pl.String:
        numbers = _numbers_in(times)
        found = _of_text(times, unit) if numbers is None else _of_numbers(numbers, unit)
    elif times.dtype == pl.Date:
        found = Times(times.cast(pl.Int64) * _DAY_S, 1)
    elif times.dtype == pl.Datetime:
        zone = times.dtype.time_zone  # type: ignore[attr-defined]  # Datetime has it
        naive = times.is_not_null() if zone is None else None
        found = _zoned(times, times.dt.epoch("us"), naive)
    elif times.dtype.is_numeric() or times.dtype == pl.Null:
        found = _of_numbers(times, unit)
    else:
        raise DataError(
            f"column {times.name!r} holds {in_words(times)}: times are numbers, datetimes, dates "
            "or ISO text",
            column=times.name,
        )
    return _bounded(times, found if unit == "order" else _known(times, found, drop=drop_unknown))


# Numbers


def _of_numbers(times: pl.Series, unit: TimestampUnit) -> Times:
    if unit in _DATES:
        raise DataError(
            f"column {times.name!r} holds numbers, and timestamp_unit={unit!r} is for text: say "
            'what they count, such as "s" or "YYYYMMDD"',
            column=times.name,
        )
    coarse = _coarseness(times)
    times = _plain_numbers(times)
    notes = (*_refuse_other_units(times, unit), *coarse)
    if unit in _PER_SECOND:
        scale = _PER_SECOND[unit]
        if times.dtype.is_float():
            return Times((times * (1_000_000 / scale)).round().cast(pl.Int64), 1_000_000, notes)
        ticks = times.cast(pl.Int64)
        return Times(*((ticks // 1_000, 1_000_000) if unit == "ns" else (ticks, scale)), notes)
    if unit in _LINEAR:
        size, zero = _LINEAR[unit]
        micros = (times * (size * 1_000_000)).round().cast(pl.Int64) + zero * 1_000_000
    elif unit == "years":
        micros = _of_years(times)
    else:
        micros = _of_digits(times, unit)
        broken = micros.is_null() & times.is_not_null() & ~_is_blank(times)
        if broken.any():
            raise refusal(times, broken, f"is not a date written {unit}: fix it, or set another "
                          "timestamp_unit")  # fmt: skip
    micros = pl.select(pl.when(_is_blank(times)).then(-1_000_000).otherwise(micros)).to_series()
    if (micros % 1_000_000 == 0).all():
        return Times(micros // 1_000_000, 1, notes)
    return Times(micros, 1_000_000, notes)


def _coarseness(times: pl.Series) -> tuple[str, ...]:
    """Return a note on the precision of small floats for large numbers."""
    high = _bound(times.max()) if times.dtype in (pl.Float16, pl.Float32) else 0
    digits = 11 if times.dtype == pl.Float16 else 24
    if not 2**digits <= high < math.inf:
        return ()
    return (
        f"column {times.name!r}: floats of {32 if digits == 24 else 16} bits hold such numbers to "
        f"{2 ** (math.frexp(high)[1] - digits):,} only, and closer times have become equal: keep "
        "them as integers",
    )


def _plain_numbers(times: pl.Series) -> pl.Series:
    """Return integers, or floats if there is a fraction, with nulls for NaN."""
    if times.dtype == pl.Null:
        return times.cast(pl.Int64)
    if times.dtype == pl.Decimal:
        times = times.cast(pl.Int128 if times.dtype.scale == 0 else pl.Float64)  # type: ignore[attr-defined]  # Decimal has it
    if times.dtype.is_integer():  # signed, because numbers are compared with a negative one
        small = times.cast(pl.Int64, strict=False)
        return small if small.null_count() == times.null_count() else times.cast(pl.Int128)
    times = times.cast(pl.Float64).fill_nan(None)
    whole = times.cast(pl.Int64, strict=False)
    return whole if (times == whole).all() and times.null_count() == whole.null_count() else times


def _numbers_in(text: pl.Series) -> pl.Series | None:
    """Return the numbers of a text column; None if a text is not a number."""
    for dtype in (pl.Int64, pl.Float64):
        numbers = text.cast(dtype, strict=False)
        if numbers.null_count() == text.null_count():
            return numbers
    return None


def _is_blank(times: pl.Series) -> pl.Series:
    """Return a mask of numbers that programs write for an unknown time."""
    return ((times == 0) | (times == -1)).fill_null(value=False)


def _refuse_other_units(times: pl.Series, unit: TimestampUnit) -> tuple[str, ...]:
    """Raise an error for numbers plausible only in another unit; note those plausible in none."""
    low, high = _bound(times.min()), _bound(times.max())
    limit = _limit(unit)
    if low < -1 or high > limit:
        scale = _PER_SECOND.get(unit, 1)
        outside = ((times < 0) | (times > limit)).fill_null(value=False)
        for tick in (second * scale for second in _UNKNOWN_S):
            outside &= (times != tick) if abs(tick) < 2**63 else True
        if outside.any():
            raise _outside(times, outside, unit)
    if unit == "order" or (low > 0 and low >= _SANE[unit][0]):
        return ()
    known = times.filter(times > 0)
    if known.is_empty():
        return ()
    low, high = _bound(known.min()), _bound(known.max())
    if high >= _SANE[unit][0]:
        _refuse_mixed(times, unit)
        return ()
    if other := _unit_of(known, unit):
        early = (times > 0).fill_null(value=False)
        raise refusal(
            times,
            early,
            f"lies before 1990 in {unit}, but all are plausible in {other}: set "
            f'timestamp_unit="{other}", or "order" for a mere count',
        )
    return (
        f"column {times.name!r}: {low:,} to {high:,} would be times before 1990 in {unit}, and "
        'were taken as an order; set timestamp_unit="order" if that is meant',
    )


def _bound(value: object) -> int | float:
    return value if isinstance(value, int | float) else 0


def _limit(unit: TimestampUnit) -> int | float:
    """Return the number of the year 2200 in a unit."""
    if unit in _LINEAR:
        size, zero = _LINEAR[unit]
        return (YEAR_2200_S - zero) / size
    if unit in _PER_SECOND:
        return YEAR_2200_S * _PER_SECOND[unit]
    return 2200 if unit == "years" else int("22001231235959"[: len(unit)])


def _unit_of(known: pl.Series, unit: TimestampUnit) -> str | None:
    """Return another unit in which all numbers are plausible, if there is one."""
    low, high = _bound(known.min()), _bound(known.max())
    for other, (first, last) in _SANE.items():
        fits = first <= low and high <= last and other != unit
        if fits and not (other.startswith("Y") and _of_digits(known, other).null_count()):
            return other
    return None


def _refuse_mixed(times: pl.Series, unit: TimestampUnit) -> None:
    """Raise an error if some times have a coarser unit than the rest, which puts them in 1970."""
    for other, scale in _PER_SECOND.items():
        if other == unit or unit not in _PER_SECOND:
            return
        own = _SANE[unit][0]
        mixed = times.is_between(YEAR_1990_S * scale, min(YEAR_2200_S * scale, own - 1)).fill_null(
            value=False
        )
        if mixed.any():
            raise refusal(
                times,
                mixed,
                f"lies before 1990 in {unit}, but is plausible in {other}, and so are "
                f"{int(mixed.sum()) - 1:,} more rows, while others are not: the column mixes "
                "units; use one unit for all of it",
            )


def _of_digits(times: pl.Series, unit: str) -> pl.Series:
    """Return microseconds of dates written as digits, null for other numbers."""
    text = times.cast(pl.Int64, strict=False).cast(pl.String)
    text = text.set(text.str.len_bytes() != len(unit), None) + "00000101000000"[len(unit) :]
    whole = times.cast(pl.Int64, strict=False) == times
    date = text.set(~whole, None).str.to_datetime("%Y%m%d%H%M%S", time_unit="us", strict=False)
    return date.dt.epoch("us")


def _of_years(times: pl.Series) -> pl.Series:
    """Return microseconds of years; a fraction is a part of its year."""
    year = times.cast(pl.Float64).floor().cast(pl.Int32)
    start, end = (
        pl.select(pl.datetime(year + more, 1, 1).dt.epoch("us")).to_series() for more in (0, 1)
    )
    return start + ((times - year) * (end - start)).round().cast(pl.Int64)


# Texts


def _of_text(times: pl.Series, unit: TimestampUnit) -> Times:
    text = times.str.strip_chars()
    if unit in _DATES:
        date = _DATES[unit]
        naive = _parsed(text, (f"{date} %H:%M:%S%.f", f"{date} %H:%M", date))
        return _zoned(times, _readable(times, naive, unit), times.is_not_null())
    text = text.str.replace(" ", "T", literal=True)
    zoned, naive = _parsed(text, _ISO_ZONED), _parsed(text, _ISO_NAIVE)
    micros = zoned.fill_null(naive)
    if micros.null_count() > times.null_count():  # 2024/05/01, 2024-05-01 12:30:00 UTC
        text = text.str.replace(r"^(\d{4})/(\d\d)/(\d\d)", "$1-$2-$3")
        text = text.str.replace(r"T?(UTC|GMT)$", "Z").str.replace(r"T([+-]\d\d:?\d\d)$", "$1")
        zoned, naive = _parsed(text, _ISO_ZONED), _parsed(text, _ISO_NAIVE)
        micros = zoned.fill_null(naive)
    return _zoned(times, _readable(times, micros, unit), zoned.is_null() & naive.is_not_null())


def _parsed(text: pl.Series, forms: tuple[str, ...]) -> pl.Series:
    """Return microseconds, in UTC if there is a zone; null where no format fits."""
    zone = "UTC" if forms == _ISO_ZONED else None
    parsed = pl.coalesce(
        pl.lit(text)
        .str.to_datetime(form, time_unit="us", strict=False, time_zone=zone)
        .dt.epoch("us")
        for form in forms
    )
    return pl.select(parsed.alias(text.name)).to_series()


def _readable(times: pl.Series, micros: pl.Series, unit: TimestampUnit) -> pl.Series:
    """Return the times if all texts can be read."""
    broken = micros.is_null() & times.is_not_null()
    if not broken.any():
        return micros
    value = times.filter(broken)[0]
    fits = [
        form
        for form, date in _DATES.items()
        if form != unit
        and (_parsed(pl.Series([value]), (date, f"{date} %H:%M", f"{date} %H:%M:%S%.f")) >= 0).any()
    ]
    if fits:
        fix = "set timestamp_unit=" + " or ".join(f'"{form}"' for form in fits)
    else:
        fix = "give all as unix seconds, or all as ISO 8601 text such as 2024-05-01T12:30:00Z"
    fix += "; if it means a missing time, list it in the setting `missing`"
    raise refusal(
        times, broken, f"is not a time: {fix}" if unit not in _DATES else f"is not {unit}: {fix}"
    )


def _zoned(shown: pl.Series, micros: pl.Series, naive: pl.Series | None) -> Times:
    """Return times, with a note if times of day without a zone were taken as UTC."""
    if naive is None or not naive.any() or not (micros % (_DAY_S * 1_000_000) != 0).any():
        return Times(micros, 1_000_000)
    note = f"column {shown.name!r}: times without a zone were taken as UTC"
    return Times(micros, 1_000_000, (note,))


# All


def _known(shown: pl.Series, times: Times, *, drop: bool) -> Times:
    """Raise an error for, or leave out, unknown times: 1970, or no year, among plausible times."""
    ticks, scale = times.ticks, times.per_second
    if _bound(ticks.min()) >= _YEAR_1971_S * scale and _bound(ticks.max()) <= YEAR_2200_S * scale:
        return times
    seconds = ticks // scale
    unknown = seconds.is_in(list(_UNKNOWN_S))
    newest = _bound(seconds.filter(~unknown & (seconds <= YEAR_2200_S)).max())
    if newest < YEAR_1990_S:
        return times
    between = seconds.is_between(_YEAR_1971_S, YEAR_1990_S - 1)
    unknown |= seconds.is_between(0, 0 if between.any() else _YEAR_1971_S - 1)
    return _without(shown, times, unknown.fill_null(value=False), drop=drop)


def _bounded(shown: pl.Series, times: Times) -> Times:
    ticks, last = times.ticks, YEAR_2200_S * times.per_second
    outside = ((ticks < 0) | (ticks > last)).fill_null(value=False)
    if outside.any():
        why = "lies before 1970 or after 2200: fix the time, or leave out the row"
        raise refusal(shown, outside, why)
    return times


def _without(shown: pl.Series, times: Times, unknown: pl.Series, *, drop: bool) -> Times:
    """Return times with the unknown ones missing, if the settings allow it."""
    if not unknown.any():
        return times
    count = int(unknown.sum())
    if not drop:
        more = f", and so would {count - 1:,} more" if count > 1 else ""
        may_stay = 0 <= times.ticks.filter(unknown)[0] <= YEAR_2200_S * times.per_second
        keep = '; to keep it as it is, set timestamp_unit="order"' if may_stay else ""
        raise refusal(
            shown,
            unknown,
            f"would be a time of 1970 or of no known year{more}, while others are of today: if it "
            "means an unknown time, leave it empty or set drop_incomplete=True, which leaves the "
            f"row out{keep}",
        )
    note = (
        f"column {shown.name!r}: {count:,} times such as {shown.filter(unknown)[0]!r} were "
        "taken as missing"
    )
    return times._replace(ticks=times.ticks.set(unknown, None), notes=(*times.notes, note))


def _outside(times: pl.Series, outside: pl.Series, unit: TimestampUnit) -> DataError:
    value = times.filter(outside)[:1]
    if value[0] < 0:
        return refusal(
            times, outside, "is a negative time, before 1970: fix it, or leave out the row"
        )
    other = _unit_of(value, unit) if abs(value[0]) < 2**62 else None
    if other and (own := times.is_between(_SANE[unit][0], _limit(unit))).any():
        why = (
            f"is after the year 2200 in {unit}, but plausible in {other}, while "
            f"{int(own.sum()):,} rows are plausible in {unit}: the column mixes units; "
            "use one unit for all of it"
        )
    elif other:
        why = f"is after the year 2200 in {unit}, but plausible in {other}: "
        why += f'set timestamp_unit="{other}"'
    else:
        why = (
            f"is after the year 2200 in {unit}, and is not near today in any known unit: "
            "fix it, or convert the column to unix seconds"
        )
    return refusal(times, outside, why)

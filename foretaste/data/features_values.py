"""Values of features: the same value may come from a table, from JSON or as text.

Fitting determines the type of a column once and stores it. Later values, from a table, from JSON or
as text, are read as that type: a date may come as a date or as ISO text, a number as digits, and
all of these are the same feature.

A message names the column, the row and the value. Rows are counted from 1, without the header.

Shape legend: R rows.
"""

from collections.abc import Callable
from datetime import UTC, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from functools import lru_cache
from importlib import import_module
from typing import Any, Literal
from uuid import UUID

import numpy as np
import polars as pl
from jaxtyping import Float32, Float64
from pydantic import TypeAdapter, ValidationError

from foretaste.data.columns import canonical_ids, in_words
from foretaste.errors import ConfigError, DataError

Held = Literal["text", "number", "truth", "time", "clock", "duration"]
"""The type of a column in training: `time` is a date or datetime, `clock` a time of day."""

_WANTED: dict[Held, str] = {
    "text": "a text",
    "number": "a number",
    "truth": "true or false",
    "time": 'a date or time, such as "2024-02-29" or "2024-02-29T12:30:00Z"',
    "clock": 'a time of day, such as "12:30:00"',
    "duration": 'a duration, such as "PT1H30M"',
}
_SECONDS_PER_DAY = 86_400
_DAYS = (-719_162, 2_932_896)
"""From year 1 to year 9999."""
_WHOLE = 2.0**53
"""A 64-bit float holds every whole number up to this one."""
_ISO_TIME = r"^\d{4}-\d{2}-\d{2}([T ]\d{2}:\d{2}(:\d{2}(\.\d+)?)?(Z|[+-]\d{2}:?\d{2})?)?$"
_DURATION = TypeAdapter(timedelta)


def held_by(column: pl.Series, *, as_number: bool = False) -> Held:
    """Return the type of a column; for lists, that of their values.

    A text column in which every value is an ISO date or time has times.

    Args:
        column: A column of training.
        as_number: Whether it becomes a number: text may then hold any type.
    """
    if isinstance(column.dtype, pl.List | pl.Array):
        column = column.explode()
    dtype = column.dtype
    if dtype == pl.Boolean:
        return "truth"
    if dtype.is_numeric():
        return "number"
    if dtype.is_temporal():
        return _held_by_times(column)
    if not is_text(column):
        return "number" if as_number else "text"
    text = column.cast(pl.String).unique().drop_nulls()
    text = text.filter(text != "")
    if as_number:
        return _most_like(text)
    is_time = len(text) and text.str.contains(_ISO_TIME).all()
    return "time" if is_time and not _typed(text, "time").null_count() else "text"


def _held_by_times(column: pl.Series) -> Held:
    match column.dtype:
        case pl.Time():
            return "clock"
        case pl.Duration():
            return "duration"
    return "time"


def _most_like(text: pl.Series) -> Held:
    """Return the type that fits the most distinct texts; numbers win ties."""
    kinds: tuple[Held, ...] = ("number", "time", "clock", "duration", "truth")
    if not _typed(text, "number").null_count():
        return "number"
    return min(kinds, key=lambda holds: _typed(text, holds).null_count())


def texts_of(column: pl.Series, *, holds: Held = "text") -> pl.Series:
    """Return categories as text, null where missing.

    Whole numbers of any type become the text of their digits, so that 42, 42.0 and "42" are one
    category. Truth values become `true` and `false`. Dates and times become ISO text in UTC,
    midnight without a time; durations become ISO text. Other text is not changed, not even blanks
    and case. NaN and empty text are missing.

    Args:
        column: The values.
        holds: The column's type in training; text is read as that type if possible.

    Raises:
        DataError: The column holds lists, bytes or the like, or an infinite number.
    """
    column = single_of(column)
    if column.dtype != pl.String:
        if holds == "number" and column.dtype == pl.Boolean:
            column = column.cast(pl.Int8)
        text = _spelled(column)
        return text if holds != "truth" or column.dtype == pl.Boolean else _respelled(text, holds)
    return _respelled(column.set(column == "", None), holds)


def single_of(column: pl.Series) -> pl.Series:
    """Return a column of single values, text of any type as `String`."""
    dtype = column.dtype
    if dtype == pl.Object:
        column = canonical_ids(column)
    elif dtype == pl.Binary or dtype.is_nested():
        raise DataError(
            f"column {column.name!r} holds {in_words(column)}, and a category is text, a number or "
            "a date: give one value, or leave it missing",
            column=column.name,
        )
    return column.cast(pl.String) if is_text(column) else column


def is_text(column: pl.Series) -> bool:
    """Return whether a column's type is text."""
    return isinstance(column.dtype, pl.String | pl.Categorical | pl.Enum)


def _spelled(column: pl.Series) -> pl.Series:
    """Return the text of each value that is not a text already."""
    dtype = column.dtype
    if dtype.is_decimal():
        column, dtype = column.cast(pl.Float64), pl.Float64()
    if dtype.is_float():
        return _texts_of_floats(column)
    if dtype == pl.Datetime:
        text = _in_utc(column).dt.to_string("%Y-%m-%dT%H:%M:%S%.f")
        return text.str.strip_suffix("T00:00:00")
    if dtype == pl.Time:
        return column.dt.to_string("%H:%M:%S%.f")
    if dtype == pl.Duration:
        return column.dt.cast_time_unit("us").dt.to_string("iso")
    return column.cast(pl.String)


def _in_utc(column: pl.Series) -> pl.Series:
    """Return times in UTC, without a zone; times without a zone are taken as UTC."""
    if column.dtype.time_zone is not None:  # type: ignore[attr-defined]  # Datetime has it
        column = column.dt.convert_time_zone("UTC").dt.replace_time_zone(None)
    return column.dt.cast_time_unit("us")


def _texts_of_floats(column: pl.Series) -> pl.Series:
    shortest = column.cast(pl.String)  # of 32 bits: 2.1, where 64 bits are 2.0999999046325684
    column = column.cast(pl.Float64).fill_nan(None)
    _refuse(column, column.is_infinite(), "is not a category: correct it, or leave it missing")
    whole = ((column == column.round()) & (column.abs() <= _WHOLE)).fill_null(value=False)
    digits = column.set(~whole, None).cast(pl.Int64).cast(pl.String)
    return digits.zip_with(whole, shortest.set(column.is_null(), None))


def _respelled(text: pl.Series, holds: Held) -> pl.Series:
    """Return text in the spelling of the column's type; other text is not changed."""
    if holds == "text" or not text.count():
        return text
    typed = _typed(text, holds)
    if holds == "number":
        typed = typed.set(typed.is_infinite(), None)
    spelled = _spelled(typed)
    if holds == "number":  # digits are exact, however many
        whole = text.cast(pl.Int128, strict=False).cast(pl.String)
        spelled = whole.zip_with(whole.is_not_null(), spelled)
    return spelled.zip_with(spelled.is_not_null(), text)


def _typed(text: pl.Series, holds: Held) -> pl.Series:
    """Return text parsed as the column's type, null where this fails."""
    if holds == "number":
        return text.cast(pl.Float64, strict=False)
    read, dtype = _READERS[holds]
    distinct = text.drop_nulls().unique()
    if not len(distinct):
        return pl.repeat(None, len(text), dtype=dtype, eager=True).alias(text.name)
    values = pl.Series([read(value) for value in distinct], dtype=dtype)
    return text.replace_strict(distinct, values, default=None, return_dtype=dtype)


def _read_time(text: str) -> datetime | None:
    try:
        read = datetime.fromisoformat(text.strip())
        return (read.astimezone(UTC) if read.tzinfo else read).replace(tzinfo=None)
    except (ValueError, OverflowError):
        return None


def _read_clock(text: str) -> time | None:
    try:
        read = time.fromisoformat(text.strip())
    except ValueError:
        return None
    return None if read.tzinfo else read


def _read_duration(text: str) -> timedelta | None:
    try:
        return _DURATION.validate_python(text.strip())
    except (ValidationError, OverflowError):
        return None


def _read_truth(text: str) -> bool | None:
    return {"true": True, "1": True, "false": False, "0": False}.get(text.strip().lower())


_READERS: dict[Held, tuple[Callable[[str], object], Any]] = {
    "truth": (_read_truth, pl.Boolean()),
    "time": (_read_time, pl.Datetime("us")),
    "clock": (_read_clock, pl.Time()),
    "duration": (_read_duration, pl.Duration("us")),
}


def numbers_of(column: pl.Series, *, holds: Held | None = None) -> Float64[np.ndarray, " R"]:
    """Return numbers, NaN where missing.

    Dates and times are days since 1970, times of day seconds since midnight, durations seconds;
    true is 1.

    Args:
        column: The values.
        holds: The column's type in training; None: text may be numbers or times.

    Raises:
        DataError: A value is not a number, does not have the type of training, or is infinite.
    """
    if column.dtype == pl.Binary or column.dtype.is_nested():
        raise DataError(
            f"column {column.name!r} holds {in_words(column)}, and a numeric field reads numbers, "
            "dates, times or durations: give those, or leave it missing",
            column=column.name,
        )
    column = single_of(column)
    column = column.fill_nan(None) if column.dtype.is_float() else column
    numbers = _numbers(column, holds)
    broken = numbers.is_null() & column.is_not_null()
    if column.dtype == pl.String:
        broken &= column != ""
    wanted = _WANTED[holds or "number"]
    _refuse(column, broken, f"is not {wanted}: correct it, or leave it missing")
    _refuse(column, numbers.is_infinite(), "is infinite: correct it, or leave it missing")
    return numbers.fill_null(np.nan).to_numpy(writable=True)


def _numbers(column: pl.Series, holds: Held | None) -> pl.Series:
    """Return 64-bit floats, null where a value does not have the column's type."""
    dtype = column.dtype
    if dtype == pl.String:
        numbers = _numbers(_typed(column, holds or "number"), holds)
        if holds is None and numbers.null_count() > column.null_count():
            numbers = numbers.fill_null(_numbers(_typed(column, "time"), "time"))
        return numbers
    if dtype.is_temporal():
        strange = holds is not None and _held_by_times(column) != holds
        numbers = _spans(column)
        return numbers.clear(len(numbers)) if strange else numbers
    if dtype in (pl.Float32, pl.Float16):
        column = column.cast(pl.String)  # the number that people wrote: 2.1, not 2.0999999
    numbers = column.cast(pl.Float64, strict=False)
    if holds == "time":
        numbers = numbers.set(~numbers.is_between(*_DAYS), None)
    return numbers


def _spans(column: pl.Series) -> pl.Series:
    """Return dates and times as days since 1970; times of day and durations as seconds."""
    if column.dtype == pl.Date:
        return column.cast(pl.Int32).cast(pl.Float64)
    if column.dtype == pl.Datetime:
        return column.dt.epoch("s").cast(pl.Float64) / _SECONDS_PER_DAY
    if column.dtype == pl.Time:
        return column.cast(pl.Int64).cast(pl.Float64) / 1e9
    return column.dt.total_microseconds().cast(pl.Float64) / 1e6


def cell_of(name: str, value: object) -> pl.Series:
    """Return a caller's value, from JSON or Python, as a column of one row.

    Args:
        name: The column's name.
        value: A text, number, truth value, date, time or duration, of Python, NumPy or pandas; a
            list or an array of one kind; None, NaN, NaT or NA where it is missing.

    Raises:
        DataError: The value has another type.
    """
    try:
        column = pl.Series(name, [_plain(value)])
        if column.dtype == pl.Object or column.dtype == pl.Struct:
            raise TypeError
    except (TypeError, ValueError, OverflowError, pl.exceptions.PolarsError) as error:
        raise DataError(
            f"column {name!r} cannot hold {_short(value)}: give a text, a number, true or false, a "
            "date, or a list of one kind",
            column=name,
            value=value,
        ) from error
    return column


def _plain(value: object) -> object:
    """Return a value as Polars accepts it; whole numbers beside fractions become floats."""
    if isinstance(value, set | frozenset):
        value = sorted(value, key=str)
    elif isinstance(value, pl.Series):
        value = value.to_list()
    elif not isinstance(value, np.generic) and hasattr(value, "tolist"):
        value = value.tolist()
    if not isinstance(value, list | tuple):
        return _plainsingle_of(value)
    parts = [_plain(part) for part in value]
    if {type(part) for part in parts if part is not None} == {int, float}:
        return [float(part) if isinstance(part, int | float) else None for part in parts]
    return parts


def _plainsingle_of(value: object) -> object:
    match value:
        case np.datetime64() | np.timedelta64():
            return pl.Series(np.array([value]).astype(f"{value.dtype.kind}8[us]"))[0]
        case Decimal() if not value.is_finite():
            return float(value)
        case UUID():
            return str(value)
        case Enum():
            return _plain(value.value)
        case time() if value.tzinfo is not None:
            raise ValueError(value)
    # NA and NaT belong to pandas, which may not be installed
    missing = type(value).__name__ in ("NAType", "NaTType") or value == "" or value != value
    return None if missing else value


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}…"


def _refuse(column: pl.Series, wrong: pl.Series, why: str) -> None:
    wrong = wrong.fill_null(value=False)
    if wrong.any():
        row = wrong.arg_max() or 0
        raise DataError(
            f"column {column.name!r}{at_row(column, row)}: {column[row]!r} {why}",
            column=column.name,
            row=1 + row,
            value=column[row],
        )


def moved(error: DataError, place: str, *, row: int | None = None) -> DataError:
    """Return the error with a position that the caller can find, instead of the row."""
    return DataError(
        str(error).replace(f", row {error.row}", f", {place}", 1),
        column=error.column,
        row=row,
        value=error.value,
    )


def at_row(column: pl.Series, row: int) -> str:
    """Return the position of a row for a message; empty for a single row, which is a request's."""
    return f", row {1 + row}" if len(column) > 1 else ""


def embed_texts(texts: list[str], encoder: str, *, batch_size: int) -> Float32[np.ndarray, "N W"]:
    """Return a vector of length 1 for each text.

    Args:
        texts: At least one.
        encoder: Folder or name of a sentence-transformers model on this machine; nothing is
            downloaded.
        batch_size: Texts encoded at a time.

    Raises:
        ConfigError: The extra `text` is not installed, or the encoder does not exist.
    """
    vectors = load_encoder(encoder).encode(
        texts,
        batch_size=batch_size,
        normalize_embeddings=True,
        convert_to_numpy=True,
        show_progress_bar=False,
    )
    return np.asarray(vectors, dtype=np.float32)


@lru_cache(maxsize=4)
def load_encoder(encoder: str) -> Any:
    """Load a sentence encoder and keep it; this may be done before any data are read.

    Raises:
        ConfigError: The extra `text` is not installed, or the encoder does not exist.
    """
    try:
        library = import_module("sentence_transformers")
    except ImportError as error:
        raise ConfigError(
            "a field of kind 'text' needs sentence-transformers: "
            "pip install 'foretaste[text]', or give the texts as vectors, kind = 'vector'",
            name="encoder",
            value=encoder,
        ) from error
    try:
        return library.SentenceTransformer(encoder, device="cpu", local_files_only=True)
    except (OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"encoder {encoder!r} cannot be loaded ({reason}): give the folder of a "
            "sentence-transformers model that is on this machine",
            name="encoder",
            value=encoder,
        ) from error


NEARLY_ALL = 0.5
"""A column with more distinct texts than this share of its rows is an id, a title or free text."""


_SEPARATORS = ("|", ";", ",")


_CUT = 0.05
"""A separator is in at least this share of texts."""


def separator_of(text: pl.Series) -> str | None:
    """Return the separator of the values of each text, "|" in "Action|Comedy"; None without one.

    Args:
        text: Texts, null where missing.
    """
    text = text.drop_nulls()
    for separator in _SEPARATORS:
        holds = text.str.contains(separator, literal=True)
        if not len(text) or holds.sum() < _CUT * len(text):
            continue
        parts = text.str.split(separator).explode().str.strip_chars()
        # a comma may be part of a name, as in "Seven Samurai, The": it must make far fewer values
        wholes = min(text.n_unique(), len(parts)) if separator == "," else len(parts)
        if parts.n_unique() <= NEARLY_ALL * wholes:
            return separator
    return None

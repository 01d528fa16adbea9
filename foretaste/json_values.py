"""Any value as JSON can hold it, the same in every file, at the prompt and over HTTP."""

import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import asdict, is_dataclass
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from typing import Any

from pydantic import BaseModel


def json_value(value: object) -> Any:
    """Return a value as JSON holds it.

    NaN, infinity and missing values become null; dates and times ISO text, durations seconds,
    bytes text, objects with fields, arrays and columns what they hold; and everything else its
    text.
    """
    match value:
        case None | bool() | int() | str():
            return value
        case float() | Decimal():
            return float(value) if math.isfinite(value) else None
        case bytes() | bytearray() | memoryview():
            return bytes(value).decode("utf-8", "backslashreplace")
        case timedelta() | datetime() | date() | time():
            return _of_time(value)
        case Mapping() | Set() | Sequence():
            return _of_collection(value)
    return _of_object(value)


def _of_time(value: timedelta | date | time) -> Any:
    if str(value) == "NaT":
        return None
    return value.total_seconds() if isinstance(value, timedelta) else value.isoformat()


def _of_collection(value: object) -> Any:
    if isinstance(value, Mapping):
        return {str(name): json_value(inner) for name, inner in value.items()}
    if isinstance(value, Set):
        return sorted((json_value(inner) for inner in value), key=str)
    return [json_value(inner) for inner in value] if isinstance(value, Sequence) else None


def _of_object(value: object) -> Any:
    if isinstance(value, BaseModel):
        return json_value(value.model_dump())
    if is_dataclass(value) and not isinstance(value, type):
        return json_value(asdict(value))
    if type(value).__name__ not in ("datetime64", "timedelta64"):  # whose lists hold bare numbers
        for name in ("tolist", "to_list", "to_pylist"):  # NumPy and pandas, Polars, Arrow
            if callable(method := getattr(value, name, None)):
                return json_value(method())
    text = str(value)
    return None if text in ("NaT", "<NA>") else text

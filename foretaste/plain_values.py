"""Any value as JSON can hold it, and settings as TOML text, the way a person would write them."""

import json
import math
import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import asdict, is_dataclass
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from typing import Any

from pydantic import BaseModel

from foretaste.errors import ConfigError


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


_BARE = re.compile(r"[A-Za-z0-9_-]+")


def to_toml(settings: Mapping[str, object]) -> str:
    """Write nested settings as TOML text; None, for which TOML has no form, becomes "none".

    Raises:
        ConfigError: A value is of a kind that TOML cannot hold.
    """
    return "\n".join(_section(settings, ())).strip() + "\n"


def toml_key(name: str) -> str:
    """Write a name as TOML takes it before an equals sign or between brackets."""
    return name if _BARE.fullmatch(name) else _text(name)


def toml_value(name: str, value: object) -> str:
    """Write a value, a mapping as an inline table; None becomes "none".

    Args:
        name: Whose value it is, for the message.
        value: Plain: text, numbers, true and false, and lists and mappings of them.

    Raises:
        ConfigError: It is of a kind that TOML cannot hold.
    """
    match value:
        case None:
            return '"none"'
        case bool():
            return str(value).lower()
        case int() | float():
            return repr(value)
        case str():
            return _text(value)
        case Mapping():
            return f"{{{', '.join(_line(inner, value[inner]) for inner in value)}}}"
        case Sequence():
            return f"[{', '.join(toml_value(name, inner) for inner in value)}]"
        case _:
            raise ConfigError(
                f"{name} = {value!r}: TOML has no form for a {type(value).__name__}",
                name=name,
                value=value,
            )


def _section(settings: Mapping[str, object], path: tuple[str, ...]) -> list[str]:
    scalars = {name: value for name, value in settings.items() if not isinstance(value, Mapping)}
    lines = [_line(name, value) for name, value in scalars.items()]
    if path and (lines or not settings):
        lines = ["", f"[{'.'.join(map(toml_key, path))}]", *lines]
    for name, value in settings.items():
        if isinstance(value, Mapping):
            lines += _section(value, (*path, name))
    return lines


def _line(name: str, value: object) -> str:
    return f"{toml_key(name)} = {toml_value(name, value)}"


def _text(text: str) -> str:
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")

"""Formats values and objects: as JSON and TOML, as a line, and as a small HTML table."""

import json
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence, Set
from dataclasses import asdict, is_dataclass
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from html import escape
from typing import Any

from pydantic import BaseModel

from foretaste.errors import ConfigError

LONGEST = 190
"""Maximum number of characters of the line."""


class Shown(ABC):
    """Adds `__repr__` and `_repr_html_` to a class that has `_facts`."""

    __slots__ = ()

    @abstractmethod
    def _facts(self) -> Mapping[str, object]:
        """Return the most important facts; whole numbers are counts of the named things."""

    def _rows(self) -> Sequence[Sequence[object]]:
        """Return the table; its first row has the headings."""
        return [("", type(self).__name__), *self._facts().items()]

    def __repr__(self) -> str:
        words = [_words(name, value) for name, value in self._facts().items()]
        return cut(f"{type(self).__name__}({', '.join(words)})", end="…)")

    def _repr_html_(self) -> str:
        head, *rows = self._rows()
        body = "".join(_line(row, "td") for row in rows)
        return f"<table><thead>{_line(head, 'th')}</thead><tbody>{body}</tbody></table>"


def cut(text: str, *, end: str = "…") -> str:
    """Return a text as one line, shortened if necessary."""
    line = " ".join(text.split())
    return line if len(line) <= LONGEST else line[: LONGEST - len(end)] + end


def _line(row: Sequence[object], tag: str) -> str:
    cells = "".join(f"<{tag}>{escape(_cell(cell))}</{tag}>" for cell in row)
    return f"<tr>{cells}</tr>"


def _words(name: str, value: object) -> str:
    if isinstance(value, int):
        return f"{value:,} {name}"
    return f"{name} {_cell(value)}".strip()


def _cell(value: object) -> str:
    match value:
        case float():
            return f"{value:.4f}"
        case int():
            return f"{value:,}"
        case _:
            return str(value)


def json_value(value: object) -> Any:
    """Return a value in a form that JSON can hold.

    NaN, infinity and missing values become null; dates and times become ISO text, durations
    seconds, and bytes text; objects with fields, arrays and columns become their contents;
    everything else becomes its text.
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
    """Write nested settings as TOML; None, which TOML lacks, becomes "none".

    Raises:
        ConfigError: TOML cannot hold a value of this type.
    """
    return "\n".join(_section(settings, ())).strip() + "\n"


def toml_key(name: str) -> str:
    """Write a name as TOML requires it before an equals sign or between brackets."""
    return name if _BARE.fullmatch(name) else _text(name)


def toml_value(name: str, value: object) -> str:
    """Write a value, a mapping as an inline table; None becomes "none".

    Args:
        name: The name of the value, for the message.
        value: Text, numbers, true and false, and lists and mappings of these.

    Raises:
        ConfigError: TOML cannot hold a value of this type.
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
            return f"{{{', '.join(_toml_line(inner, value[inner]) for inner in value)}}}"
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
    lines = [_toml_line(name, value) for name, value in scalars.items()]
    if path and (lines or not settings):
        lines = ["", f"[{'.'.join(map(toml_key, path))}]", *lines]
    for name, value in settings.items():
        if isinstance(value, Mapping):
            lines += _section(value, (*path, name))
    return lines


def _toml_line(name: str, value: object) -> str:
    return f"{toml_key(name)} = {toml_value(name, value)}"


def _text(text: str) -> str:
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")

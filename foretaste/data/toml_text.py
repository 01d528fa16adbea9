"""Settings written as TOML, the way a person would: scalars first, then sections."""

import json
import re
from collections.abc import Mapping, Sequence

from foretaste.errors import ConfigError

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

"""Settings written as TOML, the way a person would: scalars first, then sections."""

import json
from collections.abc import Mapping, Sequence

from foretaste.errors import ConfigError


def to_toml(settings: Mapping[str, object]) -> str:
    """Write nested settings as TOML text; None, for which TOML has no form, becomes "none".

    Raises:
        ConfigError: A value is of a kind that TOML cannot hold.
    """
    return "\n".join(_section(settings, ())).strip() + "\n"


def _section(settings: Mapping[str, object], path: tuple[str, ...]) -> list[str]:
    scalars = {name: value for name, value in settings.items() if not isinstance(value, Mapping)}
    lines = [f"{_key(name)} = {_value(name, value)}" for name, value in scalars.items()]
    if path and (lines or not settings):
        lines = ["", f"[{'.'.join(map(_key, path))}]", *lines]
    for name, value in settings.items():
        if isinstance(value, Mapping):
            lines += _section(value, (*path, name))
    return lines


def _key(name: str) -> str:
    return name if name.replace("_", "").replace("-", "").isalnum() else json.dumps(name)


def _value(name: str, value: object) -> str:
    match value:
        case None:
            return '"none"'
        case bool():
            return str(value).lower()
        case int() | float():
            return repr(value)
        case str():
            return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
        case Sequence():
            return f"[{', '.join(_value(name, inner) for inner in value)}]"
        case _:
            raise ConfigError(f"{name} = {value!r}: TOML has no form for a {type(value).__name__}")

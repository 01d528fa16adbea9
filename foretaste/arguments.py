"""What a public function was given, checked by its annotations before it does anything.

`@checked` turns a wrong call into a `ConfigError` that names the argument, the value and the fix,
and takes what means the same: NumPy's numbers for Python's, text for paths (`~` is expanded), and
any array, series or generator where a sequence is asked for.
"""

import inspect
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from functools import cache, wraps
from pathlib import Path
from types import NoneType, UnionType
from typing import (
    Annotated,
    Any,
    Literal,
    ParamSpec,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from annotated_types import Ge, Gt, Le, Lt

from foretaste.config import Config, plain, shown
from foretaste.errors import ConfigError, did_you_mean, nearest

P = ParamSpec("P")
T = TypeVar("T")

_FIXES = {
    ("Holdout", "Split"): "give split.test, or split.validation",
    ("Holdout", "Interactions"): "cut the events first: split = ft.temporal_split(events)",
    ("Split", "Interactions"): "cut the events first: split = ft.temporal_split(events)",
    ("Split", "Holdout"): "give the split itself, not its test",
    ("Interactions", "Split"): "give split.train, or split.events",
    ("Interactions", "Holdout"): "give the split's events: split.train",
    ("Interactions", "str"): "read it first: ft.read_interactions(path)",
    ("Interactions", "DataFrame"): "read it first: ft.read_interactions(table)",
    ("Trained", "Recommender"): "give recommender.trained",
    ("Trained", "Run"): "give run.trained",
    ("Recommender", "Trained"): "make it first: ft.build_recommender(trained)",
    ("Recommender", "str"): "load it first: ft.load(path)",
    ("ExperimentConfig", "str"): "read it first: ft.read_experiment(path)",
    ("FeatureSchema", "str"): "read it first: ft.schema_from_toml(text)",
    (
        "FeatureSchema",
        "dict",
    ): "write it as TOML for ft.schema_from_toml, or as ft.FeatureSchema(…)",
}
"""From the class that is wanted and the one that was given to what its user probably means."""


def checked(function: Callable[P, T]) -> Callable[P, T]:
    """Check and convert the arguments of a public function by their annotations.

    Raises:
        ConfigError: An argument is missing, unknown, of another type or out of its range. The
            error's `name` is the argument, its `value` what was given.
    """
    signature = inspect.signature(function)

    @cache
    def hints() -> Mapping[str, Any]:
        return get_type_hints(function, include_extras=True)

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError:
            raise _wrong_call(function, signature, hints(), args, kwargs) from None
        for name, value in bound.arguments.items():
            kind = signature.parameters[name].kind
            if name in hints() and kind not in (kind.VAR_POSITIONAL, kind.VAR_KEYWORD):
                try:
                    bound.arguments[name] = _converted(value, hints()[name])
                except _Unfit as unfit:
                    raise ConfigError(
                        f"{function.__name__}({name}=…): {unfit}", name=name, value=value
                    ) from None
        return function(*bound.args, **bound.kwargs)

    return call


def as_list(values: object) -> list[Any] | None:
    """Return what is a collection of values as a list; None for a text, a mapping or one value.

    Lists, tuples, sets, views, generators, NumPy arrays, and the series of pandas, Polars and
    Arrow are collections.
    """
    if isinstance(values, str | bytes | bytearray | Mapping) or hasattr(values, "columns"):
        return None
    for name in ("tolist", "to_list", "to_pylist"):  # NumPy and pandas, Polars, Arrow
        if callable(method := getattr(type(values), name, None)):
            found: object = method(values)
            return found if isinstance(found, list) else None
    return list(values) if isinstance(values, Iterable) else None


class _Unfit(Exception):
    """What an argument must be, and is not."""


def _must(wanted: str, value: object, advice: str = "") -> _Unfit:
    return _Unfit(f"must be {wanted}, not {shown(value)}{advice}")


def _converted(value: Any, hint: Any) -> Any:
    """Return the value as the annotation wants it.

    Raises:
        _Unfit: It cannot be that.
    """
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _bounded(_converted(value, parts[0]), parts[1:])
    if origin in (Union, UnionType):
        return _one_of(value, parts)
    if origin is Literal:
        return _choice(value, parts)
    if origin is type:
        return _class(value, parts[0])
    if origin is not None:
        return _collection(value, origin, parts)
    if hint in _PLAIN:
        return _PLAIN[hint](value)
    if not _is_checkable(hint) or isinstance(value, hint):
        return value
    raise _Unfit(_wrong_object(value, hint))


def _is_checkable(hint: object) -> bool:
    """Return whether an object can be told to be of a class: our own, and no protocol."""
    return (
        isinstance(hint, type)
        and hint.__module__.partition(".")[0] in ("foretaste", "torch", "polars")
        and not getattr(hint, "_is_protocol", False)
    )


def _bounded(value: Any, limits: Sequence[object]) -> Any:
    if isinstance(value, int | float):
        for limit in limits:
            match limit:
                case Gt(gt=bound) if not value > bound:  # type: ignore[operator]  # of numbers
                    raise _must(f"above {bound}", value)
                case Ge(ge=bound) if not value >= bound:  # type: ignore[operator]
                    raise _must(f"at least {bound}", value)
                case Lt(lt=bound) if not value < bound:  # type: ignore[operator]
                    raise _must(f"below {bound}", value)
                case Le(le=bound) if not value <= bound:  # type: ignore[operator]
                    raise _must(f"at most {bound}", value)
    return value


def _one_of(value: Any, options: Sequence[Any]) -> Any:
    """Return the value as the first member of a union that takes it."""
    if value is None and NoneType in options:
        return None
    unfit = []
    for option in options:
        if option is not NoneType:
            try:
                return _converted(value, option)
            except _Unfit as error:
                unfit.append(str(error))
    raise _Unfit(_together(value, [option for option in options if option is not NoneType], unfit))


def _together(value: object, options: Sequence[Any], unfit: Sequence[str]) -> str:
    classes = [option for option in options if isinstance(option, type)]
    if len(classes) == len(options) and all(issubclass(option, Config) for option in classes):
        return _wrong_settings(value, classes)
    if len(unfit) == 1:
        return unfit[0]
    start, end = "must be ", f", not {shown(value)}"
    wishes = [said.removeprefix(start).partition(end)[0] for said in unfit]
    return f"{start}{' or '.join(dict.fromkeys(wishes))}{end}"


def _wrong_settings(value: object, classes: Sequence[type[Any]]) -> str:
    """Say which settings are meant: brackets forgotten, a name in place of settings, or another."""
    names = [option.__name__ for option in classes]
    if isinstance(value, type):
        return f"must be settings, not {shown(value)}: write {value.__name__}()"
    if isinstance(value, str):
        kinds = {
            option.model_fields["kind"].default: option
            for option in classes
            if "kind" in option.model_fields
        }
        near = nearest(value.lower(), kinds)
        meant = kinds[near].__name__ if near else names[0]
        return f"must be settings, not the text {value!r}: write ft.{meant}()"
    wanted = names[0] if len(names) == 1 else f"one of {', '.join(names)}"
    return f"must be {wanted}, not {shown(value)}"


def _wrong_object(value: object, wanted: type[Any]) -> str:
    if issubclass(wanted, Config):
        fix = _FIXES.get((wanted.__name__, type(value).__name__))
        return _wrong_settings(value, [wanted]) + (f": {fix}" if fix else "")
    fix = _FIXES.get((wanted.__name__, type(value).__name__))
    if isinstance(value, os.PathLike):
        fix = _FIXES.get((wanted.__name__, "str"))
    article = "an" if wanted.__name__[0] in "AEIOU" else "a"
    return f"must be {article} {wanted.__name__}, not {shown(value)}{f': {fix}' if fix else ''}"


def _choice(value: object, choices: Sequence[object]) -> object:
    value = plain(value)
    for choice in choices:
        if type(value) is type(choice) and value == choice:
            return value
    near = did_you_mean(value, map(str, choices)) if isinstance(value, str) else ""
    raise _must(" or ".join(map(repr, choices)), value, near)


def _class(value: object, wanted: Any) -> object:
    if isinstance(value, type):
        return value
    raise _must("a class of settings", value)


def _collection(value: Any, origin: Any, parts: Sequence[Any]) -> Any:
    if origin is Callable or not isinstance(origin, type):
        return _callable(value)
    if issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise _must("a dictionary", value)
        return {key: _converted(inner, parts[1]) for key, inner in value.items()}
    if origin is Iterator or not issubclass(origin, Iterable) or issubclass(origin, Set):
        return value
    found = as_list(value)
    if found is None:
        raise _must("a list", value)
    element = parts[0] if parts else object
    if element not in (object, Any):
        found = [_converted(one, element) for one in found]
    return tuple(found) if origin is tuple else found


def _callable(value: object) -> object:
    if not callable(value):
        raise _must("a function", value)
    return value


def _whole(value: object) -> int:
    value = plain(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    raise _must("a whole number", value)


def _number(value: object) -> float:
    value = plain(value)
    if isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value):
        return value
    raise _must("a number", value)


def _truth(value: object) -> bool:
    value = plain(value)
    if isinstance(value, bool):
        return value
    raise _must("True or False", value)


def _text(value: object) -> str:
    if isinstance(value, str):
        return str(value)
    raise _must("text", value)


def _path(value: object) -> Path:
    if isinstance(value, str | os.PathLike):
        path = os.fspath(value)
        if isinstance(path, str) and path and "\0" not in path:
            return Path(path).expanduser()
    raise _must("a path", value)


_PLAIN: Mapping[Any, Callable[[object], Any]] = {
    int: _whole,
    float: _number,
    bool: _truth,
    str: _text,
    Path: _path,
    os.PathLike: _path,
}


def _wrong_call(
    function: Callable[..., object],
    signature: inspect.Signature,
    hints: Mapping[str, Any],
    args: Sequence[object],
    kwargs: Mapping[str, object],
) -> ConfigError:
    """Say which argument is unknown, missing or must be given by name."""
    name, parameters = function.__name__, signature.parameters
    for unknown in kwargs:
        if unknown not in parameters:
            for owner, config in _settings_of(hints):
                if unknown in config.model_fields:
                    advice = f"; it is a setting: {owner}=ft.{config.__name__}({unknown}=…)"
                    break
            else:
                advice = did_you_mean(unknown, parameters)
                advice = advice or f"; there are {', '.join(n for n in parameters if n != 'self')}"
            return ConfigError(
                f"{name} has no argument {unknown!r}{advice}", name=unknown, value=kwargs[unknown]
            )
    positional = [p for p in parameters.values() if p.kind is not p.KEYWORD_ONLY]
    if len(args) > len(positional):
        rest = [n for n, p in parameters.items() if p.kind is p.KEYWORD_ONLY and n not in kwargs]
        advice = f", such as {rest[0]}=…" if rest else ""
        given = args[len(positional)]
        return ConfigError(
            f"{name}: give {shown(given)} by its name{advice}",
            name=rest[0] if rest else None,
            value=given,
        )
    given_names = {*kwargs, *(p.name for p in positional[: len(args)])}
    missing = [n for n, p in parameters.items() if p.default is p.empty and n not in given_names]
    return ConfigError(
        f"{name} needs {', '.join(missing) or 'other arguments'}",
        name=missing[0] if missing else None,
    )


def _settings_of(hints: Mapping[str, Any]) -> Iterator[tuple[str, type[Config]]]:
    """Yield the arguments that are one kind of settings, and the kind."""
    for name, hint in hints.items():
        for option in get_args(hint) or (hint,):
            if isinstance(option, type) and issubclass(option, Config):
                yield name, option

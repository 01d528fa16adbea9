"""Checks the arguments of public functions by their annotations.

`@checked` turns a wrong call into a `ConfigError` that names the argument, the value and the fix,
and converts equivalent values: NumPy's numbers to Python's, text to paths (`~` is expanded), and
any array, series or generator to a sequence.
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
    Concatenate,
    Literal,
    ParamSpec,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

import numpy as np
from annotated_types import Ge, Gt, Le, Lt

from foretaste.config import Config, parse_settings, plain, shown
from foretaste.errors import ConfigError, did_you_mean, nearest

P = ParamSpec("P")
T = TypeVar("T")
C = TypeVar("C", bound=type)
S = TypeVar("S", bound=Config)
A = TypeVar("A")

_TAKES_ALL = (object, Any, inspect.Parameter.empty)
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
    ("Trained", "str"): "load it first: ft.load(path).trained",
    ("Queries", "Holdout"): "give some of them: split.test.queries([0, 1])",
    ("Series", "list"): "write polars.Series(ids)",
    ("ExperimentConfig", "str"): "read it first: ft.read_experiment(path)",
    ("FeatureSchema", "str"): "read it first: ft.schema_from_toml(text)",
    (
        "FeatureSchema",
        "dict",
    ): "write it as TOML for ft.schema_from_toml, or as ft.FeatureSchema(…)",
}
"""Maps the required and the given class to advice about what the caller probably means."""


def checked(function: Callable[P, T]) -> Callable[P, T]:
    """Check and convert the arguments of a public function by their annotations.

    Raises:
        ConfigError: An argument is missing, unknown, of a wrong type or out of its range. The
            error's `name` is the argument, and its `value` the given value.
    """
    signature = inspect.signature(function)
    if all(one.annotation in _TAKES_ALL for one in signature.parameters.values()):
        return _counted(function, signature)

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
                        f"{_called(function)}({name}=…): {unfit}", name=name, value=value
                    ) from None
        return function(*bound.args, **bound.kwargs)

    return call


def settings_as_arguments(
    settings: Callable[P, S],
) -> Callable[[Callable[[A, S], T]], Callable[Concatenate[A, P], T]]:
    """Turn a function of an argument and settings into one with an argument per setting.

    Its signature and its documentation come from the settings, which are defined once; a type
    checker and an editor see them too. `kind`, which only a recipe needs, is not an argument.
    """
    made: type[Config] = settings  # type: ignore[assignment]  # a class, typed by its constructor

    def decorate(function: Callable[[A, S], T]) -> Callable[Concatenate[A, P], T]:
        @wraps(function)
        def call(first: A, /, *args: P.args, **kwargs: P.kwargs) -> T:
            found: Any = parse_settings(made, kwargs, source=function.__name__)
            return function(first, found)

        fields = {name: field for name, field in made.model_fields.items() if name != "kind"}
        first = next(iter(inspect.signature(function).parameters.values()))
        parameters = [
            inspect.Parameter(
                name, first.KEYWORD_ONLY, default=field.default, annotation=field.annotation
            )
            for name, field in fields.items()
        ]
        call.__signature__ = inspect.signature(function).replace(  # type: ignore[attr-defined]  # read by inspect
            parameters=[first, *parameters]
        )
        call.__annotations__ = {first.name: first.annotation}
        arguments = "\n".join(
            f"        {name}: {(field.description or '').replace(chr(10), chr(10) + ' ' * 12)}"
            for name, field in fields.items()
        )
        call.__doc__ = (function.__doc__ or "").replace("        (settings)", arguments)
        return checked(call)

    return decorate


def _counted(function: Callable[P, T], signature: inspect.Signature) -> Callable[P, T]:
    """Check only the number and the names of arguments, not their values.

    This runs only after a call failed, so that it costs a correct call nothing.
    """

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return function(*args, **kwargs)
        except TypeError:
            try:
                signature.bind(*args, **kwargs)
            except TypeError:
                raise _wrong_call(function, signature, {}, args, kwargs) from None
            raise

    return call


def checked_class(made: C) -> C:
    """Check and convert the arguments of a class's constructor, as `checked` does."""
    made.__init__ = checked(made.__init__)  # type: ignore[misc]  # the decorator of a whole class
    return made


def _called(function: Callable[..., object]) -> str:
    """Return the name that a caller writes; for a constructor, that of the class."""
    owner, _, name = function.__qualname__.rpartition(".")
    return owner if name == "__init__" else name


def as_list(values: object) -> list[Any] | None:
    """Return a collection of values as a list; None for a text, a mapping or a single value.

    Lists, tuples, sets, views, generators, NumPy arrays, and the series of pandas, Polars and
    Arrow are collections.
    """
    if isinstance(values, str | bytes | bytearray | Mapping) or hasattr(type(values), "columns"):
        return None
    if isinstance(values, np.ndarray) and values.dtype.kind == "M" and values.ndim:
        return list(values)  # its own list converts some times to numbers
    for name in ("tolist", "to_list", "to_pylist"):  # NumPy and pandas, Polars, Arrow
        if callable(method := getattr(type(values), name, None)):
            found: object = method(values)
            return found if isinstance(found, list) else None
    return list(values) if isinstance(values, Iterable) else None


class _Unfit(Exception):
    """The requirement of an argument, the given value, and the advice."""

    def __init__(self, wanted: str, value: object, advice: str = "") -> None:
        super().__init__(f"must be {wanted}, not {shown(value)}{advice}")
        self.wanted = wanted
        self.value = value
        self.advice = advice


def _converted(value: Any, hint: Any) -> Any:
    """Return the value converted to the annotation.

    Raises:
        _Unfit: It cannot be converted.
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
    return _single(value, hint)


def _single(value: Any, hint: Any) -> Any:
    """Return the value converted to a type without parts."""
    if hint in _PLAIN:
        return _PLAIN[hint](value)
    if hasattr(hint, "array_type"):
        return _array(value, hint)
    if getattr(hint, "_is_protocol", False) and "__call__" in vars(hint):
        return _callable(value)
    if not _is_checkable(hint) or isinstance(value, hint):
        return value
    raise _Unfit(_named(hint), value, _advice(value, hint))


def _is_checkable(hint: object) -> bool:
    """Return whether `isinstance` can check the class: one of our own that is not a protocol."""
    return hint is slice or (
        isinstance(hint, type)
        and hint.__module__.partition(".")[0] in ("foretaste", "torch", "polars")
        and not getattr(hint, "_is_protocol", False)
    )


def _bounded(value: Any, limits: Sequence[object]) -> Any:
    if isinstance(value, int | float):
        for limit in limits:
            match limit:
                case Gt(gt=bound) if not value > bound:  # type: ignore[operator]  # of numbers
                    raise _Unfit(f"above {bound}", value)
                case Ge(ge=bound) if not value >= bound:  # type: ignore[operator]
                    raise _Unfit(f"at least {bound}", value)
                case Lt(lt=bound) if not value < bound:  # type: ignore[operator]
                    raise _Unfit(f"below {bound}", value)
                case Le(le=bound) if not value <= bound:  # type: ignore[operator]
                    raise _Unfit(f"at most {bound}", value)
    return value


def _one_of(value: Any, options: Sequence[Any]) -> Any:
    """Return the value converted to the first member of a union that accepts it."""
    if value is None and NoneType in options:
        return None
    unfit: list[_Unfit] = []
    is_path = any(get_origin(option) is os.PathLike or option is Path for option in options)
    for option in options:
        if option is not NoneType and not (is_path and option is str):  # a path accepts text
            try:
                return _converted(value, option)
            except _Unfit as error:
                unfit.append(error)
    wishes = list(dict.fromkeys(error.wanted for error in unfit))
    if "a number" in wishes and "a whole number" in wishes:
        wishes.remove("a whole number")
    wanted = " or ".join(wishes) if len(wishes) < 5 else f"settings, such as {wishes[0]}"
    advice = _meant(value, [option for option in options if _is_settings(option)])
    inner = next((error.value for error in unfit if error.value is not value), value)
    raise _Unfit(wanted, inner, advice or next((e.advice for e in unfit if e.advice), ""))


def _is_settings(hint: object) -> bool:
    return isinstance(hint, type) and issubclass(hint, Config)


def _named(wanted: type[Any]) -> str:
    article = "an" if wanted.__name__[0] in "AEIOU" else "a"
    return f"{article} {wanted.__name__}"


def _advice(value: object, wanted: type[Any]) -> str:
    """Return advice on how to get the required value from the given one, if known."""
    given = "str" if isinstance(value, os.PathLike) else type(value).__name__
    if fix := _FIXES.get((wanted.__name__, given)):
        return f": {fix}"
    return _meant(value, [wanted]) if _is_settings(wanted) else ""


def _meant(value: object, classes: Sequence[type[Any]]) -> str:
    """Suggest settings for a class without brackets, or for a name of settings."""
    if isinstance(value, type):
        return f": write {value.__name__}()"
    kinds = {c.model_fields["kind"].default: c for c in classes if "kind" in c.model_fields}
    near = nearest(value.lower(), kinds) if isinstance(value, str) else None
    return f": write ft.{kinds[near].__name__}()" if near else ""


def _choice(value: object, choices: Sequence[object]) -> object:
    value = plain(value)
    for choice in choices:
        if type(value) is type(choice) and value == choice:
            return value
    near = did_you_mean(value.lower(), map(str, choices)) if isinstance(value, str) else ""
    raise _Unfit(" or ".join(map(repr, choices)), value, near)


def _class(value: object, wanted: Any) -> object:
    if isinstance(value, type):
        return value
    raise _Unfit("a class of settings", value)


def _collection(value: Any, origin: Any, parts: Sequence[Any]) -> Any:
    if origin is os.PathLike:
        return _path(value)
    if origin is Callable or not isinstance(origin, type):
        return _callable(value)
    if issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise _Unfit("a dictionary", value)
        return {key: _named_part(key, inner, parts[1]) for key, inner in value.items()}
    if origin is Iterator or not issubclass(origin, Iterable) or issubclass(origin, Set):
        return value
    found = as_list(value)
    if found is None:
        raise _Unfit("a list", value)
    element = parts[0] if parts else object
    if element not in (object, Any):
        found = [_converted(one, element) for one in found]
    return tuple(found) if origin is tuple else found


def _named_part(key: object, value: Any, hint: Any) -> Any:
    try:
        return _converted(value, hint)
    except _Unfit as unfit:
        raise _Unfit(f"{unfit.wanted} for {key!r}", value, unfit.advice) from None


def _array(value: object, hint: Any) -> object:
    """Return an array of the annotated type and number of dimensions."""
    if not issubclass(hint.array_type, np.ndarray):
        if isinstance(value, hint.array_type):
            return value
        raise _Unfit("a tensor", value)
    found = as_list(value) if not isinstance(value, np.ndarray) else value
    if found is None:
        raise _Unfit("an array", value)
    try:
        array = np.asarray(found)
    except ValueError:  # lists of several lengths
        raise _Unfit("an array", value) from None
    name = hint.dtypes[0] if isinstance(hint.dtypes, tuple) else ""  # not a tuple: any type
    wanted = np.dtype(name) if name in _NUMBERS else array.dtype
    if array.size == 0:
        array = array.astype(wanted)
    if array.dtype.kind not in _NUMBERS_FROM.get(wanted.kind, array.dtype.kind):
        raise _Unfit(f"an array of {_NUMBERS_NAMED[wanted.kind]}", value)
    if array.ndim != (wanted_ndim := len(hint.dims)):
        raise _Unfit(f"an array of {wanted_ndim} dimension{'s' * (wanted_ndim != 1)}", value)
    return array.astype(wanted, copy=False)


_NUMBERS = ("bool", "uint8", "int32", "int64", "float32", "float64")
_NUMBERS_FROM = {"b": "b", "u": "iu", "i": "iu", "f": "fiu"}
_NUMBERS_NAMED = {"b": "true and false", "u": "whole numbers", "i": "whole numbers", "f": "numbers"}


def _callable(value: object) -> object:
    if not callable(value):
        raise _Unfit("a function", value)
    return value


def _whole(value: object) -> int:
    value = value if isinstance(value, int) else plain(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    raise _Unfit("a whole number", value)


def _number(value: object) -> float:
    value = plain(value)
    if isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value):
        return float(value)
    raise _Unfit("a number", value)


def _truth(value: object) -> bool:
    value = plain(value)
    if isinstance(value, bool):
        return value
    raise _Unfit("True or False", value)


def _text(value: object) -> str:
    if isinstance(value, str):
        return str(value)
    raise _Unfit("text", value)


def _path(value: object) -> Path:
    if isinstance(value, str | os.PathLike):
        path = os.fspath(value)
        if isinstance(path, str) and path and "\0" not in path:
            return Path(path).expanduser()
    raise _Unfit("a path", value)


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
    """Return which argument is unknown, missing or must be given by name."""
    name, parameters = _called(function), signature.parameters
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
    """Yield the arguments that take one kind of settings, with the kind."""
    for name, hint in hints.items():
        for option in get_args(hint) or (hint,):
            if isinstance(option, type) and issubclass(option, Config):
                yield name, option

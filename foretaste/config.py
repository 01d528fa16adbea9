"""The parent of all settings, and the message about a wrong setting: one line with its name.

Settings are frozen and refuse unknown names. `SASRecConfig(embeding_dim=16)` raises
`ConfigError: SASRecConfig: embeding_dim: there is no such setting; did you mean embedding_dim?`,
and a recipe with the same mistake raises the same error with the recipe's path.
"""

import inspect
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from itertools import islice
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, TypeVar, get_args, get_origin

from annotated_types import Ge, Le, Lt, MaxLen
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails, InitErrorDetails, PydanticCustomError

from foretaste.errors import ConfigError, nearest

C = TypeVar("C", bound="Config")
Seed = Annotated[int, Ge(0), Lt(2**63)]
"""The seed of all random draws; equal seeds give equal results."""
Schema = Mapping[str, Any]
SETTINGS = "\nSettings:"
"""Separates the docstring of settings from the list of their meanings."""

Count = Annotated[int, Ge(1), Le(2_000_000_000)]
"""A number, width or length up to 32 bits; free memory may limit it further."""
CountOrZero = Annotated[int, Ge(0), Le(2_000_000_000)]
Depth = Annotated[int, Ge(1), Le(100)]
"""A number of stacked layers or blocks."""
Widths = Annotated[tuple[Count, ...], MaxLen(100)]
"""Widths of stacked layers."""
Rounds = Annotated[int, Ge(1), Le(1_000_000)]
"""A number of repetitions, such as epochs."""
Resamples = Annotated[int, Ge(0), Le(1_000_000)]
"""Number of bootstrap draws; 0: none."""
Weight = Annotated[float, Ge(0), Le(1e6)]
"""A weight of a term in a sum, or an exponent; products must fit in float32."""
Positive = Annotated[float, Ge(1e-6), Le(1e6)]
"""A factor or a divisor; products and quotients must fit in float32."""


if TYPE_CHECKING:  # type checkers read the fields
    from pydantic._internal._model_construction import ModelMetaclass as _SettingsClass
else:

    class _SettingsClass(type(BaseModel)):
        """Makes the constructor of settings raise our error, which `ForetasteError` catches."""

        def __call__(cls, *args: object, **settings: object) -> object:
            if args:
                bases = [base for base in cls.__bases__ if issubclass(base, BaseModel)]
                inherited = {name for base in bases for name in base.model_fields}
                names = [name for name in cls.model_fields if name != "kind"]
                first = min(names, key=inherited.__contains__, default="name")  # its own first
                raise ConfigError(
                    f"{cls.__name__} takes its settings by name, such as "
                    f"{cls.__name__}({first}=…), not {shown(args[0])}",
                    value=args[0],
                )
            try:
                return super().__call__(**settings)
            except ValidationError as error:
                raise config_error(error, cls, settings, source=cls.__name__) from None

        def __dir__(cls) -> list[str]:
            """List the settings; `help` leaves out attributes that all settings inherit."""
            return [name for name in vars(cls) if not name.startswith(("_", "model_"))]


class Config(BaseModel, metaclass=_SettingsClass):
    """Settings that come from outside.

    The docstring under a field becomes its help on the command line and in the documentation.

    Raises:
        ConfigError: A setting is missing, unknown or out of range; the message names it.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )

    @classmethod
    def __pydantic_init_subclass__(cls, **_: object) -> None:
        """Let `help` show what each setting means."""
        given = []
        for name, field in cls.model_fields.items():
            default = "" if field.is_required() else f" = {shown(field.get_default())}"
            meaning = " ".join((field.description or "").split())
            given.append(f"    {name}{default}" + (f": {meaning}" if meaning else ""))
        own = inspect.cleandoc(vars(cls).get("__doc__") or "")
        cls.__doc__ = "\n".join([own, SETTINGS, *given]) if given else own

    @model_validator(mode="before")
    @classmethod
    def _as_it_is_meant(cls, settings: object) -> object:
        """Accept NumPy's values and paths as plain ones; refuse text or `true` for a number."""
        if not isinstance(settings, Mapping):
            return settings
        settings = few_unknown(cls, settings)
        found = {name: plain(value) for name, value in settings.items()}
        wrong: list[InitErrorDetails] = []
        for name, value in found.items():
            most = _most_entries(cls, name)
            if most is not None and isinstance(value, Mapping) and len(value) > most:
                many = {"error": f"has {len(value)} entries, but may have {most}"}
                problem = PydanticCustomError("value_error", "{error}", many)
                wrong.append({"type": problem, "loc": (name,), "input": name})
        if wrong:
            raise ValidationError.from_exception_data(cls.__name__, wrong)
        for name, value in found.items():
            if said := _lookalike(value, _kinds(cls, name)):
                problem = PydanticCustomError("value_error", "{error}", {"error": said})
                wrong.append({"type": problem, "loc": (name,), "input": value})
        if wrong:
            raise ValidationError.from_exception_data(cls.__name__, wrong)
        return found


def few_unknown(kind: type[BaseModel], settings: Mapping[str, object]) -> Mapping[str, object]:
    """Return settings with at most ten of the names that their class does not know.

    A request of 1 MB may have 80,000 of them, and a message about each would take a second.
    """
    if len(settings) <= len(kind.model_fields):
        return settings
    unknown = islice((name for name in settings if name not in kind.model_fields), 10)
    known = (name for name in kind.model_fields if name in settings)
    return {name: settings[name] for name in (*known, *unknown)}


_LIKE_A_VALUE = re.compile(
    r"[-+]?[\d._]+(e[-+]?\d+)?|true|false|yes|no|on|off|[tfyn]", re.IGNORECASE
)
"""Text that pydantic reads as a number or a truth value."""


def _lookalike(value: object, kinds: frozenset[type | str]) -> str | None:
    """Explain why a value is refused that could be read as a number or a truth value."""
    match value:
        case list() | tuple():
            inside = tuple(value)
        case Mapping():
            inside = tuple(value.values())
        case _:
            inside = (value,)
    for part in inside:
        if isinstance(part, bool) and kinds & {int, float} and bool not in kinds:
            return f"must be a number, not {str(part).lower()}"
        choices = sorted(repr(kind) for kind in kinds if isinstance(kind, str))
        others = kinds & {int, float, bool}
        if isinstance(part, str) and others and not kinds & {str, part}:
            if choices and not _LIKE_A_VALUE.fullmatch(part.strip()):
                continue  # the choices are then suggested
            wanted = "true or false" if others == {bool} else "a number"
            return f"must be {' or '.join([wanted, *choices])}, not the text {part!r}"
        if kinds == {bool} and not isinstance(part, bool):
            return f"must be true or false, not {shown(part)}"
    return None


def plain(value: object) -> object:
    """Return NumPy's scalars and arrays, and paths, as Python's numbers, lists and text."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if type(value).__module__ == "numpy" and hasattr(value, "tolist"):
        return value.tolist()
    return value


@cache
def _most_entries(owner: type[Config], field: str) -> int | None:
    """Return how many entries a field may have; None: any number."""
    known = owner.model_fields.get(field)
    limits = [] if known is None else [one for one in known.metadata if isinstance(one, MaxLen)]
    return limits[0].max_length if limits else None


@cache
def _kinds(owner: type[Config], field: str) -> frozenset[type | str]:
    """Return the plain types and the texts that a field may hold, including those in its lists.

    A field with sections of settings has none, because the sections check themselves.
    """
    found: set[type | str] = set()
    known = owner.model_fields.get(field)
    waiting: list[Any] = [] if known is None else [known.annotation]
    while waiting:
        hint = waiting.pop()
        parts = get_args(hint)
        if not parts:
            if not (isinstance(hint, type) and hint in (int, float, bool, str, type(None))):
                return frozenset()
            found.add(hint)
        elif get_origin(hint) is dict:
            waiting.append(parts[1])
        elif all(isinstance(part, str | int | bool) for part in parts):  # a Literal's choices
            found.update(part if isinstance(part, str) else type(part) for part in parts)
        elif getattr(hint, "__metadata__", None) is not None:
            waiting.append(parts[0])
        else:
            waiting += [part for part in parts if part is not Ellipsis]
    return frozenset(found)


def parse_settings(kind: type[C], settings: Mapping[str, object], *, source: str) -> C:
    """Check plain values, such as a recipe's, a bundle's or the command line's.

    Args:
        kind: The settings' class.
        settings: Names and values, in sections or flat.
        source: Their origin, for the message.

    Raises:
        ConfigError: A setting is missing, unknown or out of range; the message names it.
    """
    try:
        return kind.model_validate(settings)
    except ValidationError as error:
        raise config_error(error, kind, settings, source=source) from None


def config_error(
    error: ValidationError, kind: type[BaseModel], settings: object, *, source: str
) -> ConfigError:
    """Return an error that names the first wrong setting and lists all of them."""
    found = findings(error.errors(include_url=False), kind, settings)
    name, _, value = found[0]
    said = "; ".join(f"{name}: {sentence}" if name else sentence for name, sentence, _ in found)
    return ConfigError(f"{source}: {said}", name=name or None, value=value)


def findings(
    problems: Iterable[ErrorDetails], kind: type[BaseModel] | None, settings: object
) -> list[tuple[str, str, object]]:
    """Convert pydantic's findings to our own sentences.

    Args:
        problems: Its `errors()`.
        kind: The settings' class, whose names are suggested for a wrong one; None suggests none.
        settings: The checked values.

    Returns:
        For each wrong setting its dotted name, the sentence, and the value.
    """
    sentences: dict[str, list[str]] = {}
    values: dict[str, object] = {}
    for problem in problems:
        if problem["type"] == "too_short" and len(problem["input"]) >= problem["ctx"]["min_length"]:
            continue  # it is long enough; only its elements are wrong
        path = path_of(problem["loc"], settings)
        if problem["type"] == "missing":
            path = [*path, problem["loc"][-1]]
        name = ".".join(map(str, path))
        sentences.setdefault(name, []).append(_said(problem, kind))
        values.setdefault(name, problem["input"])
    return [(name, _together(said, values[name]), values[name]) for name, said in sentences.items()]


def path_of(location: tuple[int | str, ...], settings: object) -> list[int | str]:
    """Return the path of a finding: pydantic's path without the tags of unions."""
    path: list[int | str] = []
    tag: object = None
    for part in location:
        match settings:
            case Mapping() if part in settings and part != tag:
                settings = settings[part]
            case list() | tuple() if isinstance(part, int):
                settings = settings[part]
            case _:
                tag = None
                continue
        path.append(part)
        tag = settings.get("kind") if isinstance(settings, Mapping) else None
    return path


_WANTED = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing_size": "a whole number below 2^63",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "text",
    "tuple_type": "a list, such as [{value}]",
    "sequence_type": "a list, such as [{value}]",
    "sequence_str": "a list, such as [{value}]",
    "list_type": "a list, such as [{value}]",
    "dict_type": "a section of names and values",
    "mapping_type": "a section of names and values",
    "model_type": "a section of settings",
    "model_attributes_type": "a section of settings",
    "dataclass_type": "a section of settings",
    "none_required": "absent",
    "greater_than": "above {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "below {lt}",
    "less_than_equal": "at most {le}",
    "literal_error": "{expected}",
    "enum": "{expected}",
    "too_short": "a list of at least {min_length}",
    "too_long": "a list of at most {max_length}",
    "string_too_short": "text of at least {min_length} characters",
    "string_too_long": "text of at most {max_length} characters",
}
"""The requirement in pydantic's findings, for a sentence that begins with "must be"."""


def _said(problem: ErrorDetails, kind: type[BaseModel] | None) -> str:
    """Return a sentence, or only the requirement if the sentence would begin with "must be"."""
    facts, value = problem.get("ctx", {}), shown(problem["input"])
    match problem["type"]:
        case "missing":
            return "it is missing: give it"
        case "extra_forbidden":
            *section, name = problem["loc"]
            there = [] if kind is None else names_at(kind, tuple(section))
            return f"there is no such setting{_advice(str(name), there)}"
        case _ if isinstance(problem["input"], type):
            return f"must be settings, not {value}: write {problem['input'].__name__}(…)"
        case "union_tag_not_found":
            there = [] if kind is None else names_at(kind, problem["loc"])
            return f"name its kind{', one of ' * bool(there)}{', '.join(there)}"
        case "union_tag_invalid":
            there = [tag.strip(" '") for tag in str(facts["expected_tags"]).split(",")]
            return f"there is no kind {facts['tag']!r}{_advice(str(facts['tag']).lower(), there)}"
        case "value_error" | "assertion_error":
            return str(facts.get("error", problem["msg"]))
        case known if known in _WANTED:
            limits = {name: _plainly(limit) for name, limit in facts.items()}
            return "must be " + _WANTED[known].format(value=value, **limits)
        case _:
            return f"{value} is not allowed here"


def _plainly(limit: object) -> object:
    """Return a limit without a fraction of 0: 1000000, not 1000000.0 or 1e+06."""
    whole = isinstance(limit, float) and limit.is_integer() and abs(limit) < 2**53
    return int(limit) if isinstance(limit, float) and whole else limit


def _advice(name: str, there: Sequence[str]) -> str:
    """Return the end of a message about an unknown name."""
    if near := nearest(name, there):
        return f"; did you mean {near}?"
    return f"; there are {', '.join(there)}" if there else ""


def _together(said: list[str], value: object) -> str:
    """Join the requirements of a union's members, any of which is sufficient."""
    wanted = list(dict.fromkeys(one.removeprefix("must be ") for one in said if _is_wish(one)))
    others = list(dict.fromkeys(one for one in said if not _is_wish(one)))
    if not wanted or others:
        return "; ".join(others or wanted)
    return f"must be {' or '.join(wanted)}, not {shown(value)}{_near_choice(value, wanted)}"


def _near_choice(value: object, wanted: Sequence[str]) -> str:
    """Return the advice for a word that is similar to one of the quoted choices."""
    choices = [quoted for wish in wanted for quoted in wish.split("'")[1::2]]
    near = nearest(value, choices) if isinstance(value, str) else None
    return f"; did you mean {near!r}?" if near and near != value else ""


def _is_wish(sentence: str) -> bool:
    return sentence.startswith("must be ") and ", not " not in sentence


def shown(value: object) -> str:
    """Return a value in a short form for a message, without another library's words."""
    if isinstance(value, int) and value.bit_length() > 10_000:  # Python does not print it
        return "a number with thousands of digits"
    if isinstance(value, str | int | float | bool | None):
        text = repr(value)
    elif isinstance(value, type):
        return f"the class {value.__name__}"
    elif isinstance(value, list | tuple | Mapping):
        text = repr(list(value) if isinstance(value, tuple) else value)
    else:
        name = type(value).__name__
        return f"{'an' if name[0] in 'AEIOU' else 'a'} {name}"
    return text if len(text) <= 60 else f"{text[:57]}…"


def names_at(kind: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """Return the names that a section may hold, or its kinds if there are several.

    Args:
        kind: The settings' class.
        location: The path of the section in pydantic's form, with the tags of unions.
    """
    whole = _schema(kind)
    parts: Mapping[str, Schema] = whole.get("$defs", {})
    found: list[Schema] = [whole]
    for part in location:
        found = [inner for schema in found for inner in _step(schema, part, parts)]
    return [name for schema in found for name in _names(schema, parts)]


@cache
def _schema(kind: type[BaseModel]) -> Schema:
    return kind.model_json_schema()


def _step(schema: Schema, part: int | str, parts: Mapping[str, Schema]) -> Iterator[Schema]:
    options = _options(schema, parts)
    if options == [schema]:
        rest = schema.get("additionalProperties") or schema.get("items")
        inner = schema.get("properties", {}).get(part, rest)
        if isinstance(inner, Mapping):
            yield inner
        return
    tag = schema.get("discriminator", {}).get("mapping", {}).get(part, f"/{part}")
    tagged = [option for option in options if option.get("$ref", "").endswith(tag)]
    if tagged:
        yield from tagged
        return
    for option in options:
        yield from _step(option, part, parts)


def _names(schema: Schema, parts: Mapping[str, Schema]) -> Iterator[str]:
    if "discriminator" in schema:
        yield from schema["discriminator"]["mapping"]
        return
    for option in _options(schema, parts):
        yield from option.get("properties", ()) if option is schema else _names(option, parts)


def _options(schema: Schema, parts: Mapping[str, Schema]) -> list[Schema]:
    """Return the schemas behind a schema: a referenced one, the members of a union, or itself."""
    if "$ref" in schema:
        return [parts[schema["$ref"].rpartition("/")[2]]]
    return [*schema.get("anyOf", ()), *schema.get("oneOf", ())] or [schema]


class RangeConfig(Config):
    """A setting that the search draws from a range."""

    low: float
    """The lowest value."""
    high: float
    """The highest value."""
    log: bool = False
    """Whether values are drawn log-uniformly."""


class ChoiceConfig(Config):
    """A setting that the search draws from a list."""

    choices: tuple[bool | int | float | str, ...] = Field(min_length=1)
    """The values, one of which is drawn uniformly."""


Space = Mapping[str, RangeConfig | ChoiceConfig]
"""Maps a setting's name to the values that a search may give it."""


class Usual(NamedTuple):
    """A model's training defaults in `fit`, `compare` and `tune`. They are an attribute of the
    model's settings class, `usual`, whose docstring has the reasons.
    """

    objective: Mapping[str, object] = {}
    """The objective's settings, including its `kind`; empty for models in closed form."""
    training: Mapping[str, Any] = {}
    """Settings of the training loop that depend on the model: the learning rate, the weight
    average, and the maximum number of events in a step."""
    l2_by_counts: Literal["never", "without features", "always"] = "never"
    """When the objective's l2 is larger for data with few events per user and item. With features
    of users or items, a larger l2 would leave all preferences to the features, and a new user
    without features would have none."""

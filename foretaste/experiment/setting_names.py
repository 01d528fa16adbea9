"""Which settings may stand at a place of a recipe, for messages about one that may not."""

from collections.abc import Iterator, Mapping
from typing import Any

from foretaste.config import Config

Schema = Mapping[str, Any]


def names_at(kind: type[Config], location: tuple[int | str, ...]) -> list[str]:
    """Return the names that a section may hold, or its kinds where it is of several.

    Args:
        kind: The settings' class.
        location: Where the section stands, as pydantic says it: with the tags of unions.
    """
    whole = kind.model_json_schema()
    parts: Mapping[str, Schema] = whole.get("$defs", {})
    found: list[Schema] = [whole]
    for part in location:
        found = [inner for schema in found for inner in _step(schema, part, parts)]
    return [name for schema in found for name in _names(schema, parts)]


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
    """Return what a schema stands for: another one by name, several, or itself."""
    if "$ref" in schema:
        return [parts[schema["$ref"].rpartition("/")[2]]]
    return [*schema.get("anyOf", ()), *schema.get("oneOf", ())] or [schema]

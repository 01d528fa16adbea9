"""What a person should know about an answer, in sentences."""

from collections.abc import Mapping
from typing import Any

from foretaste.serving.answer import Source


def notes(
    source: Source,
    *,
    found: int,
    k: int,
    unknown: Mapping[int | str, None],
    stranger: object = None,
) -> tuple[str, ...]:
    """Say who and what is unknown, and why a list is of popular items, or short.

    Args:
        source: Where the answer came from.
        found: How many items it has.
        k: How many were asked for.
        unknown: Ids of items.
        stranger: The id of a user whom training never saw.
    """
    said = [] if stranger is None else [f"user {stranger!r} is unknown to training"]
    if unknown:
        some = ", ".join(repr(item_id) for item_id in list(unknown)[:5])
        more = ", …" if len(unknown) > 5 else ""
        said.append(f"{len(unknown)} item ids are unknown to training: {some}{more}")
    if source == "popular":
        said.append("nothing is known to go by: these are the most popular items")
    if found < k:
        said.append(f"{k} were asked for, and {found} are all that may be answered")
    return tuple(said)


def told_in_vain(
    whose: str,
    told: Mapping[Any, object] | None,
    *,
    used: bool,
    known: bool = False,
    uncounted: bool = False,
) -> tuple[str, ...]:
    """Say if features were told and had no influence; of whom training knows, none have.

    Args:
        whose: "users", "items" or "moments".
        told: The features.
        used: Whether the model read them.
        known: Whether training knows the user whose they are.
        uncounted: Whether they are of new items in an answer of popular ones.
    """
    if not told or (used and not known):
        return ()
    if uncounted:
        return ("the features told had no influence: new items have no place among popular ones",)
    if used:
        return ("the features told had no influence: training knows this user by its own",)
    return (
        f"the features told had no influence: this model reads none of {whose} here, or training "
        "saw no such value",
    )

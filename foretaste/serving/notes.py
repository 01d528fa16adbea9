"""What a person should know about an answer, in sentences."""

from collections.abc import Mapping

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
        stranger: The id of an unknown user.
    """
    said = [] if stranger is None else [f"user {stranger!r} is unknown to training"]
    if unknown:
        some = ", ".join(repr(item_id) for item_id in list(unknown)[:5])
        more = ", …" if len(unknown) > 5 else ""
        what = "item id is" if len(unknown) == 1 else "item ids are"
        said.append(f"{len(unknown)} {what} unknown to training: {some}{more}")
    if source == "popular":
        said.append("nothing is known to go by: these are the most popular items")
    if found < k:
        said.append(f"{k} were asked for, and {found} are all that may be answered")
    return tuple(said)

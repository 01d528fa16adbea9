"""`foretaste recommend` and `foretaste similar`: answers at the prompt, or lists in a file."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

import foretaste as ft
from foretaste.cli.show import JsonFlag, ReplaceFlag, answer, table

Bundle = Annotated[Path, typer.Argument(help="Folder of a bundle.")]
Features = Annotated[
    str | None, typer.Option(help='What is known of it, as JSON: {"genres": ["Comedy"]}')
]
ListLength = Annotated[int, typer.Option("-k", "--k", min=1, help="Length of the list.")]


def recommend(
    bundle: Bundle,
    *,
    user: Annotated[str | None, typer.Option(help="A user id.")] = None,
    history: Annotated[
        list[str] | None,
        typer.Option(help="Item ids, oldest first: between commas, or given several times."),
    ] = None,
    features: Features = None,
    context: Annotated[
        str | None, typer.Option(help='What is known of the moment, as JSON: {"hour": 9}')
    ] = None,
    users: Annotated[
        Path | None,
        typer.Option(help="File of user ids: one a line, or a table's column of users."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="With --users: lists as .parquet, .csv, .json or .jsonl.")
    ] = None,
    replace: ReplaceFlag = False,
    k: ListLength = 10,
    weights: Annotated[
        list[str] | None,
        typer.Option("--weight", metavar="TASK=VALUE", help="What a unit of a task counts: buy=5"),
    ] = None,
    rules: Annotated[
        list[str] | None,
        typer.Option(
            "--rule",
            metavar="NAME=VALUE",
            help="Also: where.year.at_least=1990, caps.genres=2, diversity.relevance=0.7",
        ),
    ] = None,
    seen: Annotated[bool, typer.Option("--seen", help="Allow items that the user had.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Recommend for a user, for a history, for an unknown user, or for a file of users."""
    if (users is None) != (out is None):
        raise typer.BadParameter("--users and --out go together")
    alone = (user, history, features, context, weights)
    if users is not None and any(told is not None for told in alone):
        raise typer.BadParameter(
            "--users goes without --user, --history, --features, --context and --weight"
        )
    kept = ft.parse_settings(ft.Rules, ft.with_overrides({}, rules or ()), source="--rule")
    told, moment = _told(features), _told(context, "--context")
    weighed = _weights(weights) if weights else None
    if users is not None and out is not None:
        ft.check_place(out, replace=replace)
        written = ft.write_lists(
            ft.load(bundle),
            users,
            out,
            k=k,
            exclude_seen=not seen,
            rules=kept,
            replace=replace,
        )
        notes = _notes(written)
        answer(written, f"{written['users']} lists in {out}", *notes, as_json=as_json)
        return
    recommender = ft.load(bundle)
    past = _history(history or (), recommender.trained.events.items)
    found = recommender.recommend(
        user,
        history=past,
        features=told,
        context=moment,
        k=k,
        exclude_seen=not seen,
        weights=weighed,
        rules=kept,
    )
    known = "this history" if past else "these features" if told else "an unknown user"
    title = f"for {known if user is None else user}"
    unknown = user is not None and not found.user_known
    near = recommender.trained.events.users.spelled_like(user) if unknown else None
    hints = [] if near is None else [f"did you mean {near}?"]
    _answer(found, title, *hints, as_json=as_json)


def similar(
    bundle: Bundle,
    *,
    item: Annotated[str, typer.Option(help="An item id.")],
    features: Features = None,
    k: ListLength = 10,
    as_json: JsonFlag = False,
) -> None:
    """Show the items most like one; a new item by its features."""
    told = _told(features)
    found = ft.load(bundle).similar(item, k, features=told)
    _answer(found, f"like {item}", as_json=as_json)


def _history(given: Sequence[str], items: "ft.Vocabulary") -> list[str]:
    """Return the item ids: a text that is no item of training is taken apart at its commas."""
    found = []
    for text in given:
        parts = [text] if items.find(text) >= 0 else [part.strip() for part in text.split(",")]
        found += [part for part in parts if part]
    return found


def _told(text: str | None, option: str = "--features") -> dict[str, object] | None:
    if text is None:
        return None
    try:
        told = json.loads(text)
    except json.JSONDecodeError as error:
        raise typer.BadParameter(
            f'{option} is not JSON, as {{"age": 30}} is: look at character {error.pos + 1}'
        ) from error
    if not isinstance(told, dict):
        raise typer.BadParameter(f'{option} is a JSON object, such as {{"age": 30}}')
    return told


def _weights(told: list[str]) -> dict[str, float]:
    parts = [text.partition("=") for text in told]
    try:
        return {name.strip(): float(value) for name, _, value in parts}
    except ValueError as error:
        raise typer.BadParameter("--weight is a task and a number, such as buy=5") from error


def _answer(found: "ft.Answer", title: str, *hints: str, as_json: bool) -> None:
    tasks = tuple(dict.fromkeys(task for row in found.rows for task in row.predictions))
    rows = [
        (
            place,
            str(row.item_id),
            row.title,
            row.score,
            *(row.predictions.get(task, "") for task in tasks),
            row.source,
        )
        for place, row in enumerate(found.rows, 1)
    ]
    made = table(title, ("", "item", "title", "score", *tasks, "from"), rows)
    answer(asdict(found), made, *found.notes, *hints, as_json=as_json)


def _notes(written: Mapping[str, object]) -> list[str]:
    notes = written["notes"]
    said = [f"· {note}" for note in notes] if isinstance(notes, list) else []
    counts = ((written["unknown"], "are unknown to training"), (written["missing"], "had no id"))
    return [*said, *(f"· {count} of the users {what}" for count, what in counts if count)]

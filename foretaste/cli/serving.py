"""Commands for answers: `recommend`, `similar`, `inspect`, `serve`, `token`, `quickstart`."""

import ctypes
import gc
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

import foretaste as ft
from foretaste.cli.show import DataDir, JsonFlag, ReplaceFlag, answer, log, pairs, table

Bundle = Annotated[Path, typer.Argument(help="Folder of a bundle.")]
Features = Annotated[str | None, typer.Option(help='Its features, as JSON: {"genres": ["Comedy"]}')]
ListLength = Annotated[int, typer.Option("-k", "--k", min=1, help="Length of the list.")]


def recommend(
    bundle: Bundle,
    *,
    user: Annotated[str | None, typer.Option(help="A user id.")] = None,
    history: Annotated[
        list[str] | None,
        typer.Option(help="Item ids, oldest first: separated by commas, or given several times."),
    ] = None,
    features: Features = None,
    context: Annotated[
        str | None, typer.Option(help='Features of the context, as JSON: {"hour": 9}')
    ] = None,
    users: Annotated[
        Path | None,
        typer.Option(help="File of user ids: one per line, or a table with a column of users."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="With --users: lists as .parquet, .csv, .json or .jsonl.")
    ] = None,
    replace: ReplaceFlag = False,
    k: ListLength = 10,
    weights: Annotated[
        list[str] | None,
        typer.Option(
            "--weight",
            metavar="TASK=VALUE",
            help="Weight of a task per unit of its prediction: buy=5",
        ),
    ] = None,
    rules: Annotated[
        list[str] | None,
        typer.Option(
            "--rule",
            metavar="NAME=VALUE",
            help="A rule, such as where.year.at_least=1990, caps.genres=2, diversity.relevance=0.7",
        ),
    ] = None,
    seen: Annotated[
        bool, typer.Option("--seen", help="Allow items that the user already had.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Recommend for a user, for a history, for an unknown user, or for a file of users."""
    if (users is None) != (out is None):
        raise typer.BadParameter("--users and --out go together")
    alone = (user, history, features, context, weights)
    if users is not None and any(sent is not None for sent in alone):
        raise typer.BadParameter(
            "--users cannot be used with --user, --history, --features, --context or --weight"
        )
    kept = ft.parse_settings(ft.Rules, ft.with_overrides({}, rules or ()), source="--rule")
    sent, moment = _sent(features), _sent(context, "--context")
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
        features=sent,
        context=moment,
        k=k,
        exclude_seen=not seen,
        weights=weighed,
        rules=kept,
    )
    known = "this history" if past else "these features" if sent else "an unknown user"
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
    """Show the items most similar to one; a new item is given by its features."""
    sent = _sent(features)
    found = ft.load(bundle).similar(item, k, features=sent)
    _answer(found, f"like {item}", as_json=as_json)


def inspect(
    bundle: Bundle,
    *,
    as_json: JsonFlag = False,
) -> None:
    """Show a bundle's settings, versions, files and figures; every checksum is verified."""
    found = ft.inspect_bundle(bundle)
    answer(found.to_json(), pairs(str(bundle), found.facts()), as_json=as_json)


def _history(given: Sequence[str], items: "ft.Vocabulary") -> list[str]:
    """Return the item ids; a text that is not a training item is split at commas."""
    found = []
    for text in given:
        parts = [text] if items.find(text) >= 0 else [part.strip() for part in text.split(",")]
        found += [part for part in parts if part]
    return found


def _sent(text: str | None, option: str = "--features") -> dict[str, object] | None:
    if text is None:
        return None
    try:
        sent = json.loads(text)
    except json.JSONDecodeError as error:
        raise typer.BadParameter(
            f'{option} is not JSON, as {{"age": 30}} is: look at character {error.pos + 1}'
        ) from error
    if not isinstance(sent, dict):
        raise typer.BadParameter(f'{option} is a JSON object, such as {{"age": 30}}')
    return sent


def _weights(sent: list[str]) -> dict[str, float]:
    parts = [text.partition("=") for text in sent]
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
    counts = (
        (written["unknown"], "are not in the training data"),
        (written["missing"], "had no id"),
    )
    return [*said, *(f"· {count} of the users {what}" for count, what in counts if count)]


def serve(
    bundle: Bundle,
    *,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port to listen on; 0 picks a free one.")
    ] = 8000,
    state: Annotated[
        str,
        typer.Option(
            help="Where live events are stored: an SQLite file, a database URL, or beside (the "
            "bundle)."
        ),
    ] = "beside",
    token: Annotated[
        str | None,
        typer.Option(
            help="Requests must carry it as Bearer token; better given as FORETASTE_TOKEN."
        ),
    ] = None,
    token_file: Annotated[
        Path | None,
        typer.Option(help="File of tokens and their hashes, as `foretaste token` writes it."),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Another setting: max_k=200"),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Answer over HTTP, with the page, until it is stopped."""
    _share_heaps()
    if token is None:
        token = os.environ.get("FORETASTE_TOKEN")  # an empty token is an unset secret, and an error
    given = {"host": host, "port": port, "state": state, "token": token, "token_file": token_file}
    settings = ft.parse_settings(
        ft.ServerSettings, ft.with_overrides(given, overrides or ()), source="serve"
    )
    ft.serve(bundle, settings=settings, announce=partial(announce, as_json=as_json))
    gc.freeze()  # the process ends next, after a last collection that would take seconds


def _share_heaps() -> None:
    """Let all threads use four heaps of the C library, because each keeps what is free in it.

    With one, threads wait for each other. Called before torch is imported, whose threads would get
    heaps of their own.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:  # glibc
        mallopt(-8, 4)  # M_ARENA_MAX


def token(
    path: Annotated[Path, typer.Argument(help="File of tokens, created if it does not exist.")],
    name: Annotated[str, typer.Argument(help="Name of the token in the log.")],
    *,
    role: Annotated[
        list[str] | None,
        typer.Option(
            help="read (the default), write (live events) or admin; may be given several times."
        ),
    ] = None,
    requests_per_minute: Annotated[
        int | None, typer.Option(min=1, help="Maximum number of requests per minute.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Make a token for `serve --token-file`; it is shown once, and the file holds its hash."""
    made = ft.add_token(
        path, name, roles=role or ("read",), requests_per_minute=requests_per_minute
    )
    answer({"name": name, "token": made}, f"{made}\n", as_json=as_json)


def sign(
    bundle: Annotated[Path, typer.Argument(help="Folder of a bundle.")],
    *,
    key: Annotated[Path, typer.Option(help="File with the key, 32 random bytes or more.")],
    as_json: JsonFlag = False,
) -> None:
    """Sign a bundle, so that a server with the setting `signature_key` accepts it."""
    ft.sign_bundle(bundle, key)
    answer({"bundle": str(bundle)}, f"signed {bundle}\n", as_json=as_json)


def announce(line: str, *, as_json: bool) -> None:
    """Print the line that ends with the server's address."""
    answer({"address": line.split()[-1]}, line.strip(), as_json=as_json)


def quickstart(
    *,
    serve: Annotated[bool, typer.Option(help="Serve the page at the end.")] = True,
    data_dir: DataDir = None,
    out: Annotated[Path, typer.Option(help="Folder of the bundle to write.")] = Path("quickstart"),
    replace: ReplaceFlag = False,
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port to listen on; 0 picks a free one.")
    ] = 8000,
    as_json: JsonFlag = False,
) -> None:
    """Train, measure and serve a recommender on MovieLens-100K, in a few minutes."""
    found = ft.run_quickstart(out, data_dir=data_dir, replace=replace, say=log)
    answer(found.to_json(), *found.tables, *found.sentences, as_json=as_json)
    log(f"to serve it again: foretaste serve {out}")
    if serve:
        settings = ft.ServerSettings(port=port)
        ft.serve(out, settings=settings, announce=partial(announce, as_json=as_json))

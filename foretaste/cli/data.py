"""`foretaste data`: import of tables, audits, schemas and public data sets."""

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import typer

import foretaste as ft
from foretaste.cli.show import JsonFlag, ReplaceFlag, answer, pairs, table
from foretaste.data.read_config import ReadConfig

app = typer.Typer(
    help="Import events, audit them, get public data sets.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


_SINGULAR = {"columns": "column"}
"""Options that may be repeated have a singular name."""


_TABLES = ("users", "items", "user_links", "item_links")
_ARGUMENT = re.compile(
    rf"(?<![\w./])({'|'.join([*ReadConfig.model_fields, *_TABLES])})="
    r"""(True|False|NAME|'[^']*'|"[^"]*")?(?=$|[\s,;:)?])"""
)
"""An argument of `read_interactions` within a sentence, such as drop_incomplete=True."""


def in_words_of(sentence: str, command: str) -> str:
    """Return a sentence with the command's own names for arguments of reading.

    These are options of `foretaste data`, or settings if a recipe names the data.
    """
    if command == "data":
        return _ARGUMENT.sub(_as_option, sentence)
    if command in ("fit", "evaluate", "tune", "compare"):
        return _ARGUMENT.sub(_as_setting, sentence)
    return sentence


def _as_option(found: re.Match[str]) -> str:
    name, value = found[1], found[2] or ""
    flag = _SINGULAR.get(name, name).replace("_", "-")
    match value:
        case "True":
            return f"--{flag}"
        case "False":
            return f"--no-{flag}"
        case _:
            return f"--{flag} {value}".rstrip()


def _as_setting(found: re.Match[str]) -> str:
    value = found[2] or ""
    return f"data.{found[1]} = {value.lower() if value in ('True', 'False') else value}".rstrip(
        " ="
    )


def reading_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command an option for each setting of reading; it receives them as `reading`."""

    @wraps(command)
    def call(**options: Any) -> None:
        given = {name: options.pop(_SINGULAR.get(name, name)) for name in ReadConfig.model_fields}
        lists = {name: value or () for name, value in given.items() if _is_list(name)}
        command(**options, reading=given | lists)

    signature, hints = inspect.signature(command), get_type_hints(command, include_extras=True)
    parameters = [one for name, one in signature.parameters.items() if name != "reading"]
    for name, field in ReadConfig.model_fields.items():
        option, default = _SINGULAR.get(name, name), None if _is_list(name) else field.default
        kind: Any = field.annotation
        if str in get_args(kind) or _is_list(name):  # on the command line, columns have names
            kind = list[str] | None if _is_list(name) else str if default else str | None
        sentence = " ".join((field.description or "").split()).partition(". ")[0].rstrip(".")
        flag = [f"--{option.replace('_', '-')}"] if default is False else []
        hints[option] = Annotated[kind, typer.Option(*flag, help=f"{sentence}.")]
        parameters.append(
            inspect.Parameter(option, inspect.Parameter.KEYWORD_ONLY, default=default)
        )
    del hints["reading"]
    call.__annotations__ = hints
    call.__signature__ = signature.replace(  # type: ignore[attr-defined]  # typer reads it
        parameters=[one.replace(annotation=hints[one.name]) for one in parameters]
    )
    return call


def _is_list(name: str) -> bool:
    return isinstance(ReadConfig.model_fields[name].default, tuple)


@app.command("import")
@reading_options
def import_(
    files: Annotated[list[Path], typer.Argument(help="CSV, TSV or Parquet files, read in order.")],
    *,
    out: Annotated[Path, typer.Option(help="Folder of the event store to write.")],
    replace: ReplaceFlag = False,
    no_users: Annotated[
        bool, typer.Option("--no-users", help="There are no users: every row is its own user.")
    ] = False,
    no_items: Annotated[
        bool, typer.Option("--no-items", help="There are no items: all rows belong to one item.")
    ] = False,
    users: Annotated[Path | None, typer.Option(help="Table about users.")] = None,
    items: Annotated[
        Path | None, typer.Option(help="Table of items, such as their titles.")
    ] = None,
    user_links: Annotated[
        Path | None,
        typer.Option(help="Table of two columns of user ids, such as users and those they trust."),
    ] = None,
    item_links: Annotated[
        Path | None, typer.Option(help="Table of two columns of item ids that go together.")
    ] = None,
    as_json: JsonFlag = False,
    reading: Mapping[str, Any],
) -> None:
    """Read tables of events into an event store that opens at once whatever its size."""
    without = {"user": None} if no_users else {}
    without |= {"item": None} if no_items else {}
    tables = {"users": users, "items": items, "user_links": user_links, "item_links": item_links}
    arguments = {**reading, **without, **tables}
    events = ft.import_events(files, out=out, replace=replace, **arguments)
    _show(str(out), _summary(events, out), as_json=as_json)


@app.command()
@reading_options
def schema(
    sources: Annotated[
        list[Path], typer.Argument(help="Folder of an event store, or files of events.")
    ],
    *,
    users: Annotated[Path | None, typer.Option(help="Table about users.")] = None,
    items: Annotated[Path | None, typer.Option(help="Table about items.")] = None,
    as_json: JsonFlag = False,
    reading: Mapping[str, Any],
) -> None:
    """Propose which columns are features; print a file for a recipe: features = "FILE"."""
    if len(sources) == 1 and sources[0].is_dir():
        events = ft.open_store(sources[0])
    else:
        events = ft.read_interactions(sources, **{**reading, "users": users, "items": items})
    found = ft.inspect_schema(events)
    answer(found.model_dump(), ft.schema_to_toml(found).strip(), as_json=as_json)


@app.command()
def audit(
    store: Annotated[Path, typer.Argument(help="Folder of an event store.")],
    *,
    label: Annotated[
        list[str] | None, typer.Option(help="A column to predict, which nothing else may reveal.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Look for leaks and errors: repeats, impossible times, columns and ids that reveal labels."""
    found = ft.audit_events(ft.open_store(store), labels=label or ())
    findings = [asdict(finding) for finding in found]
    rows = [(f["severity"], f["what"], f["count"], f["sentence"]) for f in findings]
    shown = table(f"audit of {store}", ("", "what", "count", ""), rows) if rows else "found nothing"
    answer({"store": str(store), "findings": findings}, shown, as_json=as_json)


@app.command()
def get(
    name: Annotated[str, typer.Argument(help="Name of the data set, such as ml-100k.")],
    *,
    data_dir: Annotated[
        Path | None, typer.Option(help="Folder that already has its files.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Also write it as an event store, in this folder.")
    ] = None,
    replace: ReplaceFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """Download a public data set into the cache, and verify its checksum."""
    if out is not None:
        ft.check_place(out, "event store", replace=replace)
    dataset = ft.get_dataset(name, data_dir=data_dir)
    if out is not None:
        ft.write_store(dataset.events, out, replace=replace)
    summary = {
        **_summary(dataset.events, out),
        "origin": dataset.origin,
        "licence": dataset.licence,
    }
    _show(name, summary, as_json=as_json)


def _show(title: str, summary: dict[str, object], *, as_json: bool) -> None:
    notes = summary["notes"]
    shown = {name: value for name, value in summary.items() if name != "notes"}
    lines = [f"· {in_words_of(note, 'data')}" for note in notes] if isinstance(notes, list) else []
    answer(summary, pairs(title, shown), *lines, as_json=as_json)


def _summary(events: "ft.Interactions", out: Path | None) -> dict[str, object]:
    return {
        "store": None if out is None else str(out),
        "events": len(events),
        "users": events.num_users,
        "items": events.num_items,
        "columns": list(events.columns),
        "context": [] if events.context is None else events.context.columns,
        "notes": list(events.notes),
    }

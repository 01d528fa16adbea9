"""`foretaste data`: tables into an event store, what an audit sees, public data sets."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

import foretaste as ft
from foretaste.cli.show import JsonFlag, answer, pairs, table

app = typer.Typer(help="Import events, audit them, get public data sets.", no_args_is_help=True)


@app.command("import")
def import_(
    files: Annotated[list[Path], typer.Argument(help="CSV, TSV or Parquet files, read in order.")],
    *,
    out: Annotated[Path, typer.Option(help="Folder of the event store to write.")],
    user: Annotated[str, typer.Option(help="Column of user ids.")] = "user_id",
    item: Annotated[str, typer.Option(help="Column of item ids.")] = "item_id",
    no_users: Annotated[
        bool, typer.Option("--no-users", help="There are none: every row is a user of its own.")
    ] = False,
    no_items: Annotated[
        bool, typer.Option("--no-items", help="There are none: every row is of one item.")
    ] = False,
    timestamp: Annotated[str | None, typer.Option(help="Column of times.")] = None,
    timestamp_unit: Annotated[
        Literal["s", "ms", "us", "ns"], typer.Option(help="What numbers in it count, since 1970.")
    ] = "s",
    rating: Annotated[str | None, typer.Option(help="Column of ratings.")] = None,
    column: Annotated[
        list[str] | None, typer.Option(help="A further column of numbers to keep: a label, say.")
    ] = None,
    context: Annotated[
        list[str] | None, typer.Option(help="A column of the moment to keep, of any type.")
    ] = None,
    separator: Annotated[
        str | None, typer.Option(help="Between the fields; without it, the first line tells.")
    ] = None,
    header: Annotated[
        bool, typer.Option(help="Without a header, columns are named 0, 1 and so on.")
    ] = True,
    users: Annotated[Path | None, typer.Option(help="Table about users.")] = None,
    items: Annotated[Path | None, typer.Option(help="Table about items: titles, say.")] = None,
    user_links: Annotated[
        Path | None, typer.Option(help="Table of two columns of user ids: who trusts whom.")
    ] = None,
    item_links: Annotated[
        Path | None, typer.Option(help="Table of two columns of item ids that go together.")
    ] = None,
    duplicates: Annotated[
        Literal["keep", "first", "last"], typer.Option(help="Which of repeated events to keep.")
    ] = "keep",
    drop_incomplete: Annotated[
        bool, typer.Option("--drop-incomplete", help="Leave out rows with a missing value.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Read tables of events into an event store that opens at once whatever its size."""
    events = ft.read_interactions(
        files,
        user=None if no_users else user,
        item=None if no_items else item,
        timestamp=timestamp,
        timestamp_unit=timestamp_unit,
        rating=rating,
        columns=column or (),
        context=context or (),
        separator=separator,
        header=header,
        users=users,
        items=items,
        user_links=user_links,
        item_links=item_links,
        duplicates=duplicates,
        drop_incomplete=drop_incomplete,
    )
    ft.write_store(events, out)
    _show(str(out), _summary(events, out), as_json=as_json)


@app.command()
def audit(
    store: Annotated[Path, typer.Argument(help="Folder of an event store.")],
    *,
    label: Annotated[
        list[str] | None, typer.Option(help="A column to be predicted, which nothing may tell.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Look for leaks and faults: repeats, impossible times, columns and ids that tell too much."""
    found = ft.audit_events(ft.open_store(store), labels=label or ())
    findings = [asdict(finding) for finding in found]
    rows = [(f["severity"], f["what"], f["count"], f["sentence"]) for f in findings]
    shown = table(f"audit of {store}", ("", "what", "count", ""), rows) if rows else "found nothing"
    answer({"store": str(store), "findings": findings}, shown, as_json=as_json)


@app.command()
def get(
    name: Annotated[str, typer.Argument(help="Such as ml-100k.")],
    *,
    data_dir: Annotated[Path | None, typer.Option(help="Where its files lie already.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write it as an event store too.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Get a public data set into the cache, its checksum verified."""
    dataset = ft.get_dataset(name, data_dir=data_dir)
    if out is not None:
        ft.write_store(dataset.events, out)
    summary = {
        **_summary(dataset.events, out),
        "origin": dataset.origin,
        "licence": dataset.licence,
    }
    _show(name, summary, as_json=as_json)


def _show(title: str, summary: dict[str, object], *, as_json: bool) -> None:
    notes = summary["notes"]
    shown = {name: value for name, value in summary.items() if name != "notes"}
    lines = [f"· {note}" for note in notes] if isinstance(notes, list) else []
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

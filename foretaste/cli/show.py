"""How every command answers: for people by default, one JSON document with `--json`."""

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.table import Table

ReplaceFlag = Annotated[
    bool, typer.Option("--replace", help="Replace what an earlier run wrote there.")
]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON document instead.")]

_people = Console()
_log = Console(stderr=True)


def answer(document: object, *people: object, as_json: bool) -> None:
    """Print the document as JSON, or what is meant for people, to standard output."""
    if as_json:
        sys.stdout.write(json.dumps(document, default=str, allow_nan=False) + "\n")
        return
    for part in people:
        is_table = isinstance(part, Table)
        shown = part if is_table else str(part)
        _people.print(shown, highlight=False, markup=False, soft_wrap=not is_table)


def log(line: str) -> None:
    """Print a line to standard error."""
    _log.print(line, highlight=False, markup=False, soft_wrap=True)


def fail(sentence: str) -> NoReturn:
    """End with the one line that says why the work failed, and exit code 1."""
    log(f"foretaste: {' '.join(sentence.split())}")
    sys.exit(1)


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> Table:
    """Return a table for people; numbers stand to the right."""
    rows = [list(row) for row in rows]
    made = Table(title=title or None, title_justify="left")
    for place, name in enumerate(columns):
        number = all(isinstance(row[place], int | float) for row in rows)
        made.add_column(name, justify="right" if number and rows else "left")
    for row in rows:
        made.add_row(*(_cell(value) for value in row))
    return made


def heading(metric: str) -> str:
    """Return a metric's name as people write it: `hit_rate_at_10` is "hit rate @10"."""
    return metric.replace("_at_", " @").replace("_", " ")


def pairs(title: str, values: Mapping[str, object]) -> Table:
    """Return names and values, one a line."""
    return table(title, ("", "value"), [(name, _cell(value)) for name, value in values.items()])


def _cell(value: object) -> str:
    match value:
        case None:
            return ""
        case float():
            return f"{value:.4f}" if abs(value) < 10 else f"{value:,.1f}"
        case bool():
            return "yes" if value else "no"
        case int():
            return f"{value:,}"
        case list():
            return ", ".join(map(str, value))
        case _:
            return str(value)

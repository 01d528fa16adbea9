"""The output of every command: text by default, one JSON document with `--json`.

In a pipe or a file, ids, names and sentences are not shortened; characters that the stream cannot
encode are replaced. In JSON, NaN and infinity are null.
"""

import io
import json
import os
import signal
import sys
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from foretaste.shown import json_value

ReplaceFlag = Annotated[
    bool, typer.Option("--replace", help="Replace the output of an earlier run.")
]
JsonFlag = Annotated[
    bool, typer.Option("--json", help="Print one JSON document instead; NaN and infinity are null.")
]
DataDir = Annotated[Path | None, typer.Option(help="Folder that already has the data files.")]

_BROKEN_PIPE = 128 + signal.SIGPIPE if hasattr(signal, "SIGPIPE") else 1
_WIDE = 1_000_000
_PLAIN_LINES = dict.fromkeys(range(9472, 9600), "+") | str.maketrans("─━│┃", "--||")
"""Replacements of table lines that a stream cannot encode."""


class Stopped(BaseException):
    """Raised at Ctrl-C or SIGTERM; the message describes what was kept."""

    def __init__(self, signum: int, kept: str = "stopped") -> None:
        super().__init__(kept)
        self.code = 128 + signum
        self.signum = signum


@contextmanager
def stoppable() -> Iterator[None]:
    """Raise `Stopped` at Ctrl-C or SIGTERM, and restore the handlers at the end."""

    def stop(signum: int, _: FrameType | None) -> None:
        raise Stopped(signum)

    before = {}
    with suppress(ValueError):  # only the main thread handles signals
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
                before[number] = signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def answer(document: object, *people: object, as_json: bool) -> None:
    """Print the document as JSON, or the text, to standard output."""
    if as_json:
        text = json.dumps(json_value(document), allow_nan=False) + "\n"
    else:
        text = "".join(map(_for_people, people))
    if sys.stdout is None:
        fail("the answer cannot be written: standard output is closed")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
        if not sys.stdout.encoding.lower().startswith("utf"):
            text = text.translate(_PLAIN_LINES)
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader needs no more, such as `head`
        _forget_output()
        sys.exit(_BROKEN_PIPE)
    except OSError as error:
        _forget_output()
        fail(f"the answer cannot be written to standard output: {error.strerror}")


def log(line: str) -> None:
    """Print a line to standard error; nothing happens if that is closed."""
    with suppress(OSError, AttributeError):
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()


def fail(sentence: str, code: int = 1) -> NoReturn:
    """Print one line with the reason of a failure, and end with its exit code."""
    log(f"foretaste: {' '.join(sentence.split())}")
    sys.exit(code)


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> Table:
    """Return a table as text; numbers are aligned right."""
    rows = [list(row) for row in rows]
    made = Table(title=Text(one_line(title)) if title else None)
    for place, name in enumerate(columns):
        number = all(isinstance(row[place], int | float) for row in rows)
        justify = "right" if number and rows else "left"
        made.add_column(Text(name), justify=justify, overflow="fold")  # type: ignore[arg-type]
    for row in rows:
        made.add_row(*(Text(one_line(_cell(value))) for value in row))
    return made


def pairs(title: str, values: Mapping[str, object]) -> Table:
    """Return names and values, one per line."""
    return table(title, ("", "value"), [(name, _cell(value)) for name, value in values.items()])


def one_line(text: str) -> str:
    """Return a text with escaped line ends and control characters."""
    return "".join(
        repr(mark)[1:-1] if unicodedata.category(mark) in ("Cc", "Zl", "Zp") else mark
        for mark in text
    )


def _for_people(part: object) -> str:
    if not isinstance(part, Table):
        return f"{part}\n"
    title, part.title = part.title, None
    is_terminal = sys.stdout is not None and sys.stdout.isatty()
    page = io.StringIO()
    width = None if is_terminal else _WIDE
    Console(file=page, width=width, force_terminal=is_terminal).print(part, highlight=False)
    return (f"{title}\n" if title else "") + page.getvalue()


def _forget_output() -> None:
    """Discard pending output, so that the process ends without an error message."""
    with suppress(OSError, ValueError, io.UnsupportedOperation):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _cell(value: object) -> str:
    match value:
        case None:
            return ""
        case float():
            return f"{value:.4f}" if abs(value) < 10 else f"{value:.1f}"
        case bool():
            return "yes" if value else "no"
        case list():
            return ", ".join(map(str, value))
        case _:
            return str(value)

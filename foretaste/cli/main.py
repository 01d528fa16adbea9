"""The command line: each command reads settings, calls one library function and prints.

Importing `foretaste` is cheap, because each name imports its module at first use, so help and wrong
calls are answered at once.
"""

import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, cast

import typer
from pydantic import ValidationError

import foretaste as ft
from foretaste.cli import data, serving, training
from foretaste.cli.show import Stopped, answer, fail, stoppable
from foretaste.config import findings

_WrongCall = cast("type[typer.BadParameter]", typer.BadParameter.__mro__[2])
"""The base of typer's errors for wrong calls, which typer does not export."""

app = typer.Typer(
    help=ft.__doc__,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(data.app, name="data")
_COMMANDS: tuple[Callable[..., None], ...] = (
    serving.quickstart,
    training.fit,
    training.plan,
    training.evaluate,
    training.tune,
    training.compare,
    serving.recommend,
    serving.similar,
    serving.inspect,
    training.compress,
    serving.serve,
    serving.token,
    serving.sign,
)
for _command in _COMMANDS:
    app.command()(_command)


def _version(wanted: bool | None) -> None:  # noqa: FBT001 - required by typer
    if wanted:
        answer({}, f"foretaste {ft.__version__}", as_json=False)
        raise typer.Exit


@app.callback()
def _foretaste(
    *,
    version: Annotated[
        bool | None,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", help="Log more to standard error.")] = False,
) -> None:
    level = logging.INFO if verbose else logging.WARNING
    logging.basicConfig(stream=sys.stderr, level=level, format="%(levelname)s %(message)s")


def run(arguments: Sequence[str] | None = None) -> None:
    """Run the command line: exit code 0, 1 (the work failed: one line says why), 2 (a wrong call).

    The exit code after Ctrl-C is 130, and after SIGTERM 143.

    Args:
        arguments: The arguments after `foretaste`; by default, those of the process.
    """
    # OpenMP reads this when torch is loaded: a waiting thread spins for a short time, then sleeps.
    # Without sleep, a SASRec step with two threads took 5 to 10 times as long on a busy machine;
    # with immediate sleep, it took 3 times as long on a quiet machine.
    os.environ.setdefault("GOMP_SPINCOUNT", "100000")
    try:
        with stoppable():
            sys.exit(app(arguments, standalone_mode=False) or 0)
    except _WrongCall as error:
        if isinstance(error.__cause__, ValidationError):
            found = findings(error.__cause__.errors(), None, None)
            error.message = "; ".join(sentence for _, sentence, _ in found)
        error.show()
        sys.exit(error.exit_code)
    except ft.ForetasteError as error:
        words = sys.argv[1:] if arguments is None else arguments
        fail(data.in_words_of(str(error), words[0] if words else ""))
    except Stopped as stop:
        fail(str(stop), stop.code)
    except MemoryError:
        fail("there is not enough memory for this: choose smaller sizes")


if __name__ == "__main__":
    run()

"""`foretaste serve`, the HTTP server with the page, and `foretaste token`, who may ask it what."""

import os
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

import foretaste as ft
from foretaste.cli.show import JsonFlag, answer


def serve(
    bundle: Annotated[Path, typer.Argument(help="Folder of a bundle.")],
    *,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes any free one.")] = 8000,
    state: Annotated[
        str, typer.Option(help="Live events: a file for SQLite, a database URL, or beside.")
    ] = "beside",
    token: Annotated[
        str | None,
        typer.Option(
            help="Requests must carry it as Bearer token; better given as FORETASTE_TOKEN."
        ),
    ] = None,
    token_file: Annotated[
        Path | None, typer.Option(help="Tokens by their hashes, as `foretaste token` writes them.")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Another setting: max_k=200"),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Answer over HTTP, with the page, until told to stop."""
    if token is None:
        token = os.environ.get("FORETASTE_TOKEN")  # an empty one is refused: a secret not set
    given = {"host": host, "port": port, "state": state, "token": token, "token_file": token_file}
    settings = ft.parse_settings(
        ft.ServerSettings, ft.with_overrides(given, overrides or ()), source="serve"
    )
    ft.serve(bundle, settings=settings, announce=partial(announce, as_json=as_json))


def token(
    path: Annotated[Path, typer.Argument(help="File of tokens, made where there is none.")],
    name: Annotated[str, typer.Argument(help="What the log calls the token.")],
    *,
    role: Annotated[
        list[str] | None,
        typer.Option(
            help="read (if none is given), write (live events) or admin; may be repeated."
        ),
    ] = None,
    requests_per_minute: Annotated[
        int | None, typer.Option(min=1, help="At most so many requests; none: no bound.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Make a token for `serve --token-file`; it is shown once, and the file holds its hash."""
    made = ft.add_token(
        path, name, roles=role or ("read",), requests_per_minute=requests_per_minute
    )
    answer({"name": name, "token": made}, f"{made}\n", as_json=as_json)


def announce(line: str, *, as_json: bool) -> None:
    """Print the line that ends with the server's address."""
    answer({"address": line.split()[-1]}, line.strip(), as_json=as_json)

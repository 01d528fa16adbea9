"""`foretaste serve`: the HTTP server with the page."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

import foretaste as ft
from foretaste.cli.show import JsonFlag, answer, log


def serve(
    bundle: Annotated[Path, typer.Argument(help="Folder of a bundle.")],
    *,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes any free one.")] = 8000,
    state: Annotated[
        str, typer.Option(help="Live events: a file for SQLite, a database URL, or beside.")
    ] = "beside",
    token: Annotated[
        str, typer.Option(envvar="FORETASTE_TOKEN", help="Requests must carry it as Bearer token.")
    ] = "",
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Another setting: max_k=200"),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Answer over HTTP, with the page, until told to stop."""
    given = {"host": host, "port": port, "state": state, "token": token}
    settings = ft.parse_settings(
        ft.ServerSettings, ft.with_overrides(given, overrides or ()), source="serve"
    )
    if settings.host not in ("127.0.0.1", "localhost", "::1") and not settings.token:
        log(f"{settings.host} is open to other machines, and no token is asked for: give --token")
    ft.serve(bundle, settings=settings, announce=partial(announce, as_json=as_json))


def announce(line: str, *, as_json: bool) -> None:
    """Print the line that ends with the server's address."""
    answer({"address": line.split()[-1]}, line.strip(), as_json=as_json)

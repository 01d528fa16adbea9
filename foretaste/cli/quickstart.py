"""`foretaste quickstart`: the whole path on a small real data set."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

import foretaste as ft
from foretaste.cli.fit import DataDir
from foretaste.cli.serve import announce
from foretaste.cli.show import JsonFlag, ReplaceFlag, answer, heading, log, table


def quickstart(
    *,
    serve: Annotated[bool, typer.Option(help="Serve the page when all is done.")] = True,
    data_dir: DataDir = None,
    out: Annotated[Path, typer.Option(help="Folder of the bundle to write.")] = Path("quickstart"),
    replace: ReplaceFlag = False,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes any free one.")] = 8000,
    as_json: JsonFlag = False,
) -> None:
    """Train, measure and serve a recommender on MovieLens-100K, in a few minutes."""
    found = ft.run_quickstart(out, data_dir=data_dir, replace=replace, say=log)
    tables = [
        table(part.title, ("model", *map(heading, part.columns)), part.rows)
        for part in found.tables
    ]
    answer(found.to_json(), *tables, *found.sentences, as_json=as_json)
    log(f"to serve it again: foretaste serve {out}")
    if serve:
        settings = ft.ServerSettings(port=port)
        ft.serve(out, settings=settings, announce=partial(announce, as_json=as_json))

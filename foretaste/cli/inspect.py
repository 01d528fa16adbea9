"""`foretaste inspect`: what is inside a bundle."""

from pathlib import Path
from typing import Annotated

import typer

import foretaste as ft
from foretaste.cli.show import JsonFlag, answer, pairs


def inspect(
    bundle: Annotated[Path, typer.Argument(help="Folder of a bundle.")],
    *,
    as_json: JsonFlag = False,
) -> None:
    """Show a bundle's settings, versions, files and figures; every checksum is verified."""
    found = ft.inspect_bundle(bundle)
    answer(found.to_json(), pairs(str(bundle), found.facts()), as_json=as_json)

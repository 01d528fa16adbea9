"""`foretaste inspect` and `compress`: what is inside a bundle, and how small it can be."""

import json
from pathlib import Path
from typing import Annotated

import typer

import foretaste as ft
from foretaste.cli.fit import DataDir
from foretaste.cli.show import JsonFlag, answer, pairs


def inspect(
    bundle: Annotated[Path, typer.Argument(help="Folder of a bundle.")],
    *,
    as_json: JsonFlag = False,
) -> None:
    """Show a bundle's settings, versions, files and figures; every checksum is verified."""
    found = ft.inspect_bundle(bundle)
    answer(found.to_json(), pairs(str(bundle), found.facts()), as_json=as_json)


def compress(
    bundle: Annotated[Path, typer.Argument(help="Folder of a bundle with dense tables.")],
    *,
    recipe: Annotated[
        Path | None, typer.Option(help="Measure on this recipe's data and split instead.")
    ] = None,
    metric: Annotated[str, typer.Option(help="What is to be kept.")] = "ndcg_at_10",
    out: Annotated[
        Path | None, typer.Option(help="Where the recommended bundle is written, if one is.")
    ] = None,
    kind: Annotated[
        str | None, typer.Option(help="Write and measure this kind alone, such as int8.")
    ] = None,
    data_dir: DataDir = None,
    as_json: JsonFlag = False,
) -> None:
    """Measure smaller tables on the bundle's test part, and write one that is worth it."""
    if out is not None:
        ft.check_place(out, "bundle")
    asked = None if recipe is None else ft.read_experiment(recipe, data_dir=data_dir)
    tables = [] if kind is None else [{"kind": kind}]
    found = ft.compress(bundle, tables=tables, recipe=asked, data_dir=data_dir, metric=metric)
    chosen = {"kind": kind} if kind else found.recommended and found.recommended.table
    if out is not None and chosen:
        smaller = ft.compress_tables(ft.load(bundle).trained, chosen)
        ft.build_recommender(smaller).save(out)
    answer(json.loads(found.to_json()), found, as_json=as_json)

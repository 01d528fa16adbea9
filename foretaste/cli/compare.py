"""`foretaste compare`: several models on the same data, and which one to take."""

from pathlib import Path
from typing import Annotated

import typer

import foretaste as ft
from foretaste.cli.fit import DataDir, Overrides
from foretaste.cli.show import JsonFlag, ReplaceFlag, answer, log


def compare(
    recipes: Annotated[list[Path], typer.Argument(help="Recipes of the same data and split.")],
    *,
    families: Annotated[
        str | None,
        typer.Option(help="Instead of the one recipe's model, these kinds, between commas."),
    ] = None,
    budget_seconds: Annotated[
        float | None, typer.Option(help="For all trainings together; without it, no end is set.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the table, the picture and the best bundle.")
    ] = None,
    replace: ReplaceFlag = False,
    seeds: Annotated[
        str | None,
        typer.Option(help="Train each model once with each, between commas: 0,1,2"),
    ] = None,
    overrides: Overrides = None,
    data_dir: DataDir = None,
    as_json: JsonFlag = False,
) -> None:
    """Train several models and the baselines, measure all in one way, and say which to take."""
    if families is not None and len(recipes) > 1:
        raise typer.BadParameter("--families takes its data and split from one recipe")
    configs = ft.read_recipes(recipes, overrides=overrides or (), data_dir=data_dir)
    first = next(iter(configs.values()))
    if families is not None:
        configs = ft.family_recipes(first, [name.strip() for name in families.split(",")])
    if out is not None:
        ft.check_place(out / "bundle", "bundle", replace=replace)
    split = ft.read_split(first, data_dir=data_dir)
    found = ft.compare_models(
        configs,
        split,
        budget_seconds=budget_seconds,
        folder=out,
        replace=replace,
        say=log,
        seeds=None if seeds is None else _numbers(seeds),
    )
    if out is not None:
        log(f"wrote the table, the picture and the bundle of {found.pick} into {out}")
    answer(found.to_json(), str(found), as_json=as_json)


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(
            f"--seeds takes whole numbers between commas, as in 0,1,2, not {text!r}"
        ) from None

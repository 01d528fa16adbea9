"""`foretaste fit` and `foretaste evaluate`: from a recipe to a bundle, and what it is worth."""

import json
from pathlib import Path
from typing import Annotated

import typer

import foretaste as ft
from foretaste.cli.show import JsonFlag, ReplaceFlag, Stopped, answer, log

Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="Replace a setting: model.dropout=0.5"),
]
DataDir = Annotated[Path | None, typer.Option(help="Where the data's files lie already.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on where it was stopped.")]


def fit(
    recipe: Annotated[Path, typer.Argument(help="A recipe, in TOML.")],
    *,
    out: Annotated[Path, typer.Option(help="Folder of the bundle to write.")],
    overrides: Overrides = None,
    resume: Resume = False,
    replace: ReplaceFlag = False,
    data_dir: DataDir = None,
    result: Annotated[Path | None, typer.Option(help="Record the run in this JSON file.")] = None,
    track: Annotated[ft.TrackerKind | None, typer.Option(help="Where to follow the run.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Train a recipe's model, report it on the test part, and write the bundle."""
    config = ft.read_experiment(recipe, overrides=overrides or (), data_dir=data_dir)
    folder = ft.start_run(out, result=result, resume=resume, replace=replace, track=track)
    split = ft.read_split(config, data_dir=data_dir)
    for note in split.events.notes:
        log(note)
    try:
        run = ft.run_experiment(config, split, folder=folder, resume=resume, track=track)
    except Stopped as stop:
        raise Stopped(stop.signum, _kept(ft.stopped_after(folder), folder)) from stop
    trained, report = run.final
    for note in trained.notes:
        log(note)
    ft.to_recommender(trained, report).save(out, replace=resume or replace)
    if result is not None:
        record = ft.record_run(run, config, recipe=recipe.stem, overrides=overrides or ())
        ft.write_record(record, result, replace=resume or replace)
    log(f"wrote {out}; checkpoints and the log of steps are in {folder}")
    answer(json.loads(report.to_json(per_user=False)), report, as_json=as_json)


def _kept(epochs: int | None, folder: Path) -> str:
    if epochs is None:
        return "stopped: there is no checkpoint yet, so start again"
    return f"stopped at epoch {epochs + 1}: {folder} holds a checkpoint, and --resume goes on"


def evaluate(
    bundle: Annotated[Path, typer.Argument(help="Folder of a bundle.")],
    *,
    recipe: Annotated[
        Path | None, typer.Option(help="Measure on this recipe's data and split instead.")
    ] = None,
    overrides: Overrides = None,
    data_dir: DataDir = None,
    as_json: JsonFlag = False,
) -> None:
    """Measure a bundle on the test part of the recipe that it was made from."""
    recommender = ft.load(bundle)
    config = (
        ft.recipe_of(recommender.trained)
        if recipe is None
        else ft.read_experiment(recipe, data_dir=data_dir)
    )
    config = ft.override(config, overrides or ())
    split = ft.read_split(config, data_dir=data_dir)
    report = ft.evaluate_split(recommender.trained, config, split)
    answer(json.loads(report.to_json(per_user=False)), report, as_json=as_json)

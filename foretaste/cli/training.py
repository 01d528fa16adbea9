"""Commands that train and measure: `fit`, `evaluate`, `tune`, `compare` and `compress`."""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import foretaste as ft
from foretaste.cli.show import (
    DataDir,
    JsonFlag,
    ReplaceFlag,
    Stopped,
    answer,
    fail,
    log,
    pairs,
    table,
)

if TYPE_CHECKING:
    from foretaste.experiment.tune import TrialRow
    from foretaste.training.processes import Together

Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="Replace a setting: model.dropout=0.5"),
]
Resume = Annotated[bool, typer.Option("--resume", help="Continue a run that was stopped.")]


def fit(
    recipe: Annotated[Path, typer.Argument(help="A recipe, in TOML.")],
    *,
    out: Annotated[Path, typer.Option(help="Folder of the bundle to write.")],
    overrides: Overrides = None,
    resume: Resume = False,
    replace: ReplaceFlag = False,
    data_dir: DataDir = None,
    result: Annotated[Path | None, typer.Option(help="Record the run in this JSON file.")] = None,
    track: Annotated[
        ft.TrackerKind | None, typer.Option(help="Where the run is logged: tensorboard or mlflow.")
    ] = None,
    processes: Annotated[
        int, typer.Option(min=1, help="Number of processes on this machine that train together.")
    ] = 1,
    process_timeout: Annotated[
        float, typer.Option(min=1, help="Seconds that a process waits for another one in a step.")
    ] = 600.0,
    as_json: JsonFlag = False,
) -> None:
    """Train a recipe's model, report it on the test part, and write the bundle."""
    read = partial(ft.read_experiment, recipe, overrides=overrides or (), data_dir=data_dir)
    if processes > 1:
        read()
        options: dict[str, object] = {"--out": out, "--data-dir": data_dir}
        options |= {"--result": result, "--track": track, "--process-timeout": process_timeout}
        flags = {"--resume": resume, "--replace": replace, "--json": as_json}
        _start(processes, recipe, options, flags, overrides or ())
        return
    with _together(process_timeout) as together:
        config = together.first_goes(read)
        folder = ft.start_run(out, result=result, resume=resume, replace=replace, track=track)
        split = together.first_goes(partial(ft.read_split, config, data_dir=data_dir))
        for note in split.events.notes if together.is_first else ():
            log(note)
        try:
            run = ft.run_experiment(config, split, folder=folder, resume=resume, track=track)
        except Stopped as stop:
            raise Stopped(stop.signum, _kept(ft.stopped_after(folder), folder)) from stop
        if not together.is_first:
            return
    trained, report = run.final
    for note in trained.notes:
        log(note)
    ft.to_recommender(trained, report).save(out, replace=resume or replace)
    if result is not None:
        record = ft.record_run(run, config, recipe=recipe.stem, overrides=overrides or ())
        ft.write_record(record, result, replace=resume or replace)
    log(f"wrote {out}; checkpoints and the log of steps are in {folder}")
    answer(json.loads(report.to_json(per_user=False)), report, as_json=as_json)


def _start(
    num: int,
    recipe: Path,
    options: Mapping[str, object],
    flags: Mapping[str, bool],
    overrides: Sequence[str],
) -> None:
    """Run this command in several processes, and end as they ended."""
    given = [str(word) for name, value in options.items() if value for word in (name, value)]
    given += [name for name, is_set in flags.items() if is_set]
    given += [word for override in overrides for word in ("--set", override)]
    signum = ft.start_processes(num, ["-m", "foretaste", "fit", str(recipe), *given])
    if signum:
        sys.exit(128 + signum)


@contextmanager
def _together(timeout_seconds: float) -> Iterator["Together"]:
    """Join the processes that torchrun started; only the first one reports that it was stopped."""
    with ft.joined_processes(timeout_seconds=timeout_seconds) as together:
        try:
            yield together
        except Stopped as stop:
            if together.is_first:
                raise
            sys.exit(stop.code)
        except ft.ProcessError as error:
            if together.is_first:
                fail(str(error), ft.ProcessError.followed)
            sys.exit(ft.ProcessError.followed)


def _kept(epochs: int | None, folder: Path) -> str:
    if epochs is None:
        return "stopped: there is no checkpoint yet, so start again"
    return f"stopped at epoch {epochs + 1}: {folder} holds a checkpoint, and --resume continues"


def plan(
    recipe: Annotated[Path, typer.Argument(help="A recipe, in TOML.")],
    *,
    events: Annotated[float, typer.Option(min=1, help="Number of events, such as 1e9.")],
    users: Annotated[float, typer.Option(min=1, help="Number of users.")],
    items: Annotated[float, typer.Option(min=1, help="Number of items.")],
    processes: Annotated[int, typer.Option(min=1, help="Number of processes.")] = 1,
    overrides: Overrides = None,
    as_json: JsonFlag = False,
) -> None:
    """Estimate memory, traffic and hours of a recipe at another size, by a ten-second run."""
    config = ft.read_experiment(recipe, overrides=overrides or ())
    found = ft.plan_size(
        config, events=round(events), users=round(users), items=round(items), processes=processes
    )
    columns = ("table", "rows", "width", "GiB in all", "GiB of each process")
    rows = [
        (t.name, t.rows, t.width, t.bytes_in_all / 2**30, t.bytes_of_each / 2**30)
        for t in found.tables
    ]
    figures = {
        "GiB of each process, all weights": found.bytes_of_each / 2**30,
        "GiB of events on the disk": found.events_bytes / 2**30,
        "MiB a step, sent by each process": found.traffic_bytes / 2**20,
        "steps of an epoch": found.steps,
        "events a second of a process, measured here": round(found.events_per_second),
        "hours of all epochs": found.hours,
    }
    answer(found.document(), table("", columns, rows), pairs("", figures), as_json=as_json)


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
    """Measure a bundle on the test part of its recipe."""
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


def tune(
    recipe: Annotated[
        Path, typer.Argument(help="A recipe; its [tune] section defines the search.")
    ],
    *,
    out: Annotated[Path, typer.Option(help="Folder of the study and the best recipe.")] = Path(
        "tuned"
    ),
    trials: Annotated[
        int | None,
        typer.Option(min=1, help="Number of trials, including those of a resumed search."),
    ] = None,
    max_seconds: Annotated[
        float | None,
        typer.Option(help="Start no trial after this time, and stop the last one then."),
    ] = None,
    resume: Resume = False,
    replace: ReplaceFlag = False,
    overrides: Overrides = None,
    data_dir: DataDir = None,
    as_json: JsonFlag = False,
) -> None:
    """Search a recipe's settings by validation; write the best as a recipe."""
    config = ft.read_experiment(recipe, overrides=overrides or (), data_dir=data_dir)
    ft.check_place(out / "best.toml", replace=True)
    split = ft.read_split(config, data_dir=data_dir)
    try:
        found = ft.tune(
            config,
            split,
            folder=out,
            trials=trials,
            max_seconds=max_seconds,
            resume=resume,
            replace=replace,
            watch=partial(_log, trials=trials or config.tune.trials, seen=[]),
        )
    except Stopped as stop:
        kept = f"stopped: its trials are in {out}, and --resume continues them"
        raise Stopped(stop.signum, kept) from stop
    frame = found.to_frame()
    rows = [(*row[:4], *map(str, row[4:])) for row in frame.rows()]
    made = table(f"{found.metric} on validation, best first", frame.columns, rows)
    log(f"{found.ended}; the trials took {found.seconds:.1f} s")
    answer(found.to_json(), made, f"best recipe: {out / 'best.toml'}", as_json=as_json)


def _log(trial: "TrialRow", *, trials: int, seen: list[int]) -> None:
    """Print a completed trial, and after the first one an estimate of the remaining time."""
    value = "" if trial.value is None else f"{trial.value:.4f} "
    settings = ", ".join(f"{name} = {drawn}" for name, drawn in trial.settings.items())
    log(f"trial {trial.number}: {trial.state} {value}{settings}")
    left = trials - trial.number - 1
    if not seen and left > 0:
        log(
            f"this trial took {trial.seconds:.1f} s: about {trial.seconds * left:.0f} s for "
            f"{left} more"
        )
    seen.append(trial.number)


def compare(
    recipes: Annotated[list[Path], typer.Argument(help="Recipes with the same data and split.")],
    *,
    families: Annotated[
        str | None,
        typer.Option(
            help="Kinds of models, separated by commas, in place of the one recipe's model."
        ),
    ] = None,
    budget_seconds: Annotated[
        float | None, typer.Option(help="Time for all trainings together; without it, no limit.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the table, the chart and the bundle of the best model."),
    ] = None,
    replace: ReplaceFlag = False,
    seeds: Annotated[
        str | None,
        typer.Option(help="Train each model once with each seed, separated by commas: 0,1,2"),
    ] = None,
    overrides: Overrides = None,
    data_dir: DataDir = None,
    as_json: JsonFlag = False,
) -> None:
    """Train several models and the baselines, measure all in the same way, and recommend one."""
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
        log(f"wrote the table, the chart and the bundle of {found.pick} into {out}")
    answer(found.to_json(), str(found), as_json=as_json)


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(
            f"--seeds takes whole numbers separated by commas, as in 0,1,2, not {text!r}"
        ) from None


def compress(
    bundle: Annotated[Path, typer.Argument(help="Folder of a bundle with dense tables.")],
    *,
    recipe: Annotated[
        Path | None, typer.Option(help="Measure on this recipe's data and split instead.")
    ] = None,
    metric: Annotated[
        str, typer.Option(help="Metric of the report by which the tables are compared.")
    ] = "ndcg_at_10",
    out: Annotated[
        Path | None, typer.Option(help="Folder for the recommended bundle, if there is one.")
    ] = None,
    kind: Annotated[
        str | None, typer.Option(help="Measure and write only this kind, such as int8.")
    ] = None,
    retrain: Annotated[
        bool, typer.Option("--retrain", help="Also train the recipe again with trainable kinds.")
    ] = False,
    chart: Annotated[Path | None, typer.Option(help="SVG file for a chart.")] = None,
    data_dir: DataDir = None,
    as_json: JsonFlag = False,
) -> None:
    """Measure smaller tables on the bundle's test part, and write the recommended bundle."""
    if out is not None:
        ft.check_place(out, "bundle")
    if chart is not None:
        ft.check_place(chart)
    asked = None if recipe is None else ft.read_experiment(recipe, data_dir=data_dir)
    tables = [] if kind is None else [{"kind": kind}]
    found = ft.compress(
        bundle,
        tables=tables,
        retrain=retrain,
        recipe=asked,
        data_dir=data_dir,
        metric=metric,
        out=out,
    )
    if chart is not None:
        chart.write_text(ft.frontier_svg(found), encoding="utf-8")
    answer(json.loads(found.to_json()), found, as_json=as_json)

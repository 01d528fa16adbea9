"""`foretaste tune`: the search."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import foretaste as ft
from foretaste.cli.fit import DataDir, Overrides, Resume
from foretaste.cli.show import JsonFlag, ReplaceFlag, Stopped, answer, log, table

if TYPE_CHECKING:
    from foretaste.experiment.tune import TrialRow


def tune(
    recipe: Annotated[Path, typer.Argument(help="A recipe; its [tune] says what is searched.")],
    *,
    out: Annotated[Path, typer.Option(help="Folder of the study and the best recipe.")] = Path(
        "tuned"
    ),
    trials: Annotated[int | None, typer.Option(min=1, help="In all, resumed ones too.")] = None,
    max_seconds: Annotated[
        float | None, typer.Option(help="Begin no trial after so long, and end the last one there.")
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
        kept = f"stopped: its trials are in {out}, and --resume goes on with them"
        raise Stopped(stop.signum, kept) from stop
    frame = found.to_frame()
    rows = [(*row[:4], *map(str, row[4:])) for row in frame.rows()]
    made = table(f"{found.metric} on validation, best first", frame.columns, rows)
    log(f"{found.ended}; they took {found.seconds:.1f} s")
    answer(found.to_json(), made, f"best recipe: {out / 'best.toml'}", as_json=as_json)


def _log(trial: "TrialRow", *, trials: int, seen: list[int]) -> None:
    """Print a trial that ended, and after the first one about how long the others will take."""
    value = "" if trial.value is None else f"{trial.value:.4f} "
    settings = ", ".join(f"{name} = {drawn}" for name, drawn in trial.settings.items())
    log(f"trial {trial.number}: {trial.state} {value}{settings}")
    left = trials - trial.number - 1
    if not seen and left > 0:
        log(f"it took {trial.seconds:.1f} s: about {trial.seconds * left:.0f} s for {left} more")
    seen.append(trial.number)

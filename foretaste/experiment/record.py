"""The record of a run that counts: what was run, where, and what came out."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from foretaste.arguments import checked
from foretaste.data.disk import whole_file
from foretaste.experiment.facts import run_facts
from foretaste.experiment.recipe import ExperimentConfig
from foretaste.experiment.run import Run


@checked
def record_run(
    run: Run, config: ExperimentConfig, *, recipe: str, overrides: Sequence[str] = ()
) -> dict[str, object]:
    """Return what `recipes/results/NAME.json` holds, as plain JSON values.

    `metrics` are those of the model that was trained without the validation events;
    `refitted` holds those of the one trained with them, where the recipe asks for it.

    Args:
        run: What the recipe gave.
        config: The recipe.
        recipe: Its name, as the README's table shows it.
        overrides: What was changed on the command line.
    """
    changes = "".join(f" --set {override}" for override in overrides)
    record: dict[str, object] = {
        "recipe": recipe,
        "command": f"foretaste fit recipes/{recipe}.toml --out {recipe}{changes}",
        "seed": config.seed,
        **run_facts(),
        "train_seconds": round(run.trained.train_seconds, 1),
        "epochs": run.trained.log.get("best_epoch", 0),
        "metrics": dict(run.report.metrics),
        "intervals": {name: list(ends) for name, ends in run.report.intervals.items()},
    }
    if run.refitted is not None and run.refitted_report is not None:
        record["refitted"] = {
            "train_seconds": round(run.refitted.train_seconds, 1),
            "metrics": dict(run.refitted_report.metrics),
            "intervals": {n: list(ends) for n, ends in run.refitted_report.intervals.items()},
        }
    return record | {"published": dict(config.published), "notes": config.notes}


@checked
def write_record(record: Mapping[str, object], path: str | Path, *, replace: bool = False) -> None:
    """Write a record, whole or not at all.

    Raises:
        DataError: A file is there and `replace` is false, or the disk is full or refuses.
    """
    with whole_file(path, replace=replace) as part:
        part.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")

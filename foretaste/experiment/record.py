"""The record of a run that counts: what was run, where, and what came out."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from foretaste.arguments import checked
from foretaste.data.folder import whole_file
from foretaste.evaluation.reports import Reports
from foretaste.experiment.facts import run_facts
from foretaste.experiment.learning import usual_objective
from foretaste.experiment.recipe import ExperimentConfig, Negatives, Protocol
from foretaste.experiment.run import Run
from foretaste.models.base import LearnsBy
from foretaste.models.catalogue import tasks_of
from foretaste.training.objectives.candidates import CandidateConfig
from foretaste.training.objectives.rows import RowsConfig


@checked
def record_run(
    run: Run, config: ExperimentConfig, *, recipe: str, overrides: Sequence[str] = ()
) -> dict[str, object]:
    """Return what `recipes/results/NAME.json` holds, as plain JSON values.

    `metrics` are those of the model that was trained without the validation events; `refitted`
    is about the one of the recipe's `final`, with its metrics where it did not learn from the test.

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
        **protocol_of(config, run.trained.log, learns_by=run.trained.model.learns_by).model_dump(),
        "metrics": dict(run.report.metrics),
        "intervals": {name: list(ends) for name, ends in run.report.intervals.items()},
    }
    if run.refitted is not None:
        again = run.refitted_report or Reports()
        record["refitted"] = {
            "trained_on": run.refitted.learned_from,
            "train_seconds": round(run.refitted.train_seconds, 1),
            "metrics": dict(again.metrics),
            "intervals": {name: list(ends) for name, ends in again.intervals.items()},
        }
    published: dict[str, object] = {"published": dict(config.published)}
    if config.published:
        published["published_as"] = config.published_as.model_dump()
    return record | published | {"notes": config.notes}


def protocol_of(
    config: ExperimentConfig, log: Mapping[str, object], *, learns_by: LearnsBy | None
) -> Protocol:
    """Return what a figure of a recipe's first run may be compared by.

    Args:
        config: The recipe.
        log: What training saw.
        learns_by: What its model learns from.
    """
    epochs = log.get("epochs", ())
    chosen = isinstance(epochs, list | tuple) and any(
        isinstance(epoch, Mapping) and epoch.get("validation") is not None for epoch in epochs
    )
    return Protocol(
        trained_on="train",
        negatives=_negatives(config, learns_by),
        selection="validation" if chosen else "fixed epochs",
    )


def _negatives(config: ExperimentConfig, learns_by: LearnsBy | None) -> Negatives:
    objective, tasks = config.objective, tasks_of(config.model)
    if tasks:
        rows = objective if isinstance(objective, RowsConfig) else RowsConfig()
        return "drawn again" if rows.num_negatives(tasks) else "fixed"
    if learns_by in ("events", None):
        return "none"
    learned = objective if isinstance(objective, CandidateConfig) else usual_objective(config.model)
    drawn = not isinstance(learned, CandidateConfig) or learned.loss != "softmax"
    return "drawn again" if drawn else "all items"


@checked
def write_record(record: Mapping[str, object], path: str | Path, *, replace: bool = False) -> None:
    """Write a record, whole or not at all.

    Raises:
        DataError: A file is there and `replace` is false, or the disk is full or refuses.
    """
    with whole_file(path, replace=replace) as part:
        part.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")

"""Comparing rankers by what they predict of labelled rows, where lists are not asked for.

Shape legend: N rows, T tasks.
"""

import statistics
import time
from collections.abc import Mapping, Sequence

import numpy as np

from foretaste.data.parts import TEST
from foretaste.data.rows import rows_of
from foretaste.data.splits import Split
from foretaste.data.tasks import Task
from foretaste.errors import ConfigError
from foretaste.evaluation.compare import Comparison
from foretaste.evaluation.compare_rows import compare_rows
from foretaste.evaluation.measure_rows import Predicted, measure_rows
from foretaste.evaluation.rows import predict_tasks, ranker_of, rows_to_judge
from foretaste.evaluation.rows_report import RowsReport
from foretaste.experiment.compare_table import (
    FailedModel,
    Measured,
    ModelComparison,
    ModelRow,
    TaskFigure,
    choose,
    model_row,
)
from foretaste.experiment.recipe import ExperimentConfig
from foretaste.models.catalogue import tasks_of
from foretaste.training.trained import Trained

BASE_RATE = "base rate"
"""The baseline's name: to every row it says the mean label of training."""
_TIMED_ROWS, _TIMES = 1000, 7


def common_tasks(recipes: Mapping[str, ExperimentConfig], split: Split) -> tuple[Task, ...]:
    """Return the tasks by which recipes are compared; none where lists are what is asked for.

    Args:
        recipes: By name; in the first one's order.
        split: Their data: with one item only, there are no lists.

    Raises:
        ConfigError: Some ask for lists and others do not, a model predicts no labels, or no task
            is common to all.
    """
    (first, *others) = recipes
    asks = {name: config.evaluation.catalogue for name, config in recipes.items()}
    for name in others:
        if asks[name] != asks[first]:
            raise ConfigError(
                f"{name} has evaluation.catalogue = {str(asks[name]).lower()} and {first} "
                f"{str(asks[first]).lower()}: models are compared by their lists (true) or by "
                "labelled rows (false), so set it alike"
            )
    if asks[first] and split.events.num_items > 1:
        return ()
    without = [name for name, config in recipes.items() if not tasks_of(config.model)]
    if without:
        why = "evaluation.catalogue is false" if not asks[first] else "the data have no items"
        raise ConfigError(
            f"{why}, so models are compared by labelled rows, and {without[0]} "
            f"({recipes[without[0]].model.kind}) predicts no labels: leave it out"
        )
    common = tuple(
        task
        for task in tasks_of(recipes[first].model)
        if all(_has(recipes[name], task) for name in others)
    )
    if not common:
        told = "; ".join(
            f"{name} has {', '.join(task.name for task in tasks_of(config.model))}"
            for name, config in recipes.items()
        )
        raise ConfigError(
            f"no task is common to all recipes ({told}): a common one has the same name, kind, "
            "column, limit and levels"
        )
    return common


def _has(config: ExperimentConfig, task: Task) -> bool:
    labels = {"name", "kind", "column", "above", "levels"}
    asked = task.model_dump(include=labels)
    return any(own.model_dump(include=labels) == asked for own in tasks_of(config.model))


def compare_by_rows(
    measured: Sequence[Measured],
    failed: Sequence[FailedModel],
    split: Split,
    tasks: tuple[Task, ...],
    budget_seconds: float | None,
    *,
    notes: tuple[str, ...],
) -> ModelComparison:
    """Compare models task by task on the rows that all of them judged.

    Args:
        measured: With reports of rows, one at least; the first one's rows count.
        failed: Models without figures.
        split: What they learned from.
        tasks: Common to all; the first leads.
        budget_seconds: Of all trainings.
        notes: What the columns mean.

    Raises:
        ConfigError: The test rows' labels tell no good model of any task from a bad one.
    """
    reports = {f.name: f.report for f in measured if isinstance(f.report, RowsReport)}
    first, *_ = reports.values()
    tasks = tuple(t for t in tasks if first.name(leading(t), t.name) in first.metrics)
    if not tasks:
        raise ConfigError(
            "of no common task have the test rows labels of both classes: cut the data otherwise"
        )
    kept = [f for f in measured if reports[f.name].holdout_digest == first.holdout_digest]
    failed = [
        *failed,
        *(_judged_otherwise(f, measured[0]) for f in measured if f not in kept),
    ]
    kept.sort(key=lambda f: _badness(reports[f.name], tasks[0]))
    reports = {f.name: reports[f.name] for f in kept}
    best = reports[kept[0].name]
    floor = base_rate(best, tasks, split)
    figures = {f.name: [figure(reports[f.name], task, best) for task in tasks] for f in kept}
    rows = [model_row(f, *figures[f.name]) for f in kept]
    metric = figures[kept[0].name][0].metric
    pick, sentence = choose(rows, metric)
    more = "".join(_better_elsewhere(pick, reports, task) for task in tasks[1:])
    more += "".join(_not_learned(reports[pick], floor, t) for t in tasks)
    return ModelComparison(
        metric=metric,
        rows=(*rows, _floor(floor, tasks, best)),
        failed=tuple(failed),
        split=split.kind,
        users=best.counts["users"],
        budget_seconds=budget_seconds,
        pick=pick,
        sentence=sentence + more,
        notes=(best.notes[0], *notes),
        judged=best.counts["rows"],
    )


def _judged_otherwise(found: Measured, first: Measured) -> FailedModel:
    return FailedModel(
        name=found.name,
        kind=found.kind,
        error=f"its rows are not those of {first.name}, because other items were drawn for them: "
        "set objective.negatives alike, or evaluation.sampled_negatives for all",
    )


def _badness(report: RowsReport, task: Task) -> float:
    value = report.metrics[report.name(leading(task), task.name)]
    return -value if task.kind == "binary" else value


def _floor(report: RowsReport, tasks: tuple[Task, ...], best: RowsReport) -> ModelRow:
    first, *others = (figure(report, task, best) for task in tasks)
    return ModelRow(
        name=BASE_RATE,
        kind=BASE_RATE,
        quality=first.value,
        interval=first.interval,
        behind=first.behind,
        train_seconds=0.0,
        bundle_bytes=0,
        answer_ms=0.0,
        stopped=False,
        note="",
        metrics=report.metrics,
        settings={},
        tasks=tuple(others),
        is_baseline=True,
    )


def _better_elsewhere(pick: str, reports: Mapping[str, RowsReport], task: Task) -> str:
    """Say which model is better than the one to take at another task, if one is beyond luck."""
    name = min(reports, key=lambda name: _badness(reports[name], task))
    if name == pick:
        return ""
    found = behind(reports[name], reports[pick], task)
    if found.interval.low <= 0:
        return ""
    return f" Of {task.name}, {name} is better: by {found.difference:.4f} of {leading(task)}."


def _not_learned(report: RowsReport, floor: RowsReport, task: Task) -> str:
    if behind(report, floor, task).interval.low > 0:
        return ""
    return f" Of {task.name} it cannot be told from the {BASE_RATE}: nothing was learned there."


def leading(task: Task) -> str:
    """Return the short name of what a task is compared by."""
    return "auc" if task.kind == "binary" else "rmse"


def figure(report: RowsReport, task: Task, best: RowsReport) -> TaskFigure:
    """Return how well a model predicts a task, and how far it lies behind the best model.

    Raises:
        DataError: The task has no such figure here, such as AUC where all labels are alike.
    """
    name = report.name(leading(task), task.name)
    return TaskFigure(
        metric=f"{leading(task)}_{task.name}{report.suffix}",
        value=report.metrics[name],
        interval=report.intervals[name],
        behind=None if report is best else behind(best, report, task),
    )


def behind(better: RowsReport, other: RowsReport, task: Task) -> Comparison:
    """Return by how much one is better: AUC that it has more, or RMSE that it has less."""
    pair = (better, other) if task.kind == "binary" else (other, better)
    return compare_rows(*pair, leading(task), task=task.name)


def base_rate(report: RowsReport, tasks: Sequence[Task], split: Split) -> RowsReport:
    """Return the report of a baseline on the rows that a model was measured on.

    It says of every row the mean of the task's training labels: of a binary one, drawn items count
    as zeros.
    """
    label_ET = rows_of(split, "train", tasks=tuple(tasks)).label_ET.astype(np.float64)
    mean_T = np.nanmean(label_ET, axis=0)
    rows_each = len(report.label_NT) / np.count_nonzero(split.part_E == TEST)
    binary_T = np.array([task.kind == "binary" for task in tasks])
    mean_T[binary_T] /= rows_each
    names = [task.name for task in report.tasks]
    label_NT = report.label_NT[:, [names.index(task.name) for task in tasks]]
    return measure_rows(
        Predicted(
            name=report.holdout,
            digest=report.holdout_digest,
            tasks=tuple(tasks),
            user_N=report.user_N,
            label_NT=label_NT,
            prediction_NT=np.broadcast_to(mean_T, label_NT.shape),
            suffix=report.suffix,
        ),
        model=BASE_RATE,
        resamples=1000,
        seed=0,
        calibration={},
        settings={},
        train_seed=0,
    )


def thousand_rows_ms(trained: Trained, split: Split) -> float:
    """Return the median time in which a model judges 1,000 test rows, from their events on."""
    rows, _, _ = rows_to_judge(trained, split, part="test")
    ranker, milliseconds = ranker_of(trained), []
    index_B = np.arange(min(len(rows), _TIMED_ROWS))
    for _ in range(_TIMES):
        started = time.perf_counter()
        batch = rows.batch(index_B, reads=ranker.reads, max_len=ranker.max_len, seed=0)
        judged = predict_tasks(ranker, batch)
        seconds = time.perf_counter() - started
        milliseconds.append(seconds * 1e6 / (judged.shape[0] * judged.shape[1]))
    return statistics.median(milliseconds)

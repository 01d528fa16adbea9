"""Comparing rankers by what they predict of labelled rows, where lists are not asked for.

Shape legend: N rows, T tasks.
"""

import statistics
import time
from collections.abc import Mapping, Sequence

import numpy as np

from foretaste.data.rows import Rows
from foretaste.data.splits import Split
from foretaste.data.tasks import Task
from foretaste.errors import ConfigError
from foretaste.evaluation.compare import Comparison, compare_rows, mean_and_interval
from foretaste.evaluation.report import RowsReport
from foretaste.evaluation.rows import Predicted, measure_rows, predict_tasks, ranker_of
from foretaste.experiment.compare_advice import choose
from foretaste.experiment.compare_counts import BASE_RATE, count_baselines
from foretaste.experiment.compare_table import (
    FailedModel,
    Measured,
    ModelComparison,
    ModelRow,
    TaskFigure,
    corrected,
    difference,
    model_row,
)
from foretaste.training.trained import Trained

_TIMED_ROWS, _TIMES = 1000, 7
_RESAMPLES = 1000
_MANY_ROWS, _FEW_RESAMPLES = 300_000, 200
"""From so many rows on, baselines are resampled less often: it would take longer than training."""


def compare_by_rows(
    measured: Sequence[Measured],
    failed: Sequence[FailedModel],
    split: Split,
    tasks: tuple[Task, ...],
    budget_seconds: float | None,
    *,
    notes: tuple[str, ...],
) -> ModelComparison:
    """Compare models, and baselines that count, task by task on the rows that all of them judged.

    Args:
        measured: With reports of rows, one at least.
        failed: Models without figures.
        split: What they learned from.
        tasks: Common to all, with labels that tell models apart; the first leads.
        budget_seconds: Of all trainings.
        notes: What the columns mean.
    """
    measured = sorted(measured, key=lambda found: _badness(_reports(found), tasks[0]))
    reports = {found.name: _reports(found) for found in measured}
    best = reports[measured[0].name]
    floors, left_out = _baselines(measured[0], best[0], tasks, split)
    every = {**reports, **{name: [report] for name, report in floors.items()}}
    figures = {
        task.name: dict(
            zip(every, corrected([figure(own, task, best) for own in every.values()]), strict=True)
        )
        for task in tasks
    }
    of = {name: [figures[task.name][name] for task in tasks] for name in every}
    rows = [model_row(found, *of[found.name]) for found in measured]
    metric = rows[0].leading.metric
    users = best[0].counts["users"]
    chance = 0.5 if tasks[0].kind == "binary" else of[BASE_RATE][0].value
    pick, sentence = choose(rows, metric, users=users, chance=chance)
    beaten_by, warning = _counting_is_better(reports, floors, tasks[0])
    if beaten_by:
        sentence = f"{warning}Of the models alone, {sentence[0].lower()}{sentence[1:]}"
    sentence += "".join(_better_elsewhere(pick, reports, task) for task in tasks[1:])
    unsaid = tasks if beaten_by in ("", BASE_RATE) else tasks[1:]
    sentence += "".join(_no_better(reports[pick], floors, task) for task in unsaid)
    return ModelComparison(
        metric=metric,
        rows=(*rows, *(_floor(name, floors[name], of[name]) for name in floors)),
        failed=tuple(failed),
        split=split.kind,
        users=users,
        budget_seconds=budget_seconds,
        pick=pick,
        sentence=sentence,
        notes=(best[0].notes[0], *notes, *left_out),
        judged=best[0].counts["rows"],
        beaten_by=beaten_by,
    )


def _reports(found: Measured) -> list[RowsReport]:
    return [report for report in found.reports if isinstance(report, RowsReport)]


def _badness(reports: Sequence[RowsReport], task: Task) -> float:
    values = [report.metrics[report.name(leading(task), task.name)] for report in reports]
    return statistics.mean(values) * (-1 if task.kind == "binary" else 1)


def _baselines(
    found: Measured, report: RowsReport, tasks: tuple[Task, ...], split: Split
) -> tuple[dict[str, RowsReport], list[str]]:
    """Return the reports of baselines on a model's rows, the best first, the base rate last."""
    if found.rows is None:
        raise ConfigError(f"{found.name} was not measured by labelled rows", name=found.name)
    counted, notes = count_baselines(split, found.rows, tasks)
    names = [task.name for task in report.tasks]
    label_NT = report.label_NT[:, [names.index(task.name) for task in tasks]]
    reports = {
        one.name: measure_rows(
            Predicted(
                name=report.holdout,
                digest=report.holdout_digest,
                tasks=tasks,
                user_N=report.user_N,
                label_NT=label_NT,
                prediction_NT=one.prediction_NT,
                suffix=report.suffix,
            ),
            model=one.name,
            resamples=_RESAMPLES if len(label_NT) < _MANY_ROWS else _FEW_RESAMPLES,
            seed=0,
            calibration={},
            settings={},
            train_seed=0,
        )
        for one in counted
    }
    in_order = sorted(
        reports, key=lambda name: (name == BASE_RATE, _badness([reports[name]], tasks[0]))
    )
    return {name: reports[name] for name in in_order}, notes


def _floor(name: str, report: RowsReport, figures: Sequence[TaskFigure]) -> ModelRow:
    return ModelRow(
        name=name,
        kind=name,
        leading=figures[0],
        train_seconds=0.0,
        bundle_bytes=0,
        answer_ms=0.0,
        stopped=False,
        note="",
        metrics=report.metrics,
        settings={},
        tasks=tuple(figures[1:]),
        is_baseline=True,
    )


def _better_elsewhere(pick: str, reports: Mapping[str, list[RowsReport]], task: Task) -> str:
    """Say which model is better than the one to take at another task, if one is beyond luck."""
    name = min(reports, key=lambda name: _badness(reports[name], task))
    if name == pick:
        return ""
    found = behind(reports[name], reports[pick], task)
    if found.interval.low <= 0:
        return ""
    return f" Of {task.name}, {name} is better: by {found.difference:.4f} of {leading(task)}."


def _counting_is_better(
    reports: Mapping[str, list[RowsReport]], floors: Mapping[str, RowsReport], task: Task
) -> tuple[str, str]:
    """Return the baseline with a better figure than every model's, and a sentence; or "" and ""."""
    name, floor = _strongest(floors, task)
    best = next(iter(reports))
    found = behind([floor], reports[best], task)
    if found.difference < 0:
        return "", ""
    metric = leading(task)
    reached = floor.metrics[floor.name(metric, task.name)]
    own = figure(reports[best], task, reports[best]).value
    return name, (
        f"No model is worth taking yet: {_named(name)}, without any training, has an {metric} of "
        f"{reached:.4f} at {task.name}, and {best}, the best model, {own:.4f} (behind by "
        f"{difference(found)}). "
    )


def _no_better(reports: list[RowsReport], floors: Mapping[str, RowsReport], task: Task) -> str:
    """Say that a model is not better than a baseline beyond luck, if it is not."""
    name, floor = _strongest(floors, task)
    ahead = behind(reports, [floor], task)
    value = f"{leading(task)} is {floor.metrics[floor.name(leading(task), task.name)]:.4f}"
    if ahead.interval.high < 0:
        return f" Of {task.name}, {_named(name)} is better than it: its {value}."
    if behind(reports, [floors[BASE_RATE]], task).interval.low <= 0:
        return f" Of {task.name} it cannot be told from the {BASE_RATE}: nothing was learned there."
    if ahead.interval.low > 0:
        return ""
    return f" Of {task.name} it is not better than {_named(name)} beyond luck, whose {value}."


def _named(baseline: str) -> str:
    return f"the {BASE_RATE}" if baseline == BASE_RATE else baseline.replace("counts", "counting")


def _strongest(floors: Mapping[str, RowsReport], task: Task) -> tuple[str, RowsReport]:
    return min(floors.items(), key=lambda entry: _badness([entry[1]], task))


def leading(task: Task) -> str:
    """Return the short name of what a task is compared by."""
    return "auc" if task.kind == "binary" else "rmse"


def figure(reports: list[RowsReport], task: Task, best: list[RowsReport]) -> TaskFigure:
    """Return how well a model predicts a task, and how far it lies behind the best model.

    Args:
        reports: Of the model, one for each seed.
        task: Which.
        best: Of the best model.

    Raises:
        DataError: The task has no such figure here, such as AUC where all labels are equal.
    """
    first = reports[0]
    name = first.name(leading(task), task.name)
    values = [report.metrics[name] for report in reports]
    value, interval = values[0], first.intervals[name]
    if len(reports) > 1:
        value, interval = mean_and_interval(reports, leading(task), task.name)
    return TaskFigure(
        metric=f"{leading(task)}_{task.name}{first.suffix}",
        value=value,
        interval=interval,
        behind=None if reports is best else behind(best, reports, task),
        spread=statistics.stdev(values) if len(values) > 1 else None,
    )


def behind(better: list[RowsReport], other: list[RowsReport], task: Task) -> Comparison:
    """Return by how much one is better: AUC that it has more, or RMSE that it has less."""
    pair = (better, other) if task.kind == "binary" else (other, better)
    many = len(better[0].label_NT) >= _MANY_ROWS
    resamples = _FEW_RESAMPLES if many else 2 * _RESAMPLES
    return compare_rows(*pair, leading(task), task=task.name, resamples=resamples)


def thousand_rows_ms(trained: Trained, rows: Rows) -> float:
    """Return the median time in which a model judges 1,000 test rows, from their events on."""
    ranker, milliseconds = ranker_of(trained), []
    index_B = np.arange(min(len(rows), _TIMED_ROWS))
    for _ in range(_TIMES):
        started = time.perf_counter()
        batch = rows.batch(index_B, reads=ranker.reads, max_len=ranker.max_len, seed=0)
        judged = predict_tasks(ranker, batch)
        seconds = time.perf_counter() - started
        milliseconds.append(seconds * 1e6 / (judged.shape[0] * judged.shape[1]))
    return statistics.median(milliseconds)

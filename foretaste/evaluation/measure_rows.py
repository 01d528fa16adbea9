"""From predictions of labelled rows to their report: task by task, where a label is.

Shape legend: N rows, T tasks.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float64, Int64

from foretaste.data.tasks import Task
from foretaste.errors import ConfigError, DataError, NonFiniteError
from foretaste.evaluation.bootstrap import percentile_interval
from foretaste.evaluation.row_metrics import (
    NUM_BINS,
    Reliability,
    TaskRows,
    Weighed,
    point_values,
    reliability,
    resampled,
)
from foretaste.evaluation.rows_report import RowsReport, metric_name
from foretaste.training.calibration import Calibration, calibrated


@dataclass(frozen=True, eq=False, kw_only=True)
class Predicted:
    """A part's rows with what a model predicted of them."""

    name: str
    """Which part it is: "validation", "test"."""
    digest: str
    """SHA-256 of the rows."""
    tasks: tuple[Task, ...]
    user_N: Int64[np.ndarray, " N"]
    """Any numbers, alike for rows of one user."""
    label_NT: Float64[np.ndarray, "N T"]
    """NaN where one is missing."""
    prediction_NT: Float64[np.ndarray, "N T"]
    notes: tuple[str, ...] = ()
    counts: Mapping[str, int] = field(default_factory=dict)
    """Further counts for the report."""
    suffix: str = ""
    """What the names of metrics end in, such as `_sampled_99`."""


def measure_rows(
    predicted: Predicted,
    *,
    model: str,
    resamples: int,
    seed: int,
    calibration: Mapping[str, Calibration],
    settings: Mapping[str, object],
    train_seed: int,
) -> RowsReport:
    """Work out the report of predictions.

    Raises:
        ConfigError: `resamples` is out of range, or a calibration is of no binary task.
        DataError: There is no row with a label.
        NonFiniteError: A prediction of a labelled row is NaN or infinite.
    """
    if resamples < 0:
        raise ConfigError(
            f"resamples is {resamples}: give 0 or more", name="resamples", value=resamples
        )
    _check_calibration(predicted.tasks, calibration)
    users, user_N = np.unique(predicted.user_N, return_inverse=True)
    parts = list(_task_rows(predicted, user_N.astype(np.int64), len(users)))
    if not parts:
        raise DataError(
            f"none of the {len(user_N)} rows of {predicted.name!r} has a label of "
            f"{', '.join(task.name for task in predicted.tasks)}: there is nothing to measure"
        )
    weighed: dict[str, Weighed] = {}
    curves: dict[str, Reliability] = {}
    missing: list[str] = []
    for part in parts:
        found, found_curves = _of_task(part, calibration.get(part.task.name))
        curves |= found_curves
        weighed |= {
            metric_name(name, part.task.name, predicted.tasks, predicted.suffix): metric
            for name, metric in found.items()
        }
        missing += _not_defined(part, found)
    metrics = point_values(weighed, len(users))
    drawn = resampled(weighed, len(users), resamples=resamples, seed=seed) if resamples else {}
    one_row_each = len(users) == len(user_N)
    return RowsReport(
        model=model,
        holdout=predicted.name,
        holdout_digest=predicted.digest,
        tasks=predicted.tasks,
        metrics=metrics,
        intervals={
            name: percentile_interval(value_R)
            for name, value_R in drawn.items()
            if not np.isnan(value_R).all()
        },
        reliability=curves,
        counts={
            "rows": len(user_N),
            "users": len(users),
            **predicted.counts,
            **{f"labels_{part.task.name}": len(part.label_N) for part in parts},
        },
        notes=(
            *predicted.notes,
            *missing,
            *_notes(parts, calibration, resamples=resamples, seed=seed, by_row=one_row_each),
        ),
        user_N=user_N.astype(np.int64),
        label_NT=predicted.label_NT,
        prediction_NT=predicted.prediction_NT,
        calibration=dict(calibration),
        settings=settings,
        seed=train_seed,
        suffix=predicted.suffix,
    )


def _task_rows(
    predicted: Predicted, user_N: Int64[np.ndarray, " N"], num_users: int
) -> list[TaskRows]:
    parts = []
    for place, task in enumerate(predicted.tasks):
        labelled_N = ~np.isnan(predicted.label_NT[:, place])
        if labelled_N.any():
            prediction_N = predicted.prediction_NT[labelled_N, place]
            if not np.isfinite(prediction_N).all():
                raise NonFiniteError(
                    f"a prediction of task {task.name!r} is NaN or infinite: the model is broken, "
                    "train it anew",
                    name=task.name,
                )
            parts.append(
                TaskRows(
                    task=task,
                    label_N=predicted.label_NT[labelled_N, place],
                    prediction_N=prediction_N,
                    user_N=user_N[labelled_N],
                    num_users=num_users,
                )
            )
    return parts


def _of_task(
    part: TaskRows, calibration: Calibration | None
) -> tuple[dict[str, Weighed], dict[str, Reliability]]:
    """Return a task's metrics by their short names, and its curves."""
    found, curves, task = part.metrics(), {}, part.task.name
    if part.task.kind == "binary":
        curves[task] = reliability(part.label_N, part.prediction_N)
        if calibration is not None:
            better = part.predicting(calibrated(calibration, part.prediction_N))
            method = calibration.kind
            found |= {f"{n}_{method}": m for n, m in better.probability_metrics().items()}
            curves[f"{task}_{method}"] = reliability(better.label_N, better.prediction_N)
    return found, curves


def _not_defined(part: TaskRows, found: Mapping[str, Weighed]) -> list[str]:
    """Say which metrics a task's rows do not define, and why."""
    if part.task.kind != "binary" or "gauc" in found:
        return []
    if "auc" not in found:
        return [
            f"auc of {part.task.name}: not defined, all {len(part.label_N)} labels are "
            f"{part.label_N[0]:g}"
        ]
    return [f"gauc of {part.task.name}: not defined, no user has both a 1 and a 0"]


def _check_calibration(tasks: tuple[Task, ...], calibration: Mapping[str, Calibration]) -> None:
    binary = [task.name for task in tasks if task.kind == "binary"]
    for name in calibration:
        if name not in binary:
            raise ConfigError(
                f"a calibration is of {name!r}, but the binary tasks are "
                f"{', '.join(binary) or 'none'}: probabilities alone can be calibrated",
                name=name,
            )


def _notes(
    parts: list[TaskRows],
    calibration: Mapping[str, Calibration],
    *,
    resamples: int,
    seed: int,
    by_row: bool,
) -> list[str]:
    notes = ["a task is measured on the rows that have its label; missing ones are no zeros"]
    kinds = {part.task.kind for part in parts}
    if "binary" in kinds:
        notes += [
            "auc: equal scores count as half; gauc: mean of each user's own auc, weighted by the "
            "user's rows, over users that have both a 1 and a 0",
            "log_loss: in nats, probabilities kept 2.2e-16 away from 0 and 1, as in scikit-learn; "
            f"ece: {NUM_BINS} bins of equal width",
        ]
    if kinds - {"binary"}:
        notes.append("rmse, mae: in the label's own unit; of an ordinal task, expected level")
    notes += [
        f"{method}: fitted on other rows, the order of rows is kept but for ties"
        for method in dict.fromkeys(found.kind for found in calibration.values())
    ]
    unit = "rows" if by_row else "users, who bring all their rows"
    notes.append(
        f"intervals: 95 %, percentile bootstrap over {unit}, {resamples} resamples, seed {seed}"
        if resamples
        else "intervals: none asked for"
    )
    return notes

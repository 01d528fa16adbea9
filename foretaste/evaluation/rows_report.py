"""What predictions of labelled rows are worth, task by task, with every choice that was made.

Shape legend: N rows, T tasks.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field

import numpy as np
import polars as pl
from jaxtyping import Float64, Int64
from pydantic import TypeAdapter

from foretaste.arguments import checked
from foretaste.data.tasks import Task
from foretaste.errors import DataError
from foretaste.evaluation.bootstrap import Interval
from foretaste.evaluation.report import (
    console_table,
    figures_frame,
    markdown_table,
    no_report,
    printed,
)
from foretaste.evaluation.row_metrics import Method, Reliability, TaskRows, fit_calibration
from foretaste.shown import Shown
from foretaste.training.calibration import Calibration

_FORMAT = 1
_CALIBRATIONS: TypeAdapter[dict[str, Calibration]] = TypeAdapter(dict[str, Calibration])


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class RowsReport(Shown):
    """The pointwise metrics of one model on the labelled rows of one part. Printed, a table."""

    model: str
    """Name of the model's class."""
    holdout: str
    """"validation" or "test"."""
    holdout_digest: str
    """SHA-256 of the rows: only reports of equal ones can be compared."""
    tasks: tuple[Task, ...]
    metrics: Mapping[str, float]
    """Name to value; where there are several tasks, names end in `_TASK`."""
    intervals: Mapping[str, Interval]
    """Name to 95 % bootstrap interval over users."""
    reliability: Mapping[str, Reliability]
    """Of each binary task, by its name; of calibrated probabilities, by `TASK_METHOD`."""
    counts: Mapping[str, int]
    """Rows, users, and the labels of each task."""
    notes: tuple[str, ...]
    """Every choice that could have changed a number, one sentence each."""
    user_N: Int64[np.ndarray, " N"]
    """The user of each row, in [0, `counts["users"]`); empty if left out, like the next two."""
    label_NT: Float64[np.ndarray, "N T"]
    """NaN where one is missing."""
    prediction_NT: Float64[np.ndarray, "N T"]
    """Probabilities, values in the labels' units, or expected levels; before any calibration."""
    calibration: Mapping[str, Calibration] = field(default_factory=dict)
    """By the task's name: what the calibrated figures were worked out with."""
    settings: Mapping[str, object] = field(default_factory=dict)
    """What decided the training run, as plain JSON values."""
    seed: int = 0
    """Of the training run."""
    suffix: str = ""
    """What the names of metrics end in where zeros were drawn, such as `_sampled_99`."""

    @checked
    def name(self, metric: str, task: str) -> str:
        """Return the full name of a metric of a task, such as `auc_click`."""
        return metric_name(metric, task, self.tasks, self.suffix)

    @checked
    def rows(self, task: str) -> TaskRows:
        """Return what there is of a task: labels, predictions, users.

        Raises:
            DataError: There is no such task, no label of it, or the rows were left out.
        """
        if not len(self.label_NT):
            raise DataError(
                f"this report of {self.model} was kept without its rows: evaluate anew",
                name=self.model,
            )
        for place, own in enumerate(self.tasks):
            labelled_N = ~np.isnan(self.label_NT[:, place])
            if own.name == task and labelled_N.any():
                return TaskRows(
                    task=own,
                    label_N=self.label_NT[labelled_N, place],
                    prediction_N=self.prediction_NT[labelled_N, place],
                    user_N=self.user_N[labelled_N],
                    num_users=self.counts["users"],
                )
        raise DataError(
            f"no row of {self.holdout!r} has a label of a task {task!r}; the tasks are "
            f"{', '.join(own.name for own in self.tasks)}",
            name=task,
        )

    @checked
    def to_json(self, *, per_row: bool = True) -> str:
        """Return the whole report as one JSON document, to the last digit.

        Args:
            per_row: False leaves each row's values out; such a report cannot be compared.
        """
        document = {
            "format": _FORMAT,
            "model": self.model,
            "holdout": self.holdout,
            "holdout_digest": self.holdout_digest,
            "tasks": [task.model_dump(mode="json") for task in self.tasks],
            "metrics": dict(self.metrics),
            "intervals": {name: list(interval) for name, interval in self.intervals.items()},
            "reliability": {name: asdict(curve) for name, curve in self.reliability.items()},
            "counts": dict(self.counts),
            "notes": list(self.notes),
            "calibration": {n: c.model_dump(mode="json") for n, c in self.calibration.items()},
            "settings": dict(self.settings),
            "seed": self.seed,
            "suffix": self.suffix,
            "user": self.user_N.tolist() if per_row else [],
            "label": _plain(self.label_NT) if per_row else [],
            "prediction": _plain(self.prediction_NT) if per_row else [],
        }
        return json.dumps(document, allow_nan=False)

    @staticmethod
    @checked
    def from_json(text: str) -> "RowsReport":
        """Read what `to_json` wrote.

        Raises:
            DataError: It is no such report, or one of a later format.
        """
        try:
            document = json.loads(text)
            if document["format"] != _FORMAT:
                raise DataError(
                    f"a report of format {document['format']}; this foretaste reads {_FORMAT}: "
                    "update foretaste",
                    name="format",
                    value=document["format"],
                )
            tasks = tuple(Task.model_validate(task) for task in document["tasks"])
            curves = document["reliability"].items()
            return RowsReport(
                model=document["model"],
                holdout=document["holdout"],
                holdout_digest=document["holdout_digest"],
                tasks=tasks,
                metrics=document["metrics"],
                intervals={name: Interval(*ends) for name, ends in document["intervals"].items()},
                reliability={
                    name: Reliability(**{key: tuple(values) for key, values in curve.items()})
                    for name, curve in curves
                },
                counts=document["counts"],
                notes=tuple(document["notes"]),
                user_N=np.array(document["user"], np.int64),
                label_NT=np.array(document["label"], np.float64).reshape(-1, len(tasks)),
                prediction_NT=np.array(document["prediction"], np.float64).reshape(-1, len(tasks)),
                calibration=_CALIBRATIONS.validate_python(document["calibration"]),
                settings=document["settings"],
                seed=document["seed"],
                suffix=document["suffix"],
            )
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise no_report(error, "report of rows") from error

    @checked
    def to_frame(self) -> pl.DataFrame:
        """Return the figures, a row for each metric: its value, 95 % interval and chance level."""
        chance = {name: 0.5 for name in self.metrics if name.startswith(("auc", "gauc"))}
        return figures_frame(self.metrics, self.intervals, chance)

    @checked
    def to_markdown(self) -> str:
        """Return the table and notes as Markdown."""
        lines = "\n".join(f"- {line}" for line in self._remarks())
        return f"## {self._title()}\n\n{markdown_table(list(self._table()))}\n\n{lines}\n"

    def __str__(self) -> str:
        table = console_table(list(self._table()), title=self._title())
        return printed([table], self._remarks())

    @property
    def at_chance(self) -> tuple[str, ...]:
        """The binary tasks whose AUC has an interval that holds 0.5, or lies below it."""
        intervals = {t.name: self.intervals.get(self.name("auc", t.name)) for t in self.tasks}
        return tuple(name for name, ends in intervals.items() if ends and ends.low <= 0.5)

    def _remarks(self) -> Iterator[str]:
        yield self._counted()
        if any(name.startswith("auc") for name in self.metrics):
            held = ", ".join(self.at_chance)
            yield "chance: a random order gets an auc and a gauc of 0.5" + (
                f"; no better than that, as the interval reaches down to it: {held}" if held else ""
            )
        yield from self.notes

    def _title(self) -> str:
        return f"{self.model} on {self.holdout}: {self.counts['rows']:,} rows"

    def _counted(self) -> str:
        return ", ".join(f"{name} {count:,}" for name, count in self.counts.items())

    def _table(self) -> Iterator[list[str]]:
        """Give a line a metric, and a column a task."""
        yield ["metric", *(task.name for task in self.tasks)]
        bases = ["auc", "gauc", "log_loss", "ece", "rmse", "mae"]
        methods = dict.fromkeys(found.kind for found in self.calibration.values())
        bases[4:4] = [f"{base}_{method}" for method in methods for base in ("log_loss", "ece")]
        for base in bases:
            names = [self.name(base, task.name) for task in self.tasks]
            if any(name in self.metrics for name in names):
                yield [base + self.suffix, *map(self._cell, names)]

    def _cell(self, name: str) -> str:
        if name not in self.metrics:
            return ""
        value = f"{self.metrics[name]:.4f}"
        if name not in self.intervals:
            return value
        return "{} [{:.4f}, {:.4f}]".format(value, *self.intervals[name])

    def _facts(self) -> dict[str, object]:
        figures = {name: self._cell(name) for name in list(self.metrics)[:3]}
        return {"": f"{self.model} on {self.holdout}", "rows": self.counts["rows"], **figures}

    def _rows(self) -> list[list[str]]:
        return list(self._table())


@checked
def calibrate(report: RowsReport, method: Method) -> dict[str, Calibration]:
    """Fit the probabilities of every binary task that has labels of both classes, by its name.

    Args:
        report: Of rows that training did not see, such as validation's; not of those on which the
            effect is to be shown.
        method: "platt" or "isotonic".

    Raises:
        DataError: The report was kept without its rows, or is of rows that training saw.
    """
    if report.holdout == "train":
        raise DataError(
            "the report is of training's own rows, of which the model is too sure: calibrate on "
            'those of validation, evaluate_rows(model, split, part="validation")',
            name="report",
            value=report.holdout,
        )
    found: dict[str, Calibration] = {}
    for task in report.tasks:
        if task.kind == "binary" and report.name("auc", task.name) in report.metrics:
            rows = report.rows(task.name)
            found[task.name] = fit_calibration(method, rows.label_N, rows.prediction_N)
    return found


def metric_name(metric: str, task: str, tasks: tuple[Task, ...], suffix: str) -> str:
    """Return the full name of a metric: with its task where there are several."""
    return f"{metric}_{task}{suffix}" if len(tasks) > 1 else f"{metric}{suffix}"


def _plain(value_NT: Float64[np.ndarray, "N T"]) -> list[list[float | None]]:
    return [[None if np.isnan(v) else v for v in row] for row in value_NT.tolist()]

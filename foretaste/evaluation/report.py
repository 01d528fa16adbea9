"""Reports: the results of an evaluation of lists or of labelled rows, with notes on every choice.

Shape legend: U users with targets, N rows, T tasks.
"""

import io
import json
import re
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, TypeVar

import numpy as np
import polars as pl
from jaxtyping import Float64, Int64
from pydantic import TypeAdapter
from rich.console import Console
from rich.table import Table
from rich.text import Text

from foretaste.arguments import checked
from foretaste.data.tasks import Task, metric_name
from foretaste.errors import DataError
from foretaste.evaluation.list_metrics import Interval
from foretaste.evaluation.row_metrics import Method, Reliability, TaskRows, fit_calibration
from foretaste.shown import Shown, json_value
from foretaste.training.trained import Calibration

_FORMAT = 1
_LATER = ("suffix", "chance")
"""Fields that older reports of this format lack."""
_WIDE = 1_000_000
_CALIBRATIONS: TypeAdapter[dict[str, Calibration]] = TypeAdapter(dict[str, Calibration])

R = TypeVar("R", bound="AnyReport")
Cells = list[list[str]]
"""Rows of a table; the first row has the headings."""


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class AnyReport(Shown):
    """The common base of reports of lists and of rows. A report is printed as tables."""

    model: str
    """Name of the model's class."""
    holdout: str
    """"validation" or "test"."""
    holdout_digest: str
    """SHA-256 of the targets: only reports of equal targets can be compared."""
    metrics: Mapping[str, float]
    """Name to value."""
    intervals: Mapping[str, Interval]
    """Name to 95 % bootstrap interval over users; a figure that is not a mean over users may have
    no interval."""
    counts: Mapping[str, int]
    """Numbers of evaluated and of omitted items, by reason."""
    notes: tuple[str, ...]
    """One sentence for every choice that could have changed a number."""
    settings: Mapping[str, object] = field(default_factory=dict)
    """The settings of the training run, as plain JSON values."""
    seed: int = 0
    """The seed of the training run."""
    suffix: str = ""
    """Suffix of metric names, such as `_sampled_99`."""

    _WHAT: ClassVar[str]
    _FROM_JSON: ClassVar[Mapping[str, Callable[[Any], object]]]
    """By field, the conversion from JSON; other fields are not converted."""

    @classmethod
    @checked
    def from_json(cls: type[R], text: str) -> R:
        """Read the result of `to_json`.

        Raises:
            DataError: It is not a report, or has a later format.
        """
        made: dict[str, Callable[[Any], object]] = {
            "intervals": _intervals,
            "notes": tuple,
            **cls._FROM_JSON,
        }
        try:
            document = json.loads(text)
            if document["format"] != _FORMAT:
                raise DataError(
                    f"a report of format {document['format']}; this foretaste reads {_FORMAT}: "
                    "update foretaste",
                    name="format",
                    value=document["format"],
                )
            there = [p.name for p in fields(cls) if p.name not in _LATER or p.name in document]
            found = {name: document[_key(name)] for name in there}
            return cls(**found | {name: make(found[name]) for name, make in made.items()})
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise _no_report(error, cls._WHAT) from error

    def _json(self, *, without: Iterable[str]) -> str:
        document: dict[str, object] = {"format": _FORMAT}
        for part in fields(self):
            value = json_value(getattr(self, part.name))
            document[_key(part.name)] = type(value)() if part.name in without else value
        return json.dumps(document, allow_nan=False)

    @checked
    def to_frame(self) -> pl.DataFrame:
        """Return the figures, a row per metric: its value, 95 % interval and chance level."""
        levels = self._levels()
        rows = [
            (name, value, *self.intervals.get(name, (None, None)), levels.get(name))
            for name, value in self.metrics.items()
        ]
        numbers = dict.fromkeys(("value", "low", "high", "chance"), pl.Float64)
        return pl.DataFrame(rows, schema={"metric": pl.String, **numbers}, orient="row")

    @checked
    def to_markdown(self) -> str:
        """Return the tables and notes as Markdown."""
        (title, _), *_ = tables = self._tables()
        parts = [f"## {title}", *(markdown_table(rows) for _, rows in tables)]
        parts.append("\n".join(f"- {line}" for line in self._remarks()))
        return "\n\n".join(parts) + "\n"

    def __str__(self) -> str:
        tables = [console_table(rows, title=title) for title, rows in self._tables()]
        return printed(tables, self._remarks())

    @property
    def at_chance(self) -> tuple[str, ...]:
        """Metrics no better than chance: the interval includes the chance level or is below."""
        return tuple(
            name
            for name, level in self._levels().items()
            if name in self.intervals and self.intervals[name].low <= level
        )

    def _remarks(self) -> Iterator[str]:
        yield ", ".join(f"{name} {count:,}" for name, count in self.counts.items())
        if self._levels():
            held = ", ".join(self.at_chance)
            yield f"chance: {self._chance()}" + (
                f"; no better than chance, because the interval includes it: {held}" if held else ""
            )
        yield from self.notes

    def _cell(self, name: str) -> str:
        if name not in self.metrics:
            return ""
        value = f"{self.metrics[name]:.4f}"
        if name not in self.intervals:
            return value
        return "{} [{:.4f}, {:.4f}]".format(value, *self.intervals[name])

    def _rows(self) -> Cells:
        return self._tables()[0][1]

    @abstractmethod
    def _tables(self) -> list[tuple[str, Cells]]:
        """Return the tables with their titles; the first title is the report's."""

    @abstractmethod
    def _levels(self) -> Mapping[str, float]:
        """Return the chance level of each metric."""

    @abstractmethod
    def _chance(self) -> str:
        """Return the definition of chance."""


def _key(name: str) -> str:
    """Return a field's name in JSON, without the letters of its shape."""
    return re.sub("_[A-Z]+$", "", name)


def _intervals(found: Mapping[str, Iterable[float]]) -> dict[str, Interval]:
    return {name: Interval(*ends) for name, ends in found.items()}


@dataclass(frozen=True, kw_only=True)
class Slice:
    """The same metrics over some of the queries or targets."""

    group: str
    """The property that defines the slices, such as "history length"."""
    label: str
    """The name of the slice, such as "10 to 19 events"."""
    users: int
    queries: int
    targets: int
    metrics: Mapping[str, float]
    """Mean over the slice's users, each over the user's queries or targets in the slice."""


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Report(AnyReport):
    """The metrics of one model's lists on one holdout, each a mean over users.

    Every metric's name ends in `_at_K` and `suffix`. It is printed as a table.
    """

    k: tuple[int, ...]
    user_idx: Int64[np.ndarray, " U"]
    """The users with targets, ascending."""
    per_user: Mapping[str, Float64[np.ndarray, " U"]]
    """Name to each user's value, the mean over the user's queries; empty if left out."""
    slices: tuple[Slice, ...] = ()
    chance: Mapping[str, float] = field(default_factory=dict)
    """Name of an accuracy metric to its expectation for a random order of the same candidates;
    empty without intervals."""

    _WHAT: ClassVar[str] = "report"
    _FROM_JSON: ClassVar[Mapping[str, Callable[[Any], object]]] = {
        "k": tuple,
        "user_idx": lambda found: np.array(found, np.int64),
        "per_user": lambda found: {n: np.array(v, np.float64) for n, v in found.items()},
        "slices": lambda found: tuple(Slice(**part) for part in found),
    }

    @checked
    def to_json(self, *, per_user: bool = True) -> str:
        """Return the complete report as one JSON document, in full precision.

        Args: per_user: False leaves each user's values out; such a report cannot be compared.
        """
        return self._json(without=() if per_user else ("user_idx", "per_user"))

    def _levels(self) -> Mapping[str, float]:
        return self.chance

    def _chance(self) -> str:
        return "what a random order of the same candidates gets, on average"

    def _tables(self) -> list[tuple[str, Cells]]:
        users = "1 user" if len(self.user_idx) == 1 else f"{self.counts['users']:,} users"
        title = f"{self.model} on {self.holdout}: {users}, {self.counts['catalogue']:,} items"
        return [(title, self._headline()), *([("slices", self._sliced())] if self.slices else [])]

    def _headline(self) -> Cells:
        families = dict.fromkeys(name.rpartition("_at_")[0] for name in self.metrics)
        heads = ["chance"] if self.chance else []
        rows = [["metric", *(head for k in self.k for head in (f"@{k}", *heads))]]
        for family in families:
            names = [f"{family}_at_{k}{self.suffix}" for k in self.k]
            rows.append([family, *(cell for name in names for cell in self._cells(name))])
        return rows

    def _cells(self, name: str) -> list[str]:
        """Return a figure with its interval and, in a report that has them, its chance level."""
        if not self.chance:
            return [self._cell(name)]
        level = self.chance.get(name)
        return [self._cell(name), "" if level is None else f"{level:.4f}"]

    def _sliced(self) -> Cells:
        families = ("hit_rate", "recall", "ndcg")
        names = [f"{family}_at_{self.k[0]}{self.suffix}" for family in families]
        titles = (f"{family}_at_{self.k[0]}" for family in families)
        rows = [["slice", "", "users", "targets", *titles]]
        for part in self.slices:
            values = (f"{part.metrics[n]:.4f}" if n in part.metrics else "" for n in names)
            rows.append([part.group, part.label, f"{part.users:,}", f"{part.targets:,}", *values])
        return rows

    def _facts(self) -> dict[str, object]:
        leading = next((name for name in self.metrics if name.startswith("ndcg")), None)
        figure = {} if leading is None else {leading: self._cell(leading)}
        return {"": f"{self.model} on {self.holdout}", "users": self.counts["users"], **figure}


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class RowsReport(AnyReport):
    """The pointwise metrics of one model on the labelled rows of one part.

    If there are several tasks, the names of metrics end in `_TASK`. It is printed as a table.
    """

    tasks: tuple[Task, ...]
    reliability: Mapping[str, Reliability]
    """The reliability of each binary task, by its name; for calibrated probabilities, by
    `TASK_METHOD`."""
    user_N: Int64[np.ndarray, " N"]
    """The user of each row, in [0, `counts["users"]`); empty if left out, like the next two."""
    label_NT: Float64[np.ndarray, "N T"]
    """NaN for missing labels."""
    prediction_NT: Float64[np.ndarray, "N T"]
    """Probabilities, values in the labels' units, or expected levels, before any calibration."""
    calibration: Mapping[str, Calibration] = field(default_factory=dict)
    """The calibrations of the calibrated figures, by the task's name."""

    _WHAT: ClassVar[str] = "report of rows"
    _FROM_JSON: ClassVar[Mapping[str, Callable[[Any], object]]] = {
        "tasks": lambda found: tuple(map(Task.model_validate, found)),
        "reliability": lambda found: {
            name: Reliability(**{key: tuple(values) for key, values in curve.items()})
            for name, curve in found.items()
        },
        "user_N": lambda found: np.array(found, np.int64),
        "label_NT": lambda found: _two_dimensions(found),
        "prediction_NT": lambda found: _two_dimensions(found),
        "calibration": _CALIBRATIONS.validate_python,
    }

    @checked
    def name(self, metric: str, task: str) -> str:
        """Return the full name of a metric of a task, such as `auc_click`."""
        return metric_name(metric, task, self.tasks, self.suffix)

    @checked
    def rows(self, task: str) -> TaskRows:
        """Return the labels, predictions and users of a task.

        Raises:
            DataError: The task does not exist, it has no labels, or the rows were left out.
        """
        if not len(self.label_NT):
            raise DataError(
                f"this report of {self.model} was kept without its rows: evaluate again",
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
        """Return the complete report as one JSON document, in full precision.

        Args:
            per_row: False leaves each row's values out; such a report cannot be compared.
        """
        return self._json(without=() if per_row else ("user_N", "label_NT", "prediction_NT"))

    @property
    def at_chance(self) -> tuple[str, ...]:
        """The binary tasks whose AUC interval includes 0.5 or lies below it."""
        held = super().at_chance
        return tuple(task.name for task in self.tasks if self.name("auc", task.name) in held)

    def _levels(self) -> Mapping[str, float]:
        return {name: 0.5 for name in self.metrics if name.startswith(("auc", "gauc"))}

    def _chance(self) -> str:
        return "a random order gets an auc and a gauc of 0.5"

    def _tables(self) -> list[tuple[str, Cells]]:
        """Return a table with a row per metric and a column per task."""
        rows = [["metric", *(task.name for task in self.tasks)]]
        bases = ["auc", "gauc", "log_loss", "ece", "rmse", "mae"]
        methods = dict.fromkeys(found.kind for found in self.calibration.values())
        bases[4:4] = [f"{base}_{method}" for method in methods for base in ("log_loss", "ece")]
        for base in bases:
            names = [self.name(base, task.name) for task in self.tasks]
            if any(name in self.metrics for name in names):
                rows.append([base + self.suffix, *map(self._cell, names)])
        return [(f"{self.model} on {self.holdout}: {self.counts['rows']:,} rows", rows)]

    def _facts(self) -> dict[str, object]:
        figures = {name: self._cell(name) for name in list(self.metrics)[:3]}
        return {"": f"{self.model} on {self.holdout}", "rows": self.counts["rows"], **figures}


def _two_dimensions(found: list[list[float | None]]) -> Float64[np.ndarray, "N T"]:
    return np.array(found, np.float64).reshape(len(found), len(found[0]) if found else 0)


@checked
def calibrate(report: RowsReport, method: Method) -> dict[str, Calibration]:
    """Fit a calibration of every binary task with labels of both classes, by its name.

    Args:
        report: The report of rows outside training, such as validation; not of the rows that
            measure the effect.
        method: "platt" or "isotonic".

    Raises:
        DataError: The report has no rows, or its rows are training rows.
    """
    if report.holdout == "train":
        raise DataError(
            "the report is of training rows, on which the model is overconfident: calibrate on "
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


def console_table(rows: list[list[str]], *, title: str) -> Table:
    """Return rows, the first of which has the headings, as a table for a terminal."""
    table = Table(title=Text(title))
    for position, name in enumerate(rows[0]):
        table.add_column(Text(name), justify="left" if position == 0 else "right")
    for row in rows[1:]:
        table.add_row(*map(Text, row))
    return table


def printed(tables: Iterable[Table], notes: Iterable[str] = ()) -> str:
    """Return tables, and notes below them, as text of any width, without cutting or folding."""
    lines: list[str] = []
    for table in tables:
        title, table.title = table.title, None
        text = io.StringIO()
        # in a notebook, a console would show each table at once instead of writing it
        out = Console(file=text, width=_WIDE, color_system=None, force_jupyter=False)
        out.print(table, highlight=False)
        lines += [str(title), *(line.rstrip() for line in text.getvalue().splitlines())]
    return "\n".join([*lines, *(f"· {note}" for note in notes)])


def markdown_table(rows: Iterable[list[str]]) -> str:
    """Return rows, the first of which has the headings, as a Markdown table."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    lines.insert(1, f"|{' --- |' * lines[0].count(' | ')} --- |")
    return "\n".join(lines)


def latex_table(rows: Iterable[list[str]]) -> str:
    r"""Return rows, the first of which has the headings, as a LaTeX `tabular` with booktabs."""
    rows = list(rows)
    heads, *others = [" & ".join(map(_in_latex, row)) + r" \\" for row in rows]
    layout = "l" + "r" * (len(rows[0]) - 1)
    lines = [r"\toprule", heads, r"\midrule", *others, r"\bottomrule"]
    return "\n".join([rf"\begin{{tabular}}{{{layout}}}", *lines, r"\end{tabular}"]) + "\n"


_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "<": r"$<$",
    ">": r"$>$",
    "|": r"$|$",
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
}


def _in_latex(text: str) -> str:
    return "".join(_LATEX.get(sign, sign) for sign in " ".join(text.split()))


def _no_report(error: Exception, what: str) -> DataError:
    """Return the error for a text that is not a report's `to_json`."""
    match error:
        case json.JSONDecodeError(lineno=line, colno=column):
            why = f"it is not JSON (line {line}, column {column})"
        case KeyError(args=(name,)):
            why = f"it has no {name!r}"
        case _:
            why = "its values have other types"
    return DataError(
        f"this is not a {what}: {why}; give what to_json wrote, or evaluate the model again",
        name="text",
    )

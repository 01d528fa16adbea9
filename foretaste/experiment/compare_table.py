"""The result of a comparison: a table and a chart, as text, JSON and LaTeX."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from html import escape
from pathlib import Path

import polars as pl

from foretaste.arguments import checked
from foretaste.data.rows import Rows
from foretaste.evaluation.chart import line, page, text
from foretaste.evaluation.compare import Comparison, holm
from foretaste.evaluation.list_metrics import Interval
from foretaste.evaluation.report import (
    Report,
    RowsReport,
    console_table,
    latex_table,
    markdown_table,
    printed,
)
from foretaste.shown import Shown
from foretaste.training.fit import OUT_OF_TIME

SIGNIFICANT = 0.05
"""Above this corrected p-value, a model does not differ significantly from the best."""
P_HEAD = "p (Holm)"
COLUMNS = ("model", "quality", "behind the best", P_HEAD, "training s", "bundle MB", "answer ms")
"""Columns of a comparison by lists."""


@dataclass(frozen=True, kw_only=True)
class TaskFigure:
    """The quality of a model's predictions of one task."""

    metric: str
    """`auc_TASK`, or `rmse_TASK` (lower is better)."""
    value: float
    interval: Interval
    """95 % bootstrap interval over users."""
    behind: Comparison | None
    """The difference from the best model, on the same users; None for the best model itself."""
    p_holm: float | None = None
    """The p-value of `behind`, corrected for the number of models compared with the best."""
    spread: float | None = None
    """Standard deviation over seeds; None with a single seed."""

    @property
    def ties_with_the_best(self) -> bool:
        """Whether the difference is not significant, by the interval or the corrected p-value."""
        if self.behind is None or self.p_holm is None:
            return True
        return self.behind.interval.low <= 0 or self.p_holm > SIGNIFICANT


@dataclass(frozen=True, kw_only=True)
class ModelRow:
    """A model that was trained, measured and timed."""

    name: str
    kind: str
    leading: TaskFigure
    """The leading metric's mean over users; by rows, the figure of the leading task."""
    metrics: Mapping[str, float]
    train_seconds: float = 0.0
    """Seconds of training; the mean if there are several seeds."""
    bundle_bytes: int = 0
    """Bytes of all files of the bundle, including training events."""
    answer_ms: float = 0.0
    """Median time of a single request to the model as it is served; by rows, the time of 1,000
    rows."""
    stopped: bool = False
    """Whether the budget ended its training."""
    note: str = ""
    """How its training ended; empty for a model in closed form."""
    settings: Mapping[str, object] = field(default_factory=dict)
    """The complete recipe."""
    tasks: tuple[TaskFigure, ...] = ()
    """By rows: the figures of the tasks after the leading one."""
    is_baseline: bool = False
    """By rows: whether it is a baseline of counts, which is never recommended."""
    seeds: tuple[int, ...] = ()
    """The seeds; the model was trained once with each."""

    @property
    def quality(self) -> float:
        """The leading figure, or its mean over seeds."""
        return self.leading.value

    @property
    def interval(self) -> Interval:
        """95 % bootstrap interval of the leading figure, over users."""
        return self.leading.interval

    @property
    def behind(self) -> Comparison | None:
        """The difference from the best model, paired by user; None for the best model itself."""
        return self.leading.behind

    @property
    def ties_with_the_best(self) -> bool:
        """Whether the difference from the best is not significant."""
        return self.leading.ties_with_the_best

    def to_json(self) -> dict[str, object]:
        """Return the row as plain JSON values."""
        found = asdict(self)
        leading = found.pop("leading")
        return {**found, "quality": leading.pop("value"), **leading}


@dataclass(frozen=True, kw_only=True)
class FailedModel:
    """A model without figures."""

    name: str
    kind: str
    error: str


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class ModelComparison(Shown):
    """Several models on one holdout, printed as a table and a sentence."""

    metric: str
    """The leading metric."""
    rows: tuple[ModelRow, ...]
    """At least one row, best quality first; by rows, the baseline is last."""
    failed: tuple[FailedModel, ...]
    split: str
    users: int
    """The number of users that the quality is a mean over."""
    budget_seconds: float | None
    pick: str
    """The name of the recommended model."""
    sentence: str
    """The recommended model, and why."""
    notes: tuple[str, ...]
    judged: int = 0
    """The number of labelled rows for the comparison; 0 for a comparison by lists."""
    chance: float | None = None
    """The first metric of a random order of the same candidates; None by rows."""
    beaten_by: str = ""
    """By rows: the baseline whose first metric is better than every model's, if there is one."""

    @property
    def is_worth_taking(self) -> bool:
        """Whether the best model is better than counting, or significantly above chance."""
        at_chance = self.chance is not None and self.rows[0].interval.low <= self.chance
        return not (self.beaten_by or at_chance)

    @property
    def columns(self) -> tuple[str, ...]:
        """The table's headings."""
        if not self.judged:
            return COLUMNS
        metrics = [self.metric, *(figure.metric for figure in self.rows[0].tasks)]
        given = [head for metric in metrics for head in (label(metric), "behind the best", P_HEAD)]
        return ("model", *given, "training s", "bundle MB", "ms a 1,000 rows")

    @checked
    def cells(self) -> list[tuple[str, ...]]:
        """Return the table's rows as text, under `columns`."""
        measured = [
            _cells(row, is_pick=row.name == self.pick and self.is_worth_taking) for row in self.rows
        ]
        blank = ("",) * (len(self.columns) - 2)
        return measured + [(row.name, "failed", *blank) for row in self.failed]

    @checked
    def remarks(self) -> list[str]:
        """Return notes: how trainings ended, why models failed, and what the columns mean."""
        ended = [f"{row.name}: {row.note}" for row in self.rows if row.note]
        failed = [f"{row.name} failed: {row.error}" for row in self.failed]
        return [*ended, *failed, *self.notes]

    @checked
    def title(self) -> str:
        """Return the title of the table."""
        users = "1 user" if self.users == 1 else f"{self.users:,} users"
        rows = f"{self.judged:,} rows of " if self.judged else ""
        return f"{_head(self.metric)} on the test part ({self.split}), {rows}{users}"

    @checked
    def to_json(self) -> dict[str, object]:
        """Return everything as plain JSON values."""
        return {
            "metric": self.metric,
            "split": self.split,
            "users": self.users,
            "judged_rows": self.judged,
            "budget_seconds": self.budget_seconds,
            "chance": self.chance,
            "beaten_by": self.beaten_by,
            "rows": [row.to_json() for row in self.rows],
            "failed": [asdict(row) for row in self.failed],
            "best": self.rows[0].name,
            "pick": self.pick,
            "sentence": self.sentence,
            "notes": list(self.notes),
        }

    @checked
    def to_markdown(self, *, picture: str = "") -> str:
        """Return the table, the notes and the sentence; `picture` is the path of an image."""
        table = [[_escaped(cell) for cell in row] for row in (self.columns, *self.cells())]
        shown = [f"![quality against cost]({picture})"] if picture else []
        notes = "\n".join(f"- {_one_line(remark)}" for remark in self.remarks())
        parts = [f"# {self.title()}", markdown_table(table), *shown, notes, f"**{self.sentence}**"]
        return "\n\n".join(parts) + "\n"

    @checked
    def to_latex(self) -> str:
        r"""Return the table as a LaTeX `tabular` for the package booktabs."""
        return latex_table([list(self.columns), *map(list, self.cells())])

    @checked
    def to_frame(self) -> pl.DataFrame:
        """Return the figures, one row for each model and metric, failed models last."""
        figures = [(row, figure) for row in self.rows for figure in (row.leading, *row.tasks)]
        rows = [_record(row, figure) for row, figure in figures]
        rows += [{"model": row.name, "kind": row.kind, "note": row.error} for row in self.failed]
        return pl.DataFrame(rows, schema=_SCHEMA)

    def __str__(self) -> str:
        rows = (self.columns, *self.cells())
        last = len(self.columns)
        # a table per task, because one table would be too wide for a terminal
        places = [(0, 1, 2, 3, *range(last - 3, last))]
        places += [(0, at, at + 1, at + 2) for at in range(4, last - 3, 3)]
        titles = [self.title(), *(_head(figure.metric) for figure in self.rows[0].tasks)]
        tables = [
            console_table([[row[at] for at in part] for row in rows], title=title)
            for part, title in zip(places, titles, strict=True)
        ]
        remarks = [f"· {_one_line(remark)}" for remark in self.remarks()]
        return "\n".join([printed(tables), *remarks, self.sentence])

    def _facts(self) -> dict[str, object]:
        return {"models": len(self.rows), "": self.sentence}

    def _rows(self) -> list[tuple[str, ...]]:
        return [self.columns, *self.cells()]


@dataclass(frozen=True, eq=False, kw_only=True)
class Measured:
    """A measured model before it is in the table."""

    name: str
    kind: str
    train_seconds: float
    """Seconds of training; the mean if there are several seeds."""
    ended: str
    """The reason why the training loop ended; empty for a model in closed form."""
    settings: Mapping[str, object]
    reports: tuple[Report | RowsReport, ...]
    """The reports, one per seed."""
    seeds: tuple[int, ...]
    bundle: Path
    """The model of the first seed, like the size and the time of an answer."""
    bundle_bytes: int
    answer_ms: float
    """Milliseconds per request; by rows, per 1,000 rows."""
    rows: Rows | None = None
    """By rows: the measured rows."""


def corrected(figures: Sequence[TaskFigure]) -> list[TaskFigure]:
    """Return figures of one metric with p-values corrected for multiple comparisons."""
    p_values = iter(holm([f.behind.p_value for f in figures if f.behind is not None]))
    return [f if f.behind is None else replace(f, p_holm=next(p_values)) for f in figures]


def model_row(found: Measured, leading: TaskFigure, *others: TaskFigure) -> ModelRow:
    """Return a model's row of the table."""
    means = [report.metrics for report in found.reports]
    return ModelRow(
        name=found.name,
        kind=found.kind,
        leading=leading,
        train_seconds=found.train_seconds,
        bundle_bytes=found.bundle_bytes,
        answer_ms=found.answer_ms,
        stopped=found.ended.startswith(OUT_OF_TIME),
        note=found.ended,
        metrics={name: sum(m[name] for m in means) / len(means) for name in means[0]},
        settings=found.settings,
        tasks=others,
        seeds=found.seeds,
    )


def label(metric: str) -> str:
    """Return a metric's name for display: `ndcg_at_10` becomes "ndcg@10"."""
    return metric.replace("_at_", "@").replace("_", " ")


def _head(metric: str) -> str:
    return label(metric) + (" (less is better)" if metric.startswith("rmse") else "")


def _cells(row: ModelRow, *, is_pick: bool) -> tuple[str, ...]:
    costs = (row.train_seconds, row.bundle_bytes / 1e6, row.answer_ms)
    return (
        f"{row.name} (take it)" if is_pick else row.name,
        *_figure_cells(row.leading, same="the best"),
        *(cell for figure in row.tasks for cell in _figure_cells(figure, same="0")),
        *("" if row.is_baseline else f"{cost:.2f}" for cost in costs),
    )


def _figure_cells(figure: TaskFigure, *, same: str) -> tuple[str, str, str]:
    spread = "" if figure.spread is None else f" ± {figure.spread:.4f}"
    return (
        "{:.4f}{} [{:.4f}, {:.4f}]".format(figure.value, spread, *figure.interval),
        difference(figure.behind) if figure.behind else same,
        "" if figure.p_holm is None else f"{figure.p_holm:.4f}",
    )


def difference(behind: Comparison) -> str:
    """Return a difference with its interval, as text."""
    return "{:.4f} [{:.4f}, {:.4f}]".format(behind.difference, *behind.interval)


_SCHEMA = {
    **dict.fromkeys(("model", "kind", "metric"), pl.String),
    **dict.fromkeys(("value", "low", "high", "spread"), pl.Float64),
    **dict.fromkeys(("behind", "behind_low", "behind_high", "p", "p_holm"), pl.Float64),
    "seeds": pl.Int64,
    "train_seconds": pl.Float64,
    "bundle_bytes": pl.Int64,
    "answer_ms": pl.Float64,
    "is_baseline": pl.Boolean,
    "stopped": pl.Boolean,
    "note": pl.String,
}


def _record(row: ModelRow, figure: TaskFigure) -> dict[str, object]:
    found: dict[str, object] = {
        "model": row.name,
        "kind": row.kind,
        "metric": figure.metric,
        "value": figure.value,
        "low": figure.interval.low,
        "high": figure.interval.high,
        "spread": figure.spread,
        "p_holm": figure.p_holm,
        "is_baseline": row.is_baseline,
        "note": row.note,
    }
    if figure.behind is not None:
        low, high = figure.behind.interval
        found |= {"behind": figure.behind.difference, "behind_low": low, "behind_high": high}
        found["p"] = figure.behind.p_value
    if not row.is_baseline:
        names = ("train_seconds", "bundle_bytes", "answer_ms", "stopped")
        found |= {name: getattr(row, name) for name in names} | {"seeds": len(row.seeds)}
    return found


def _escaped(cell: str) -> str:
    return _one_line(cell).replace("|", "\\|")


def _one_line(text: str) -> str:
    return " ".join(text.split())


_WIDTH, _HEIGHT = 760.0, 420.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 70.0, 230.0, 40.0, 50.0
_LEAST_SECONDS = 1e-3
_BLUE, _GREEN, _GREY = "#3465a4", "#2e8b57", "#888888"


def comparison_svg(found: ModelComparison) -> str:
    """Draw each model's quality, with its interval, over the seconds of its training.

    The seconds are on a logarithmic scale. The recommended model is green; models that do not
    differ significantly from the best are filled.
    """
    seconds = [max(row.train_seconds, _LEAST_SECONDS) for row in found.rows]
    ends = [end for row in found.rows for end in row.interval]
    first, last = math.floor(math.log10(min(seconds))), math.ceil(math.log10(max(seconds)))
    last = max(last, first + 1)
    ticks = _ticks(min(0.0, *ends), max(*ends, 1e-9))
    low, high = ticks[0], ticks[-1]

    def across(value: float) -> float:
        share = (math.log10(value) - first) / (last - first)
        return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)

    def up(value: float) -> float:
        return _HEIGHT - _BOTTOM - (value - low) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)

    parts = [text(_LEFT, 22.0, found.title(), size=14)]
    for tick in ticks:
        parts += [line(_LEFT, up(tick), _WIDTH - _RIGHT, up(tick), "#dddddd")]
        parts += [text(_LEFT - 8, up(tick) + 4, f"{tick:g}", anchor="end")]
    for power in range(first, last + 1):
        x = across(10.0**power)
        parts += [line(x, _TOP, x, _HEIGHT - _BOTTOM, "#dddddd")]
        parts += [text(x, _HEIGHT - _BOTTOM + 18, f"{10.0**power:g}", anchor="middle")]
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts += [text(middle, _HEIGHT - 10, "seconds of training", anchor="middle")]
    for number, (row, cost) in enumerate(zip(found.rows, seconds, strict=True), 1):
        colour = _GREEN if row.name == found.pick else _BLUE
        x, y = across(cost), up(row.quality)
        fill = colour if row.ties_with_the_best else "white"
        ink = "white" if row.ties_with_the_best else colour
        parts += [
            line(x, up(row.interval.low), x, up(row.interval.high), colour),
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="9" fill="{fill}" stroke="{colour}">'
            f"<title>{escape(row.name)}</title></circle>",
            text(x, y + 4, str(number), anchor="middle", colour=ink),
        ]
        legend = f"{number}  {row.name}  {row.quality:.4f}"
        parts += [text(_WIDTH - _RIGHT + 16, _TOP + 18 * number, legend, colour=colour)]
    for number, failed in enumerate(found.failed, len(found.rows) + 1):
        legend = f"×  {failed.name}  failed"
        parts += [text(_WIDTH - _RIGHT + 16, _TOP + 18 * number, legend, colour=_GREY)]
    height = max(_HEIGHT, _TOP + 18 * (len(found.rows) + len(found.failed) + 1))
    title = f"{label(found.metric)} against seconds of training"
    return page(parts, width=_WIDTH, height=height, title=title)


def _ticks(low: float, high: float) -> Sequence[float]:
    """Return about five round numbers that cover the range from `low` to `high`."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    return [
        round(step * number, 12)
        for number in range(math.floor(low / step), math.ceil(high / step) + 1)
    ]

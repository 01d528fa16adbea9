"""What a comparison of models found: a table, and which of them to take."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from foretaste.evaluation.bootstrap import Interval
from foretaste.evaluation.compare import Comparison
from foretaste.evaluation.report import Report, console_table, markdown_table, printed
from foretaste.evaluation.rows_report import RowsReport
from foretaste.shown import Shown
from foretaste.training.fit import OUT_OF_TIME

COLUMNS = ("model", "quality", "behind the best", "p", "training s", "bundle MB", "answer ms")
"""Of a comparison by lists."""


@dataclass(frozen=True, kw_only=True)
class TaskFigure:
    """What a model's predictions of one task are worth."""

    metric: str
    """`auc_TASK`, or `rmse_TASK`, of which less is better."""
    value: float
    interval: Interval
    """95 % bootstrap interval over users."""
    behind: Comparison | None
    """By how much it is worse than the best model, on the same users; None for that itself."""


@dataclass(frozen=True, kw_only=True)
class ModelRow:
    """A model that was trained, measured and asked."""

    name: str
    kind: str
    quality: float
    """Mean of the leading metric over users; by rows, the figure of the leading task."""
    interval: Interval
    """95 % bootstrap interval of it."""
    behind: Comparison | None
    """By how much it is worse than the best, paired by user; None for the best itself."""
    train_seconds: float
    bundle_bytes: int
    """All files of the bundle, the training events among them."""
    answer_ms: float
    """Median over single questions, put to the model as it is served; by rows, the time of
    1,000 rows."""
    stopped: bool
    """Whether the budget ended its training."""
    note: str
    """How its training ended; empty for a model in closed form."""
    metrics: Mapping[str, float]
    settings: Mapping[str, object]
    """Its whole recipe."""
    tasks: tuple[TaskFigure, ...] = ()
    """By rows: of the tasks after the leading one."""
    is_baseline: bool = False
    """By rows: it learned nothing and cannot be taken."""

    @property
    def ties_with_the_best(self) -> bool:
        """Whether the paired interval touches 0."""
        return self.behind is None or self.behind.interval.low <= 0


@dataclass(frozen=True, kw_only=True)
class FailedModel:
    """A model of which there are no figures."""

    name: str
    kind: str
    error: str


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class ModelComparison(Shown):
    """Several models on one holdout. Printed, it is a table and the sentence."""

    metric: str
    """The leading one."""
    rows: tuple[ModelRow, ...]
    """Best quality first, one at least; by rows, the baseline last."""
    failed: tuple[FailedModel, ...]
    split: str
    users: int
    """Over how many the quality is a mean."""
    budget_seconds: float | None
    pick: str
    """The name of the model to take."""
    sentence: str
    """Which that is, and why."""
    notes: tuple[str, ...]
    judged: int = 0
    """How many labelled rows the models were compared by; 0: by lists."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The table's heads."""
        if not self.judged:
            return COLUMNS
        metrics = [self.metric, *(figure.metric for figure in self.rows[0].tasks)]
        told = [head for metric in metrics for head in (label(metric), "behind the best", "p")]
        return ("model", *told, "training s", "bundle MB", "ms a 1,000 rows")

    def cells(self) -> list[tuple[str, ...]]:
        """Return the table's rows as text, under `columns`."""
        measured = [_cells(row, is_pick=row.name == self.pick) for row in self.rows]
        blank = ("",) * (len(self.columns) - 2)
        return measured + [(row.name, "failed", *blank) for row in self.failed]

    def remarks(self) -> list[str]:
        """Return how trainings ended, why models failed, and what the columns mean."""
        ended = [f"{row.name}: {row.note}" for row in self.rows if row.note]
        failed = [f"{row.name} failed: {row.error}" for row in self.failed]
        return [*ended, *failed, *self.notes]

    def title(self) -> str:
        """Return what the table shows."""
        users = "1 user" if self.users == 1 else f"{self.users:,} users"
        rows = f"{self.judged:,} rows of " if self.judged else ""
        less = " (less is better)" if self.judged and self.metric.startswith("rmse") else ""
        return f"{label(self.metric)}{less} on the test part ({self.split}), {rows}{users}"

    def to_json(self) -> dict[str, object]:
        """Return all of it as plain JSON values."""
        return {
            "metric": self.metric,
            "split": self.split,
            "users": self.users,
            "judged_rows": self.judged,
            "budget_seconds": self.budget_seconds,
            "rows": [asdict(row) for row in self.rows],
            "failed": [asdict(row) for row in self.failed],
            "best": self.rows[0].name,
            "pick": self.pick,
            "sentence": self.sentence,
            "notes": list(self.notes),
        }

    def to_markdown(self, *, picture: str = "") -> str:
        """Return the table, the notes and the sentence; `picture` is the path of one to show."""
        table = [[_escaped(cell) for cell in row] for row in (self.columns, *self.cells())]
        shown = [f"![quality against cost]({picture})"] if picture else []
        notes = "\n".join(f"- {_one_line(remark)}" for remark in self.remarks())
        parts = [f"# {self.title()}", markdown_table(table), *shown, notes, f"**{self.sentence}**"]
        return "\n\n".join(parts) + "\n"

    def __str__(self) -> str:
        rows = [list(row) for row in (self.columns, *self.cells())]
        table = console_table(rows, title=self.title())
        remarks = [f"· {_one_line(remark)}" for remark in self.remarks()]
        return "\n".join([printed([table]), *remarks, self.sentence])

    def _facts(self) -> dict[str, object]:
        return {"models": len(self.rows), "": self.sentence}

    def _rows(self) -> list[tuple[str, ...]]:
        return [self.columns, *self.cells()]


@dataclass(frozen=True, eq=False, kw_only=True)
class Measured:
    """A model on its way into the table."""

    name: str
    kind: str
    train_seconds: float
    ended: str
    """Why the training loop ended; empty for a model in closed form."""
    settings: Mapping[str, object]
    report: Report | RowsReport
    bundle: Path
    bundle_bytes: int
    answer_ms: float
    """Of a question; by rows, of 1,000 rows."""


def model_row(found: Measured, leading: TaskFigure, *others: TaskFigure) -> ModelRow:
    """Return a model's row of the table."""
    return ModelRow(
        name=found.name,
        kind=found.kind,
        quality=leading.value,
        interval=leading.interval,
        behind=leading.behind,
        train_seconds=found.train_seconds,
        bundle_bytes=found.bundle_bytes,
        answer_ms=found.answer_ms,
        stopped=found.ended.startswith(OUT_OF_TIME),
        note=found.ended,
        metrics=found.report.metrics,
        settings=found.settings,
        tasks=others,
    )


def choose(rows: Sequence[ModelRow], metric: str) -> tuple[str, str]:
    """Return the name of the model to take, and the sentence that says why.

    It is the best, unless one that trains faster cannot be told from it: then the fastest such.

    Args:
        rows: Best first.
        metric: The leading one.
    """
    best, others = rows[0], rows[1:]
    cheaper = [r for r in others if r.ties_with_the_best and r.train_seconds < best.train_seconds]
    if cheaper:
        pick = min(cheaper, key=lambda row: row.train_seconds)
        why = (
            f"its {label(metric)} of {pick.quality:.4f} cannot be told from the "
            f"{best.quality:.4f} of {best.name}, the best (behind by {_behind(pick)}), and it "
            f"trains in {pick.train_seconds:.2f} s instead of {best.train_seconds:.2f} s"
        )
    else:
        pick, why = best, f"its {label(metric)} of {best.quality:.4f} is the best"
        if others:
            why += f"; {others[0].name} comes next, behind by {_behind(others[0])}"
    cut = [row.name for row in rows if row.stopped]
    more = f" More time could change this: the budget cut {', '.join(cut)} short." if cut else ""
    return pick.name, f"Take {pick.name}: {why}.{more}"


def label(metric: str) -> str:
    """Return a metric's name as people write it: `ndcg_at_10` is "ndcg@10"."""
    return metric.replace("_at_", "@").replace("_", " ")


def _cells(row: ModelRow, *, is_pick: bool) -> tuple[str, ...]:
    costs = (row.train_seconds, row.bundle_bytes / 1e6, row.answer_ms)
    return (
        f"{row.name} (take it)" if is_pick else row.name,
        *_figure_cells(row.quality, row.interval, row.behind, same="the best"),
        *(c for f in row.tasks for c in _figure_cells(f.value, f.interval, f.behind, same="0")),
        *("" if row.is_baseline else f"{cost:.2f}" for cost in costs),
    )


def _figure_cells(
    value: float, interval: Interval, behind: Comparison | None, *, same: str
) -> tuple[str, str, str]:
    return (
        f"{value:.4f} [{interval.low:.4f}, {interval.high:.4f}]",
        _difference(behind) if behind else same,
        f"{behind.p_value:.4f}" if behind else "",
    )


def _behind(row: ModelRow) -> str:
    return "0" if row.behind is None else _difference(row.behind)


def _difference(behind: Comparison) -> str:
    low, high = behind.interval
    return f"{behind.difference:.4f} [{low:.4f}, {high:.4f}]"


def _escaped(cell: str) -> str:
    return _one_line(cell).replace("|", "\\|")


def _one_line(text: str) -> str:
    return " ".join(text.split())

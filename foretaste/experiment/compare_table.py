"""What a comparison of models found: a table, and which of them to take."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from foretaste.evaluation.bootstrap import Interval
from foretaste.evaluation.compare import Comparison

COLUMNS = ("model", "quality", "behind the best", "p", "training s", "bundle MB", "answer ms")
_WIDTH = 200
"""More than a table of usual names needs, so that nothing is folded."""


@dataclass(frozen=True, kw_only=True)
class ModelRow:
    """A model that was trained, measured and asked."""

    name: str
    kind: str
    quality: float
    """Mean of the leading metric over users."""
    interval: Interval
    """95 % bootstrap interval of it."""
    behind: Comparison | None
    """The best less this one, paired by user; None for the best itself."""
    train_seconds: float
    bundle_bytes: int
    """All files of the bundle, the training events among them."""
    answer_ms: float
    """Median over single questions, put to the model as it is served."""
    stopped: bool
    """Whether the budget ended its training."""
    note: str
    """How its training ended; empty for a model in closed form."""
    metrics: Mapping[str, float]
    settings: Mapping[str, object]
    """Its whole recipe."""

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


@dataclass(frozen=True, eq=False, kw_only=True)
class ModelComparison:
    """Several models on one holdout. Printed, it is a table and the sentence."""

    metric: str
    """The leading one."""
    rows: tuple[ModelRow, ...]
    """Best quality first; one at least."""
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

    def cells(self) -> list[tuple[str, ...]]:
        """Return the table's rows as text, under `COLUMNS`."""
        measured = [_cells(row, is_pick=row.name == self.pick) for row in self.rows]
        blank = ("",) * (len(COLUMNS) - 2)
        return measured + [(row.name, "failed", *blank) for row in self.failed]

    def remarks(self) -> list[str]:
        """Return how trainings ended, why models failed, and what the columns mean."""
        ended = [f"{row.name}: {row.note}" for row in self.rows if row.note]
        failed = [f"{row.name} failed: {row.error}" for row in self.failed]
        return [*ended, *failed, *self.notes]

    def title(self) -> str:
        """Return what the table shows."""
        users = "1 user" if self.users == 1 else f"{self.users:,} users"
        return f"{label(self.metric)} on the test part ({self.split}), {users}"

    def to_json(self) -> dict[str, object]:
        """Return all of it as plain JSON values."""
        return {
            "metric": self.metric,
            "split": self.split,
            "users": self.users,
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
        table = [COLUMNS, ("---",) * len(COLUMNS), *self.cells()]
        lines = [f"| {' | '.join(_escaped(cell) for cell in row)} |" for row in table]
        shown = [f"![quality against cost]({picture})"] if picture else []
        notes = "\n".join(f"- {_one_line(remark)}" for remark in self.remarks())
        parts = [f"# {self.title()}", "\n".join(lines), *shown, notes, f"**{self.sentence}**"]
        return "\n\n".join(parts) + "\n"

    def __str__(self) -> str:
        out = Console(file=io.StringIO(), width=_WIDTH, color_system=None, force_terminal=False)
        table = Table(*COLUMNS, title=self.title(), title_justify="left")
        for row in self.cells():
            table.add_row(*(escape(cell) for cell in row))
        out.print(table, highlight=False)
        text: str = out.file.getvalue()  # type: ignore[attr-defined]  # it is the StringIO above
        lines = [line.rstrip() for line in text.splitlines()]
        lines += [f"· {_one_line(remark)}" for remark in self.remarks()]
        return "\n".join([*lines, self.sentence])


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
    low, high = row.interval
    return (
        f"{row.name} (take it)" if is_pick else row.name,
        f"{row.quality:.4f} [{low:.4f}, {high:.4f}]",
        _behind(row) if row.behind else "the best",
        f"{row.behind.p_value:.4f}" if row.behind else "",
        f"{row.train_seconds:.2f}",
        f"{row.bundle_bytes / 1e6:.2f}",
        f"{row.answer_ms:.2f}",
    )


def _behind(row: ModelRow) -> str:
    if row.behind is None:
        return "0"
    low, high = row.behind.interval
    return f"{row.behind.difference:.4f} [{low:.4f}, {high:.4f}]"


def _escaped(cell: str) -> str:
    return _one_line(cell).replace("|", "\\|")


def _one_line(text: str) -> str:
    return " ".join(text.split())

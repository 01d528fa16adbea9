"""What an evaluation found, with every choice that could have changed it.

Shape legend: U users that had something to find.
"""

import io
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field

import numpy as np
import polars as pl
from jaxtyping import Float64, Int64
from rich.console import Console
from rich.table import Table
from rich.text import Text

from foretaste.arguments import checked
from foretaste.errors import DataError
from foretaste.evaluation.bootstrap import Interval
from foretaste.shown import Shown

_FORMAT = 1
_WIDE = 1_000_000


@dataclass(frozen=True, kw_only=True)
class Slice:
    """The same metrics over some of the queries or targets."""

    group: str
    """What was sliced by, such as "history length"."""
    label: str
    """Which slice it is, such as "10 to 19 events"."""
    users: int
    queries: int
    targets: int
    metrics: Mapping[str, float]
    """Mean over the slice's users, in whose mean only what belongs to the slice is counted."""


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Report(Shown):
    """The metrics of one model on one holdout. Printed, it is a table."""

    model: str
    """Name of the model's class."""
    holdout: str
    """"validation" or "test"."""
    holdout_digest: str
    """SHA-256 of what was to be predicted: only reports of equal ones can be compared."""
    k: tuple[int, ...]
    metrics: Mapping[str, float]
    """Name to mean over users; every name ends in `_at_K`, and `suffix`."""
    intervals: Mapping[str, Interval]
    """Name to 95 % interval; coverage, which is no mean over users, has none."""
    user_idx: Int64[np.ndarray, " U"]
    """The users that had something to find, ascending."""
    per_user: Mapping[str, Float64[np.ndarray, " U"]]
    """Name to each user's value, the mean over the user's queries; empty if left out."""
    counts: Mapping[str, int]
    """How much was evaluated, and how much was left out, by reason."""
    notes: tuple[str, ...]
    """Every choice that could have changed a number, one sentence each."""
    slices: tuple[Slice, ...] = ()
    settings: Mapping[str, object] = field(default_factory=dict)
    """What decided the training run, as plain JSON values."""
    seed: int = 0
    """Of the training run."""
    suffix: str = ""
    """What the names of metrics end in after `_at_K`, such as `_sampled_99`."""
    chance: Mapping[str, float] = field(default_factory=dict)
    """Name of a metric of accuracy to what a random order of the same candidates gets, on average;
    empty where no intervals were asked for."""

    @property
    def at_chance(self) -> tuple[str, ...]:
        """The metrics whose interval holds their chance level, or lies below it."""
        return tuple(
            name
            for name, level in self.chance.items()
            if name in self.intervals and self.intervals[name].low <= level
        )

    @checked
    def to_json(self, *, per_user: bool = True) -> str:
        """Return the whole report as one JSON document, to the last digit.

        Args:
            per_user: False leaves each user's values out; such a report cannot be compared.
        """
        document = {
            "format": _FORMAT,
            "model": self.model,
            "holdout": self.holdout,
            "holdout_digest": self.holdout_digest,
            "k": list(self.k),
            "metrics": dict(self.metrics),
            "intervals": {name: list(interval) for name, interval in self.intervals.items()},
            "counts": dict(self.counts),
            "notes": list(self.notes),
            "slices": [asdict(part) for part in self.slices],
            "settings": dict(self.settings),
            "seed": self.seed,
            "suffix": self.suffix,
            "chance": dict(self.chance),
            "user_idx": self.user_idx.tolist() if per_user else [],
            "per_user": {n: v.tolist() for n, v in self.per_user.items()} if per_user else {},
        }
        return json.dumps(document, allow_nan=False)

    @staticmethod
    @checked
    def from_json(text: str) -> "Report":
        """Read what `to_json` wrote.

        Raises:
            DataError: It is no report, or one of a later format.
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
            return Report(
                model=document["model"],
                holdout=document["holdout"],
                holdout_digest=document["holdout_digest"],
                k=tuple(document["k"]),
                metrics=document["metrics"],
                intervals={name: Interval(*ends) for name, ends in document["intervals"].items()},
                user_idx=np.array(document["user_idx"], dtype=np.int64),
                per_user={n: np.array(v, np.float64) for n, v in document["per_user"].items()},
                counts=document["counts"],
                notes=tuple(document["notes"]),
                slices=tuple(Slice(**part) for part in document["slices"]),
                settings=document["settings"],
                seed=document["seed"],
                suffix=document.get("suffix", ""),
                chance=document.get("chance", {}),
            )
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise no_report(error, "report") from error

    @checked
    def to_frame(self) -> pl.DataFrame:
        """Return the figures, a row for each metric: its value, 95 % interval and chance level."""
        return figures_frame(self.metrics, self.intervals, self.chance)

    @checked
    def to_markdown(self) -> str:
        """Return the tables and notes as Markdown."""
        parts = [f"## {self._title()}", markdown_table(self._headline())]
        if self.slices:
            parts.append(markdown_table(self._sliced()))
        parts.append("\n".join(f"- {line}" for line in self._remarks()))
        return "\n\n".join(parts) + "\n"

    def __str__(self) -> str:
        tables = [console_table(self._headline(), title=self._title())]
        if self.slices:
            tables.append(console_table(self._sliced(), title="slices"))
        return printed(tables, self._remarks())

    def _remarks(self) -> Iterator[str]:
        yield self._counted()
        if self.chance:
            held = ", ".join(self.at_chance)
            yield "chance: what a random order of the same candidates gets, on average" + (
                f"; no better than that, as the interval reaches down to it: {held}" if held else ""
            )
        yield from self.notes

    def _title(self) -> str:
        users = "1 user" if len(self.user_idx) == 1 else f"{self.counts['users']:,} users"
        return f"{self.model} on {self.holdout}: {users}, {self.counts['catalogue']:,} items"

    def _counted(self) -> str:
        return ", ".join(f"{name} {count:,}" for name, count in self.counts.items())

    def _headline(self) -> list[list[str]]:
        families = list(dict.fromkeys(_family(name) for name in self.metrics))
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

    def _cell(self, name: str) -> str:
        value = f"{self.metrics[name]:.4f}"
        if name not in self.intervals:
            return value
        return "{} [{:.4f}, {:.4f}]".format(value, *self.intervals[name])

    def _sliced(self) -> list[list[str]]:
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

    def _rows(self) -> list[list[str]]:
        return self._headline()


def _family(name: str) -> str:
    return name.rpartition("_at_")[0]


def figures_frame(
    metrics: Mapping[str, float],
    intervals: Mapping[str, Interval],
    chance: Mapping[str, float],
) -> pl.DataFrame:
    """Return figures as a frame with a row for each metric; what a metric lacks is null."""
    rows = [
        (name, value, *intervals.get(name, (None, None)), chance.get(name))
        for name, value in metrics.items()
    ]
    numbers = dict.fromkeys(("value", "low", "high", "chance"), pl.Float64)
    return pl.DataFrame(rows, schema={"metric": pl.String, **numbers}, orient="row")


def console_table(rows: list[list[str]], *, title: str) -> Table:
    """Return rows, the first of which are headings, as a table for a terminal."""
    table = Table(title=Text(title))
    for position, name in enumerate(rows[0]):
        table.add_column(Text(name), justify="left" if position == 0 else "right")
    for row in rows[1:]:
        table.add_row(*map(Text, row))
    return table


def printed(tables: Iterable[Table], notes: Iterable[str] = ()) -> str:
    """Return tables and notes below them as text: nothing is cut or folded, whatever is wide."""
    lines: list[str] = []
    for table in tables:
        title, table.title = table.title, None
        text = io.StringIO()
        # in a notebook, a console shows each table at once in place of writing it
        out = Console(file=text, width=_WIDE, color_system=None, force_jupyter=False)
        out.print(table, highlight=False)
        lines += [str(title), *(line.rstrip() for line in text.getvalue().splitlines())]
    return "\n".join([*lines, *(f"· {note}" for note in notes)])


def markdown_table(rows: Iterable[list[str]]) -> str:
    """Return rows, the first of which are headings, as a table in Markdown."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    lines.insert(1, f"|{' --- |' * lines[0].count(' | ')} --- |")
    return "\n".join(lines)


def latex_table(rows: Iterable[list[str]]) -> str:
    r"""Return rows, the first of which are headings, as a `tabular` with rules of booktabs."""
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


def no_report(error: Exception, what: str) -> DataError:
    """Say why a text is not what `to_json` of a report wrote."""
    match error:
        case json.JSONDecodeError(lineno=line, colno=column):
            why = f"it is no JSON (line {line}, column {column})"
        case KeyError(args=(name,)):
            why = f"it has no {name!r}"
        case _:
            why = "its values are of other types"
    return DataError(
        f"this is not a {what}: {why}; give what to_json wrote, or evaluate the model again",
        name="text",
    )

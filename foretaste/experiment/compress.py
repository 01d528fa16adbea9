"""Compression of a trained model's tables: the frontier of size and quality.

Each kind of table that can be made of a trained one, or trained again, is measured on the test part
and compared with `narrow` and `int8` of the same size; it is recommended only if it is better than
both.

Shape legend: D width of a table.
"""

import copy
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from html import escape
from pathlib import Path
from typing import final

import numpy as np
import polars as pl
import torch
from torch import nn

from foretaste.arguments import checked
from foretaste.data.splits import Split
from foretaste.errors import ConfigError
from foretaste.evaluation.chart import line, page, text
from foretaste.evaluation.compare import Reports, compare, compare_rows
from foretaste.evaluation.report import console_table, printed
from foretaste.experiment.compare_models import answer_ms
from foretaste.experiment.learning import without_l2
from foretaste.experiment.recipe import ExperimentConfig, recipe_of
from foretaste.experiment.run import evaluate_split, read_split, run_experiment
from foretaste.models.layers.table import Dense, DenseConfig, Links, Table
from foretaste.models.layers.table_kinds import KINDS, IdConfig, TableConfig
from foretaste.serving.recommender import build_recommender, load
from foretaste.shown import Shown
from foretaste.training.trained import Trained

Settings = TableConfig | Mapping[str, object]
_MOST_LOST = 1.0


@final
@dataclass(frozen=True, kw_only=True)
class Point:
    """One kind of table, measured."""

    table: dict[str, object]
    """Its settings."""
    trained: bool = False
    """Whether the model was trained with it; otherwise it was made from the bundle's tables."""
    weight_bytes: int
    """Bytes of all weights, on disk and in memory."""
    times_smaller: float
    """The compression factor: bytes of the dense tables over bytes of these."""
    value: float
    loss_percent: float
    """The loss relative to the original's value; negative if it is better."""
    interval: tuple[float, float] | None
    """95 % paired interval of the difference from the original."""
    p50_ms: float
    """Median time of a single answer by the library, in milliseconds."""
    above_narrow: bool | None = None
    """Whether it is better than `narrow` of equal size, by an interval that excludes 0; None: not
    measured."""
    above_int8: bool | None = None
    """Whether it is better than int8 in the same way."""


@final
@dataclass(frozen=True, kw_only=True)
class Frontier(Shown):
    """The cost of kinds of tables in quality, and the recommended one."""

    metric: str
    original: float
    weight_bytes: int
    points: tuple[Point, ...]
    recommended: Point | None
    """The smallest that loses at most 1 % and is better than `narrow` and `int8` of its size."""

    @checked
    def to_json(self) -> str:
        """Return the frontier as JSON values."""
        return json.dumps(asdict(self), indent=1)

    @checked
    def to_frame(self) -> pl.DataFrame:
        """Return a row for each point."""
        return pl.DataFrame(
            [asdict(p) | {"table": json.dumps(p.table)} for p in self.points], strict=False
        )

    def __str__(self) -> str:
        rows = [[str(cell) for cell in row] for row in self._rows()]
        title = (
            f"{self.metric} {self.original:.4f}, {self.weight_bytes / 2**20:,.1f} MiB of weights"
        )
        return f"{printed([console_table(rows, title=title)])}\n{self._facts()['recommended']}"

    def _facts(self) -> dict[str, object]:
        return {
            self.metric: f"{self.original:.4f}",
            "weights": f"{self.weight_bytes / 2**20:,.1f} MiB",
            "recommended": "no kind that loses at most 1 % is better than narrow and int8"
            if self.recommended is None
            else f"{_said(self.recommended.table)} is better than narrow and int8",
        }

    def _rows(self) -> list[tuple[object, ...]]:
        heads = ("table", "times smaller", self.metric, "loss %", "95 % interval", "p50 ms")
        rows = [
            (
                _said(p.table) + (", trained" if p.trained else ""),
                f"{p.times_smaller:.1f}",
                f"{p.value:.4f}",
                f"{p.loss_percent:+.2f}",
                "" if p.interval is None else f"[{p.interval[0]:+.4f}, {p.interval[1]:+.4f}]",
                f"{p.p50_ms:.2f}",
            )
            for p in sorted(self.points, key=lambda p: p.times_smaller)
        ]
        return [heads, *rows]


@checked
def compress_tables(trained: Trained, table: Settings) -> Trained:
    """Return a trained model with its tables converted to another kind; the original is unchanged.

    Args:
        trained: A model with dense tables.
        table: A kind that can be made from a trained table, as settings: `{"kind": "int8"}`.

    Raises:
        ConfigError: The model has no dense tables, all have too few rows, or the kind must be
            trained.
    """
    config, kept = trained.config, _settings(table)
    if not isinstance(getattr(config, "table", None), DenseConfig):
        kind = getattr(getattr(config, "table", None), "kind", "none")
        raise ConfigError(
            f"the model's tables are of kind {kind!r}, and only dense ones are compressed: take a "
            "model that has vectors of ids and was trained with dense tables",
            name="table",
            value=kind,
        )
    if hasattr(config, "graph"):
        kind = str(getattr(config, "kind", ""))
        raise ConfigError(
            f"{kind} answers with vectors that it computed from its tables over a graph, so "
            "smaller tables would not make it smaller: keep its vectors as codes, "
            'build_recommender(trained, index="codes"), or train it with model.table of a kind '
            "that trains",
            name="model.kind",
            value=kind,
        )
    model, made = copy.deepcopy(trained.model), dict[Dense, Table]()
    sides = {
        getattr(part, f"{side}_table", None): side
        for part in model.modules()
        for side in ("user", "item")
    }
    for parent in list(model.modules()):
        for name, part in parent.named_children():
            if isinstance(part, Dense):
                if part not in made:
                    links = partial(_links, trained, sides.get(part, ""))
                    made[part] = kept.compressed(part, links)
                setattr(parent, name, made[part])
    if all(table is dense for dense, table in made.items()):
        rows = max((dense.num_rows for dense in made), default=0)
        raise ConfigError(
            f"the largest table has {rows:,} rows, and tables of fewer than table.from_rows stay "
            "dense, so none would become smaller: set table.from_rows lower",
            name="table.from_rows",
            value=getattr(kept, "from_rows", None),
        )
    # Item vectors computed from the dense tables are cleared. The regression for new users stays as
    # fitted with the dense tables, because fitting it again on pruned rows was worse.
    model.train().eval()
    smaller = config.model_copy(update={"table": kept})
    settings = {**trained.settings, "model": smaller.model_dump(mode="json")}
    return replace(trained, model=model, config=smaller, settings=settings)


def _links(trained: Trained, side: str, kind: str) -> Links | None:
    """Return the links of users or items: the items or users of events, or codes of features.

    Raises:
        ConfigError: Features are requested, and the model has none.
    """
    if side not in ("user", "item"):
        return None  # a table of features' codes
    if kind == "neighbours":
        pair = trained.events.user_idx, trained.events.item_idx
        first, second = (torch.from_numpy(idx.astype(np.int64)) for idx in pair)
        return (first, second) if side == "user" else (second, first)
    features = trained.features
    if features is None:
        raise ConfigError(
            f'table.instead = "{kind}" needs features, and the model has none: set it to '
            '"neighbours" or "mean"',
            name="table.instead",
            value=kind,
        )
    table = features.item_table if side == "item" else features.user_table
    if table is None:
        return None
    row_R = torch.arange(len(table))
    in_bags_R = table.bag_offsets_RG1[:, -1] - table.bag_offsets_RG1[:, 0]
    row_N = [row_R.repeat_interleave(table.code_RC.shape[1]), row_R.repeat_interleave(in_bags_R)]
    return torch.cat(row_N), torch.cat([table.code_RC.flatten(), table.bag_N])


@checked
def compress(
    bundle: Path | str,
    *,
    tables: Sequence[Settings] = (),
    retrain: bool = False,
    recipe: ExperimentConfig | None = None,
    data_dir: Path | str | None = None,
    metric: str = "ndcg_at_10",
    out: Path | str | None = None,
) -> Frontier:
    """Measure kinds of tables, made from a bundle's tables, on the test part of its recipe.

    Each is compared with `narrow` and int8 tables of equal size: rows along the principal
    directions of the trained table, in 32 bits or in 8.

    Args:
        bundle: The folder of a bundle with dense tables.
        tables: Settings to try; none: half, int8, int4, quantised and pruned at several sizes.
        retrain: Also train the recipe again with each trainable kind, 4 and 8 times smaller,
            without an l2 of its objective, which is for separate rows.
        recipe: The recipe of the data and split to measure on; None: the bundle's own.
        data_dir: Folder of its public data.
        metric: A metric of the report; higher is better.
        out: The bundle to write, with the recommended kind, if there is one, or with the only kind
            in `tables`.

    Raises:
        ConfigError: The model has no dense tables, or the report has no such metric.
    """
    trained = load(bundle).trained
    config = recipe or recipe_of(trained)
    measure = _Measure(trained, config, read_split(config, data_dir=data_dir), metric)
    asked = [(table, False) for table in map(_settings, tables or usual_tables(measure.width))]
    if retrain:
        again = [t for times in (4.0, 8.0) for t in trained_tables(times, measure.width)]
        asked += [(table, True) for table in dict.fromkeys(again)]
    for table, by_training in asked:
        measure.with_anchors(table, trained=by_training)
    frontier = measure.frontier()
    chosen = frontier.recommended
    if len(tables) == 1 and not retrain:
        chosen = measure.found[asked[0]][0]
    if out is not None and chosen is not None:
        build_recommender(measure.model(_settings(chosen.table), trained=chosen.trained)).save(out)
    return frontier


@final
class _Measure:
    """The points of one bundle; each is measured once."""

    def __init__(
        self, original: Trained, config: ExperimentConfig, split: Split, metric: str
    ) -> None:
        self.original, self.config, self.split, self.metric = original, config, split, metric
        self.width, self.bytes = width_of(original), table_bytes(original)
        self.report = self._report(original)
        self.found: dict[tuple[TableConfig, bool], tuple[Point, Reports]] = {}
        self._trained: dict[TableConfig, Trained] = {}

    def model(self, table: TableConfig, *, trained: bool) -> Trained:
        """Return the model with another kind of table."""
        if not trained:
            return compress_tables(self.original, table)
        if table not in self._trained:
            recipe = with_table(self.config, table).model_copy(update={"final": "none"})
            self._trained[table] = run_experiment(recipe, self.split, show=False).trained
        return self._trained[table]

    def with_anchors(self, table: TableConfig, *, trained: bool) -> None:
        """Measure a kind, and the baselines of the same size."""
        point, report = self._measured(table, trained=trained)
        above: dict[str, bool] = {}
        for name, anchor in anchors(table, point.times_smaller, self.width).items():
            difference = _difference(report, self._measured(anchor, trained=False)[1], self.metric)
            above[name] = difference is not None and difference[0] > 0
        point = replace(point, above_narrow=above.get("narrow"), above_int8=above.get("int8"))
        self.found[table, trained] = point, report

    def frontier(self) -> Frontier:
        """Return all points, and the smallest that is better than both references."""
        points = tuple(point for point, _ in self.found.values())
        return Frontier(
            metric=self.metric,
            original=self.report.metrics[self.metric],
            weight_bytes=_bytes(self.original.model),
            points=points,
            recommended=recommended(points),
        )

    def _measured(self, table: TableConfig, *, trained: bool) -> tuple[Point, Reports]:
        if (table, trained) not in self.found:
            model = self.model(table, trained=trained)
            report = self._report(model)
            value, before = report.metrics[self.metric], self.report.metrics[self.metric]
            chance = 0.5 if self.metric.startswith("auc") else 0.0
            loss = 100 * (before - value) / (before - chance) if before != chance else 0.0
            point = Point(
                table=table.model_dump(mode="json"),
                trained=trained,
                weight_bytes=_bytes(model.model),
                times_smaller=self.bytes / table_bytes(model),
                value=value,
                loss_percent=loss,
                interval=_difference(report, self.report, self.metric),
                p50_ms=answer_ms(build_recommender(model), k=10),
            )
            self.found[table, trained] = point, report
        return self.found[table, trained]

    def _report(self, trained: Trained) -> Reports:
        report = evaluate_split(trained, self.config, self.split)
        if self.metric not in report.metrics:
            raise ConfigError(
                f"the report has no {self.metric!r}: take one of {', '.join(report.metrics)}",
                name="metric",
                value=self.metric,
            )
        return report


def recommended(points: Sequence[Point]) -> Point | None:
    """Return the smallest that is better than both references of its size and loses at most 1 %."""
    better = [p for p in points if p.above_narrow and p.above_int8 and p.loss_percent <= _MOST_LOST]
    return max(better, key=lambda p: p.times_smaller, default=None)


def _settings(table: Settings) -> TableConfig:
    return IdConfig(table=table).table  # type: ignore[arg-type]  # settings are parsed there


def with_table(recipe: ExperimentConfig, table: TableConfig) -> ExperimentConfig:
    """Return a recipe with another kind of table, without its l2 if the rows share weights."""
    model, objective = recipe.model.model_copy(update={"table": table}), recipe.objective
    objective = None if objective is None else without_l2(model, objective)
    return recipe.model_copy(update={"model": model, "objective": objective})


def usual_tables(width: int) -> list[TableConfig]:
    """Return the kinds to make from trained tables of a width."""
    return [table for kind in KINDS for table in kind.tried(width)]


def trained_tables(times: float, width: int) -> list[TableConfig]:
    """Return the kinds to train again, in tables with about 1/`times` of the bytes."""
    return [table for kind in KINDS for table in kind.retrained(times, width)]


def anchors(table: TableConfig, times: float, width: int) -> dict[str, TableConfig]:
    """Return the baselines of the same size, by kind; empty for a baseline."""
    if times <= 1:
        return {}
    found = [kind.anchor(times, width) for kind in KINDS]
    by_kind = {one.kind: one for one in found if one is not None}
    return {} if table.kind in by_kind else by_kind


def _difference(a: Reports, b: Reports, metric: str) -> tuple[float, float] | None:
    """Return the paired interval over users; None if neither report has this metric."""
    if a.lists is not None and b.lists is not None and metric in a.lists.per_user:
        interval = compare(a.lists, b.lists, metric, resamples=2000).interval
    elif a.rows is not None and b.rows is not None and len(a.rows.tasks) == 1:
        interval = compare_rows(a.rows, b.rows, metric, resamples=1000).interval
    else:
        return None
    return interval.low, interval.high


def _bytes(model: nn.Module) -> int:
    return sum(value.nbytes for value in model.state_dict().values())


def table_bytes(trained: Trained) -> int:
    """Return the bytes of a model's tables."""
    tables = {module for module in trained.model.modules() if isinstance(module, Table)}
    inside = {part for table in tables for part in table.modules() if part is not table}
    return sum(_bytes(table) for table in tables - inside)


def width_of(trained: Trained) -> int:
    """Return the width of a model's widest table; 0 without one."""
    return max(
        (module.width for module in trained.model.modules() if isinstance(module, Table)), default=0
    )


def _said(table: dict[str, object]) -> str:
    settings = ", ".join(
        f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in table.items()
        if name not in ("kind", "from_rows") and value is not None
    )
    return f"{table['kind']} ({settings})" if settings else str(table["kind"])


_LEFT, _TOP, _WIDTH, _HEIGHT = 70.0, 50.0, 480.0, 300.0
_COLOURS = ("#888888", "#3465a4", "#2e8b57", "#c4622d", "#75507b", "#b8860b", "#008b8b", "#a52a2a")


@checked
def frontier_svg(frontier: Frontier) -> str:
    """Plot the metric against the compression factor, with a curve for each kind.

    A bar is the paired interval of the difference from the original, which is the grey line.
    """
    title = f"{frontier.metric} by the size of the tables"
    values = [v for p in frontier.points for v in _ends(p, frontier)] + [frontier.original]
    low, high = min(values), max(values)
    most = max(2.0, *(p.times_smaller for p in frontier.points))

    def at(times: float, value: float) -> tuple[float, float]:
        across = math.log(max(1.0, times)) / math.log(most)
        up = (value - low) / (high - low) if high > low else 0.5
        return _LEFT + across * _WIDTH, _TOP + (1 - up) * _HEIGHT

    base, bottom = at(1.0, frontier.original)[1], _TOP + _HEIGHT
    parts = [
        text(_LEFT, 22.0, title, size=14),
        line(_LEFT, base, _LEFT + _WIDTH, base, "#bbbbbb"),
        text(_LEFT - 8, base + 4, f"{frontier.original:.4f}", anchor="end"),
        text(_LEFT - 8, bottom + 4, f"{low:.4f}", anchor="end"),
        text(_LEFT + _WIDTH / 2, bottom + 40, "times smaller (log scale)", anchor="middle"),
    ]
    for exponent in range(1 + int(math.log2(most))):
        x = at(2.0**exponent, low)[0]
        parts += [line(x, _TOP, x, bottom, "#eeeeee")]
        parts += [text(x, bottom + 18, f"{2**exponent}", anchor="middle")]
    kinds = dict.fromkeys(_curve(p) for p in frontier.points)
    for number, name in enumerate(kinds):
        colour = _COLOURS[number % len(_COLOURS)]
        points = sorted(
            (p for p in frontier.points if _curve(p) == name), key=lambda p: p.times_smaller
        )
        path = " L".join("{:.1f},{:.1f}".format(*at(p.times_smaller, p.value)) for p in points)
        parts.append(f'<path d="M{path}" stroke="{colour}" fill="none"/>')
        for p in points:
            x, y = at(p.times_smaller, p.value)
            ends = [at(p.times_smaller, value)[1] for value in _ends(p, frontier)]
            parts.append(line(x, ends[0], x, ends[1], colour))
            words = f"{_said(p.table)}: {p.times_smaller:.1f} times smaller, {p.value:.4f}"
            parts.append(
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}">'
                f"<title>{escape(words)}</title></circle>"
            )
        parts.append(text(_LEFT + _WIDTH + 16, _TOP + 18 * (number + 1), name, colour=colour))
    return page(parts, width=_LEFT + _WIDTH + 190, height=bottom + 56, title=title)


def _curve(point: Point) -> str:
    return f"{point.table['kind']}{', trained' if point.trained else ''}"


def _ends(point: Point, frontier: Frontier) -> tuple[float, float]:
    """Return the ends of a point's bar."""
    if point.interval is None:
        return point.value, point.value
    return frontier.original + point.interval[0], frontier.original + point.interval[1]

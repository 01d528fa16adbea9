"""What tables of a trained model may lose: a frontier of bytes and quality.

Each kind of table that can be made of a trained one is measured on the test part beside `narrow`
and `int8` of as many bytes; one is recommended only where it is better than both.

Shape legend: D width of a table.
"""

import copy
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import final

import polars as pl
from torch import nn

from foretaste.arguments import checked
from foretaste.errors import ConfigError
from foretaste.evaluation.compare import Reports, compare
from foretaste.evaluation.report import console_table, printed
from foretaste.experiment.recipe import ExperimentConfig
from foretaste.experiment.run import evaluate_split, read_split, recipe_of
from foretaste.models.layers.table import Dense, Table
from foretaste.models.layers.table_settings import IdConfig, TableConfig
from foretaste.models.layers.tables import DenseConfig, NarrowConfig, QuantisedConfig
from foretaste.models.layers.tables_at_rest import HalfConfig, IntegerConfig, PrunedConfig
from foretaste.serving.building import build_recommender, load
from foretaste.shown import Shown
from foretaste.training.trained import Trained

Settings = TableConfig | Mapping[str, object]
_ASKED = 200


@final
@dataclass(frozen=True, kw_only=True)
class Point:
    """One kind of table, measured."""

    table: dict[str, object]
    """Its settings."""
    weight_bytes: int
    """Of all weights, on disk as in memory."""
    times_smaller: float
    """How many times fewer bytes its tables are than dense ones."""
    value: float
    loss_percent: float
    """Of the original's value; below 0 it is better."""
    interval: tuple[float, float] | None
    """95 % paired interval of the difference from the original."""
    p50_ms: float
    """Of an answer by the library, one at a time."""
    above_narrow: bool | None = None
    """Whether it is better than `narrow` of as many bytes by an interval that is clear of 0; None:
    it was not asked."""
    above_int8: bool | None = None
    """Likewise than int8."""


@final
@dataclass(frozen=True, kw_only=True)
class Frontier(Shown):
    """What kinds of tables cost in quality, and which one is worth taking."""

    metric: str
    original: float
    weight_bytes: int
    points: tuple[Point, ...]
    recommended: Point | None
    """The smallest that is better than `narrow` and `int8` of as many bytes."""

    @checked
    def to_json(self) -> str:
        """Return it as JSON."""
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
            "recommended": "no kind is better than narrow and int8 of as many bytes"
            if self.recommended is None
            else f"{_said(self.recommended.table)} is better than narrow and int8",
        }

    def _rows(self) -> list[tuple[object, ...]]:
        heads = ("table", "times smaller", self.metric, "loss %", "95 % interval", "p50 ms")
        rows = [
            (
                _said(p.table),
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
    """Return a trained model whose tables are kept in another kind; the original stays.

    Args:
        trained: With dense tables.
        table: A kind that can be made of a trained table, as settings: `{"kind": "int8"}`.

    Raises:
        ConfigError: It has no dense tables, or the kind must be trained.
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
            f"{kind} answers with vectors that it worked out from its tables over a graph, so "
            "smaller tables would not make it smaller: train it with model.table of a kind that "
            "trains, or take a model without a graph",
            name="model.kind",
            value=kind,
        )
    model, made = copy.deepcopy(trained.model), dict[Dense, Table]()
    for parent in list(model.modules()):
        for name, part in parent.named_children():
            if isinstance(part, Dense):
                if part not in made:
                    made[part] = kept.compressed(part)
                setattr(parent, name, made[part])
    # Item vectors worked out from the other tables are forgotten; how new users are answered stays
    # as the dense tables taught it: learned again from pruned rows it was worse.
    model.train().eval()
    smaller = config.model_copy(update={"table": kept})
    settings = {**trained.settings, "model": smaller.model_dump(mode="json")}
    return replace(trained, model=model, config=smaller, settings=settings)


@checked
def compress(
    bundle: Path | str,
    *,
    tables: Sequence[Settings] = (),
    recipe: ExperimentConfig | None = None,
    data_dir: Path | str | None = None,
    metric: str = "ndcg_at_10",
) -> Frontier:
    """Measure kinds of tables, made of a bundle's, on the test part of its recipe.

    Beside each stand `narrow` and int8 of as many bytes: rows along the principal directions of the
    trained table, in 32 bits or in 8.

    Args:
        bundle: A folder, with dense tables.
        tables: What to try; nothing: half, int8, int4, quantised and pruned at several sizes.
        recipe: Whose data and split to measure on, if not the bundle's own.
        data_dir: Where its public data are.
        metric: Of the report; higher is better.

    Raises:
        ConfigError: The model has no dense tables, or the report has no such metric.
    """
    trained = load(bundle).trained
    config = recipe or recipe_of(trained)
    split = read_split(config, data_dir=data_dir)

    def measured(one: Trained) -> Reports:
        report = evaluate_split(one, config, split)
        if metric not in report.metrics:
            raise ConfigError(
                f"the report has no {metric!r}: take one of {', '.join(report.metrics)}",
                name="metric",
                value=metric,
            )
        return report

    original, width = measured(trained), width_of(trained)
    dense_bytes = table_bytes(trained)
    found: dict[TableConfig, tuple[Point, Reports]] = {}

    def measure(table: TableConfig) -> tuple[Point, Reports]:
        if table not in found:
            smaller = compress_tables(trained, table)
            report = measured(smaller)
            found[table] = (_point(smaller, table, report, original, metric, dense_bytes), report)
        return found[table]

    for table in map(_settings, tables or usual_tables(width)):
        point, report = measure(table)
        above: dict[str, bool] = {}
        for name, anchor in anchors(table, point.times_smaller, width).items():
            difference = _difference(report, measure(anchor)[1], metric)
            above[name] = difference is not None and difference[0] > 0
        point = replace(point, above_narrow=above.get("narrow"), above_int8=above.get("int8"))
        found[table] = (point, report)
    points = tuple(point for point, _ in found.values())
    better = [p for p in points if p.above_narrow and p.above_int8]
    return Frontier(
        metric=metric,
        original=original.metrics[metric],
        weight_bytes=_bytes(trained.model),
        points=points,
        recommended=max(better, key=lambda p: p.times_smaller, default=None),
    )


def _settings(table: Settings) -> TableConfig:
    return IdConfig(table=table).table  # type: ignore[arg-type]  # settings are read there


def usual_tables(width: int) -> list[TableConfig]:
    """Return what is tried for tables of a width."""
    sub_spaces = [n for n in (width // 2, width // 4, width // 8) if n]
    return [
        HalfConfig(),
        IntegerConfig(),
        IntegerConfig(kind="int4"),
        *(QuantisedConfig(sub_spaces=n) for n in sub_spaces),
        *(PrunedConfig(keep=keep) for keep in (0.5, 0.25, 0.125)),
    ]


def anchors(table: TableConfig, times: float, width: int) -> dict[str, TableConfig]:
    """Return narrow and int8 tables of about as many bytes as a dense one of so many `times` fewer.

    A row of int8 takes a byte a number, and four for its scale.
    """
    if isinstance(table, NarrowConfig | IntegerConfig) or times <= 1:
        return {}
    whole = min(width, max(1, round(4 * width / times) - 4))
    return {
        "narrow": NarrowConfig(times=times),
        "int8": IntegerConfig(width=whole if whole < width else None),
    }


def _point(
    trained: Trained,
    table: TableConfig,
    report: Reports,
    original: Reports,
    metric: str,
    dense_bytes: int,
) -> Point:
    value, before = report.metrics[metric], original.metrics[metric]
    chance = 0.5 if metric.startswith("auc") else 0.0
    return Point(
        table=table.model_dump(mode="json"),
        weight_bytes=_bytes(trained.model),
        times_smaller=dense_bytes / table_bytes(trained),
        value=value,
        loss_percent=100 * (before - value) / (before - chance) if before != chance else 0.0,
        interval=_difference(report, original, metric),
        p50_ms=_p50_ms(trained),
    )


def _difference(a: Reports, b: Reports, metric: str) -> tuple[float, float] | None:
    """Return the paired interval over users; None of reports by rows."""
    if a.lists is None or b.lists is None or metric not in a.lists.per_user:
        return None
    interval = compare(a.lists, b.lists, metric, resamples=2000).interval
    return interval.low, interval.high


def _p50_ms(trained: Trained) -> float:
    recommender = build_recommender(trained)
    ids = trained.events.users.ids.head(_ASKED).to_list()
    took = []
    for user in ids:
        started = time.perf_counter()
        recommender.recommend(user, k=10)
        took.append(1e3 * (time.perf_counter() - started))
    return statistics.median(took)


def _bytes(model: nn.Module) -> int:
    return sum(value.nbytes for value in model.state_dict().values())


def table_bytes(trained: Trained) -> int:
    """Return the bytes of a model's tables."""
    tables = {module for module in trained.model.modules() if isinstance(module, Table)}
    inside = {part for table in tables for part in table.children()}
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

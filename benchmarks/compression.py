"""Quality lost by compressed tables, converted or trained as such, beside narrow and int8 ones.

    python benchmarks/compression.py frappe-deepfm --data-dir DATA --keep FOLDER \
        --seeds 3 --out benchmarks/results/compression.json

Each set is a recipe with the changes listed in `SETS`, such as fewer epochs. A point's value is the
mean over seeds, with an interval of the difference from the dense tables, paired by user; a point
is above an anchor if the interval of their difference excludes 0. The figure is written after each
point. Models and reports are kept in `--keep`, so that an interrupted run, or one with more seeds,
continues from there. `--train` also measures kinds that are trained as such, `--times` smaller,
without the l2 of dense tables if their rows share weights; with `--seeds 0` only these.

`made-up` is a synthetic set of `--items` items (1,000,000) and a fifth as many users, written to
`--keep`: popularity by Zipf's law, tastes in 8 dimensions, and a component of each item's vector
that is its own. A user chooses 20 of 200 items drawn by popularity, the best by taste plus noise.
For this set, and for a recipe given by `--recipe`, only the items' table is compressed, and
`times_smaller` refers to it: `gowalla-mf-items --recipe recipes/mf-gowalla-rows.toml` gives the
figure of docs/tables.md.
"""

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import torch

import foretaste as ft
from foretaste.experiment.compress import (
    anchors,
    table_bytes,
    trained_tables,
    usual_tables,
    width_of,
    with_table,
)
from foretaste.experiment.record import run_facts
from foretaste.models.layers.table import DenseConfig
from foretaste.models.layers.table_kinds import QuantisedConfig, TableConfig
from foretaste.models.layers.tables import NarrowConfig
from foretaste.models.layers.tables_at_rest import IntegerConfig

ROOT = Path(__file__).parent.parent
DENSE = DenseConfig()


class Set(NamedTuple):
    """A recipe and the changes to it."""

    recipe: str
    changes: tuple[str, ...]
    metric: str = "ndcg_at_10"
    at_rest: bool = True
    """Whether its tables can be compressed after training; else references are trained too."""


SETS = {
    "frappe-deepfm": Set("deepfm-frappe-rows", (), "auc"),
    "gowalla-mf": Set("mf-gowalla-rows", ()),
    "sports-sasrec": Set("sasrec-sports", ()),
    "ml-1m-sasrec": Set("sasrec-ml1m-fast-rows", ()),
    # A third of the epochs, for kinds that are trained: dense tables get as many.
    "gowalla-mf-short": Set("mf-gowalla-rows", ("training.epochs=10",)),
    "gowalla-lightgcn-short": Set("lightgcn-gowalla", ("training.epochs=6",), at_rest=False),
    "ml-1m-sasrec-short": Set("sasrec-ml1m-fast-rows", ("training.epochs=8",)),
}


MADE_UP = """\
[data]
kind = "files"
files = ["{events}"]
timestamp = "timestamp"
[split]
kind = "temporal"
validation = 0.0
test = {test}
[model]
kind = "mf"
embedding_dim = 64
[objective]
kind = "pairs"
loss = "sampled_softmax"
negatives = 512
[training]
epochs = 10
batch_events = 8192
learning_rate = 1e-2
tables = "lazy_adamw"
patience = "none"
[evaluation]
k = [10]
"""
TASTES, OF_USER, CANDIDATES, ASKED = 8, 20, 200, 20_000


def make_up(num_items: int, folder: Path) -> Path:
    """Write synthetic events and their recipe if they do not exist; return the recipe."""
    folder.mkdir(parents=True, exist_ok=True)
    recipe, file = folder / f"made-up-{num_items}.toml", folder / f"made-up-{num_items}.parquet"
    if recipe.exists():
        return recipe
    rng, num_users = np.random.default_rng(0), num_items // 5
    item_ID = rng.standard_normal((num_items, TASTES), dtype=np.float32)
    item_ID += 0.5 * rng.standard_normal((num_items, TASTES), dtype=np.float32)  # its own
    done = []
    for users in np.array_split(np.arange(num_users), max(1, num_users // 2_000)):
        user_UD = rng.standard_normal((len(users), TASTES), dtype=np.float32)
        # Zipf, exponent 1: log-uniform ranks, and the item's number is its rank.
        drawn = rng.random((len(users), CANDIDATES)) * np.log(num_items + 1)
        item_UC = np.exp(drawn).astype(np.int64) - 1
        score_UC = np.einsum("ucd,ud->uc", item_ID[item_UC], user_UD)
        score_UC += rng.gumbel(size=score_UC.shape)
        best_UK = np.argpartition(-score_UC, OF_USER, axis=1)[:, :OF_USER]
        done.append(np.take_along_axis(item_UC, best_UK, axis=1))
    item = np.concatenate(done).ravel()
    order = rng.permutation(len(item))
    user = np.repeat(np.arange(num_users), OF_USER)[order]
    frame = {"user_id": user, "item_id": item[order], "timestamp": np.arange(len(item))}
    pl.DataFrame(frame).write_parquet(file)
    recipe.write_text(MADE_UP.format(events=file.absolute(), test=ASKED / len(item)))
    return recipe


class Measured(NamedTuple):
    """The measurement of one kind of table with one seed."""

    report: Any
    times_smaller: float


class Bench:
    """One set: its models are trained once, and its reports kept."""

    def __init__(self, name: str, recipe: Path, *, data_dir: Path, keep: Path) -> None:
        self.name, self.data_dir, self.keep = name, data_dir, keep
        self.set = SETS[name] if name in SETS else Set(recipe.stem, ())
        self.recipe = ft.read_experiment(recipe, overrides=self.set.changes)
        self.split = ft.read_split(self.recipe, data_dir=data_dir)
        self.models: dict[int, ft.Trained] = {}
        self.items_alone = name not in SETS
        keep.mkdir(parents=True, exist_ok=True)

    def dense(self, seed: int) -> ft.Trained:
        """Return a seed's model with dense tables; train it if it was not kept."""
        if seed not in self.models:
            place = self.keep / f"{self.name}-{seed}"
            if not place.exists():
                ft.build_recommender(self._trained(DENSE, seed), index="exact").save(place)
            self.models[seed] = ft.load(place).trained
        return self.models[seed]

    def _trained(self, table: TableConfig, seed: int) -> ft.Trained:
        recipe = with_table(self.recipe, table).model_copy(update={"seed": seed})
        return ft.run_experiment(recipe, self.split, show=False).trained

    def here(self, table: TableConfig) -> TableConfig:
        """Keep tables with fewer rows than there are items dense, if the set asks for this."""
        if not self.items_alone or table == DENSE:
            return table
        return table.model_copy(update={"from_rows": self.split.train.num_items})

    def bytes(self, model: ft.Trained) -> int:
        """Return the bytes of the tables that are compressed."""
        if not self.items_alone:
            return table_bytes(model)
        return sum(value.nbytes for value in model.model.item_table.state_dict().values())

    def measured(self, table: TableConfig, seed: int, *, trained: bool) -> Measured:
        """Return the report of a kind, from the file where it is kept."""
        table = self.here(table)
        is_rows = self.set.metric == "auc"
        said = f"{table.model_dump_json()} {trained}"
        digest = hashlib.sha256(said.encode()).hexdigest()[:12]
        place = self.keep / f"{self.name}-{seed}-{table.kind}-{digest}.json"
        if not place.exists():
            if trained:
                model = self._trained(table, seed)
            else:
                dense = self.dense(seed)
                model = dense if table == DENSE else ft.compress_tables(dense, table)
            reports = ft.evaluate_split(model, self.recipe, self.split)
            report: Any = reports.rows if is_rows else reports.lists
            times = self.bytes(self.dense(seed)) / self.bytes(model)
            place.write_text(json.dumps({"times": times, "report": report.to_json()}))
        kept = json.loads(place.read_text())
        kind = ft.RowsReport if is_rows else ft.Report
        return Measured(kind.from_json(kept["report"]), kept["times"])

    def compared(self, a: list[Any], b: list[Any]) -> Any:
        """Compare reports, one a seed."""
        if self.set.metric == "auc":
            return ft.compare_rows(a, b, "auc")
        return ft.compare(a, b, self.set.metric)

    def point(self, table: TableConfig, seeds: range, *, trained: bool) -> dict[str, Any]:
        """Return the loss of a kind, beside both anchors of equal size."""
        found = [self.measured(table, seed, trained=trained) for seed in seeds]
        times = found[0].times_smaller
        reports = [one.report for one in found]
        original = [self.measured(DENSE, seed, trained=False).report for seed in seeds]
        beside = self.compared(reports, original)
        above = {}
        for name, anchor in anchors(table, times, width_of(self.dense(0))).items():
            by_training = not self.set.at_rest
            if by_training and not anchor.trains:
                continue
            other = [self.measured(anchor, seed, trained=by_training).report for seed in seeds]
            above[name] = self.compared(reports, other).interval.low > 0
        chance = 0.5 if self.set.metric == "auc" else 0.0
        return {
            "data": self.name,
            "recipe": self.set.recipe,
            "changes": list(self.set.changes),
            "items": self.split.train.num_items,
            "model": self.recipe.model.kind,
            "kind": table.kind,
            "settings": self.here(table).model_dump(mode="json"),
            "of": "items" if self.items_alone else "all tables",
            "trained": trained,
            "times_smaller": round(times, 2),
            "metric": self.set.metric,
            "value": round(beside.mean_a, 5),
            "loss_percent": round(
                100 * (beside.mean_b - beside.mean_a) / (beside.mean_b - chance), 3
            ),
            "interval": [round(beside.interval.low, 6), round(beside.interval.high, 6)],
            "above_narrow": above.get("narrow"),
            "above_int8": above.get("int8"),
            "seeds": len(seeds),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", help=f"One of {', '.join(SETS)}, made-up, or a name for --recipe.")
    parser.add_argument("--recipe", type=Path)
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--keep", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--train", nargs="+", default=[], help="Kinds to train as such.")
    parser.add_argument("--times", type=float, nargs="+", default=[8.0, 4.0])
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if asked.name == "made-up":
        recipe = make_up(asked.items, asked.keep)
        asked.name = recipe.stem
    else:
        recipe = asked.recipe or ROOT / "recipes" / f"{SETS[asked.name].recipe}.toml"
    bench = Bench(asked.name, recipe, data_dir=asked.data_dir, keep=asked.keep)
    width = width_of(bench.dense(0))
    smallest = QuantisedConfig(sub_spaces=max(1, width // 12), turned=True)  # 48 times
    at_rest = [
        *usual_tables(width),
        NarrowConfig(times=8),
        IntegerConfig(width=max(1, width // 2 - 2)),  # 8 times smaller, like the next one
        IntegerConfig(kind="int4", width=max(1, width - 4)),
        smallest,
    ]
    if bench.items_alone:  # of many items, where each measurement takes minutes
        hidden = IntegerConfig(kind="int4", scale_bits=6)
        few = QuantisedConfig(sub_spaces=max(1, width // 16), turned=True, exact=0.0025)
        at_rest = [few, smallest, hidden, IntegerConfig()]
    for seeds in range(1, asked.seeds + 1):
        times = [bench.measured(table, 0, trained=False).times_smaller for table in at_rest]
        both = [anchors(*one, width) for one in zip(at_rest, times, strict=True)]
        beside = [anchor for found in both for anchor in found.values()]
        for table in dict.fromkeys([*at_rest, *beside]):
            write(asked.out, bench.point(table, range(seeds), trained=False))
    for table in (table for times in asked.times for table in trained_tables(times, width)):
        if table.kind in asked.train:
            write(asked.out, bench.point(table, range(1), trained=True))


def write(out: Path, point: dict[str, Any]) -> None:
    """Write a point into the file; replace the same point with fewer seeds."""
    document: dict[str, Any] = {"points": []}
    if out.exists():
        document = json.loads(out.read_text(encoding="utf-8"))
    same = ("data", "model", "settings", "trained")
    others = [p for p in document["points"] if any(p[key] != point[key] for key in same)]
    document |= {"points": [*others, point], **run_facts()}
    out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(point, flush=True)


if __name__ == "__main__":
    main()

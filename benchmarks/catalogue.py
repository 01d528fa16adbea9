"""Seconds and memory of each stage, from reading to answers, by size of the catalogue.

    python benchmarks/catalogue.py --out benchmarks/results/catalogue.json \
        --items 100000 1000000 10000000 --models mf two_tower sasrec

Events are synthetic (`large_events`): a fifth as many users as items, and two events per item, half
of them by taste and popularity. Each model and size runs in its own process, on one thread: it
reads and splits the events, trains for `--seconds` with a sampled softmax, evaluates on 2,000
users, builds an index and saves the bundle; another process loads the bundle and answers 300
requests. `slopes` are slopes of log seconds on log items between the two largest catalogues: 0
means constant cost, 1 means cost in proportion to the items. The picture beside the record draws
both on logarithmic axes.
"""

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch

import foretaste as ft
from foretaste.evaluation.chart import line, page, text
from foretaste.experiment.record import run_facts

MODELS = {
    "mf": ft.MFConfig(embedding_dim=64),
    "two_tower": ft.TwoTowerConfig(embedding_dim=64),
    "sasrec": ft.SASRecConfig(embedding_dim=64, max_len=20),
}
LEARNING = {
    "pairs": ft.PairsConfig(loss="sampled_softmax", negatives=512),
    "next_item": ft.NextItemConfig(loss="sampled_softmax", negatives=512),
}
CLUSTERS, OF_USER = 1_000, 3
BATCH, ASKED_USERS, ASKED = 8_192, 2_000, 300


def main() -> None:
    asked = parse()
    torch.set_num_threads(1)
    if asked.serve:
        print(json.dumps(served(asked.serve, asked.users)))
        return
    if asked.one:
        print(json.dumps(life(asked.one, asked.items[0], asked.seconds, asked.queries)))
        return
    document: dict[str, Any] = {"rows": []}
    if asked.out.exists():
        document = json.loads(asked.out.read_text(encoding="utf-8"))
    document["what"] = __doc__.split("\n", maxsplit=1)[0]
    for items in asked.items:
        for name in asked.models:
            found, _ = in_process(
                __file__,
                *("--one", name, "--items", str(items)),
                *("--seconds", str(asked.seconds), "--queries", str(asked.queries)),
            )
            rows = [r for r in document["rows"] if (r["model"], r["items"]) != (name, items)]
            document["rows"] = [*rows, {"model": name, "items": items, **found, **run_facts()}]
            document["slopes"] = slopes(document["rows"])
            print(name, items, found, flush=True)
            asked.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    if document["rows"]:
        asked.out.with_suffix(".svg").write_text(drawn(document["rows"]), encoding="utf-8")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--items", type=int, nargs="+", default=[100_000, 1_000_000, 10_000_000])
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--queries", type=int, default=ASKED_USERS, help="that are evaluated")
    parser.add_argument("--one", default="")
    parser.add_argument("--serve", type=Path)
    parser.add_argument("--users", type=int, default=0)
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def in_process(script: str, *told: str) -> tuple[dict[str, Any], float]:
    """Run a part of a script in its own process; return its JSON output and its peak memory in
    GiB.
    """
    with subprocess.Popen([sys.executable, script, *told], stdout=subprocess.PIPE) as call:
        printed = call.stdout.read() if call.stdout else b""
        _, call.returncode, usage = os.wait4(call.pid, 0)
    if call.returncode:
        raise RuntimeError(f"{told} ended with {call.returncode}")
    return json.loads(printed.splitlines()[-1]), usage.ru_maxrss / 2**20


def large_events(num_users: int, num_items: int, *, seed: int) -> pl.DataFrame:
    """Return two events per item: each item once, and as many again by taste and popularity.

    Item i belongs to cluster i mod 1,000, and is number i / 1,000 there by popularity (Zipf's law,
    exponent 1); a user likes three clusters. There is one event per second.
    """
    rng = np.random.default_rng(seed)
    liked = rng.integers(0, CLUSTERS, (num_users, OF_USER), dtype=np.int32)
    user = rng.integers(0, num_users, 2 * num_items, dtype=np.int32)
    cluster = liked[user[:num_items], rng.integers(0, OF_USER, num_items)]
    ranks = num_items // CLUSTERS
    rank = np.exp(rng.random(num_items) * math.log(ranks + 1)).astype(np.int64) - 1
    item = np.concatenate([rank * CLUSTERS + cluster, np.arange(num_items)])
    order = rng.permutation(len(item))
    return pl.DataFrame(
        {"user": user[order], "item": item[order], "time": np.arange(len(item), dtype=np.int64)}
    )


class Stages:
    """Seconds of each stage, and the peak memory of the process up to the stage's end."""

    def __init__(self) -> None:
        self.found: dict[str, dict[str, float]] = {}

    def take(self, name: str, stage: Callable[[], Any]) -> Any:
        started = time.process_time()
        result = stage()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        seconds = round(time.process_time() - started, 3)
        self.found[name] = {"seconds": seconds, "peak_gib": round(peak, 3)}
        print(name, self.found[name], file=sys.stderr, flush=True)
        return result


def life(name: str, num_items: int, seconds: float, queries: int) -> Mapping[str, object]:
    """Return the cost of each stage for one model."""
    num_users, stages = num_items // 5, Stages()
    frames = [stages.take("generate", lambda: large_events(num_users, num_items, seed=0))]
    columns = {"user": "user", "item": "item", "timestamp": "time"}
    events = stages.take("read", lambda: ft.read_interactions(frames.pop(), **columns))
    test = queries / len(events)
    split = stages.take("split", lambda: ft.temporal_split(events, validation=0.0, test=test))
    training = ft.TrainingConfig(epochs=1, batch_events=BATCH, tables="lazy_adamw")
    objective = LEARNING[MODELS[name].usual.objective["kind"]]
    trained = stages.take(
        "fit",
        lambda: ft.fit(
            MODELS[name],
            split,
            training=training,
            objective=objective,
            max_seconds=seconds,
            show=False,
        ),
    )
    report = stages.take("evaluate", lambda: ft.evaluate(trained, split.test, k=(10,)))
    recommender = stages.take("index", lambda: ft.build_recommender(trained))
    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(folder) / "bundle"
        stages.take("save", lambda: recommender.save(bundle))
        size = sum(file.stat().st_size for file in bundle.rglob("*") if file.is_file())
        asked, _ = in_process(__file__, "--serve", str(bundle), "--users", str(num_users))
    (epoch,) = trained.log["epochs"]
    return {
        "users": num_users,
        "events": 2 * num_items,
        "ms_per_step": round(1e3 * BATCH / epoch["events_per_second"], 2),
        "steps": trained.log["steps"],
        "stages": stages.found | {"load": asked["load"]},
        "index_kind": str(recommender.index.kind),
        "answer_p50_ms": asked["p50_ms"],
        "answer_p99_ms": asked["p99_ms"],
        "bundle_gib": round(size / 2**30, 3),
        "queries": len(split.test),
        "ndcg_at_10": round(report.metrics["ndcg_at_10"], 5),
    }


def served(bundle: Path, num_users: int) -> Mapping[str, object]:
    """Load a bundle and request lists of ten, one user after another."""
    stages = Stages()
    recommender = stages.take("load", lambda: ft.load(bundle))
    took = []
    for user in np.random.default_rng(1).integers(0, num_users, ASKED).tolist():
        started = time.perf_counter()
        recommender.recommend(user, k=10)
        took.append(1e3 * (time.perf_counter() - started))
    p50, p99 = np.percentile(took[20:], [50, 99])
    return {"load": stages.found["load"], "p50_ms": round(p50, 3), "p99_ms": round(p99, 3)}


def slopes(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return the slope of each cost between a model's two largest catalogues."""
    found: dict[str, dict[str, float]] = {}
    for name in {row["model"] for row in rows}:
        of_model = sorted((row for row in rows if row["model"] == name), key=lambda r: r["items"])
        if len(of_model) < 2:
            continue
        small, large = (costs(row) for row in of_model[-2:])
        wider = math.log(of_model[-1]["items"] / of_model[-2]["items"])
        found[name] = {
            cost: round(math.log(max(large[cost], 1e-3) / max(small[cost], 1e-3)) / wider, 2)
            for cost in large
        }
    return found


def costs(row: Mapping[str, Any]) -> dict[str, float]:
    stages = {f"{name} seconds": stage["seconds"] for name, stage in row["stages"].items()}
    peak = max(stage["peak_gib"] for stage in row["stages"].values())
    return stages | {
        "ms_per_step": row["ms_per_step"],
        "answer_p50_ms": row["answer_p50_ms"],
        "peak_gib": peak,
    }


PANEL, LEFT, TOP = 320.0, 60.0, 50.0
COLOURS = (
    *("#3465a4", "#2e8b57", "#c4622d", "#75507b", "#888888"),
    *("#a40000", "#c4a000", "#06989a", "#000000"),
)


def drawn(rows: list[dict[str, Any]]) -> str:
    """Draw seconds of each stage, and peak memory, by items; both axes are logarithmic."""
    names = [name for name in MODELS if any(row["model"] == name for row in rows)]
    costs_R = [costs(row) for row in rows]
    shown = [c for c in costs_R[0] if c.endswith("seconds")] + ["peak_gib"]
    values = [max(found[c], 1e-3) for found in costs_R for c in shown]
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    items = [row["items"] for row in rows]
    first, last = math.log10(min(items)), math.log10(max(items))
    bottom, parts = TOP + PANEL, [text(LEFT, 22.0, "Seconds and GiB by items", size=14)]
    step = PANEL + 2 * LEFT
    for panel, name in enumerate(names):
        left = LEFT + panel * step

        def at(number: float, value: float, left: float = left) -> tuple[float, float]:
            across = (math.log10(number) - first) / max(last - first, 1e-9)
            up = (math.log10(max(value, 1e-3)) - low) / (high - low)
            return left + across * PANEL, bottom - up * PANEL

        parts.append(text(left, TOP - 8, name))
        for power in range(low, high + 1):
            y = at(min(items), 10.0**power)[1]
            parts += [line(left, y, left + PANEL, y, "#dddddd")]
            parts += [text(left - 8, y + 4, f"{10.0**power:g}", anchor="end")]
        for number in sorted(set(items)):
            x = at(number, 10.0**low)[0]
            parts.append(text(x, bottom + 18, f"{number:,}", anchor="middle"))
        found = [(r["items"], c) for r, c in zip(rows, costs_R, strict=True) if r["model"] == name]
        found.sort(key=lambda pair: pair[0])
        for colour, cost in zip(COLOURS, shown, strict=False):
            path = " L".join("{:.1f},{:.1f}".format(*at(n, c[cost])) for n, c in found)
            parts.append(f'<path d="M{path}" stroke="{colour}" fill="none" stroke-width="2"/>')
    for number, (colour, cost) in enumerate(zip(COLOURS, shown, strict=False)):
        parts.append(text(LEFT + 130.0 * number, bottom + 44, cost, colour=colour))
    return page(parts, width=len(names) * step + LEFT, height=bottom + 60, title="Cost by items")


if __name__ == "__main__":
    main()

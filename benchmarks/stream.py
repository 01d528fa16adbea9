"""Importing events in blocks, and training from the memory-mapped store.

    python benchmarks/stream.py --out benchmarks/results/stream.json --events 20000000

Events are synthetic, in parts like those of a log (`write_parts`): users and items follow Zipf's
law, a user likes three clusters of items, and times continue from part to part. They are imported
into a store and trained on for `--seconds` of the processor. In turns, about `--memory` of these
events are trained on from arrays in memory, with the same ids and tables. Rates are events per
processor second, the median of the steps. Each stage runs in its own process, whose peak memory
the parent reads; `peak_gib_beyond_tables` excludes the tables and their optimiser state, and
includes the libraries (about 0.4 GiB) and the pages of the store that the system kept in memory.
"""

import argparse
import json
import tempfile
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from catalogue import ASKED_USERS, BATCH, CLUSTERS, LEARNING, MODELS, OF_USER, in_process

import foretaste as ft
from foretaste.data import importing
from foretaste.experiment.record import run_facts
from foretaste.training.fit import Fit

PART = 2_000_000


def main() -> None:
    asked = parse()
    torch.set_num_threads(1)
    match asked.stage:
        case "":
            measure(asked)
        case "generate":
            write_parts(asked.folder, asked.events, asked.items, asked.kind)
            print("{}")
        case "import":
            print(json.dumps(imported(asked.folder)))
        case _:
            print(json.dumps(trained(asked)))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--events", type=int, default=100_000_000)
    parser.add_argument("--memory", type=int, default=10_000_000)
    parser.add_argument("--items", type=int, default=10_000_000)
    parser.add_argument("--kind", default="parquet", choices=["parquet", "csv"])
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--stage", default="", help=argparse.SUPPRESS)
    parser.add_argument("--model", default="mf", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def measure(asked: argparse.Namespace) -> None:
    document: dict[str, Any] = {"models": {}}
    if asked.out.exists():
        document = json.loads(asked.out.read_text(encoding="utf-8"))
    sizes = {"events": asked.events, "items": asked.items, "users": asked.items // 5}
    with tempfile.TemporaryDirectory() as name:
        told = ["--folder", name, "--events", str(asked.events), "--items", str(asked.items)]
        told += ["--kind", asked.kind, "--memory", str(asked.memory)]
        told += ["--seconds", str(asked.seconds)]
        in_process(__file__, "--stage", "generate", *told)
        found, peak = in_process(__file__, "--stage", "import", *told)
        document["import"] = {**sizes, "kind": asked.kind, **found, "peak_gib": round(peak, 3)}
        print(document["import"], flush=True)
        for model in asked.models:
            runs: dict[str, list[Any]] = {"stream": [], "memory": []}
            for _ in range(asked.rounds):
                for stage, of_stage in runs.items():
                    of_stage.append(in_process(__file__, "--stage", stage, "--model", model, *told))
            rates = {
                stage: float(np.mean([run["events_per_cpu_second"] for run, _ in of_stage]))
                for stage, of_stage in runs.items()
            }
            tables = runs["stream"][0][0]["tables_gib"]
            peaks = {stage: max(peak for _, peak in of) for stage, of in runs.items()}
            document["models"][model] = {
                **sizes,
                "events_in_memory": asked.memory,
                "steps": runs["stream"][-1][0]["steps"],
                "tables_gib": tables,
                "peak_gib_beyond_tables": round(peaks["stream"] - tables, 3),
                "in_memory_peak_gib_beyond_tables": round(peaks["memory"] - tables, 3),
                "events_per_cpu_second": round(rates["stream"]),
                "rate_to_in_memory": round(rates["stream"] / rates["memory"], 3),
                **run_facts(),
            }
            print(model, document["models"][model], flush=True)
            asked.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def write_parts(folder: Path, num_events: int, num_items: int, kind: str) -> None:
    """Write skewed events in clusters, with times, in parts of two million.

    A fifth as many users as items; the number of events per user follows Zipf's law, and a user
    likes three of 1,000 clusters, the first of them half of the time. Within a cluster, popularity
    follows Zipf's law. One event in five has any item. A part is a period of time.
    """
    rng, users = np.random.default_rng(0), num_items // 5
    liked_UC = rng.integers(0, CLUSTERS, (users, OF_USER), dtype=np.int16)
    ranks, day = num_items // CLUSTERS, 86_400
    for number, start in enumerate(range(0, num_events, PART)):
        size = min(PART, num_events - start)
        rank = np.exp(rng.random(size) * np.log(users + 1)).astype(np.int64) - 1
        user = np.where(rng.random(size) < 0.3, rank, rng.integers(0, users, size))
        taste = np.minimum(rng.geometric(0.5, size) - 1, OF_USER - 1)
        place = np.exp(rng.random(size) * np.log(ranks + 1)).astype(np.int64) - 1
        item = place * CLUSTERS + liked_UC[user, taste]
        item = np.where(rng.random(size) < 0.2, rng.integers(0, num_items, size), item)
        second = 1_600_000_000 + number * day + np.sort(rng.integers(0, day, size))
        part = pl.DataFrame({"user_id": user, "item_id": item, "time": second})
        path = folder / f"part-{number:04}.{kind}"
        part.write_parquet(path) if kind == "parquet" else part.write_csv(path)


def imported(folder: Path) -> dict[str, Any]:
    importing.IN_MEMORY_BYTES = 0  # small parts are to be read in blocks too
    parts = sorted(folder.glob("part-*"))
    started, clock = time.process_time(), time.perf_counter()
    events = ft.import_events(parts, out=folder / "store", timestamp="time")
    return {
        "imported": len(events),
        "cpu_seconds": round(time.process_time() - started, 1),
        "seconds": round(time.perf_counter() - clock, 1),
        "events_per_cpu_second": round(len(events) / (time.process_time() - started)),
    }


def trained(asked: argparse.Namespace) -> dict[str, Any]:
    """Train for a while, from the store or from arrays in memory; return the rate of the steps."""
    config, took = MODELS[asked.model], list[float]()
    events = ft.open_store(asked.folder / "store")
    if asked.stage == "memory":
        events = first_in_memory(events, asked.memory)
    split = ft.temporal_split(events, validation=0.0, test=ASKED_USERS / len(events))
    step, weights = Fit._step, 0

    def timed(self: Any, *told: Any) -> float:
        nonlocal weights
        took.append(time.process_time())
        weights = sum(value.numel() for value in self.model.parameters())
        if took[-1] - took[0] > asked.seconds:
            raise _EnoughError
        return step(self, *told)

    Fit._step = timed
    training = ft.TrainingConfig(epochs=1, batch_events=BATCH, tables="lazy_adamw")
    objective = LEARNING[config.usual.objective["kind"]]
    with suppress(_EnoughError):
        ft.fit(config, split, training=training, objective=objective, show=False)
    return {
        "steps": len(took) - 1,
        "tables_gib": round(3 * 4 * weights / 2**30, 3),
        "events_per_cpu_second": BATCH / float(np.median(np.diff(took))),
    }


class _EnoughError(Exception):
    """A run has taken its processor seconds."""


def first_in_memory(events: ft.Interactions, num: int) -> ft.Interactions:
    """Copy the events of every n-th user, about `num` events, into memory, with the same ids."""
    share = max(1, len(events) // num)
    keep_U = np.arange(events.num_users) % share == 0
    counts_U = np.diff(events.offsets)
    keep_E = np.repeat(keep_U, counts_U)
    return replace(
        events,
        offsets=np.concatenate([[0], np.cumsum(np.where(keep_U, counts_U, 0))]),
        item_idx=np.array(events.item_idx[keep_E]),
        timestamp_s=np.array(events.timestamp_s[keep_E]),
    )


if __name__ == "__main__":
    main()

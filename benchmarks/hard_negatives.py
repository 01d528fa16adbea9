"""Gain and cost of hard negatives: none, searched while training waits, or in a thread.

    python benchmarks/hard_negatives.py --data-dir DATA --out benchmarks/results/hard-negatives.json

A retriever (`--model`) is trained on one data set with three settings: without hard negatives, with
hard negatives that are searched in its index at the start of each epoch, and with a search in a
thread every `--steps` steps. The epoch is chosen on validation, and the figures are of validation
too: the test is never read. Seconds are processor seconds of all threads.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import foretaste as ft
from foretaste.experiment.record import run_facts

WAYS: dict[str, dict[str, Any]] = {
    "none": {},
    "between epochs": {"hard_negatives": 1, "hard_from": "index"},
    "beside training": {"hard_negatives": 1, "hard_from": "index"},
}
MODELS: dict[str, Any] = {
    "mf": ft.MFConfig(embedding_dim=32),
    "two_tower": ft.TwoTowerConfig(embedding_dim=32),
    "lightgcn": ft.LightGCNConfig(embedding_dim=32),
    "pinsage": ft.PinSageConfig(embedding_dim=32),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="ml-100k")
    parser.add_argument("--model", choices=MODELS, default="mf")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    split = ft.leave_last_split(ft.get_dataset(asked.data, data_dir=asked.data_dir).events)
    name = asked.data if asked.model == "mf" else f"{asked.data}, {asked.model}"
    rows, told_of_run = [], {"part": "validation", "epochs": asked.epochs, "batch": asked.batch}
    for seed in range(asked.seeds):
        for way, told in WAYS.items():
            every = asked.steps if way == "beside training" else 0
            objective = ft.PairsConfig(
                **told, loss="bpr", negatives=16, hard_refresh_steps=every if told else 0
            )
            rows.append({"way": way, "seed": seed, **measured(split, objective, asked, seed)})
            document = json.loads(asked.out.read_text("utf-8")) if asked.out.exists() else {}
            document[name] = told_of_run | {"means": means(rows), "rows": rows, **run_facts()}
            asked.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
            print(rows[-1], document[name]["means"], flush=True)


def means(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return the means of each way over the seeds that all ways have."""
    last = min(sum(row["way"] == way for row in rows) for way in WAYS)
    return {
        way: {
            name: round(float(np.mean([r[name] for r in rows if r["way"] == way][:last])), 4)
            for name in ("ndcg_at_10", "cpu_seconds")
        }
        for way in (WAYS if last else ())
    }


def measured(
    split: ft.Split, objective: ft.PairsConfig, asked: argparse.Namespace, seed: int
) -> dict[str, Any]:
    started = time.process_time()
    trained = ft.fit(
        MODELS[asked.model],
        split,
        seed=seed,
        objective=objective,
        training=ft.TrainingConfig(
            epochs=asked.epochs, batch_events=asked.batch, learning_rate=0.01
        ),
        show=False,
    )
    seconds = time.process_time() - started
    report = ft.evaluate(trained, split.validation, k=(10,))
    return {
        "ndcg_at_10": report.metrics["ndcg_at_10"],
        "cpu_seconds": round(seconds, 1),
        "epochs": len(trained.log["epochs"]),
    }


if __name__ == "__main__":
    main()

"""Training speed and quality of lists in fp32, bf16 and fp16.

Each model is trained on MovieLens 100K, split by time, at default settings.

    python benchmarks/precision.py --data-dir DATA --out benchmarks/results/precision.json
    python benchmarks/precision.py --data-dir DATA --quality mf,lightgcn,sasrec \
        --out benchmarks/results/precision.json

- steps: each model and precision runs in its own process, in turns, `--turns` times: processor
  milliseconds per step of the second epoch (the lowest of all turns), peak memory, and the choice
  of `precision = "auto"`.
- quality: complete runs or `--epochs` epochs; test NDCG@10 of each of `--seeds` seeds in fp32 and
  in each of `--beside`, and the difference of their means over users with its 95 % interval.

The file keeps its entries for other models and kinds.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from validation_share import MODELS

import foretaste as ft
from foretaste.experiment.record import run_facts
from foretaste.training.fit import Fit

PRECISIONS = ("fp32", "bf16", "fp16")


def main() -> None:
    asked = parse()
    torch.set_num_threads(1)
    if asked.one:
        name, precision = asked.one.split(",")
        print(json.dumps(one_run(name, precision, asked)))
        return
    document: dict[str, Any] = {}
    if asked.out.exists():
        document = json.loads(asked.out.read_text(encoding="utf-8"))
    document["what"] = "MovieLens 100K, temporal split, default settings, one thread"
    document["bf16 in hardware"] = native_bf16()
    place = "ndcg_at_10" if asked.quality else "steps"
    for name in (asked.quality or asked.models).split(","):
        for found in quality(name, asked) if asked.quality else [steps(name, asked)]:
            document.setdefault(place, {})[name] = found
            document[f"run of {place}"] = run_facts()
            print(name, found, flush=True)
            asked.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--quality", default="")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, help="most epochs of a run that is for quality")
    parser.add_argument("--beside", nargs="+", choices=PRECISIONS[1:], default=["bf16"])
    parser.add_argument("--one", default="")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def native_bf16() -> bool:
    """Return whether this processor multiplies bf16 without converting it to fp32 first."""
    facts = Path("/proc/cpuinfo")
    return facts.exists() and "avx512_bf16" in facts.read_text(encoding="utf-8")


def steps(name: str, asked: argparse.Namespace) -> Mapping[str, object]:
    """Return the time of a step in each precision."""
    call = [sys.executable, __file__, "--data-dir", str(asked.data_dir), "--one"]
    runs: dict[str, list[dict[str, Any]]] = {precision: [] for precision in (*PRECISIONS, "auto")}
    for _ in range(asked.turns):
        for precision, found in runs.items():
            told = subprocess.run(
                [*call, f"{name},{precision}"], capture_output=True, check=True, text=True
            )
            found.append(json.loads(told.stdout.splitlines()[-1]))
    took = {key: min(run["ms_per_step"] for run in found) for key, found in runs.items()}
    result: dict[str, object] = {
        precision: {
            "ms_per_step": round(took[precision], 2),
            "time_of_fp32": round(took[precision] / took["fp32"], 3),
            "peak_gib": min(run["peak_gib"] for run in runs[precision]),
        }
        for precision in PRECISIONS
    }
    return result | {"auto": [run["precision"] for run in runs["auto"]]}


def one_run(name: str, precision: str, asked: argparse.Namespace) -> Mapping[str, object]:
    """Train two epochs; return the time of a step in the second one."""
    split, began, step = split_of(asked), list[float](), Fit._step
    training = ft.TrainingConfig(epochs=2, precision=precision, validate_every=100)

    def timed(self: Any, *told: Any) -> float:
        began.append(time.process_time())
        return step(self, *told)

    Fit._step = timed
    log = ft.fit(MODELS[name], split, training=training, show=False).log
    second = np.diff(began[len(began) // 2 :])
    return {
        "ms_per_step": 1e3 * float(second.mean()),
        "precision": log["precision"],
        "peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3),
    }


def quality(name: str, asked: argparse.Namespace) -> Iterator[Mapping[str, object]]:
    """Yield the test figures of each precision after each seed."""
    split, most = split_of(asked), {} if asked.epochs is None else {"epochs": asked.epochs}
    reports: dict[str, list[ft.Report]] = {name: [] for name in ("fp32", *asked.beside)}
    for seed in range(asked.seeds):
        for precision, of_precision in reports.items():
            training = ft.TrainingConfig(precision=precision, **most)
            trained = ft.fit(MODELS[name], split, training=training, seed=seed, show=False)
            of_precision.append(ft.evaluate(trained, split.test, k=(10,)))
        values = {
            precision: [round(report.metrics["ndcg_at_10"], 5) for report in of_precision]
            for precision, of_precision in reports.items()
        }
        found: dict[str, Any] = {**values, "most_epochs": asked.epochs}
        for precision in asked.beside:
            difference = ft.compare(reports[precision], reports["fp32"], "ndcg_at_10")
            found |= {
                f"{precision}_minus_fp32": round(difference.difference, 5),
                f"interval_{precision}": [round(end, 5) for end in difference.interval],
                "users": difference.users,
            }
        yield found


def split_of(asked: argparse.Namespace) -> ft.Split:
    return ft.temporal_split(ft.get_dataset("ml-100k", data_dir=asked.data_dir).events)


if __name__ == "__main__":
    main()

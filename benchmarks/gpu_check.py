"""Check that models learn the same on a GPU as on the CPU, and measure their speed.

    python benchmarks/gpu_check.py --out benchmarks/results/gpu-NAME.json

Nine models are trained for 50 steps from the same seed on both, without dropout, because a GPU
draws other masks. The record has the largest relative difference of a loss, and seconds. Then a
step of a large table and an epoch of SASRec are timed. Without CUDA, the script records nothing,
unless `--device cpu` is set to test the script itself; such a report proves nothing about CUDA.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import polars as pl
import torch
from processes import MODELS, losses

import foretaste as ft
from foretaste.experiment.record import run_facts
from foretaste.models.layers.table import Dense
from foretaste.training.settings import make_optimizer

STEPS, BATCH = 50, 512
ALLOWED = 1e-3
"""Relative difference of a loss in 32 bits that a different order of sums may cause."""
USERS, ITEMS = 2000, 1000
EVENTS = BATCH * STEPS + 2 * USERS
"""Two events of each user are validation and test."""
LARGE, WIDTH, LOOK_UPS = 10_000_000, 64, 2**16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--rows", type=int, default=LARGE, help="of the large table")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("there is no CUDA here, so nothing was run: CUDA stays unproven")
    split = made_up()
    found = {name: compared(name, split, options.device) for name in MODELS}
    device = torch.cuda.get_device_name() if options.device == "cuda" else "CPU, twice"
    report = {
        "device": device,
        "proves": "CUDA"
        if options.device == "cuda"
        else "nothing of CUDA: it ran on the CPU twice",
        "facts": run_facts(threads=torch.get_num_threads()),
        "models": found,
        "all_within": all(each["largest_difference"] <= ALLOWED for each in found.values()),
        "table_step_ms": table_step(options.device, options.rows),
        "sasrec_epoch_s": {on: sasrec_epoch(split, on) for on in ("cpu", options.device)},
    }
    text = json.dumps(report, indent=2) + "\n"
    if options.out is None:
        sys.stdout.write(text)
    else:
        options.out.write_text(text)


def made_up() -> ft.Split:
    rng = np.random.default_rng(0)
    items = np.minimum(rng.zipf(1.3, EVENTS) - 1, ITEMS - 1)
    events = pl.DataFrame(
        {
            "user": rng.integers(USERS, size=EVENTS),
            "item": items,
            "time": np.arange(EVENTS),
            "rating": rng.integers(1, 6, EVENTS).astype(np.float32),
        }
    )
    columns = {"user": "user", "item": "item", "timestamp": "time"}
    return ft.leave_last_split(ft.read_interactions(events, **columns, columns=["rating"]))


def compared(name: str, split: ft.Split, device: str) -> dict[str, float]:
    """Train a model on the CPU and on a device; return the difference of losses, and seconds."""
    found, seconds = {}, {}
    for place, on in (("cpu", "cpu"), ("device", device)):
        started = time.perf_counter()
        found[place] = learned(name, split, on)
        seconds[place] = time.perf_counter() - started
    pairs = zip(found["device"], found["cpu"], strict=True)
    return {
        "largest_difference": max(abs(a / b - 1) for a, b in pairs),
        "steps": len(found["cpu"]),
        "cpu_s": round(seconds["cpu"], 2),
        "device_s": round(seconds["device"], 2),
    }


def learned(name: str, split: ft.Split, device: str) -> list[float]:
    """Return a model's first losses on a device."""
    model, objective = MODELS[name]
    without = {field: 0.0 for field in type(model).model_fields if field.endswith("dropout")}
    settings: Any = {"epochs": 1, "batch_events": BATCH, "patience": None, "device": device}
    with TemporaryDirectory() as folder:
        ft.fit(
            model.model_copy(update=without),
            split,
            training=ft.TrainingConfig(**settings),
            objective=objective,
            folder=folder,
            show=False,
        )
        return losses(Path(folder))[:STEPS]


def table_step(device: str, num_rows: int) -> float:
    """Return a step's median milliseconds: look up, compute gradients, update the rows."""
    table = Dense(num_rows, WIDTH).to(device)
    settings = ft.TrainingConfig(tables="row_adagrad")
    optimizer = make_optimizer(list(table.parameters()), settings, tables=[table])
    row_N, found = torch.randint(num_rows, (LOOK_UPS,), device=device), []
    for _ in range(20):
        started = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        loss = table(row_N).square().sum()
        loss.backward()
        optimizer.step()
        loss.item()  # waits for a GPU
        found.append(1000 * (time.perf_counter() - started))
    return round(statistics.median(found[3:]), 3)


def sasrec_epoch(split: ft.Split, device: str) -> float:
    settings: Any = {"epochs": 1, "patience": None, "device": device}
    trained = ft.fit(ft.SASRecConfig(), split, training=ft.TrainingConfig(**settings), show=False)
    log: Any = trained.log
    return round(log["epochs"][0]["seconds"], 2)


if __name__ == "__main__":
    main()

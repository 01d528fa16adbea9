"""Single tasks, Shared-Bottom and MMoE where two tasks conflict as much as they are told to.

Section 3.2 of Ma et al. 2018: two quantities of the same form whose weights have a chosen cosine.
Shared-Bottom and MMoE have as many parameters. Run it with:

    python benchmarks/multitask_synthetic.py --out benchmarks/results/multitask-synthetic.json

A model's figure is its RMSE on the test rows, each task's in its own unit, averaged over the two;
pairs of models are compared over the same seeds, with a t interval of the mean difference.
"""

import argparse
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import scipy.stats
import torch
from torch import nn

import foretaste as ft
from foretaste.data.tasks import INPUT, correlated_tasks
from foretaste.experiment.record import run_facts
from foretaste.models.catalogue import build_model

TASKS = tuple(ft.Task(name=n, kind="regression", column=n) for n in ("first", "second"))
SCHEMA = ft.FeatureSchema(context={INPUT: ft.VectorField(normalise=False)})
PAIRS = (("mmoe", "shared-bottom"), ("mmoe", "single"), ("shared-bottom", "single"))


def models(asked: argparse.Namespace) -> dict[str, list[ft.ModelConfig]]:
    """Return what is compared, each a model or one for each task."""
    same = {"embedding_dim": asked.dim, "user_id": False, "tower_hidden": (8,)}
    mmoe = ft.MMoEConfig(
        tasks=TASKS, num_experts=asked.experts, expert_hidden=(asked.expert_width,), **same
    )
    # As many parameters: the gates' take the place of a few columns of the bottom.
    width = asked.experts * asked.expert_width
    width = round(width * _size(mmoe, asked.dim) / _size(_bottom(TASKS, width, same), asked.dim))
    return {
        "single": [_bottom((task,), width, same) for task in TASKS],
        "shared-bottom": [_bottom(TASKS, width, same)],
        "mmoe": [mmoe],
    }


def _bottom(tasks: tuple[ft.Task, ...], width: int, same: dict) -> ft.SharedBottomConfig:
    return ft.SharedBottomConfig(tasks=tasks, bottom_hidden=(width,), **same)


def _size(config: ft.ModelConfig, dim: int) -> int:
    """Return the parameters above the input."""
    events = correlated_tasks(50, correlation=0, dim=dim)
    features = ft.fit_features(SCHEMA, events)
    model: nn.Module = build_model(config, num_users=50, num_items=1, features=features)
    return sum(p.numel() for name, p in model.named_parameters() if not name.startswith("fields"))


def errors(
    configs: Sequence[ft.ModelConfig], split: ft.Split, seed: int, asked: argparse.Namespace
) -> list[float]:
    """Return the test RMSE of the two tasks."""
    training = ft.TrainingConfig(
        epochs=asked.epochs,
        batch_events=asked.batch,
        learning_rate=asked.learning_rate,
        warmup_steps=100,
        schedule="cosine",
        beta2=0.999,
        patience=None,
        device="cpu",
    )
    found: dict[str, float] = {}
    for config in configs:
        model = ft.fit(config, split, seed=seed, training=training, features=SCHEMA, show=False)
        report = ft.evaluate_rows(model, split, resamples=0)
        found |= {
            task.name: report.metrics[report.name("rmse", task.name)] for task in report.tasks
        }
    return [found[task.name] for task in TASKS]


def run(asked: argparse.Namespace) -> dict[str, object]:
    """Run all models on all correlations and seeds."""
    started, rows = time.perf_counter(), []
    compared = models(asked)
    for correlation in asked.correlations:
        values: dict[str, list[list[float]]] = {name: [] for name in compared}
        for seed in range(asked.seeds):
            events = correlated_tasks(
                asked.rows, correlation=correlation, dim=asked.dim, seed=100 + seed
            )
            split = ft.random_split(events, validation=0.1, test=0.3, seed=seed)
            for name, configs in compared.items():
                values[name].append(errors(configs, split, seed, asked))
                print(f"p {correlation:+.1f} seed {seed} {name:14} {values[name][-1]}", flush=True)
        rows.append(summary(correlation, values))
    return {
        "what": "test RMSE, mean of two tasks; noise 0.1 is the least there can be",
        "settings": {key: str(value) for key, value in vars(asked).items() if key != "out"},
        "models": {n: [c.model_dump(mode="json") for c in cs] for n, cs in compared.items()},
        "rows": rows,
        "seconds": round(time.perf_counter() - started),
        **run_facts(),
    }


def summary(correlation: float, values: dict[str, list[list[float]]]) -> dict[str, object]:
    """Return means over seeds, and paired differences with their 95 % t intervals."""
    means = {name: np.array(own).mean(axis=1) for name, own in values.items()}
    row: dict[str, object] = {
        "correlation": correlation,
        "rmse": {name: round(float(own.mean()), 4) for name, own in means.items()},
        "per_seed": {name: np.array(own).round(4).tolist() for name, own in values.items()},
    }
    for one, other in PAIRS:
        apart = means[one] - means[other]
        reach = scipy.stats.t.ppf(0.975, len(apart) - 1) * apart.std(ddof=1) / math.sqrt(len(apart))
        middle = float(apart.mean())
        ends = [round(middle - reach, 4), round(middle + reach, 4)]
        row[f"{one} - {other}"] = {"mean": round(middle, 4), "interval": ends}
        print(f"p {correlation:+.1f}  {one} - {other}: {middle:+.4f} {ends}", flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--dim", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--correlations", type=float, nargs="+", default=[0.0, 0.5, 1.0])
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--expert-width", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    found = run(asked)
    if asked.out is not None:
        asked.out.parent.mkdir(parents=True, exist_ok=True)
        asked.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

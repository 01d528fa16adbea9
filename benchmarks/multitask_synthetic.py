"""Single tasks, Shared-Bottom and MMoE on two tasks with a chosen conflict.

Section 3.2 of Ma et al. 2018: two quantities of the same form whose weights have a chosen cosine.
Shared-Bottom and MMoE have as many parameters. Run it with:

    python benchmarks/multitask_synthetic.py --out benchmarks/results/multitask-synthetic.json

A model's figure is its test RMSE in the label's unit, averaged over both tasks; pairs of models are
compared over the same seeds, with a t interval of the mean difference.
"""

import argparse
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl
import scipy.stats
import torch
from jaxtyping import Float64
from torch import nn

import foretaste as ft
from foretaste.data.arrays import check_fits
from foretaste.experiment.record import run_facts
from foretaste.models.catalogue import build_model

INPUT = "x"
"""The context column that holds the input, a vector."""


def correlated_tasks(
    num_events: int,
    *,
    correlation: float,
    dim: int = 100,
    scale: float = 1.0,
    frequencies: tuple[float, ...] = (1.0, 2.0, 3.0),
    phases: tuple[float, ...] = (0.0, 1.0, 2.0),
    noise: float = 0.1,
    seed: int = 0,
) -> ft.Interactions:
    r"""Make rows of an input and two quantities, columns `first` and `second`.

    .. math:: w_1 = c\,u_1, \quad w_2 = c\,\big(p\,u_1 + \sqrt{1 - p^2}\,u_2\big), \quad
              y_t = w_t \cdot x + \sum_m \sin(\alpha_m w_t \cdot x + \beta_m) + \epsilon

    with x standard normal, u orthogonal and of length 1. Both tasks have the same form, so that
    with :math:`p = 1` they are one and with :math:`p = 0` they read unrelated things.

    Args:
        num_events: Rows; each is its own user, and all have one item.
        correlation: :math:`p` in [-1, 1], the cosine between the tasks' weights.
        dim: D, at least 2.
        scale: :math:`c`.
        frequencies: :math:`\alpha`.
        phases: :math:`\beta`, as many.
        noise: Standard deviation of :math:`\epsilon`; no model's RMSE gets below it.
        seed: Decides weights, inputs and noise.

    Raises:
        ConfigError: A number is out of range.
        TooLargeError: The rows would not fit in memory.

    References:
        Ma et al., "Modeling Task Relationships in Multi-task Learning with Multi-gate
        Mixture-of-Experts", KDD 2018, https://doi.org/10.1145/3219819.3220007, section 3.2.
    """
    if not -1 <= correlation <= 1:
        raise ft.ConfigError(
            f"correlation is {correlation}: a cosine lies in [-1, 1]",
            name="correlation",
            value=correlation,
        )
    if dim < 2 or num_events < 1 or len(frequencies) != len(phases):
        raise ft.ConfigError(
            f"{num_events} rows of width {dim}, {len(frequencies)} frequencies and {len(phases)} "
            "phases: give rows, a width of 2 or more, and a phase for each frequency"
        )
    check_fits(
        num_events * dim * 16,
        f"{num_events:,} rows of width {dim:,}",
        "make fewer or narrower ones",
        name="num_events" if num_events > dim else "dim",
        value=max(num_events, dim),
    )
    draw = np.random.default_rng(seed)
    axes, _ = np.linalg.qr(draw.normal(size=(dim, 2)))
    weights_2D = scale * np.array([[1.0, 0.0], [correlation, np.sqrt(1 - correlation**2)]]) @ axes.T
    input_ED = draw.normal(size=(num_events, dim))
    line_E2 = input_ED @ weights_2D.T
    waves_E2 = sum(
        (np.sin(f * line_E2 + phase) for f, phase in zip(frequencies, phases, strict=True)),
        start=np.zeros_like(line_E2),
    )
    label_E2 = line_E2 + waves_E2 + noise * draw.normal(size=line_E2.shape)
    return ft.Interactions(
        users=ft.Vocabulary(pl.Series(range(num_events), dtype=pl.Int64)),
        items=ft.Vocabulary(pl.Series(["row"])),
        offsets=np.arange(num_events + 1, dtype=np.int64),
        item_idx=np.zeros(num_events, np.int32),
        columns={
            name: label_E2[:, place].astype(np.float32)
            for place, name in enumerate(("first", "second"))
        },
        context=_frame(input_ED),
    )


def _frame(input_ED: Float64[np.ndarray, "E D"]) -> pl.DataFrame:
    values = pl.Series(INPUT, input_ED.astype(np.float32))
    return pl.DataFrame({INPUT: values.arr.to_list()})


TASKS = tuple(ft.Task(name=n, kind="regression", column=n) for n in ("first", "second"))
SCHEMA = ft.FeatureSchema(context={INPUT: ft.VectorField(normalise=False)})
PAIRS = (("mmoe", "shared-bottom"), ("mmoe", "single"), ("shared-bottom", "single"))


def models(asked: argparse.Namespace) -> dict[str, list[ft.ModelConfig]]:
    """Return the compared models; each is one model, or one per task."""
    same = {"embedding_dim": asked.dim, "user_id": False, "tower_hidden": (8,)}
    mmoe = ft.MMoEConfig(
        tasks=TASKS, num_experts=asked.experts, expert_hidden=(asked.expert_width,), **same
    )
    # The number of parameters is equal: those of the gates replace a few columns of the bottom.
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
    """Return the number of parameters above the input."""
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

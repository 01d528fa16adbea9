"""The gain of DIN's attention over mean pooling, no history, DeepFM and popularity.

All read the fields of the recipe's DIN and differ only as follows:

- din: the recipe's model.
- mean pooling: DIN without attention; all events of a history have the same weight.
- no history: DIN without histories; a user has only fields, with an id if `model.user_id` is set.
- deepfm: no histories; products of pairs of fields beside the network.
- popularity: no fields; the score is the number of an item's training events.

All but the last are trained on one split with the recipe's objective and training settings, once
per seed. Each user's last event is ranked among 99 drawn items, once uniform and once by
popularity, as `evaluate` does for the recipe. The comparison uses each user's mean over the seeds.

    python benchmarks/din_baselines.py recipes/din-beauty.toml --data-dir DATA \
        --out benchmarks/results/din-beauty.json
"""

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch

import foretaste as ft
from foretaste.experiment.record import run_facts
from foretaste.models.layers.side_fields import RowFieldsConfig

By = Literal["uniform", "popularity"]
WAYS: tuple[By, ...] = ("uniform", "popularity")
METRICS = ("hit_rate_at_10_sampled_99", "ndcg_at_10_sampled_99")
Model = ft.DINConfig | ft.DeepFMConfig | ft.PopularityConfig


def main() -> None:
    asked = parse()
    torch.set_num_threads(1)
    config = ft.read_experiment(asked.recipe, overrides=asked.overrides)
    split = ft.read_split(config, data_dir=asked.data_dir)
    found: dict[By, dict[str, ft.Report]] = {by: {} for by in WAYS}
    for name, model in models(config).items():
        seeds = 1 if isinstance(model, ft.PopularityConfig) else asked.seeds
        trained = [fitted(model, config, split, seed) for seed in range(seeds)]
        for by in WAYS:
            sampled = ft.SampledNegatives(num=99, by=by)
            reports = [ft.evaluate(t, split.test, resamples=0, sampled=sampled) for t in trained]
            found[by][name] = mean_of(reports)
            for report in reports:
                values = ", ".join(f"{metric} {report.metrics[metric]:.4f}" for metric in METRICS)
                print(f"{name}, seed {report.seed}, {by}: {values}", flush=True)
    document = {
        "what": "DIN minus each baseline, each user's last event among 99 drawn",
        "recipe": asked.recipe.stem,
        "overrides": asked.overrides,
        "seeds": asked.seeds,
        "found": [{"drawn": by, "din less": din_less(found[by])} for by in WAYS],
        **run_facts(),
    }
    print(json.dumps(document["found"], indent=1))
    if asked.out is not None:
        asked.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def models(config: ft.ExperimentConfig) -> dict[str, Model]:
    """Return DIN as in the recipe, and the others."""
    din = config.model
    if not isinstance(din, ft.DINConfig):
        raise ft.ConfigError("the recipe's model is not DIN")
    fields = {name: getattr(din, name) for name in RowFieldsConfig.model_fields}
    return {
        "din": din,
        "mean pooling": din.model_copy(update={"pooling": "mean"}),
        "no history": din.model_copy(update={"pooling": "none"}),
        "deepfm": ft.DeepFMConfig(**fields, hidden=din.hidden, dropout=din.dropout),
        "popularity": ft.PopularityConfig(),
    }


def fitted(model: Model, config: ft.ExperimentConfig, split: ft.Split, seed: int) -> ft.Trained:
    if isinstance(model, ft.PopularityConfig):
        return ft.fit(model, split, show=False)
    return ft.fit(
        model,
        split,
        seed=seed,
        training=config.training,
        objective=config.objective,
        features=config.features,
        show=False,
    )


def mean_of(reports: list[ft.Report]) -> ft.Report:
    """Return the first report with each user's mean over all."""
    per_user = {name: np.mean([r.per_user[name] for r in reports], axis=0) for name in METRICS}
    return replace(reports[0], per_user=per_user)


def din_less(reports: dict[str, ft.Report]) -> dict[str, dict[str, dict[str, object]]]:
    """Return the difference between DIN and each of the others, user by user."""
    din = reports["din"]
    return {
        name: {metric: asdict(ft.compare(din, other, metric)) for metric in METRICS}
        for name, other in reports.items()
        if other is not din
    }


if __name__ == "__main__":
    main()

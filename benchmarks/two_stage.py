r"""The gain of a second stage, and of its negatives: one retriever, several rankers.

For each seed of a recipe in two stages, it measures the retriever alone, then rankers whose
negatives are drawn from all items, from the retriever's candidates, or from both. The rankers are
otherwise equal: with folds, each row's candidates and scores come from retrievers fitted to other
users. Differences are paired by user, on the mean over seeds.

    python benchmarks/two_stage.py recipes/two-stage-ml100k.toml --seeds 3 \
        --out benchmarks/results/two-stage-ml100k.json
"""

import argparse
import json
import statistics
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np

import foretaste as ft
from foretaste.experiment.record import run_facts
from foretaste.experiment.run import evaluate_split
from foretaste.experiment.two_stage import fit_first_stage

SHARES = {"random negatives": 0.0, "candidates as negatives": 1.0, "half candidates": 0.5}
"""By name: the share of negatives drawn from the retriever's candidates."""


def main() -> None:
    options = parse()
    config = ft.read_experiment(options.recipe, overrides=options.set or ())
    split = ft.read_split(config, data_dir=options.data_dir)
    reports: dict[str, list[ft.Report]] = {}
    seconds: dict[str, list[float]] = {}
    for seed in range(options.seeds):
        for name, trained in models(config, split, seed, options.shares):
            reports.setdefault(name, []).append(lists(trained, config, split))
            seconds.setdefault(name, []).append(trained.train_seconds)
            print(f"seed {seed}, {name}: {reports[name][-1].metrics['ndcg_at_10']:.5f}", flush=True)
            result = summary(reports, seconds, options, config)
            if options.out:
                options.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--set", action="append", metavar="NAME=VALUE")
    parser.add_argument("--shares", nargs="+", choices=SHARES, default=list(SHARES))
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--out", type=Path, help="write a dated JSON report")
    return parser.parse_args()


def models(config: ft.ExperimentConfig, split: ft.Split, seed: int, shares: list[str]):
    """Yield the retriever alone, and each ranker on its candidates."""
    two, objective = config.model, config.objective
    if not isinstance(two, ft.TwoStageConfig) or not isinstance(objective, ft.RowsConfig):
        raise ft.ConfigError("the recipe's model is not of two stages, or names no objective")
    features = None if config.features is None else ft.fit_features(config.features, split.train)
    fit = partial(ft.fit, seed=seed, features=features)
    first = fit_first_stage(two, fit, split, first_stage=config.first_stage)
    yield "retrieval alone", first.retriever
    for name in shares:
        drawn = objective.model_copy(
            update={"negatives_from": "retriever", "retriever_share": SHARES[name]}
        )
        ranker = fit(
            two.ranker,
            split,
            training=config.training,
            objective=drawn,
            candidates=first.candidates(two, split, drawn),
        )
        join = partial(ft.two_stage, first.retriever, ranker, candidates=two.candidates)
        yield name, join(retriever_weight=two.retriever_weight)
        if two.retriever_weight and not first.folds:  # with folds, the ranker learned to add to it
            yield f"{name}, the ranker's word alone", join()


def lists(trained: ft.Trained, config: ft.ExperimentConfig, split: ft.Split) -> ft.Report:
    alone = config.evaluation.model_copy(update={"rows": False})
    reports = evaluate_split(trained, config.model_copy(update={"evaluation": alone}), split)
    if reports.lists is None:
        raise ft.ConfigError("the recipe measures no lists")
    return reports.lists


def summary(
    reports: dict[str, list[ft.Report]],
    seconds: dict[str, list[float]],
    options: argparse.Namespace,
    config: ft.ExperimentConfig,
) -> dict[str, object]:
    means = {name: mean_of(found) for name, found in reports.items()}
    names = list(means)
    pairs = [(a, b) for place, b in enumerate(names) for a in names[place + 1 :]]
    return {
        "benchmark": "two_stage",
        "recipe": options.recipe.stem,
        **run_facts(),
        "settings": config.model_dump(mode="json"),
        "seeds": {name: len(found) for name, found in reports.items()},
        "metrics": {name: dict(report.metrics) for name, report in means.items()},
        "by_seed": {
            name: [report.metrics["ndcg_at_10"] for report in found]
            for name, found in reports.items()
        },
        "train_seconds": {name: statistics.mean(took) for name, took in seconds.items()},
        "differences": {
            f"{a} - {b}": asdict(ft.compare(means[a], means[b], "ndcg_at_10")) for a, b in pairs
        },
    }


def mean_of(found: list[ft.Report]) -> ft.Report:
    """Return a report with each user's mean over the seeds."""
    per_user = {
        name: np.mean([report.per_user[name] for report in found], axis=0)
        for name in found[0].per_user
    }
    metrics = {
        name: statistics.mean(report.metrics[name] for report in found) for name in found[0].metrics
    }
    return replace(found[0], per_user=per_user, metrics=metrics)


if __name__ == "__main__":
    started = time.perf_counter()
    main()
    print(f"{time.perf_counter() - started:.0f} s")

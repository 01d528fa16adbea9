r"""The gain of rankers over each other, over themselves without features, and over popularity.

All recipes have one data set and split, and are trained once per seed; the first recipe's
`[evaluation]` decides what is ranked. Each user's mean over the seeds is compared, user by user:
each recipe with popularity, with itself under the settings of `--without`, and with the recipes
named after it. Popularity cannot rank cold items: among them it gets the figure of chance.

    python benchmarks/paired_rankers.py recipes/deepfm-ml100k-cold.toml \
        recipes/din-ml100k-cold.toml recipes/mmoe-ml100k-cold.toml \
        --without model.item_features=false model.item_id=true \
        --out benchmarks/results/cold-rankers-ml100k.json
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

import foretaste as ft
from foretaste.evaluation.compare import Comparison
from foretaste.experiment.record import run_facts
from foretaste.experiment.run import run_experiment

MEASURED = ("hit_rate", "recall", "ndcg")
POPULARITY = "popularity"


def main() -> None:
    asked = parse()
    torch.set_num_threads(1)
    recipes = {path.stem: ft.read_experiment(path, overrides=asked.set) for path in asked.recipes}
    evaluation = next(iter(recipes.values())).evaluation
    pairs = [(name, POPULARITY) for name in recipes]
    pairs += [(a, b) for place, a in enumerate(recipes) for b in list(recipes)[place + 1 :]]
    if asked.without:
        for path in asked.recipes:
            pairs.append((path.stem, f"{path.stem} without"))
            recipes[pairs[-1][1]] = ft.read_experiment(path, overrides=[*asked.set, *asked.without])
    split = ft.read_split(next(iter(recipes.values())), data_dir=asked.data_dir)
    popular = ft.PopularityConfig()
    first = next(iter(recipes.values()))
    entries = {POPULARITY: first.model_copy(update={"model": popular, "objective": None})} | recipes
    found, seconds = {}, {}
    for name, config in entries.items():
        same = config.model_copy(update={"evaluation": evaluation, "final": "none"})
        reports = []
        for seed in range(1 if name == POPULARITY else asked.seeds):
            ran = run_experiment(same.model_copy(update={"seed": seed}), split, show=False)
            if ran.report.lists is None:
                raise ft.ConfigError("the first recipe measures no lists")
            seconds[name] = round(ran.trained.train_seconds, 1)
            reports.append(ran.report.lists)
            print(f"{name}, seed {seed}: {figures(reports[-1])}", flush=True)
        found[name] = mean_of(reports)
    document = {
        "what": "rankers user by user, the mean over seeds",
        "seeds": asked.seeds,
        "without": asked.without,
        "metrics": {name: figures(report) for name, report in found.items()},
        "differences": {f"{a} - {b}": differences(found[a], found[b]) for a, b in pairs},
        "train_seconds": seconds,
        "notes": list(found[POPULARITY].notes[:2]),
        **run_facts(),
    }
    print(json.dumps(document["differences"], indent=1))
    if asked.out is not None:
        asked.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipes", type=Path, nargs="+")
    parser.add_argument("--without", nargs="+", default=[], metavar="NAME=VALUE")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def mean_of(reports: list[ft.Report]) -> ft.Report:
    """Return the first report with each user's mean over all."""
    per_user = {
        name: np.mean([report.per_user[name] for report in reports], axis=0)
        for name in reports[0].per_user
        if name.startswith(MEASURED)
    }
    return replace(reports[0], per_user=per_user)


def figures(report: ft.Report) -> dict[str, float]:
    return {
        name: round(float(value_U.mean()), 5)
        for name, value_U in report.per_user.items()
        if name.startswith(MEASURED)
    }


def differences(a: ft.Report, b: ft.Report) -> dict[str, dict[str, object]]:
    return {name: rounded(ft.compare(a, b, name)) for name in a.per_user}


def rounded(found: Comparison) -> dict[str, object]:
    return {
        "difference": round(found.difference, 5),
        "interval": [round(end, 5) for end in found.interval],
        "p": round(found.p_value, 5),
        "users": found.users,
    }


if __name__ == "__main__":
    main()

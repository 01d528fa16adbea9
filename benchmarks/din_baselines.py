r"""What DIN's attention brings: against mean pooling, no history, DeepFM and popularity.

All are trained on one split, with the recipe's objective and training, once a seed; each user's
last event is found among 99 drawn items, uniform and popular ones apart. AUC and GAUC are compared
on users drawn again with all their rows, NDCG@10 user by user, both over the mean of the seeds.
NDCG@10 is of these same rows: an item may be drawn twice, unlike in `evaluate`, which ranks the
whole catalogue before it looks at the drawn items, and takes minutes for DIN.

Shape legend: U users, one row each, C their item and those drawn.

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
from jaxtyping import Float64

import foretaste as ft
from foretaste.evaluation.bootstrap import bootstrap_intervals, sign_flip_p_value
from foretaste.evaluation.rows import rows_to_judge
from foretaste.experiment.record import run_facts

By = Literal["uniform", "popularity"]
WAYS: tuple[By, ...] = ("uniform", "popularity")
NUM = 99
GAIN_C = np.where(np.arange(1 + NUM) < 10, 1 / np.log2(np.arange(1 + NUM) + 2), 0.0)
"""What a target at each place adds to NDCG@10."""


def main() -> None:
    asked = parse()
    torch.set_num_threads(1)
    config = ft.read_experiment(asked.recipe, overrides=asked.overrides)
    split = ft.read_split(config, data_dir=asked.data_dir)
    rows: dict[tuple[By, str], list[ft.RowsReport]] = {}
    for seed in range(asked.seeds):
        for name, model in models(config).items():
            trained = fitted(model, config, split, seed)
            for by in WAYS:
                sampled = ft.SampledNegatives(num=NUM, by=by)
                report = ft.evaluate_rows(trained, split, sampled=sampled, resamples=0)
                rows.setdefault((by, name), []).append(report)
                if name == "din" and seed == 0:
                    rows[by, "popularity"] = [by_popularity(report, trained, split, sampled)]
                print(f"{name} seed {seed}, {by}: {dict(report.metrics)}", flush=True)
    document = {
        "what": "DIN less what it is held against, each user's last event among 99 drawn",
        "recipe": asked.recipe.stem,
        "overrides": asked.overrides,
        "seeds": asked.seeds,
        "resamples": asked.resamples,
        "found": [summary(by, rows, asked.resamples) for by in WAYS],
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
    parser.add_argument("--resamples", type=int, default=100, help="of users; AUC takes its time")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def models(config: ft.ExperimentConfig) -> dict[str, ft.DINConfig | ft.DeepFMConfig]:
    """Return DIN as in the recipe, and the others; who reads no history has vectors of users."""
    din = config.model
    if not isinstance(din, ft.DINConfig):
        raise ft.ConfigError("the recipe's model is not DIN")
    return {
        "din": din,
        "mean pooling": din.model_copy(update={"pooling": "mean"}),
        "no history": din.model_copy(update={"pooling": "none", "user_id": True}),
        "deepfm": ft.DeepFMConfig(
            embedding_dim=din.embedding_dim,
            hidden=din.hidden,
            dropout=din.dropout,
            id_dropout=din.id_dropout,
            l2=din.l2,
        ),
    }


def fitted(
    model: ft.DINConfig | ft.DeepFMConfig, config: ft.ExperimentConfig, split: ft.Split, seed: int
) -> ft.Trained:
    return ft.fit(
        model,
        split,
        seed=seed,
        training=config.training,
        objective=config.objective,
        features=config.features,
        show=False,
    )


def by_popularity(
    report: ft.RowsReport, trained: ft.Trained, split: ft.Split, sampled: ft.SampledNegatives
) -> ft.RowsReport:
    """Return what the number of an item's training events would have said of the same rows."""
    judged, _, _ = rows_to_judge(trained, split, part="test", sampled=sampled)
    item_EC = np.concatenate([judged.events.item_idx[:, None], judged.drawn_EN], axis=1)
    share_I = trained.events.item_count / (1 + trained.events.item_count.max())
    return replace(report, model="Popularity", prediction_NT=share_I[item_EC].reshape(-1, 1))


def summary(
    by: By, rows: dict[tuple[By, str], list[ft.RowsReport]], resamples: int
) -> dict[str, object]:
    """Return DIN less each of the others, among items drawn in one way."""
    apart = {}
    for _, name in [key for key in rows if key[0] == by and key[1] != "din"]:
        din, other = rows[by, "din"], rows[by, name]
        compared = [
            ft.compare_rows(din, other, metric, resamples=resamples) for metric in ("auc", "gauc")
        ]
        compared.append(compared_lists(din, other))
        apart[name] = {found.metric: asdict(found) for found in compared}
    return {"drawn": by, "din less": apart}


def compared_lists(a: list[ft.RowsReport], b: list[ft.RowsReport]) -> ft.Comparison:
    """Compare the NDCG@10 of each user, the mean over seeds."""
    value_a_U, value_b_U = (np.mean([ndcg(report) for report in found], axis=0) for found in (a, b))
    apart_U = value_a_U - value_b_U
    return ft.Comparison(
        metric=f"ndcg_at_10_rows_{NUM}",
        users=len(apart_U),
        mean_a=float(value_a_U.mean()),
        mean_b=float(value_b_U.mean()),
        difference=float(apart_U.mean()),
        interval=bootstrap_intervals(apart_U[:, None], resamples=10_000, seed=0)[0],
        p_value=sign_flip_p_value(apart_U, resamples=10_000, seed=0),
    )


def ndcg(report: ft.RowsReport) -> Float64[np.ndarray, " U"]:
    """Return each user's NDCG@10; equal predictions stand in any order, all as likely."""
    prediction_UC = report.prediction_NT.reshape(-1, 1 + NUM)
    better_U = (prediction_UC > prediction_UC[:, :1]).sum(axis=1)
    equal_U = (prediction_UC == prediction_UC[:, :1]).sum(axis=1)
    up_to = np.concatenate([[0.0], GAIN_C.cumsum()])
    mean_U: np.ndarray = (up_to[better_U + equal_U] - up_to[better_U]) / equal_U
    return mean_U


if __name__ == "__main__":
    main()

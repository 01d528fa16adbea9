"""The gain from histories for rankers of several tasks, on a synthetic media log or real data.

- mmoe, shared_bottom: attention over the user's history (`pooling = "attention"`); "without
  history": `pooling = "none"`.
- din: one DIN for each task.
- group by: no model: the mean label of the user and the item's topic in training (on a recipe's
  data, of the user), shrunk towards the overall mean as if by 5 further rows.

All read the same fields and are trained on one split with the same settings, once per seed. On the
media log (`foretaste.data.tasks.media_log`) users' interests last for about 20 impressions
("planted") or for one ("absent", where histories can bring nothing); histories hold clicks, or all
impressions ("of impressions"). A recipe of MMoE or Shared-Bottom replaces the data, features and
settings.

    python benchmarks/history_multitask.py --out benchmarks/results/history-multitask.json
    python benchmarks/history_multitask.py --recipe recipes/mmoe-ciao.toml --data-dir DATA \
        --out benchmarks/results/history-multitask.json

The file keeps its entries for other data.
"""

import argparse
import json
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import polars as pl
import torch

import foretaste as ft
from foretaste.data.splits import TEST
from foretaste.data.tasks import media_log
from foretaste.evaluation.row_metrics import auc
from foretaste.experiment.record import run_facts
from foretaste.models.layers.field_ranker import HistoryConfig

TASKS = (
    ft.Task(name="click", column="click"),
    ft.Task(name="minutes", kind="regression", column="minutes"),
    ft.Task(name="like", column="like"),
)
SCHEMA = ft.FeatureSchema(item={"topic": ft.CategoricalField()})
TRAINING = ft.TrainingConfig(
    epochs=15, batch_events=1024, learning_rate=3e-3, warmup_steps=50, beta2=0.999, patience=3
)
Figures = dict[str, float]


def main() -> None:
    asked = parse()
    torch.set_num_threads(1)
    found: dict[str, object] = {}
    if asked.recipe is None:
        for name, history in (("media log, planted", True), ("media log, absent", False)):
            found[name] = on_media_log(history, asked) | run_facts()
    else:
        found[asked.recipe.stem] = on_recipe(asked) | run_facts()
    document: dict[str, object] = {}
    if asked.out is not None and asked.out.exists():
        document = json.loads(asked.out.read_text(encoding="utf-8"))
    kept = document.get("data", {})
    document = {
        "what": "the test rows' AUC of each binary task, RMSE of each other one, mean over seeds",
        "data": {**(kept if isinstance(kept, Mapping) else {}), **found},
    }
    if asked.out is not None:
        asked.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", type=Path)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--users", type=int, default=3_000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def on_media_log(history: bool, asked: argparse.Namespace) -> dict[str, object]:  # noqa: FBT001
    """Return the figures of all models on one variant of the log."""
    log = media_log(history=history, num_users=asked.users)
    events = ft.read_interactions(
        log.events,
        user="user",
        item="item",
        timestamp="time",
        columns=["click", "minutes", "like"],
        items=log.items,
    )
    split = ft.temporal_split(events, validation=0.1, test=0.1)
    of_clicks, of_all = ft.RowsConfig(positive="click"), ft.RowsConfig()
    compared = rankers(ft.MMoEConfig(tasks=TASKS, expert_hidden=(32,), tower_hidden=(16,)))
    compared |= rankers(ft.SharedBottomConfig(tasks=TASKS, bottom_hidden=(64,), tower_hidden=(16,)))
    runs = {name: (configs, of_clicks) for name, configs in compared.items()}
    runs["mmoe, history of impressions"] = (compared["mmoe"], of_all)
    runs["din"] = ([ft.DINConfig(task=task, user_id=True) for task in TASKS], of_clicks)
    found = {
        name: measured(name, configs, split, asked.seeds, objective, TRAINING, SCHEMA)
        for name, (configs, objective) in runs.items()
    }
    return {"users": asked.users, "figures": found | {"group by": group_by(split, TASKS, "topic")}}


def on_recipe(asked: argparse.Namespace) -> dict[str, object]:
    """Return the figures of all models on a recipe's data."""
    recipe = ft.read_experiment(asked.recipe, overrides=asked.overrides)
    split, model = ft.read_split(recipe, data_dir=asked.data_dir), recipe.model
    if not isinstance(model, ft.MMoEConfig | ft.SharedBottomConfig):
        raise ft.ConfigError("the recipe's model is neither MMoE nor Shared-Bottom")
    shared = model.model_dump(include=set(HistoryConfig.model_fields) | {"tasks", "dropout"})
    kinds = {"mmoe": ft.MMoEConfig, "shared_bottom": ft.SharedBottomConfig}
    runs = rankers(model)
    for kind, config in kinds.items():
        if kind != model.kind:
            runs |= rankers(config(**shared))
    fields = {name: value for name, value in shared.items() if name not in ("tasks", "pooling")}
    runs["din"] = [ft.DINConfig(**fields, task=task) for task in model.tasks]
    objective = recipe.objective or ft.RowsConfig()
    found = {
        name: measured(
            name, configs, split, asked.seeds, objective, recipe.training, recipe.features
        )
        for name, configs in runs.items()
    }
    if isinstance(objective, ft.RowsConfig) and not objective.num_negatives(model.tasks):
        found["group by"] = group_by(split, model.tasks, None)
    return {"overrides": asked.overrides, "figures": found}


def rankers(config: ft.MMoEConfig | ft.SharedBottomConfig) -> dict[str, list[ft.ModelConfig]]:
    """Return a model with and without histories."""
    kind = config.kind
    return {
        kind: [config.model_copy(update={"pooling": "attention"})],
        f"{kind}, without history": [config.model_copy(update={"pooling": "none"})],
    }


def measured(
    name: str,
    configs: list[ft.ModelConfig],
    split: ft.Split,
    seeds: int,
    objective: ft.RowsConfig,
    training: ft.TrainingConfig,
    features: ft.FeatureSchema | None,
) -> dict[str, object]:
    """Return the figures of a model, or of one model per task: each seed's, and their mean."""
    started, rows = time.perf_counter(), []
    num_drawn = max(
        objective.num_negatives(getattr(c, "tasks", None) or (c.task,)) for c in configs
    )
    sampled = ft.SampledNegatives(num=num_drawn) if num_drawn else None
    for seed in range(seeds):
        figures: Figures = {}
        for config in configs:
            trained = ft.fit(
                config,
                split,
                seed=seed,
                training=training,
                objective=objective,
                features=features,
                show=False,
            )
            figures |= figures_of(ft.evaluate_rows(trained, split, sampled=sampled, resamples=0))
        rows.append(figures)
        print(f"{name}, seed {seed}: {figures}", flush=True)
    return {
        "mean": {key: round(float(np.mean([row[key] for row in rows])), 4) for key in rows[0]},
        "per_seed": rows,
        "seconds": round(time.perf_counter() - started),
    }


def figures_of(report: ft.RowsReport) -> Figures:
    """Return the AUC of binary tasks and the RMSE of others, by the task's name."""
    found: Figures = {}
    for task in report.tasks:
        metric = "auc" if task.kind == "binary" else "rmse"
        found[f"{metric} {task.name}"] = round(report.metrics[report.name(metric, task.name)], 4)
    return found


def group_by(split: ft.Split, tasks: tuple[ft.Task, ...], by: str | None) -> dict[str, object]:
    """Return the same figures for mean training labels by user and by a column of the items."""
    parts = split.train, split.events.select(split.part_E == TEST)
    train, test = (table(events, tasks, by) for events in parts)
    found: Figures = {}
    for task in tasks:
        name = task.column or task.name
        labelled, mean = train.drop_nulls(name), train[name].mean()
        mean_of = (pl.col(name).sum() + 5 * mean) / (pl.len() + 5)
        groups = labelled.group_by("user", "by").agg(predicted=mean_of)
        rows = test.drop_nulls(name).join(
            groups, on=["user", "by"], how="left", maintain_order="left"
        )
        predicted_N = rows["predicted"].fill_null(mean).to_numpy()
        label_N = rows[name].cast(pl.Float64).to_numpy()
        if task.kind == "binary":
            found[f"auc {task.name}"] = round(auc(label_N, predicted_N), 4)
        else:
            found[f"rmse {task.name}"] = round(
                float(np.sqrt(np.mean((label_N - predicted_N) ** 2))), 4
            )
    print(f"group by: {found}", flush=True)
    return {"mean": found}


def table(events: ft.Interactions, tasks: tuple[ft.Task, ...], by: str | None) -> pl.DataFrame:
    """Return users, item groups and labels, one row per event."""
    groups = np.zeros(events.num_items, int) if by is None else events.item_table[by].to_numpy()
    labels = {task.column: events.columns[task.column] for task in tasks if task.column}
    frame = pl.DataFrame({"user": events.user_idx, "by": groups[events.item_idx], **labels})
    return frame.fill_nan(None)


if __name__ == "__main__":
    main()

"""Every model at its defaults on a panel of data sets, beside the baselines.

    python benchmarks/defaults.py --data-dir FOLDER
    python benchmarks/defaults.py --data-dir FOLDER --sets ml-100k --models mf --tuned

A cell is one data set and one model. It is recorded as soon as it is measured, so that an
interrupted run continues from there. Sets are cut to 200,000 events by drawing users with a seed.
Lists: test NDCG@10 over the whole catalogue; the labelled rows of Frappe: AUC and log loss.
Intervals are from a bootstrap over users or rows; seconds are processor seconds of one thread.
`--tuned` adds the same model after 15 pruned trials of its usual ranges. `--shuffled` adds sequence
models trained with each user's items in random order: the loss shows how informative the order is.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import torch

import foretaste as ft
from foretaste.experiment.compare_counts import count_baselines
from foretaste.experiment.compare_plan import BASELINES
from foretaste.experiment.record import run_facts
from foretaste.experiment.run import run_experiment
from foretaste.experiment.tune import tune

MOST_EVENTS, TRIALS, TRIAL_SECONDS = 200_000, 15, 120.0
GIVEN = {"kind": "given", "validation": 0.1}
SETS: Mapping[str, tuple[str, dict[str, object]]] = {
    "s3rec-lastfm": ("s3rec-lastfm", {"kind": "leave_last"}),
    "ml-100k": ("ml-100k", {"kind": "leave_last"}),
    "ml-latest-small": ("ml-latest-small", {"kind": "ratio"}),
    "social-lastfm": ("social-lastfm", GIVEN),
    "tiktok-mm": ("tiktok-mm", {"kind": "given"}),
    "s3rec-beauty": ("s3rec-beauty", {"kind": "leave_last"}),
    "retailrocket": ("retailrocket", {"kind": "temporal", "stop_on": "leave_last"}),
    "social-ciao": ("social-ciao", GIVEN),
    "ml-1m": ("ml-1m-sequences", {"kind": "leave_last"}),
    "gowalla": ("gowalla", {**GIVEN, "validation_by": "blocks"}),
    "frappe": ("frappe-ctr-rows", {"kind": "given"}),
}
"""By name: the data set and its split; the smaller ones come first."""
ROWS = ("frappe",)
"""Sets of labelled rows, for rankers only."""
RETRIEVERS = ("mf", "two_tower", "lightgcn", "pinsage", "sasrec", "bert4rec", "hstu")
BY_ORDER = ("sasrec", "bert4rec", "hstu")
RANKERS = ("gmf", "mlp", "neumf", "deepfm", "din", "shared_bottom", "mmoe")
FIGURES = Path(__file__).parent / "results" / "defaults.json"


def main() -> None:
    options = arguments()
    torch.set_num_threads(1)
    record = json.loads(options.out.read_text()) if options.out.exists() else {}
    record = {"benchmark": "defaults", "sets": {}, "baselines": {}} | record
    started = time.perf_counter()
    for name in options.sets:
        models = RANKERS if name in ROWS else (*BASELINES, *RETRIEVERS, *RANKERS)
        for model in (model for model in models if model in (options.models or models)):
            if options.budget and time.perf_counter() - started > options.budget:
                return
            group = record["baselines" if model in BASELINES else "sets"].setdefault(name, {})
            cell = group.setdefault(model, {})
            if "default" not in cell or options.again:
                cell |= measured(recipe(name, model), name, options)
                keep(record, options.out)
                print(name, model, cell["default"], cell["interval"], cell["seconds"], flush=True)
            if options.tuned and "tuned" not in cell and model != "popularity":
                cell |= searched(recipe(name, model), name, options)
                keep(record, options.out)
                print(name, model, "tuned", cell["tuned"], flush=True)
            if options.shuffled and model in BY_ORDER and "shuffled" not in cell:
                found = measured(recipe(name, model), name, options, shuffled=True)
                cell |= {"shuffled": found["default"], "shuffled_interval": found["interval"]}
                keep(record, options.out)
                print(name, model, "shuffled", cell["shuffled"], flush=True)
        if name in ROWS and name not in record["baselines"]:
            record["baselines"][name] = counted(name, options)
            keep(record, options.out)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, help="where the public data sets lie")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--models", nargs="+", choices=(*BASELINES, *RETRIEVERS, *RANKERS))
    parser.add_argument("--tuned", action="store_true", help="measure each model tuned, too")
    parser.add_argument("--shuffled", action="store_true", help="and without order")
    parser.add_argument("--budget", type=float, help="start no cell after this many seconds")
    parser.add_argument("--cell-seconds", type=float, help="end a training after this many seconds")
    parser.add_argument("--again", action="store_true", help="measure the defaults again")
    parser.add_argument("--out", type=Path, default=FIGURES)
    return parser.parse_args()


def recipe(name: str, model: str) -> ft.ExperimentConfig:
    """Return a recipe that names only a data set, a split and a model."""
    data, split = SETS[name]
    settings = {
        "data": {"kind": "public", "name": data},
        "split": split,
        "model": {"kind": "popularity"},
        "evaluation": {"k": [10]},
    }
    if name in ROWS:
        label = {"name": "label", "column": "label"}
        settings |= {"model": {"kind": "deepfm", "task": label}}
        settings |= {"objective": {"kind": "rows", "positive": "label"}}
        settings |= {"evaluation": {"catalogue": False}}
    config = ft.parse_settings(ft.ExperimentConfig, settings, source=name)
    return alone(config, model)


def alone(config: ft.ExperimentConfig, model: str) -> ft.ExperimentConfig:
    """Return a recipe with the model's own defaults, without a comparison's preset."""
    tasks = getattr(config.model, "task", None)
    told = {} if tasks is None else {"task": tasks}
    if model in ("shared_bottom", "mmoe"):
        told = {"tasks": [tasks or {"name": "done"}]}
    kept = config.model_dump(exclude={"model"})
    return ft.parse_settings(
        ft.ExperimentConfig, kept | {"model": {"kind": model, **told}}, source=model
    )


@cache
def read(name: str, data_dir: Path | None) -> ft.Split:
    events = ft.get_dataset(SETS[name][0], data_dir=data_dir).events
    if len(events) > MOST_EVENTS:
        events = cut(events)
    return ft.make_split(recipe(name, "popularity" if name not in ROWS else "deepfm").split, events)


def cut(events: ft.Interactions) -> ft.Interactions:
    """Return the events of users drawn with a seed until they have 200,000 in total."""
    drawn_U = np.random.default_rng(0).permutation(events.num_users)
    before_U = np.cumsum(np.diff(events.offsets)[drawn_U])
    return events.select(np.isin(events.user_idx, drawn_U[before_U <= MOST_EVENTS]))


def without_order(split: ft.Split) -> ft.Split:
    """Return a split with each user's training items in random order and the same test."""
    events, train = split.events, np.flatnonzero(split.part_E == 0)
    order = np.lexsort((np.random.default_rng(0).random(len(train)), events.user_idx[train]))
    item_E = events.item_idx.copy()
    item_E[train] = item_E[train[order]]
    return replace(split, events=replace(events, item_idx=item_E))


def measured(
    config: ft.ExperimentConfig, name: str, options: argparse.Namespace, *, shuffled: bool = False
) -> dict[str, object]:
    split = read(name, options.data_dir)
    split = without_order(split) if shuffled else split
    started = time.process_time()
    try:
        run = run_experiment(config, split, show=False, max_seconds=options.cell_seconds)
    except ft.TooLargeError as error:  # EASE over a hundred thousand items
        return {"default": None, "interval": None, "seconds": None, "error": str(error)}
    report = run.report.rows if name in ROWS else run.report.lists
    log = run.trained.log
    metric = "auc" if name in ROWS else "ndcg_at_10"
    found = {
        "default": rounded(report.metrics[metric]),
        "interval": [rounded(end) for end in report.intervals[metric]],
        "seconds": round(time.process_time() - started, 1),
        "commit": run_facts()["commit"],
    }
    if name in ROWS:
        found["log_loss"] = rounded(report.metrics["log_loss"])
    epochs = log.get("epochs", ())
    values = [each["validation"] for each in epochs if each["validation"] is not None]
    if values:
        found |= {"validation": rounded(max(values)), "epochs": len(epochs)}
    return found


def searched(
    config: ft.ExperimentConfig, name: str, options: argparse.Namespace
) -> dict[str, object]:
    split = read(name, options.data_dir)
    limit = {"trials": TRIALS, "max_seconds": TRIALS * TRIAL_SECONDS}
    started = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        best = tune(config, split, folder=folder, **limit).best_recipe
    found = measured(best, name, options)
    return {
        "tuned": found["default"],
        "tuned_interval": found["interval"],
        "tuned_seconds": round(time.process_time() - started, 1),
    }


def counted(name: str, options: argparse.Namespace) -> dict[str, object]:
    """Return the AUC of predictions by counting."""
    split = read(name, options.data_dir)
    task = ft.Task(name="label", column="label")
    rows = ft.rows_of(split, "test", tasks=(task,))
    found, _ = count_baselines(split, rows, (task,))
    label_E = rows.label_ET[:, 0].astype(bool)
    return {each.name: {"default": auc(each.prediction_NT[:, 0], label_E)} for each in found}


def auc(score_N: np.ndarray, label_N: np.ndarray) -> float:
    """Return the share of pairs of a 1 and a 0 in which the 1 scores higher; ties count half."""
    _, group_N, count_G = np.unique(score_N, return_inverse=True, return_counts=True)
    rank_N = (np.cumsum(count_G) - (count_G - 1) / 2)[group_N]
    ones = int(label_N.sum())
    above = rank_N[label_N].sum() - ones * (ones + 1) / 2
    return rounded(above / (ones * (len(label_N) - ones)))


def rounded(value: float) -> float:
    return round(float(value), 5)


def keep(record: dict[str, object], path: Path) -> None:
    """Write the record atomically."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(record | run_facts(threads=1), indent=1) + "\n")
    part.replace(path)


if __name__ == "__main__":
    main()

"""SASRec, HSTU, and HSTU without times on MovieLens, with equal settings in one run.

Each user's last event is the test, and the one before it validation; the whole catalogue is ranked.
Width, blocks, heads, length, dropout, objective, optimizer and epochs are the same for all, and the
epoch with the best validation is kept. HSTU is also evaluated on histories without times, which a
request may contain. Differences are paired by user, on the mean over seeds.

    python benchmarks/hstu.py --data-dir ../data --out benchmarks/results/hstu.json
"""

import argparse
import json
import statistics
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

import foretaste as ft
from foretaste.experiment.record import run_facts

LIKE = {"embedding_dim": 64, "num_blocks": 2, "num_heads": 2, "max_len": 100, "dropout": 0.3}
MODELS = {
    "sasrec": ft.SASRecConfig(**LIKE),
    "hstu": ft.HSTUConfig(**LIKE),
    "hstu, without times": ft.HSTUConfig(**LIKE, times=False),
}
OBJECTIVE = ft.NextItemConfig(loss="sampled_softmax", negatives=1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--sets", nargs="+", default=["ml-100k", "ml-latest-small"])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--out", type=Path, help="write a dated JSON report")
    options = parser.parse_args()
    training = ft.TrainingConfig(
        epochs=options.epochs,
        batch_events=2048,
        learning_rate=4e-3,
        ema_decay=0.99,
        patience=None,
        validate_every=1,
        validate_queries="all",
        device="cpu",
    )
    result: dict[str, object] = {
        "benchmark": "hstu",
        **run_facts(),
        "models": {name: MODELS[name].model_dump(mode="json") for name in options.models},
        "objective": OBJECTIVE.model_dump(mode="json"),
        "training": training.model_dump(mode="json"),
    }
    for name in options.sets:
        events = ft.get_dataset(name, data_dir=options.data_dir).events
        split = ft.leave_last_split(events)
        found: dict[str, list[ft.Report]] = {}
        seconds: dict[str, list[float]] = {}
        for seed in range(options.seeds):
            for model in options.models:
                begin = time.process_time()
                trained = ft.fit(
                    MODELS[model],
                    split,
                    seed=seed,
                    objective=OBJECTIVE,
                    training=training,
                    show=False,
                )
                seconds.setdefault(model, []).append(time.process_time() - begin)
                found.setdefault(model, []).append(ft.evaluate(trained, split.test, resamples=0))
                if model == "hstu":
                    hidden = replace(
                        split.test,
                        events=replace(split.test.events, timestamp_s=None),
                        target_timestamp_s=None,
                    )
                    asked = ft.evaluate(trained, hidden, resamples=0)
                    found.setdefault("hstu, evaluated without times", []).append(asked)
                print(name, seed, model, found[model][-1].metrics["ndcg_at_10"], flush=True)
            result[name] = summary(found, seconds)
            if options.out:
                options.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


def summary(
    found: dict[str, list[ft.Report]], seconds: dict[str, list[float]]
) -> dict[str, object]:
    means = {name: mean_of(reports) for name, reports in found.items()}
    return {
        "users": len(means["sasrec"].per_user["ndcg_at_10"]),
        "ndcg_at_10": {name: report.metrics["ndcg_at_10"] for name, report in means.items()},
        "hit_rate_at_10": {name: r.metrics["hit_rate_at_10"] for name, r in means.items()},
        "by_seed": {
            name: [report.metrics["ndcg_at_10"] for report in reports]
            for name, reports in found.items()
        },
        "train_cpu_seconds": {name: statistics.mean(took) for name, took in seconds.items()},
        "less_sasrec": {
            name: asdict(ft.compare(report, means["sasrec"], "ndcg_at_10"))
            for name, report in means.items()
            if name != "sasrec"
        },
    }


def mean_of(reports: list[ft.Report]) -> ft.Report:
    """Return a report with each user's mean over the seeds."""
    names = reports[0].per_user
    return replace(
        reports[0],
        metrics={n: float(np.mean([r.metrics[n] for r in reports])) for n in reports[0].metrics},
        per_user={n: np.mean([r.per_user[n] for r in reports], axis=0) for n in names},
    )


if __name__ == "__main__":
    main()

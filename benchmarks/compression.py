"""What tables lose by kind: made of trained ones, and trained as such, beside narrow and int8.

    python benchmarks/compression.py --data-dir DATA --data ml-100k --model mf \
        --out benchmarks/results/compression.json

The data are cut by each user's last event; models are at default settings, one a seed. A point's
value is the mean over seeds, its interval the paired one over users of the difference from the
dense tables; it is above an anchor where the interval of their difference is clear of 0.
The file keeps what it holds of other data and models.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch

import foretaste as ft
from foretaste.experiment.compress import anchors, table_bytes, usual_tables, width_of
from foretaste.experiment.record import run_facts
from foretaste.models.layers.tables import (
    CompositionalConfig,
    HashConfig,
    NarrowConfig,
    QuantisedConfig,
)

MODELS = {"mf": ft.MFConfig(), "sasrec": ft.SASRecConfig(), "lightgcn": ft.LightGCNConfig()}
TRAINED = (
    NarrowConfig(times=4),
    NarrowConfig(times=8),
    HashConfig(times=4),
    HashConfig(times=8),
    CompositionalConfig(times=4),
    CompositionalConfig(times=8),
    CompositionalConfig(times=8, operation="concatenation"),
    QuantisedConfig(sub_spaces=8),
)
METRIC = "ndcg_at_10"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--data", default="ml-100k")
    parser.add_argument("--model", choices=list(MODELS), default="mf")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    split = ft.leave_last_split(ft.get_dataset(asked.data, data_dir=asked.data_dir).events)
    config = MODELS[asked.model]

    def fitted(table: Any) -> list[ft.Trained]:
        made = config.model_copy(update={"table": table}) if table is not None else config
        return [ft.fit(made, split, seed=seed, show=False) for seed in range(asked.seeds)]

    def reports(models: list[ft.Trained]) -> list[ft.Report]:
        return [ft.evaluate(model, split.test, k=(10,)) for model in models]

    dense = fitted(None)
    original, width = reports(dense), width_of(dense[0])
    measured: dict[Any, tuple[float, list[ft.Report]]] = {}

    def at_rest(table: Any) -> tuple[float, list[ft.Report]]:
        if table not in measured:
            smaller = [ft.compress_tables(model, table) for model in dense]
            times = table_bytes(dense[0]) / table_bytes(smaller[0])
            measured[table] = times, reports(smaller)
        return measured[table]

    def point(table: Any, times: float, found: list[ft.Report], *, trained: bool) -> dict[str, Any]:
        beside = ft.compare(found, original, METRIC)
        above = {
            f"above_{name}": ft.compare(found, at_rest(anchor)[1], METRIC).interval.low > 0
            for name, anchor in anchors(table, times, width).items()
        }
        return {
            "data": asked.data,
            "items": split.train.num_items,
            "model": asked.model,
            "kind": table.kind,
            "settings": table.model_dump(mode="json"),
            "trained": trained,
            "times_smaller": round(times, 2),
            "metric": METRIC,
            "value": round(beside.mean_a, 5),
            "loss_percent": round(100 * (1 - beside.mean_a / beside.mean_b), 2),
            "interval": [round(beside.interval.low, 5), round(beside.interval.high, 5)],
            "above_narrow": above.get("above_narrow"),
            "above_int8": above.get("above_int8"),
            "seeds": asked.seeds,
        }

    points = [point(table, *at_rest(table), trained=False) for table in usual_tables(width)]
    for table in TRAINED:
        models = fitted(table)
        times = table_bytes(dense[0]) / table_bytes(models[0])
        points.append(point(table, times, reports(models), trained=True))
        print(points[-1], flush=True)
    points += [
        point(table, *found, trained=False)
        for table, found in measured.items()
        if table not in usual_tables(width)
    ]
    document: dict[str, Any] = {"points": []}
    if asked.out.exists():
        document = json.loads(asked.out.read_text(encoding="utf-8"))
    others = [p for p in document["points"] if (p["data"], p["model"]) != (asked.data, asked.model)]
    document = {"points": [*others, *points], **run_facts()}
    asked.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

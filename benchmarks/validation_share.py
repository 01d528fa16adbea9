"""Validation's share of the time of a fit at default settings, and the quality of lists.

Each model is trained on MovieLens 100K, split by time, at default settings. Every validation and
the training loop are timed; a load on the machine affects both.

    python benchmarks/validation_share.py --data-dir DATA --epochs 4 \
        --out benchmarks/results/validation-share.json
    python benchmarks/validation_share.py --data-dir DATA --figures after --models mf,sasrec \
        --out benchmarks/results/validation-share.json

- shares: a run of `--epochs` epochs for each model, one seed.
- figures: complete runs; test NDCG@10 of each of `--seeds` seeds with its 95 % interval. Run it
  with an older foretaste on the path as `--figures before`.

The file keeps its entries for other models and kinds.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from statistics import mean

import torch

import foretaste as ft
from foretaste.experiment.record import run_facts
from foretaste.models.catalogue import ModelConfig
from foretaste.training.fit import Fit

RETRIEVERS = (ft.MFConfig, ft.TwoTowerConfig, ft.LightGCNConfig, ft.PinSageConfig)
SEQUENCES = (ft.SASRecConfig, ft.BERT4RecConfig)
PAIRS = (ft.GMFConfig, ft.MLPConfig, ft.NeuMFConfig)
FIELDS = (ft.DeepFMConfig, ft.DINConfig, ft.SharedBottomConfig, ft.MMoEConfig)
MODELS = {made().kind: made() for made in (*RETRIEVERS, *SEQUENCES, *PAIRS, *FIELDS)}


class Clock:
    """Seconds spent in chosen functions."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def around(self, owner: type, name: str) -> None:
        """Measure the time of a method from now on."""
        function: Callable[..., object] = getattr(owner, name)

        def timed(*args: object, **kwargs: object) -> object:
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - started

        setattr(owner, name, timed)


def main() -> None:
    asked = parse()
    torch.set_num_threads(asked.threads)
    split = ft.temporal_split(ft.get_dataset("ml-100k", data_dir=asked.data_dir).events)
    document: dict[str, object] = {}
    if asked.out is not None and asked.out.exists():
        document = json.loads(asked.out.read_text(encoding="utf-8"))
    document["what"] = (
        "MovieLens 100K, temporal split, default settings: seconds in validation over seconds of "
        "the training loop; test NDCG@10 before and after validation took samples"
    )
    document.setdefault("models", {})
    found = measured_shares(split, asked) if asked.figures is None else figures(split, asked)
    for place, name, value in found:
        part = document.setdefault(place, {})
        if isinstance(part, dict):
            part[name] = value
        document["run"] = run_facts()
        if asked.out is not None:
            asked.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--figures", choices=("before", "after"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def measured_shares(
    split: ft.Split, asked: argparse.Namespace
) -> Iterator[tuple[str, str, object]]:
    """Return each model's share, and how it was validated."""
    validation, whole = Clock(), Clock()
    validation.around(Fit, "_validate")
    whole.around(Fit, "run")
    few = ft.temporal_split(split.events.select(split.events.user_idx < 50))
    for name in asked.models.split(","):
        ft.fit(MODELS[name], few, training=ft.TrainingConfig(epochs=1), show=False)  # compiles
        validation.seconds = whole.seconds = 0.0
        training = ft.TrainingConfig(epochs=asked.epochs)
        log = ft.fit(MODELS[name], split, training=training, show=False).log
        share = round(validation.seconds / whole.seconds, 3)
        print(f"{name}: {share} of {whole.seconds:.1f} s, {log.get('validated')}", flush=True)
        yield "models", name, share
        yield "how", name, log.get("validated", "after every epoch on all queries")


def figures(split: ft.Split, asked: argparse.Namespace) -> Iterator[tuple[str, str, object]]:
    """Return each model's test figures, per seed and as a mean."""
    for name in asked.models.split(","):
        runs = [of_seed(MODELS[name], split, seed) for seed in range(asked.seeds)]
        values = [value for run in runs if isinstance(value := run["ndcg_at_10"], float)]
        print(f"{name}: {mean(values):.4f} {runs}", flush=True)
        yield f"ndcg_at_10 {asked.figures}", name, {"mean": round(mean(values), 5), "seeds": runs}


def of_seed(config: ModelConfig, split: ft.Split, seed: int) -> Mapping[str, object]:
    started = time.process_time()
    trained = ft.fit(config, split, seed=seed, show=False)
    spent = time.process_time() - started
    report = ft.evaluate(trained, split.test, k=(10,))
    return {
        "ndcg_at_10": round(report.metrics["ndcg_at_10"], 5),
        "interval": [round(end, 5) for end in report.intervals["ndcg_at_10"]],
        "best_epoch": trained.log["best_epoch"],
        "cpu_seconds": round(spent, 1),
    }


if __name__ == "__main__":
    main()

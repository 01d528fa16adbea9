r"""A table of gains and losses of joint training on real data, over seeds.

Each recipe is trained once per seed, all on one split. Means over seeds are compared, with
intervals from resampled users (rows, if there are no users). For Adult:

    python benchmarks/multitask_transfer.py --data-dir DATA \
        --joint recipes/shared-bottom-adult.toml recipes/mmoe-adult.toml \
        --single recipes/single-income-adult.toml recipes/single-married-adult.toml \
        --out benchmarks/results/transfer-adult.json
"""

import argparse
import json
from pathlib import Path

import torch

import foretaste as ft
from foretaste.evaluation.chart import gates_svg, read_gates
from foretaste.evaluation.compare import transfer
from foretaste.experiment.record import run_facts
from foretaste.models.rankers import MMoE


def reports(path: Path, split: ft.Split, asked: argparse.Namespace) -> list[ft.RowsReport]:
    """Train a recipe once per seed and measure it on the test rows."""
    found = []
    for seed in range(asked.seeds):
        config = ft.read_experiment(path, overrides=[*asked.overrides, f"seed={seed}"])
        model = ft.fit(
            config.model,
            split,
            seed=seed,
            training=config.training,
            objective=config.objective,
            features=config.features,
            show=False,
        )
        found.append(measured(model, config, split))
        print(f"{path.stem} seed {seed}: {dict(found[-1].metrics)}", flush=True)
        if seed == 0 and asked.out is not None and isinstance(model.model, MMoE):
            picture = asked.out.with_name(f"{path.stem}-gates.svg")
            picture.write_text(gates_svg(read_gates(model, split)), encoding="utf-8")
    return found


def measured(model: ft.Trained, config: ft.ExperimentConfig, split: ft.Split) -> ft.RowsReport:
    """Return the report on the test rows, with drawn items if the recipe asks for them."""
    asked = config.evaluation.sampled_negatives
    sampled = ft.SampledNegatives(num=asked, by=config.evaluation.sampled_by) if asked else None
    return ft.evaluate_rows(model, split, sampled=sampled, resamples=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--joint", type=Path, nargs="+", required=True)
    parser.add_argument("--single", type=Path, nargs="+", required=True)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    split = ft.read_split(ft.read_experiment(asked.joint[0]), data_dir=asked.data_dir)
    joint = {path.stem: reports(path, split, asked) for path in asked.joint}
    alone = [reports(path, split, asked) for path in asked.single]
    single = {own[0].tasks[0].name: own for own in alone}
    found = transfer(joint, single)
    print(found)
    if asked.out is not None:
        document = {
            "what": "joint models minus single ones on the test rows",
            "seeds": asked.seeds,
            "rows": [
                {
                    "task": row.task,
                    "model": row.model,
                    "metric": row.compared.metric,
                    "joint": round(row.compared.mean_a, 5),
                    "single": round(row.compared.mean_b, 5),
                    "difference": round(row.compared.difference, 5),
                    "interval": [round(end, 5) for end in row.compared.interval],
                    "p": round(row.compared.p_value, 5),
                    "verdict": row.verdict,
                }
                for row in found.rows
            ],
            **run_facts(),
        }
        asked.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""Time of a step by number of table rows, of the table alone and of matrix factorisation.

    python benchmarks/table_step.py --out benchmarks/results/table-step.json

Every step reads newly drawn distinct rows: 8,192 of the table alone; for MF, 8,192 pairs of
distinct users and items with 512 negatives. Each number of rows has its own process and `peak_gib`;
milliseconds are processor time of one thread, the median of the steps. Ratios compare the fastest
steps, which other processes affect least. They show where `training.tables = "auto"` should switch,
and that no part is linear in rows.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from foretaste.data.batch import Queries
from foretaste.experiment.record import run_facts
from foretaste.models.layers.table import Dense
from foretaste.models.mf import MF, MFConfig
from foretaste.sampling.samplers import DistinctSampler
from foretaste.training.settings import TrainingConfig, gradients, make_optimizer

ROWS = (10_000, 100_000, 1_000_000, 10_000_000)
KINDS = ("adamw", "lazy_adamw", "row_adagrad")
READ, MOST = 8_192, 10_000_000


def main() -> None:
    options = parse()
    if options.one:
        what, rows, kind = options.one.split(",")
        print(json.dumps(measured(what, int(rows), kind, options)))
        return
    steps = []
    for what in ("table", "mf"):
        for kind in KINDS:
            for rows in ROWS:
                if (what, kind, rows) == ("mf", "adamw", MOST):
                    continue  # 11 GiB at a width of 32
                steps.append(in_a_process(f"{what},{rows},{kind}", options))
                print(steps[-1], flush=True)
    ratios = {
        f"{what}, {kind}": ratios_of(steps, what, kind)
        for what in ("table", "mf")
        for kind in KINDS
    }
    chosen = ratios["table, lazy_adamw"]  # the hardest: nothing but the table
    written = {
        "benchmark": "table-step",
        **run_facts(threads=1),
        "settings": {name: str(value) for name, value in vars(options).items() if name != "out"},
        "steps": steps,
        **chosen,
        "ratios": ratios,
    }
    if options.out:
        options.out.write_text(json.dumps(written, indent=1) + "\n")


def ratios_of(steps: list[dict[str, Any]], what: str, kind: str) -> dict[str, float]:
    own = [step for step in steps if (step["of"], step["optimizer"]) == (what, kind)]
    ms = {step["table_rows"]: step["lowest"] for step in own}
    if MOST not in ms:
        return {}
    return {
        "ratio_10m_to_1m": ms[MOST] / ms[1_000_000],
        "ratio_10m_to_100k": ms[MOST] / ms[100_000],
    }


def in_a_process(one: str, options: argparse.Namespace) -> dict[str, Any]:
    given = [f"--{name}={getattr(options, name)}" for name in ("steps", "width")]
    done = subprocess.run(  # this file itself
        [sys.executable, __file__, f"--one={one}", *given],
        check=True,
        capture_output=True,
        text=True,
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measured(what: str, rows: int, kind: str, options: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    make = table_step if what == "table" else mf_step
    take = make(rows, kind, options.width)
    seconds = []
    for number in range(options.steps + 3):
        begin = time.process_time()
        take()
        if number >= 3:  # the first steps create the optimizer's state
            seconds.append(time.process_time() - begin)
    return {
        "of": what,
        "table_rows": rows,
        "optimizer": kind,
        "distinct_rows": min(READ, rows),
        "width": options.width,
        "ms_per_step": statistics.median(seconds) * 1e3,
        "lowest": min(seconds) * 1e3,
        "highest": max(seconds) * 1e3,
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def table_step(rows: int, kind: str, width: int) -> Callable[[], None]:
    table = Dense(rows, width)
    table.draw(std=0.05)
    config = TrainingConfig(tables=kind, weight_decay=0.01)  # type: ignore[arg-type]  # one of KINDS
    optimizer = make_optimizer(list(table.parameters()), config, tables=[table])
    pull_ND = torch.randn(min(READ, rows), width)

    def take() -> None:
        row_N = distinct(rows)
        optimizer.zero_grad()
        (table(row_N) * pull_ND).sum().backward()
        gradients(table.parameters())
        optimizer.step()

    return take


def mf_step(rows: int, kind: str, width: int) -> Callable[[], None]:
    model = MF(MFConfig(embedding_dim=width), num_users=rows, num_items=rows)
    tables = [module for module in model.modules() if isinstance(module, Dense)]
    config = TrainingConfig(tables=kind, weight_decay=0.01)  # type: ignore[arg-type]  # one of KINDS
    optimizer = make_optimizer(list(model.parameters()), config, tables=tables)
    sampler = DistinctSampler(torch.ones(rows, dtype=torch.int64))

    def take() -> None:
        user_B, item_B = distinct(rows), distinct(rows)
        negative_M = sampler.draw(min(512, rows), device=user_B.device).item_M
        queries = Queries(
            user_B=user_B,
            history_N=user_B[:0],
            offsets_B1=torch.zeros(len(user_B) + 1, dtype=torch.int64),
        )
        optimizer.zero_grad()
        vectors = model(queries, torch.cat([item_B, negative_M]))
        own_BD, other_MD = vectors.item_VD.split([len(item_B), len(negative_M)])
        positive_B1 = (vectors.query_BD * own_BD).sum(dim=1, keepdim=True)
        logit_BC = torch.cat([positive_B1, vectors.query_BD @ other_MD.T], dim=1)
        (-logit_BC.log_softmax(dim=1)[:, 0]).mean().backward()
        gradients(model.parameters())
        optimizer.step()

    return take


def distinct(rows: int) -> torch.Tensor:
    """Return distinct rows spread over all of them, at a cost that does not depend on `rows`."""
    num = min(READ, rows)
    stride = rows // num
    row_N = torch.arange(num) * stride + torch.randint(stride, (num,))
    return row_N[torch.randperm(num)]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--one", default="", help="only this: table or mf, rows, optimizer")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()

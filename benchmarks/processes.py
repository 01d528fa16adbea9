"""How far the losses of two and of four processes are from those of one, in 64 bits.

    python benchmarks/processes.py --out benchmarks/results/processes.json

The cases are those of `tests/golden/losses.json`, whose first 20 losses one process had; each
figure is the largest relative difference of any of them, with two or with four processes.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from foretaste.experiment.record import run_facts

WORKER = Path(__file__).parents[1] / "tests" / "test_processes.py"
LOSSES = WORKER.parent / "golden" / "losses.json"
CASES = (
    "mf",
    "two_tower, features",
    "sasrec",
    "bert4rec",
    "lightgcn",
    "pinsage, uniform",
    "deepfm, features",
    "din",
    "mmoe, attention",
    "mf, the batch and the popular",
    "sasrec, lazy_adamw",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    options = parser.parse_args()
    found = [differences(num) for num in options.processes]
    record = {
        "facts": {**run_facts(threads=1), "processes": options.processes},
        "equality_float64": {name: max(each[name] for each in found) for name in CASES},
    }
    options.out.write_text(json.dumps(record, indent=2) + "\n")


def differences(num: int) -> dict[str, float]:
    """Train all cases with so many processes; return each one's largest difference."""
    expected = json.loads(LOSSES.read_text())
    with TemporaryDirectory() as folder:
        command = ["-m", "torch.distributed.run", "--nproc-per-node", str(num)]
        subprocess.run(
            [sys.executable, *command, str(WORKER), folder, *CASES],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            check=True,
        )
        return {name: difference(Path(folder), name, expected[name]["losses"]) for name in CASES}


def difference(folder: Path, name: str, expected: list[float]) -> float:
    """Return the largest relative difference of a case's losses."""
    lines = (folder / name / "steps.jsonl").read_text().splitlines()[: len(expected)]
    losses = [json.loads(line)["loss"] for line in lines]
    return max(abs(a / b - 1) for a, b in zip(losses, expected, strict=True))


if __name__ == "__main__":
    main()

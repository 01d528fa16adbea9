"""Time of reading events into per-user order: foretaste against pandas, in turns.

Each run is its own process, including imports and compilation: foretaste imports the file into an
event store; pandas reads it, numbers the ids, sorts by user and time, and writes nothing.

    python benchmarks/reading.py --events 25000000 --out report.json
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import polars as pl

from foretaste.experiment.record import run_facts

FORETASTE = """
import sys
from foretaste.data.reading import read_interactions
from foretaste.data.store import write_store
write_store(read_interactions(sys.argv[1], timestamp="timestamp"), sys.argv[2])
"""
PANDAS = """
import sys
import pandas as pd
read = pd.read_parquet if sys.argv[1].endswith("parquet") else pd.read_csv
table = read(sys.argv[1])
table["user_idx"], users = pd.factorize(table["user_id"], sort=True)
table["item_idx"], items = pd.factorize(table["item_id"], sort=True)
table = table.sort_values(["user_idx", "timestamp"], kind="stable")
"""
MEASURE = """
import json, resource, sys, time
start = time.perf_counter()
exec(compile(sys.argv.pop(1), "measured", "exec"))
usage = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps({
    "seconds": time.perf_counter() - start,
    "cpu_seconds": usage.ru_utime + usage.ru_stime,
    "peak_mib": usage.ru_maxrss / 1024,
}))
"""


def main() -> None:
    options = parse()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        files = generate(folder, options.events)
        runs: dict[str, list[dict[str, float]]] = {}
        for turn in range(options.runs):
            for form, path in files.items():
                for who, program in (("foretaste", FORETASTE), ("pandas", PANDAS)):
                    cache = folder / f"numba-{turn if options.cold else 0}-{form}"
                    run = measure(program, path, folder / "store", cache)
                    runs.setdefault(f"{who} {form}", []).append(run)
    report = summary(runs, options)
    show(report)
    if options.out:
        options.out.write_text(json.dumps(report, indent=2) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--events", type=int, default=25_000_000)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--cold", action="store_true", help="compile again in every run")
    parser.add_argument("--folder", type=Path, help="where temporary files go")
    parser.add_argument("--out", type=Path, help="write a dated JSON report")
    return parser.parse_args()


def generate(folder: Path, events: int) -> dict[str, Path]:
    """Write random events of a million users and 100 thousand items (fewer for fewer events)."""
    rng = np.random.default_rng(0)
    frame = pl.DataFrame(
        {
            "user_id": rng.integers(1, max(2, min(1_000_000, events // 25)), events),
            "item_id": rng.integers(1, max(2, min(100_000, events // 250)), events),
            "timestamp": rng.integers(1_000_000_000, 1_600_000_000, events),
        }
    )
    frame.write_csv(folder / "events.csv")
    frame.write_parquet(folder / "events.parquet")
    return {"csv": folder / "events.csv", "parquet": folder / "events.parquet"}


def measure(program: str, path: Path, store: Path, cache: Path) -> dict[str, float]:
    """Run a program in a fresh process, and remove the store that it writes."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, program, str(path), str(store)],
        env={**os.environ, "NUMBA_CACHE_DIR": str(cache)},
        check=True,
        capture_output=True,
        text=True,
    )
    for file in store.glob("*"):
        file.unlink()
    if store.exists():
        store.rmdir()
    measured: dict[str, float] = json.loads(done.stdout)
    return measured


def summary(
    runs: dict[str, list[dict[str, float]]], options: argparse.Namespace
) -> dict[str, object]:
    rows = {
        name: {
            "median_seconds": statistics.median(run["seconds"] for run in found),
            "best_seconds": min(run["seconds"] for run in found),
            "median_cpu_seconds": statistics.median(run["cpu_seconds"] for run in found),
            "peak_mib": max(run["peak_mib"] for run in found),
            "runs": found,
        }
        for name, found in runs.items()
    }
    seconds = {name: statistics.median(run["seconds"] for run in r) for name, r in runs.items()}
    return {
        **run_facts(threads=pl.thread_pool_size(), packages=("pandas",)),
        "command": f"benchmarks/reading.py --events {options.events} --runs {options.runs}"
        + (" --cold" if options.cold else ""),
        "events": options.events,
        "load_average": os.getloadavg(),
        "rows": rows,
        "pandas_over_foretaste": {
            form: seconds[f"pandas {form}"] / seconds[f"foretaste {form}"]
            for form in ("csv", "parquet")
        },
    }


def show(report: dict[str, object]) -> None:
    print(f"{report['events']:,} events, {report['machine']}, load {report['load_average']}")
    print(f"{'':18}{'median s':>10}{'best s':>10}{'CPU s':>10}{'peak MiB':>10}")
    for name, row in report["rows"].items():
        figures = ("median_seconds", "best_seconds", "median_cpu_seconds", "peak_mib")
        print(f"{name:18}" + "".join(f"{row[figure]:10.1f}" for figure in figures))
    for form, ratio in report["pandas_over_foretaste"].items():
        print(f"{form}: foretaste takes 1/{ratio:.1f} of the time of pandas")


if __name__ == "__main__":
    main()

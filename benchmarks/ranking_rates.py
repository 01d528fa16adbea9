"""Training rates of rankers against peers in one run, for `neumf.py` and `deepfm.py`.

Programs take turns of one epoch, each in its own process, which waits while another works. All read
the same rows in batches of one size, and train with Adam at one rate. The result is the median of
rows per second, without the first turn, a warm-up, if there are more. With `--to`, a program stops
once validation reaches this AUC, and its seconds of training are recorded too.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import polars as pl
from sequence_ml1m import command
from turns import KEEP_MEMORY, Program

from foretaste.experiment.record import run_facts

HERE = Path(__file__).parent
OURS = {"foretaste": "fp32", "foretaste-bf16": "bf16"}
"""Precision of each of our programs."""
Peers = dict[str, str]
"""Maps a peer, which is also the name of its environment, to its program's file."""


def arguments(description: str, peers: Peers, *, to: bool) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("data", type=Path, help="folder of the data set's files")
    names = [*OURS, *peers]
    parser.add_argument("--programs", nargs="+", choices=names, default=names)
    parser.add_argument("--epochs", type=int, default=4, help="at most, for each program")
    parser.add_argument("--rows", type=int, default=0, help="only this many of training; 0: all")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--out", type=Path, help="where the report goes, JSON")
    if to:
        parser.add_argument("--to", type=float, help="stop at this AUC of validation")
    return parser


def run(
    args: argparse.Namespace, peers: Peers, rows: pl.DataFrame, told: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """Let the programs take turns, and return the results of each.

    Args:
        args: The runner's arguments.
        peers: The peers that have programs.
        rows: With a column `part` of 0 for training, 1 for validation and 2 for test.
        told: Further settings of the programs.
    """
    to = getattr(args, "to", None)
    train = rows.filter(part=0).head(args.rows or len(rows))
    train = train.sample(fraction=1.0, shuffle=True, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.tsv"
        pl.concat([train, rows.filter(pl.col("part") > 0)]).write_csv(path, separator="\t")
        told |= {"data": str(path), "auc": to is not None, "threads": args.threads}
        told |= {"learning_rate": args.learning_rate}
        everybody = [program(name, peers, told) for name in args.programs]
        for each in everybody:
            each.start()
        running = list(everybody)
        for epoch in range(1, args.epochs + 1):
            for each in list(running):
                turn = each.take_turn()
                print(f"epoch {epoch}, {each.name}: {json.dumps(turn)}", file=sys.stderr)
                if to is not None and turn["auc"] >= to:
                    running.remove(each)
        for each in everybody:
            each.stop()
    return {each.name: summary(each, to) for each in everybody}


def program(name: str, peers: Peers, told: dict[str, Any]) -> Program:
    """Return one of our programs, or a peer's, with glibc set to keep memory as ours do."""
    python, script = sys.executable, "foretaste_ranking.py"
    kept: Mapping[str, str] = {}
    if name in peers:
        found = HERE.parent / ".peers" / name / "bin" / "python"
        if not found.exists():
            raise SystemExit(f"{found} is not there: run `sh benchmarks/peers.sh {name}` first")
        python, script, kept = str(found), peers[name], KEEP_MEMORY
    wanted = json.dumps(told | {"precision": OURS.get(name)})
    quiet = {"TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore"}
    environment = {"OMP_NUM_THREADS": str(told["threads"]), **quiet, **kept}
    return Program(name, [python, str(HERE / script), wanted], environment)


def summary(program: Program, to: float | None) -> dict[str, Any]:
    rates = [turn["rows"] / turn["seconds"] for turn in program.turns]
    rates = sorted(rates[1:] or rates)
    reached = to is not None and program.turns[-1]["auc"] >= to
    seconds = sum(turn["seconds"] for turn in program.turns)
    return {
        "rows_per_second": statistics.median(rates),
        "rows_per_second_low_high": [rates[0], rates[-1]],
        "seconds_to_auc": seconds if reached else None,
        **program.ready,
        "turns": program.turns,
    }


def report(
    args: argparse.Namespace,
    name: str,
    results: dict[str, dict[str, Any]],
    *,
    start: dict[str, float],
    what: str,
    work: str,
) -> None:
    """Print and write the results.

    Args:
        args: The runner's arguments.
        name: Of the benchmark.
        results: By program.
        start: Memory and load before the programs ran.
        what: "pairs" or "rows".
        work: The kind of work, for the table in the README.
    """
    best = max(result["rows_per_second"] for n, result in results.items() if n in OURS)
    for each, result in results.items():
        rate, seconds = result["rows_per_second"], result["seconds_to_auc"]
        result["times_slower"] = best / rate
        told = f"{each:16} {rate / 1e6:7.3f} M {what} a second, 1/{best / rate:.1f} of our best"
        print(told + ("" if seconds is None else f", {seconds:.1f} s to AUC {args.to}"))
    if args.out is None:
        return
    rates = {
        n: f"{r['rows_per_second'] / 1e6:.2f} M"
        + (f" ({OURS[n]})" if n in OURS else f" ({r['times_slower']:.1f} times slower)")
        for n, r in results.items()
    }
    seconds = {
        n: f"{r['seconds_to_auc']:.0f} s" + (f" ({OURS[n]})" if n in OURS else "")
        for n, r in results.items()
        if r["seconds_to_auc"] is not None
    }
    rows = [cells(f"{what} trained on a second, {work}", rates)]
    if seconds:
        rows.append(cells(f"{work} to AUC {args.to} of validation", seconds))
    written = {
        "benchmark": name,
        **run_facts(threads=args.threads),
        **start,
        "command": command(name),
        "settings": {k: v for k, v in vars(args).items() if k not in ("data", "out")},
        "results": results,
        "readme": rows,
    }
    args.out.write_text(json.dumps(written, indent=1) + "\n")


def cells(work: str, shown: dict[str, str]) -> list[str]:
    """Return a row of the README's table."""
    theirs = ", ".join(f"{name} {said}" for name, said in shown.items() if name not in OURS)
    return [work, ", ".join(said for name, said in shown.items() if name in OURS), theirs]

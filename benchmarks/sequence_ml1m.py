"""A sequence model on ML-1M: seconds per epoch and to a quality, against RecTools in one run.

`sasrec_ml1m.py` and `bert4rec_ml1m.py` choose the model.

Programs take turns of one epoch, each in its own process, which waits while another works.
"rectools-kept" is RecTools with glibc set to keep freed memory, which is not its default. With
`--to`, a program stops once it reaches this NDCG@10 (last but one item of each user, whole
catalogue), and its training time until then, without evaluations, is recorded.
"""

import argparse
import json
import os
import re
import statistics
import sys
from pathlib import Path
from typing import Any

from turns import KEEP_MEMORY, Program

from foretaste.experiment.record import run_facts

HERE = Path(__file__).parent
PEER_PYTHON = HERE.parent / ".peers" / "rectools" / "bin" / "python"
PEERS: dict[str, dict[str, str]] = {"rectools": {}, "rectools-kept": KEEP_MEMORY}


def arguments(model: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=f"{model} on ML-1M against RecTools")
    parser.add_argument("data", type=Path, help="ml-1m.txt.gz: lines `user item`, oldest first")
    parser.add_argument("--peers", nargs="*", choices=list(PEERS), default=list(PEERS))
    parser.add_argument("--loss", choices=["softmax", "sampled_softmax"], default="softmax")
    parser.add_argument("--negatives", type=int, default=256)
    parser.add_argument("--epochs", type=int, default=5, help="at most, for each program")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--mask-ratio", type=float, default=0.15, help="of BERT4Rec")
    parser.add_argument("--max-len", type=int, default=200)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--users", type=int, default=0, help="only the first users; 0: all")
    parser.add_argument("--evaluate-every", type=int, default=0)
    parser.add_argument("--to", type=float, default=None, help="stop at this NDCG@10")
    parser.add_argument("--ours", default="{}", help="foretaste's own settings, as JSON")
    parser.add_argument("--out", type=Path, help="where the report goes, JSON")
    return parser.parse_args()


def programs(args: argparse.Namespace, model: str) -> list[Program]:
    shared = [str(args.data), "--model", model]
    told = (
        "loss",
        "negatives",
        "epochs",
        "batch_size",
        "max_len",
        "mask_ratio",
        "threads",
        "users",
    )
    for name in told:
        shared += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    every = args.evaluate_every or (1 if args.to else 0)
    shared += ["--evaluate-every", str(every)]
    threads = {"OMP_NUM_THREADS": str(args.threads)}
    ours = [sys.executable, str(HERE / "foretaste_sequence.py"), *shared, "--ours", args.ours]
    theirs = [str(PEER_PYTHON), str(HERE / "peer_rectools_sequence.py"), *shared]
    return [
        Program("foretaste", ours, threads),
        *(Program(name, theirs, threads | PEERS[name]) for name in args.peers),
    ]


def run(everybody: list[Program], epochs: int, to: float | None) -> None:
    running = list(everybody)
    for epoch in range(1, epochs + 1):
        for program in list(running):
            turn = program.take_turn()
            print(f"epoch {epoch}, {program.name}: {json.dumps(turn)}", file=sys.stderr, flush=True)
            if to is not None and turn.get("ndcg_at_10", 0) >= to:
                running.remove(program)
                program.stop()
        if not running:
            return
    for program in running:
        program.stop()


def summary(program: Program, to: float | None) -> dict[str, Any]:
    seconds = [turn["train_seconds"] for turn in program.turns]
    reached = to is not None and program.turns[-1].get("ndcg_at_10", 0) >= to
    return {
        "seconds_per_epoch": statistics.median(seconds),
        "seconds_per_epoch_low_high": [min(seconds), max(seconds)],
        "best_ndcg_at_10": max((turn.get("ndcg_at_10", 0) for turn in program.turns), default=0),
        "seconds_to_quality": sum(seconds) if reached else None,
        **program.ready,
        "turns": program.turns,
    }


def at_start() -> dict[str, float]:
    """Return the machine's memory and its load before the start."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return {"memory_gib": round(memory, 1), "load_at_start": os.getloadavg()[0]}


def command(script: str) -> list[str]:
    """Return the command as typed; absolute paths are cut to the file's name."""
    words = [re.sub(r"^(--[\w-]+=)?/(.*/)?(?=.)", r"\1", word) for word in sys.argv[1:]]
    return [f"benchmarks/{script}.py", *words]


def main(model: str) -> None:
    """Run the benchmark of `model`: "sasrec" or "bert4rec"."""
    args = arguments(model)
    if args.peers and not PEER_PYTHON.exists():
        raise SystemExit(f"{PEER_PYTHON} is not there: run `sh benchmarks/peers.sh rectools` first")
    start = at_start()
    everybody = programs(args, model)
    for program in everybody:
        program.start()
    run(everybody, args.epochs, args.to)
    results = {program.name: summary(program, args.to) for program in everybody}
    ours = results["foretaste"]
    for name, result in results.items():
        result["times_foretaste"] = result["seconds_per_epoch"] / ours["seconds_per_epoch"]
        line = f"{name}: {result['seconds_per_epoch']:.1f} s an epoch"
        line += f", {result['times_foretaste']:.1f} times foretaste's"
        if result["seconds_to_quality"] is not None:
            line += f", {result['seconds_to_quality']:.0f} s to NDCG@10 {args.to}"
        print(line)
    if args.out:
        settings = {k: v for k, v in vars(args).items() if k not in ("data", "out")}
        report = {
            "benchmark": f"{model}-ml1m",
            **run_facts(threads=args.threads),
            **start,
            "command": command(f"{model}_ml1m"),
            "settings": settings,
            "results": results,
        }
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(report, indent=1) + "\n")

"""LightGCN: seconds of a propagation against PyG, and of an epoch against RecBole, in one run.

    sh benchmarks/peers.sh pyg recbole
    python benchmarks/lightgcn.py train.txt --out benchmarks/results/lightgcn.json
    python benchmarks/lightgcn.py train.txt --work epoch --epochs 2

The file has lines `user item item …`: LightGCN's own training file of Gowalla, gzipped or not.
Programs take turns, each in its own process, which waits while another one works.

A propagation is three layers of 64 dimensions over the graph, forward and backward, the gradient
reaching every node. PyG runs it as its LightGCN does, with an edge index, and with torch's sparse
matrix (CSR); its edge weights are computed before the clock starts, to its advantage.

An epoch is RecBole's LightGCN with its defaults (BPR, one negative per pair) and the given batch
size, against foretaste with the same loss, negatives and batches, and with the sampled softmax of
the recipe. RecBole runs with glibc set to keep freed memory, which foretaste does automatically.
"""

import argparse
import json
import os
import statistics
import sys
from pathlib import Path
from typing import Any

from turns import KEEP_MEMORY, Program

from foretaste.experiment.record import run_facts

HERE = Path(__file__).parent
PEERS = HERE.parent / ".peers"
PROGRAMS = {
    "propagation": {
        "foretaste": (None, "foretaste_lightgcn.py", ["--work", "propagation"]),
        "pyg-edge-index": ("pyg", "peer_pyg_lightgcn.py", ["--form", "edge_index"]),
        "pyg-sparse": ("pyg", "peer_pyg_lightgcn.py", ["--form", "sparse"]),
    },
    "epoch": {
        "foretaste": (None, "foretaste_lightgcn.py", ["--work", "epoch", "--loss", "bpr"]),
        "foretaste-softmax": (
            None,
            "foretaste_lightgcn.py",
            ["--work", "epoch", "--loss", "sampled_softmax"],
        ),
        "recbole": ("recbole", "peer_recbole_lightgcn.py", []),
    },
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="LightGCN against PyG and RecBole")
    parser.add_argument("data", type=Path, help="lines `user item item …`, gzipped or not")
    parser.add_argument("--work", nargs="*", choices=list(PROGRAMS), default=list(PROGRAMS))
    parser.add_argument("--rounds", type=int, default=5, help="turns of 3 propagations each")
    parser.add_argument("--epochs", type=int, default=1, help="epochs of each program")
    parser.add_argument("--batch-size", type=int, default=4096)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="where the report goes, JSON")
    return parser.parse_args()


def programs(work: str, args: argparse.Namespace) -> list[Program]:
    shared = [str(args.data)]
    for name in ("batch_size", "dim", "layers", "threads"):
        shared += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    found = []
    for name, (peer, script, own) in PROGRAMS[work].items():
        python = Path(sys.executable) if peer is None else PEERS / peer / "bin" / "python"
        if not python.exists():
            print(f"{name} is left out: make it with `sh benchmarks/peers.sh {peer}`")
            continue
        environment = {"OMP_NUM_THREADS": str(args.threads)} | (KEEP_MEMORY if peer else {})
        found.append(Program(name, [str(python), str(HERE / script), *shared, *own], environment))
    return found


def measure(work: str, args: argparse.Namespace) -> dict[str, Any]:
    everybody = programs(work, args)
    for program in everybody:
        program.start()
    for turn in range(args.rounds if work == "propagation" else args.epochs):
        for program in everybody:
            said = program.take_turn()
            print(f"{work} {turn + 1}, {program.name}: {said}", file=sys.stderr, flush=True)
    for program in everybody:
        program.stop()
    ours = statistics.median(turn["seconds"] for turn in everybody[0].turns)
    results = {}
    for program in everybody:
        seconds = sorted(turn["seconds"] for turn in program.turns)
        median = statistics.median(seconds)
        results[program.name] = {
            "median": median,
            "seconds": seconds,
            "times_foretaste": median / ours,
            **program.ready,
            "turns": program.turns,
        }
        print(
            f"{work:12} {program.name:18} {median:9.4f} s  [{seconds[0]:.4f}, {seconds[-1]:.4f}]  "
            f"x {median / ours:6.2f}"
        )
    return results


def readme(work: str, args: argparse.Namespace, found: dict[str, Any]) -> list[str]:
    """Return the row of the README's table."""
    name = (
        "LightGCN: "
        + {
            "propagation": "layers forward and backward",
            "epoch": f"an epoch, BPR, batches of {args.batch_size:,}",
        }[work]
    )
    ours, *others = (
        f"{name} {result['median']:.{3 if result['median'] < 1 else 1}f} s"
        + (f" ({result['times_foretaste']:.0f} times)" if name != "foretaste" else "")
        for name, result in found.items()
        if name != "foretaste-softmax"
    )
    facts = f"{args.data.parent.name}, {args.layers} layers, {args.dim} dims, {args.threads} thread"
    return [f"{name} ({facts})", ours.removeprefix("foretaste "), ", ".join(others)]


def main() -> None:
    args = arguments()
    load = os.getloadavg()[0]
    results = {work: measure(work, args) for work in args.work}
    if args.out is not None:
        settings = {key: value for key, value in vars(args).items() if key not in ("data", "out")}
        report = {
            "benchmark": "lightgcn",
            **run_facts(threads=args.threads),
            "load_at_start": load,
            "settings": settings,
            "results": results,
            "readme": [readme(work, args, found) for work, found in results.items()],
        }
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()

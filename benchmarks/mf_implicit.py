"""Seconds of training until MF reaches a quality, against implicit's BPR, in one run on ML-1M.

    sh benchmarks/peers.sh implicit
    python benchmarks/mf_implicit.py ml-1m.txt.gz --to 0.033 --out report.json

Both hold out each user's last two items, learn 64 dimensions from the others and are measured by
NDCG@10 of the last but one, the whole catalogue ranked. They take turns, each in its own process,
which waits while the other works: a turn is one epoch of foretaste or five of implicit, which take
as long. The result is the training time until the quality is reached, without evaluations.
foretaste learns by the sampled softmax of its recipes; `--ours` and `--theirs` change settings.
"""

import argparse
import json
import os
import sys
from pathlib import Path

from sequence_ml1m import at_start, command, run, summary
from turns import Program

from foretaste.experiment.record import run_facts

HERE = Path(__file__).parent
PEER_PYTHON = HERE.parent / ".peers" / "implicit" / "bin" / "python"


def main() -> None:
    args = arguments()
    if not PEER_PYTHON.exists():
        raise SystemExit(f"{PEER_PYTHON} is not there: run `sh benchmarks/peers.sh implicit` first")
    start, threads = at_start(), str(args.threads)
    environment = {"OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads}
    everybody = [
        Program(name, [str(python), str(HERE / script), str(args.data), threads, own], environment)
        for name, python, script, own in (
            ("foretaste", sys.executable, "foretaste_mf.py", args.ours),
            ("implicit", PEER_PYTHON, "peer_implicit_mf.py", args.theirs),
        )
    ]
    for program in everybody:
        program.start()
    run(everybody, args.turns, args.to)
    results = {program.name: summary(program, args.to) for program in everybody}
    for name, result in results.items():
        reached = result["seconds_to_quality"]
        print(
            f"{name}: best NDCG@10 {result['best_ndcg_at_10']:.4f}, "
            + ("not" if reached is None else f"{reached:.1f} s to")
            + f" {args.to}"
        )
    if args.out:
        ours, theirs = (results[name]["seconds_to_quality"] for name in ("foretaste", "implicit"))
        work = f"MF, 64 dims, on ML-1M to NDCG@10 {args.to} (last but one item)"
        shown = [work, f"{ours:.1f} s", f"implicit's BPR {theirs:.1f} s"] if ours and theirs else []
        report = {
            "benchmark": "mf-implicit",
            **run_facts(threads=args.threads),
            **start,
            "command": command("mf_implicit"),
            "settings": {k: v for k, v in vars(args).items() if k not in ("data", "out")},
            "results": results,
            "readme": [shown] if shown else [],
        }
        args.out.write_text(json.dumps(report, indent=1) + "\n")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="MF against implicit's BPR on ML-1M")
    parser.add_argument("data", type=Path, help="lines `user item`, oldest first; .gz or not")
    parser.add_argument("--to", type=float, required=True, help="stop at this NDCG@10")
    parser.add_argument("--turns", type=int, default=40, help="at most, for each program")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--ours", default="{}", help="foretaste's own settings, as JSON")
    parser.add_argument("--theirs", default="{}", help="implicit's own settings, as JSON")
    parser.add_argument("--out", type=Path, help="where the report goes, JSON")
    return parser.parse_args()


if __name__ == "__main__":
    main()

"""Times the evaluation of a dot-product model against the same work in RecTools and RecBole.

    python benchmarks/evaluation.py [--rounds 7] [--threads 2] [--out results.json]

The work: 6,040 users x 3,416 items, 64 dimensions, and synthetic events, as many as ML-1M has. Each
user's last event is ranked among all items but those of the history: hit rate, recall, precision,
NDCG, MRR, MAP at 10 and 20, coverage. The vectors are given; nothing is trained.

Each library runs in its own process, which waits for its turn; the rounds alternate, and the first
of each is not counted. `benchmarks/peers.sh` makes the peers' environments; a missing one is left
out with a message.
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

from foretaste.experiment.record import run_facts

HERE = Path(__file__).parent
NUM_USERS, NUM_ITEMS, WIDTH, NUM_EVENTS = 6_040, 3_416, 64, 1_000_000


def make_data(path: Path, *, seed: int = 0) -> None:
    generator = np.random.default_rng(seed)
    lengths = 20 + generator.multinomial(
        NUM_EVENTS - 20 * NUM_USERS, generator.dirichlet(np.full(NUM_USERS, 0.7))
    )
    lengths = np.minimum(lengths, NUM_ITEMS // 2)
    popularity = np.log(1 / np.arange(20, NUM_ITEMS + 20))
    noise = generator.gumbel(size=(NUM_USERS, NUM_ITEMS))  # draws without replacement
    ranked = np.argsort(-(popularity + noise), axis=1).astype(np.int32)
    np.savez(
        path,
        user_UD=generator.normal(size=(NUM_USERS, WIDTH)).astype(np.float32),
        item_ID=generator.normal(size=(NUM_ITEMS, WIDTH)).astype(np.float32),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        item_idx=np.concatenate([row[:n] for row, n in zip(ranked, lengths, strict=True)]),
    )


def start(python: Path, script: str, *arguments: str, threads: int) -> subprocess.Popen[str]:
    env = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    return subprocess.Popen(
        [python, HERE / script, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=env,
    )


def turn(worker: subprocess.Popen[str]) -> dict[str, float]:
    """Let a worker do the work once; it answers with one line of JSON."""
    if worker.stdin is None or worker.stdout is None:
        raise RuntimeError("the worker has no pipes")
    worker.stdin.write("go\n")
    worker.stdin.flush()
    for line in worker.stdout:
        if line.startswith("{"):
            answer: dict[str, float] = json.loads(line)
            return answer
    raise RuntimeError(f"{worker.args} ended before it answered")


def start_all(data: Path, threads: int) -> dict[str, subprocess.Popen[str]]:
    mine = Path(sys.executable)
    workers = {
        "foretaste": start(mine, "evaluation_foretaste.py", str(data), "0", threads=threads),
        "foretaste, with intervals": start(
            mine, "evaluation_foretaste.py", str(data), "1000", threads=threads
        ),
    }
    for peer in ("rectools", "recbole"):
        python = HERE.parent / ".peers" / peer / "bin" / "python"
        if python.exists():
            workers[peer] = start(python, f"evaluation_{peer}.py", str(data), threads=threads)
        else:
            print(f"{peer} is left out: make it with `sh benchmarks/peers.sh {peer}`")
    return workers


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data.npz"
        make_data(data)
        workers = start_all(data, options.threads)
        answers: dict[str, list[dict[str, float]]] = {name: [] for name in workers}
        for _ in range(options.rounds + 1):
            for name, worker in workers.items():
                answers[name].append(turn(worker))
        for worker in workers.values():
            worker.communicate()
    report(answers, options.threads, options.out)


def report(answers: dict[str, list[dict[str, float]]], threads: int, out: Path | None) -> None:
    rows = {}
    for name, rounds in answers.items():
        seconds = sorted(answer.pop("seconds") for answer in rounds[1:])
        rows[name] = {"median": statistics.median(seconds), "seconds": seconds, **rounds[-1]}
    own = rows["foretaste"]["median"]
    print(f"{NUM_USERS:,} users x {NUM_ITEMS:,} items, {threads} threads")
    for name, row in rows.items():
        low, high = row["seconds"][0], row["seconds"][-1]
        print(
            f"{name:26} {row['median']:7.3f} s  [{low:.3f}, {high:.3f}]  "
            f"x {row['median'] / own:6.2f}  "
            f"hit_rate_at_10 {row['hit_rate_at_10']:.6f}  mrr_at_10 {row['mrr_at_10']:.6f}"
        )
    if out is not None:
        document = {
            "benchmark": "evaluation",
            **run_facts(threads=threads),
            "work": [NUM_USERS, NUM_ITEMS, WIDTH],
            "rows": rows,
        }
        out.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()

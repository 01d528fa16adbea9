"""Random walks of three hops per second, with visits counted and the most visited nodes kept.

Both graphs are random, of the given sizes; degrees fall as a power of the rank.

    python benchmarks/walks.py --threads 2 --out report.json
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np

from foretaste.data.graph import Graph
from foretaste.data.walks import most_visited
from foretaste.experiment.record import run_facts


def main() -> None:
    options = parse()
    runs = []
    for name in options.sizes:
        num_nodes, num_ties = (int(float(part)) for part in name.split("x"))
        graph = random_graph(num_nodes, num_ties)
        nodes = np.arange(min(num_nodes, options.nodes))
        seconds = []
        for turn in range(options.turns + 1):
            started = time.perf_counter()
            most_visited(
                graph,
                top=options.top,
                seed=turn,
                walks=options.walks,
                hops=3,
                nodes=nodes,
                threads=options.threads,
            )
            seconds.append(time.perf_counter() - started)
        rates = [len(nodes) * options.walks / second / 1e6 for second in seconds[1:]]
        run = {
            "nodes": num_nodes,
            "ties": len(graph.neighbour_E) // 2,
            "million_walks_per_second": statistics.median(rates),
            "lowest": min(rates),
            "highest": max(rates),
        }
        print(json.dumps(run))
        runs.append(run)
    report = {
        "what": "random walks of 3 hops, counted, the most visited kept",
        **run_facts(threads=options.threads),
        "settings": {n: str(value) for n, value in vars(options).items() if n != "out"},
        "runs": runs,
        "readme": [
            [
                f"random walks of 3 hops a second, {run['nodes']:,} nodes, {run['ties']:,} edges, "
                f"{options.threads} threads",
                f"{run['million_walks_per_second']:.1f} M",
                "",
            ]
            for run in runs
        ],
    }
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n")


def random_graph(num_nodes: int, num_ties: int, *, seed: int = 0) -> Graph:
    """Connect users (the first half) with items, popular ones more often; duplicates make one
    edge.
    """
    rng = np.random.default_rng(seed)
    half = num_nodes // 2
    user = rng.integers(0, half, num_ties)
    item = half + ((num_nodes - half) * rng.random(num_ties) ** 2).astype(np.int64)
    key = np.concatenate([user * num_nodes + item, item * num_nodes + user])
    key.sort()
    key = key[np.concatenate([[True], key[1:] != key[:-1]])]
    return Graph(
        num_users=half,
        num_items=num_nodes - half,
        offsets_V1=np.searchsorted(key, np.arange(num_nodes + 1) * num_nodes),
        neighbour_E=(key % num_nodes).astype(np.int32),
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="+", default=["70e3x800e3", "2e6x20e6"])
    parser.add_argument("--nodes", type=int, default=100_000, help="to walk from, at most")
    parser.add_argument("--walks", type=int, default=200)
    parser.add_argument("--top", type=int, default=10)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()

"""Time and peak memory of computing all vectors of a graph whose layers do not fit into memory.

The graph is random, with 2 M nodes and 20 M edges; PinSage has two layers of 256 dimensions, which
would take 6 GB at once. The process limits its own address space and reports its peak memory.

    python benchmarks/generation.py --limit-gib 3 --threads 1 --out report.json
"""

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from walks import random_graph

from foretaste.data.walks import most_visited
from foretaste.experiment.record import run_facts
from foretaste.models.layers.pooling import Convolve, generate


def main() -> None:
    options = parse()
    limit = int(options.limit_gib * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    width, num_nodes = options.width, int(options.nodes)
    started = time.perf_counter()
    graph = random_graph(num_nodes, int(options.ties))
    graph_s = time.perf_counter() - started
    num_ties = len(graph.neighbour_E) // 2
    neighbours = most_visited(
        graph, top=options.top, seed=0, walks=options.walks, threads=options.threads
    )
    del graph
    walks_s = time.perf_counter() - started - graph_s
    before = peak_mib()
    asked = np.zeros(num_nodes, np.int8)

    def inputs(low: int, high: int) -> Tensor:
        asked[low:high] += 1
        generator = torch.Generator().manual_seed(low)
        return torch.randn(high - low, width, generator=generator)

    layers = [Convolve(width, width, width) for _ in range(options.layers)]
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        began = time.perf_counter()
        state = generate(
            layers,
            neighbours,
            inputs,
            folder=Path(folder),
            gathered_bytes=int(options.gathered_gib * 2**30),
        )
        generate_s = time.perf_counter() - began
        some = state.read(num_nodes // 2, num_nodes // 2 + 1000)
        length = some.norm(dim=1)
    report = {
        "what": "all vectors of a generated graph, layer by layer",
        **run_facts(threads=options.threads),
        "settings": {
            n: str(value) for n, value in vars(options).items() if n not in ("folder", "out")
        },
        "ties": num_ties,
        "graph_seconds": graph_s,
        "walks_seconds": walks_s,
        "generation_seconds": generate_s,
        "peak_mib_before_generation": before,
        "peak_mib": peak_mib(),
        "all_layers_at_once_mib": (options.layers + 1) * num_nodes * width * 4 / 2**20,
        "each_input_asked_once": bool((asked == 1).all()),
        "all_of_length_1": bool(torch.allclose(length, torch.ones(1000), atol=1e-4)),
        "readme": [
            [
                f"all vectors of {num_nodes:,} nodes, {num_ties:,} edges, {width} dims, "
                f"{options.layers} layers, under {options.limit_gib:g} GiB",
                f"{generate_s:.0f} s, {peak_mib() / 1024:.1f} GiB at most",
                "",
            ]
        ],
    }
    print(json.dumps(report, indent=1))
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n")


def peak_mib() -> float:
    """Return the peak memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", type=float, default=2e6)
    parser.add_argument("--ties", type=float, default=20e6)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--top", type=int, default=10)
    parser.add_argument("--walks", type=int, default=50)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--limit-gib", type=float, default=3.0, help="of address space")
    parser.add_argument("--gathered-gib", type=float, default=1.0)
    parser.add_argument("--folder", type=Path, help="for files of 6 GB, on a disk")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()

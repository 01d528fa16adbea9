"""Negatives drawn per second by the samplers, by numpy and by torch.

    python benchmarks/draws.py --threads 2 --out benchmarks/results/draws.json

Threads draw at the same time, each with its own generator, as producers of batches do. Samplers
take turns, so that a busy minute of the machine affects all equally. Each rate is given by
wall-clock time and by the threads' own processor time, which other processes affect less.

`--distinct` measures only the processor time of drawing 512 distinct items with their
probabilities, in catalogues of three sizes, and updates that part of the file.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from foretaste.experiment.record import run_facts
from foretaste.sampling.samplers import DistinctSampler, PopularitySampler, UniformSampler
from foretaste.training.settings import keep_memory

SIZES = (10_000, 1_000_000, 10_000_000)
Draw = Callable[[int, int], object]
"""Maps a thread's number and the number of draws to the draws."""


def main() -> None:
    options = parse()
    torch.set_num_threads(1)  # of each thread of its own
    facts = {**run_facts(threads=1), "load_at_start": os.getloadavg()[0]}
    draws = [distinct_draws(num, power) for num in SIZES for power in (0.0, 0.75)]
    distinct = {"distinct": {"facts": facts, "draws": draws}}
    print(*draws, sep="\n")
    if options.distinct:
        if options.out:
            kept = json.loads(options.out.read_text())
            options.out.write_text(json.dumps({**kept, **distinct}, indent=1) + "\n")
        return
    keep_memory()  # as training does
    load = os.getloadavg()[0]
    programs = samplers(options.items, options.threads)
    rates: dict[str, list[tuple[float, float]]] = {name: [] for name in programs}
    with ThreadPoolExecutor(options.threads) as pool:
        for turn in range(options.turns + 1):
            for name, draw in programs.items():
                measured = rate(draw, options, pool)
                if turn:  # the first one warms up
                    rates[name].append(measured)
    results = {name: summary(measured) for name, measured in rates.items()}
    for name, result in results.items():
        print(
            f"{name:26} {result['million_per_second']:8.1f} M/s on the wall, "
            f"{result['million_per_second_of_processor_time']:8.1f} M/s a thread of processor time"
        )
    if options.out:
        written = {**report(options, load, results), **distinct}
        options.out.write_text(json.dumps(written, indent=1) + "\n")


def distinct_draws(num_items: int, power: float) -> dict[str, Any]:
    """Return the time of drawing 512 distinct items with their probabilities."""
    count_I = torch.from_numpy(np.random.default_rng(0).zipf(1.3, num_items).clip(max=10**6))
    sampler, seconds = DistinctSampler(count_I, power=power), []
    for _ in range(203):
        begin = time.thread_time()
        drawn = sampler.draw(512, device=torch.device("cpu"))
        drawn.chance(drawn.item_M)
        seconds.append(time.thread_time() - begin)
    ms = sorted(1e3 * second for second in seconds[3:])
    return {
        "items": num_items,
        "distinct": 512,
        "popularity_power": power,
        "ms": statistics.median(ms),
        "lowest": ms[0],
        "highest": ms[-1],
    }


def samplers(num_items: int, threads: int) -> dict[str, Draw]:
    """Return the samplers: ours, and those of numpy and torch for the same distributions."""
    count_I = np.random.default_rng(0).zipf(1.3, num_items).clip(max=10**6).astype(np.int64)
    count_I[::20] = 0
    uniform = UniformSampler(num_items, known_I=torch.from_numpy(count_I > 0))
    popularity = PopularitySampler(count_I)
    ours = [torch.Generator().manual_seed(seed) for seed in range(threads)]
    theirs = [np.random.default_rng(seed) for seed in range(threads)]
    known = np.flatnonzero(count_I)
    chance_I = popularity.probability_I
    return {
        "uniform": lambda t, n: uniform.draw((n,), generator=ours[t]),
        "uniform, numpy": lambda t, n: known[theirs[t].integers(len(known), size=n)],
        "popularity": lambda t, n: popularity.draw((n,), generator=ours[t]),
        "popularity, numpy": lambda t, n: theirs[t].choice(num_items, n, p=chance_I.numpy()),
        "popularity, torch": lambda t, n: torch.multinomial(
            chance_I, n, replacement=True, generator=ours[t]
        ),
    }


def rate(draw: Draw, options: argparse.Namespace, pool: ThreadPoolExecutor) -> tuple[float, float]:
    """Let all threads draw at once; return draws per second of wall-clock and of processor time."""

    def work(thread: int) -> float:
        begin = time.thread_time()
        for _ in range(options.blocks):
            draw(thread, options.block)
        return time.thread_time() - begin

    begin = time.perf_counter()
    busy = list(pool.map(work, range(options.threads)))
    wall = time.perf_counter() - begin
    drawn = options.blocks * options.block
    return options.threads * drawn / wall, drawn / statistics.mean(busy)


def summary(measured: list[tuple[float, float]]) -> dict[str, Any]:
    wall = sorted(on_the_wall / 1e6 for on_the_wall, _ in measured)
    return {
        "million_per_second": statistics.median(wall),
        "lowest": wall[0],
        "highest": wall[-1],
        "million_per_second_of_processor_time": statistics.median(m / 1e6 for _, m in measured),
    }


def report(options: argparse.Namespace, load: float, results: dict[str, Any]) -> dict[str, Any]:
    def shown(name: str) -> str:
        return f"{results[name]['million_per_second']:.0f} M"

    work = f"negatives drawn a second, {options.items:,} items, {options.threads} threads"
    return {
        "benchmark": "draws",
        **run_facts(threads=options.threads),
        "load_at_start": load,
        "settings": {n: str(value) for n, value in vars(options).items() if n != "out"},
        "results": results,
        "readme": [
            [f"{work}, uniform", shown("uniform"), f"numpy {shown('uniform, numpy')}"],
            [
                f"{work}, ~ count^0.75",
                shown("popularity"),
                f"numpy {shown('popularity, numpy')}, torch {shown('popularity, torch')}",
            ],
        ],
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--items", type=int, default=40_981)
    parser.add_argument("--block", type=int, default=2**18, help="drawn by a thread at a time")
    parser.add_argument("--blocks", type=int, default=16)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--distinct", action="store_true", help="only the draws of distinct items")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()

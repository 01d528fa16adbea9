"""Arguments and input of each program of `lightgcn.py`. It imports only the standard library."""

import argparse
import gzip
import time
from collections.abc import Callable
from pathlib import Path


def arguments(description: str) -> argparse.ArgumentParser:
    """Return a parser of the arguments that all programs share."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("data", type=Path)
    parser.add_argument("--batch-size", type=int, default=4096)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    return parser


def read_rows(path: Path) -> tuple[list[int], list[int]]:
    """Return the user and the item of each pair in lines `user item item …`."""
    users: list[int] = []
    items: list[int] = []
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as lines:
        for line in lines:
            user, *row = map(int, line.split())
            users += [user] * len(row)
            items += row
    return users, items


def best_of_three(work: Callable[[], None]) -> float:
    """Return the seconds of the fastest of three runs."""
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - begin)
    return min(seconds)

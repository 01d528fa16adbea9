"""What each program of `neumf.py` and `deepfm.py` is told and reads, and its loop of turns."""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from turns import say, say_ready, wait_for_turn

PARTS = ("train", "valid", "test")
"""By the code that stands in the table's column `part`."""


def told() -> dict[str, Any]:
    """Return what the runner wants, and hide it from libraries that read the command line."""
    wanted: dict[str, Any] = json.loads(sys.argv[1])
    sys.argv = sys.argv[:1]
    return wanted


def read_table(path: Path | str, part: str) -> dict[str, np.ndarray]:
    """Return the columns of the rows of one part, `part` itself left out."""
    with Path(path).open() as lines:
        names = lines.readline().split()
        rows = np.loadtxt(lines, dtype=np.int64, delimiter="\t", ndmin=2)
    columns = dict(zip(names, rows.T, strict=True))
    here = columns.pop("part") == PARTS.index(part)
    return {name: np.ascontiguousarray(column[here]) for name, column in columns.items()}


def take_turns(
    train: Callable[[], float], *, rows: int, packages: list[str], auc: Callable[[], float] | None
) -> None:
    """Train an epoch a turn, and say how long it took, the AUC of validation left out.

    Args:
        train: Trains one epoch and returns its loss.
        rows: What an epoch learns from, drawn negatives counted in.
        packages: Whose versions are of interest.
        auc: Measures validation; None: nobody asked.
    """
    say_ready(packages)
    while True:
        begin = time.perf_counter()
        loss = float(train())
        turn = {"seconds": time.perf_counter() - begin, "rows": rows, "loss": loss}
        say(turn if auc is None else turn | {"auc": float(auc())})
        wait_for_turn()

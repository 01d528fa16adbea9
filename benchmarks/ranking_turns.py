"""Settings, input and loop of turns of each program of `neumf.py` and `deepfm.py`."""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from turns import say, say_ready, wait_for_turn

PARTS = ("train", "valid", "test")
"""By the code in the table's column `part`."""


def told() -> dict[str, Any]:
    """Return the runner's settings, and hide them from libraries that read the command line."""
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
    """Train an epoch per turn, and report its time without the AUC of validation.

    Args:
        train: Trains one epoch and returns its loss.
        rows: Number of rows per epoch, including drawn negatives.
        packages: Whose versions are of interest.
        auc: Measures validation; None if it is not needed.
    """
    say_ready(packages)
    while True:
        begin = time.perf_counter()
        loss = float(train())
        turn = {"seconds": time.perf_counter() - begin, "rows": rows, "loss": loss}
        say(turn if auc is None else turn | {"auc": float(auc())})
        wait_for_turn()

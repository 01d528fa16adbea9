"""Programs take turns of one epoch, each in its own process, so that none disturbs another and a
busy minute of the machine affects all equally.

A program sends `{"ready": ...}` once its data is loaded, waits for its turn, works, sends its
measurements, and waits again. This file imports only the standard library, because it runs in every
peer's environment.
"""

import argparse
import gzip
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

KEEP_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str((1 << 31) - 1),
    "MALLOC_TOP_PAD_": str(64 << 20),
}
"""Makes glibc keep freed memory, which foretaste does automatically."""


def say(message: Mapping[str, Any]) -> None:
    """Send the runner one line of JSON."""
    print(json.dumps(message), flush=True)


def wait_for_turn() -> None:
    """Wait for the runner's signal; end the process if the runner has ended."""
    if sys.stdin.readline().strip() != "go":
        sys.exit(0)


def say_ready(packages: Sequence[str], **facts: Any) -> None:
    """Report that the data is loaded and which packages are installed, and wait for the first
    turn.
    """
    say({"ready": True, "versions": {name: version(name) for name in packages}, **facts})
    wait_for_turn()


def sequence_arguments(description: str) -> argparse.Namespace:
    """Parse the arguments of a program that trains a sequence model."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("data", type=Path, help="lines `user item`, oldest first; .gz or not")
    parser.add_argument("--model", choices=["sasrec", "bert4rec"], default="sasrec")
    parser.add_argument("--loss", choices=["softmax", "sampled_softmax"], default="softmax")
    parser.add_argument("--negatives", type=int, default=256)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--max-len", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--mask-ratio", type=float, default=0.15, help="of BERT4Rec")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--evaluate-every", type=int, default=0, help="epochs; 0: only at the end")
    parser.add_argument("--users", type=int, default=0, help="only the first users; 0: all")
    parser.add_argument("--ours", type=json.loads, default={}, help="foretaste's own settings")
    return parser.parse_args()


def read_pairs(path: Path, num_users: int = 0) -> tuple[list[int], list[int]]:
    """Return the user and the item of each line of the first `num_users` users."""
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as lines:
        pairs = [(int(user), int(item)) for user, item in map(str.split, lines)]
    wanted = set(list(dict.fromkeys(user for user, _ in pairs))[: num_users or None])
    kept = [pair for pair in pairs if pair[0] in wanted]
    return [user for user, _ in kept], [item for _, item in kept]


@dataclass
class Program:
    """A running program, seen from the runner."""

    name: str
    command: Sequence[str]
    environment: Mapping[str, str]
    ready: dict[str, Any] = field(default_factory=dict)
    turns: list[dict[str, Any]] = field(default_factory=list)

    def start(self) -> None:
        """Start it and wait until it is ready."""
        self.process = subprocess.Popen(
            self.command,
            env={**os.environ, **self.environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.ready = self._hear()

    def take_turn(self) -> dict[str, Any]:
        """Let it work for one turn and return its measurements."""
        assert self.process.stdin is not None  # noqa: S101  # asked for above
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        self.turns.append(self._hear())
        return self.turns[-1]

    def stop(self) -> None:
        """End the program by closing its input."""
        assert self.process.stdin is not None  # noqa: S101
        self.process.stdin.close()
        self.process.wait(timeout=60)

    def _hear(self) -> dict[str, Any]:
        assert self.process.stdout is not None  # noqa: S101
        for line in self.process.stdout:
            if line.startswith("{"):
                return dict(json.loads(line))
        raise SystemExit(f"{self.name} ended with code {self.process.wait()} before its turn")

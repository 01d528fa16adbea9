"""What a figure depends on besides settings."""

import os
import platform
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch

import foretaste

_PACKAGES = ("torch", "numpy", "numba", "polars", "faiss-cpu", "implicit")


def run_facts(*, threads: int | None = None, packages: Sequence[str] = ()) -> dict[str, object]:
    """Return when, by which code and where a run was made: plain JSON values.

    Args:
        threads: How many the run computed with; None: as many as torch does here.
        packages: Further ones whose versions matter.
    """
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "threads": torch.get_num_threads() if threads is None else threads,
        "machine": _machine(),
        "versions": {
            "foretaste": foretaste.__version__,
            "python": platform.python_version(),
            **{name: version(name) for name in (*_PACKAGES, *packages)},
        },
    }


def _commit() -> str:
    """Return the commit of the code that runs, with a + where files differ from it."""
    here = Path(__file__).parent
    try:
        run = ["git", "-C", str(here), "describe", "--always", "--abbrev=12", "--dirty=+"]
        return subprocess.run(run, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _machine() -> str:
    names = [
        line.partition(":")[2].strip()
        for line in _lines(Path("/proc/cpuinfo"))
        if line.startswith("model name")
    ]
    processor = names[0] if names else platform.processor() or platform.machine()
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{processor}, {os.cpu_count()} cores, {platform.system()}{gpu}"


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []

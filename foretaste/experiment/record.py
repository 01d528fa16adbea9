"""The record of a run that counts: what was run, where, and what came out."""

import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import torch

import foretaste
from foretaste.experiment.recipe import ExperimentConfig
from foretaste.experiment.run import Run

_PACKAGES = ("torch", "numpy", "numba", "polars", "faiss-cpu", "implicit")


def record_run(
    run: Run, config: ExperimentConfig, *, recipe: str, overrides: Sequence[str] = ()
) -> dict[str, object]:
    """Return what `recipes/results/NAME.json` holds, as plain JSON values.

    `metrics` are those of the model that was trained without the validation events;
    `refitted` holds those of the one trained with them, where the recipe asks for it.

    Args:
        run: What the recipe gave.
        config: The recipe.
        recipe: Its name, as the README's table shows it.
        overrides: What was changed on the command line.
    """
    changes = "".join(f" --set {override}" for override in overrides)
    record: dict[str, object] = {
        "recipe": recipe,
        "command": f"foretaste fit recipes/{recipe}.toml --out {recipe}{changes}",
        "seed": config.seed,
        **run_facts(),
        "train_seconds": round(run.trained.train_seconds, 1),
        "epochs": run.trained.log.get("best_epoch", 0),
        "metrics": dict(run.report.metrics),
        "intervals": {name: list(ends) for name, ends in run.report.intervals.items()},
    }
    if run.refitted is not None and run.refitted_report is not None:
        record["refitted"] = {
            "train_seconds": round(run.refitted.train_seconds, 1),
            "metrics": dict(run.refitted_report.metrics),
            "intervals": {n: list(ends) for n, ends in run.refitted_report.intervals.items()},
        }
    return record | {"published": dict(config.published), "notes": config.notes}


def run_facts() -> dict[str, object]:
    """Return what a figure depends on besides settings: commit, threads, machine, versions."""
    return {
        "commit": _commit(),
        "threads": torch.get_num_threads(),
        "machine": _machine(),
        "versions": {
            "foretaste": foretaste.__version__,
            "python": platform.python_version(),
            **{name: version(name) for name in _PACKAGES},
        },
    }


def write_record(record: Mapping[str, object], path: Path) -> None:
    """Write a record, or nothing where it cannot be written whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_suffix(".part")
    half.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    half.replace(path)


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

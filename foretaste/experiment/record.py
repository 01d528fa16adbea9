"""The record of a run: its figures and everything they depend on; and the contents of a bundle."""

import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch

import foretaste
from foretaste.arguments import checked
from foretaste.data.folder import read_manifest, whole_file
from foretaste.evaluation.compare import Reports
from foretaste.experiment.learning import usual_objective
from foretaste.experiment.recipe import ExperimentConfig, Negatives, Protocol
from foretaste.experiment.run import Run
from foretaste.models.base import LearnsBy
from foretaste.models.catalogue import tasks_of
from foretaste.serving.bundle import BundleManifest, read_bundle
from foretaste.training.candidates import CandidateConfig
from foretaste.training.objectives import RowsConfig


@checked
def record_run(
    run: Run, config: ExperimentConfig, *, recipe: str, overrides: Sequence[str] = ()
) -> dict[str, object]:
    """Return the contents of `recipes/results/NAME.json`, as plain JSON values.

    `metrics` belong to the model that was trained without the validation events; `refitted`
    describes the model of the recipe's `final`, with metrics unless it was trained on the test.

    Args:
        run: The result of the recipe.
        config: The recipe.
        recipe: Its name in the README's table.
        overrides: The changes on the command line.
    """
    changes = "".join(f" --set {override}" for override in overrides)
    record: dict[str, object] = {
        "recipe": recipe,
        "command": f"foretaste fit recipes/{recipe}.toml --out {recipe}{changes}",
        "seed": config.seed,
        **run_facts(),
        "train_seconds": round(run.trained.train_seconds, 1),
        "epochs": run.trained.log.get("best_epoch", 0),
        **protocol_of(config, run.trained.log, learns_by=run.trained.model.learns_by).model_dump(),
        "metrics": dict(run.report.metrics),
        "intervals": {name: list(ends) for name, ends in run.report.intervals.items()},
    }
    if run.refitted is not None:
        again = run.refitted_report or Reports()
        record["refitted"] = {
            "trained_on": run.refitted.learned_from,
            "train_seconds": round(run.refitted.train_seconds, 1),
            "metrics": dict(again.metrics),
            "intervals": {name: list(ends) for name, ends in again.intervals.items()},
        }
    published: dict[str, object] = {"published": dict(config.published)}
    if config.published:
        published["published_as"] = config.published_as.model_dump()
    return record | published | {"notes": config.notes}


def protocol_of(
    config: ExperimentConfig, log: Mapping[str, object], *, learns_by: LearnsBy | None
) -> Protocol:
    """Return the facts that decide which published figures a first run can be compared with.

    Args:
        config: The recipe.
        log: The log of training.
        learns_by: The kind of the model's training data.
    """
    epochs = log.get("epochs", ())
    chosen = isinstance(epochs, list | tuple) and any(
        isinstance(epoch, Mapping) and epoch.get("validation") is not None for epoch in epochs
    )
    return Protocol(
        trained_on="train",
        negatives=_negatives(config, learns_by),
        selection="validation" if chosen else "fixed epochs",
    )


def _negatives(config: ExperimentConfig, learns_by: LearnsBy | None) -> Negatives:
    objective, tasks = config.objective, tasks_of(config.model)
    if tasks:
        rows = objective if isinstance(objective, RowsConfig) else RowsConfig()
        return "drawn again" if rows.num_negatives(tasks) else "fixed"
    if learns_by in ("events", None):
        return "none"
    learned = objective if isinstance(objective, CandidateConfig) else usual_objective(config.model)
    drawn = not isinstance(learned, CandidateConfig) or learned.loss != "softmax"
    return "drawn again" if drawn else "all items"


@checked
def write_record(record: Mapping[str, object], path: str | Path, *, replace: bool = False) -> None:
    """Write a record atomically.

    Raises:
        DataError: The file exists and `replace` is false, or the disk is full or refuses.
    """
    with whole_file(path, replace=replace) as part:
        part.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


_PACKAGES = ("torch", "numpy", "numba", "polars", "faiss-cpu", "implicit")


def run_facts(*, threads: int | None = None, packages: Sequence[str] = ()) -> dict[str, object]:
    """Return date, code version and machine of a run, as plain JSON values.

    Args:
        threads: Number of threads of the run; None: that of torch here.
        packages: Further packages whose versions matter.
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
    """Return the commit of the running code, with a + if files differ from it."""
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


@dataclass(frozen=True, kw_only=True)
class BundleContents:
    """The contents of a bundle whose checksums were all verified."""

    manifest: BundleManifest
    parameters: int
    """Number of parameters of the network."""
    size: int
    """Bytes of all files."""
    learned_from: str
    """The events that the model was trained on, in words."""
    measured_on: str
    """The events that the stored report was measured on, in words."""
    metrics: dict[str, float]
    """The metrics of the stored report; empty without one."""

    @checked
    def facts(self) -> dict[str, object]:
        """Return the main facts, by name."""
        manifest, data, index = self.manifest, self.manifest.data, self.manifest.index or {}
        return {
            "model": manifest.model["kind"],
            "written by": f"foretaste {manifest.foretaste}, format {manifest.format_version}",
            "parameters": self.parameters,
            "MiB": self.size / 2**20,
            "users, items, events": f"{data.num_users:,}, {data.num_items:,}, {data.num_events:,}",
            "learned from": self.learned_from,
            "data": f"sha256 {data.fingerprint[:16]}…",
            "seed": manifest.seed,
            "seconds of training": manifest.train_seconds,
            "index": ", ".join(f"{name} {value}" for name, value in index.items()) or "none",
            "measured on": self.measured_on,
            **self.metrics,
        }

    @checked
    def to_json(self) -> dict[str, object]:
        """Return everything as plain JSON values."""
        return {
            "manifest": self.manifest.model_dump(mode="json"),
            "parameters": self.parameters,
            "size": self.size,
            "learned_from": self.learned_from,
            "measured_on": self.measured_on,
            "metrics": self.metrics,
        }


@checked
def inspect_bundle(path: Path | str) -> BundleContents:
    """Read a bundle and return its contents.

    Raises:
        BundleError: It is missing, broken or changed, or has a newer format.
    """
    path = Path(path)
    bundle = read_bundle(path)
    manifest = read_manifest(path, BundleManifest)
    return BundleContents(
        manifest=manifest,
        parameters=sum(value.numel() for value in bundle.trained.model.parameters()),
        size=sum(entry.size for entry in manifest.files.values()),
        learned_from=bundle.learned_from,
        measured_on=bundle.measured_on,
        metrics=metrics_in(bundle.report or {}),
    )


def metrics_in(report: Mapping[str, object]) -> dict[str, float]:
    """Return the figures of a stored report, including those about rows."""
    own, rows = report.get("metrics"), report.get("rows")
    inner = metrics_in(rows) if isinstance(rows, Mapping) else {}
    return {**own, **inner} if isinstance(own, dict) else inner

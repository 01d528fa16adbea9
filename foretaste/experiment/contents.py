"""What is inside a bundle, for a person or a script."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from foretaste.arguments import checked
from foretaste.data.folder import read_manifest
from foretaste.serving.bundle import BundleManifest, read_bundle


@dataclass(frozen=True, kw_only=True)
class BundleContents:
    """A bundle that was read whole: every checksum is right."""

    manifest: BundleManifest
    parameters: int
    """Numbers in the network."""
    size: int
    """Bytes of all files."""
    learned_from: str
    """Which events the model learned from, in words."""
    measured_on: str
    """What the stored report was measured on, in words."""
    metrics: dict[str, float]
    """Of the stored report; empty without one."""

    @checked
    def facts(self) -> dict[str, object]:
        """Return what a person wants to know first, by name."""
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
        """Return all of it as plain JSON values."""
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
    """Read a bundle and say what it holds.

    Raises:
        BundleError: It is missing, broken, tampered with or of a newer format.
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
    """Return the figures of a stored report, those of its part about rows included."""
    own, rows = report.get("metrics"), report.get("rows")
    inner = metrics_in(rows) if isinstance(rows, Mapping) else {}
    return {**own, **inner} if isinstance(own, dict) else inner

"""A run's whole state in a folder: a reader sees the old state or the new one, never a mix.

manifest.json             where the run is, its settings and seed, and the checksum of every part
NAME-NUMBER.safetensors   a part: model, best, average, optimizer, objective or refreshed

The manifest is replaced last, in one rename, and only what it lists is read. A part that it lists
already, such as the best weights of an earlier epoch, is not written again. What a step draws is
decided by the seed and by where the run is, so no generator has a state to keep.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, final

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from foretaste.data.folder import (
    MANIFEST_FILE,
    FileEntry,
    FolderManifest,
    entry_of,
    read_manifest,
    reason_of,
    verify_files,
    whole_file,
)
from foretaste.errors import BundleError, DataError

CHECKPOINT = "checkpoint"
"""Its name in the folder of a run."""
_FORMER = "checkpoint.safetensors"
"""The one file that earlier versions kept all of it in."""


class CheckpointManifest(FolderManifest):
    """What a checkpoint says of itself."""

    kind = "checkpoint"
    latest = 1
    remedy = "start again without --resume"

    format: Literal["foretaste-checkpoint"] = "foretaste-checkpoint"
    """What kind of folder it is."""
    format_version: int = 1
    """Version of the folder's format."""
    facts: dict[str, Any]
    """Everything that is not a tensor."""


def write_checkpoint(
    folder: Path, parts: Mapping[str, Mapping[str, Tensor]], facts: Mapping[str, Any]
) -> None:
    """Write a run's state.

    Args:
        folder: The checkpoint's own.
        parts: Tensors by name, by the name of their part, which ends with `-NUMBER`: a part of
            the same name is the same.
        facts: All else, as JSON values.

    Raises:
        DataError: The disk is full or refuses; the checkpoint that was there is as it was.
    """
    before, files = _listed(folder), {}
    for name, tensors in parts.items():
        file = f"{name}.safetensors"
        if file not in before:
            with whole_file(folder / file, replace=True) as part:
                save_file({n: t.detach().cpu().contiguous() for n, t in tensors.items()}, part)
        files[file] = before.get(file) or entry_of(folder / file)
    with whole_file(folder / MANIFEST_FILE, replace=True) as part:
        part.write_text(CheckpointManifest(facts=dict(facts), files=files).render(), "utf-8")
    for path in _parts_in(folder):
        if path.name not in files:
            path.unlink()


def read_checkpoint(folder: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Read what `write_checkpoint` wrote; parts come without their numbers.

    Raises:
        BundleError: It is missing, broken or of a newer format.
    """
    manifest = read_manifest(folder, CheckpointManifest)
    verify_files(folder, manifest)
    try:
        read = {name.partition("-")[0]: load_file(folder / name) for name in manifest.files}
    except (OSError, SafetensorError) as error:
        raise BundleError(
            f"{folder} cannot be used although its checksums are right: {manifest.remedy}",
            name=str(folder),
        ) from error
    return read, manifest.facts


def find_checkpoint(run: Path) -> Path | None:
    """Return the checkpoint in a run's folder, if there is one.

    Raises:
        BundleError: There is one of the former layout, a single file, which is left as it is.
    """
    if (run / CHECKPOINT / MANIFEST_FILE).exists():
        return run / CHECKPOINT
    if (run / _FORMER).exists():
        raise BundleError(
            f"{run / _FORMER} is a checkpoint of an earlier foretaste, which wrote it as one file: "
            "resume with the version that wrote it (pip install foretaste==VERSION), or start "
            "again with --replace (in Python: without resume)",
            name=str(run / _FORMER),
            value=str(run / _FORMER),
        )
    return None


def epochs_done(run: Path) -> int | None:
    """Return how many epochs a run had completed that was stopped; None: it ended, or is none.

    Raises:
        BundleError: Its checkpoint is of the former layout.
    """
    try:
        found = find_checkpoint(run)
        if found is None:
            return None
        progress = read_manifest(found, CheckpointManifest).facts["progress"]
        return None if progress["done"] else int(progress["epoch"])
    except (KeyError, TypeError, ValueError):
        return None


def forget_checkpoint(run: Path) -> None:
    """Delete the checkpoint of an earlier run, so that nobody resumes it in place of a new one."""
    folder = run / CHECKPOINT
    for path in (run / _FORMER, folder / MANIFEST_FILE, *_parts_in(folder)):
        path.unlink(missing_ok=True)


def _listed(folder: Path) -> dict[str, FileEntry]:
    try:
        return dict(read_manifest(folder, CheckpointManifest).files)
    except BundleError:
        return {}


def _parts_in(folder: Path) -> Iterator[Path]:
    """Return every part, and what a process that was killed left of one."""
    yield from folder.glob("*.safetensors")
    yield from folder.glob(".*.safetensors.*.writing")


STEPS_FILE = "steps.jsonl"


@final
class StepLog:
    """A line of JSON a step; on resuming, lines past the checkpoint are cut off."""

    def __init__(self, folder: Path | None, step: int) -> None:
        self.file = None
        self.path = Path(STEPS_FILE) if folder is None else folder / STEPS_FILE
        if folder is None:
            return
        with self._in_our_words():
            folder.mkdir(parents=True, exist_ok=True)
            kept = self.path.read_text().splitlines(keepends=True)[:step] if step else []
            self.path.write_text("".join(kept))
            self.file = self.path.open("a", buffering=1)

    def __enter__(self) -> "StepLog":
        return self

    def __exit__(self, *_: object) -> None:
        if self.file is not None:
            with suppress(OSError):  # what could not be written was said by `write`
                self.file.close()

    def write(self, step: int, epoch: int, loss: float) -> None:
        if self.file is not None:
            with self._in_our_words():
                self.file.write(json.dumps({"step": step, "epoch": epoch, "loss": loss}) + "\n")

    @contextmanager
    def _in_our_words(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DataError(
                f"{self.path} cannot be written: {reason_of(error)}: make room, then resume from "
                "the last checkpoint",
                name=str(self.path),
                value=str(self.path),
            ) from error

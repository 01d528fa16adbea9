"""A run's whole state in a folder: a reader sees the old state or the new one, never a mix.

manifest.json             where the run is, its settings and seed, and the checksum of every part
NAME-NUMBER.safetensors   a part: model, best, average, optimizer, objective or refreshed
NAME-NUMBER.R-of-N.safetensors   of tensors whose rows are dealt among N processes those of number R

The manifest is replaced last, in one rename, and only what it lists is read. A part that it lists
already, such as the best weights of an earlier epoch, is not written again. What a step draws is
decided by the seed and by where the run is, so no generator has a state to keep.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import groupby
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
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
from foretaste.training import processes

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
    folder: Path,
    parts: Mapping[str, Mapping[str, Tensor]],
    facts: Mapping[str, Any],
    *,
    own: Mapping[str, range] = MappingProxyType({}),
) -> None:
    """Write a run's state.

    Args:
        folder: The checkpoint's own.
        parts: Tensors by name, by the name of their part, which ends with `-NUMBER`: a part of
            the same name is the same.
        facts: All else, as JSON values.
        own: Tensors of which each process has some rows, and which these are. If there are any,
            all processes write.

    Raises:
        DataError: The disk is full or refuses; the checkpoint that was there is as it was.
    """
    before, names = _listed(folder), list[str]()
    for name, tensors in parts.items():
        names += _write_part(folder, name, tensors, own, before)
    if own:
        processes.wait()
    if not processes.is_first():
        return
    listed = {name: before.get(name) or entry_of(folder / name) for name in names}
    with whole_file(folder / MANIFEST_FILE, replace=True) as part:
        part.write_text(CheckpointManifest(facts=dict(facts), files=listed).render(), "utf-8")
    for path in _parts_in(folder):
        if path.name not in listed:
            path.unlink()


def _write_part(
    folder: Path,
    name: str,
    tensors: Mapping[str, Tensor],
    own: Mapping[str, range],
    before: Mapping[str, FileEntry],
) -> list[str]:
    """Write what this process has of a part; return the names of all its files."""
    dealt = {n: tensor for n, tensor in tensors.items() if n in own}
    common = {n: tensor for n, tensor in tensors.items() if n not in own}
    world = processes.share().world if dealt else 0
    files = [f"{name}.{rank}-of-{world}.safetensors" for rank in range(world)]
    mine = {files[processes.share().rank]: dealt} if dealt else {}
    if common or not dealt:
        files.append(f"{name}.safetensors")
        mine |= {files[-1]: common} if processes.is_first() else {}
    for file, kept in mine.items():
        if file not in before:
            with whole_file(folder / file, replace=True) as part:
                save_file({n: t.detach().cpu().contiguous() for n, t in kept.items()}, part)
    return files


def read_checkpoint(
    folder: Path, *, own: Mapping[str, range] = MappingProxyType({})
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Read what `write_checkpoint` wrote; parts come without their numbers.

    Args:
        folder: The checkpoint's own.
        own: Tensors of which only some rows are wanted, whoever wrote them.

    Raises:
        BundleError: It is missing, broken or of a newer format.
    """
    manifest = read_manifest(folder, CheckpointManifest)
    verify_files(folder, manifest, checksums=processes.is_first())
    parts: dict[str, dict[str, Tensor]] = {}
    try:
        for part, files in groupby(sorted(manifest.files, key=_place), lambda f: _place(f)[0]):
            parts[part.partition("-")[0]] = _read([folder / file for file in files], own)
    except (OSError, SafetensorError) as error:
        raise BundleError(
            f"{folder} cannot be used although its checksums are right: {manifest.remedy}",
            name=str(folder),
        ) from error
    return parts, manifest.facts


def _place(file: str) -> tuple[str, int]:
    """Return a file's part, and whose rows of it it holds, counted from 0; -1: everybody's."""
    part, *ranks = file.removesuffix(".safetensors").split(".")
    return part, int(ranks[0].partition("-")[0]) if ranks else -1


def _read(files: Iterable[Path], own: Mapping[str, range]) -> dict[str, Tensor]:
    """Read the wanted rows of tensors, which may stand in several files, one after the other."""
    pieces: dict[str, list[Tensor]] = {}
    rows_before: dict[str, int] = {}
    for file in files:
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  # it is no mapping
                if name not in own:
                    pieces.setdefault(name, []).append(tensors.get_tensor(name))
                    continue
                piece, first = tensors.get_slice(name), rows_before.get(name, 0)
                num, wanted = piece.get_shape()[0], own[name]
                begin, end = (min(num, max(0, row - first)) for row in (wanted.start, wanted.stop))
                pieces.setdefault(name, []).append(piece[begin:end])
                rows_before[name] = first + num
    return {
        name: found[0] if len(found) == 1 else torch.cat(found) for name, found in pieces.items()
    }


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
    """Delete the checkpoint of an earlier run, so that it is not resumed in place of a new one."""
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

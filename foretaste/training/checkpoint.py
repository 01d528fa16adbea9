"""Checkpoints: the complete state of a run, in a folder that is replaced in one rename.

manifest.json             the run's progress, its settings and seed, and the checksum of every part
NAME-NUMBER.safetensors   a part: model, best, average, optimizer, objective or refreshed
NAME-NUMBER.R-of-N.safetensors   the rows of sharded tensors that process R of N holds

The manifest is replaced last, in one rename, and only what it lists is read. A part that the
manifest lists already, such as the best weights of an earlier epoch, is not written again. The
random draws of a step depend only on the seed and the step's number, so the checkpoint holds no
generator state.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from foretaste.data.folder import (
    MANIFEST_FILE,
    FileEntry,
    FolderManifest,
    entry_of,
    read_manifest,
    verify_files,
    whole_file,
)
from foretaste.errors import BundleError
from foretaste.training import processes

CHECKPOINT = "checkpoint"
"""Name of the checkpoint's folder inside a run's folder."""
_FORMER = "checkpoint.safetensors"
"""The single file that earlier versions wrote."""


class CheckpointManifest(FolderManifest):
    """The manifest of a checkpoint."""

    kind = "checkpoint"
    latest = 1
    remedy = "start again without --resume"

    format: Literal["foretaste-checkpoint"] = "foretaste-checkpoint"
    """Identifies the folder as a checkpoint."""
    format_version: int = 1
    """Version of the checkpoint format."""
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
        folder: The checkpoint's folder.
        parts: Part name to tensor name to tensor. Part names end with `-NUMBER`; a part whose
            name is already in the manifest is unchanged and is not written.
        facts: Everything else, as JSON values.
        own: The sharded tensors by name, with the range of rows that this process holds. If
            there are any, all processes write.

    Raises:
        DataError: The disk is full or not writable; the previous checkpoint is unchanged.
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
    """Write this process's share of a part; return the names of all files of the part."""
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
                save_tensors(kept, part)
    return files


_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""The types by their names in safetensors."""


def save_tensors(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Write a safetensors file without a complete copy in memory."""
    header, first_bytes = _header({n: (t.dtype, list(t.shape)) for n, t in tensors.items()})
    with file.open("wb") as opened:
        opened.write(header)
        for name in first_bytes:
            opened.write(_bytes(tensors[name]))


def save_together(file: Path, rows: Mapping[str, tuple[int, range, Tensor]]) -> dict[str, Tensor]:
    """Write tensors of which each process has some rows into one safetensors file.

    Args:
        file: In a folder that all processes see.
        rows: By name, the number of rows, the range of this process, and its rows.

    Returns:
        All rows, mapped from the file; changes to them are not written to the file.
    """
    shapes = {name: (own.dtype, [num, *own.shape[1:]]) for name, (num, _, own) in rows.items()}
    header, first_bytes = _header(shapes)
    if processes.is_first():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(header)
    processes.wait()
    with file.open("r+b") as opened:
        for name, first_byte in first_bytes.items():
            _, which, own = rows[name]
            opened.seek(first_byte + which.start * own[:1].nbytes)
            opened.write(_bytes(own))
    processes.wait()
    return load_file(file)


def _header(
    shapes: Mapping[str, tuple[torch.dtype, list[int]]],
) -> tuple[bytes, dict[str, int]]:
    """Return the header of a file, and the position of each tensor."""
    parts: dict[str, Any] = {}
    ends, end = dict[str, int](), 0
    for name in sorted(shapes, key=lambda name: (-shapes[name][0].itemsize, name)):
        dtype, shape = shapes[name]
        ends[name], begin = end, end
        end += dtype.itemsize * math.prod(shape)
        parts[name] = {"dtype": _DTYPES[dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(parts, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return header, {name: len(header) + begin for name, begin in ends.items()}


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().flatten()
    return flat.view(torch.uint8).numpy().data


def read_checkpoint(
    folder: Path, *, own: Mapping[str, range] = MappingProxyType({})
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Read a checkpoint that `write_checkpoint` wrote; part names come without their numbers.

    Args:
        folder: The checkpoint's folder.
        own: The tensors of which only a range of rows is read; any process may have written them.

    Raises:
        BundleError: The checkpoint is missing, damaged or of a newer format.
    """
    manifest = read_manifest(folder, CheckpointManifest)
    verify_files(folder, manifest, checksums=processes.is_first())
    parts: dict[str, dict[str, Tensor]] = {}
    try:
        for part, files in groupby(sorted(manifest.files, key=_place), lambda f: _place(f)[0]):
            parts[part.partition("-")[0]] = _read([folder / file for file in files], own)
    except (OSError, SafetensorError) as error:
        raise BundleError(
            f"{folder} cannot be read although its checksums match: {manifest.remedy}",
            name=str(folder),
        ) from error
    return parts, manifest.facts


def _place(file: str) -> tuple[str, int]:
    """Return a file's part and the rank of the process that wrote it; -1 for an unsharded file."""
    part, *ranks = file.removesuffix(".safetensors").split(".")
    return part, int(ranks[0].partition("-")[0]) if ranks else -1


def _read(files: Iterable[Path], own: Mapping[str, range]) -> dict[str, Tensor]:
    """Read the requested rows of tensors, which may be spread over several files in row order."""
    pieces: dict[str, list[Tensor]] = {}
    rows_before: dict[str, int] = {}
    for file in files:
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  # it is not a mapping
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
        BundleError: The checkpoint has the former layout, a single file, which is left unchanged.
    """
    if (run / CHECKPOINT / MANIFEST_FILE).exists():
        return run / CHECKPOINT
    if (run / _FORMER).exists():
        raise BundleError(
            f"{run / _FORMER} is a checkpoint of an earlier version of foretaste, which wrote one "
            "file: resume with the version that wrote it (pip install foretaste==VERSION), or "
            "start again with --replace (in Python: without resume)",
            name=str(run / _FORMER),
            value=str(run / _FORMER),
        )
    return None


def epochs_done(run: Path) -> int | None:
    """Return how many epochs an interrupted run completed; None if it ended or there is no run.

    Raises:
        BundleError: The run's checkpoint has the former layout.
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
    """Delete the checkpoint of an earlier run, so that it cannot be resumed by mistake."""
    folder = run / CHECKPOINT
    for path in (run / _FORMER, folder / MANIFEST_FILE, *_parts_in(folder)):
        path.unlink(missing_ok=True)


def _listed(folder: Path) -> dict[str, FileEntry]:
    try:
        return dict(read_manifest(folder, CheckpointManifest).files)
    except BundleError:
        return {}


def _parts_in(folder: Path) -> Iterator[Path]:
    """Yield every part, and unfinished parts that a killed process left behind."""
    yield from folder.glob("*.safetensors")
    yield from folder.glob(".*.safetensors.*.writing")


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """Figures of one epoch."""

    epoch: int
    """Counted from 1."""
    loss: float
    """Mean loss over the steps with a finite loss; NaN if there were none."""
    seconds: float
    """Time of training up to the end of this epoch, including earlier epochs and validations."""
    events_per_second: float
    """Speed of training in this epoch, without validation."""
    validation: float | None = None
    """The validation metric, higher is better; None if there was no validation."""
    validation_seconds: float = 0.0
    """Time of the validation."""
    waiting_share: float = 0.0
    """Share of this epoch's training time that was spent waiting for batches."""


@dataclass(kw_only=True)
class Progress:
    """The progress of a run, which a checkpoint restores."""

    epoch: int = 0
    batch: int = 0
    step: int = 0
    loss_sum: float = 0.0
    """Sum of the finite losses of the epoch so far; `counted` is their number."""
    counted: int = 0
    skipped: int = 0
    bad_in_a_row: int = 0
    seconds: float = 0.0
    best: float = -math.inf
    best_epoch: int = 0
    last: list[float] = field(default_factory=list)
    """The most recent validations, at most three."""
    watched: float = -math.inf
    """The best value so far of the metric that patience watches."""
    waited: int = 0
    """Validations since the best one."""
    done: str = ""
    """The reason why the run ended; empty while it runs."""
    precision: str = ""
    """The number format of the steps; empty until "auto" has chosen one."""
    epochs: list[dict[str, Any]] = field(default_factory=list)

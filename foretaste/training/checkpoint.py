"""A run's whole state in one file, written whole or not at all.

The file is safetensors: every tensor under a dotted name, everything else as JSON in its header.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from foretaste.data.disk import whole_file
from foretaste.errors import BundleError

CHECKPOINT_FILE = "checkpoint.safetensors"
"""Its name in the folder of a run."""


def write_checkpoint(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write the state so that a reader sees the old file or the new one, never a half.

    Raises:
        DataError: The disk is full or refuses.
    """
    data = save(
        {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
        metadata={"facts": json.dumps(facts)},
    )
    with whole_file(path, replace=True) as part:
        part.write_bytes(data)


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `write_checkpoint` wrote.

    Raises:
        BundleError: The file is missing or is not a checkpoint.
    """
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads((file.metadata() or {})["facts"])
            return {name: file.get_tensor(name) for name in file.keys()}, facts  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise BundleError(
            f"{path} is not a checkpoint ({error}): start without --resume"
        ) from error


def epochs_done(path: Path) -> int | None:
    """Return how many epochs a run had completed that was stopped; None: it ended, or is none."""
    try:
        with safe_open(path, framework="pt") as file:
            progress = json.loads((file.metadata() or {})["facts"])["progress"]
            return None if progress["done"] else int(progress["epoch"])
    except (OSError, SafetensorError, KeyError, ValueError):
        return None


def forget_checkpoint(folder: Path) -> None:
    """Delete the checkpoint of an earlier run, so that nobody resumes it in place of a new one."""
    path = folder / CHECKPOINT_FILE
    if path.exists():
        path.unlink()

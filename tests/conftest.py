"""What every test may lean on."""

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import torch

from foretaste.training.fit import Fit

torch.set_num_threads(1)  # beside a busy neighbour, two threads stall at every parallel region


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets beside the checkout, where it stands."""
    folder = Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"real data sets are not at {folder}: their tests are left out")
    return folder


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 64 KiB, where this process may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("a small disk cannot be mounted here: that takes root")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.fixture(scope="session", autouse=True)
def shapes_of_the_first_epoch() -> Iterator[None]:
    """Check shapes in the first epoch of each training alone: later epochs have the same."""
    epoch = Fit._epoch

    def checked_at_first(run: Any, *args: Any) -> None:
        jaxtyping.config.update("jaxtyping_disable", run.progress.epoch > 0)
        try:
            epoch(run, *args)
        finally:
            jaxtyping.config.update("jaxtyping_disable", value=False)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Fit, "_epoch", checked_at_first)
        yield

"""What every test may lean on."""

from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # beside a busy neighbour, two threads stall at every parallel region


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets beside the checkout, where it stands."""
    folder = Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"real data sets are not at {folder}: their tests are left out")
    return folder

"""Memory and threads of the process, and the random generators of a run.

Random draws depend only on the position in a run: step b of epoch e draws from (seed, e, b). A
resumed run therefore makes the same draws as one that was not interrupted.
"""

import ctypes
import sys

import numpy as np
import torch

from foretaste.errors import ConfigError

_GLIBC_LIMITS = {-1: (1 << 31) - 1, -2: 64 << 20, -3: 1 << 30}
"""mallopt's M_TRIM_THRESHOLD, M_TOP_PAD and M_MMAP_THRESHOLD, in bytes."""


def keep_memory() -> bool:
    """Make glibc keep freed memory for the next tensor; return whether it accepted the setting.

    By default, glibc returns tensors of a megabyte and more to the system when they are freed, and
    the next tensor is paged in again, at a tenth of the speed of memory. With this setting, a
    SASRec step on a CPU takes half the time.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # musl has none
        return False
    taken = [mallopt(option, size) for option, size in _GLIBC_LIMITS.items()]
    return all(taken)


def choose_device(name: str) -> torch.device:
    """Return the device to train on; "auto" uses a GPU if there is one.

    Raises:
        ConfigError: The setting asks for a GPU, and there is none.
    """
    has_gpu = torch.cuda.is_available()
    if name == "cuda" and not has_gpu:
        raise ConfigError(
            'training.device is "cuda", but torch finds no GPU: set it to "auto"',
            name="training.device",
            value="cuda",
        )
    return torch.device(("cuda" if has_gpu else "cpu") if name == "auto" else name)


def epoch_generator(seed: int, epoch: int) -> np.random.Generator:
    """Return the generator of an epoch's windows and order."""
    return np.random.default_rng([seed, epoch])


def step_seed(seed: int, epoch: int, batch: int) -> int:
    """Return the seed of one step."""
    state = np.random.SeedSequence([seed, epoch, batch + 1]).generate_state(1, np.uint64)
    return int(state[0])


def step_generator(seed: int, epoch: int, batch: int) -> torch.Generator:
    """Return the generator of a step, which is on the CPU for every device.

    It is torch's global generator, the only one that dropout can use, and is seeded for each step,
    so that steps do not depend on earlier ones. `torch.manual_seed` is not used, because it records
    the stack for every unused device in each step.
    """
    number = step_seed(seed, epoch, batch)
    torch.default_generator.manual_seed(number)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(number)
    return torch.default_generator

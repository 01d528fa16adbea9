"""How this process uses memory and threads, and where a run's randomness comes from.

Randomness depends on where a run is, never on what ran before: step b of epoch e draws from
(seed, e, b), so a run resumed anywhere is the same run.
"""

import ctypes
import sys

import numpy as np
import torch

from foretaste.errors import ConfigError

_GLIBC_LIMITS = {-1: (1 << 31) - 1, -2: 64 << 20, -3: 1 << 30}
"""mallopt's M_TRIM_THRESHOLD, M_TOP_PAD and M_MMAP_THRESHOLD, in bytes."""


def keep_memory() -> bool:
    """Tell glibc to keep freed memory for the next tensor; return whether it took it.

    It gives tensors of a megabyte and more back to the system when they are freed, and the next
    one is paged in afresh, at a tenth of the speed of memory. So set, a SASRec step on a CPU takes
    half its time.
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
    """Return the device to train on: "auto" takes a GPU where there is one.

    Raises:
        ConfigError: A GPU is asked for, and there is none.
    """
    has_gpu = torch.cuda.is_available()
    if name == "cuda" and not has_gpu:
        raise ConfigError(
            'training.device is "cuda", and torch finds no GPU: set it to "auto"',
            name="training.device",
            value="cuda",
        )
    return torch.device(("cuda" if has_gpu else "cpu") if name == "auto" else name)


def epoch_generator(seed: int, epoch: int) -> np.random.Generator:
    """Return what decides an epoch's windows and order."""
    return np.random.default_rng([seed, epoch])


def step_seed(seed: int, epoch: int, batch: int) -> int:
    """Return the seed of one step."""
    state = np.random.SeedSequence([seed, epoch, batch + 1]).generate_state(1, np.uint64)
    return int(state[0])


def step_generator(seed: int, epoch: int, batch: int) -> torch.Generator:
    """Return what a step draws from, a generator of the CPU on every device.

    It is torch's own, since dropout can draw from nothing else: set for each step, so that nothing
    goes from one step to the next through it. `torch.manual_seed` would note down the stack for
    every device that is not in use: each step.
    """
    number = step_seed(seed, epoch, batch)
    torch.default_generator.manual_seed(number)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(number)
    return torch.default_generator

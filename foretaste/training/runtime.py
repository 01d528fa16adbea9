"""How this process uses memory and threads: measured settings, in one place.

glibc gives tensors of a megabyte and more back to the system when they are freed, and the next
one is paged in afresh, at a tenth of the speed of memory. Told to keep it, a SASRec step on a CPU
takes half its time.
"""

import ctypes
import sys

import torch

from foretaste.errors import ConfigError

_GLIBC_LIMITS = {-1: (1 << 31) - 1, -2: 64 << 20, -3: 1 << 30}
"""mallopt's M_TRIM_THRESHOLD, M_TOP_PAD and M_MMAP_THRESHOLD, in bytes."""


def keep_memory() -> bool:
    """Tell glibc to keep freed memory for the next tensor; return whether it took it."""
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
            'training.device is "cuda", and torch sees no GPU here: set it to "auto"',
            name="training.device",
            value="cuda",
        )
    return torch.device(("cuda" if has_gpu else "cpu") if name == "auto" else name)

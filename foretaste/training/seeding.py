"""Randomness that depends on where a run is, never on what ran before.

Step b of epoch e draws from (seed, e, b), so a run resumed anywhere is the same run.
"""

import numpy as np
import torch


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

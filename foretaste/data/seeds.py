"""Randomness of a part, decided by a seed and the part's number alone."""

import numpy as np
import torch


def mixed(seed: int, number: int) -> int:
    """Return the seed of one part, an unsigned 64-bit integer."""
    return int(np.random.SeedSequence([seed, number]).generate_state(1, np.uint64)[0])


def torch_generator(seed: int, number: int) -> torch.Generator:
    """Return what decides one part's draws."""
    return torch.Generator().manual_seed(mixed(seed, number) % 2**63)

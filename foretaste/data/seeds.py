"""Randomness of a part, decided by a seed and the part's number alone, and what one process reads.

What a batch holds is decided for the whole batch, row by row of it, before it is divided among
processes, so several of them learn from the same batches as one.
"""

from dataclasses import dataclass

import numpy as np
import torch

from foretaste.errors import ConfigError


@dataclass(frozen=True)
class Share:
    """The part of every batch that one of several processes reads."""

    rank: int = 0
    """Number of the process, in [0, world)."""
    world: int = 1
    """How many processes there are."""

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world:
            raise ConfigError(
                f"rank is {self.rank} of {self.world} processes: ranks are counted from 0",
                name="rank",
                value=self.rank,
            )

    def of(self, num: int) -> slice:
        """Return this process's rows of a batch of `num`; rank after rank they are the batch.

        Shares differ by one row at most; one may be empty where there are more processes than rows.
        """
        return slice(num * self.rank // self.world, num * (self.rank + 1) // self.world)


WHOLE = Share()


def mixed(seed: int, number: int) -> int:
    """Return the seed of one part, an unsigned 64-bit integer."""
    return int(np.random.SeedSequence([seed, number]).generate_state(1, np.uint64)[0])


def torch_generator(seed: int, number: int) -> torch.Generator:
    """Return what decides one part's draws."""
    return torch.Generator().manual_seed(mixed(seed, number) % 2**63)

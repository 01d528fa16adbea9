"""Seeds of parts of a run, and draws and results that do not depend on the number of processes.

Randomness depends on where a run is, never on what ran before: step b of epoch e draws from
(seed, e, b), so a run resumed anywhere is the same run.

Draws for a batch are made for all of its rows, from a seed and the batch's number, before it is
divided among processes, so several processes learn from the same batches as one. Work that is done
in blocks, such as evaluation, is divided block by block.

Shape legend: S keys of this process, T keys of all processes.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int64, Shaped
from torch import Tensor

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
        """Return this process's rows of a batch of `num`; the ranks' rows follow each other.

        Shares differ by at most one row; some are empty if there are more processes than rows.
        """
        return slice(num * self.rank // self.world, num * (self.rank + 1) // self.world)


WHOLE = Share()


class Part(NamedTuple):
    """The rows of a step's batch that belong to one of several processes."""

    first: int
    last: int
    """One more than its last row."""
    total: int
    """Number of rows of all processes together."""

    @property
    def rows(self) -> slice:
        """The rows, numbered in the complete batch."""
        return slice(self.first, self.last)


AllKeys = Callable[[Tensor], Tensor]
"""Maps a process's distinct keys to those of all processes, both ascending."""
_dealt: list[tuple[Part, AllKeys]] = []


@contextmanager
def only_part(part: Part, all_keys: AllKeys) -> Iterator[None]:
    """Declare that batches in this context are parts of larger ones."""
    _dealt.append((part, all_keys))
    try:
        yield
    finally:
        _dealt.pop()


def draw_for_rows(
    shape: Sequence[int], draw: Callable[[torch.Size], Tensor]
) -> Shaped[Tensor, "..."]:
    """Draw numbers for the rows of a batch.

    They are drawn for the complete batch, so they are the same for any number of processes.

    Args:
        shape: The shape of the result. If its first size is not a multiple of the batch's rows,
            only this process's numbers are drawn.
        draw: Draws a tensor of a shape.
    """
    if not _dealt:
        return draw(torch.Size(shape))
    (part, _), (num, *others) = _dealt[-1], shape
    num_own = part.last - part.first
    each, rest = divmod(num, num_own) if num_own else (1, num)
    if rest:
        return draw(torch.Size(shape))
    drawn = draw(torch.Size((part.total * each, *others)))
    return drawn[part.first * each : part.last * each]


def draw_for_keys(
    key_S: Int64[Tensor, " S"], draw: Callable[[torch.Size], Tensor]
) -> Shaped[Tensor, " S"]:
    """Draw a number for each of a batch's distinct keys (ascending), such as its items.

    A key that several processes have gets the same number in all of them.
    """
    if not _dealt:
        return draw(key_S.shape)
    every_T = _dealt[-1][1](key_S)
    return draw(every_T.shape)[torch.searchsorted(every_T, key_S)]


Fill = Callable[[Tensor], None]
"""Sums a tensor over processes, in place; for bytes, takes the maximum."""
_shared_out: list[tuple[Share, Fill]] = []


@contextmanager
def shared_out(share: Share, fill: Fill) -> Iterator[None]:
    """Divide the blocks of work in this context among the processes."""
    _shared_out.append((share, fill))
    try:
        yield
    finally:
        _shared_out.pop()


def own_blocks(num: int, step: int) -> Iterator[slice]:
    """Yield the blocks of `step` rows that this process computes; a single process has all."""
    share = _shared_out[-1][0] if _shared_out else WHOLE
    for first in range(share.rank * step, num, share.world * step):
        yield slice(first, min(first + step, num))


def fill_blocks(*values: np.ndarray | Tensor) -> None:
    """Fill in the blocks that other processes computed; they are 0 before."""
    for value in values if _shared_out else ():
        tensor = torch.from_numpy(value) if isinstance(value, np.ndarray) else value
        if tensor.numel():
            _shared_out[-1][1](tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor)


def mixed(seed: int, number: int) -> int:
    """Return the seed of one part of a run, an unsigned 64-bit integer."""
    return int(np.random.SeedSequence([seed, number]).generate_state(1, np.uint64)[0])


def torch_generator(seed: int, number: int) -> torch.Generator:
    """Return the generator of one part of a run."""
    return torch.Generator().manual_seed(mixed(seed, number) % 2**63)


def epoch_generator(seed: int, epoch: int) -> np.random.Generator:
    """Return the generator of an epoch's windows and order."""
    return np.random.default_rng([seed, epoch])


def step_seed(seed: int, epoch: int, batch: int) -> int:
    """Return the seed of one step."""
    state = np.random.SeedSequence([seed, epoch, batch + 1]).generate_state(1, np.uint64)
    return int(state[0])


def step_generator(seed: int, epoch: int, batch: int) -> torch.Generator:
    """Return the generator of a step; it is on the CPU for every device.

    It is torch's global generator, the only one that dropout can use, and is seeded for each step,
    so that steps do not depend on earlier ones. `torch.manual_seed` is not used, because it records
    the stack for every unused device in each step.
    """
    number = step_seed(seed, epoch, batch)
    torch.default_generator.manual_seed(number)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(number)
    return torch.default_generator

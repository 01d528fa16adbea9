"""Seeds of parts of a run, and draws and answers that are the same for any number of processes.

Randomness depends on where a run is, never on what ran before: step b of epoch e draws from
(seed, e, b), so a run resumed anywhere is the same run.

What is drawn for the rows of a batch is drawn for all of it, from a seed and its number, before it
is divided among processes, so that several of them learn from the same batches as one. Work that
is done in blocks, such as evaluation, is divided block by block.

Shape legend: S keys of this process, T of all processes.
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
        """Return this process's rows of a batch of `num`; rank after rank they are the batch.

        Shares differ by one row at most; one may be empty where there are more processes than rows.
        """
        return slice(num * self.rank // self.world, num * (self.rank + 1) // self.world)


WHOLE = Share()


class Part(NamedTuple):
    """Which rows of a step's batch one of several processes has."""

    first: int
    last: int
    """One more than its last row."""
    total: int
    """Of all processes together."""

    @property
    def rows(self) -> slice:
        """The rows, counted in the whole batch."""
        return slice(self.first, self.last)


AllKeys = Callable[[Tensor], Tensor]
"""From a process's distinct keys, rising, to those of all processes, rising."""
_dealt: list[tuple[Part, AllKeys]] = []


@contextmanager
def only_part(part: Part, all_keys: AllKeys) -> Iterator[None]:
    """Let draws know that the batches of this context are parts of larger ones."""
    _dealt.append((part, all_keys))
    try:
        yield
    finally:
        _dealt.pop()


def draw_for_rows(
    shape: Sequence[int], draw: Callable[[torch.Size], Tensor]
) -> Shaped[Tensor, "..."]:
    """Draw numbers for the rows of a batch, so many for each: those of the whole batch are drawn.

    So they are the same for any number of processes.

    Args:
        shape: What is wanted; the first size is a multiple of the batch's rows, or is that of
            something else, for which it alone is drawn.
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
    """Draw a number for each of a batch's distinct keys, rising, such as its items.

    A key that several processes have gets the same number in each.
    """
    if not _dealt:
        return draw(key_S.shape)
    every_T = _dealt[-1][1](key_S)
    return draw(every_T.shape)[torch.searchsorted(every_T, key_S)]


Fill = Callable[[Tensor], None]
"""Adds to a tensor what it holds in other processes, in place; of bytes the largest."""
_shared_out: list[tuple[Share, Fill]] = []


@contextmanager
def shared_out(share: Share, fill: Fill) -> Iterator[None]:
    """Divide the blocks of the work in this context among processes that all do it."""
    _shared_out.append((share, fill))
    try:
        yield
    finally:
        _shared_out.pop()


def own_blocks(num: int, step: int) -> Iterator[slice]:
    """Give the blocks of `step` of `num` rows that this process computes: all if it is alone."""
    share = _shared_out[-1][0] if _shared_out else WHOLE
    for first in range(share.rank * step, num, share.world * step):
        yield slice(first, min(first + step, num))


def fill_blocks(*values: np.ndarray | Tensor) -> None:
    """Fill in the blocks that other processes computed; until then they are 0."""
    for value in values if _shared_out else ():
        tensor = torch.from_numpy(value) if isinstance(value, np.ndarray) else value
        if tensor.numel():
            _shared_out[-1][1](tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor)


def mixed(seed: int, number: int) -> int:
    """Return the seed of one part, an unsigned 64-bit integer."""
    return int(np.random.SeedSequence([seed, number]).generate_state(1, np.uint64)[0])


def torch_generator(seed: int, number: int) -> torch.Generator:
    """Return what decides one part's draws."""
    return torch.Generator().manual_seed(mixed(seed, number) % 2**63)


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

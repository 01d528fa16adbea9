"""Batches made ahead of the trainer, by threads, delivered in order.

What a batch holds is a function of (seed, epoch, index) alone, so it does not matter who makes it
and when: with producers or without, a run is the same to the bit.
"""

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, final

from foretaste.data.plans import Plan

Batch = TypeVar("Batch", covariant=True)

_AHEAD = 2
"""Batches that wait or are being made, for each producer."""


@final
@dataclass(frozen=True, eq=False, kw_only=True)
class WorkedPlan(Plan[Any]):
    """A plan whose batches are worked on further where they are made."""

    plan: Plan[Any]
    work: Callable[[Any, int], Any]
    """From a batch and its index to what is delivered."""

    def __len__(self) -> int:
        return len(self.plan)

    @property
    def num_events(self) -> int:
        """Events in the epoch."""
        return self.plan.num_events

    def batch(self, index: int) -> Any:
        """Make one batch and work on it."""
        return self.work(self.plan.batch(index), index)


@final
class Prefetch(Generic[Batch]):
    """Gives a plan's batches in order; with producers, these make a few of them ahead.

    The producers are threads: what they do, drawing and gathering in torch, numpy and numba,
    leaves the interpreter to the trainer. The queue is bounded, so memory is too. Leaving the
    context ends them, whether the epoch is over or broken off.
    """

    def __init__(
        self,
        plan: Plan[Batch],
        *,
        producers: int,
        first: int = 0,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Prepare; nothing is made yet.

        Args:
            plan: Whose batches.
            producers: How many threads make them; 0: the caller makes them.
            first: The first batch that will be asked for.
            clock: Seconds since whenever, to measure waiting with.
        """
        self.plan, self.producers = plan, producers
        self.waited_s = 0.0
        """How long the caller has waited for batches, in seconds."""
        self._clock = clock
        self._next = first
        self._ahead: deque[Future[Batch]] = deque()
        self._pool: ThreadPoolExecutor | None = None

    def __enter__(self) -> "Prefetch[Batch]":
        if self.producers:
            self._pool = ThreadPoolExecutor(self.producers, thread_name_prefix="producer")
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None

    def next(self) -> Batch:
        """Return the next batch; an error in making it is raised here."""
        started = self._clock()
        if self._pool is None:
            batch = self.plan.batch(self._next)
            self._next += 1
        else:
            self._fill(self._pool)
            asked = self._ahead.popleft()
            self._fill(self._pool)
            batch = asked.result()
        self.waited_s += self._clock() - started
        return batch

    def _fill(self, pool: ThreadPoolExecutor) -> None:
        while self._next < len(self.plan) and len(self._ahead) < _AHEAD * self.producers:
            self._ahead.append(pool.submit(self.plan.batch, self._next))
            self._next += 1

"""Prefetching: threads make batches ahead of the trainer and deliver them in order.

The contents of a batch depend only on (seed, epoch, index), so it does not matter which thread
makes it and when: a run is bit-identical with and without producers.
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
"""Batches per producer that are waiting or in the making."""


@final
@dataclass(frozen=True, eq=False, kw_only=True)
class WorkedPlan(Plan[Any]):
    """A plan whose batches are processed further by the thread that makes them."""

    plan: Plan[Any]
    work: Callable[[Any, int], Any]
    """Turns a batch and its index into the object that is delivered."""

    def __len__(self) -> int:
        return len(self.plan)

    @property
    def num_events(self) -> int:
        """Number of events in the epoch."""
        return self.plan.num_events

    def batch(self, index: int) -> Any:
        """Make one batch and process it."""
        return self.work(self.plan.batch(index), index)


@final
class Prefetch(Generic[Batch]):
    """Delivers a plan's batches in order; producers, if any, make a few of them in advance.

    The producers are threads: drawing and gathering in torch, numpy and numba releases the
    interpreter lock for the trainer. The queue is bounded, so memory is too. Leaving the context
    ends the threads, whether the epoch is complete or not.
    """

    def __init__(
        self,
        plan: Plan[Batch],
        *,
        producers: int,
        first: int = 0,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Prepare without making a batch.

        Args:
            plan: The plan whose batches are delivered.
            producers: Number of threads that make batches; 0: the caller makes them.
            first: Index of the first batch to deliver.
            clock: Returns the time in seconds, to measure waiting.
        """
        self.plan, self.producers = plan, producers
        self.waited_s = 0.0
        """Time that the caller has waited for batches, in seconds."""
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
        """Return the next batch; an error that a producer met is raised here."""
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

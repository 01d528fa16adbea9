"""A run around its steps: batches made ahead, a log of steps, a progress bar, estimates of cost.

What a batch holds is a function of (seed, epoch, index) alone, so with threads that make batches
ahead of the trainer or without them a run is the same to the bit.
"""

import json
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, TypeVar, final

import psutil
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from foretaste.data.folder import reason_of
from foretaste.data.plans import Plan
from foretaste.errors import DataError
from foretaste.training.checkpoint import Epoch
from foretaste.training.checkpoint import Progress as RunProgress

if TYPE_CHECKING:  # fit.py reads batches by `Prefetch`
    from foretaste.training.fit import Fit

_WARM_UP = 3
"""Number of first steps that are not timed: they are slower, because memory is paged in and loops
are compiled."""
_LOOK_STEPS, _LOOK_SECONDS = 5, 2.0
"""The least time, in seconds, for which the steps after them are timed."""


def say(line: str) -> None:
    """Print a line about a run on standard error."""
    Console(stderr=True).print(line, highlight=False)


@final
class ShowProgress:
    """Shows a run on the console of standard error, or on the one given."""

    def __init__(self, epochs: int, console: Console | None = None) -> None:
        self.epochs = epochs
        self.console = console or Console(stderr=True)
        self._bar = Progress(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(),
            TextColumn("loss {task.fields[loss]:.4f} · {task.fields[rate]:,.1f} steps/s"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
            transient=True,
        )
        self._task = self._bar.add_task("", total=None, epoch=1, loss=float("nan"), rate=0.0)

    def __enter__(self) -> "ShowProgress":
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def step(self, progress: RunProgress, steps_per_epoch: int) -> None:
        """Advance the bar; the time left assumes all epochs, without early stopping."""
        self._bar.update(
            self._task,
            completed=progress.step,
            total=steps_per_epoch * self.epochs,
            epoch=f"{progress.epoch + 1}/{self.epochs}",
            loss=progress.loss_sum / max(1, progress.counted),
            rate=progress.step / max(progress.seconds, 1e-9),
        )

    def epoch(self, epoch: Epoch) -> None:
        """Print a line about an epoch that ended."""
        validation = "" if epoch.validation is None else f" · validation {epoch.validation:.4f}"
        self.console.print(
            f"epoch {epoch.epoch}/{self.epochs} · loss {epoch.loss:.4f}{validation} · "
            f"{epoch.events_per_second:,.0f} events/s · {epoch.seconds:,.0f} s",
            highlight=False,
        )

    def cost(self, name: str, cost: "Cost") -> None:
        """Print a line about what the training of a model will cost."""
        self.say(f"{name}: {cost}")

    def say(self, text: str) -> None:
        """Print a line."""
        self.console.print(text, highlight=False, soft_wrap=True)


@final
@dataclass(frozen=True, kw_only=True)
class Cost:
    """The estimated cost of a run, from its first steps and its first validation.

    The estimate assumes that the load of the machine does not change.
    """

    epochs: int
    """The most epochs; early stopping may end the run before."""
    epoch_seconds: float
    """Seconds of training per epoch, without validation."""
    validations: int
    """The most validations; 0 if there is none."""
    validation_seconds: float | None
    """Seconds of one validation; None if there is none, or none so far."""
    max_seconds: float | None
    """The time limit of the run, if it has one."""
    weight_bytes: int
    """Bytes of tables and other weights."""
    optimizer_bytes: int
    """Bytes of gradients and of the optimizer's state."""
    batch_bytes: int
    """Bytes of the activations that a step keeps for its backward pass."""
    process_bytes: int
    """Bytes of the whole process so far, including data and libraries."""
    gpu_bytes: int
    """The peak use of GPU memory so far, in bytes; 0 without a GPU."""

    @property
    def seconds(self) -> float:
        """Seconds of all epochs and, if known, of their validations."""
        validated = self.validations * (self.validation_seconds or 0.0)
        seconds = self.epochs * self.epoch_seconds + validated
        return seconds if self.max_seconds is None else min(seconds, self.max_seconds)

    def __str__(self) -> str:
        """Return the estimate as one line of text."""
        each = f"{duration(self.epoch_seconds)} an epoch"
        if self.validation_seconds is not None:
            each += f" and {duration(self.validation_seconds)} a validation"
        at_most = "at most " if self.validations else ""
        known = self.validation_seconds is not None or not self.validations
        gpu = f"; {_size(self.gpu_bytes)} of the GPU's" if self.gpu_bytes else ""
        return (
            f"about {each}: {at_most}{duration(self.seconds)} for {self.epochs:,} "
            f"epoch{'s' * (self.epochs > 1)}{'' if known else ', validation not counted'}; "
            f"{_size(self.process_bytes)} of memory (weights {_size(self.weight_bytes)}, optimizer "
            f"{_size(self.optimizer_bytes)}, a batch {_size(self.batch_bytes)}){gpu}"
        )


@final
class CostWatch:
    """Watches the first steps of a run, and its first validation."""

    def __init__(
        self,
        run: "Fit[Any, Any]",
        found: Sequence[Callable[[Cost], object]],
        *,
        max_seconds: float | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Start to watch a run.

        Args:
            run: A run that has not started.
            found: Functions that are called with the cost after the first steps, and again after
                the first validation if it comes later.
            max_seconds: The time limit of the run, if it has one.
            clock: Returns the time in seconds.
        """
        self.cost: Cost | None = None
        """The most recent estimate."""
        self._run, self._found, self._max_seconds, self._clock = run, found, max_seconds, clock
        self._saved = _SavedForBackward(run.parameters)
        self._steps, self._steps_per_epoch = 0, 1
        self._began = self._first = self._warm = clock()
        self._validation: float | None = None
        self._validated = 0.0

    def step(self, steps_per_epoch: int) -> None:
        """Record a step that ended."""
        self._steps, self._steps_per_epoch = self._steps + 1, steps_per_epoch
        if self._steps <= _WARM_UP:
            self._warm = self._clock()
            self._first = self._warm if self._steps == 1 else self._first
            if self._steps == _WARM_UP - 1:
                self._saved.watch()
            else:
                self._saved.stop()
        elif self.cost is None:
            self._tell()

    def epoch(self, epoch: Epoch) -> None:
        """Record an epoch that ended."""
        if epoch.validation is not None:
            self._validated += epoch.validation_seconds if self._steps >= _WARM_UP else 0.0
            if self._validation is None:
                self._validation, self.cost = epoch.validation_seconds, None
        if self.cost is None:
            self._tell()

    def _tell(self) -> None:
        steps, seconds = self._steps - _WARM_UP, self._clock() - self._warm - self._validated
        if steps < _LOOK_STEPS or seconds < _LOOK_SECONDS:
            return
        run, step = self._run, seconds / steps
        refreshed = 0.0 if run.refreshed is None else max(0.0, self._first - self._began - step)
        every, epochs = run.validate_every, run.config.rounds
        kept = [value for state in run.optimizer.state.values() for value in state.values()]
        self.cost = Cost(
            epochs=epochs,
            epoch_seconds=self._steps_per_epoch * step + refreshed,
            validations=0 if run.validate is None else math.ceil(epochs / every),
            validation_seconds=self._validation,
            max_seconds=self._max_seconds,
            weight_bytes=_nbytes([*run.parameters, *run.model.buffers()]),
            optimizer_bytes=_nbytes([*kept, *(parameter.grad for parameter in run.parameters)]),
            batch_bytes=self._saved.nbytes,
            process_bytes=psutil.Process().memory_info().rss,
            gpu_bytes=torch.cuda.max_memory_allocated() if run.device.type == "cuda" else 0,
        )
        for tell in self._found:
            tell(self.cost)


@final
class _SavedForBackward:
    """Counts the bytes that a step keeps for its backward pass, without the weights."""

    def __init__(self, weights: Iterable[Tensor]) -> None:
        self.nbytes = 0
        self._weights = {weight.untyped_storage().data_ptr() for weight in weights}
        self._size_of: dict[int, int] = {}
        self._hooks: saved_tensors_hooks | None = None

    def watch(self) -> None:
        """Start to count, in this thread."""
        self._hooks = saved_tensors_hooks(self._keep, lambda tensor: tensor)
        self._hooks.__enter__()

    def stop(self) -> None:
        """Stop counting."""
        if self._hooks is not None:
            self._hooks.__exit__()
            self._hooks, self.nbytes = None, sum(self._size_of.values())

    def _keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._weights:
            self._size_of[storage.data_ptr()] = storage.nbytes()
        return tensor


def duration(seconds: float) -> str:
    """Return a duration as readable text."""
    if seconds < 100:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _size(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB" if size < 2**30 else f"{size / 2**30:,.1f} GiB"


def _nbytes(values: Iterable[object]) -> int:
    tensors = [value for value in values if isinstance(value, Tensor)]
    return sum(
        one.nbytes
        for tensor in tensors
        for one in ((tensor._indices(), tensor._values()) if tensor.is_sparse else (tensor,))
    )


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


_STEPS_FILE = "steps.jsonl"


@final
class StepLog:
    """Writes a line of JSON for each step; resuming removes lines after the checkpoint."""

    def __init__(self, folder: Path | None, step: int) -> None:
        self.file = None
        self.path = Path(_STEPS_FILE) if folder is None else folder / _STEPS_FILE
        if folder is None:
            return
        with self._in_our_words():
            folder.mkdir(parents=True, exist_ok=True)
            kept = self.path.read_text().splitlines(keepends=True)[:step] if step else []
            self.path.write_text("".join(kept))
            self.file = self.path.open("a", buffering=1)

    def __enter__(self) -> "StepLog":
        return self

    def __exit__(self, *_: object) -> None:
        if self.file is not None:
            with suppress(OSError):  # `write` has reported the error already
                self.file.close()

    def write(self, step: int, epoch: int, loss: float) -> None:
        if self.file is not None:
            with self._in_our_words():
                self.file.write(json.dumps({"step": step, "epoch": epoch, "loss": loss}) + "\n")

    @contextmanager
    def _in_our_words(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DataError(
                f"{self.path} cannot be written: {reason_of(error)}: make room, then resume from "
                "the last checkpoint",
                name=str(self.path),
                value=str(self.path),
            ) from error

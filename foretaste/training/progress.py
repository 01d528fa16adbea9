"""What a person sees of a run: a bar on a terminal or a line an epoch, and early what it costs."""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, final

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from foretaste.later import later
from foretaste.training.fit import Epoch, Fit
from foretaste.training.fit import Progress as RunProgress

psutil = later("psutil")

_WARM_UP = 3
"""First steps, which are slower: memory is paged in, loops are compiled."""
_LOOK_STEPS, _LOOK_SECONDS = 5, 2.0
"""How long the steps after those are watched at least."""


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
        """Move the bar; time left is to the last epoch, early stopping may come before it."""
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
    """What a run will cost, as its first steps and its first validation say.

    Seconds are those of a machine that stays as busy as it was then.
    """

    epochs: int
    """At most so many; validation may end the run before."""
    epoch_seconds: float
    """Of training alone."""
    validations: int
    """At most so many; 0: none is made."""
    validation_seconds: float | None
    """Of one validation; None: there is none, or none was made yet."""
    max_seconds: float | None
    """Where the clock ends the run, if it does."""
    weight_bytes: int
    """Of tables and other weights."""
    optimizer_bytes: int
    """Of gradients and of what the optimizer keeps."""
    batch_bytes: int
    """Of what a step keeps for its backward pass, beside the weights."""
    process_bytes: int
    """Of the whole process so far, data and libraries included."""
    gpu_bytes: int
    """The most that was taken of a GPU's memory so far; 0 without one."""

    @property
    def seconds(self) -> float:
        """Of all epochs, and of their validations as far as these are known."""
        validated = self.validations * (self.validation_seconds or 0.0)
        seconds = self.epochs * self.epoch_seconds + validated
        return seconds if self.max_seconds is None else min(seconds, self.max_seconds)

    def __str__(self) -> str:
        """Say it in a line."""
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
        run: Fit[Any, Any],
        found: Sequence[Callable[[Cost], object]],
        *,
        max_seconds: float | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Begin to watch.

        Args:
            run: About to begin.
            found: Each is called with the cost when the first steps are over, and again after the
                first validation where that comes later.
            max_seconds: Where the clock ends the run, if it does.
            clock: Seconds since any time.
        """
        self.cost: Cost | None = None
        """As it was found last."""
        self._run, self._found, self._max_seconds, self._clock = run, found, max_seconds, clock
        self._saved = _SavedForBackward(run.parameters)
        self._steps, self._steps_per_epoch = 0, 1
        self._began = self._first = self._warm = clock()
        self._validation: float | None = None
        self._validated = 0.0

    def step(self, steps_per_epoch: int) -> None:
        """Take note of a step that ended."""
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
        """Take note of an epoch that ended."""
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
    """Counts what a step keeps for its backward pass, beside the weights."""

    def __init__(self, weights: Iterable[Tensor]) -> None:
        self.nbytes = 0
        self._weights = {weight.untyped_storage().data_ptr() for weight in weights}
        self._size_of: dict[int, int] = {}
        self._hooks: saved_tensors_hooks | None = None

    def watch(self) -> None:
        """Count from now on, in this thread."""
        self._hooks = saved_tensors_hooks(self._keep, lambda tensor: tensor)
        self._hooks.__enter__()

    def stop(self) -> None:
        """Count no more."""
        if self._hooks is not None:
            self._hooks.__exit__()
            self._hooks, self.nbytes = None, sum(self._size_of.values())

    def _keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._weights:
            self._size_of[storage.data_ptr()] = storage.nbytes()
        return tensor


def duration(seconds: float) -> str:
    """Return a time as people say it."""
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

"""Settings of training that every gradient-trained model shares, and their implementation.

These are the device, memory that is kept, a log of steps, and threads that make batches ahead of
the trainer. A batch depends only on (seed, epoch, index), so a run is bit-identical with and
without threads.
"""

import ctypes
import json
import math
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar, final

import torch
from pydantic import Field, model_validator

from foretaste.arguments import checked
from foretaste.config import Config, Count, CountOrZero, Positive, Rounds
from foretaste.data.folder import reason_of
from foretaste.data.plans import Plan
from foretaste.errors import ConfigError, DataError

ROWS_FROM = 2**17
"""With "auto", tables of this many rows or more are updated by rows."""
_LEAST_STEPS = 800
"""Minimum number of steps if the model sets the epochs, because few events need more epochs."""


class TrainingConfig(Config):
    """Settings of the training loop. The text "auto" in their place means `search = true`."""

    epochs: Rounds | Literal["auto"] = "auto"
    """Maximum number of passes over the training events; the schedule spans all of them. "auto":
    the model's own number, but enough for at least 800 steps; 100 if the model has none."""
    batch_events: Count | Literal["auto"] = "auto"
    """About how many events a step learns from. "auto": a 32nd of the training events, at least 32,
    and at most 8192 or the model's own limit."""
    learning_rate: Annotated[float, Field(gt=0, le=100)] | Literal["auto"] = "auto"
    """Step size of the optimizer. "auto": the model's own, or else 0.001."""
    weight_decay: float = Field(default=0.0, ge=0, le=100)
    """AdamW's decoupled weight decay. It applies to matrices and tables, not to biases and
    scales."""
    beta2: float = Field(default=0.98, gt=0, lt=1)
    """AdamW's decay of squared gradients; SASRec's authors use 0.98."""
    tables: Literal["auto", "adamw", "lazy_adamw", "row_adagrad"] = "auto"
    """The optimizer for tables of ids and codes. "adamw": all rows change in every step.
    "lazy_adamw": only the rows that a batch reads change; the moments of the other rows do not, but
    weight decay applies to all rows. "row_adagrad": only the rows that a batch reads change, with
    one rate for each row, from its squared gradients; it needs a third of the memory. "auto":
    lazy_adamw for large tables if there is no `ema_decay`; else adamw. With lazy_adamw, rows that
    few batches read change less: MF on Gowalla needs twice the learning rate to reach the results
    of adamw."""
    sharded_from: Count | None = None
    """Tables of ids or codes with at least this many rows are sharded: each of several processes
    holds and updates a range of the rows. None: each process holds all tables."""
    engine: Literal["own", "torchrec"] = "own"
    """What looks up and updates sharded tables in training. "torchrec": TorchRec 1.8 on the CPU, by
    its fused row-wise Adagrad (`tables = "row_adagrad"`, without `gradient_clip`, `weight_decay`
    and `ema_decay`), for models that read a table once in a step. A single process always uses
    "own"."""
    warmup_steps: CountOrZero | Literal["auto"] = "auto"
    """Number of steps over which the learning rate rises from 0. "auto": two epochs, at most 200
    steps."""
    schedule: Literal["constant", "cosine", "linear", "auto"] = "auto"
    """The learning rate after the warm-up; all but "constant" end at 2 % of it. "auto": the model's
    own, or else "constant"."""
    gradient_clip: Positive | None = None
    """Largest Euclidean norm of the whole gradient; larger gradients are scaled down. None: no
    clipping."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] | Literal["auto"] = "auto"
    """Decay of an exponential moving average of the weights, which is used for validation and as
    the result; 0: no average. "auto": the model's own, or else 0. With 131,072 items or more it is
    0 unless `tables` is "adamw": an average is one more table, all of whose rows change in each
    step."""
    precision: Literal["fp32", "bf16", "fp16", "auto"] = "fp32"
    """Number format of the forward and backward pass; weights and updates stay fp32, and fp16 uses
    loss scaling. bf16 is faster if the processor supports it natively (avx512_bf16, amx, a GPU).
    "auto": times the first batch in fp32 and in bf16, and takes bf16 if it needs at most nine
    tenths of the time. The log holds the choice, and a resumed run keeps it."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where training runs; "auto" takes a GPU if there is one."""
    validate_every: Count | Literal["auto"] = "auto"
    """Epochs between two validations. "auto": as few as possible while the work of validation is at
    most a quarter of the work of training; work is counted, not timed."""
    validate_queries: Count | Literal["auto", "all"] = "auto"
    """Number of validation queries for the list metrics. They are spread over users, and are the
    same at each validation and with every seed. "auto": as many as validation at every epoch
    allows, but at least 1,000, or at least 100 if 1,000 would take longer than four epochs. The
    report always measures all queries. Rankers that are validated by labels use all rows."""
    patience: Count | Literal["auto"] | None = "auto"
    """Validations without improvement before training stops; None never stops early. "auto": as
    many as there are in five epochs and in 300 steps, at least two, watching the mean of the last
    three; five times as many while no validation is above what popularity reaches (with labels: the
    base rate), because models may stay at that level before they learn more."""
    checkpoint_seconds: float = Field(default=60.0, ge=0)
    """Seconds between two checkpoints, if there is a folder for them; 0 writes one after each
    step."""
    producers: int = Field(default=0, ge=0, le=256)
    """Number of threads that prepare batches ahead of the trainer: gathering, drawing negatives,
    and other work that needs no weights. The result does not depend on it."""

    search: bool = False
    """Whether the learning rate, l2 and one setting of the model are tuned first, by validation on
    a sample of the data. The cost is printed before the search starts; `tune` searches longer."""

    @model_validator(mode="before")
    @classmethod
    def _auto_searches(cls, settings: object) -> object:
        return {"search": True} if settings == "auto" else settings

    @checked
    def settled(
        self, usual: Mapping[str, Any], num_events: int, num_items: int = 0
    ) -> "TrainingConfig":
        """Return settings in which every "auto" is replaced by a value.

        Args:
            usual: The model's defaults: learning rate, schedule, epochs, average and the maximum
                number of events in a batch.
            num_events: Number of training events.
            num_items: Number of items, which may be too many for an average.
        """
        own = TrainingConfig(**usual)
        own_average = own.average_decay
        if num_items >= ROWS_FROM and self.tables != "adamw":
            own_average = 0.0
        batch = self.batch_of(num_events)
        if self.batch_events == "auto":
            batch = min(batch, own.batch_of(num_events))
        own_epochs = own.rounds
        if own.epochs != "auto":
            own_epochs = min(100, max(own_epochs, math.ceil(_LEAST_STEPS * batch / num_events)))
        return self.model_copy(
            update={
                "epochs": own_epochs if self.epochs == "auto" else self.epochs,
                "batch_events": batch,
                "schedule": own.decay if self.schedule == "auto" else self.schedule,
                "learning_rate": own.rate if self.learning_rate == "auto" else self.rate,
                "ema_decay": own_average if self.ema_decay == "auto" else self.ema_decay,
            }
        )

    @property
    def rounds(self) -> int:
        """The maximum number of epochs."""
        return 100 if self.epochs == "auto" else self.epochs

    @property
    def decay(self) -> Literal["constant", "cosine", "linear"]:
        """The schedule of the learning rate."""
        return "constant" if self.schedule == "auto" else self.schedule

    @property
    def rate(self) -> float:
        """The learning rate."""
        return 1e-3 if self.learning_rate == "auto" else self.learning_rate

    @property
    def average_decay(self) -> float:
        """The decay of the average; 0 for none."""
        return 0.0 if self.ema_decay == "auto" else self.ema_decay

    @checked
    def batch_of(self, num_events: int) -> int:
        """Return the approximate number of events per step, given the number of training events."""
        if self.batch_events == "auto":
            return min(max(32, num_events // 32), 8192)
        return self.batch_events

    @checked
    def warmup_of(self, steps_per_epoch: int) -> int:
        """Return the number of warm-up steps, given the number of steps in an epoch."""
        return min(200, 2 * steps_per_epoch) if self.warmup_steps == "auto" else self.warmup_steps


_GLIBC_LIMITS = {-1: (1 << 31) - 1, -2: 64 << 20, -3: 1 << 30}
"""mallopt's M_TRIM_THRESHOLD, M_TOP_PAD and M_MMAP_THRESHOLD, in bytes."""


def keep_memory() -> bool:
    """Make glibc keep freed memory for the next tensor; return whether it accepted the setting.

    By default, glibc returns tensors of a megabyte and more to the system when they are freed, and
    the next tensor is paged in again, at a tenth of the speed of memory. With this setting, a
    SASRec step on a CPU takes half the time.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # musl has none
        return False
    taken = [mallopt(option, size) for option, size in _GLIBC_LIMITS.items()]
    return all(taken)


def choose_device(name: str) -> torch.device:
    """Return the device to train on; "auto" uses a GPU if there is one.

    Raises:
        ConfigError: The setting asks for a GPU, and there is none.
    """
    has_gpu = torch.cuda.is_available()
    if name == "cuda" and not has_gpu:
        raise ConfigError(
            'training.device is "cuda", but torch finds no GPU: set it to "auto"',
            name="training.device",
            value="cuda",
        )
    return torch.device(("cuda" if has_gpu else "cpu") if name == "auto" else name)


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

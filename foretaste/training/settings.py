"""How to train: the settings that every gradient-trained model shares."""

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from foretaste.arguments import checked
from foretaste.config import Config, Count, CountOrZero, Positive, Rounds

_LEAST_STEPS = 800
"""Of a training whose epochs are the model's own: few events need more epochs."""


class TrainingConfig(Config):
    """Settings of the training loop. The text "auto" stands for `search = true` and no others."""

    epochs: Rounds | Literal["auto"] = "auto"
    """Most passes over the training events; the schedule is laid over all of them. "auto": the
    model's own, but as many as 800 steps take; of a model without any, 100."""
    batch_events: Count | Literal["auto"] = "auto"
    """About how many events a step learns from. "auto": a 32nd of the training events, at least 32,
    and at most 8192 or the model's own limit."""
    learning_rate: Annotated[float, Field(gt=0, le=100)] | Literal["auto"] = "auto"
    """Step size of the optimizer. "auto": the model's own, or else 0.001."""
    weight_decay: float = Field(default=0.0, ge=0, le=100)
    """AdamW's decoupled decay, of matrices and tables, not of biases and scales."""
    beta2: float = Field(default=0.98, gt=0, lt=1)
    """AdamW's decay of squared gradients; SASRec's authors use 0.98."""
    tables: Literal["auto", "adamw", "lazy_adamw", "row_adagrad"] = "auto"
    """Optimizer of the tables of ids and codes. "adamw": all rows change in every step.
    "lazy_adamw": only the rows that a batch reads; the moments of the others wait, but weight decay
    reaches all. "row_adagrad": only the rows that a batch reads, with one rate for each row, from
    its squared gradients, in a third of the memory. "auto": lazy_adamw for tables of many rows if
    there is no `ema_decay`; else adamw. A row that few batches read changes less by lazy_adamw: MF
    on Gowalla needs twice the rate for the figures of adamw."""
    sharded_from: Count | None = None
    """Rows from which on a table of ids or codes is dealt among several processes, each of which
    holds and moves a range of its rows. None: each process holds all tables."""
    warmup_steps: CountOrZero | Literal["auto"] = "auto"
    """Steps over which the learning rate rises from 0. "auto": those of two epochs, at most 200."""
    schedule: Literal["constant", "cosine", "linear", "auto"] = "auto"
    """The learning rate after the warm-up; all but "constant" end at 2 % of it. "auto": the model's
    own, or else "constant"."""
    gradient_clip: Positive | None = None
    """Largest Euclidean norm of the whole gradient; None clips nothing."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] | Literal["auto"] = "auto"
    """Decay of an exponential moving average of the weights, which is validated and kept; 0: none.
    "auto": the model's own, or else 0."""
    precision: Literal["fp32", "bf16", "fp16", "auto"] = "fp32"
    """Number format of the forward and backward pass; weights and updates stay fp32, and fp16
    scales its loss. bf16 pays if the processor multiplies it natively (avx512_bf16, amx, a GPU).
    "auto": times the first batch in fp32 and in bf16, and takes bf16 if it needs at most nine
    tenths of the time. The log holds the choice, and a resumed run keeps it."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where training runs; "auto" takes a GPU if there is one."""
    validate_every: Count | Literal["auto"] = "auto"
    """Epochs between two validations. "auto": as few as keep the work of validation, which is
    counted and not timed, at a quarter of training's."""
    validate_queries: Count | Literal["auto", "all"] = "auto"
    """How many validation queries the lists are measured on, spread over users and the same each
    time and with every seed. "auto": as many as validation at every epoch allows, at least 1,000.
    The report always measures all queries. Rankers that are validated by labels use all rows."""
    patience: Count | Literal["auto"] | None = "auto"
    """Validations without improvement before training stops; None never stops early. "auto": as
    many as there are in five epochs and in 300 steps, at least two, watching the mean of the last
    three; five times as many while no validation is above what popularity reaches (with labels: the
    base rate), because models may stay at that level before they learn more."""
    checkpoint_seconds: float = Field(default=60.0, ge=0)
    """Seconds between two checkpoints, if there is a folder for them; 0 writes one after each
    step."""
    producers: int = Field(default=0, ge=0, le=256)
    """Threads that prepare batches ahead of the trainer: gathering, negatives, and other work that
    needs no weights. The result is the same."""

    search: bool = False
    """Whether learning rate, l2 and one setting of the model are searched first, by validation, on
    a sample of the data. The cost is printed before it starts; `tune` searches longer."""

    @model_validator(mode="before")
    @classmethod
    def _auto_searches(cls, settings: object) -> object:
        return {"search": True} if settings == "auto" else settings

    @checked
    def settled(self, usual: Mapping[str, Any], num_events: int) -> "TrainingConfig":
        """Return settings in which nothing is left to the model and the data.

        Args:
            usual: The model's own settings: learning rate, schedule, epochs and average, and the
                most events of a batch.
            num_events: How many there are to learn from.
        """
        own = TrainingConfig(**usual)
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
                "ema_decay": own.average_decay if self.ema_decay == "auto" else self.ema_decay,
            }
        )

    @property
    def rounds(self) -> int:
        """Most epochs."""
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
        """Return about how many of so many training events a step learns from."""
        if self.batch_events == "auto":
            return min(max(32, num_events // 32), 8192)
        return self.batch_events

    @checked
    def warmup_of(self, steps_per_epoch: int) -> int:
        """Return over how many steps the learning rate rises, where an epoch has so many."""
        return min(200, 2 * steps_per_epoch) if self.warmup_steps == "auto" else self.warmup_steps

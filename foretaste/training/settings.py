"""How to train: the settings that every gradient-trained model shares."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from foretaste.arguments import checked
from foretaste.config import Config, Count, CountOrZero, Positive, Rounds


class TrainingConfig(Config):
    """Settings of the training loop. The text "auto" stands for `search = true` and no others."""

    epochs: Rounds = 100
    """At most so many passes over the training events; the schedule is laid over all of them."""
    batch_events: Count | Literal["auto"] = "auto"
    """About how many events a step learns from; "auto": a 32nd of the training events, but 32 at
    least and 8192, or what the model's own way of learning says, at most."""
    learning_rate: Annotated[float, Field(gt=0, le=100)] | Literal["auto"] = "auto"
    """"auto": the model's own, or else 0.001."""
    weight_decay: float = Field(default=0.0, ge=0, le=100)
    """AdamW's decoupled decay, of matrices and tables, not of biases and scales."""
    beta2: float = Field(default=0.98, gt=0, lt=1)
    """AdamW's decay of squared gradients; SASRec's authors use 0.98."""
    tables: Literal["auto", "adamw", "lazy_adamw", "row_adagrad"] = "auto"
    """How tables of ids and codes learn. "adamw": all rows move in every step. "lazy_adamw": only
    the rows that a batch reads, whose moments rest in between, while weight decay reaches all.
    "row_adagrad": likewise, with one rate a row, by its squared gradients, and a third of the
    memory. "auto": lazy_adamw for tables of many rows, without `ema_decay`; else adamw."""
    warmup_steps: CountOrZero | Literal["auto"] = "auto"
    """Steps over which the learning rate rises from 0; "auto": those of two epochs, but 200 at
    most."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """How the learning rate goes after the warm-up; all but constant end at 2 % of it."""
    gradient_clip: Positive | None = None
    """Largest Euclidean norm of the whole gradient; none clips nothing."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] | Literal["auto"] = "auto"
    """Above 0, an exponential moving average of the weights is validated and kept; "auto": the
    model's own, or else 0."""
    precision: Literal["fp32", "bf16", "fp16", "auto"] = "fp32"
    """Of the forward and backward pass; weights and updates stay fp32, fp16 scales its loss.
    bf16 pays where the processor multiplies it natively (avx512_bf16, amx, a GPU). "auto": the
    first batch is passed through in fp32 and in bf16 a few times, and bf16 is taken if it needs at
    most nine tenths of the time; what was chosen is in the log, and a resumed run keeps it."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """"auto" takes a GPU where there is one."""
    validate_every: Count | Literal["auto"] = "auto"
    """Epochs between two validations; "auto": as few as keep validation's work, which is counted
    and not timed, at a quarter of training's."""
    validate_queries: Count | Literal["auto", "all"] = "auto"
    """How many queries of the validation part lists are judged by, spread over users, the same each
    time and with every seed; "auto": as many as validation at every epoch allows, 1,000 at least.
    The report is always of all queries. Rankers that are judged by labels take all rows."""
    patience: Count | Literal["auto"] | None = "auto"
    """Stop after so many validations without a better one; none never stops early. "auto": as many
    as come in five epochs and in 300 steps, two at least, without a better mean of the last three.
    It is five times as many while no validation is above what popularity reaches there (by labels:
    the base rate), as models stay on that level before they learn more."""
    checkpoint_seconds: float = Field(default=60.0, ge=0)
    """Seconds between two checkpoints, where a folder for them is given; 0 writes one a step."""
    producers: int = Field(default=0, ge=0, le=256)
    """Threads that make batches ahead of the trainer: gathering, negatives, and what else a step
    needs that takes no weights. The result is the same."""

    search: bool = False
    """Whether learning rate, l2 and one setting of the model are searched first, by validation, on
    a sample of the data. What that costs is said before it starts; `tune` searches longer."""

    @model_validator(mode="before")
    @classmethod
    def _auto_searches(cls, settings: object) -> object:
        return {"search": True} if settings == "auto" else settings

    @checked
    def settled(self, usual: Mapping[str, Any], num_events: int) -> "TrainingConfig":
        """Return settings in which nothing is left to the model and the data.

        Args:
            usual: The model's own learning rate and average, and the most events of a batch.
            num_events: How many there are to learn from.
        """
        own = TrainingConfig(**usual)
        batch = self.batch_of(num_events)
        if self.batch_events == "auto":
            batch = min(batch, own.batch_of(num_events))
        return self.model_copy(
            update={
                "batch_events": batch,
                "learning_rate": own.rate if self.learning_rate == "auto" else self.rate,
                "ema_decay": own.average_decay if self.ema_decay == "auto" else self.ema_decay,
            }
        )

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

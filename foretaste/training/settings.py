"""Settings of training that every gradient-trained model shares, and the optimizer they describe.

The optimizer is AdamW with a learning rate schedule and a moving average of the weights. Large
tables are updated by rows: a step updates only the rows that its batch read, so its cost does not
depend on the number of rows.

Shape legend: R rows of a table, N of them in a batch, D width.
"""

import ctypes
import inspect
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, final

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn, optim

from foretaste.arguments import checked
from foretaste.config import Config, Count, CountOrZero, Positive, Rounds
from foretaste.errors import ConfigError
from foretaste.models.layers.table import OwnRows, Table

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
    0 unless `tables` is "adamw", and with TorchRec it is 0: an average is one more table, all of
    whose rows change in each step."""
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
        by_rows = num_items >= ROWS_FROM and self.tables != "adamw"
        if by_rows or self.engine == "torchrec":
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


ROW_STATES = ("exp_avg", "exp_avg_sq", "sum")
"""The optimizer's state for each row of a table."""


@final
class AdamWByRows(optim.AdamW):
    r"""AdamW that updates, in some tables, only the rows that a batch has read.

    The moments of a row are unchanged while no batch reads it. Weight decay applies in every step:
    all rows of such a table share one factor, :math:`\prod_t (1 - \eta_t \lambda)`, which costs
    nothing per row.

    With `one_rate`, each row of these tables has one rate, from the sum of its squared gradients:

    .. math:: G_r \leftarrow G_r + \frac{1}{D} \lVert g_r \rVert^2, \quad
              w_r \leftarrow w_r - \eta g_r / (\sqrt{G_r} + \epsilon)

    References:
        Loshchilov and Hutter, "Decoupled Weight Decay Regularization", ICLR 2019,
        https://arxiv.org/abs/1711.05101; Duchi, Hazan and Singer, "Adaptive Subgradient Methods
        for Online Learning and Stochastic Optimization", JMLR 2011, with one sum a row.
    """

    # without torch's wrappers: the first call of one imports torch's compiler, 1 s of CPU time
    add_param_group = inspect.unwrap(optim.AdamW.add_param_group)
    zero_grad = inspect.unwrap(optim.AdamW.zero_grad)
    state_dict = inspect.unwrap(optim.AdamW.state_dict)
    _step_whole = inspect.unwrap(optim.AdamW.step)
    _load = inspect.unwrap(optim.AdamW.load_state_dict)

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        tables: Sequence[OwnRows],
        one_rate: bool,
        **settings: Any,
    ) -> None:
        """Create the optimizer.

        Args:
            groups: Parameter groups, as for AdamW.
            tables: The tables that are updated by rows.
            one_rate: Whether each row of these tables has one rate.
            settings: The other arguments of AdamW.
        """
        super().__init__(groups, **settings)
        self.by_rows = {table.weight: table for table in tables}
        self.one_rate = one_rate

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]  # torch overloads it
        """Take a step; a table with a dense gradient is updated as a whole."""
        apart = []
        for group in self.param_groups:
            for weight in group["params"]:
                if weight not in self.by_rows or weight.grad is None:
                    continue
                if weight.grad.is_sparse or self.one_rate:
                    apart.append((group, weight, weight.grad))
                    weight.grad = None  # so that AdamW skips it
                else:
                    self._settle(weight)
        loss: float | None = self._step_whole(closure)
        overflow = getattr(self, "found_inf", None)  # fp16 overflowed: the step is skipped
        for group, weight, grad in apart:
            weight.grad = grad
            if overflow is None or not bool(overflow):
                self._move_rows(group, weight, grad)
        return loss

    def _move_rows(self, group: dict[str, Any], weight: nn.Parameter, grad: Tensor) -> None:
        table, state, rate = self.by_rows[weight], self.state[weight], group["lr"]
        if grad.is_sparse:
            grad = _coalesced(grad)
            row_N, grad_ND = grad.indices()[0], grad.values()
        else:
            row_N, grad_ND = torch.arange(len(grad), device=grad.device), grad
        if group["weight_decay"]:
            table.scale *= 1 - rate * group["weight_decay"]
            state["scale"] = torch.tensor(table.scale, dtype=torch.float64)
        move = _one_rate if self.one_rate else _lazy_adam
        change_ND = move(state, group, weight, row_N, grad_ND)
        change_ND.mul_(-rate / table.scale)
        row_ND = row_N.unsqueeze(1).expand_as(change_ND)
        weight.scatter_add_(0, row_ND, change_ND)  # in a third of the time of index_add_

    @torch.no_grad()
    def settle(self) -> None:
        """Apply pending weight decay to the tables; call it before other code reads them."""
        for weight in self.by_rows:
            self._settle(weight)

    def _settle(self, weight: nn.Parameter) -> None:
        table = self.by_rows[weight]
        if table.scale != 1:
            weight.mul_(table.scale)
            table.scale = 1.0
            self.state[weight]["scale"] = torch.tensor(1.0, dtype=torch.float64)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the result of `state_dict`, including each table's decay factor."""
        self._load(state_dict)
        weights = [weight for group in self.param_groups for weight in group["params"]]
        for index, weight in enumerate(weights):
            kept = state_dict["state"].get(index, {})
            if weight in self.by_rows and "scale" in kept:
                self.state[weight]["scale"] = kept["scale"]  # AdamW has cast it to fp32
                self.by_rows[weight].scale = float(kept["scale"])


def _lazy_adam(
    state: dict[str, Tensor],
    group: dict[str, Any],
    weight: Tensor,
    row_N: Tensor,
    grad_ND: Tensor,
) -> Tensor:
    if "step" not in state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=weight.device)
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(weight), torch.zeros_like(weight)
    state["step"] += 1
    step, (beta1, beta2) = int(state["step"]), group["betas"]
    mean_ND = state["exp_avg"].index_select(0, row_N).lerp_(grad_ND, 1 - beta1)
    square_ND = state["exp_avg_sq"].index_select(0, row_N)
    square_ND.mul_(beta2).addcmul_(grad_ND, grad_ND, value=1 - beta2)
    state["exp_avg"].index_copy_(0, row_N, mean_ND)
    state["exp_avg_sq"].index_copy_(0, row_N, square_ND)
    divisor_ND = square_ND.sqrt_().div_((1 - beta2**step) ** 0.5).add_(group["eps"])
    return mean_ND.div_(divisor_ND).div_(1 - beta1**step)


def _one_rate(
    state: dict[str, Tensor],
    group: dict[str, Any],
    weight: Tensor,
    row_N: Tensor,
    grad_ND: Tensor,
) -> Tensor:
    if "sum" not in state:
        state["sum"] = torch.zeros(len(weight), dtype=weight.dtype, device=weight.device)
        state["step"] = torch.zeros(())  # AdamW expects this key on resuming
    square_N = torch.linalg.vector_norm(grad_ND, dim=1).square_() / grad_ND.shape[1]
    sum_N = state["sum"].index_select(0, row_N).add_(square_N)
    state["sum"].index_copy_(0, row_N, sum_N)
    change_ND: Tensor = grad_ND / (sum_N.sqrt() + group["eps"]).unsqueeze(1)
    return change_ND


def make_optimizer(
    parameters: Sequence[nn.Parameter], config: TrainingConfig, *, tables: Iterable[OwnRows] = ()
) -> AdamWByRows:
    """Return AdamW with weight decay for matrices and tables, but not for biases and scales.

    Args:
        parameters: All trainable parameters.
        config: The training settings, which say which tables are updated by rows.
        tables: The tables that own some of the parameters.
    """
    by_rows = []
    for table in tables:
        table.by_rows = learns_by_rows(table, config)
        by_rows += [table] if table.by_rows else []
    decayed = [p for p in parameters if p.requires_grad and p.ndim > 1]
    others = [p for p in parameters if p.requires_grad and p.ndim <= 1]
    groups: list[dict[str, Any]] = [
        {"params": decayed},
        {"params": others, "weight_decay": 0.0},
    ]
    return AdamWByRows(
        [group for group in groups if group["params"]],
        tables=by_rows,
        one_rate=config.tables == "row_adagrad",
        lr=config.rate,
        betas=(0.9, config.beta2),
        weight_decay=config.weight_decay,
        fused=True,
    )


def learns_by_rows(table: OwnRows, config: TrainingConfig) -> bool:
    """Return whether a step updates only the rows of a table that its batch read."""
    if config.tables == "auto":
        return table.num_rows >= ROWS_FROM and not config.average_decay
    return config.tables != "adamw"


def _coalesced(grad: Tensor) -> Tensor:
    """Sum the entries of each row; one look-up has each row once, which torch does not record."""
    row_N = grad._indices()[0]
    if not grad.is_coalesced() and bool((row_N[1:] > row_N[:-1]).all()):
        grad._coalesced_(True)  # noqa: FBT003  # torch's own form
    summed: Tensor = grad.coalesce()
    return summed


def clip(gradients: Sequence[Tensor], norm: Tensor, most: float) -> None:
    """Scale the gradients so that their norm, `norm` now, is at most `most`."""
    torch._foreach_mul_(list(gradients), (most / (norm + 1e-6)).clamp(max=1.0))


def gradients(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """Return all existing gradients; for tables that are updated by rows, those of the rows."""
    found = []
    for parameter in parameters:
        if parameter.grad is not None and parameter.grad.is_sparse:
            parameter.grad = _coalesced(parameter.grad)
            found.append(parameter.grad.values())
        elif parameter.grad is not None:
            found.append(parameter.grad)
    return found


def refuse_at_rest(model: nn.Module) -> None:
    """Raise an error if a table of the model was made from a trained table.

    Raises:
        ConfigError: A table was made from a trained table and cannot be trained.
    """
    for table in model.modules():
        if isinstance(table, Table) and not table.trains:
            raise ConfigError(
                f"a table of {type(table).__name__} is made from a trained table and cannot be "
                "trained: set model.table to another kind, such as dense, and compress it then",
                name="model.table",
                value=type(table).__name__,
            )


def rate_factor(config: TrainingConfig, step: int, steps_per_epoch: int) -> float:
    """Return the factor on the learning rate: a warm-up from 0, then the schedule, down to 0.02."""
    done = step / (steps_per_epoch * config.rounds)
    after = {
        "constant": 1.0,
        "cosine": 0.5 * (1 + math.cos(math.pi * min(1.0, done))),
        "linear": 1 - done,
    }[config.decay]
    warmup = config.warmup_of(steps_per_epoch)
    return min(1.0, (step + 1) / (warmup + 1)) * max(0.02, after)


@torch.no_grad()
def move_average(average: nn.Module, model: nn.Module, decay: float, step: int) -> None:
    """Move the average towards the weights; the first steps move it faster, to forget its start."""
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)

"""The optimizer: AdamW, its learning rate schedule, and the moving average of the weights.

Large tables are updated by rows: a step updates only the rows that its batch read, so its cost does
not depend on the number of rows.

Shape legend: R rows of a table, N of them in a batch, D width.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, final

import torch
from torch import Tensor, nn, optim

from foretaste.errors import ConfigError
from foretaste.models.layers.table import OwnRows, Table
from foretaste.training.settings import ROWS_FROM, TrainingConfig

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
        loss: float | None = super().step(closure)
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
        super().load_state_dict(state_dict)
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

"""Experts and gates over a query and each of its items; towers over what they make.

Shape legend: B queries, A rows of items (B or 1), C items of each, Q width of a query, I width of
an item, E experts, T tasks, H width of an expert's output.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from foretaste.data.tasks import Task
from foretaste.models.layers.dropout import Dropout
from foretaste.models.layers.mlp import MLP
from foretaste.models.layers.pair_mlp import PairLinear


@final
class Experts(nn.Module):
    """Networks side by side, each layer followed by ReLU, and a softmax over them for each task.

    The first layers of all experts and all gates are one product.
    """

    def __init__(
        self,
        query_dim: int,
        item_dim: int,
        hidden: Sequence[int],
        *,
        num_experts: int,
        num_gates: int,
        dropout: float = 0.0,
    ) -> None:
        """Make untrained weights.

        Args:
            query_dim: Q.
            item_dim: I.
            hidden: Widths of each expert's layers, one or more; the last is H.
            num_experts: E.
            num_gates: T.
            dropout: Share of values dropped after each layer.
        """
        super().__init__()
        self.num_experts, self.num_gates = num_experts, num_gates
        self.first = PairLinear(
            query_dim, item_dim, num_experts * hidden[0] + num_gates * num_experts
        )
        self.further = nn.ModuleList(
            _Layer(num_experts, before, after) for before, after in pairwise(hidden)
        )
        self.dropout = Dropout(dropout)

    def forward(
        self, query_BQ: Float[Tensor, "B Q"], item_ACI: Float[Tensor, "A C I"]
    ) -> tuple[Float[Tensor, "B C E H"], Float[Tensor, "B C T E"]]:
        """Return each expert's output and each task's weights of them, which sum to 1."""
        num_experts, num_gates = self.num_experts, self.num_gates
        both: Tensor = self.first(query_BQ, item_ACI)
        logit_BCTE = both[..., both.shape[-1] - num_gates * num_experts :].unflatten(
            -1, (num_gates, num_experts)
        )
        state = both[..., : both.shape[-1] - num_gates * num_experts]
        state = self.dropout(state.unflatten(-1, (num_experts, -1)).relu())
        for layer in self.further:
            state = self.dropout(layer(state).relu())
        return state, logit_BCTE.softmax(dim=-1)


@final
class _Layer(nn.Module):
    """A linear layer for each expert."""

    def __init__(self, num_experts: int, before: int, after: int) -> None:
        super().__init__()
        bound = before**-0.5
        self.weight_EHK = nn.Parameter(torch.empty(num_experts, before, after))
        self.bias_EK = nn.Parameter(torch.empty(num_experts, after))
        nn.init.uniform_(self.weight_EHK, -bound, bound)
        nn.init.uniform_(self.bias_EK, -bound, bound)

    def forward(self, x_BCEH: Float[Tensor, "B C E H"]) -> Float[Tensor, "B C E K"]:
        x_ENH = x_BCEH.flatten(0, 1).transpose(0, 1)
        y_ENK = torch.baddbmm(self.bias_EK.unsqueeze(1), x_ENH, self.weight_EHK)
        return y_ENK.transpose(0, 1).reshape(*x_BCEH.shape[:3], -1)


@final
class Towers(nn.Module):
    """A small network for each task, from what it is given to one number."""

    def __init__(
        self, tasks: tuple[Task, ...], input_dim: int, hidden: Sequence[int], *, dropout: float
    ) -> None:
        super().__init__()
        self.tasks = tasks
        self.towers = nn.ModuleList(MLP(input_dim, hidden, 1, dropout=dropout) for _ in tasks)

    def forward(
        self, input_BCH: Sequence[Float[Tensor, "B C H"]]
    ) -> Mapping[str, Float[Tensor, "B C"]]:
        """Return each task's number, given each task's input."""
        return {
            task.name: tower(x_BCH).squeeze(2)
            for task, tower, x_BCH in zip(self.tasks, self.towers, input_BCH, strict=True)
        }

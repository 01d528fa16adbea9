"""Dense layers: perceptrons over a query and each of its items, attention, and dropout.

A first layer is linear, so :math:`W [q; i] = W_q q + W_i i`: with C items per query, or equal items
for all queries, most products are computed once and not for every pair.

Shape legend: B queries, A rows of items (B or 1), C items per query, Q width of a query, I of an
item, O of the output, D of a state, R rows, E experts, T tasks or returned positions, L positions,
H heads or an expert's width.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal, final

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor, nn

from foretaste.data.draws import draw_for_rows
from foretaste.data.tasks import Task
from foretaste.errors import ConfigError


@final
class MLP(nn.Module):
    """Linear, ReLU and dropout for each hidden layer, then one more linear layer."""

    def __init__(
        self, input_dim: int, hidden: Sequence[int], output_dim: int, *, dropout: float = 0.0
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for width in hidden:
            layers += [nn.Linear(input_dim, width), nn.ReLU(), Dropout(dropout)]
            input_dim = width
        self.layers = nn.Sequential(*layers, nn.Linear(input_dim, output_dim))

    def forward(self, x_XD: Float[Tensor, "*X D"]) -> Float[Tensor, "*X O"]:
        output: Tensor = self.layers(x_XD)
        return output


Activation = Literal["relu", "prelu", "dice"]
"""The activation after a hidden layer; Dice is a PReLU whose corner moves with the data."""


@final
class PairLinear(nn.Module):
    r"""One linear layer over a query and an item side by side.

    Initial weights preserve the variance through a ReLU: :math:`W \sim N(0, 2 / (Q + I)), b = 0`.

    Torch's initial weights are less than half as large; with them, experts missed parts of their
    tasks. Higher layers have torch's weights: with larger ones there, the model memorises tables of
    many rare ids.

    References:
        He et al., "Delving Deep into Rectifiers: Surpassing Human-Level Performance on ImageNet
        Classification", ICCV 2015, https://arxiv.org/abs/1502.01852
    """

    def __init__(self, query_dim: int, item_dim: int, output_dim: int) -> None:
        super().__init__()
        self.query_dim, self.item_dim = query_dim, item_dim
        self.joint = nn.Linear(query_dim + item_dim, output_dim)
        nn.init.kaiming_normal_(self.joint.weight, nonlinearity="relu")
        nn.init.zeros_(self.joint.bias)

    def forward(
        self, query_BQ: Float[Tensor, "B Q"], item_ACI: Float[Tensor, "A C I"]
    ) -> Float[Tensor, "B C O"]:
        """Return the layer's output for each pair."""
        weight, bias = self.joint.weight, self.joint.bias
        query_B1O = F.linear(query_BQ, weight[:, : self.query_dim], bias).unsqueeze(1)
        if not self.item_dim:
            return query_B1O.repeat(1, item_ACI.shape[1], 1)
        item_ACO = F.linear(item_ACI, weight[:, self.query_dim :])
        return item_ACO.add_(query_B1O) if len(item_ACO) == len(query_B1O) else item_ACO + query_B1O


@final
class PairMLP(nn.Module):
    """Hidden layers over a query and an item, then a linear layer if there is an output."""

    def __init__(
        self,
        query_dim: int,
        item_dim: int,
        hidden: Sequence[int],
        output_dim: int | None = None,
        *,
        dropout: float = 0.0,
        activation: Activation = "relu",
        batch_norm: bool = False,
    ) -> None:
        """Make untrained weights.

        Args:
            query_dim: Q.
            item_dim: I.
            hidden: Widths of the hidden layers.
            output_dim: O; None: the last hidden layer is the output, and there must be one.
            dropout: Share of values dropped after each hidden layer.
            activation: The activation after each hidden layer.
            batch_norm: Whether values are normalised over the batch before the activation.
        """
        super().__init__()
        widths = [*hidden] if output_dim is None else [*hidden, output_dim]
        self.first = PairLinear(query_dim, item_dim, widths[0])
        layers: list[nn.Module] = []
        for place, width in enumerate(widths):
            layers += [nn.Linear(widths[place - 1], width)] if place else []
            if place < len(hidden):
                layers += [RowNorm(width)] if batch_norm else []
                layers += [activate(activation, width), Dropout(dropout)]
        self.layers = nn.Sequential(*layers)

    def forward(
        self, query_BQ: Float[Tensor, "B Q"], item_ACI: Float[Tensor, "A C I"]
    ) -> Float[Tensor, "B C O"]:
        """Return the last layer's output for each pair."""
        first_BCO: Tensor = self.first(query_BQ, item_ACI)
        output_RO: Tensor = self.layers(first_BCO.flatten(0, 1))
        return output_RO.view(*first_BCO.shape[:2], output_RO.shape[1])


@final
class RowNorm(nn.Module):
    """Batch normalisation over all rows, in any layout."""

    needs_whole_batch = ("model.batch_norm", True)

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width)

    def forward(self, x_XO: Float[Tensor, "*X O"]) -> Float[Tensor, "*X O"]:
        rows_RO = x_XO.flatten(0, -2)
        if self.training and len(rows_RO) < 2:  # a single row has no variance
            return x_XO
        normal: Tensor = self.norm(rows_RO)
        return normal.view(x_XO.shape)


@final
class Dice(nn.Module):
    r"""PReLU with its corner at the mean of the data, smoothed by their standard deviation.

    .. math:: f(s) = p(s)\, s + (1 - p(s))\, \alpha s, \quad
              p(s) = \sigma\left(\frac{s - E[s]}{\sqrt{Var[s] + \epsilon}}\right)

    Training uses mean and variance of the batch; afterwards their moving averages are used.

    References:
        Zhou et al., "Deep Interest Network for Click-Through Rate Prediction", KDD 2018,
        https://arxiv.org/abs/1706.06978
    """

    needs_whole_batch = ("model.activation", "dice")
    mean_O: Tensor
    var_O: Tensor

    def __init__(self, width: int, *, momentum: float = 0.1, epsilon: float = 1e-8) -> None:
        super().__init__()
        self.momentum, self.epsilon = momentum, epsilon
        self.slope_O = nn.Parameter(torch.zeros(width))
        self.register_buffer("mean_O", torch.zeros(width))
        self.register_buffer("var_O", torch.ones(width))

    def forward(
        self, x_XO: Float[Tensor, "*X O"], valid_X: Bool[Tensor, "*X"] | None = None
    ) -> Float[Tensor, "*X O"]:
        """Return the activations; invalid rows do not count in mean and variance."""
        mean_O, var_O = self._moments(x_XO, valid_X) if self.training else (self.mean_O, self.var_O)
        share_XO = ((x_XO - mean_O) * (var_O + self.epsilon).rsqrt()).sigmoid()
        return x_XO * (share_XO + (1 - share_XO) * self.slope_O)

    def _moments(self, x_XO: Tensor, valid_X: Tensor | None) -> tuple[Tensor, Tensor]:
        rows_RO = (x_XO.flatten(0, -2) if valid_X is None else x_XO[valid_X]).float()
        if len(rows_RO) < 2:
            return self.mean_O, self.var_O
        var_O, mean_O = torch.var_mean(rows_RO, dim=0, correction=0)
        with torch.no_grad():
            self.mean_O.lerp_(mean_O, self.momentum)
            self.var_O.lerp_(var_O, self.momentum)
        return mean_O, var_O


def activate(kind: Activation, width: int) -> nn.Module:
    """Make the activation of a hidden layer."""
    match kind:
        case "relu":
            return nn.ReLU(inplace=True)
        case "prelu":
            return SlopedReLU(width)
        case "dice":
            return Dice(width)


@final
class SlopedReLU(nn.Module):
    """PReLU with a slope for each unit, the last dimension."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.slope_O = nn.Parameter(torch.full((width,), 0.25))

    def forward(self, x_XO: Float[Tensor, "*X O"]) -> Float[Tensor, "*X O"]:
        sloped_RO: Tensor = _Sloped.apply(  # type: ignore[no-untyped-call]  # torch leaves it so
            x_XO.flatten(0, -2), self.slope_O.to(x_XO.dtype)
        )
        return sloped_RO.view(x_XO.shape)


class _Sloped(torch.autograd.Function):
    """PReLU with a gradient that takes half the time of torch's own on a CPU."""

    @staticmethod
    def forward(context: Any, x_RO: Tensor, slope_O: Tensor) -> Tensor:
        context.save_for_backward(x_RO, slope_O)
        return F.prelu(x_RO, slope_O)

    @staticmethod
    def backward(context: Any, grad_RO: Tensor) -> tuple[Tensor, Tensor]:
        x_RO, slope_O = context.saved_tensors
        below_RO = grad_RO * (x_RO <= 0)
        of_slope_O = x_RO.new_ones(len(x_RO)) @ (below_RO * x_RO)
        return torch.addcmul(grad_RO, below_RO, slope_O - 1), of_slope_O


def pair_dot(
    query_BD: Float[Tensor, "B D"], item_ACD: Float[Tensor, "A C D"]
) -> Float[Tensor, "B C"]:
    """Return the dot product of each query with its items."""
    if len(item_ACD) == 1:
        return query_BD @ item_ACD[0].T
    return (item_ACD * query_BD.unsqueeze(1)).sum(dim=2)


@final
class Experts(nn.Module):
    """Parallel networks of layers and ReLU, and for each task a softmax over them.

    The first layers of all experts and all gates are computed in one product.
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
        """Return each expert's output, and each task's weights of the experts, which sum to 1."""
        both: Tensor = self.first(query_BQ, item_ACI)
        num_logits = self.num_gates * self.num_experts
        state, logit = both.split([both.shape[-1] - num_logits, num_logits], dim=-1)
        logit_BCTE = logit.unflatten(-1, (self.num_gates, self.num_experts))
        state = self.dropout(state.unflatten(-1, (self.num_experts, -1)).relu())
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
    """A small network for each task, which maps an input to one number."""

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


_LEVELS = 256


def random_bytes(shape: torch.Size) -> UInt8[Tensor, "..."]:
    """Draw numbers in [0, 256) on the CPU, with one draw of torch's global generator."""
    seed = int(torch.randint(2**63 - 1, ()))
    words = np.random.SFC64(seed).random_raw(-(-shape.numel() // 8))
    return torch.from_numpy(words.view(np.uint8))[: shape.numel()].view(shape)


@final
class Dropout(nn.Module):
    r"""Set a share p of the values to 0 and divide the others by 1 - p, in training only.

    The mask is drawn from random bytes, so p is rounded to a multiple of 1/256. On a CPU, this
    takes a quarter of the time of `torch.nn.Dropout`, which draws a number for each value in turn.
    Each call makes one draw of torch's generator as its seed.

    References:
        Srivastava et al., "Dropout: A Simple Way to Prevent Neural Networks from Overfitting",
        JMLR 2014, https://jmlr.org/papers/v15/srivastava14a.html
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.levels = round(p * _LEVELS)

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        if not self.training or self.levels == 0:
            return x
        if x.device.type != "cpu":
            return nn.functional.dropout(x, self.levels / _LEVELS)
        # as bytes, because the conversion of bools to floats is slow
        kept = draw_for_rows(x.shape, random_bytes).ge_(self.levels)
        return x * kept.to(x.dtype).mul_(_LEVELS / (_LEVELS - self.levels))


@final
class MultiHeadAttention(nn.Module):
    r"""concat(head_1 … head_H) W^O with head = softmax(Q K^T / sqrt(D / H)) V.

    References:
        Vaswani et al., "Attention Is All You Need", NeurIPS 2017,
        https://arxiv.org/abs/1706.03762
    """

    def __init__(self, embedding_dim: int, num_heads: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        if embedding_dim % num_heads:
            raise ConfigError(
                f"embedding_dim {embedding_dim} is not a multiple of num_heads {num_heads}: "
                "change one of them",
                name="num_heads",
                value=num_heads,
            )
        self.num_heads = num_heads
        self.dropout = dropout
        self.query = nn.Linear(embedding_dim, embedding_dim)
        self.key_value = nn.Linear(embedding_dim, 2 * embedding_dim)
        self.output = nn.Linear(embedding_dim, embedding_dim)

    def forward(
        self,
        query_BLD: Float[Tensor, "B L D"],
        memory_BSD: Float[Tensor, "B S D"],
        *,
        causal: bool = False,
        valid_BS: Bool[Tensor, "B S"] | None = None,
    ) -> Float[Tensor, "B L D"]:
        """Attend from each query position to the memory (S positions).

        Args:
            query_BLD: The queries.
            memory_BSD: The keys and values.
            causal: Position l attends only to memory 0 … l.
            valid_BS: True = may be attended to. A row without valid memory gives the bias of the
                output layer, not NaN. Excludes `causal`.
        """
        query_BHLd = self._heads(self.query(query_BLD))
        key, value = self.key_value(memory_BSD).chunk(2, dim=-1)
        mask = None if valid_BS is None else valid_BS[:, None, None, :]
        with torch.autocast("cpu", enabled=False):  # backward in bf16 takes four times as long
            mixed_BHLd = F.scaled_dot_product_attention(
                query_BHLd,
                self._heads(key),
                self._heads(value),
                attn_mask=mask,
                is_causal=causal,
                dropout_p=self.dropout if self.training else 0.0,
            )
        if mask is not None:
            mixed_BHLd = mixed_BHLd.where(mask.any(dim=-1, keepdim=True), 0)
        output: Tensor = self.output(mixed_BHLd.transpose(1, 2).flatten(2))
        return output

    def _heads(self, x_BLD: Tensor) -> Tensor:
        """Split the heads, on a CPU in fp32 at least."""
        heads: Tensor = x_BLD.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        is_short = heads.is_cpu and heads.itemsize < torch.float32.itemsize
        return heads.float() if is_short else heads


@final
class GatedBlock(nn.Module):
    """Self-attention and SwiGLU, each with prior normalisation and a gate.

    References:
        Borisyuk et al., "From Features to Transformers: Redefining Ranking for Scalable Impact"
        (LiGR), 2025, https://arxiv.org/abs/2502.03417; Shazeer, "GLU Variants Improve
        Transformer", 2020, https://arxiv.org/abs/2002.05202.
    """

    def __init__(
        self,
        embedding_dim: int,
        num_heads: int,
        *,
        hidden_dim: int,
        dropout: float,
        attention_dropout: float = 0.0,
        causal: bool = False,
    ) -> None:
        super().__init__()
        width = embedding_dim
        self.causal = causal
        self.attention_norm, self.feed_norm = nn.RMSNorm(width), nn.RMSNorm(width)
        self.attention = MultiHeadAttention(width, num_heads, dropout=attention_dropout)
        self.attention_gate, self.feed_gate = nn.Linear(width, width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * hidden_dim), nn.Linear(hidden_dim, width)
        self.dropout = Dropout(dropout)

    def forward(
        self,
        x_BLD: Float[Tensor, "B L D"],
        *,
        valid_BL: Bool[Tensor, "B L"] | None = None,
        place_BT: Int64[Tensor, "B T"] | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Return the next state of each position.

        Args:
            x_BLD: The states.
            valid_BL: True = may be attended to; None: all may. With `causal`, only together with
                `place_BT`.
            place_BT: The only positions whose states are computed; None: all. In a causal block
                they are the last of their rows, so they attend to all valid positions.
        """
        memory_BLD = self.attention_norm(x_BLD)
        normal_BTD = memory_BLD
        if place_BT is not None:
            x_BLD, normal_BTD = rows_at(x_BLD, place_BT), rows_at(memory_BLD, place_BT)
        causal = self.causal and place_BT is None
        attended_BTD = self.attention(normal_BTD, memory_BLD, causal=causal, valid_BS=valid_BL)
        gate_BTD = self.attention_gate(normal_BTD).sigmoid()
        x_BTD = x_BLD + self.dropout(attended_BTD * gate_BTD)
        normal_BTD = self.feed_norm(x_BTD)
        value, gate = self.up(normal_BTD).chunk(2, dim=-1)
        fed_BTD = self.down(value * F.silu(gate))
        output: Tensor = x_BTD + self.dropout(fed_BTD * self.feed_gate(normal_BTD).sigmoid())
        return output


def rows_at(
    x_BLD: Float[Tensor, "B L D"], place_BT: Int64[Tensor, "B T"]
) -> Float[Tensor, "B T D"]:
    """Gather some positions of each row."""
    row_B1 = torch.arange(len(x_BLD), device=x_BLD.device).unsqueeze(1)
    return F.embedding(place_BT + row_B1 * x_BLD.shape[1], x_BLD.flatten(0, 1))

r"""Propagation of vectors along edges of a graph, weighted by the degrees of both ends.

.. math:: \hat A = D^{-1/2} A D^{-1/2}

The operator is symmetric, and so is every polynomial of it, so the backward pass is the forward
product again. That product sums the rows of each node's neighbours without a weight per edge,
because rows are scaled before and after; `embedding_bag` is the fastest such sum on a CPU.
Internally, rows have an order that keeps shared neighbours in the processor's cache
(`cache_order`); inputs and outputs have the graph's order.

Shape legend: V nodes, E directed edges, R requested nodes, D width.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, final

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from foretaste.data.graph import Graph, adjacency, cache_order
from foretaste.models.layers.dense import random_bytes


@dataclass(frozen=True, kw_only=True)
class Perturbation:
    """The changes of a training step to the graph and to the propagated vectors."""

    noise: float = 0.0
    """Length of the random vector that is added to each node's vector after each layer, in the same
    orthant."""
    edge_dropout: float = 0.0
    """Share of the edges that are dropped, in [0, 1); the weights of the others are multiplied by 1
    / (1 - share)."""


class Propagated(NamedTuple):
    """The vectors of the requested nodes."""

    mean_RD: Float[Tensor, "R D"]
    """Mean over the layers 0 to L."""
    layer_0_RD: Float[Tensor, "R D"]
    view_RD: Float[Tensor, "R D"]
    """Vectors of the view layer; 0 without one."""


@final
class GraphConv(nn.Module):
    """The operator of one graph. Its tensors are not part of a model's state."""

    node_V: Tensor
    row_V: Tensor
    each_V1: Tensor
    offsets_V1: Tensor
    neighbour_E: Tensor
    weight_E: Tensor | None
    tie_E: Tensor
    strength_V: Tensor
    """Degree of each node in the graph's order: the sum of its edge weights, in 64 bits."""
    scale_V: Tensor
    """D^-1/2 in the graph's order; 0 for an isolated node."""

    def __init__(self, graph: Graph) -> None:
        """Prepare the graph; isolated nodes receive nothing."""
        super().__init__()
        node_V = cache_order(graph)
        row_V = np.empty_like(node_V)
        row_V[node_V] = np.arange(len(node_V))
        rows = adjacency(graph)[node_V]
        rows.indices = row_V[rows.indices]
        rows.sort_indices()
        strength_V = np.bincount(graph.node_E, graph.weight_E, graph.num_nodes).astype(float)
        with np.errstate(divide="ignore"):
            scale_V = np.where(strength_V > 0, 1 / np.sqrt(strength_V), 0)
        weight_E = None if graph.weight_E is None else torch.from_numpy(rows.data)
        for name, array in (  # 32-bit indices are half the bytes to read
            ("node_V", node_V.astype(np.int32)),
            ("row_V", row_V.astype(np.int32)),
            ("each_V1", np.arange(len(node_V) + 1, dtype=np.int32)),
            ("offsets_V1", rows.indptr.astype(np.int32)),
            ("neighbour_E", rows.indices.astype(np.int32)),
            ("tie_E", np.empty(0, np.int64)),
            ("strength_V", strength_V),
            ("scale_V", scale_V),
        ):
            self.register_buffer(name, torch.from_numpy(array), persistent=False)
        self.register_buffer("weight_E", weight_E, persistent=False)

    def forward(
        self,
        x_VD: Float[Tensor, "V D"],
        node_R: Int64[Tensor, " R"],
        *,
        num_layers: int,
        view_layer: int = 0,
        change: Perturbation | None = None,
    ) -> Propagated:
        """Return some nodes' means over the layers 0 to L, and their vectors at the view layer.

        Args:
            x_VD: Layer 0.
            node_R: The nodes, possibly repeated.
            num_layers: L, 1 or more.
            view_layer: The layer whose vectors are also returned, in [1, L]; 0: none, and they are
                0.
            change: The changes to graph and vectors; the gradient treats the noise as constant.
        """
        change = change or Perturbation()
        weight_E = self._dropped(change.edge_dropout)
        vectors = _Propagate.apply(  # type: ignore[no-untyped-call]  # torch leaves it untyped
            x_VD, self, node_R, num_layers, view_layer, weight_E, change.noise
        )
        return Propagated(*vectors)

    def product(self, x_VD: Float[Tensor, "V D"]) -> Float[Tensor, "V D"]:
        r"""Return :math:`\hat A x`: one propagation step."""
        out_VD: Tensor = _Product.apply(x_VD, self)  # type: ignore[no-untyped-call]
        return out_VD

    def sum_neighbours(self, x_VD: Float[Tensor, "V D"]) -> Float[Tensor, "V D"]:
        """Return the sum of each node's neighbours, weighted only by the edges."""
        row_VD = x_VD.index_select(0, self.node_V)
        return self.sum_rows(row_VD).index_select(0, self.row_V)

    def enter(self, x_VD: Tensor) -> Tensor:
        """Put nodes into cache order and scale them, in one pass."""
        x_VD = x_VD.detach()  # the surrounding function computes the gradient
        return self._gather(self.node_V, x_VD, self.row_scale_V)

    def leave(self, row_VD: Tensor, *, by: float = 1.0) -> Tensor:
        """Put nodes back into the graph's order, and scale them."""
        return self._gather(self.row_V, row_VD, self.scale_V * by)

    @property
    def row_scale_V(self) -> Tensor:
        """D^-1/2 in cache order."""
        return self.scale_V.index_select(0, self.node_V)

    def sum_rows(self, row_VD: Tensor, weight_E: Tensor | None = None) -> Tensor:
        """Return the sum of each node's neighbours, all in cache order."""
        weight_E = self.weight_E if weight_E is None else weight_E
        return F.embedding_bag(
            self.neighbour_E,
            row_VD,
            self.offsets_V1,
            mode="sum",
            include_last_offset=True,
            per_sample_weights=None if weight_E is None else weight_E.to(row_VD.dtype),
        )

    def _gather(self, index_V: Tensor, x_VD: Tensor, scale_V: Tensor) -> Tensor:
        return F.embedding_bag(
            index_V,
            x_VD,
            self.each_V1,
            mode="sum",
            include_last_offset=True,
            per_sample_weights=scale_V.to(x_VD.dtype),
        )

    def _dropped(self, share: float) -> Tensor | None:
        """Draw which edges are kept; both directions of an edge are kept together."""
        if not share:
            return None
        if not len(self.tie_E):
            from_E = torch.repeat_interleave(self.offsets_V1.diff())
            both_2E = torch.stack([from_E, self.neighbour_E.long()])
            key_E = both_2E.amin(0) * len(self.node_V) + both_2E.amax(0)
            self.tie_E = key_E.unique(return_inverse=True)[1]
        kept_P = torch.rand(len(self.tie_E) // 2, device=self.tie_E.device) >= share
        kept_E = kept_P.float().div_(1 - share).index_select(0, self.tie_E)
        return kept_E if self.weight_E is None else kept_E.mul_(self.weight_E)


@final
class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_VD: Tensor, conv: GraphConv) -> Tensor:
        ctx.conv = conv
        return conv.leave(conv.sum_rows(conv.enter(x_VD)))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        conv: GraphConv = ctx.conv
        return conv.leave(conv.sum_rows(conv.enter(grad_outputs[0]))), None


@final
class _Propagate(torch.autograd.Function):
    """The mean over layers of a few nodes, whose rows are taken from each layer during propagation.

    Between two products, rows are scaled by D^-1/2. The tests compare it with
    `models.lightgcn.propagate`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_VD: Tensor,
        conv: GraphConv,
        node_R: Tensor,
        num_layers: int,
        view_layer: int,
        weight_E: Tensor | None,
        noise: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        row_R = conv.row_V.index_select(0, node_R)
        scale_V1 = conv.row_scale_V.to(x_VD.dtype).unsqueeze(1)
        scale_R1 = scale_V1.index_select(0, row_R)
        layer_0_RD = x_VD.index_select(0, node_R)
        mean_RD, view_RD = layer_0_RD.clone(), torch.zeros_like(layer_0_RD)
        row_VD = conv.enter(x_VD)
        for layer in range(1, num_layers + 1):
            row_VD = conv.sum_rows(row_VD, weight_E)
            if noise:
                row_VD = _moved(row_VD.mul_(scale_V1), noise)
                layer_RD = row_VD.index_select(0, row_R)
                row_VD.mul_(scale_V1)
            else:
                layer_RD = row_VD.index_select(0, row_R).mul_(scale_R1)
                if layer < num_layers:
                    row_VD.mul_(scale_V1.square())
            mean_RD += layer_RD
            if layer == view_layer:
                view_RD = layer_RD
        ctx.save_for_backward(node_R, row_R, scale_V1, scale_R1, weight_E)
        ctx.conv, ctx.num_layers, ctx.view_layer = conv, num_layers, view_layer
        return mean_RD.div_(num_layers + 1), layer_0_RD, view_RD

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        conv: GraphConv = ctx.conv
        node_R, row_R, scale_V1, scale_R1, weight_E = ctx.saved_tensors
        grad_RD, layer_0_RD, view_RD = grad_outputs
        grad_RD = grad_RD / (ctx.num_layers + 1)
        mean_RD = grad_RD * scale_R1
        row_VD = grad_RD.new_zeros(len(scale_V1), grad_RD.shape[1])
        for layer in range(ctx.num_layers, 0, -1):
            if layer < ctx.num_layers:
                row_VD = conv.sum_rows(row_VD, weight_E).mul_(scale_V1.square())
            row_VD.index_add_(0, row_R, mean_RD)
            if layer == ctx.view_layer:
                row_VD.index_add_(0, row_R, view_RD * scale_R1)
        grad_VD = conv.leave(conv.sum_rows(row_VD, weight_E))
        return (grad_VD.index_add_(0, node_R, grad_RD + layer_0_RD), *(None,) * 6)


def _moved(row_VD: Tensor, length: float) -> Tensor:
    """Add a random vector of given length to each vector, in the same orthant."""
    if row_VD.device.type == "cpu":  # a fifth of the time
        noise_VD = random_bytes(row_VD.shape).to(row_VD.dtype)
    else:
        noise_VD = torch.rand_like(row_VD)
    noise_VD.mul_(length / noise_VD.norm(dim=1, keepdim=True).clamp_(min=1e-12))
    return row_VD.add_(noise_VD.copysign_(row_VD).masked_fill_(row_VD == 0, 0))

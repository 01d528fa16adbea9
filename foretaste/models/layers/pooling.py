"""Importance pooling, and the computation of every node's vector, layer by layer.

A node pools its neighbours' messages, weighted by importance. A batch computes each node of its
frontier once; for all nodes, this would repeat a node for each of the many batches whose frontier
contains it. Here a layer is finished for all nodes before the next one begins, and only the
randomly accessed part must be in memory: one slice of the columns of the messages. Everything else
is read and written sequentially, in memory or in files.

Shape legend: R nodes of a layer, S nodes of the layer below, D width in, H width of messages, O
width out; V nodes, B nodes of a block, E their edges.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float32, Int32
from torch import Tensor, nn

from foretaste.data.draws import fill_blocks, own_blocks
from foretaste.data.walks import Layer, Neighbourhoods

_TINY = 1e-6
"""Added to squared lengths: a node without inputs has a vector of 0 and a gradient."""


@final
class _Pool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, message_SH: Tensor, layer: Layer) -> Tensor:
        ctx.layer = layer
        return weighted_bag(message_SH, layer.source_E, layer.weight_E, layer.offsets_R1)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        layer: Layer = ctx.layer
        grad_RH = grad_outputs[0].contiguous()
        return weighted_bag(grad_RH, layer.target_E, layer.back_weight_E, layer.back_S1), None


def weighted_bag(
    table_SH: Tensor, index_E: Tensor, weight_E: Tensor, offsets_R1: Tensor
) -> Float[Tensor, "R H"]:
    """Return, for each row, the weighted sum of the table's rows at its indices."""
    if len(index_E) == 0:
        return table_SH.new_zeros(len(offsets_R1) - 1, table_SH.shape[1])
    bag_RH: Tensor = F.embedding_bag(
        index_E,
        table_SH,
        offsets_R1,
        mode="sum",
        per_sample_weights=weight_E.to(table_SH.dtype),
        include_last_offset=True,
    )
    return bag_RH


def pool(message_SH: Float[Tensor, "S H"], layer: Layer) -> Float[Tensor, "R H"]:
    """Return the weighted mean of the messages of each row's neighbours; 0 without neighbours.

    The backward pass also gathers, along the reversed edges, which is 40 times as fast on a CPU as
    scattering.
    """
    pooled_RH: Tensor = _Pool.apply(message_SH, layer)  # type: ignore[no-untyped-call]  # torch's
    return pooled_RH


@final
class Convolve(nn.Module):
    r"""One layer of PinSage.

    .. math::
        n_u = \sum_{v \in N(u)} \alpha_{uv} \, \mathrm{ReLU}(Q h_v + q), \qquad
        h'_u = \frac{W [h_u ; n_u] + w}{\lVert W [h_u ; n_u] + w \rVert}

    Initially it is the sum of the node and its neighbours: Q is the identity, and W two identities.

    References:
        Ying et al., "Graph Convolutional Neural Networks for Web-Scale Recommender Systems", KDD
        2018, https://arxiv.org/abs/1806.01973, algorithm 1. **Departure**: no ReLU after W, which
        would keep all states in one orthant.
    """

    def __init__(self, width_in: int, message_width: int, width_out: int) -> None:
        super().__init__()
        self.width_in, self.message_width, self.width_out = width_in, message_width, width_out
        self.message = nn.Linear(width_in, message_width)
        self.update = nn.Linear(width_in + message_width, width_out)
        nn.init.eye_(self.message.weight)
        with torch.no_grad():
            for part in self.update.weight.split([width_in, message_width], dim=1):
                part.copy_(torch.eye(*part.shape))
        for linear in (self.message, self.update):
            nn.init.zeros_(linear.bias)

    def forward(
        self,
        h_SD: Float[Tensor, "S D"],
        layer: Layer,
        *,
        alone_R: Bool[Tensor, " R"] | None = None,
    ) -> Float[Tensor, "R O"]:
        """Return the next state of a layer's nodes.

        Args:
            h_SD: States of the layer below.
            layer: The neighbours that each node pools.
            alone_R: True = as if it had no neighbours.
        """
        pooled_RH = pool(self.messages(h_SD), layer)
        if alone_R is not None:
            pooled_RH = pooled_RH * ~alone_R.unsqueeze(1)
        return self.updated(h_SD.index_select(0, layer.self_R), pooled_RH)

    def messages(
        self, h_SD: Float[Tensor, "S D"], columns: slice = slice(None)
    ) -> Float[Tensor, "S H"]:
        """Return the messages of nodes to their neighbours, or some columns of them."""
        return F.linear(h_SD, self.message.weight[columns], self.message.bias[columns]).relu_()

    def updated(
        self, h_RD: Float[Tensor, "R D"], pooled_RH: Float[Tensor, "R H"]
    ) -> Float[Tensor, "R O"]:
        """Return nodes' next state from their own and from their neighbours' messages."""
        own, other = self.update.weight.split([self.width_in, self.message_width], dim=1)
        x_RO = torch.addmm(F.linear(h_RD, own, self.update.bias), pooled_RH, other.T)
        square_R1 = x_RO.square().sum(dim=1, keepdim=True)
        return x_RO * (square_R1 + _TINY).rsqrt()


OnBlock = Callable[[int, int, Tensor], None]
"""A callback with a layer's number from 0, the first node of a block, and the block's inputs to the
layer."""

_CPU = torch.device("cpu")


@final
class Rows:
    """A float32 table, in memory or in a file, read and written in ranges of rows."""

    def __init__(self, num_rows: int, width: int, path: Path | None = None) -> None:
        """Allocate the table.

        Args:
            num_rows: Number of rows.
            width: Width of a row.
            path: The file, which is overwritten; None keeps the table in memory.
        """
        self.num_rows, self.width, self.path = num_rows, width, path
        self._memory = torch.zeros(num_rows if path is None else 0, width)
        if path is not None:
            with path.open("wb") as file:
                file.truncate(num_rows * width * 4)

    def read(self, low: int, high: int) -> Float[Tensor, "B D"]:
        """Return rows `low … high - 1`, which must not be changed."""
        if self.path is None:
            return self._memory[low:high]
        count, offset = (high - low) * self.width, low * self.width * 4
        data = np.fromfile(self.path, np.float32, count=count, offset=offset)
        return torch.from_numpy(data).view(-1, self.width)

    def write(self, low: int, rows_BD: Float[Tensor, "B D"]) -> None:
        """Write rows from `low` on."""
        if self.path is None:
            self._memory[low : low + len(rows_BD)] = rows_BD.cpu()
            return
        with self.path.open("r+b", buffering=0) as file:
            file.seek(low * self.width * 4)
            file.write(np.ascontiguousarray(rows_BD.cpu().numpy(), dtype=np.float32).data)

    def fill(self) -> None:
        """Fill in the rows that other processes computed."""
        fill_blocks(self._memory)

    def remove(self) -> None:
        """Free the memory or delete the file."""
        self._memory = torch.empty(0, self.width)
        if self.path is not None:
            self.path.unlink()


@torch.no_grad()
def generate(
    layers: Sequence[Convolve],
    neighbourhoods: Neighbourhoods,
    inputs: Callable[[int, int], Tensor],
    *,
    folder: Path | None = None,
    gathered_bytes: int = 2**30,
    block_nodes: int = 16384,
    on_block: OnBlock | None = None,
    device: torch.device = _CPU,
) -> Rows:
    """Compute the last layer's state of every node.

    It needs `gathered_bytes` and a few blocks of memory, and, without a folder, about four tables
    of all nodes. With a folder, these are files: at most two layers and one layer's pooled
    messages.

    Args:
        layers: From the lowest to the highest, 1 or more.
        neighbourhoods: The neighbours that each node pools.
        inputs: Returns the inputs of nodes `low … high - 1`; called once for each block.
        folder: Folder for tables that do not fit in memory, of a single process; None keeps them in
            memory.
        gathered_bytes: Maximum size of the randomly accessed part; larger messages are pooled in
            slices of their columns.
        block_nodes: Number of nodes computed at a time.
        on_block: Called with each block of inputs to each layer.
        device: The device of the layers.

    Returns:
        The states, in node order.
    """
    num_nodes = len(neighbourhoods)
    blocks = [(block.start, block.stop) for block in own_blocks(num_nodes, block_nodes)]

    def table(name: str, width: int) -> Rows:
        return Rows(num_nodes, width, None if folder is None else folder / f"{name}.f32")

    state = table("layer-0", layers[0].width_in)
    _write(state, ((low, inputs(low, high)) for low, high in blocks))
    for number, layer in enumerate(layers):
        if on_block is not None:
            _show(on_block, number, state, blocks, device)
        pool = partial(_pooled, layer, state, neighbourhoods, blocks, device)
        above = table(f"layer-{number + 1}", layer.width_out)
        *earlier, last = _slices(num_nodes, layer.message_width, gathered_bytes)
        pooled = [table(f"pooled-{n}", s.stop - s.start) for n, s in enumerate(earlier)]
        for rows, columns in zip(pooled, earlier, strict=True):
            _write(rows, pool(columns))
        _write(above, _updated(layer, state, pooled, pool(last)))
        for rows in (state, *pooled):
            rows.remove()
        state = above
    return state


def _show(
    on_block: OnBlock,
    number: int,
    state: Rows,
    blocks: Sequence[tuple[int, int]],
    device: torch.device,
) -> None:
    for low, high in blocks:
        on_block(number, low, state.read(low, high).to(device))


def _write(rows: Rows, blocks: Iterable[tuple[int, Tensor]]) -> None:
    for low, block_BD in blocks:
        rows.write(low, block_BD)
    rows.fill()


def _updated(
    layer: Convolve, state: Rows, earlier: Sequence[Rows], said: Iterable[tuple[int, Tensor]]
) -> Iterator[tuple[int, Tensor]]:
    """Yield each block's next state, from its own state and its neighbours' messages."""
    for low, said_BH in said:
        high = low + len(said_BH)
        parts = [rows.read(low, high).to(said_BH.device) for rows in earlier]
        h_BD = state.read(low, high).to(said_BH.device)
        yield low, layer.updated(h_BD, torch.cat([*parts, said_BH], dim=1))


def _pooled(
    layer: Convolve,
    state: Rows,
    neighbourhoods: Neighbourhoods,
    blocks: Sequence[tuple[int, int]],
    device: torch.device,
    columns: slice,
) -> Iterator[tuple[int, Tensor]]:
    """Compute some columns of all messages, then yield each block's pooled messages."""
    message_VH = torch.zeros(state.num_rows, columns.stop - columns.start, device=device)
    for low, high in blocks:
        message_VH[low:high] = layer.messages(state.read(low, high).to(device), columns)
    fill_blocks(message_VH)
    for low, high in blocks:
        yield low, weighted_bag(message_VH, *_edges(neighbourhoods, low, high, device))


def _slices(num_nodes: int, width: int, most_bytes: int) -> list[slice]:
    """Cut columns into equal slices with a maximum size in bytes, at least one column wide."""
    most = max(1, most_bytes // (4 * max(1, num_nodes)))
    count = -(-width // most)
    bounds = np.linspace(0, width, count + 1).astype(int).tolist()
    return [slice(low, high) for low, high in pairwise(bounds)]


def _edges(
    neighbourhoods: Neighbourhoods, low: int, high: int, device: torch.device
) -> tuple[Int32[Tensor, " E"], Float32[Tensor, " E"], Int32[Tensor, " B1"]]:
    """Return the neighbours of a block of nodes, their weights, and the start of each node's."""
    neighbour_BT = neighbourhoods.neighbour_VT[low:high]
    real_BT = neighbour_BT >= 0
    offsets_B1 = np.concatenate([[0], np.cumsum(real_BT.sum(axis=1))]).astype(np.int32)
    weight_BT = neighbourhoods.weight_VT[low:high]
    return (
        torch.from_numpy(neighbour_BT[real_BT]).to(device),
        torch.from_numpy(weight_BT[real_BT]).to(device),
        torch.from_numpy(offsets_B1).to(device),
    )

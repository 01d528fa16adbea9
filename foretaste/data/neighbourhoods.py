"""Each node's few neighbours, and which nodes a batch needs in each layer above them.

Shape legend: V nodes, T neighbours, R nodes of a layer, S nodes of the layer below, E edges
between the two, K layers.
"""

from dataclasses import dataclass
from typing import no_type_check

import numba
import numpy as np
import torch
from jaxtyping import Float32, Int32, Int64, Integer
from torch import Tensor

from foretaste.data.batch import Prepared
from foretaste.data.memory import check_fits


@dataclass(frozen=True, eq=False, kw_only=True)
class Neighbourhoods:
    """A table of neighbours with weights."""

    neighbour_VT: Int32[np.ndarray, "V T"]
    """Most important first; -1 pads."""
    weight_VT: Float32[np.ndarray, "V T"]
    """Above 0, a row's sum is 1; 0 under padding."""

    def __len__(self) -> int:
        return len(self.neighbour_VT)

    @staticmethod
    def empty(num_nodes: int, top: int) -> "Neighbourhoods":
        """Return the table in which nobody has a neighbour.

        Raises:
            TooLargeError: It would not fit in memory.
        """
        check_fits(
            num_nodes * top * 8,
            f"a table of {top:,} neighbours for each of {num_nodes:,} nodes",
            "keep fewer",
            name="top",
            value=top,
        )
        return Neighbourhoods(
            neighbour_VT=np.full((num_nodes, top), -1, np.int32),
            weight_VT=np.zeros((num_nodes, top), np.float32),
        )


@dataclass(frozen=True, eq=False, kw_only=True)
class Layer:
    """Which rows of the layer below each row of a layer is made from.

    Edges stand twice, by their row here and by their row below, so that the backward pass gathers
    as the forward pass does.
    """

    self_R: Int32[Tensor, " R"]
    """Row below of the same node."""
    source_E: Int32[Tensor, " E"]
    """Rows below of the neighbours, those of row r at `offsets_R1[r] : offsets_R1[r + 1]`."""
    weight_E: Float32[Tensor, " E"]
    offsets_R1: Int32[Tensor, " R1"]
    target_E: Int32[Tensor, " E"]
    """Rows here, those that row s below is a neighbour of at `back_S1[s] : back_S1[s + 1]`."""
    back_weight_E: Float32[Tensor, " E"]
    back_S1: Int32[Tensor, " S1"]

    def to(self, device: torch.device) -> "Layer":
        """Return the layer on a device."""
        return Layer(**{name: tensor.to(device) for name, tensor in vars(self).items()})


@dataclass(frozen=True, eq=False, kw_only=True)
class Frontier:
    """The nodes that a batch needs, no node twice in a layer."""

    input_S: Int64[Tensor, " S"]
    """Nodes of the lowest layer, rising."""
    layers: tuple[Layer, ...]
    """From the lowest to the highest; the last one's rows are the nodes asked for, rising."""

    def to(self, device: torch.device) -> "Frontier":
        """Return the frontier on a device."""
        return Frontier(
            input_S=self.input_S.to(device), layers=tuple(layer.to(device) for layer in self.layers)
        )


@dataclass(frozen=True, eq=False, kw_only=True)
class PairFrontier(Prepared):
    """What a batch of pairs needs that is known before the weights are.

    Shape legend: B users of the batch, V items they are compared with.
    """

    frontier: Frontier
    user_row_B: Int64[Tensor, " B"]
    """Row of the highest layer that each user is; likewise the items."""
    item_row_V: Int64[Tensor, " V"]

    def to(self, device: torch.device) -> "PairFrontier":
        """Return it on a device."""
        return PairFrontier(
            frontier=self.frontier.to(device),
            user_row_B=self.user_row_B.to(device),
            item_row_V=self.item_row_V.to(device),
        )


def make_frontier(
    neighbourhoods: Neighbourhoods, node_R: Integer[np.ndarray, " R"], *, num_layers: int
) -> Frontier:
    """Find the nodes that `num_layers` of convolution over some nodes need.

    Args:
        neighbourhoods: The table.
        node_R: Nodes of the highest layer, rising, no two alike.
        num_layers: K, 1 or more.
    """
    layers: list[Layer] = []
    node_R = node_R.astype(np.int32)
    for _ in range(num_layers):
        layer, node_R = _layer_below(neighbourhoods, node_R)
        layers.append(layer)
    return Frontier(input_S=torch.from_numpy(node_R).long(), layers=tuple(layers[::-1]))


def _layer_below(
    table: Neighbourhoods, node_R: Int32[np.ndarray, " R"]
) -> tuple[Layer, Int32[np.ndarray, " S"]]:
    """Return what a layer's nodes are made from, and the nodes of the layer below."""
    neighbour_VT, weight_VT = table.neighbour_VT, table.weight_VT
    offsets_R1, node_S, row_of_V = _nodes_below(node_R, neighbour_VT)
    source_E, weight_E = _edges(node_R, offsets_R1, row_of_V, neighbour_VT, weight_VT)
    target_E, back_weight_E, back_S1 = _turned(offsets_R1, source_E, weight_E, len(node_S))
    layer = Layer(
        self_R=torch.from_numpy(row_of_V[node_R]),
        source_E=torch.from_numpy(source_E),
        weight_E=torch.from_numpy(weight_E),
        offsets_R1=torch.from_numpy(offsets_R1),
        target_E=torch.from_numpy(target_E),
        back_weight_E=torch.from_numpy(back_weight_E),
        back_S1=torch.from_numpy(back_S1),
    )
    return layer, node_S


@numba.njit(cache=True, nogil=True)
@no_type_check
def _nodes_below(node_R, neighbour_VT):
    """Return where each row's edges begin, the distinct nodes below, and each node's row there."""
    row_of_V = np.full(neighbour_VT.shape[0], -1, np.int32)
    offsets_R1 = np.zeros(node_R.shape[0] + 1, np.int32)
    for row in range(node_R.shape[0]):
        node = node_R[row]
        row_of_V[node] = 0
        place = 0
        while place < neighbour_VT.shape[1] and neighbour_VT[node, place] >= 0:
            row_of_V[neighbour_VT[node, place]] = 0
            place += 1
        offsets_R1[row + 1] = offsets_R1[row] + place
    node_S = np.flatnonzero(row_of_V == 0).astype(np.int32)
    for row in range(node_S.shape[0]):
        row_of_V[node_S[row]] = row
    return offsets_R1, node_S, row_of_V


@numba.njit(cache=True, nogil=True)
@no_type_check
def _edges(node_R, offsets_R1, row_of_V, neighbour_VT, weight_VT):
    """Return the row below and the weight of each edge."""
    source_E = np.empty(offsets_R1[-1], np.int32)
    weight_E = np.empty(offsets_R1[-1], np.float32)
    for row in range(node_R.shape[0]):
        begin = offsets_R1[row]
        for place in range(offsets_R1[row + 1] - begin):
            source_E[begin + place] = row_of_V[neighbour_VT[node_R[row], place]]
            weight_E[begin + place] = weight_VT[node_R[row], place]
    return source_E, weight_E


@numba.njit(cache=True, nogil=True)
@no_type_check
def _turned(offsets_R1, source_E, weight_E, num_below):
    """Return the edges by their row below: a counting sort."""
    back_S1 = np.zeros(num_below + 1, np.int32)
    for source in source_E:
        back_S1[source + 1] += 1
    for below in range(num_below):
        back_S1[below + 1] += back_S1[below]
    next_S = back_S1[:-1].copy()
    target_E = np.empty_like(source_E)
    back_weight_E = np.empty_like(weight_E)
    for row in range(offsets_R1.shape[0] - 1):
        for edge in range(offsets_R1[row], offsets_R1[row + 1]):
            at = next_S[source_E[edge]]
            target_E[at], back_weight_E[at] = row, weight_E[edge]
            next_S[source_E[edge]] = at + 1
    return target_E, back_weight_E, back_S1

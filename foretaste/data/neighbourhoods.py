"""Each node's few neighbours, and which nodes a batch needs in each layer above them.

Shape legend: V nodes, T neighbours, R nodes of a layer, S nodes of the layer below, E edges
between the two, K layers.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float32, Int32, Int64, Integer
from torch import Tensor

from foretaste.data.batch import Prepared
from foretaste.data.memory import check_fits
from foretaste.later import later

if TYPE_CHECKING:
    from foretaste.data import walk_loops
else:
    walk_loops = later("foretaste.data.walk_loops")


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
    offsets_R1, node_S, row_of_V = walk_loops.nodes_below(node_R, neighbour_VT)
    source_E, weight_E = walk_loops.edges_below(
        node_R, offsets_R1, row_of_V, neighbour_VT, weight_VT
    )
    target_E, back_weight_E, back_S1 = walk_loops.turned(
        offsets_R1, source_E, weight_E, len(node_S)
    )
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

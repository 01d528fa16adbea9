"""Random walks with restart, the neighbours they visit most, and the nodes that a batch needs.

The share of visits approximates personalised PageRank. Every step of every walk has its own random
number, a hash of (seed, node, hop, walk), so results depend neither on the number of threads nor on
the other requested nodes.

Shape legend: V nodes, N requested nodes, T neighbours, R nodes of a layer, S nodes of the layer
below, E directed edges, K layers.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float32, Float64, Int32, Int64, Integer
from torch import Tensor

from foretaste.data.arrays import check_fits
from foretaste.data.batch import Prepared
from foretaste.data.graph import Graph
from foretaste.errors import ConfigError, DataError
from foretaste.later import later

loops = later("foretaste.data.loops")


@dataclass(frozen=True, eq=False, kw_only=True)
class Neighbourhoods:
    """A table of neighbours with weights."""

    neighbour_VT: Int32[np.ndarray, "V T"]
    """Most important first, padded with -1."""
    weight_VT: Float32[np.ndarray, "V T"]
    """Above 0 and summing to 1 per row; 0 under padding."""

    def __len__(self) -> int:
        return len(self.neighbour_VT)

    @staticmethod
    def empty(num_nodes: int, top: int) -> "Neighbourhoods":
        """Return a table in which no node has a neighbour.

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
    """For each row of a layer, the rows of the layer below that it is computed from.

    Edges are stored twice, by their row here and by their row below, so that the backward pass
    gathers like the forward pass.
    """

    self_R: Int32[Tensor, " R"]
    """Row below of the same node."""
    source_E: Int32[Tensor, " E"]
    """Rows below of the neighbours; those of row r are at `offsets_R1[r] : offsets_R1[r + 1]`."""
    weight_E: Float32[Tensor, " E"]
    offsets_R1: Int32[Tensor, " R1"]
    target_E: Int32[Tensor, " E"]
    """Rows here; those with row s below as a neighbour are at `back_S1[s] : back_S1[s + 1]`."""
    back_weight_E: Float32[Tensor, " E"]
    back_S1: Int32[Tensor, " S1"]

    def to(self, device: torch.device) -> "Layer":
        """Return the layer on a device."""
        return Layer(**{name: tensor.to(device) for name, tensor in vars(self).items()})


@dataclass(frozen=True, eq=False, kw_only=True)
class Frontier:
    """The nodes that a batch needs; nodes in a layer are distinct."""

    input_S: Int64[Tensor, " S"]
    """Nodes of the lowest layer, ascending."""
    layers: tuple[Layer, ...]
    """From the lowest to the highest; the rows of the last one are the requested nodes,
    ascending."""

    def to(self, device: torch.device) -> "Frontier":
        """Return the frontier on a device."""
        return Frontier(
            input_S=self.input_S.to(device), layers=tuple(layer.to(device) for layer in self.layers)
        )


@dataclass(frozen=True, eq=False, kw_only=True)
class PairFrontier(Prepared):
    """The part of a batch of pairs that can be computed without the weights.

    Shape legend: B users of the batch, V items that they are compared with.
    """

    frontier: Frontier
    user_row_B: Int64[Tensor, " B"]
    """Row of each user in the highest layer; the next field has the items' rows."""
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
        node_R: Distinct nodes of the highest layer, ascending.
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
    """Return the inputs of a layer's nodes, and the nodes of the layer below."""
    neighbour_VT, weight_VT = table.neighbour_VT, table.weight_VT
    offsets_R1, node_S, row_of_V = loops.nodes_below(node_R, neighbour_VT)
    source_E, weight_E = loops.edges_below(node_R, offsets_R1, row_of_V, neighbour_VT, weight_VT)
    target_E, back_weight_E, back_S1 = loops.turned(offsets_R1, source_E, weight_E, len(node_S))
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


_BLOCK = 2048
"""Number of nodes that a thread takes at a time."""
_MOST_VISITS = 2**24
"""Maximum number of visits from one node; the table of counts takes 16 bytes per visit in each
thread."""


def most_visited(
    graph: Graph,
    *,
    top: int,
    seed: int,
    walks: int = 200,
    hops: int = 3,
    restart: float = 0.0,
    nodes: Int64[np.ndarray, " N"] | None = None,
    counted: tuple[int, int] | None = None,
    threads: int | None = None,
) -> Neighbourhoods:
    r"""Walk from each node and return the nodes visited most, weighted by visits.

    Before each hop a walk returns to its start with probability :math:`\alpha` (`restart`); then it
    moves to one of the node's neighbours, with probability proportional to the weight of the edge
    (to 32 bits). With longer walks, the share of visits at :math:`v \neq s` tends to personalised
    PageRank up to a constant,

    .. math:: \pi_s \propto \sum_{k \geq 0} (1 - \alpha)^k P^k e_s

    and with `hops` of 3 and no restart it is the mean of the first three steps. A return to the
    start is not a visit.

    Args:
        graph: The graph.
        top: T, the maximum number of neighbours kept per node; ties go to lower numbers.
        seed: Decides all walks.
        walks: Number of walks from each node.
        hops: Length of a walk.
        restart: Probability in [0, 1) of a return before a hop.
        nodes: Start nodes; None for every node.
        counted: First and last-plus-one node whose visits count; walks only pass through the
            others. None: all count.
        threads: Number of threads; None: one per core.

    Returns:
        A row for each start node, most visited first; empty for isolated nodes.

    Raises:
        ConfigError: A number is out of range.
        DataError: A node does not exist.

    References:
        Ying et al., "Graph Convolutional Neural Networks for Web-Scale Recommender Systems", KDD
        2018, https://arxiv.org/abs/1806.01973, section 3.1; Eksombatchai et al., "Pixie", WWW
        2018, https://arxiv.org/abs/1711.07601
    """
    if min(top, walks, hops) < 1 or not 0 <= restart < 1:
        raise ConfigError(
            f"top {top}, walks {walks} and hops {hops} must be 1 or more, and restart {restart} "
            "in [0, 1)",
            name="top",
            value=top,
        )
    if walks * hops > _MOST_VISITS:
        raise ConfigError(
            f"{walks} walks of {hops} hops are {walks * hops} visits a node: use at most "
            f"{_MOST_VISITS}",
            name="walks" if walks > hops else "hops",
            value=max(walks, hops),
        )
    node_N = _start_nodes(graph, nodes)
    first, last = counted or (0, graph.num_nodes)
    found = Neighbourhoods.empty(len(node_N), top)
    threshold = np.uint64(int(restart * 2**32))
    total_E = _running_totals(graph)

    def walk(low: int, high: int) -> None:
        loops.most_visited(
            node_N,
            low,
            high,
            graph.offsets_V1,
            graph.neighbour_E,
            total_E,
            walks,
            hops,
            threshold,
            np.uint64(seed % 2**64),
            first,
            last,
            found.neighbour_VT,
            found.weight_VT,
        )

    _in_blocks(len(node_N), walk, threads)
    return found


def uniform_neighbours(
    graph: Graph,
    *,
    top: int,
    seed: int,
    nodes: Int64[np.ndarray, " N"] | None = None,
    counted: tuple[int, int] | None = None,
    threads: int | None = None,
) -> Neighbourhoods:
    """Return for each node up to `top` direct neighbours, drawn uniformly, with equal weights.

    Arguments, row order (by number) and errors are those of `most_visited`.

    References:
        Hamilton, Ying and Leskovec, "Inductive Representation Learning on Large Graphs", NeurIPS
        2017, https://arxiv.org/abs/1706.02216. **Departure**: neighbours are drawn once, not in
        each step.
    """
    if top < 1:
        raise ConfigError(f"top {top} must be 1 or more", name="top", value=top)
    node_N = _start_nodes(graph, nodes)
    first, last = counted or (0, graph.num_nodes)
    found = Neighbourhoods.empty(len(node_N), top)

    def draw(low: int, high: int) -> None:
        loops.uniform(
            node_N,
            low,
            high,
            graph.offsets_V1,
            graph.neighbour_E,
            np.uint64(seed % 2**64),
            first,
            last,
            found.neighbour_VT,
            found.weight_VT,
        )

    _in_blocks(len(node_N), draw, threads)
    return found


def _start_nodes(graph: Graph, nodes: np.ndarray | None) -> Int64[np.ndarray, " N"]:
    if nodes is None:
        return np.arange(graph.num_nodes)
    if len(nodes) and not (nodes.min() >= 0 and nodes.max() < graph.num_nodes):
        raise DataError(
            f"walks should start at node {nodes.max()} (or one below 0) of a graph of "
            f"{graph.num_nodes} nodes"
        )
    return nodes


def _running_totals(graph: Graph) -> Float64[np.ndarray, " E"]:
    """Return the running total of edge weights within each node; empty if all are 1."""
    if graph.weight_E is None:
        return np.empty(0)
    total_E1 = np.concatenate([[0.0], np.cumsum(graph.weight_E, dtype=np.float64)])
    begin_E = np.repeat(graph.offsets_V1[:-1], graph.degree_V)
    total_E: Float64[np.ndarray, " E"] = total_E1[1:] - total_E1[begin_E]
    return total_E


def _in_blocks(num: int, work: Callable[[int, int], None], threads: int | None) -> None:
    starts = range(0, num, _BLOCK)
    workers = max(1, min(threads or os.cpu_count() or 1, len(starts)))
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(lambda low: work(low, min(low + _BLOCK, num)), starts))

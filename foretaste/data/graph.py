"""Who is tied to what: users and items (and what else is known of them) as nodes of one graph.

Shape legend: V nodes, E directed edges (each tie twice), P ties.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int32, Int64

from foretaste.data.interactions import Interactions
from foretaste.errors import DataError


@dataclass(frozen=True, eq=False, kw_only=True)
class Graph:
    """An undirected graph without double edges, in CSR form.

    Nodes are users (`user_idx`), then items (`num_users + item_idx`), then whatever else ties
    were given for, such as an item's attributes. A node without ties is isolated, no error.
    """

    num_users: int
    num_items: int
    offsets_V1: Int64[np.ndarray, " V1"]
    neighbour_E: Int32[np.ndarray, " E"]
    """Neighbours of node v: `neighbour_E[offsets_V1[v] : offsets_V1[v + 1]]`, rising."""

    @property
    def num_nodes(self) -> int:
        return len(self.offsets_V1) - 1

    @property
    def degree_V(self) -> Int64[np.ndarray, " V"]:
        return np.diff(self.offsets_V1)


def make_graph(
    events: Interactions, *, ties: tuple[Int64[np.ndarray, "2 P"], ...] = (), num_nodes: int = 0
) -> Graph:
    """Tie users to the items they did, and nodes to nodes as `ties` say.

    Args:
        events: Repeated events make one tie.
        ties: Pairs of nodes; direction, doubles and ties of a node to itself do not count.
        num_nodes: How many nodes there are, if more than users and items.

    Raises:
        DataError: A tie names a node that does not exist.
    """
    num_nodes = max(num_nodes, events.num_users + events.num_items)
    of_events = np.stack([events.user_idx.astype(np.int64), events.num_users + events.item_idx])
    pair_2P = np.concatenate([of_events, *ties], axis=1)
    if pair_2P.size and not (pair_2P.min() >= 0 and pair_2P.max() < num_nodes):
        raise DataError(
            f"a tie names node {pair_2P.max()} (or one below 0) of a graph of {num_nodes}: give "
            "num_nodes, or leave out ties to unknown nodes"
        )
    pair_2P = pair_2P[:, pair_2P[0] != pair_2P[1]]
    key_E = np.unique(
        np.concatenate([pair_2P[0] * num_nodes + pair_2P[1], pair_2P[1] * num_nodes + pair_2P[0]])
    )
    return Graph(
        num_users=events.num_users,
        num_items=events.num_items,
        offsets_V1=np.searchsorted(key_E, np.arange(num_nodes + 1) * num_nodes),
        neighbour_E=(key_E % num_nodes).astype(np.int32),
    )

"""The graph: users, items and their attributes as nodes, with weighted edges.

Shape legend: V nodes, E directed edges (each tie twice), P ties (undirected edges).
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import polars as pl
from jaxtyping import Float32, Int32, Int64

from foretaste.config import Config, Positive, Weight
from foretaste.data.arrays import distinct
from foretaste.data.interactions import Interactions
from foretaste.errors import DataError
from foretaste.later import later

if TYPE_CHECKING:
    from scipy import sparse
    from scipy.sparse import csgraph
else:
    sparse, csgraph = later("scipy.sparse"), later("scipy.sparse.csgraph")


class GraphConfig(Config):
    """Edges of the graph besides those of events, and their weights; an event has weight 1."""

    user_links: Weight = 1.0
    """Weight of an edge between two linked users, if the data have such links; 0 leaves them
    out."""
    item_links: Weight = 1.0
    """Weight of an edge between two linked items; 0 leaves them out."""
    attributes: tuple[str, ...] = ()
    """Columns of the item table. Each of their values is a node with an edge to each item that has
    it."""
    attribute_weight: Positive = 1.0
    """Weight of the edge between an item and such a value."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Graph:
    """An undirected graph without double edges, in CSR form.

    Nodes are users (`user_idx`), then items (`num_users + item_idx`), then other nodes with edges,
    such as an item's attributes. A node without edges is isolated, which is not an error.
    """

    num_users: int
    num_items: int
    offsets_V1: Int64[np.ndarray, " V1"]
    neighbour_E: Int32[np.ndarray, " E"]
    """Neighbours of node v: `neighbour_E[offsets_V1[v] : offsets_V1[v + 1]]`, ascending."""
    weight_E: Float32[np.ndarray, " E"] | None = None
    """Weight of each edge, above 0, the same in both directions; None: all are 1."""

    @property
    def num_nodes(self) -> int:
        return len(self.offsets_V1) - 1

    @property
    def degree_V(self) -> Int64[np.ndarray, " V"]:
        return np.diff(self.offsets_V1)

    @property
    def node_E(self) -> Int64[np.ndarray, " E"]:
        """The node that each edge starts from."""
        return np.repeat(np.arange(self.num_nodes), self.degree_V)

    def count_neighbours(self, first: int, last: int) -> Int64[np.ndarray, " V"]:
        """Return how many neighbours each node has among the nodes `first` to `last - 1`."""
        among_E = (self.neighbour_E >= first) & (self.neighbour_E < last)
        return np.bincount(self.node_E[among_E], minlength=self.num_nodes)


class Ties(NamedTuple):
    """Undirected edges of one kind."""

    node_2P: Int64[np.ndarray, "2 P"]
    weight: float = 1.0


def graph_of(events: Interactions, config: GraphConfig | None = None) -> Graph:
    """Make the graph of events, of the links between users and items, and of attributes.

    Args:
        events: The training events; all of their links and tables count.
        config: The edges to include; None: the links, if there are any.

    Raises:
        DataError: An attribute is not a column of the item table, or no two items share a value of
            it.
    """
    config = config or GraphConfig()
    ties: list[Ties] = []
    if events.user_links is not None and config.user_links:
        ties.append(Ties(_checked(events.user_links, events.num_users), config.user_links))
    if events.item_links is not None and config.item_links:
        item_2P = _checked(events.item_links, events.num_items)
        ties.append(Ties(events.num_users + item_2P, config.item_links))
    num_nodes = events.num_users + events.num_items
    for name in config.attributes:
        item_P, value_P, num_values = attribute_ties(events, name)
        node_2P = np.stack([events.num_users + item_P, num_nodes + value_P])
        ties.append(Ties(node_2P, config.attribute_weight))
        num_nodes += num_values
    return make_graph(
        events,
        ties=tuple(tie.node_2P for tie in ties),
        weights=tuple(tie.weight for tie in ties),
        num_nodes=num_nodes,
    )


def make_graph(
    events: Interactions,
    *,
    ties: tuple[Int64[np.ndarray, "2 P"], ...] = (),
    weights: tuple[float, ...] = (),
    num_nodes: int = 0,
) -> Graph:
    """Make edges between users and the items of their events, and between the nodes in `ties`.

    Args:
        events: Repeated events make one edge of weight 1.
        ties: Pairs of nodes; direction, duplicates and edges of a node to itself are ignored.
        weights: One for each of `ties`, above 0; none: all are 1. Of several edges between two
            nodes, the heaviest counts.
        num_nodes: Number of nodes, if there are more than users and items.

    Raises:
        DataError: An edge names a node that does not exist, or a weight is not above 0.
    """
    weights = weights or (1.0,) * len(ties)
    if len(weights) != len(ties) or not all(0 < weight < np.inf for weight in weights):
        raise DataError(
            f"weights of edges are {weights} for {len(ties)} kinds: give each kind one above 0, or "
            "leave out the edges that should not count",
            name="weights",
            value=weights,
        )
    num_nodes = max(num_nodes, events.num_users + events.num_items)
    of_events = np.stack([events.user_idx.astype(np.int64), events.num_users + events.item_idx])
    pair_2P = np.concatenate([of_events, *ties], axis=1)
    if pair_2P.size and not (pair_2P.min() >= 0 and pair_2P.max() < num_nodes):
        raise DataError(
            f"an edge names node {pair_2P.max()} (or one below 0) of a graph of {num_nodes}: give "
            "num_nodes, or leave out edges to unknown nodes"
        )
    key_E, weight_E = _both_ways(pair_2P, num_nodes), None
    if any(weight != 1 for weight in weights):
        sizes = [of_events.shape[1], *(tie.shape[1] for tie in ties)]
        weight_P = np.repeat(np.array([1.0, *weights], np.float32), sizes)
        key_E, weight_E = _heaviest(key_E, np.concatenate([weight_P, weight_P]))
    else:
        key_E = distinct(key_E)
    own_E = key_E // num_nodes == key_E % num_nodes
    key_E = key_E[~own_E]
    return Graph(
        num_users=events.num_users,
        num_items=events.num_items,
        offsets_V1=np.searchsorted(key_E, np.arange(num_nodes + 1) * num_nodes),
        neighbour_E=(key_E % num_nodes).astype(np.int32),
        weight_E=None if weight_E is None else weight_E[~own_E],
    )


def adjacency(graph: Graph) -> "sparse.csr_array":
    """Return the weights of all edges as a scipy matrix with 32-bit indices."""
    weight_E = graph.weight_E
    if weight_E is None:
        weight_E = np.ones(len(graph.neighbour_E), np.float32)
    shape = (graph.num_nodes, graph.num_nodes)
    return sparse.csr_array(
        (weight_E, graph.neighbour_E, graph.offsets_V1.astype(np.int32)), shape=shape
    )


def cache_order(graph: Graph) -> Int64[np.ndarray, " V"]:
    """Return the nodes in an order that puts nodes with shared neighbours close together.

    A loop over all neighbourhoods in this order finds many of the neighbours' rows in the
    processor's cache. Users come first, then items, then other nodes, because their neighbours are
    rows of different tables.

    References:
        Cuthill and McKee, "Reducing the bandwidth of sparse symmetric matrices", ACM 1969,
        https://doi.org/10.1145/800195.805928
    """
    order_V = csgraph.reverse_cuthill_mckee(adjacency(graph), symmetric_mode=True).astype(np.int64)
    kind_V = np.searchsorted(
        [graph.num_users, graph.num_users + graph.num_items], order_V, side="right"
    )
    ordered_V: Int64[np.ndarray, " V"] = order_V[np.argsort(kind_V, kind="stable")]
    return ordered_V


def _checked(links_2P: Int32[np.ndarray, "2 P"], size: int) -> Int64[np.ndarray, "2 P"]:
    if links_2P.size and not (links_2P.min() >= 0 and links_2P.max() < size):
        raise DataError(
            f"a link names row {links_2P.max()} (or one below 0) of {size}: leave out links to "
            "users and items that the events do not know"
        )
    return links_2P.astype(np.int64)


def _both_ways(pair_2P: Int64[np.ndarray, "2 P"], num_nodes: int) -> Int64[np.ndarray, " E"]:
    """Return one number for each direction of each edge."""
    one, other = pair_2P
    return np.concatenate([one * num_nodes + other, other * num_nodes + one])


def _heaviest(
    key_E: Int64[np.ndarray, " E"], weight_E: Float32[np.ndarray, " E"]
) -> tuple[Int64[np.ndarray, " D"], Float32[np.ndarray, " D"]]:
    """Return the distinct keys in ascending order, and the largest weight of each."""
    order_E = np.lexsort((-weight_E, key_E))
    key_E, weight_E = key_E[order_E], weight_E[order_E]
    first_E = np.ones(len(key_E), bool)
    first_E[1:] = key_E[1:] != key_E[:-1]
    return key_E[first_E], weight_E[first_E]


def attribute_ties(
    events: Interactions, name: str
) -> tuple[Int64[np.ndarray, " P"], Int64[np.ndarray, " P"], int]:
    """Number the values of a column of the item table, and connect each item with its values.

    A column of lists holds several values per item. Missing and empty values make no edge, and
    neither does a value that only one item has.

    Args:
        events: With an item table.
        name: The column: text, integers, true and false, or lists of these.

    Returns:
        item_idx and value of each pair, and the number of values.

    Raises:
        DataError: The column does not exist, holds fractions or other values that are not names, or
            no two items share a value of it.
    """
    table = events.item_table
    if table is None or name not in table.columns:
        there = [] if table is None else table.columns
        raise DataError(
            f"the items have no column {name!r} to make nodes of; there are {there}: name one of "
            "them, or give a table of items when reading",
            column=name,
            name="attributes",
            value=name,
        )
    column = table[name]
    pairs = pl.DataFrame({"item": np.arange(len(column)), "value": column})
    while isinstance(pairs.schema["value"], pl.List | pl.Array):
        pairs = pairs.explode("value")
    kind = pairs.schema["value"]
    is_name = kind in (pl.String, pl.Categorical, pl.Enum, pl.Boolean, pl.Null)
    if not (is_name or kind.is_integer()):
        raise DataError(
            f"column {name!r} of the items is {kind}, which few items share: give it in classes, "
            "as text or integers, or leave it out of the attributes",
            column=name,
            name="attributes",
            value=name,
        )
    pairs = pairs.with_columns(pl.col("value").cast(pl.String))
    pairs = pairs.filter(pl.col("value").is_not_null() & (pl.col("value") != "")).unique()
    pairs = pairs.filter(pl.len().over("value") > 1).sort("value", "item")
    if pairs.is_empty():
        raise DataError(
            f"no two items share a value of column {name!r}: it makes no edges, leave it out of "
            "the attributes",
            column=name,
            name="attributes",
            value=name,
        )
    value_P = pairs["value"].rank("dense").to_numpy().astype(np.int64) - 1
    return pairs["item"].to_numpy(), value_P, int(value_P.max(initial=-1)) + 1

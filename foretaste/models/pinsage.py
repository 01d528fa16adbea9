r"""PinSage, a retriever: a node's vector is computed from its own inputs and its neighbours'.

.. math::
    n_u = \sum_{v \in N(u)} \alpha_{uv} \, \mathrm{ReLU}(Q h_v + q), \quad
    h'_u = \frac{W [h_u ; n_u] + w}{\lVert W [h_u ; n_u] + w \rVert}

Ying et al., "Graph Convolutional Neural Networks for Web-Scale Recommender Systems", KDD 2018,
https://arxiv.org/abs/1806.01973

Departures: users are nodes like items, so that a user's vector is computed in the same way; nodes
may have an id embedding besides their features; walks find neighbours once before training, not in
each batch; the last layer's state is the vector, without a ReLU after W and without the two dense
layers on top (both lose accuracy where nodes have ids); the loss and its negatives are the
objective's.

A new user is a new node whose neighbours are the distinct items of the history, with equal weights:
the same convolutions are applied to the items' messages that `finish` keeps. This needs a table of
items per layer in the bundle, and no regression.

Shape legend: B users, P distinct items of their histories, V requested items, I items of the
catalogue, U users, D width, H width of messages, K layers, S nodes of the lowest layer, X users and
items.
"""

from functools import partial
from typing import ClassVar, Literal, NamedTuple, final

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from pydantic import Field
from torch import Tensor, nn

from foretaste.config import ChoiceConfig, Count, Depth, Positive, RangeConfig, Space, Usual
from foretaste.data.batch import Queries
from foretaste.data.draws import draw_for_keys, fill_blocks
from foretaste.data.features import Features, FieldTable
from foretaste.data.graph import Graph, GraphConfig
from foretaste.data.interactions import Interactions
from foretaste.data.walks import (
    Neighbourhoods,
    PairFrontier,
    make_frontier,
    most_visited,
    uniform_neighbours,
)
from foretaste.errors import ConfigError
from foretaste.models.base import PairVectors, Retriever, Similarity, as_item, as_query
from foretaste.models.layers.embedding import Fusion
from foretaste.models.layers.nodes import NodeInputs, take_shapes
from foretaste.models.layers.pooling import Convolve, generate, weighted_bag
from foretaste.models.layers.table_kinds import IdConfig


class PinSageConfig(IdConfig):
    """Settings of PinSage."""

    kind: Literal["pinsage"] = "pinsage"
    tuning: ClassVar[Space] = {
        "embedding_dim": ChoiceConfig(choices=(32, 64, 128)),
        "num_neighbours": RangeConfig(low=5, high=20, log=True),
        "temperature": RangeConfig(low=0.05, high=0.5, log=True),
    }
    usual: ClassVar[Usual] = Usual(
        objective={"kind": "pairs", "loss": "sampled_softmax", "negatives": 2048},
        training={"learning_rate": 5e-3},
    )
    """As MF, but corrected for the sampling probabilities of negatives, and without l2, because
    cosines are bounded."""
    embedding_dim: Count = 64
    """Width of inputs, states and vectors."""
    message_dim: Count | None = None
    """Width of a neighbour's message. None: embedding_dim."""
    num_layers: Depth = 2
    """Number of pooling layers."""
    neighbours: Literal["ppr", "uniform"] = "ppr"
    """"ppr": the nodes that random walks visit most, weighted by the visits. "uniform": direct
    neighbours, drawn uniformly, as in GraphSAGE."""
    num_neighbours: Count = 10
    """Maximum number of neighbours that a node pools."""
    walks: Count = 200
    """Number of random walks from each node."""
    hops: Count = 3
    """Length of a walk."""
    restart: float = Field(default=0.0, ge=0, lt=1)
    """Probability that a walk returns to its start before a hop."""
    ids: bool = True
    """Whether users and items have an embedding, besides their features."""
    fusion: Fusion = "gate"
    """How a node's features become one vector, which is added to the vector of its id."""
    id_dropout: float = Field(default=0.05, ge=0, lt=1)
    """Share of a batch's nodes whose id is hidden in training. One learned vector replaces them; it
    also stands for new users and items."""
    cold_share: float = Field(default=0.0, ge=0, lt=1)
    """Share of a batch's nodes that training shows without id and neighbours, so that the features
    alone learn to represent a node."""
    similarity: Similarity = "cosine"
    """How two vectors are compared: by dot product, or by cosine."""
    temperature: Positive = 0.1
    """Divisor of the scores; below 1 for the cosine, whose range is small."""
    init_std: Positive = 0.1
    """Standard deviation of the initial id vectors."""
    graph: GraphConfig = Field(default_factory=GraphConfig)
    """Which edges there are besides those of events."""


class _Tables(NamedTuple):
    """The vectors that answers are computed from."""

    vector_XD: Tensor
    """Vectors of users, then items, before the similarity."""
    message_KIH: Tensor
    """The messages of items in each layer."""


@final
class PinSage(Retriever):
    """The network. Without a graph it only answers, from the tables of `finish`."""

    learns_by = "pairs"

    def __init__(
        self,
        config: PinSageConfig,
        *,
        num_users: int,
        num_items: int,
        graph: Graph | None = None,
        features: Features | None = None,
    ) -> None:
        """Make the network, and find each node's neighbours if there is a graph.

        Args:
            config: The settings.
            num_users: Users that training knows.
            num_items: Items of the catalogue.
            graph: Users, items, and further nodes. Walks pass through further nodes, but these have
                no inputs and so are not neighbours.
            features: Features of users and items.

        Raises:
            ConfigError: There are neither ids nor features of items.
        """
        super().__init__()
        width, message_width = config.embedding_dim, config.message_dim or config.embedding_dim
        self.config, self.num_users, self.num_items = config, num_users, num_items
        self.inputs = NodeInputs(
            num_users=num_users,
            num_items=num_items,
            embedding_dim=width,
            ids=config.ids,
            teach_newcomer=config.id_dropout > 0 or config.cold_share > 0,
            init_std=config.init_std,
            features=features,
            fusion=config.fusion,
            table=config.table,
        )
        self.convolutions = nn.ModuleList(
            Convolve(width, message_width, width) for _ in range(config.num_layers)
        )
        self.neighbourhoods = None if graph is None else find_neighbours(config, graph)
        self.num_items_U: Tensor
        self.vector_XD: Tensor
        self.message_KIH: Tensor
        self.register_buffer("num_items_U", torch.full((num_users,), -1))
        self.register_buffer("vector_XD", torch.empty(0, width))
        self.register_buffer("message_KIH", torch.empty(config.num_layers, 0, message_width))
        self.register_load_state_dict_pre_hook(take_shapes)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        if self.neighbourhoods is not None:
            self.inputs.linked_X.copy_(
                torch.from_numpy(self.neighbourhoods.neighbour_VT[:, 0] >= 0)
            )
        self._kept: _Tables | None = None

    def prepare(self, queries: Queries, item_V: Int64[Tensor, " V"]) -> PairFrontier:
        """Find the distinct nodes that a batch needs in each layer.

        Raises:
            ConfigError: The model was made without a graph.
        """
        wanted = torch.cat([queries.user_B, item_V + self.num_users]).cpu()
        node_R, row = wanted.unique(return_inverse=True)
        return PairFrontier(
            frontier=make_frontier(
                self._neighbours(), node_R.numpy(), num_layers=self.config.num_layers
            ),
            user_row_B=row[: len(queries)],
            item_row_V=row[len(queries) :],
        )

    def forward(
        self,
        queries: Queries,
        item_V: Int64[Tensor, " V"],
        prepared: PairFrontier | None = None,
    ) -> PairVectors:
        """Return the vectors of known users and of some items.

        Args:
            queries: The users.
            item_V: The items.
            prepared: The result of `prepare`, if it was called already.

        Raises:
            ConfigError: The model was made without a graph.
        """
        needs = prepared or self.prepare(queries, item_V).to(item_V.device)
        node_S, config = needs.frontier.input_S, self.config
        hidden_S = self._drawn(config.id_dropout, node_S)
        alone_S = self._drawn(config.cold_share, node_S)
        input_SD = self.inputs(node_S, hidden_S | alone_S)
        h_SD, below_R = input_SD, torch.arange(len(node_S), device=node_S.device)
        for convolve, layer in zip(self._layers(), needs.frontier.layers, strict=True):
            below_R = below_R.index_select(0, layer.self_R)
            alone_R = alone_S[below_R] if config.cold_share else None
            h_SD = convolve(h_SD, layer, alone_R=alone_R)
        return PairVectors(
            query_BD=self._query(h_SD.index_select(0, needs.user_row_B)),
            item_VD=self._item(h_SD.index_select(0, needs.item_row_V)),
            base=(
                input_SD.index_select(0, below_R[needs.user_row_B]),
                input_SD.index_select(0, below_R[needs.item_row_V]),
            ),
        )

    def encode(self, queries: Queries) -> Float[Tensor, "B D"]:
        """Return each user's vector: the learned one, or that of a new node.

        A training user with a different history is also a new node, with the user's own inputs.
        """
        tables, user_B = self._answers(), queries.user_B
        if self.num_users == 0:
            return self._query(self._new_nodes(queries, tables.message_KIH))
        own_BD = tables.vector_XD[user_B.clamp(min=0)]
        told_B = torch.bincount(self._distinct(queries)[0], minlength=len(queries))
        taught_B = self.num_items_U[user_B.clamp(min=0)]
        is_tied_B = self.known_users()[user_B.clamp(min=0)]
        as_taught_B = (user_B >= 0) & ((taught_B < 0) | is_tied_B & (told_B == taught_B))
        if as_taught_B.all():
            return self._query(own_BD)
        new_BD = self._new_nodes(queries, tables.message_KIH)
        return self._query(own_BD.where(as_taught_B.unsqueeze(1), new_BD))

    def known_users(self) -> Bool[Tensor, " U"]:
        """Return a mask of users with neighbours: by events, or by links to other users."""
        return self.inputs.linked_X[: self.num_users]

    def items(self, item_V: Int64[Tensor, " V"]) -> Float[Tensor, "V D"]:
        """Return some items' vectors."""
        return self._item(self._answers().vector_XD[self.num_users + item_V])

    def known_items(self) -> Bool[Tensor, " I"]:
        """Return a mask of items with neighbours or a known feature."""
        return self.inputs.linked_X[self.num_users :] | self.inputs.told_I

    @property
    def reads_profiles(self) -> bool:
        """Whether the model has features of users."""
        return self.inputs.user_fields is not None

    @property
    def scores_new_items(self) -> bool:
        """Whether the model has features of items."""
        return self.inputs.item_fields is not None

    def item_from_features(self, table: FieldTable) -> Float[Tensor, "R D"]:
        """Return vectors of items without a row, which are nodes without neighbours."""
        h_RD = self.inputs.items_from_features(table)
        for convolve in self._layers():
            h_RD = convolve.updated(h_RD, h_RD.new_zeros(len(h_RD), convolve.message_width))
        return self._item(h_RD)

    def begin(self, events: Interactions) -> None:
        """Record the number of items of each user, which decides the vector used in an answer."""
        super().begin(events)
        pair_E = events.user_idx.astype(np.int64) * self.num_items + events.item_idx
        user_P = torch.from_numpy(pair_E).unique() // self.num_items
        self.num_items_U.copy_(torch.bincount(user_P, minlength=self.num_users))

    def learn_new_users(self, events: Interactions) -> None:
        """Compute every vector; several processes share this work."""
        self._answers()

    def finish(self) -> None:
        """Compute and keep what answers need: every vector, and items' messages to new users."""
        self.vector_XD, self.message_KIH = self._generate()

    def train(self, mode: bool = True) -> "PinSage":  # noqa: FBT001, FBT002  # torch's signature
        """Clear all results that were computed from earlier weights, also those of `finish`."""
        self._kept = None
        if mode and self.neighbourhoods is not None:
            self.vector_XD = self.vector_XD[:0].clone()
            self.message_KIH = self.message_KIH[:, :0].clone()
        super().train(mode)
        return self

    def _answers(self) -> _Tables:
        if len(self.vector_XD):
            return _Tables(self.vector_XD, self.message_KIH)
        if self._kept is not None:
            return self._kept
        tables = self._generate()
        if not self.training:
            self._kept = tables
        return tables

    @torch.no_grad()
    def _generate(self) -> _Tables:
        """Compute all nodes, layer by layer."""
        device, first = self.inputs.linked_X.device, self.num_users
        layers, width = self._layers(), self.message_KIH.shape[2]
        message_KIH = torch.zeros(len(layers), self.num_items, width, device=device)

        def inputs(low: int, high: int) -> Tensor:
            input_BD: Tensor = self.inputs(torch.arange(low, high, device=device))
            return input_BD

        def keep(number: int, low: int, h_BD: Tensor) -> None:
            item_BD = h_BD[max(0, first - low) :]
            start = max(0, low - first)
            message_KIH[number, start : start + len(item_BD)] = layers[number].messages(item_BD)

        state = generate(layers, self._neighbours(), inputs, on_block=keep, device=device)
        fill_blocks(message_KIH)
        return _Tables(state.read(0, state.num_rows).to(device), message_KIH)

    def _layers(self) -> list[Convolve]:
        return [layer for layer in self.convolutions if isinstance(layer, Convolve)]

    def _neighbours(self) -> Neighbourhoods:
        if self.neighbourhoods is None:
            raise ConfigError("PinSage was made without a graph: it can answer, but not learn")
        return self.neighbourhoods

    def _drawn(self, share: float, node_S: Tensor) -> Tensor:
        """Draw a share of the nodes, in training only."""
        if not (self.training and share):
            return torch.zeros_like(node_S, dtype=torch.bool)
        return draw_for_keys(node_S, partial(torch.rand, device=node_S.device)) < share

    def _new_nodes(self, queries: Queries, message_KIH: Tensor) -> Float[Tensor, "B D"]:
        """Convolve users whose neighbours are the distinct items of their histories."""
        row_P, item_P = self._distinct(queries)
        length_B = torch.bincount(row_P, minlength=len(queries))
        offsets_B1 = F.pad(length_B.cumsum(0), (1, 0))
        weight_P = length_B.reciprocal()[row_P]
        h_BD = self.inputs.users(queries)
        for convolve, message_IH in zip(self._layers(), message_KIH, strict=True):
            said_BH = weighted_bag(message_IH, item_P, weight_P, offsets_B1)
            h_BD = convolve.updated(h_BD, said_BH)
        return h_BD

    def _distinct(self, queries: Queries) -> tuple[Int64[Tensor, " P"], Int64[Tensor, " P"]]:
        """Return each history's distinct training items: row and item, ascending."""
        row_N = torch.repeat_interleave(queries.offsets_B1.diff())
        known_N = self.inputs.linked_X[self.num_users + queries.history_N]
        key_P = (row_N * self.num_items + queries.history_N)[known_N].unique()
        return key_P // self.num_items, key_P % self.num_items

    def _query(self, vector_BD: Tensor) -> Tensor:
        return as_query(vector_BD, self.config.similarity, self.config.temperature)

    def _item(self, vector_VD: Tensor) -> Tensor:
        return as_item(vector_VD, self.config.similarity)


def find_neighbours(config: PinSageConfig, graph: Graph) -> Neighbourhoods:
    """Find the neighbours of users and items, with a seed from torch's global generator."""
    seed, last = int(torch.randint(2**63 - 1, ())), graph.num_users + graph.num_items
    nodes, counted = np.arange(last), (0, last)
    top = min(config.num_neighbours, last)  # so many there are
    if config.neighbours == "uniform":
        return uniform_neighbours(graph, top=top, seed=seed, nodes=nodes, counted=counted)
    return most_visited(
        graph,
        top=top,
        seed=seed,
        walks=config.walks,
        hops=config.hops,
        restart=config.restart,
        nodes=nodes,
        counted=counted,
    )

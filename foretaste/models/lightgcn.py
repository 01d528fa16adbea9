r"""LightGCN, a retriever: each user and item is a mean of vectors propagated over the graph.

.. math:: E^{(l+1)} = D^{-1/2} A D^{-1/2} E^{(l)}, \quad
          E = \frac{1}{L+1} \sum_{l=0}^{L} E^{(l)}, \quad s_{ui} = e_u \cdot e_i

He et al., "LightGCN: Simplifying and Powering Graph Convolution Network for Recommendation",
SIGIR 2020, https://arxiv.org/abs/2002.02126

Noise and contrast: Yu et al., "Are Graph Augmentations Necessary? Simple Graph Contrastive
Learning for Recommendation", SIGIR 2022, https://arxiv.org/abs/2112.08679, and "XSimGCL", TKDE
2023, https://arxiv.org/abs/2209.02544. **Departures**: layer 0 stays in the mean; the contrast
compares a sample of the batch's users and of all its items.

The transformation: Wang et al., "Neural Graph Collaborative Filtering", SIGIR 2019,
https://arxiv.org/abs/1905.08108. **Departures**: no dropout of messages; as in its authors' code,
layers are scaled to length 1 before they are concatenated.

Further departures: edges of other kinds are added to those of the events, with weights
(`GraphConfig`); a node without edges is 0; `answer_users` computes the vector of a new user.

`propagate` is the first equation, line by line. `GraphConv` computes the same vectors and
gradients, but only those of a batch's nodes: on Gowalla (71,000 nodes, 2 million edges) in 40 % of
the processor time. The tests compare the two. To try another equation, change `propagate` and set
`propagation = "reference"`: training, answers and new users then use only this function.

Shape legend: B users, V items of a batch, I items of the catalogue, N nodes of the graph, R rows,
D width of layer 0, W width of a node's message, F width of the answer.
"""

from collections.abc import Callable, Mapping
from typing import ClassVar, Literal, final

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from pydantic import Field, model_validator
from torch import Tensor, nn

from foretaste.config import (
    ChoiceConfig,
    Count,
    CountOrZero,
    Depth,
    Positive,
    RangeConfig,
    Space,
    Usual,
    Weight,
)
from foretaste.data.batch import Queries
from foretaste.data.graph import Graph, GraphConfig
from foretaste.errors import ConfigError
from foretaste.models.base import PairVectors, Retriever, Similarity, as_item, as_query
from foretaste.models.layers.graph_conv import GraphConv, Perturbation
from foretaste.models.layers.nodes import (
    NodeTables,
    PlacedNodes,
    answer_users,
    place,
)
from foretaste.models.layers.table import Table
from foretaste.models.layers.table_kinds import FactorConfig, Init
from foretaste.models.mf import MFConfig


class LightGCNConfig(FactorConfig):
    """Settings of LightGCN."""

    kind: Literal["lightgcn"] = "lightgcn"
    tuning: ClassVar[Space] = {
        "embedding_dim": ChoiceConfig(choices=(32, 64, 128)),
        "num_layers": ChoiceConfig(choices=(1, 2, 3, 4)),
        "edge_dropout": RangeConfig(low=0.0, high=0.3),
    }
    usual: ClassVar[Usual] = Usual(
        objective={**MFConfig.usual.objective, "l2": 0.01},
        training={"learning_rate": 2e-2, "ema_decay": 0.99},
        l2_by_counts="always",
    )
    """As MF, with a tenth of its l2 and twice its learning rate: propagation averages vectors, so
    vectors of layer 0 must grow more until their products express more than popularity. On
    MovieLens-100K, an l2 of .03 keeps the model at popularity's level. Without the average, test
    NDCG@10 is .076 (.085) on Gowalla, .075 (.078) on MovieLens-100K and .053 (.054) on S3-Rec's
    Last.fm.
    """
    init: Init = "random"
    """The vectors of layer 0 before training, "random", "svd" or "auto" as for MF. They are drawn
    by default, because propagation averages the vectors of neighbours from the first step on."""
    embedding_dim: Count = 64
    """Width of the vectors."""
    num_layers: Depth = 3
    """L, the number of propagation layers."""
    similarity: Similarity = "dot"
    """How two vectors are compared: by dot product, or by cosine."""
    temperature: Positive = 1.0
    """Divisor of the scores; below 1 for the cosine, whose range is small."""
    init_std: Positive = 0.1
    """Standard deviation of the initial vectors."""
    noise: Weight = 0.0
    """Length of the random vector added to each node after each layer in training (SimGCL)."""
    contrast_layer: CountOrZero = 0
    """Layer whose vectors are contrasted with the final ones (XSimGCL); 0: none. The objective's
    `contrast` is its weight."""
    contrast_rows: Count = 2048
    """Number of users, and number of items, of a batch that are contrasted."""
    edge_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of edges left out at each step."""
    propagation: Literal["fast", "reference"] = "fast"
    """"fast": computes only what a batch needs, with its own backward pass. "reference": the
    equation as it is written in the model's file; slower, for those who want to change it."""
    transform: bool = False
    """Whether layers are NGCF's: each multiplies by matrices and applies an activation, and the
    layers are concatenated. An ablation: slower, and worse in LightGCN's paper."""
    graph: GraphConfig = Field(default_factory=GraphConfig)
    """The edges besides those of events."""

    @model_validator(mode="after")
    def _layers_fit(self) -> "LightGCNConfig":
        if self.contrast_layer > self.num_layers:
            raise ValueError(
                f"contrast_layer {self.contrast_layer} is beyond num_layers {self.num_layers}"
            )
        if not self.is_fast and (self.noise or self.contrast_layer or self.edge_dropout):
            slow = "transform" if self.transform else 'propagation = "reference"'
            raise ValueError(f"{slow} goes without noise, contrast_layer and edge_dropout")
        return self

    @property
    def is_fast(self) -> bool:
        """Whether `GraphConv` propagates, instead of an equation layer by layer."""
        return self.propagation == "fast" and not self.transform


Send = Callable[[Tensor], Tensor]
r"""Maps a vector for each node to the propagated vectors :math:`D^{-1/2} A D^{-1/2} E`."""


def propagate(
    layer_0_ND: Float[Tensor, "N D"], send: Send, *, num_layers: int
) -> Float[Tensor, "N D"]:
    """Return each node's vector: the mean of the propagated vectors after 0, 1, … and L steps."""
    layers = [layer_0_ND]
    for _ in range(num_layers):
        layers.append(send(layers[-1]))
    return torch.stack(layers).mean(dim=0)


@final
class LightGCN(Retriever):
    """The network: one table, which is layer 0, and the graph of the propagation.

    In evaluation mode, it keeps propagated vectors. Loaded from a file, it has no graph and answers
    from the tables of `finish`.
    """

    learns_by = "pairs"

    def __init__(
        self, config: LightGCNConfig, *, num_users: int, num_items: int, graph: Graph | None = None
    ) -> None:
        """Make the network.

        Args:
            config: The settings.
            num_users: Number of training users.
            num_items: Number of items in the catalogue.
            graph: The graph of the training events; None: the state is loaded next, without
                training.
        """
        super().__init__()
        self.config, self.init, self.recency = config, config.init, config.known_recency
        self.num_users, self.num_items = num_users, num_items
        num_nodes = num_users + num_items if graph is None else graph.num_nodes
        width = config.embedding_dim
        num_others = num_nodes - num_users - num_items
        self.user_table, self.item_table, others = config.table.make_several(
            (num_users, num_items, num_others), width, std=config.init_std
        )
        self.other_table = others if num_others else None
        self.register_load_state_dict_pre_hook(_make_others)  # type: ignore[no-untyped-call]  # torch
        num_mixes = config.num_layers if config.transform else 0
        self.mixes = nn.ModuleList(_Mix(width) for _ in range(num_mixes))
        self.graph = graph
        self.conv = None if graph is None else GraphConv(graph)
        self.change = Perturbation(noise=config.noise, edge_dropout=config.edge_dropout)
        self.placed = PlacedNodes()
        self._tables: NodeTables | None = None
        if graph is not None:
            first, untied_V = 0, torch.from_numpy(graph.degree_V == 0)
            for table in self._node_tables():
                table.zero_rows(untied_V[first : first + table.num_rows])
                first += table.num_rows

    def forward(self, queries: Queries, item_V: Int64[Tensor, " V"]) -> PairVectors:
        """Return the vectors of known users and of some items, after one propagation.

        Raises:
            ConfigError: The model was made without a graph.
        """
        num_B, node_R = len(queries), torch.cat([queries.user_B, self.num_users + item_V])
        conv = self._made()[1]
        if self.config.is_fast:
            vector_RF, base_RD, view_RF = conv(
                self._layer_0(),
                node_R,
                num_layers=self.config.num_layers,
                view_layer=self.config.contrast_layer,
                change=self.change if self.training else None,
            )
        else:
            layer_0_ND = self._layer_0()
            vector_NF = self._equation(layer_0_ND, conv.product)
            vector_RF = F.embedding(node_R, vector_NF)
            base_RD = view_RF = F.embedding(node_R, layer_0_ND)
        views: tuple[tuple[Tensor, Tensor], ...] = ()
        if self.config.contrast_layer:
            few = self.config.contrast_rows
            rows = (_some_rows(queries.user_B, few), num_B + _some_rows(item_V, few))
            views = tuple((vector_RF[row_S], view_RF[row_S]) for row_S in rows)
        return PairVectors(
            query_BD=self._query(vector_RF[:num_B]),
            item_VD=self._item(vector_RF[num_B:]),
            base=(base_RD[:num_B], base_RD[num_B:]),
            views=views,
        )

    def encode(self, queries: Queries) -> Float[Tensor, "B F"]:
        """Return each user's vector: from training, or from the history; 0 without a history."""
        tables = self._known()
        return self._query(
            answer_users(queries, tables, self.user_table, self._combine, self.recency)
        )

    def known_users(self) -> Bool[Tensor, " U"]:
        """Return a mask of users with an edge: an event, or a link to another user."""
        return self._known().strength_U > 0

    def items(self, item_V: Int64[Tensor, " V"]) -> Float[Tensor, "V F"]:
        """Return some items' vectors; 0 for items without an edge."""
        return self._item(self._known().item_IF[item_V])

    def known_items(self) -> Bool[Tensor, " I"]:
        """Return a mask of items without events that have edges to other items or attributes."""
        return self._known().placed_I

    def finish(self) -> None:
        """Keep the tables that answers need, so that they need no graph."""
        self.placed.keep(self._known())

    def train(self, mode: bool = True) -> "LightGCN":  # noqa: FBT001, FBT002  # torch's own form
        """Set the mode, and clear the cache of propagated vectors."""
        self._tables = None
        return super().train(mode)

    def _known(self) -> NodeTables:
        if self.graph is None:
            return self.placed.tables()
        if self.training or self._tables is None:
            self._tables = self._propagated()
        return self._tables

    @torch.no_grad()
    def _propagated(self) -> NodeTables:
        """Propagate the vectors and record each node's sent and received vectors at each layer."""
        graph, conv = self._made()
        sent_NW = self._sent(conv)
        sent_NW = sent_NW * conv.scale_V.to(sent_NW.dtype).unsqueeze(1)
        received_NW = conv.sum_neighbours(sent_NW)
        strength_N = conv.strength_V.to(sent_NW.dtype)
        final_NF = place(self._layer_0(), received_NW, strength_N, self._combine)
        end = self.num_users + self.num_items
        users, items = slice(0, self.num_users), slice(self.num_users, end)
        tied_I = torch.from_numpy(graph.degree_V[items] > 0)
        has_user_I = torch.from_numpy(graph.count_neighbours(0, self.num_users)[items] > 0)
        events_U = torch.from_numpy(graph.count_neighbours(self.num_users, end)[users])
        device = final_NF.device
        return NodeTables(
            user_UF=final_NF[users],
            item_IF=final_NF[items],
            sent_VW=sent_NW,
            received_UW=received_NW[users],
            strength_U=strength_N[users],
            events_U=events_U.to(device),
            tied_I=tied_I.to(device),
            placed_I=(tied_I & ~has_user_I).to(device),
        )

    def _sent(self, conv: GraphConv) -> Float[Tensor, "N W"]:
        """Return each node's messages of all steps, concatenated, or their sum if it is fast."""
        sent = [self._layer_0()]
        if self.config.is_fast:
            for _ in range(1, self.config.num_layers):
                sent.append(conv.product(sent[-1]))
            return torch.stack(sent).sum(dim=0)

        def send(layer_ND: Tensor) -> Tensor:
            sent.append(layer_ND)
            return conv.product(layer_ND)

        self._equation(sent.pop(), send)
        return torch.cat(sent, dim=1)

    def _combine(self, layer_0_BD: Tensor, received_BW: Tensor) -> Tensor:
        """Return some nodes' vectors from the vectors that they received in each step."""
        if self.config.is_fast:
            return (layer_0_BD + received_BW) / (self.config.num_layers + 1)
        received = iter(received_BW.split(self.config.embedding_dim, dim=1))
        return self._equation(layer_0_BD, lambda _: next(received))

    def _equation(self, layer_0_ND: Tensor, send: Send) -> Tensor:
        if not self.mixes:
            return propagate(layer_0_ND, send, num_layers=self.config.num_layers)
        layers = [layer_0_ND]
        for mix in self.mixes:
            layers.append(mix(layers[-1], send(layers[-1])))
        return _side_by_side(layers)

    def _node_tables(self) -> tuple[Table, ...]:
        own = self.user_table, self.item_table
        return own if self.other_table is None else (*own, self.other_table)

    def _layer_0(self) -> Float[Tensor, "N D"]:
        """Return the rows of all nodes, because the graph needs all of them in every step."""
        return torch.cat([table.block(0, table.num_rows) for table in self._node_tables()])

    def _made(self) -> tuple[Graph, GraphConv]:
        if self.graph is None or self.conv is None:
            raise ConfigError(
                "LightGCN learns on a graph: give build_model the graph of the events"
            )
        return self.graph, self.conv

    def _query(self, vector_BF: Tensor) -> Tensor:
        return as_query(vector_BF, self.config.similarity, self.config.temperature)

    def _item(self, vector_VF: Tensor) -> Tensor:
        return as_item(vector_VF, self.config.similarity)


@final
class _Mix(nn.Module):
    r"""NGCF's layer, with the received vector p: LeakyReLU(W_1 (e + p) + W_2 (p \odot e))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.own, self.product = nn.Linear(width, width), nn.Linear(width, width)
        for linear in (self.own, self.product):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, own_BD: Tensor, received_BD: Tensor) -> Tensor:
        mixed_BD = self.own(own_BD + received_BD) + self.product(own_BD * received_BD)
        return F.leaky_relu(mixed_BD, 0.2)


def _make_others(model: LightGCN, state: Mapping[str, Tensor], prefix: str, *_: object) -> None:
    """Make the table of nodes that are neither users nor items, if there are any to load."""
    found = next((v for name, v in state.items() if name.startswith(prefix + "other_table.")), None)
    if found is not None and model.other_table is None:
        model.other_table = model.config.table.make(len(found), model.config.embedding_dim)


def _side_by_side(layers: list[Tensor]) -> Tensor:
    return torch.cat([layers[0], *(F.normalize(layer_BD, dim=1) for layer_BD in layers[1:])], 1)


def _some_rows(index_R: Tensor, most: int) -> Int64[Tensor, " S"]:
    """Return the positions of distinct indices, sampled if there are more than `most`."""
    distinct, inverse_R = index_R.unique(return_inverse=True)
    place_R = torch.arange(len(index_R), device=index_R.device)
    place = torch.empty_like(distinct).scatter_(0, inverse_R, place_R)
    return place[torch.randperm(len(place), device=place.device)[:most]]

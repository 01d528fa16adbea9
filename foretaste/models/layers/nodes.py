"""Nodes of a graph: their input vectors, and the vectors of new nodes.

A new node has its own degree, and its vector of layer 0 is 0. The messages of its neighbours at
each layer are known from training, so its vector is one sum of rows. This is **approximate**,
because the new edges would also change the neighbours a little: their degrees, and their layers by
the message of the new node.

Shape legend: S nodes, B queries, U users, I items, X users and items, V nodes, D width of layer 0,
W width of a message, F width of the answer, N events, P distinct events.
"""

from collections.abc import Callable
from itertools import chain
from typing import NamedTuple, final

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from foretaste.data.batch import Queries, newest_events
from foretaste.data.features import Features, FieldTable
from foretaste.errors import ConfigError
from foretaste.models.layers.embedding import Fusion, fields_of_items, fields_of_users, known_fields
from foretaste.models.layers.table import Table
from foretaste.models.layers.table_kinds import TableConfig


@final
class NodeInputs(nn.Module):
    """Input vectors of users, then items. All nodes without an id share one learned vector.

    A node without edges has no vector, because it cannot be trained.
    """

    linked_X: Tensor
    """True for nodes with an edge; part of the state."""

    def __init__(
        self,
        *,
        num_users: int,
        num_items: int,
        embedding_dim: int,
        ids: bool,
        teach_newcomer: bool,
        init_std: float,
        features: Features | None,
        fusion: Fusion,
        table: TableConfig,
    ) -> None:
        """Make untrained weights.

        Args:
            num_users: Number of training users.
            num_items: Number of items in the catalogue.
            embedding_dim: D.
            ids: Whether nodes have their own vectors.
            teach_newcomer: Whether training sometimes hides ids; otherwise new nodes start from 0.
            init_std: Standard deviation of the initial id vectors.
            features: Features of users and items.
            fusion: How a node's features become one vector.
            table: The kind of table for the vectors of ids.

        Raises:
            ConfigError: There are neither ids nor features of items, or features belong to a
                different number of users or items.
        """
        super().__init__()
        self.num_users = num_users
        self.user_fields, self.item_fields = (
            known_fields(given, embedding_dim=embedding_dim, fusion=fusion, table=table)
            for given in (
                fields_of_users(features, num_users),
                fields_of_items(features, num_items),
            )
        )
        if not ids and self.item_fields is None:
            raise ConfigError(
                "ids = false and no features of items leave the model without input: keep the "
                "ids, or give the items features",
                name="ids",
                value=False,
            )
        self.embedding_dim = embedding_dim
        self.user_table: Table | None = None
        self.item_table: Table | None = None
        self.everybody_1D: nn.Parameter | None = None
        if ids:
            sizes = num_users, num_items, 1
            self.user_table, self.item_table, last = table.make_several(
                sizes, embedding_dim, std=init_std
            )
            self.everybody_1D = nn.Parameter(
                last.block(0, 1).detach() * teach_newcomer, requires_grad=teach_newcomer
            )
        self.register_buffer("linked_X", torch.ones(num_users + num_items, dtype=torch.bool))

    def forward(
        self, node_S: Int64[Tensor, " S"], hidden_S: Bool[Tensor, " S"] | None = None
    ) -> Float[Tensor, "S D"]:
        """Return the input vectors of nodes.

        Args:
            node_S: Nodes in ascending order.
            hidden_S: True = hide the id.
        """
        has_id_S = self.linked_X.index_select(0, node_S)
        input_SD = self._own(node_S, has_id_S if hidden_S is None else has_id_S & ~hidden_S)
        if self.user_fields is None and self.item_fields is None:
            return input_SD
        num_users = int((node_S < self.num_users).sum())
        given = [
            input_SD.new_zeros(len(row_R), self.embedding_dim) if fields is None else fields(row_R)
            for fields, row_R in (
                (self.user_fields, node_S[:num_users]),
                (self.item_fields, node_S[num_users:] - self.num_users),
            )
        ]
        return input_SD + torch.cat(given)

    def users(self, queries: Queries) -> Float[Tensor, "B D"]:
        """Return the input vectors of users, known or not."""
        user_B, node_B = queries.user_B, queries.user_B.clamp(min=0)
        input_BD = self._own(node_B, (user_B >= 0) & self.linked_X[node_B])
        if self.user_fields is None:
            return input_BD
        told_BD: Tensor = self.user_fields(user_B, queries.profile)
        return input_BD + told_BD

    def items_from_features(self, table: FieldTable) -> Float[Tensor, "R D"]:
        """Return the input vectors of items without a row.

        Raises:
            ConfigError: There are no features of items.
        """
        if self.item_fields is None:
            raise ConfigError(
                "the model was trained without features of items, so it cannot represent new ones"
            )
        told_RD: Tensor = self.item_fields.encoder(table)
        nobody_R = torch.zeros(len(table), dtype=torch.int64, device=told_RD.device)
        return self._own(nobody_R, nobody_R > 0) + told_RD

    @property
    def told_I(self) -> Bool[Tensor, " I"]:
        """True for items with a known feature."""
        if self.item_fields is None:
            return torch.zeros_like(self.linked_X[self.num_users :])
        return self.item_fields.known_R

    def _own(self, node_S: Tensor, has_id_S: Tensor) -> Tensor:
        """Return id vectors of ascending nodes, or the shared vector for nodes without an id."""
        if self.user_table is None or self.item_table is None or self.everybody_1D is None:
            return torch.zeros(len(node_S), self.embedding_dim, device=node_S.device)
        num_users = int((node_S < self.num_users).sum())
        row_S = node_S.where(has_id_S, -1)
        item_R = (row_S[num_users:] - self.num_users).clamp(min=-1)
        id_SD = torch.cat([self.user_table(row_S[:num_users]), self.item_table(item_R)])
        return id_SD.where(has_id_S.unsqueeze(1), self.everybody_1D)


Combine = Callable[[Tensor, Tensor], Tensor]
"""Maps layer 0 (B, D) and the neighbours' messages of each layer (B, W) to the answer (B, F)."""


class NodeTables(NamedTuple):
    """The results of a trained graph."""

    user_UF: Float[Tensor, "U F"]
    item_IF: Float[Tensor, "I F"]
    sent_VW: Float[Tensor, "V W"]
    """The message of each node along an edge of weight 1; 0 for isolated nodes."""
    received_UW: Float[Tensor, "U W"]
    """Sum of the messages to each user, not yet divided by the root of the degree."""
    strength_U: Float[Tensor, " U"]
    """Degree of each user: the sum of its edge weights."""
    events_U: Int64[Tensor, " U"]
    """Number of distinct training items of each user."""
    tied_I: Bool[Tensor, " I"]
    """True for items with an edge."""
    placed_I: Bool[Tensor, " I"]
    """True for items with edges, but no edge to a user."""


@final
class PlacedNodes(nn.Module):
    """Keeps the tables as buffers, empty until `keep`, and answers from them."""

    def __init__(self) -> None:
        super().__init__()
        kinds = {"events_U": torch.int64, "tied_I": torch.bool, "placed_I": torch.bool}
        for name in NodeTables._fields:
            shape = (0,) if name in (*kinds, "strength_U") else (0, 0)
            self.register_buffer(name, torch.empty(shape, dtype=kinds.get(name, torch.float32)))
        self.register_load_state_dict_pre_hook(take_shapes)  # type: ignore[no-untyped-call]  # torch

    def keep(self, tables: NodeTables) -> None:
        """Store tables, which are saved with the model."""
        for name, table in tables._asdict().items():
            setattr(self, name, table.detach().clone())

    def tables(self) -> NodeTables:
        """Return the stored results."""
        return NodeTables(*(self.get_buffer(name) for name in NodeTables._fields))


def take_shapes(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    """Give a module's tensors the shapes of those to be loaded.

    For `register_load_state_dict_pre_hook`: sizes that depend on the training's graph.
    """
    own = (module.named_parameters(recurse=False), module.named_buffers(recurse=False))
    for name, tensor in chain(*own):
        loaded = state.get(prefix + name)
        if loaded is not None and loaded.shape != tensor.shape:
            tensor.data = tensor.new_empty(loaded.shape)


def answer_users(
    queries: Queries,
    tables: NodeTables,
    users: Table,
    combine: Combine,
    recency: float | None = None,
) -> Float[Tensor, "B F"]:
    """Return a vector for each query.

    A training user with the training history gets the row of the table; further items are added to
    the user's neighbours. A new user, or a training user with fewer items than in training, gets a
    vector from the given items; without any, the vector is 0. A `recency` above 1 adds to what a
    user receives the messages of the newest items, by their additional weights.
    """
    row_P, item_P, place_P = _distinct(queries, tables.tied_I)
    user_B, length_B = queries.user_B, torch.bincount(row_P, minlength=len(queries))
    trained_B = torch.zeros_like(length_B)
    trained_B[user_B >= 0] = tables.events_U[user_B[user_B >= 0]]
    known_R = ((user_B >= 0) & (length_B >= trained_B)).nonzero().squeeze(1)
    user_R = user_B[known_R]
    is_known_B = torch.zeros_like(user_B, dtype=torch.bool).index_fill_(0, known_R, 1)
    is_new_P = ~is_known_B[row_P] | (place_P >= trained_B[row_P])
    row_P, node_P = row_P[is_new_P], len(tables.user_UF) + item_P[is_new_P]
    new_B = torch.bincount(row_P, minlength=len(queries))
    received_BW = sum_of_rows(tables.sent_VW, node_P, new_B)
    strength_B = new_B.to(received_BW.dtype)
    layer_0_BD = received_BW.new_zeros(len(queries), users.width)
    received_BW.index_add_(0, known_R, tables.received_UW[user_R])
    strength_B.index_add_(0, known_R, tables.strength_U[user_R])
    layer_0_BD.index_copy_(0, known_R, users(user_R))
    if recency is not None and recency > 1 and len(queries.history_N):
        item_N, offsets_B1, weight_N = newest_events(queries, recency)
        received_BW += F.embedding_bag(
            len(tables.user_UF) + item_N,
            tables.sent_VW,
            offsets_B1,
            mode="sum",
            per_sample_weights=(weight_N * tables.tied_I[item_N]).to(received_BW.dtype),
            include_last_offset=True,
        )
        return place(layer_0_BD, received_BW, strength_B, combine)
    answer_BF = place(layer_0_BD, received_BW, strength_B, combine)
    same_R = new_B[known_R] == 0
    return answer_BF.index_copy_(0, known_R[same_R], tables.user_UF[user_R[same_R]])


def place(
    layer_0_BD: Float[Tensor, "B D"],
    received_BW: Float[Tensor, "B W"],
    strength_B: Float[Tensor, " B"],
    combine: Combine,
) -> Float[Tensor, "B F"]:
    """Return the vectors of nodes from their messages; 0 for a node without edges."""
    scale_B1 = strength_B.clamp(min=1e-12).rsqrt().unsqueeze(1)
    return combine(layer_0_BD, received_BW * scale_B1) * (strength_B > 0).unsqueeze(1)


def sum_of_rows(
    table_VW: Float[Tensor, "V W"], node_P: Int64[Tensor, " P"], length_B: Int64[Tensor, " B"]
) -> Float[Tensor, "B W"]:
    """Return the sum of each query's rows, which are laid out query by query."""
    if len(node_P) == 0:
        return table_VW.new_zeros(len(length_B), table_VW.shape[1])
    offsets_B1 = F.pad(length_B.cumsum(0), (1, 0))
    return F.embedding_bag(node_P, table_VW, offsets_B1, mode="sum", include_last_offset=True)


def _distinct(
    queries: Queries, tied_I: Bool[Tensor, " I"]
) -> tuple[Int64[Tensor, " P"], Int64[Tensor, " P"], Int64[Tensor, " P"]]:
    """Return each history's distinct items with edges: row, item, and its number.

    They are sorted by row and item, so that sums do not depend on the order of events.
    """
    row_N = torch.repeat_interleave(queries.offsets_B1.diff())
    tied_N = tied_I[queries.history_N]
    key_N = row_N[tied_N] * len(tied_I) + queries.history_N[tied_N]
    order_N = key_N.argsort(stable=True)
    ordered_N = key_N[order_N]
    first_N = torch.ones_like(key_N, dtype=torch.bool)
    first_N[1:] = ordered_N[1:] != ordered_N[:-1]
    key_P, event_P = ordered_N[first_N], order_N[first_N]
    row_P = key_P // len(tied_I)
    length_B = torch.bincount(row_P, minlength=len(queries))
    start_B = length_B.cumsum(0) - length_B
    place_P = torch.empty_like(event_P)
    place_P[event_P.argsort()] = torch.arange(len(event_P), device=event_P.device)
    return row_P, key_P % len(tied_I), place_P - start_B[row_P]

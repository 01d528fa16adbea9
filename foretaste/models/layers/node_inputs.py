"""What the nodes of a graph start from: an id vector of their own, features, or both.

Shape legend: S nodes, B users, X users and items, D width.
"""

from typing import final

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from foretaste.data.batch import Queries
from foretaste.data.features import Features, FieldTable
from foretaste.errors import ConfigError
from foretaste.models.layers.embedding import Fusion, known_fields, told_of_items, told_of_users
from foretaste.models.layers.table import Table
from foretaste.models.layers.table_settings import TableConfig, make_tables


@final
class NodeInputs(nn.Module):
    """Users, then items. One learned vector stands for everybody who has no id of their own.

    Who is without any tie has none: nothing could have taught it.
    """

    linked_X: Tensor
    """Which nodes have a tie; part of the state."""

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
            num_users: Users that training knows.
            num_items: Items of the catalogue.
            embedding_dim: D.
            ids: Whether nodes have a vector of their own.
            teach_newcomer: Whether training hides ids now and then; else newcomers start from 0.
            init_std: Spread of the first id vectors.
            features: What is known of users and items.
            fusion: How a node's features become one vector.
            table: How the vectors of ids are kept.

        Raises:
            ConfigError: There are neither ids nor features of items, or features are of others than
                there are.
        """
        super().__init__()
        self.num_users = num_users
        self.user_fields, self.item_fields = (
            known_fields(told, embedding_dim=embedding_dim, fusion=fusion, table=table)
            for told in (told_of_users(features, num_users), told_of_items(features, num_items))
        )
        if not ids and self.item_fields is None:
            raise ConfigError(
                "ids = false and no features of items leave nothing to start from: keep the ids, "
                "or give the items a table of features",
                name="ids",
                value=False,
            )
        self.embedding_dim = embedding_dim
        self.user_table: Table | None = None
        self.item_table: Table | None = None
        self.everybody_1D: nn.Parameter | None = None
        if ids:
            sizes = num_users, num_items, 1
            self.user_table, self.item_table, last = make_tables(
                table, sizes, embedding_dim, std=init_std
            )
            self.everybody_1D = nn.Parameter(
                last.block(0, 1).detach() * teach_newcomer, requires_grad=teach_newcomer
            )
        self.register_buffer("linked_X", torch.ones(num_users + num_items, dtype=torch.bool))

    def forward(
        self, node_S: Int64[Tensor, " S"], hidden_S: Bool[Tensor, " S"] | None = None
    ) -> Float[Tensor, "S D"]:
        """Return what nodes start from.

        Args:
            node_S: Rising.
            hidden_S: True = without the id.
        """
        has_id_S = self.linked_X.index_select(0, node_S)
        input_SD = self._own(node_S, has_id_S if hidden_S is None else has_id_S & ~hidden_S)
        if self.user_fields is None and self.item_fields is None:
            return input_SD
        num_users = int((node_S < self.num_users).sum())
        told = [
            input_SD.new_zeros(len(row_R), self.embedding_dim) if fields is None else fields(row_R)
            for fields, row_R in (
                (self.user_fields, node_S[:num_users]),
                (self.item_fields, node_S[num_users:] - self.num_users),
            )
        ]
        return input_SD + torch.cat(told)

    def users(self, queries: Queries) -> Float[Tensor, "B D"]:
        """Return what users start from, known or not."""
        user_B, node_B = queries.user_B, queries.user_B.clamp(min=0)
        input_BD = self._own(node_B, (user_B >= 0) & self.linked_X[node_B])
        if self.user_fields is None:
            return input_BD
        told_BD: Tensor = self.user_fields(user_B, queries.profile)
        return input_BD + told_BD

    def items_from_features(self, table: FieldTable) -> Float[Tensor, "R D"]:
        """Return what items start from that are in no table.

        Raises:
            ConfigError: There are no features of items.
        """
        if self.item_fields is None:
            raise ConfigError("the model was made without features of items: it can place none")
        told_RD: Tensor = self.item_fields.encoder(table)
        nobody_R = torch.zeros(len(table), dtype=torch.int64, device=told_RD.device)
        return self._own(nobody_R, nobody_R > 0) + told_RD

    @property
    def told_I(self) -> Bool[Tensor, " I"]:
        """Which items have a feature that says something."""
        if self.item_fields is None:
            return torch.zeros_like(self.linked_X[self.num_users :])
        return self.item_fields.known_R

    def _own(self, node_S: Tensor, has_id_S: Tensor) -> Tensor:
        """Return id vectors of rising nodes; the one for everybody where there is none."""
        if self.user_table is None or self.item_table is None or self.everybody_1D is None:
            return torch.zeros(len(node_S), self.embedding_dim, device=node_S.device)
        num_users = int((node_S < self.num_users).sum())
        row_S = node_S.where(has_id_S, -1)
        item_R = (row_S[num_users:] - self.num_users).clamp(min=-1)
        id_SD = torch.cat([self.user_table(row_S[:num_users]), self.item_table(item_R)])
        return id_SD.where(has_id_S.unsqueeze(1), self.everybody_1D)

"""The inputs of a ranker for a row: its user, its item and its context, one vector per field.

The ids of a batch are looked up in one pass per side, and so are the codes of single values. Fields
of the user and the context are computed once per query, for any number of items; bags, numbers and
vectors of items are computed once per distinct item in a batch.

Shape legend: B queries, A rows of items (B, or 1 if all queries have the same), C items per row, R
new items, M events of histories, Q fields of a query, G fields of an item, W width of a field.
"""

from functools import partial
from typing import NamedTuple, final

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from foretaste.data.batch import Queries
from foretaste.data.draws import draw_for_rows
from foretaste.data.features import Features, FieldTable
from foretaste.data.interactions import Interactions
from foretaste.errors import ConfigError
from foretaste.models.layers.history import FoldIn, with_likely_features, with_likely_ids
from foretaste.models.layers.side_fields import (
    RowFieldsConfig,
    SideFields,
    side_by_side,
    sides_of_rows,
)


class RowParts(NamedTuple):
    """The fields of a batch."""

    query_BQW: Float[Tensor, "B Q W"]
    """Fields of users and contexts."""
    item_ACGW: Float[Tensor, "A C G W"]
    history_MGW: Float[Tensor, "M G W"]
    """Fields of the items of histories; M is 0 if none was requested."""


@final
class RowFields(nn.Module):
    """The fields of users, items and contexts.

    The id vector of a user or item without a training event, or without an id, is 0.
    """

    taught_U: Tensor
    """True for users with a training event; no user if each row is its own user."""
    taught_I: Tensor

    def __init__(
        self,
        config: RowFieldsConfig,
        *,
        num_users: int,
        num_items: int,
        features: Features | None,
        width: int | None = None,
        reads_history: bool = False,
        folds_in: bool = True,
    ) -> None:
        """Make untrained weights.

        Args:
            config: The settings.
            num_users: Number of training users, 0 or more.
            num_items: Number of items in the catalogue, 1 or more.
            features: Features of users, items and contexts.
            width: W; None: `embedding_dim`.
            reads_history: Whether the model reads histories itself, so that later events of known
                users do not change their id vectors.
            folds_in: Whether new users' id vectors and missing features are computed by a
                regression on their histories (`FoldIn`).

        Raises:
            ConfigError: Items have neither ids nor features.
        """
        super().__init__()
        self.config, self.num_users, self.num_items = config, num_users, num_items
        self.width = width or config.embedding_dim
        self.user, self.item, self.context = sides_of_rows(
            config,
            num_users=num_users,
            num_items=num_items,
            features=features,
            width=self.width,
        )
        self.register_buffer("taught_U", torch.ones(num_users, dtype=torch.bool))
        self.register_buffer("taught_I", torch.ones(num_items, dtype=torch.bool))
        folds = config.user_id and config.item_id and folds_in
        self.folds_only_new = reads_history
        user_dim = (self.user.num_fields - 1) * self.width
        self.fold_in = FoldIn(num_users=num_users, embedding_dim=self.width) if folds else None
        self.fold_features = (
            FoldIn(num_users=num_users, embedding_dim=self.width, user_dim=user_dim)
            if folds and user_dim
            else None
        )
        self._moments = (
            None if features is None or not config.context_features else features.context_table
        )

    @property
    def num_query_fields(self) -> int:
        """Q."""
        return self.user.num_fields + self.context.num_fields

    @property
    def num_item_fields(self) -> int:
        """G."""
        return self.item.num_fields

    def forward(
        self,
        queries: Queries,
        item_AC: Int64[Tensor, "A C"],
        history_M: Int64[Tensor, " M"] | None = None,
    ) -> RowParts:
        """Return the fields.

        Args:
            queries: Users and contexts.
            item_AC: Items of each query.
            history_M: Items of histories, in any layout; -1 is padding.
        """
        history_M = item_AC.new_empty(0) if history_M is None else history_M
        query_codes = self._user_codes(queries, drops=True), self._moment_codes(queries)
        item_ACS, history_MS = self._item_codes(item_AC, drops=True), self._item_codes(history_M)
        item_single, history_single = self._look_up_items(item_ACS, history_MS)
        vector_NOW, vector_MOW = self.item.shared_vectors(
            torch.cat([item_AC.flatten(), history_M])
        ).split([item_AC.numel(), len(history_M)])
        return RowParts(
            query_BQW=self._query_fields(queries, *query_codes),
            item_ACGW=self._item_fields(item_AC, item_ACS, item_single, vector_NOW),
            history_MGW=self._item_fields(history_M, history_MS, history_single, vector_MOW),
        )

    def query(self, queries: Queries) -> Float[Tensor, "B Q W"]:
        """Return only the fields of users and contexts."""
        codes = self._user_codes(queries), self._moment_codes(queries)
        return self._query_fields(queries, *codes)

    def items(self, item_AC: Int64[Tensor, "A C"]) -> Float[Tensor, "A C G W"]:
        """Return only the fields of items."""
        item_ACS = self._item_codes(item_AC)
        single_ACSW = self.item.look_up(item_ACS)
        vector_MOW = self.item.shared_vectors(item_AC.flatten())
        return self._item_fields(item_AC, item_ACS, single_ACSW, vector_MOW)

    def new_items(self, table: FieldTable) -> Float[Tensor, "1 R G W"]:
        """Return the fields of R items without a row, computed from features.

        Raises:
            ConfigError: The model reads no features of items.
        """
        if not self.item.has_features:
            raise ConfigError("this model reads no features of items, so it cannot score new ones")
        new_R = table.code_RC.new_full((len(table),), -1)
        code_RS = self._item_codes(new_R, other=table)
        single_RSW = self.item.look_up(code_RS)
        vector_ROW = self.item.vectors(new_R, table)
        return self._item_fields(new_R, code_RS, single_RSW, vector_ROW, other=table).unsqueeze(0)

    @property
    def user_U(self) -> Int64[Tensor, " U"]:
        """All users, on the device of the weights."""
        return torch.arange(self.num_users, device=self.taught_U.device)

    @property
    def item_I(self) -> Int64[Tensor, " I"]:
        """All items, on the device of the weights."""
        return torch.arange(self.num_items, device=self.taught_I.device)

    def known_items(self) -> Bool[Tensor, " I"]:
        """Return a mask of items with a known feature."""
        return self.item.known.known_R

    @property
    def reads_profiles(self) -> bool:
        """Whether users' features are read."""
        return self.user.has_features

    @property
    def scores_new_items(self) -> bool:
        """Whether items' features are read."""
        return self.item.has_features

    @torch.no_grad()
    def begin(self, events: Interactions) -> None:
        """Set the id vectors of users and items without a training event to 0."""
        times_U = torch.from_numpy(np.diff(events.offsets))
        times_I = torch.from_numpy(events.item_count)
        come_back = (times_U > 1).any() or times_U.all()  # otherwise an id memorises its row
        self.taught_U.copy_((times_U > 0) & come_back)
        self.taught_I.copy_(times_I > 0)
        for side, taught_R in ((self.user, self.taught_U), (self.item, self.taught_I)):
            if side.id_table is not None:
                side.id_table.zero_rows(~taught_R)
        if self.config.l2:
            self.user.count(self.user.codes(self.user_U, self.taught_U), times_U)
            self.item.count(self.item.codes(self.item_I, self.taught_I), times_I)
            if self._moments is not None:
                code_ES = self._moments.code_RC
                self.context.count(code_ES, torch.ones(len(code_ES), dtype=torch.long))

    def penalty(
        self,
        queries: Queries,
        item_BC: Int64[Tensor, "B C"],
        history_N: Int64[Tensor, " N"] | None = None,
    ) -> Float[Tensor, ""]:
        """Return the l2 penalty of a batch.

        Args:
            queries: Users and contexts.
            item_BC: Items of each query.
            history_N: Items of the histories that are read.
        """
        if not self.config.l2:
            return torch.zeros((), device=item_BC.device)
        item_N, num_rows = item_BC.flatten(), len(queries)
        if history_N is not None:
            item_N = torch.cat([item_N, history_N])
        parts = [
            *self.user.penalty(self._user_codes(queries), num_rows=num_rows),
            *self.context.penalty(self._moment_codes(queries), num_rows=num_rows),
            *self.item.penalty(self._item_codes(item_N), num_rows=num_rows),
        ]
        return torch.stack(parts).sum()

    @torch.no_grad()
    def learn_new_users(self, events: Interactions) -> None:
        """Learn how to answer new users from their histories.

        Args:
            events: The events of histories.
        """
        users, items = self.user.id_table, self.item.id_table
        if self.fold_in is not None and users is not None and items is not None:
            self.fold_in.learn(events, users, items)
        if self.fold_features is not None and items is not None:
            self.fold_features.learn(events, self._features_of, items)

    def _user_codes(self, queries: Queries, *, drops: bool = False) -> Int64[Tensor, "B S"]:
        dropped_B = None
        if drops and self._drops_ids(self.user):
            dropped_B = self._drawn(queries.user_B)
        return self.user.codes(queries.user_B, self.taught_U, queries.profile, dropped_X=dropped_B)

    def _moment_codes(self, queries: Queries) -> Int64[Tensor, "B S"]:
        nobody_B = torch.full_like(queries.user_B, -1)
        return self.context.codes(nobody_B, other=queries.context)

    def _item_codes(
        self, item_X: Int64[Tensor, "*X"], *, drops: bool = False, other: FieldTable | None = None
    ) -> Int64[Tensor, "*X S"]:
        dropped_X = None
        if drops and self._drops_ids(self.item):
            dropped_X = self._drawn(item_X) & self.known_items()[item_X]
        return self.item.codes(item_X, self.taught_I, other, dropped_X=dropped_X)

    def _drops_ids(self, side: SideFields) -> bool:
        return self.training and self.config.id_dropout > 0 and side.has_id and side.has_features

    def _drawn(self, row_X: Int64[Tensor, "*X"]) -> Bool[Tensor, "*X"]:
        draw = partial(torch.rand, device=row_X.device)
        return draw_for_rows(row_X.shape, draw) < self.config.id_dropout

    def _look_up_items(self, item_ACS: Tensor, history_MS: Tensor) -> tuple[Tensor, Tensor]:
        """Look up the scored items and those of histories, in one pass."""
        sizes = [item_ACS.shape[:-1].numel(), len(history_MS)]
        code_NS = torch.cat([item_ACS.flatten(0, -2), history_MS])
        item_NSW, history_MSW = self.item.look_up(code_NS).split(sizes)
        return item_NSW.view(*item_ACS.shape, self.width), history_MSW

    def _query_fields(
        self, queries: Queries, user_BS: Tensor, moment_BS: Tensor
    ) -> Float[Tensor, "B Q W"]:
        own_BSW, moment_BSW = self.user.look_up(user_BS), self.context.look_up(moment_BS)
        return side_by_side(
            self._user_fields(queries, user_BS[:, :1] >= 0, own_BSW),
            self._moment_fields(queries, moment_BSW),
        )

    def _features_of(self, user_B: Int64[Tensor, " B"]) -> Float[Tensor, "B X"]:
        offsets_B1 = user_B.new_zeros(len(user_B) + 1)
        queries = Queries(user_B=user_B, history_N=user_B[:0], offsets_B1=offsets_B1)
        code_BS = self._user_codes(queries)
        single_BSW = self.user.look_up(code_BS)
        return self._user_fields(queries, code_BS[:, :1] >= 0, single_BSW)[:, 1:].flatten(1)

    def _user_fields(
        self, queries: Queries, has_id_B1: Tensor, single_BSW: Tensor
    ) -> Float[Tensor, "B _ W"]:
        users, items, fold_in = self.user.id_table, self.item.id_table, self.fold_in
        if fold_in is not None and users is not None and items is not None and not self.training:
            single_BSW, has_id_B1 = with_likely_ids(
                fold_in,
                queries,
                single_BSW,
                has_id_B1,
                users=users,
                items=items,
                only_new=self.folds_only_new,
            )
        field_BQW = self.user.joined(
            queries.user_B,
            queries.profile,
            single_XSW=single_BSW,
            vector_XOW=self.user.vectors(queries.user_B, queries.profile),
            has_id_XN=has_id_B1[:, : self.user.has_id],
        )
        if self.fold_features is None or items is None or self.training:
            return field_BQW
        return with_likely_features(self.fold_features, queries, field_BQW, items=items)

    def _moment_fields(self, queries: Queries, single_BSW: Tensor) -> Float[Tensor, "B _ W"]:
        nobody_B = torch.full_like(queries.user_B, -1)
        return side_by_side(single_BSW, self.context.vectors(nobody_B, queries.context))

    def _item_fields(
        self,
        item_X: Tensor,
        code_XS: Tensor,
        single_XSW: Tensor,
        vector_MOW: Tensor,
        *,
        other: FieldTable | None = None,
    ) -> Float[Tensor, "*X G W"]:
        return self.item.joined(
            item_X,
            other,
            single_XSW=single_XSW,
            vector_XOW=vector_MOW.view(*item_X.shape, *vector_MOW.shape[1:]),
            has_id_XN=code_XS[..., : self.item.has_id] >= 0,
        )

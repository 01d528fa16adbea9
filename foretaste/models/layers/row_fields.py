"""What a ranker reads of a row: its user, its item and its moment, one vector a field.

All single-valued fields of a batch, ids among them, are looked up in one table in one pass; what
is said of the user and the moment is worked out once for a query, however many items it has; bags,
numbers and vectors of items are worked out once for an item, however often it stands in a batch.

Shape legend: B queries, A rows of items (B, or 1 where all queries have the same), C items of
each, R new items, M events of histories, Q fields of a query, G fields of an item, W width of a
field.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple, final

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from foretaste.config import Config
from foretaste.data.batch import Queries
from foretaste.data.features import Features, FieldSide, FieldTable
from foretaste.data.interactions import Interactions
from foretaste.errors import ConfigError
from foretaste.models.layers.embedding import Fusion, look_up, refuse_codes
from foretaste.models.layers.fold_in import FoldIn
from foretaste.models.layers.side_fields import SideFields, side_by_side

_BLOCK_USERS = 2**14


class RowFieldsConfig(Config):
    """Settings of what a ranker reads."""

    embedding_dim: PositiveInt = 16
    """Width of each field's vector."""
    user_id: bool = True
    """Whether each user has a vector of their own."""
    item_id: bool = True
    """Whether each item has a vector of its own."""
    user_features: bool = True
    """Whether the features of users are read, where there are any."""
    item_features: bool = True
    """Whether the features of items are read, where there are any."""
    context_features: bool = True
    """Whether the features of the moment are read, where there are any."""
    fusion: Fusion = "concat"
    """How vectors, of a text or an image, join: each as one more field, or by a gate, which makes
    one field of them and the id."""
    id_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of rows that are told in training without their id, where something else is known:
    features learn to stand alone."""
    init_std: float = Field(default=0.05, gt=0)
    """Spread of the first vectors."""
    l2: float = Field(default=0.0, ge=0)
    """Weight of half the squared length of the vectors of ids and single values that a batch
    uses."""
    l2_of: Literal["rows", "mini_batch_aware"] = "rows"
    """"rows": the mean over the batch's rows of all that they use. "mini_batch_aware": each vector
    once a batch, by 1 over the number of training rows that use it, so that over an epoch rare
    and frequent ones are held alike."""


class RowParts(NamedTuple):
    """The fields of a batch."""

    query_BQW: Float[Tensor, "B Q W"]
    """Of users and moments."""
    item_ACGW: Float[Tensor, "A C G W"]
    history_MGW: Float[Tensor, "M G W"]
    """Of the items of histories; M is 0 where none was asked for."""


@final
class RowFields(nn.Module):
    """One table of ids and single values, and what works out the other fields.

    Row 0 of the table is nobody: it is 0, and no gradient goes there. Who has no training event, or
    is told without an id, stands there.
    """

    taught_U: Tensor
    """Which users have a training event."""
    taught_I: Tensor
    times_V: Tensor
    """How many training rows use each row of the table; known in training only."""

    def __init__(
        self,
        config: RowFieldsConfig,
        *,
        num_users: int,
        num_items: int,
        features: Features | None,
        width: int | None = None,
        reads_history: bool = False,
    ) -> None:
        """Make untrained weights.

        Args:
            config: The settings.
            num_users: Users that training knows, 0 or more.
            num_items: Items of the catalogue, 1 or more.
            features: What else is known of users, items and moments.
            width: W; None: `embedding_dim`.
            reads_history: Whether the model tells users by their histories; else new users' id
                vectors, and features that are not told, are regressed on them (`FoldIn`).

        Raises:
            ConfigError: There is nothing to tell an item by.
            TooLargeError: A table would not fit in memory.
        """
        super().__init__()
        self.config, self.num_users, self.num_items = config, num_users, num_items
        self.width = width or config.embedding_dim
        self.first_item = 1 + (num_users if config.user_id else 0)
        self.num_codes = self.first_item + (num_items if config.item_id else 0)
        self.user = self._side(*_users(config, features, num_users), has_id=config.user_id)
        self.item = self._side(*_items(config, features, num_items), has_id=config.item_id)
        self.context = self._side(_moment(config, features), None, has_id=False)
        if not config.item_id and self.item is None:
            raise ConfigError(
                "there is nothing to tell an item by: set model.item_id, or give features of items"
            )
        self.table = self._table()
        self.register_buffer("taught_U", torch.ones(num_users, dtype=torch.bool))
        self.register_buffer("taught_I", torch.ones(num_items, dtype=torch.bool))
        self.fold_in = (
            FoldIn(num_users=num_users, embedding_dim=self.width)
            if config.user_id and config.item_id and not reads_history
            else None
        )
        num_features = 0 if self.user is None else self.user.num_fields - 1
        self.fold_features = (
            FoldIn(
                num_users=num_users,
                embedding_dim=self.width,
                user_dim=num_features * self.width,
            )
            if self.fold_in is not None and num_features
            else None
        )
        self.register_buffer("times_V", torch.zeros(self.num_codes), persistent=False)
        self._moments = None if features is None else features.context_table

    @property
    def num_query_fields(self) -> int:
        """Q."""
        user = self.config.user_id if self.user is None else self.user.num_fields
        return user + (0 if self.context is None else self.context.num_fields)

    @property
    def num_item_fields(self) -> int:
        """G."""
        return 1 if self.item is None else self.item.num_fields

    def forward(
        self,
        queries: Queries,
        item_AC: Int64[Tensor, "A C"],
        history_M: Int64[Tensor, " M"] | None = None,
    ) -> RowParts:
        """Return the fields.

        Args:
            queries: Users and moments.
            item_AC: Items of each query.
            history_M: Items of histories, in whatever layout; -1 is padding.
        """
        history_M = item_AC.new_empty(0) if history_M is None else history_M
        query_codes = self._user_codes(queries, drops=True), self._moment_codes(queries)
        item_ACS, history_MS = self._item_codes(item_AC, drops=True), self._item_codes(history_M)
        *query_single, item_single, history_single = self._look_up(
            [*query_codes, item_ACS, history_MS]
        )
        vector_NOW, vector_MOW = self._item_vectors(
            torch.cat([item_AC.flatten(), history_M])
        ).split([item_AC.numel(), len(history_M)])
        return RowParts(
            query_BQW=self._query_fields(queries, query_codes[0], query_single),
            item_ACGW=self._item_fields(item_AC, item_ACS, item_single, vector_NOW),
            history_MGW=self._item_fields(history_M, history_MS, history_single, vector_MOW),
        )

    def query(self, queries: Queries) -> Float[Tensor, "B Q W"]:
        """Return the fields of users and moments alone."""
        codes = self._user_codes(queries), self._moment_codes(queries)
        return self._query_fields(queries, codes[0], self._look_up(codes))

    def items(self, item_AC: Int64[Tensor, "A C"]) -> Float[Tensor, "A C G W"]:
        """Return the fields of items alone."""
        item_ACS = self._item_codes(item_AC)
        (single_ACSW,) = self._look_up([item_ACS])
        vector_MOW = self._item_vectors(item_AC.flatten())
        return self._item_fields(item_AC, item_ACS, single_ACSW, vector_MOW)

    def new_items(self, table: FieldTable) -> Float[Tensor, "1 R G W"]:
        """Return the fields of R items that are in no table, from their features alone.

        Raises:
            ConfigError: No features of items are read.
        """
        if self.item is None:
            raise ConfigError("this model reads no features of items: none can be told by them")
        new_R = table.code_RC.new_full((len(table),), -1)
        code_RS = self._item_codes(new_R, other=table)
        (single_RSW,) = self._look_up([code_RS])
        vector_ROW = self.item.vectors(new_R, table)
        return self._item_fields(new_R, code_RS, single_RSW, vector_ROW, other=table).unsqueeze(0)

    @property
    def item_I(self) -> Int64[Tensor, " I"]:
        """All items, where the weights are."""
        return torch.arange(self.num_items, device=self.taught_I.device)

    def placed_I(self) -> Bool[Tensor, " I"]:
        """Return which items have a feature that says something."""
        if self.item is None:
            return torch.zeros_like(self.taught_I)
        return self.item.known.known_R

    @property
    def reads_profiles(self) -> bool:
        """Whether users' features are read."""
        return self.user is not None

    @torch.no_grad()
    def begin(self, events: Interactions) -> None:
        """Send users and items that no event can teach to row 0."""
        self.taught_U.copy_(torch.from_numpy(np.diff(events.offsets)) > 0)
        self.taught_I.copy_(torch.from_numpy(events.item_count) > 0)
        for table_RW, taught_R in (
            (self._user_table(), self.taught_U),
            (self._item_table(), self.taught_I),
        ):
            if len(table_RW):
                table_RW.mul_(taught_R.unsqueeze(1).to(table_RW))
        self.times_V.copy_(self._times(events))

    def penalty(
        self,
        queries: Queries,
        item_BC: Int64[Tensor, "B C"],
        history_N: Int64[Tensor, " N"] | None = None,
    ) -> Float[Tensor, ""]:
        """Return what `l2` adds to the loss of a batch.

        Args:
            queries: Users and moments.
            item_BC: Items of each query.
            history_N: Items of the histories that are read.

        References:
            "mini_batch_aware": Zhou et al., "Deep Interest Network for Click-Through Rate
            Prediction", KDD 2018, equation 6. Departure: a row that only reads an item in a
            history does not count among those that use it.
        """
        if not self.config.l2:
            return self.table.weight.new_zeros(())
        codes = [self._user_codes(queries), self._moment_codes(queries), self._item_codes(item_BC)]
        if history_N is not None:
            codes.append(self._item_codes(history_N))
        times_V = torch.cat([code.flatten() for code in codes]).bincount(minlength=self.num_codes)
        used_V = times_V[1:].nonzero().squeeze(1) + 1
        if self.config.l2_of == "mini_batch_aware":
            weight_V = self.times_V[used_V].clamp(min=1).reciprocal()
        else:
            weight_V = times_V[used_V] / len(queries)
        square_V = F.embedding(used_V, self.table.weight).square().sum(dim=1)
        return self.config.l2 / 2 * (weight_V @ square_V)

    @torch.no_grad()
    def learn_newcomers(self, events: Interactions) -> None:
        """Learn how to answer users of whom only the history is known.

        Args:
            events: What histories are made of.
        """
        if self.fold_in is not None:
            self.fold_in.learn(events, self._user_table(), self._item_table())
        if self.fold_features is not None:
            blocks = torch.arange(self.num_users, device=self.taught_U.device).split(_BLOCK_USERS)
            known_UX = torch.cat([self._features_of(user_B) for user_B in blocks])
            self.fold_features.learn(events, known_UX, self._item_table())

    def _side(
        self, side: FieldSide | None, table: FieldTable | None, *, has_id: bool
    ) -> SideFields | None:
        if side is None:
            return None
        made = SideFields(
            side,
            table,
            first_code=self.num_codes,
            width=self.width,
            init_std=self.config.init_std,
            has_id=has_id,
            fusion=self.config.fusion,
        )
        self.num_codes += made.num_codes
        return made

    def _table(self) -> nn.Embedding:
        refuse_codes(self.num_codes, self.width)
        table = nn.Embedding(self.num_codes, self.width, padding_idx=0)
        nn.init.normal_(table.weight, std=self.config.init_std)
        sides = [side for side in (self.user, self.item, self.context) if side is not None]
        with torch.no_grad():
            table.weight[[0, *(code for side in sides for code in side.untaught_codes)]] = 0.0
        return table

    def _user_table(self) -> Float[Tensor, "_ W"]:
        return self.table.weight[1 : self.first_item]

    def _item_table(self) -> Float[Tensor, "_ W"]:
        num_rows = self.num_items if self.config.item_id else 0
        return self.table.weight[self.first_item : self.first_item + num_rows]

    def _times(self, events: Interactions) -> Float[Tensor, " V"]:
        """Count the training rows that use each row of the table."""
        user_U, item_I = (
            torch.from_numpy(np.diff(events.offsets)),
            torch.from_numpy(events.item_count),
        )
        counted = [(torch.arange(1, self.first_item), user_U)] if self.config.user_id else []
        if self.config.item_id:
            counted.append((self.first_item + torch.arange(self.num_items), item_I))
        for side, times_R in ((self.user, user_U), (self.item, item_I)):
            if side is not None:
                code_RC = side.codes(torch.arange(len(times_R), device=self.taught_I.device))
                counted.append((code_RC.cpu(), times_R.unsqueeze(1).expand(-1, code_RC.shape[1])))
        if self.context is not None and self._moments is not None:
            code_EC = self._moments.code_RC + self.context.first_code
            counted.append((code_EC, torch.ones_like(code_EC)))
        times_V = torch.zeros(self.num_codes)
        for code, times in counted:
            times_V.index_add_(0, code.flatten(), times.flatten().float())
        return times_V

    def _user_codes(self, queries: Queries, *, drops: bool = False) -> Int64[Tensor, "B S"]:
        user_B, codes = queries.user_B, []
        if self.config.user_id:
            has_B = user_B >= 0
            if self.num_users:
                has_B &= self.taught_U[user_B]
            if drops and self._drops and self.user is not None:
                has_B &= self._kept_ids(user_B)
            codes.append((user_B + 1).where(has_B, 0).unsqueeze(1))
        if self.user is not None:
            codes.append(self.user.codes(user_B, queries.profile))
        return torch.cat(codes, dim=1) if codes else user_B.new_empty(len(user_B), 0)

    def _moment_codes(self, queries: Queries) -> Int64[Tensor, "B S"]:
        if self.context is None:
            return queries.user_B.new_empty(len(queries), 0)
        return self.context.codes(torch.full_like(queries.user_B, -1), queries.context)

    def _item_codes(
        self, item_X: Int64[Tensor, "*X"], *, drops: bool = False, other: FieldTable | None = None
    ) -> Int64[Tensor, "*X S"]:
        codes = []
        if self.config.item_id:
            has_X = self.taught_I[item_X] & (item_X >= 0)
            if drops and self._drops and self.item is not None:
                has_X &= self._kept_ids(item_X) | ~self.placed_I()[item_X]
            codes.append((item_X + self.first_item).where(has_X, 0).unsqueeze(-1))
        if self.item is not None:
            codes.append(self.item.codes(item_X, other))
        return torch.cat(codes, dim=-1) if len(codes) > 1 else codes[0]

    @property
    def _drops(self) -> bool:
        return self.training and self.config.id_dropout > 0

    def _kept_ids(self, row_X: Int64[Tensor, "*X"]) -> Bool[Tensor, "*X"]:
        return torch.rand(row_X.shape, device=row_X.device) >= self.config.id_dropout

    def _look_up(self, codes: Sequence[Tensor]) -> list[Tensor]:
        """Look all codes up in one pass."""
        looked = look_up(torch.cat([code.flatten() for code in codes]), self.table.weight)
        parts = looked.split([code.numel() for code in codes])
        return [part.view(*code.shape, self.width) for part, code in zip(parts, codes, strict=True)]

    def _query_fields(
        self, queries: Queries, user_BS: Tensor, single: Sequence[Tensor]
    ) -> Float[Tensor, "B Q W"]:
        own_BSW, moment_BSW = single
        return side_by_side(
            self._user_fields(queries, user_BS[:, :1] > 0, own_BSW),
            self._moment_fields(queries, moment_BSW),
        )

    def _features_of(self, user_B: Int64[Tensor, " B"]) -> Float[Tensor, "B X"]:
        offsets_B1 = user_B.new_zeros(len(user_B) + 1)
        queries = Queries(user_B=user_B, history_N=user_B[:0], offsets_B1=offsets_B1)
        code_BS = self._user_codes(queries)
        (single_BSW,) = self._look_up([code_BS])
        return self._user_fields(queries, code_BS[:, :1] > 0, single_BSW)[:, 1:].flatten(1)

    def _with_folded_features(
        self, queries: Queries, field_BQW: Float[Tensor, "B Q W"]
    ) -> Float[Tensor, "B Q W"]:
        """Put what the history makes likely where a new user's features are not told."""
        untold_B = (queries.user_B < 0) & (queries.offsets_B1.diff() > 0)
        if queries.profile is not None:
            untold_B &= ~queries.profile.known_R
        if self.fold_features is None or self.training or not untold_B.any():
            return field_BQW
        nobody_UX = field_BQW[:0, 1:].flatten(1)
        folded_BX: Tensor = self.fold_features(queries, nobody_UX, self._item_table())
        folded_BQW = torch.cat([field_BQW[:, :1], folded_BX.view_as(field_BQW[:, 1:])], dim=1)
        return folded_BQW.where(untold_B[:, None, None], field_BQW)

    def _user_fields(
        self, queries: Queries, has_id_B1: Tensor, single_BSW: Tensor
    ) -> Float[Tensor, "B _ W"]:
        told_B1 = (queries.offsets_B1.diff() > 0).unsqueeze(1)
        if self.fold_in is not None and not self.training and told_B1.any():
            own_BW = single_BSW[:, 0]
            folded_BW = self.fold_in(queries, self._user_table(), self._item_table())
            id_BW, has_id_B1 = folded_BW.where(told_B1, own_BW), has_id_B1 | told_B1
            single_BSW = torch.cat([id_BW.unsqueeze(1), single_BSW[:, 1:]], dim=1)
        if self.user is None:
            return single_BSW
        field_BQW = self.user.joined(
            queries.user_B,
            queries.profile,
            single_XSW=single_BSW,
            vector_XOW=self.user.vectors(queries.user_B, queries.profile),
            has_id_XN=has_id_B1[:, : self.config.user_id],
        )
        return self._with_folded_features(queries, field_BQW)

    def _moment_fields(self, queries: Queries, single_BSW: Tensor) -> Float[Tensor, "B _ W"]:
        if self.context is None:
            return single_BSW
        nobody_B = torch.full_like(queries.user_B, -1)
        return side_by_side(single_BSW, self.context.vectors(nobody_B, queries.context))

    def _item_vectors(self, item_M: Int64[Tensor, " M"]) -> Float[Tensor, "M O W"]:
        if self.item is None:
            return torch.empty(len(item_M), 0, self.width, device=item_M.device)
        return self.item.shared_vectors(item_M)

    def _item_fields(
        self,
        item_X: Tensor,
        code_XS: Tensor,
        single_XSW: Tensor,
        vector_MOW: Tensor,
        *,
        other: FieldTable | None = None,
    ) -> Float[Tensor, "*X G W"]:
        if self.item is None:
            return single_XSW
        return self.item.joined(
            item_X,
            other,
            single_XSW=single_XSW,
            vector_XOW=vector_MOW.view(*item_X.shape, *vector_MOW.shape[1:]),
            has_id_XN=code_XS[..., : self.config.item_id] > 0,
        )


def _users(
    config: RowFieldsConfig, features: Features | None, num_users: int
) -> tuple[FieldSide | None, FieldTable | None]:
    if features is None or not config.user_features:
        return None, None
    return _fitting("users", features.user, features.user_table, num_users)


def _items(
    config: RowFieldsConfig, features: Features | None, num_items: int
) -> tuple[FieldSide | None, FieldTable | None]:
    if features is None or not config.item_features:
        return None, None
    return _fitting("items", features.item, features.item_table, num_items)


def _moment(config: RowFieldsConfig, features: Features | None) -> FieldSide | None:
    return features.context if features is not None and config.context_features else None


def _fitting(
    what: str, side: FieldSide | None, table: FieldTable | None, num_rows: int
) -> tuple[FieldSide | None, FieldTable | None]:
    if side is None or table is None:
        return None, None
    if len(table) != num_rows:
        raise ConfigError(
            f"there are features of {len(table)} {what} for {num_rows} of them: fit the features "
            "to the events that the model learns from"
        )
    return side, table

"""The base of rankers over fields: outputs, answers and histories.

These are abstract classes because five models need a dozen methods each, of which only one differs.

Shape legend: B queries, A rows of items (B, or 1 if all queries have the same), C items per row, I
items, L positions, M events, concatenated group by group, Q fields of a query, G fields of an item,
W width of a field, K = G W.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import partial
from typing import ClassVar, Generic, Literal, TypeVar

import torch
from jaxtyping import Bool, Float, Int64
from pydantic import Field
from torch import Tensor, nn

from foretaste.config import Count, Widths
from foretaste.data.batch import Queries, Reads
from foretaste.data.features import Features, FieldTable
from foretaste.data.interactions import Interactions
from foretaste.errors import ConfigError
from foretaste.models.base import Ranker, Scorer
from foretaste.models.layers.dense import Activation
from foretaste.models.layers.heads import score_in_blocks
from foretaste.models.layers.history import (
    Histories,
    TargetAttention,
    group_histories,
    mean_weights,
    pool,
)
from foretaste.models.layers.row_fields import RowFields, RowParts
from foretaste.models.layers.side_fields import RowFieldsConfig
from foretaste.models.layers.table_kinds import IdConfig

_BLOCK_PAIRS = 2**16
_HISTORY_QUERIES, _HISTORY_PAIRS = 32, 2**13


class FieldRanker(Ranker, Scorer, ABC):
    """A `Ranker` that reads `RowFields` and predicts with `Heads`; a subclass makes both."""

    fields: RowFields

    @abstractmethod
    def raw(
        self, queries: Queries, item_BC: Int64[Tensor, "B C"]
    ) -> Mapping[str, Float[Tensor, "B C"]]:
        """Return the inputs of the task heads for a batch."""

    @abstractmethod
    def raw_of(
        self, queries: Queries, item_1CGW: Float[Tensor, "1 C G W"]
    ) -> Mapping[str, Float[Tensor, "B C"]]:
        """Return the inputs of the task heads for shared items, given by their fields."""

    def forward(self, queries: Queries, item_BC: Int64[Tensor, "B C"]) -> dict[str, Tensor]:
        """Return each task's training outputs."""
        outputs: dict[str, Tensor] = self.heads(self.raw(queries, item_BC))
        return outputs

    def penalty(self, queries: Queries, item_BC: Int64[Tensor, "B C"]) -> Float[Tensor, ""]:
        """Return the l2 penalty of the vectors in the batch."""
        return self.fields.penalty(queries, item_BC)

    def known_items(self) -> Bool[Tensor, " I"]:
        """Return a mask of items with a known feature."""
        return self.fields.known_items()

    @property
    def scores_new_items(self) -> bool:
        """Whether the model reads items' features."""
        return self.fields.scores_new_items

    def of_new_items(self, queries: Queries, table: FieldTable) -> dict[str, Tensor]:
        """Return each task's training outputs for items without a row.

        Raises:
            ConfigError: The model reads no features of items.
        """
        outputs: dict[str, Tensor] = self.heads(self.raw_of(queries, self.fields.new_items(table)))
        return outputs

    @property
    def reads_profiles(self) -> bool:
        """Whether the model reads users' features."""
        return self.fields.reads_profiles

    def known_users(self) -> Bool[Tensor, " U"]:
        """Return a mask of users with a trained id; empty if no ids of users are read."""
        return self.fields.taught_U & self.fields.user.has_id

    @property
    def reads_context(self) -> bool:
        """Whether the model reads features of the context."""
        return self.fields.context.has_features

    def begin(self, events: Interactions) -> None:
        """Record which users have a training event, and the range of the labels."""
        self.fields.begin(events)
        self.heads.begin(events)

    def learn_new_users(self, events: Interactions) -> None:
        """Learn how to answer new users."""
        self.fields.learn_new_users(events)


C = TypeVar("C", bound=IdConfig)
MakeFields = Callable[..., RowFields]
"""Makes the fields of a model from settings and features."""


class PairRanker(FieldRanker, ABC, Generic[C]):
    """A `FieldRanker` of pairs: a query's fields are computed once for all its items."""

    def __init__(
        self, config: C, *, num_users: int, num_items: int, features: Features | None = None
    ) -> None:
        """Make untrained weights.

        Args:
            config: The settings.
            num_users: Number of training users, 0 or more.
            num_items: Number of items in the catalogue, 1 or more.
            features: Features of users, items and contexts.

        Raises:
            ConfigError: Items have neither ids nor features, or the tasks are incomplete.
        """
        super().__init__()
        self.config = config
        make_fields = partial(
            RowFields, num_users=num_users, num_items=num_items, features=features
        )
        self.make(config, make_fields)

    @abstractmethod
    def make(self, config: C, make_fields: MakeFields) -> None:
        """Make `tasks`, `fields`, layers and `heads`."""

    @abstractmethod
    def of_fields(
        self, query_BQW: Float[Tensor, "B Q W"], item_ACGW: Float[Tensor, "A C G W"]
    ) -> Mapping[str, Float[Tensor, "B C"]]:
        """Return the inputs of the task heads from the fields of queries and items."""

    def read(
        self, queries: Queries, item_BC: Int64[Tensor, "B C"]
    ) -> tuple[Float[Tensor, "B Q W"], Float[Tensor, "B C G W"]]:
        """Return the fields of queries and items, for `of_fields`."""
        parts: RowParts = self.fields(queries, item_BC)
        return parts.query_BQW, parts.item_ACGW

    def raw(
        self, queries: Queries, item_BC: Int64[Tensor, "B C"]
    ) -> Mapping[str, Float[Tensor, "B C"]]:
        return self.of_fields(*self.read(queries, item_BC))

    def raw_of(
        self, queries: Queries, item_1CGW: Float[Tensor, "1 C G W"]
    ) -> Mapping[str, Float[Tensor, "B C"]]:
        return self.of_fields(self.fields.query(queries), item_1CGW)

    def score(self, queries: Queries) -> Float[Tensor, "B I"]:
        """Return every item's score, some items at a time."""
        query_BQW = self.fields.query(queries)
        return score_in_blocks(
            lambda item_1C: self.heads.rank(self.of_fields(query_BQW, self.fields.items(item_1C))),
            num_queries=len(queries),
            item_I=self.fields.item_I,
            block_pairs=_BLOCK_PAIRS,
        )


class HistoryConfig(RowFieldsConfig):
    """Settings of a ranker that may read histories."""

    pooling: Literal["auto", "attention", "mean", "none"] = "auto"
    """How a history becomes a vector: "attention", weighted by how much each event matters to the
    item that is scored; "mean", the mean of all events; "none", not at all. "auto": "attention" if
    a user has several training events, else "none"; "none" too if some events are negative (a click
    of 0) and no `positive` marks which are positive."""
    reads: Literal["auto", "before", "others"] = "auto"
    """What training reads as the history of a row: "before", the user's events before it; "others",
    the user's other events, drawn at random, for data whose order has no meaning. "auto": "others"
    if events have no times and the split does not use their order, because a model memorises
    training histories that it reads repeatedly, and is then worse on new ones; otherwise
    "before"."""
    max_len: Count = 50
    """Number of last events of a history that are read."""
    weights: Literal["softmax", "unnormalised"] = "softmax"
    """Whether attention weights sum to 1. If they do not, as in DIN's paper, they also measure how
    strong an interest is."""
    attention_hidden: Widths = Field(default=(36,), min_length=1)
    """Widths of the hidden layers that compute the attention weights."""

    @property
    def reads_history(self) -> bool:
        """Whether histories are read."""
        return self.pooling != "none"


H = TypeVar("H", bound=HistoryConfig)


class HistoryRanker(PairRanker[H], ABC):
    r"""A `PairRanker` that may read histories, as DIN does.

    With histories, an item has three times its fields: its own, :math:`e`, the vector of the
    history for it, :math:`u`, and :math:`u \odot e`.
    """

    folds_in: ClassVar[bool] = True
    """Whether new users' id vectors are also computed by regression on the histories."""

    def make_histories(
        self, config: H, make_fields: MakeFields, *, activation: Activation = "prelu"
    ) -> None:
        """Make the fields and the attention, untrained.

        Args:
            config: The settings.
            make_fields: The argument of `make`.
            activation: The activation in the hidden layers of the attention.

        Raises:
            ConfigError: Items have neither ids nor features.
        """
        self.max_len = config.max_len
        reads: Reads = "others" if config.reads == "others" else "before"
        self.reads: Reads = reads if config.reads_history else "nothing"
        self.fields = make_fields(
            config,
            reads_history=config.reads_history,
            folds_in=self.folds_in or not config.reads_history,
        )
        width = self.fields.num_item_fields * config.embedding_dim
        if not width and config.reads_history:
            raise ConfigError(
                'histories hold items without id or features: set model.pooling to "none", or '
                "model.item_id to true",
                name="pooling",
                value=config.pooling,
            )
        self.query_dim = self.fields.num_query_fields * config.embedding_dim
        self.item_dim = 3 * width if config.reads_history else width
        self.attention = (
            TargetAttention(
                width, config.attention_hidden, weights=config.weights, activation=activation
            )
            if self.attends
            else None
        )

    @property
    def attends(self) -> bool:
        """Whether the weights of a history's events depend on the scored item."""
        return self.config.pooling in ("auto", "attention")

    def attention_weights(
        self, queries: Queries, item_BC: Int64[Tensor, "B C"]
    ) -> Float[Tensor, "B C L"]:
        """Return the weight of each event for each item, 0 under padding.

        Position l is the l-th of the last `max_len` events of a history, and L is the length of the
        longest. With "mean" pooling, all events of a history have equal weights.

        Raises:
            ConfigError: The model does not read histories.
        """
        histories, parts = self._read_histories(queries, item_BC)
        width = max(batch.item_BL.shape[1] for batch in histories.batches)

        def weigh(event_BLK: Tensor, item_BCK: Tensor, valid_BL: Tensor) -> Tensor:
            weight_BCL = self._weights(event_BLK, item_BCK, valid_BL)
            return nn.functional.pad(weight_BCL, (0, width - weight_BCL.shape[2]))

        weight_BCL = histories.map(weigh, parts.history_MGW.flatten(1), parts.item_ACGW.flatten(2))
        return weight_BCL.expand(-1, item_BC.shape[1], -1)

    def user_vectors(
        self, queries: Queries, item_BC: Int64[Tensor, "B C"]
    ) -> Float[Tensor, "B C K"]:
        """Return the vector of each history for each item.

        Raises:
            ConfigError: The model does not read histories.
        """
        histories, parts = self._read_histories(queries, item_BC)
        pooled_BCK = self._pooled(
            histories, parts.history_MGW.flatten(1), parts.item_ACGW.flatten(2)
        )
        return pooled_BCK.expand(-1, item_BC.shape[1], -1)

    def read(
        self, queries: Queries, item_BC: Int64[Tensor, "B C"]
    ) -> tuple[Float[Tensor, "B Q W"], Float[Tensor, "B C G W"]]:
        """Return the fields of queries and items, three times as many with histories."""
        if not self.config.reads_history:
            return super().read(queries, item_BC)
        histories, parts = self._read_histories(queries, item_BC)
        return parts.query_BQW, self._beside(histories, parts.history_MGW, parts.item_ACGW)

    def raw_of(
        self, queries: Queries, item_1CGW: Float[Tensor, "1 C G W"]
    ) -> Mapping[str, Float[Tensor, "B C"]]:
        if not self.config.reads_history:
            return super().raw_of(queries, item_1CGW)
        histories, history_MGW = self._histories(queries)
        item_BCGW = self._beside(histories, history_MGW, item_1CGW)
        return self.of_fields(self.fields.query(queries), item_BCGW)

    def score(self, queries: Queries) -> Float[Tensor, "B I"]:
        """Return every item's score, some queries and items at a time."""
        if not self.config.reads_history:
            return super().score(queries)
        if len(queries) > _HISTORY_QUERIES:
            starts = range(0, len(queries), _HISTORY_QUERIES)
            return torch.cat([self.score(queries.part(at, at + _HISTORY_QUERIES)) for at in starts])
        query_BQW = self.fields.query(queries)
        histories, history_MGW = self._histories(queries)

        def rank(item_1C: Tensor) -> Tensor:
            item_BCGW = self._beside(histories, history_MGW, self.fields.items(item_1C))
            return self.heads.rank(self.of_fields(query_BQW, item_BCGW))

        return score_in_blocks(
            rank,
            num_queries=len(queries),
            item_I=self.fields.item_I,
            block_pairs=_HISTORY_PAIRS,
        )

    def penalty(self, queries: Queries, item_BC: Int64[Tensor, "B C"]) -> Float[Tensor, ""]:
        """Return the l2 penalty of the vectors in the batch."""
        reads = self.config.reads_history and self.config.l2
        history_M = group_histories(queries, self.max_len).items() if reads else None
        return self.fields.penalty(queries, item_BC, history_M)

    def _read_histories(
        self, queries: Queries, item_BC: Int64[Tensor, "B C"]
    ) -> tuple[Histories, RowParts]:
        if not self.config.reads_history:
            raise ConfigError(
                'model.pooling is "none": no history is read', name="pooling", value="none"
            )
        histories = group_histories(queries, self.max_len)
        return histories, self.fields(queries, item_BC, histories.items())

    def _histories(self, queries: Queries) -> tuple[Histories, Float[Tensor, "M G W"]]:
        """Return histories and the fields of their events."""
        histories = group_histories(queries, self.max_len)
        return histories, self.fields.items(histories.items().unsqueeze(0))[0]

    def _beside(
        self,
        histories: Histories,
        history_MGW: Float[Tensor, "M G W"],
        item_ACGW: Float[Tensor, "A C G W"],
    ) -> Float[Tensor, "B C _ W"]:
        """Append the history vectors, and their products with the item, to the item's fields."""
        item_ACK = item_ACGW.flatten(2)
        pooled_BCK = self._pooled(histories, history_MGW.flatten(1), item_ACK)
        both_BCK = pooled_BCK * item_ACK
        parts = item_ACK.expand_as(both_BCK), pooled_BCK.expand_as(both_BCK), both_BCK
        all_BCK = torch.cat(parts, dim=2)
        num_fields, width = item_ACGW.shape[2:]
        return all_BCK.view(*all_BCK.shape[:2], 3 * num_fields, width)

    def _pooled(
        self, histories: Histories, event_MK: Tensor, item_ACK: Tensor
    ) -> Float[Tensor, "B _ K"]:
        def read(event_BLK: Tensor, item_BCK: Tensor, valid_BL: Tensor) -> Tensor:
            return pool(self._weights(event_BLK, item_BCK, valid_BL), event_BLK)

        return histories.map(read, event_MK, item_ACK)

    def _weights(
        self, event_BLK: Tensor, item_BCK: Tensor, valid_BL: Tensor
    ) -> Float[Tensor, "B _ L"]:
        if self.attention is not None:
            weight_BCL: Tensor = self.attention(event_BLK, item_BCK, valid_BL)
            return weight_BCL
        return mean_weights(valid_BL)

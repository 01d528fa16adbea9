r"""DIN, a ranker and a catalogue scorer: what a user has done, as it bears on the item judged.

.. math:: u_t = \sum_j w_j(e_j, e_t)\, e_j, \quad
          s = MLP([x_u; x_c; e_t; u_t; u_t \odot e_t])

An item's vector e is its id and features side by side, for the history as for the item that is
judged; x are the features of the user and of the moment.

Zhou et al., "Deep Interest Network for Click-Through Rate Prediction", KDD 2018,
https://arxiv.org/abs/1706.06978

Departures: the activation unit sees the element-wise product in place of the outer one, as in the
authors' code; the MLP is also given :math:`u_t \odot e_t`, as in their later models; a softmax over
the weights is the default, the paper's unnormalised ones a setting.

Shape legend: B queries, A rows of items (B or 1), C items of each, L positions, M events laid out
group by group, Q fields of a query, G fields of an item, W width of a field, K = G W.
"""

from typing import ClassVar, Literal, final

import torch
from jaxtyping import Float, Int64
from pydantic import Field
from torch import Tensor, nn

from foretaste.config import ChoiceConfig, Count, RangeConfig, Space, Widths
from foretaste.data.batch import Queries
from foretaste.data.features import Features
from foretaste.data.histories import Reads
from foretaste.data.tasks import Task
from foretaste.errors import ConfigError
from foretaste.models.layers.field_ranker import FieldRanker
from foretaste.models.layers.grouped_histories import Histories, group_histories
from foretaste.models.layers.heads import Heads, score_in_blocks
from foretaste.models.layers.pair_mlp import Activation, PairMLP
from foretaste.models.layers.row_fields import RowFields, RowParts
from foretaste.models.layers.row_sides import RowFieldsConfig
from foretaste.models.layers.target_attention import TargetAttention, mean_weights, pool

_BLOCK_QUERIES, _BLOCK_PAIRS = 32, 2**13


class DINConfig(RowFieldsConfig):
    """Settings of DIN."""

    kind: Literal["din"] = "din"
    tuning: ClassVar[Space] = {
        "embedding_dim": ChoiceConfig(choices=(8, 16, 32)),
        "activation": ChoiceConfig(choices=("prelu", "dice")),
        "dropout": RangeConfig(low=0.0, high=0.5),
        "l2": RangeConfig(low=1e-07, high=0.001, log=True),
    }
    task: Task = Task(name="click")
    """What is predicted."""
    user_id: bool = False
    """Whether each user has a vector of their own, beside the history."""
    reads: Literal["before", "others"] = "before"
    """What training reads as the history of a row: the user's events before it, or others drawn at
    random, for data whose order means nothing."""
    max_len: Count = 50
    """How many events of a history are read, the last ones."""
    pooling: Literal["attention", "mean", "none"] = "attention"
    """How a history becomes a vector: by what each event has to say of the item, by the mean of
    all, or not at all."""
    weights: Literal["softmax", "unnormalised"] = "softmax"
    """Whether attention weights sum to 1; unnormalised, as in the paper, they also say how strong
    an interest is."""
    attention_hidden: Widths = Field(default=(36,), min_length=1)
    """Widths of the activation unit's hidden layers."""
    hidden: Widths = (200, 80)
    """Widths of the MLP's hidden layers."""
    activation: Literal["prelu", "dice"] = "prelu"
    """What follows hidden layers."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of values dropped after each hidden layer of the MLP."""


@final
class DIN(FieldRanker):
    """The network: fields, the activation unit, an MLP."""

    def __init__(
        self,
        config: DINConfig,
        *,
        num_users: int,
        num_items: int,
        features: Features | None = None,
    ) -> None:
        """Make untrained weights.

        Args:
            config: The settings.
            num_users: Users that training knows, 0 or more.
            num_items: Items of the catalogue, 1 or more.
            features: What else is known of them, and of moments.

        Raises:
            ConfigError: There is nothing to tell an item by.
        """
        super().__init__()
        self.config, self.tasks, self.max_len = config, (config.task,), config.max_len
        self.reads: Reads = "nothing" if config.pooling == "none" else config.reads
        self.fields = RowFields(
            config,
            num_users=num_users,
            num_items=num_items,
            features=features,
            reads_history=config.pooling != "none",
        )
        query_dim = self.fields.num_query_fields * config.embedding_dim
        item_dim = self.fields.num_item_fields * config.embedding_dim
        if not item_dim and config.pooling != "none":
            raise ConfigError(
                'histories are of one item, and nothing tells it: set model.pooling to "none", or '
                "model.item_id to true"
            )
        activation: Activation = config.activation
        self.attention = (
            TargetAttention(
                item_dim, config.attention_hidden, weights=config.weights, activation=activation
            )
            if config.pooling == "attention"
            else None
        )
        self.mlp = PairMLP(
            query_dim,
            item_dim if config.pooling == "none" else 3 * item_dim,
            config.hidden,
            1,
            dropout=config.dropout,
            activation=activation,
        )
        self.heads = Heads(self.tasks)

    @property
    def attends(self) -> bool:
        """Whether the weights of a history's events depend on the item that is judged."""
        return self.config.pooling == "attention"

    def attention_weights(
        self, queries: Queries, item_BC: Int64[Tensor, "B C"]
    ) -> Float[Tensor, "B C L"]:
        """Return how much each event says of each item, 0 under padding.

        Position l is the l-th of the last `max_len` events of a history, and L the longest of
        them. With "mean" pooling all events of a history weigh the same.

        Raises:
            ConfigError: The model reads no histories.
        """
        if self.config.pooling == "none":
            raise ConfigError('model.pooling is "none": no event of a history has a weight')
        histories = group_histories(queries, self.max_len)
        parts: RowParts = self.fields(queries, item_BC, histories.items())
        width = max(batch.item_BL.shape[1] for batch in histories.batches)

        def weigh(event_BLK: Tensor, item_BCK: Tensor, valid_BL: Tensor) -> Tensor:
            weight_BCL = self._weights(event_BLK, item_BCK, valid_BL)
            return nn.functional.pad(weight_BCL, (0, width - weight_BCL.shape[2]))

        weight_BCL = histories.map(weigh, parts.history_MGW.flatten(1), parts.item_ACGW.flatten(2))
        return weight_BCL.expand(-1, item_BC.shape[1], -1)

    def user_vectors(
        self, queries: Queries, item_BC: Int64[Tensor, "B C"]
    ) -> Float[Tensor, "B C K"]:
        """Return what each history comes to for each item.

        Raises:
            ConfigError: The model reads no histories.
        """
        if self.config.pooling == "none":
            raise ConfigError('model.pooling is "none": a history comes to nothing')
        histories = group_histories(queries, self.max_len)
        parts: RowParts = self.fields(queries, item_BC, histories.items())
        pooled_BCK = self._pooled(
            histories, parts.history_MGW.flatten(1), parts.item_ACGW.flatten(2)
        )
        return pooled_BCK.expand(-1, item_BC.shape[1], -1)

    def score(self, queries: Queries) -> Float[Tensor, "B I"]:
        """Return every item's score, some queries and items at a time."""
        if len(queries) > _BLOCK_QUERIES:
            starts = range(0, len(queries), _BLOCK_QUERIES)
            return torch.cat([self.score(queries.part(at, at + _BLOCK_QUERIES)) for at in starts])
        asked = self._asked(queries)

        def rank(item_1C: Tensor) -> Tensor:
            return self.heads.rank(self._raw(self.fields.items(item_1C), *asked))

        return score_in_blocks(
            rank,
            num_queries=len(queries),
            item_I=self.fields.item_I,
            block_pairs=_BLOCK_PAIRS,
        )

    def penalty(self, queries: Queries, item_BC: Int64[Tensor, "B C"]) -> Float[Tensor, ""]:
        """Return what the batch's vectors add to the loss for being long."""
        history_M = self._histories(queries).items() if self.config.l2 else None
        return self.fields.penalty(queries, item_BC, history_M)

    def _histories(self, queries: Queries) -> Histories:
        if self.config.pooling == "none":
            return Histories(queries.user_B, [])
        return group_histories(queries, self.max_len)

    def raw_of(
        self, queries: Queries, item_1CGW: Float[Tensor, "1 C G W"]
    ) -> dict[str, Float[Tensor, "B C"]]:
        return self._raw(item_1CGW, *self._asked(queries))

    def _asked(self, queries: Queries) -> tuple[Tensor, Histories, Tensor]:
        """Return what `_raw` reads beside items: the queries' fields, histories, their events."""
        histories = self._histories(queries)
        event_MGW = self.fields.items(histories.items().unsqueeze(0))[0]
        return self.fields.query(queries), histories, event_MGW.flatten(1)

    def raw(
        self, queries: Queries, item_BC: Int64[Tensor, "B C"]
    ) -> dict[str, Float[Tensor, "B C"]]:
        histories = self._histories(queries)
        parts: RowParts = self.fields(queries, item_BC, histories.items())
        return self._raw(parts.item_ACGW, parts.query_BQW, histories, parts.history_MGW.flatten(1))

    def _raw(
        self,
        item_ACGW: Float[Tensor, "A C G W"],
        query_BQW: Float[Tensor, "B Q W"],
        histories: Histories,
        event_MK: Float[Tensor, "M K"],
    ) -> dict[str, Float[Tensor, "B C"]]:
        item_ACK = item_ACGW.flatten(2)
        if self.config.pooling != "none":
            pooled_BCK = self._pooled(histories, event_MK, item_ACK)
            both_BCK = pooled_BCK * item_ACK
            parts = item_ACK.expand_as(both_BCK), pooled_BCK.expand_as(both_BCK), both_BCK
            item_ACK = torch.cat(parts, dim=2)
        raw_BC1: Tensor = self.mlp(query_BQW.flatten(1), item_ACK)
        return {self.tasks[0].name: raw_BC1.squeeze(2)}

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

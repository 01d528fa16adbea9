r"""MF, a retriever: a vector for each user and each item, compared by their dot product.

.. math:: s_{ui} = p_u \cdot q_i + b_i

Koren, Bell and Volinsky, "Matrix Factorization Techniques for Recommender Systems", Computer 2009,
https://doi.org/10.1109/MC.2009.263

Departures: no bias of users, which would not change a ranking; a new user is represented by a
regression on the history (`FoldIn`), and the newest events may weigh more in answers (`recency`).

Shape legend: B users, V items, I items of the catalogue, D width.
"""

from typing import ClassVar, Literal, final

import torch
from jaxtyping import Float, Int64
from pydantic import Field
from torch import Tensor

from foretaste.config import ChoiceConfig, Count, Positive, RangeConfig, Space, Usual
from foretaste.data.batch import Queries
from foretaste.data.draws import draw_for_rows
from foretaste.data.interactions import Interactions
from foretaste.models.base import PairVectors, Retriever, Similarity, as_item, as_query
from foretaste.models.layers.history import FoldIn
from foretaste.models.layers.table import Table
from foretaste.models.layers.table_kinds import FactorConfig


class MFConfig(FactorConfig):
    """Settings of matrix factorisation."""

    kind: Literal["mf"] = "mf"
    tuning: ClassVar[Space] = {
        "embedding_dim": ChoiceConfig(choices=(32, 64, 128)),
        "dropout": RangeConfig(low=0.0, high=0.5),
    }
    usual: ClassVar[Usual] = Usual(
        objective={
            "kind": "pairs",
            "loss": "sampled_softmax",
            "negatives": 2048,
            "log_q": False,
            "l2": 0.1,
        },
        training={"learning_rate": 1e-2, "ema_decay": 0.99},
        l2_by_counts="always",
    )
    """Softmax over 2048 negatives, which covers a small catalogue at once; without correction, so
    that the products include popularity; l2 limits the vectors at the high learning rate of 1e-2.
    The average of the last hundred steps is less noisy than a step at this rate. On validation:
    Gowalla .052 (without .049), S3-Rec's Last.fm .051 (.050), MovieLens-100K .091 (.092), Beauty
    .043 (.043).
    """
    embedding_dim: Count = 64
    """Width of the vectors."""
    biases: bool = False
    """Whether items have a bias, which is an additional column of their vectors."""
    similarity: Similarity = "dot"
    """How two vectors are compared: by dot product, or by cosine."""
    temperature: Positive = 1.0
    """Divisor of the scores; below 1 for the cosine, whose range is small."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of the coordinates of user vectors dropped in training."""
    init_std: Positive = 0.05
    """Standard deviation of the initial vectors."""


@final
class MF(Retriever):
    """The network: two tables."""

    learns_by = "pairs"

    def __init__(self, config: MFConfig, *, num_users: int, num_items: int) -> None:
        super().__init__()
        self.config, self.init, self.recency = config, config.init, config.known_recency
        self.num_items = num_items
        self.user_table = config.table.make(num_users, config.embedding_dim)
        self.item_table = config.table.make(num_items, config.embedding_dim)
        self.bias_table = config.table.make(num_items, 1) if config.biases else None
        self.fold_in = FoldIn(num_users=num_users, embedding_dim=config.embedding_dim)
        for table in (self.user_table, self.item_table):
            table.draw(std=config.init_std)
        if self.bias_table is not None:
            self.bias_table.zero_rows(torch.ones(num_items, dtype=torch.bool))

    def forward(self, queries: Queries, item_V: Int64[Tensor, " V"]) -> PairVectors:
        """Return the vectors of known users and of some items."""
        user_BD, item_VD = self.user_table(queries.user_B), self.item_table(item_V)
        return PairVectors(
            query_BD=self._query(self._dropped(user_BD)),
            item_VD=self._with_bias(item_V, item_VD),
            base=(user_BD, item_VD),
        )

    def encode(self, queries: Queries) -> Float[Tensor, "B D"]:
        """Return each user's vector, by regression for users without training events."""
        tables = self.user_table, self.item_table
        return self._query(self.fold_in(queries, *tables, recency=self.recency))

    def items(self, item_V: Int64[Tensor, " V"]) -> Float[Tensor, "V D"]:
        """Return some items' vectors, the bias as a last column."""
        return self._with_bias(item_V, self.item_table(item_V))

    @property
    def item_rows(self) -> Table | None:
        """The table of items, if its rows are the vectors."""
        as_they_are = self.config.similarity == "dot" and not self.config.biases
        return self.item_table if as_they_are else None

    def learn_new_users(self, events: Interactions) -> None:
        """Learn how to answer new users."""
        self.fold_in.learn(events, self.user_table, self.item_table)

    def _dropped(self, user_BD: Tensor) -> Tensor:
        kept = 1 - self.config.dropout
        if not self.training or kept == 1:
            return user_BD
        draw = user_BD.new_empty
        kept_BD = draw_for_rows(user_BD.shape, lambda shape: draw(shape).bernoulli_(kept))
        return user_BD * kept_BD / kept

    def _query(self, user_BD: Tensor) -> Tensor:
        query_BD = as_query(user_BD, self.config.similarity, self.config.temperature)
        if self.bias_table is None:
            return query_BD
        return torch.cat([query_BD, torch.ones_like(query_BD[:, :1])], dim=1)

    def _with_bias(self, item_V: Tensor, item_VD: Tensor) -> Tensor:
        item_VD = as_item(item_VD, self.config.similarity)
        if self.bias_table is None:
            return item_VD
        return torch.cat([item_VD, self.bias_table(item_V)], dim=1)

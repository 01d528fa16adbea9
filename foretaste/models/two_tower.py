r"""Two-Tower, a retriever: users and items are each represented by their own inputs.

.. math:: s_{ui} = f(x_u) \cdot g(y_i)

A tower reads an id embedding, features and, for users, the history; these parts are added, or
concatenated before an MLP. The item tower's vectors are computed once, for an index; only the query
tower runs in an answer.

Covington, Adams and Sargin, "Deep Neural Networks for YouTube Recommendations", RecSys 2016,
https://doi.org/10.1145/2959100.2959190; Yi et al., "Sampling-Bias-Corrected Neural Modeling for
Large Corpus Item Recommendations", RecSys 2019, https://doi.org/10.1145/3298689.3346996

Departures: histories are embedded by the item tower's own ids and features, before its MLP; ids may
be dropped in training, so that features learn to work without an id (DropoutNet, Volkovs, Yu and
Poutanen, NeurIPS 2017); a user or item without a training event has the id vector 0.

Shape legend: B users, V items, I items of the catalogue, R items of a batch, D width, N events of
all histories.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import ClassVar, Literal, NamedTuple, final

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from pydantic import Field, model_validator
from torch import Tensor, nn

from foretaste.config import (
    ChoiceConfig,
    Count,
    Depth,
    Positive,
    RangeConfig,
    Space,
    Usual,
    Widths,
)
from foretaste.data.batch import Queries, Reads
from foretaste.data.draws import draw_for_keys, draw_for_rows, fill_blocks, own_blocks
from foretaste.data.features import Features, FieldTable
from foretaste.data.interactions import Interactions
from foretaste.errors import ConfigError
from foretaste.models.base import PairVectors, Retriever, Similarity, as_item, as_query
from foretaste.models.layers.dense import MLP
from foretaste.models.layers.embedding import Fusion, fields_of_items, fields_of_users, known_fields
from foretaste.models.layers.history import AttentionHistory, CausalHistory, FoldIn, MeanHistory
from foretaste.models.layers.table import Table
from foretaste.models.layers.table_kinds import FactorConfig
from foretaste.models.mf import MFConfig
from foretaste.models.sasrec import SASRecConfig

_BLOCK_ITEMS = 2**14


DrawFor = Callable[[Callable[[torch.Size], Tensor]], Tensor]
"""Draws random numbers for rows or keys, given a function that draws a shape."""


class TwoTowerConfig(FactorConfig):
    """Settings of Two-Tower."""

    kind: Literal["two_tower"] = "two_tower"
    tuning: ClassVar[Space] = {
        "embedding_dim": ChoiceConfig(choices=(32, 64, 128)),
        "id_dropout": RangeConfig(low=0.0, high=0.5),
        "temperature": RangeConfig(low=0.05, high=1.0, log=True),
    }
    usual: ClassVar[Usual] = MFConfig.usual._replace(l2_by_counts="without features")
    """As MF."""
    embedding_dim: Count = 64
    """Width of each input vector and of both towers' outputs."""
    user_id: bool = True
    """Whether each user has a vector."""
    item_id: bool = True
    """Whether each item has a vector."""
    user_features: bool = True
    """Whether the features of users are read, if there are any."""
    item_features: bool = True
    """Whether the features of items are read, if there are any."""
    fusion: Fusion = "gate"
    """How a row's features become one vector."""
    history: Literal["none", "mean", "attention", "sasrec"] = "none"
    """How a user's history becomes a vector; "sasrec" reads its order."""
    reads: Literal["before", "others"] = "before"
    """What training reads as the history of a pair: "before", the user's events before it;
    "others", the user's other events, drawn at random, for data whose order has no meaning."""
    max_len: Count = 50
    """Number of events of a history that are read; with `reads = "others"`, only in training."""
    num_heads: Count = 2
    """Attention heads of "attention" and "sasrec"."""
    num_blocks: Depth = 2
    """Blocks of "sasrec"."""
    query_hidden: Widths = ()
    """Widths of the query tower's hidden layers. Without any, the input vectors are added."""
    item_hidden: Widths = ()
    """Widths of the item tower's hidden layers. Without any, the input vectors are added."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of values dropped in hidden layers and in "sasrec"."""
    id_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of training rows whose id is hidden: items are then represented by features alone,
    users by features and history."""
    similarity: Similarity = "dot"
    """How two vectors are compared: by dot product, or by cosine."""
    temperature: Positive = 1.0
    """Divisor of the scores; below 1 for the cosine, whose range is small."""
    init_std: Positive = 0.05
    """Standard deviation of the initial id vectors."""

    @model_validator(mode="after")
    def _order_is_known(self) -> "TwoTowerConfig":
        if self.history == "sasrec" and self.reads == "others":
            raise ValueError(
                'history "sasrec" reads the order, and reads "others" has none: read "before", or '
                'take "mean" or "attention"'
            )
        return self


@final
class TwoTower(Retriever):
    """The network: the inputs of users and of items, with a tower over each."""

    learns_by = "pairs"

    def __init__(
        self,
        config: TwoTowerConfig,
        *,
        num_users: int,
        num_items: int,
        features: Features | None = None,
    ) -> None:
        """Make untrained weights.

        Args:
            config: The settings.
            num_users: Number of training users, 0 or more.
            num_items: Number of items in the catalogue, 1 or more.
            features: Features of users and items.

        Raises:
            ConfigError: A tower has no input.
        """
        super().__init__()
        width = config.embedding_dim
        self.config, self.init, self.num_items = config, config.init, num_items
        self.reads: Reads = "nothing" if config.history == "none" else config.reads
        self.max_len = config.max_len
        self.user_table = _ids(num_users, config) if config.user_id else None
        self.item_table = _ids(num_items, config) if config.item_id else None
        self.user_fields, self.item_fields = (
            known_fields(given, embedding_dim=width, fusion=config.fusion, table=config.table)
            for given in (
                fields_of_users(features if config.user_features else None, num_users),
                fields_of_items(features if config.item_features else None, num_items),
            )
        )
        self.history = _history(config)
        num_query = sum(p is not None for p in (self.user_table, self.user_fields, self.history))
        num_item = sum(p is not None for p in (self.item_table, self.item_fields))
        if not num_query or not num_item:
            raise ConfigError(_nothing_to_read("item" if num_query else "user"), name="features")
        self.query_mlp = _mlp(num_query, config.query_hidden, config)
        self.item_mlp = _mlp(num_item, config.item_hidden, config)
        self.everybody = (
            nn.Parameter(config.init_std * torch.randn(width)) if self.query_mlp is None else None
        )
        self.fold_in = (
            FoldIn(num_users=num_users, embedding_dim=width)
            if self.user_table is not None and self.history is None
            else None
        )
        self.recency = None if self.fold_in is None else config.known_recency
        self._kept: list[tuple[int, Tensor]] | None = None

    def forward(self, queries: Queries, item_V: Int64[Tensor, " V"]) -> PairVectors:
        """Return the vectors of users and of some items."""
        user_BD = None if self.user_table is None else self.user_table(queries.user_B)
        item_VD = None if self.item_table is None else self.item_table(item_V)
        needed = self._needed(queries, item_V)
        query_BD = self._query(queries, self._without_some_users(user_BD), needed)
        own_VD = self._without_some_items(item_VD, item_V)
        parts = [] if own_VD is None else [own_VD]
        if needed is not None and needed.field_RD is not None:
            parts.append(F.embedding(needed.place_V, needed.field_RD))
        return PairVectors(
            query_BD=query_BD,
            item_VD=self._item_tower(parts),
            base=tuple(row_RD for row_RD in (user_BD, item_VD) if row_RD is not None),
        )

    def encode(self, queries: Queries) -> Float[Tensor, "B D"]:
        """Return each user's vector; this does not need the item tower's MLP.

        A new user is represented by history and features. If a model reads only ids of users, a
        regression on the history gives the id vector (`FoldIn`).
        """
        needed = None if self.history is None else self._needed(queries, queries.user_B[:0])
        if self.user_table is None:
            return self._query(queries, None, needed)
        if self.fold_in is None:
            return self._query(queries, self.user_table(queries.user_B), needed)
        tables = self.user_table, self._base_vectors
        folded_BD: Tensor = self.fold_in(queries, *tables, recency=self.recency)
        return self._query(queries, folded_BD, needed)

    def items(self, item_V: Int64[Tensor, " V"]) -> Float[Tensor, "V D"]:
        """Return some items' vectors."""
        return self._item_tower(self._own_parts(item_V))

    def item_blocks(self) -> Iterator[tuple[int, Float[Tensor, "V D"]]]:
        """Yield every item's vector; vectors are kept in evaluation mode."""
        if self.training:
            yield from self._worked_out()
            return
        if self._kept is None:
            with torch.inference_mode(mode=False):
                self._kept = self._worked_out()
        yield from self._kept

    def known_items(self) -> Bool[Tensor, " I"]:
        """Return a mask of items with a known feature."""
        if self.item_fields is None:
            return torch.zeros(self.num_items, dtype=torch.bool)
        return self.item_fields.known_R

    @property
    def reads_profiles(self) -> bool:
        """Whether the model reads users' features."""
        return self.user_fields is not None

    @property
    def scores_new_items(self) -> bool:
        """Whether the model reads items' features."""
        return self.item_fields is not None

    def item_from_features(self, table: FieldTable) -> Float[Tensor, "R D"]:
        """Return items' vectors from their features, with an id vector of 0.

        Raises:
            ConfigError: The model reads no features of items.
        """
        if self.item_fields is None:
            raise ConfigError(
                "this model reads no features of items, so it cannot represent new ones"
            )
        told_RD = self.item_fields.encoder(table)
        own = [] if self.item_table is None else [torch.zeros_like(told_RD)]
        return self._item_tower([*own, told_RD])

    def begin(self, events: Interactions) -> None:
        """Set id vectors without training events to 0."""
        super().begin(events)
        untrained_U = torch.from_numpy(np.diff(events.offsets) == 0)
        untrained_I = torch.from_numpy(events.item_count == 0)
        for table, untrained_R in ((self.user_table, untrained_U), (self.item_table, untrained_I)):
            if table is not None:
                table.zero_rows(untrained_R)

    def learn_new_users(self, events: Interactions) -> None:
        """Learn how to answer new users from their histories, and compute every item's vector."""
        if self.fold_in is not None and self.user_table is not None:
            self.fold_in.learn(events, self.user_table, self._base_vectors)
        if not self.training:
            list(self.item_blocks())

    def train(self, mode: bool = True) -> "TwoTower":  # noqa: FBT001, FBT002 - torch's signature
        """Set the mode, and clear values computed from earlier weights."""
        self._kept = None
        super().train(mode)
        return self

    @torch.no_grad()
    def _worked_out(self) -> list[tuple[int, Tensor]]:
        every_I = self.every_item
        none_VD = self.items(every_I[:0])
        vector_ID = none_VD.new_zeros(len(every_I), none_VD.shape[1])
        for rows in own_blocks(len(every_I), _BLOCK_ITEMS):
            vector_ID[rows] = self.items(every_I[rows])
        fill_blocks(vector_ID)
        return list(
            zip(range(0, len(every_I), _BLOCK_ITEMS), vector_ID.split(_BLOCK_ITEMS), strict=True)
        )

    def _query(
        self, queries: Queries, id_BD: Tensor | None, needed: "_Needed | None"
    ) -> Float[Tensor, "B D"]:
        parts = [] if id_BD is None else [id_BD]
        if self.user_fields is not None:
            parts.append(self.user_fields(queries.user_B, queries.profile))
        if self.history is not None and needed is not None:
            rows = replace(queries, history_N=needed.place_N)
            parts.append(self.history(rows, self._base(needed.item_R, needed.field_RD)))
        query_BD = _sum_or_mlp(parts, self.query_mlp)
        if self.everybody is not None:
            query_BD = query_BD + self.everybody
        return as_query(query_BD, self.config.similarity, self.config.temperature)

    def _needed(self, queries: Queries, item_V: Tensor) -> "_Needed | None":
        """Find the items of a batch and encode their features once; None if neither is needed."""
        if self.item_fields is None and self.history is None:
            return None
        parts = [item_V]
        if self.history is not None:
            parts += [queries.history_N, item_V.new_zeros(1)]  # padding has item 0
        item_R, place = torch.cat(parts).unique(return_inverse=True)
        num = len(item_V)
        return _Needed(
            item_R=item_R,
            place_V=place[:num],
            place_N=place[num:-1],
            field_RD=None if self.item_fields is None else self.item_fields(item_R),
        )

    def _item_tower(self, parts: Sequence[Tensor]) -> Tensor:
        return as_item(_sum_or_mlp(parts, self.item_mlp), self.config.similarity)

    def _own_parts(self, item_V: Tensor) -> list[Tensor]:
        parts = [] if self.item_table is None else [self.item_table(item_V)]
        if self.item_fields is not None:
            parts.append(self.item_fields(item_V))
        return parts

    def _base(self, item_R: Tensor, field_RD: Tensor | None) -> Float[Tensor, "R D"]:
        """Return the vectors of items in histories, before the item tower's MLP."""
        parts = [] if self.item_table is None else [self.item_table(item_R)]
        return _sum_or_mlp(parts if field_RD is None else [*parts, field_RD], None)

    def _base_vectors(self, item_N: Int64[Tensor, " N"]) -> Float[Tensor, "N D"]:
        """Return the same for repeated items, each computed once."""
        item_R, place_N = item_N.unique(return_inverse=True)
        field_RD = None if self.item_fields is None else self.item_fields(item_R)
        return F.embedding(place_N, self._base(item_R, field_RD))

    def _without_some_users(self, id_BD: Tensor | None) -> Tensor | None:
        """Drop ids of users with other information."""
        if id_BD is None or (self.history is None and self.user_fields is None):
            return id_BD
        return self._drop(id_BD, partial(draw_for_rows, id_BD.shape[:1]))

    def _without_some_items(self, id_VD: Tensor | None, item_V: Tensor) -> Tensor | None:
        """Drop ids of items with a feature."""
        if id_VD is None or self.item_fields is None:
            return id_VD
        may_V = self.item_fields.known_R[item_V]
        return self._drop(id_VD, partial(draw_for_keys, item_V), may_V)

    def _drop(self, id_RD: Tensor, draw: DrawFor, may_R: Tensor | None = None) -> Tensor:
        share = self.config.id_dropout
        if not self.training or share == 0:
            return id_RD
        dropped_R = draw(partial(torch.rand, device=id_RD.device)) < share
        if may_R is not None:
            dropped_R &= may_R
        return id_RD.masked_fill(dropped_R.unsqueeze(1), 0.0)


class _Needed(NamedTuple):
    """The distinct items that a batch needs."""

    item_R: Int64[Tensor, " R"]
    place_V: Int64[Tensor, " V"]
    """Positions in `item_R` of the items to compare with."""
    place_N: Int64[Tensor, " N"]
    """Positions in `item_R` of the items of histories."""
    field_RD: Float[Tensor, "R D"] | None
    """Their encoded features."""


def _ids(num_rows: int, config: TwoTowerConfig) -> Table:
    table = config.table.make(num_rows, config.embedding_dim)
    table.draw(std=config.init_std)
    return table


def _history(
    config: TwoTowerConfig,
) -> MeanHistory | AttentionHistory | CausalHistory | None:
    width, most = config.embedding_dim, config.max_len if config.reads == "before" else sys.maxsize
    match config.history:
        case "none":
            return None
        case "mean":
            return MeanHistory(max_len=most)
        case "attention":
            return AttentionHistory(width, config.num_heads, max_len=most)
        case "sasrec":
            return CausalHistory(
                SASRecConfig(
                    block="original",
                    embedding_dim=width,
                    num_blocks=config.num_blocks,
                    num_heads=config.num_heads,
                    max_len=config.max_len,
                    dropout=config.dropout,
                )
            )


def _mlp(num_parts: int, hidden: tuple[int, ...], config: TwoTowerConfig) -> MLP | None:
    if not hidden:
        return None
    width = config.embedding_dim
    return MLP(num_parts * width, hidden, width, dropout=config.dropout)


def _sum_or_mlp(parts: Sequence[Tensor], mlp: MLP | None) -> Tensor:
    if mlp is None:
        return torch.stack(tuple(parts)).sum(dim=0) if len(parts) > 1 else parts[0]
    output: Tensor = mlp(torch.cat(tuple(parts), dim=1))
    return output


def _nothing_to_read(side: str) -> str:
    more = ", a history" if side == "user" else ""
    return (
        f"the tower of {side}s has no input: set model.{side}_id, or give it{more} or "
        f"features of {side}s"
    )

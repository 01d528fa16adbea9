r"""Shared-Bottom, a ranker and a catalogue scorer: one network below, a tower for each task above.

.. math:: s^{(t)} = h^{(t)}(f(x))

Caruana, "Multitask Learning", Machine Learning 1997, https://doi.org/10.1023/A:1007379606734

Shape legend: B queries, A rows of items (B or 1), C items of each, Q fields of a query, G fields
of an item, W width of a field.
"""

from collections.abc import Mapping
from typing import Literal, final

from jaxtyping import Bool, Float, Int64
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from foretaste.data.batch import Queries
from foretaste.data.features import Features
from foretaste.data.interactions import Interactions
from foretaste.data.pairs import Reads
from foretaste.data.tasks import Task
from foretaste.models.layers.experts import Towers
from foretaste.models.layers.heads import Heads, score_in_blocks
from foretaste.models.layers.pair_mlp import PairMLP
from foretaste.models.layers.row_fields import RowFields, RowFieldsConfig, RowParts

_BLOCK_PAIRS = 2**16


class SharedBottomConfig(RowFieldsConfig):
    """Settings of Shared-Bottom."""

    kind: Literal["shared_bottom"] = "shared_bottom"
    tasks: tuple[Task, ...] = (Task(name="click"),)
    """What is predicted."""
    bottom_hidden: tuple[PositiveInt, ...] = Field(default=(128, 64), min_length=1)
    """Widths of the layers that all tasks share."""
    tower_hidden: tuple[PositiveInt, ...] = (32,)
    """Widths of each task's own hidden layers."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of values dropped after each layer."""


@final
class SharedBottom(nn.Module):
    """The network: fields, the bottom, towers."""

    def __init__(
        self,
        config: SharedBottomConfig,
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
            ConfigError: There is nothing to tell an item by, or the tasks are not whole.
            TooLargeError: A table would not fit in memory.
        """
        super().__init__()
        self.config, self.tasks, self.max_len = config, config.tasks, 0
        self.reads: Reads = "nothing"
        self.heads = Heads(self.tasks)
        self.fields = RowFields(config, num_users=num_users, num_items=num_items, features=features)
        width = config.embedding_dim
        self.bottom = PairMLP(
            self.fields.num_query_fields * width,
            self.fields.num_item_fields * width,
            config.bottom_hidden,
            dropout=config.dropout,
        )
        self.towers = Towers(
            self.tasks, config.bottom_hidden[-1], config.tower_hidden, dropout=config.dropout
        )

    def forward(self, queries: Queries, item_BC: Int64[Tensor, "B C"]) -> dict[str, Tensor]:
        """Return what each task learns from."""
        outputs: dict[str, Tensor] = self.heads(self._raw(*self._parts(queries, item_BC)))
        return outputs

    def predict(
        self, queries: Queries, item_BC: Int64[Tensor, "B C"]
    ) -> dict[str, Float[Tensor, "B C"]]:
        """Return each task's prediction."""
        return self.heads.predict(self._raw(*self._parts(queries, item_BC)))

    def score(self, queries: Queries) -> Float[Tensor, "B I"]:
        """Return every item's score, some items at a time."""
        query_BQW = self.fields.query(queries)
        return score_in_blocks(
            lambda item_1C: self.heads.rank(self._raw(query_BQW, self.fields.items(item_1C))),
            num_queries=len(queries),
            item_I=self.fields.item_I,
            block_pairs=_BLOCK_PAIRS,
        )

    def penalty(self, queries: Queries, item_BC: Int64[Tensor, "B C"]) -> Float[Tensor, ""]:
        """Return what the batch's vectors add to the loss for being long."""
        return self.fields.penalty(queries, item_BC)

    def placed_I(self) -> Bool[Tensor, " I"]:
        """Return which items have a feature that says something."""
        return self.fields.placed_I()

    @property
    def reads_profiles(self) -> bool:
        """Whether users' features are read."""
        return self.fields.reads_profiles

    def begin(self, events: Interactions) -> None:
        """Take from the training events who has one, and where their labels lie."""
        self.fields.begin(events)
        self.heads.begin(events)

    def learn_newcomers(self, events: Interactions) -> None:
        """Learn how to answer users whom training never saw."""
        self.fields.learn_newcomers(events)

    def _parts(self, queries: Queries, item_BC: Tensor) -> tuple[Tensor, Tensor]:
        parts: RowParts = self.fields(queries, item_BC)
        return parts.query_BQW, parts.item_ACGW

    def _raw(
        self, query_BQW: Float[Tensor, "B Q W"], item_ACGW: Float[Tensor, "A C G W"]
    ) -> Mapping[str, Float[Tensor, "B C"]]:
        state_BCH: Tensor = self.bottom(query_BQW.flatten(1), item_ACGW.flatten(2))
        raw: Mapping[str, Tensor] = self.towers([state_BCH] * len(self.tasks))
        return raw

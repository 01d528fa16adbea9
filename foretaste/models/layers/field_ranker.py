"""What all rankers over fields do alike: from a model's raw outputs to answers.

An abstract class and not a set of functions: five models owe a dozen doors each, and what differs
between them is one method.

Shape legend: B queries, A rows of items (B, or 1 where all queries have the same), C items of
each, I items, Q fields of a query, G fields of an item, W width of a field.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping

from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from foretaste.data.batch import Queries
from foretaste.data.features import FieldTable
from foretaste.data.histories import Reads
from foretaste.data.interactions import Interactions
from foretaste.data.tasks import Task
from foretaste.models.layers.heads import Heads, score_in_blocks
from foretaste.models.layers.row_fields import RowFields, RowParts

_BLOCK_PAIRS = 2**16


class FieldRanker(nn.Module, ABC):
    """A `Ranker` that reads `RowFields` and answers by `Heads`; a subclass makes both."""

    tasks: tuple[Task, ...]
    reads: Reads = "nothing"
    max_len = 0
    fields: RowFields
    heads: Heads

    @abstractmethod
    def raw(
        self, queries: Queries, item_BC: Int64[Tensor, "B C"]
    ) -> Mapping[str, Float[Tensor, "B C"]]:
        """Return what the heads of a batch's tasks read."""

    @abstractmethod
    def raw_of(
        self, queries: Queries, item_1CGW: Float[Tensor, "1 C G W"]
    ) -> Mapping[str, Float[Tensor, "B C"]]:
        """Return what the heads read of items that all queries share, given by their fields."""

    @abstractmethod
    def score(self, queries: Queries) -> Float[Tensor, "B I"]:
        """Return every item's score, some items at a time."""

    def forward(self, queries: Queries, item_BC: Int64[Tensor, "B C"]) -> dict[str, Tensor]:
        """Return what each task learns from."""
        outputs: dict[str, Tensor] = self.heads(self.raw(queries, item_BC))
        return outputs

    def predict(
        self, queries: Queries, item_BC: Int64[Tensor, "B C"]
    ) -> dict[str, Float[Tensor, "B C"]]:
        """Return each task's prediction."""
        return self.heads.predict(self.raw(queries, item_BC))

    def penalty(self, queries: Queries, item_BC: Int64[Tensor, "B C"]) -> Float[Tensor, ""]:
        """Return what the batch's vectors add to the loss for being long."""
        return self.fields.penalty(queries, item_BC)

    def placed_I(self) -> Bool[Tensor, " I"]:
        """Return which items have a feature that says something."""
        return self.fields.placed_I()

    @property
    def judges_new_items(self) -> bool:
        """Whether items' features are read."""
        return self.fields.judges_new_items

    def of_new_items(self, queries: Queries, table: FieldTable) -> dict[str, Tensor]:
        """Return what each task learns from, of items that are in no table.

        Raises:
            ConfigError: The model reads no features of items.
        """
        outputs: dict[str, Tensor] = self.heads(self.raw_of(queries, self.fields.new_items(table)))
        return outputs

    @property
    def reads_profiles(self) -> bool:
        """Whether users' features are read."""
        return self.fields.reads_profiles

    def taught_U(self) -> Bool[Tensor, " U"]:
        """Return whose id training taught; nobody's where no ids of users are read."""
        return self.fields.taught_U & self.fields.user.has_id

    @property
    def reads_moments(self) -> bool:
        """Whether features of moments are read."""
        return self.fields.context.has_features

    def begin(self, events: Interactions) -> None:
        """Take from the training events who has one, and where their labels lie."""
        self.fields.begin(events)
        self.heads.begin(events)

    def learn_newcomers(self, events: Interactions) -> None:
        """Learn how to answer users whom training never saw, where no history is read."""
        self.fields.learn_newcomers(events)


class PairRanker(FieldRanker, ABC):
    """A `FieldRanker` without histories: a query's fields are worked out once for all its items."""

    @abstractmethod
    def of_fields(
        self, query_BQW: Float[Tensor, "B Q W"], item_ACGW: Float[Tensor, "A C G W"]
    ) -> Mapping[str, Float[Tensor, "B C"]]:
        """Return what the heads read, from the fields of queries and items."""

    def raw(
        self, queries: Queries, item_BC: Int64[Tensor, "B C"]
    ) -> Mapping[str, Float[Tensor, "B C"]]:
        parts: RowParts = self.fields(queries, item_BC)
        return self.of_fields(parts.query_BQW, parts.item_ACGW)

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

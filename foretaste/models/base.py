"""The base of all models: a network whose attributes and methods show what it can do.

A retriever has a vector for each query and each item, a ranker judges given items, a scorer gives
every item a score. A model overrides the attributes and methods of its capabilities and inherits
the rest; other packages use nothing else, and never a model's name.

Shape legend: B queries, I items, U users, V items of a batch, C items of each query, D width,
E experts, K thresholds of an ordinal task or length of a list, L positions, N scores, R rows.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from foretaste.config import Config
from foretaste.data.batch import Prepared, Queries, Reads
from foretaste.data.features import FieldTable
from foretaste.data.interactions import Interactions
from foretaste.data.tasks import Task
from foretaste.errors import ConfigError
from foretaste.models.layers.codes import Codes
from foretaste.models.layers.heads import Heads
from foretaste.models.layers.table import BLOCK_ROWS, Table
from foretaste.models.layers.table_kinds import Quantised, code_by_events

LearnsBy = Literal["pairs", "next_item", "masked_item", "rows", "events"]
"""The kind of training data, which determines the arguments and the result of `forward`.

"pairs": `(queries, item_V)` to `PairVectors`, and a third argument where `prepare` gives one.
"next_item": a `SequenceBatch` to L + 1 states a row, before any event and after each.
"masked_item": a `SequenceBatch` and places (B, T) to the states of these hidden places.
"rows": `(queries, item_BC)` to what each task learns from, by its name.
"events": nothing; `learn` takes all events at once, without steps of gradient descent.
"""


class StrengthConfig(Config):
    """Settings of a model whose strengths are chosen by validation if they are "auto"."""

    strengths: ClassVar[Mapping[str, tuple[float, ...]]] = {}
    """By setting, what is tried. The first one is taken where nothing can be tried."""
    most_events: ClassVar[int] = 500_000
    """Nothing is tried on more events than these: they need less of a strength, and cost more."""
    most_items: ClassVar[int] = 1_000_000_000
    """Nothing is tried over more items than these."""

    def strength(self, name: str) -> float:
        """Return the value of a setting."""
        value = getattr(self, name)
        return self.strengths[name][0] if value == "auto" else float(value)

    @property
    def left_open(self) -> list[str]:
        """The strengths that are to be chosen."""
        return [name for name in self.strengths if getattr(self, name) == "auto"]

    def may_try(self, events: Interactions) -> bool:
        """Return whether several fits take little."""
        return len(events) <= self.most_events and events.num_items <= self.most_items


class Model(nn.Module, ABC):
    """The base class of all models; the defaults mean that a capability is missing."""

    learns_by: ClassVar[LearnsBy | None] = None
    """None: it is made of models that have learned."""
    reads: Reads = "nothing"
    """The part of a user's history that the model reads in training."""
    max_len: int = 0
    """Maximum number of events of the history."""
    note: str = ""
    """Events that the model did not learn from and why, for the log; empty if it used all."""

    @property
    def reads_profiles(self) -> bool:
        """Whether it was made with features of users: `Queries.profile` holds a new user's."""
        return False

    @property
    def reads_context(self) -> bool:
        """Whether it was made with features of the context: `Queries.context` holds them."""
        return False

    @property
    def scores_new_items(self) -> bool:
        """Whether it was made with features of items, by which an item without a row is scored."""
        return False

    @property
    def first_stage(self) -> "Model":
        """The model that finds items in the catalogue: of two stages the first, else itself."""
        return self

    @property
    def second_stage(self) -> "Model":
        """The model that judges given items: of two stages the second, else itself."""
        return self

    def start_from(self, parts: Mapping[str, "Model"]) -> None:
        """Take over what smaller models have learned before it, by their kinds."""

    def learn(self, events: Interactions) -> None:
        """Learn from all events at once, where `learns_by` is "events".

        Raises:
            TooLargeError: What it keeps would not fit in memory; nothing is made before.
        """
        raise ConfigError(f"{type(self).__name__} does not learn from all events at once")

    def begin(self, events: Interactions) -> None:
        """Take from the training events what must be known before the first step."""
        tables = {side: getattr(self, f"{side[:-1]}_table", None) for side in ("users", "items")}
        coded = {side: table for side, table in tables.items() if isinstance(table, Quantised)}
        if coded:
            code_by_events(events, **coded)

    def learn_new_users(self, events: Interactions) -> None:
        """Work out from the weights how to answer users without a vector of their own.

        It is fast and changes no weight that training reads, so it runs before each validation:
        validation then measures the model that will answer.
        """

    def finish(self) -> None:
        """Fill what answers need and training does not, such as final tables."""

    def known_users(self) -> Bool[Tensor, " U"] | None:
        """Return which users are known by their id, also without a history; None: none is."""
        return None

    def known_items(self) -> Bool[Tensor, " I"] | None:
        """Return which items are known without an event, by features or edges; None: none is."""
        return None


class PairVectors(NamedTuple):
    """A batch of users, and the items that they are compared with."""

    query_BD: Float[Tensor, "B D"]
    item_VD: Float[Tensor, "V D"]
    base: tuple[Tensor, ...]
    """Tables of rows (R, D) whose length `l2` holds down, such as the looked-up embeddings."""
    views: tuple[tuple[Tensor, Tensor], ...] = ()
    """Two views (R, D) of the same rows, for users and for items."""


class Retriever(Model, ABC):
    """A model that scores by a dot product, so that its items can be indexed."""

    num_items: int
    """I."""

    @abstractmethod
    def encode(self, queries: Queries) -> Float[Tensor, "B D"]:
        """Return each query's vector; a user without history gets one too."""

    @abstractmethod
    def items(self, item_V: Int64[Tensor, " V"]) -> Float[Tensor, "V D"]:
        """Return the vectors of some items, to be learned from; a score is a dot product."""

    @property
    def item_rows(self) -> Table | None:
        """The table whose rows are the items' vectors as they are; None: they are computed."""
        return None

    def item_codes(self) -> Codes | None:
        """Return the vectors of all items as codes, if their table stores codes."""
        return None if self.item_rows is None else self.item_rows.codes()

    def products(self, query_BD: Float[Tensor, "B D"]) -> Float[Tensor, "B I"]:
        """Return every item's score for each query, without gradient."""
        if self.item_rows is not None:
            return self.item_rows.products(query_BD)
        blocks = [query_BD @ item_VD.float().T for _, item_VD in self.item_blocks()]
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=1)

    def item_blocks(self) -> Iterator[tuple[int, Float[Tensor, "V D"]]]:
        """Give every item's vector without gradient, in blocks, each with its first item."""
        if self.item_rows is not None:
            yield from self.item_rows.blocks()
            return
        for item_V in self.every_item.split(BLOCK_ROWS):
            with torch.no_grad():
                vector_VD = self.items(item_V)
            yield int(item_V[0]), vector_VD

    @property
    def every_item(self) -> Int64[Tensor, " I"]:
        """All items, where the weights are."""
        device = next(chain(self.parameters(), self.buffers())).device
        return torch.arange(self.num_items, device=device)

    def prepare(self, queries: Queries, item_V: Int64[Tensor, " V"]) -> Prepared | None:
        """Do the part of the work on a batch of pairs that needs no weights; None: there is none.

        A producer may do it ahead of the trainer: on the CPU, in several threads at once.
        """
        return None

    def item_from_features(self, table: FieldTable) -> Float[Tensor, "R D"]:
        """Return a vector like an item's for each row of features.

        Raises:
            ConfigError: The model reads no features of items.
        """
        raise _reads_no_items(self)


class Ranker(Model, ABC):
    """A model that judges given items in a context, for one task or several."""

    learns_by: ClassVar[LearnsBy | None] = "rows"
    has_gates: ClassVar[bool] = False
    """Whether its tasks mix experts, by `gates`."""
    tasks: tuple[Task, ...]
    heads: Heads
    """From what each task learns from to its prediction, and to the order of a list."""

    @abstractmethod
    def forward(self, queries: Queries, item_BC: Int64[Tensor, "B C"]) -> Mapping[str, Tensor]:
        """Return what each task learns from, by the task's name.

        Of a binary task the logit (B, C); of a regression the standardised value (B, C); of an
        ordinal one the logits (B, C, K) of lying above each level but the last.
        """

    def predict(
        self, queries: Queries, item_BC: Int64[Tensor, "B C"]
    ) -> Mapping[str, Float[Tensor, "B C"]]:
        """Return each task's prediction: a probability, a value in the label's own unit, or the
        expected level.
        """
        return self.heads.predictions(self(queries, item_BC))

    def penalty(self, queries: Queries, item_BC: Int64[Tensor, "B C"]) -> Float[Tensor, ""] | None:
        """Return the penalty that the model's settings add to the loss of a batch; None for no
        penalty.
        """
        return None

    def of_new_items(self, queries: Queries, table: FieldTable) -> Mapping[str, Tensor]:
        """Return what each task learns from, for every query and every row of features.

        Raises:
            ConfigError: The model reads no features of items.
        """
        raise _reads_no_items(self)

    @property
    def attends(self) -> bool:
        """Whether it weighs a user's events by the item that is judged."""
        return False

    def attention_weights(
        self, queries: Queries, item_BC: Int64[Tensor, "B C"]
    ) -> Float[Tensor, "B C L"]:
        """Return how much each of the last `max_len` events matters to each item, oldest first.

        Raises:
            ConfigError: The model reads no histories.
        """
        raise ConfigError(
            f"{type(self).__name__} reads no histories, so it has no attention weights"
        )

    def gates(
        self, queries: Queries, item_BC: Int64[Tensor, "B C"]
    ) -> Mapping[str, Float[Tensor, "B C E"]]:
        """Return how each task weights the experts, by the task's name; each pair's sum to 1.

        Raises:
            ConfigError: There are no experts.
        """
        raise ConfigError(f"{type(self).__name__} has no gates: MMoE has")


class Scorer(Model, ABC):
    """A model that gives every item a score for a block of users, with no vectors to index."""

    @abstractmethod
    def score(self, queries: Queries) -> Float[Tensor, "B I"]:
        """Return a score for each item, higher is better, all finite."""


def _reads_no_items(model: Model) -> ConfigError:
    return ConfigError(f"{type(model).__name__} reads no features of items, only their ids")


Similarity = Literal["dot", "cosine"]


def as_query(
    vector_BD: Float[Tensor, "B D"], similarity: Similarity, temperature: float
) -> Float[Tensor, "B D"]:
    """Return query vectors scaled so that a dot product is the similarity over the temperature."""
    return as_item(vector_BD, similarity) / temperature


def as_item(vector_VD: Float[Tensor, "V D"], similarity: Similarity) -> Float[Tensor, "V D"]:
    """Return item vectors, of length 1 for the cosine."""
    return F.normalize(vector_VD, dim=1) if similarity == "cosine" else vector_VD


def top_k(
    score_BN: Float[Tensor, "B N"], k: int
) -> tuple[Float[Tensor, "B K"], Int64[Tensor, "B K"]]:
    """Return the min(k, N) best scores of each row and their positions, best first.

    Ties go to the lower position, so a longer list begins with the shorter one.
    """
    k, num_items = min(k, score_BN.shape[1]), score_BN.shape[1]
    value_BK, position_BK = score_BN.topk(min(k + 1, num_items))  # one more shows a tie at the end
    tie_BK = value_BK[:, 1:] == value_BK[:, :-1]
    value_BK, position_BK = value_BK[:, :k], position_BK[:, :k]
    if not tie_BK.any() or k == 0:
        return value_BK, position_BK
    if k < num_items:
        last_B1 = value_BK[:, -1:]
        goes_on_B = tie_BK[:, -1] & last_B1.squeeze(1).isfinite()
        for row in goes_on_B.nonzero().flatten().tolist():
            above = (score_BN[row] > last_B1[row]).nonzero().flatten()
            equal = (score_BN[row] == last_B1[row]).nonzero().flatten()[: k - len(above)]
            position_BK[row] = torch.cat([above, equal])
            value_BK[row] = score_BN[row, position_BK[row]]
    return best_first(value_BK, position_BK)


def best_first(value_BK: Tensor, position_BK: Tensor) -> tuple[Tensor, Tensor]:
    """Sort rows by value, highest first, and ties by position, lowest first."""
    position_BK, order_BK = position_BK.sort(dim=1)
    value_BK, again_BK = value_BK.gather(1, order_BK).sort(dim=1, descending=True, stable=True)
    return value_BK, position_BK.gather(1, again_BK)


class TopK(NamedTuple):
    """The best items of each query, best first, padded with -1 and -inf.

    Shape legend: B queries, K list length.
    """

    item_BK: Int64[Tensor, "B K"]
    score_BK: Float[Tensor, "B K"]


def padded(best: TopK, k: int) -> TopK:
    """Pad results to length k with -1 and -inf."""
    missing = k - best.item_BK.shape[1]
    if missing == 0:
        return best
    return TopK(
        item_BK=F.pad(best.item_BK, (0, missing), value=-1),
        score_BK=F.pad(best.score_BK, (0, missing), value=-torch.inf),
    )

"""What the other rooms may ask of a model. A model's first line says which of these it is."""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from foretaste.data.batch import Queries, SequenceBatch
from foretaste.data.features import FieldTable
from foretaste.data.histories import Reads
from foretaste.data.interactions import Interactions
from foretaste.data.tasks import Task
from foretaste.models.layers.heads import Heads


@runtime_checkable
class Retriever(Protocol):
    """Scores by a dot product, so its items can be indexed.

    Shape legend: B queries, I items, D width.
    """

    def encode(self, queries: Queries) -> Float[Tensor, "B D"]:
        """Return each query's vector; a user without history gets one too."""
        ...

    def item_table(self) -> Float[Tensor, "I D"]:
        """Return every item's vector; a score is its dot product with a query's."""
        ...


@runtime_checkable
class CatalogueScorer(Protocol):
    """Scores every item for a block of users, with no vectors to index."""

    def score(self, queries: Queries) -> Float[Tensor, "B I"]:
        """Return a score for each item, higher is better, all finite."""
        ...


@runtime_checkable
class Ranker(Protocol):
    """Judges given items for a user at a moment, for one task or several.

    Shape legend: B queries, C items of each, K thresholds between an ordinal task's levels.
    """

    tasks: tuple[Task, ...]
    reads: Reads
    """What of a user's history it reads."""
    max_len: int
    """How many events of it."""
    heads: Heads
    """From what each task learns from to its prediction, and to the order of a list."""

    def __call__(self, queries: Queries, item_BC: Int64[Tensor, "B C"]) -> Mapping[str, Tensor]:
        """Return what each task learns from, by the task's name.

        Of a binary task the logit (B, C); of a regression the standardised value (B, C); of an
        ordinal one the logits (B, C, K) of lying above each level but the last.
        """
        ...

    def predict(
        self, queries: Queries, item_BC: Int64[Tensor, "B C"]
    ) -> Mapping[str, Float[Tensor, "B C"]]:
        """Return each task's prediction: a probability, a value in the label's own unit, or the
        expected level.
        """
        ...


@runtime_checkable
class JudgesNewItems(Protocol):
    """A ranker that judges items that no table has, by their features.

    Shape legend: R new items.
    """

    @property
    def judges_new_items(self) -> bool:
        """Whether it was made with features of items."""
        ...

    def of_new_items(self, queries: Queries, table: FieldTable) -> Mapping[str, Tensor]:
        """Return of every row of features, for every query, what each task learns from."""
        ...


@runtime_checkable
class Penalised(Protocol):
    """A ranker that adds to the loss of a batch what its own settings say."""

    def penalty(self, queries: Queries, item_BC: Int64[Tensor, "B C"]) -> Float[Tensor, ""]:
        """Return the term, 0 where there is none."""
        ...


@runtime_checkable
class Attends(Protocol):
    """A ranker that weighs a user's events by what they say of the item that is judged."""

    max_len: int

    @property
    def attends(self) -> bool:
        """Whether it was made so."""
        ...

    def attention_weights(
        self, queries: Queries, item_BC: Int64[Tensor, "B C"]
    ) -> Float[Tensor, "B C L"]:
        """Return how much each of the last `max_len` events says of each item, oldest first."""
        ...


@runtime_checkable
class Gated(Protocol):
    """A ranker whose tasks mix experts.

    Shape legend: E experts.
    """

    def gates(
        self, queries: Queries, item_BC: Int64[Tensor, "B C"]
    ) -> Mapping[str, Float[Tensor, "B C E"]]:
        """Return how each task weighs the experts, by the task's name; each pair's sum to 1."""
        ...


@runtime_checkable
class ClosedForm(Protocol):
    """Learns from the events at once, without steps of gradient descent."""

    def learn(self, events: Interactions) -> None:
        """Fill the model's buffers from events.

        Raises:
            TooLargeError: What it keeps would not fit in memory; said before it is tried.
        """
        ...


class PairVectors(NamedTuple):
    """What a model makes of a batch of users and of the items they are compared with.

    Shape legend: B users, V items, D width, R rows.
    """

    query_BD: Float[Tensor, "B D"]
    item_VD: Float[Tensor, "V D"]
    base: tuple[Tensor, ...]
    """Tables of rows (R, D) whose length `l2` holds down, such as the looked-up embeddings."""
    views: tuple[tuple[Tensor, Tensor], ...] = ()
    """Two tables (R, D) that say the same of the same rows in two ways, of users and of items."""


@runtime_checkable
class PairModel(Protocol):
    """A retriever that learns from pairs of a user and an item."""

    reads: Reads
    """What of a user's history it reads while it learns."""
    max_len: int
    """How many events of it."""

    def __call__(self, queries: Queries, item_V: Int64[Tensor, " V"]) -> PairVectors:
        """Return the vectors of a batch's users and of some items, to be learned from."""
        ...

    def encode(self, queries: Queries) -> Float[Tensor, "B D"]: ...
    def item_table(self) -> Float[Tensor, "I D"]: ...


@runtime_checkable
class Prepared(Protocol):
    """What a model made of a batch before its step."""

    def to(self, device: torch.device) -> "Prepared": ...


@runtime_checkable
class PreparesPairs(Protocol):
    """A `PairModel` that has work to do on a batch which takes no weights.

    A producer can do it ahead of the trainer; called without it, the model does it itself.
    """

    def prepare(self, queries: Queries, item_V: Int64[Tensor, " V"]) -> Prepared:
        """Do the work; on the CPU, and safe in several threads at once."""
        ...

    def __call__(
        self, queries: Queries, item_V: Int64[Tensor, " V"], prepared: Any = None
    ) -> PairVectors:
        """Return what a `PairModel` does, given what `prepare` made of the same batch."""
        ...


@runtime_checkable
class SequenceModel(Protocol):
    """A retriever that learns from histories, with a state for each event."""

    max_len: int

    def __call__(self, batch: SequenceBatch) -> Float[Tensor, "B L1 D"]: ...
    def encode(self, queries: Queries) -> Float[Tensor, "B D"]: ...
    def item_table(self) -> Float[Tensor, "I D"]: ...


@runtime_checkable
class Begins(Protocol):
    """Must know some things of the training events before its first step."""

    def begin(self, events: Interactions) -> None:
        """Take them; `events` are those of training."""
        ...


@runtime_checkable
class Finishes(Protocol):
    """Works something out once training is over: final tables, answers to new users."""

    def finish(self) -> None:
        """Fill what answers need and training does not."""
        ...


@runtime_checkable
class LearnsNewcomers(Protocol):
    """Works out from its weights how to answer users whom training never saw.

    It is quick and changes no weight that training reads, so it is done before each validation:
    what is validated is what will answer.
    """

    def learn_newcomers(self, events: Interactions) -> None:
        """Work it out anew; `events` are those of training."""
        ...


@runtime_checkable
class ReadsProfiles(Protocol):
    """Answers a user of whom only features are known: `Queries.profile` holds them."""

    @property
    def reads_profiles(self) -> bool:
        """Whether it was made with features of users."""
        ...


@runtime_checkable
class ReadsMoments(Protocol):
    """Reads what is known of the moment: `Queries.context` holds it."""

    @property
    def reads_moments(self) -> bool:
        """Whether it was made with features of moments."""
        ...


@runtime_checkable
class KnowsUsers(Protocol):
    """Learns of users also where nothing ever happened: from labelled rows, or from links."""

    def taught_U(self) -> Bool[Tensor, " U"]:
        """Return of whom training learned."""
        ...


@runtime_checkable
class PlacesNewItems(Protocol):
    """Gives an item that no table has a vector, from its features."""

    @property
    def places_new_items(self) -> bool:
        """Whether it was made with features of items."""
        ...

    def item_from_features(self, table: FieldTable) -> Float[Tensor, "R D"]:
        """Return a vector for each row of features, to be compared like `item_table`'s."""
        ...


@runtime_checkable
class PlacesItems(Protocol):
    """Knows some items without any event of theirs, by their features or their edges."""

    def placed_I(self) -> Bool[Tensor, " I"]:
        """Return which items have a vector worth ranking though training saw no event of them."""
        ...

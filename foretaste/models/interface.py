"""What the other rooms may ask of a model. A model's first line says which of these it is."""

from typing import NamedTuple, Protocol, runtime_checkable

from jaxtyping import Bool, Float, Int64
from torch import Tensor

from foretaste.data.batch import Queries, SequenceBatch
from foretaste.data.interactions import Interactions
from foretaste.data.pairs import Reads


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

    def finish(self, events: Interactions) -> None:
        """Fill what answers need and training does not; `events` are those of training."""
        ...


@runtime_checkable
class PlacesItems(Protocol):
    """Knows some items without any event of theirs, by their features or their edges."""

    def placed_I(self) -> Bool[Tensor, " I"]:
        """Return which items have a vector worth ranking though training saw no event of them."""
        ...

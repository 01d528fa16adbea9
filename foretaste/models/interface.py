"""What the other rooms may ask of a model. A model's first line says which of these it is."""

from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from foretaste.data.batch import Queries
from foretaste.data.interactions import Interactions


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

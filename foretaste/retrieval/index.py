"""The door to the item index: what serving may ask of any, exact or approximate."""

from pathlib import Path
from typing import Literal, NamedTuple, Protocol, runtime_checkable

from jaxtyping import Bool, Float, Int64
from pydantic import Field
from torch import Tensor

from foretaste.config import Config
from foretaste.errors import DataError, NonFiniteError

IndexKind = Literal["exact", "ivf_flat", "ivf_sq8", "hnsw"]
IndexChoice = Literal["auto", "exact", "ivf_flat", "ivf_sq8", "hnsw"]


class TopK(NamedTuple):
    """The best items of each query, best first; -1 and -inf where the catalogue ran out.

    Shape legend: B queries, K list length.
    """

    item_BK: Int64[Tensor, "B K"]
    score_BK: Float[Tensor, "B K"]


class IndexFacts(Config):
    """What an index is and how good it was when it was built; kept beside it in `index.json`."""

    kind: IndexKind
    num_items: int
    """Items in the index: those with a training event."""
    catalogue_size: int
    """Items of the catalogue; item_idx lies in [0, catalogue_size)."""
    embedding_dim: int
    search_width: int = 0
    """Lists probed by IVF, candidates kept by HNSW; 0 where everything is compared."""
    build: dict[str, int] = Field(default_factory=dict)
    """What it was built with, such as IVF's number of lists."""
    recall_at_100: float = 1.0
    """Share of the true 100 best that it finds, in [0, 1], measured when it was built."""
    recall_target: float = 1.0
    recall_queries: str = "exact by construction"
    """Where the measured queries came from."""


@runtime_checkable
class ItemIndex(Protocol):
    """The best items of a query by dot product. Safe to search from several threads.

    Shape legend: B queries, D width, X exclusions, K list length, I items of the catalogue.
    """

    @property
    def kind(self) -> IndexKind: ...

    @property
    def facts(self) -> IndexFacts: ...

    def search(
        self,
        query_BD: Float[Tensor, "B D"],
        k: int,
        *,
        exclude_BX: Int64[Tensor, "B X"],
        allow_I: Bool[Tensor, " I"] | None = None,
    ) -> TopK:
        """Return the K best items of each query, none of them excluded (-1 pads X).

        Never fewer than k while the catalogue has that many left.

        Args:
            query_BD: Finite.
            k: At least 1.
            exclude_BX: item_idx that a row must not get.
            allow_I: Only these items may be answered, to any row; without it, all.

        Raises:
            DataError: k is below 1, or a width or the catalogue's size disagrees.
            NonFiniteError: A query is NaN or infinite.
        """
        ...

    def save(self, folder: Path) -> None:
        """Write the index's own files into an existing folder."""
        ...


def check_search(
    facts: IndexFacts,
    query_BD: Float[Tensor, "B D"],
    k: int,
    allow_I: Bool[Tensor, " I"] | None,
) -> None:
    """Refuse a search that no index could answer.

    Raises:
        DataError: k is below 1, or a width or the catalogue's size disagrees.
        NonFiniteError: A query is NaN or infinite.
    """
    if k < 1:
        raise DataError(f"k is {k}: ask for 1 item or more", name="k", value=k)
    if query_BD.shape[1] != facts.embedding_dim:
        raise DataError(
            f"queries are {query_BD.shape[1]} wide and the index {facts.embedding_dim}: "
            "search with vectors of the model that it was built from",
            name="query",
            value=query_BD.shape[1],
        )
    if allow_I is not None and len(allow_I) != facts.catalogue_size:
        raise DataError(
            f"allow names {len(allow_I)} items of {facts.catalogue_size}",
            name="allow",
            value=len(allow_I),
        )
    if not query_BD.isfinite().all():
        raise NonFiniteError("a query is NaN or infinite: the model is broken, train it anew")

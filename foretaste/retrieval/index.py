"""The door to the item index: what serving may ask of any, exact or approximate."""

from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

from jaxtyping import Float, Int64
from torch import Tensor


class TopK(NamedTuple):
    """The best items of each query, best first; -1 and -inf where the catalogue ran out.

    Shape legend: B queries, K list length.
    """

    item_BK: Int64[Tensor, "B K"]
    score_BK: Float[Tensor, "B K"]


@runtime_checkable
class ItemIndex(Protocol):
    """The best items of a query by dot product.

    Shape legend: B queries, D width, X exclusions, K list length.
    """

    kind: str
    """"exact", "ivf_flat", "ivf_sq8" or "hnsw"."""

    def search(
        self, query_BD: Float[Tensor, "B D"], k: int, *, exclude_BX: Int64[Tensor, "B X"]
    ) -> TopK:
        """Return the K best items of each query, none of them excluded (-1 pads X).

        Never fewer than k while the catalogue has that many left.
        """
        ...

    def save(self, folder: Path) -> None:
        """Write the index's own files into an existing folder."""
        ...

"""An approximate index of FAISS's, beside the exact one over the same items.

Shape legend: B queries, N items in the index, I items of the catalogue, D width, X exclusions.
"""

from pathlib import Path
from typing import TYPE_CHECKING, final

import numpy as np
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from foretaste.later import later
from foretaste.retrieval.exact import ExactIndex, save_vectors
from foretaste.retrieval.filtered import candidates, search_filtered
from foretaste.retrieval.index import IndexFacts, IndexKind, TopK, check_search

if TYPE_CHECKING:
    import faiss
else:
    faiss = later("faiss")

FAISS_FILE = "index.faiss"
_REFINE = {"ivf_flat": 1, "ivf_sq8": 4, "hnsw": 1}
"""Candidates fetched per answer, for the whole vectors to choose among."""
_WIDEST_WALK = 1024


@final
class FaissIndex:
    """Searches as wide as `facts.search_width`; wider finds more and takes longer."""

    def __init__(self, index: "faiss.Index", exact: ExactIndex, facts: IndexFacts) -> None:
        self._index = index
        self.exact = exact
        self._facts = facts

    @property
    def kind(self) -> IndexKind:
        return self._facts.kind

    @property
    def facts(self) -> IndexFacts:
        return self._facts

    @property
    def widest(self) -> int:
        """The width of every list of IVF; of a walk, past which comparing everything is faster."""
        if self.kind == "hnsw":
            return min(_WIDEST_WALK, self._facts.num_items)
        return self._facts.build["num_lists"]

    def with_facts(self, facts: IndexFacts) -> "FaissIndex":
        """Return the same index under other facts, such as another search width."""
        return FaissIndex(self._index, self.exact, facts)

    def search(
        self,
        query_BD: Float[Tensor, "B D"],
        k: int,
        *,
        exclude_BX: Int64[Tensor, "B X"],
        allow_I: Bool[Tensor, " I"] | None = None,
    ) -> TopK:
        """Return the K best items of each query; see `ItemIndex.search`."""
        check_search(self._facts, query_BD, k, allow_I)
        return search_filtered(
            self._fetch,
            self.exact,
            query_BD,
            k,
            exclude_BX=exclude_BX,
            allow_I=allow_I,
            refine=_REFINE[self.kind],
        )

    def candidates(self, query_BD: Float[Tensor, "B D"], k: int) -> Int64[Tensor, "B K"]:
        """Return what FAISS alone finds, for recall to be measured on."""
        return candidates(self._fetch, self.exact, query_BD, k, refine=_REFINE[self.kind])

    def _fetch(
        self, query_BD: np.ndarray, fetched: int, selector: "faiss.IDSelector | None"
    ) -> np.ndarray:
        width = self._facts.search_width
        if self.kind == "hnsw":
            if self._facts.build["levelled"]:
                query_BD = np.pad(query_BD, ((0, 0), (0, 1)))
            parameters = faiss.SearchParametersHNSW(sel=selector, efSearch=max(fetched, width))
        else:
            parameters = faiss.SearchParametersIVF(sel=selector, nprobe=width)
        position_BF: np.ndarray = self._index.search(query_BD, fetched, params=parameters)[1]
        return position_BF

    def save(self, folder: Path) -> None:
        """Write `index.faiss`, `vectors.safetensors` and `index.json`.

        Raises:
            OSError: The disk is full or refuses.
        """
        save_vectors(self.exact, folder)
        try:
            faiss.write_index(self._index, str(folder / FAISS_FILE))
        except RuntimeError as error:  # what FAISS says where it is the disk
            raise OSError(f"{folder / FAISS_FILE}: {error}") from error
        (folder / "index.json").write_text(self._facts.model_dump_json(indent=2))

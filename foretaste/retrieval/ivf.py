"""FAISS's inverted file: items in lists around centroids, of which a query visits the nearest.

Jégou et al., "Product Quantization for Nearest Neighbor Search", TPAMI 2011, section IV;
Douze et al., "The Faiss library", 2024, https://arxiv.org/abs/2401.08281

"ivf_flat" keeps whole vectors in the lists; "ivf_sq8" one byte a value, a quarter of the
memory, and scores four candidates per answer anew by the whole vectors, which stay on disk.

Shape legend: B queries, N items in the index, I items of the catalogue, D width, X exclusions.
"""

from pathlib import Path
from typing import Literal, final

import faiss
import numpy as np
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from foretaste.retrieval.exact import ExactIndex, save_vectors
from foretaste.retrieval.filtered import candidates, search_filtered
from foretaste.retrieval.index import IndexFacts, IndexKind, TopK, check_search

FAISS_FILE = "index.faiss"
REFINE = {"ivf_flat": 1, "ivf_sq8": 4}
POINTS_PER_LIST = 64
"""Vectors that a centroid is learned from, at most."""


@final
class IvfIndex:
    """Visits `facts.search_width` lists; more find more and take longer."""

    def __init__(self, lists: faiss.IndexIVF, exact: ExactIndex, facts: IndexFacts) -> None:
        self._lists = lists
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
        """Every list: all items are compared."""
        return int(self._lists.nlist)

    def with_facts(self, facts: IndexFacts) -> "IvfIndex":
        """Return the same lists under other facts, such as another search width."""
        return IvfIndex(self._lists, self.exact, facts)

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
            refine=REFINE[self._facts.kind],
        )

    def candidates(self, query_BD: Float[Tensor, "B D"], k: int) -> Int64[Tensor, "B K"]:
        """Return what the lists alone find, for recall to be measured on."""
        return candidates(self._fetch, self.exact, query_BD, k, refine=REFINE[self._facts.kind])

    def _fetch(
        self, query_BD: np.ndarray, fetched: int, selector: faiss.IDSelector | None
    ) -> tuple[np.ndarray, np.ndarray]:
        parameters = faiss.SearchParametersIVF(sel=selector, nprobe=self._facts.search_width)
        score_BF, position_BF = self._lists.search(query_BD, fetched, params=parameters)
        return score_BF, position_BF

    def save(self, folder: Path) -> None:
        """Write `index.faiss`, `vectors.safetensors` and `index.json`."""
        save_vectors(self.exact, folder)
        write_faiss(self._lists, folder / FAISS_FILE)
        (folder / "index.json").write_text(self._facts.model_dump_json(indent=2))


def build_ivf(exact: ExactIndex, *, kind: Literal["ivf_flat", "ivf_sq8"], seed: int) -> IvfIndex:
    """Make the lists: about 2 √N of them, their centroids learned from a sample of the items."""
    num_items, width = exact.facts.num_items, exact.facts.embedding_dim
    num_lists = max(1, min(int(2 * num_items**0.5), num_items // 39))
    centroids = faiss.IndexFlatIP(width)
    if kind == "ivf_flat":
        lists = faiss.IndexIVFFlat(centroids, width, num_lists, faiss.METRIC_INNER_PRODUCT)
    else:
        lists = faiss.IndexIVFScalarQuantizer(
            centroids,
            width,
            num_lists,
            faiss.ScalarQuantizer.QT_8bit,
            faiss.METRIC_INNER_PRODUCT,
        )
    lists.cp.seed = seed
    lists.cp.min_points_per_centroid = 1
    vectors_ND = np.ascontiguousarray(exact.vectors_ND.float().numpy())
    sample = np.random.default_rng(seed).permutation(num_items)[: num_lists * POINTS_PER_LIST]
    lists.train(vectors_ND[np.sort(sample)])
    lists.add(vectors_ND)
    facts = exact.facts.model_copy(
        update={"kind": kind, "search_width": 1, "build": {"num_lists": num_lists}}
    )
    return IvfIndex(lists, exact, facts)


def write_faiss(index: faiss.Index, path: Path) -> None:
    """Write a FAISS index.

    Raises:
        OSError: The disk is full or refuses; FAISS itself would say RuntimeError.
    """
    try:
        faiss.write_index(index, str(path))
    except RuntimeError as error:
        raise OSError(f"{path}: {error}") from error

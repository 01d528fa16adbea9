"""FAISS's navigable small world: a graph between near items, walked greedily to a query.

Malkov and Yashunin, "Efficient and Robust Approximate Nearest Neighbor Search Using
Hierarchical Navigable Small World Graphs", TPAMI 2020, https://arxiv.org/abs/1603.09320

Fast for single queries, slow to build, and nothing can be deleted from it. On some vectors it may
stay below the recall asked for: the facts say what it reached.

Shape legend: B queries, N items in the index, I items of the catalogue, D width, X exclusions.
"""

from pathlib import Path
from typing import final

import faiss
import numpy as np
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from foretaste.retrieval.exact import ExactIndex, save_vectors
from foretaste.retrieval.filtered import candidates, search_filtered
from foretaste.retrieval.index import IndexFacts, IndexKind, TopK, check_search
from foretaste.retrieval.ivf import FAISS_FILE, write_faiss

NEIGHBOURS = 32
"""Edges of a node (M of the paper)."""
BUILD_WIDTH = 80
"""Candidates kept while a node looks for its neighbours (efConstruction)."""

NARROWEST = 100
"""Least candidates kept: recall is measured on lists of 100, for which FAISS keeps as many."""


@final
class HnswIndex:
    """Keeps `facts.search_width` candidates on its walk; more find more and take longer."""

    def __init__(self, graph: faiss.IndexHNSWFlat, exact: ExactIndex, facts: IndexFacts) -> None:
        self._graph = graph
        self.exact = exact
        self._facts = facts

    @property
    def kind(self) -> IndexKind:
        return "hnsw"

    @property
    def facts(self) -> IndexFacts:
        return self._facts

    @property
    def widest(self) -> int:
        """Past this, comparing everything is faster."""
        return min(1024, self._facts.num_items)

    def with_facts(self, facts: IndexFacts) -> "HnswIndex":
        """Return the same graph under other facts, such as another search width."""
        return HnswIndex(self._graph, self.exact, facts)

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
            refine=1,
        )

    def candidates(self, query_BD: Float[Tensor, "B D"], k: int) -> Int64[Tensor, "B K"]:
        """Return what the graph alone finds, for recall to be measured on."""
        return candidates(self._fetch, self.exact, query_BD, k, refine=1)

    def _fetch(
        self, query_BD: np.ndarray, fetched: int, selector: faiss.IDSelector | None
    ) -> tuple[np.ndarray, np.ndarray]:
        if self._facts.build["levelled"]:
            query_BD = np.pad(query_BD, ((0, 0), (0, 1)))
        width = max(fetched, self._facts.search_width)
        parameters = faiss.SearchParametersHNSW(sel=selector, efSearch=width)
        score_BF, position_BF = self._graph.search(query_BD, fetched, params=parameters)
        return score_BF, position_BF

    def save(self, folder: Path) -> None:
        """Write `index.faiss`, `vectors.safetensors` and `index.json`."""
        save_vectors(self.exact, folder)
        write_faiss(self._graph, folder / FAISS_FILE)
        (folder / "index.json").write_text(self._facts.model_dump_json(indent=2))


def build_hnsw(exact: ExactIndex, *, levelled: bool) -> HnswIndex:
    """Insert the items one after the other, in their order.

    Args:
        exact: The items.
        levelled: False walks by inner product, which suits spread vectors. True adds a
            coordinate that brings all vectors to one length and walks by distance, of which
            the order is the same; clusters stay connected that way.

    References:
        Bachrach et al., "Speeding Up the Xbox Recommender System Using a Euclidean
        Transformation for Inner-Product Spaces", RecSys 2014.
    """
    vectors_ND = np.ascontiguousarray(exact.vectors_ND.float().numpy())
    metric = faiss.METRIC_INNER_PRODUCT
    if levelled:
        square_N = (vectors_ND**2).sum(axis=1)
        vectors_ND = np.column_stack([vectors_ND, np.sqrt(square_N.max() - square_N)])
        metric = faiss.METRIC_L2
    graph = faiss.IndexHNSWFlat(vectors_ND.shape[1], NEIGHBOURS, metric)
    graph.hnsw.efConstruction = BUILD_WIDTH
    graph.add(vectors_ND)
    build = {"neighbours": NEIGHBOURS, "build_width": BUILD_WIDTH, "levelled": int(levelled)}
    facts = exact.facts.model_copy(
        update={"kind": "hnsw", "search_width": NARROWEST, "build": build}
    )
    return HnswIndex(graph, exact, facts)

"""FAISS's navigable small world: a graph between near items, walked greedily to a query.

Malkov and Yashunin, "Efficient and Robust Approximate Nearest Neighbor Search Using
Hierarchical Navigable Small World Graphs", TPAMI 2020, https://arxiv.org/abs/1603.09320

Fast for single queries, slow to build, and nothing can be deleted from it. On some vectors it may
stay below the recall asked for: the facts say what it reached.

Shape legend: N items in the index, D width.
"""

import numpy as np

from foretaste.later import later
from foretaste.retrieval.exact import ExactIndex
from foretaste.retrieval.faiss_index import FaissIndex

faiss = later("faiss")

NEIGHBOURS = 32
"""Edges of a node (M of the paper)."""
BUILD_WIDTH = 80
"""Candidates kept while a node looks for its neighbours (efConstruction)."""
NARROWEST = 100
"""Least candidates kept: recall is measured on lists of 100, for which FAISS keeps as many."""


def build_hnsw(exact: ExactIndex, *, levelled: bool) -> FaissIndex:
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
    return FaissIndex(graph, exact, facts)

"""FAISS's inverted file: items in lists around centroids, of which a query visits the nearest.

Jégou et al., "Product Quantization for Nearest Neighbor Search", TPAMI 2011, section IV;
Douze et al., "The Faiss library", 2024, https://arxiv.org/abs/2401.08281

"ivf_flat" keeps whole vectors in the lists; "ivf_sq8" one byte a value, a quarter of the
memory, and scores four candidates per answer anew by the whole vectors, which stay on disk.

Shape legend: N items in the index, D width.
"""

from typing import Literal

import numpy as np

from foretaste.later import later
from foretaste.retrieval.exact import ExactIndex
from foretaste.retrieval.faiss_index import FaissIndex

faiss = later("faiss")

POINTS_PER_LIST = 64
"""Vectors that a centroid is learned from, at most."""


def build_ivf(exact: ExactIndex, *, kind: Literal["ivf_flat", "ivf_sq8"], seed: int) -> FaissIndex:
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
    lists.cp.seed = seed % 2**31
    lists.cp.min_points_per_centroid = 1
    vectors_ND = np.ascontiguousarray(exact.vectors_ND.float().numpy())
    sample = np.random.default_rng(seed).permutation(num_items)[: num_lists * POINTS_PER_LIST]
    lists.train(vectors_ND[np.sort(sample)])
    lists.add(vectors_ND)
    facts = exact.facts.model_copy(
        update={"kind": kind, "search_width": 1, "build": {"num_lists": num_lists}}
    )
    return FaissIndex(lists, exact, facts)

"""The approximate indexes of FAISS, and how they honour exclusions and allow-lists.

Two ways, by what is fast: one query is searched under a bitmap of what it may get; many queries,
each with its own short list of exclusions, are searched together for k + X items, and the
excluded ones are dropped. The exact index answers instead where an approximate one would be
wrong or slow: lists deep in the catalogue, filters that leave little of it, short answers.

Shape legend: B queries, N items in the index, I items of the catalogue, D width, X exclusions,
K list length, F fetched.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal, final

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int64, UInt8
from torch import Tensor

from foretaste.errors import BundleError
from foretaste.later import later
from foretaste.retrieval.index import (
    ExactIndex,
    IndexFacts,
    IndexKind,
    TopK,
    check_search,
    save_vectors,
)

if TYPE_CHECKING:
    import faiss
else:
    faiss = later("faiss")

FEW = 8
"""Exact below 1/FEW of the items left by a filter, and for lists longer than 1/FEW of them."""
MOST_FETCHED = 1024
"""Past this many items fetched a row, a bitmap per row is faster than fetching and dropping."""


Fetch = Callable[[np.ndarray, int, "faiss.IDSelector | None"], np.ndarray]
"""From queries (B, D), how many to fetch, and which positions may be fetched, to the positions
(B, F) that an approximate search finds; -1 where it finds no more."""


def candidates(
    fetch: Fetch, exact: ExactIndex, query_BD: Float[Tensor, "B D"], k: int, *, refine: int
) -> Int64[Tensor, "B K"]:
    """Return the K <= N best items as the approximate search alone finds them, -1 where none.

    What recall is measured on: the exact index lends no hand here.
    """
    query, fetched = _rows(query_BD), min(k * refine, len(exact.item_N))
    position_BF = fetch(query, fetched, None)
    _, position_BK = _best(exact, query, position_BF, k)
    return exact.item_N[position_BK.clamp(min=0)].where(position_BK >= 0, -1)


def search_filtered(
    fetch: Fetch,
    exact: ExactIndex,
    query_BD: Float[Tensor, "B D"],
    k: int,
    *,
    exclude_BX: Int64[Tensor, "B X"],
    allow_I: Bool[Tensor, " I"] | None,
    refine: int,
) -> TopK:
    """Search approximately under the rules of `ItemIndex.search`.

    Args:
        fetch: The approximate search.
        exact: The same items; scores the candidates, and answers where `fetch` cannot.
        query_BD: Checked already.
        k: Checked already.
        exclude_BX: item_idx, -1 pads.
        allow_I: Items that may be answered; None for all.
        refine: Candidates fetched per answer, for the exact vectors to choose among; at least 1.
    """
    num_items = len(exact.item_N)
    allowed_N = None if allow_I is None else exact.allowed(allow_I).numpy()
    allowed = num_items if allowed_N is None else int(np.count_nonzero(allowed_N))
    if allowed * FEW < num_items or k * FEW > allowed - exclude_BX.shape[1]:
        return exact.search(query_BD, k, exclude_BX=exclude_BX, allow_I=allow_I)
    query, exclude = _rows(query_BD), exact.positions(exclude_BX).numpy()
    bits, wanted = _bits(allowed_N, num_items), k * refine
    if len(query) > 1 and wanted + exclude.shape[1] <= MOST_FETCHED:
        selector = None if allowed_N is None else faiss.IDSelectorBitmap(bits)
        position = fetch(query, wanted + exclude.shape[1], selector)
        position = _drop(position, exclude, num_items)[:, :wanted]
    else:
        position = _fetch_each(fetch, query, wanted, exclude, bits)
    score_BK, position_BK = _best(exact, query, position, k)
    item_BK = exact.item_N[position_BK.clamp(min=0)].where(position_BK >= 0, -1)
    short_S = (item_BK < 0).any(dim=1).nonzero().flatten()
    if len(short_S):
        mended = exact.search(query_BD[short_S], k, exclude_BX=exclude_BX[short_S], allow_I=allow_I)
        item_BK[short_S], score_BK[short_S] = mended
    return TopK(item_BK=item_BK, score_BK=score_BK)


def _rows(query_BD: Tensor) -> Float32[np.ndarray, "B D"]:
    return np.ascontiguousarray(query_BD.detach().float().numpy())


def _bits(allowed_N: np.ndarray | None, num_items: int) -> UInt8[np.ndarray, " bytes"]:
    if allowed_N is None:
        return np.full((num_items + 7) // 8, 255, dtype=np.uint8)
    return np.packbits(allowed_N, bitorder="little")


def _fetch_each(
    fetch: Fetch, query_BD: np.ndarray, fetched: int, exclude_BX: np.ndarray, bits: np.ndarray
) -> np.ndarray:
    """Search row by row, each under a bitmap of its own."""
    position_BF = np.empty((len(query_BD), fetched), dtype=np.int64)
    for row, exclude_X in enumerate(exclude_BX):
        own, gone = bits.copy(), exclude_X[exclude_X >= 0]
        np.bitwise_and.at(own, gone >> 3, ~(1 << (gone & 7)).astype(np.uint8))
        selector = faiss.IDSelectorBitmap(own)
        position_BF[row] = fetch(query_BD[row : row + 1], fetched, selector)
    return position_BF


def _drop(position_BF: np.ndarray, exclude_BX: np.ndarray, num_items: int) -> np.ndarray:
    """Move what a row must not get to its end, as -1; the rest keeps its order."""
    row_B1 = np.arange(len(position_BF))[:, None] * num_items
    excluded = (row_B1 + exclude_BX)[exclude_BX >= 0]
    gone_BF = np.isin(row_B1 + position_BF, excluded) | (position_BF < 0)
    order_BF = np.argsort(gone_BF, axis=1, kind="stable")
    dropped: np.ndarray = np.take_along_axis(np.where(gone_BF, -1, position_BF), order_BF, axis=1)
    return dropped


def _best(
    exact: ExactIndex, query_BD: np.ndarray, position_BF: np.ndarray, k: int
) -> tuple[Tensor, Tensor]:
    """Score candidates by the whole vectors and return the best k, best first, -1 and -inf last."""
    position = torch.from_numpy(position_BF)
    vectors_MD = exact.vectors_ND.index_select(0, position.clamp(min=0).flatten()).float()
    vectors_BFD = vectors_MD.view(*position.shape, -1)
    score_BF = (vectors_BFD @ torch.from_numpy(query_BD).unsqueeze(2)).squeeze(2)
    score_BF = score_BF.masked_fill(position < 0, -torch.inf)
    score_BK, order_BK = score_BF.sort(dim=1, descending=True, stable=True)
    return score_BK[:, :k], position.gather(1, order_BK[:, :k])


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

    def check(self) -> None:
        """Read all that FAISS holds, and compare it with the items and their vectors.

        Raises:
            BundleError: It holds others, or its search width is none.
        """
        vectors_ND = np.ascontiguousarray(self.exact.vectors_ND.float().numpy())
        if self._index.ntotal != len(vectors_ND) or not 1 <= self._facts.search_width <= max(
            self.widest, NARROWEST
        ):
            raise _other_items(f"{self._index.ntotal} items, width {self._facts.search_width}")
        if self.kind == "hnsw":
            self._check_graph(vectors_ND)
        else:
            self._check_lists(vectors_ND)

    def _check_graph(self, vectors_ND: Float32[np.ndarray, "N D"]) -> None:
        graph, num = self._index.hnsw, len(vectors_ND)
        node_E, last = faiss.vector_to_array(graph.neighbors), graph.entry_point
        stored = faiss.downcast_index(self._index.storage).reconstruct_n(0, num)
        if node_E.min(initial=-1) < -1 or max(node_E.max(initial=-1), last) >= num or last < 0:
            raise _other_items("edges to items that are not there")
        if not np.array_equal(stored[:, : vectors_ND.shape[1]], vectors_ND):
            raise _other_items("other vectors")

    def _check_lists(self, vectors_ND: Float32[np.ndarray, "N D"]) -> None:
        lists, parts = self._index.invlists, []
        if lists.nlist != self._facts.build.get("num_lists"):
            raise _other_items(f"{lists.nlist} lists")
        for number in range(lists.nlist):
            size = lists.list_size(number)
            if not size:
                continue
            item_M = faiss.rev_swig_ptr(lists.get_ids(number), size).copy()
            code_M = faiss.rev_swig_ptr(lists.get_codes(number), size * lists.code_size)
            parts.append(item_M)
            if item_M.min() < 0 or item_M.max() >= len(vectors_ND):
                raise _other_items("items that are not there")
            own_MD, code_MC = vectors_ND[item_M], code_M.reshape(size, -1)
            if self.kind == "ivf_flat":
                same = np.array_equal(code_MC.view(np.float32), own_MD)
            else:
                residual_MD = own_MD - self._index.quantizer.reconstruct(number)
                coded_MC = self._index.sq.compute_codes(np.ascontiguousarray(residual_MD))
                same = bool((np.abs(coded_MC.astype(int) - code_MC) <= 1).all())
            if not same:
                raise _other_items("other vectors")
        if not np.array_equal(np.sort(np.concatenate(parts)), np.arange(len(vectors_ND))):
            raise _other_items("items twice or not at all")

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


def _other_items(what: str) -> BundleError:
    return BundleError(
        f"the index does not hold the model's items: it has {what}; build it again", name="index"
    )


NEIGHBOURS = 32
"""Edges of a node (M of the paper)."""
BUILD_WIDTH = 80
"""Candidates kept while a node looks for its neighbours (efConstruction)."""
NARROWEST = 100
"""Least candidates kept: recall is measured on lists of 100, for which FAISS keeps as many."""


def build_hnsw(exact: ExactIndex, *, levelled: bool) -> FaissIndex:
    """Build a navigable small world: a graph between near items, walked greedily to a query.

    Fast for single queries, slow to build, and nothing can be deleted from it. On some vectors
    it may stay below the recall asked for: the facts say what it reached. Items are inserted in
    their order.

    Args:
        exact: The items.
        levelled: False walks by inner product, which suits spread vectors. True adds a
            coordinate that brings all vectors to one length and walks by distance, of which
            the order is the same; clusters stay connected that way.

    References:
        Malkov and Yashunin, "Efficient and Robust Approximate Nearest Neighbor Search Using
        Hierarchical Navigable Small World Graphs", TPAMI 2020,
        https://arxiv.org/abs/1603.09320
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


POINTS_PER_LIST = 64
"""Vectors that a centroid is learned from, at most."""


def build_ivf(exact: ExactIndex, *, kind: Literal["ivf_flat", "ivf_sq8"], seed: int) -> FaissIndex:
    """Build an inverted file: items in lists around centroids, of which a query visits the nearest.

    There are about 2 √N lists, centroids learned from a sample of the items. "ivf_flat" keeps
    whole vectors in the lists; "ivf_sq8" one byte a value, a quarter of the memory, and scores
    four candidates per answer again by the whole vectors, which stay on disk.

    References:
        Jégou et al., "Product Quantization for Nearest Neighbor Search", TPAMI 2011, section IV;
        Douze et al., "The Faiss library", 2024, https://arxiv.org/abs/2401.08281
    """
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

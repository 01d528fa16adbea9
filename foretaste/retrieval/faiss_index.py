"""Approximate indexes with FAISS, and their exclusions and allow-lists.

A single query is searched with a set of its excluded items or, with an allow-list, a bitmap of the
allowed ones. Many queries, each with a short list of exclusions, are searched together for k + X
items, and the excluded items are dropped. The exact index answers if the approximate one would be
wrong or slow: for very long lists, for filters that leave few items, and if it found too few items.

Shape legend: B queries, N items in the index, I items of the catalogue, D width, X exclusions,
K list length, F fetched.
"""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, final

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int64, UInt8
from torch import Tensor

from foretaste.data.folder import entry_of
from foretaste.errors import BundleError
from foretaste.later import later
from foretaste.models.base import TopK
from foretaste.retrieval.index import (
    VECTORS_FILE,
    ExactIndex,
    IndexFacts,
    IndexKind,
    check_search,
    save_vectors,
)

if TYPE_CHECKING:
    import faiss
else:
    faiss = later("faiss")

FEW = 8
"""The exact index answers if a filter leaves less than 1/FEW of the items, or if the list is longer
than 1/FEW of the items left."""
MOST_FETCHED = 1024
"""If more items than this are fetched for a row, a search per row is faster than dropping items."""


Fetch = Callable[[np.ndarray, int, "faiss.IDSelector | None"], np.ndarray]
"""An approximate search. Arguments: queries (B, D), the number of items to fetch, and the allowed
positions. Result: the positions found (B, F), padded with -1."""


def candidates(
    fetch: Fetch, exact: ExactIndex, query_BD: Float[Tensor, "B D"], k: int, *, refine: int
) -> Int64[Tensor, "B K"]:
    """Return the K <= N best items that the approximate search alone finds, padded with -1.

    Recall is measured on this search, which never uses the exact index.
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
    """Search approximately, with the guarantees of `ItemIndex.search`.

    Args:
        fetch: The approximate search.
        exact: The exact index of the same items; it scores the candidates, and answers if `fetch`
            cannot.
        query_BD: Query vectors, already checked.
        k: List length, already checked.
        exclude_BX: item_idx, padded with -1.
        allow_I: Items that may be returned; None for all.
        refine: Number of candidates per returned item, which are ranked again by their exact
            vectors; at least 1.
    """
    num_items = len(exact.item_N)
    allowed_N = None if allow_I is None else exact.allowed(allow_I).numpy()
    allowed = num_items if allowed_N is None else int(np.count_nonzero(allowed_N))
    if allowed * FEW < num_items or k * FEW > allowed - exclude_BX.shape[1]:
        return exact.search(query_BD, k, exclude_BX=exclude_BX, allow_I=allow_I)
    query, exclude = _rows(query_BD), exact.positions(exclude_BX).numpy()
    bits = None if allowed_N is None else np.packbits(allowed_N, bitorder="little")
    wanted = k * refine
    if len(query) > 1 and wanted + exclude.shape[1] <= MOST_FETCHED:
        selector = None if bits is None else faiss.IDSelectorBitmap(bits)
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


def _fetch_each(
    fetch: Fetch,
    query_BD: np.ndarray,
    fetched: int,
    exclude_BX: np.ndarray,
    bits: UInt8[np.ndarray, " bytes"] | None,
) -> np.ndarray:
    """Search row by row, each without its own excluded items."""
    position_BF = np.empty((len(query_BD), fetched), dtype=np.int64)
    for row, exclude_X in enumerate(exclude_BX):
        selector = _without(exclude_X[exclude_X >= 0], bits)
        position_BF[row] = fetch(query_BD[row : row + 1], fetched, selector)
    return position_BF


def _without(
    gone_G: Int64[np.ndarray, " G"], bits: UInt8[np.ndarray, " bytes"] | None
) -> "faiss.IDSelector | None":
    """Return a selector of the allowed items without some; it costs little if all are allowed."""
    if bits is None:
        return faiss.IDSelectorNot(faiss.IDSelectorBatch(gone_G)) if len(gone_G) else None
    own = bits.copy()
    np.bitwise_and.at(own, gone_G >> 3, ~(1 << (gone_G & 7)).astype(np.uint8))
    return faiss.IDSelectorBitmap(own)


def _drop(position_BF: np.ndarray, exclude_BX: np.ndarray, num_items: int) -> np.ndarray:
    """Replace each row's excluded items by -1 at its end; the others keep their order."""
    row_B1 = np.arange(len(position_BF))[:, None] * num_items
    excluded = (row_B1 + exclude_BX)[exclude_BX >= 0]
    gone_BF = np.isin(row_B1 + position_BF, excluded) | (position_BF < 0)
    order_BF = np.argsort(gone_BF, axis=1, kind="stable")
    dropped: np.ndarray = np.take_along_axis(np.where(gone_BF, -1, position_BF), order_BF, axis=1)
    return dropped


def _best(
    exact: ExactIndex, query_BD: np.ndarray, position_BF: np.ndarray, k: int
) -> tuple[Tensor, Tensor]:
    """Score candidates by their full vectors and return the best k, padded with -1 and -inf."""
    position = torch.from_numpy(position_BF)
    vectors_MD = exact.vectors_ND.index_select(0, position.clamp(min=0).flatten()).float()
    vectors_BFD = vectors_MD.view(*position.shape, -1)
    score_BF = (vectors_BFD @ torch.from_numpy(query_BD).unsqueeze(2)).squeeze(2)
    score_BF = score_BF.masked_fill(position < 0, -torch.inf)
    score_BK, order_BK = score_BF.sort(dim=1, descending=True, stable=True)
    return score_BK[:, :k], position.gather(1, order_BK[:, :k])


FAISS_FILE = "index.faiss"
_TABLE = re.compile(rb"[0-9a-f]{64}")
"""Marks the SHA-256 of the file of vectors, which is stored at the end of the file, where FAISS
does not read."""
_REFINE = {"ivf_flat": 1, "ivf_sq8": 4, "ivf_pq": 8, "hnsw": 2}
"""Number of candidates per returned item, which are ranked again by their full vectors."""
_WIDEST_WALK = 1024
BLOCK_ROWS = 2**17
"""Number of vectors that are passed to FAISS at a time."""
NARROWEST = 100
"""Smallest number of candidates in a search (efSearch): recall is measured on lists of 100."""
LISTS_OF_SIMILAR = 32
"""Fewest lists in which similar items are searched."""
FEW_LISTS = 16
"""All items are compared if these lists are more than 1/FEW_LISTS of all."""
FETCHED_SIMILAR = 512
"""Fewest candidates that are ranked again by their full vectors."""


@final
class FaissIndex:
    """A FAISS index with the search width of `facts.search_width`; a larger width finds more items
    and takes longer.
    """

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
        """The largest useful width: all lists of IVF; for HNSW, the width at which an exact search
        is faster.
        """
        if self.kind == "hnsw":
            return min(_WIDEST_WALK, self._facts.num_items)
        return self._facts.build["num_lists"]

    def with_facts(self, facts: IndexFacts) -> "FaissIndex":
        """Return the same index with other facts, such as another search width."""
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
        """Return the items that FAISS alone finds, to measure recall."""
        return candidates(self._fetch, self.exact, query_BD, k, refine=_REFINE[self.kind])

    def near(self, vector_D: Float[Tensor, " D"], k: int) -> Int64[Tensor, " F"] | None:
        """Return the positions of candidates for the k nearest items by cosine; None for a kind
        without lists, for few lists, or if too few items are found.

        An item is in the list of the centroid of largest dot product, which depends on its
        direction only, so items near by cosine are in the same few lists.
        """
        width = max(LISTS_OF_SIMILAR, self._facts.search_width)
        if self.kind == "hnsw" or width * FEW_LISTS > self._index.invlists.nlist:
            return None
        query_D, lists = (
            np.pad(vector_D.numpy(), (0, self._index.d - len(vector_D))),
            self._index.invlists,
        )
        number_P = self._index.quantizer.search(query_D[None], width)[1][0]
        ids, cosines = [np.empty(0, np.int64)], [np.empty(0, np.float32)]
        for number in number_P[number_P >= 0].tolist():
            if size := lists.list_size(number):
                ids.append(faiss.rev_swig_ptr(lists.get_ids(number), size).copy())
                code_M = faiss.rev_swig_ptr(lists.get_codes(number), size * lists.code_size)
                decoded_MD = self._decoded(number, code_M.reshape(size, -1))
                norm_M = np.linalg.norm(decoded_MD, axis=1)
                cosines.append(decoded_MD @ query_D / np.maximum(norm_M, 1e-12))
        position_M, cosine_M = np.concatenate(ids), np.concatenate(cosines)
        if len(position_M) < k:
            return None
        fetched = min(max(FETCHED_SIMILAR, k * _REFINE[self.kind]), len(position_M))
        return torch.from_numpy(position_M)[torch.from_numpy(cosine_M).topk(fetched).indices]

    def _decoded(self, number: int, code_MC: np.ndarray) -> Float32[np.ndarray, "M D"]:
        """Return the vectors that a list's codes stand for."""
        if self.kind == "ivf_flat":
            vectors_MD: np.ndarray = code_MC.view(np.float32)
            return vectors_MD
        coder = self._index.sq if self.kind == "ivf_sq8" else self._index.pq
        whole_MD: np.ndarray = coder.decode(code_MC) + self._index.quantizer.reconstruct(number)
        return whole_MD

    def _fetch(
        self, query_BD: np.ndarray, fetched: int, selector: "faiss.IDSelector | None"
    ) -> np.ndarray:
        width = self._facts.search_width
        if (
            query_BD.shape[1] < self._index.d
        ):  # vectors padded for HNSW, or to a multiple of the code's size
            query_BD = np.pad(query_BD, ((0, 0), (0, self._index.d - query_BD.shape[1])))
        if self.kind == "hnsw":
            parameters = faiss.SearchParametersHNSW(sel=selector, efSearch=max(fetched, width))
        else:
            parameters = faiss.SearchParametersIVF(sel=selector, nprobe=width)
        position_BF: np.ndarray = self._index.search(query_BD, fetched, params=parameters)[1]
        return position_BF

    def check(self) -> None:
        """Compare the contents of the FAISS index with the items and their vectors.

        Raises:
            BundleError: The contents differ, or the search width is invalid.
        """
        num = len(self.exact.item_N)
        if self._index.ntotal != num or not 1 <= self._facts.search_width <= max(
            self.widest, NARROWEST
        ):
            raise _other_items(f"{self._index.ntotal} items, width {self._facts.search_width}")
        if self.kind == "hnsw":
            self._check_graph(num)
        else:
            self._check_lists(num)

    def _check_graph(self, num: int) -> None:
        graph, storage = self._index.hnsw, faiss.downcast_index(self._index.storage)
        node_E, last = faiss.vector_to_array(graph.neighbors), graph.entry_point
        if node_E.min(initial=-1) < -1 or max(node_E.max(initial=-1), last) >= num or last < 0:
            raise _other_items("edges to items that do not exist")
        code_NC = faiss.vector_to_array(storage.codes).reshape(num, -1)
        for start in range(0, num, BLOCK_ROWS):
            own_MD = self._own(np.arange(start, min(start + BLOCK_ROWS, num)))
            wide_MD = np.pad(own_MD, ((0, 0), (0, self._index.d - own_MD.shape[1])))
            coded_MC = storage.sa_encode(np.ascontiguousarray(wide_MD)).astype(int)
            width = own_MD.shape[1] * coded_MC.shape[1] // self._index.d  # without the padding
            off_MC = np.abs(coded_MC - code_NC[start : start + BLOCK_ROWS])[:, :width]
            if off_MC.max() > (coded_MC.shape[1] == self._index.d):
                raise _other_items("other vectors")

    def _check_lists(self, num: int) -> None:
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
            if item_M.min() < 0 or item_M.max() >= num:
                raise _other_items("items that do not exist")
            if not self._is_coded(number, self._own(item_M), code_M.reshape(size, -1)):
                raise _other_items("other vectors")
        if not np.array_equal(np.sort(np.concatenate(parts)), np.arange(num)):
            raise _other_items("duplicate or missing items")

    def _is_coded(self, number: int, own_MD: np.ndarray, code_MC: np.ndarray) -> bool:
        """Return whether a list holds the codes of these vectors, up to rounding."""
        if self.kind == "ivf_flat":
            return np.array_equal(code_MC.view(np.float32), own_MD)
        own_MD = np.pad(own_MD, ((0, 0), (0, self._index.d - own_MD.shape[1])))
        rest_MD = np.ascontiguousarray(own_MD - self._index.quantizer.reconstruct(number))
        if self.kind == "ivf_sq8":
            off_MC = np.abs(self._index.sq.compute_codes(rest_MD).astype(int) - code_MC)
            return bool((off_MC <= 1).all())
        nearest_MC = self._index.pq.compute_codes(rest_MD)
        return bool((nearest_MC == code_MC).mean() > 0.99)  # two codes may be equally close

    def _own(self, position_M: Int64[np.ndarray, " M"]) -> Float32[np.ndarray, "M D"]:
        vectors_MD: np.ndarray = self.exact.vectors_at(torch.from_numpy(position_M)).numpy()
        return vectors_MD

    def save(self, folder: Path) -> None:
        """Write `index.faiss`, `vectors.safetensors` and `index.json`.

        Raises:
            OSError: The disk is full or refuses.
        """
        save_vectors(self.exact, folder)
        try:
            faiss.write_index(self._index, str(folder / FAISS_FILE))
            with (folder / FAISS_FILE).open("ab") as file:
                file.write(entry_of(folder / VECTORS_FILE).sha256.encode())
        except RuntimeError as error:  # FAISS's message for an error of the disk
            raise OSError(f"{folder / FAISS_FILE}: {error}") from error
        (folder / "index.json").write_text(self._facts.model_dump_json(indent=2))


def load_faiss(
    folder: Path, exact: ExactIndex, facts: IndexFacts, *, is_verified: bool
) -> FaissIndex:
    """Read a FAISS index that `FaissIndex.save` wrote; IVF lists are memory-mapped.

    Raises:
        BundleError: The index was built from other vectors than those in the folder. This is
            checked unless the checksums of the files were verified (`is_verified`).
        OSError, RuntimeError: The file cannot be read.
    """
    path = folder / FAISS_FILE
    with path.open("rb") as file:
        file.seek(-min(64, path.stat().st_size), os.SEEK_END)
        table = file.read()
    is_known = not is_verified and _TABLE.fullmatch(table) is not None
    if is_known and table != entry_of(folder / VECTORS_FILE).sha256.encode():
        raise BundleError(
            f"{path} was built from other vectors than those of {VECTORS_FILE}: one of the two is "
            "older; build it again",
            name=str(path),
            value=str(path),
        )
    if facts.kind == "hnsw":
        return FaissIndex(faiss.read_index(str(path)), exact, facts)
    mapped = faiss.read_index(str(path), faiss.IO_FLAG_MMAP)
    lists = faiss.downcast_InvertedLists(mapped.invlists)
    if isinstance(lists, faiss.OnDiskInvertedLists):
        lists.prefetch_nthread = 0  # a search with 32 threads takes three times as long
    return FaissIndex(mapped, exact, facts)


def _other_items(what: str) -> BundleError:
    return BundleError(
        f"the index does not hold the model's items: it has {what}; build it again", name="index"
    )

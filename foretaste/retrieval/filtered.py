"""How the approximate indexes honour exclusions and allow-lists, and when they give way.

Two ways, by what is fast: one query is searched under a bitmap of what it may get; many queries,
each with its own short list of exclusions, are searched together for k + X items, and the
excluded ones are dropped. The exact index answers instead where an approximate one would be
wrong or slow: lists deep in the catalogue, filters that leave little of it, short answers.

Shape legend: B queries, N items in the index, I items of the catalogue, D width, X exclusions,
K list length, F fetched.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int64, UInt8
from torch import Tensor

from foretaste.later import later
from foretaste.retrieval.exact import ExactIndex
from foretaste.retrieval.index import TopK

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

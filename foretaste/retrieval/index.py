"""The interface of all item indexes, and the exact index that others are measured against.

Shape legend: B queries, N items in the index, I items of the catalogue, D width, X exclusions,
A allowed items, K list length.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryFile, gettempdir
from typing import Literal, Protocol, final, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from pydantic import Field
from safetensors.torch import load_file, save_file
from torch import Tensor

from foretaste.config import Config
from foretaste.data.folder import reason_of
from foretaste.errors import DataError, NonFiniteError
from foretaste.models.base import TopK, best_first, padded, top_k
from foretaste.models.layers.codes import Codes, read_codes

IndexKind = Literal["exact", "codes", "ivf_flat", "ivf_sq8", "ivf_pq", "hnsw"]
IndexChoice = Literal["auto", "exact", "codes", "ivf_flat", "ivf_sq8", "ivf_pq", "hnsw"]


class IndexFacts(Config):
    """Facts about an index and its recall when it was built; stored in `index.json`."""

    kind: IndexKind
    num_items: int
    """Number of items in the index: those with a training event."""
    catalogue_size: int
    """Number of items of the catalogue; item_idx is in [0, catalogue_size)."""
    embedding_dim: int
    """Width of the vectors."""
    search_width: int = 0
    """Number of lists probed by IVF, or of candidates of HNSW; 0 for an exact search."""
    build: dict[str, int] = Field(default_factory=dict)
    """Parameters of the build, such as IVF's number of lists, or the number of codes of a row."""
    recall_at_100: float = 1.0
    """Share of the true 100 best items that the index finds, in [0, 1], measured when it was
    built."""
    recall_target: float = 1.0
    """The recall that the search width was tuned for."""
    recall_queries: str = "exact by construction"
    """The source of the queries that recall was measured on."""


@runtime_checkable
class ItemIndex(Protocol):
    """An index that finds the best items of a query by dot product. Searches are thread-safe.

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

        There are k items unless fewer are left in the catalogue.

        Args:
            query_BD: Query vectors, finite.
            k: List length, at least 1.
            exclude_BX: item_idx that are excluded for each row.
            allow_I: Items that may be returned, for all rows; None: all items.

        Raises:
            DataError: k is below 1, or a width or the catalogue's size does not match.
            NonFiniteError: A query is NaN or infinite.
        """
        ...

    def save(self, folder: Path) -> None:
        """Write the files of the index into an existing folder."""
        ...


def check_search(
    facts: IndexFacts,
    query_BD: Float[Tensor, "B D"],
    k: int,
    allow_I: Bool[Tensor, " I"] | None,
) -> None:
    """Raise an error for a search that no index can answer.

    Raises:
        DataError: k is below 1, or a width or the catalogue's size does not match.
        NonFiniteError: A query is NaN or infinite.
    """
    if k < 1:
        raise DataError(f"k is {k}: ask for 1 item or more", name="k", value=k)
    if query_BD.shape[1] != facts.embedding_dim:
        raise DataError(
            f"queries have width {query_BD.shape[1]} and the index {facts.embedding_dim}: search "
            "with vectors of the model that the index was built from",
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
        raise NonFiniteError("a query is NaN or infinite: the model is broken, train it again")


ITEM_BLOCK = 2**20
"""Number of items that are compared at a time."""
SCORE_BLOCK = 2**24
"""Number of scores in memory at a time: 64 MiB."""
VECTORS_FILE = "vectors.safetensors"
CODES_FILE = "codes.safetensors"


MAPPED_BYTES = 2**28
"""Tables of this size or larger are built in a temporary file, which the system may page out."""


def room_for(num: int, width: int, dtype: torch.dtype = torch.float32) -> Float[Tensor, "N D"]:
    """Allocate a table in memory or, if it is large, in a memory-mapped temporary file.

    Raises:
        DataError: There is no room for the file.
    """
    size = num * width * dtype.itemsize
    if size < MAPPED_BYTES:
        return torch.empty(num, width, dtype=dtype)
    try:
        with TemporaryFile() as file:
            if hasattr(os, "posix_fallocate"):  # otherwise a full disk would end the process later
                os.posix_fallocate(file.fileno(), 0, size)
            bytes_S = np.memmap(file, np.uint8, "w+", shape=(size,))
    except OSError as error:
        raise DataError(
            f"there is no room for the table of vectors in {gettempdir()}: {reason_of(error)}: "
            "make room there, or set the environment variable TMPDIR to another folder",
            name="TMPDIR",
            value=gettempdir(),
        ) from error
    return torch.from_numpy(bytes_S).view(dtype).view(num, width)


class WholeIndex(ABC):
    """Compares a query with every item."""

    def __init__(self, item_N: Int64[Tensor, " N"], facts: IndexFacts) -> None:
        """Store the item of each position, ascending."""
        self.item_N, self.facts = item_N, facts
        self._is_whole = len(item_N) == facts.catalogue_size

    @property
    def kind(self) -> IndexKind:
        return self.facts.kind

    @abstractmethod
    def search(
        self,
        query_BD: Float[Tensor, "B D"],
        k: int,
        *,
        exclude_BX: Int64[Tensor, "B X"],
        allow_I: Bool[Tensor, " I"] | None = None,
    ) -> TopK:
        """Return the K best items of each query; see `ItemIndex.search`."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write its files."""

    @abstractmethod
    def vectors_at(self, position_X: Int64[Tensor, "*X"]) -> Float[Tensor, "*X D"]:
        """Return the vectors of some positions."""

    @abstractmethod
    def blocks(self) -> Iterator[Float[Tensor, "_ D"]]:
        """Yield all vectors, in blocks."""

    def positions(self, item_BX: Int64[Tensor, "B X"]) -> Int64[Tensor, "B X"]:
        """Return the positions of items in the index, -1 for items that are not in it."""
        if self._is_whole:
            return item_BX
        return _find(self.item_N, item_BX)

    def allowed(self, allow_I: Bool[Tensor, " I"]) -> Bool[Tensor, " N"]:
        """Return which of the index's items are allowed."""
        return allow_I if self._is_whole else allow_I.index_select(0, self.item_N)

    def products(self, vector_D: Float[Tensor, " D"]) -> Float[Tensor, " N"]:
        """Return the dot product of each item with a vector."""
        return torch.cat([block_nD @ vector_D for block_nD in self.blocks()])


@final
class ExactIndex(WholeIndex):
    """The exact index over full vectors, which is the reference for approximate indexes."""

    def __init__(
        self,
        vectors_ND: Float[Tensor, "N D"],
        item_N: Int64[Tensor, " N"],
        *,
        catalogue_size: int,
    ) -> None:
        """Store vectors without a copy; `item_N` is the item of each vector, ascending."""
        facts = IndexFacts(
            kind="exact",
            num_items=len(item_N),
            catalogue_size=catalogue_size,
            embedding_dim=vectors_ND.shape[1],
        )
        super().__init__(item_N, facts)
        self.vectors_ND = vectors_ND

    def vectors_at(self, position_X: Int64[Tensor, "*X"]) -> Float[Tensor, "*X D"]:
        found_ND = self.vectors_ND.index_select(0, position_X.flatten()).float()
        return found_ND.view(*position_X.shape, self.vectors_ND.shape[1])

    def blocks(self) -> Iterator[Float[Tensor, "_ D"]]:
        for block_nD in self.vectors_ND.split(ITEM_BLOCK):
            yield block_nD.float()

    def search(
        self,
        query_BD: Float[Tensor, "B D"],
        k: int,
        *,
        exclude_BX: Int64[Tensor, "B X"],
        allow_I: Bool[Tensor, " I"] | None = None,
    ) -> TopK:
        check_search(self.facts, query_BD, k, allow_I)
        vectors_AD, item_A, exclude_BX = self.vectors_ND, self.item_N, self.positions(exclude_BX)
        if allow_I is not None:
            chosen_A = self.allowed(allow_I).nonzero().flatten()
            vectors_AD = vectors_AD.index_select(0, chosen_A)  # 10 times as fast as [chosen_A]
            item_A = item_A.index_select(0, chosen_A)
            exclude_BX = _find(chosen_A, exclude_BX)
        query_BD = query_BD.to(vectors_AD.dtype)
        found = min(k, len(item_A))
        rows = max(1, SCORE_BLOCK // max(1, min(len(item_A), ITEM_BLOCK)))
        answers = [
            _search_block(vectors_AD, query_bD, found, exclude_bX)
            for query_bD, exclude_bX in zip(
                query_BD.split(rows), exclude_BX.split(rows), strict=True
            )
        ]
        score_BK = torch.cat([score_bK for score_bK, _ in answers]).float()
        position_BK = torch.cat([position_bK for _, position_bK in answers])
        item_BK = position_BK if self._is_whole and allow_I is None else item_A[position_BK]
        item_BK = item_BK.where(score_BK > -torch.inf, -1)
        return padded(TopK(item_BK=item_BK, score_BK=score_BK), k)

    def save(self, folder: Path) -> None:
        """Write `vectors.safetensors` and `index.json`."""
        save_vectors(self, folder)
        (folder / "index.json").write_text(self.facts.model_dump_json(indent=2))


@final
class CodeIndex(WholeIndex):
    """An exact index over product-quantised vectors; scores are computed without decompression.

    The result equals that of the decompressed vectors up to rounding: in float32, a sum of M
    partial products and one of D products differ by a relative error of about 1e-7.
    """

    def __init__(self, codes: Codes, item_N: Int64[Tensor, " N"], facts: IndexFacts) -> None:
        """Store codes without a copy; `item_N` is the item of each code, ascending."""
        super().__init__(item_N, facts)
        self.codes = codes

    def search(
        self,
        query_BD: Float[Tensor, "B D"],
        k: int,
        *,
        exclude_BX: Int64[Tensor, "B X"],
        allow_I: Bool[Tensor, " I"] | None = None,
    ) -> TopK:
        check_search(self.facts, query_BD, k, allow_I)
        score_BK, position_BK = self.codes.best(
            query_BD,
            k,
            left_out_BY=self.positions(exclude_BX),
            left_out_R=None if allow_I is None else ~self.allowed(allow_I),
        )
        item_BK = self.item_N[position_BK.clamp(min=0)].where(position_BK >= 0, -1)
        return padded(TopK(item_BK=item_BK, score_BK=score_BK), k)

    def vectors_at(self, position_X: Int64[Tensor, "*X"]) -> Float[Tensor, "*X D"]:
        return self.codes.rows(position_X)

    def blocks(self) -> Iterator[Float[Tensor, "_ D"]]:
        for _, block_nD in self.codes.blocks():
            yield block_nD

    def products(self, vector_D: Float[Tensor, " D"]) -> Float[Tensor, " N"]:
        return self.codes.products(vector_D.unsqueeze(0))[0]

    def save(self, folder: Path) -> None:
        """Write `codes.safetensors` and `index.json`."""
        tensors = {"code_NM": self.codes.code_RM, "book_MCd": self.codes.book_MCd}
        if self.codes.turn_DD is not None:
            tensors["turn_DD"] = self.codes.turn_DD
        if self.codes.exact_L is not None and self.codes.exact_LD is not None:
            tensors |= {"exact_L": self.codes.exact_L, "exact_LD": self.codes.exact_LD}
        tensors = {name: value.contiguous() for name, value in tensors.items()}
        save_file(tensors | {"item_N": self.item_N.contiguous()}, folder / CODES_FILE)
        (folder / "index.json").write_text(self.facts.model_dump_json(indent=2))


def load_codes(folder: Path, facts: IndexFacts) -> CodeIndex:
    """Read the codes that `CodeIndex.save` wrote, memory-mapped.

    Raises:
        BundleError: The codes do not match their codebooks.
    """
    tensors = load_file(folder / CODES_FILE)
    codes = read_codes(
        tensors["code_NM"],
        tensors["book_MCd"],
        tensors.get("turn_DD"),
        (tensors["exact_L"], tensors["exact_LD"])
        if {"exact_L", "exact_LD"} & tensors.keys()
        else None,
        width=facts.embedding_dim,
        source=str(folder / CODES_FILE),
    )
    return CodeIndex(codes, tensors["item_N"], facts)


def save_vectors(exact: ExactIndex, folder: Path) -> None:
    """Write the vectors and their items."""
    tensors = {"vectors_ND": exact.vectors_ND.contiguous(), "item_N": exact.item_N.contiguous()}
    save_file(tensors, folder / VECTORS_FILE)


def load_vectors(folder: Path, facts: IndexFacts) -> ExactIndex:
    """Read the vectors that `save_vectors` wrote, memory-mapped."""
    tensors = load_file(folder / VECTORS_FILE)
    return ExactIndex(tensors["vectors_ND"], tensors["item_N"], catalogue_size=facts.catalogue_size)


def _find(sorted_N: Tensor, value_BX: Tensor) -> Tensor:
    """Return the positions of values in `sorted_N`, -1 for missing ones."""
    if len(sorted_N) == 0:
        return torch.full_like(value_BX, -1)
    at_BX = torch.searchsorted(sorted_N, value_BX.contiguous()).clamp(max=len(sorted_N) - 1)
    return at_BX.where(sorted_N[at_BX] == value_BX, -1)


def _search_block(
    vectors_ND: Tensor, query_BD: Tensor, k: int, exclude_BX: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the k <= N best positions of each query; excluded ones score -inf."""
    blocks = vectors_ND.split(ITEM_BLOCK)
    best = _score_block(blocks[0], query_BD, k, exclude_BX, start=0)
    for number, block_nD in enumerate(blocks[1:], start=1):
        more = _score_block(block_nD, query_BD, k, exclude_BX, start=number * ITEM_BLOCK)
        value_BK, position_BK = best_first(
            torch.cat([best[0], more[0]], dim=1), torch.cat([best[1], more[1]], dim=1)
        )
        best = value_BK[:, :k], position_BK[:, :k]
    return best


def _score_block(
    block_ND: Tensor, query_BD: Tensor, k: int, exclude_BX: Tensor, *, start: int
) -> tuple[Tensor, Tensor]:
    """Return at most k best items among those from position `start` on."""
    score_BN = query_BD @ block_ND.T
    width = score_BN.shape[1]
    if exclude_BX.numel():
        place_BX = exclude_BX - start
        inside_BX = (exclude_BX >= start) & (place_BX < width)
        row_B1 = torch.arange(len(query_BD)).unsqueeze(1) * width
        score_BN.view(-1)[(place_BX + row_B1)[inside_BX]] = -torch.inf
    value_BK, position_BK = top_k(score_BN, k)
    return value_BK, position_BK + start

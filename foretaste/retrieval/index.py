"""The item index: what serving may ask of any, and the exact one, by which the others are measured.

Shape legend: B queries, N items in the index, I items of the catalogue, D width, X exclusions,
A allowed items, K list length.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryFile, gettempdir
from typing import Literal, NamedTuple, Protocol, final, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from pydantic import Field
from safetensors.torch import load_file, save_file
from torch import Tensor

from foretaste.config import Config
from foretaste.data.folder import reason_of
from foretaste.errors import DataError, NonFiniteError
from foretaste.models.base import best_first, top_k
from foretaste.models.layers.codes import Codes, read_codes

IndexKind = Literal["exact", "codes", "ivf_flat", "ivf_sq8", "ivf_pq", "hnsw"]
IndexChoice = Literal["auto", "exact", "codes", "ivf_flat", "ivf_sq8", "ivf_pq", "hnsw"]


class TopK(NamedTuple):
    """The best items of each query, best first; -1 and -inf where the catalogue ran out.

    Shape legend: B queries, K list length.
    """

    item_BK: Int64[Tensor, "B K"]
    score_BK: Float[Tensor, "B K"]


class IndexFacts(Config):
    """What an index is and how good it was when it was built; kept beside it in `index.json`."""

    kind: IndexKind
    num_items: int
    """Items in the index: those with a training event."""
    catalogue_size: int
    """Items of the catalogue; item_idx lies in [0, catalogue_size)."""
    embedding_dim: int
    """Width of the vectors."""
    search_width: int = 0
    """Lists probed by IVF, candidates kept by HNSW; 0 if everything is compared."""
    build: dict[str, int] = Field(default_factory=dict)
    """What it was built with, such as IVF's number of lists, or a row's number of codes."""
    recall_at_100: float = 1.0
    """Share of the true 100 best that it finds, in [0, 1], measured when it was built."""
    recall_target: float = 1.0
    """The recall that the search width was tuned for."""
    recall_queries: str = "exact by construction"
    """Where the measured queries came from."""


@runtime_checkable
class ItemIndex(Protocol):
    """The best items of a query by dot product. Safe to search from several threads.

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

        Never fewer than k while the catalogue has that many left.

        Args:
            query_BD: Finite.
            k: At least 1.
            exclude_BX: item_idx that a row must not get.
            allow_I: Only these items may be answered, to any row; without it, all.

        Raises:
            DataError: k is below 1, or a width or the catalogue's size disagrees.
            NonFiniteError: A query is NaN or infinite.
        """
        ...

    def save(self, folder: Path) -> None:
        """Write the index's own files into an existing folder."""
        ...


def check_search(
    facts: IndexFacts,
    query_BD: Float[Tensor, "B D"],
    k: int,
    allow_I: Bool[Tensor, " I"] | None,
) -> None:
    """Refuse a search that no index could answer.

    Raises:
        DataError: k is below 1, or a width or the catalogue's size disagrees.
        NonFiniteError: A query is NaN or infinite.
    """
    if k < 1:
        raise DataError(f"k is {k}: ask for 1 item or more", name="k", value=k)
    if query_BD.shape[1] != facts.embedding_dim:
        raise DataError(
            f"queries are {query_BD.shape[1]} wide and the index {facts.embedding_dim}: "
            "search with vectors of the model that it was built from",
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
"""Items compared at a time."""
SCORE_BLOCK = 2**24
"""Scores held at a time: 64 MiB."""
VECTORS_FILE = "vectors.safetensors"
CODES_FILE = "codes.safetensors"


MAPPED_BYTES = 2**28
"""Tables from this size on are built in a temporary file, which the system may write out."""


def room_for(num: int, width: int, dtype: torch.dtype = torch.float32) -> Float[Tensor, "N D"]:
    """Make a table to be filled: in memory, or, where it is large, a map of a nameless file.

    Raises:
        DataError: The file finds no room.
    """
    size = num * width * dtype.itemsize
    if size < MAPPED_BYTES:
        return torch.empty(num, width, dtype=dtype)
    try:
        with TemporaryFile() as file:
            if hasattr(os, "posix_fallocate"):  # or a full disk would end the process later
                os.posix_fallocate(file.fileno(), 0, size)
            bytes_S = np.memmap(file, np.uint8, "w+", shape=(size,))
    except OSError as error:
        raise DataError(
            f"the table of vectors finds no room in {gettempdir()}: {reason_of(error)}: make room "
            "there, or name another folder in the environment variable TMPDIR",
            name="TMPDIR",
            value=gettempdir(),
        ) from error
    return torch.from_numpy(bytes_S).view(dtype).view(num, width)


def padded(best: TopK, k: int) -> TopK:
    """Make answers k long: -1 and -inf where the catalogue ran out."""
    missing = k - best.item_BK.shape[1]
    if missing == 0:
        return best
    return TopK(
        item_BK=F.pad(best.item_BK, (0, missing), value=-1),
        score_BK=F.pad(best.score_BK, (0, missing), value=-torch.inf),
    )


class WholeIndex(ABC):
    """Compares a query with every item."""

    def __init__(self, item_N: Int64[Tensor, " N"], facts: IndexFacts) -> None:
        """Take which item each position is, rising."""
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
        """Give all vectors, in blocks."""

    def positions(self, item_BX: Int64[Tensor, "B X"]) -> Int64[Tensor, "B X"]:
        """Return where items stand in the index, -1 for those that do not."""
        if self._is_whole:
            return item_BX
        return _find(self.item_N, item_BX)

    def allowed(self, allow_I: Bool[Tensor, " I"]) -> Bool[Tensor, " N"]:
        """Return which of the index's items are allowed."""
        return allow_I if self._is_whole else allow_I.index_select(0, self.item_N)

    def products(self, vector_D: Float[Tensor, " D"]) -> Float[Tensor, " N"]:
        """Return each item's product with a vector."""
        return torch.cat([block_nD @ vector_D for block_nD in self.blocks()])


@final
class ExactIndex(WholeIndex):
    """Whole vectors, by which approximate indexes are measured."""

    def __init__(
        self,
        vectors_ND: Float[Tensor, "N D"],
        item_N: Int64[Tensor, " N"],
        *,
        catalogue_size: int,
    ) -> None:
        """Keep vectors by reference; `item_N` says which item each is, rising."""
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
    """Vectors kept as codes: scores are sums of partial products, and nothing is decompressed.

    The best of the decompressed vectors, to rounding: in float32 a sum of M parts and one of D
    products differ by about 1e-7 of the parts' size.
    """

    def __init__(self, codes: Codes, item_N: Int64[Tensor, " N"], facts: IndexFacts) -> None:
        """Keep codes by reference; `item_N` says which item each is, rising."""
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
        tensors = {name: value.contiguous() for name, value in tensors.items()}
        save_file(tensors | {"item_N": self.item_N.contiguous()}, folder / CODES_FILE)
        (folder / "index.json").write_text(self.facts.model_dump_json(indent=2))


def load_codes(folder: Path, facts: IndexFacts) -> CodeIndex:
    """Read what `CodeIndex.save` wrote, as a memory map.

    Raises:
        BundleError: The codes do not fit their codebooks.
    """
    tensors = load_file(folder / CODES_FILE)
    codes = read_codes(
        tensors["code_NM"],
        tensors["book_MCd"],
        tensors.get("turn_DD"),
        width=facts.embedding_dim,
        source=str(folder / CODES_FILE),
    )
    return CodeIndex(codes, tensors["item_N"], facts)


def save_vectors(exact: ExactIndex, folder: Path) -> None:
    """Write the vectors and which items they are."""
    tensors = {"vectors_ND": exact.vectors_ND.contiguous(), "item_N": exact.item_N.contiguous()}
    save_file(tensors, folder / VECTORS_FILE)


def load_vectors(folder: Path, facts: IndexFacts) -> ExactIndex:
    """Read what `save_vectors` wrote, as a memory map."""
    tensors = load_file(folder / VECTORS_FILE)
    return ExactIndex(tensors["vectors_ND"], tensors["item_N"], catalogue_size=facts.catalogue_size)


def _find(sorted_N: Tensor, value_BX: Tensor) -> Tensor:
    """Return where values stand in `sorted_N`, -1 where they do not."""
    if len(sorted_N) == 0:
        return torch.full_like(value_BX, -1)
    at_BX = torch.searchsorted(sorted_N, value_BX.contiguous()).clamp(max=len(sorted_N) - 1)
    return at_BX.where(sorted_N[at_BX] == value_BX, -1)


def _search_block(
    vectors_ND: Tensor, query_BD: Tensor, k: int, exclude_BX: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the k <= N best positions of each query, excluded ones at -inf."""
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
    """Return the best of the items from position `start` on, at most k."""
    score_BN = query_BD @ block_ND.T
    width = score_BN.shape[1]
    if exclude_BX.numel():
        place_BX = exclude_BX - start
        inside_BX = (exclude_BX >= start) & (place_BX < width)
        row_B1 = torch.arange(len(query_BD)).unsqueeze(1) * width
        score_BN.view(-1)[(place_BX + row_B1)[inside_BX]] = -torch.inf
    value_BK, position_BK = top_k(score_BN, k)
    return value_BK, position_BK + start

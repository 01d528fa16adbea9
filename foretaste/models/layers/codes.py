"""Rows of codes, scored without decompressing: the item side of product quantisation.

Shape legend: R rows, X any shape of requested rows, M codes of a row (sub-spaces), C vectors of a
codebook, d width of the widest of them, D width, B queries, K list length, Y left-out rows, L rows
that are stored as they are.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, final

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor

from foretaste.errors import BundleError
from foretaste.later import later

if TYPE_CHECKING:
    from foretaste.data import loops
else:
    loops = later("foretaste.data.loops")
faiss = later("faiss")

CODES = 256
"""Number of vectors in a codebook, so that a code is a byte."""
_BLOCK_ROWS = 2**18


def even(width: int, parts: int) -> list[int]:
    """Cut a width into parts that differ by at most 1, the wider ones first."""
    return [width // parts + (part < width % parts) for part in range(parts)]


def places(width: int, parts: int) -> Int64[Tensor, " D"]:
    """Return the positions of a row's numbers in the concatenated codebook vectors."""
    sizes = even(width, parts)
    return torch.cat([torch.arange(size) + part * sizes[0] for part, size in enumerate(sizes)])


@final
@dataclass(frozen=True, eq=False, kw_only=True)
class Codes:
    r"""Rows :math:`[c^1_{b_{r1}}; \dots; c^M_{b_{rM}}] R`, stored as their codes b.

    A product with a query is a sum over sub-spaces of one of 256 partial products, each computed
    once per query: :math:`q \cdot e_r = \sum_m (q R^\top)^m \cdot c^m_{b_{rm}}`. It differs from
    the product with the decompressed row only by the order of summation.

    References:
        Jégou, Douze and Schmid, "Product Quantization for Nearest Neighbor Search", TPAMI 2011;
        Petrov, Macdonald and Tonellotto, "Efficient Inference of Sub-Item Id-based Sequential
        Recommendation Models with Millions of Items", RecSys 2024,
        https://arxiv.org/abs/2408.09992.
    """

    code_RM: UInt8[Tensor, "R M"]
    book_MCd: Float[Tensor, "M C d"]
    """Narrower parts are padded with zeros."""
    width: int
    turn_DD: Float[Tensor, "D D"] | None = None
    """The orthogonal R, which rotates rows back to the axes of the model; None: no rotation."""
    exact_L: Int64[Tensor, " L"] | None = None
    """Rows that are stored as they are, ascending; their codes are not read. None: no row is."""
    exact_LD: Float[Tensor, "L D"] | None = None

    def __len__(self) -> int:
        return len(self.code_RM)

    def take(self, row_N: Int64[Tensor, " N"]) -> "Codes":
        """Return some of the rows."""
        taken = replace(self, code_RM=self.code_RM.index_select(0, row_N))
        if self.exact_L is None or self.exact_LD is None:
            return taken
        place_N = self._exact_places(row_N)
        exact_l = (place_N >= 0).nonzero().flatten()
        return replace(taken, exact_L=exact_l, exact_LD=self.exact_LD[place_N[exact_l]])

    def rows(self, row_X: Int64[Tensor, "*X"]) -> Float[Tensor, "*X D"]:
        """Return rows as vectors."""
        num_parts, width = self.code_RM.shape[1], self.book_MCd.shape[2]
        code_NM = self.code_RM[row_X.flatten()].long() + torch.arange(num_parts) * CODES
        found_ND = self.book_MCd.reshape(-1, width)[code_NM].flatten(1)
        if self.width < found_ND.shape[1]:
            found_ND = found_ND[:, places(self.width, num_parts)]
        if self.turn_DD is not None:
            found_ND = found_ND @ self.turn_DD
        return self.with_exact(row_X.flatten(), found_ND).view(*row_X.shape, self.width)

    def with_exact(
        self, row_N: Int64[Tensor, " N"], decoded_ND: Float[Tensor, "N D"]
    ) -> Float[Tensor, "N D"]:
        """Return decoded rows, those that are stored as they are in their places."""
        if self.exact_LD is None:
            return decoded_ND
        place_N = self._exact_places(row_N)
        exact_N = (place_N >= 0).nonzero().flatten()
        return decoded_ND.index_copy(0, exact_N, self.exact_LD[place_N[exact_N]])

    def _exact_places(self, row_N: Tensor) -> Tensor:
        """Return the place of each row among those that are stored as they are, or -1."""
        if self.exact_L is None or not len(self.exact_L):
            return torch.full_like(row_N, -1)
        place_N = torch.searchsorted(self.exact_L, row_N).clamp(max=len(self.exact_L) - 1)
        return place_N.where(self.exact_L[place_N] == row_N, -1)

    def blocks(self) -> Iterator[tuple[int, Float[Tensor, "_ D"]]]:
        """Yield all rows as vectors, in blocks, each with the number of its first row."""
        for row_N in torch.arange(len(self)).split(_BLOCK_ROWS):
            yield int(row_N[0]), self.rows(row_N)

    def products(self, query_BD: Float[Tensor, "B D"]) -> Float[Tensor, "B R"]:
        """Return the product of each query with every row."""
        part_BMC, code_RM = self._parts(query_BD), self.code_RM.numpy()
        score_BR = np.empty((len(query_BD), len(self)), dtype=np.float32)
        _in_threads(len(query_BD), lambda b: loops.code_sums(code_RM, part_BMC[b], score_BR[b]))
        found_BR = torch.from_numpy(score_BR)
        if self.exact_L is not None and self.exact_LD is not None:
            found_BR[:, self.exact_L] = query_BD.detach().float() @ self.exact_LD.T
        return found_BR

    def best(
        self,
        query_BD: Float[Tensor, "B D"],
        k: int,
        *,
        left_out_BY: Int64[Tensor, "B Y"],
        left_out_R: Bool[Tensor, " R"] | None = None,
    ) -> tuple[Float[Tensor, "B K"], Int64[Tensor, "B K"]]:
        """Return the best min(k, R) products of each query and their rows, best first.

        Ties go to the lower row; missing entries are -inf and -1.

        Args:
            query_BD: Queries.
            k: List length.
            left_out_BY: Rows that a query must not get, padded with -1.
            left_out_R: Rows that no query may get.
        """
        part_BMC, code_RM = self._parts(query_BD), self.code_RM.numpy()
        shape = (len(query_BD), min(k, len(self)))
        score_BK, row_BK = np.full(shape, -np.inf, np.float32), np.full(shape, -1, np.int64)
        left_out = np.ascontiguousarray(left_out_BY.numpy())

        def work(b: slice) -> None:
            none = (
                np.zeros(len(self), np.bool_) if left_out_R is None else left_out_R.numpy().copy()
            )
            if self.exact_L is not None:
                none[self.exact_L.numpy()] = True  # they follow
            loops.best_by_codes(code_RM, part_BMC[b], none, left_out[b], score_BK[b], row_BK[b])

        _in_threads(len(query_BD), work)
        found_BK, found_row_BK = torch.from_numpy(score_BK), torch.from_numpy(row_BK)
        if self.exact_L is not None and self.exact_LD is not None:
            score_BL = query_BD.detach().float() @ self.exact_LD.T
            score_BL[_left_out(self.exact_L, left_out_BY, left_out_R)] = -torch.inf
            found_BK = torch.cat([found_BK, score_BL], dim=1)
            exact_BL = self.exact_L.expand_as(score_BL).where(score_BL > -torch.inf, -1)
            found_row_BK, order_BK = torch.cat([found_row_BK, exact_BL], dim=1).sort(dim=1)
            found_BK = found_BK.gather(1, order_BK)
        found_BK, order_BK = found_BK.sort(dim=1, descending=True, stable=True)
        return found_BK[:, : shape[1]], found_row_BK.gather(1, order_BK)[:, : shape[1]]

    def _parts(self, query_BD: Tensor) -> np.ndarray:
        """Return the partial products (B, M, C)."""
        num_parts, _, width = self.book_MCd.shape
        query_BD = query_BD.detach().float()
        if self.turn_DD is not None:
            query_BD = query_BD @ self.turn_DD.T
        if self.width < num_parts * width:
            padded_BP = query_BD.new_zeros(len(query_BD), num_parts * width)
            padded_BP[:, places(self.width, num_parts)] = query_BD
            query_BD = padded_BP
        query_MBd = query_BD.view(len(query_BD), num_parts, width).transpose(0, 1)
        part_BMC: np.ndarray = (query_MBd @ self.book_MCd.mT).transpose(0, 1).contiguous().numpy()
        return part_BMC


def _left_out(
    exact_L: Tensor, left_out_BY: Tensor, left_out_R: Tensor | None
) -> Bool[Tensor, "B L"]:
    """Return which of the rows that are stored as they are a query must not get."""
    place_BY = torch.searchsorted(exact_L, left_out_BY.contiguous()).clamp(max=len(exact_L) - 1)
    is_BY = exact_L[place_BY] == left_out_BY
    none_BL = torch.zeros(len(left_out_BY), len(exact_L) + 1, dtype=torch.bool)
    none_BL.scatter_(1, place_BY.where(is_BY, len(exact_L)), value=True)
    none_BL = none_BL[:, :-1]
    return none_BL if left_out_R is None else none_BL | left_out_R[exact_L]


def read_codes(
    code: Tensor,
    book: Tensor,
    turn: Tensor | None = None,
    exact: tuple[Tensor, Tensor] | None = None,
    *,
    width: int,
    source: str,
) -> Codes:
    """Return codes from a file.

    Raises:
        BundleError: They are invalid: a code is beyond its codebook, or a number is not finite.
    """
    num_parts = code.shape[-1] if code.dim() == 2 else 0
    wanted = (num_parts, CODES, even(width, max(1, num_parts))[0])
    wrong = ""
    if code.dtype != torch.uint8 or not 0 < num_parts <= width:
        wrong = f"its codes are {code.dtype} of shape {tuple(code.shape)}, and not rows of bytes"
    elif book.dtype != torch.float32 or tuple(book.shape) != wanted:
        wrong = f"its codebooks are {book.dtype} of shape {tuple(book.shape)}, and not {wanted}"
    elif not book.isfinite().all():
        wrong = "a codebook has a number that is NaN or infinite"
    elif turn is not None and (turn.dtype, tuple(turn.shape)) != (torch.float32, (width, width)):
        wrong = f"its turn is {turn.dtype} of shape {tuple(turn.shape)}, and not {(width, width)}"
    elif turn is not None and not turn.isfinite().all():
        wrong = "its turn has a number that is NaN or infinite"
    elif exact is not None:
        wrong = exact_damage(*exact, num_rows=len(code), width=width)
    if wrong:
        raise BundleError(
            f"{source}: {wrong}: the file is damaged, write the bundle again", name=source
        )
    # Copies have the layout of the originals, so that products are bit-identical.
    turn = None if turn is None else turn.clone()
    codes = Codes(code_RM=code, book_MCd=book.clone(), width=width, turn_DD=turn)
    return codes if exact is None else replace(codes, exact_L=exact[0], exact_LD=exact[1].clone())


def exact_damage(row: Tensor, vector: Tensor, *, num_rows: int, width: int) -> str:
    """Return what is wrong with rows that are stored as they are, "" if nothing is."""
    if (row.dtype, vector.dtype) != (torch.int64, torch.float32):
        return f"its exact rows are {row.dtype} and {vector.dtype}"
    if row.dim() != 1 or tuple(vector.shape) != (len(row), width) or not len(row):
        return f"its exact rows are of shape {tuple(row.shape)} and {tuple(vector.shape)}"
    if int(row[0]) < 0 or int(row[-1]) >= num_rows or not (row.diff() > 0).all():
        return f"its exact rows are not ascending places of {num_rows:,} rows"
    return "" if vector.isfinite().all() else "an exact row has a number that is NaN or infinite"


def train_codes(row_RD: Float[Tensor, "R D"], sub_spaces: int, *, turned: bool = True) -> Codes:
    """Rotate rows if requested, and code them by k-means in each sub-space (FAISS's trainer).

    References:
        Ge, He, Ke and Sun, "Optimized Product Quantization", TPAMI 2014: its parametric form.
    """
    num_rows, width = row_RD.shape
    size = even(width, sub_spaces)[0]
    turn_DD = balanced_turn(row_RD, sub_spaces) if turned else None
    padded_RP = row_RD.new_zeros(num_rows, sub_spaces * size)
    padded_RP[:, places(width, sub_spaces)] = row_RD if turn_DD is None else row_RD @ turn_DD.T
    quantizer = faiss.ProductQuantizer(padded_RP.shape[1], sub_spaces, 8)
    quantizer.cp.min_points_per_centroid = 1  # few rows give no warning
    times = -(-CODES // num_rows)  # it needs as many rows as vectors
    quantizer.train(padded_RP.repeat(times, 1).numpy())
    found = torch.from_numpy(faiss.vector_to_array(quantizer.centroids))
    return Codes(
        code_RM=torch.from_numpy(quantizer.compute_codes(padded_RP.numpy())),
        book_MCd=found.view(sub_spaces, CODES, size),
        width=width,
        turn_DD=turn_DD,
    )


def balanced_turn(row_RD: Float[Tensor, "R D"], sub_spaces: int) -> Float[Tensor, "D D"]:
    """Return principal directions, distributed over sub-spaces so that variances are balanced."""
    square_DD = torch.zeros(row_RD.shape[1], row_RD.shape[1], dtype=torch.float64)
    for block_RD in row_RD.split(_BLOCK_ROWS):
        square_DD += (block_RD.T @ block_RD).double()
    length_D, direction_DD = torch.linalg.eigh(square_DD)
    turn_DD: Tensor = direction_DD.T.float().index_select(0, balanced(length_D, sub_spaces))
    return turn_DD


def balanced(length_D: Float[Tensor, " D"], sub_spaces: int) -> Int64[Tensor, " D"]:
    """Return an order of directions of these squared lengths that balances the sub-spaces.

    The loss of a sub-space of k directions depends on the product of their squared lengths to the
    power 1/k, so the longest remaining direction goes to the sub-space with the smallest product.
    """
    least = float(length_D.max()) * 1e-9 or 1.0
    log_D = (length_D.clamp(min=least) / least).log().tolist()
    sizes = even(len(length_D), sub_spaces)
    dealt: list[list[int]] = [[] for _ in sizes]
    for place in sorted(range(len(log_D)), key=lambda d: -log_D[d]):
        open_parts = [m for m, size in enumerate(sizes) if len(dealt[m]) < size]
        part = min(open_parts, key=lambda m: sum(log_D[d] for d in dealt[m]))
        dealt[part].append(place)
    return torch.tensor([d for one in dealt for d in one])


def _in_threads(num: int, work: Callable[[slice], None]) -> None:
    """Process slices of [0, num) in as many threads as torch uses."""
    threads = max(1, min(torch.get_num_threads(), num))
    step = -(-num // threads)
    slices = [slice(first, first + step) for first in range(0, num, max(1, step))]
    if threads == 1:
        for one in slices:
            work(one)
        return
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, slices))

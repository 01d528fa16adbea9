"""Smaller kinds of tables: how the vectors of ids and features are kept, and their settings.

A model that needs a table asks its settings for one (`make`); only this file,
`table_kinds.py` and `tables_at_rest.py` know a kind by its name.

Shape legend: R rows of a table, X any shape of requested rows, N requested rows, D width, K hash
functions, M sub-spaces or digits.
"""

import math
from abc import abstractmethod
from collections.abc import Sequence
from itertools import chain
from typing import Annotated, Any, Literal, final

import torch
from jaxtyping import Bool, Float, Int64
from pydantic import Field
from torch import Tensor, nn

from foretaste.config import Count, CountOrZero
from foretaste.errors import BundleError, ConfigError
from foretaste.models.layers.codes import even
from foretaste.models.layers.table import (
    Dense,
    FindLinks,
    OwnRows,
    Table,
    TableKind,
    check_block,
    check_growth,
    check_rows,
    no_links,
    own_rows,
)

_SIGNED = 2**63 - 1

Times = Annotated[float, Field(gt=1, le=1e6)]
Parts = Annotated[int, Field(ge=2, le=4)]


class SmallerConfig(TableKind):
    """Settings of tables that store fewer numbers than a row for each id."""

    from_rows: CountOrZero = 256
    """Tables of fewer rows, and tables of biases, stay dense, because there is little to save."""

    @property
    def shares(self) -> bool:
        """Whether rows share weights: all smaller kinds that can be trained do."""
        return True

    def make(self, num_rows: int, width: int) -> Table:
        """Make an untrained table, or a dense one if it would be small anyway."""
        if num_rows < max(1, self.from_rows) or width == 1:
            return own_rows(num_rows, width)
        return self.make_smaller(num_rows, width)

    @abstractmethod
    def make_smaller(self, num_rows: int, width: int) -> Table:
        """Make an untrained table of at least one row."""


class FilledConfig(SmallerConfig):
    """Settings of tables that can be made from a trained one."""

    def compressed(self, table: Table, links: FindLinks = no_links) -> Table:
        """Return a trained table, converted to this kind unless it would be dense."""
        made = self.make(table.num_rows, table.width)
        if not isinstance(made, Filled):
            return table
        self.fill(made, table, links)
        return made

    def fill(self, made: "Filled", table: Table, links: FindLinks) -> None:
        """Copy a trained table's rows into an empty table."""
        made.fill(table)


class NarrowConfig(FilledConfig):
    """Settings of rows of a smaller width, and a learned projection to the model's width."""

    kind: Literal["narrow"] = "narrow"
    """"narrow": rows of a smaller width and one learned projection; other kinds should be better
    than this."""
    times: Times = 8.0
    """The number of a dense table's weights divided by this table's, approximately."""

    @classmethod
    def retrained(cls, times: float, width: int) -> Sequence["TableKind"]:
        """Return settings of equally narrow rows."""
        return (cls(times=times),)

    @classmethod
    def anchor(cls, times: float, width: int) -> "TableKind":
        """Return settings of equally narrow rows."""
        return cls(times=times)

    def make_smaller(self, num_rows: int, width: int) -> Table:
        """Make an untrained table."""
        inner = round(num_rows * width / (self.times * (num_rows + width)))
        return Narrow(num_rows, width, inner=min(width, max(1, inner)))


class HashConfig(SmallerConfig):
    """Settings of rows that are weighted sums of shared rows, selected by hash functions."""

    kind: Literal["hash"] = "hash"
    """"hash": sums of shared rows that hash functions select, with learned weights."""
    times: Times = 8.0
    """The number of a dense table's weights divided by this table's, approximately."""
    hashes: Annotated[int, Field(ge=1, le=8)] = 2
    """Number of hash functions: each row is the weighted sum of this many shared rows."""
    rows: Count | None = None
    """Number of shared rows; None: `times` decides it."""

    @classmethod
    def retrained(cls, times: float, width: int) -> Sequence["TableKind"]:
        """Return settings of sums of equally few rows."""
        return (cls(times=times),)

    def make_smaller(self, num_rows: int, width: int) -> Table:
        """Make an untrained table."""
        shared = round(num_rows * width / (self.times * (width + self.hashes)))
        return Hash(num_rows, width, shared=self.rows or max(1, shared), hashes=self.hashes)


class CompositionalConfig(SmallerConfig):
    """Settings of rows that combine one shared row for each digit of the row's number."""

    kind: Literal["compositional"] = "compositional"
    """"compositional": a combination of one shared row for each digit of the row's number."""
    times: Times = 8.0
    """The number of a dense table's weights divided by this table's, approximately; the number of
    digits sets a limit."""
    parts: Parts = 2
    """Number of digits; two digits are quotient and remainder."""
    operation: Literal["product", "sum", "concatenation"] = "product"
    """How the rows of the digits are combined."""

    @classmethod
    def retrained(cls, times: float, width: int) -> Sequence["TableKind"]:
        """Return settings of products and of concatenated rows, with equally few rows."""
        return (cls(times=times), cls(times=times, operation="concatenation"))

    def make_smaller(self, num_rows: int, width: int) -> Table:
        """Make an untrained table."""
        return Compositional(num_rows, width, bases=self._bases(num_rows), operation=self.operation)

    def _bases(self, num_rows: int) -> list[int]:
        """Return the bases of all digits except the last, which has the rest.

        m remainders and n / m quotients are n / times rows in all: the larger root m of a square.
        """
        wanted = num_rows / self.times
        if self.operation == "concatenation":
            wanted *= self.parts  # because each row is narrower
        root = wanted * wanted - 4 * num_rows
        if self.parts == 2 and root > 0:
            return [math.ceil((wanted + math.sqrt(root)) / 2)]
        return [max(2, math.ceil(num_rows ** (1 / self.parts)))] * (self.parts - 1)


class SharedRows(Table):
    """Rows that are computed from shared weights."""

    def __init__(self, num_rows: int, width: int) -> None:
        super().__init__()
        self.width, self._num_rows = width, num_rows
        self.register_load_state_dict_post_hook(_refuse_damage)  # type: ignore[no-untyped-call]

    @property
    def num_rows(self) -> int:
        return self._num_rows

    @abstractmethod
    def rows(self, row_N: Int64[Tensor, " N"]) -> Float[Tensor, "N D"]:
        """Return rows; -1 gives 0."""

    def damage(self) -> str:
        """Return the fault of weights that were read from a file; "" if there is none."""
        return ""

    def forward(self, row_X: Int64[Tensor, "*X"]) -> Float[Tensor, "*X D"]:
        row_N = row_X.flatten()
        check_rows(row_N, self.num_rows)
        return self.rows(row_N).view(*row_X.shape, self.width)

    def block(self, first: int, last: int) -> Float[Tensor, "R D"]:
        check_block(first, last, self.num_rows)
        device = next(chain(self.parameters(), self.buffers())).device
        return self.rows(torch.arange(first, last, device=device))

    def zero_rows(self, untrained_R: Bool[Tensor, " R"]) -> None:
        """Do nothing, because an untrained row shares trained weights."""

    def grow(self, num_rows: int) -> None:
        check_growth(self.num_rows, num_rows)
        self._num_rows = num_rows


def _refuse_damage(table: SharedRows, _: Any) -> None:
    """Check weights that were read; torch calls this with the missing names.

    Raises:
        BundleError: They do not give valid rows.
    """
    if wrong := table.damage():
        kind = type(table).__name__
        raise BundleError(
            f"the weights of a table of kind {kind} are damaged: {wrong}: write the bundle again "
            "from the model",
            name=kind,
            value=wrong,
        )


class Filled(SharedRows):
    """Rows that can approximate a trained table."""

    @abstractmethod
    def fill(self, table: Table) -> None:
        """Take a trained table's rows.

        Raises:
            ConfigError: A row is not finite.
        """


@final
class Narrow(Filled):
    r"""Rows of a smaller width d and a projection: :math:`e_r = W z_r`."""

    def __init__(self, num_rows: int, width: int, *, inner: int) -> None:
        super().__init__(num_rows, width)
        self.inner = own_rows(num_rows, inner)
        self.projection = nn.Parameter(torch.empty(inner, width))
        self.draw(std=1.0)

    def rows(self, row_N: Int64[Tensor, " N"]) -> Float[Tensor, "N D"]:
        projected_ND: Tensor = self.inner(row_N) @ self.projection
        return projected_ND

    def draw(self, *, std: float) -> None:
        self.inner.draw(std=std)
        nn.init.normal_(self.projection, std=self.inner.width**-0.5)

    @torch.no_grad()
    def fill(self, table: Table) -> None:
        """Take a trained table's rows, projected on its principal directions."""
        self.projection.copy_(principal_directions(table, self.inner.width))
        for first, block_RD in finite_blocks(table):
            self.inner.weight[first : first + len(block_RD)] = block_RD @ self.projection.T

    def zero_rows(self, untrained_R: Bool[Tensor, " R"]) -> None:
        self.inner.zero_rows(untrained_R)

    def grow(self, num_rows: int) -> None:
        super().grow(num_rows)
        self.inner.grow(num_rows)


@final
class Hash(SharedRows):
    r"""Weighted sums of shared rows, chosen by K hash functions:

    .. math:: e_r = \sum_k p_{h_0(r), k} \, c_{h_k(r)}

    It has as many rows of weights p as of vectors c; new ids need no new rows.

    References:
        Svenstrup, Hansen and Winther, "Hash Embeddings for Efficient Word Representations",
        NeurIPS 2017, https://arxiv.org/abs/1709.03933. In the paper, each id may have its own
        weights, and weights may be concatenated to the vector.
    """

    def __init__(self, num_rows: int, width: int, *, shared: int, hashes: int) -> None:
        super().__init__(num_rows, width)
        self.hashes = hashes
        self.shared, self.importance = own_rows(shared, width), Dense(shared, hashes)
        self.draw(std=1.0)

    def rows(self, row_N: Int64[Tensor, " N"]) -> Float[Tensor, "N D"]:
        shared = self.shared.num_rows
        chosen = [hashed(row_N, salt, shared) for salt in range(1, 1 + self.hashes)]
        part_NKD = self.shared(torch.stack(chosen, dim=1))
        share_NK = self.importance(hashed(row_N, 0, shared))
        summed_ND: Tensor = (share_NK.unsqueeze(1) @ part_NKD).squeeze(1)
        return summed_ND

    @torch.no_grad()
    def draw(self, *, std: float) -> None:
        self.shared.draw(std=std)
        self.importance.weight.fill_(self.hashes**-0.5)


@final
class Compositional(SharedRows):
    """One row for each digit of the row's number, multiplied, added or concatenated.

    Concatenated rows are all different if those of each digit are; products and sums may coincide.

    References:
        Shi, Mudigere, Naumov and Yang, "Compositional Embeddings Using Complementary Partitions for
        Memory-Efficient Recommendation Systems", KDD 2020, https://arxiv.org/abs/1909.02107.
    """

    def __init__(self, num_rows: int, width: int, *, bases: Sequence[int], operation: str) -> None:
        super().__init__(num_rows, width)
        self.bases, self.operation = list(bases), operation
        digits = len(bases) + 1
        sides = operation == "concatenation"
        if sides and digits > width:
            raise ConfigError(
                f"table.parts = {digits} is more than the width {width}, so some parts of a "
                "row would be empty: set fewer, or another operation",
                name="table.parts",
                value=digits,
            )
        sizes = [*self.bases, self._left(num_rows)]
        widths = even(width, digits) if sides else [width] * digits
        self.digits = nn.ModuleList(map(own_rows, sizes, widths))
        self.draw(std=1.0)

    def _left(self, num_rows: int) -> int:
        return max(1, math.ceil(num_rows / math.prod(self.bases)))

    def rows(self, row_N: Int64[Tensor, " N"]) -> Float[Tensor, "N D"]:
        found, rest_N, none_N = [], row_N.clamp(min=0), row_N < 0
        for base, table in zip([*self.bases, 0], self.digits, strict=True):
            digit_N = rest_N % base if base else rest_N
            rest_N = rest_N // base if base else rest_N
            found.append(table(digit_N.masked_fill(none_N, -1)))
        if self.operation == "concatenation":
            return torch.cat(found, dim=1)
        stacked_MND = torch.stack(found)
        joined_ND: Tensor = (
            stacked_MND.prod(dim=0) if self.operation == "product" else stacked_MND.sum(dim=0)
        )
        return joined_ND

    def draw(self, *, std: float) -> None:
        num = len(self.digits)
        of_digit = {"product": std ** (1 / num), "sum": std / num**0.5, "concatenation": std}
        for table in self._tables():
            table.draw(std=of_digit[self.operation])

    def grow(self, num_rows: int) -> None:
        super().grow(num_rows)
        last = self._tables()[-1]
        last.grow(max(last.num_rows, self._left(num_rows)))

    def _tables(self) -> list[OwnRows]:
        return [table for table in self.digits if isinstance(table, OwnRows)]


def hashed(row_N: Int64[Tensor, " N"], salt: int, num: int) -> Int64[Tensor, " N"]:
    """Return a number in [0, num) for each row, by splitmix64; -1 for -1."""
    x_N = row_N + _wrapped(salt * 0x9E3779B97F4A7C15)
    x_N = (x_N ^ (x_N >> 30 & (1 << 34) - 1)) * _wrapped(0xBF58476D1CE4E5B9)
    x_N = (x_N ^ (x_N >> 27 & (1 << 37) - 1)) * _wrapped(0x94D049BB133111EB)
    x_N = x_N ^ (x_N >> 31 & (1 << 33) - 1)
    found_N: Tensor = ((x_N & _SIGNED) % num).masked_fill_(row_N < 0, -1)
    return found_N


def _wrapped(number: int) -> int:
    """Return an unsigned 64-bit number as torch's signed one."""
    return (number + 2**63) % 2**64 - 2**63


def finite_blocks(table: Table) -> list[tuple[int, Tensor]]:
    """Return a trained table's blocks.

    Raises:
        ConfigError: A number is NaN or infinite.
    """
    blocks = list(table.blocks())
    for first, block_RD in blocks:
        broken_R = ~block_RD.isfinite().all(dim=1)
        if broken_R.any():
            row = first + int(broken_R.nonzero()[0])
            raise ConfigError(
                f"row {row} of the table is NaN or infinite, so it cannot be compressed: the model "
                "is broken, train it again",
                name="row",
                value=row,
            )
    return blocks


@torch.no_grad()
def principal_directions(table: Table, num: int) -> Float[Tensor, "d D"]:
    """Return the orthonormal directions along which the (uncentred) rows are the longest."""
    square_DD = torch.zeros(table.width, table.width, dtype=torch.float64)
    for _, block_RD in finite_blocks(table):
        square_DD += (block_RD.T @ block_RD).double().cpu()
    direction_DD = torch.linalg.eigh(square_DD).eigenvectors  # the longest last
    longest_dD: Tensor = direction_DD.T.flip(0)[:num].float()
    return longest_dD

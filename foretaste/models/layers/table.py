"""Tables of learned rows, the only place where an id or a code becomes a vector.

A model requests rows, a block of rows, or the mean of bags of rows, independent of their storage.
Each side (users, items, the codes of features) has its own table, so that it can grow at its end.
Kinds other than the dense one are in `tables.py`, `tables_at_rest.py` and `table_kinds.py`.

Shape legend: R rows of a table, X any shape of requested rows, D width, P bags, N codes of bags, B
queries.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, final

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from foretaste.config import Config
from foretaste.errors import ConfigError, DataError
from foretaste.models.layers.codes import Codes

BLOCK_ROWS = 2**18
"""Number of rows in a block: 64 MiB at a width of 64."""


class Table(nn.Module, ABC):
    """Returns rows by number; row -1 is 0."""

    trains: bool = True
    width: int

    @property
    @abstractmethod
    def num_rows(self) -> int:
        """Number of rows."""

    @abstractmethod
    def forward(self, row_X: Int64[Tensor, "*X"]) -> Float[Tensor, "*X D"]:
        """Return rows; -1 gives 0, without a gradient."""

    @abstractmethod
    def block(self, first: int, last: int) -> Float[Tensor, "R D"]:
        """Return the rows in [first, last), with their gradient.

        Raises:
            DataError: The block is not within the table.
        """

    @abstractmethod
    def draw(self, *, std: float) -> None:
        """Draw all rows from a normal distribution around 0, with torch's global generator."""

    @abstractmethod
    def zero_rows(self, untrained_R: Bool[Tensor, " R"]) -> None:
        """Set rows that cannot be trained to 0."""

    @abstractmethod
    def grow(self, num_rows: int) -> None:
        """Append rows, drawn like the first ones; existing rows keep their numbers.

        Raises:
            DataError: The table already has more rows.
        """

    def take(self, others: Sequence["Table"]) -> None:
        """Take the concatenated columns of other tables as rows.

        Raises:
            ConfigError: Rows of this kind cannot be combined like this.
        """
        raise ConfigError(
            f"a table of {type(self).__name__} cannot start from those of other models: set "
            'model.table.kind to "dense", or pretrain to false',
            name="table",
            value=type(self).__name__,
        )

    def blocks(self) -> Iterator[tuple[int, Float[Tensor, "_ D"]]]:
        """Yield all rows without gradient, in blocks, each with the number of its first row."""
        for first in range(0, self.num_rows, BLOCK_ROWS):
            with torch.no_grad():
                rows_RD = self.block(first, min(first + BLOCK_ROWS, self.num_rows))
            yield first, rows_RD.detach()

    def codes(self) -> Codes | None:
        """Return the rows as codes, if the table stores codes."""
        return None

    def products(self, query_BD: Float[Tensor, "B D"]) -> Float[Tensor, "B R"]:
        """Return the product of each query with every row, without gradient."""
        blocks = [query_BD @ block_RD.float().T for _, block_RD in self.blocks()]
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=1)

    def mean_bags(
        self, code_N: Int64[Tensor, " N"], offsets_P: Int64[Tensor, " P"]
    ) -> Float[Tensor, "P D"]:
        """Return the mean of the rows of each bag; see the function of this name."""
        place_N = torch.arange(len(code_N), device=code_N.device)
        return mean_bags(place_N, offsets_P, self(code_N))


class OwnRows(Table):
    """A separate row for each number, in one tensor: all rows, or those of one process."""

    weight: nn.Parameter
    std: float
    """Standard deviation of the initial rows."""
    by_rows = False
    """Whether the gradient of a look-up is sparse, with only the rows that were read."""
    scale = 1.0
    """A factor of the rows: weight decay that is not yet applied to them."""

    @abstractmethod
    def cut(self, sizes: Sequence[int]) -> list["Table"]:
        """Cut the rows into tables of these sizes, in order."""


@final
class Dense(OwnRows):
    """All rows in one tensor."""

    def __init__(self, num_rows: int, width: int) -> None:
        super().__init__()
        self.width = width
        self.weight = nn.Parameter(torch.empty(num_rows, width))
        self.draw(std=1.0)

    @property
    def num_rows(self) -> int:
        return len(self.weight)

    def forward(self, row_X: Int64[Tensor, "*X"]) -> Float[Tensor, "*X D"]:
        looked_ND = look_up(row_X.flatten(), self.weight, scale=self.scale, by_rows=self.by_rows)
        return looked_ND.view(*row_X.shape, self.width)

    def block(self, first: int, last: int) -> Float[Tensor, "R D"]:
        check_block(first, last, self.num_rows)
        block_RD = self.weight[first:last]
        if self.scale == 1:
            return block_RD
        return block_RD.detach() * self.scale + (block_RD - block_RD.detach())  # same gradient

    @torch.no_grad()
    def draw(self, *, std: float) -> None:
        self.std = std
        self.weight.normal_(std=std)

    @torch.no_grad()
    def zero_rows(self, untrained_R: Bool[Tensor, " R"]) -> None:
        self.weight[untrained_R.to(self.weight.device)] = 0.0

    @torch.no_grad()
    def grow(self, num_rows: int) -> None:
        check_growth(self.num_rows, num_rows)
        more_RD = self.weight.new_empty(num_rows - self.num_rows, self.width).normal_(std=self.std)
        self.weight = nn.Parameter(
            torch.cat([self.weight, more_RD]), requires_grad=self.weight.requires_grad
        )

    @torch.no_grad()
    def take(self, others: Sequence[Table]) -> None:
        self.weight.copy_(torch.cat([other.block(0, self.num_rows) for other in others], dim=1))

    def mean_bags(
        self, code_N: Int64[Tensor, " N"], offsets_P: Int64[Tensor, " P"]
    ) -> Float[Tensor, "P D"]:
        return mean_bags(code_N, offsets_P, self.weight, scale=self.scale, by_rows=self.by_rows)

    @torch.no_grad()
    def cut(self, sizes: Sequence[int]) -> list[Table]:
        return [self.of_rows(part_RD.clone(), self.std) for part_RD in self.weight.split(sizes)]

    @classmethod
    def of_rows(cls, row_RD: Float[Tensor, "R D"], std: float) -> "Dense":
        """Return a table of these rows; later rows are drawn with `std`."""
        table = cls(0, row_RD.shape[1])
        table.std, table.weight = std, nn.Parameter(row_RD)
        return table


Place = Callable[[int, int], OwnRows]
"""Makes an untrained table from a number of rows and their width."""
_places: list[Place] = []


@contextmanager
def placed(place: Place) -> Iterator[None]:
    """Make tables with `place` in this context, such as tables of several processes."""
    _places.append(place)
    try:
        yield
    finally:
        _places.pop()


def own_rows(num_rows: int, width: int) -> OwnRows:
    """Make an untrained table of separate rows, placed as the context decides."""
    return _places[-1](num_rows, width) if _places else Dense(num_rows, width)


def check_growth(num_before: int, num_rows: int) -> None:
    """Raise an error if a table would shrink.

    Raises:
        DataError: The table already has more rows.
    """
    if num_rows < num_before:
        raise DataError(
            f"a table of {num_before:,} rows cannot grow to {num_rows:,}: a table only grows, so "
            "give at least all ids that the model was trained with",
            name="num_rows",
            value=num_rows,
        )


def check_block(first: int, last: int, num_rows: int) -> None:
    """Raise an error for a block that is not within the table.

    Raises:
        DataError: It begins before row 0, ends beyond the table, or before it begins.
    """
    if not 0 <= first <= last <= num_rows:
        raise DataError(
            f"rows {first} to {last} were asked of a table of {num_rows:,} rows: ask for a block "
            "within it",
            name="row",
            value=last if last > num_rows else first,
        )


def check_rows(row_N: Int64[Tensor, " N"], num_rows: int) -> bool:
    """Return whether a row is -1.

    Raises:
        DataError: A row is beyond the table.
    """
    if not row_N.numel() or row_N.is_meta:
        return False
    lowest, highest = (int(value) for value in row_N.aminmax())
    if highest >= num_rows or lowest < -1:
        wrong = highest if highest >= num_rows else lowest
        raise DataError(
            f"row {wrong} was asked of a table of {num_rows:,} rows, which has 0 to {num_rows - 1} "
            "and -1 for none: ask in the rows of the events that the model was trained on",
            name="row",
            value=wrong,
        )
    return lowest < 0


def look_up(
    row_N: Int64[Tensor, " N"],
    weight_RD: Float[Tensor, "R D"],
    *,
    scale: float = 1.0,
    by_rows: bool = False,
) -> Float[Tensor, "N D"]:
    """Return rows like `F.embedding`, with a faster gradient; row -1 is 0 and gets no gradient.

    torch's own gradient takes two to eight times as long on a CPU.

    Args:
        row_N: The rows.
        weight_RD: The table.
        scale: Factor of the rows; the gradient is that of the product.
        by_rows: Whether the gradient is sparse, with only the rows that were read.
    """
    looked_ND: Tensor = _LookUp.apply(row_N, weight_RD, scale, by_rows)  # type: ignore[no-untyped-call]  # torch
    return looked_ND


def mean_bags(
    code_N: Int64[Tensor, " N"],
    offsets_P: Int64[Tensor, " P"],
    weight_RD: Float[Tensor, "R D"],
    *,
    scale: float = 1.0,
    by_rows: bool = False,
) -> Float[Tensor, "P D"]:
    """Return the mean of the rows of each bag like `F.embedding_bag`, with a faster gradient.

    The gradient of a row is a sum over its positions, so it is a sum over bags again: codes in
    ascending order, one bag per code. torch's own takes ten times as long on a CPU.

    Args:
        code_N: Rows of `weight_RD`, bag by bag.
        offsets_P: Start of each bag in `code_N`; it ends at the next start.
        weight_RD: The table.
        scale: Factor of the rows; the gradient is that of the product.
        by_rows: Whether the gradient is sparse, with only the rows that were read.
    """
    length_P = torch.diff(offsets_P, append=offsets_P.new_full((1,), len(code_N)))
    share_N = length_P.to(weight_RD.dtype).reciprocal().repeat_interleave(length_P)
    looked_PD: Tensor = _SumBags.apply(  # type: ignore[no-untyped-call]  # torch leaves it untyped
        code_N, offsets_P, length_P, share_N, weight_RD, scale, by_rows
    )
    return looked_PD


def sum_by_row(
    row_N: Tensor,
    grad_XD: Tensor,
    *,
    num_rows: int,
    by_rows: bool,
    of_N: Tensor | None = None,
    share_N: Tensor | None = None,
) -> Tensor:
    """Return the gradient of a table from that of its rows: dense, or sparse and coalesced.

    Args:
        row_N: The rows; -1 gets no gradient.
        grad_XD: Gradients.
        num_rows: Number of rows of the table.
        by_rows: Whether the result is sparse.
        of_N: The gradient of each row; None: gradients are in the order of the rows.
        share_N: Weight of each; None: 1.
    """
    ordered_N, order_N = row_N.int().sort(stable=True)  # int32 sorts in half of the time
    num_none = int((ordered_N < 0).sum())
    ordered_N, order_N = ordered_N[num_none:], order_N[num_none:]
    shape = (num_rows, grad_XD.shape[1])
    if not len(ordered_N) and not by_rows:
        return grad_XD.new_zeros(shape)
    if by_rows:
        row_R, times_R = ordered_N.unique_consecutive(return_counts=True)
    else:
        row_R, times_R = None, ordered_N.bincount(minlength=num_rows)
    grad_RD = F.embedding_bag(
        order_N if of_N is None else of_N[order_N],
        grad_XD.contiguous(),
        times_R.cumsum(0) - times_R,
        mode="sum",
        per_sample_weights=None if share_N is None else share_N[order_N],
    )
    if row_R is None:
        return grad_RD
    return torch.sparse_coo_tensor(
        row_R.long().unsqueeze(0), grad_RD, shape, is_coalesced=True, check_invariants=False
    )


class _LookUp(torch.autograd.Function):
    """The look-up of some rows of a table."""

    @staticmethod
    def forward(
        context: Any,  # torch's own, without a public type
        row_N: Tensor,
        weight_RD: Tensor,
        scale: float,
        by_rows: bool,  # noqa: FBT001  # torch hands no names on
    ) -> Tensor:
        context.save_for_backward(row_N)
        context.num_rows, context.by_rows = len(weight_RD), by_rows
        if check_rows(row_N, len(weight_RD)):
            if not len(weight_RD):
                return weight_RD.new_zeros(len(row_N), weight_RD.shape[1])
            looked_ND = weight_RD.index_select(0, row_N.clamp(min=0))
            looked_ND.masked_fill_((row_N < 0).unsqueeze(1), 0.0)
        else:
            looked_ND = weight_RD.index_select(0, row_N)
        return looked_ND if scale == 1 else looked_ND.mul_(scale)

    @staticmethod
    def backward(context: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (row_N,) = context.saved_tensors
        grad_RD = sum_by_row(
            row_N, grad_outputs[0], num_rows=context.num_rows, by_rows=context.by_rows
        )
        return None, grad_RD, None, None


class _SumBags(torch.autograd.Function):
    """The weighted sum of each bag's rows."""

    @staticmethod
    def forward(
        context: Any,  # torch's own, without a public type
        code_N: Tensor,
        offsets_P: Tensor,
        length_P: Tensor,
        share_N: Tensor,
        weight_RD: Tensor,
        scale: float,
        by_rows: bool,  # noqa: FBT001  # torch hands no names on
    ) -> Tensor:
        context.save_for_backward(code_N, length_P, share_N)
        context.num_rows, context.by_rows = len(weight_RD), by_rows
        sum_PD = F.embedding_bag(
            code_N, weight_RD, offsets_P, mode="sum", per_sample_weights=share_N
        )
        return sum_PD if scale == 1 else sum_PD.mul_(scale)

    @staticmethod
    def backward(context: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        code_N, length_P, share_N = context.saved_tensors
        bag_N = torch.arange(len(length_P), device=code_N.device).repeat_interleave(length_P)
        grad_RD = sum_by_row(
            code_N,
            grad_outputs[0],
            num_rows=context.num_rows,
            by_rows=context.by_rows,
            of_N=bag_N,
            share_N=share_N,
        )
        return None, None, None, None, grad_RD, None, None


Links = tuple[Int64[Tensor, " N"], Int64[Tensor, " N"]]
"""Pairs of a row and one of its links: the other side of an event, or a feature's code."""


FindLinks = Callable[[str], Links | None]
"""Maps "neighbours" or "features" to the links of a table; None: it has no such links."""


def no_links(_: str) -> None:
    """Return no links, because rows have nothing in common."""
    return


class TableKind(Config):
    """Settings of every kind of table."""

    @property
    def trains(self) -> bool:
        """Whether its tables can be trained."""
        return True

    @property
    def shares(self) -> bool:
        """Whether rows share weights. The l2 of all rows of a step adds up in these weights, while
        their other gradients cancel, so it would pull them to 0.
        """
        return False

    @abstractmethod
    def make(self, num_rows: int, width: int) -> Table:
        """Make an untrained table."""

    def compressed(self, table: Table, links: FindLinks = no_links) -> Table:
        """Return a trained table, converted to this kind.

        Args:
            table: The trained one.
            links: The links of its rows.

        Raises:
            ConfigError: This kind must be trained as such.
        """
        kind = str(getattr(self, "kind", ""))
        raise ConfigError(
            f"a table of kind {kind!r} has to be trained as one: set model.table.kind = {kind!r} "
            "in a recipe, or compress to half, int8, int4, pruned or quantised",
            name="table.kind",
            value=kind,
        )

    @classmethod
    def tried(cls, width: int) -> Sequence["TableKind"]:
        """Return the settings that `compress` tries for trained tables of a width."""
        return ()

    @classmethod
    def retrained(cls, times: float, width: int) -> Sequence["TableKind"]:
        """Return the settings that `compress` retrains, for about `times` fewer bytes."""
        return ()

    @classmethod
    def anchor(cls, times: float, width: int) -> "TableKind | None":
        """Return settings of about `times` fewer bytes, if this kind is a reference for others."""
        return None

    def make_several(self, sizes: Sequence[int], width: int, *, std: float) -> list[Table]:
        """Make tables of one width with one standard deviation."""
        tables = [self.make(num_rows, width) for num_rows in sizes]
        for table in tables:
            table.draw(std=std)
        return tables


class DenseConfig(TableKind):
    """Settings of a table with a separate row for each id."""

    kind: Literal["dense"] = "dense"
    """"dense": a separate row for each id."""

    def make(self, num_rows: int, width: int) -> Table:
        """Make an untrained table."""
        return own_rows(num_rows, width)

    def make_several(self, sizes: Sequence[int], width: int, *, std: float) -> list[Table]:
        """Make tables whose rows are drawn as one table and cut at `sizes`."""
        whole = own_rows(sum(sizes), width)
        whole.draw(std=std)
        return whole.cut(sizes)

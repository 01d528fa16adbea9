"""Tables of learned rows, the only place where an id or a code becomes a vector.

A model asks a table for rows, for a block of them, or for the mean of bags of them, and never sees
how they are kept. A side has a table of its own (users, items, the codes of features), so that it
can grow at its end.

Shape legend: R rows of a table, X any shape of rows asked for, D width, P bags, N codes of them.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, Literal, final

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from foretaste.config import Config
from foretaste.errors import ConfigError, DataError

BLOCK_ROWS = 2**18
"""Rows of a block: 64 MiB at a width of 64."""


class TableConfig(Config):
    """Settings of how the vectors of ids and of features' codes are kept."""

    kind: Literal["dense"] = "dense"
    """"dense": a row of its own for each."""


class IdConfig(Config):
    """Settings of a model that has a vector for each id."""

    table: TableConfig = TableConfig()
    """How the vectors of ids and of features' codes are kept."""


class Table(nn.Module, ABC):
    """Rows by number; row -1 is 0."""

    width: int

    @property
    @abstractmethod
    def num_rows(self) -> int:
        """How many rows there are."""

    @abstractmethod
    def forward(self, row_X: Int64[Tensor, "*X"]) -> Float[Tensor, "*X D"]:
        """Return rows; -1 gives 0, without a gradient."""

    @abstractmethod
    def block(self, first: int, last: int) -> Float[Tensor, "R D"]:
        """Return the rows in [first, last), with their gradient."""

    @abstractmethod
    def draw(self, *, std: float) -> None:
        """Draw all rows from a normal distribution around 0, by torch's global generator."""

    @abstractmethod
    def zero_rows(self, untrained_R: Bool[Tensor, " R"]) -> None:
        """Make those rows 0 that nothing can train."""

    @abstractmethod
    def grow(self, num_rows: int) -> None:
        """Append rows, drawn as the first ones were; those that are there keep their numbers.

        Raises:
            DataError: There are more rows already.
        """

    def take(self, others: Sequence["Table"]) -> None:
        """Become the rows of other tables, side by side.

        Raises:
            ConfigError: Rows of this kind cannot be put together so.
        """
        raise ConfigError(
            f"a table of {type(self).__name__} cannot start from those of other models: set "
            'model.table.kind to "dense", or pretrain to false',
            name="table",
            value=type(self).__name__,
        )

    def blocks(self) -> Iterator[tuple[int, Float[Tensor, "_ D"]]]:
        """Give all rows without gradient, in blocks, each with the number of its first row."""
        for first in range(0, self.num_rows, BLOCK_ROWS):
            with torch.no_grad():
                rows_RD = self.block(first, min(first + BLOCK_ROWS, self.num_rows))
            yield first, rows_RD.detach()

    def mean_bags(
        self, code_N: Int64[Tensor, " N"], offsets_P: Int64[Tensor, " P"]
    ) -> Float[Tensor, "P D"]:
        """Return the mean of the rows of each bag; see the function of this name."""
        place_N = torch.arange(len(code_N), device=code_N.device)
        return mean_bags(place_N, offsets_P, self(code_N))


@final
class Dense(Table):
    """A row of its own for each, in one tensor."""

    def __init__(self, num_rows: int, width: int) -> None:
        super().__init__()
        self.width, self.std = width, 1.0
        self.weight = nn.Parameter(torch.empty(num_rows, width))
        self.draw(std=1.0)

    @property
    def num_rows(self) -> int:
        return len(self.weight)

    def forward(self, row_X: Int64[Tensor, "*X"]) -> Float[Tensor, "*X D"]:
        looked_ND = look_up(row_X.flatten(), self.weight)
        return looked_ND.view(*row_X.shape, self.width)

    def block(self, first: int, last: int) -> Float[Tensor, "R D"]:
        return self.weight[first:last]

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
        return mean_bags(code_N, offsets_P, self.weight)


def make_table(config: TableConfig, num_rows: int, width: int) -> Table:
    """Make an untrained table; its rows are drawn around 0 with a standard deviation of 1."""
    match config.kind:
        case "dense":
            return Dense(num_rows, width)


@torch.no_grad()
def make_tables(
    config: TableConfig, sizes: Sequence[int], width: int, *, std: float
) -> list[Table]:
    """Make tables of one width whose rows are drawn as those of one table, cut at `sizes`."""
    if config.kind != "dense":
        made = [make_table(config, num_rows, width) for num_rows in sizes]
        for table in made:
            table.draw(std=std)
        return made
    whole = Dense(sum(sizes), width)
    whole.draw(std=std)
    tables: list[Table] = []
    for part_RD in whole.weight.detach().split(list(sizes)):
        part = Dense(0, width)
        part.std, part.weight = std, nn.Parameter(part_RD.clone())
        tables.append(part)
    return tables


def check_growth(num_before: int, num_rows: int) -> None:
    """Refuse to shrink.

    Raises:
        DataError: There are more rows already.
    """
    if num_rows < num_before:
        raise DataError(
            f"a table of {num_before:,} rows cannot grow to {num_rows:,}: a table only grows, so "
            "give at least all ids that the model was trained with",
            name="num_rows",
            value=num_rows,
        )


def check_rows(row_N: Int64[Tensor, " N"], num_rows: int) -> bool:
    """Return whether a row is -1.

    Raises:
        DataError: A row is beyond the table.
    """
    if not row_N.numel():
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


def look_up(row_N: Int64[Tensor, " N"], weight_RD: Float[Tensor, "R D"]) -> Float[Tensor, "N D"]:
    """Return rows, as `F.embedding` does, with a fast gradient; row -1 is 0 and gets none.

    torch's own gradient takes two to eight times as long on a CPU.
    """
    looked_ND: Tensor = _LookUp.apply(row_N, weight_RD)  # type: ignore[no-untyped-call]  # torch
    return looked_ND


def mean_bags(
    code_N: Int64[Tensor, " N"],
    offsets_P: Int64[Tensor, " P"],
    weight_RD: Float[Tensor, "R D"],
) -> Float[Tensor, "P D"]:
    """Return the mean of the rows of each bag, as `F.embedding_bag` does, with a fast gradient.

    The gradient of a row is a sum over the places where it stands, so it is a sum over bags again:
    codes in ascending order, one bag a code. torch's own takes ten times as long on a CPU.

    Args:
        code_N: Rows of `weight_RD`, bag by bag.
        offsets_P: Where each bag starts in `code_N`; it ends where the next one starts.
        weight_RD: The table.
    """
    length_P = torch.diff(offsets_P, append=offsets_P.new_full((1,), len(code_N)))
    share_N = length_P.to(weight_RD.dtype).reciprocal().repeat_interleave(length_P)
    looked_PD: Tensor = _SumBags.apply(  # type: ignore[no-untyped-call]  # torch leaves it untyped
        code_N, offsets_P, length_P, share_N, weight_RD
    )
    return looked_PD


def _by_code(code_N: Tensor, num_codes: int) -> tuple[Int64[Tensor, " N"], Int64[Tensor, " R"]]:
    """Return the places of codes in ascending order, and where each code begins among them."""
    times_R = code_N.bincount(minlength=num_codes)
    order_N = code_N.int().sort(stable=True).indices  # int32 sorts in half of the time
    return order_N, times_R.cumsum(0) - times_R


class _LookUp(torch.autograd.Function):
    """Some rows of a table."""

    @staticmethod
    def forward(
        context: Any,  # torch's own, without a public type
        row_N: Tensor,
        weight_RD: Tensor,
    ) -> Tensor:
        context.save_for_backward(row_N)
        context.num_rows = len(weight_RD)
        context.has_none = check_rows(row_N, len(weight_RD))
        if not context.has_none:
            return weight_RD.index_select(0, row_N)
        if not len(weight_RD):
            return weight_RD.new_zeros(len(row_N), weight_RD.shape[1])
        looked_ND = weight_RD.index_select(0, row_N.clamp(min=0))
        return looked_ND.masked_fill_((row_N < 0).unsqueeze(1), 0.0)

    @staticmethod
    def backward(context: Any, *grad_outputs: Tensor) -> tuple[None, Tensor]:
        (row_N,) = context.saved_tensors
        shift = int(context.has_none)  # -1 sorts first, and is cut off
        order_N, start_R = _by_code(row_N + shift, context.num_rows + shift)
        grad_ND = grad_outputs[0].contiguous()
        return None, F.embedding_bag(order_N, grad_ND, start_R, mode="sum")[shift:]


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
    ) -> Tensor:
        context.save_for_backward(code_N, length_P, share_N)
        context.num_codes = len(weight_RD)
        return F.embedding_bag(code_N, weight_RD, offsets_P, mode="sum", per_sample_weights=share_N)

    @staticmethod
    def backward(context: Any, *grad_outputs: Tensor) -> tuple[None, None, None, None, Tensor]:
        code_N, length_P, share_N = context.saved_tensors
        bag_N = torch.arange(len(length_P), device=code_N.device).repeat_interleave(length_P)
        order_N, start_R = _by_code(code_N, context.num_codes)
        grad_RD = F.embedding_bag(
            bag_N[order_N],
            grad_outputs[0].contiguous(),
            start_R,
            mode="sum",
            per_sample_weights=share_N[order_N],
        )
        return None, None, None, None, grad_RD

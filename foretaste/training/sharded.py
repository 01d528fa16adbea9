"""Sharded tables: each process holds a range of the rows.

A look-up requests rows from the processes that own them, and gradients are sent back to the owners,
which update the rows and hold their optimizer state. All processes make their look-ups at the same
points of a step, each for its own rows. For answers, such as in validation, each process writes its
rows into one file, which all of them map into memory: no process holds a complete table.

Shape legend: R rows of a table, X any shape of requested rows, N requested rows, U distinct rows, A
rows that other processes request from this one, D width.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import chain
from pathlib import Path
from typing import Any, final

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn, optim

from foretaste.data.draws import WHOLE, Share
from foretaste.errors import ConfigError
from foretaste.models.layers.table import (
    BLOCK_ROWS,
    Dense,
    OwnRows,
    Table,
    check_block,
    check_rows,
    own_rows,
    placed,
    sum_by_row,
)
from foretaste.training import processes
from foretaste.training.checkpoint import save_together
from foretaste.training.settings import ROW_STATES


def sharding(rows_from: int) -> AbstractContextManager[None]:
    """Shard the tables that are created in this context, if there are several processes.

    Args:
        rows_from: Tables of fewer rows are not sharded; every process holds them completely.
    """
    if processes.share() == WHOLE:
        return nullcontext()

    def place(num_rows: int, width: int) -> OwnRows:
        return (Sharded if num_rows >= rows_from else Dense)(num_rows, width)

    return placed(place)


def tables_of(model: nn.Module) -> list["Sharded"]:
    """Return the sharded tables of a model."""
    return [table for table in model.modules() if isinstance(table, Sharded)]


def own_rows_of(model: nn.Module, optimizer: optim.Optimizer) -> dict[str, range]:
    """Return the range of rows held here of each sharded tensor, by its checkpoint name."""
    weights = list(chain(*(group["params"] for group in optimizer.param_groups)))
    own = dict[str, range]()
    for name, table in model.named_modules(remove_duplicate=False):
        if isinstance(table, Sharded):
            (place,) = (place for place, weight in enumerate(weights) if weight is table.weight)
            names = f"{name}.weight", *(f"{place}.{state}" for state in ROW_STATES)
            own |= dict.fromkeys(names, table.own)
    return own


@final
class Sharded(OwnRows):
    """A sharded table: the rows of this process, and look-ups in those of the other processes."""

    def __init__(self, num_rows: int, width: int) -> None:
        super().__init__()
        self.width, self._num_rows = width, num_rows
        self.look_up_by: Callable[[Tensor], Tensor] | None = None
        """Another engine's look-up, for training; None: our own."""
        own = self.own
        self.weight = nn.Parameter(torch.empty(len(own), width))
        self.draw(std=1.0)

    @property
    def num_rows(self) -> int:
        return self._num_rows

    @property
    def own(self) -> range:
        """The rows that this process holds."""
        return rows_of(self.num_rows, processes.share())

    def forward(self, row_X: Int64[Tensor, "*X"]) -> Float[Tensor, "*X D"]:
        row_N = row_X.flatten()
        if row_N.is_meta:
            return self.weight.new_empty(*row_X.shape, self.width)
        check_rows(row_N, self.num_rows)
        if self.look_up_by is not None and torch.is_grad_enabled():
            return self.look_up_by(row_N).view(*row_X.shape, self.width)
        looked_ND: Tensor = _LookUp.apply(row_N, self.weight, self)  # type: ignore[no-untyped-call]
        return looked_ND.view(*row_X.shape, self.width)

    def block(self, first: int, last: int) -> Float[Tensor, "R D"]:
        check_block(first, last, self.num_rows)
        block_RD: Tensor = self(torch.arange(first, last, device=self.weight.device))
        return block_RD

    @torch.no_grad()
    def draw(self, *, std: float) -> None:
        """Draw all rows as a single process would, block by block, and keep this process's rows."""
        self.std, own = std, self.own
        for first, last in _draws(self.num_rows):
            block_RD = self.weight.new_empty(last - first, self.width).normal_(std=std)
            begin, end = max(first, own.start), min(last, own.stop)
            if begin < end:
                kept_RD = block_RD[begin - first : end - first]
                self.weight[begin - own.start : end - own.start] = kept_RD

    @torch.no_grad()
    def zero_rows(self, untrained_R: Bool[Tensor, " R"]) -> None:
        self.weight[untrained_R[self.own.start : self.own.stop].to(self.weight.device)] = 0.0

    def grow(self, num_rows: int) -> None:
        raise ConfigError(
            f"a table of {self.num_rows:,} rows that several processes share cannot grow: train "
            "in one process, or leave out training.sharded_from",
            name="training.sharded_from",
        )

    @torch.no_grad()
    def cut(self, sizes: Sequence[int]) -> list[Table]:
        tables: list[Table] = []
        state, first = torch.get_rng_state(), 0
        for size in sizes:
            table = own_rows(size, self.width)
            own = table.own if isinstance(table, Sharded) else range(size)
            table.weight.copy_(self.block(first + own.start, first + own.stop))
            table.std, first = self.std, first + size
            tables.append(table)
        torch.set_rng_state(state)  # all rows are drawn already
        return tables

    @torch.no_grad()
    def take(self, others: Sequence[Table]) -> None:
        own = self.own
        self.weight.copy_(torch.cat([other.block(own.start, own.stop) for other in others], dim=1))


def rows_of(num_rows: int, share: Share) -> range:
    """Return the range of rows that a process holds; all but the last hold equally many."""
    each = -(-num_rows // share.world)
    return range(min(num_rows, share.rank * each), min(num_rows, (share.rank + 1) * each))


def _draws(num_rows: int) -> Iterator[tuple[int, int]]:
    """Return blocks whose successive draws equal one draw of the whole table.

    torch draws normal numbers in groups of 16, so every block but the last must end at a multiple
    of 16, and the last must have at least 16 numbers.
    """
    starts = list(range(0, max(1, num_rows - BLOCK_ROWS + 1), BLOCK_ROWS))
    return zip(starts, [*starts[1:], num_rows], strict=True)


@final
class _LookUp(torch.autograd.Function):
    """Fetches rows from their owners, which sum the gradients of their rows."""

    @staticmethod
    def forward(
        context: Any,  # torch's own, without a public type
        row_N: Tensor,
        weight_RD: Tensor,
        table: Sharded,
    ) -> Tensor:
        ordered_N, order_N = row_N.int().sort(stable=True)  # int32 sorts in half the time
        num_none = int((ordered_N < 0).sum())
        order_N = order_N[num_none:]
        row_U, times_U = ordered_N[num_none:].unique_consecutive(return_counts=True)
        world = processes.share().world
        ends = [rows_of(table.num_rows, Share(rank, world)).stop for rank in range(world)]
        end_U = torch.searchsorted(row_U, torch.tensor(ends, dtype=row_U.dtype).to(row_U.device))
        sizes = end_U.diff(prepend=end_U.new_zeros(1)).tolist()
        row_A, sizes_A = processes.exchanged(row_U, sizes)
        own_A = row_A.long() - table.own.start
        own_AD = weight_RD.index_select(0, own_A)
        if table.scale != 1:
            own_AD.mul_(table.scale)
        row_UD, _ = processes.exchanged(own_AD, sizes_A, incoming=sizes)
        place_U = torch.arange(len(row_U), device=row_N.device)
        place_N = torch.full_like(row_N, len(row_U))
        place_N[order_N] = place_U.repeat_interleave(times_U)
        if num_none:
            row_UD = torch.cat([row_UD, row_UD.new_zeros(1, table.width)])
        context.save_for_backward(order_N, times_U, own_A)
        context.sizes, context.sizes_A = sizes, sizes_A
        context.num_rows, context.by_rows = len(weight_RD), table.by_rows
        return row_UD.index_select(0, place_N)

    @staticmethod
    def backward(context: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        order_N, times_U, own_A = context.saved_tensors
        grad_UD = F.embedding_bag(
            order_N, grad_outputs[0].contiguous(), times_U.cumsum(0) - times_U, mode="sum"
        )
        grad_AD, _ = processes.exchanged(grad_UD, context.sizes, incoming=context.sizes_A)
        grad_RD = sum_by_row(own_A, grad_AD, num_rows=context.num_rows, by_rows=context.by_rows)
        return None, grad_RD, None


@contextmanager
def mapped(model: nn.Module, file: Path | None) -> Iterator[None]:
    """Read a model's sharded tables from a file in this context, and delete the file after it."""
    replaced = map_tables(model, file)
    try:
        yield
    finally:
        for module, name, table in replaced:
            setattr(module, name, table)
    if replaced and file is not None:
        processes.wait()
        if processes.is_first():
            file.unlink()


def map_tables(model: nn.Module, file: Path | None) -> list[tuple[nn.Module, str, Sharded]]:
    """Write a model's sharded tables into one file, from which each process then reads all rows.

    Args:
        model: Its tables are replaced by complete ones, mapped from the file.
        file: In a folder that all processes see.

    Returns:
        For each sharded table its module, its name there, and the table.

    Raises:
        ConfigError: There is no folder.
    """
    places = [
        (module, name, part)
        for module in model.modules()
        for name, part in module.named_children()
        if isinstance(part, Sharded)
    ]
    if not places:
        return places
    if file is None:
        raise ConfigError(
            "training.sharded_from needs a folder that all processes see, where they write their "
            "rows of a table together: give one (folder)",
            name="folder",
        )
    names = {table: str(number) for number, table in enumerate(tables_of(model))}
    rows = {name: (table.num_rows, table.own, table.weight) for table, name in names.items()}
    whole = save_together(file, rows)
    made = {table: Dense.of_rows(whole[name], table.std) for table, name in names.items()}
    for module, name, table in places:
        setattr(module, name, made[table].to(table.weight.device))
    return places

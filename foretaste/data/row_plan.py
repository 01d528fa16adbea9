"""An epoch of labelled rows, in random order and in batches, with items drawn beside each row.

Shape legend: E rows, B rows of a batch, N drawn items a row, C = 1 + N items.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from foretaste.data.batch import (
    WHOLE,
    DrawItems,
    Reads,
    RowBatch,
    Share,
    check_drawn,
    mixed,
    torch_generator,
)
from foretaste.data.offered import Offered
from foretaste.data.rows import Rows
from foretaste.errors import ConfigError


@dataclass(frozen=True, eq=False, kw_only=True)
class RowPlan:
    """One epoch's batches, decided by (seed, epoch) alone and made one by one when asked for."""

    rows: Rows
    order_E: Int64[np.ndarray, " E"]
    """Rows in the order of the epoch."""
    batch_events: int
    reads: Reads
    max_len: int
    seed: int
    """Decides which other events are read, and which items are drawn."""
    num_drawn: int = 0
    draw: DrawItems | None = None
    offered: Offered | None = None
    """What a retriever offered for each row; None: `draw` draws."""
    share: Share = WHOLE

    def __len__(self) -> int:
        return -(-len(self.order_E) // self.batch_events)

    @property
    def num_events(self) -> int:
        """Rows in the epoch, of all processes together."""
        return len(self.order_E)

    def batch(self, index: int) -> RowBatch:
        """Gather one batch, or this process's share of it; items are drawn for all of it."""
        row_B = self.order_E[index * self.batch_events : (index + 1) * self.batch_events]
        drawn_BN = torch.empty(len(row_B), 0, dtype=torch.int64)
        first_BC: Tensor | None = None
        if self.offered is not None:
            drawn_BN, first_BC = self.offered.draw(
                torch.from_numpy(row_B),
                self.rows.item_E[row_B],
                self.num_drawn,
                generator=torch_generator(self.seed, index),
            )
        elif self.draw is not None and self.num_drawn:
            check_drawn(len(row_B), self.num_drawn)
            drawn_BN = self.draw(
                torch.from_numpy(self.rows.user_E[row_B]),
                self.rows.item_E[row_B],
                self.num_drawn,
                generator=torch_generator(self.seed, index),
            )
        batch = self.rows.batch(
            row_B,
            reads=self.reads,
            max_len=self.max_len,
            seed=mixed(self.seed, index),
            drawn_BN=drawn_BN,
            share=(share := self.share.of(len(row_B))),
        )
        return batch if first_BC is None else replace(batch, first_BC=first_BC[share])


def plan_rows(
    rows: Rows,
    *,
    batch_events: int,
    generator: np.random.Generator,
    reads: Reads = "before",
    max_len: int = 50,
    num_drawn: int = 0,
    draw: DrawItems | None = None,
    offered: Offered | None = None,
    share: Share = WHOLE,
) -> RowPlan:
    """Put rows into batches, in random order.

    Args:
        rows: Those of training.
        batch_events: Rows of a batch; the last one of an epoch may be smaller.
        generator: Decides the order.
        reads: What of each user's history is read along.
        max_len: How many events of it at most.
        num_drawn: Items drawn for each row: a 0 for every binary task, without a label for others.
        draw: Who draws them.
        offered: What a retriever offered for each row, drawn from in its place; rows that it
            offered nothing are left out.
        share: What of each batch this process reads.

    Raises:
        ConfigError: Items are to be drawn and nobody draws them.
    """
    if num_drawn and draw is None and offered is None:
        raise ConfigError(
            f"{num_drawn} items are to be drawn for each row: say who draws them", name="draw"
        )
    return RowPlan(
        rows=rows,
        order_E=generator.permutation(len(rows) if offered is None else offered.asked.numpy()),
        batch_events=batch_events,
        reads=reads,
        max_len=max_len,
        seed=int(generator.integers(2**31)),
        num_drawn=num_drawn,
        draw=draw,
        offered=offered,
        share=share,
    )

"""Whoever draws items to be compared with observed ones: samplers, walks, an index, a retriever.

Shape legend: B rows, N items drawn for each.
"""

from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Int64
from torch import Tensor

from foretaste.data.memory import check_fits


def check_drawn(num_rows: int, num: int) -> None:
    """Refuse to draw more items than fit in memory.

    Raises:
        TooLargeError: They do not.
    """
    check_fits(
        num_rows * num * 32,
        f"{num:,} items drawn for each of {num_rows:,} rows",
        "lower objective.negatives or training.batch_events",
        name="negatives",
        value=num,
    )


@runtime_checkable
class DrawItems(Protocol):
    """Draws items that a row's user has not done, easy or hard ones."""

    def __call__(
        self,
        user_B: Int64[Tensor, " B"],
        positive_B: Int64[Tensor, " B"],
        num: int,
        *,
        generator: torch.Generator,
    ) -> Int64[Tensor, "B N"]:
        """Draw.

        Args:
            user_B: user_idx of each row.
            positive_B: The item_idx that was observed.
            num: N, draws for each row, with replacement.
            generator: Source of all randomness.

        Returns:
            item_idx; the row's own where nothing was found: it is hidden, and gets no label.
        """
        ...

r"""Popular items more often: :math:`P(j) \propto n_j^\alpha`, n the number of events of item j.

Drawn from an alias table (Walker, "An Efficient Method for Generating Discrete Random
Variables", TOMS 1977): each of I equal cells is split between two items, so that one number
picks the cell and, by its fraction, the item. O(1) a draw. The table is filled by a sweep
written as prefix sums (Hübschle-Schneider and Sanders, "Parallel Weighted Random Sampling",
TOMS 2022), without a loop over items.

Shape legend: I items, R draws.
"""

from typing import final

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from foretaste.errors import DataError

_BLOCK_DRAWS = 2**15
"""Drawn at a time: what a block needs stays in the processor's cache, which doubles the speed."""


@final
class PopularitySampler:
    """Draws an item with a chance that grows with its number of events; never one without."""

    def __init__(self, item_count_I: Int64[np.ndarray, " I"], *, alpha: float = 0.75) -> None:
        """Fill the table.

        Args:
            item_count_I: Training events of each item, 0 or more.
            alpha: Exponent of the count: 0 draws all known items alike, 1 by their events.

        Raises:
            DataError: No item has an event.
        """
        if not (item_count_I > 0).any():
            raise DataError(f"none of {len(item_count_I)} items has an event: nothing can be drawn")
        weight_I = np.power(
            item_count_I, alpha, where=item_count_I > 0, out=np.zeros(len(item_count_I))
        )
        probability_I = weight_I / weight_I.sum()
        share_I, alias_I = _alias_table(probability_I)
        self.probability_I: Float[Tensor, " I"] = torch.from_numpy(probability_I)
        self._share_I, self._alias_I = torch.from_numpy(share_I), torch.from_numpy(alias_I)

    def draw(self, shape: tuple[int, ...], *, generator: torch.Generator) -> Int64[Tensor, "..."]:
        """Return a tensor of `shape`, each entry an item_idx drawn on its own."""
        drawn = torch.empty(shape, dtype=torch.int64)
        for drawn_R in drawn.view(-1).split(_BLOCK_DRAWS):
            point_R = torch.rand(len(drawn_R), generator=generator, dtype=torch.float64)
            point_R *= len(self._share_I)
            cell_R = point_R.long()
            point_R -= cell_R
            own_R = point_R < self._share_I.index_select(0, cell_R)  # far faster than [cell_R]
            torch.where(own_R, cell_R, self._alias_I.index_select(0, cell_R), out=drawn_R)
        return drawn


def _alias_table(
    probability_I: Float64[np.ndarray, " I"],
) -> tuple[Float64[np.ndarray, " I"], Int64[np.ndarray, " I"]]:
    """Return which share of each cell is the cell's own item, and whose the rest is.

    Light items (less than a cell) hand the rest of their cell to the heavy ones in order. The
    heavy item that is used up gives the rest of its own cell to the next heavy one.
    """
    share_I, alias_I = probability_I * len(probability_I), np.arange(len(probability_I))
    is_heavy_I = share_I >= min(1.0, share_I.max())  # equal ones may all round to less than 1
    light, heavy = np.flatnonzero(~is_heavy_I), np.flatnonzero(is_heavy_I)
    room, excess = np.cumsum(1 - share_I[light]), np.cumsum(share_I[heavy] - 1)
    room_before = np.concatenate([[0.0], room])
    giver = np.searchsorted(excess, room_before[:-1], side="right").clip(max=len(heavy) - 1)
    alias_I[light] = heavy[giver]
    num_served = np.searchsorted(giver, np.arange(len(heavy)), side="right")
    share_I[heavy] = (1 + excess - room_before[num_served]).clip(0, 1)
    share_I[heavy[-1]] = 1
    alias_I[heavy[:-1]] = heavy[1:]
    return share_I, alias_I

"""Negatives that a user has certainly not done: draw, and draw again what was seen.

Shape legend: B rows, N negatives a row, E distinct (user, item) pairs, P pairs of a batch, I items.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from foretaste.data.distinct import distinct
from foretaste.data.interactions import Interactions
from foretaste.errors import DataError
from foretaste.sampling.sampler import Sampler

_ROUNDS = 8
_BLOCK_ROWS, _BLOCK_WEIGHTS = 64, 2**24
"""Rows, and weights of items for all of them, in memory at once."""
_MOST_FLAGS = 1 << 26


@dataclass(frozen=True, eq=False, kw_only=True)
class Seen:
    """Which items each user has done, to be asked in bulk."""

    num_items: int
    key_E: Int64[Tensor, " E"]
    """user_idx · num_items + item_idx, rising."""
    offsets_U1: Int64[Tensor, " U1"]
    """Where each user's keys begin and end."""

    @staticmethod
    def of(events: Interactions) -> "Seen":
        """Collect the distinct pairs of some events."""
        key_E = distinct(events.user_idx.astype(np.int64) * events.num_items + events.item_idx)
        bounds = np.arange(events.num_users + 1) * events.num_items
        return Seen(
            num_items=events.num_items,
            key_E=torch.from_numpy(key_E),
            offsets_U1=torch.from_numpy(np.searchsorted(key_E, bounds)),
        )

    def contains(
        self, user_B: Int64[Tensor, "*B"], item_B: Int64[Tensor, "*B"]
    ) -> Bool[Tensor, "*B"]:
        """Return whether each user has done the item beside it."""
        if len(self.key_E) == 0:
            return torch.zeros_like(item_B, dtype=torch.bool)
        key_B = user_B * self.num_items + item_B
        if self._flags is not None:
            return self._flags[key_B]
        place_B = torch.searchsorted(self.key_E, key_B).clamp_(max=len(self.key_E) - 1)
        return self.key_E[place_B] == key_B

    @cached_property
    def _flags(self) -> Bool[Tensor, " pairs"] | None:
        """A byte for each pair that can be: one look instead of a search; None where too many."""
        num_pairs = (len(self.offsets_U1) - 1) * self.num_items
        if num_pairs > _MOST_FLAGS:
            return None
        flags = torch.zeros(num_pairs, dtype=torch.bool)
        flags[self.key_E] = True
        return flags

    def items_of(
        self, user_B: Int64[Tensor, " B"]
    ) -> tuple[Int64[Tensor, " P"], Int64[Tensor, " P"]]:
        """Return all pairs of a row and an item that its user has done, row by row."""
        start_B, end_B = self.offsets_U1[user_B], self.offsets_U1[user_B + 1]
        length_B = end_B - start_B
        row_P = torch.repeat_interleave(length_B)
        first_B = length_B.cumsum(0) - length_B
        index_P = torch.arange(len(row_P)) + (start_B - first_B)[row_P]
        return row_P, self.key_E[index_P] - user_B[row_P] * self.num_items


def draw_unseen(
    sampler: Sampler,
    user_B: Int64[Tensor, " B"],
    num_negatives: int,
    *,
    seen: Seen,
    generator: torch.Generator,
) -> Int64[Tensor, "B N"]:
    """Draw for each row items that its user has not done, with the sampler's chances among them.

    A user who has done nearly everything is served by an exact draw over the whole catalogue,
    so the number of rounds is bounded.

    Args:
        sampler: Whose distribution is drawn from, less what the user has done.
        user_B: user_idx of each row.
        num_negatives: Draws per row, with replacement.
        seen: What may not be drawn.
        generator: Source of all randomness.

    Returns:
        item_idx. Their log chances are the sampler's up to one constant per user.

    Raises:
        DataError: A user has done every item that can be drawn.
    """
    item_BN = sampler.draw((len(user_B), num_negatives), generator=generator)
    row_R, column_R = seen.contains(user_B.unsqueeze(1).expand_as(item_BN), item_BN).nonzero().T
    for _ in range(_ROUNDS):
        if len(row_R) == 0:
            return item_BN
        item_R = sampler.draw((len(row_R),), generator=generator)
        item_BN[row_R, column_R] = item_R
        again_R = seen.contains(user_B[row_R], item_R)
        row_R, column_R = row_R[again_R], column_R[again_R]
    size = max(1, min(_BLOCK_ROWS, _BLOCK_WEIGHTS // seen.num_items))
    for rows, columns in zip(row_R.split(size), column_R.split(size), strict=True):
        item_BN[rows, columns] = _draw_exactly(sampler, user_B[rows], seen, generator)
    return item_BN


def _draw_exactly(
    sampler: Sampler, user_R: Tensor, seen: Seen, generator: torch.Generator
) -> Int64[Tensor, " R"]:
    row_P, item_P = seen.items_of(user_R)
    weight_RI = sampler.probability_I.repeat(len(user_R), 1)
    weight_RI[row_P, item_P] = 0
    if not (weight_RI.sum(dim=1) > 0).all():
        user_idx = int(user_R[weight_RI.sum(dim=1).argmin()])
        raise DataError(
            f"the user in row {user_idx} has done all {int((sampler.probability_I > 0).sum())} "
            "items that can be drawn: leave such users out, or set exclude_known = false"
        )
    # As `multinomial` draws one, which refuses more than 2^24 items.
    race_RI = torch.empty_like(weight_RI).exponential_(generator=generator)
    return torch.div(weight_RI, race_RI, out=race_RI).argmax(dim=1)

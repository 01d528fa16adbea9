"""Items drawn for labelled rows: what the user has not done, by any sampler's chances.

Shape legend: B rows, N negatives of a row, U users.
"""

from typing import final

import torch
from jaxtyping import Int64
from torch import Tensor

from foretaste.sampling.sampler import Sampler
from foretaste.sampling.unseen import Seen, draw_unseen

_ROUNDS = 8


@final
class RowNegatives:
    """A `DrawItems` that looks at no model: it draws from one distribution for all."""

    def __init__(self, sampler: Sampler, seen: Seen | None) -> None:
        """Prepare.

        Args:
            sampler: Whose chances.
            seen: What each user has done and is never drawn; None: only the row's own is not.
        """
        self.sampler, self.seen = sampler, seen
        if seen is not None:
            drawable_I = sampler.probability_I > 0
            done_U = torch.bincount(
                seen.key_E.div(seen.num_items, rounding_mode="floor"),
                drawable_I[seen.key_E % seen.num_items].double(),
                minlength=len(seen.offsets_U1) - 1,
            )
            self._full_U = done_U == drawable_I.sum()

    def __call__(
        self,
        user_B: Int64[Tensor, " B"],
        positive_B: Int64[Tensor, " B"],
        num: int,
        *,
        generator: torch.Generator,
    ) -> Int64[Tensor, "B N"]:
        """Return item_idx; the row's own where nothing can be drawn."""
        own_BN = positive_B.unsqueeze(1).expand(-1, num)
        if self.seen is None:
            return self._other(own_BN, generator)
        full_B = self._full_U[user_B]
        drawn_BN = own_BN.clone()
        drawn_BN[~full_B] = draw_unseen(
            self.sampler, user_B[~full_B], num, seen=self.seen, generator=generator
        )
        return drawn_BN

    def _other(self, own_BN: Tensor, generator: torch.Generator) -> Int64[Tensor, "B N"]:
        drawn_BN = self.sampler.draw(tuple(own_BN.shape), generator=generator)
        for _ in range(_ROUNDS):
            again_BN = drawn_BN == own_BN
            num_again = int(again_BN.sum())
            if not num_again:
                break
            drawn_BN[again_BN] = self.sampler.draw((num_again,), generator=generator)
        return drawn_BN

"""The other rows' positives as negatives: they cost nothing, their vectors are there already.

Shape legend: N rows, M distinct items, I items.
"""

from typing import final

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from foretaste.errors import DataError
from foretaste.sampling.distinct import Drawn


@final
class InBatchSampler:
    r"""Gives the distinct items of a batch, each with its chance to be in it.

    A batch is N of the E training events, drawn without replacement. To one of its rows, an
    item with c events is among the other N - 1 with chance

    .. math:: \pi_j = 1 - \binom{E - 1 - c_j}{N - 1} \Big/ \binom{E - 1}{N - 1}

    exactly, if the row's own item is another. Batches of sequences hold events of few users
    together; for them it is an approximation.

    References:
        Yi et al., "Sampling-Bias-Corrected Neural Modeling for Large Corpus Item
        Recommendations", RecSys 2019, https://doi.org/10.1145/3298689.3346996. Departure: items
        stand once however often the batch has them, and frequencies are counted;
        `StreamedFrequency` estimates them where they cannot be.
    """

    def __init__(self, count_I: Int64[Tensor, " I"]) -> None:
        """Prepare to give chances.

        Args:
            count_I: Training events of each item.

        Raises:
            DataError: No item has a training event.
        """
        if not (count_I > 0).any():
            raise DataError("no item has a training event: no batch has anything in it")
        self._count_I, self._events = count_I, float(count_I.sum())

    def draw(self, target_N: Int64[Tensor, " N"]) -> Drawn:
        """Return the distinct items of a batch."""
        if self._count_I.device != target_N.device:
            self._count_I = self._count_I.to(target_N.device)
        num_rows = len(target_N)
        return Drawn(target_N.unique(), lambda item_X: self._chances(item_X, num_rows))

    def _chances(self, item_X: Int64[Tensor, "*X"], num_rows: int) -> Float[Tensor, "*X"]:
        count_X = self._count_I[item_X].double()
        events, others = self._events - 1, float(num_rows - 1)
        rest_X = events - count_X
        possible_X = rest_X >= others
        rest_X = rest_X.where(possible_X, others)
        log_miss_X = (
            torch.lgamma(rest_X + 1)
            - torch.lgamma(rest_X - others + 1)
            - torch.lgamma(torch.tensor(events + 1).double())
            + torch.lgamma(torch.tensor(events - others + 1).double())
        )
        chance_X = -torch.expm1(log_miss_X.clamp(max=0))
        return chance_X.where(possible_X, 1.0).where(count_X > 0, 0.0).float()

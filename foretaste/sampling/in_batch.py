"""The other rows' positives as negatives: they cost nothing, their vectors are there already.

Shape legend: N rows, M distinct items, I items.
"""

from typing import final

import torch
from jaxtyping import Int64
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
        self._count_I = count_I.double()
        self._kept = (-1, torch.empty(0))

    def draw(self, target_N: Int64[Tensor, " N"]) -> Drawn:
        """Return the distinct items of a batch."""
        rows, chance_I = self._kept  # as one, since several threads may draw at a time
        if len(target_N) != rows:
            chance_I = self._chances(len(target_N))
            self._kept = (len(target_N), chance_I)
        return Drawn(target_N.unique(), chance_I.to(target_N.device))

    def _chances(self, rows: int) -> Tensor:
        events, others = float(self._count_I.sum()) - 1, float(rows - 1)
        rest_I = events - self._count_I
        possible_I = rest_I >= others
        rest_I = rest_I.where(possible_I, others)
        log_miss_I = (
            torch.lgamma(rest_I + 1)
            - torch.lgamma(rest_I - others + 1)
            - torch.lgamma(torch.tensor(events + 1).double())
            + torch.lgamma(torch.tensor(events - others + 1).double())
        )
        chance_I = -torch.expm1(log_miss_I.clamp(max=0))
        return chance_I.where(possible_I, 1.0).where(self._count_I > 0, 0.0).float()

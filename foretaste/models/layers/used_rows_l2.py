r"""The price of long vectors, paid by the rows of a table that a batch uses.

.. math:: \frac{\lambda}{2} \sum_v w_v \lVert e_v \rVert^2

"rows": w is how often the batch uses row v over its number of rows. "mini_batch_aware": w is 1 over
the number of training rows that use v: Zhou et al., "Deep Interest Network for Click-Through Rate
Prediction", KDD 2018, equation 6. Departure: a row that only reads an item in a history does not
count among those that use it.

Shape legend: V rows of the table, W width, N uses in a batch. Row 0 is nobody, and pays nothing.
"""

from collections.abc import Iterable
from typing import Literal, final

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

L2Of = Literal["rows", "mini_batch_aware"]


@final
class UsedRowsL2(nn.Module):
    """The penalty, and what it must know of the training rows; no part of the state."""

    times_V: Tensor
    """How many training rows use each row of the table."""

    def __init__(self, l2: float, of: L2Of, *, num_codes: int) -> None:
        super().__init__()
        self.weight, self.of = l2, of
        self.register_buffer("times_V", torch.zeros(num_codes), persistent=False)

    def count(self, uses: Iterable[tuple[Int64[Tensor, "_ _"], Int64[Tensor, " _"]]]) -> None:
        """Count the training rows of each row of the table.

        Args:
            uses: Codes of users, items or moments, and how many training rows each stands in.
        """
        times_V = torch.zeros(len(self.times_V))
        for code_RS, times_R in uses:
            times_RS = times_R.unsqueeze(1).expand_as(code_RS)
            times_V.index_add_(0, code_RS.flatten().cpu(), times_RS.flatten().float())
        self.times_V.copy_(times_V)

    def forward(
        self, code_N: Int64[Tensor, " N"], weight_VW: Float[Tensor, "V W"], *, num_rows: int
    ) -> Float[Tensor, ""]:
        """Return the penalty of a batch of `num_rows` rows, which uses `code_N`."""
        times_V = code_N.bincount(minlength=len(weight_VW))
        used_V = times_V[1:].nonzero().squeeze(1) + 1
        if self.of == "mini_batch_aware":
            factor_V = self.times_V[used_V].clamp(min=1).reciprocal()
        else:
            factor_V = times_V[used_V] / num_rows
        square_V = F.embedding(used_V, weight_VW).square().sum(dim=1)
        return self.weight / 2 * (factor_V @ square_V)

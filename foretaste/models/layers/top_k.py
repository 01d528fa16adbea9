"""The best of a row of scores, the same ones whatever the length of the list.

Shape legend: B queries, N scores of each, K list length.
"""

import torch
from jaxtyping import Float, Int64
from torch import Tensor


def top_k(
    score_BN: Float[Tensor, "B N"], k: int
) -> tuple[Float[Tensor, "B K"], Int64[Tensor, "B K"]]:
    """Return the min(k, N) best scores of each row and where they stand, best first.

    Ties go to the lower position, so a longer list begins with the shorter one.
    """
    k, num_items = min(k, score_BN.shape[1]), score_BN.shape[1]
    value_BK, position_BK = score_BN.topk(min(k + 1, num_items))  # one more shows a tie at the end
    tie_BK = value_BK[:, 1:] == value_BK[:, :-1]
    value_BK, position_BK = value_BK[:, :k], position_BK[:, :k]
    if not tie_BK.any() or k == 0:
        return value_BK, position_BK
    if k < num_items:
        last_B1 = value_BK[:, -1:]
        goes_on_B = tie_BK[:, -1] & last_B1.squeeze(1).isfinite()
        for row in goes_on_B.nonzero().flatten().tolist():
            above = (score_BN[row] > last_B1[row]).nonzero().flatten()
            equal = (score_BN[row] == last_B1[row]).nonzero().flatten()[: k - len(above)]
            position_BK[row] = torch.cat([above, equal])
            value_BK[row] = score_BN[row, position_BK[row]]
    return best_first(value_BK, position_BK)


def best_first(value_BK: Tensor, position_BK: Tensor) -> tuple[Tensor, Tensor]:
    """Sort rows by value, highest first, and ties by position, lowest first."""
    position_BK, order_BK = position_BK.sort(dim=1)
    value_BK, again_BK = value_BK.gather(1, order_BK).sort(dim=1, descending=True, stable=True)
    return value_BK, position_BK.gather(1, again_BK)

"""Only the hardest negatives of a row count: those that the model scores highest."""

import torch
from jaxtyping import Float
from torch import Tensor

from foretaste.losses.chunked import LossGradient


def hardest(loss_gradient: LossGradient, num: int) -> LossGradient:
    """Return the loss over each row's `num` highest-scored negatives of those it is given.

    The others get no gradient. Rows with fewer keep all they have.

    References:
        Zhang et al., "Optimizing Top-N Collaborative Filtering via Dynamic Negative Item
        Sampling", SIGIR 2013, https://doi.org/10.1145/2484028.2484126
    """

    def narrowed(
        positive_N: Float[Tensor, " N"], negative_NM: Float[Tensor, "N M"]
    ) -> tuple[Tensor, Tensor, Tensor]:
        if num >= negative_NM.shape[1]:
            return loss_gradient(positive_N, negative_NM)
        top_NK, column_NK = negative_NM.topk(num, dim=1)
        loss, grad_positive_N, grad_NK = loss_gradient(positive_N, top_NK)
        return loss, grad_positive_N, torch.zeros_like(negative_NM).scatter_(1, column_NK, grad_NK)

    return narrowed

"""Cross-entropy over the catalogue, whole or sampled."""

import torch
from jaxtyping import Float
from torch import Tensor


def softmax_loss_gradient(
    positive_N: Float[Tensor, " N"], negative_NM: Float[Tensor, "N M"]
) -> tuple[Float[Tensor, ""], Float[Tensor, " N"], Float[Tensor, "N M"]]:
    r"""Sum the cross-entropy of each positive against its negatives, with its gradient.

    .. math:: L = \sum_n \ln\Big(e^{s^+_n} + \sum_m e^{s^-_{nm}}\Big) - s^+_n

    With all other items as negatives this is the full softmax. With a sample of them, each
    offset by :math:`-\ln(M q_m)` (its expected number of draws), the sum in the logarithm is an
    unbiased estimate of the full one.

    Args:
        positive_N: Logits of the observed items.
        negative_NM: Logits of the negatives, -inf where there is none; overwritten.

    Returns:
        The loss in nats, its gradient to the positives (in [-1, 0]) and to the negatives
        (in [0, 1], the storage of `negative_NM`).

    References:
        Bengio and Senécal, "Adaptive Importance Sampling to Accelerate Training of a Neural
        Probabilistic Language Model", IEEE TNN 2008, https://doi.org/10.1109/TNN.2007.912312.
    """
    peak_N1 = torch.maximum(positive_N, negative_NM.amax(dim=1)).unsqueeze(1)
    weight_NM = negative_NM.sub_(peak_N1).exp_()
    positive_weight_N = (positive_N - peak_N1.squeeze(1)).exp()
    total_N = weight_NM.sum(dim=1) + positive_weight_N
    loss = (total_N.log() + peak_N1.squeeze(1) - positive_N).sum(dtype=torch.float64)
    return loss, positive_weight_N / total_N - 1, weight_NM.div_(total_N.unsqueeze(1))

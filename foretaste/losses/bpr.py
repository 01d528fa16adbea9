"""Pairwise losses: an observed item should stand above those drawn for the same row."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def bpr_loss_gradient(
    positive_N: Float[Tensor, " N"], negative_NM: Float[Tensor, "N M"]
) -> tuple[Float[Tensor, ""], Float[Tensor, " N"], Float[Tensor, "N M"]]:
    r"""Sum over rows the mean BPR loss against the row's negatives, with its gradient.

    .. math:: L = -\sum_n \frac{1}{M_n} \sum_m \ln \sigma(s^+_n - s^-_{nm})

    Args:
        positive_N: Logits of the observed items.
        negative_NM: Logits of the negatives, -inf where there is none; overwritten.

    Returns:
        The loss in nats, N ln 2 when the scores cannot tell items apart, and its gradient to the
        positives (in [-1, 0]) and to the negatives (the storage of `negative_NM`).

    References:
        Rendle et al., "BPR: Bayesian Personalized Ranking from Implicit Feedback", UAI 2009,
        https://arxiv.org/abs/1205.2618. Departure: the paper's weight decay is `l2`'s business.
    """
    share_N1 = _share(negative_NM)
    above_NM = negative_NM.sub_(positive_N.unsqueeze(1))
    loss = (F.softplus(above_NM) * share_N1).sum(dtype=torch.float64)
    grad_NM = above_NM.sigmoid_().mul_(share_N1)
    return loss, -grad_NM.sum(dim=1), grad_NM


def margin_loss_gradient(
    positive_N: Float[Tensor, " N"], negative_NM: Float[Tensor, "N M"], *, margin: float
) -> tuple[Float[Tensor, ""], Float[Tensor, " N"], Float[Tensor, "N M"]]:
    r"""Sum over rows the mean hinge against the row's negatives, with its gradient.

    .. math:: L = \sum_n \frac{1}{M_n} \sum_m \max(0, s^-_{nm} - s^+_n + \Delta)

    Args:
        positive_N: Scores of the observed items.
        negative_NM: Scores of the negatives, -inf where there is none; overwritten.
        margin: :math:`\Delta`, above 0, in the unit of the scores.

    Returns:
        The loss in the unit of the scores, 0 when all negatives stand a margin below, and its
        gradient to the positives (in [-1, 0]) and to the negatives (the storage of `negative_NM`).

    References:
        Ying et al., "Graph Convolutional Neural Networks for Web-Scale Recommender Systems", KDD
        2018, https://arxiv.org/abs/1806.01973, equation 1.
    """
    share_N1 = _share(negative_NM)
    short_NM = negative_NM.sub_(positive_N.unsqueeze(1)).add_(margin).clamp_(min=0)
    loss = (short_NM * share_N1).sum(dtype=torch.float64)
    grad_NM = short_NM.sign_().mul_(share_N1)
    return loss, -grad_NM.sum(dim=1), grad_NM


def _share(negative_NM: Tensor) -> Tensor:
    """Return one over the number of real negatives of each row."""
    num_N1: Tensor = negative_NM.isfinite().sum(dim=1, keepdim=True)
    return num_N1.clamp(min=1).reciprocal()

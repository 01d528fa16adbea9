"""Binary cross-entropy of an observed item against drawn ones, plain and calibrated."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def bce_loss_gradient(
    positive_N: Float[Tensor, " N"],
    negative_NM: Float[Tensor, "N M"],
    *,
    positive_power: float = 1.0,
    negative_weight: float = 1.0,
) -> tuple[Float[Tensor, ""], Float[Tensor, " N"], Float[Tensor, "N M"]]:
    r"""Sum the (generalised) binary cross-entropy, with its gradient.

    .. math:: L = -\sum_n \Big(\beta \ln \sigma(s^+_n) + w \sum_m \ln \sigma(-s^-_{nm})\Big)

    :math:`\beta` = 1 is BCE; `gbce_power` gives the :math:`\beta` of gBCE.

    Args:
        positive_N: Logits of the observed items.
        negative_NM: Logits of the negatives, -inf where there is none; overwritten.
        positive_power: :math:`\beta`, in (0, 1].
        negative_weight: :math:`w`, above 0; 1/M makes all negatives weigh as one.

    Returns:
        The loss in nats, its gradient to the positives (in [-β, 0]) and to the negatives
        (in [0, w], the storage of `negative_NM`).

    References:
        Petrov and Macdonald, "gSASRec: Reducing Overconfidence in Sequential Recommendation
        Trained with Negative Sampling", RecSys 2023, https://arxiv.org/abs/2308.07192.
    """
    loss = -positive_power * F.logsigmoid(positive_N).sum(dtype=torch.float64)
    loss = loss + negative_weight * F.softplus(negative_NM).sum(dtype=torch.float64)
    grad_positive_N = -positive_power * torch.sigmoid(-positive_N)
    return loss, grad_positive_N, negative_NM.sigmoid_().mul_(negative_weight)


def gbce_power(*, sampling_rate: float, calibration: float) -> float:
    r"""Return gBCE's exponent of the positive probability.

    .. math:: \beta = \alpha \Big(t \big(1 - \tfrac{1}{\alpha}\big) + \tfrac{1}{\alpha}\Big)

    Args:
        sampling_rate: :math:`\alpha`, negatives per positive over the catalogue less one, (0, 1].
        calibration: :math:`t` in [0, 1]: 0 is plain BCE, 1 makes probabilities calibrated.
    """
    return sampling_rate * (calibration * (1 - 1 / sampling_rate) + 1 / sampling_rate)

"""Losses of labelled rows, a task each, and how several tasks share one sum.

Shape legend: B rows, C items of each, N labelled rows, K thresholds between an ordinal task's
levels, T tasks.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from foretaste.data.tasks import LabelScale, Task, standardised


def task_loss(
    task: Task, output: Tensor, label_N: Float[Tensor, " N"], scale: LabelScale
) -> Float[Tensor, ""]:
    """Return the mean loss of a task over rows that have a label.

    Args:
        task: Says which loss.
        output: What a ranker gives: a binary task's logits (N,), a regression's standardised
            values (N,), an ordinal task's logits (N, K).
        label_N: In the label's own unit, none missing.
        scale: Of a regression's labels.
    """
    match task.kind:
        case "binary":
            return binary_loss(output, label_N)
        case "regression":
            return regression_loss(
                output, standardised(task, label_N, scale), huber=task.loss == "huber"
            )
        case "ordinal":
            return ordinal_loss(output, label_N, levels=task.levels)


def binary_loss(logit_N: Float[Tensor, " N"], label_N: Float[Tensor, " N"]) -> Float[Tensor, ""]:
    r"""Return the mean binary cross-entropy, in nats.

    .. math:: -\frac{1}{N} \sum_n y_n \ln \sigma(s_n) + (1 - y_n) \ln \sigma(-s_n)
    """
    return F.binary_cross_entropy_with_logits(logit_N, label_N.to(logit_N.dtype))


def listwise_loss(
    logit_BC: Float[Tensor, "B C"], hidden_BC: Bool[Tensor, "B C"]
) -> Float[Tensor, ""]:
    r"""Return the mean cross-entropy of each row's first item among all of its items, in nats.

    .. math:: -\frac{1}{B} \sum_b \ln \frac{e^{s_{b0}}}{\sum_c e^{s_{bc}}}

    Args:
        logit_BC: The row's own item first.
        hidden_BC: Items that are not to be compared; the first never is.

    References:
        Cao et al., "Learning to Rank: From Pairwise Approach to Listwise Approach", ICML 2007,
        https://doi.org/10.1145/1273496.1273513, with one relevant item.
    """
    compared_BC = ~hidden_BC
    compared_BC[:, 0] = True
    logit_BC = logit_BC.float().where(compared_BC, -torch.inf)
    return (logit_BC.logsumexp(dim=1) - logit_BC[:, 0]).mean()


def regression_loss(
    value_N: Float[Tensor, " N"], target_N: Float[Tensor, " N"], *, huber: bool
) -> Float[Tensor, ""]:
    r"""Return the mean squared error, or Huber's: :math:`e^2` up to 1, :math:`2|e| - 1` beyond.

    Both are in units of the target's variance, and alike where the error is within one standard
    deviation.

    References:
        Huber, "Robust Estimation of a Location Parameter", Annals of Mathematical Statistics
        1964. Departure: twice his loss, so that it continues the squared one.
    """
    if huber:
        return 2 * F.huber_loss(value_N, target_N.to(value_N.dtype))
    return F.mse_loss(value_N, target_N.to(value_N.dtype))


def ordinal_loss(
    logit_NK: Float[Tensor, "N K"], label_N: Float[Tensor, " N"], *, levels: tuple[float, ...]
) -> Float[Tensor, ""]:
    r"""Return the mean cross-entropy of "does the label lie above this level", in nats.

    .. math:: -\frac{1}{NK} \sum_{n,k} [y_n > l_k] \ln \sigma(s_{nk})
                                      + [y_n \le l_k] \ln \sigma(-s_{nk})

    Args:
        logit_NK: Of lying above each level but the last.
        label_N: Each is one of the levels.
        levels: K + 1 values, ascending.

    References:
        Cao, Mirjalili and Raschka, "Rank consistent ordinal regression for neural networks with
        application to age estimation", Pattern Recognition Letters 2020,
        https://arxiv.org/abs/1901.07884. Departure: the mean over thresholds, not the sum, so
        that a task weighs the same however many levels it has.
    """
    level_K = torch.tensor(levels[:-1], dtype=label_N.dtype, device=label_N.device)
    above_NK = (label_N.unsqueeze(1) > level_K).to(logit_NK.dtype)
    return F.binary_cross_entropy_with_logits(logit_NK, above_NK)


def uncertain_terms(
    loss_T: Float[Tensor, " T"], log_sigma_T: Float[Tensor, " T"]
) -> Float[Tensor, " T"]:
    r"""Weigh each task's loss by how uncertain it is; their sum is what is learned from.

    .. math:: \frac{1}{2 \sigma_t^2} L_t + \ln \sigma_t

    With a loss that stays as it is, the sum is least at :math:`\sigma_t^2 = L_t`.

    Args:
        loss_T: Mean losses, 0 or more.
        log_sigma_T: Learned beside the model's weights.

    References:
        Kendall, Gal and Cipolla, "Multi-Task Learning Using Uncertainty to Weigh Losses for Scene
        Geometry and Semantics", CVPR 2018, https://arxiv.org/abs/1705.07115. Departure: the paper
        has twice this weight for a classification; here all tasks have the same form.
    """
    return loss_T * (-2 * log_sigma_T).exp() / 2 + log_sigma_T

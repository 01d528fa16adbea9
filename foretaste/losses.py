"""Losses over candidates, computed in chunks without the whole matrix, and losses of labelled rows.

For each chunk of rows, the logits, the loss and its gradient are computed together while the chunk
is in cache, and the logits are then discarded. With 25,600 positions and 3,416 items the whole
matrix would be 350 MB, written and read half a dozen times.

Shape legend: N rows (positions, or labelled rows), M candidates shared by all rows, H candidates
of a row alone, D width, P pairs, B rows of a batch, C items per row, K thresholds between an
ordinal task's levels, T tasks.
"""

from collections.abc import Callable
from typing import Any, final

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from foretaste.data.tasks import LabelScale, Task, standardised

LossGradient = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
"""Maps positive logits (N,) and negative logits (N, M) to the summed loss and its gradient with
respect to each. It may overwrite the negative logits. A negative of -inf is not a candidate
(gradient 0)."""

_CHUNK_FLOATS = 2**20
"""4 MiB of logits at a time, about a core's share of the cache."""


@final
class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query_ND: Tensor,
        positive_ND: Tensor,
        negative_MD: Tensor,
        own_NHD: Tensor,
        offset_M: Tensor | None,
        own_offset_NH: Tensor | None,
        hidden_2P: Tensor,
        loss_gradient: LossGradient,
    ) -> Tensor:
        num_rows, num_shared, num_own = len(query_ND), len(negative_MD), own_NHD.shape[1]
        rows = max(32, min(num_rows, _CHUNK_FLOATS // max(1, num_shared + num_own)))
        buffer = query_ND.new_empty(rows, num_shared + num_own)
        grad_query, grad_positive = torch.empty_like(query_ND), torch.empty_like(positive_ND)
        grad_negative, grad_own = torch.zeros_like(negative_MD), torch.empty_like(own_NHD)
        loss = query_ND.new_zeros((), dtype=torch.float64)
        table_DM = negative_MD.T
        starts = torch.arange(0, num_rows + rows, rows, device=hidden_2P.device)
        first_hidden = torch.searchsorted(hidden_2P[0].contiguous(), starts).tolist()
        for number, start in enumerate(range(0, num_rows, rows)):
            part = slice(start, min(start + rows, num_rows))
            query, positive, own = query_ND[part], positive_ND[part], own_NHD[part]
            logits = buffer[: len(query)]
            torch.mm(query, table_DM, out=logits[:, :num_shared])
            if offset_M is not None:
                logits[:, :num_shared] += offset_M
            if num_own:
                logits[:, num_shared:] = torch.einsum("nd,nhd->nh", query, own)
                if own_offset_NH is not None:
                    logits[:, num_shared:] += own_offset_NH[part]
            row_P, column_P = hidden_2P[:, first_hidden[number] : first_hidden[number + 1]]
            logits[row_P - start, column_P] = -torch.inf
            value, grad_p, grad_n = loss_gradient((query * positive).sum(1), logits)
            loss += value
            shared = grad_n[:, :num_shared]
            torch.mul(query, grad_p.unsqueeze(1), out=grad_positive[part])
            torch.mul(positive, grad_p.unsqueeze(1), out=grad_query[part])
            grad_query[part].addmm_(shared, negative_MD)
            grad_negative.addmm_(shared.T, query)
            if num_own:
                grad_h = grad_n[:, num_shared:].unsqueeze(2)
                grad_query[part] += (grad_h * own).sum(dim=1)
                torch.mul(grad_h, query.unsqueeze(1), out=grad_own[part])
        ctx.save_for_backward(grad_query, grad_positive, grad_negative, grad_own)
        return loss.to(query_ND.dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        scale = grad_outputs[0]
        grads = tuple(grad.mul_(scale) for grad in ctx.saved_tensors)
        return (*grads, None, None, None, None)


def chunked_loss(
    query_ND: Float[Tensor, "N D"],
    positive_ND: Float[Tensor, "N D"],
    negative_MD: Float[Tensor, "M D"],
    loss_gradient: LossGradient,
    *,
    hidden_2P: Int64[Tensor, "2 P"],
    offset_M: Float[Tensor, " M"] | None = None,
    own_NHD: Float[Tensor, "N H D"] | None = None,
    own_offset_NH: Float[Tensor, "N H"] | None = None,
) -> Float[Tensor, ""]:
    r"""Sum a loss over rows, each with a positive, M shared negatives and H own negatives.

    Logits are :math:`s^+_n = q_n \cdot p_n` and :math:`s^-_{nm} = q_n \cdot c_m + o_m`.
    Can be differentiated once, to all tables.

    Args:
        query_ND: One row per position.
        positive_ND: The vector of each row's observed item.
        negative_MD: Vectors of the candidates that all rows share.
        loss_gradient: Computes the loss and the gradient of a chunk of logits.
        hidden_2P: (row, column) of candidates that are not negatives of that row, such as its own
            positive (an accidental hit), in ascending order of rows. Columns from M on are the
            row's own.
        offset_M: Added to each candidate's logit, such as a correction for its sampling
            probability.
        own_NHD: Vectors of each row's own candidates.
        own_offset_NH: Added to their logits.
    """
    own = query_ND.new_empty(len(query_ND), 0, query_ND.shape[1]) if own_NHD is None else own_NHD
    loss: Tensor = _Chunked.apply(  # type: ignore[no-untyped-call]  # torch leaves it untyped
        query_ND,
        positive_ND,
        negative_MD,
        own,
        offset_M,
        own_offset_NH,
        hidden_2P,
        loss_gradient,
    )
    return loss


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
        negative_NM: Logits of the negatives, -inf for none; overwritten.
        positive_power: :math:`\beta`, in (0, 1].
        negative_weight: :math:`w`, above 0; with 1/M all negatives together weigh 1.

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
        sampling_rate: :math:`\alpha`, negatives per positive divided by the catalogue's size minus
            1, in (0, 1].
        calibration: :math:`t` in [0, 1]: 0 is plain BCE, 1 makes probabilities calibrated.
    """
    return sampling_rate * (calibration * (1 - 1 / sampling_rate) + 1 / sampling_rate)


def bpr_loss_gradient(
    positive_N: Float[Tensor, " N"], negative_NM: Float[Tensor, "N M"]
) -> tuple[Float[Tensor, ""], Float[Tensor, " N"], Float[Tensor, "N M"]]:
    r"""Sum over rows the mean BPR loss against the row's negatives, with its gradient.

    .. math:: L = -\sum_n \frac{1}{M_n} \sum_m \ln \sigma(s^+_n - s^-_{nm})

    Args:
        positive_N: Logits of the observed items.
        negative_NM: Logits of the negatives, -inf for none; overwritten.

    Returns:
        The loss in nats, N ln 2 if all scores are equal, and its gradient to the
        positives (in [-1, 0]) and to the negatives (the storage of `negative_NM`).

    References:
        Rendle et al., "BPR: Bayesian Personalized Ranking from Implicit Feedback", UAI 2009,
        https://arxiv.org/abs/1205.2618. Departure: the setting `l2` replaces the paper's weight
        decay.
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
        negative_NM: Scores of the negatives, -inf for none; overwritten.
        margin: :math:`\Delta`, above 0, in the unit of the scores.

    Returns:
        The loss in the unit of the scores, 0 if all negatives are lower by the margin, and its
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
        negative_NM: Logits of the negatives, -inf for none; overwritten.

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


def hardest(loss_gradient: LossGradient, num: int) -> LossGradient:
    """Return the loss over each row's `num` negatives with the highest scores.

    The others get no gradient. Rows with fewer negatives keep all of them.

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


def task_loss(
    task: Task, output: Tensor, label_N: Float[Tensor, " N"], scale: LabelScale
) -> Float[Tensor, ""]:
    """Return the mean loss of a task over rows that have a label.

    Args:
        task: The task, which determines the loss.
        output: A ranker's output: a binary task's logits (N,), a regression's standardised
            values (N,), an ordinal task's logits (N, K).
        label_N: Labels in their own unit, none missing.
        scale: The scale of a regression's labels.
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
        hidden_BC: Items that are not compared; the first item is never hidden.

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

    Both are in units of the target's variance, and equal where the error is within one standard
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
        logit_NK: Logits of the label being above each level except the last.
        label_N: Each is one of the levels.
        levels: K + 1 values, ascending.

    References:
        Cao, Mirjalili and Raschka, "Rank consistent ordinal regression for neural networks with
        application to age estimation", Pattern Recognition Letters 2020,
        https://arxiv.org/abs/1901.07884. Departure: the mean over thresholds, not the sum, so that
        a task's weight does not depend on its number of levels.
    """
    level_K = torch.tensor(levels[:-1], dtype=label_N.dtype, device=label_N.device)
    above_NK = (label_N.unsqueeze(1) > level_K).to(logit_NK.dtype)
    return F.binary_cross_entropy_with_logits(logit_NK, above_NK)


def uncertain_terms(
    loss_T: Float[Tensor, " T"], log_sigma_T: Float[Tensor, " T"]
) -> Float[Tensor, " T"]:
    r"""Weight each task's loss by its uncertainty; the sum of the results is the training loss.

    .. math:: \frac{1}{2 \sigma_t^2} L_t + \ln \sigma_t

    For a constant loss, the sum has its minimum at :math:`\sigma_t^2 = L_t`.

    Args:
        loss_T: Mean losses, 0 or more.
        log_sigma_T: Learned together with the model's weights.

    References:
        Kendall, Gal and Cipolla, "Multi-Task Learning Using Uncertainty to Weigh Losses for Scene
        Geometry and Semantics", CVPR 2018, https://arxiv.org/abs/1705.07115. Departure: the paper
        has twice this weight for a classification; here all tasks have the same form.
    """
    return loss_T * (-2 * log_sigma_T).exp() / 2 + log_sigma_T

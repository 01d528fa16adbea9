"""Losses over positions x candidates, without ever keeping that matrix.

A chunk of rows is multiplied, turned into a loss and into its gradient, and forgotten: forward and
backward are done in one visit, while the chunk is in cache. With 25,600 positions and 3,416 items
the whole matrix would be 350 MB, written and read half a dozen times.

Shape legend: N rows (positions), M candidates shared by all rows, D width.
"""

from collections.abc import Callable
from typing import Any, final

import torch
from jaxtyping import Float, Int64
from torch import Tensor

LossGradient = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
"""From positive logits (N,) and negative logits (N, M) to the summed loss and its gradient to
each; it may overwrite the negative logits. A negative of -inf is no candidate (gradient 0)."""

_CHUNK_FLOATS = 2**20
"""4 MiB of logits at a time: about what a core's share of cache holds."""


@final
class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query_ND: Tensor,
        positive_ND: Tensor,
        negative_MD: Tensor,
        offset_M: Tensor | None,
        column_N: Tensor,
        loss_gradient: LossGradient,
    ) -> Tensor:
        num_rows, num_candidates = len(query_ND), len(negative_MD)
        rows = max(32, min(num_rows, _CHUNK_FLOATS // num_candidates))
        buffer = query_ND.new_empty(rows, num_candidates)
        grad_query, grad_positive = torch.empty_like(query_ND), torch.empty_like(positive_ND)
        grad_negative = torch.zeros_like(negative_MD)
        loss = query_ND.new_zeros((), dtype=torch.float64)
        table_DM = negative_MD.T
        for start in range(0, num_rows, rows):
            part = slice(start, min(start + rows, num_rows))
            query, positive = query_ND[part], positive_ND[part]
            logits = torch.mm(query, table_DM, out=buffer[: len(query)])
            if offset_M is not None:
                logits += offset_M
            hit = (column_N[part] >= 0).nonzero().squeeze(1)
            logits[hit, column_N[part][hit]] = -torch.inf
            value, grad_p, grad_n = loss_gradient((query * positive).sum(1), logits)
            loss += value
            torch.mul(query, grad_p.unsqueeze(1), out=grad_positive[part])
            torch.mul(positive, grad_p.unsqueeze(1), out=grad_query[part])
            grad_query[part].addmm_(grad_n, negative_MD)
            grad_negative.addmm_(grad_n.T, query)
        ctx.save_for_backward(grad_query, grad_positive, grad_negative)
        return loss.to(query_ND.dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        scale = grad_outputs[0]
        grads = tuple(grad.mul_(scale) for grad in ctx.saved_tensors)
        return (*grads, None, None, None)


def chunked_loss(
    query_ND: Float[Tensor, "N D"],
    positive_ND: Float[Tensor, "N D"],
    negative_MD: Float[Tensor, "M D"],
    loss_gradient: LossGradient,
    *,
    offset_M: Float[Tensor, " M"] | None = None,
    column_N: Int64[Tensor, " N"],
) -> Float[Tensor, ""]:
    r"""Sum a loss over rows, each with one positive and the same M negatives.

    Logits are :math:`s^+_n = q_n \cdot p_n` and :math:`s^-_{nm} = q_n \cdot c_m + o_m`.
    Can be differentiated once, to all three tables.

    Args:
        query_ND: One row per position.
        positive_ND: The vector of each row's observed item.
        negative_MD: Vectors of the candidates that all rows share.
        loss_gradient: What to make of a chunk of logits.
        offset_M: Added to each candidate's logit, such as a correction for how it was drawn.
        column_N: Where among the candidates the row's own positive stands, -1 for nowhere; it
            is hidden there (an accidental hit).
    """
    loss: Tensor = _Chunked.apply(  # type: ignore[no-untyped-call]  # torch leaves it untyped
        query_ND, positive_ND, negative_MD, offset_M, column_N, loss_gradient
    )
    return loss

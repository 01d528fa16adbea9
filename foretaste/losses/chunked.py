"""Losses over positions x candidates, without ever keeping that matrix.

A chunk of rows is multiplied, turned into a loss and into its gradient, and forgotten: forward and
backward are done in one visit, while the chunk is in cache. With 25,600 positions and 3,416 items
the whole matrix would be 350 MB, written and read half a dozen times.

Shape legend: N rows (positions), M candidates shared by all rows, H candidates of a row alone,
D width, P pairs.
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
    r"""Sum a loss over rows, each with one positive, M negatives that all share, and H of its own.

    Logits are :math:`s^+_n = q_n \cdot p_n` and :math:`s^-_{nm} = q_n \cdot c_m + o_m`.
    Can be differentiated once, to all tables.

    Args:
        query_ND: One row per position.
        positive_ND: The vector of each row's observed item.
        negative_MD: Vectors of the candidates that all rows share.
        loss_gradient: What to make of a chunk of logits.
        hidden_2P: (row, column) of candidates that are no negatives of that row, such as its own
            positive (an accidental hit); rows never fall. Columns from M on are the row's own.
        offset_M: Added to each candidate's logit, such as a correction for how it was drawn.
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

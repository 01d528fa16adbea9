"""A block of attention and feed-forward: normalise first, SwiGLU, gated residuals.

Borisyuk et al., "From Features to Transformers: Redefining Ranking for Scalable Impact" (LiGR),
2025, https://arxiv.org/abs/2502.03417; Shazeer, "GLU Variants Improve Transformer", 2020,
https://arxiv.org/abs/2002.05202.

Shape legend: B rows, L positions, T positions whose states are wanted, D width.
"""

from typing import final

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from foretaste.models.layers.attention import MultiHeadAttention
from foretaste.models.layers.dropout import Dropout


@final
class GatedBlock(nn.Module):
    """Self-attention and SwiGLU, each normalised before and weighed by a gate."""

    def __init__(
        self,
        embedding_dim: int,
        num_heads: int,
        *,
        hidden_dim: int,
        dropout: float,
        attention_dropout: float = 0.0,
        causal: bool = False,
    ) -> None:
        super().__init__()
        width = embedding_dim
        self.causal = causal
        self.attention_norm, self.feed_norm = nn.RMSNorm(width), nn.RMSNorm(width)
        self.attention = MultiHeadAttention(width, num_heads, dropout=attention_dropout)
        self.attention_gate, self.feed_gate = nn.Linear(width, width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * hidden_dim), nn.Linear(hidden_dim, width)
        self.dropout = Dropout(dropout)

    def forward(
        self,
        x_BLD: Float[Tensor, "B L D"],
        *,
        valid_BL: Bool[Tensor, "B L"] | None = None,
        place_BT: Int64[Tensor, "B T"] | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Return the next state of each position.

        Args:
            x_BLD: The states.
            valid_BL: True = may be attended; None: all may. With `causal` only beside `place_BT`.
            place_BT: The positions whose states are wanted, and alone worked out; None: all. A
                causal block's are the last of their rows: they see all that is valid.
        """
        memory_BLD = self.attention_norm(x_BLD)
        normal_BTD = memory_BLD
        if place_BT is not None:
            x_BLD, normal_BTD = rows_at(x_BLD, place_BT), rows_at(memory_BLD, place_BT)
        causal = self.causal and place_BT is None
        attended_BTD = self.attention(normal_BTD, memory_BLD, causal=causal, valid_BS=valid_BL)
        gate_BTD = self.attention_gate(normal_BTD).sigmoid()
        x_BTD = x_BLD + self.dropout(attended_BTD * gate_BTD)
        normal_BTD = self.feed_norm(x_BTD)
        value, gate = self.up(normal_BTD).chunk(2, dim=-1)
        fed_BTD = self.down(value * F.silu(gate))
        output: Tensor = x_BTD + self.dropout(fed_BTD * self.feed_gate(normal_BTD).sigmoid())
        return output


def rows_at(
    x_BLD: Float[Tensor, "B L D"], place_BT: Int64[Tensor, "B T"]
) -> Float[Tensor, "B T D"]:
    """Gather some positions of each row."""
    row_B1 = torch.arange(len(x_BLD), device=x_BLD.device).unsqueeze(1)
    return F.embedding(place_BT + row_B1 * x_BLD.shape[1], x_BLD.flatten(0, 1))

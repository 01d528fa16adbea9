"""Attention, the block around it, and dropout whose mask costs next to nothing on a CPU.

Shape legend: B rows, L positions, T positions whose states are wanted, D width, H heads.
"""

from typing import final

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from foretaste.errors import ConfigError
from foretaste.models.layers.mlp import Dropout


@final
class MultiHeadAttention(nn.Module):
    r"""concat(head_1 … head_H) W^O with head = softmax(Q K^T / sqrt(D / H)) V.

    References:
        Vaswani et al., "Attention Is All You Need", NeurIPS 2017,
        https://arxiv.org/abs/1706.03762
    """

    def __init__(self, embedding_dim: int, num_heads: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        if embedding_dim % num_heads:
            raise ConfigError(
                f"embedding_dim {embedding_dim} is not a multiple of num_heads {num_heads}: "
                "change one of them",
                name="num_heads",
                value=num_heads,
            )
        self.num_heads = num_heads
        self.dropout = dropout
        self.query = nn.Linear(embedding_dim, embedding_dim)
        self.key_value = nn.Linear(embedding_dim, 2 * embedding_dim)
        self.output = nn.Linear(embedding_dim, embedding_dim)

    def forward(
        self,
        query_BLD: Float[Tensor, "B L D"],
        memory_BSD: Float[Tensor, "B S D"],
        *,
        causal: bool = False,
        valid_BS: Bool[Tensor, "B S"] | None = None,
    ) -> Float[Tensor, "B L D"]:
        """Attend from each query position to the memory (S positions).

        Args:
            query_BLD: Where the questions come from.
            memory_BSD: What is attended to.
            causal: Position l sees memory 0 … l only.
            valid_BS: True = may be attended. A row with nothing to attend to gives the bias of
                the output layer, not NaN. Excludes `causal`.
        """
        query_BHLd = self._heads(self.query(query_BLD))
        key, value = self.key_value(memory_BSD).chunk(2, dim=-1)
        mask = None if valid_BS is None else valid_BS[:, None, None, :]
        mixed_BHLd = F.scaled_dot_product_attention(
            query_BHLd,
            self._heads(key),
            self._heads(value),
            attn_mask=mask,
            is_causal=causal,
            dropout_p=self.dropout if self.training else 0.0,
        )
        if mask is not None:
            mixed_BHLd = mixed_BHLd.where(mask.any(dim=-1, keepdim=True), 0)
        output: Tensor = self.output(mixed_BHLd.transpose(1, 2).flatten(2))
        return output

    def _heads(self, x_BLD: Tensor) -> Tensor:
        heads: Tensor = x_BLD.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        return heads


@final
class GatedBlock(nn.Module):
    """Self-attention and SwiGLU, each normalised before and weighed by a gate.

    References:
        Borisyuk et al., "From Features to Transformers: Redefining Ranking for Scalable Impact"
        (LiGR), 2025, https://arxiv.org/abs/2502.03417; Shazeer, "GLU Variants Improve
        Transformer", 2020, https://arxiv.org/abs/2002.05202.
    """

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
            place_BT: The positions whose states are wanted, and alone computed; None: all. A
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

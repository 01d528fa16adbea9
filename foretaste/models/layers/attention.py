"""Multi-head attention, one implementation for every model that attends.

Shape legend: B rows, L positions, D width, H heads.
"""

from typing import final

import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from foretaste.errors import ConfigError


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

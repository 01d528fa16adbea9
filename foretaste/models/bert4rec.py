r"""BERT4Rec, a retriever: bidirectional attention predicts masked items of a history.

Some items of a history are replaced by a learned [MASK]; the state at its position predicts the
item. To recommend, a [MASK] is appended, and its state is compared with every item.

.. math:: P(v) \propto \exp(g(h_{[MASK]}) \cdot e_v + b_v)

Sun et al., "BERT4Rec: Sequential Recommendation with Bidirectional Encoder Representations from
Transformer", CIKM 2019, https://arxiv.org/abs/1904.06690

Departures: g is the identity and b is 0 unless `output_projection` and `output_bias` are set; input
vectors of items are multiplied by sqrt(D); the last block computes only the states of the hidden
positions. The "modern" block (`GatedBlock`) is an option.

Shape legend: B rows, L positions, T hidden positions of a row, D width, I items.
"""

from dataclasses import replace
from typing import ClassVar, Literal, final

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from pydantic import Field
from torch import Tensor, nn

from foretaste.config import ChoiceConfig, Count, Depth, RangeConfig, Space, Usual
from foretaste.data.batch import Queries, SequenceBatch, last_events
from foretaste.models.base import Retriever
from foretaste.models.layers.dense import Dropout, GatedBlock, MultiHeadAttention, rows_at
from foretaste.models.layers.table import Table
from foretaste.models.layers.table_kinds import IdConfig


class BERT4RecConfig(IdConfig):
    """Settings of BERT4Rec."""

    kind: Literal["bert4rec"] = "bert4rec"
    tuning: ClassVar[Space] = {
        "embedding_dim": ChoiceConfig(choices=(32, 64, 128)),
        "num_blocks": ChoiceConfig(choices=(1, 2, 3)),
        "dropout": RangeConfig(low=0.0, high=0.5),
    }
    usual: ClassVar[Usual] = Usual(
        objective={
            "kind": "masked_item",
            "loss": "sampled_softmax",
            "negatives": 1024,
            "mask_ratio": 0.3,
            "last_share": 0.3,
        },
        training={"batch_events": 2048, "learning_rate": 4e-3, "ema_decay": 0.999},
    )
    """As SASRec. More positions are masked than in the paper, because only masked positions are
    trained on, and more often only the last one, because recommendations need that case."""
    embedding_dim: Count = 64
    """Width of item vectors and states; a multiple of num_heads."""
    num_blocks: Depth = 2
    """Number of blocks, each of attention and a feed-forward layer."""
    num_heads: Count = 2
    """Attention heads in a block."""
    max_len: int = Field(default=100, ge=2)
    """Length of a training window. A recommendation reads one event less, plus [MASK]."""
    dropout: float = Field(default=0.2, ge=0, lt=1)
    """Share of values dropped after the embedding and in each block."""
    attention_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of attention weights dropped. With 0 the fused kernel can run, twice as fast on a
    CPU."""
    block: Literal["original", "modern"] = "modern"
    """"original": the paper's block. "modern": normalisation first, SwiGLU, gated residuals."""
    hidden_ratio: float = Field(default=1.0, gt=0, le=1000)
    """Width of the feed-forward layer divided by embedding_dim; 4 in the paper."""
    output_projection: bool = False
    """Whether a GELU layer comes between a state and its product with the items, as in the
    paper."""
    output_bias: bool = False
    """Whether each item has a bias, as in the paper; the bias is an additional column of the item
    vectors."""


@final
class BERT4Rec(Retriever):
    """The network: `forward` returns the states of masked positions, `items` the vectors of
    items.
    """

    learns_by = "masked_item"

    def __init__(self, config: BERT4RecConfig, *, num_items: int) -> None:
        super().__init__()
        width = config.embedding_dim
        self.max_len = config.max_len
        self.scale = width**0.5
        self.num_items = num_items
        self.item_table = config.table.make(num_items, width)
        self.mask = nn.Parameter(torch.empty(width))
        self.positions = nn.Embedding(config.max_len, width)
        self.dropout = Dropout(config.dropout)
        self.blocks = nn.ModuleList(_block(config) for _ in range(config.num_blocks))
        self.norm = nn.LayerNorm(width)
        self.projection = nn.Linear(width, width) if config.output_projection else None
        self.bias_table = config.table.make(num_items, 1) if config.output_bias else None
        self.item_table.draw(std=0.02)
        for weight in (self.mask, self.positions.weight):
            nn.init.normal_(weight, std=0.02)
        if self.bias_table is not None:
            self.bias_table.zero_rows(torch.ones(num_items, dtype=torch.bool))

    def forward(
        self, batch: SequenceBatch, place_BT: Int64[Tensor, "B T"]
    ) -> Float[Tensor, "B T E"]:
        """Replace some positions of each row by [MASK] and return their states.

        Masked and padded items have no influence.

        Args:
            batch: Histories; positions are counted back from a row's last event.
            place_BT: Positions in [0, length of the row); a position may be repeated.

        Returns:
            States; E is D, plus 1 with `output_bias`.
        """
        hidden_BL = torch.zeros_like(batch.valid_BL).scatter_(1, place_BT, value=True)
        x_BLD = torch.where(hidden_BL.unsqueeze(2), self.mask, self.item_table(batch.item_BL))
        x_BLD = self.dropout(x_BLD * self.scale + self.positions(self._age(batch.valid_BL)))
        valid_BL = None if batch.valid_BL.all() else batch.valid_BL
        for block in self.blocks[:-1]:
            x_BLD = block(x_BLD, valid_BL=valid_BL)
        x_BTD: Tensor = self.norm(self.blocks[-1](x_BLD, valid_BL=valid_BL, place_BT=place_BT))
        if self.projection is not None:
            x_BTD = F.gelu(self.projection(x_BTD))
        if self.bias_table is None:
            return x_BTD
        return torch.cat([x_BTD, torch.ones_like(x_BTD[..., :1])], dim=2)

    def encode(self, queries: Queries) -> Float[Tensor, "B E"]:
        """Return the state of a [MASK] after each history; an empty history has only the [MASK]."""
        batch, length_B1 = _with_one_more(last_events(queries, self.max_len - 1))
        state_B1E: Tensor = self(batch, length_B1)
        return state_B1E.squeeze(1)

    def items(self, item_V: Int64[Tensor, " V"]) -> Float[Tensor, "V E"]:
        """Return some items' vectors, shared by input and output; a bias is the last column."""
        vector_VD: Tensor = self.item_table(item_V)
        if self.bias_table is None:
            return vector_VD
        return torch.cat([vector_VD, self.bias_table(item_V)], dim=1)

    @property
    def item_rows(self) -> Table | None:
        """The table of items, if there is no bias."""
        return self.item_table if self.bias_table is None else None

    def _age(self, valid_BL: Bool[Tensor, "B L"]) -> Int64[Tensor, "B L"]:
        """Count positions back from each row's last event, which has 0."""
        place_L = torch.arange(valid_BL.shape[1], device=valid_BL.device)
        return (valid_BL.sum(dim=1, keepdim=True) - 1 - place_L).clamp(min=0)


def _with_one_more(batch: SequenceBatch) -> tuple[SequenceBatch, Int64[Tensor, "B 1"]]:
    """Append a position to each row; return it too."""
    length_B1 = batch.valid_BL.sum(dim=1, keepdim=True)
    width = int(length_B1.max()) + 1 if len(batch) else 1
    item_BL = F.pad(batch.item_BL, (0, 1))[:, :width]
    valid_BL = torch.arange(width, device=item_BL.device) <= length_B1
    return replace(batch, item_BL=item_BL, valid_BL=valid_BL, times=None), length_B1


def _block(config: BERT4RecConfig) -> nn.Module:
    hidden_dim = max(1, round(config.embedding_dim * config.hidden_ratio))
    block = _OriginalBlock if config.block == "original" else GatedBlock
    return block(
        config.embedding_dim,
        config.num_heads,
        hidden_dim=hidden_dim,
        dropout=config.dropout,
        attention_dropout=config.attention_dropout,
    )


@final
class _OriginalBlock(nn.Module):
    """The Transformer's block: attention, then GELU, each added and then normalised."""

    def __init__(
        self,
        embedding_dim: int,
        num_heads: int,
        *,
        hidden_dim: int,
        dropout: float,
        attention_dropout: float,
    ) -> None:
        super().__init__()
        width = embedding_dim
        self.attention = MultiHeadAttention(width, num_heads, dropout=attention_dropout)
        self.up, self.down = nn.Linear(width, hidden_dim), nn.Linear(hidden_dim, width)
        self.attention_norm, self.feed_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.dropout = Dropout(dropout)

    def forward(
        self,
        x_BLD: Tensor,
        *,
        valid_BL: Tensor | None = None,
        place_BT: Tensor | None = None,
    ) -> Tensor:
        x_BTD = x_BLD if place_BT is None else rows_at(x_BLD, place_BT)
        attended_BTD = self.attention(x_BTD, x_BLD, valid_BS=valid_BL)
        x_BTD = self.attention_norm(x_BTD + self.dropout(attended_BTD))
        fed_BTD = self.down(F.gelu(self.up(x_BTD)))
        output: Tensor = self.feed_norm(x_BTD + self.dropout(fed_BTD))
        return output

"""SASRec, a retriever: causal self-attention over a history; the last state represents the user.

Kang and McAuley, "Self-Attentive Sequential Recommendation", ICDM 2018,
https://arxiv.org/abs/1808.09781

Departures: padding is at the end, which causal attention never reads, and positions are counted
back from the end, so an event's position embedding is the paper's. The "modern" block (normalise
first, SwiGLU, gated residuals as in LiGR, https://arxiv.org/abs/2502.03417) is an option. A learned
start state precedes the first event, so that the first event is predicted too, and a user without
history gets an answer.

Shape legend: B rows, L positions (L1 = L + 1), D width, I items.
"""

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


class SASRecConfig(IdConfig):
    """Settings of SASRec."""

    kind: Literal["sasrec"] = "sasrec"
    tuning: ClassVar[Space] = {
        "embedding_dim": ChoiceConfig(choices=(32, 64, 128)),
        "num_blocks": ChoiceConfig(choices=(1, 2, 3)),
        "dropout": RangeConfig(low=0.0, high=0.5),
    }
    usual: ClassVar[Usual] = Usual(
        objective={"kind": "next_item", "loss": "sampled_softmax", "negatives": 1024},
        training={"batch_events": 2048, "learning_rate": 4e-3, "ema_decay": 0.999},
    )
    """With many negatives, a step learns more than with the paper's single one. Four times the
    usual learning rate is combined with an average of the weights over a thousand steps, which is
    validated."""
    embedding_dim: Count = 64
    """Width of item vectors and states; a multiple of num_heads."""
    num_blocks: Depth = 2
    """Number of blocks, each of attention and a feed-forward layer."""
    num_heads: Count = 2
    """Attention heads in a block."""
    max_len: Count = 100
    """Number of a user's last events that the model reads."""
    dropout: float = Field(default=0.2, ge=0, lt=1)
    """Share of values dropped after the embedding, in attention and in the feed-forward layers."""
    attention_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of attention weights dropped. With 0 the fused kernel can run, twice as fast on a
    CPU."""
    block: Literal["original", "modern"] = "modern"
    """"original": the paper's block. "modern": normalisation first, SwiGLU, gated residuals."""
    hidden_ratio: float = Field(default=1.0, gt=0, le=1000)
    """Width of the feed-forward layer divided by embedding_dim; 1 in the paper."""


class CausalEncoder(nn.Module):
    """The base of networks with SASRec's causal encoder of vectors."""

    def make_encoder(self, config: SASRecConfig) -> None:
        """Make the untrained parts."""
        width = config.embedding_dim
        self.max_len = config.max_len
        self.positions = nn.Embedding(config.max_len + 1, width)
        self.start = nn.Parameter(torch.zeros(width))
        self.dropout = Dropout(config.dropout)
        self.blocks = nn.ModuleList(_block(config) for _ in range(config.num_blocks))
        self.norm = nn.LayerNorm(width)

    def causal_states(
        self, vector_BLD: Float[Tensor, "B L D"], valid_BL: Bool[Tensor, "B L"]
    ) -> Float[Tensor, "B L1 D"]:
        """Return the states before and after each vector; padding follows the vectors of a row."""
        x_BLD = self._inputs(vector_BLD, valid_BL)
        for block in self.blocks:
            x_BLD = block(x_BLD)
        state_BLD: Tensor = self.norm(x_BLD)
        return state_BLD

    def last_state(
        self, vector_BLD: Float[Tensor, "B L D"], valid_BL: Bool[Tensor, "B L"]
    ) -> Float[Tensor, "B D"]:
        """Return the state after each row's last vector; the last block computes no other state."""
        x_BLD = self._inputs(vector_BLD, valid_BL)
        for block in self.blocks[:-1]:
            x_BLD = block(x_BLD)
        seen_BL = None if valid_BL.all() else F.pad(valid_BL, (1, 0), value=True)
        place_B1 = valid_BL.sum(dim=1, keepdim=True)
        state_B1D: Tensor = self.norm(self.blocks[-1](x_BLD, valid_BL=seen_BL, place_BT=place_B1))
        return state_B1D.squeeze(1)

    def _inputs(
        self, vector_BLD: Float[Tensor, "B L D"], valid_BL: Bool[Tensor, "B L"]
    ) -> Float[Tensor, "B L1 D"]:
        rows, width, dim = vector_BLD.shape
        step_L1 = torch.arange(width + 1, device=vector_BLD.device)
        age_BL = valid_BL.sum(dim=1, keepdim=True) - step_L1
        x_BLD = torch.cat([self.start.expand(rows, 1, -1), vector_BLD], dim=1) * dim**0.5
        input_BLD: Tensor = self.dropout(x_BLD + self.positions(age_BL.clamp(min=0)))
        return input_BLD


@final
class SASRec(CausalEncoder, Retriever):
    """The network: `forward` returns a state per position, `items` the item vectors."""

    learns_by = "next_item"

    def __init__(self, config: SASRecConfig, *, num_items: int) -> None:
        super().__init__()
        self.num_items = num_items
        self.item_table = config.table.make(num_items, config.embedding_dim)
        self.make_encoder(config)
        self.item_table.draw(std=0.02)
        nn.init.normal_(self.positions.weight, std=0.02)

    def forward(self, batch: SequenceBatch) -> Float[Tensor, "B L1 D"]:
        """Return L + 1 states: before any event, and after each one.

        States at padding positions are undefined. The position counts back from the row's last
        event.
        """
        return self.causal_states(self.item_table(batch.item_BL), batch.valid_BL)

    def encode(self, queries: Queries) -> Float[Tensor, "B D"]:
        """Return the state after the last event of each history."""
        batch = last_events(queries, self.max_len)
        return self.last_state(self.item_table(batch.item_BL), batch.valid_BL)

    def items(self, item_V: Int64[Tensor, " V"]) -> Float[Tensor, "V D"]:
        """Return some items' vectors, shared by input and output."""
        vector_VD: Tensor = self.item_table(item_V)
        return vector_VD

    @property
    def item_rows(self) -> Table:
        """The table of items."""
        return self.item_table


def _block(config: SASRecConfig) -> nn.Module:
    if config.block == "original":
        return _OriginalBlock(config)
    return GatedBlock(
        config.embedding_dim,
        config.num_heads,
        hidden_dim=max(1, round(config.embedding_dim * config.hidden_ratio)),
        dropout=config.dropout,
        attention_dropout=config.attention_dropout,
        causal=True,
    )


@final
class _OriginalBlock(nn.Module):
    def __init__(self, config: SASRecConfig) -> None:
        super().__init__()
        width = config.embedding_dim
        hidden = max(1, round(width * config.hidden_ratio))
        self.attention_norm, self.feed_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = MultiHeadAttention(
            width, config.num_heads, dropout=config.attention_dropout
        )
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.dropout = Dropout(config.dropout)

    def forward(
        self,
        x_BLD: Float[Tensor, "B L D"],
        *,
        valid_BL: Bool[Tensor, "B L"] | None = None,
        place_BT: Int64[Tensor, "B T"] | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Return the next state of each position, or only of the last one, like `GatedBlock`."""
        last = x_BLD if place_BT is None else rows_at(x_BLD, place_BT)
        query_BTD = self.attention_norm(last)
        attended_BTD = self.attention(query_BTD, x_BLD, causal=place_BT is None, valid_BS=valid_BL)
        x_BTD = self.feed_norm(query_BTD + self.dropout(attended_BTD))
        hidden = self.dropout(F.relu(self.up(x_BTD)))
        output: Tensor = x_BTD + self.dropout(self.down(hidden))
        return output

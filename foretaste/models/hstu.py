r"""HSTU, a retriever: each event attends to earlier events, by content, position and time.

.. math:: U, V, Q, K = \mathrm{SiLU}(f_1(\mathrm{norm}(X))), \quad
          A = \frac{1}{n} \mathrm{SiLU}(Q K^\top + r^{p} + r^{t}), \quad
          X' = X + f_2(\mathrm{norm}(A V) \odot U)

The weights A are not a softmax and need not sum to 1, so that a state also reflects the number of
similar events. :math:`r^p` is learned for each number of steps between two events, and :math:`r^t`
for each power of :math:`\sqrt 2` of the seconds between them, with a separate value for events
without times. Only these encode the position of an event in a history.

Zhai et al., "Actions Speak Louder than Words: Trillion-Parameter Sequential Transducers for
Generative Recommendations", ICML 2024, https://arxiv.org/abs/2402.17152

Departures: only items are read, without actions between them; there are no absolute positions,
which the authors' public code adds; time is measured between two events, whereas that code also
uses the time of the next event; states are normalised but do not have length 1; a learned start
state precedes the first event, as in SASRec.

Shape legend: B rows, L positions (L1 = L + 1, the start first), T positions whose states are
returned, H heads, K rows of a table, N places of a batch, D width, I items.
"""

from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple, final

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from pydantic import Field
from torch import Tensor, nn

from foretaste.config import ChoiceConfig, Count, Depth, RangeConfig, Space, Usual
from foretaste.data.batch import NO_TIME, Queries, SequenceBatch, last_events
from foretaste.data.draws import draw_for_rows
from foretaste.errors import ConfigError
from foretaste.models.base import Retriever
from foretaste.models.layers.dense import Dropout, rows_at
from foretaste.models.layers.table import Table
from foretaste.models.layers.table_kinds import IdConfig

_BUCKETS = 64
"""Number of buckets of the seconds between two events; the last begins at 2^31.5, 96 years."""

_PAIRS_AT_ONCE = 2**20
"""Bound on pairs of events within histories, over all histories of a block."""


class HSTUConfig(IdConfig):
    """Settings of HSTU."""

    kind: Literal["hstu"] = "hstu"
    tuning: ClassVar[Space] = {
        "embedding_dim": ChoiceConfig(choices=(32, 64, 128)),
        "num_blocks": ChoiceConfig(choices=(2, 4, 8)),
        "dropout": RangeConfig(low=0.0, high=0.5),
    }
    usual: ClassVar[Usual] = Usual(
        objective={"kind": "next_item", "loss": "sampled_softmax", "negatives": 1024},
        training={"batch_events": 2048, "learning_rate": 4e-3, "ema_decay": 0.999},
    )
    """As SASRec. On MovieLens-100K this was better and faster than the full softmax at the usual
    learning rate."""
    embedding_dim: Count = 64
    """Width of item vectors and states; a multiple of num_heads."""
    num_blocks: Depth = 2
    """Number of blocks."""
    num_heads: Count = 2
    """Attention heads in a block."""
    max_len: Count = 200
    """Number of a user's last events that the model reads."""
    dropout: float = Field(default=0.2, ge=0, lt=1)
    """Share of values dropped from the item vectors and from the output of each block."""
    times: bool = True
    """Whether the time between events is read, if events have times."""
    time_dropout: float = Field(default=0.1, ge=0, lt=1)
    """Share of rows whose times are hidden in training, so that the model can also read a history
    without times, as a request may bring one."""


class _Between(NamedTuple):
    """Steps and time between each event whose state is returned and each event of its row."""

    step_BTL: Int64[Tensor, "B T L"]
    """Number of steps; B may be 1."""
    bucket_BTL: Int64[Tensor, "B T L"]
    """Bucket of the seconds; B, T and L may be 1."""
    seen_BTL: Bool[Tensor, "B T L"]
    """Whether the other event is earlier, or the event itself; B may be 1."""


@final
class HSTU(Retriever):
    """The network: `forward` gives a state per position, compared with the item embeddings."""

    learns_by = "next_item"

    def __init__(self, config: HSTUConfig, *, num_items: int) -> None:
        """Make untrained weights.

        Raises:
            ConfigError: The width is not a multiple of the number of heads.
        """
        super().__init__()
        if config.embedding_dim % config.num_heads:
            raise ConfigError(
                f"embedding_dim {config.embedding_dim} is not a multiple of num_heads "
                f"{config.num_heads}: change one of them",
                name="num_heads",
                value=config.num_heads,
            )
        self.config, self.max_len = config, config.max_len
        self.num_items = num_items
        self.item_table = config.table.make(num_items, config.embedding_dim)
        self.start = nn.Parameter(torch.zeros(config.embedding_dim))
        self.dropout = Dropout(config.dropout)
        self.blocks = nn.ModuleList(_Block(config) for _ in range(config.num_blocks))
        self.norm = nn.LayerNorm(config.embedding_dim)
        self.item_table.draw(std=0.02)

    def forward(self, batch: SequenceBatch) -> Float[Tensor, "B L1 D"]:
        """Return L + 1 states: before any event, and after each one.

        States at padding positions are undefined.
        """
        place_L1 = torch.arange(batch.item_BL.shape[1] + 1, device=batch.item_BL.device)
        between = self._between(batch, place_L1.unsqueeze(0))
        x_BLD = self._inputs(batch)
        for block in self.blocks:
            x_BLD = block(x_BLD, between)
        state_BLD: Tensor = self.norm(x_BLD)
        return state_BLD

    def encode(self, queries: Queries) -> Float[Tensor, "B D"]:
        """Return the state after each history; the last block computes no other state.

        Histories are read in parts, so that the weights between events fit into the processor's
        caches, which takes a third of the time at a length of 200.
        """
        longest = (
            int(queries.offsets_B1.diff().clamp(max=self.max_len).max()) if len(queries) else 0
        )
        size = max(1, _PAIRS_AT_ONCE // (longest + 1) ** 2)
        if len(queries) > size:
            starts = range(0, len(queries), size)
            return torch.cat([self.encode(queries.part(at, at + size)) for at in starts])
        batch = last_events(queries, self.max_len)
        place_L1 = torch.arange(batch.item_BL.shape[1] + 1, device=batch.item_BL.device)
        last_B1 = batch.valid_BL.sum(dim=1, keepdim=True)
        between = self._between(batch, place_L1.unsqueeze(0))
        x_BLD = self._inputs(batch)
        for block in self.blocks[:-1]:
            x_BLD = block(x_BLD, between)
        x_B1D = self.blocks[-1](x_BLD, self._between(batch, last_B1), last_B1)
        state_B1D: Tensor = self.norm(x_B1D)
        return state_B1D.squeeze(1)

    def items(self, item_V: Int64[Tensor, " V"]) -> Float[Tensor, "V D"]:
        """Return some items' vectors, shared by input and output."""
        vector_VD: Tensor = self.item_table(item_V)
        return vector_VD

    @property
    def item_rows(self) -> Table:
        """The table of items."""
        return self.item_table

    def _inputs(self, batch: SequenceBatch) -> Float[Tensor, "B L1 D"]:
        start_B1D = self.start.expand(len(batch), 1, -1)
        x_BLD = torch.cat([start_B1D, self.item_table(batch.item_BL)], dim=1)
        input_BLD: Tensor = self.dropout(x_BLD * self.config.embedding_dim**0.5)
        return input_BLD

    def _between(self, batch: SequenceBatch, place_BT: Int64[Tensor, "B T"]) -> _Between:
        place_L1 = torch.arange(batch.item_BL.shape[1] + 1, device=batch.item_BL.device)
        step_BTL = place_BT.unsqueeze(2) - place_L1
        if batch.times is None or not self.config.times:
            bucket_BTL = torch.full_like(step_BTL[:1, :1, :1], _BUCKETS)
        else:
            time_BL = F.pad(batch.times(), (1, 0), value=NO_TIME)
            if self.training and self.config.time_dropout:
                draw = partial(torch.rand, device=time_BL.device)
                hidden_B1 = draw_for_rows((len(batch), 1), draw) < self.config.time_dropout
                time_BL = time_BL.masked_fill(hidden_B1, NO_TIME)
            time_BT = time_BL.gather(1, place_BT.expand(len(batch), -1))
            bucket_BTL = time_buckets(time_BT.unsqueeze(2), time_BL.unsqueeze(1))
        return _Between(step_BTL.clamp(min=0), bucket_BTL, step_BTL >= 0)


def time_buckets(one: Int64[Tensor, "*#X"], other: Int64[Tensor, "*#X"]) -> Int64[Tensor, "*#X"]:
    """Return the power of √2 that the seconds between two times reach; 64 without times."""
    gap = (one - other).abs().clamp(min=1)
    bucket = (2 * gap.float().log2()).long().clamp(max=_BUCKETS - 1)
    return bucket.masked_fill((one == NO_TIME) | (other == NO_TIME), _BUCKETS)


@final
class _OfEachHead(torch.autograd.Function):
    """`table_KH[index]`, with heads before positions, and a sum for each row as its gradient. The
    gradient of an embedding took a quarter of a step, because few rows are read very often.
    """

    @staticmethod
    def forward(ctx: Any, table_KH: Tensor, index_BTL: Tensor) -> Tensor:
        ctx.save_for_backward(index_BTL)
        ctx.num_rows = len(table_KH)
        found_HN = table_KH.T.index_select(1, index_BTL.flatten())
        return found_HN.view(table_KH.shape[1], *index_BTL.shape).movedim(0, 1)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        (index_BTL,) = ctx.saved_tensors
        index_N = index_BTL.flatten()
        sums = [
            torch.bincount(index_N, grad_BTL.flatten(), minlength=ctx.num_rows)
            for grad_BTL in grad_outputs[0].unbind(1)
        ]
        return torch.stack(sums, dim=1), None


def _of_each_head(
    table_KH: Float[Tensor, "K H"], index_BTL: Int64[Tensor, "B T L"]
) -> Float[Tensor, "B H T L"]:
    if table_KH.device.type == "cpu":
        found: Tensor = _OfEachHead.apply(table_KH, index_BTL)  # type: ignore[no-untyped-call]
        return found
    return F.embedding(index_BTL, table_KH).movedim(3, 1)


@final
class _Block(nn.Module):
    def __init__(self, config: HSTUConfig) -> None:
        super().__init__()
        width, self.num_heads = config.embedding_dim, config.num_heads
        self.most = config.max_len + 1
        self.norm, self.mixed_norm = (nn.LayerNorm(width, eps=1e-6) for _ in range(2))
        self.gate_query = nn.Linear(width, 2 * width)
        self.key_value = nn.Linear(width, 2 * width)
        self.output = nn.Linear(width, width)
        self.dropout = Dropout(config.dropout)
        self.of_step = nn.Embedding(self.most, config.num_heads)
        self.of_time = nn.Embedding(_BUCKETS + 1, config.num_heads)
        for table in (self.of_step, self.of_time):
            nn.init.normal_(table.weight, std=0.02)

    def forward(
        self,
        x_BLD: Float[Tensor, "B L D"],
        between: _Between,
        place_BT: Int64[Tensor, "B T"] | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Return the next state of each position, or only of the given positions."""
        memory_BLD = self.norm(x_BLD)
        wanted_BTD = memory_BLD
        if place_BT is not None:
            x_BLD, wanted_BTD = rows_at(x_BLD, place_BT), rows_at(memory_BLD, place_BT)
        gate_BTD, query_BTD = F.silu(self.gate_query(wanted_BTD)).chunk(2, dim=-1)
        key_BLD, value_BLD = F.silu(self.key_value(memory_BLD)).chunk(2, dim=-1)
        near_BHTL = _of_each_head(self.of_step.weight, between.step_BTL)
        near_BHTL = near_BHTL + _of_each_head(self.of_time.weight, between.bucket_BTL)
        logit_BHTL = self._heads(query_BTD) @ self._heads(key_BLD).mT + near_BHTL
        weight_BHTL = F.silu(logit_BHTL) * between.seen_BTL.unsqueeze(1) / self.most
        mixed_BTD = (weight_BHTL @ self._heads(value_BLD)).transpose(1, 2).flatten(2)
        changed_BTD = self.output(self.dropout(self.mixed_norm(mixed_BTD) * gate_BTD))
        output: Tensor = x_BLD + changed_BTD
        return output

    def _heads(self, x_BLD: Tensor) -> Float[Tensor, "B H L _"]:
        heads: Tensor = x_BLD.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        return heads

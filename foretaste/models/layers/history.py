"""Histories in batches of similar length, and a vector for each: a mean, attention or regression.

Here `history_N` of queries contains rows of a table of vectors, not items of the catalogue, so that
an item's vector is computed once even if many histories contain the item.

Shape legend: B queries, b queries of a group, A rows of items (B, or 1 if all queries have the
same), C items per row, L positions, M events, concatenated group by group, N events of all
histories or of a group, V rows of the table, D and K widths, U users, I items, E width of users'
vectors, S single-valued fields, the id first, Q fields of a user, W width of a field.
"""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, final

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from foretaste.data.arrays import user_blocks
from foretaste.data.batch import Queries, SequenceBatch, last_events, newest_events
from foretaste.data.interactions import Interactions
from foretaste.models.layers.dense import Activation, Dice, MultiHeadAttention, activate
from foretaste.models.layers.table import mean_bags
from foretaste.models.sasrec import CausalEncoder, SASRecConfig

_GROUPS, _GROUP_ROWS = 8, 128


class Histories(NamedTuple):
    """Groups of queries with histories of similar length."""

    order_B: Int64[Tensor, " B"]
    """The queries, group after group."""
    batches: list[SequenceBatch]
    """The items of each group."""

    def items(self) -> Int64[Tensor, " M"]:
        """Return all items, -1 under padding."""
        if not self.batches:
            return self.order_B.new_empty(0)
        return torch.cat(
            [batch.item_BL.where(batch.valid_BL, -1).flatten() for batch in self.batches]
        )

    def map(
        self,
        make: Callable[[Tensor, Tensor, Tensor], Tensor],
        event_MK: Float[Tensor, "M K"],
        item_ACK: Float[Tensor, "A C K"],
    ) -> Float[Tensor, "B _ _"]:
        """Apply a function to each group's events, items and validity; return one row per query.

        Args:
            make: Maps events (b, L, K), items (b, C, K) and validity (b, L) to a row per query.
            event_MK: The vectors of `items`.
            item_ACK: The scored items.
        """
        sizes = [batch.item_BL.numel() for batch in self.batches]
        one = len(self.batches) == 1
        if len(item_ACK) > 1 and not one:
            item_ACK = item_ACK.index_select(0, self.order_B)
        rows, made = 0, []
        for batch, event_NK in zip(self.batches, event_MK.split(sizes), strict=True):
            event_BLK = event_NK.view(*batch.item_BL.shape, event_MK.shape[1])
            own_ACK = item_ACK if len(item_ACK) == 1 else item_ACK[rows : rows + len(batch)]
            made.append(make(event_BLK, own_ACK, batch.valid_BL))
            rows += len(batch)
        return made[0] if one else torch.cat(made).index_select(0, self.order_B.argsort())


def group_histories(queries: Queries, max_len: int) -> Histories:
    """Put queries into groups by the length of their histories, as far as they are read."""
    length_B = queries.offsets_B1.diff().clamp(max=max_len)
    num_groups = max(1, min(_GROUPS, len(queries) // _GROUP_ROWS))
    if num_groups == 1:
        order_B = torch.arange(len(queries), device=length_B.device)
        return Histories(order_B, [last_events(queries, max_len)])
    order_B = length_B.argsort(stable=True)
    groups = [last_events(queries, max_len, rows=rows) for rows in order_B.chunk(num_groups)]
    return Histories(order_B, groups)


@final
class MeanHistory(nn.Module):
    """The mean of a history's last vectors; 0 for an empty one."""

    def __init__(self, *, max_len: int) -> None:
        super().__init__()
        self.max_len = max_len

    def forward(self, queries: Queries, table_VD: Float[Tensor, "V D"]) -> Float[Tensor, "B D"]:
        row_N, offsets_B1 = queries.history_N, queries.offsets_B1
        length_B = offsets_B1.diff()
        if len(length_B) and int(length_B.max()) > self.max_len:
            length_B = length_B.clamp(max=self.max_len)
            first_B = length_B.cumsum(0) - length_B
            skipped_B = offsets_B1[1:] - length_B - first_B
            place_N = torch.arange(int(length_B.sum()), device=row_N.device)
            row_N = row_N[place_N + skipped_B.repeat_interleave(length_B)]
            offsets_B1 = F.pad(length_B.cumsum(0), (1, 0))
        return mean_bags(row_N, offsets_B1[:-1], table_VD)


@final
class AttentionHistory(nn.Module):
    """Attention of a learned query, the same for all users, over a history in any order.

    An empty history gives the bias of the attention's output.
    """

    def __init__(self, embedding_dim: int, num_heads: int, *, max_len: int) -> None:
        super().__init__()
        self.max_len = max_len
        self.question = nn.Parameter(torch.randn(embedding_dim))
        self.attention = MultiHeadAttention(embedding_dim, num_heads)

    def forward(self, queries: Queries, table_VD: Float[Tensor, "V D"]) -> Float[Tensor, "B D"]:
        def read(batch: SequenceBatch) -> Tensor:
            found_B1D: Tensor = self.attention(
                self.question.expand(len(batch), 1, -1),
                F.embedding(batch.item_BL, table_VD),
                valid_BS=batch.valid_BL,
            )
            return found_B1D.squeeze(1)

        return _by_length(queries, self.max_len, read)


@final
class CausalHistory(CausalEncoder):
    """The state of SASRec's blocks after the last event, or of their start without events."""

    def __init__(self, config: SASRecConfig) -> None:
        super().__init__()
        self.make_encoder(config)
        nn.init.normal_(self.positions.weight, std=0.02)

    def forward(self, queries: Queries, table_VD: Float[Tensor, "V D"]) -> Float[Tensor, "B D"]:
        def read(batch: SequenceBatch) -> Tensor:
            return self.last_state(F.embedding(batch.item_BL, table_VD), batch.valid_BL)

        return _by_length(queries, self.max_len, read)


def _by_length(
    queries: Queries, max_len: int, read: Callable[[SequenceBatch], Tensor]
) -> Float[Tensor, "B D"]:
    """Read histories of similar length together, to save work on padding."""
    histories = group_histories(queries, max_len)
    parts = [read(batch) for batch in histories.batches]
    return F.embedding(histories.order_B.argsort(), torch.cat(parts))


@final
class TargetAttention(nn.Module):
    """DIN's activation unit f, and the weights that it computes."""

    def __init__(
        self,
        width: int,
        hidden: Sequence[int],
        *,
        weights: Literal["softmax", "unnormalised"],
        activation: Activation,
    ) -> None:
        """Make untrained weights.

        Args:
            width: K.
            hidden: Widths of the unit's hidden layers, one or more.
            weights: Whether the weights of a history sum to 1, or also measure the strength of an
                interest.
            activation: The activation after each hidden layer.
        """
        super().__init__()
        self.width, self.normalised = width, weights == "softmax"
        self.joint = nn.Linear(3 * width, hidden[0])
        self.layers = nn.ModuleList(
            nn.Linear(before, after) for before, after in zip(hidden, [*hidden[1:], 1], strict=True)
        )
        self.activations = nn.ModuleList(activate(activation, width) for width in hidden)

    def forward(
        self,
        event_BLK: Float[Tensor, "B L K"],
        item_ACK: Float[Tensor, "A C K"],
        valid_BL: Bool[Tensor, "B L"],
    ) -> Float[Tensor, "B C L"]:
        """Return the weight of each event for each item, 0 for invalid events.

        Args:
            event_BLK: The history's items.
            item_ACK: The scored items.
            valid_BL: True = a real event.
        """
        first = self._of_items if item_ACK.shape[1] > self.joint.out_features else self._of_pairs
        state_BCLH = first(event_BLK, item_ACK)
        valid_BCL = valid_BL.unsqueeze(1).expand(state_BCLH.shape[:3])
        for activation, layer in zip(self.activations, self.layers, strict=True):
            if isinstance(activation, Dice):
                state_BCLH = layer(activation(state_BCLH, valid_BCL))
            else:
                state_BCLH = layer(activation(state_BCLH))
        logit_BCL = state_BCLH.squeeze(3)
        if self.normalised:
            lowest = torch.finfo(logit_BCL.dtype).min
            logit_BCL = logit_BCL.masked_fill(~valid_BCL, lowest).softmax(dim=2)
        return logit_BCL * valid_BCL

    def _of_pairs(self, event_BLK: Tensor, item_ACK: Tensor) -> Float[Tensor, "B C L H"]:
        """Return the first layer's output, pair by pair."""
        of_event_KH, of_item_KH, of_both_KH = self.joint.weight.T.split(self.width)
        of_item_AC1H = (item_ACK @ of_item_KH + self.joint.bias).unsqueeze(2)
        of_event_B1LH = (event_BLK @ of_event_KH).unsqueeze(1)
        both_BCLK = item_ACK.unsqueeze(2) * event_BLK.unsqueeze(1)
        state_BCLH: Tensor = both_BCLK @ of_both_KH + of_item_AC1H + of_event_B1LH
        return state_BCLH

    def _of_items(self, event_BLK: Tensor, item_ACK: Tensor) -> Float[Tensor, "B C L H"]:
        """Return the same for more than H items, with each event as a layer over items."""
        of_event_KH, of_item_KH, of_both_KH = self.joint.weight.T.split(self.width)
        bias_BLH = event_BLK @ of_event_KH + self.joint.bias
        weight_BKLH = torch.addcmul(
            of_item_KH.unsqueeze(1), event_BLK.mT.unsqueeze(3), of_both_KH.unsqueeze(1)
        )
        item_BCK = item_ACK.expand(len(event_BLK), -1, -1)
        state_BCX = torch.baddbmm(
            bias_BLH.flatten(1).unsqueeze(1), item_BCK, weight_BKLH.flatten(2)
        )
        return state_BCX.view(*state_BCX.shape[:2], *bias_BLH.shape[1:])


def pool(
    weight_BCL: Float[Tensor, "B C L"], event_BLK: Float[Tensor, "B L K"]
) -> Float[Tensor, "B C K"]:
    """Return the weighted sum of each history's events."""
    return torch.bmm(weight_BCL.to(event_BLK.dtype), event_BLK)


def mean_weights(valid_BL: Bool[Tensor, "B L"]) -> Float[Tensor, "B 1 L"]:
    """Return equal weights for all events of a history."""
    return F.normalize(valid_BL.float(), p=1, dim=1).unsqueeze(1)


Rows = Callable[[Int64[Tensor, " N"]], Float[Tensor, "N _"]]
"""Returns vectors by row: a `Table`, or a model's function of one."""

_BLOCK_EVENTS = 2**17
_RIDGE = 1e-3
"""Weight of the squared coefficients, relative to the mean square of the inputs."""


@final
class FoldIn(nn.Module):
    r"""A vector for a new user, from the user's history.

    .. math:: p \approx W \frac{1}{\sqrt{n}} \sum_{i \in h} q_i + b

    W and b are a ridge regression of training users' vectors on their histories. Training users are
    represented by their learned vectors, new users by W and b.

    For a training user with new events, the learned vector is shifted by the change in the
    regression's output. `recency` adds to every vector
    :math:`W \frac{1}{\sqrt{n}} \sum_r (\text{recency} - 1) 2^{-r} q_{i_r}` over the newest events.
    """

    def __init__(self, *, num_users: int, embedding_dim: int, user_dim: int | None = None) -> None:
        """Prepare.

        Args:
            num_users: Number of training users.
            embedding_dim: Width of items' vectors.
            user_dim: Width of users' vectors; None: the same.
        """
        super().__init__()
        user_dim = embedding_dim if user_dim is None else user_dim
        self.weight_DD: Tensor
        self.bias_D: Tensor
        self.num_events_U: Tensor
        self.register_buffer("weight_DD", torch.eye(embedding_dim, user_dim))
        self.register_buffer("bias_D", torch.zeros(user_dim))
        self.register_buffer("num_events_U", torch.full((num_users,), -1))

    @torch.no_grad()
    def learn(self, events: Interactions, users: Rows, items: Rows) -> None:
        """Fit W and b to the users with a training event, some users at a time.

        Args:
            events: The events of histories.
            users: Returns users' vectors (B, E) by row.
            items: Returns items' vectors (N, D).
        """
        device, (dim, user_dim) = self.weight_DD.device, self.weight_DD.shape
        offsets_U1 = torch.from_numpy(events.offsets.astype(np.int64)).to(device)
        self.num_events_U.copy_(offsets_U1.diff())
        with_events_U = self.num_events_U > 0
        both = torch.zeros(dim + user_dim, dtype=torch.float64, device=device)
        product = torch.zeros(dim, dim + user_dim, dtype=torch.float64, device=device)
        for first_user, last_user in user_blocks(events.offsets, _BLOCK_EVENTS):
            user_B = torch.arange(first_user, last_user, device=device)
            user_B = user_B[with_events_U[first_user:last_user]]
            if not len(user_B):
                continue
            first, last = int(offsets_U1[user_B[0]]), int(offsets_U1[user_B[-1] + 1])
            item_N = torch.from_numpy(events.item_idx[first:last].astype(np.int64))
            offsets_B1 = F.pad(offsets_U1[user_B + 1] - first, (1, 0))
            bag_BD = _bag(item_N.to(device), offsets_B1, items)
            pair_BX = torch.cat([bag_BD, users(user_B)], dim=1).double()
            both += pair_BX.sum(dim=0)
            product += pair_BX[:, :dim].T @ pair_BX
        num = int(with_events_U.sum())
        mean = both / num
        product -= num * mean[:dim].unsqueeze(1) * mean
        gram_DD = product[:, :dim].contiguous()
        gram_DD.diagonal().add_(_RIDGE * gram_DD.diagonal().mean() + 1e-12)
        weight_DD = torch.linalg.solve(gram_DD, product[:, dim:])
        self.weight_DD.copy_(weight_DD)
        self.bias_D.copy_(mean[dim:] - mean[:dim] @ weight_DD)

    def forward(
        self, queries: Queries, users: Rows | None, items: Rows, *, recency: float | None = None
    ) -> Float[Tensor, "B E"]:
        """Return a vector for each query.

        Args:
            queries: Users and their histories.
            users: Returns users' vectors (B, E) by row; None: treat all as new users.
            items: Returns items' vectors (N, D).
            recency: Weight of the newest event; None: 1.
        """
        vector_BE = self._whole(queries, users, items)
        if recency is None or recency == 1:
            return vector_BE
        item_N, offsets_B1, weight_N = newest_events(queries, recency)
        length_B = queries.offsets_B1.diff()
        return vector_BE + _bag(item_N, offsets_B1, items, weight_N, length_B) @ self.weight_DD

    def _whole(self, queries: Queries, users: Rows | None, items: Rows) -> Float[Tensor, "B E"]:
        """Return vectors in which all events count the same."""
        length_B = queries.offsets_B1.diff()
        is_user_B = queries.user_B >= 0
        if users is None or len(self.num_events_U) == 0:
            return self._fold(queries.history_N, queries.offsets_B1, items)
        user_B = queries.user_B.clamp(min=0)
        trained_B = self.num_events_U[user_B]
        own_BD = users(user_B)
        is_same_B = (length_B == trained_B) & (trained_B > 0)
        as_trained_B = is_user_B & (is_same_B | (trained_B < 0))
        if as_trained_B.all():
            return own_BD
        folded_BD = self._fold(queries.history_N, queries.offsets_B1, items)
        moved_B = is_user_B & (length_B > trained_B) & (trained_B > 0)
        if moved_B.any():
            earlier = _first_events(queries, trained_B.where(moved_B, 0))
            moved_BD = own_BD + folded_BD - self._fold(*earlier, items)
            folded_BD = moved_BD.where(moved_B.unsqueeze(1), folded_BD)
        return own_BD.where(as_trained_B.unsqueeze(1), folded_BD)

    def _fold(self, item_N: Tensor, offsets_B1: Tensor, items: Rows) -> Tensor:
        return _bag(item_N, offsets_B1, items) @ self.weight_DD + self.bias_D


def _bag(
    item_N: Tensor,
    offsets_B1: Tensor,
    items: Rows,
    weight_N: Tensor | None = None,
    length_B: Tensor | None = None,
) -> Float[Tensor, "B D"]:
    """Return the weighted sum of each history's item vectors over the root of its length."""
    length_B = offsets_B1.diff() if length_B is None else length_B
    vector_ND = items(item_N)
    if len(item_N) == 0:
        return vector_ND.new_zeros(len(offsets_B1) - 1, vector_ND.shape[1])
    place_N = torch.arange(len(item_N), device=item_N.device)
    sum_BD = F.embedding_bag(
        place_N,
        vector_ND,
        offsets_B1,
        mode="sum",
        per_sample_weights=weight_N,
        include_last_offset=True,
    )
    return sum_BD * length_B.clamp(min=1).rsqrt().unsqueeze(1)


def _first_events(
    queries: Queries, length_B: Int64[Tensor, " B"]
) -> tuple[Int64[Tensor, " N"], Int64[Tensor, " B1"]]:
    """Cut each history to its first events."""
    offsets_B1 = torch.cat([length_B.new_zeros(1), length_B.cumsum(0)])
    row_N = torch.repeat_interleave(length_B)
    place_N = torch.arange(len(row_N), device=row_N.device) - offsets_B1[row_N]
    return queries.history_N[queries.offsets_B1[row_N] + place_N], offsets_B1


def with_likely_ids(
    fold_in: FoldIn,
    queries: Queries,
    single_BSW: Float[Tensor, "B S W"],
    has_id_B1: Bool[Tensor, "B 1"],
    *,
    users: Rows,
    items: Rows,
    only_new: bool = False,
) -> tuple[Float[Tensor, "B S W"], Bool[Tensor, "B 1"]]:
    """Return id vectors, by `fold_in` for queries with a history, and a mask of queries with an id.

    Args:
        fold_in: The regression.
        queries: Users and their histories.
        single_BSW: Single-valued fields.
        has_id_B1: True for users with an id vector.
        users: Returns the users' id vectors.
        items: Returns the items' id vectors.
        only_new: Whether known users keep their vectors, even with later events.
    """
    told_B1 = (queries.offsets_B1.diff() > 0).unsqueeze(1)
    if only_new:
        told_B1 = told_B1 & ~has_id_B1
    if not told_B1.any():
        return single_BSW, has_id_B1
    id_BW = fold_in(queries, users, items).where(told_B1, single_BSW[:, 0])
    return torch.cat([id_BW.unsqueeze(1), single_BSW[:, 1:]], dim=1), has_id_B1 | told_B1


def with_likely_features(
    fold_features: FoldIn,
    queries: Queries,
    field_BQW: Float[Tensor, "B Q W"],
    *,
    items: Rows,
) -> Float[Tensor, "B Q W"]:
    """Replace all fields except the first for new users with a history and without features."""
    unknown_B = (queries.user_B < 0) & (queries.offsets_B1.diff() > 0)
    if queries.profile is not None:
        unknown_B &= ~queries.profile.known_R
    if not unknown_B.any():
        return field_BQW
    likely_BX: Tensor = fold_features(queries, None, items)
    likely_BQW = torch.cat([field_BQW[:, :1], likely_BX.view_as(field_BQW[:, 1:])], dim=1)
    return likely_BQW.where(unknown_B[:, None, None], field_BQW)

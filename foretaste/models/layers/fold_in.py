r"""A vector for a user of whom training saw nothing, from what they have done.

.. math:: p \approx W \frac{1}{\sqrt{n}} \sum_{i \in h} q_i + b

W and b are the ridge regression of the users that training learned on their own histories.

`with_likely_ids` and `with_likely_features` give a ranker such vectors, in evaluation only: in
training every row is read as it is given.

Shape legend: B queries, U users, I items, D width, E width of users' vectors, D unless said, N
events, S single-valued fields, the id first, Q fields of a user, W width of a field.
"""

from collections.abc import Callable
from typing import final

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from foretaste.data.batch import Queries
from foretaste.data.interactions import Interactions

Rows = Callable[[Int64[Tensor, " N"]], Float[Tensor, "N _"]]
"""Gives vectors by row: a `Table`, or what a model makes of one."""

_BLOCK_USERS = 2**12
_RIDGE = 1e-3
"""Weight of the squared coefficients, over the mean square of the inputs."""


@final
class FoldIn(nn.Module):
    """Answers users by their learned vectors, new users by W and b, and moves the known ones.

    A user of training who has done more since is their own vector, moved by what the new events
    change in the regression's answer.
    """

    def __init__(self, *, num_users: int, embedding_dim: int, user_dim: int | None = None) -> None:
        """Prepare.

        Args:
            num_users: Users of training.
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
        """Fit W and b to the users that have a training event, some users at a time.

        Args:
            events: What histories are made of.
            users: Gives users' vectors (B, E) by row.
            items: Gives items' vectors (N, D).
        """
        device, (dim, user_dim) = self.weight_DD.device, self.weight_DD.shape
        offsets_U1 = torch.from_numpy(events.offsets.astype(np.int64)).to(device)
        self.num_events_U.copy_(offsets_U1.diff())
        user_U = (self.num_events_U > 0).nonzero().squeeze(1)
        both = torch.zeros(dim + user_dim, dtype=torch.float64, device=device)
        product = torch.zeros(dim, dim + user_dim, dtype=torch.float64, device=device)
        for user_B in user_U.split(_BLOCK_USERS):
            first, last = int(offsets_U1[user_B[0]]), int(offsets_U1[user_B[-1] + 1])
            item_N = torch.from_numpy(events.item_idx[first:last].astype(np.int64))
            offsets_B1 = F.pad(offsets_U1[user_B + 1] - first, (1, 0))
            bag_BD = _bag(item_N.to(device), offsets_B1, items)
            pair_BX = torch.cat([bag_BD, users(user_B)], dim=1).double()
            both += pair_BX.sum(dim=0)
            product += pair_BX[:, :dim].T @ pair_BX
        mean = both / len(user_U)
        product -= len(user_U) * mean[:dim].unsqueeze(1) * mean
        gram_DD = product[:, :dim].contiguous()
        gram_DD.diagonal().add_(_RIDGE * gram_DD.diagonal().mean() + 1e-12)
        weight_DD = torch.linalg.solve(gram_DD, product[:, dim:])
        self.weight_DD.copy_(weight_DD)
        self.bias_D.copy_(mean[dim:] - mean[:dim] @ weight_DD)

    def forward(self, queries: Queries, users: Rows | None, items: Rows) -> Float[Tensor, "B E"]:
        """Return a vector for each query.

        Args:
            queries: Users and their histories.
            users: Gives users' vectors (B, E) by row; None: answer all as new users.
            items: Gives items' vectors (N, D).
        """
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


def _bag(item_N: Tensor, offsets_B1: Tensor, items: Rows) -> Float[Tensor, "B D"]:
    """Return the sum of each history's item vectors over the root of its length."""
    vector_ND = items(item_N)
    if len(item_N) == 0:
        return vector_ND.new_zeros(len(offsets_B1) - 1, vector_ND.shape[1])
    place_N = torch.arange(len(item_N), device=item_N.device)
    sum_BD = F.embedding_bag(place_N, vector_ND, offsets_B1, mode="sum", include_last_offset=True)
    return sum_BD * offsets_B1.diff().clamp(min=1).rsqrt().unsqueeze(1)


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
    """Return the ids of queries with a history by `fold_in`, and which queries have an id then.

    Args:
        fold_in: Knows the regression.
        queries: Users and their histories.
        single_BSW: Single-valued fields.
        has_id_B1: Which users have an id vector.
        users: Gives the users' id vectors.
        items: Gives the items'.
        only_new: Whether known users keep their vectors whatever they have done since.
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
    """Replace all fields but the first, of new users with a history whose features are not told."""
    untold_B = (queries.user_B < 0) & (queries.offsets_B1.diff() > 0)
    if queries.profile is not None:
        untold_B &= ~queries.profile.known_R
    if not untold_B.any():
        return field_BQW
    likely_BX: Tensor = fold_features(queries, None, items)
    likely_BQW = torch.cat([field_BQW[:, :1], likely_BX.view_as(field_BQW[:, 1:])], dim=1)
    return likely_BQW.where(untold_B[:, None, None], field_BQW)

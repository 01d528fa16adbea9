r"""A vector for a user of whom training saw nothing, from what they have done.

.. math:: p \approx W \frac{1}{\sqrt{n}} \sum_{i \in h} q_i + b

W and b are the ridge regression of the users that training learned on their own histories.

Shape legend: B queries, U users, I items, D width, E width of users' vectors, D unless said, N
events.
"""

from typing import final

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from foretaste.data.batch import Queries
from foretaste.data.interactions import Interactions

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
    def learn(
        self, events: Interactions, user_UD: Float[Tensor, "U E"], item_ID: Float[Tensor, "I D"]
    ) -> None:
        """Fit W and b to the users that have a training event."""
        device = user_UD.device
        item_N = torch.from_numpy(events.item_idx.astype(np.int64)).to(device)
        offsets_U1 = torch.from_numpy(events.offsets.astype(np.int64)).to(device)
        self.num_events_U.copy_(offsets_U1.diff())
        has_U = self.num_events_U > 0
        bag_UD = _bag(item_N, offsets_U1, item_ID)[has_U].double()
        target_UD = user_UD[has_U].double()
        bag_mean_D, target_mean_D = bag_UD.mean(dim=0), target_UD.mean(dim=0)
        bag_UD, target_UD = bag_UD - bag_mean_D, target_UD - target_mean_D
        gram_DD = bag_UD.T @ bag_UD
        gram_DD.diagonal().add_(_RIDGE * gram_DD.diagonal().mean() + 1e-12)
        weight_DD = torch.linalg.solve(gram_DD, bag_UD.T @ target_UD)
        self.weight_DD.copy_(weight_DD)
        self.bias_D.copy_(target_mean_D - bag_mean_D @ weight_DD)

    def forward(
        self,
        queries: Queries,
        user_UD: Float[Tensor, "U E"],
        item_ID: Float[Tensor, "I D"],
    ) -> Float[Tensor, "B E"]:
        """Return a vector for each query."""
        length_B = queries.offsets_B1.diff()
        is_user_B = queries.user_B >= 0
        if len(user_UD) == 0:
            return self._fold(queries.history_N, queries.offsets_B1, item_ID)
        user_B = queries.user_B.clamp(min=0)
        trained_B = self.num_events_U[user_B]
        own_BD = F.embedding(user_B, user_UD)
        is_same_B = (length_B == trained_B) & (trained_B > 0)
        as_trained_B = is_user_B & (is_same_B | (trained_B < 0))
        if as_trained_B.all():
            return own_BD
        folded_BD = self._fold(queries.history_N, queries.offsets_B1, item_ID)
        moved_B = is_user_B & (length_B > trained_B) & (trained_B > 0)
        if moved_B.any():
            earlier = _first_events(queries, trained_B.where(moved_B, 0))
            moved_BD = own_BD + folded_BD - self._fold(*earlier, item_ID)
            folded_BD = moved_BD.where(moved_B.unsqueeze(1), folded_BD)
        return own_BD.where(as_trained_B.unsqueeze(1), folded_BD)

    def _fold(self, item_N: Tensor, offsets_B1: Tensor, item_ID: Tensor) -> Tensor:
        return _bag(item_N, offsets_B1, item_ID) @ self.weight_DD + self.bias_D


def _bag(item_N: Tensor, offsets_B1: Tensor, item_ID: Tensor) -> Float[Tensor, "B D"]:
    """Return the sum of each history's item vectors over the root of its length."""
    if len(item_N) == 0:
        return item_ID.new_zeros(len(offsets_B1) - 1, item_ID.shape[1])
    sum_BD = F.embedding_bag(item_N, item_ID, offsets_B1, mode="sum", include_last_offset=True)
    return sum_BD * offsets_B1.diff().clamp(min=1).rsqrt().unsqueeze(1)


def _first_events(
    queries: Queries, length_B: Int64[Tensor, " B"]
) -> tuple[Int64[Tensor, " N"], Int64[Tensor, " B1"]]:
    """Cut each history to its first events."""
    offsets_B1 = torch.cat([length_B.new_zeros(1), length_B.cumsum(0)])
    row_N = torch.repeat_interleave(length_B)
    place_N = torch.arange(len(row_N), device=row_N.device) - offsets_B1[row_N]
    return queries.history_N[queries.offsets_B1[row_N] + place_N], offsets_B1

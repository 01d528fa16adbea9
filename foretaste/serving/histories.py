"""Histories as a model takes them: one user's, those of a block of users, and with items left out.

Shape legend: B users, N events of all their histories, X exclusions, L events, C left out.
"""

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from foretaste.data.arrays import ranges
from foretaste.data.batch import NO_TIME, Queries, Times, times_at
from foretaste.data.interactions import Interactions
from foretaste.errors import DataError

BLOCK_USERS = 1024
BLOCK_EVENTS = 2**15
"""Users times the longest of their histories, padding included, in one block."""
BLOCK_SCORES = 2**25
"""Scores of a block, where a model scores the whole catalogue: 128 MiB."""


def one_query(
    user_idx: int, history_L: Int64[np.ndarray, " L"], times: Times | None = None
) -> Queries:
    """Return one user as a block; user_idx is -1 for a new user."""
    return Queries(
        user_B=torch.tensor([user_idx]),
        history_N=torch.from_numpy(history_L),
        offsets_B1=torch.tensor([0, len(history_L)]),
        times=times,
    )


def training_history(
    events: Interactions, user_idx: int, *, since: int | None = None
) -> Int64[np.ndarray, " L"]:
    """Return what training saw of a user, oldest first; nothing of somebody unknown, -1.

    Raises:
        DataError: `since`, in unix seconds, is asked of events without times.
    """
    if since is not None and events.timestamp_s is None:
        raise DataError(
            f"since is {since}, but training's events have no times: leave it out",
            name="since",
            value=since,
        )
    if user_idx < 0:
        return np.empty(0, dtype=np.int64)
    past = events.history(user_idx).astype(np.int64)
    if since is None or events.timestamp_s is None:
        return past
    start, end = events.offsets[user_idx], events.offsets[user_idx + 1]
    return past[events.timestamp_s[start:end] >= since]


def training_times(
    events: Interactions, user_idx: int, *, since: int | None = None, more: int = 0
) -> Times | None:
    """Return what gathers the times of `training_history`, and of `more` events without one."""
    timestamp_s = events.timestamp_s
    if timestamp_s is None or user_idx < 0:
        return None
    past_s = timestamp_s[events.offsets[user_idx] : events.offsets[user_idx + 1]]

    def gather() -> Tensor:
        kept_s = past_s if since is None else past_s[past_s >= since]
        return torch.from_numpy(np.concatenate([kept_s, np.full(more, NO_TIME)]))

    return gather


def training_histories(
    events: Interactions, user_B: Int64[np.ndarray, " B"]
) -> tuple[Queries, Int64[Tensor, "B X"]]:
    """Return users with what training saw of them, and the same padded with -1, to exclude."""
    start_B, end_B = events.offsets[user_B], events.offsets[user_B + 1]
    length_B = end_B - start_B
    index_N, offsets_B1 = ranges(start_B, length_B)
    history_N = events.item_idx[index_N].astype(np.int64)
    seen_BX = np.full((len(user_B), int(length_B.max(initial=0))), -1, dtype=np.int64)
    seen_BX[np.arange(seen_BX.shape[1]) < length_B[:, None]] = history_N
    queries = Queries(
        user_B=torch.from_numpy(user_B),
        history_N=torch.from_numpy(history_N),
        offsets_B1=torch.from_numpy(offsets_B1),
        times=times_at(events.timestamp_s, index_N),
    )
    return queries, torch.from_numpy(seen_BX)


def blocks(
    events: Interactions, user_B: Int64[np.ndarray, " B"], *, scores_per_user: int
) -> Iterator[Int64[np.ndarray, " b"]]:
    """Cut users into blocks of like history length; yields rows of `user_B`, each once.

    Args:
        events: The training events.
        user_B: user_idx.
        scores_per_user: Items that the model scores for each user; 0 behind an index.
    """
    length_B = events.offsets[user_B + 1] - events.offsets[user_B]
    order_B = np.argsort(length_B, kind="stable")
    most = min(BLOCK_USERS, BLOCK_SCORES // max(1, scores_per_user)) or 1
    start = 0
    while start < len(order_B):
        end = min(start + most, len(order_B))
        while end - start > 1 and (end - start) * length_B[order_B[end - 1]] > BLOCK_EVENTS:
            end = start + (end - start + 1) // 2
        yield order_B[start:end]
        start = end


def without_each(
    history_L: Int64[np.ndarray, " L"], *, last: int
) -> tuple[Int64[np.ndarray, " C"], list[np.ndarray]]:
    """Leave out, in turn, each distinct item of the last events, wherever it stands."""
    removed_C = np.unique(history_L[-last:])
    return removed_C, [history_L[history_L != item] for item in removed_C]

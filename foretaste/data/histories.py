"""What of users' histories goes with a batch, gathered in one pass.

Shape legend: B rows of a batch, H events of all their histories.
"""

from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from foretaste.data.batch import Times, times_at
from foretaste.data.interactions import Interactions
from foretaste.data.ranges import ranges

Reads = Literal["nothing", "before", "others"]
"""What of a user's history goes with a row: nothing; the last events before it; or other events
of the user drawn at random, where the order means nothing."""

ALL_ROWS = slice(None)


class History(NamedTuple):
    """What is read of the histories of a batch's rows, named as `Queries` names it."""

    history_N: Int64[Tensor, " H"]
    offsets_B1: Int64[Tensor, " B1"]
    times: Times | None


def read_histories(
    past: Interactions,
    user_B: Int64[np.ndarray, " B"],
    *,
    reads: Reads,
    max_len: int,
    end_B: Int64[np.ndarray, " B"],
    own_B: Int64[np.ndarray, " B"],
    generator: np.random.Generator,
    share: slice = ALL_ROWS,
) -> History:
    """Return each row's history.

    Args:
        past: The events that histories are made of.
        user_B: user_idx of each row.
        reads: What of them.
        max_len: How many events at most.
        end_B: Of "before": position in `past` where the row's history ends.
        own_B: Of "others": position in `past` of the row's own event, -1 where it is not there.
        generator: Of "others": decides which, of all rows before some are left out.
        share: The rows whose histories are wanted.
    """
    if reads == "nothing":
        nothing_B1 = np.zeros(len(user_B[share]) + 1, np.int64)
        return _at(past, np.empty(0, np.int64), nothing_B1)
    start_B = past.offsets[user_B]
    if reads == "before":
        start_B, end_B = start_B[share], end_B[share]
        first_B = np.maximum(start_B, end_B - max_len)
        index_H, offsets_B1 = ranges(first_B, end_B - first_B)
        return _at(past, index_H, offsets_B1)
    # A run of the user's events from a random place, once around, without the row's own.
    size_B = past.offsets[user_B + 1] - start_B
    others_B = size_B - (own_B >= 0)
    turn_B = generator.integers(0, np.maximum(1, others_B))
    start_B, size_B, others_B, turn_B, own_B = (
        all_B[share] for all_B in (start_B, size_B, others_B, turn_B, own_B)
    )
    length_B = np.minimum(others_B, max_len)
    step_H, offsets_B1 = ranges(np.zeros_like(length_B), length_B)
    behind_B = np.where(own_B >= 0, own_B - start_B, -1)
    ahead_H = 1 + _once_around(step_H + np.repeat(turn_B, length_B), np.repeat(others_B, length_B))
    place_H = _once_around(ahead_H + np.repeat(behind_B, length_B), np.repeat(size_B, length_B))
    return _at(past, place_H + np.repeat(start_B, length_B), offsets_B1)


def _at(
    past: Interactions, index_H: Int64[np.ndarray, " H"], offsets_B1: Int64[np.ndarray, " B1"]
) -> History:
    return History(
        history_N=torch.from_numpy(past.item_idx[index_H].astype(np.int64)),
        offsets_B1=torch.from_numpy(offsets_B1),
        times=times_at(past.timestamp_s, index_H),
    )


def _once_around(
    place_H: Int64[np.ndarray, " H"], size_H: Int64[np.ndarray, " H"]
) -> Int64[np.ndarray, " H"]:
    """Return places in `[0, 2 size)` as places in `[0, size)`: a division costs ten times this."""
    around_H: Int64[np.ndarray, " H"] = place_H - size_H * (place_H >= size_H)
    return around_H

"""Popularity: how far the lists lean on what everybody knows."""

import numpy as np
from jaxtyping import Float64, Int64

HEAD_SHARE = 0.2
"""The share of the catalogue that counts as its popular head."""


def popularity_rank(count_I: Int64[np.ndarray, " I"]) -> Int64[np.ndarray, " I"]:
    """Return how many items have more events; items with equally many share a rank."""
    descending_I = -np.sort(-count_I)
    return np.searchsorted(-descending_I, -count_I, side="left").astype(np.int64)


def head_membership(count_I: Int64[np.ndarray, " I"]) -> Float64[np.ndarray, " I"]:
    """Return how much of each item belongs to the most popular fifth of the catalogue.

    1 for the head, 0 for the tail; items as popular as the last of the head share what is left
    of it. The mean over a list is its popularity share: lists drawn blindly get 0.2.

    Args:
        count_I: Training events of each item; items without one are no part of the catalogue.
    """
    known_I = count_I > 0
    head_size = HEAD_SHARE * known_I.sum()
    rank_I = popularity_rank(count_I)
    _, group_I, size_G = np.unique(rank_I, return_inverse=True, return_counts=True)
    return np.where(known_I, np.clip((head_size - rank_I) / size_G[group_I], 0, 1), 0)

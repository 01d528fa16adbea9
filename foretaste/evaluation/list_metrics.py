"""Metrics of ranked lists: a function each, from hits or items and `k` to a value for each query.

Shape legend: B queries, K places of a list, I items.
"""

import numpy as np
from jaxtyping import Bool, Float64, Int64

from foretaste.evaluation.rank import Hits


def list_mean(
    item_BK: Int64[np.ndarray, "B K"], value_I: Float64[np.ndarray, " I"], k: int
) -> Float64[np.ndarray, " B"]:
    """Return the mean of `value_I` over the first `k` places of each list.

    Args:
        item_BK: Best first; -1 where the list ran out, left out of the mean.
        value_I: A property of each item.
        k: At least 1.

    Returns:
        0 for an empty list.
    """
    filled_BK = item_BK[:, :k] >= 0
    value_BK = np.where(filled_BK, value_I[item_BK[:, :k]], 0.0)
    num_B = filled_BK.sum(axis=1)
    mean_B: np.ndarray = value_BK.sum(axis=1) / np.maximum(num_B, 1)
    return mean_B


def hit_rate(hits: Hits, k: int) -> Float64[np.ndarray, " B"]:
    """Return the probability that at least one target stands among the first `k`, in [0, 1].

    Also called Success@k and, where each query has one target, Recall@k.
    """
    chance_B: np.ndarray = hits.first_BK[:, :k].sum(axis=1)
    return chance_B


def recall(hits: Hits, k: int) -> Float64[np.ndarray, " B"]:
    r"""Return the expected share of the targets that stand among the first `k`, in [0, 1].

    .. math:: \frac{1}{n} \sum_{p \le k} \text{rel}_p

    with `n` the number of targets. RecBole and ranx divide by `n` too; some papers divide by
    min(k, n), so that 1 can always be reached.
    """
    share_B: np.ndarray = hits.relevance_BK[:, :k].sum(axis=1) / hits.num_targets_B
    return share_B


def precision(hits: Hits, k: int) -> Float64[np.ndarray, " B"]:
    r"""Return the expected share of the first `k` places that hold a target, in [0, 1].

    .. math:: \frac{1}{k} \sum_{p \le k} \text{rel}_p

    Divided by `k` also where the catalogue has fewer items.
    """
    share_B: np.ndarray = hits.relevance_BK[:, :k].sum(axis=1) / k
    return share_B


def average_precision(hits: Hits, k: int) -> Float64[np.ndarray, " B"]:
    r"""Return the expected mean of the precision at each target found, in [0, 1].

    .. math:: \frac{1}{\min(k, n)} \sum_{p \le k} \text{rel}_p \cdot \text{precision}_p

    with `n` the number of targets. Divided by min(k, n), as in RecBole and the Kaggle contests,
    so that a perfect list gets 1; ranx, trec_eval and RecTools divide by `n`.
    """
    position_K = np.arange(1, min(k, hits.so_far_BK.shape[1]) + 1)
    found_B = (hits.so_far_BK[:, :k] / position_K).sum(axis=1)
    mean_B: np.ndarray = found_B / np.minimum(hits.num_targets_B, k)
    return mean_B


def mrr(hits: Hits, k: int) -> Float64[np.ndarray, " B"]:
    """Return the expectation of 1 / (position of the first target), 0 beyond `k`, in [0, 1]."""
    position_K = np.arange(1, min(k, hits.first_BK.shape[1]) + 1)
    reciprocal_B: np.ndarray = (hits.first_BK[:, :k] / position_K).sum(axis=1)
    return reciprocal_B


def ndcg(hits: Hits, k: int) -> Float64[np.ndarray, " B"]:
    r"""Return the expected discounted gain over that of the ideal list, in [0, 1].

    .. math:: \frac{\sum_{p \le k} \text{rel}_p / \log_2(p + 1)}
                    {\sum_{p \le \min(k, n)} 1 / \log_2(p + 1)}

    with `n` the number of targets, each of gain 1: the ideal list has min(k, n) of them on top,
    as in ranx, trec_eval and scikit-learn. A few libraries take the ideal list as `k` hits.

    References:
        Järvelin and Kekäläinen, "Cumulated gain-based evaluation of IR techniques",
        TOIS 2002, https://doi.org/10.1145/582415.582418
    """
    width = min(k, hits.relevance_BK.shape[1])
    longest = min(k, max(width, int(hits.num_targets_B.max(initial=1))))
    discount_K = 1 / np.log2(np.arange(2, longest + 2))
    ideal_K = np.cumsum(discount_K)
    gain_B = (hits.relevance_BK[:, :width] * discount_K[:width]).sum(axis=1)
    ndcg_B: np.ndarray = gain_B / ideal_K[np.minimum(hits.num_targets_B, k) - 1]
    return ndcg_B


def coverage(shown_I: Bool[np.ndarray, " I"], known_I: Bool[np.ndarray, " I"]) -> float:
    """Return the share of the catalogue that stands in at least one list, in [0, 1].

    Args:
        shown_I: Items in some list.
        known_I: The catalogue: items that can be recommended.
    """
    return float(shown_I[known_I].mean())


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


def self_information(count_I: Int64[np.ndarray, " I"]) -> Float64[np.ndarray, " I"]:
    r"""Return each item's :math:`-\log_2 (n_i / \sum_j n_j)`, in bits; 0 for items without events.

    The mean over a list is its novelty: higher is more novel, and a catalogue of `m` equally
    popular items gives :math:`\log_2 m`.

    Args:
        count_I: Training events of each item.

    References:
        Zhou et al., "Solving the apparent diversity-accuracy dilemma of recommender systems",
        PNAS 2010, https://doi.org/10.1073/pnas.1000488107. Departure: the share is of events,
        not of users, so that repeated events cannot make it exceed 1.
    """
    share_I = count_I / max(1, count_I.sum())
    bits_I: np.ndarray = -np.log2(share_I, out=np.zeros(len(count_I)), where=share_I > 0)
    return bits_I

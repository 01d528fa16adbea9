r"""Metrics of ranked lists, with equal scores as expectations over random orders.

Equal scores form a group that fills consecutive positions, and every order inside a group is
equally likely. The inputs of a metric are then exact expectations, not draws. A group of `g` items,
`r` of them targets, that starts after `h` better targets, has at its j-th position (j = 0, 1, …)

.. math::
    P(\text{target}) = \frac rg \qquad
    P(\text{no target yet} \mid h = 0) = \prod_{i \le j} \Bigl(1 - \frac{r}{g - i}\Bigr)^+ \qquad
    E[\text{targets so far} \cdot 1(\text{target})]
        = \frac rg \Bigl(h + 1 + j\,\frac{r - 1}{g - 1}\Bigr)

so a constant scorer gets the figure of chance with any sort. Without equal scores, all three are 0
or whole numbers.

Shape legend: B queries of a block, I items, K places of a list, N targets of the block, U users,
R rows, M metrics.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

_BLOCK_ELEMENTS = 2**20
"""Number of scores that are processed together if equal ones are drawn from."""


class Top(NamedTuple):
    """The best items of each query, best first, with their groups of equal scores.

    K is limited to the size of the catalogue. Excluded items are at the end, with score -inf.
    """

    item_BK: Int64[np.ndarray, "B K"]
    score_BK: Float[np.ndarray, "B K"]
    start_BK: Int64[np.ndarray, "B K"]
    """Position at which this position's group of equal scores starts."""
    size_BK: Int64[np.ndarray, "B K"]
    """Number of candidates of that group in the whole catalogue; 0 for excluded items."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Hits:
    """All inputs of an accuracy metric of a list."""

    relevance_BK: Float64[np.ndarray, "B K"]
    """Probability that a target is at this position."""
    first_BK: Float64[np.ndarray, "B K"]
    """Probability that the first target of the list is at this position."""
    so_far_BK: Float64[np.ndarray, "B K"]
    """Expected number of targets up to and including this position; 0 if it has no target."""
    num_targets_B: Int64[np.ndarray, " B"]
    """Number of targets, at least 1; a target that is not a candidate is never found."""


def best(score_BI: Float[Tensor, "B I"], k: int) -> Top:
    """Return the `k` best items of each query and their groups of equal scores.

    Args:
        score_BI: Higher is better; -inf marks an excluded item. Never NaN.
        k: At least 1.
    """
    num_items = score_BI.shape[1]
    width = min(k, num_items)
    top = score_BI.topk(min(k + 1, num_items))  # one more, to see whether the last group continues
    all_BK, item_BK = top.values.cpu().numpy(), top.indices[:, :width].cpu().numpy()
    score_BK = all_BK[:, :width]
    starts_BK = np.ones(score_BK.shape, dtype=bool)
    starts_BK[:, 1:] = score_BK[:, 1:] != score_BK[:, :-1]
    position_K = np.arange(width)
    start_BK = np.maximum.accumulate(np.where(starts_BK, position_K, 0), axis=1)
    ends_BK = np.ones(score_BK.shape, dtype=bool)
    ends_BK[:, :-1] = starts_BK[:, 1:]
    last_BK = np.where(ends_BK, position_K, width)
    size_BK = np.minimum.accumulate(last_BK[:, ::-1], axis=1)[:, ::-1] + 1 - start_BK
    if all_BK.shape[1] > width:
        goes_on = np.flatnonzero(np.isfinite(all_BK[:, -1]) & (all_BK[:, -1] == score_BK[:, -1]))
        if len(goes_on):
            last_score = torch.from_numpy(score_BK[goes_on, -1:].copy()).to(score_BI.device)
            rows = torch.from_numpy(goes_on).to(score_BI.device)
            equal_RI = (score_BI[rows] == last_score).cpu().numpy()
            whole = np.count_nonzero(equal_RI, axis=1)  # nine times as fast as torch.sum
            in_last = start_BK[goes_on] == start_BK[goes_on, -1:]
            size_BK[goes_on] = np.where(in_last, whole[:, None], size_BK[goes_on])
    size_BK[np.isneginf(score_BK)] = 0
    return Top(item_BK, score_BK, start_BK, size_BK)


def all_equal(num_B: Int64[np.ndarray, " B"], width: int) -> Top:
    """Return the lists of a scorer that gives every candidate the same score, as chance does.

    Args:
        num_B: Number of candidates of each query.
        width: K.
    """
    position_BK = np.broadcast_to(np.arange(width), (len(num_B), width))
    is_candidate_BK = position_BK < num_B[:, None]
    return Top(
        item_BK=np.full(position_BK.shape, -1),
        score_BK=np.where(is_candidate_BK, 0.0, -np.inf),
        start_BK=np.where(is_candidate_BK, 0, num_B[:, None]),
        size_BK=np.where(is_candidate_BK, num_B[:, None], 0),
    )


def place(
    top: Top, row_N: Int64[np.ndarray, " N"], score_N: Float[np.ndarray, " N"]
) -> tuple[Int64[np.ndarray, " N"], Int64[np.ndarray, " N"]]:
    """Return how many candidates are better than each target, and how many are equal (with itself).

    Args:
        top: The lists.
        row_N: Each target's query.
        score_N: Each target's score; -inf if it is not a candidate.

    Returns:
        Both are exact for targets that may be in the list. For the others, `better` is K or more,
        and `equal` is 1.
    """
    width = top.score_BK.shape[1]
    better_N = np.full(len(row_N), width, dtype=np.int64)
    equal_N = np.ones(len(row_N), dtype=np.int64)
    near = np.flatnonzero((score_N >= top.score_BK[row_N, -1]) & ~np.isneginf(score_N))
    # Scores descend along a row, so binary search finds the first that is not better.
    low, high = np.zeros(len(near), np.int64), np.full(len(near), width, np.int64)
    for _ in range(width.bit_length()):
        middle = (low + high) // 2
        is_better = top.score_BK[row_N[near], middle] > score_N[near]
        low, high = np.where(is_better, middle + 1, low), np.where(is_better, high, middle)
    better_N[near] = low
    equal_N[near] = top.size_BK[row_N[near], low]
    return better_N, equal_N


def settle(top: Top, row_N: Int64[np.ndarray, " N"], score_N: Float[np.ndarray, " N"]) -> Hits:
    """Return the positions of the targets, with ties as expectations (see the top of the file).

    Args:
        top: The lists.
        row_N: Each target's query; the targets of a query are distinct.
        score_N: Each target's score; -inf if it is not a candidate.
    """
    num_queries, width = top.score_BK.shape
    better_N, _ = place(top, row_N, score_N)
    near = better_N < width
    targets_at = np.zeros((num_queries, width), dtype=np.int64)
    np.add.at(targets_at, (row_N[near], better_N[near]), 1)  # at the start of the group
    r_BK = np.take_along_axis(targets_at, top.start_BK, axis=1)
    h_BK = np.cumsum(targets_at, axis=1) - r_BK
    g_BK = np.maximum(top.size_BK, 1)
    j_BK = np.arange(width) - top.start_BK
    relevance_BK = r_BK / g_BK
    missed_BK = np.cumprod(np.maximum(1 - r_BK / np.maximum(g_BK - j_BK, 1), 0), axis=1)
    within_BK = j_BK * (r_BK - 1) / np.maximum(g_BK - 1, 1)
    return Hits(
        relevance_BK=relevance_BK,
        first_BK=-np.diff(missed_BK, axis=1, prepend=1.0),
        so_far_BK=relevance_BK * (h_BK + 1 + within_BK),
        num_targets_B=np.bincount(row_N, minlength=num_queries),
    )


def draw_lists(
    score_BI: Float[Tensor, "B I"], top: Top, key_B: Int64[np.ndarray, " B"], *, seed: int
) -> Int64[np.ndarray, "B K"]:
    """Return one list per query, with equal scores in random order, padded with -1.

    The order depends on the seed, the query's key and the items, not on the block, on K, or on the
    sort.

    Args:
        score_BI: The scores that `top` was computed from.
        top: The lists; positions with a unique score are not changed.
        key_B: A unique number for each query, independent of its position.
        seed: Decides the order of equal scores.
    """
    item_BK = np.where(top.size_BK > 0, top.item_BK, -1)
    width = item_BK.shape[1]
    rows = np.flatnonzero(top.size_BK[:, -1] > width - top.start_BK[:, -1])
    step = max(1, _BLOCK_ELEMENTS // score_BI.shape[1])
    for begin in range(0, len(rows), step):
        part = rows[begin : begin + step]
        drawn_RK = _draw(score_BI, part, top.score_BK[part, -1:], key_B[part], width, seed=seed)
        place_RK = np.arange(width) - top.start_BK[part, -1:]
        filled_RK = np.take_along_axis(drawn_RK, np.maximum(place_RK, 0), axis=1)
        item_BK[part] = np.where(place_RK >= 0, filled_RK, item_BK[part])
    rows = np.flatnonzero((top.size_BK > 1).any(axis=1))
    noise_BK = noise(key_B[rows, None], item_BK[rows], seed)
    order_BK = np.lexsort((-noise_BK, top.start_BK[rows]), axis=1)
    item_BK[rows] = np.take_along_axis(item_BK[rows], order_BK, axis=1)
    return item_BK


def chance_within(
    better_N: Int64[np.ndarray, " N"], equal_N: Int64[np.ndarray, " N"], k: int
) -> Float64[np.ndarray, " N"]:
    """Return each target's probability of being among the `k` best."""
    chance_N: np.ndarray = np.clip(k - better_N, 0, equal_N) / equal_N
    return chance_N


def _draw(
    score_BI: Float[Tensor, "B I"],
    row_R: Int64[np.ndarray, " R"],
    score_R1: Float[np.ndarray, "R 1"],
    key_R: Int64[np.ndarray, " R"],
    k: int,
    *,
    seed: int,
) -> Int64[np.ndarray, "R K"]:
    """Draw items of one score in each row, without replacement."""
    on = score_BI.device
    wanted_R1 = torch.from_numpy(score_R1.copy()).to(on)
    pair_P2 = (score_BI[torch.from_numpy(row_R).to(on)] == wanted_R1).nonzero().cpu().numpy()
    lot_RI = torch.full((len(row_R), score_BI.shape[1]), -1, dtype=torch.int64)
    lot_RI.numpy()[pair_P2[:, 0], pair_P2[:, 1]] = noise(key_R[pair_P2[:, 0]], pair_P2[:, 1], seed)
    return lot_RI.topk(k).indices.numpy()


def noise(
    key: Int64[np.ndarray, "..."], item: Int64[np.ndarray, "*S"], seed: int
) -> Int64[np.ndarray, "*S"]:
    """Return 63 random bits for each (seed, key, item): splitmix64 of their mixture."""
    bits = key.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed & (2**64 - 1))
    for part in (item.astype(np.uint64), np.uint64(0)):
        bits = bits + part * np.uint64(0xD1B54A32D192ED03) + np.uint64(0x9E3779B97F4A7C15)
        bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        bits = bits ^ (bits >> np.uint64(31))
    return (bits >> np.uint64(1)).astype(np.int64)


def list_mean(
    item_BK: Int64[np.ndarray, "B K"], value_I: Float64[np.ndarray, " I"], k: int
) -> Float64[np.ndarray, " B"]:
    """Return the mean of `value_I` over the first `k` positions of each list.

    Args:
        item_BK: Best first; padding with -1 is left out of the mean.
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
    """Return the probability that at least one target is among the first `k`, in [0, 1].

    Also called Success@k and, if each query has one target, Recall@k.
    """
    chance_B: np.ndarray = hits.first_BK[:, :k].sum(axis=1)
    return chance_B


def recall(hits: Hits, k: int) -> Float64[np.ndarray, " B"]:
    r"""Return the expected share of the targets that are among the first `k`, in [0, 1].

    .. math:: \frac{1}{n} \sum_{p \le k} \text{rel}_p

    with `n` the number of targets. RecBole and ranx divide by `n` too; some papers divide by min(k,
    n), so that 1 is always possible.
    """
    share_B: np.ndarray = hits.relevance_BK[:, :k].sum(axis=1) / hits.num_targets_B
    return share_B


def precision(hits: Hits, k: int) -> Float64[np.ndarray, " B"]:
    r"""Return the expected share of the first `k` positions that have a target, in [0, 1].

    .. math:: \frac{1}{k} \sum_{p \le k} \text{rel}_p

    The divisor is `k` even if the catalogue has fewer items.
    """
    share_B: np.ndarray = hits.relevance_BK[:, :k].sum(axis=1) / k
    return share_B


def average_precision(hits: Hits, k: int) -> Float64[np.ndarray, " B"]:
    r"""Return the expected mean of the precision at each target found, in [0, 1].

    .. math:: \frac{1}{\min(k, n)} \sum_{p \le k} \text{rel}_p \cdot \text{precision}_p

    with `n` the number of targets. The divisor is min(k, n), as in RecBole and Kaggle contests, so
    that a perfect list gets 1; ranx, trec_eval and RecTools divide by `n`.
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
    r"""Return the expected discounted gain divided by that of the ideal list, in [0, 1].

    .. math:: \frac{\sum_{p \le k} \text{rel}_p / \log_2(p + 1)}
                    {\sum_{p \le \min(k, n)} 1 / \log_2(p + 1)}

    with `n` the number of targets, each of gain 1: the ideal list has min(k, n) of them on top,
    as in ranx, trec_eval and scikit-learn. In a few libraries, the ideal list has `k` hits.

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
    """Return the share of the catalogue that is in at least one list, in [0, 1].

    Args:
        shown_I: Items in some list.
        known_I: The catalogue: items that can be recommended.
    """
    return float(shown_I[known_I].mean())


HEAD_SHARE = 0.2
"""The share of the catalogue that counts as the popular head."""


def popularity_rank(count_I: Int64[np.ndarray, " I"]) -> Int64[np.ndarray, " I"]:
    """Return the number of items with more events; items with equal counts share a rank."""
    descending_I = -np.sort(-count_I)
    return np.searchsorted(-descending_I, -count_I, side="left").astype(np.int64)


def head_membership(count_I: Int64[np.ndarray, " I"]) -> Float64[np.ndarray, " I"]:
    """Return each item's membership of the most popular fifth of the catalogue.

    It is 1 in the head and 0 in the tail; items that tie with the last of the head share its rest.
    The mean over a list is its popularity share; random lists get 0.2.

    Args:
        count_I: Training events of each item; items without one are not part of the catalogue.
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


def mean_by_user(
    user_R: Int64[np.ndarray, " R"], values_RM: Float64[np.ndarray, "R M"]
) -> tuple[Int64[np.ndarray, " U"], Float64[np.ndarray, "U M"]]:
    """Return the users that occur, ascending, and the mean of each over its rows."""
    user_U, row_R, count_U = np.unique(user_R, return_inverse=True, return_counts=True)
    sums = [np.bincount(row_R, values_RM[:, m], len(user_U)) for m in range(values_RM.shape[1])]
    return user_U, np.stack(sums, axis=1) / count_U[:, None]


_CHUNK_ELEMENTS = 2**22
"""Number of weights in memory at once; it is fixed, so that it does not affect results."""


class Interval(NamedTuple):
    """A 95 % confidence interval of a mean over users."""

    low: float
    high: float


def bootstrap_means(
    values_UM: Float64[np.ndarray, "U M"], *, resamples: int, seed: int
) -> Float64[np.ndarray, "R M"]:
    """Return the mean of each column over R resamples of users with replacement.

    All columns of a drawn user are used, so differences between columns are paired.

    Args:
        values_UM: One row per user, at least one.
        resamples: R.
        seed: Decides the draw.

    References:
        Efron, "Bootstrap Methods: Another Look at the Jackknife", Annals of Statistics 1979.
    """
    chunks = drawn_again(len(values_UM), resamples=resamples, seed=seed)
    empty = np.empty((0, values_UM.shape[1]))
    return np.concatenate([empty, *(times_RU @ values_UM / len(values_UM) for times_RU in chunks)])


def drawn_again(
    num_users: int, *, resamples: int, seed: int
) -> Iterator[Float64[np.ndarray, "R U"]]:
    """Yield, some resamples at a time, how often each user was drawn with replacement.

    Args:
        num_users: U, at least one; each resample draws U users.
        resamples: R, the total number.
        seed: Decides the draw.
    """
    generator = np.random.default_rng(seed)
    step = max(1, _CHUNK_ELEMENTS // num_users)
    for begin in range(0, resamples, step):
        rows = min(step, resamples - begin)
        drawn_RU = generator.integers(0, num_users, size=(rows, num_users))
        drawn_RU += np.arange(rows)[:, None] * num_users
        times = np.bincount(drawn_RU.reshape(-1), minlength=rows * num_users)
        yield times.reshape(rows, num_users).astype(np.float64)


def bootstrap_intervals(
    values_UM: Float64[np.ndarray, "U M"], *, resamples: int, seed: int
) -> list[Interval]:
    """Return the 95 % percentile interval of each column's mean over users."""
    means_RM = bootstrap_means(values_UM, resamples=resamples, seed=seed)
    return [percentile_interval(means_R) for means_R in means_RM.T]


def percentile_interval(value_R: Float64[np.ndarray, " R"]) -> Interval:
    """Return the interval of the middle 95 % of resampled values, ignoring NaN."""
    low, high = np.nanquantile(value_R, [0.025, 0.975])
    return Interval(float(low), float(high))

"""AUC within each user: does the model order what one user was shown.

Shape legend: N rows, U users.
"""

import numpy as np
from jaxtyping import Float, Float64, Int64

from foretaste.errors import DataError
from foretaste.evaluation.metrics.labels import checked_labels, checked_predictions


def user_auc(
    label_N: Float[np.ndarray, " N"],
    score_N: Float[np.ndarray, " N"],
    user_N: Int64[np.ndarray, " N"],
    *,
    num_users: int,
) -> Float64[np.ndarray, " U"]:
    """Return each user's AUC over the user's own rows, NaN where they are of one class.

    Args:
        label_N: 0 or 1.
        score_N: Any real numbers, higher is better.
        user_N: In [0, num_users).
        num_users: U.

    Raises:
        DataError: A label is neither 0 nor 1.
        NonFiniteError: A score is NaN or infinite.
    """
    label_N, score_N = checked_labels(label_N), checked_predictions(score_N)
    order = np.lexsort((score_N, user_N))
    label_N, score_N, user_N = label_N[order], score_N[order], user_N[order]
    starts_N = np.ones(len(order), dtype=bool)
    starts_N[1:] = (np.diff(user_N) != 0) | (np.diff(score_N) != 0)
    group_N = np.cumsum(starts_N) - 1
    first_G = np.flatnonzero(starts_N)
    positive_G, size_G = np.bincount(group_N, label_N), np.bincount(group_N)
    negative_G, user_G = size_G - positive_G, user_N[first_G]
    positive_U = np.bincount(user_G, positive_G, num_users)
    negative_U = np.bincount(user_G, negative_G, num_users)
    before_U = np.cumsum(negative_U) - negative_U
    below_G = np.cumsum(negative_G) - before_U[user_G] - negative_G / 2
    won_U = np.bincount(user_G, positive_G * below_G, num_users)
    pairs_U = positive_U * negative_U
    auc_U: np.ndarray = np.full(num_users, np.nan)
    np.divide(won_U, pairs_U, out=auc_U, where=pairs_U > 0)
    return auc_U


def gauc(
    label_N: Float[np.ndarray, " N"],
    score_N: Float[np.ndarray, " N"],
    user_N: Int64[np.ndarray, " N"],
) -> float:
    r"""Return the mean over users of their own AUC, weighted by their rows, in [0, 1].

    .. math:: \frac{\sum_u n_u \text{AUC}_u}{\sum_u n_u}

    Over users that have rows of both classes; the others cannot be ordered rightly or wrongly.

    Raises:
        DataError: No user has both, or a label is neither 0 nor 1.
        NonFiniteError: A score is NaN or infinite.

    References:
        Zhu et al., "Optimized Cost per Click in Taobao Display Advertising", KDD 2017,
        https://arxiv.org/abs/1703.02091
    """
    _, place_N = np.unique(user_N, return_inverse=True)
    rows_U = np.bincount(place_N)
    auc_U = user_auc(label_N, score_N, place_N, num_users=len(rows_U))
    both_U = ~np.isnan(auc_U)
    if not both_U.any():
        raise DataError(
            f"GAUC orders each user's own rows, and none of {len(rows_U)} users has both a 1 and "
            "a 0: measure AUC instead"
        )
    return float(np.average(auc_U[both_U], weights=rows_U[both_U]))

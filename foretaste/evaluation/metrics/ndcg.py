"""Normalised discounted cumulative gain: hits count more the higher they stand."""

import numpy as np
from jaxtyping import Float64

from foretaste.evaluation.rank import Hits


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

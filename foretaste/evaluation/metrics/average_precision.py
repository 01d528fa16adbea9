"""Average precision, whose mean over users is MAP."""

import numpy as np
from jaxtyping import Float64

from foretaste.evaluation.rank import Hits


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

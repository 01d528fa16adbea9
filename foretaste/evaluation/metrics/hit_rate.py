"""Hit rate: did the list hold a target at all."""

import numpy as np
from jaxtyping import Float64

from foretaste.evaluation.rank import Hits


def hit_rate(hits: Hits, k: int) -> Float64[np.ndarray, " B"]:
    """Return the probability that at least one target stands among the first `k`, in [0, 1].

    Also called Success@k and, where each query has one target, Recall@k.
    """
    chance_B: np.ndarray = hits.first_BK[:, :k].sum(axis=1)
    return chance_B

"""Mean reciprocal rank: how high the first target stands."""

import numpy as np
from jaxtyping import Float64

from foretaste.evaluation.rank import Hits


def mrr(hits: Hits, k: int) -> Float64[np.ndarray, " B"]:
    """Return the expectation of 1 / (position of the first target), 0 beyond `k`, in [0, 1]."""
    position_K = np.arange(1, min(k, hits.first_BK.shape[1]) + 1)
    reciprocal_B: np.ndarray = (hits.first_BK[:, :k] / position_K).sum(axis=1)
    return reciprocal_B

"""Precision: the share of the list that is a target."""

import numpy as np
from jaxtyping import Float64

from foretaste.evaluation.rank import Hits


def precision(hits: Hits, k: int) -> Float64[np.ndarray, " B"]:
    r"""Return the expected share of the first `k` places that hold a target, in [0, 1].

    .. math:: \frac{1}{k} \sum_{p \le k} \text{rel}_p

    Divided by `k` also where the catalogue has fewer items.
    """
    share_B: np.ndarray = hits.relevance_BK[:, :k].sum(axis=1) / k
    return share_B

"""Recall: the share of the targets that the list holds."""

import numpy as np
from jaxtyping import Float64

from foretaste.evaluation.rank import Hits


def recall(hits: Hits, k: int) -> Float64[np.ndarray, " B"]:
    r"""Return the expected share of the targets that stand among the first `k`, in [0, 1].

    .. math:: \frac{1}{n} \sum_{p \le k} \text{rel}_p

    with `n` the number of targets. RecBole and ranx divide by `n` too; some papers divide by
    min(k, n), so that 1 can always be reached.
    """
    share_B: np.ndarray = hits.relevance_BK[:, :k].sum(axis=1) / hits.num_targets_B
    return share_B

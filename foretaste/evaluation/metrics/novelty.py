"""Novelty: how little an item's popularity gives it away."""

import numpy as np
from jaxtyping import Float64, Int64


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

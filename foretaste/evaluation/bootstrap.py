"""How sure a mean over users is: intervals by resampling users, and a paired test.

Shape legend: U users, M metrics, R resamples.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float64

_CHUNK_ELEMENTS = 2**22
"""How many weights are held at once; a fixed size, so it decides no digit."""


class Interval(NamedTuple):
    """A range that holds the mean in 95 of 100 such samples of users."""

    low: float
    high: float


def bootstrap_means(
    values_UM: Float64[np.ndarray, "U M"], *, resamples: int, seed: int
) -> Float64[np.ndarray, "R M"]:
    """Return the mean of each column over users drawn again with replacement, R times.

    A user that is drawn brings all its columns, so differences between columns stay paired.

    Args:
        values_UM: One row per user, at least one.
        resamples: R.
        seed: Decides the draw.

    References:
        Efron, "Bootstrap Methods: Another Look at the Jackknife", Annals of Statistics 1979.
    """
    num_users = len(values_UM)
    generator = np.random.default_rng(seed)
    means_RM = np.empty((resamples, values_UM.shape[1]))
    step = max(1, _CHUNK_ELEMENTS // num_users)
    for begin in range(0, resamples, step):
        rows = min(step, resamples - begin)
        drawn_RU = generator.integers(0, num_users, size=(rows, num_users))
        drawn_RU += np.arange(rows)[:, None] * num_users
        weight = np.bincount(drawn_RU.reshape(-1), minlength=rows * num_users)
        means_RM[begin : begin + rows] = (
            weight.reshape(rows, num_users).astype(np.float64) @ values_UM / num_users
        )
    return means_RM


def bootstrap_intervals(
    values_UM: Float64[np.ndarray, "U M"], *, resamples: int, seed: int
) -> list[Interval]:
    """Return the 95 % percentile interval of each column's mean over users."""
    means_RM = bootstrap_means(values_UM, resamples=resamples, seed=seed)
    low_M, high_M = np.quantile(means_RM, [0.025, 0.975], axis=0)
    return [Interval(float(low), float(high)) for low, high in zip(low_M, high_M, strict=True)]


def sign_flip_p_value(
    difference_U: Float64[np.ndarray, " U"], *, resamples: int, seed: int
) -> float:
    """Return how often luck alone makes a mean difference as large, two-sided, in (0, 1].

    If neither model were better, each user's difference could as well have the other sign: the
    p-value is the share of random signs whose mean is as far from 0, the observed one counted in.

    References:
        Fisher's randomisation test; Smucker et al., "A Comparison of Statistical Significance
        Tests for Information Retrieval Evaluation", CIKM 2007.
    """
    observed = abs(difference_U.sum())
    moving_U = difference_U[difference_U != 0]
    generator = np.random.default_rng(seed)
    tolerance = 1e-12 * np.abs(moving_U).sum()  # sums of the same numbers in another order
    as_far, step = 0, max(1, _CHUNK_ELEMENTS // max(1, len(moving_U)))
    for begin in range(0, resamples, step):
        shape = (min(step, resamples - begin), len(moving_U))
        positive_RU = generator.integers(0, 2, size=shape, dtype=np.int8)
        sums_R = 2 * (positive_RU @ moving_U) - moving_U.sum()
        as_far += int((np.abs(sums_R) >= observed - tolerance).sum())
    return (1 + as_far) / (1 + resamples)

"""How sure a mean over users is: intervals by resampling users, and a paired test.

Shape legend: U users, M metrics, R resamples, P p-values.
"""

from collections.abc import Iterator, Sequence
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
    chunks = drawn_again(len(values_UM), resamples=resamples, seed=seed)
    empty = np.empty((0, values_UM.shape[1]))
    return np.concatenate([empty, *(times_RU @ values_UM / len(values_UM) for times_RU in chunks)])


def drawn_again(
    num_users: int, *, resamples: int, seed: int
) -> Iterator[Float64[np.ndarray, "R U"]]:
    """Give, some resamples at a time, how often each user was drawn with replacement.

    Args:
        num_users: U, at least one; so many are drawn each time.
        resamples: R of all pieces together.
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
    """Return what holds the middle 95 % of resampled values; NaN is not a value."""
    low, high = np.nanquantile(value_R, [0.025, 0.975])
    return Interval(float(low), float(high))


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


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values corrected for how many there are, each in its own place.

    Of P tests whose differences are all luck, the chance that any corrected value is at most .05
    is .05 at most, however the tests depend on each other: the smallest is multiplied by P, the
    next one by P - 1, and so on, and none falls below the one before it.

    References:
        Holm, "A Simple Sequentially Rejective Multiple Test Procedure", Scandinavian Journal of
        Statistics 1979.
    """
    p_P = np.array(p_values)
    order = np.argsort(p_P)
    raised_P = np.maximum.accumulate(p_P[order] * np.arange(len(p_P), 0, -1)).clip(max=1.0)
    found_P = np.empty(len(p_P))
    found_P[order] = raised_P
    return found_P.tolist()

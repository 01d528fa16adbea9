"""Calibration: of what is given 30 %, do 30 % happen.

Shape legend: N rows, M bins.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float, Float64, Int64

from foretaste.evaluation.metrics.labels import checked_labels, checked_probabilities

NUM_BINS = 15
"""As in Guo et al. 2017."""
Bins = Literal["width", "count"]
"""All bins as wide, from 0 to 1; or as many rows in each, as far as equal probabilities allow."""


@dataclass(frozen=True, kw_only=True)
class Reliability:
    """The curve that a calibrated model puts on the diagonal; empty bins are left out."""

    count: tuple[int, ...]
    """Rows of each bin."""
    predicted: tuple[float, ...]
    """Mean probability of each."""
    happened: tuple[float, ...]
    """Share of ones in each."""


def reliability(
    label_N: Float[np.ndarray, " N"],
    probability_N: Float[np.ndarray, " N"],
    *,
    num_bins: int = NUM_BINS,
    bins: Bins = "width",
) -> Reliability:
    """Return what was predicted and what happened, bin by bin, as scikit-learn's curve does.

    Raises:
        DataError: A label is neither 0 nor 1, or a probability is none.
        NonFiniteError: A probability is NaN or infinite.
    """
    label_N, probability_N = checked_labels(label_N), checked_probabilities(probability_N)
    bin_N = bin_of(probability_N, num_bins=num_bins, bins=bins)
    count_M = np.bincount(bin_N, minlength=num_bins)
    kept_M = count_M > 0
    predicted_M = np.bincount(bin_N, probability_N, num_bins)[kept_M] / count_M[kept_M]
    happened_M = np.bincount(bin_N, label_N, num_bins)[kept_M] / count_M[kept_M]
    return Reliability(
        count=tuple(count_M[kept_M].tolist()),
        predicted=tuple(predicted_M.tolist()),
        happened=tuple(happened_M.tolist()),
    )


def calibration_error(
    label_N: Float[np.ndarray, " N"],
    probability_N: Float[np.ndarray, " N"],
    *,
    num_bins: int = NUM_BINS,
    bins: Bins = "width",
) -> float:
    r"""Return the expected calibration error (ECE), in [0, 1]; 0 is calibrated.

    .. math:: \sum_m \frac{n_m}{N} \Big|\bar p_m - \bar y_m\Big|

    Raises:
        DataError: A label is neither 0 nor 1, or a probability is none.
        NonFiniteError: A probability is NaN or infinite.

    References:
        Naeini, Cooper and Hauskrecht, "Obtaining Well Calibrated Probabilities Using Bayesian
        Binning", AAAI 2015; Guo et al., "On Calibration of Modern Neural Networks", ICML 2017,
        https://arxiv.org/abs/1706.04599
    """
    curve = reliability(label_N, probability_N, num_bins=num_bins, bins=bins)
    apart_M = np.abs(np.subtract(curve.predicted, curve.happened))
    return float(np.average(apart_M, weights=curve.count))


def bin_of(
    probability_N: Float64[np.ndarray, " N"], *, num_bins: int = NUM_BINS, bins: Bins = "width"
) -> Int64[np.ndarray, " N"]:
    """Return each row's bin; what lies on an edge belongs below it."""
    edges = np.linspace(0, 1, num_bins + 1)
    if bins == "count":
        edges = np.quantile(probability_N, edges)
    return np.searchsorted(edges[1:-1], probability_N).astype(np.int64)

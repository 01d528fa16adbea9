"""Log loss: how surprised a probability is by what happened.

Shape legend: N rows.
"""

import numpy as np
from jaxtyping import Float, Float64

from foretaste.evaluation.metrics.labels import checked_labels, checked_probabilities


def row_log_loss(
    label_N: Float[np.ndarray, " N"], probability_N: Float[np.ndarray, " N"]
) -> Float64[np.ndarray, " N"]:
    """Return each row's loss, in nats.

    Probabilities are kept 2.2e-16 away from 0 and 1, as in scikit-learn.

    Raises:
        DataError: A label is neither 0 nor 1, or a probability is none.
        NonFiniteError: A probability is NaN or infinite.
    """
    label_N, probability_N = checked_labels(label_N), checked_probabilities(probability_N)
    eps = np.finfo(np.float64).eps
    kept_N = np.clip(probability_N, eps, 1 - eps)
    loss_N: np.ndarray = -np.log(np.where(label_N == 1, kept_N, 1 - kept_N))
    return loss_N


def log_loss(
    label_N: Float[np.ndarray, " N"],
    probability_N: Float[np.ndarray, " N"],
    weight_N: Float64[np.ndarray, " N"] | None = None,
) -> float:
    r"""Return the mean log loss, in nats: 0 is perfect, ln 2 is a coin.

    .. math:: -\frac{1}{N} \sum_n y_n \ln p_n + (1 - y_n) \ln(1 - p_n)

    Raises:
        DataError: A label is neither 0 nor 1, or a probability is none.
        NonFiniteError: A probability is NaN or infinite.
    """
    return float(np.average(row_log_loss(label_N, probability_N), weights=weight_N))

"""Root mean squared error.

Shape legend: N rows.
"""

import numpy as np
from jaxtyping import Float, Float64

from foretaste.evaluation.metrics.labels import checked_predictions


def rmse(
    label_N: Float[np.ndarray, " N"],
    value_N: Float[np.ndarray, " N"],
    weight_N: Float64[np.ndarray, " N"] | None = None,
) -> float:
    r"""Return :math:`\sqrt{\frac{1}{N} \sum_n (\hat y_n - y_n)^2}`, in the label's unit.

    Raises:
        DataError: There is no row.
        NonFiniteError: A value is NaN or infinite.
    """
    error_N = checked_predictions(value_N) - label_N
    return float(np.sqrt(np.average(error_N**2, weights=weight_N)))

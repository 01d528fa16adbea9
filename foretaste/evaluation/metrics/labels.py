"""What pointwise metrics ask of their columns.

Shape legend: N rows.
"""

import numpy as np
from jaxtyping import Float, Float64

from foretaste.errors import DataError, NonFiniteError


def checked_labels(label_N: Float[np.ndarray, " N"]) -> Float64[np.ndarray, " N"]:
    """Return the labels of a binary task in double precision.

    Raises:
        DataError: One is neither 0 nor 1, or is missing.
    """
    wrong_N = (label_N != 0) & (label_N != 1)
    if wrong_N.any():
        row = int(np.argmax(wrong_N))
        raise DataError(f"label {label_N[row]:g} of row {row} is neither 0 nor 1: leave it out")
    return label_N.astype(np.float64)


def checked_predictions(prediction_N: Float[np.ndarray, " N"]) -> Float64[np.ndarray, " N"]:
    """Return predictions in double precision.

    Raises:
        DataError: There is none.
        NonFiniteError: One is NaN or infinite.
    """
    if len(prediction_N) == 0:
        raise DataError("there is no labelled row: nothing can be measured")
    if not np.isfinite(prediction_N).all():
        row = int(np.argmin(np.isfinite(prediction_N)))
        raise NonFiniteError(
            f"the prediction of row {row} is {prediction_N[row]}: the model is broken, train it "
            "anew"
        )
    return prediction_N.astype(np.float64)


def checked_probabilities(probability_N: Float[np.ndarray, " N"]) -> Float64[np.ndarray, " N"]:
    """Return probabilities in double precision.

    Raises:
        DataError: There is none, or one lies outside of [0, 1].
        NonFiniteError: One is NaN or infinite.
    """
    found_N = checked_predictions(probability_N)
    if found_N.min() < 0 or found_N.max() > 1:
        row = int(np.argmax((found_N < 0) | (found_N > 1)))
        raise DataError(f"{found_N[row]:g} of row {row} is no probability: give [0, 1], not logits")
    return found_N

"""Making probabilities mean what they say, after training: Platt's line or a rising staircase.

Fitted on validation rows, used on others; neither changes the order of a task's rows, but for
ties that isotonic regression makes.

Shape legend: N rows.
"""

from typing import Annotated, Literal, assert_never

import numpy as np
from jaxtyping import Float, Float64
from pydantic import Field
from scipy.optimize import isotonic_regression

from foretaste.config import Config
from foretaste.errors import DataError
from foretaste.evaluation.metrics.labels import checked_labels, checked_probabilities

_MOST_STEPS = 100


class PlattCalibration(Config):
    r"""A line through the logits: :math:`\sigma(a \ln \frac{p}{1 - p} + b)`."""

    kind: Literal["platt"] = "platt"
    slope: float
    """Above 0; below 1 where the model was too sure of itself."""
    intercept: float


class IsotonicCalibration(Config):
    """A rising line of straight pieces, level beyond its ends."""

    kind: Literal["isotonic"] = "isotonic"
    at: tuple[float, ...] = Field(min_length=1)
    """Probabilities, ascending."""
    gives: tuple[float, ...] = Field(min_length=1)
    """What becomes of each, never falling."""


Calibration = Annotated[PlattCalibration | IsotonicCalibration, Field(discriminator="kind")]
Method = Literal["platt", "isotonic"]


def fit_calibration(
    method: Method, label_N: Float[np.ndarray, " N"], probability_N: Float[np.ndarray, " N"]
) -> PlattCalibration | IsotonicCalibration:
    """Learn from rows that training did not see what a model's probabilities mean.

    Args:
        method: "platt" has two numbers to learn and needs few rows; "isotonic" follows any rising
            curve and wants a thousand or more.
        label_N: 0 or 1.
        probability_N: What the model gave.

    Raises:
        DataError: There are rows of one class only, a label is neither 0 nor 1, or a probability
            is none.
        NonFiniteError: A probability is NaN or infinite.
    """
    label_N, probability_N = checked_labels(label_N), checked_probabilities(probability_N)
    if label_N.min() == label_N.max():
        raise DataError(
            f"all {len(label_N)} labels are {label_N[0]:g}: a calibration needs rows of both"
        )
    match method:
        case "platt":
            return _fit_platt(label_N, _logit(probability_N))
        case "isotonic":
            return _fit_isotonic(label_N, probability_N)
        case _:
            assert_never(method)


def calibrated(
    calibration: PlattCalibration | IsotonicCalibration, probability_N: Float[np.ndarray, " N"]
) -> Float64[np.ndarray, " N"]:
    """Return what a model's probabilities become."""
    match calibration:
        case PlattCalibration():
            line_N = calibration.slope * _logit(probability_N) + calibration.intercept
            return _sigmoid(line_N)
        case IsotonicCalibration():
            found_N: np.ndarray = np.interp(probability_N, calibration.at, calibration.gives)
            return found_N


def _fit_platt(
    label_N: Float64[np.ndarray, " N"], logit_N: Float64[np.ndarray, " N"]
) -> PlattCalibration:
    """Find the line of greatest likelihood by Newton's method, halving steps that overshoot.

    References:
        Platt, "Probabilistic Outputs for Support Vector Machines and Comparisons to Regularized
        Likelihood Methods", 1999: labels are drawn in by one row of each class, so that rows that
        a line parts perfectly have a finite answer too.
    """
    ones = label_N.sum()
    target_N = np.where(label_N == 1, (ones + 1) / (ones + 2), 1 / (len(label_N) - ones + 2))
    input_N2 = np.stack([logit_N, np.ones(len(logit_N))], axis=1)
    line_2 = np.array([1.0, 0.0])
    loss = _line_loss(input_N2 @ line_2, target_N)
    for _ in range(_MOST_STEPS):
        share_N = _sigmoid(input_N2 @ line_2)
        slope_2 = input_N2.T @ (share_N - target_N)
        bend_22 = (input_N2.T * (share_N * (1 - share_N))) @ input_N2
        step_2 = np.linalg.lstsq(bend_22, slope_2, rcond=None)[0]
        size = 1.0
        while (moved := _line_loss(input_N2 @ (line_2 - size * step_2), target_N)) > loss:
            size /= 2
            if size < 1e-9:
                break
        if loss - moved < 1e-12 * max(1.0, loss):
            break
        line_2, loss = line_2 - size * step_2, moved
    return PlattCalibration(slope=float(line_2[0]), intercept=float(line_2[1]))


def _fit_isotonic(
    label_N: Float64[np.ndarray, " N"], probability_N: Float64[np.ndarray, " N"]
) -> IsotonicCalibration:
    """Pool adjacent violators over distinct probabilities; only the ends of a stair are kept.

    **Departure**: a lowest stair of 0 and a highest of 1 are drawn in to one of its n + 2 rows, not
    beyond the next stair: "never" and "always" would cost without bound when they are wrong.
    """
    at, place_N, count = np.unique(probability_N, return_inverse=True, return_counts=True)
    mean = np.bincount(place_N, label_N) / count
    gives: np.ndarray = isotonic_regression(mean, weights=count.astype(np.float64)).x
    levels, stair = np.unique(gives, return_inverse=True)
    rows = np.bincount(stair, count)
    if len(levels) > 1:
        lowest, highest = levels[0], levels[-1]
        levels[0] = max(lowest, min(levels[1], 1 / (rows[0] + 2)))
        levels[-1] = min(highest, max(levels[-2], 1 - 1 / (rows[-1] + 2)))
    gives = levels[stair]
    level = np.diff(gives) == 0
    inner = np.append(level, False) & np.insert(level, 0, False)  # level on both sides
    return IsotonicCalibration(at=tuple(at[~inner].tolist()), gives=tuple(gives[~inner].tolist()))


def _line_loss(line_N: Float64[np.ndarray, " N"], target_N: Float64[np.ndarray, " N"]) -> float:
    return float((np.logaddexp(0, line_N) - target_N * line_N).sum())


def _logit(probability_N: Float[np.ndarray, " N"]) -> Float64[np.ndarray, " N"]:
    eps = np.finfo(np.float64).eps
    kept_N = np.clip(probability_N.astype(np.float64), eps, 1 - eps)
    found_N: np.ndarray = np.log(kept_N) - np.log1p(-kept_N)
    return found_N


def _sigmoid(line_N: Float64[np.ndarray, " N"]) -> Float64[np.ndarray, " N"]:
    found_N: np.ndarray = np.exp(-np.logaddexp(0, -line_N))
    return found_N

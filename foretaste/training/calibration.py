"""Calibration of predicted probabilities: the fitted maps, and how they are applied.

Shape legend: N rows, in any shape.
"""

from typing import Annotated, Literal

import numpy as np
from jaxtyping import Float, Float64
from pydantic import Field

from foretaste.config import Config


class PlattCalibration(Config):
    r"""A line through the logits: :math:`\sigma(a \ln \frac{p}{1 - p} + b)`."""

    kind: Literal["platt"] = "platt"
    slope: float
    """The factor a, above 0. It is below 1 if the model was too confident."""
    intercept: float
    """The constant b."""


class IsotonicCalibration(Config):
    """A non-decreasing piecewise linear function, constant outside its range."""

    kind: Literal["isotonic"] = "isotonic"
    at: tuple[float, ...] = Field(min_length=1)
    """Probabilities at the breakpoints, ascending."""
    gives: tuple[float, ...] = Field(min_length=1)
    """The calibrated probability at each breakpoint, non-decreasing."""


Calibration = Annotated[PlattCalibration | IsotonicCalibration, Field(discriminator="kind")]


def calibrated(
    calibration: PlattCalibration | IsotonicCalibration, probability_N: Float[np.ndarray, "*N"]
) -> Float64[np.ndarray, "*N"]:
    """Return a model's probabilities after calibration; NaN stays NaN."""
    match calibration:
        case PlattCalibration():
            line_N = calibration.slope * logit(probability_N) + calibration.intercept
            return sigmoid(line_N)
        case IsotonicCalibration():
            found_N: np.ndarray = np.interp(probability_N, calibration.at, calibration.gives)
            return found_N


def logit(probability_N: Float[np.ndarray, "*N"]) -> Float64[np.ndarray, "*N"]:
    """Return log odds; probabilities are clipped to [epsilon, 1 - epsilon] first."""
    eps = np.finfo(np.float64).eps
    kept_N = np.clip(probability_N.astype(np.float64), eps, 1 - eps)
    found_N: np.ndarray = np.log(kept_N) - np.log1p(-kept_N)
    return found_N


def sigmoid(line_N: Float64[np.ndarray, "*N"]) -> Float64[np.ndarray, "*N"]:
    """Return the probability of log odds."""
    found_N: np.ndarray = np.exp(-np.logaddexp(0, -line_N))
    return found_N

"""Fitting what a model's probabilities mean: Platt's line or a rising staircase.

Fitted on validation rows, used on others; neither changes the order of a task's rows, but for
ties that isotonic regression makes.

Shape legend: N rows.
"""

from typing import Literal, assert_never

import numpy as np
from jaxtyping import Float, Float64

from foretaste.errors import DataError
from foretaste.evaluation.row_metrics import checked_labels, checked_probabilities
from foretaste.later import later
from foretaste.training.calibration import (
    IsotonicCalibration,
    PlattCalibration,
    logit,
    sigmoid,
)

optimize = later("scipy.optimize")

Method = Literal["platt", "isotonic"]
_MOST_STEPS = 100
_STEEPEST = 1.0
"""How much isotonic regression may rise for each unit of the logit; of the logistic curve itself,
which changes no probability, it is a quarter at most."""


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
            f"all {len(label_N)} labels are {label_N[0]:g}: a calibration needs rows of both",
            name="labels",
            value=float(label_N[0]),
        )
    match method:
        case "platt":
            return _fit_platt(label_N, logit(probability_N))
        case "isotonic":
            return _fit_isotonic(label_N, probability_N)
        case _:
            assert_never(method)


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
        share_N = sigmoid(input_N2 @ line_2)
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

    **Departures**: a lowest stair of 0 and a highest of 1 are drawn in to one of its n + 2 rows,
    not beyond the next stair: "never" and "always" would cost without bound when they are wrong.
    Steps become slopes (`_eased`).
    """
    at, place_N, count = np.unique(probability_N, return_inverse=True, return_counts=True)
    mean = np.bincount(place_N, label_N) / count
    gives: np.ndarray = optimize.isotonic_regression(mean, weights=count.astype(np.float64)).x
    levels, stair = np.unique(gives, return_inverse=True)
    rows = np.bincount(stair, count)
    if len(levels) > 1:
        lowest, highest = levels[0], levels[-1]
        levels[0] = max(lowest, min(levels[1], 1 / (rows[0] + 2)))
        levels[-1] = min(highest, max(levels[-2], 1 - 1 / (rows[-1] + 2)))
    gives = _eased(at, levels[stair])
    level = np.diff(gives) == 0
    inner = np.append(level, False) & np.insert(level, 0, False)  # level on both sides
    return IsotonicCalibration(at=tuple(at[~inner].tolist()), gives=tuple(gives[~inner].tolist()))


def _eased(
    at: Float64[np.ndarray, " N"], gives: Float64[np.ndarray, " N"]
) -> Float64[np.ndarray, " N"]:
    """Rise no steeper than `_STEEPEST`: half of a step is taken before it, half behind it.

    A logit's last digits differ with how many rows are judged at once, and a step between two that
    lie 1e-5 apart would make ten thousand times as much of it: answers would not be those measured.
    """
    line = _STEEPEST * logit(at)
    late = line + np.minimum.accumulate(gives - line)
    early = line + np.maximum.accumulate((gives - line)[::-1])[::-1]
    eased: np.ndarray = np.maximum.accumulate(((late + early) / 2).round(12))  # level is level
    return eased


def _line_loss(line_N: Float64[np.ndarray, " N"], target_N: Float64[np.ndarray, " N"]) -> float:
    return float((np.logaddexp(0, line_N) - target_N * line_N).sum())

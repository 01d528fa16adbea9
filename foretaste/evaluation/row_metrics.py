"""Pointwise metrics of labelled rows with a bootstrap over users, and calibrations.

A drawn user brings all its rows, which accounts for the dependence between them. Calibrations are
fitted on validation rows and applied to others; they keep the order of a task's rows, except for
ties from isotonic regression.

Shape legend: N rows, U users, R resamples, T tasks, M bins, G distinct scores.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, assert_never, final

import numpy as np
from jaxtyping import Float, Float64, Int64

from foretaste.data.tasks import Task
from foretaste.errors import DataError, NonFiniteError
from foretaste.evaluation.list_metrics import drawn_again
from foretaste.later import later
from foretaste.training.trained import (
    IsotonicCalibration,
    PlattCalibration,
    logit,
    sigmoid,
)


def checked_labels(label_N: Float[np.ndarray, " N"]) -> Float64[np.ndarray, " N"]:
    """Return the labels of a binary task in double precision.

    Raises:
        DataError: A label is neither 0 nor 1, or is missing.
    """
    wrong_N = (label_N != 0) & (label_N != 1)
    if wrong_N.any():
        row = int(np.argmax(wrong_N))
        raise DataError(
            f"label {label_N[row]:g} of row {row} is neither 0 nor 1: leave it out",
            row=int(row),
            value=float(label_N[row]),
        )
    return label_N.astype(np.float64)


def checked_predictions(prediction_N: Float[np.ndarray, " N"]) -> Float64[np.ndarray, " N"]:
    """Return predictions in double precision.

    Raises:
        DataError: There are no predictions.
        NonFiniteError: A prediction is NaN or infinite.
    """
    if len(prediction_N) == 0:
        raise DataError("there is no labelled row: nothing can be measured")
    if not np.isfinite(prediction_N).all():
        row = int(np.argmin(np.isfinite(prediction_N)))
        raise NonFiniteError(
            f"the prediction of row {row} is {prediction_N[row]}: the model is broken, train it "
            "again",
            row=int(row),
            value=float(prediction_N[row]),
        )
    return prediction_N.astype(np.float64)


def checked_probabilities(probability_N: Float[np.ndarray, " N"]) -> Float64[np.ndarray, " N"]:
    """Return probabilities in double precision.

    Raises:
        DataError: There are no predictions, or one is outside [0, 1].
        NonFiniteError: A prediction is NaN or infinite.
    """
    found_N = checked_predictions(probability_N)
    if found_N.min() < 0 or found_N.max() > 1:
        row = int(np.argmax((found_N < 0) | (found_N > 1)))
        raise DataError(
            f"{found_N[row]:g} of row {row} is not a probability in [0, 1]: give no logits",
            row=int(row),
            value=float(found_N[row]),
        )
    return found_N


@final
class RankedRows:
    """Rows sorted by score once, for repeated use with the weights of a bootstrap."""

    def __init__(self, label_N: Float[np.ndarray, " N"], score_N: Float[np.ndarray, " N"]) -> None:
        """Sort the rows.

        Args:
            label_N: 0 or 1.
            score_N: Any real numbers, higher is better.

        Raises:
            DataError: A label is neither 0 nor 1.
            NonFiniteError: A score is NaN or infinite.
        """
        self.label_N = checked_labels(label_N)
        _, self.place_N = np.unique(checked_predictions(score_N), return_inverse=True)

    def auc(self, weight_N: Float[np.ndarray, " N"] | None = None) -> float:
        """Return the AUC, NaN if the weights leave only one class."""
        positive_N = self.label_N if weight_N is None else self.label_N * weight_N
        all_N = np.ones(len(self.label_N)) if weight_N is None else weight_N
        positive_G = np.bincount(self.place_N, positive_N)
        negative_G = np.bincount(self.place_N, all_N - positive_N)
        pairs = positive_G.sum() * negative_G.sum()
        if not pairs > 0:
            return float("nan")
        below_G = np.cumsum(negative_G) - negative_G / 2
        return float(positive_G @ below_G / pairs)


def auc(
    label_N: Float[np.ndarray, " N"],
    score_N: Float[np.ndarray, " N"],
    weight_N: Float64[np.ndarray, " N"] | None = None,
) -> float:
    r"""Return the probability that a 1 scores above a 0, with ties counted half, in [0, 1].

    .. math:: \frac{\sum_{i: y_i = 1} \sum_{j: y_j = 0} w_i w_j
                    \big([s_i > s_j] + \tfrac{1}{2} [s_i = s_j]\big)}
                   {\sum_{i: y_i = 1} w_i \sum_{j: y_j = 0} w_j}

    Args:
        label_N: 0 or 1.
        score_N: Any real numbers, higher is better.
        weight_N: Weight of each row, 0 or more; None: all weights are equal.

    Returns:
        The AUC, which is 0.5 for uninformative scores.

    Raises:
        DataError: A class has no rows, or a label is neither 0 nor 1.
        NonFiniteError: A score is NaN or infinite.

    References:
        Hanley and McNeil, "The meaning and use of the area under a receiver operating
        characteristic (ROC) curve", Radiology 1982.
    """
    found = RankedRows(label_N, score_N).auc(weight_N)
    if np.isnan(found):
        raise DataError(
            f"AUC needs both classes; of {len(label_N)} rows "
            f"{int(np.sum(label_N))} have label 1 (and weights above 0 leave one class only): "
            "measure on rows of both"
        )
    return found


def user_auc(
    label_N: Float[np.ndarray, " N"],
    score_N: Float[np.ndarray, " N"],
    user_N: Int64[np.ndarray, " N"],
    *,
    num_users: int,
) -> Float64[np.ndarray, " U"]:
    """Return each user's AUC over the user's own rows, NaN if they have only one class.

    Args:
        label_N: 0 or 1.
        score_N: Any real numbers, higher is better.
        user_N: In [0, num_users).
        num_users: U.

    Raises:
        DataError: A label is neither 0 nor 1.
        NonFiniteError: A score is NaN or infinite.
    """
    label_N, score_N = checked_labels(label_N), checked_predictions(score_N)
    order = np.lexsort((score_N, user_N))
    label_N, score_N, user_N = label_N[order], score_N[order], user_N[order]
    starts_N = np.ones(len(order), dtype=bool)
    starts_N[1:] = (np.diff(user_N) != 0) | (np.diff(score_N) != 0)
    group_N = np.cumsum(starts_N) - 1
    first_G = np.flatnonzero(starts_N)
    positive_G, size_G = np.bincount(group_N, label_N), np.bincount(group_N)
    negative_G, user_G = size_G - positive_G, user_N[first_G]
    positive_U = np.bincount(user_G, positive_G, num_users)
    negative_U = np.bincount(user_G, negative_G, num_users)
    before_U = np.cumsum(negative_U) - negative_U
    below_G = np.cumsum(negative_G) - before_U[user_G] - negative_G / 2
    won_U = np.bincount(user_G, positive_G * below_G, num_users)
    pairs_U = positive_U * negative_U
    auc_U: np.ndarray = np.full(num_users, np.nan)
    np.divide(won_U, pairs_U, out=auc_U, where=pairs_U > 0)
    return auc_U


def row_log_loss(
    label_N: Float[np.ndarray, " N"], probability_N: Float[np.ndarray, " N"]
) -> Float64[np.ndarray, " N"]:
    """Return each row's loss, in nats.

    Probabilities are clipped 2.2e-16 away from 0 and 1, as in scikit-learn.

    Raises:
        DataError: A label is neither 0 nor 1, or a probability is outside [0, 1].
        NonFiniteError: A probability is NaN or infinite.
    """
    label_N, probability_N = checked_labels(label_N), checked_probabilities(probability_N)
    eps = np.finfo(np.float64).eps
    kept_N = np.clip(probability_N, eps, 1 - eps)
    loss_N: np.ndarray = -np.log(np.where(label_N == 1, kept_N, 1 - kept_N))
    return loss_N


NUM_BINS = 15
"""As in Guo et al. 2017."""


@dataclass(frozen=True, kw_only=True)
class Reliability:
    """A reliability curve, the diagonal for a calibrated model; empty bins are left out."""

    count: tuple[int, ...]
    """Number of rows in each bin."""
    predicted: tuple[float, ...]
    """Mean probability in each bin."""
    happened: tuple[float, ...]
    """Share of ones in each bin."""


def reliability(
    label_N: Float[np.ndarray, " N"],
    probability_N: Float[np.ndarray, " N"],
) -> Reliability:
    """Return predicted and observed shares by bin, like scikit-learn's calibration curve.

    Raises:
        DataError: A label is neither 0 nor 1, or a probability is outside [0, 1].
        NonFiniteError: A probability is NaN or infinite.
    """
    label_N, probability_N = checked_labels(label_N), checked_probabilities(probability_N)
    bin_N = bin_of(probability_N)
    count_M = np.bincount(bin_N)
    kept_M = count_M > 0
    predicted_M = np.bincount(bin_N, probability_N)[kept_M] / count_M[kept_M]
    happened_M = np.bincount(bin_N, label_N)[kept_M] / count_M[kept_M]
    return Reliability(
        count=tuple(count_M[kept_M].tolist()),
        predicted=tuple(predicted_M.tolist()),
        happened=tuple(happened_M.tolist()),
    )


def bin_of(probability_N: Float64[np.ndarray, " N"]) -> Int64[np.ndarray, " N"]:
    """Return each row's bin of equal width; a value on an edge belongs to the lower bin."""
    edges = np.linspace(0, 1, NUM_BINS + 1)
    return np.searchsorted(edges[1:-1], probability_N).astype(np.int64)


Weighed = Callable[[Float64[np.ndarray, " U"]], float]
"""Maps the weights of users to the metric; NaN if it is not defined."""


@dataclass(frozen=True, eq=False, kw_only=True)
class TaskRows:
    """The rows with a label of one task, and a model's predictions of them."""

    task: Task
    label_N: Float64[np.ndarray, " N"]
    prediction_N: Float64[np.ndarray, " N"]
    """A probability, a value in the label's unit, or the expected level."""
    user_N: Int64[np.ndarray, " N"]
    """In [0, num_users)."""
    num_users: int
    """Number of users of all rows, including those without this label."""

    def predicting(self, prediction_N: Float64[np.ndarray, " N"]) -> "TaskRows":
        """Return the same rows with other predictions."""
        return replace(self, prediction_N=prediction_N)

    def metrics(self) -> dict[str, Weighed]:
        r"""Return the defined metrics by name, as functions of users' weights.

        For a binary task, "auc" is that of `auc`, left out if all labels are equal, and "gauc" is
        the mean of each user's AUC, weighted by the user's rows, over users with rows of both
        classes. For other tasks, in the label's unit,

        .. math:: \text{rmse} = \sqrt{\frac 1N \sum_n (\hat y_n - y_n)^2} \qquad
                  \text{mae} = \frac 1N \sum_n |\hat y_n - y_n|

        References:
            Zhu et al., "Optimized Cost per Click in Taobao Display Advertising", KDD 2017,
            https://arxiv.org/abs/1703.02091, for "gauc".
        """
        if self.task.kind == "binary":
            return self._ordering() | self.probability_metrics()
        error_N = checked_predictions(self.prediction_N) - self.label_N
        square, absolute = self._mean(error_N**2), self._mean(np.abs(error_N))
        return {"rmse": lambda times_U: float(np.sqrt(square(times_U))), "mae": absolute}

    def probability_metrics(self) -> dict[str, Weighed]:
        r"""Return the metrics of probabilities, which do not depend only on their order.

        .. math:: \text{log\_loss} = -\frac 1N \sum_n y_n \ln p_n + (1 - y_n) \ln(1 - p_n) \qquad
                  \text{ece} = \sum_m \frac{n_m}{N} \Big|\bar p_m - \bar y_m\Big|

        The first is in nats: 0 is perfect, and ln 2 belongs to a constant 0.5. The second is the
        expected calibration error over bins m, in [0, 1]; 0 is calibrated.

        References:
            Naeini, Cooper and Hauskrecht, "Obtaining Well Calibrated Probabilities Using Bayesian
            Binning", AAAI 2015; Guo et al., "On Calibration of Modern Neural Networks", ICML 2017,
            https://arxiv.org/abs/1706.04599
        """
        loss = self._mean(row_log_loss(self.label_N, self.prediction_N))
        apart_N, bin_N = self.prediction_N - self.label_N, bin_of(self.prediction_N)
        num_bins = int(bin_N.max()) + 1
        apart_UM = np.bincount(
            self.user_N * num_bins + bin_N, apart_N, self.num_users * num_bins
        ).reshape(self.num_users, num_bins)
        rows_U = np.bincount(self.user_N, minlength=self.num_users)

        def error(times_U: Float64[np.ndarray, " U"]) -> float:
            return float(np.abs(times_U @ apart_UM).sum() / (times_U @ rows_U))

        return {"log_loss": loss, "ece": error}

    def _ordering(self) -> dict[str, Weighed]:
        label_N = checked_labels(self.label_N)
        if label_N.min() == label_N.max():
            return {}
        order_N = np.argsort(self.prediction_N)  # so that each resample reads memory sequentially
        ranked = RankedRows(label_N[order_N], self.prediction_N[order_N])
        user_N = self.user_N[order_N]
        found: dict[str, Weighed] = {"auc": lambda times_U: ranked.auc(times_U[user_N])}
        auc_U = user_auc(label_N, self.prediction_N, self.user_N, num_users=self.num_users)
        both_U = ~np.isnan(auc_U)
        if both_U.any():
            rows_U = np.bincount(self.user_N, minlength=self.num_users) * both_U
            found["gauc"] = _ratio(np.where(both_U, auc_U, 0) * rows_U, rows_U.astype(np.float64))
        return found

    def _mean(self, value_N: Float64[np.ndarray, " N"]) -> Weighed:
        return _ratio(
            np.bincount(self.user_N, value_N, self.num_users),
            np.bincount(self.user_N, minlength=self.num_users).astype(np.float64),
        )


def _ratio(above_U: Float64[np.ndarray, " U"], below_U: Float64[np.ndarray, " U"]) -> Weighed:
    def value(times_U: Float64[np.ndarray, " U"]) -> float:
        below = float(times_U @ below_U)
        return float(times_U @ above_U) / below if below > 0 else float("nan")

    return value


def point_values(metrics: Mapping[str, Weighed], num_users: int) -> dict[str, float]:
    """Return each metric over the users without resampling."""
    once_U = np.ones(num_users)
    return {name: metric(once_U) for name, metric in metrics.items()}


def resampled(
    metrics: Mapping[str, Weighed], num_users: int, *, resamples: int, seed: int
) -> dict[str, Float64[np.ndarray, " R"]]:
    """Return each metric over R resamples of users, which are the same for all metrics.

    Args:
        metrics: By name.
        num_users: U.
        resamples: R.
        seed: Decides the draw; equal seeds draw the same users for two models.
    """
    found: dict[str, list[float]] = {name: [] for name in metrics}
    for times_RU in drawn_again(num_users, resamples=resamples, seed=seed):
        for times_U in times_RU:
            for name, metric in metrics.items():
                found[name].append(metric(times_U))
    return {name: np.array(values) for name, values in found.items()}


optimize = later("scipy.optimize")

Method = Literal["platt", "isotonic"]
_MOST_STEPS = 100
_STEEPEST = 1.0
"""Maximum slope of isotonic regression per unit of the logit. The logistic curve, which changes no
probability, has a slope of at most a quarter."""


def fit_calibration(
    method: Method, label_N: Float[np.ndarray, " N"], probability_N: Float[np.ndarray, " N"]
) -> PlattCalibration | IsotonicCalibration:
    """Fit a calibration of a model's probabilities on rows outside training.

    Args:
        method: "platt" has two parameters and needs few rows; "isotonic" fits any non-decreasing
            curve and needs a thousand rows or more.
        label_N: 0 or 1.
        probability_N: The model's probabilities.

    Raises:
        DataError: There is only one class, a label is neither 0 nor 1, or a probability is outside
            [0, 1].
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
    """Find the line of maximum likelihood with Newton's method, halving steps that overshoot.

    References:
        Platt, "Probabilistic Outputs for Support Vector Machines and Comparisons to Regularized
        Likelihood Methods", 1999: labels are smoothed by one row of each class, so that perfectly
        separable rows also have a finite solution.
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
    """Pool adjacent violators over distinct probabilities; only the ends of a step are kept.

    **Departures**: a lowest step of 0 and a highest of 1 are moved inward to one of n + 2 rows, but
    not beyond the next step, because 0 and 1 have unbounded loss when they are wrong. Steps become
    slopes (`_eased`).
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
    inner = np.append(level, False) & np.insert(level, 0, False)  # constant on both sides
    return IsotonicCalibration(at=tuple(at[~inner].tolist()), gives=tuple(gives[~inner].tolist()))


def _eased(
    at: Float64[np.ndarray, " N"], gives: Float64[np.ndarray, " N"]
) -> Float64[np.ndarray, " N"]:
    """Limit the slope to `_STEEPEST`: half of a step comes before its position, half after it.

    A logit's last digits depend on the number of rows scored at once, and a step between two logits
    1e-5 apart would multiply this by ten thousand, so that answers would differ from the
    evaluation.
    """
    line = _STEEPEST * logit(at)
    late = line + np.minimum.accumulate(gives - line)
    early = line + np.maximum.accumulate((gives - line)[::-1])[::-1]
    eased: np.ndarray = np.maximum.accumulate(((late + early) / 2).round(12))  # no tiny slopes
    return eased


def _line_loss(line_N: Float64[np.ndarray, " N"], target_N: Float64[np.ndarray, " N"]) -> float:
    return float((np.logaddexp(0, line_N) - target_N * line_N).sum())

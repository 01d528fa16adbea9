"""The pointwise metrics of a task, worked out again and again over users drawn anew.

A user that is drawn brings all its rows: what one user's rows have in common is no evidence twice.

Shape legend: N rows, U users, R resamples, T tasks, M bins.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float64, Int64

from foretaste.data.tasks import Task
from foretaste.evaluation.bootstrap import drawn_again
from foretaste.evaluation.metrics.auc import RankedRows
from foretaste.evaluation.metrics.calibration import bin_of
from foretaste.evaluation.metrics.gauc import user_auc
from foretaste.evaluation.metrics.labels import checked_labels, checked_predictions
from foretaste.evaluation.metrics.log_loss import row_log_loss

Weighed = Callable[[Float64[np.ndarray, " U"]], float]
"""From how often each user counts to the metric; NaN where it is not defined so."""


@dataclass(frozen=True, eq=False, kw_only=True)
class TaskRows:
    """The rows that have a label of one task, and what a model predicted of them."""

    task: Task
    label_N: Float64[np.ndarray, " N"]
    prediction_N: Float64[np.ndarray, " N"]
    """A probability, a value in the label's unit, or the expected level."""
    user_N: Int64[np.ndarray, " N"]
    """In [0, num_users)."""
    num_users: int
    """Of all rows, also of those without this label."""

    def predicting(self, prediction_N: Float64[np.ndarray, " N"]) -> "TaskRows":
        """Return the same rows with other predictions."""
        return replace(self, prediction_N=prediction_N)

    def metrics(self) -> dict[str, Weighed]:
        """Return the metrics that these rows define, by name."""
        if self.task.kind == "binary":
            return self._ordering() | self.probability_metrics()
        error_N = checked_predictions(self.prediction_N) - self.label_N
        square, absolute = self._mean(error_N**2), self._mean(np.abs(error_N))
        return {"rmse": lambda times_U: float(np.sqrt(square(times_U))), "mae": absolute}

    def probability_metrics(self) -> dict[str, Weighed]:
        """Return the metrics of probabilities as such, whatever order they give."""
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
        order_N = np.argsort(self.prediction_N)  # so that each resample walks through memory
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
    """Return each metric over the users as they are."""
    once_U = np.ones(num_users)
    return {name: metric(once_U) for name, metric in metrics.items()}


def resampled(
    metrics: Mapping[str, Weighed], num_users: int, *, resamples: int, seed: int
) -> dict[str, Float64[np.ndarray, " R"]]:
    """Return each metric over users drawn again, R times, the same users for all metrics.

    Args:
        metrics: By name.
        num_users: U.
        resamples: R.
        seed: Decides the draw: with one seed, two models meet the same users.
    """
    found: dict[str, list[float]] = {name: [] for name in metrics}
    for times_RU in drawn_again(num_users, resamples=resamples, seed=seed):
        for times_U in times_RU:
            for name, metric in metrics.items():
                found[name].append(metric(times_U))
    return {name: np.array(values) for name, values in found.items()}

"""Is one model better than another, or was it luck.

Shape legend: U users that all reports have.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float64, Int64

from foretaste.arguments import checked
from foretaste.config import Resamples, Seed
from foretaste.errors import DataError, did_you_mean
from foretaste.evaluation.bootstrap import Interval, bootstrap_intervals, sign_flip_p_value
from foretaste.evaluation.report import Report
from foretaste.shown import Shown

Reports = Report | Sequence[Report]


@dataclass(frozen=True, kw_only=True, repr=False)
class Comparison(Shown):
    """One metric of two models over the users that both were measured on."""

    metric: str
    users: int
    mean_a: float
    mean_b: float
    difference: float
    """`mean_a - mean_b`: above 0, the first model is better."""
    interval: Interval
    """95 % paired bootstrap interval of the difference."""
    p_value: float
    """Two-sided: of the paired sign-flip test; of rows, by the bootstrap."""

    def __str__(self) -> str:
        return (
            f"{self.metric}: {self.mean_a:.4f} - {self.mean_b:.4f} = {self.difference:+.4f} "
            f"[{self.interval.low:+.4f}, {self.interval.high:+.4f}], p = {self.p_value:.4f}, "
            f"{self.users:,} users"
        )

    def _facts(self) -> dict[str, object]:
        return {"": str(self)}

    def _rows(self) -> list[tuple[object, ...]]:
        heads = ("metric", "first", "second", "difference", "95 % interval", "p", "users")
        interval = f"[{self.interval.low:+.4f}, {self.interval.high:+.4f}]"
        figures = (self.mean_a, self.mean_b, self.difference, interval, self.p_value, self.users)
        return [heads, (self.metric, *figures)]


@checked
def compare(
    a: Reports, b: Reports, metric: str, *, resamples: Resamples = 10_000, seed: Seed = 0
) -> Comparison:
    """Compare two models user by user on what both had to predict.

    Args:
        a: Report of the first model; or several, trained in the same way from several seeds: a
            user's value is the mean over them then.
        b: Of the second, on the same holdout.
        metric: A name that all have for each user, such as "ndcg_at_10".
        resamples: How often users are drawn again, and signs flipped.
        seed: Decides both.

    Raises:
        DataError: The holdouts differ, a report lacks the metric per user, or no user is common.
    """
    reports_a, reports_b = _several(a), _several(b)
    for report in (*reports_a, *reports_b):
        check_comparable(reports_a[0], report)
        if metric not in report.per_user:
            there, advice = ", ".join(report.per_user), did_you_mean(metric, report.per_user)
            raise DataError(
                f"the report of {report.model} has no {metric!r} per user, but "
                f"{there or 'none at all'}{advice}",
                name="metric",
                value=metric,
            )
    user_U = reduce(np.intersect1d, [report.user_idx for report in (*reports_a, *reports_b)])
    if len(user_U) == 0:
        raise DataError("the reports have no user in common")
    value_a_U = mean_per_user(reports_a, metric, user_U)
    value_b_U = mean_per_user(reports_b, metric, user_U)
    difference_U = value_a_U - value_b_U
    return Comparison(
        metric=metric,
        users=len(difference_U),
        mean_a=float(value_a_U.mean()),
        mean_b=float(value_b_U.mean()),
        difference=float(difference_U.mean()),
        interval=bootstrap_intervals(difference_U[:, None], resamples=resamples, seed=seed)[0],
        p_value=sign_flip_p_value(difference_U, resamples=resamples, seed=seed),
    )


def mean_per_user(
    reports: Sequence[Report], metric: str, user_U: Int64[np.ndarray, " U"]
) -> Float64[np.ndarray, " U"]:
    """Return some users' values of a metric, each the mean over the reports, which all have it."""
    values = [r.per_user[metric][np.searchsorted(r.user_idx, user_U)] for r in reports]
    mean_U: np.ndarray = np.mean(values, axis=0)
    return mean_U


def _several(reports: Reports) -> Sequence[Report]:
    several = [reports] if isinstance(reports, Report) else reports
    if not several:
        raise DataError("there is no report to compare: give one at least")
    return several


@runtime_checkable
class Measured(Protocol):
    """A report of some holdout."""

    @property
    def holdout(self) -> str: ...
    @property
    def holdout_digest(self) -> str: ...


def check_comparable(a: Measured, b: Measured) -> None:
    """Refuse reports of different holdouts.

    Raises:
        DataError: They differ.
    """
    if a.holdout_digest != b.holdout_digest:
        raise DataError(
            f"these reports are of different holdouts ({a.holdout} {a.holdout_digest[:8]}, "
            f"{b.holdout} {b.holdout_digest[:8]}): evaluate both models on the same one"
        )

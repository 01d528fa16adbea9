"""Is one model better than another, or was it luck.

Shape legend: U users that both reports have.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from foretaste.arguments import checked
from foretaste.config import Resamples, Seed
from foretaste.errors import DataError
from foretaste.evaluation.bootstrap import Interval, bootstrap_intervals, sign_flip_p_value
from foretaste.evaluation.report import Report
from foretaste.shown import Shown


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
    a: Report, b: Report, metric: str, *, resamples: Resamples = 10_000, seed: Seed = 0
) -> Comparison:
    """Compare two models user by user on what both had to predict.

    Args:
        a: Report of the first model.
        b: Report of the second, on the same holdout.
        metric: A name that both have for each user, such as "ndcg_at_10".
        resamples: How often users are drawn again, and signs flipped.
        seed: Decides both.

    Raises:
        DataError: The holdouts differ, a report lacks the metric per user, or no user is common.
    """
    check_comparable(a, b)
    for report in (a, b):
        if metric not in report.per_user:
            raise DataError(
                f"the report of {report.model} has no {metric!r} per user, but "
                f"{', '.join(report.per_user) or 'none at all'}"
            )
    _, row_a, row_b = np.intersect1d(a.user_idx, b.user_idx, return_indices=True)
    if len(row_a) == 0:
        raise DataError("the two reports have no user in common")
    value_a_U, value_b_U = a.per_user[metric][row_a], b.per_user[metric][row_b]
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

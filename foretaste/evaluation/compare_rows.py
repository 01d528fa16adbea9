"""Does one model predict labelled rows better than another, or was it luck.

Shape legend: N rows, U users, R resamples, S seeds.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64

from foretaste.arguments import checked
from foretaste.config import Resamples, Seed
from foretaste.errors import DataError
from foretaste.evaluation.bootstrap import Interval, percentile_interval
from foretaste.evaluation.compare import Comparison, check_comparable
from foretaste.evaluation.row_metrics import point_values, resampled
from foretaste.evaluation.rows_report import RowsReport

Reports = RowsReport | Sequence[RowsReport]


@checked
def compare_rows(
    a: Reports,
    b: Reports,
    metric: str,
    *,
    task: str = "",
    resamples: Resamples = 2000,
    seed: Seed = 0,
) -> Comparison:
    """Compare two models on the rows that both predicted, user by user.

    Users are drawn again with all their rows, the same for both models, and the metric is worked
    out anew: AUC is no mean over users, so its difference is not one either. The p-value is twice
    the share of resamples on the other side of 0, the observed one counted in; and never below
    2 / 2^U of U users, the chance that all their differences have one sign.

    Args:
        a: Report of the first model; or several, trained alike from several seeds: the metric is
            their mean then.
        b: Of the second, on the same rows; it may have other tasks besides.
        metric: Its short name: "auc", "gauc", "log_loss", "ece", "rmse" or "mae". Of the last
            four, less is better.
        task: Which; "" if there is only one.
        resamples: How often users are drawn again.
        seed: Decides the draw.

    Raises:
        DataError: The rows differ, a report was kept without them, or the task has no such metric.
    """
    reports_a, reports_b = _several(a), _several(b)
    first = reports_a[0]
    task = task or first.tasks[0].name
    for other in (*reports_a, *reports_b):
        check_comparable(first, other)
        if not np.array_equal(first.rows(task).label_N, other.rows(task).label_N):
            raise DataError(
                f"the labels of task {task!r} differ between {first.model} and {other.model}: give "
                "both models the same task"
            )
    (mean_a, a_R), (mean_b, b_R) = (
        _resampled_mean(reports, metric, task, resamples=resamples, seed=seed)
        for reports in (reports_a, reports_b)
    )
    apart_R = a_R - b_R
    apart_R = apart_R[~np.isnan(apart_R)]
    users = reports_a[0].counts["users"]
    beyond = min(int((apart_R <= 0).sum()), int((apart_R >= 0).sum()))
    return Comparison(
        metric=first.name(metric, task),
        users=users,
        mean_a=mean_a,
        mean_b=mean_b,
        difference=mean_a - mean_b,
        interval=percentile_interval(apart_R),
        p_value=min(1.0, max(2 * (1 + beyond) / (1 + len(apart_R)), 2.0 ** (1 - users))),
    )


def mean_and_interval(
    reports: Sequence[RowsReport], metric: str, task: str
) -> tuple[float, Interval]:
    """Return the mean of a metric over reports from several seeds, and its 95 % interval."""
    mean, mean_R = _resampled_mean(reports, metric, task, resamples=1000, seed=0)
    return mean, percentile_interval(mean_R)


def _several(reports: Reports) -> Sequence[RowsReport]:
    several = [reports] if isinstance(reports, RowsReport) else reports
    if not several:
        raise DataError("there is no report to compare: give one at least")
    return several


def _resampled_mean(
    reports: Sequence[RowsReport], metric: str, task: str, *, resamples: int, seed: int
) -> tuple[float, Float64[np.ndarray, " R"]]:
    weighed = {}
    for number, report in enumerate(reports):
        found = report.rows(task).metrics()
        if metric not in found:
            raise DataError(
                f"task {task!r} of {report.model} has no {metric!r} here, but "
                f"{', '.join(found) or 'none at all'}"
            )
        weighed[str(number)] = found[metric]
    num_users = reports[0].counts["users"]
    points = point_values(weighed, num_users)
    drawn = resampled(weighed, num_users, resamples=resamples, seed=seed)
    return float(np.mean(list(points.values()))), np.mean(list(drawn.values()), axis=0)

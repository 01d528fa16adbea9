"""Comparisons of models with significance tests, and all reports of one model.

Shape legend: U users in all reports, N rows, R resamples, S seeds.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import reduce
from typing import TypeVar

import numpy as np
from jaxtyping import Float64, Int64

from foretaste.arguments import checked
from foretaste.config import Resamples, Seed
from foretaste.errors import DataError, did_you_mean
from foretaste.evaluation.list_metrics import Interval, bootstrap_intervals, percentile_interval
from foretaste.evaluation.report import AnyReport, Report, RowsReport, markdown_table
from foretaste.evaluation.row_metrics import point_values, resampled
from foretaste.shown import Shown

R = TypeVar("R", Report, RowsReport)


@dataclass(frozen=True, kw_only=True, repr=False)
class Comparison(Shown):
    """One metric of two models over their common users."""

    metric: str
    users: int
    mean_a: float
    mean_b: float
    difference: float
    """`mean_a - mean_b`: above 0, the first model is better."""
    interval: Interval
    """95 % paired bootstrap interval of the difference."""
    p_value: float
    """Two-sided: from the paired sign-flip test or, for rows, from the bootstrap."""

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
    a: Report | Sequence[Report],
    b: Report | Sequence[Report],
    metric: str,
    *,
    resamples: Resamples = 10_000,
    seed: Seed = 0,
) -> Comparison:
    """Compare two models user by user on the same holdout.

    Args:
        a: Report of the first model, or reports of several seeds, whose mean is a user's value.
        b: Report or reports of the second model on the same holdout.
        metric: A metric that all reports have per user, such as "ndcg_at_10".
        resamples: Number of resamples of users and of sign flips.
        seed: Decides both draws.

    Raises:
        DataError: The holdouts differ, a report lacks the metric per user, or the reports share no
            user.
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
        raise DataError("the reports have no user in common", name="b")
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
    """Return users' values of a metric, each the mean over the reports."""
    values = [r.per_user[metric][np.searchsorted(r.user_idx, user_U)] for r in reports]
    mean_U: np.ndarray = np.mean(values, axis=0)
    return mean_U


def _several(reports: R | Sequence[R]) -> Sequence[R]:
    several = reports if isinstance(reports, Sequence) else [reports]
    if not several:
        raise DataError("there is no report to compare: give at least one", name="reports")
    return several


def check_comparable(a: AnyReport, b: AnyReport) -> None:
    """Raise an error for reports of different holdouts.

    Raises:
        DataError: The holdouts differ.
    """
    if a.holdout_digest != b.holdout_digest:
        raise DataError(
            f"these reports are of different holdouts ({a.holdout} {a.holdout_digest[:8]}, "
            f"{b.holdout} {b.holdout_digest[:8]}): evaluate both models on the same one",
            name="b",
            value=b.holdout,
        )


@checked
def compare_rows(
    a: RowsReport | Sequence[RowsReport],
    b: RowsReport | Sequence[RowsReport],
    metric: str,
    *,
    task: str = "",
    resamples: Resamples = 2000,
    seed: Seed = 0,
) -> Comparison:
    """Compare two models on the rows that both predicted, user by user.

    Users are resampled with all their rows, the same users for both models, and the metric is
    computed again, because AUC is not a mean over users. The p-value is twice the share of
    resamples on the other side of 0, including the observed value; it is at least 2 / 2^U for U
    users, the probability that all their differences have the same sign.

    Args:
        a: Report of the first model, or reports of several seeds, whose mean is compared.
        b: Report or reports of the second model on the same rows; it may have further tasks.
        metric: Its short name: "auc", "gauc", "log_loss", "ece", "rmse" or "mae". For the last
            four, lower is better.
        task: The task's name; "" if there is only one.
        resamples: Number of resamples of users.
        seed: Decides the draw.

    Raises:
        DataError: The rows differ, a report has no rows, or the task has no such metric.
    """
    reports_a, reports_b = _several(a), _several(b)
    first = reports_a[0]
    task = task or first.tasks[0].name
    for other in (*reports_a, *reports_b):
        check_comparable(first, other)
        if not np.array_equal(first.rows(task).label_N, other.rows(task).label_N):
            raise DataError(
                f"the labels of task {task!r} differ between {first.model} and {other.model}: give "
                "both models the same task",
                name=task,
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


def _resampled_mean(
    reports: Sequence[RowsReport], metric: str, task: str, *, resamples: int, seed: int
) -> tuple[float, Float64[np.ndarray, " R"]]:
    weighed = {}
    for number, report in enumerate(reports):
        found = report.rows(task).metrics()
        if metric not in found:
            raise DataError(
                f"task {task!r} of {report.model} has no {metric!r} here, but "
                f"{', '.join(found) or 'none at all'}",
                name=task,
                value=metric,
            )
        weighed[str(number)] = found[metric]
    num_users = reports[0].counts["users"]
    points = point_values(weighed, num_users)
    drawn = resampled(weighed, num_users, resamples=resamples, seed=seed)
    return float(np.mean(list(points.values()))), np.mean(list(drawn.values()), axis=0)


@dataclass(frozen=True, kw_only=True)
class TransferRow:
    """One task of one joint model."""

    model: str
    task: str
    compared: Comparison
    """The joint model minus the single one."""
    lower_is_better: bool

    @property
    def verdict(self) -> str:
        """Whether the other tasks helped: "gain", "loss", or "neither" if not significant."""
        low, high = self.compared.interval
        if low <= 0 <= high:
            return "neither"
        return "gain" if (low > 0) != self.lower_is_better else "loss"


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """A table of gains and losses, printed as Markdown."""

    rows: tuple[TransferRow, ...]

    def __str__(self) -> str:
        table = [["task", "metric", "model", "joint", "single", "difference", "p", ""]]
        for row in self.rows:
            found = row.compared
            ends = f"[{found.interval.low:+.4f}, {found.interval.high:+.4f}]"
            table.append(
                [
                    row.task,
                    found.metric,
                    row.model,
                    f"{found.mean_a:.4f}",
                    f"{found.mean_b:.4f}",
                    f"{found.difference:+.4f} {ends}",
                    f"{found.p_value:.4f}",
                    row.verdict,
                ]
            )
        return markdown_table(table)


@checked
def transfer(
    joint: Mapping[str, Sequence[RowsReport]],
    single: Mapping[str, Sequence[RowsReport]],
    *,
    resamples: Resamples = 2000,
    seed: Seed = 0,
) -> Transfer:
    """Compare joint models with single ones, task by task, on the same rows and users.

    Binary tasks are compared by AUC, the others by RMSE.

    Args:
        joint: Reports of joint models by name, one per seed.
        single: Reports of single-task models by the task's name, one per seed.
        resamples: Number of resamples of users.
        seed: Decides the draw.

    Raises:
        DataError: The rows or labels differ, or no joint model has a task of `single`.
    """
    rows = [
        TransferRow(
            model=name,
            task=task.name,
            compared=compare_rows(
                reports,
                single[task.name],
                "auc" if task.kind == "binary" else "rmse",
                task=task.name,
                resamples=resamples,
                seed=seed,
            ),
            lower_is_better=task.kind != "binary",
        )
        for name, reports in joint.items()
        for task in reports[0].tasks
        if task.name in single
    ]
    if not rows:
        raise DataError(
            f"no joint model has a task of {', '.join(single) or 'the single ones'}", name="joint"
        )
    return Transfer(rows=tuple(sorted(rows, key=lambda row: row.task)))


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class RankingGain(Shown):
    """The gain of the second stage: two stages against only the first."""

    retrieval: Report
    """The report of the retriever alone."""
    comparison: Comparison
    """The two stages minus the retriever alone, user by user."""

    @property
    def metrics(self) -> Mapping[str, float]:
        """The retriever's figures, and the gain."""
        alone = {f"{name}_retrieval": value for name, value in self.retrieval.metrics.items()}
        return alone | {f"{self.comparison.metric}_gain": self.comparison.difference}

    @property
    def intervals(self) -> Mapping[str, Interval]:
        """The paired intervals of the gain."""
        return {f"{self.comparison.metric}_gain": self.comparison.interval}

    @checked
    def to_json(self) -> dict[str, object]:
        """Return the gain as plain JSON values."""
        return {**asdict(self.comparison), "retrieval": dict(self.retrieval.metrics)}

    def __str__(self) -> str:
        return f"two stages - retrieval alone, {self.comparison}"

    def _facts(self) -> dict[str, object]:
        return {"": str(self)}


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Reports(Shown):
    """One or two reports of the same model, printed as tables."""

    lists: Report | None = None
    """The report of lists over the catalogue; None if they were not measured."""
    rows: RowsReport | None = None
    """The report of labelled rows; None for models without labels, or if they were not measured."""
    gain: RankingGain | None = None
    """The gain of two stages over the first; None for other models."""

    @property
    def metrics(self) -> Mapping[str, float]:
        """All figures; names in the two reports are distinct."""
        return {name: value for part in self._parts() for name, value in part.metrics.items()}

    @property
    def intervals(self) -> Mapping[str, Interval]:
        """All intervals."""
        return {name: ends for part in self._parts() for name, ends in part.intervals.items()}

    @checked
    def to_json(self, *, per_user: bool = True) -> str:
        """Return one JSON document; a second report, of rows, is in it as `rows`.

        Args:
            per_user: False leaves each user's and each row's values out.
        """
        rows = None if self.rows is None else self.rows.to_json(per_row=per_user)
        if self.lists is None:
            return rows or "{}"
        document = json.loads(self.lists.to_json(per_user=per_user))
        if rows is not None:
            document["rows"] = json.loads(rows)
        if self.gain is not None:
            document["gain"] = self.gain.to_json()
        return json.dumps(document, allow_nan=False)

    @checked
    def noted(self, sentence: str) -> "Reports":
        """Return the reports with a further note, which comes first."""
        lists, rows = self.lists, self.rows
        return replace(
            self,
            lists=lists and replace(lists, notes=(sentence, *lists.notes)),
            rows=rows and replace(rows, notes=(sentence, *rows.notes)),
        )

    def __str__(self) -> str:
        return "\n\n".join(map(str, self._parts())) or "nothing was measured"

    def _parts(self) -> list[Report | RowsReport | RankingGain]:
        return [part for part in (self.lists, self.gain, self.rows) if part is not None]

    def _facts(self) -> dict[str, object]:
        return {"": ", ".join(map(repr, self._parts())) or "nothing was measured"}

    def _repr_html_(self) -> str:
        return "".join(part._repr_html_() for part in self._parts())


_SIGNS = 2**22
"""Number of random signs in memory at a time."""


def sign_flip_p_value(
    difference_U: Float64[np.ndarray, " U"], *, resamples: int, seed: int
) -> float:
    """Return the two-sided p-value of a mean difference, in (0, 1].

    If neither model were better, each user's difference could have either sign: the p-value is the
    share of random sign flips whose mean is as far from 0, including the observed one.

    References:
        Fisher's randomisation test; Smucker et al., "A Comparison of Statistical Significance
        Tests for Information Retrieval Evaluation", CIKM 2007.
    """
    observed = abs(difference_U.sum())
    moving_U = difference_U[difference_U != 0]
    generator = np.random.default_rng(seed)
    tolerance = 1e-12 * np.abs(moving_U).sum()  # of sums in another order
    as_far, step = 0, max(1, _SIGNS // max(1, len(moving_U)))
    for begin in range(0, resamples, step):
        shape = (min(step, resamples - begin), len(moving_U))
        positive_RU = generator.integers(0, 2, size=shape, dtype=np.int8)
        sums_R = 2 * (positive_RU @ moving_U) - moving_U.sum()
        as_far += int((np.abs(sums_R) >= observed - tolerance).sum())
    return (1 + as_far) / (1 + resamples)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values corrected for multiple comparisons, in the same order.

    If none of P differences is real, the probability that any corrected value is at most .05 is at
    most .05, for any dependence between tests: the smallest is multiplied by P, the next one by P -
    1, and so on, and none is lower than the previous one.

    References:
        Holm, "A Simple Sequentially Rejective Multiple Test Procedure", Scandinavian Journal of
        Statistics 1979.
    """
    p_P = np.array(p_values)
    order = np.argsort(p_P)
    raised_P = np.maximum.accumulate(p_P[order] * np.arange(len(p_P), 0, -1)).clip(max=1.0)
    found_P = np.empty(len(p_P))
    found_P[order] = raised_P
    return found_P.tolist()

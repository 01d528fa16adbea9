"""Comparison of measured models: figures with intervals, baselines of counts, and the advice.

Comparisons by lists and by labelled rows work in the same way: models are ordered by the first
metric, each metric has a figure for every model and its difference from the best, and one model is
recommended.

Shape legend: N rows, T tasks, U users.
"""

import statistics
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar, final

from foretaste.data.splits import Split
from foretaste.data.tasks import Task
from foretaste.errors import ConfigError
from foretaste.evaluation.compare import (
    Comparison,
    compare,
    compare_rows,
    mean_and_interval,
    mean_per_user,
)
from foretaste.evaluation.list_metrics import Interval, bootstrap_intervals
from foretaste.evaluation.report import AnyReport, Report, RowsReport
from foretaste.evaluation.rows import Predicted, measure_rows
from foretaste.experiment.compare_counts import BASE_RATE, count_baselines
from foretaste.experiment.compare_plan import Plan
from foretaste.experiment.compare_table import (
    FailedModel,
    Measured,
    ModelComparison,
    ModelRow,
    TaskFigure,
    corrected,
    difference,
    label,
    model_row,
)

K = TypeVar("K", bound=AnyReport)

ASKED = 200
"""Number of single requests for the median time of an answer."""
WORTH = 0.1
"""A model is as good as the best if the difference is less than this share of the best model's gain
over chance."""
FEWEST_USERS = 6
"""For 5 users, all differences have the same sign by chance in 2 of 32 cases, so with fewer than 6
users no paired test has a p-value below .05."""
_RESAMPLES = 1000
_MANY_ROWS, _FEW_RESAMPLES = 300_000, 200
"""From this many rows on, baselines are resampled less often, because it would take longer than
training."""


def _of(kind: type[K], reports: Iterable[AnyReport]) -> list[K]:
    return [report for report in reports if isinstance(report, kind)]


class Question(ABC):
    """A metric that models are compared by."""

    metric: str
    """Its name in the table."""
    sign = -1
    """1 if lower is better."""

    @abstractmethod
    def value(self, report: AnyReport) -> float: ...

    @abstractmethod
    def interval(self, report: AnyReport) -> Interval: ...

    @abstractmethod
    def mean(self, reports: Sequence[AnyReport]) -> tuple[float, Interval]:
        """Return the mean over reports from several seeds, and its interval."""

    @abstractmethod
    def behind(self, better: Sequence[AnyReport], other: Sequence[AnyReport]) -> Comparison:
        """Return the difference between two models."""

    def badness(self, reports: Sequence[AnyReport]) -> float:
        """Return the sort key of models, the best first."""
        return statistics.mean(map(self.value, reports)) * self.sign

    def figure(self, reports: Sequence[AnyReport], best: Sequence[AnyReport]) -> TaskFigure:
        """Return a model's figure, and its difference from the best on the same users."""
        values = [self.value(report) for report in reports]
        value, interval = values[0], self.interval(reports[0])
        if len(reports) > 1:
            value, interval = self.mean(reports)
        return TaskFigure(
            metric=self.metric,
            value=value,
            interval=interval,
            behind=None if reports is best else self.behind(best, reports),
            spread=statistics.stdev(values) if len(values) > 1 else None,
        )


@final
class ByLists(Question):
    """NDCG at the first list length, a mean over users."""

    def __init__(self, report: Report) -> None:
        name = f"ndcg_at_{report.k[0]}"
        names = report.per_user
        self.metric = next(m for m in names if m == name or m.startswith(f"{name}_"))

    def value(self, report: AnyReport) -> float:
        return report.metrics[self.metric]

    def interval(self, report: AnyReport) -> Interval:
        return report.intervals[self.metric]

    def mean(self, reports: Sequence[AnyReport]) -> tuple[float, Interval]:
        lists = _of(Report, reports)
        mean_U = mean_per_user(lists, self.metric, lists[0].user_idx)
        (interval,) = bootstrap_intervals(mean_U[:, None], resamples=1000, seed=0)
        return statistics.mean(map(self.value, reports)), interval

    def behind(self, better: Sequence[AnyReport], other: Sequence[AnyReport]) -> Comparison:
        return compare(_of(Report, better), _of(Report, other), self.metric)


@final
class OfTask(Question):
    """The quality of a task's predictions: the AUC, or the RMSE (lower is better)."""

    def __init__(self, task: Task, report: RowsReport) -> None:
        self.task, self.short = task, "auc" if task.kind == "binary" else "rmse"
        self.sign = -1 if task.kind == "binary" else 1
        self.metric = f"{self.short}_{task.name}{report.suffix}"

    def _name(self, report: AnyReport) -> str:
        """Return the metric's name in a report, which may have further tasks."""
        (rows,) = _of(RowsReport, [report])
        return rows.name(self.short, self.task.name)

    def value(self, report: AnyReport) -> float:
        return report.metrics[self._name(report)]

    def interval(self, report: AnyReport) -> Interval:
        return report.intervals[self._name(report)]

    def mean(self, reports: Sequence[AnyReport]) -> tuple[float, Interval]:
        return mean_and_interval(_of(RowsReport, reports), self.short, self.task.name)

    def behind(self, better: Sequence[AnyReport], other: Sequence[AnyReport]) -> Comparison:
        first, second = _of(RowsReport, better), _of(RowsReport, other)
        pair = (first, second) if self.sign < 0 else (second, first)
        many = len(first[0].label_NT) >= _MANY_ROWS
        resamples = _FEW_RESAMPLES if many else 2 * _RESAMPLES
        return compare_rows(*pair, self.short, task=self.task.name, resamples=resamples)


Reports = Mapping[str, Sequence[AnyReport]]
"""Reports by the name of a model or baseline, one for each seed."""


def compare_measured(
    measured: Sequence[Measured],
    failed: Sequence[FailedModel],
    split: Split,
    plan: Plan,
    budget_seconds: float | None,
) -> ModelComparison:
    """Compare models; by labelled rows, compare them also with baselines of counts.

    Args:
        measured: At least one model.
        failed: Models without figures.
        split: The training data.
        plan: The plan of the comparison.
        budget_seconds: Time limit of all trainings.

    Raises:
        ConfigError: No model was measured.
    """
    if not measured:
        raise ConfigError(
            f"none of {len(failed)} models could be measured: {failed[0].error}",
            name=failed[0].name,
        )
    meaning = _notes(budget_seconds, measured, by_rows=bool(plan.tasks))
    questions = _questions(measured[0].reports[0], plan.tasks)
    leading = questions[0]
    measured = sorted(measured, key=lambda found: leading.badness(found.reports))
    reports = {found.name: found.reports for found in measured}
    best = measured[0].reports
    floors, left_out = _baselines(measured[0], questions, split) if plan.tasks else ({}, [])
    every: Reports = {**reports, **floors}
    figures = [corrected([one.figure(own, best) for own in every.values()]) for one in questions]
    of = dict(zip(every, zip(*figures, strict=True), strict=True))
    rows = [model_row(found, *of[found.name]) for found in measured]
    chance = _chance(best[0], leading, of)
    users = best[0].counts["users"]
    pick, sentence = choose(rows, leading.metric, users=users, chance=chance)
    notes = [best[0].notes[0], *plan.notes, *meaning, *left_out]
    beaten_by = ""
    if plan.tasks:
        beaten_by, sentence = _beside_counting(sentence, pick, reports, floors, questions)
    else:
        notes.insert(0, f"chance: a random order of the same candidates gets {chance:.4f}")
        if rows[0].interval.low <= chance:
            sentence = (
                f"No model is significantly better than chance: the best {label(leading.metric)}, "
                f"{rows[0].quality:.4f}, has an interval from {rows[0].interval.low:.4f}, and a "
                f"random order gets {chance:.4f}. {sentence}"
            )
    return ModelComparison(
        metric=leading.metric,
        rows=(*rows, *(_floor(name, floors[name][0], of[name]) for name in floors)),
        failed=tuple(failed),
        split=split.kind,
        users=users,
        budget_seconds=budget_seconds,
        pick=pick,
        sentence=sentence,
        notes=tuple(notes),
        judged=best[0].counts["rows"] if plan.tasks else 0,
        chance=None if plan.tasks else chance,
        beaten_by=beaten_by,
    )


def _questions(report: AnyReport, tasks: tuple[Task, ...]) -> Sequence[Question]:
    lists, rows = _of(Report, [report]), _of(RowsReport, [report])
    return [ByLists(lists[0])] if lists else [OfTask(task, rows[0]) for task in tasks]


def _chance(report: AnyReport, leading: Question, of: Mapping[str, Sequence[TaskFigure]]) -> float:
    """Return the first metric of a random order."""
    if isinstance(report, Report):
        return report.chance[leading.metric]
    return 0.5 if leading.sign < 0 else of[BASE_RATE][0].value


def _baselines(
    found: Measured, questions: Sequence[Question], split: Split
) -> tuple[dict[str, list[RowsReport]], list[str]]:
    """Return the reports of baselines on a model's rows, the best first, the base rate last."""
    if found.rows is None:
        raise ConfigError(f"{found.name} was not measured by labelled rows", name=found.name)
    tasks = tuple(one.task for one in questions if isinstance(one, OfTask))
    counted, notes = count_baselines(split, found.rows, tasks)
    report = _of(RowsReport, found.reports)[0]
    names = [task.name for task in report.tasks]
    label_NT = report.label_NT[:, [names.index(task.name) for task in tasks]]
    reports = {
        one.name: measure_rows(
            Predicted(
                name=report.holdout,
                digest=report.holdout_digest,
                tasks=tasks,
                user_N=report.user_N,
                label_NT=label_NT,
                prediction_NT=one.prediction_NT,
                suffix=report.suffix,
            ),
            model=one.name,
            resamples=_RESAMPLES if len(label_NT) < _MANY_ROWS else _FEW_RESAMPLES,
            seed=0,
            calibration={},
            settings={},
            train_seed=0,
        )
        for one in counted
    }
    in_order = sorted(
        reports, key=lambda name: (name == BASE_RATE, questions[0].badness([reports[name]]))
    )
    return {name: [reports[name]] for name in in_order}, notes


def _floor(name: str, report: AnyReport, figures: Sequence[TaskFigure]) -> ModelRow:
    return ModelRow(
        name=name,
        kind=name,
        leading=figures[0],
        metrics=report.metrics,
        tasks=tuple(figures[1:]),
        is_baseline=True,
    )


def _beside_counting(
    sentence: str, pick: str, reports: Reports, floors: Reports, questions: Sequence[Question]
) -> tuple[str, str]:
    """Return the baseline that is better than every model, if there is one, and the advice, with
    remarks on other tasks and baselines.
    """
    tasks = [one for one in questions if isinstance(one, OfTask)]
    beaten_by, warning = _counting_is_better(reports, floors, tasks[0])
    if beaten_by:
        sentence = f"{warning}Of the models alone, {sentence[0].lower()}{sentence[1:]}"
    sentence += "".join(_better_elsewhere(pick, reports, task) for task in tasks[1:])
    unsaid = tasks if beaten_by in ("", BASE_RATE) else tasks[1:]
    return beaten_by, sentence + "".join(_no_better(reports[pick], floors, one) for one in unsaid)


def _better_elsewhere(pick: str, reports: Reports, task: OfTask) -> str:
    """Return the model that is significantly better at another task, if there is one."""
    name = _strongest(reports, task)
    if name == pick:
        return ""
    found = task.behind(reports[name], reports[pick])
    if found.interval.low <= 0:
        return ""
    return f" For {task.task.name}, {name} is better by {found.difference:.4f} of {task.short}."


def _counting_is_better(reports: Reports, floors: Reports, task: OfTask) -> tuple[str, str]:
    """Return the baseline with a better figure than every model's, and a sentence; or "" and ""."""
    name, best = _strongest(floors, task), next(iter(reports))
    found = task.behind(floors[name], reports[best])
    if found.difference < 0:
        return "", ""
    own = task.figure(reports[best], reports[best]).value
    return name, (
        f"No model is worth taking yet: {_named(name)}, without any training, has an {task.short} "
        f"of {task.value(floors[name][0]):.4f} at {task.task.name}, and {best}, the best model, "
        f"{own:.4f} (behind by {difference(found)}). "
    )


def _no_better(reports: Sequence[AnyReport], floors: Reports, task: OfTask) -> str:
    """Return a warning if a model is not significantly better than a baseline."""
    name, of = _strongest(floors, task), task.task.name
    ahead = task.behind(reports, floors[name])
    value = f"{task.short} is {task.value(floors[name][0]):.4f}"
    if ahead.interval.high < 0:
        return f" For {of}, {_named(name)} is better: its {value}."
    if task.behind(reports, floors[BASE_RATE]).interval.low <= 0:
        return f" For {of}, it does not differ from the {BASE_RATE}: it learned nothing there."
    if ahead.interval.low > 0:
        return ""
    return f" For {of}, it is not significantly better than {_named(name)}, whose {value}."


def _named(baseline: str) -> str:
    return f"the {BASE_RATE}" if baseline == BASE_RATE else baseline.replace("counts", "counting")


def _strongest(reports: Reports, task: Question) -> str:
    return min(reports, key=lambda name: task.badness(reports[name]))


def _notes(
    budget_seconds: float | None, measured: Sequence[Measured], *, by_rows: bool
) -> tuple[str, ...]:
    budget = (
        "no budget was set"
        if budget_seconds is None
        else f"the budget of {budget_seconds:g} s covers training and validations; "
        "models in closed form are trained first and cannot be stopped early"
    )
    how, of_best = "of the paired sign-flip test", "the best"
    if by_rows:
        how, of_best = "by the bootstrap", "the best by the first task"
    asked = (
        "1,000 rows: median time from their events to predictions"
        if by_rows
        else f"answer: median time of {ASKED} single requests to the model as it is served"
    )
    return (
        f"behind the best: the difference from {of_best}, paired by user, with its 95 % "
        f"bootstrap interval; p {how}, corrected for several models by Holm's method",
        f"{asked}; bundle: all its files, training events included",
        f"training: {budget}; all models are trained only on the training part",
        *_of_seeds(measured),
    )


def _of_seeds(measured: Sequence[Measured]) -> tuple[str, ...]:
    """Explain the figures if there are several seeds."""
    several = {seeds for found in measured if len(seeds := found.seeds) > 1}
    if not several:
        return ()
    once = ", ".join(found.name for found in measured if len(found.seeds) == 1)
    return tuple(
        f"seeds {', '.join(map(str, seeds))}: a figure is the mean over them, ± their standard "
        "deviation; intervals and p are over users, of each user's mean; the bundle, its size and "
        f"the time of an answer are of the first{f'. Trained once: {once}' if once else ''}"
        for seeds in several
    )


def choose(rows: Sequence[ModelRow], metric: str, *, users: int, chance: float) -> tuple[str, str]:
    """Return the name of the recommended model, and a sentence with the reason.

    It is the best model, unless a faster one is as good: then the paired interval of the difference
    includes 0 and ends below `WORTH` of the best model's gain over chance. If a difference is not
    significant but its interval is wider, there are too few users to decide, and the model with the
    best figure is recommended.

    Args:
        rows: Best first.
        metric: The leading metric.
        users: Number of measured users.
        chance: The leading figure of a random order.
    """
    best, others = rows[0], rows[1:]
    margin = WORTH * abs(best.quality - chance)
    tied = [row for row in others if row.ties_with_the_best]
    unsure = [row for row in tied if _reach(row, users) > margin]
    faster = [row for row in tied if row.train_seconds < best.train_seconds]
    if unsure:
        pick, sentence = best, _too_few(best, unsure, metric, users=users, margin=margin)
    elif faster:
        pick = min(faster, key=lambda row: row.train_seconds)
        sentence = (
            f"Take {pick.name}: its {label(metric)} of {pick.quality:.4f} is as good as the "
            f"{best.quality:.4f} of {best.name}, the best (behind by {_behind(pick)}; less than "
            f"{margin:.2g}, a tenth of what {best.name} gains over chance, does not count), "
            f"and it trains in {pick.train_seconds:.2f} s instead of {best.train_seconds:.2f} s."
        )
    else:
        pick = best
        sentence = f"Take {pick.name}: its {label(metric)} "
        if others:
            next_one = f"{others[0].name} comes next, behind by {_behind(others[0])}"
            sentence += f"of {best.quality:.4f} is the best; {next_one}."
        else:
            sentence += f"is {best.quality:.4f}, and there is no other model to compare it with."
    return pick.name, sentence + _cut_short(rows)


def _reach(row: ModelRow, users: int) -> float:
    """Return the largest plausible difference: by its interval, and by the smallest detectable
    difference.

    If none of U users shows a difference, up to 3 in U may still have one (the rule of three), of
    at most 1.
    """
    high = 0.0 if row.behind is None else row.behind.interval.high
    return max(high, 3 / users)


def _too_few(
    best: ModelRow, unsure: Sequence[ModelRow], metric: str, *, users: int, margin: float
) -> str:
    """Describe which models do not differ significantly from the best, and how many users are
    needed.
    """
    names = ", ".join(row.name for row in unsure)
    far = max(unsure, key=lambda row: row.behind.difference if row.behind else 0.0)
    seen = max(3 / users, *(_half(row) for row in unsure))
    needed = max(_users_needed(row, users=users, margin=margin) for row in unsure)
    return (
        f"Too few users to decide which is best: on {users:,} test "
        f"{'user' if users == 1 else 'users'} luck may explain that {names} "
        f"{'is' if len(unsure) == 1 else 'are'} behind {best.name} ({far.name} by {_behind(far)}); "
        f"the test cannot detect differences below about {seen:.2g}. Stay with {best.name}, whose "
        f"{label(metric)} of {best.quality:.4f} is the best figure, or measure about "
        f"{needed:,} users."
    )


def _half(row: ModelRow) -> float:
    """Return half the width of the interval, the smallest detectable difference."""
    return 0.0 if row.behind is None else (row.behind.interval.high - row.behind.interval.low) / 2


def _users_needed(row: ModelRow, *, users: int, margin: float) -> int:
    """Return about how many users would show whether the model is worse than the best.

    Widths decrease with the root of the number of users; the figure is rounded to two digits.
    """
    wanted = max(margin, row.behind.difference if row.behind else 0.0, 1e-4)
    needed = max(users * (_half(row) / wanted) ** 2, 3 / wanted, users + 1, FEWEST_USERS)
    return int(float(f"{needed:.2g}"))


def _cut_short(rows: Sequence[ModelRow]) -> str:
    cut = [row.name for row in rows if row.stopped]
    if not cut:
        return ""
    return (
        f" More time could change this: the budget cut {', '.join(cut)} short, and what "
        f"{'it' if len(cut) == 1 else 'they'} could reach is unknown."
    )


def _behind(row: ModelRow) -> str:
    return "0" if row.behind is None else difference(row.behind)

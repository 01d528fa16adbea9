"""What early stopping watches: on the validation part, higher is better."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
from torch import nn

from foretaste.data.rows import happened_split
from foretaste.data.splits import Holdout, Split
from foretaste.errors import DataError
from foretaste.evaluation.cold import Whose
from foretaste.evaluation.protocol import evaluate, to_find
from foretaste.evaluation.rows import evaluate_rows, rows_settings, rows_to_judge
from foretaste.evaluation.rows_report import RowsReport
from foretaste.evaluation.sampled import SampledNegatives
from foretaste.experiment.two_stage import Candidates
from foretaste.models.interface import LearnsNewcomers, Ranker
from foretaste.models.two_stage import second_stage
from foretaste.training.objectives.rows import RowsConfig
from foretaste.training.trained import Trained

STOP_METRIC = "ndcg_at_10"
"""Of lists, over the full catalogue; of users without history where none has one, and with items
that were seen where nothing else is to be found."""
ROWS_METRIC = "mean over tasks"
"""Of labelled rows: of a binary task its AUC, of another 1 - RMSE / standard deviation."""


@dataclass(frozen=True, eq=False)
class Validation:
    """A number for any weights of a model."""

    metric: str
    """`STOP_METRIC` or `ROWS_METRIC`."""
    value: Callable[[nn.Module], float]


def make_validation(
    trained: Trained, split: Split, candidates: Candidates | None = None
) -> Validation | None:
    """Return what a model's weights are judged by while it learns; None without validation events.

    A ranker is judged by the mean over its tasks: the AUC of a binary one, 1 - RMSE / standard
    deviation of the labels of another. A task whose labels are all alike in validation has no say.
    Where that is all of them, only what happened being known, and for all other models, it is
    NDCG@10 over the full catalogue: of a ranker with candidates, of the two stages together. A
    ranker may ask for the AUC against drawn items there (`RowsConfig.stop_by`).

    Args:
        trained: The model, in the making or made; its weights may change.
        split: What it is trained on.
        candidates: What a ranker will be asked about.
    """
    if isinstance(trained.model, Ranker):
        sampled = _zeros(trained.model, rows_settings(trained))
        if _can_judge(trained, split, sampled):
            return Validation(
                ROWS_METRIC,
                lambda model: _rows_value(replace(trained, model=model), split, sampled),
            )
    if isinstance(second_stage(trained.model), Ranker):
        split = happened_split(split, rows_settings(trained).positive)
    holdout = split.validation
    if len(holdout) == 0:
        return None
    users: Whose = "known" if holdout.has_history_Q.any() else "new"
    exclude_seen = _finds_unseen(holdout, users)

    def validate(model: nn.Module) -> float:
        if isinstance(model, LearnsNewcomers):
            model.learn_newcomers(trained.events)
        if candidates is not None:
            model = candidates.ranked_by(model)
        report = evaluate(
            replace(trained, model=model),
            holdout,
            k=(10,),
            exclude_seen=exclude_seen,
            resamples=0,
            users=users,
        )
        return report.metrics[STOP_METRIC + report.suffix]

    return Validation(STOP_METRIC, validate)


def _finds_unseen(holdout: Holdout, users: Whose) -> bool:
    try:
        to_find(holdout, users=users)
    except DataError:
        return False
    return True


def _zeros(ranker: Ranker, learned: RowsConfig) -> SampledNegatives | None:
    """Return what validation draws for each row, as training does; None: only what it must."""
    num = learned.num_negatives(ranker.tasks)
    return SampledNegatives(num=num) if learned.stop_by == "rows" and num else None


def _can_judge(trained: Trained, split: Split, sampled: SampledNegatives | None) -> bool:
    """Return whether validation's labels tell a good model of any task from a bad one."""
    rows, _, _ = rows_to_judge(trained, split, part="validation", sampled=sampled)
    for label_E, task in zip(rows.label_ET.T, rows.tasks, strict=True):
        values = set(label_E[~np.isnan(label_E)].tolist())
        if values and sampled is not None:
            values.add(0.0)  # of what is drawn
        if len(values) > (1 if task.kind == "binary" else 0):
            return True
    return False


def _rows_value(judged: Trained, split: Split, sampled: SampledNegatives | None) -> float:
    report = evaluate_rows(judged, split, part="validation", sampled=sampled, resamples=0)
    return float(np.mean(list(_task_values(report))))


def _task_values(report: RowsReport) -> Iterator[float]:
    """Give a number of each task that validation can judge: 1 is perfect, none has a unit."""
    for place, task in enumerate(report.tasks):
        if task.kind == "binary":
            name = report.name("auc", task.name)
            if name in report.metrics:
                yield report.metrics[name]
        elif (name := report.name("rmse", task.name)) in report.metrics:
            spread = np.nanstd(report.label_NT[:, place])
            yield 1 - report.metrics[name] / (spread or 1.0)

"""What early stopping watches: on the validation part, higher is better."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from torch import nn

from foretaste.data.rows import happened_split
from foretaste.data.splits import Split
from foretaste.evaluation.protocol import evaluate
from foretaste.evaluation.rows import evaluate_rows, rows_settings, rows_to_judge
from foretaste.experiment.two_stage import Candidates
from foretaste.models.interface import LearnsNewcomers, Ranker
from foretaste.training.trained import Trained

STOP_METRIC = "ndcg_at_10"
"""Of lists, over the full catalogue."""


def make_validation(
    trained: Trained, split: Split, candidates: Candidates | None = None
) -> Callable[[nn.Module], float] | None:
    """Return what a model's weights are judged by while it learns; None without validation events.

    A ranker's first task decides: its AUC where validation holds labels of both classes, minus the
    RMSE of a quantity. Where only what happened is known, and for all other models, it is NDCG@10
    over the full catalogue: of a ranker with candidates, of the two stages together. A ranker may
    ask for the AUC against drawn items there (`RowsConfig.stop_by`).

    Args:
        trained: The model in the making; its weights may change.
        split: What it is trained on.
        candidates: What a ranker will be asked about.
    """
    if isinstance(trained.model, Ranker):
        if _has_labels(trained, split):
            return lambda model: _rows_value(replace(trained, model=model), split)
        split = happened_split(split, rows_settings(trained).positive)
    holdout = split.validation
    if len(holdout) == 0:
        return None

    def validate(model: nn.Module) -> float:
        if isinstance(model, LearnsNewcomers):
            model.learn_newcomers(trained.events)
        if candidates is not None:
            model = candidates.ranked_by(model)
        report = evaluate(replace(trained, model=model), holdout, k=(10,), resamples=0)
        return report.metrics[STOP_METRIC]

    return validate


def _has_labels(trained: Trained, split: Split) -> bool:
    """Return whether validation can judge the first task."""
    rows, _, _ = rows_to_judge(trained, split, part="validation")
    label_E = rows.label_ET[:, 0]
    num_values = len(np.unique(label_E[~np.isnan(label_E)]))
    if rows_settings(trained).stop_by == "rows" and rows.drawn_EN.shape[1] and len(rows):
        num_values += 1  # what is drawn is a 0, beside the 1 that is known
    return num_values > (1 if rows.tasks[0].kind == "binary" else 0)


def _rows_value(judged: Trained, split: Split) -> float:
    report = evaluate_rows(judged, split, part="validation", resamples=0)
    task = report.tasks[0]
    if task.kind == "binary":
        return report.metrics[report.name("auc", task.name)]
    return -report.metrics[report.name("rmse", task.name)]

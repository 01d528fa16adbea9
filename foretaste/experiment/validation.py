"""Validation for early stopping: a metric on the validation part, higher is better.

Lists are measured on a sample of queries, and rows completely, as often as a share of the work of
training allows. Work is counted, never timed, so that two runs with one seed are the same.

Shape legend: E events, T tasks.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TypeVar

import numpy as np

from foretaste.config import Config
from foretaste.data.interactions import Interactions
from foretaste.data.splits import Holdout, Split, happened_split
from foretaste.errors import DataError
from foretaste.evaluation.asked import Task
from foretaste.evaluation.measure_queries import SampledNegatives, Whose, mean_ndcg
from foretaste.evaluation.protocol import to_find
from foretaste.evaluation.rows import (
    predict_rows,
    ranker_of,
    rows_settings,
    rows_to_judge,
    task_values,
)
from foretaste.experiment.compare_counts import count_baselines
from foretaste.experiment.two_stage import Candidates
from foretaste.models.base import Model, Ranker, Retriever, StrengthConfig
from foretaste.models.baselines import (
    ItemKNN,
    ItemKNNConfig,
    Popularity,
    PopularityConfig,
)
from foretaste.models.catalogue import ModelConfig
from foretaste.models.layers.table_kinds import FactorConfig
from foretaste.training import processes
from foretaste.training.objectives import (
    MaskedItemConfig,
    NextItemConfig,
    ObjectiveConfig,
    RowsConfig,
)
from foretaste.training.settings import TrainingConfig
from foretaste.training.trained import Trained

M = TypeVar("M", bound=Config)

STOP_METRIC = "ndcg_at_10"
"""The metric of lists over the full catalogue. If no user has a history, users without history are
measured; if there are no other targets, seen items count too."""
ROWS_METRIC = "mean over tasks"
"""The metric of labelled rows: the AUC of a binary task, 1 - RMSE / standard deviation of
others."""
_LEAST_QUERIES, _FEWEST_QUERIES, _EPOCHS_WORK = 1000, 100, 4
"""Limits on a sample of queries: at least 1,000, or as many as take the work of four epochs, but no
fewer than 100. A ranker scores the whole catalogue for each query."""
_SAMPLED, _MOST = 1 / 8, 0.3
"""Validation's work as a share of training's: for a sample above the minimum, and in any case."""
_JUDGED, _READ, _MULTIPLIED = 1 / 4, 1 / 9, 1 / 400
"""The work of running a ranker on a row, of reading an event of a history, and of multiplying two
vectors with a top-k check, as shares of a training step's work on one row, measured on MovieLens
100K."""
_ABOVE, _ABOVE_BASE = 1.1, 0.01
"""A model is above popularity's level at 1.1 times its NDCG, and above the base rate's level (.5
for an AUC, 0 for a regression) at .01 more."""
_RECENCIES = 4.0, 16.0, 64.0
"""Weights of the newest event that are tried, until one is worse than the one before."""
_MOST_PAIRS = 2**28
"""Maximum number of item pairs for which item-kNN is fitted as a baseline, in a few seconds."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Validation:
    """The validation metric of any weights of a model."""

    metric: str
    """`STOP_METRIC` or `ROWS_METRIC`."""
    value: Callable[[Model], float]
    on: str
    """The queries that it is computed on, such as "1,000 of 9,885 queries"."""
    level: float
    """The level of popularity or of the base rate."""
    beside: Callable[[], dict[str, float]]
    """Computes the figures of baselines of counts, by name."""
    every: int = 1
    """Epochs between two validations."""

    def advice(self, best: float, *, best_epoch: int, epochs: int) -> tuple[dict[str, float], str]:
        """Return the figures of baselines of counts, and advice if a run is below one.

        Args:
            best: The run's best value.
            best_epoch: The epoch of the best value.
            epochs: Number of epochs of the run.
        """
        beside = self.beside()
        better = {name: value for name, value in beside.items() if value > best}
        if not better:
            return beside, ""
        name = max(better, key=lambda name: better[name])
        if best_epoch >= epochs - self.every:
            todo = "it was still improving: raise training.epochs or training.learning_rate"
        elif best <= self.level:
            todo = "it learned little: try another training.learning_rate, or a lower l2"
        else:
            todo = "it was best early: raise l2 or dropout, or lower training.learning_rate"
        return beside, (
            f"below {name} on validation ({self.metric} {best:.4f}, not {better[name]:.4f}): "
            f"{todo}; `tune` searches such settings, `compare` other models"
        )

    def __str__(self) -> str:
        """Return a line that describes the validation."""
        often = "every epoch" if self.every == 1 else f"every {self.every} epochs"
        return f"validated {often} on {self.on}"


def trained_rows(model: Model, objective: ObjectiveConfig, events: Interactions) -> int:
    """Return the approximate number of rows of an epoch: events, and items drawn for a ranker."""
    match objective:
        case RowsConfig() if isinstance(model, Ranker):
            return len(events) * (1 + objective.num_negatives(model.tasks))
        case NextItemConfig() | MaskedItemConfig() if objective.windows == "last":
            return int(np.minimum(np.diff(events.offsets), model.max_len).sum())
    return len(events)


def make_validation(
    trained: Trained,
    split: Split,
    candidates: Candidates | None = None,
    *,
    training: TrainingConfig | None = None,
    rows_of_epoch: int = 1,
) -> Validation | None:
    """Return the validation of a model during training; None without validation events.

    A ranker is measured by the mean over its tasks: the AUC of a binary task, 1 - RMSE / standard
    deviation of the labels of others. A task whose validation labels are all equal does not count.
    If this leaves no task, because all events are positive, and for all other models, the metric is
    NDCG@10 over the full catalogue; for a ranker with candidates, it is that of the two stages
    together. `RowsConfig.stop_by` may choose the AUC against drawn items instead.

    Args:
        trained: The model, whose weights may change.
        split: The training data.
        candidates: The candidates that a ranker will score.
        training: Decides the number of queries and the frequency; None: all queries.
        rows_of_epoch: Number of training rows in an epoch, from `trained_rows`.
    """
    if isinstance(trained.model, Ranker):
        found = _by_rows(trained, split, training, rows_of_epoch)
        if found is not None:
            return found
    if isinstance(trained.model.second_stage, Ranker):
        split = happened_split(split, rows_settings(trained).positive)
    holdout = split.validation
    if len(holdout) == 0:
        return None
    task, exclude_seen = _asked(holdout)
    each = _work_of_query(trained, task, candidates)
    sample = task.sample(_num_queries(training, _SAMPLED * rows_of_epoch / each, len(task.row_Q)))
    lists = _Lists(trained=trained, holdout=holdout, task=sample, exclude_seen=exclude_seen)

    def value(model: Model) -> float:
        model.learn_new_users(trained.events)
        return lists.ndcg(model if candidates is None else candidates.ranked_by(model))

    return Validation(
        metric=STOP_METRIC,
        value=value,
        on=f"{len(sample.row_Q):,} of {len(task.row_Q):,} queries",
        level=_ABOVE * lists.popular,
        beside=lists.beside,
        every=_every(training, each * len(sample.row_Q), rows_of_epoch),
    )


@dataclass(frozen=True, eq=False, kw_only=True)
class _Lists:
    """Measures any model's lists on the same queries."""

    trained: Trained
    holdout: Holdout
    task: Task
    exclude_seen: bool

    def ndcg(self, model: Model) -> float:
        judged = replace(self.trained, model=model)
        return mean_ndcg(judged, self.holdout, self.task, k=10, exclude_seen=self.exclude_seen)

    @cached_property
    def popular(self) -> float:
        """The metric of popularity."""
        return self._learned(Popularity(PopularityConfig(), num_items=self._num_items))

    def beside(self) -> dict[str, float]:
        """Measure popularity and, if there are histories, item-kNN."""
        found = {"popularity": self.popular}
        if self.task.length_Q.any() and _pairs(self.trained.events) <= _MOST_PAIRS:
            found["item-kNN"] = self._learned(ItemKNN(ItemKNNConfig(), num_items=self._num_items))
        return found

    def _learned(self, model: Popularity | ItemKNN) -> float:
        model.learn(self.trained.events)
        return self.ndcg(model)

    @property
    def _num_items(self) -> int:
        return self.trained.events.num_items


def _pairs(events: Interactions) -> int:
    """Return the number of item pairs with a common user, which is item-kNN's work."""
    return int((np.diff(events.offsets).astype(np.float64) ** 2).sum())


def _num_queries(training: TrainingConfig | None, affordable: float, num_all: int) -> int:
    if training is None or training.validate_queries == "all":
        return num_all
    if training.validate_queries == "auto":
        bounded = max(_FEWEST_QUERIES, int(_EPOCHS_WORK / _SAMPLED * affordable))
        return max(min(_LEAST_QUERIES, bounded), int(affordable))
    return training.validate_queries


def _every(training: TrainingConfig | None, work: float, rows_of_epoch: int) -> int:
    """Return the epochs between two validations, given their work."""
    if training is None:
        return 1
    if training.validate_every != "auto":
        return training.validate_every
    return max(1, min(training.rounds, math.ceil(work / (_MOST * rows_of_epoch))))


def _asked(holdout: Holdout) -> tuple[Task, bool]:
    """Return the targets, and whether seen items are excluded.

    Raises:
        DataError: There are no targets.
    """
    users: Whose = "known" if holdout.has_history_Q.any() else "new"
    try:
        task, asked_Q = to_find(holdout, users=users)
        exclude_seen = True
    except DataError:
        task, asked_Q = to_find(holdout, exclude_seen=False, users=users)
        exclude_seen = False
    return task.select(asked_Q), exclude_seen


def _work_of_query(trained: Trained, task: Task, candidates: Candidates | None) -> float:
    """Return the work of ranking the catalogue for a query, in training rows."""
    model, num_items = trained.model, trained.events.num_items
    if candidates is not None:
        return num_items * _MULTIPLIED + candidates.num * _JUDGED
    if not isinstance(model, Retriever):
        return num_items * _JUDGED
    read = float(np.minimum(task.length_Q, model.max_len).mean())
    return read * _READ + num_items * _MULTIPLIED


def _by_rows(
    trained: Trained, split: Split, training: TrainingConfig | None, rows_of_epoch: int
) -> Validation | None:
    """Return a validation of a ranker by labels; None if no task has different labels."""
    sampled = _zeros(ranker_of(trained), rows_settings(trained))
    rows, _, _ = rows_to_judge(trained, split, part="validation", sampled=sampled)
    judged = []
    for label_E, task in zip(rows.label_ET.T, rows.tasks, strict=True):
        values = set(label_E[~np.isnan(label_E)].tolist())
        if values and sampled is not None:
            values.add(0.0)  # the seed of drawn items
        if len(values) > (1 if task.kind == "binary" else 0):
            judged.append(task)
    if not judged:
        return None

    def value(model: Model) -> float:
        label_NT, prediction_NT = predict_rows(replace(trained, model=model), rows)
        return float(np.mean(list(task_values(rows.tasks, label_NT, prediction_NT))))

    def beside() -> dict[str, float]:
        blind = replace(rows, context=None).batch(rows.every, reads="nothing", max_len=0)
        label_NT = blind.label_BCT.flatten(0, 1).double().numpy()
        counted, _ = count_baselines(split, rows, rows.tasks)
        return {
            each.name: float(np.mean(list(task_values(rows.tasks, label_NT, each.prediction_NT))))
            for each in counted
        }

    binary = [task.kind == "binary" for task in judged]
    return Validation(
        metric=ROWS_METRIC,
        value=value,
        on=f"{len(rows):,} rows",
        level=float(np.mean(binary)) / 2 + _ABOVE_BASE,
        beside=beside,
        every=_every(training, len(rows) * (1 + rows.drawn_EN.shape[1]) * _JUDGED, rows_of_epoch),
    )


def _zeros(ranker: Ranker, learned: RowsConfig) -> SampledNegatives | None:
    """Return the drawn zeros of each validation row, as in training; None: only if necessary."""
    num = learned.num_negatives(ranker.tasks)
    return SampledNegatives(num=num) if learned.stop_by == "rows" and num else None


def choose_recency(
    config: Config, model: Model, split: Split, validation: Validation | None
) -> dict[str, float]:
    """Set the weight of a history's newest event in answers, if it is "auto", by validation.

    Args:
        config: The settings of any model.
        model: The trained model, whose `recency` is set.
        split: Its data; without validation events, or without an order of events, nothing is tried.
        validation: The validation of the training.

    Returns:
        The validation figure of each value that was tried.
    """
    if not isinstance(config, FactorConfig) or config.recency != "auto" or model.recency is None:
        return {}
    if validation is None or not split.ordered:
        return {}
    tried = dict[float, float]()
    for recency in (1.0, *_RECENCIES):
        model.recency = recency
        with processes.work_divided():
            found = validation.value(model)
        tried[recency] = processes.by_first(partial(float, found), at_once=True)
        if tried[recency] < max(tried.values()):
            break
    model.recency = max(tried, key=lambda recency: tried[recency])
    return {f"{recency:g}": value for recency, value in tried.items()}


def with_recency(config: M, model: Model) -> M:
    """Return a model's settings with the weight that was chosen for its newest events."""
    if not isinstance(config, FactorConfig) or model.recency is None:
        return config
    return config.model_copy(update={"recency": model.recency})


def choose_strengths(
    config: ModelConfig, split: Split, fit_one: Callable[[ModelConfig], Trained]
) -> tuple[dict[str, float], dict[str, float]]:
    """Choose by validation the "auto" regularisation of a model in closed form.

    Settings are tried one after another, with the best values of the others so far. Without
    validation events, or with too many events or items for several fits, the defaults are used.

    Args:
        config: The settings of any model.
        split: The data of training and validation.
        fit_one: Trains a model.

    Returns:
        The chosen values, and the validation figure of each value that was tried.
    """
    if not isinstance(config, StrengthConfig):
        return {}, {}
    chosen = {name: config.strength(name) for name in config.left_open}
    said = dict[str, float]()
    if len(split.validation) == 0 or not config.may_try(split.train):
        return chosen, said
    for name in chosen:
        values = {}
        for strength in config.strengths[name]:
            trained = fit_one(config.model_copy(update=chosen | {name: strength}))
            validation = make_validation(trained, split, training=TrainingConfig())
            values[strength] = 0.0 if validation is None else validation.value(trained.model)
        chosen[name] = max(values, key=lambda strength: values[strength])
        said |= {f"{name} {strength:g}": value for strength, value in values.items()}
    return chosen, said

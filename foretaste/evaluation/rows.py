"""Evaluation of rankers on labelled rows, each predicted from its user's earlier events.

Shape legend: N rows: events of a part and items drawn for them; B rows of a block, C items per row,
T tasks.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from foretaste.arguments import checked
from foretaste.config import Resamples, Seed
from foretaste.data.batch import RowBatch
from foretaste.data.draws import fill_blocks, own_blocks
from foretaste.data.rows import PartName, Rows, rows_of
from foretaste.data.splits import TEST, TRAIN, UNUSED, VALIDATION, Split, happened_split
from foretaste.data.tasks import Task, metric_name
from foretaste.errors import ConfigError, DataError, NonFiniteError
from foretaste.evaluation.asked import Asked, Overlap, overlap
from foretaste.evaluation.list_metrics import percentile_interval
from foretaste.evaluation.measure_queries import SampledNegatives
from foretaste.evaluation.report import RowsReport
from foretaste.evaluation.row_metrics import (
    NUM_BINS,
    Reliability,
    TaskRows,
    Weighed,
    auc,
    checked_predictions,
    point_values,
    reliability,
    resampled,
)
from foretaste.models.base import Ranker
from foretaste.sampling.negatives import RowNegatives, Seen
from foretaste.sampling.samplers import PopularitySampler, Sampler, UniformSampler
from foretaste.training.objectives import RowsConfig
from foretaste.training.trained import Calibration, Trained, calibrated

_BLOCK_ROWS = 2**13
_NEW_USERS_EVENTS = 50
"""Number of events read for a user that the model does not know, if training read none."""
_LAST = {"train": TRAIN, "validation": VALIDATION, "test": TEST}


@checked
def evaluate_rows(
    model: Trained,
    split: Split,
    *,
    part: PartName = "test",
    sampled: SampledNegatives | None = None,
    calibration: Mapping[str, Calibration] | None = None,
    resamples: Resamples = 1000,
    seed: Seed = 0,
) -> RowsReport:
    """Compare a ranker's predictions for a part's labelled rows with their labels.

    Each row is predicted from its user's earlier events, with the trained weights. If the part has
    no zeros, as many items are drawn as in training, uniformly; metric names show it.

    Args:
        model: A ranker.
        split: The split of its training, or other events, in which users and items are matched by
            their ids; rows of items that the model does not know are left out and counted.
        part: "train", "validation" or "test".
        sampled: Settings of the drawn items, instead of those of training.
        calibration: Calibrations of binary tasks by name, from `fit_calibration` on other rows;
            calibrated figures are shown next to the plain ones. None: the model's own.
        resamples: Number of bootstrap resamples of users; 0 gives no intervals.
        seed: Decides the resamples.

    Raises:
        ConfigError: The model is not a ranker, or a setting is out of range.
        DataError: No row has a label, the model knows few of their items, or it was trained on most
            of them.
        NonFiniteError: A prediction is NaN or infinite.
    """
    ranker_of(model)  # otherwise it predicts no labels
    model = model.asked_by(split.events)
    split, known = known_rows(model, split, part=part)
    rows, notes, suffix = rows_to_judge(model, split, part=part, sampled=sampled)
    label_NT, prediction_NT = predict_rows(model, rows)
    return measure_rows(
        Predicted(
            name=part,
            digest=_digest(rows),
            tasks=rows.tasks,
            user_N=np.repeat(rows.events.user_idx, 1 + rows.drawn_EN.shape[1]).astype(np.int64),
            label_NT=label_NT,
            prediction_NT=prediction_NT,
            notes=(*notes, *(() if known is None else known.notes)),
            counts={} if known is None else known.counts,
            suffix=suffix,
        ),
        model=type(model.model).__name__,
        resamples=resamples,
        seed=seed,
        calibration=model.calibration if calibration is None else calibration,
        settings=model.settings,
        train_seed=model.seed,
    )


def ranker_of(model: Trained) -> Ranker:
    """Return the network that predicts labels, which is the second of two stages.

    Raises:
        ConfigError: The model predicts no labels.
    """
    ranker = model.model.second_stage
    if not isinstance(ranker, Ranker):
        raise ConfigError(
            f"{type(model.model).__name__} predicts no labels: `evaluate` measures its lists",
            name="trained",
            value=type(model.model).__name__,
        )
    return ranker


def rows_settings(model: Trained) -> RowsConfig:
    """Return a ranker's training objective, or its default."""
    return model.objective if isinstance(model.objective, RowsConfig) else RowsConfig()


def rows_to_judge(
    model: Trained, split: Split, *, part: PartName, sampled: SampledNegatives | None = None
) -> tuple[Rows, tuple[str, ...], str]:
    """Return a part's rows, with drawn items if there are no zeros; notes; and a suffix."""
    ranker, learned = ranker_of(model), rows_settings(model)
    rows = rows_of(
        split, part, tasks=ranker.tasks, features=model.features, positive=learned.positive
    )
    history = "its user's history before it, the weights as training left them"
    notes = (f"rows: every event of {part}, each with {history}",)
    num = learned.num_negatives(ranker.tasks)
    if sampled is None and num and not has_zeros(rows):
        sampled = SampledNegatives(num=num)
    if sampled is None:
        return rows, notes, ""
    seen = Seen.of(split.events.select(split.part_E <= _LAST[part]))
    draw = RowNegatives(_sampler(model, sampled, split.events.num_items), seen)
    rows = rows.draw(sampled.num, draw, seed=sampled.seed)
    return rows, (*notes, *_drawn_notes(model, rows, sampled)), sampled.suffix


def _drawn_notes(model: Trained, rows: Rows, sampled: SampledNegatives) -> Iterator[str]:
    yield (
        f"zeros: {sampled.num} items drawn for each row, {sampled.by}, of "
        f"{int((model.item_count > 0).sum()):,}, with repetitions, that the user has not done "
        f"before (seed {sampled.seed})"
    )
    nothing_E = (rows.drawn_EN == rows.events.item_idx[:, None]).all(axis=1)
    if nothing_E.any():
        yield (
            f"zeros: none for {int(nothing_E.sum()):,} of {len(rows):,} rows, whose user has done "
            "every item"
        )


def known_rows(model: Trained, split: Split, *, part: PartName) -> tuple[Split, Overlap | None]:
    """Leave out a part's rows of items that a model does not know, and count the overlap.

    Args:
        model: A model for queries in the rows of the split's events.
        split: The split with the rows.
        part: The part of the split.

    Returns:
        The split and the overlap, which is None for the split of the model's training.

    Raises:
        DataError: The model knows few of their items, or was trained on most of them.
    """
    if model.events is split.train:
        return split, None
    happened = happened_split(split, rows_settings(model).positive)
    found = overlap(model, Asked.of_rows(rows_of(happened, part, tasks=())))
    if model.translation is None:
        return split, found
    unknown_E = model.translation.item_X[split.events.item_idx] < 0
    part_E = np.where(unknown_E, UNUSED, split.part_E).astype(np.uint8)
    return replace(split, part_E=part_E), found


def has_zeros(rows: Rows) -> bool:
    """Return whether the labels of any binary task include zeros."""
    binary_T = np.array([task.kind == "binary" for task in rows.tasks])
    return bool((rows.label_ET[:, binary_T] == 0).any())


def _sampler(model: Trained, sampled: SampledNegatives, num_items: int) -> Sampler:
    count_I = model.item_count[:num_items]
    match sampled.by:
        case "uniform":
            return UniformSampler(len(count_I), known_I=torch.from_numpy(count_I > 0))
        case "popularity":
            return PopularitySampler(count_I, alpha=sampled.power)
        case "listed":
            raise ConfigError(
                "the negatives of rows are drawn, not listed: set sampled_by to uniform",
                name="sampled_by",
                value="listed",
            )


def predict_rows(
    model: Trained, rows: Rows
) -> tuple[Float64[np.ndarray, "N T"], Float64[np.ndarray, "N T"]]:
    """Return labels and a ranker's predictions, for rows and the items drawn for them."""
    each = 1 + rows.drawn_EN.shape[1]
    shape = len(rows), each, len(rows.tasks)
    label_ECT, prediction_ECT = np.zeros(shape), np.zeros(shape)
    own = own_blocks(len(rows), max(1, _BLOCK_ROWS // each))
    for block, batch in blocks_of(model, rows, own):
        label_ECT[block] = batch.label_BCT.double().numpy()
        prediction_ECT[block] = predict_tasks(ranker_of(model), batch).numpy()
    fill_blocks(label_ECT, prediction_ECT)
    return label_ECT.reshape(-1, shape[2]), prediction_ECT.reshape(-1, shape[2])


def task_values(
    tasks: Sequence[Task],
    label_NT: Float64[np.ndarray, "N T"],
    prediction_NT: Float64[np.ndarray, "N T"],
) -> Iterator[float]:
    """Return a number without unit for each task that rows can measure; 1 is perfect.

    It is the AUC for a binary task, and 1 - RMSE / standard deviation of the labels for others.
    They equal the figures of `evaluate_rows`, which reports more.

    Raises:
        NonFiniteError: A prediction is NaN or infinite.
    """
    for task, label_N, prediction_N in zip(tasks, label_NT.T, prediction_NT.T, strict=True):
        labelled_N = ~np.isnan(label_N)
        if not labelled_N.any():
            continue
        label_N, prediction_N = label_N[labelled_N], checked_predictions(prediction_N[labelled_N])
        if task.kind != "binary":
            error = np.sqrt(np.square(prediction_N - label_N).mean())
            yield float(1 - error / (label_N.std() or 1.0))
        elif label_N.min() != label_N.max():
            yield auc(label_N, prediction_N)


def blocks_of(
    model: Trained, rows: Rows, blocks: Iterable[slice]
) -> Iterator[tuple[slice, RowBatch]]:
    """Yield blocks of rows as a model's ranker reads them.

    A user that the model does not know is represented by the history, even if training read none.
    """
    ranker, translation = ranker_of(model), model.translation
    reads, max_len = ranker.reads, ranker.max_len
    only_new = translation is not None and reads == "nothing"
    if only_new:
        reads, max_len = "before", _NEW_USERS_EVENTS
    for block in blocks:
        row_B = np.arange(block.start, block.stop)
        batch = rows.batch(row_B, reads=reads, max_len=max_len, seed=block.start)
        if translation is not None:
            batch = translation.batch(batch, new_users_histories=only_new)
        yield block, batch


@torch.inference_mode()
def predict_tasks(ranker: Ranker, batch: RowBatch) -> Float64[Tensor, "B C T"]:
    """Return the predictions of each task."""
    found = ranker.heads.answers(ranker(batch.queries, batch.item_BC))
    return torch.stack([found[task.name] for task in ranker.tasks], dim=2).cpu()


def _digest(rows: Rows) -> str:
    """Return a SHA-256 of the rows, which does not depend on the number of tasks."""
    events = rows.events
    sha = hashlib.sha256(f"{events.users.digest} {events.items.digest}".encode())
    for column in (rows.events.user_idx, rows.events.item_idx, rows.drawn_EN):
        sha.update(np.ascontiguousarray(column).data)
    return sha.hexdigest()


@dataclass(frozen=True, eq=False, kw_only=True)
class Predicted:
    """A part's rows with a model's predictions."""

    name: str
    """The part: "validation" or "test"."""
    digest: str
    """SHA-256 of the rows."""
    tasks: tuple[Task, ...]
    user_N: Int64[np.ndarray, " N"]
    """Arbitrary numbers, equal for rows of one user."""
    label_NT: Float64[np.ndarray, "N T"]
    """NaN for missing labels."""
    prediction_NT: Float64[np.ndarray, "N T"]
    notes: tuple[str, ...] = ()
    counts: Mapping[str, int] = field(default_factory=dict)
    """Further counts for the report."""
    suffix: str = ""
    """Suffix of metric names, such as `_sampled_99`."""


def measure_rows(
    predicted: Predicted,
    *,
    model: str,
    resamples: int,
    seed: int,
    calibration: Mapping[str, Calibration],
    settings: Mapping[str, object],
    train_seed: int,
) -> RowsReport:
    """Compute the report of predictions.

    Raises:
        ConfigError: `resamples` is out of range, or a calibration belongs to no binary task.
        DataError: There is no row with a label.
        NonFiniteError: A prediction of a labelled row is NaN or infinite.
    """
    if resamples < 0:
        raise ConfigError(
            f"resamples is {resamples}: give 0 or more", name="resamples", value=resamples
        )
    _check_calibration(predicted.tasks, calibration)
    users, user_N = np.unique(predicted.user_N, return_inverse=True)
    parts = list(_task_rows(predicted, user_N.astype(np.int64), len(users)))
    if not parts:
        raise DataError(
            f"none of the {len(user_N)} rows of {predicted.name!r} has a label of "
            f"{', '.join(task.name for task in predicted.tasks)}: there is nothing to measure"
        )
    weighed: dict[str, Weighed] = {}
    curves: dict[str, Reliability] = {}
    missing: list[str] = []
    for part in parts:
        found, found_curves = _of_task(part, calibration.get(part.task.name))
        curves |= found_curves
        weighed |= {
            metric_name(name, part.task.name, predicted.tasks, predicted.suffix): metric
            for name, metric in found.items()
        }
        missing += _not_defined(part, found)
    metrics = point_values(weighed, len(users))
    drawn = resampled(weighed, len(users), resamples=resamples, seed=seed) if resamples else {}
    one_row_each = len(users) == len(user_N)
    return RowsReport(
        model=model,
        holdout=predicted.name,
        holdout_digest=predicted.digest,
        tasks=predicted.tasks,
        metrics=metrics,
        intervals={
            name: percentile_interval(value_R)
            for name, value_R in drawn.items()
            if not np.isnan(value_R).all()
        },
        reliability=curves,
        counts={
            "rows": len(user_N),
            "users": len(users),
            **predicted.counts,
            **{f"labels_{part.task.name}": len(part.label_N) for part in parts},
        },
        notes=(
            *predicted.notes,
            *missing,
            *_notes(parts, calibration, resamples=resamples, seed=seed, by_row=one_row_each),
        ),
        user_N=user_N.astype(np.int64),
        label_NT=predicted.label_NT,
        prediction_NT=predicted.prediction_NT,
        calibration=dict(calibration),
        settings=settings,
        seed=train_seed,
        suffix=predicted.suffix,
    )


def _task_rows(
    predicted: Predicted, user_N: Int64[np.ndarray, " N"], num_users: int
) -> list[TaskRows]:
    parts = []
    for place, task in enumerate(predicted.tasks):
        labelled_N = ~np.isnan(predicted.label_NT[:, place])
        if labelled_N.any():
            prediction_N = predicted.prediction_NT[labelled_N, place]
            if not np.isfinite(prediction_N).all():
                raise NonFiniteError(
                    f"a prediction of task {task.name!r} is NaN or infinite: the model is broken, "
                    "train it again",
                    name=task.name,
                )
            parts.append(
                TaskRows(
                    task=task,
                    label_N=predicted.label_NT[labelled_N, place],
                    prediction_N=prediction_N,
                    user_N=user_N[labelled_N],
                    num_users=num_users,
                )
            )
    return parts


def _of_task(
    part: TaskRows, calibration: Calibration | None
) -> tuple[dict[str, Weighed], dict[str, Reliability]]:
    """Return a task's metrics by their short names, and its curves."""
    found, curves, task = part.metrics(), {}, part.task.name
    if part.task.kind == "binary":
        curves[task] = reliability(part.label_N, part.prediction_N)
        if calibration is not None:
            better = part.predicting(calibrated(calibration, part.prediction_N))
            method = calibration.kind
            found |= {f"{n}_{method}": m for n, m in better.probability_metrics().items()}
            curves[f"{task}_{method}"] = reliability(better.label_N, better.prediction_N)
    return found, curves


def _not_defined(part: TaskRows, found: Mapping[str, Weighed]) -> list[str]:
    """Return notes on metrics that a task's rows do not define, with the reason."""
    if part.task.kind != "binary" or "gauc" in found:
        return []
    if "auc" not in found:
        return [
            f"auc of {part.task.name}: not defined, all {len(part.label_N)} labels are "
            f"{part.label_N[0]:g}"
        ]
    return [f"gauc of {part.task.name}: not defined, no user has both a 1 and a 0"]


def _check_calibration(tasks: tuple[Task, ...], calibration: Mapping[str, Calibration]) -> None:
    binary = [task.name for task in tasks if task.kind == "binary"]
    for name in calibration:
        if name not in binary:
            raise ConfigError(
                f"a calibration is of {name!r}, but the binary tasks are "
                f"{', '.join(binary) or 'none'}: probabilities alone can be calibrated",
                name=name,
            )


def _notes(
    parts: list[TaskRows],
    calibration: Mapping[str, Calibration],
    *,
    resamples: int,
    seed: int,
    by_row: bool,
) -> list[str]:
    notes = [
        "a task is measured on the rows that have its label; missing ones are ignored, not "
        "treated as 0"
    ]
    kinds = {part.task.kind for part in parts}
    if "binary" in kinds:
        notes += [
            "auc: equal scores count as half; gauc: mean of each user's own auc, weighted by the "
            "user's rows, over users that have both a 1 and a 0",
            "log_loss: in nats, probabilities kept 2.2e-16 away from 0 and 1, as in scikit-learn; "
            f"ece: {NUM_BINS} bins of equal width",
        ]
    if kinds - {"binary"}:
        notes.append("rmse, mae: in the label's own unit; of an ordinal task, expected level")
    notes += [
        f"{method}: fitted on other rows, the order of rows is kept but for ties"
        for method in dict.fromkeys(found.kind for found in calibration.values())
    ]
    unit = "rows" if by_row else "users with all their rows"
    notes.append(
        f"intervals: 95 %, percentile bootstrap over {unit}, {resamples} resamples, seed {seed}"
        if resamples
        else "intervals: none asked for"
    )
    return notes

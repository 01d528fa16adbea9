"""Runs a recipe: data, split, fit, evaluate, and a final fit."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from foretaste.arguments import checked
from foretaste.config import parse_settings
from foretaste.data.conditions import counted_as_positive, only_where
from foretaste.data.features_schema import FeatureSchema, TextField
from foretaste.data.features_values import load_encoder
from foretaste.data.folder import check_place
from foretaste.data.interactions import Interactions
from foretaste.data.read_config import WhichEvents
from foretaste.data.reading import read_interactions
from foretaste.data.sources.load import get_dataset
from foretaste.data.splits import Split, happened_split
from foretaste.data.splitting import make_split
from foretaste.data.store import open_store
from foretaste.errors import BundleError, ConfigError, DataError
from foretaste.evaluation.compare import Reports
from foretaste.evaluation.measure_queries import SampledNegatives, no_list
from foretaste.evaluation.protocol import evaluate, to_find
from foretaste.evaluation.report import Report, RowsReport, calibrate
from foretaste.evaluation.rows import evaluate_rows, ranker_of, rows_settings
from foretaste.experiment.fit import fit
from foretaste.experiment.learning import RunOptions
from foretaste.experiment.recipe import (
    EvaluationConfig,
    ExperimentConfig,
    FileData,
    PublicData,
    StoreData,
)
from foretaste.experiment.tracking import Tracker, TrackerKind, check_tracker, followed
from foretaste.experiment.two_stage import ranking_gain, retrieval_alone
from foretaste.models.base import Ranker
from foretaste.models.catalogue import TwoStage, tasks_of
from foretaste.serving.recommender import Recommender, build_recommender
from foretaste.shown import Shown
from foretaste.training import processes
from foretaste.training.checkpoint import (
    CHECKPOINT,
    Epoch,
    epochs_done,
    find_checkpoint,
    forget_checkpoint,
)
from foretaste.training.objectives import RowsConfig
from foretaste.training.progress import Cost, ShowProgress, duration
from foretaste.training.trained import Trained

_FINAL = "final"
FIRST_RUN = (
    "of the first run, trained only on the training part: the bundle's model was trained again, "
    'on all events (final = "all"), and was not measured'
)


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Run(Shown):
    """The result of a recipe."""

    trained: Trained
    report: Reports
    """The report on the test part; empty if the split has none."""
    refitted: Trained | None = None
    """The model trained on more than the training part, if the recipe's `final` asks for it."""
    refitted_report: Reports | None = None
    """The final model's report; None if it learned from the test too, or there is no final
    model."""

    @property
    def final(self) -> tuple[Trained, Reports]:
        """The model to serve, and the report to store with it."""
        if self.refitted is None:
            return self.trained, self.report
        return self.refitted, self.refitted_report or self.report.noted(FIRST_RUN)

    def _facts(self) -> dict[str, object]:
        trained, report = self.final
        return {"": f"{trained}, {report!r}"}


@checked
def read_split(config: ExperimentConfig, *, data_dir: Path | str | None = None) -> Split:
    """Read a recipe's data and split it.

    Args:
        config: The recipe.
        data_dir: Folder of a public data set's files, and of files that a recipe names by a
            relative path.

    Raises:
        ConfigError: A text field names an encoder that does not exist, or its extra is missing.
        DataError: The tables are invalid, or cannot be split in this way.
        SourceError: The public data set cannot be downloaded.
        BundleError: The event store is missing or broken.
    """
    schema = config.features or FeatureSchema()
    for field in (*schema.user.values(), *schema.item.values(), *schema.context.values()):
        if isinstance(field, TextField):
            load_encoder(field.encoder)
    folder = None if data_dir is None else Path(data_dir)
    return make_split(config.split, _read_events(config.data, folder))


@checked
def run_folder(bundle: Path | str) -> Path:
    """Return the folder of the checkpoints for a bundle, which is next to the bundle."""
    place = Path(bundle)
    if place.name in ("", ".."):
        place = place.absolute().resolve()
    return place.parent / f"{place.name}.run"


@checked
def start_run(
    bundle: str | Path,
    *,
    result: str | Path | None = None,
    resume: bool = False,
    replace: bool = False,
    track: TrackerKind | None = None,
) -> Path:
    """Check before training that its results can be written; return the folder of checkpoints.

    Args:
        bundle: The folder of the bundle that will be written.
        result: The file of the run's record, if there will be one.
        resume: Continue the run whose checkpoints are next to `bundle`, and replace its output.
        replace: Replace a bundle, a record and the checkpoints of an earlier run.
        track: The tracker of the run, if any.

    Raises:
        ConfigError: The tracker's extra is not installed.
        BundleError: The bundle or an unfinished run of it exists, and neither `resume` nor
            `replace` is set; something else exists there; its folder cannot be written; or its
            checkpoint has the former layout.
        DataError: The record exists or cannot be written.
    """
    bundle, folder = Path(bundle), run_folder(bundle)
    if not processes.is_first():
        return folder
    if track is not None:
        check_tracker(track)
    may_replace = replace or (resume and find_checkpoint(folder) is not None)
    check_place(bundle, "bundle", replace=may_replace)
    check_place(folder / CHECKPOINT, "checkpoint", replace=True)
    if result is not None:
        check_place(result, replace=may_replace)
        if Path(result).absolute() in (bundle.absolute(), folder.absolute()):
            raise DataError(
                f"{result} is the place of the run itself: name another file for its record",
                name="result",
                value=str(result),
            )
    if not (resume or replace) and (epochs := stopped_after(folder)) is not None:
        raise BundleError(
            f"{folder} holds a run that was stopped after {epochs} epochs: give --resume to "
            "continue it, --replace to start again, or choose another place",
            name=str(bundle),
            value=str(bundle),
        )
    return folder


@checked
def stopped_after(folder: str | Path) -> int | None:
    """Return how many epochs a run had completed when it was stopped; None if it was not."""
    folder = Path(folder)
    refitted = folder / _FINAL
    return epochs_done(refitted if (refitted / CHECKPOINT).exists() else folder)


@checked
def run_experiment(
    config: ExperimentConfig,
    split: Split,
    *,
    folder: Path | str | None = None,
    resume: bool = False,
    track: TrackerKind | None = None,
    show: bool = True,
    max_seconds: float | None = None,
) -> Run:
    """Fit a recipe's model, evaluate it on the test part, and fit it on more data by `final`.

    If the split has no test part, nothing is measured. Several processes share the evaluation, and
    each has the complete report; the first one writes to the tracker.

    Args:
        config: The recipe.
        split: Its data, from `read_split`.
        folder: Folder for checkpoints and the log of steps; None: neither is written.
        resume: Continue from the checkpoint in `folder`.
        track: Log the run with MLflow or TensorBoard, in `folder` or the current folder.
        show: Report progress on standard error.
        max_seconds: Time limit of each training loop in seconds.

    Raises:
        ConfigError: The tracker's extra is not installed, or the recipe measures nothing.
        DataError: The test part has no targets; this is checked before any training.
        NonFiniteError: A loss, a gradient or a weight is not finite.
    """
    folder, is_first = None if folder is None else Path(folder), processes.is_first()
    options = RunOptions(folder=folder, resume=resume, show=show, max_seconds=max_seconds)
    check_measurable(config, split)
    if folder is not None and not resume and is_first:
        forget_checkpoint(folder / _FINAL)
    name, settings = config.model.kind, config.model_dump(mode="json")
    with followed(track if is_first else None, folder, name=name, settings=settings) as tracker:
        given = None if tracker is None else partial(_tell, tracker)
        say_final = partial(_say_final, config, split) if show else None
        trained = fit_recipe(config, split, replace(options, on_epoch=given, on_cost=say_final))
        with processes.work_divided():
            trained = with_calibration(trained, config.evaluation, split)
            report = evaluate_split(trained, config, split) if split.has_test else Reports()
        if tracker is not None:
            tracker.log_metrics(report.metrics, step=0)
    if config.final == "none":
        return Run(trained=trained, report=report)
    refitted = fit_final(trained, config, split, options.part(_FINAL))
    measurable = config.final == "validation" and split.has_test
    with processes.work_divided():
        again = evaluate_split(refitted, config, split) if measurable else None
    return Run(trained=trained, report=report, refitted=refitted, refitted_report=again)


def fit_final(
    trained: Trained, config: ExperimentConfig, split: Split, options: RunOptions
) -> Trained:
    """Train a recipe's model again, on the parts that its `final` names.

    Args:
        trained: The model of the first run, which chose the epochs and has the calibration.
        config: The recipe.
        split: Its data.
        options: The options of this training.
    """
    config = _with_chosen_epochs(_with_found(config, trained.log), trained.epochs)
    chosen = config.model_copy(update={"model": trained.config})  # by validation
    refitted = fit_recipe(chosen, _final_split(config, split), options)
    return replace(
        refitted,
        calibration=trained.calibration,  # trained on validation
        settings={**refitted.settings, "model": config.model.model_dump(mode="json")},
    )


def _final_split(config: ExperimentConfig, split: Split) -> Split:
    return split.everything() if config.final == "all" else split.refit()


def _say_final(config: ExperimentConfig, split: Split, cost: Cost) -> None:
    """Show the estimated time of the last training, once the first one has an estimate."""
    if config.final == "none" or (cost.validations and cost.validation_seconds is None):
        return
    more = len(_final_split(config, split).train) / max(1, len(split.train))
    seconds = more * cost.epochs * cost.epoch_seconds
    seconds = seconds if cost.max_seconds is None else min(seconds, cost.max_seconds)
    ShowProgress(cost.epochs).say(
        f'final = "{config.final}" trains again, without validation: at most '
        f"{duration(seconds)} for as many epochs"
    )


def check_measurable(config: ExperimentConfig, split: Split) -> None:
    """Check before training that the recipe's metrics can be measured on the test part.

    Raises:
        ConfigError: It measures only rows, and the model predicts no labels.
        DataError: The recipe asks for lists, but the test part has no targets.
    """
    if not (len(split.train) and split.has_test):
        return  # `fit` raises an error for empty training; without a test, nothing is measured
    asked, is_ranker = config.evaluation, bool(tasks_of(config.model))
    by_rows = asked.rows and is_ranker
    if not (asked.catalogue or by_rows):
        raise ConfigError(
            f"evaluation.catalogue is false, and {config.model.kind} predicts no labels of rows: "
            "set it to true",
            name="evaluation.catalogue",
            value=False,
        )
    if not asked.catalogue or (by_rows and not _has_lists(asked, split)):
        return
    learned = config.objective
    positive = learned.positive if isinstance(learned, RowsConfig) else ""
    test = happened_split(split, positive).test
    if asked.sampled_negatives and asked.sampled_by == "listed" and test.listed is None:
        raise no_list()
    try:
        to_find(test, exclude_seen=asked.exclude_seen, users=asked.users)
    except DataError as error:
        more = ", or set evaluation.catalogue = false" if by_rows else ""
        raise DataError(
            f"{error}{more}", name=error.name, column=error.column, value=error.value
        ) from error


@checked
def evaluate_split(trained: Trained, config: ExperimentConfig, split: Split) -> Reports:
    """Evaluate a model on the test part of a split, with a recipe's settings.

    Raises:
        ConfigError: A recipe measures only rows, and the model predicts no labels; or the split has
            no test part.
        DataError: The model was trained on the test part.
    """
    if not split.has_test:
        raise ConfigError(
            "the split has no test part, so nothing can be measured: set split.test above 0",
            name="split.test",
            value=0,
        )
    asked, is_ranker = config.evaluation, isinstance(trained.model.second_stage, Ranker)
    lists = rows = gain = None
    if asked.rows and is_ranker:
        rows = _evaluate_rows(trained, asked, split)
    if asked.catalogue and (rows is None or _has_lists(asked, split)):
        happened = happened_split(split, rows_settings(trained).positive) if is_ranker else split
        lists = _evaluate_lists(trained, asked, happened)
        if isinstance(trained.model, TwoStage):
            gain = ranking_gain(lists, _evaluate_lists(retrieval_alone(trained), asked, happened))
    if lists is None and rows is None:
        raise ConfigError(
            f"evaluation.catalogue is false, and {type(trained.model).__name__} predicts no "
            "labels of rows: set it to true",
            name="evaluation.catalogue",
            value=False,
        )
    return Reports(lists=lists, rows=rows, gain=gain)


def _has_lists(asked: EvaluationConfig, split: Split) -> bool:
    """Return whether lists can be measured: several items, and targets after a history."""
    longest = np.diff(split.events.offsets).max(initial=0)
    return split.events.num_items > 1 and (asked.users == "new" or bool(longest > 1))


def _evaluate_lists(trained: Trained, asked: EvaluationConfig, split: Split) -> Report:
    num = asked.sampled_negatives
    return evaluate(
        trained,
        split.test,
        k=asked.k,
        exclude_seen=asked.exclude_seen,
        sampled=SampledNegatives(num=num, by=asked.sampled_by) if num else None,
        among=asked.among,
        users=asked.users,
    )


def _evaluate_rows(trained: Trained, asked: EvaluationConfig, split: Split) -> RowsReport:
    mended = with_calibration(trained, asked, split)
    return evaluate_rows(mended, split, sampled=sampled_rows(trained, asked))


def with_calibration(trained: Trained, asked: EvaluationConfig, split: Split) -> Trained:
    """Return a ranker with the calibration of the recipe, fitted on validation.

    A ranker that has such a calibration, or was trained on validation, is not changed, and neither
    is another model.
    """
    if trained.learned_from in ("train and validation", "all events"):
        return trained
    kept = {found.kind for found in trained.calibration.values()}
    if asked.calibration is None or kept == {asked.calibration} or not len(split.validation):
        return trained
    if not isinstance(trained.model.second_stage, Ranker):
        return trained
    sampled = sampled_rows(trained, asked)
    fitted_to = evaluate_rows(trained, split, part="validation", sampled=sampled, resamples=0)
    return replace(trained, calibration=calibrate(fitted_to, asked.calibration))


def sampled_rows(trained: Trained, asked: EvaluationConfig) -> SampledNegatives | None:
    """Return the sampled negatives for each measured row of a ranker, if the recipe asks for
    them.
    """
    draws = rows_settings(trained).num_negatives(ranker_of(trained).tasks) > 0
    if draws and asked.sampled_negatives and asked.sampled_by != "listed":
        return SampledNegatives(num=asked.sampled_negatives, by=asked.sampled_by)
    return None


@checked
def to_recommender(trained: Trained, report: Report | Reports) -> Recommender:
    """Index a model's items and attach its report, without per-user values.

    Without measurements, there is no report.
    """
    return build_recommender(trained, report=json.loads(report.to_json(per_user=False)) or None)


def _tell(tracker: Tracker, epoch: Epoch) -> None:
    found = {n: getattr(epoch, n) for n in ("loss", "events_per_second", "validation")}
    tracker.log_metrics({n: v for n, v in found.items() if v is not None}, step=epoch.epoch)


def fit_recipe(config: ExperimentConfig, split: Split, options: RunOptions) -> Trained:
    """Train a recipe's model once, on the split's training part."""
    trained = fit(
        config.model,
        split,
        seed=config.seed,
        training=config.training,
        objective=config.objective,
        features=config.features,
        first_stage=config.first_stage,
        **vars(options),
    )
    config = _with_found(config, trained.log)
    return replace(trained, settings=config.model_dump(mode="json"))


def _with_found(config: ExperimentConfig, log: Mapping[str, object]) -> ExperimentConfig:
    """Return a recipe with the settings from a short search, if there was one."""
    search = log.get("search")
    if not isinstance(search, Mapping):
        return config
    return parse_settings(
        ExperimentConfig, config.model_dump() | search["found"], source="what a search found"
    )


def _with_chosen_epochs(config: ExperimentConfig, chosen: tuple[int, ...]) -> ExperimentConfig:
    """Return a recipe whose stages train for as many epochs as validation chose."""
    *of_first, own = chosen
    first = config.first_stage
    if of_first:
        training = first.training.model_copy(update={"epochs": of_first[0]})
        first = first.model_copy(update={"training": training})
    training = config.training.model_copy(update={"epochs": own})
    return config.model_copy(update={"training": training, "first_stage": first})


def _read_events(data: PublicData | FileData | StoreData, data_dir: Path | None) -> Interactions:
    base = data_dir or Path()
    match data:
        case PublicData():
            return _which(get_dataset(data.name, data_dir=data_dir).events, data)
        case StoreData():
            return _which(open_store(base / data.path), data)
        case FileData():
            files, settings = data.tables(base)
            return read_interactions(files, **settings)


def _which(events: Interactions, data: WhichEvents) -> Interactions:
    """Apply the recipe's `where`, and mark positive events by its `positive`."""
    events = only_where(events, data.where) if data.where else events
    return counted_as_positive(events, data.positive) if data.positive else events

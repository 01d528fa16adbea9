"""Searches a recipe's settings; weak trials are stopped early, and a search can be resumed."""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import optuna
import polars as pl
from optuna.distributions import BaseDistribution
from optuna.samplers import TPESampler
from optuna.trial import FrozenTrial, TrialState

from foretaste.arguments import checked
from foretaste.config import Rounds
from foretaste.data.arrays import out_of_memory
from foretaste.data.folder import check_place, whole_file
from foretaste.data.splits import Split
from foretaste.errors import ConfigError, DataError, NonFiniteError, TooLargeError
from foretaste.experiment.learning import RunOptions
from foretaste.experiment.recipe import ExperimentConfig, without_defaults
from foretaste.experiment.run import fit_recipe
from foretaste.experiment.search_space import distributions, with_drawn, with_own_objective
from foretaste.experiment.validation import STOP_METRIC, make_validation
from foretaste.shown import to_toml
from foretaste.training.checkpoint import Epoch

_STUDY, _BEST, _TRIALS = _FILES = ("study.db", "best.toml", "trials.json")
_FINISHED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)


@dataclass(frozen=True, kw_only=True)
class TrialRow:
    """One trial of a search."""

    number: int
    state: str
    """"complete", "pruned" (stopped early because it was weak) or "fail"."""
    value: float | None
    """The validation metric; None if the trial was stopped early."""
    seconds: float
    settings: Mapping[str, bool | int | float | str]
    """The drawn settings, by dotted name."""


@dataclass(frozen=True, kw_only=True)
class TuneResult:
    """The result of a search."""

    metric: str
    """The validation metric that was maximised: NDCG@10 of lists, or the mean over a ranker's
    tasks."""
    trials: tuple[TrialRow, ...]
    """The trials, in the order of their start."""
    best: TrialRow
    best_recipe: ExperimentConfig
    """The recipe with the best trial's settings."""
    ended: str
    """Why the search ended: all trials were completed, or its time was over."""

    @property
    def seconds(self) -> float:
        """The total time of all trials, in seconds."""
        return sum(trial.seconds for trial in self.trials)

    @checked
    def to_frame(self) -> pl.DataFrame:
        """Return the trials, best first, with a column for each drawn setting."""
        rows = [{**asdict(trial), **trial.settings} for trial in self.trials]
        frame = pl.DataFrame(rows, infer_schema_length=None, strict=False).drop("settings")
        return frame.sort("value", descending=True, nulls_last=True, maintain_order=True)

    @checked
    def to_json(self) -> dict[str, object]:
        """Return everything as plain JSON values."""
        return {
            "metric": self.metric,
            "ended": self.ended,
            "seconds": self.seconds,
            "best": asdict(self.best),
            "trials": [asdict(trial) for trial in self.trials],
            "recipe": self.best_recipe.model_dump(mode="json"),
        }


@checked
def tune(
    config: ExperimentConfig,
    split: Split,
    *,
    folder: str | Path,
    trials: Rounds | None = None,
    max_seconds: float | None = None,
    resume: bool = False,
    replace: bool = False,
    watch: Callable[[TrialRow], None] | None = None,
) -> TuneResult:
    """Search a recipe's settings by the metric of early stopping; the test part is never read.

    Args:
        config: The recipe; `[tune]` defines the search.
        split: The recipe's data.
        folder: Folder for the study and, at the end, `trials.json` and `best.toml`, which has the
            settings that differ from the defaults.
        trials: Total number of trials of the study; None: the recipe's number.
        max_seconds: Start no trial after this time, and stop the training of the last one then,
            with its best weights so far; there is at least one trial. None: the recipe's limit, if
            it has one. Searches with equal effort have equal numbers of trials, or equal times.
        resume: Continue the study in `folder`; a killed trial is run again.
        replace: Delete an earlier study in `folder`, and start again.
        watch: Called with each completed trial.

    Raises:
        ConfigError: `resume` and `replace` are both set; the folder has a study of another recipe;
            a range is wrong; the split has no validation part; or no trial was completed.
        DataError: The folder has a study and neither is set, or it cannot be written.
    """
    config = with_own_objective(config)
    space, folder = distributions(config), Path(folder)
    trials, max_seconds = trials or config.tune.trials, max_seconds or config.tune.max_seconds
    if max_seconds is not None and not max_seconds > 0:
        raise ConfigError(
            f"max_seconds is {max_seconds}: give more than 0 s, or none",
            name="max_seconds",
            value=max_seconds,
        )
    _check_folder(folder, resume=resume, replace=replace)
    study = _open_study(config, split, folder)
    started, ended = time.perf_counter(), f"all {trials} trials are done"
    for number in range(trials - len(_finished(study))):
        left = None
        if max_seconds is not None:
            left = max_seconds - (time.perf_counter() - started)
            if left <= 0 and number:
                ended = f"out of time after {number} trials and {max_seconds:g} s"
                break
        row = _run_trial(study, config, split, space, max_seconds=left)
        if watch is not None:
            watch(row)
    return _result(study, config, folder, ended=ended)


def _check_folder(folder: Path, *, resume: bool, replace: bool) -> None:
    """Check that the study can be written; delete the one to replace."""
    if resume and replace:
        raise ConfigError(
            "resume continues the study, and replace deletes it: give one of them",
            name="replace",
            value=True,
        )
    found = [name for name in _FILES if (folder / name).is_file()]
    if found and not (resume or replace):
        raise DataError(
            f"{folder / found[0]} exists already: give --resume to continue that search (in Python "
            "resume=True), --replace to delete it and start again, or choose another place",
            name=str(folder),
            value=str(folder),
        )
    for name in _FILES:
        check_place(folder / name, replace=True)
    if replace:
        for name in _FILES:
            (folder / name).unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)


def _open_study(config: ExperimentConfig, split: Split, folder: Path) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    file = folder / _STUDY
    study = optuna.create_study(
        storage=f"sqlite:///{file.absolute()}",
        study_name="tune",
        direction="maximize",
        load_if_exists=True,
        pruner=optuna.pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=2),
    )
    recipe = config.model_dump_json(exclude={"tune": {"trials", "max_seconds"}, "notes": True})
    if study.user_attrs.get("recipe", recipe) != recipe:
        raise ConfigError(
            f"{file} searches another recipe: name another folder", name="folder", value=str(folder)
        )
    study.set_user_attr("recipe", recipe)
    data = f"{split.train.fingerprint()} {split.refit().train.fingerprint()}"
    if study.user_attrs.get("data", data) != data:
        raise ConfigError(
            f"{file} searched on other events: name another folder, or replace the search",
            name="folder",
            value=str(folder),
        )
    study.set_user_attr("data", data)
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        study.enqueue_trial(trial.params)  # a killed trial is run again, with a new number
        study.set_user_attr("killed", [*study.user_attrs.get("killed", ()), trial.number])
        study.tell(trial.number, state=TrialState.FAIL)
    # The seed depends on the number of trials, so that a resumed search does not repeat draws.
    study.sampler = TPESampler(seed=(config.seed * 1_000_003 + len(study.trials)) % 2**32)
    return study


def _finished(study: optuna.Study) -> list[FrozenTrial]:
    killed = study.user_attrs.get("killed", ())
    found = study.get_trials(deepcopy=False, states=_FINISHED)
    return [trial for trial in found if trial.number not in killed]


def _run_trial(
    study: optuna.Study,
    config: ExperimentConfig,
    split: Split,
    space: Mapping[str, BaseDistribution],
    *,
    max_seconds: float | None,
) -> TrialRow:
    trial = study.ask(dict(space))
    try:
        drawn = with_drawn(config, trial.params)
    except ConfigError as error:  # these settings cannot be combined
        trial.set_user_attr("error", str(error))
        study.tell(trial, state=TrialState.FAIL)
        return _row(study.trials[trial.number])

    def report(epoch: Epoch) -> None:
        if epoch.validation is not None:
            trial.report(epoch.validation, epoch.epoch)
            if trial.should_prune():
                raise optuna.TrialPruned

    try:
        with out_of_memory("a trial", "narrow [tune.space]", name="space"):
            metric, value = _validated(drawn, split, report, max_seconds)
        study.set_user_attr("metric", metric)
        study.tell(trial, value)
    except optuna.TrialPruned:
        study.tell(trial, state=TrialState.PRUNED)
    except (ConfigError, NonFiniteError, TooLargeError) as error:
        trial.set_user_attr("error", str(error))
        study.tell(trial, state=TrialState.FAIL)
    return _row(study.trials[trial.number])


def _validated(
    config: ExperimentConfig,
    split: Split,
    report: Callable[[Epoch], None],
    max_seconds: float | None,
) -> tuple[str, float]:
    """Train a recipe, and return its validation metric and the value."""
    if max_seconds is not None:
        max_seconds = max(0.0, max_seconds)
    options = RunOptions(show=False, on_epoch=report, max_seconds=max_seconds)
    trained = fit_recipe(config, split, options)
    validation = make_validation(trained, split)
    if validation is None:
        raise ConfigError(
            "the split has no validation part to search by: give it a share",
            name="split.validation",
        )
    return validation.metric, validation.value(trained.model)


def _result(
    study: optuna.Study, config: ExperimentConfig, folder: Path, *, ended: str
) -> TuneResult:
    rows = tuple(_row(trial) for trial in _finished(study))
    complete = [row for row in rows if row.value is not None]
    if not complete:
        why = study.trials[-1].user_attrs.get("error", "they were stopped early")
        raise ConfigError(
            f"none of {len(rows)} trials was completed: narrow [tune.space]; the last: {why}",
            name="tune.space",
        )
    best = max(complete, key=lambda row: row.value or 0.0)
    result = TuneResult(
        metric=study.user_attrs.get("metric", STOP_METRIC),
        trials=rows,
        best=best,
        best_recipe=with_drawn(config, best.settings),
        ended=ended,
    )
    texts = {
        _BEST: to_toml(without_defaults(result.best_recipe)),
        _TRIALS: json.dumps(result.to_json(), indent=2),
    }
    for name, text in texts.items():
        with whole_file(folder / name, replace=True) as part:  # of the same study
            part.write_text(text, encoding="utf-8")
    return result


def _row(trial: FrozenTrial) -> TrialRow:
    complete = trial.state is TrialState.COMPLETE
    return TrialRow(
        number=trial.number,
        state=trial.state.name.lower(),
        value=trial.value if complete else None,
        seconds=trial.duration.total_seconds() if trial.duration else 0.0,
        settings=trial.params,
    )

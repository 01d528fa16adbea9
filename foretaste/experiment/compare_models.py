"""Several models on one holdout within a time budget: which one to take, and why."""

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from foretaste.arguments import checked
from foretaste.data.disk import check_place, reason_of, whole_file
from foretaste.data.splits import Split
from foretaste.data.tasks import Task
from foretaste.errors import ConfigError, DataError, ForetasteError
from foretaste.evaluation.compare import compare
from foretaste.evaluation.report import Report
from foretaste.experiment.compare_by_rows import common_tasks, compare_by_rows, thousand_rows_ms
from foretaste.experiment.compare_families import CLOSED_FORM, with_baselines
from foretaste.experiment.compare_picture import comparison_svg
from foretaste.experiment.compare_table import (
    FailedModel,
    Measured,
    ModelComparison,
    TaskFigure,
    choose,
    model_row,
)
from foretaste.experiment.recipe import ExperimentConfig, read_experiment
from foretaste.experiment.run import run_experiment, to_recommender
from foretaste.serving.building import load
from foretaste.serving.recommender import Recommender

ASKED = 200
"""How many single questions the time of an answer is the median of."""
_WARM_UP = 10
_FILES = ("comparison.svg", "comparison.json", "comparison.md")


@checked
def read_recipes(
    paths: Sequence[Path | str],
    *,
    overrides: Sequence[str] = (),
    data_dir: Path | str | None = None,
) -> dict[str, ExperimentConfig]:
    """Read several recipes, each under its file's name, or its path where two share a name.

    Args:
        paths: The recipes.
        overrides: What replaces a setting of each of them; see `read_experiment`.
        data_dir: Where a file of `features` is looked for first.

    Raises:
        ConfigError: A setting is missing, unknown or out of range; it says which.
    """
    files = [Path(path) for path in paths]
    stems = [file.stem for file in files]
    return {
        file.stem if stems.count(file.stem) == 1 else str(file): read_experiment(
            file, overrides=overrides, data_dir=data_dir
        )
        for file in files
    }


@checked
def compare_models(
    recipes: Mapping[str, ExperimentConfig],
    split: Split,
    *,
    budget_seconds: float | None = None,
    folder: str | Path | None = None,
    replace: bool = False,
    say: Callable[[str], object] | None = None,
) -> ModelComparison:
    """Train several models and the baselines on one split, measure all on its test part, choose.

    They are compared by their lists; where `evaluation.catalogue` is false, or the data have no
    items, by their predictions of labelled rows: the AUC (of tasks that are not binary, the RMSE)
    of each task that all of them have, the first of these leading, beside each task's base rate.

    Those that learn in closed form go first. Each of the others may train for an even share of
    what is left of the budget, one step at least; what one leaves over falls to those after it. A
    model that fails does not end the others. Every model learns from the training part alone:
    `refit` is ignored.

    Args:
        recipes: By name, on the same data and split; the first one says how all are evaluated.
        split: Their data, from `read_split`.
        budget_seconds: Of all trainings together, validations counted in; None sets no end.
        folder: Where `comparison.md`, `.json` and `.svg` go, and the `bundle` of the one to take.
        replace: An earlier comparison in `folder` is replaced.
        say: Told what is being done; with it, trainings show their progress.

    Raises:
        ConfigError: There is no recipe, they are not of one data set and split, some are measured
            by lists and others are not, or the budget is not above 0; by rows, a model predicts no
            labels, or they have no task in common; or none of the models could be measured.
        BundleError: The folder holds a bundle and `replace` is false, or something else under the
            name `bundle`.
        DataError: The folder holds a comparison and `replace` is false, or cannot be written.
    """
    _check(recipes, budget_seconds)
    folder = None if folder is None else Path(folder)
    if folder is not None:
        check_place(folder / "bundle", "bundle", replace=replace)
        for file in _FILES:
            check_place(folder / file, replace=replace)
    tasks = common_tasks(recipes, split)
    entries = dict(recipes) if tasks else with_baselines(recipes)
    in_order = sorted(entries, key=lambda name: not _in_one_piece(entries[name]))
    evaluation = next(iter(recipes.values())).evaluation
    if tasks:
        evaluation = evaluation.model_copy(update={"catalogue": False, "rows": True})
    measured: list[Measured] = []
    failed: list[FailedModel] = []
    spent = 0.0
    with _workplace(folder) as place:
        for number, name in enumerate(in_order):
            config = entries[name].model_copy(update={"refit": False, "evaluation": evaluation})
            share = None
            if budget_seconds is not None and not _in_one_piece(config):
                share = max(0.0, budget_seconds - spent) / (len(in_order) - number)
            started = time.perf_counter()
            found = _attempt(name, config, split, place / str(number), share, say)
            if isinstance(found, FailedModel):
                failed.append(found)
                spent += time.perf_counter() - started
            else:
                measured.append(found)
                spent += found.train_seconds
        comparison = _compare(measured, failed, split, budget_seconds, tasks)
        if folder is not None:
            (pick,) = (found for found in measured if found.name == comparison.pick)
            load(pick.bundle).save(folder / "bundle", replace=replace)
            _write(comparison, folder, replace=replace)
    return comparison


def _check(recipes: Mapping[str, ExperimentConfig], budget_seconds: float | None) -> None:
    if not recipes:
        raise ConfigError("there is no recipe to compare: give one at least")
    if budget_seconds is not None and not budget_seconds > 0:
        raise ConfigError(f"budget_seconds is {budget_seconds}: give more than 0 s, or no budget")
    (first, *others) = recipes
    for name in others:
        for part in ("data", "split"):
            if getattr(recipes[name], part) != getattr(recipes[first], part):
                raise ConfigError(
                    f"{name} has another [{part}] than {first}: models are compared on the same "
                    "data and split"
                )


def _in_one_piece(config: ExperimentConfig) -> bool:
    return isinstance(config.model, CLOSED_FORM)


@contextmanager
def _workplace(folder: Path | None) -> Iterator[Path]:
    """Give a folder for the bundles, which is deleted in the end."""
    try:
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        made = tempfile.TemporaryDirectory(prefix=".compare.", dir=folder)
    except OSError as error:
        raise DataError(
            f"{folder} cannot be written: {reason_of(error)}: choose another place",
            name=str(folder),
            value=str(folder),
        ) from error
    with made as place:
        yield Path(place)


def _attempt(
    name: str,
    config: ExperimentConfig,
    split: Split,
    bundle: Path,
    share: float | None,
    say: Callable[[str], object] | None,
) -> Measured | FailedModel:
    if say is not None:
        say(f"training {name}" + ("" if share is None else f" for at most {share:.1f} s"))
    try:
        run = run_experiment(config, split, show=say is not None, max_seconds=share)
        report = run.report.lists if config.evaluation.catalogue else run.report.rows
        if report is None:
            raise ConfigError("the data have one item, of which no lists can be made")
        recommender = to_recommender(run.trained, run.report)
        recommender.save(bundle)
        return Measured(
            name=name,
            kind=config.model.kind,
            train_seconds=run.trained.train_seconds,
            ended=str(run.trained.log.get("stopped", "")),
            settings=run.trained.settings,
            report=report,
            bundle=bundle,
            bundle_bytes=sum(file.stat().st_size for file in bundle.rglob("*") if file.is_file()),
            answer_ms=_answer_ms(recommender, k=max(config.evaluation.k))
            if isinstance(report, Report)
            else thousand_rows_ms(run.trained, split),
        )
    except (ForetasteError, MemoryError, RuntimeError) as error:  # torch's, where memory is short
        reason = str(error) or type(error).__name__
        if say is not None:
            say(f"{name} failed: {reason}")
        return FailedModel(name=name, kind=config.model.kind, error=reason)


def _answer_ms(recommender: Recommender, *, k: int) -> float:
    """Return the median time of a single question about a user of training."""
    events, milliseconds = recommender.trained.events, []
    known_U = np.flatnonzero(np.diff(events.offsets))
    asked = np.random.default_rng(0).choice(known_U, size=_WARM_UP + ASKED)
    for user_id in events.users.ids[asked.tolist()].to_list():
        started = time.perf_counter()
        recommender.recommend(user_id, k=k)
        milliseconds.append((time.perf_counter() - started) * 1e3)
    return statistics.median(milliseconds[_WARM_UP:])


def _compare(
    measured: list[Measured],
    failed: list[FailedModel],
    split: Split,
    budget_seconds: float | None,
    tasks: tuple[Task, ...],
) -> ModelComparison:
    if not measured:
        raise ConfigError(f"none of {len(failed)} models could be measured: {failed[0].error}")
    if tasks:
        notes = _notes(budget_seconds, by_rows=True)
        return compare_by_rows(measured, failed, split, tasks, budget_seconds, notes=notes)
    lists = {found.name: found.report for found in measured if isinstance(found.report, Report)}
    metric = _leading_metric(lists[measured[0].name])
    in_order = sorted(measured, key=lambda found: -found.report.metrics[metric])
    best = lists[in_order[0].name]
    rows = [
        model_row(
            found,
            TaskFigure(
                metric=metric,
                value=found.report.metrics[metric],
                interval=found.report.intervals[metric],
                behind=None if report is best else compare(best, report, metric),
            ),
        )
        for found in in_order
        for report in (lists[found.name],)
    ]
    pick, sentence = choose(rows, metric)
    return ModelComparison(
        metric=metric,
        rows=tuple(rows),
        failed=tuple(failed),
        split=split.kind,
        users=len(best.user_idx),
        budget_seconds=budget_seconds,
        pick=pick,
        sentence=sentence,
        notes=(best.notes[0], *_notes(budget_seconds, by_rows=False)),
    )


def _leading_metric(report: Report) -> str:
    """Return NDCG at the first list length, under the name that the report gives it."""
    name = f"ndcg_at_{report.k[0]}"
    return next(m for m in report.per_user if m == name or m.startswith(f"{name}_"))


def _notes(budget_seconds: float | None, *, by_rows: bool) -> tuple[str, ...]:
    budget = (
        "no budget was set"
        if budget_seconds is None
        else f"the budget of {budget_seconds:g} s is of training alone, validations counted in; "
        "models in closed form go first and cannot be cut short"
    )
    how, of_best = "of the paired sign-flip test", "the best"
    if by_rows:
        how, of_best = "by the bootstrap", "the best by the first task"
    asked = (
        "1,000 rows: median time from their events to predictions"
        if by_rows
        else f"answer: median of {ASKED} single questions, put to the model as it is served"
    )
    return (
        f"behind the best: by how much it is worse than {of_best}, paired by user, with its 95 % "
        f"bootstrap interval; p {how}, not corrected for several models",
        f"{asked}; bundle: all its files, the training events among them",
        f"training: {budget}; refits are left out",
    )


def _write(comparison: ModelComparison, folder: Path, *, replace: bool) -> None:
    texts = (
        comparison_svg(comparison),
        json.dumps(comparison.to_json(), indent=2) + "\n",
        comparison.to_markdown(picture=_FILES[0]),
    )
    for name, text in zip(_FILES, texts, strict=True):
        with whole_file(folder / name, replace=replace) as part:
            part.write_text(text, encoding="utf-8")

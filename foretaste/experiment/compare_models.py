"""Trains and compares several models on one holdout within a time budget, and recommends one."""

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace as replace_fields
from pathlib import Path

import numpy as np

from foretaste.arguments import checked
from foretaste.config import Seed
from foretaste.data.folder import check_place, reason_of, whole_file
from foretaste.data.rows import Rows
from foretaste.data.splits import Split
from foretaste.errors import ConfigError, DataError, ForetasteError
from foretaste.evaluation.report import Report
from foretaste.evaluation.rows import predict_tasks, ranker_of, rows_to_judge
from foretaste.experiment.compare_figures import ASKED, compare_measured
from foretaste.experiment.compare_plan import Entry, Plan, plan_of
from foretaste.experiment.compare_table import (
    FailedModel,
    Measured,
    ModelComparison,
    comparison_svg,
)
from foretaste.experiment.learning import RunOptions
from foretaste.experiment.recipe import ExperimentConfig, read_experiment
from foretaste.experiment.run import (
    FIRST_RUN,
    fit_final,
    run_experiment,
    sampled_rows,
    to_recommender,
)
from foretaste.serving.recommender import Recommender, build_recommender, load
from foretaste.training.fit import OUT_OF_TIME
from foretaste.training.trained import Trained

_WARM_UP = 10
_TIMED_ROWS, _TIMES = 1000, 7
_FILES = tuple(f"comparison.{kind}" for kind in ("svg", "json", "md", "csv", "tex"))


@checked
def read_recipes(
    paths: Sequence[Path | str],
    *,
    overrides: Sequence[str] = (),
    data_dir: Path | str | None = None,
) -> dict[str, ExperimentConfig]:
    """Read several recipes, named by file, or by path if two files have the same name.

    Args:
        paths: The recipes.
        overrides: Settings to replace in each of them; see `read_experiment`.
        data_dir: The first folder in which to look for a file of `features`.

    Raises:
        ConfigError: A setting is missing, unknown or out of range; the message names it.
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
    seeds: Sequence[Seed] | None = None,
    keep: str = "",
) -> ModelComparison:
    """Train several models and the baselines on one split, measure all on its test, choose one.

    They are compared by their lists. If `evaluation.catalogue` is false, or the data have no items,
    they are compared by their predictions of labelled rows: by the AUC (for tasks that are not
    binary, the RMSE) of each common task, the first of which leads. Baselines of counts are added:
    the base rate, and means by user, by item, by each column of categories, and by user and
    category.

    Models that are fitted in closed form are trained first. Each of the others may train for an
    equal share of the remaining budget, at least one step; unused time goes to later models. A
    search, if a recipe asks for one (`training.search`), takes at most a third of that share. A
    model that fails does not end the others. Every model is trained only on the training part,
    whatever `final` a recipe has; the recommended one is then trained again on all events, for as
    many epochs as were chosen, and that is the bundle.

    Args:
        recipes: By name, on the same data and split; the first one says how all are evaluated.
        split: Their data, from `read_split`.
        budget_seconds: Time limit of all trainings together, including validations and the training
            on all events; None: no limit.
        folder: Folder for `comparison.md`, `.json`, `.csv`, `.tex` and `.svg`, and for the `bundle`
            of the recommended model.
        replace: Replace an earlier comparison in `folder`.
        say: Called with a line about each step; trainings then show their progress.
        seeds: Each recipe's model is trained once with each seed, and figures are means over seeds;
            baselines, and models without random draws, are trained once. None: the seeds of the
            recipes.
        keep: Name of the recipe whose model is trained on all events and written as the bundle; "":
            the recommended one.

    Raises:
        ConfigError: Before any training: there is no recipe; recipes differ in data, split,
            `catalogue`, `positive` or seeds; a seed is repeated; the budget is not above 0; or, by
            rows, a model predicts no labels, recipes have no common task, or the numbers of drawn
            items differ. After training: none of the models could be measured, or the one to `keep`
            could not.
        BundleError: The folder has a bundle and `replace` is false, or something else with the name
            `bundle`.
        DataError: The folder has a comparison and `replace` is false, or cannot be written.
    """
    folder = None if folder is None else Path(folder)
    _check(split, budget_seconds, folder, replace=replace)
    plan = plan_of(recipes, split, seeds)
    trainings = sum(len(entry.seeds) for entry in plan.entries) + (folder is not None)
    clock = _Clock(budget_seconds, trainings)
    measured: list[Measured] = []
    failed: list[FailedModel] = []
    with _workplace(folder) as place:
        for number, entry in enumerate(plan.entries):
            found = _attempts(entry, place / str(number), clock, say)
            if isinstance(found, FailedModel):
                failed.append(found)
            else:
                measured.append(found)
        comparison = compare_measured(measured, failed, split, plan, budget_seconds)
        if folder is not None:
            name = keep or comparison.pick
            kept = next((found for found in measured if found.name == name), None)
            if kept is None:
                raise ConfigError(f"{name} could not be measured", name="keep", value=name)
            recommender, note = _final(kept, plan, clock, say)
            recommender.save(folder / "bundle", replace=replace)
            comparison = replace_fields(comparison, notes=(*comparison.notes, note))
            _write(comparison, folder, replace=replace)
    return comparison


def _check(
    split: Split, budget_seconds: float | None, folder: Path | None, *, replace: bool
) -> None:
    if budget_seconds is not None and not budget_seconds > 0:
        raise ConfigError(
            f"budget_seconds is {budget_seconds}: give more than 0 s, or no budget",
            name="budget_seconds",
            value=budget_seconds,
        )
    if folder is not None:
        check_place(folder / "bundle", "bundle", replace=replace)
        for file in _FILES:
            check_place(folder / file, replace=replace)
    if not split.has_test:
        raise ConfigError(
            "split.test is 0, so nothing can be compared: set it above 0",
            name="split.test",
            value=0,
        )


class _Clock:
    """Tracks the remaining budget, and the number of trainings that share it."""

    def __init__(self, seconds: float | None, trainings: int) -> None:
        self.left, self.trainings = seconds, trainings

    def share(self, entry: Entry) -> float | None:
        """Return the time limit of a training; None: no limit."""
        if self.left is None or entry.in_one_piece:
            return None
        return max(0.0, self.left) / self.trainings

    def spend(self, seconds: float) -> None:
        """Count a completed training."""
        self.trainings -= 1
        if self.left is not None:
            self.left -= seconds


@contextmanager
def _workplace(folder: Path | None) -> Iterator[Path]:
    """Yield a temporary folder for the bundles."""
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


def _attempts(
    entry: Entry, place: Path, clock: _Clock, say: Callable[[str], object] | None
) -> Measured | FailedModel:
    """Train and measure a model once with each seed; if one fails, none counts."""
    found: list[Measured] = []
    for seed in entry.seeds:
        share, started = clock.share(entry), time.perf_counter()
        of_seed = f" with seed {seed}" if len(entry.seeds) > 1 else ""
        if say is not None:
            at_most = "" if share is None else f" for at most {share:.1f} s"
            say(f"training {entry.name}{of_seed}{at_most}")
        try:
            found.append(_attempt(entry, seed, place / str(seed), share, show=say is not None))
            clock.spend(found[-1].train_seconds)
        except (ForetasteError, MemoryError, RuntimeError) as error:  # torch's for lack of memory
            clock.spend(time.perf_counter() - started)
            reason = f"{str(error) or type(error).__name__}{of_seed and f' ({of_seed.strip()})'}"
            if say is not None:
                say(f"{entry.name} failed: {reason}")
            return FailedModel(name=entry.name, kind=entry.config.model.kind, error=reason)
    return replace_fields(
        found[0],
        train_seconds=statistics.mean(one.train_seconds for one in found),
        ended="; ".join(dict.fromkeys(one.ended for one in found if one.ended)),
        reports=tuple(report for one in found for report in one.reports),
        seeds=entry.seeds,
    )


def _attempt(entry: Entry, seed: int, bundle: Path, share: float | None, *, show: bool) -> Measured:
    config, split = entry.config.model_copy(update={"seed": seed}), entry.split
    run = run_experiment(config, split, show=show, max_seconds=share)
    report = run.report.lists if config.evaluation.catalogue else run.report.rows
    if report is None:
        raise ConfigError("the data have one item, so no lists can be made", name="recipes")
    recommender = to_recommender(run.trained, run.report)
    recommender.save(bundle)
    rows = None
    if isinstance(report, Report):
        answered_ms = answer_ms(recommender, k=max(config.evaluation.k))
    else:
        sampled = sampled_rows(run.trained, config.evaluation)
        rows, _, _ = rows_to_judge(run.trained, split, part="test", sampled=sampled)
        answered_ms = _thousand_rows_ms(run.trained, rows)
    return Measured(
        name=entry.name,
        kind=config.model.kind,
        train_seconds=run.trained.train_seconds,
        ended=str(run.trained.log.get("stopped", "")),
        settings=run.trained.settings,
        reports=(report,),
        seeds=(seed,),
        bundle=bundle,
        bundle_bytes=sum(file.stat().st_size for file in bundle.rglob("*") if file.is_file()),
        answer_ms=answered_ms,
        rows=rows,
    )


def _final(
    pick: Measured, plan: Plan, clock: _Clock, say: Callable[[str], object] | None
) -> tuple[Recommender, str]:
    """Train the recommended model again, on all events; if that fails, keep the measured one."""
    measured = load(pick.bundle)
    entry = next(entry for entry in plan.entries if entry.name == pick.name)
    config = entry.config.model_copy(update={"seed": pick.seeds[0], "final": "all"})
    if say is not None:
        say(f"training {pick.name} again, on all events")
    try:
        options = RunOptions(show=say is not None, max_seconds=clock.share(entry))
        trained = fit_final(measured.trained, config, entry.split, options)
    except (ForetasteError, MemoryError, RuntimeError) as error:  # torch's for lack of memory
        reason = str(error) or type(error).__name__
        return measured, f"bundle: {pick.name} as measured; training on all events failed: {reason}"
    report = measured.report or {}
    notes = report.get("notes")
    noted = {**report, "notes": [FIRST_RUN, *(notes if isinstance(notes, list) else ())]}
    ended = str(trained.log.get("stopped", ""))
    epochs = "" if entry.in_one_piece else " and for as many epochs as were chosen"
    return build_recommender(trained, report=noted), (
        f"bundle: {pick.name}, trained again after it was measured, on all events{epochs}"
        f"{f'; {ended}' if ended.startswith(OUT_OF_TIME) else ''}"
    )


def answer_ms(recommender: Recommender, *, k: int) -> float:
    """Return the median time of a single request for a training user."""
    events, milliseconds = recommender.trained.events, []
    known_U = np.flatnonzero(np.diff(events.offsets))
    asked = np.random.default_rng(0).choice(known_U, size=_WARM_UP + ASKED)
    for user_id in events.users.ids[asked.tolist()].to_list():
        started = time.perf_counter()
        recommender.recommend(user_id, k=k)
        milliseconds.append((time.perf_counter() - started) * 1e3)
    return statistics.median(milliseconds[_WARM_UP:])


def _thousand_rows_ms(trained: Trained, rows: Rows) -> float:
    """Return the median time for predictions of 1,000 test rows, from their events on."""
    ranker, milliseconds = ranker_of(trained), []
    index_B = np.arange(min(len(rows), _TIMED_ROWS))
    for _ in range(_TIMES):
        started = time.perf_counter()
        batch = rows.batch(index_B, reads=ranker.reads, max_len=ranker.max_len, seed=0)
        judged = predict_tasks(ranker, batch)
        seconds = time.perf_counter() - started
        milliseconds.append(seconds * 1e6 / (judged.shape[0] * judged.shape[1]))
    return statistics.median(milliseconds)


def _write(comparison: ModelComparison, folder: Path, *, replace: bool) -> None:
    texts = (
        comparison_svg(comparison),
        json.dumps(comparison.to_json(), indent=2) + "\n",
        comparison.to_markdown(picture=_FILES[0]),
        comparison.to_frame().write_csv(),
        comparison.to_latex(),
    )
    for name, text in zip(_FILES, texts, strict=True):
        with whole_file(folder / name, replace=replace) as part:
            part.write_text(text, encoding="utf-8")

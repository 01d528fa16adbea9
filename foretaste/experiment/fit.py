"""Trains a model from settings and a split; this file wires all packages together."""

import json
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import NoneType
from typing import Any, Literal

import torch

from foretaste.arguments import checked
from foretaste.config import Config, Seed, parse_settings
from foretaste.data.arrays import out_of_memory
from foretaste.data.batch import DrawItems
from foretaste.data.draws import WHOLE
from foretaste.data.features import Features, fit_features
from foretaste.data.features_schema import FeatureSchema
from foretaste.data.folder import whole_file
from foretaste.data.graph import Graph
from foretaste.data.interactions import Interactions, positives_of
from foretaste.data.splits import Split, happened_split
from foretaste.errors import ConfigError, DataError
from foretaste.experiment.learning import (
    RunOptions,
    decided,
    make_learning,
    needs_one_process,
    settled_init,
    usual_objective,
)
from foretaste.experiment.mining import candidate_negatives
from foretaste.experiment.search_space import Learner, ShortSearch
from foretaste.experiment.two_stage import Candidates, FirstStage, check_same, fit_two_stage
from foretaste.experiment.validation import (
    Validation,
    choose_recency,
    choose_strengths,
    make_validation,
    trained_rows,
    with_recency,
)
from foretaste.models.base import Model
from foretaste.models.catalogue import (
    LEARNING_COPIES,
    ModelConfig,
    Pretraining,
    TwoStageConfig,
    build_model,
    graph_for,
    pretraining_of,
    settled,
    tasks_of,
)
from foretaste.training import processes
from foretaste.training.checkpoint import Epoch, Progress
from foretaste.training.fit import Fit
from foretaste.training.objectives import LabelledRows, ObjectiveConfig, RowsConfig
from foretaste.training.progress import Cost, CostWatch, ShowProgress, say
from foretaste.training.settings import TrainingConfig
from foretaste.training.sharded import sharding
from foretaste.training.trained import Trained


@checked
def fit(
    config: "ModelConfig",
    split: Split,
    *,
    seed: Seed = 0,
    training: TrainingConfig | Literal["auto"] | None = None,
    objective: "ObjectiveConfig | None" = None,
    features: Features | FeatureSchema | None = None,
    folder: Path | str | None = None,
    resume: bool = False,
    show: bool = True,
    on_epoch: Callable[[Epoch], None] | None = None,
    on_cost: Callable[[Cost], None] | None = None,
    max_seconds: float | None = None,
    candidates: Candidates | None = None,
    first_stage: FirstStage | None = None,
) -> Trained:
    """Train a model on a split's training part, stopping by its validation part.

    The test part is never read. Models in closed form ignore `training`, `objective` and `folder`.

    Args:
        config: The settings of a model.
        split: A split, such as from `temporal_split` or `leave_last_split`.
        seed: Decides initial weights, order, dropout and negatives; equal seeds give equal results.
        training: The settings of the loop; "auto": those of a short search, which tells its cost.
        objective: The loss and the negatives.
        features: Fitted features, or a schema, which is fitted to the training part. Features that
            were fitted to other events are encoded for these.
        folder: Folder for checkpoints and the log of steps.
        resume: Continue from the checkpoint in `folder`, with the result of an unbroken run.
        show: Report progress on standard error.
        on_epoch: Called with each epoch; an exception from it ends the run.
        on_cost: Called with the estimated cost of each training, after its first steps and again
            after its first validation; an exception from it ends the run. The last estimate is in
            the log.
        max_seconds: Time limit of the training loop in seconds; the best weights so far are kept. A
            model in closed form cannot be stopped.
        candidates: For a ranker: the candidates that it will rank. Its negatives are drawn from
            them if `objective` requires it, and early stopping measures their ranking.
        first_stage: For a model in two stages: the training of its retriever. `training` and
            `objective` are the ranker's then.

    Raises:
        ConfigError: The model has no input, or the schema names a column that does not exist.
        DataError: The training part is empty, a feature does not have its kind, or the retriever of
            `candidates` has other users or items.
        NonFiniteError: A loss, a gradient or a weight is not finite.
        TooLargeError: The model would not fit in memory.
    """
    started, show = time.perf_counter(), show and processes.is_first()
    options = RunOptions(
        folder=None if folder is None else Path(folder),
        resume=resume,
        show=show,
        on_epoch=on_epoch,
        on_cost=on_cost,
        max_seconds=max_seconds,
    )
    if not (tasks_of(config) and isinstance(objective, RowsConfig | NoneType)):
        _refuse_positive(config, objective)
        split = happened_split(split)
    events = split.train
    _refuse_empty(events)
    if candidates is not None:
        check_same(candidates.retriever.events, events, "the candidates and the split")
    asked, features = _asked(training), _features_of(features, events)
    fit_part = partial(fit, split=split, seed=seed, features=features)
    learner = _to_search(config, objective, asked, candidates, events, features)
    if learner is not None:
        return _search_and_fit(learner, split, fit_part, options, seed=seed)
    if isinstance(config, TwoStageConfig):
        return fit_two_stage(
            config,
            fit_part,
            split,
            options,
            training=asked,
            objective=objective,
            first_stage=first_stage or FirstStage(),
        )
    positive = objective.positive if isinstance(objective, RowsConfig) else ""
    config = settled(config, events, positive=positive, ordered=split.ordered)
    config = settled_init(config, events, features)
    config, tried = _with_strengths(config, split, partial(fit_part, show=show), show=show)
    training = asked.settled(config.usual.training, len(events), events.num_items)
    pretraining = pretraining_of(config)
    fit_part = partial(fit_part, objective=objective, candidates=candidates)
    parts = _fit_parts(pretraining, fit_part, asked, options)
    sizes = events.num_users, events.num_items, len(events)
    processes.check_same({"model": config.model_dump(), "data": sizes})
    torch.manual_seed(seed)
    graph = graph_for(config, events)
    with nullcontext() if training.sharded_from is None else sharding(training.sharded_from):
        model = build_model(
            config,
            num_users=events.num_users,
            num_items=events.num_items,
            graph=graph,
            features=features,
            copies=LEARNING_COPIES,
        )
    model.begin(events)
    if pretraining is not None:
        model.start_from({kind: part.model for kind, part in parts.items()})
        rate = training.rate * pretraining.fine_tuning
        training = training.model_copy(update={"learning_rate": rate})
    objective = _objective_of(config, objective, events, features)
    happened = events
    if isinstance(objective, RowsConfig):
        happened = positives_of(events, objective.positive)
    make = partial(
        Trained,
        config=config,
        model=model,
        events=happened,
        features=features,
        seed=seed,
        objective=objective,
        learned_from=split.learned_from,
    )
    log: dict[str, object] = {name: part.log for name, part in parts.items()}
    log |= {"tried": tried} if tried else {}
    epochs = 1
    with out_of_memory(
        f"learning {config.kind}",
        "lower training.batch_events, how many negatives are drawn, or the model's widths",
        name="batch_events",
    ):
        if objective is None:
            model.learn(events)
            log |= _noted(model, show=show)
        else:
            found, epochs = _learn(
                make(),
                split,
                options.at_most(1 / (1 + len(parts))),
                name=config.kind,
                training=training,
                objective=objective,
                graph=graph,
                candidates=candidates,
            )
            log |= found
    with processes.work_divided():
        model.learn_new_users(happened)
        model.finish()
    model.eval()
    config = with_recency(config, model)
    settings = _settings_of(config, split, training, objective)
    seconds = time.perf_counter() - started
    return make(config=config, log=log, epochs=(epochs,), train_seconds=seconds, settings=settings)


def _asked(training: TrainingConfig | Literal["auto"] | None) -> TrainingConfig:
    return TrainingConfig(search=True) if training == "auto" else training or TrainingConfig()


def _to_search(
    config: ModelConfig,
    objective: ObjectiveConfig | None,
    asked: TrainingConfig,
    candidates: Candidates | None,
    events: Interactions,
    features: Features | None,
) -> Learner | None:
    """Return the start of a short search, if it is requested and there are settings to search.

    Raises:
        ConfigError: The model has two stages.
    """
    if not asked.search:
        return None
    if processes.share() != WHOLE:
        raise needs_one_process("training.search", value=True)
    if isinstance(config, TwoStageConfig) or candidates is not None:
        raise ConfigError(
            "training.search is only for a single model, not for two stages: leave it out, or "
            "search both with `tune`",
            name="training.search",
            value=True,
        )
    objective = _objective_of(config, objective, events, features)
    if objective is None:
        return None
    training = asked.model_copy(update={"search": False})
    return Learner(model=config, objective=objective, training=training)


def _search_and_fit(
    own: Learner, split: Split, fit_part: Callable[..., Trained], options: RunOptions, *, seed: int
) -> Trained:
    """Search settings for at most a third of the time, and train with the best ones."""
    started, max_seconds = time.perf_counter(), options.max_seconds
    file = None if options.folder is None else options.folder / "search.json"
    if options.resume and file is not None and file.is_file():
        log = json.loads(file.read_text(encoding="utf-8"))
        learner = parse_settings(Learner, log["found"], source=str(file))
    else:
        learner, log = ShortSearch(
            own=own,
            fit_one=partial(fit_part, show=False),
            split=split,
            seed=seed,
            max_seconds=options.at_most(1 / 3).max_seconds,
            say=say if options.show else str,
        ).run()
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(file, replace=True) as part:
                part.write_text(json.dumps(log), encoding="utf-8")
    if max_seconds is not None:
        left = max_seconds - (time.perf_counter() - started)
        options = replace(options, max_seconds=max(0.0, left))
    trained = fit_part(
        learner.model, training=learner.training, objective=learner.objective, **vars(options)
    )
    seconds = time.perf_counter() - started
    return replace(trained, log={**trained.log, "search": log}, train_seconds=seconds)


def _objective_of(
    config: ModelConfig,
    objective: ObjectiveConfig | None,
    events: Interactions,
    features: Features | None,
) -> ObjectiveConfig | None:
    """Return a model's objective; None for a model that is fitted in closed form."""
    if not config.usual.objective:
        return None
    return objective or usual_objective(config, events, features)


def _settings_of(
    config: ModelConfig, split: Split, training: TrainingConfig, objective: ObjectiveConfig | None
) -> dict[str, object]:
    """Return the facts that determined a run, for the record only."""
    parts: dict[str, Config] = {"model": config}
    if objective is not None:
        parts |= {"training": training, "objective": objective}
    return {
        "split": split.kind,
        **{name: part.model_dump(mode="json") for name, part in parts.items()},
    }


def _with_strengths(
    config: ModelConfig, split: Split, fit_part: Callable[..., Trained], *, show: bool
) -> tuple[ModelConfig, dict[str, float]]:
    """Return settings with every strength set, and the validation figures of those tried."""
    chosen, tried = choose_strengths(config, split, fit_part)
    if chosen and show:
        say(f"{config.kind}: " + ", ".join(f"{name} {value:g}" for name, value in chosen.items()))
    return config.model_copy(update=chosen), tried


def _noted(model: Model, *, show: bool) -> dict[str, object]:
    if model.note and show:
        say(model.note)
    return {"note": model.note} if model.note else {}


def _features_of(
    features: Features | FeatureSchema | None, events: Interactions
) -> Features | None:
    if isinstance(features, FeatureSchema):
        return fit_features(features, events)
    return None if features is None else features.for_training(events)


def _refuse_positive(config: ModelConfig, objective: ObjectiveConfig | None) -> None:
    if isinstance(objective, RowsConfig) and objective.positive:
        raise ConfigError(
            f"objective.positive is {objective.positive!r}, and {config.kind} does not learn from "
            f"rows: give positive = {objective.positive!r} when reading ([data] of a recipe)",
            name="objective.positive",
            value=objective.positive,
        )


def _refuse_empty(events: Interactions) -> None:
    if len(events) == 0:
        which = f" of positive events ({events.positive})" if events.positive else ""
        raise DataError(
            f"the training part of the split is empty{which}: there is nothing to learn from",
            name="split",
        )


def _fit_parts(
    pretraining: Pretraining | None,
    fit_part: Callable[..., Trained],
    training: TrainingConfig,
    options: RunOptions,
) -> dict[str, Trained]:
    """Train the models that a model starts from, if there are any, each for a third of the time."""
    if pretraining is None:
        return {}
    epochs = pretraining.epochs or training.epochs
    return {
        part.kind: fit_part(
            part,
            training=training.model_copy(update={"epochs": epochs}),
            **vars(options.part(part.kind, share=1 / 3)),
        )
        for part in pretraining.parts
    }


def _learn(
    untrained: Trained,
    split: Split,
    options: RunOptions,
    *,
    name: str,
    training: TrainingConfig,
    objective: ObjectiveConfig,
    graph: Graph | None,
    candidates: Candidates | None,
) -> tuple[dict[str, object], int]:
    """Run the training loop on a model's weights; return its log and the epochs it chose."""
    model, events, features = untrained.model, split.train, untrained.features
    processes.check_same({"objective": objective.model_dump()})
    learning = make_learning(
        model,
        objective,
        events,
        batch_events=training.batch_of(len(events)),
        seed=untrained.seed,
        producers=training.producers,
        graph=graph,
        context=None if features is None else features.context_table,
        mine=_mined(objective, candidates),
        offered=None if candidates is None else candidates.offered,
    )
    if options.show:
        say(decided(training, objective))
    validation = make_validation(
        untrained,
        split,
        candidates,
        training=training,
        rows_of_epoch=trained_rows(model, objective, events),
    )
    run: Fit[Any, Any] = Fit(
        model,
        training,
        seed=untrained.seed,
        plan=learning.plan,
        objective=learning.objective,
        validate=None if validation is None else validation.value,
        validate_every=None if validation is None else validation.every,
        level=-math.inf if validation is None else validation.level,
        folder=options.folder,
        refreshed=learning.refreshed,
        data=events.fingerprint() if options.folder or processes.share() != WHOLE else "",
    )
    choose = partial(choose_recency, untrained.config, model, split, validation)
    log, epochs = _run(run, training, validation, options, choose, name=name)
    if options.show and "recency" in log:
        say(f"the newest event of a history counts {model.recency:g} times in answers")
    if isinstance(learning.objective, LabelledRows) and learning.objective.sigmas():
        log["sigma"] = learning.objective.sigmas()
    return log, epochs


def _mined(objective: ObjectiveConfig, candidates: Candidates | None) -> DrawItems | None:
    if candidates is None or not isinstance(objective, RowsConfig):
        return None
    if objective.negatives_from != "retriever" or candidates.offered is not None:
        return None
    return candidate_negatives(candidates.retriever, candidates.num)


def _run(
    run: Fit[Any, Any],
    training: TrainingConfig,
    validation: Validation | None,
    options: RunOptions,
    choose: Callable[[], dict[str, float]],
    *,
    name: str,
) -> tuple[dict[str, object], int]:
    show, max_seconds = options.show, options.max_seconds
    with ShowProgress(training.rounds) as display:
        on_epochs = [display.epoch if show else None, options.on_epoch]
        on_costs = [partial(display.cost, name) if show else None, options.on_cost]
        watch = CostWatch(run, [tell for tell in on_costs if tell], max_seconds=max_seconds)
        if show and validation is not None:
            display.say(str(validation))

        def step(progress: Progress, steps_per_epoch: int) -> None:
            if show:
                display.step(progress, steps_per_epoch)
            watch.step(steps_per_epoch)

        def epoch(ended: Epoch) -> None:
            for tell in (*on_epochs, watch.epoch):
                if tell is not None:
                    tell(ended)

        progress = run.run(
            resume=options.resume, on_epoch=epoch, on_step=step, max_seconds=max_seconds
        )
        judged = _judged(validation, progress, choose())
        if show and judged["advice"]:
            display.say(str(judged["advice"]))
    best_epoch = progress.best_epoch or progress.epoch
    log = {
        "cost": None if watch.cost is None else asdict(watch.cost),
        "epochs": progress.epochs,
        "best_epoch": best_epoch,
        "steps": progress.step,
        "skipped_steps": progress.skipped,
        "precision": progress.precision,
        "stopped": progress.done,
        **judged,
    }
    return log, max(1, best_epoch)


def _judged(
    validation: Validation | None, progress: Progress, tried: dict[str, float]
) -> dict[str, object]:
    """Return how a run was validated, and its best value compared with baselines of counts."""
    if validation is None or not processes.is_first():
        return {"validated": "", "beside": {}, "advice": ""}
    best, at = max(progress.best, *tried.values(), -math.inf), progress.best_epoch
    beside, advice = validation.advice(best, best_epoch=at, epochs=progress.epoch)
    judged = {"validated": str(validation), "beside": beside, "advice": advice}
    return {**judged, **({"recency": tried} if tried else {})}

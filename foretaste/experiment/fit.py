"""From settings and a split to a trained model: the wiring of every room."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from foretaste.data.features import Features, fit_features
from foretaste.data.fields import FeatureSchema
from foretaste.data.graph import graph_of
from foretaste.data.interactions import Interactions
from foretaste.data.splits import Split
from foretaste.errors import DataError
from foretaste.evaluation.protocol import evaluate
from foretaste.experiment.learning import make_learning, usual_objective
from foretaste.models.catalogue import ModelConfig, build_model
from foretaste.models.interface import Begins, ClosedForm, Finishes
from foretaste.models.lightgcn import LightGCNConfig
from foretaste.models.pinsage import PinSageConfig
from foretaste.training.fit import Epoch, Fit
from foretaste.training.objectives.catalogue import ObjectiveConfig
from foretaste.training.progress import ShowProgress
from foretaste.training.settings import TrainingConfig
from foretaste.training.trained import Trained

STOP_METRIC = "ndcg_at_10"
"""What early stopping watches, on the validation part, over the full catalogue."""


def fit(
    config: ModelConfig,
    split: Split,
    *,
    seed: int = 0,
    training: TrainingConfig | None = None,
    objective: ObjectiveConfig | None = None,
    features: Features | FeatureSchema | None = None,
    folder: Path | None = None,
    resume: bool = False,
    show: bool = True,
    on_epoch: Callable[[Epoch], None] | None = None,
    max_seconds: float | None = None,
) -> Trained:
    """Train a model on a split's training part, stopping by its validation part.

    The test part is never looked at. Models that learn in closed form ignore `training`,
    `objective` and `folder`.

    Args:
        config: Which model, and its settings.
        split: Made by `temporal_split`, `leave_last_split` and their like.
        seed: Decides first weights, order, dropout and negatives: one seed, one result.
        training: The loop's settings.
        objective: What the loss is and how negatives are drawn.
        features: What is known of users and items, or which columns say it: those are fitted to
            the training part.
        folder: Where checkpoints and the log of steps go.
        resume: Go on from the checkpoint in `folder`, to the same result as without the break.
        show: Report progress on standard error.
        on_epoch: Told of each epoch; what it raises ends the run.
        max_seconds: Stop the training loop after so long, and keep the best weights so far; a
            model that learns in closed form cannot be stopped.

    Raises:
        ConfigError: The model has nothing to read, or the schema names a column that is not there.
        DataError: The training part is empty, or a feature is not of its kind.
        NonFiniteError: Training left the finite numbers.
        TooLargeError: The model would not fit in memory.
    """
    started = time.perf_counter()
    events = split.train
    if len(events) == 0:
        raise DataError("the training part of the split is empty: there is nothing to learn from")
    torch.manual_seed(seed)
    graph = (
        graph_of(events, config.graph)
        if isinstance(config, LightGCNConfig | PinSageConfig)
        else None
    )
    if isinstance(features, FeatureSchema):
        features = fit_features(features, events)
    model = build_model(
        config,
        num_users=events.num_users,
        num_items=events.num_items,
        graph=graph,
        features=features,
    )
    if isinstance(model, Begins):
        model.begin(events)
    training = training or TrainingConfig()
    settings: dict[str, object] = {"model": config.model_dump(mode="json"), "split": split.kind}
    log: dict[str, object] = {}
    if isinstance(model, ClosedForm):
        model.learn(events)
    else:
        objective = objective or usual_objective(model)
        settings |= {
            "training": training.model_dump(mode="json"),
            "objective": objective.model_dump(mode="json"),
        }
        learning = make_learning(
            model,
            objective,
            events,
            batch_events=training.batch_events,
            seed=seed,
            producers=training.producers,
            graph=graph,
        )
        run: Fit[Any, Any] = Fit(
            model,
            training,
            seed=seed,
            plan=learning.plan,
            objective=learning.objective,
            validate=_validate(config, events, split, seed),
            folder=folder,
            refreshed=learning.refreshed,
        )
        log = _run(
            run,
            training,
            resume=resume,
            show=show,
            on_epoch=on_epoch,
            max_seconds=max_seconds,
        )
    if isinstance(model, Finishes):
        model.finish(events)
    return Trained(
        config=config,
        model=model.eval(),
        events=events,
        features=features,
        seed=seed,
        train_seconds=time.perf_counter() - started,
        settings=settings,
        log=log,
    )


def _run(
    run: Fit[Any, Any],
    training: TrainingConfig,
    *,
    resume: bool,
    show: bool,
    on_epoch: Callable[[Epoch], None] | None,
    max_seconds: float | None,
) -> dict[str, object]:
    with ShowProgress(training.epochs) as display:

        def tell(epoch: Epoch) -> None:
            if show:
                display.epoch(epoch)
            if on_epoch:
                on_epoch(epoch)

        progress = run.run(
            resume=resume,
            on_epoch=tell,
            on_step=display.step if show else None,
            max_seconds=max_seconds,
        )
    return {
        "epochs": progress.epochs,
        "best_epoch": progress.best_epoch or progress.epoch,
        "steps": progress.step,
        "skipped_steps": progress.skipped,
        "stopped": progress.done,
    }


def _validate(
    config: ModelConfig, events: Interactions, split: Split, seed: int
) -> Callable[[nn.Module], float] | None:
    if len(split.validation) == 0:
        return None

    def validate(model: nn.Module) -> float:
        judged = Trained(config=config, model=model, events=events, seed=seed)
        report = evaluate(judged, split.validation, k=(10,), resamples=0)
        return report.metrics[STOP_METRIC]

    return validate

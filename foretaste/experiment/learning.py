"""The objective and the batches of each kind of model."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import TypeAdapter
from torch import Generator, Tensor

from foretaste.config import Config
from foretaste.data.batch import DrawItems, FieldTable
from foretaste.data.draws import WHOLE, epoch_generator, step_seed
from foretaste.data.features import Features
from foretaste.data.graph import Graph, graph_of
from foretaste.data.interactions import Interactions, mean_count, positives_of
from foretaste.data.plans import (
    FindHard,
    Offered,
    Plan,
    RowPlan,
    Windows,
    plan_pairs,
    plan_rows,
    plan_sequences,
)
from foretaste.data.rows import training_rows
from foretaste.data.tasks import Task, check_learnable, label_scale
from foretaste.errors import ConfigError
from foretaste.experiment.mining import IndexNegatives
from foretaste.models.base import Model, Ranker, Retriever
from foretaste.models.catalogue import ModelConfig
from foretaste.models.layers.table_kinds import FEW_EVENTS, FactorConfig, IdConfig
from foretaste.sampling.negatives import (
    MixedNegatives,
    RankedNegatives,
    RowNegatives,
    Seen,
    nearby_negatives,
)
from foretaste.sampling.samplers import PopularitySampler, UniformSampler
from foretaste.training import processes
from foretaste.training.candidates import CandidateConfig
from foretaste.training.checkpoint import Epoch
from foretaste.training.fit import Refreshed
from foretaste.training.objectives import (
    Hardness,
    LabelledRows,
    MaskedItem,
    MaskedItemConfig,
    NextItem,
    NextItemConfig,
    ObjectiveConfig,
    Pairs,
    PairsConfig,
    RowsConfig,
    hardness,
)
from foretaste.training.progress import Cost, WorkedPlan
from foretaste.training.settings import TrainingConfig
from foretaste.training.sharded import tables_of

M = TypeVar("M", bound=Config)
_OBJECTIVES: TypeAdapter[ObjectiveConfig] = TypeAdapter(ObjectiveConfig)


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Options of `fit` for a run; only the time limit affects the result."""

    folder: Path | None = None
    """Folder of checkpoints and of the log of steps."""
    resume: bool = False
    show: bool = True
    on_epoch: Callable[[Epoch], None] | None = None
    on_cost: Callable[[Cost], None] | None = None
    max_seconds: float | None = None

    def part(self, name: str, *, share: float = 1.0) -> "RunOptions":
        """Return the options of a part of the run, with its own folder and a share of the time."""
        folder = None if self.folder is None else self.folder / name
        return replace(self.at_most(share), folder=folder, on_epoch=None)

    def at_most(self, share: float) -> "RunOptions":
        """Return the same options with a share of the time."""
        seconds = None if self.max_seconds is None else self.max_seconds * share
        return replace(self, max_seconds=seconds)


def usual_objective(
    config: ModelConfig, events: Interactions | None = None, features: Features | None = None
) -> ObjectiveConfig:
    """Return the default objective of a model that is trained by gradient descent.

    Without l2 if the rows of its tables share weights (`TableKind.shares`).

    Args:
        config: The model's settings.
        events: The training events, whose counts may raise the l2 of a model; None: no change.
        features: Features of users and items.
    """
    objective = without_l2(config, _OBJECTIVES.validate_python(config.usual.objective))
    when = config.usual.l2_by_counts
    if events is None or when == "never" or not isinstance(objective, PairsConfig):
        return objective
    if when == "without features" and features and (features.user or features.item):
        return objective
    l2 = float(f"{objective.l2 * l2_factor(events):.2g}")
    return objective.model_copy(update={"l2": l2})


def settled_init(config: M, events: Interactions, features: Features | None) -> M:
    """Return settings with an `init` of "auto" replaced by a value that depends on the data."""
    if not isinstance(config, FactorConfig) or config.init != "auto":
        return config
    by_ids = not (features and (features.user or features.item))
    starts = by_ids and mean_count(events) < FEW_EVENTS
    return config.model_copy(update={"init": "svd" if starts else "random"})


def without_l2(config: ModelConfig, objective: ObjectiveConfig) -> ObjectiveConfig:
    """Return an objective, without its l2 if the rows of the model's tables share weights."""
    if isinstance(objective, PairsConfig) and isinstance(config, IdConfig) and config.table.shares:
        return objective.model_copy(update={"l2": 0.0})
    return objective


def l2_factor(events: Interactions) -> float:
    r"""Return the factor on l2, compared with data of many events per user and item.

    .. math:: \min\left(3, \max\left(1, 40 \frac{\sqrt{UI}}{E}\right)\right)

    with E events of U users and I items. A vector with fewer events overfits more easily.
    On validation MF is better with an l2 of .3 than of .1 at 8 and 13 events (TikTok .034 and .030,
    social Last.fm .133 and .117), and worse at 25 and 78 (S3-Rec's Last.fm .046 and .051,
    MovieLens-100K .066 and .092); at 1 it stays at popularity's level.
    """
    return min(3.0, max(1.0, 40 / mean_count(events)))


def decided(training: TrainingConfig, objective: ObjectiveConfig) -> str:
    """Return a line on training settings that depend on the data or the model."""
    said = f"learning rate {training.rate:g}, {training.batch_events} events a step"
    if training.average_decay:
        said += f", average {training.average_decay:g}"
    if isinstance(objective, CandidateConfig):
        said += f", {objective.loss} with {objective.negatives} negatives"
    return f"{said}, l2 {objective.l2:g}" if isinstance(objective, PairsConfig) else said


@dataclass(frozen=True, kw_only=True)
class Learning:
    """An objective, and a function from an epoch's number to its batches."""

    objective: Callable[[Any, Any, Generator], Tensor]
    plan: Callable[[int], Plan[Any]]
    refreshed: Refreshed | None = None
    """Data that the loop computes again from the weights in each epoch."""


def make_learning(
    model: Model,
    config: ObjectiveConfig,
    events: Interactions,
    *,
    batch_events: int,
    seed: int,
    producers: int = 0,
    graph: Graph | None = None,
    context: FieldTable | None = None,
    mine: DrawItems | None = None,
    offered: Offered | None = None,
) -> Learning:
    """Return the objective and the batches for a model and its events.

    Args:
        model: The network.
        config: The objective's settings.
        events: The training events.
        batch_events: Approximate number of events in a batch.
        seed: Decides order and draws.
        producers: Number of producers; if there are any, they also draw the negatives.
        graph: The graph of the events, if it exists already; hard negatives need one.
        context: Features of the context of each event, for rankers.
        mine: A retriever's candidates, for rankers that are trained on them.
        offered: Retrievers' candidates for each row of a ranker.

    Raises:
        ConfigError: The model cannot learn with this objective.
        DataError: There are no events.
    """

    def windows(max_len: int, which: Windows) -> Callable[[int], Plan[Any]]:
        return lambda epoch: plan_sequences(
            events,
            max_len=max_len,
            batch_events=batch_events,
            windows=which,
            generator=epoch_generator(seed, epoch),
            share=processes.share(),
        )

    if processes.share() != WHOLE:
        _refuse_together(model, config, batch_events)
    if config.kind != model.learns_by:
        raise ConfigError(
            f"objective.kind is {config.kind!r}, but {type(model).__name__} learns by "
            f"{model.learns_by!r}: set it so, or leave the objective out",
            name="objective.kind",
            value=config.kind,
        )
    match config:
        case NextItemConfig():
            return Learning(
                objective=NextItem(config, events),
                plan=windows(model.max_len, config.windows),
            )
        case MaskedItemConfig():
            return Learning(
                objective=MaskedItem(config, events),
                plan=windows(model.max_len, config.windows),
            )
        case PairsConfig() if isinstance(model, Retriever):
            return _learn_pairs(
                model,
                config,
                events,
                batch_events=batch_events,
                seed=seed,
                producers=producers,
                graph=graph,
            )
        case RowsConfig() if isinstance(model, Ranker):
            rows, plan = learn_rows(
                model,
                config,
                events,
                batch_events=batch_events,
                seed=seed,
                context=context,
                mine=mine,
                offered=offered,
            )
            return Learning(objective=rows, plan=plan)
        case _:
            raise ConfigError(
                f"{type(model).__name__} cannot learn by {config.kind!r}",
                name="objective.kind",
                value=config.kind,
            )


def needs_one_process(name: str, *, value: object) -> ConfigError:
    """Return the error for a setting that works only with a single process."""
    return ConfigError(
        f"{name} = {value!r} needs all rows of a batch in one process: leave it out, or train "
        "with one process",
        name=name,
        value=value,
    )


def _refuse_together(model: Model, config: ObjectiveConfig, batch_events: int) -> None:
    """Raise an error for settings that work only with a single process.

    Raises:
        ConfigError: A setting needs all rows of a batch together, or there are fewer rows than
            processes.
    """
    num = processes.share().world
    if batch_events < num:
        raise ConfigError(
            f"a batch has {batch_events} events, and there are {num} processes: raise "
            "training.batch_events, or start fewer",
            name="training.batch_events",
            value=batch_events,
        )
    if isinstance(config, PairsConfig) and config.contrast:
        raise needs_one_process("objective.contrast", value=config.contrast)
    if isinstance(config, PairsConfig) and config.hard_refresh_steps and tables_of(model):
        raise ConfigError(
            f"objective.hard_refresh_steps is {config.hard_refresh_steps}, and its thread would "
            "need rows that other processes hold: set it to 0, or leave out training.sharded_from",
            name="objective.hard_refresh_steps",
            value=config.hard_refresh_steps,
        )
    for layer in model.modules():
        name, value = getattr(layer, "needs_whole_batch", ("", None))
        if name:
            raise needs_one_process(name, value=value)


def _learn_pairs(
    model: Retriever,
    config: PairsConfig,
    events: Interactions,
    *,
    batch_events: int,
    seed: int,
    producers: int,
    graph: Graph | None,
) -> Learning:
    objective = Pairs(config, events)
    source = _hard_source(config, events, seed=seed, graph=graph)

    def plan(epoch: int) -> Plan[Any]:
        hard = hardness(config, epoch)
        pairs = plan_pairs(
            events,
            batch_events=batch_events,
            generator=epoch_generator(seed, epoch),
            reads=model.reads,
            max_len=model.max_len,
            find_hard=None if source is None or not hard.num else _finder(source, hard),
            share=processes.share(),
        )
        if not (producers and objective.loss.draws_ahead and processes.share() == WHOLE):
            return pairs
        return WorkedPlan(
            plan=pairs,
            work=lambda batch, index: objective.draw(
                model, batch, seed=step_seed(seed, epoch, index)
            ),
        )

    return Learning(
        objective=objective,
        plan=plan,
        refreshed=source if isinstance(source, IndexNegatives) else None,
    )


def _hard_source(
    config: PairsConfig, events: Interactions, *, seed: int, graph: Graph | None
) -> RankedNegatives | IndexNegatives | None:
    if not config.hard_negatives:
        return None
    match config.hard_from:
        case "walks":
            return nearby_negatives(
                graph or graph_of(events), Seen.of(events), ranks=config.hard_ranks[1], seed=seed
            )
        case "index":
            return IndexNegatives(config, events, seed=seed)


def _finder(source: RankedNegatives | IndexNegatives, hard: Hardness) -> FindHard:
    ranked_at = source.ranked_at if isinstance(source, IndexNegatives) else lambda _: source
    return lambda user_B, item_B, index, generator: ranked_at(index).draw(
        user_B, item_B, hard.num, ranks=hard.ranks, generator=generator
    )


def learn_rows(
    model: Ranker,
    config: RowsConfig,
    events: Interactions,
    *,
    batch_events: int,
    seed: int,
    context: FieldTable | None = None,
    mine: DrawItems | None = None,
    offered: Offered | None = None,
) -> tuple[LabelledRows, Callable[[int], RowPlan]]:
    """Return a ranker's objective, and a function from an epoch's number to its batches.

    Args:
        model: The network.
        config: The objective's settings.
        events: The training events; each is a row.
        batch_events: Number of rows in a batch.
        seed: Decides order and draws.
        context: Features of the context, a row for each event.
        mine: A retriever's candidates, if negatives come from a retriever.
        offered: Retrievers' candidates for each row, instead of all other negatives.

    Raises:
        ConfigError: A column does not exist, candidates are required but missing, or the ranker of
            `offered` does not predict a single task without a column.
        DataError: A label does not fit its task, or a task cannot be learned.
    """
    rows = training_rows(events, tasks=model.tasks, context=context, positive=config.positive)
    num_drawn = config.num_negatives(model.tasks)
    check_learnable(rows.label_ET, model.tasks, num_drawn=num_drawn)
    scales = {
        task.name: label_scale(task, label_E)
        for task, label_E in zip(model.tasks, rows.label_ET.T, strict=True)
        if task.kind == "regression"
    }
    draw = None
    if offered is not None:
        _check_what_happened(model.tasks)
    elif num_drawn:
        draw = _draw(config, positives_of(events, config.positive), mine)

    def plan(epoch: int) -> RowPlan:
        return plan_rows(
            rows,
            batch_events=batch_events,
            generator=epoch_generator(seed, epoch),
            reads=model.reads,
            max_len=model.max_len,
            num_drawn=num_drawn,
            draw=draw,
            offered=offered,
            share=processes.share(),
        )

    return LabelledRows(config, model.tasks, scales), plan


def _check_what_happened(tasks: tuple[Task, ...]) -> None:
    if len(tasks) != 1 or tasks[0].column:
        raise ConfigError(
            "first_stage.folds is for a ranker of one task without a column (whether an event "
            "happened): set it to 0, or leave the other tasks out",
            name="first_stage.folds",
        )


def _draw(config: RowsConfig, happened: Interactions, mine: DrawItems | None) -> DrawItems:
    """Return the source of drawn items; those of `happened` are excluded."""
    count_I = happened.item_count
    seen = Seen.of(happened) if config.exclude_known else None
    uniform = RowNegatives(
        UniformSampler(len(count_I), known_I=torch.from_numpy(count_I > 0)), seen
    )
    match config.negatives_from:
        case "uniform":
            return uniform
        case "popularity":
            return RowNegatives(PopularitySampler(count_I, alpha=config.popularity_power), seen)
        case "retriever":
            if mine is None:
                raise ConfigError(
                    "objective.negatives_from is 'retriever', and there is none: give its "
                    'candidates to fit as candidates=, or set it to "uniform" or "popularity"',
                    name="objective.negatives_from",
                    value="retriever",
                )
            if config.retriever_share == 1:
                return mine
            return MixedNegatives(first=mine, share=config.retriever_share, second=uniform)

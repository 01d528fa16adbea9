"""How rankers learn: from the labels of rows, beside items drawn where there are no zeros."""

from collections.abc import Callable

import torch

from foretaste.data.batch import DrawItems, FieldTable
from foretaste.data.interactions import Interactions
from foretaste.data.plans import Offered, RowPlan, plan_rows
from foretaste.data.rows import positives_of, training_rows
from foretaste.data.tasks import Task, check_learnable, label_scale
from foretaste.errors import ConfigError
from foretaste.models.base import Ranker
from foretaste.sampling.negatives import MixedNegatives, RowNegatives, Seen
from foretaste.sampling.samplers import PopularitySampler, UniformSampler
from foretaste.training.objectives.rows import LabelledRows, RowsConfig
from foretaste.training.runtime import epoch_generator


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
    """Return a ranker's objective, and an epoch's batches from the epoch's number.

    Args:
        model: The network.
        config: The objective's settings.
        events: Those of training, each a row.
        batch_events: Rows of a batch.
        seed: Decides order and draws.
        context: Features of the moment, a row for each event.
        mine: A retriever's candidates, where negatives are to come from one.
        offered: What retrievers offered for each row, in place of all other negatives.

    Raises:
        ConfigError: A column is not there, candidates are wanted and none are handed in, or rows
            are offered to a ranker that does more than tell them apart.
        DataError: A label is none that its task can have, or a task cannot be learned.
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
        )

    return LabelledRows(config, model.tasks, scales), plan


def _check_what_happened(tasks: tuple[Task, ...]) -> None:
    if len(tasks) != 1 or tasks[0].column:
        raise ConfigError(
            "first_stage.folds is for a ranker of one task without a column, whether something "
            "happened: set it to 0, or leave the other tasks out",
            name="first_stage.folds",
        )


def _draw(config: RowsConfig, happened: Interactions, mine: DrawItems | None) -> DrawItems:
    """Return who draws; `happened` is what must not be drawn."""
    count_I = happened.item_count
    seen = Seen.of(happened) if config.exclude_known else None
    alike = RowNegatives(UniformSampler(len(count_I), known_I=torch.from_numpy(count_I > 0)), seen)
    match config.negatives_from:
        case "uniform":
            return alike
        case "popularity":
            return RowNegatives(PopularitySampler(count_I, alpha=config.popularity_power), seen)
        case "retriever":
            if mine is None:
                raise ConfigError(
                    "objective.negatives_from is 'retriever', and there is none: hand its "
                    'candidates to fit as candidates=, or set it to "uniform" or "popularity"',
                    name="objective.negatives_from",
                    value="retriever",
                )
            if config.retriever_share == 1:
                return mine
            return MixedNegatives(first=mine, share=config.retriever_share, second=alike)

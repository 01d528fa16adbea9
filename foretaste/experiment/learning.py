"""Which model learns in which way: the objective and the batches that go with it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from foretaste.data.interactions import Interactions
from foretaste.data.pairs import plan_pairs
from foretaste.data.sequences import Windows, plan_sequences
from foretaste.errors import ConfigError
from foretaste.models.bert4rec import BERT4Rec
from foretaste.models.interface import PairModel, SequenceModel
from foretaste.models.sasrec import SASRec
from foretaste.training.fit import Plan
from foretaste.training.objectives.catalogue import ObjectiveConfig
from foretaste.training.objectives.masked_item import MaskedItem, MaskedItemConfig
from foretaste.training.objectives.next_item import NextItem, NextItemConfig
from foretaste.training.objectives.pairs import Pairs, PairsConfig
from foretaste.training.seeding import epoch_generator


def usual_objective(model: nn.Module) -> ObjectiveConfig:
    """Return how a model learns if nothing else is said.

    Raises:
        ConfigError: There is no way.
    """
    if isinstance(model, PairModel):
        return PairsConfig()
    if isinstance(model, BERT4Rec):
        return MaskedItemConfig()
    if isinstance(model, SequenceModel):
        return NextItemConfig()
    raise ConfigError(f"{type(model).__name__} has no way of learning")


@dataclass(frozen=True, kw_only=True)
class Learning:
    """An objective and an epoch's batches, from the epoch's number."""

    objective: Callable[[Any, Any], Tensor]
    plan: Callable[[int], Plan[Any]]


def make_learning(
    model: nn.Module,
    config: ObjectiveConfig,
    events: Interactions,
    *,
    batch_events: int,
    seed: int,
) -> Learning:
    """Return how a model learns from events.

    Raises:
        ConfigError: The model cannot learn so.
        DataError: There is no event.
    """

    def windows(max_len: int, which: Windows) -> Callable[[int], Plan[Any]]:
        return lambda epoch: plan_sequences(
            events,
            max_len=max_len,
            batch_events=batch_events,
            windows=which,
            generator=epoch_generator(seed, epoch),
        )

    match config:
        case NextItemConfig() if isinstance(model, SASRec):
            return Learning(
                objective=NextItem(config, events),
                plan=windows(model.max_len, config.windows),
            )
        case MaskedItemConfig() if isinstance(model, BERT4Rec):
            return Learning(
                objective=MaskedItem(config, events),
                plan=windows(model.max_len, config.windows),
            )
        case PairsConfig() if isinstance(model, PairModel):
            reads, read_len = model.reads, model.max_len
            return Learning(
                objective=Pairs(config, events),
                plan=lambda epoch: plan_pairs(
                    events,
                    batch_events=batch_events,
                    generator=epoch_generator(seed, epoch),
                    reads=reads,
                    max_len=read_len,
                ),
            )
        case _:
            raise ConfigError(
                f"objective.kind is {config.kind!r}, but {type(model).__name__} learns by "
                f"{usual_objective(model).kind!r}: set it so, or leave the objective out"
            )

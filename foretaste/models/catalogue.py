"""All models by name, and the construction of untrained networks from settings.

A new model needs a member of the union and an arm of the `match`; a missing arm fails the type
check. The file also contains `TwoStage`, which combines two models.

Shape legend: B queries, I items, C candidates per query, R items that were not candidates.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Annotated, ClassVar, Literal, NamedTuple, assert_never, final

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from pydantic import Field
from torch import Tensor

from foretaste.config import ChoiceConfig, Config, Count, RangeConfig, Space, Usual, Weight
from foretaste.data import arrays
from foretaste.data.batch import Queries
from foretaste.data.features import Features, FieldTable
from foretaste.data.graph import Graph, graph_of
from foretaste.data.interactions import Interactions, positives_of
from foretaste.data.tasks import Task, Weights, zeros_in_histories
from foretaste.errors import ConfigError, NonFiniteError
from foretaste.models.base import Model, Ranker, Retriever, Scorer, sizes_only, top_k
from foretaste.models.baselines import (
    EASE,
    EASEConfig,
    ImplicitALS,
    ImplicitALSConfig,
    ItemKNN,
    ItemKNNConfig,
    Popularity,
    PopularityConfig,
)
from foretaste.models.bert4rec import BERT4Rec, BERT4RecConfig
from foretaste.models.hstu import HSTU, HSTUConfig
from foretaste.models.layers.field_ranker import HistoryConfig
from foretaste.models.lightgcn import LightGCN, LightGCNConfig
from foretaste.models.mf import MF, MFConfig
from foretaste.models.neumf import NCF, GMFConfig, MLPConfig, NeuMFConfig
from foretaste.models.pinsage import PinSage, PinSageConfig
from foretaste.models.rankers import (
    DIN,
    DeepFM,
    DeepFMConfig,
    DINConfig,
    MMoE,
    MMoEConfig,
    SharedBottom,
    SharedBottomConfig,
)
from foretaste.models.sasrec import SASRec, SASRecConfig
from foretaste.models.two_tower import TwoTower, TwoTowerConfig

RetrieverConfig = (
    SASRecConfig
    | BERT4RecConfig
    | HSTUConfig
    | MFConfig
    | TwoTowerConfig
    | LightGCNConfig
    | PinSageConfig
    | PopularityConfig
    | ItemKNNConfig
    | EASEConfig
    | ImplicitALSConfig
)
"""Models that find candidates in the whole catalogue."""

RankerConfig = (
    GMFConfig | MLPConfig | NeuMFConfig | DeepFMConfig | DINConfig | SharedBottomConfig | MMoEConfig
)
"""Models that score given items."""


class TwoStageConfig(Config):
    """Settings of the two-stage recommender: one model finds candidates, another ranks them."""

    kind: Literal["two_stage"] = "two_stage"
    tuning: ClassVar[Space] = {
        "candidates": ChoiceConfig(choices=(100, 200, 500)),
        "retriever_weight": RangeConfig(low=0.0, high=1.0),
    }
    usual: ClassVar[Usual] = Usual()
    retriever: Annotated[RetrieverConfig, Field(discriminator="kind")]
    """The model that finds candidates in the whole catalogue."""
    ranker: Annotated[RankerConfig, Field(discriminator="kind")]
    """The model that orders the candidates, for one task or several."""
    candidates: Count = 200
    """Number of the retriever's best items that the ranker orders; all others follow below."""
    retriever_weight: Weight = 0.0
    """Weight of the retriever's score, added to the ranker's. It is not used if a request gives
    weights of its own."""


ModelConfig = Annotated[
    RetrieverConfig | RankerConfig | TwoStageConfig, Field(discriminator="kind")
]
CLOSED_FORM = (PopularityConfig, ItemKNNConfig, EASEConfig, ImplicitALSConfig)
"""Models that are trained in one piece, which a budget cannot interrupt."""


def tasks_of(config: ModelConfig) -> tuple[Task, ...]:
    """Return the tasks of a model with these settings; retrievers have none."""
    match config:
        case TwoStageConfig():
            return tasks_of(config.ranker)
        case SharedBottomConfig() | MMoEConfig():
            return config.tasks
        case GMFConfig() | MLPConfig() | NeuMFConfig() | DeepFMConfig() | DINConfig():
            return (config.task,)
        case _:
            return ()


class Pretraining(NamedTuple):
    """The models that a model starts from."""

    parts: tuple[RankerConfig, ...]
    """Models that are trained first and passed to `start_from`."""
    epochs: int | None
    """Epochs of each; None: as many as the model's own."""
    fine_tuning: float
    """The model's learning rate after pretraining, as a share of training's."""


def pretraining_of(config: ModelConfig) -> Pretraining | None:
    """Return the models that a model starts from; None if it starts from random weights."""
    if isinstance(config, NeuMFConfig) and config.pretrain:
        return Pretraining(config.parts(), config.pretrain_epochs, config.fine_tuning)
    return None


def graph_for(config: ModelConfig, events: Interactions) -> Graph | None:
    """Return the graph of a model; None for models without a graph."""
    if isinstance(config, LightGCNConfig | PinSageConfig):
        return graph_of(events, config.graph)
    return None


_WHEN_ABSENT: Mapping[str, Mapping[str, object]] = {
    **{kind: {"pooling": "none"} for kind in ("mmoe", "shared_bottom")},
    **{kind: {"init": "random", "recency": 1.0} for kind in ("mf", "two_tower")},
    "lightgcn": {"recency": 1.0},
}
"""By a model's kind, settings that older bundles lack, with their former values."""


def as_written(model: Mapping[str, object]) -> dict[str, object]:
    """Return a model's settings from a bundle, with those that an earlier version lacked."""
    whole = {**_WHEN_ABSENT.get(str(model.get("kind")), {}), **model}
    stages = {name: whole.get(name) for name in ("retriever", "ranker")}
    return whole | {k: as_written(v) for k, v in stages.items() if isinstance(v, Mapping)}


def settled(
    config: ModelConfig, events: Interactions, *, positive: str = "", ordered: bool = True
) -> ModelConfig:
    """Return settings in which every "auto" is replaced by a value that depends on the data.

    Args:
        config: The settings of a model before training.
        events: The training events.
        positive: Column whose values above 0 mark histories' events; "": `Interactions.positive`.
        ordered: Whether the order of a user's events has a meaning.
    """
    if isinstance(config, HistoryConfig) and config.reads == "auto":
        config = config.model_copy(update={"reads": "before" if ordered else "others"})
    if not (isinstance(config, HistoryConfig) and config.pooling == "auto"):
        return config
    happened = positives_of(events, positive)
    has_histories = (
        happened.num_items > 1
        and np.diff(happened.offsets).max(initial=0) > 1
        and zeros_in_histories(events, tasks_of(config), positive=positive) is None
    )
    return config.model_copy(update={"pooling": "attention" if has_histories else "none"})


LEARNING_COPIES = 5  # weights, gradient, two moments of the optimizer, and the best weights


def build_model(
    config: ModelConfig,
    *,
    num_users: int,
    num_items: int,
    graph: Graph | None = None,
    features: Features | None = None,
    copies: int = 1,
) -> Model:
    """Make the untrained network that `config` describes.

    Initial weights are drawn from torch's global generator: seed it first.

    Args:
        config: A model's settings.
        num_users: Number of training users, 0 or more.
        num_items: Number of items in the catalogue, 1 or more.
        graph: The graph of the training events, for models that use one; None if the model's state
            is loaded next.
        features: Features of users, items and contexts, for models that read them.
        copies: Number of copies of the weights in memory; `LEARNING_COPIES` for training.

    Raises:
        ConfigError: The model has no input.
        TooLargeError: The model would not fit in memory; nothing is allocated before.
    """
    if isinstance(config, TwoStageConfig):
        part = partial(
            build_model, num_users=num_users, num_items=num_items, features=features, copies=copies
        )
        return TwoStage(
            part(config.retriever, graph=graph),
            part(config.ranker),
            num_candidates=config.candidates,
            retriever_weight=config.retriever_weight,
        )
    num_nodes = num_users + num_items if graph is None else graph.num_nodes
    known_users = num_nodes - num_items if isinstance(config, LightGCNConfig) else num_users

    def bytes_of(config: RetrieverConfig | RankerConfig) -> int:
        return _bytes_of(
            lambda: _make(config, num_users=known_users, num_items=num_items, features=features),
            copies=copies,
        )

    needed = bytes_of(config)
    if needed > arrays.available_bytes():
        name, value = _size_to_lower(config, bytes_of)
        arrays.check_fits(
            needed,
            f"{config.kind} over {num_users:,} users and {num_items:,} items",
            f"lower model.{name}, which is {value}, or leave rare users and items, and the "
            "feature of the most values, out",
            name=name,
            value=value,
        )
    return _make(config, num_users=num_users, num_items=num_items, graph=graph, features=features)


def _bytes_of(make: Callable[[], Model], *, copies: int) -> int:
    try:
        with sizes_only():
            model = make()
    except (RuntimeError, TypeError) as error:
        if "overflow" not in str(error).lower():
            raise
        return sys.maxsize  # torch cannot count so many bytes
    learned = sum(parameter.nbytes for parameter in model.parameters())
    return copies * learned + sum(buffer.nbytes for buffer in model.buffers())


def _size_to_lower(
    config: RetrieverConfig | RankerConfig,
    bytes_of: Callable[[RetrieverConfig | RankerConfig], int],
) -> tuple[str, object]:
    """Return the name and value of the setting that reduces a network most if it is lowered."""
    found: list[tuple[int, str, object]] = []
    for name, value, lower in _lowered(config):
        try:
            found.append((bytes_of(config.model_copy(update={name: lower})), name, value))
        except ConfigError:  # settings that cannot be combined
            continue
    _, name, value = min(found, key=lambda each: each[0], default=(0, "", None))
    return name, value


def _lowered(config: Config) -> Iterator[tuple[str, object, object]]:
    """Yield each integer setting's name and value, and lower values: 1, half, the default."""
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        if isinstance(value, tuple) and value and all(isinstance(n, int) for n in value):
            yield name, value, (1,) * len(value)
        elif isinstance(value, int) and not isinstance(value, bool):
            for lower in (1, value // 2, field.default):
                if isinstance(lower, int) and 0 < lower < value:
                    yield name, value, lower


def _make(  # noqa: C901  # one arm a model
    config: RetrieverConfig | RankerConfig,
    *,
    num_users: int,
    num_items: int,
    graph: Graph | None = None,
    features: Features | None = None,
) -> Model:
    match config:
        case SASRecConfig():
            return SASRec(config, num_items=num_items)
        case BERT4RecConfig():
            return BERT4Rec(config, num_items=num_items)
        case HSTUConfig():
            return HSTU(config, num_items=num_items)
        case MFConfig():
            return MF(config, num_users=num_users, num_items=num_items)
        case TwoTowerConfig():
            return TwoTower(config, num_users=num_users, num_items=num_items, features=features)
        case LightGCNConfig():
            return LightGCN(config, num_users=num_users, num_items=num_items, graph=graph)
        case PinSageConfig():
            return PinSage(
                config, num_users=num_users, num_items=num_items, graph=graph, features=features
            )
        case GMFConfig() | MLPConfig() | NeuMFConfig():
            return NCF(config, num_users=num_users, num_items=num_items)
        case DeepFMConfig():
            return DeepFM(config, num_users=num_users, num_items=num_items, features=features)
        case DINConfig():
            return DIN(config, num_users=num_users, num_items=num_items, features=features)
        case SharedBottomConfig():
            return SharedBottom(config, num_users=num_users, num_items=num_items, features=features)
        case MMoEConfig():
            return MMoE(config, num_users=num_users, num_items=num_items, features=features)
        case PopularityConfig():
            return Popularity(config, num_items=num_items)
        case ItemKNNConfig():
            return ItemKNN(config, num_items=num_items)
        case EASEConfig():
            return EASE(config, num_items=num_items)
        case ImplicitALSConfig():
            return ImplicitALS(config, num_items=num_items)
        case _:
            assert_never(config)


_BLOCK_PAIRS = 2**15
"""Approximate number of pairs of a query and a candidate that are scored at once."""


class Judged(NamedTuple):
    """A ranker's outputs for some items."""

    score_BC: Float[Tensor, "B C"]
    """The score that orders the items; higher is better."""
    prediction: Mapping[str, Float64[Tensor, "B C"]]
    """By task: a probability, a value in the label's own unit, or the expected level."""


def judge(
    ranker: Ranker,
    queries: Queries,
    item_BC: Int64[Tensor, "B C"],
    *,
    weights: Weights | None = None,
) -> Judged:
    """Score items with a ranker, some queries at a time.

    Args:
        ranker: In evaluation mode.
        queries: Users and contexts.
        item_BC: item_idx of each query's items.
        weights: Weights of the tasks' predictions, each in its own unit, in the score; None: the
            tasks' own weights of answers in [0, 1].

    Raises:
        NonFiniteError: A score is NaN or infinite.
    """
    columns = item_BC.split(_BLOCK_PAIRS, dim=1)
    size = max(1, _BLOCK_PAIRS // max(1, columns[0].shape[1]))
    rows = []
    for start in range(0, max(1, len(queries)), size):
        part = queries if len(queries) <= size else queries.part(start, start + size)
        outputs = [ranker(part, item_bc[start : start + size]) for item_bc in columns]
        rows.append(
            (
                torch.cat([ranker.heads.order(output, weights) for output in outputs], dim=1),
                [ranker.heads.answers(output) for output in outputs],
            )
        )
    prediction = {
        task.name: torch.cat([torch.cat([p[task.name] for p in found], dim=1) for _, found in rows])
        for task in ranker.tasks
    }
    return Judged(_finite(torch.cat([score_bC for score_bC, _ in rows])), prediction)


def judge_new(
    ranker: Ranker, queries: Queries, table: FieldTable, *, weights: Weights | None = None
) -> Judged:
    """Score the new items of a request, which are not in the tables, with a ranker.

    Args:
        ranker: In evaluation mode.
        queries: Users and contexts.
        table: The new items' features, one row per item.
        weights: Weights of the tasks, as in `judge`.

    Raises:
        ConfigError: The ranker reads no features of items.
        NonFiniteError: A score is NaN or infinite.
    """
    outputs = ranker.of_new_items(queries, table)
    return Judged(_finite(ranker.heads.order(outputs, weights)), ranker.heads.answers(outputs))


def _finite(score_BC: Float[Tensor, "B C"]) -> Float[Tensor, "B C"]:
    if not score_BC.isfinite().all():
        raise NonFiniteError("a score is NaN or infinite: the ranker is broken, train it again")
    return score_BC.float()


def below(score_BC: Float[Tensor, "B C"], first_BR: Float[Tensor, "B R"]) -> Float[Tensor, "B R"]:
    """Return scores of the other items, below the candidates, in the retriever's order.

    Args:
        score_BC: The ranker's scores of the candidates, -inf for none.
        first_BR: The retriever's scores of all other items; -inf is kept.
    """
    lowest_B = score_BC.where(score_BC.isfinite(), torch.inf).amin(dim=1, keepdim=True)
    lowest_B = lowest_B.where(lowest_B.isfinite(), 0.0)
    best_B = first_BR.amax(dim=1, keepdim=True)
    return lowest_B - 1 + (first_BR - best_B.where(best_B.isfinite(), 0.0))


@final
class TwoStage(Model):
    """A model of two networks: a retriever finds candidates, and a ranker orders them."""

    def __init__(
        self,
        retriever: Model,
        ranker: Model,
        *,
        num_candidates: int,
        retriever_weight: float = 0.0,
    ) -> None:
        """Combine two networks over one catalogue.

        Args:
            retriever: A `Retriever` or a `Scorer`.
            ranker: A `Ranker`.
            num_candidates: C, 1 or more.
            retriever_weight: Weight of the retriever's score in the sum with the ranker's.

        Raises:
            ConfigError: The networks do not have these kinds.
        """
        super().__init__()
        if not isinstance(retriever, Retriever | Scorer):
            raise ConfigError(f"{type(retriever).__name__} cannot score a catalogue")
        if not isinstance(ranker, Ranker):
            raise ConfigError(
                f"{type(ranker).__name__} is not a ranker: it cannot score given items"
            )
        self.retriever, self.ranker = retriever, ranker
        self.num_candidates, self.retriever_weight = num_candidates, retriever_weight

    def heard(self, judged: Judged, first_BC: Float[Tensor, "B C"]) -> Judged:
        """Add the weighted retriever's scores of the ranked items, -inf for none."""
        real_BC = first_BC.where(first_BC > -torch.inf, 0.0)
        return judged._replace(score_BC=judged.score_BC + self.retriever_weight * real_BC)

    def rerank(self, queries: Queries, first_BI: Float[Tensor, "B I"]) -> Float[Tensor, "B I"]:
        """Return every item's score; the ranker orders the retriever's best above all others.

        Args:
            queries: Users and contexts.
            first_BI: The retriever's scores, -inf for items that may not be recommended.

        Raises:
            NonFiniteError: A score of the ranker is NaN or infinite.
        """
        best_BC, item_BC = top_k(first_BI, self.num_candidates)
        judged = self.heard(judge(self.ranker, queries, item_BC), best_BC)
        score_BC = judged.score_BC.where(best_BC > -torch.inf, -torch.inf)
        rest_BI = first_BI.scatter(1, item_BC, -torch.inf)
        return below(score_BC, rest_BI).scatter(1, item_BC, score_BC)

    @property
    def reads_profiles(self) -> bool:
        """Whether either stage reads users' features."""
        return self.retriever.reads_profiles or self.ranker.reads_profiles

    @property
    def reads_context(self) -> bool:
        """Whether the ranker reads features of the context."""
        return self.ranker.reads_context

    @property
    def first_stage(self) -> Model:
        return self.retriever

    @property
    def second_stage(self) -> Model:
        return self.ranker


def placer(model: Model) -> Retriever | None:
    """Return the first stage if it has vectors for items without a row."""
    first = model.first_stage
    return first if isinstance(first, Retriever) and first.scores_new_items else None

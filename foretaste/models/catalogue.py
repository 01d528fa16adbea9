"""All models by name: from settings to an untrained network.

A new model is one more member of the union and one more arm of the `match`; a forgotten arm
fails the type check.
"""

from typing import Annotated, Literal, assert_never

from pydantic import Field, PositiveInt
from torch import nn

from foretaste.config import Config
from foretaste.data.features import Features
from foretaste.data.graph import Graph
from foretaste.data.tasks import Task
from foretaste.models.als import ImplicitALS, ImplicitALSConfig
from foretaste.models.bert4rec import BERT4Rec, BERT4RecConfig
from foretaste.models.deepfm import DeepFM, DeepFMConfig
from foretaste.models.din import DIN, DINConfig
from foretaste.models.ease import EASE, EASEConfig
from foretaste.models.item_knn import ItemKNN, ItemKNNConfig
from foretaste.models.lightgcn import LightGCN, LightGCNConfig
from foretaste.models.mf import MF, MFConfig
from foretaste.models.mmoe import MMoE, MMoEConfig
from foretaste.models.neumf import NCF, GMFConfig, MLPConfig, NeuMFConfig
from foretaste.models.pinsage import PinSage, PinSageConfig
from foretaste.models.popularity import Popularity, PopularityConfig
from foretaste.models.sasrec import SASRec, SASRecConfig
from foretaste.models.shared_bottom import SharedBottom, SharedBottomConfig
from foretaste.models.two_stage import TwoStage
from foretaste.models.two_tower import TwoTower, TwoTowerConfig

RetrieverConfig = (
    SASRecConfig
    | BERT4RecConfig
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
"""Models that judge given items."""


class TwoStageConfig(Config):
    """Settings of the two-stage recommender: one model finds candidates, another ranks them."""

    kind: Literal["two_stage"] = "two_stage"
    retriever: Annotated[RetrieverConfig, Field(discriminator="kind")]
    """The model that finds candidates in the whole catalogue."""
    ranker: Annotated[RankerConfig, Field(discriminator="kind")]
    """The model that judges them, for one task or several."""
    candidates: PositiveInt = 200
    """How many of the retriever's best items are ranked anew; all others stand below them."""
    retriever_weight: float = Field(default=0.0, ge=0)
    """How much the retriever's own score counts beside the ranker's; not where a request brings
    weights of its own."""


ModelConfig = Annotated[
    RetrieverConfig | RankerConfig | TwoStageConfig, Field(discriminator="kind")
]


def tasks_of(config: ModelConfig) -> tuple[Task, ...]:
    """Return what a model that `config` describes predicts of labelled rows; most predict none."""
    match config:
        case TwoStageConfig():
            return tasks_of(config.ranker)
        case SharedBottomConfig() | MMoEConfig():
            return config.tasks
        case GMFConfig() | MLPConfig() | NeuMFConfig() | DeepFMConfig() | DINConfig():
            return (config.task,)
        case _:
            return ()


def build_model(  # noqa: C901  # one arm a model
    config: ModelConfig,
    *,
    num_users: int,
    num_items: int,
    graph: Graph | None = None,
    features: Features | None = None,
) -> nn.Module:
    """Make the untrained network that `config` describes.

    Initial weights come out of torch's global generator: seed it first.

    Args:
        config: A model's settings.
        num_users: Users that training knows, 0 or more.
        num_items: Items of the catalogue, 1 or more.
        graph: Of the training events, for models that learn on one; None where the model's state
            is loaded next.
        features: What is known of users and items, for models that read it.

    Raises:
        ConfigError: The model has nothing to read.
        TooLargeError: What the model keeps would not fit in memory.
    """
    match config:
        case SASRecConfig():
            return SASRec(config, num_items=num_items)
        case BERT4RecConfig():
            return BERT4Rec(config, num_items=num_items)
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
        case TwoStageConfig():
            retriever, ranker = (
                build_model(
                    part,
                    num_users=num_users,
                    num_items=num_items,
                    graph=graph if part is config.retriever else None,
                    features=features,
                )
                for part in (config.retriever, config.ranker)
            )
            return TwoStage(
                retriever,
                ranker,
                num_candidates=config.candidates,
                retriever_weight=config.retriever_weight,
            )
        case _:
            assert_never(config)

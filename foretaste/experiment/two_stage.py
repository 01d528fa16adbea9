"""A retriever and a ranker as one model, fitted one after another, or joined after training."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Literal

import torch
from pydantic import Field

from foretaste.arguments import checked, checked_class
from foretaste.config import Config, Count, Weight
from foretaste.data.features import Features
from foretaste.data.interactions import Interactions
from foretaste.data.plans import Offered
from foretaste.data.splits import Split, happened_split
from foretaste.errors import ConfigError, DataError
from foretaste.evaluation.compare import RankingGain, compare
from foretaste.evaluation.report import Report
from foretaste.experiment.learning import RunOptions
from foretaste.experiment.mining import Fold, fit_folds, offer
from foretaste.models.base import Model, Ranker
from foretaste.models.catalogue import TwoStage, TwoStageConfig, build_model
from foretaste.training.objectives import ObjectiveConfig, RowsConfig
from foretaste.training.settings import TrainingConfig
from foretaste.training.trained import Trained

_NO_OPTIONS = RunOptions()


class FirstStage(Config):
    """Training of the retriever in two stages; the recipe's other sections are for the ranker."""

    objective: ObjectiveConfig | None = None
    """The retriever's objective; by default, that of the model."""
    training: TrainingConfig = Field(default_factory=TrainingConfig)
    """Settings of the retriever's training loop."""
    folds: Literal[0] | Annotated[int, Field(ge=2, le=100)] = 0
    """Number of parts into which users are divided; the candidates of each part's rows come from a
    retriever trained on all other users. The ranker then learns to distinguish each row's item from
    its candidates, by its logit plus `retriever_weight` times the retriever's score, as in answers.
    0: the ranker is trained without retriever scores, on candidates of the trained retriever."""


@checked_class
@dataclass(frozen=True, eq=False, kw_only=True)
class Candidates:
    """The candidates for a ranker: the best items of a trained retriever."""

    retriever: Trained
    num: Count = 200
    """Number of candidates for each user."""
    retriever_weight: Weight = 0.0
    """Weight of the retriever's score, which is added to the ranker's."""
    offered: Offered | None = None
    """Candidates of each row from retrievers that were not trained on it; None: the objective draws
    the negatives."""

    @checked
    def ranked_by(self, ranker: Model) -> TwoStage:
        """Return the two-stage network, in evaluation mode."""
        return TwoStage(
            self.retriever.model,
            ranker,
            num_candidates=self.num,
            retriever_weight=self.retriever_weight,
        ).eval()


@dataclass(frozen=True, eq=False, kw_only=True)
class FirstFitted:
    """A fitted first stage."""

    retriever: Trained
    folds: tuple[Fold, ...] = ()
    """The further retrievers; empty without folds."""

    def candidates(self, config: TwoStageConfig, split: Split, objective: RowsConfig) -> Candidates:
        """Return the candidates for a ranker with this objective.

        Raises:
            ConfigError: There are folds, and the objective reads labels or draws by popularity.
            DataError: There are folds, and no row's own item was a candidate.
        """
        offered = None
        if self.folds:
            offered = offer(
                self.folds,
                split,
                objective,
                num=config.candidates,
                weight=config.retriever_weight,
                seed=self.retriever.seed,
            )
        return Candidates(
            retriever=self.retriever,
            num=config.candidates,
            retriever_weight=config.retriever_weight,
            offered=offered,
        )


def fit_first_stage(
    config: TwoStageConfig,
    fit_part: Callable[..., Trained],
    split: Split,
    *,
    first_stage: FirstStage,
    positive: str = "",
    options: RunOptions = _NO_OPTIONS,
) -> FirstFitted:
    """Fit a retriever, and one more for each fold.

    Args:
        config: Both models.
        fit_part: `fit` with the arguments that both parts share.
        split: The training data.
        first_stage: The training of the retriever.
        positive: Column whose values above 0 mark positive events; "": every event is positive.
        options: Options of all retrievers together; checkpoints are in a subfolder.
    """
    fit_retriever = partial(
        fit_part,
        config.retriever,
        training=first_stage.training,
        objective=first_stage.objective,
    )
    options = options.part("retriever", share=1 / (1 + first_stage.folds))
    retriever = fit_retriever(split=happened_split(split, positive), **vars(options))
    if not first_stage.folds:
        return FirstFitted(retriever=retriever)
    unsaved = vars(replace(options, folder=None, resume=False))
    folds = fit_folds(
        lambda part: fit_retriever(split=part, **unsaved),
        split,
        first_stage.folds,
        seed=retriever.seed,
    )
    return FirstFitted(retriever=retriever, folds=folds)


def fit_two_stage(
    config: TwoStageConfig,
    fit_part: Callable[..., Trained],
    split: Split,
    options: RunOptions,
    *,
    training: TrainingConfig | None,
    objective: ObjectiveConfig | None,
    first_stage: FirstStage,
) -> Trained:
    """Fit a retriever, then a ranker whose negatives are the candidates, and join them.

    Args:
        config: Both models.
        fit_part: `fit` with the arguments that both stages share.
        split: The training data.
        options: Options of both trainings together; half of the time limit is for the retriever.
        training: The ranker's training settings.
        objective: The ranker's objective; None: zeros are drawn half from the candidates, half from
            all items.
        first_stage: The training of the retriever.

    Raises:
        ConfigError: The ranker cannot be trained by this objective.
    """
    if objective is None:
        objective = RowsConfig(negatives_from="retriever", retriever_share=0.5)
    if not isinstance(objective, RowsConfig):
        raise ConfigError(
            f"objective.kind is {objective.kind!r}, but in two stages it is the ranker's, which "
            'learns by "rows": the retriever\'s is first_stage.objective',
            name="objective.kind",
            value=objective.kind,
        )
    options = options.at_most(1 / 2)
    first = fit_first_stage(
        config,
        fit_part,
        split,
        first_stage=first_stage,
        positive=objective.positive,
        options=options,
    )
    ranker = fit_part(
        config.ranker,
        training=training,
        objective=objective,
        candidates=first.candidates(config, split, objective),
        **vars(options),
    )
    return two_stage(
        first.retriever,
        ranker,
        candidates=config.candidates,
        retriever_weight=config.retriever_weight,
    )


@checked
def two_stage(
    retriever: Trained, ranker: Trained, *, candidates: int = 200, retriever_weight: float = 0.0
) -> Trained:
    """Join two models trained on the same events: one finds candidates, the other ranks them.

    Args:
        retriever: A model that scores the catalogue.
        ranker: A model that scores given items.
        candidates: Number of the retriever's best items that the ranker orders, 1 or more.
        retriever_weight: Weight of the retriever's score, added to the ranker's.

    Raises:
        ConfigError: The second model is not a ranker, or the two have different features.
        DataError: The models have different users or items.
    """
    if not isinstance(ranker.model, Ranker):
        raise ConfigError(
            f"{type(ranker.model).__name__} is not a ranker: it cannot score given items",
            name="ranker",
            value=type(ranker.model).__name__,
        )
    check_same(retriever.events, ranker.events, "the retriever and the ranker")
    _check_sides(retriever.features, ranker.features)
    config = TwoStageConfig.model_validate(
        {
            "retriever": retriever.config.model_dump(),
            "ranker": ranker.config.model_dump(),
            "candidates": candidates,
            "retriever_weight": retriever_weight,
        }
    )
    features = ranker.features or retriever.features
    joined = replace(
        ranker,
        config=config,
        model=Candidates(
            retriever=retriever, num=candidates, retriever_weight=retriever_weight
        ).ranked_by(ranker.model),
        features=features,
        train_seconds=retriever.train_seconds + ranker.train_seconds,
        epochs=(*retriever.epochs, *ranker.epochs),
        settings={
            **ranker.settings,
            "model": config.model_dump(mode="json"),
            "first_stage": {
                name: retriever.settings[name]
                for name in ("training", "objective")
                if name in retriever.settings
            },
        },
        log={**ranker.log, "retriever": retriever.log},
    )
    _check_features(joined, config)
    return joined


def retrieval_alone(trained: Trained) -> Trained:
    """Return the first of two stages as a separate model."""
    config = trained.config
    return replace(
        trained,
        config=config.retriever if isinstance(config, TwoStageConfig) else config,
        model=trained.model.first_stage,
    )


def ranking_gain(both: Report, retrieval: Report) -> RankingGain:
    """Compare two stages with only the first, by the leading NDCG.

    Raises:
        DataError: They were measured on different holdouts.
    """
    metric = f"ndcg_at_{both.k[0]}{both.suffix}"
    return RankingGain(retrieval=retrieval, comparison=compare(both, retrieval, metric))


def check_same(first: Interactions, second: Interactions, what: str) -> None:
    """Raise an error for models with different users or items.

    Args:
        first: The retriever's events.
        second: The ranker's events.
        what: The two models in words, such as "the retriever and the ranker".

    Raises:
        DataError: The ids differ.
    """
    for side, one, other in (
        ("users", first.users, second.users),
        ("items", first.items, second.items),
    ):
        if not one.same_as(other):
            raise DataError(
                f"{what} have different {side}, {len(one):,} and {len(other):,}: fit both on the "
                "same split",
                name=side,
            )


def _check_sides(first: Features | None, second: Features | None) -> None:
    """Raise an error for separately fitted features, in which one code may mean two values."""
    if first is None or second is None or first is second:
        return
    for name in ("user", "item", "context"):
        if getattr(first, name) != getattr(second, name):
            raise ConfigError(
                f"the retriever and the ranker were given different features of the {name}: fit "
                "both with the same Features, from fit_features",
                name=name,
            )


def _check_features(joined: Trained, config: TwoStageConfig) -> None:
    """Make both networks from the features that a bundle would store, and compare their shapes."""
    with torch.random.fork_rng(devices=[]):
        again = build_model(
            config,
            num_users=joined.events.num_users,
            num_items=joined.events.num_items,
            features=joined.features,
        )
    made, here = (
        {name: tensor.shape for name, tensor in model.state_dict().items()}
        for model in (again, joined.model)
    )
    if made != here:
        raise ConfigError(
            "the retriever and the ranker were given different features: fit both with the same "
            "Features, from fit_features",
            name="features",
        )

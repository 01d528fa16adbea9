"""What a search may vary: what a recipe names, or a model's usual ranges."""

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from pydantic import BaseModel

from foretaste.config import ChoiceConfig, RangeConfig
from foretaste.errors import ConfigError
from foretaste.experiment.compare_families import CLOSED_FORM
from foretaste.experiment.learning import usual_objective
from foretaste.experiment.recipe import ExperimentConfig
from foretaste.models.catalogue import ModelConfig, TwoStageConfig
from foretaste.training.objectives.pairs import PairsConfig
from foretaste.training.settings import TrainingConfig


def with_own_objective(config: ExperimentConfig) -> ExperimentConfig:
    """Return a recipe that says how its model learns, where the model has a term to search."""
    if config.objective is not None or "l2" not in config.model.usual.objective:
        return config
    return config.model_copy(update={"objective": usual_objective(config.model)})


def usual_space(config: ExperimentConfig) -> dict[str, RangeConfig | ChoiceConfig]:
    """Return what is searched where a recipe names nothing, by the settings' dotted names.

    A model's own ranges stand in its settings class, as `tuning`; of two stages both models' are
    searched. What learns by gradient has a learning rate besides, from a tenth of the model's own
    to three times that, and what learns from pairs the strength of its l2, up to ten times as
    weak or as strong as what it is.
    """
    model, objective = config.model, config.objective
    own = {f"model.{name}": values for name, values in model.tuning.items()}
    if isinstance(objective, PairsConfig) and objective.l2:
        own["objective.l2"] = RangeConfig(low=objective.l2 / 10, high=objective.l2 * 10, log=True)
    if not isinstance(model, TwoStageConfig):
        return own | _rate(model, "training")
    parts = {"model.retriever": model.retriever, "model.ranker": model.ranker}
    for place, part in parts.items():
        own |= {f"{place}.{name}": values for name, values in part.tuning.items()}
    return own | _rate(model.retriever, "first_stage.training") | _rate(model.ranker, "training")


def _rate(model: ModelConfig, section: str) -> dict[str, RangeConfig | ChoiceConfig]:
    if isinstance(model, CLOSED_FORM):
        return {}
    rate = TrainingConfig(**model.usual.training).rate
    range_ = RangeConfig(low=rate / 10, high=rate * 3, log=True)
    return {f"{section}.learning_rate": range_}


def distributions(config: ExperimentConfig) -> dict[str, BaseDistribution]:
    """Return what Optuna draws from, by the setting's dotted name.

    A range whose setting is an integer draws integers.

    Raises:
        ConfigError: A name is not a setting of this recipe, or a range is empty; it says which.
    """
    space = config.tune.space or usual_space(config)
    return {name: _distribution(name, part, config) for name, part in space.items()}


def _distribution(
    name: str, part: RangeConfig | ChoiceConfig, config: ExperimentConfig
) -> BaseDistribution:
    whole = _is_integer(config, name)
    if isinstance(part, ChoiceConfig):
        return CategoricalDistribution(part.choices)
    if part.low >= part.high or (part.log and part.low <= 0):
        raise ConfigError(
            f"tune.space: {name} from {part.low} to {part.high}: low must be below high"
            + (", and above 0 where the draw is logarithmic" if part.log else ""),
            name=name,
            value=part.low,
        )
    if whole:
        return IntDistribution(int(part.low), int(part.high), log=part.log)
    return FloatDistribution(part.low, part.high, log=part.log)


def _is_integer(config: ExperimentConfig, name: str) -> bool:
    owner: object = config
    *sections, last = name.split(".")
    for section in sections:
        owner = getattr(owner, section, None)
    if not isinstance(owner, BaseModel) or last not in type(owner).model_fields:
        raise ConfigError(f"tune.space: {name} is not a setting of this recipe", name=name)
    schema = type(owner).model_json_schema()["properties"][last]
    kinds = {part.get("type") for part in schema.get("anyOf", [schema])}
    return "integer" in kinds and "number" not in kinds

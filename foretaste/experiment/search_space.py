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
from foretaste.experiment.recipe import ExperimentConfig
from foretaste.models.catalogue import ModelConfig, TwoStageConfig

_LEARNING_RATE = RangeConfig(low=1e-4, high=1e-2, log=True)


def usual_space(model: ModelConfig) -> dict[str, RangeConfig | ChoiceConfig]:
    """Return what is searched where a recipe names nothing, by the settings' dotted names.

    A model's own ranges stand in its settings class, as `tuning`; of two stages both models' are
    searched. What learns by gradient has a learning rate besides.
    """
    own = {f"model.{name}": values for name, values in model.tuning.items()}
    if not isinstance(model, TwoStageConfig):
        return own | _rate(model, "training")
    parts = {"model.retriever": model.retriever, "model.ranker": model.ranker}
    for place, part in parts.items():
        own |= {f"{place}.{name}": values for name, values in part.tuning.items()}
    return own | _rate(model.retriever, "first_stage.training") | _rate(model.ranker, "training")


def _rate(model: ModelConfig, section: str) -> dict[str, RangeConfig | ChoiceConfig]:
    return {} if isinstance(model, CLOSED_FORM) else {f"{section}.learning_rate": _LEARNING_RATE}


def distributions(config: ExperimentConfig) -> dict[str, BaseDistribution]:
    """Return what Optuna draws from, by the setting's dotted name.

    A range whose setting is an integer draws integers.

    Raises:
        ConfigError: A name is not a setting of this recipe, or a range is empty; it says which.
    """
    space = config.tune.space or usual_space(config.model)
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

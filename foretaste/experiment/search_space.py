"""What a search may vary: from a recipe, or a model's usual settings."""

from collections.abc import Mapping

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from pydantic import BaseModel

from foretaste.errors import ConfigError
from foretaste.experiment.recipe import ChoiceConfig, ExperimentConfig, RangeConfig

Space = Mapping[str, RangeConfig | ChoiceConfig]

USUAL: Mapping[str, Space] = {
    "sasrec": {
        "model.embedding_dim": ChoiceConfig(choices=(32, 64, 128)),
        "model.num_blocks": ChoiceConfig(choices=(1, 2, 3)),
        "model.dropout": RangeConfig(low=0.0, high=0.5),
        "training.learning_rate": RangeConfig(low=1e-4, high=1e-2, log=True),
    },
    "ease": {"model.l2": RangeConfig(low=1.0, high=5000.0, log=True)},
    "item_knn": {
        "model.neighbours": RangeConfig(low=10, high=500, log=True),
        "model.asymmetry": RangeConfig(low=0.0, high=1.0),
        "model.damping": RangeConfig(low=0.0, high=1.0),
    },
    "als": {
        "model.factors": ChoiceConfig(choices=(16, 32, 64, 128)),
        "model.regularization": RangeConfig(low=1e-3, high=10.0, log=True),
        "model.alpha": RangeConfig(low=1.0, high=100.0, log=True),
    },
    "popularity": {"model.window_days": RangeConfig(low=1.0, high=365.0, log=True)},
}
"""By the model's `kind`: what is searched where a recipe names nothing."""


def distributions(config: ExperimentConfig) -> dict[str, BaseDistribution]:
    """Return what Optuna draws from, by the setting's dotted name.

    A range whose setting is an integer draws integers.

    Raises:
        ConfigError: A name is not a setting of this recipe, or a range is empty; it says which.
    """
    space = config.tune.space or USUAL.get(config.model.kind, {})
    if not space:
        raise ConfigError(f"nothing to search for {config.model.kind}: name ranges in [tune.space]")
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
            + (", and above 0 where the draw is logarithmic" if part.log else "")
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
        raise ConfigError(f"tune.space: {name} is not a setting of this recipe")
    schema = type(owner).model_json_schema()["properties"][last]
    kinds = {part.get("type") for part in schema.get("anyOf", [schema])}
    return "integer" in kinds and "number" not in kinds

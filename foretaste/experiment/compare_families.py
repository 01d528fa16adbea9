"""Families of models by name, and the baselines of every comparison.

A family is a model's `kind`; a new model of the catalogue is a family at once.
"""

from collections.abc import Mapping, Sequence
from typing import get_args

from foretaste.arguments import checked
from foretaste.config import parse_settings
from foretaste.errors import ConfigError, did_you_mean
from foretaste.experiment.recipe import ExperimentConfig
from foretaste.models.als import ImplicitALSConfig
from foretaste.models.catalogue import ModelConfig, tasks_of
from foretaste.models.ease import EASEConfig
from foretaste.models.item_knn import ItemKNNConfig
from foretaste.models.popularity import PopularityConfig

BASELINES = ("popularity", "item_knn", "ease", "als")
"""What every comparison includes."""
CLOSED_FORM = (PopularityConfig, ItemKNNConfig, EASEConfig, ImplicitALSConfig)
"""They learn in one piece, which no budget can interrupt."""
WITHOUT_SEED = (PopularityConfig, ItemKNNConfig, EASEConfig)
"""They draw nothing: every seed gives the same model."""
_SETTINGS = {
    str(settings.model_fields["kind"].default): settings
    for settings in get_args(get_args(ModelConfig)[0])
}
FAMILIES: tuple[str, ...] = tuple(_SETTINGS)
_STAGES = {"two_stage": {"retriever": {"kind": "sasrec"}, "ranker": {"kind": "din"}}}
"""What a family is made of, where it is made of others."""


@checked
def family_recipes(
    config: ExperimentConfig, families: Sequence[str]
) -> dict[str, ExperimentConfig]:
    """Return a recipe for each family, at its own defaults, on the data and split of one.

    Args:
        config: Gives data, split, features, seed, evaluation and the device to train on; and to
            rankers what its own model, if it is one, predicts and how that is learned.
        families: Kinds of models, such as "sasrec".

    Raises:
        ConfigError: There is no such family, the message names the nearest; one is named twice; or
            one learns a single task, and the recipe has several.
    """
    twice = next((family for family in families if list(families).count(family) > 1), None)
    if twice is not None:
        raise ConfigError(
            f"the family {twice} is named twice: give each once", name="families", value=twice
        )
    return {family: _recipe(config, family) for family in families}


def with_baselines(recipes: Mapping[str, ExperimentConfig]) -> dict[str, ExperimentConfig]:
    """Add the baselines that are not among the recipes, at their usual settings.

    A name that a recipe of other settings has taken already is given with "(usual)".
    """
    first, added = next(iter(recipes.values())), dict(recipes)
    for name, config in family_recipes(first, BASELINES).items():
        if all(config.model != recipe.model for recipe in recipes.values()):
            added[name if name not in added else f"{name} (usual)"] = config
    return added


def _recipe(config: ExperimentConfig, family: str) -> ExperimentConfig:
    if family not in FAMILIES:
        raise ConfigError(
            f"there is no family {family!r}; they are {', '.join(FAMILIES)}"
            f"{did_you_mean(family, FAMILIES)}",
            name="families",
            value=family,
        )
    kept = config.model_dump(
        exclude={
            "model",
            "objective",
            "training",
            "first_stage",
            "final",
            "tune",
            "published",
            "notes",
        }
    )
    told = _told_of_tasks(config, family)
    settings = kept | {
        "model": {"kind": family, **_STAGES.get(family, {}), **told},
        "objective": config.objective if told else None,
        "training": {"device": config.training.device},
    }
    return parse_settings(ExperimentConfig, settings, source=f"the family {family}")


def _told_of_tasks(config: ExperimentConfig, family: str) -> dict[str, object]:
    """Return what a ranker's settings take over from those of another."""
    tasks = tasks_of(config.model)
    fields = _SETTINGS[family].model_fields
    if tasks and "tasks" in fields:
        return {"tasks": tasks}
    if len(tasks) > 1 and "task" in fields:
        raise ConfigError(
            f"the recipe has the tasks {', '.join(task.name for task in tasks)}, and {family} "
            "learns one: take shared_bottom or mmoe, or a recipe of one task",
            name="families",
            value=family,
        )
    return {"task": tasks[0]} if tasks and "task" in fields else {}

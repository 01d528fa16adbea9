"""The plan of a comparison, made before any training: the models, and how they are measured.

A family is a model's `kind`; every model of the catalogue is a family.

Shape legend: E events of a part, T tasks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar, get_args

import numpy as np
from jaxtyping import Float32

from foretaste.arguments import checked
from foretaste.config import Config, parse_settings
from foretaste.data.rows import rows_of
from foretaste.data.splits import Split, happened_split
from foretaste.data.tasks import Task
from foretaste.errors import ConfigError, did_you_mean
from foretaste.evaluation.rows import has_zeros
from foretaste.experiment.recipe import ExperimentConfig
from foretaste.experiment.run import check_measurable
from foretaste.models.baselines import EASEConfig, ItemKNNConfig, PopularityConfig
from foretaste.models.catalogue import CLOSED_FORM, ModelConfig, tasks_of
from foretaste.shown import toml_value
from foretaste.training.objectives import RowsConfig

V = TypeVar("V")

BASELINES = ("popularity", "item_knn", "ease", "als")
"""The baselines of every comparison."""
WITHOUT_SEED = (PopularityConfig, ItemKNNConfig, EASEConfig)
"""Models without random draws: every seed gives the same model."""
_SETTINGS = {
    str(settings.model_fields["kind"].default): settings
    for settings in get_args(get_args(ModelConfig)[0])
}
FAMILIES: tuple[str, ...] = tuple(_SETTINGS)
_STAGES = {"two_stage": {"retriever": {"kind": "sasrec"}, "ranker": {"kind": "din"}}}
"""The parts of a family that combines other families."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Entry:
    """A model to train, once with each seed."""

    name: str
    config: ExperimentConfig
    seeds: tuple[int, ...]
    split: Split
    """The split for training and measuring; only positive events for a model that predicts no
    labels."""

    @property
    def in_one_piece(self) -> bool:
        return isinstance(self.config.model, CLOSED_FORM)


class Plan(NamedTuple):
    """The models to train, in this order, and the tasks that they are measured by."""

    entries: list[Entry]
    tasks: tuple[Task, ...]
    """Empty for a comparison by lists."""
    notes: tuple[str, ...]


def plan_of(
    recipes: Mapping[str, ExperimentConfig], split: Split, seeds: Sequence[int] | None
) -> Plan:
    """Check that all models can be measured on one holdout, before any is trained.

    Args:
        recipes: Recipes by name; the first one decides the evaluation of all.
        split: The data of all recipes.
        seeds: The argument of `compare_models`.

    Raises:
        ConfigError: The models cannot be compared.
        DataError: The test part is empty.
    """
    _check_equal(recipes)
    seeds = _seeds(recipes, seeds)
    tasks = common_tasks(recipes, split)
    evaluation = next(iter(recipes.values())).evaluation
    positive, notes = "", tuple[str, ...]()
    if tasks:
        evaluation = evaluation.model_copy(update={"catalogue": False, "rows": True})
    else:
        positive, notes = common_positive(recipes, split)
    happened = happened_split(split, positive)
    entries = []
    for name, config in (recipes if tasks else with_baselines(recipes)).items():
        settled = config.model_copy(update={"final": "none", "seeds": (), "evaluation": evaluation})
        own = seeds or (config.seed,)
        once = name not in recipes or isinstance(config.model, WITHOUT_SEED)
        entries.append(
            Entry(
                name=name,
                config=settled,
                seeds=own[:1] if once else own,
                split=split if tasks_of(config.model) else happened,
            )
        )
    entries.sort(key=lambda entry: not entry.in_one_piece)
    if tasks and len(split.train):
        tasks = judged_tasks({entry.name: entry.config for entry in entries}, split, tasks)
    elif not tasks:
        _check_lists(entries)
    return Plan(entries, tasks, notes)


def _seeds(recipes: Mapping[str, ExperimentConfig], seeds: Sequence[int] | None) -> tuple[int, ...]:
    if seeds is None:
        own = {name: config.seeds for name, config in recipes.items()}
        return _only(own, "seeds", "set them equal, or give seeds for all")
    if not seeds or len(set(seeds)) < len(seeds):
        raise ConfigError(
            f"seeds are {list(seeds)}: give at least one, and each once",
            name="seeds",
            value=list(seeds),
        )
    return tuple(seeds)


def common_positive(
    recipes: Mapping[str, ExperimentConfig], split: Split
) -> tuple[str, tuple[str, ...]]:
    """Return the column whose values above 0 mark the targets of lists, and a note.

    Models that predict no labels, including the baselines, are trained only on these events; all
    models are measured on them.

    Raises:
        ConfigError: Recipes name different columns, or the column does not exist.
    """
    said = {
        name: config.objective.positive if isinstance(config.objective, RowsConfig) else ""
        for name, config in recipes.items()
        if tasks_of(config.model) or isinstance(config.objective, RowsConfig)
    }
    why = "lists are measured on the same positive events, so set them equal"
    positive = _only(said, "objective.positive", why) if said else ""
    if not positive:
        return "", ()
    num = len(happened_split(split, positive).events)
    return positive, (
        f"positive: lists are measured on the {num:,} of {len(split.events):,} events with "
        f"{positive} above 0; only these train models that predict no labels",
    )


def _check_lists(entries: Sequence[Entry]) -> None:
    """Check that lists have targets, for models that predict labels and for others.

    Raises:
        DataError: There are no targets.
    """
    kinds = {bool(tasks_of(entry.config.model)): entry for entry in entries}
    for entry in kinds.values():
        asked = entry.config.evaluation.model_copy(update={"catalogue": True, "rows": False})
        check_measurable(entry.config.model_copy(update={"evaluation": asked}), entry.split)


def _check_equal(recipes: Mapping[str, ExperimentConfig]) -> None:
    if not recipes:
        raise ConfigError(
            "there is no recipe to compare: give at least one", name="recipes", value=()
        )
    for part in ("data", "split"):
        own = {name: getattr(config, part) for name, config in recipes.items()}
        _only(own, part, "models are compared on the same data and split")


def _only(values: Mapping[str, V], name: str, advice: str) -> V:
    """Return the common value of a setting; raise an error if recipes differ."""
    first, *others = values
    for other in others:
        if values[other] != values[first]:
            one, another = values[first], values[other]
            both = f"another [{name}] than {first}"
            if not isinstance(one, Config):
                both = f"{name} = {toml_value(name, another)} and {first} {toml_value(name, one)}"
            raise ConfigError(f"{other} has {both}: {advice}", name=name, value=another)
    return values[first]


def common_tasks(recipes: Mapping[str, ExperimentConfig], split: Split) -> tuple[Task, ...]:
    """Return the tasks of the comparison; none for a comparison by lists.

    Args:
        recipes: Recipes by name; tasks are in the first one's order.
        split: Their data: with one item only, there are no lists.

    Raises:
        ConfigError: Only some recipes measure lists, a model predicts no labels, or no task is
            common to all.
    """
    asks = {name: config.evaluation.catalogue for name, config in recipes.items()}
    by_lists = _only(
        asks,
        "evaluation.catalogue",
        "models are compared by their lists (true) or by labelled rows (false), so set it to one "
        "value for all",
    )
    if by_lists and split.events.num_items > 1:
        return ()
    without = [name for name, config in recipes.items() if not tasks_of(config.model)]
    if without:
        why = "the data have no items" if by_lists else "evaluation.catalogue is false"
        raise ConfigError(
            f"{why}, so models are compared by labelled rows, and {without[0]} "
            f"({recipes[without[0]].model.kind}) predicts no labels: leave it out",
            name="model.kind",
            value=recipes[without[0]].model.kind,
        )
    first, *others = recipes.values()
    common = tuple(
        task for task in tasks_of(first.model) if all(_has(other, task) for other in others)
    )
    if not common:
        given = "; ".join(
            f"{name} has {', '.join(task.name for task in tasks_of(config.model))}"
            for name, config in recipes.items()
        )
        raise ConfigError(
            f"no task is common to all recipes ({given}): a common one has the same name, kind, "
            "column, limit and levels",
            name="model.tasks",
            value=given,
        )
    return common


def _has(config: ExperimentConfig, task: Task) -> bool:
    labels = {"name", "kind", "column", "above", "levels"}
    asked = task.model_dump(include=labels)
    return any(own.model_dump(include=labels) == asked for own in tasks_of(config.model))


def judged_tasks(
    recipes: Mapping[str, ExperimentConfig], split: Split, tasks: tuple[Task, ...]
) -> tuple[Task, ...]:
    """Return the tasks whose test labels have more than one class or value.

    Raises:
        ConfigError: There is no such task, or the numbers of drawn items differ between models.
        DataError: A label does not fit its task.
    """
    num_drawn = _only(
        {name: _num_drawn(config, split) for name, config in recipes.items()},
        "objective.negatives",
        "so many items are drawn for each row: set objective.negatives to one number for all, or "
        "evaluation.sampled_negatives",
    )
    label_ET = rows_of(split, "test", tasks=tasks).label_ET
    found = tuple(
        task
        for task, label_E in zip(tasks, label_ET.T, strict=True)
        if _differs(task, label_E, num_drawn)
    )
    if not found:
        raise ConfigError(
            "the test rows do not hold labels of both classes for any common task: hold out more "
            "of them, or take another split",
            name="split",
            value=split.kind,
        )
    return found


def _num_drawn(config: ExperimentConfig, split: Split) -> int:
    """Return the number of items that `evaluate_split` will draw for each test row."""
    tasks, asked, learned = tasks_of(config.model), config.evaluation, config.objective
    num = (learned if isinstance(learned, RowsConfig) else RowsConfig()).num_negatives(tasks)
    if num and asked.sampled_negatives and asked.sampled_by != "listed":
        return asked.sampled_negatives
    return 0 if num and has_zeros(rows_of(split, "test", tasks=tasks)) else num


def _differs(task: Task, label_E: Float32[np.ndarray, " E"], num_drawn: int) -> bool:
    values = set(label_E[~np.isnan(label_E)].tolist())
    if values and num_drawn:
        values.add(0.0)  # the drawn zeros
    return len(values) > (1 if task.kind == "binary" else 0)


@checked
def family_recipes(
    config: ExperimentConfig, families: Sequence[str]
) -> dict[str, ExperimentConfig]:
    """Return a recipe for each family, at its own defaults, with the data and split of one recipe.

    Args:
        config: The recipe of data, split, features, seed, evaluation and device; if its model is a
            ranker, also the tasks and the objective of rankers.
        families: Kinds of models, such as "sasrec".

    Raises:
        ConfigError: A family does not exist, or is repeated; or it predicts a single task, and the
            recipe has several.
    """
    twice = next((family for family in families if list(families).count(family) > 1), None)
    if twice is not None:
        raise ConfigError(
            f"the family {twice} is named twice: give each once", name="families", value=twice
        )
    return {family: _recipe(config, family) for family in families}


def with_baselines(recipes: Mapping[str, ExperimentConfig]) -> dict[str, ExperimentConfig]:
    """Add the baselines that are not among the recipes, at their default settings.

    If a recipe with other settings has a baseline's name, the baseline's name gets "(usual)".
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
    given = _task_settings(config, family)
    settings = kept | {
        "model": {"kind": family, **_STAGES.get(family, {}), **given},
        "objective": config.objective if given else None,
        "training": {"device": config.training.device},
    }
    return parse_settings(ExperimentConfig, settings, source=f"the family {family}")


def _task_settings(config: ExperimentConfig, family: str) -> dict[str, object]:
    """Return the settings that a ranker copies from another one."""
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

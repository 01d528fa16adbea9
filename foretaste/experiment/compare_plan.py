"""What a comparison trains and how it judges, settled before anything is trained."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from foretaste.data.rows import happened_split
from foretaste.data.splits import Split
from foretaste.data.tasks import Task
from foretaste.errors import ConfigError
from foretaste.experiment.compare_by_rows import common_tasks, judged_tasks
from foretaste.experiment.compare_families import CLOSED_FORM, WITHOUT_SEED, with_baselines
from foretaste.experiment.recipe import ExperimentConfig
from foretaste.experiment.run import check_measurable
from foretaste.models.catalogue import tasks_of
from foretaste.training.objectives.rows import RowsConfig


@dataclass(frozen=True, eq=False, kw_only=True)
class Entry:
    """A model to be trained, once with each seed."""

    name: str
    config: ExperimentConfig
    seeds: tuple[int, ...]
    split: Split
    """What it learns from and is measured on: of the positive events alone where it predicts no
    labels."""

    @property
    def in_one_piece(self) -> bool:
        return isinstance(self.config.model, CLOSED_FORM)


class Plan(NamedTuple):
    """What is trained, in this order, and what it is judged by."""

    entries: list[Entry]
    tasks: tuple[Task, ...]
    """None: by lists."""
    notes: tuple[str, ...]


def plan_of(
    recipes: Mapping[str, ExperimentConfig], split: Split, seeds: Sequence[int] | None
) -> Plan:
    """See that all models can be measured on one holdout, before any is trained.

    Args:
        recipes: By name; the first one says how all are evaluated.
        split: Their data.
        seeds: What `compare_models` was given.

    Raises:
        ConfigError: They cannot be.
        DataError: There is nothing to measure.
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
        first, *others = recipes
        for name in others:
            if recipes[name].seeds != recipes[first].seeds:
                raise ConfigError(
                    f"{name} has seeds = {list(recipes[name].seeds)} and {first} "
                    f"{list(recipes[first].seeds)}: set them equal, or give seeds for all",
                    name="seeds",
                    value=recipes[name].seeds,
                )
        return recipes[first].seeds
    if not seeds or len(set(seeds)) < len(seeds):
        raise ConfigError(
            f"seeds are {list(seeds)}: give one at least, and each once",
            name="seeds",
            value=list(seeds),
        )
    return tuple(seeds)


def common_positive(
    recipes: Mapping[str, ExperimentConfig], split: Split
) -> tuple[str, tuple[str, ...]]:
    """Return the column whose values above 0 make an event one that lists must find, and a note.

    Models that predict no labels, the baselines too, learn from these events alone and are measured
    on them, as the others are.

    Raises:
        ConfigError: Recipes say different columns, or there is no such column.
    """
    said = {
        name: config.objective.positive if isinstance(config.objective, RowsConfig) else ""
        for name, config in recipes.items()
        if tasks_of(config.model) or isinstance(config.objective, RowsConfig)
    }
    names = list(said)
    for name in names[1:]:
        if said[name] != said[names[0]]:
            raise ConfigError(
                f"{name} has objective.positive = {said[name]!r} and {names[0]} "
                f"{said[names[0]]!r}: lists are measured on the same positive events, so set them "
                "equal",
                name="objective.positive",
                value=said[name],
            )
    positive = said[names[0]] if names else ""
    if not positive:
        return "", ()
    num = len(happened_split(split, positive).events)
    return positive, (
        f"positive: lists are measured on the {num:,} of {len(split.events):,} events with "
        f"{positive} above 0; models that predict no labels learn from these alone",
    )


def _check_lists(entries: Sequence[Entry]) -> None:
    """See that there is a list to find, for models that predict labels and for those that do not.

    Raises:
        DataError: There is none.
    """
    kinds = {bool(tasks_of(entry.config.model)): entry for entry in entries}
    for entry in kinds.values():
        asked = entry.config.evaluation.model_copy(update={"catalogue": True, "rows": False})
        check_measurable(entry.config.model_copy(update={"evaluation": asked}), entry.split)


def _check_equal(recipes: Mapping[str, ExperimentConfig]) -> None:
    if not recipes:
        raise ConfigError(
            "there is no recipe to compare: give one at least", name="recipes", value=()
        )
    (first, *others) = recipes
    for name in others:
        for part in ("data", "split"):
            if getattr(recipes[name], part) != getattr(recipes[first], part):
                raise ConfigError(
                    f"{name} has another [{part}] than {first}: models are compared on the same "
                    "data and split",
                    name=part,
                    value=getattr(recipes[name], part),
                )

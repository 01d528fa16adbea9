"""The search space of each model, and the short search before a training.

It is successive halving: Jamieson and Talwalkar, "Non-stochastic Best Arm Identification and
Hyperparameter Optimization", AISTATS 2016, https://arxiv.org/abs/1502.07943. **Departures**: each
round trains again from the first step; the model's own settings are always kept.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from pydantic import BaseModel

from foretaste.config import ChoiceConfig, Config, RangeConfig, parse_settings, shown
from foretaste.data.splits import Split
from foretaste.errors import ConfigError, NonFiniteError, TooLargeError
from foretaste.experiment.learning import usual_objective
from foretaste.experiment.recipe import ExperimentConfig, with_setting
from foretaste.later import later
from foretaste.models.catalogue import CLOSED_FORM, ModelConfig, TwoStageConfig
from foretaste.training.checkpoint import Epoch
from foretaste.training.fit import OUT_OF_TIME
from foretaste.training.objectives import ObjectiveConfig, PairsConfig
from foretaste.training.settings import TrainingConfig
from foretaste.training.trained import Trained

if TYPE_CHECKING:
    from optuna import distributions as drawn_from
else:
    drawn_from = later("optuna.distributions")

C = TypeVar("C", bound=Config)
_SAMPLE = 50_000
"""Maximum number of training events of a short search, from a sample of users."""
_DRAWN = 8
_ROUNDS = ((5, 3), (15, 1))
"""Epochs of each round, and the number of settings in the next round."""


def with_own_objective(config: ExperimentConfig) -> ExperimentConfig:
    """Return a recipe with an explicit objective, if the objective has a term to search."""
    if config.objective is not None or "l2" not in config.model.usual.objective:
        return config
    return config.model_copy(update={"objective": usual_objective(config.model)})


def usual_space(config: "ExperimentConfig | Learner") -> dict[str, RangeConfig | ChoiceConfig]:
    """Return the default search space of a recipe, by dotted names of settings.

    A model's own ranges are in its settings class, as `tuning`; with two stages, both models'
    ranges are searched. Models trained by gradient descent also have a learning rate, from a tenth
    of the model's own to three times that, and models trained on pairs an l2, from a tenth of its
    value to ten times that.
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


def distributions(config: ExperimentConfig) -> "dict[str, drawn_from.BaseDistribution]":
    """Return Optuna's distributions, by the setting's dotted name.

    A range whose setting is an integer draws integers.

    Raises:
        ConfigError: A name is not a setting of this recipe, or a range is empty.
    """
    space = config.tune.space or usual_space(config)
    return {name: _distribution(name, part, config) for name, part in space.items()}


def _distribution(
    name: str, part: RangeConfig | ChoiceConfig, config: ExperimentConfig
) -> "drawn_from.BaseDistribution":
    whole = _is_integer(config, name)
    if isinstance(part, ChoiceConfig):
        return drawn_from.CategoricalDistribution(part.choices)
    if part.low >= part.high or (part.log and part.low <= 0):
        raise ConfigError(
            f"tune.space: {name} from {part.low} to {part.high}: low must be below high"
            + (", and above 0 if the draw is log-uniform" if part.log else ""),
            name=name,
            value=part.low,
        )
    if whole:
        return drawn_from.IntDistribution(int(part.low), int(part.high), log=part.log)
    return drawn_from.FloatDistribution(part.low, part.high, log=part.log)


def _is_integer(config: Config, name: str) -> bool:
    owner: object = config
    *sections, last = name.split(".")
    for section in sections:
        owner = getattr(owner, section, None)
    if not isinstance(owner, BaseModel) or last not in type(owner).model_fields:
        raise ConfigError(f"tune.space: {name} is not a setting of this recipe", name=name)
    schema = type(owner).model_json_schema()["properties"][last]
    kinds = {part.get("type") for part in schema.get("anyOf", [schema])}
    return "integer" in kinds and "number" not in kinds


def with_drawn(config: C, drawn: Mapping[str, object]) -> C:
    """Return settings with some of them replaced, by dotted name.

    Raises:
        ConfigError: A name is not a setting, or a value is out of its range.
    """
    settings: dict[str, object] = config.model_dump()
    for name, value in drawn.items():
        settings = with_setting(settings, name, value)
    return parse_settings(type(config), settings, source="tune")


class Learner(Config):
    """A model with its objective and training settings."""

    model: ModelConfig
    """The model and its settings."""
    objective: ObjectiveConfig
    """The objective of the model."""
    training: TrainingConfig
    """Settings of the training loop."""


@dataclass(kw_only=True)
class ShortSearch:
    """A search of learning rate, l2 and one more setting, for a few epochs on a sample."""

    own: Learner
    """The settings that are kept if no others are better."""
    fit_one: Callable[..., Trained]
    """`fit` with the arguments that all trainings share."""
    split: Split
    seed: int
    """Decides the sample of users and the settings that are tried."""
    max_seconds: float | None
    """Time limit for all trainings; if it is too short, the model's own settings are kept."""
    say: Callable[[str], object]
    """Called with the cost before the search starts, and with its result."""
    rows: list[dict[str, object]] = field(default_factory=list)
    """Epochs, drawn settings and validation figure of each training."""

    def run(self) -> tuple[Learner, dict[str, object]]:
        """Return the best settings, and a log of the search."""
        sample, drawn = _sample(self.split, self.seed), _drawn(self.own, self.seed)
        if len(sample.validation) == 0:
            return self._ended({}, "there is no validation part to search by")
        self.say(self._cost(sample, drawn))
        end = math.inf if self.max_seconds is None else time.perf_counter() + self.max_seconds
        ways: list[Mapping[str, object]] = [{}, *drawn]
        left = self._epochs(drawn)
        for epochs, num_on in _ROUNDS:
            values = list[float]()
            for way in ways:
                begun = time.perf_counter()
                values.append(self._value(way, sample, epochs=epochs, end=end))
                now, left = time.perf_counter(), left - epochs
                if now + left * (now - begun) / epochs > end:
                    return self._ended({}, OUT_OF_TIME)
            on = sorted(range(len(ways)), key=lambda place: -values[place])[:num_on]
            ways = [ways[place] for place in (sorted({0, *on}) if num_on > 1 else on)]
        return self._ended(ways[0], "done")

    def _value(self, way: Mapping[str, object], sample: Split, *, epochs: int, end: float) -> float:
        """Return the best validation figure of a training; minus infinity if it failed."""
        values = [-math.inf]

        def see(epoch: Epoch) -> None:
            values.extend([] if epoch.validation is None else [epoch.validation])

        try:
            learner = with_drawn(self.own, way)
            self.fit_one(
                learner.model,
                split=sample,
                objective=learner.objective,
                training=learner.training.model_copy(update={"epochs": epochs, "patience": None}),
                on_epoch=see,
                max_seconds=None if math.isinf(end) else max(0.0, end - time.perf_counter()),
            )
        except (ConfigError, NonFiniteError, TooLargeError):
            values = [-math.inf]
        best = max(values)
        value = None if math.isinf(best) else best
        self.rows.append({"epochs": epochs, "settings": dict(way), "validation": value})
        return best

    def _cost(self, sample: Split, drawn: list[dict[str, object]]) -> str:
        (first, num_on), (last, _) = _ROUNDS
        num, all_events = len(sample.train), len(self.split.train)
        work = num / all_events * self._epochs(drawn)
        return (
            f"searching {', '.join(drawn[0])}: {1 + len(drawn)} trainings of {first} epochs and "
            f"{num_on + 1} of {last}, on {num:,} of {all_events:,} events; it costs as much as "
            f"{max(1, round(work))} epochs of the training that follows"
        )

    def _epochs(self, drawn: list[dict[str, object]]) -> int:
        """Return the maximum number of epochs of all trainings together."""
        (first, num_on), (last, _) = _ROUNDS
        return (1 + len(drawn)) * first + (num_on + 1) * last

    def _ended(self, way: Mapping[str, object], why: str) -> tuple[Learner, dict[str, object]]:
        learner = with_drawn(self.own, way)
        chosen = ", ".join(f"{name} {shown(value)}" for name, value in way.items())
        self.say(f"search {why}: {chosen or 'the settings stay as they are'}")
        found = learner.model_dump(mode="json")
        return learner, {"trials": self.rows, "found": found, "ended": why}


def _sample(split: Split, seed: int) -> Split:
    """Return the events of randomly drawn users with 50,000 training events in total."""
    if len(split.train) <= _SAMPLE:
        return split
    drawn_U = np.random.default_rng(seed).permutation(split.events.num_users)
    before_U = np.cumsum(np.diff(split.train.offsets)[drawn_U])
    num = 1 + int(np.searchsorted(before_U, _SAMPLE))
    keep_E = np.isin(split.events.user_idx, drawn_U[:num])
    return replace(split, events=split.events.select(keep_E), part_E=split.part_E[keep_E])


def _drawn(own: Learner, seed: int) -> list[dict[str, object]]:
    """Return drawn settings; each setting is spread over its range, in its own random order.

    The learning rate is near the model's own, because a few epochs cannot test a much lower one.
    """
    rng, space = np.random.default_rng(seed), usual_space(own)
    rate = TrainingConfig(**own.model.usual.training).rate
    space["training.learning_rate"] = RangeConfig(low=rate / 4, high=rate * 4, log=True)
    names = [name for name in space if name.endswith(("learning_rate", ".l2"))]
    more = [name for name in space if name not in names and not name.endswith("embedding_dim")]
    more.sort(key=lambda name: name != "model.dropout")
    columns = {
        name: [
            _at(space[name], (place + 0.5) / _DRAWN, whole=_is_integer(own, name))
            for place in rng.permutation(_DRAWN)
        ]
        for name in (*names, *more[:1])
    }
    return [dict(zip(columns, way, strict=True)) for way in zip(*columns.values(), strict=True)]


def _at(part: RangeConfig | ChoiceConfig, share: float, *, whole: bool) -> object:
    """Return the value at a fraction of a range or a list."""
    if isinstance(part, ChoiceConfig):
        return part.choices[int(share * len(part.choices))]
    if part.log:
        value = part.low * (part.high / part.low) ** share
    else:
        value = part.low + (part.high - part.low) * share
    return round(value) if whole else float(f"{value:.3g}")

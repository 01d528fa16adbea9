"""A recipe: one TOML file with everything that determines a run."""

import logging
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from foretaste.arguments import checked
from foretaste.config import (
    ChoiceConfig,
    Config,
    Count,
    CountOrZero,
    RangeConfig,
    Rounds,
    Seed,
    parse_settings,
    path_of,
)
from foretaste.data.features_schema import FeatureSchema, schema_from_toml
from foretaste.data.read_config import ReadConfig, ReadTables, WhichEvents
from foretaste.data.splits import SplitConfig
from foretaste.errors import ConfigError
from foretaste.evaluation.measure_queries import Among, Whose
from foretaste.experiment.two_stage import FirstStage
from foretaste.models.catalogue import ModelConfig, TwoStageConfig
from foretaste.models.layers.table_kinds import IdConfig
from foretaste.training.objectives import ObjectiveConfig
from foretaste.training.settings import TrainingConfig
from foretaste.training.trained import Trained


class PublicData(WhichEvents):
    """A public data set, by its name in the registry."""

    kind: Literal["public"] = "public"
    name: str
    """A name that `foretaste data get` knows, such as `ml-100k`."""


class FileData(ReadConfig):
    """Files of tables."""

    kind: Literal["files"] = "files"
    files: tuple[str, ...] = Field(min_length=1)
    """Text, Parquet or Arrow files. A relative path starts at `--data-dir`, or at the current
    folder."""
    users: str | None = None
    """File of a table of users."""
    items: str | None = None
    """File of a table of items, such as one with a `title`, which the page shows."""
    user_links: str | None = None
    """File of a table of two columns of user ids, such as users and those they trust."""
    item_links: str | None = None
    """File of a table of two columns of item ids that go together."""

    def tables(self, base: Path) -> tuple[list[Path], dict[str, Any]]:
        """Return the event files, and the other arguments of `read_interactions` by name."""
        settings = self.model_dump(exclude={"kind", "files"})
        for name in ReadTables.model_fields.keys() - ReadConfig.model_fields.keys():
            settings[name] = None if settings[name] is None else base / settings[name]
        return [base / file for file in self.files], settings


class StoreData(WhichEvents):
    """An event store that `foretaste data import` wrote."""

    kind: Literal["store"] = "store"
    path: str
    """Folder of the store. A relative path starts at `--data-dir`, or at the current folder."""


DataConfig = Annotated[PublicData | FileData | StoreData, Field(discriminator="kind")]


class EvaluationConfig(Config):
    """How the test events are reported."""

    k: tuple[Count, ...] = Field(default=(10, 20), min_length=1)
    """Lengths of the lists that are measured; the first one is the main figure."""
    exclude_seen: bool = True
    """Whether items that the user already had are left out of the ranking."""
    among: Among = "all"
    """What is ranked: "all" items, or "cold": only items without a training event. The names of
    metrics show it."""
    users: Whose = "known"
    """Whose lists are measured: "known", users with a history; "new", only users without one. The
    names of metrics show it."""
    sampled_negatives: CountOrZero = 0
    """Above 0, targets are ranked among this many sampled items only. The names of metrics show
    it."""
    sampled_by: Literal["listed", "uniform", "popularity"] = "uniform"
    """How items are sampled: "listed" in the data, "uniform", or by "popularity"."""
    catalogue: bool = True
    """Whether lists over the catalogue are measured. They never are for a ranker of one item, or if
    no user has two events."""
    rows: bool = True
    """For a ranker: whether its predictions of labelled rows are measured."""
    calibration: Literal["platt", "isotonic"] | None = None
    """For a ranker: how its probabilities are calibrated on the validation rows, if at all. The
    model keeps the calibration and applies it in answers; the report shows the test's figures with
    and without it."""

    @model_validator(mode="after")
    def _measures_something(self) -> "EvaluationConfig":
        if not (self.catalogue or self.rows):
            raise ValueError("neither catalogue nor rows is measured: set one to true")
        if len(set(self.k)) < len(self.k):
            raise ValueError(f"k is {list(self.k)}: give list lengths, each once")
        if self.sampled_negatives and self.among != "all":
            raise ValueError(
                f'sampled_negatives rank among sampled items, among = "{self.among}" among others: '
                "leave one out"
            )
        return self


class TuneConfig(Config):
    """What `foretaste tune` searches."""

    trials: Rounds = 20
    """Number of trials, including those of a resumed search."""
    max_seconds: float | None = Field(default=None, gt=0)
    """No trial begins after this time, and the training of the last one ends there. None: no
    limit."""
    space: dict[str, RangeConfig | ChoiceConfig] = Field(default_factory=dict)
    """From a setting's dotted name to a range or a list. Empty: the model's usual ranges."""


Final = Literal["none", "validation", "all"]
TrainedOn = Literal["train", "train and validation"]
Negatives = Literal["drawn again", "fixed", "all items", "none"]
Selection = Literal["validation", "fixed epochs", "test"]


class Protocol(Config):
    """Facts that decide whether two figures may be compared."""

    trained_on: TrainedOn = "train"
    """The events that the model learned from: "train", or "train and validation"."""
    negatives: Negatives = "drawn again"
    """Where the negatives of training come from: "drawn again" in each epoch, "fixed" in the data,
    "all items", or "none"."""
    selection: Selection = "validation"
    """What chose the epoch. Many papers report the best epoch on the test."""

    def may_be_compared(self, other: "Protocol") -> bool:
        """Return whether figures are comparable: the same training events and kind of negatives.

        Drawn negatives and the whole catalogue are two losses over the same data; rows with fixed
        negatives are other data. How the epoch was chosen is shown next to the figures.
        """
        is_fixed, other_is = (one.negatives == "fixed" for one in (self, other))
        return self.trained_on == other.trained_on and is_fixed == other_is


class ExperimentConfig(Config):
    """Everything that determines a run; the bundle stores it with the figures."""

    seed: Seed = 0
    """Decides initial weights, order, dropout and draws: one seed gives one result."""
    seeds: tuple[Seed, ...] = ()
    """For `compare`: the model is trained once with each of these, and its figures are means over
    them. `fit` and `tune` use `seed`."""
    data: DataConfig
    """Where the events come from."""
    split: SplitConfig
    """How the events are divided into training, validation and test."""
    features: FeatureSchema | None = None
    """Which columns of users, items and the context the model reads: sections, or the path of a
    file of them, such as `foretaste data schema` writes. A relative path starts at `--data-dir`, at
    the recipe's folder, or at the current folder."""
    model: ModelConfig
    """Which model is trained, and its settings."""
    objective: ObjectiveConfig | None = None
    """How the model learns; by default, the model's own objective."""
    training: TrainingConfig = Field(default_factory=TrainingConfig)
    """Settings of the training loop."""
    first_stage: FirstStage = Field(default_factory=FirstStage)
    """For a model in two stages: how its retriever learns. `objective` and `training` are then the
    ranker's."""
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    """What is measured on the test part."""
    final: Final = "none"
    """What the model in the bundle learned from: "none": training events, the first run's model.
    "validation": one more run adds the validation events, and is reported too. "all": one more run
    on all events, including the test's, so that nothing can be measured of it; the report is the
    first run's. The second run trains for as many epochs as the first run chose."""
    tune: TuneConfig = Field(default_factory=TuneConfig)
    """What `foretaste tune` searches."""
    published: dict[str, float] = Field(default_factory=dict)
    """Published figures that the recipe is compared with, by metric, such as `ndcg_at_10`."""
    published_as: Protocol = Field(default_factory=Protocol)
    """How the published figures were made."""
    notes: str = ""
    """Remarks for readers of the result."""

    @field_validator("seeds")
    @classmethod
    def _each_seed_once(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(seeds)) < len(seeds):
            raise ValueError(f"seeds are {list(seeds)}: give each once")
        return seeds

    @model_validator(mode="before")
    @classmethod
    def _refit_is_final(cls, settings: object) -> object:
        """Accept `refit`, the former name, which older bundles and recipes have."""
        if not isinstance(settings, Mapping) or not isinstance(settings.get("refit"), bool):
            return settings
        if "final" in settings:
            raise ValueError("refit is the former name of final: leave refit out")
        rest = {name: value for name, value in settings.items() if name != "refit"}
        return rest | {"final": "validation" if settings["refit"] else "none"}


@checked
def read_experiment(
    path: Path | str, *, overrides: Sequence[str] = (), data_dir: Path | str | None = None
) -> ExperimentConfig:
    """Read the settings of one run from a TOML file.

    TOML has no word for an absent value, so the text "none" stands for it, unless "none" is one of
    a setting's own choices, as in `model.pooling`.

    Args:
        path: The recipe.
        overrides: Each is `section.name=value`, with the value in TOML syntax; a bare word is text.
        data_dir: The first folder in which to look for a file of `features`.

    Raises:
        ConfigError: A setting is missing, unknown or out of range; the message names it.
    """
    path = Path(path)
    try:
        settings = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(
            f"{path}: {error.strerror}: give the path of a recipe", name=str(path), value=str(path)
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path} is not text in UTF-8: give the path of a recipe, or save it in UTF-8",
            name=str(path),
            value=str(path),
        ) from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not TOML: {error}", name=str(path), value=str(path)) from error
    folders = [*([] if data_dir is None else [Path(data_dir)]), path.parent, Path()]
    changed = with_overrides(_with_features(settings, folders), overrides)
    absent = _with_absent(_with_features(changed, folders))
    config = parse_settings(ExperimentConfig, absent, source=str(path))
    _refuse_at_rest(config.model, path)
    if "refit" in changed:
        logging.getLogger(__name__).warning(
            'refit was renamed: write final = "%s" in %s instead', config.final, path
        )
    return config


def _refuse_at_rest(model: ModelConfig, path: Path) -> None:
    """Raise an error for tables of a kind that can only be made from trained ones.

    Raises:
        ConfigError: The model's settings, or those of one of two stages, name such a kind.
    """
    parts = {"model": model}
    if isinstance(model, TwoStageConfig):
        parts = {"model.retriever": model.retriever, "model.ranker": model.ranker}
    for name, part in parts.items():
        table = part.table if isinstance(part, IdConfig) else None
        if table is not None and not table.trains:
            raise ConfigError(
                f"{path}: {name}.table.kind is {table.kind!r}, a kind that is made of a trained "
                f"table: take another, such as dense, and run `foretaste compress --kind "
                f"{table.kind}` on the bundle",
                name=f"{name}.table.kind",
                value=table.kind,
            )


@checked
def override(config: ExperimentConfig, overrides: Sequence[str]) -> ExperimentConfig:
    """Return a recipe with some settings replaced, each given as `section.name=value`.

    Raises:
        ConfigError: A setting is unknown or out of range; the message names it.
    """
    if not overrides:
        return config
    changed = with_overrides(config.model_dump(), overrides)
    settings = _with_absent(_with_features(changed, [Path()]))
    return parse_settings(ExperimentConfig, settings, source="the recipe")


@checked
def with_overrides(settings: Mapping[str, object], overrides: Sequence[str]) -> dict[str, object]:
    """Return the settings with some of them replaced.

    Raises:
        ConfigError: An override is not of the form `section.name=value`.
    """
    changed = dict(settings)
    for override in overrides:
        name, equals, text = override.partition("=")
        if not equals or not all(name.strip().split(".")):
            raise ConfigError(
                f"override {override!r}: write it as section.name=value",
                name=override,
                value=override,
            )
        changed = with_setting(changed, name.strip(), _value(text.strip()))
    return changed


def with_setting(settings: Mapping[str, object], name: str, value: object) -> dict[str, object]:
    """Return the settings with the one with this dotted name replaced."""
    first, _, rest = name.partition(".")
    inner = settings.get(first)
    section = inner if isinstance(inner, Mapping) else {}
    return dict(settings) | {first: with_setting(section, rest, value) if rest else value}


def _with_features(settings: Mapping[str, object], folders: Sequence[Path]) -> dict[str, object]:
    """Replace the path of a schema file in a recipe by the schema."""
    name = settings.get("features")
    if not isinstance(name, str) or name == "none":
        return dict(settings)
    files = [folder / name for folder in folders]
    file = next((file for file in files if file.is_file()), files[0])
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        looked = " or ".join(dict.fromkeys(str(file.absolute()) for file in files))
        raise ConfigError(
            f"features: {name!r} cannot be read: there is no such text file at {looked}; write one "
            "with `foretaste data schema`",
            name="features",
            value=name,
        ) from error
    return dict(settings) | {"features": schema_from_toml(text, source=str(file)).model_dump()}


def _with_absent(settings: Mapping[str, object]) -> dict[str, object]:
    """Convert the text "none" to an absent value wherever a setting may be absent."""
    absent = {name: _nothing_for_none(value) for name, value in settings.items()}
    try:
        ExperimentConfig.model_validate(absent)
    except ValidationError as error:
        for problem in error.errors(include_url=False):
            if problem["input"] is None:  # an absent value is invalid, so the text was meant
                owner: Any = absent
                *outer, last = path_of(problem["loc"], absent)
                for part in outer:
                    owner = owner[part]
                owner[last] = "none"
    return absent


def _nothing_for_none(value: object) -> object:
    match value:
        case "none":
            return None
        case Mapping():
            return {name: _nothing_for_none(inner) for name, inner in value.items()}
        case list() | tuple():
            return [_nothing_for_none(inner) for inner in value]
        case _:
            return value


def _value(text: str) -> object:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def without_defaults(settings: BaseModel) -> dict[str, object]:
    """Return the values that differ from the defaults, and the kind of each section.

    Reading them gives the same settings.
    """
    plain = settings.model_dump(mode="json")
    return {
        name: _without_defaults(getattr(settings, name), plain[name])
        for name, field in type(settings).model_fields.items()
        if name == "kind"
        or field.is_required()
        or getattr(settings, name) != field.get_default(call_default_factory=True)
    }


def _without_defaults(value: object, plain: Any) -> object:
    match value:
        case BaseModel():
            return without_defaults(value)
        case Mapping():
            return {name: _without_defaults(inner, plain[name]) for name, inner in value.items()}
        case tuple():
            return [_without_defaults(*pair) for pair in zip(value, plain, strict=True)]
        case _:
            return plain


@checked
def recipe_of(trained: Trained) -> ExperimentConfig:
    """Return the recipe that a model was made from.

    Raises:
        ConfigError: The model was trained in Python with `fit`, without a recipe.
    """
    if "data" not in trained.settings:
        raise ConfigError(
            "this model was not made from a recipe, so its test data are not known: give a recipe",
            name="trained",
        )
    return parse_settings(ExperimentConfig, trained.settings, source="the bundle's recipe")

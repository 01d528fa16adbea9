"""Recipes: their settings, overrides, and the message for a misspelt name."""

import json
import tomllib
from pathlib import Path

import polars as pl
import pytest

import foretaste as ft
from foretaste.config import parse_settings
from foretaste.data.features_schema import schema_from_toml, schema_to_toml
from foretaste.errors import ConfigError
from foretaste.experiment.learning import usual_objective
from foretaste.experiment.recipe import (
    EvaluationConfig,
    FileData,
    override,
    read_experiment,
    with_overrides,
)
from foretaste.experiment.run import read_split
from foretaste.shown import to_toml

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.toml"))
SMALL = """
seed = 3
[data]
kind = "files"
files = ["events.csv"]
user = "who"
item = "what"
[split]
kind = "leave_last"
[model]
kind = "sasrec"
embedding_dim = 16
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(SMALL)
    return path


def test_a_recipe_is_read_as_written_and_the_rest_has_defaults(recipe: Path) -> None:
    config = read_experiment(recipe)
    assert (config.seed, config.model.embedding_dim, config.model.num_blocks) == (3, 16, 2)
    assert config.evaluation.k == (10, 20)


@pytest.mark.parametrize("kind", ["half", "int8", "int4", "pruned"])
def test_a_recipe_with_a_kind_of_table_that_cannot_be_trained_is_refused_when_read(
    recipe: Path, kind: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        read_experiment(recipe, overrides=[f"model.table.kind={kind}"])
    assert (caught.value.name, caught.value.value) == ("model.table.kind", kind)
    retriever = ["model.kind=two_stage", "model.retriever.kind=mf", "model.ranker.kind=deepfm"]
    recipe.write_text(SMALL.partition("[model]")[0])
    read_experiment(recipe, overrides=retriever)
    with pytest.raises(ConfigError) as caught:
        read_experiment(recipe, overrides=[*retriever, f"model.ranker.table.kind={kind}"])
    assert caught.value.name == "model.ranker.table.kind"


FEATURES = """
[item.genres]
kind = "multi"
separator = "|"
[left_out]
"item.title" = "another text in every row"
"""


@pytest.mark.parametrize("place", ["beside the recipe", "data_dir", "here", "absolute"])
def test_a_recipe_takes_a_file_of_features(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    for name in ("recipe", "data", "here"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    folder = {"data_dir": "data", "here": "here"}.get(place, "recipe")
    written = tmp_path / folder / "features.toml"
    schema = schema_from_toml(FEATURES)
    written.write_text(schema_to_toml(schema))  # which is such a file
    name = str(written) if place == "absolute" else "features.toml"
    recipe = tmp_path / "recipe" / "run.toml"
    recipe.write_text(f'features = "{name}"\n' + SMALL)
    config = read_experiment(recipe, data_dir=tmp_path / "data")
    assert config.features == schema
    config = read_experiment(
        recipe, overrides=["features.item.genres.min_count=3"], data_dir=written.parent
    )
    assert config.features is not None
    assert config.features.item["genres"].min_count == 3
    assert (
        read_experiment(recipe, overrides=["features=none"], data_dir=tmp_path / "data").features
        is None
    )
    recipe.write_text(SMALL)
    assert read_experiment(recipe, overrides=[f"features={written}"]).features == schema
    assert override(read_experiment(recipe), [f"features={written}"]).features == schema


def test_a_file_of_features_that_is_missing_or_wrong_is_named(tmp_path: Path) -> None:
    recipe = tmp_path / "run.toml"
    recipe.write_text('features = "fetures.toml"\n' + SMALL)
    with pytest.raises(ConfigError, match="foretaste data schema") as caught:
        read_experiment(recipe)
    assert (caught.value.name, caught.value.value) == ("features", "fetures.toml")
    assert str(tmp_path / "fetures.toml") in str(caught.value)
    for text in (
        "[item.x]\nkind = 'multy'",
        "not TOML",
        "[item.x]\nkind = 'numeric'\nmincount = 2",
    ):
        (tmp_path / "fetures.toml").write_text(text)
        with pytest.raises(ConfigError, match=r"fetures\.toml"):
            read_experiment(recipe)


def test_a_recipe_may_read_a_table_without_items_and_its_context(tmp_path: Path) -> None:
    table = pl.DataFrame({"hour": range(40), "bought": [0, 1] * 20, "who": [1, 2, 3, 4] * 10})
    table.write_csv(tmp_path / "events.csv")
    recipe = tmp_path / "run.toml"
    more = 'item = "none"\ncolumns = ["bought"]\ncontext = ["hour"]'
    recipe.write_text(SMALL.replace('item = "what"', more))
    split = read_split(read_experiment(recipe), data_dir=tmp_path)
    assert split.events.items.ids.to_list() == ["row"]
    assert split.events.context is not None
    assert split.events.context.columns == ["hour"]
    assert split.train.context is not None
    assert len(split.train.context) == len(split.train) == 32


def test_an_override_changes_its_setting_and_no_other(recipe: Path) -> None:
    plain = read_experiment(recipe)
    changed = read_experiment(
        recipe,
        overrides=["model.dropout=0.5", "evaluation.k=[5, 7]", "model.block=modern", "seed=9"],
    )
    assert changed.model.dropout == 0.5
    assert changed.model.block == "modern"  # a bare word is text: the shell eats quotes
    assert changed.evaluation.k == (5, 7)
    assert changed.seed == 9
    back = changed.model_copy(
        update={"model": plain.model, "evaluation": plain.evaluation, "seed": plain.seed}
    )
    assert back == plain


@pytest.mark.parametrize("slip", ["model.dropout", "=1", "model..dropout=1", ".=2"])
def test_an_override_of_another_form_is_refused(recipe: Path, slip: str) -> None:
    with pytest.raises(ConfigError, match=r"section\.name=value"):
        read_experiment(recipe, overrides=[slip])


def test_a_misspelt_setting_is_named_by_its_place_in_the_file(recipe: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read_experiment(recipe, overrides=["model.embeding_dim=8"])
    assert str(caught.value) == (
        f"{recipe}: model.embeding_dim: there is no such setting; did you mean embedding_dim?"
    )


@pytest.mark.parametrize(
    ("slips", "words"),
    [
        (["features.inspect=true"], "features.inspect: .*; there are user, item, context"),
        (["training.dropout=0.1"], "training.dropout: .*; there are epochs"),
        (
            ["model.kind=lightgcn", "model.graph.attribute=[]"],
            r"graph.attribute: .* mean attributes\?",
        ),
        (["tune.space.x.lo=1"], r"\.lo: .* mean low\?"),
        (["objective.loss=bpr"], "objective: name its kind, one of .*next_item"),
        (["objective.kind=pairs", "objective.hard_ranks=[9, 5]"], "objective: hard_ranks"),
        (["evaluation.k=[5, 5]"], r"evaluation: k is \[5, 5\]"),
        (["evaluation.sampled_negatives=9", "evaluation.among=cold"], "leave one out"),
    ],
)
def test_a_wrong_name_is_answered_with_those_of_its_own_place(
    recipe: Path, slips: list[str], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        read_experiment(recipe, overrides=slips)


def test_a_finding_about_all_settings_has_no_name_before_it() -> None:
    with pytest.raises(ConfigError, match=r"^here: k is \[5, 5\]: give"):
        parse_settings(EvaluationConfig, {"k": [5, 5]}, source="here")


def test_a_value_out_of_range_is_named_in_one_line(recipe: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read_experiment(recipe, overrides=["model.dropout=1.5"])
    assert "model.dropout: " in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_kind_that_does_not_exist_is_named_with_those_that_do(recipe: Path) -> None:
    with pytest.raises(ConfigError, match="sasrec") as caught:
        read_experiment(recipe, overrides=["model.kind=transformer"])
    assert "transformer" in str(caught.value)


def test_a_missing_section_is_named(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("[model]\nkind = 'sasrec'\n")
    with pytest.raises(ConfigError, match="data: it is missing"):
        read_experiment(path)


@pytest.mark.parametrize(
    ("content", "word"),
    [(b"seed = ", "not TOML"), (b"\xff\xfe", "not text in UTF-8"), (None, "No such file")],
)
def test_a_file_that_is_no_recipe_is_refused(
    tmp_path: Path, content: bytes | None, word: str
) -> None:
    path = tmp_path / "run.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=word):
        read_experiment(path)


def test_settings_written_as_toml_are_read_back_equal(recipe: Path) -> None:
    overrides = ["notes='a \"quote\" and Ünïcode'", "training.patience=none"]
    config = read_experiment(recipe, overrides=overrides)
    assert config.training.patience is None
    recipe.write_text(to_toml(config.model_dump(mode="json")))
    assert read_experiment(recipe) == config


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_read_back_equal_from_what_is_written_of_it(
    path: Path, tmp_path: Path
) -> None:
    config = read_experiment(path)
    written = tmp_path / "again.toml"
    written.write_text(to_toml(config.model_dump(mode="json")))
    assert read_experiment(written) == config


def test_none_is_no_value_but_where_it_is_a_choice(tmp_path: Path) -> None:
    # `pooling` has a choice named none and cannot be absent; `patience` can.
    recipe = tmp_path / "run.toml"
    recipe.write_text(
        '[data]\nkind = "files"\nfiles = ["a.csv"]\nuser = "none"\n[split]\nkind = "leave_last"\n'
        '[model]\nkind = "din"\npooling = "none"\ntask = {name = "click", above = "none"}\n'
        '[training]\npatience = "none"\n[features]\nleft_out = {"item.title" = "none"}\n'
    )
    config = read_experiment(recipe, overrides=["objective=none"])
    assert isinstance(config.model, ft.DINConfig)
    assert config.model.pooling == "none"
    assert config.model.task.above is config.training.patience is config.objective is None
    assert isinstance(config.data, FileData)
    assert config.data.user is None
    assert config.features is not None
    assert config.features.left_out == {"item.title": "none"}
    assert override(config, ["model.pooling=mean"]).training.patience is None


def test_a_wrong_value_is_named_as_the_file_names_it(tmp_path: Path) -> None:
    recipe = tmp_path / "run.toml"
    recipe.write_text(
        '[data]\nkind = "files"\nfiles = ["a.csv"]\nheader = "perhaps"\n'
        '[split]\nkind = "leave_last"\n[model]\nkind = "ease"\n[training]\nepochs = "none"\n'
    )
    with pytest.raises(ConfigError) as caught:
        read_experiment(recipe)
    found = str(caught.value).removeprefix(f"{recipe}: ").split("; ")
    assert [finding.partition(":")[0] for finding in found] == ["data.header", "training.epochs"]


def test_toml_by_hand() -> None:
    settings = {
        "seed": 1,
        "a b": {"x": [1, 2.5, True], "no": None},
        "empty": {},
        "e": 1e-7,
        "größe": [{"as inline": {"table": 1}}],
    }
    text = to_toml(settings)
    assert text == (
        'seed = 1\ne = 1e-07\n"größe" = [{"as inline" = {table = 1}}]\n\n'
        '["a b"]\nx = [1, 2.5, true]\nno = "none"\n\n[empty]\n'
    )
    assert tomllib.loads(text)["größe"] == settings["größe"]
    with pytest.raises(ConfigError, match="complex"):
        to_toml({"x": 3 + 0j})


def test_overrides_reach_sections_that_the_file_does_not_have() -> None:
    assert with_overrides({}, ["training.epochs=3"]) == {"training": {"epochs": 3}}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_of_the_repository_is_valid(path: Path) -> None:
    config = read_experiment(path)
    assert config.data.kind == "public"
    assert config.published or config.notes  # without published figures it says what it is for


def test_recipes_resolve_to_the_settings_that_their_figures_were_measured_with() -> None:
    """Settings that a recipe omits keep their defaults: if a default changes, the recipe states it.

    `recorded_defaults.json` holds the defaults of the day on which they began to be chosen.
    """
    then = json.loads((Path(__file__).parent / "golden" / "recorded_defaults.json").read_text())
    for path in RECIPES:
        config = read_experiment(path)
        first = config.first_stage
        for model, training, objective in (
            (config.model, config.training, config.objective),
            (getattr(config.model, "retriever", None), first.training, first.objective),
            (getattr(config.model, "ranker", None), config.training, config.objective),
        ):
            if model is None:
                continue
            _check_recorded(path.stem, model, then.get(model.kind, {}))
            if not model.usual.objective:  # of two stages, or in closed form
                continue
            learned = objective or usual_objective(model)
            _check_recorded(path.stem, learned, then[learned.kind])
            said = training.model_fields_set
            resolved = training.settled(model.usual.training, 10**9).model_dump(mode="json")
            largest = training.batch_of(10**9)  # "auto" was the same for all models
            for name, value in (then["training"] | {"batch_events": largest}).items():
                if name not in said and value != "auto":
                    assert resolved[name] == value, (path.stem, name)


def _check_recorded(recipe: str, settings: ft.Config, then: dict[str, object]) -> None:
    now = settings.model_dump(mode="json")
    if now.get("pooling") == "none":  # no histories are read
        then = {name: value for name, value in then.items() if name != "reads"}
    for name, value in then.items():
        if name not in settings.model_fields_set:
            assert now[name] == value, (recipe, settings, name)

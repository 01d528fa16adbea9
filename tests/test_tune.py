"""The search of settings: its draws, pruning, and resuming after a kill."""

import json
import tomllib
from dataclasses import replace
from pathlib import Path

import numpy as np
import optuna
import polars as pl
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

import foretaste as ft
from foretaste.data.interactions import Interactions
from foretaste.data.vocabulary import Vocabulary
from foretaste.errors import ConfigError, DataError
from foretaste.experiment.compare_plan import FAMILIES
from foretaste.experiment.recipe import without_defaults
from foretaste.experiment.search_space import distributions, with_drawn
from foretaste.experiment.tune import tune
from foretaste.models.catalogue import CLOSED_FORM
from foretaste.shown import to_toml

RECIPES = Path(__file__).parents[1] / "recipes"


def split() -> ft.Split:
    """Forty users walk round a ring of twelve items: what comes next can be learned."""
    start = np.arange(40) % 12
    item_idx = (start[:, None] + np.arange(8)) % 12
    return ft.leave_last_split(
        Interactions(
            users=Vocabulary(pl.Series(range(40))),
            items=Vocabulary(pl.Series(range(12))),
            offsets=np.arange(41, dtype=np.int64) * 8,
            item_idx=item_idx.reshape(-1).astype(np.int32),
        )
    )


def recipe(
    *, model: dict[str, object], space: dict[str, object], trials: int = 3
) -> ft.ExperimentConfig:
    return ft.parse_settings(
        ft.ExperimentConfig,
        {
            "data": {"kind": "public", "name": "ml-100k"},
            "split": {"kind": "leave_last"},
            "model": model,
            "training": {"epochs": 2, "batch_events": 64},
            "tune": {"trials": trials, "space": space},
        },
        source="test",
    )


EASE = {"model.l2": {"low": 1.0, "high": 100.0, "log": True}}


def test_the_best_trial_becomes_a_recipe_that_gives_its_value_again(tmp_path: Path) -> None:
    config = recipe(model={"kind": "ease"}, space=EASE)
    found = tune(config, split(), folder=tmp_path)
    assert len(found.trials) == 3
    assert found.best.value == max(trial.value or 0.0 for trial in found.trials)
    best = ft.read_experiment(tmp_path / "best.toml")
    assert best == found.best_recipe
    assert best.model.l2 == found.best.settings["model.l2"]
    again = ft.evaluate(ft.fit(best.model, split(), seed=best.seed), split().validation, k=(10,))
    assert again.metrics["ndcg_at_10"] == found.best.value
    assert json.loads((tmp_path / "trials.json").read_text()) == json.loads(
        json.dumps(found.to_json())
    )


def labelled_split() -> ft.Split:
    """Twenty users and ten items with a colour; a click is of the user's own parity."""
    user, item = np.divmod(np.arange(200), 10)
    clicked = (user + item) % 2 == 0
    return ft.random_split(
        Interactions(
            users=Vocabulary(pl.Series(range(20))),
            items=Vocabulary(pl.Series(range(10))),
            offsets=np.arange(21, dtype=np.int64) * 10,
            item_idx=item.astype(np.int32),
            columns={"clicked": clicked.astype(np.float32)},
            item_table=pl.DataFrame({"colour": ["red", "blue"] * 5}),
        ),
        validation=0.3,
    )


MMOE = {
    "kind": "mmoe",
    "tasks": [{"name": "click", "column": "clicked"}],
    "num_experts": 2,
    "expert_hidden": [4],
    "tower_hidden": [],
    "user_id": True,
    "item_id": False,
}
TWO_STAGES = {
    "kind": "two_stage",
    "candidates": 3,
    "retriever": {"kind": "mf", "embedding_dim": 4},
    "ranker": {"kind": "deepfm", "embedding_dim": 4, "hidden": [4]},
}


FEW = ft.TrainingConfig(epochs=3, batch_events=32, warmup_steps=0)


@pytest.mark.parametrize(
    ("model", "name", "metric"),
    [
        # without features it has no input about items, and was refused
        (MMOE, "training.learning_rate", "mean over tasks"),
        (TWO_STAGES, "first_stage.training.learning_rate", "ndcg_at_10"),
    ],
    ids=["ranker", "two stages"],
)
def test_a_trial_is_trained_and_judged_as_its_recipe_says(
    model: dict[str, object], name: str, metric: str, tmp_path: Path
) -> None:
    config = recipe(model=model, space={name: {"choices": [1e-9, 0.05]}}, trials=1)
    config = config.model_copy(
        update={
            "features": ft.FeatureSchema(item={"colour": ft.CategoricalField()}),
            "training": FEW,
            "first_stage": ft.FirstStage(training=FEW),
        }
    )
    tune(config, labelled_split(), folder=tmp_path)
    study = optuna.load_study(study_name="tune", storage=f"sqlite:///{tmp_path / 'study.db'}")
    for rate in (1e-9, 0.05):
        study.enqueue_trial({name: rate})
    found = tune(config, labelled_split(), folder=tmp_path, trials=3, resume=True)
    assert found.metric == metric
    slow, fast = (trial.value for trial in found.trials[1:])
    assert slow != fast  # the drawn rate was trained with
    best = ft.read_experiment(tmp_path / "best.toml")
    assert best == found.best_recipe
    again = ft.fit(
        best.model,
        labelled_split(),
        training=best.training,
        features=best.features,
        first_stage=best.first_stage,
        show=False,
    )
    if metric == "ndcg_at_10":
        measured = ft.evaluate(again, labelled_split().validation).metrics["ndcg_at_10"]
    else:
        measured = ft.evaluate_rows(again, labelled_split(), part="validation").metrics["auc"]
    assert measured == pytest.approx(found.best.value, rel=1e-12)


def test_a_draw_of_settings_that_do_not_go_together_ends_its_trial_alone(tmp_path: Path) -> None:
    space = {
        "objective.loss": {"choices": ["softmax", "bce"]},
        "objective.in_batch": {"choices": [True]},
    }
    config = recipe(model={"kind": "mf", "embedding_dim": 2}, space=space, trials=6)
    config = config.model_copy(update={"objective": ft.PairsConfig(loss="bce")})
    trials = tune(config, split(), folder=tmp_path).trials
    assert {(trial.settings["objective.loss"], trial.state) for trial in trials} == {
        ("softmax", "fail"),
        ("bce", "complete"),
    }
    never = recipe(
        model={"kind": "mf"}, space={"objective.in_batch": {"choices": [True]}}, trials=1
    )
    never = never.model_copy(update={"objective": ft.PairsConfig(loss="softmax")})
    with pytest.raises(ConfigError, match="omit in_batch"):
        tune(never, split(), folder=tmp_path / "never")


def test_a_search_needs_a_validation_part(tmp_path: Path) -> None:
    whole = ft.leave_last_split(split().events, validation=False)
    with pytest.raises(ConfigError, match="no validation part"):
        tune(recipe(model={"kind": "ease"}, space=EASE), whole, folder=tmp_path)


def test_a_search_goes_on_where_it_was_stopped_and_repeats_nothing(tmp_path: Path) -> None:
    config = recipe(model={"kind": "ease"}, space=EASE)
    first = tune(config, split(), folder=tmp_path, trials=2)
    assert tune(config, split(), folder=tmp_path, trials=2, resume=True).trials == first.trials
    both = tune(config, split(), folder=tmp_path, trials=4, resume=True)
    assert both.trials[:2] == first.trials
    assert len({trial.settings["model.l2"] for trial in both.trials}) == 4


def test_a_trial_that_was_killed_is_run_again_with_its_settings(tmp_path: Path) -> None:
    config = recipe(model={"kind": "ease"}, space=EASE)
    tune(config, split(), folder=tmp_path, trials=1)
    study = optuna.load_study(study_name="tune", storage=f"sqlite:///{tmp_path / 'study.db'}")
    killed = study.ask(distributions(config)).params  # asked for, and never reported
    found = tune(config, split(), folder=tmp_path, trials=2, resume=True)
    assert [trial.state for trial in found.trials] == ["complete", "complete"]
    assert found.trials[1].settings == killed


def test_a_folder_is_not_searched_into_twice_by_accident(tmp_path: Path) -> None:
    config = recipe(model={"kind": "ease"}, space=EASE)
    tune(config, split(), folder=tmp_path, trials=1)
    with pytest.raises(DataError, match="--resume"):
        tune(config, split(), folder=tmp_path, trials=1)
    assert len(tune(config, split(), folder=tmp_path, trials=1, replace=True).trials) == 1
    with pytest.raises(ConfigError) as both:
        tune(config, split(), folder=tmp_path, resume=True, replace=True)
    assert both.value.name == "replace"
    other = config.model_copy(update={"seed": 5})
    with pytest.raises(ConfigError, match="another recipe"):
        tune(other, split(), folder=tmp_path, trials=1, resume=True)


def test_a_trial_far_below_the_others_is_cut_short(tmp_path: Path) -> None:
    # Four trials of a learning rate that learns, then some that cannot: the median cuts those.
    space = {"training.learning_rate": {"choices": [0.03, 1e-9]}}
    config = recipe(
        model={"kind": "sasrec", "embedding_dim": 8, "num_blocks": 1, "num_heads": 1, "max_len": 8},
        space=space,
    ).model_copy(update={"training": ft.TrainingConfig(epochs=3, warmup_steps=0, patience=None)})
    tune(config, split(), folder=tmp_path, trials=1)
    study = optuna.load_study(study_name="tune", storage=f"sqlite:///{tmp_path / 'study.db'}")
    for rate in (0.03, 0.03, 0.03, 0.03, 1e-9):
        study.enqueue_trial({"training.learning_rate": rate})
    found = tune(config, split(), folder=tmp_path, trials=6, resume=True)
    assert found.trials[-1].settings == {"training.learning_rate": 1e-9}
    assert (found.trials[-1].state, found.trials[-1].value) == ("pruned", None)


def test_a_range_over_whole_numbers_draws_whole_numbers() -> None:
    config = recipe(
        model={"kind": "sasrec"},
        space={
            "model.max_len": {"low": 10, "high": 100},
            "model.dropout": {"low": 0, "high": 0.5},
            "model.block": {"choices": ["original", "modern"]},
        },
    )
    assert distributions(config) == {
        "model.max_len": IntDistribution(10, 100),
        "model.dropout": FloatDistribution(0, 0.5),
        "model.block": CategoricalDistribution(("original", "modern")),
    }


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_model_has_usual_ranges_and_takes_what_they_give(kind: str) -> None:
    model = TWO_STAGES if kind == "two_stage" else {"kind": kind}
    config = recipe(model=model, space={})
    ranges = distributions(config)
    for name, part in ranges.items():
        for value in _ends(part):
            with_drawn(config, {name: value})
    assert len(ranges) > 0
    assert ("training.learning_rate" in ranges) != isinstance(config.model, CLOSED_FORM)


def test_two_stages_search_both_of_their_models() -> None:
    names = set(distributions(recipe(model=TWO_STAGES, space={})))
    assert {
        "model.candidates",
        "model.retriever.dropout",
        "model.ranker.embedding_dim",
        "first_stage.training.learning_rate",
        "training.learning_rate",
    } <= names
    by_counts = TWO_STAGES | {"retriever": {"kind": "popularity"}}
    names = set(distributions(recipe(model=by_counts, space={})))
    assert "first_stage.training.learning_rate" not in names


@pytest.mark.parametrize(
    "model",
    [
        {"kind": "mf", "embedding_dim": 4},
        {"kind": "sasrec", "num_heads": 1, "max_len": 8},
        {"kind": "gmf"},
        {"kind": "popularity"},
    ],
    ids=lambda model: model["kind"],
)
def test_a_search_without_ranges_comes_to_its_end(model: dict[str, object], tmp_path: Path) -> None:
    config = recipe(model=model, space={}, trials=1)
    events = replace(split().events, timestamp_s=np.arange(320, dtype=np.int64))
    found = tune(config, replace(split(), events=events), folder=tmp_path)
    assert found.best.value is not None
    assert ft.read_experiment(tmp_path / "best.toml") == found.best_recipe


def test_best_toml_holds_what_differs_from_the_defaults_alone(tmp_path: Path) -> None:
    config = recipe(model={"kind": "ease"}, space=EASE, trials=1)
    found = tune(config, split(), folder=tmp_path)
    assert tomllib.loads((tmp_path / "best.toml").read_text()) == {
        "data": {"kind": "public", "name": "ml-100k"},
        "split": {"kind": "leave_last"},
        "model": {"kind": "ease", "l2": found.best.settings["model.l2"]},
        "training": {"epochs": 2, "batch_events": 64},
        "tune": {"trials": 1, "space": {"model.l2": EASE["model.l2"]}},
    }


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.stem)
def test_a_recipe_without_its_defaults_is_the_same_recipe(path: Path, tmp_path: Path) -> None:
    config = ft.read_experiment(path)
    short = to_toml(without_defaults(config))
    (tmp_path / "short.toml").write_text(short)
    assert ft.read_experiment(tmp_path / "short.toml") == config
    assert len(short) < len(to_toml(config.model_dump(mode="json")))


def test_a_search_ends_with_its_time_and_says_so(tmp_path: Path) -> None:
    config = recipe(model={"kind": "ease"}, space=EASE, trials=50)
    found = tune(config, split(), folder=tmp_path, max_seconds=1e-9)
    assert len(found.trials) == 1  # one is made whatever the time
    assert found.ended == "out of time after 1 trials and 1e-09 s"
    assert found.seconds == found.trials[0].seconds > 0
    more = tune(config, split(), folder=tmp_path, trials=3, resume=True)
    assert (len(more.trials), more.ended) == (3, "all 3 trials are done")
    with pytest.raises(ConfigError, match="more than 0 s") as caught:
        tune(config, split(), folder=tmp_path / "no", max_seconds=-1.0)
    assert caught.value.name == "max_seconds"
    with pytest.raises(ConfigError, match="above 0"):
        ft.override(config, ["tune.max_seconds=0"])


def test_the_time_of_a_search_ends_a_training_too(tmp_path: Path) -> None:
    endless = recipe(model={"kind": "mf", "embedding_dim": 2}, space={}, trials=5).model_copy(
        update={"training": ft.TrainingConfig(epochs=100_000, patience=None)}
    )
    found = tune(ft.override(endless, ["tune.max_seconds=0.5"]), split(), folder=tmp_path)
    assert 1 <= len(found.trials) <= 5
    assert found.trials[0].state == "complete"
    assert found.seconds < 60  # all epochs would take hours


def test_the_frame_of_a_search_has_a_row_a_trial_and_a_column_a_setting(tmp_path: Path) -> None:
    space = {**EASE, "objective.loss": {"choices": ["softmax", "bce"]}}
    config = recipe(model={"kind": "ease"}, space=space, trials=3)
    config = config.model_copy(update={"objective": ft.PairsConfig(loss="bce", in_batch=True)})
    found = tune(config, split(), folder=tmp_path)
    frame = found.to_frame()
    assert frame.columns == ["number", "state", "value", "seconds", *found.best.settings]
    assert frame["number"][0] == found.best.number
    assert frame["value"].drop_nulls().is_sorted(descending=True)
    assert sorted(frame["number"]) == [0, 1, 2]


def _ends(part: object) -> tuple[object, ...]:
    match part:
        case CategoricalDistribution(choices=choices):
            return tuple(choices)
        case FloatDistribution() | IntDistribution():
            return part.low, part.high
    raise AssertionError(part)


@pytest.mark.parametrize(
    ("space", "word"),
    [
        ({"model.l3": {"low": 1, "high": 2}}, "model.l3 is not a setting"),
        ({"nothing": {"low": 1, "high": 2}}, "nothing is not a setting"),
        ({"model.l2": {"low": 2, "high": 1}}, "low must be below high"),
        ({"model.l2": {"low": 0, "high": 1, "log": True}}, "above 0"),
    ],
)
def test_a_range_that_cannot_be_is_named(
    tmp_path: Path, space: dict[str, object], word: str
) -> None:
    with pytest.raises(ConfigError, match=word):
        tune(recipe(model={"kind": "ease"}, space=space), split(), folder=tmp_path)


@pytest.mark.parametrize(
    ("name", "choices"),
    [
        ("model.embedding_dim", [4, 10**9]),  # does not fit
        ("model.num_heads", [1, 3]),  # does not go with 4 dimensions
        ("training.learning_rate", [0.01, 1e300]),  # out of range
    ],
)
def test_a_trial_that_cannot_be_is_one_failed_trial(
    tmp_path: Path, name: str, choices: list[float]
) -> None:
    config = recipe(
        model={"kind": "sasrec", "embedding_dim": 4, "max_len": 5},
        space={name: {"choices": choices}},
        trials=5,
    )
    found = tune(config, split(), folder=tmp_path)
    assert len(found.trials) == 5
    states = {trial.settings[name]: trial.state for trial in found.trials}
    assert states == {choices[0]: "complete", choices[1]: "fail"}

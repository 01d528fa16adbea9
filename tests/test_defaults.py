"""Defaults of each model: which are fixed, and which depend on the data or a short search."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

import foretaste as ft
from foretaste.experiment.learning import RunOptions, l2_factor, usual_objective
from foretaste.experiment.run import fit_final, run_experiment
from foretaste.experiment.search_space import usual_space, with_drawn, with_own_objective
from foretaste.experiment.validation import make_validation
from foretaste.models.base import StrengthConfig
from foretaste.training.checkpoint import Epoch
from tests.worlds import events_of

CLOSED = (ft.ImplicitALSConfig(factors=4), ft.EASEConfig(), ft.ItemKNNConfig(neighbours=5))


def groups(*, num_users: int = 60) -> ft.Split:
    """Users of five groups, who do six of their group's eight items, some of them often."""
    rng = np.random.default_rng(0)
    histories = [(user % 5 * 8 + rng.permutation(8)[:6]).tolist() for user in range(num_users)]
    return ft.leave_last_split(events_of(histories, num_items=40))


def recipe(model: dict[str, object]) -> ft.ExperimentConfig:
    settings = {
        "data": {"kind": "public", "name": "ml-100k"},
        "split": {"kind": "leave_last"},
        "model": model,
    }
    return ft.parse_settings(ft.ExperimentConfig, settings, source="test")


@pytest.mark.parametrize("config", CLOSED, ids=lambda config: config.kind)
def test_the_strength_that_is_best_on_validation_is_taken(config: StrengthConfig) -> None:
    split = groups()
    trained = ft.fit(config, split, show=False)
    name = list(config.strengths)[-1]  # the last to be tried: the others are what they are now
    values = {}
    for strength in config.strengths[name]:
        other = ft.fit(trained.config.model_copy(update={name: strength}), split, show=False)
        assert "tried" not in other.log
        values[strength] = make_validation(other, split).value(other.model)
        assert trained.log["tried"][f"{name} {strength:g}"] == values[strength]
    assert values[trained.config.strength(name)] == max(values.values())
    assert trained.settings["model"][name] == trained.config.strength(name)


@pytest.mark.parametrize("config", CLOSED, ids=lambda config: config.kind)
def test_where_nothing_can_be_tried_the_usual_strengths_are_taken(config: StrengthConfig) -> None:
    split = groups()
    without = ft.leave_last_split(split.events, validation=False)
    trained = ft.fit(config, without, show=False)
    assert "tried" not in trained.log
    for name, (usual, *_) in config.strengths.items():
        assert trained.config.strength(name) == usual
    asked = config.model_copy(update=dict.fromkeys(config.strengths, 3.0))
    kept = ft.fit(asked, split, show=False)
    assert (kept.config, "tried" in kept.log) == (asked, False)


def test_a_run_on_all_events_keeps_the_strengths_that_validation_chose() -> None:
    split, config = groups(), recipe({"kind": "item_knn"})
    chosen = ft.fit(config.model, split, show=False)
    final = fit_final(
        chosen, config.model_copy(update={"final": "all"}), split, RunOptions(show=False)
    )
    assert final.config == chosen.config
    assert "tried" not in final.log


def test_a_model_learns_its_own_way_wherever_it_is_trained() -> None:
    config = recipe({"kind": "mf", "embedding_dim": 4})
    trained = ft.fit(config.model, groups(), training=ft.TrainingConfig(epochs=1), show=False)
    own = usual_objective(config.model).model_dump(mode="json")
    assert trained.settings["objective"] == own | {"l2": 0.3}  # by counts: they are few
    assert trained.settings["training"]["learning_rate"] == 1e-2
    compared = ft.family_recipes(config, ["mf"])["mf"]
    assert (compared.objective, compared.training) == (None, ft.TrainingConfig())
    searched = with_own_objective(config)
    assert searched.objective.model_dump(mode="json") == own
    space = usual_space(searched)
    assert space["training.learning_rate"].low < 1e-2 < space["training.learning_rate"].high
    assert space["objective.l2"].low < searched.objective.l2 < space["objective.l2"].high


def test_what_is_left_to_the_model_is_decided_and_what_is_asked_for_is_kept() -> None:
    usual = {"learning_rate": 4e-3, "ema_decay": 0.999, "batch_events": 2048}
    settled = ft.TrainingConfig().settled(usual, 10**6)
    assert (settled.learning_rate, settled.ema_decay, settled.batch_events) == (4e-3, 0.999, 2048)
    few = ft.TrainingConfig().settled(usual, 50)
    assert few.batch_events == 32  # a share of the events, where that is less
    asked = ft.TrainingConfig(
        learning_rate=1e-3, ema_decay=0.0, batch_events=9000, epochs=7, schedule="cosine"
    )
    assert asked.settled(usual, 10**6) == asked
    many = ft.TrainingConfig().settled(usual, 10**6, 2**17)  # an average would move every row
    assert (many.learning_rate, many.ema_decay) == (4e-3, 0.0)
    fused = ft.TrainingConfig(engine="torchrec").settled(usual, 10**6)
    assert fused.ema_decay == 0.0  # TorchRec keeps no average
    every = ft.TrainingConfig(tables="adamw").settled(usual, 10**6, 2**17)
    assert every.ema_decay == 0.999
    plain = ft.TrainingConfig().settled({}, 10**6)
    assert (plain.learning_rate, plain.ema_decay, plain.batch_events) == (1e-3, 0.0, 8192)
    assert (plain.epochs, plain.schedule) == (100, "constant")


@pytest.mark.parametrize(
    ("num_events", "epochs"), [(10**6, 8), (102_400, 8), (51_200, 16), (3200, 25), (50, 100)]
)
def test_a_model_that_has_epochs_of_its_own_takes_800_steps_at_least(
    num_events: int, epochs: int
) -> None:
    own = {"batch_events": 1024, "epochs": 8, "schedule": "linear"}
    settled = ft.TrainingConfig().settled(own, num_events)
    assert (settled.epochs, settled.schedule) == (epochs, "linear")
    assert ft.TrainingConfig(epochs=3).settled(own, num_events).epochs == 3


@pytest.mark.parametrize("pooling", ["attention", "auto"])
def test_training_reads_other_events_of_a_user_only_where_their_order_has_no_meaning(
    pooling: str,
) -> None:
    last = groups()
    by_time = ft.Split(kind="given", events=last.events, part_E=last.part_E, rolling=False)
    given = replace(by_time, events=replace(last.events, timestamp_s=None))
    auto = ft.DINConfig(embedding_dim=4, pooling=pooling)
    for split, config, reads in (
        (last, auto, "before"),
        (given, auto, "others"),
        (by_time, auto, "before"),
        (given, auto.model_copy(update={"reads": "before"}), "before"),
    ):
        trained = ft.fit(config, split, training=ft.TrainingConfig(epochs=1), show=False)
        assert (trained.config.reads, trained.model.reads) == (reads, reads)


@pytest.mark.parametrize(
    ("num_users", "each", "factor"), [(40, 10, 3.0), (40, 20, 2.0), (40, 40, 1.0), (160, 10, 2.0)]
)
def test_l2_is_stronger_where_events_are_few_for_a_user_and_an_item(
    num_users: int, each: int, factor: float
) -> None:
    events = events_of([[user % 40] * each for user in range(num_users)], num_items=50)
    assert l2_factor(events) == pytest.approx(factor)  # items without events do not count
    config = ft.LightGCNConfig()
    assert usual_objective(config, events).l2 == pytest.approx(0.01 * factor)
    assert usual_objective(ft.TwoTowerConfig(), events).l2 == pytest.approx(0.1 * factor)
    assert usual_objective(ft.PinSageConfig(), events) == usual_objective(ft.PinSageConfig())


def test_the_l2_of_towers_that_may_read_features_does_not_go_by_counts() -> None:
    users = pl.DataFrame({"user": range(40), "age": range(40)})
    events = replace(events_of([[user] * 10 for user in range(40)], num_items=50), user_table=users)
    features = ft.fit_features(ft.FeatureSchema(user={"age": ft.NumericField()}), events)
    towers, mf = ft.TwoTowerConfig(), ft.MFConfig()
    assert usual_objective(towers, events, features) == usual_objective(towers)
    assert usual_objective(mf, events, features) == usual_objective(mf, events)


ODD = {
    "fifty events": [[user % 7, (user + 1) % 7, (user * 3) % 7, user % 5, 6] for user in range(10)],
    "everything is popular": [[0, 1, 2, 3] for _ in range(20)],
    "repeats": [[user % 3] * 6 for user in range(20)],
    "one user": [np.random.default_rng(0).integers(0, 50, 5000).tolist()],
}


@pytest.mark.parametrize("histories", ODD.values(), ids=ODD)
@pytest.mark.parametrize(
    "config", [*CLOSED, ft.MFConfig(embedding_dim=4)], ids=lambda config: config.kind
)
def test_odd_data_are_learned_from_at_defaults(
    config: ft.ModelConfig, histories: list[list[int]]
) -> None:
    split = ft.leave_last_split(events_of(histories, num_items=1 + max(map(max, histories))))
    trained = ft.fit(config, split, training=ft.TrainingConfig(epochs=2), show=False)
    report = ft.evaluate(trained, split.test, exclude_seen=False, resamples=0)
    assert 0 <= report.metrics["ndcg_at_10"] <= 1


SMALL = ft.MFConfig(recency=1.0, embedding_dim=4, init="random")
SEARCHED = ft.TrainingConfig(search=True, epochs=3)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a search train for one epoch, and for two."""
    monkeypatch.setattr("foretaste.experiment.search_space._ROUNDS", ((1, 3), (2, 1)))


def searched(split: ft.Split, **asked: object) -> ft.Trained:
    return ft.fit(SMALL, split, training=SEARCHED, show=False, **asked)


@pytest.mark.usefixtures("quick")
def test_a_short_search_trains_with_what_was_best_in_its_last_round() -> None:
    found = searched(groups())
    search = found.log["search"]
    rows = search["trials"]
    first, last = ([row for row in rows if row["epochs"] == epochs] for epochs in (1, 2))
    best = sorted(first, key=lambda row: -row["validation"])[:3]
    assert len(first) == 9
    assert first[0]["settings"] == last[0]["settings"] == {}  # the model's own training continues
    assert [row["settings"] for row in last if row["settings"]] == [
        row["settings"] for row in first if row in best and row["settings"]
    ]
    drawn = {name for row in first for name in row["settings"]}
    assert drawn == {"training.learning_rate", "objective.l2", "model.dropout"}
    values = [row["validation"] for row in last]
    chosen = last[values.index(max(values))]["settings"]
    own = recipe(SMALL.model_dump()).model_copy(update={"objective": usual_objective(SMALL)})
    ran = with_drawn(own, chosen)
    assert found.config == ran.model
    assert found.objective == ran.objective
    assert (
        found.settings["training"]["learning_rate"]
        == ran.training.settled(SMALL.usual.training, 100).rate
    )
    assert found.settings["training"]["search"] is False


@pytest.mark.usefixtures("quick")
def test_a_short_search_gives_the_same_again_and_another_with_another_seed() -> None:
    one, again, other = (searched(groups(), seed=seed) for seed in (0, 0, 1))
    assert one.log["search"] == again.log["search"]
    assert torch.equal(one.model.items(torch.arange(40)), again.model.items(torch.arange(40)))
    assert one.log["search"]["trials"] != other.log["search"]["trials"]


@pytest.mark.usefixtures("quick")
def test_a_short_search_of_many_events_is_on_users_drawn_from_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("foretaste.experiment.search_space._SAMPLE", 40)
    split = groups()
    monkeypatch.setattr("foretaste.experiment.fit.TrainingConfig", lambda **_: SEARCHED)
    ft.fit(SMALL, split, training="auto")
    said = " ".join(capsys.readouterr().err.split())
    assert "9 trainings of 1 epochs and 4 of 2, on 40 of 240 events" in said
    assert "as much as 3 epochs" in said  # 40 / 240 * (9 * 1 + 4 * 2) is 2.8
    assert said.index("searching") < said.index("epoch 1/")


@pytest.mark.parametrize("max_seconds", [1e-6, 1e-3])
@pytest.mark.usefixtures("quick")
def test_a_search_without_time_leaves_the_settings_as_they_are(max_seconds: float) -> None:
    found = searched(groups(), max_seconds=max_seconds)
    assert found.log["search"]["ended"] == "out of time"
    assert found.config == SMALL
    assert found.objective == usual_objective(SMALL, groups().train)


@pytest.mark.usefixtures("quick")
def test_a_search_without_validation_events_leaves_the_settings_as_they_are() -> None:
    split = ft.leave_last_split(groups().events, validation=False)
    found = ft.fit(SMALL, split, training=SEARCHED, show=False)
    assert found.log["search"]["trials"] == []
    assert found.objective == usual_objective(SMALL, split.train)


@pytest.mark.usefixtures("quick")
def test_a_resumed_run_trains_with_what_its_search_has_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = searched(groups(), folder=tmp_path / "whole")

    def stop(epoch: Epoch) -> None:
        if epoch.epoch == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        searched(groups(), folder=tmp_path / "broken", on_epoch=stop)
    monkeypatch.delattr("foretaste.experiment.search_space.ShortSearch.run")
    again = searched(groups(), folder=tmp_path / "broken", resume=True)
    assert again.log["search"] == whole.log["search"]
    assert torch.equal(again.model.items(torch.arange(40)), whole.model.items(torch.arange(40)))


@pytest.mark.usefixtures("quick")
def test_the_recipe_of_a_run_holds_what_its_search_has_found_and_the_last_training_keeps_it() -> (
    None
):
    config = recipe(SMALL.model_dump()).model_copy(update={"final": "all"})
    assert ft.override(config, ["training=auto"]).training == ft.TrainingConfig(search=True)
    config = config.model_copy(update={"training": SEARCHED})
    run = run_experiment(config, groups(), show=False)
    found = run.trained.log["search"]["found"]
    for trained in (run.trained, run.refitted):
        assert trained.config.model_dump(mode="json") == found["model"]
        assert trained.settings["objective"] == found["objective"]
        assert trained.settings["training"]["search"] is False
    assert "search" not in run.refitted.log


@pytest.mark.usefixtures("quick")
def test_two_stages_are_not_searched_by_themselves() -> None:
    stages = {"retriever": {"kind": "mf"}, "ranker": {"kind": "din"}}
    config = recipe({"kind": "two_stage", **stages})
    with pytest.raises(ft.ConfigError) as refused:
        ft.fit(config.model, groups(), training="auto", show=False)
    assert refused.value.name == "training.search"

"""Defaults: one opinion of each model, and what of it the data decide."""

import numpy as np
import polars as pl
import pytest

import foretaste as ft
from foretaste.data.interactions import Interactions
from foretaste.data.vocabulary import Vocabulary
from foretaste.experiment.learning import usual_objective
from foretaste.experiment.run import fit_final
from foretaste.experiment.search_space import usual_space, with_own_objective
from foretaste.experiment.validation import make_validation
from foretaste.models.item_sets import StrengthConfig

CLOSED = (ft.ImplicitALSConfig(factors=4), ft.EASEConfig(), ft.ItemKNNConfig(neighbours=5))


def events_of(histories: list[list[int]], *, num_items: int) -> Interactions:
    return Interactions(
        users=Vocabulary(pl.Series(range(len(histories)))),
        items=Vocabulary(pl.Series(range(num_items))),
        offsets=np.cumsum([0, *map(len, histories)], dtype=np.int64),
        item_idx=np.concatenate(histories).astype(np.int32),
    )


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
    final = fit_final(chosen, config.model_copy(update={"final": "all"}), split, show=False)
    assert final.config == chosen.config
    assert "tried" not in final.log


def test_a_model_learns_its_own_way_wherever_it_is_trained() -> None:
    config = recipe({"kind": "mf", "embedding_dim": 4})
    trained = ft.fit(config.model, groups(), training=ft.TrainingConfig(epochs=1), show=False)
    own = usual_objective(config.model).model_dump(mode="json")
    assert trained.settings["objective"] == own
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
    asked = ft.TrainingConfig(learning_rate=1e-3, ema_decay=0.0, batch_events=9000)
    assert asked.settled(usual, 10**6) == asked
    plain = ft.TrainingConfig().settled({}, 10**6)
    assert (plain.learning_rate, plain.ema_decay, plain.batch_events) == (1e-3, 0.0, 8192)


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

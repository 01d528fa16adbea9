"""Validation in early stopping: which queries, how often, and the same figure as the report."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import polars as pl
import pytest

import foretaste as ft
from foretaste.evaluation.asked import Task
from foretaste.evaluation.measure_queries import mean_ndcg
from foretaste.evaluation.protocol import to_find
from foretaste.experiment.learning import usual_objective
from foretaste.experiment.validation import make_validation, trained_rows
from foretaste.models.baselines import PopularityConfig
from foretaste.models.catalogue import ModelConfig
from foretaste.models.sasrec import SASRec
from foretaste.training.objectives import NextItemConfig, RowsConfig
from foretaste.training.settings import TrainingConfig

MODELS: dict[str, ModelConfig] = {
    config.kind: config
    for config in (ft.MFConfig(init="random"), ft.SASRecConfig(), ft.GMFConfig())
}


def walks(num_users: int = 40, num_items: int = 30, length: int = 20) -> ft.Interactions:
    """Each user starts anywhere and mostly goes on to the next item."""
    draw = np.random.default_rng(0)
    start = draw.integers(0, num_items, num_users)
    steps = draw.choice([1, 2, 7], (num_users, length), p=[0.7, 0.2, 0.1]).cumsum(axis=1)
    table = pl.DataFrame(
        {
            "user": np.repeat(np.arange(num_users), length),
            "item": ((start[:, None] + steps) % num_items).ravel(),
            "at": np.tile(np.arange(length) * 100, num_users)
            + np.repeat(np.arange(num_users), length),
        }
    )
    return ft.read_interactions(table, user="user", item="item", timestamp="at")


SPLIT = ft.temporal_split(walks(), validation=0.3, test=0.1)


def untrained(kind: str) -> ft.Trained:
    return ft.fit(MODELS[kind], SPLIT, training=TrainingConfig(epochs=1, device="cpu"), show=False)


def validated(log: Mapping[str, object]) -> dict[int, float]:
    """Return the value of each epoch that was validated."""
    epochs = log["epochs"]
    assert isinstance(epochs, list)
    return {e["epoch"]: e["validation"] for e in epochs if e["validation"] is not None}


def queries_of(*counts: int) -> Task:
    """Return a task of users 0, 1, … with so many queries, each of one target."""
    user_Q = np.repeat(np.arange(len(counts)), counts)
    places = np.arange(len(user_Q))
    return Task(
        row_Q=places,
        user_Q=user_Q,
        length_Q=np.ones_like(places),
        key_Q=places,
        offsets_Q1=np.arange(len(places) + 1),
        target_N=places * 10,
        doubles=0,
        repeats=0,
        idle=0,
    )


@pytest.mark.parametrize(
    ("num", "kept"),
    [(1, 1), (3, (1, 1, 1)), (5, (2, 2, 1)), (6, (3, 2, 1)), (8, (5, 2, 1)), (99, (5, 2, 1))],
)
def test_a_sample_of_queries_is_spread_over_users(num: int, kept: int | tuple[int, ...]) -> None:
    found = queries_of(5, 2, 1).sample(num)
    counts = np.bincount(found.user_Q, minlength=3)
    assert counts.sum() == kept if isinstance(kept, int) else counts.tolist() == list(kept)
    assert found.target_N.tolist() == (found.row_Q * 10).tolist()
    assert np.diff(found.offsets_Q1).tolist() == [1] * len(found.row_Q)


def test_the_sample_is_the_same_each_time_and_its_seed_decides_it() -> None:
    task = queries_of(*[20] * 20)
    first, again, other = (task.sample(50, seed=seed).row_Q.tolist() for seed in (0, 0, 1))
    assert first == again != other
    assert first == sorted(first)


def test_the_figure_of_early_stopping_is_that_of_the_report() -> None:
    trained = ft.fit(PopularityConfig(), SPLIT, show=False)
    report = ft.evaluate(trained, SPLIT.validation, k=(10,), resamples=0)
    task, asked_Q = to_find(SPLIT.validation)
    found = mean_ndcg(trained, SPLIT.validation, task.select(asked_Q), k=10, exclude_seen=True)
    assert found == pytest.approx(report.metrics["ndcg_at_10"], abs=1e-12)
    assert found > 0


def test_a_users_mean_over_a_sample_is_near_the_mean_over_all() -> None:
    trained = ft.fit(PopularityConfig(), SPLIT, show=False)
    task, asked_Q = to_find(SPLIT.validation)
    values = [
        mean_ndcg(trained, SPLIT.validation, part, k=10, exclude_seen=True)
        for part in (
            task.select(asked_Q),
            *(task.select(asked_Q).sample(80, seed=s) for s in range(9)),
        )
    ]
    assert np.mean(values[1:]) == pytest.approx(values[0], rel=0.1)


@pytest.mark.parametrize(
    ("kind", "asked", "every", "on"),
    [
        # A ranker judges 30 items for each of 204 queries, each at a quarter of a row's work: 1530
        # rows; an epoch trains on 480 x 5 = 2400 of them, .3 of it is 720, so that 3 epochs pass.
        ("gmf", {}, 3, "204 of 204 queries"),
        ("gmf", {"epochs": 2}, 2, "204 of 204 queries"),
        ("gmf", {"validate_queries": 90}, 1, "90 of 204 queries"),
        ("gmf", {"validate_every": 1}, 1, "204 of 204 queries"),
        # 204 x (30 / 400 + about 15 events / 9) = 355 of 480 rows.
        ("sasrec", {}, 3, "204 of 204 queries"),
        ("sasrec", {"validate_queries": 80}, 1, "80 of 204 queries"),
        ("mf", {}, 1, "204 of 204 queries"),
        ("mf", {"validate_every": 7, "validate_queries": "all"}, 7, "204 of 204 queries"),
    ],
)
def test_how_often_validation_comes_is_counted_from_its_work(
    kind: str, asked: dict[str, object], every: int, on: str
) -> None:
    trained = untrained(kind)
    rows = trained_rows(trained.model, usual_objective(trained.config), SPLIT.train)
    found = make_validation(
        trained,
        SPLIT,
        training=TrainingConfig.model_validate({"epochs": 50} | asked),
        rows_of_epoch=rows,
    )
    assert found is not None
    assert (found.every, found.on) == (every, on)
    assert str(found).startswith("validated every ")


@pytest.mark.parametrize(("rows", "on"), [(1, "50"), (60, "100"), (10_000, "204")])
def test_a_longer_epoch_allows_more_queries(
    rows: int, on: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Each takes 30 / 400 of a row's work, and an eighth of an epoch's may be spent.
    monkeypatch.setattr("foretaste.experiment.validation._LEAST_QUERIES", 50)
    settings = TrainingConfig()
    found = make_validation(untrained("mf"), SPLIT, training=settings, rows_of_epoch=rows)
    assert found is not None
    assert found.on == f"{on} of 204 queries"


@pytest.mark.parametrize(("rows", "on"), [(100, "100"), (200, "106"), (10_000, "204")])
def test_a_sample_takes_no_more_than_the_work_of_four_epochs(rows: int, on: str) -> None:
    # A ranker judges 30 items for each query, each at a quarter of a row's work.
    found = make_validation(untrained("gmf"), SPLIT, training=TrainingConfig(), rows_of_epoch=rows)
    assert found is not None
    assert found.on == f"{on} of 204 queries"


def test_an_epochs_work_counts_what_is_drawn_and_what_windows_hold() -> None:
    events, ranker = SPLIT.train, untrained("gmf").model
    sequences = SASRec(ft.SASRecConfig(max_len=5), num_items=events.num_items)
    assert trained_rows(ranker, RowsConfig(negatives=2), events) == 3 * len(events)
    assert trained_rows(sequences, NextItemConfig(windows="all"), events) == len(events)
    lengths = np.diff(events.offsets)
    last = trained_rows(sequences, NextItemConfig(windows="last"), events)
    assert last == np.minimum(lengths, 5).sum() < len(events)


def test_two_runs_validate_the_same_epochs_on_the_same_queries_and_say_which() -> None:
    settings = TrainingConfig(epochs=7, validate_queries=90, device="cpu")
    first, again = (
        ft.fit(ft.GMFConfig(factors=4), SPLIT, training=settings, show=False).log for _ in range(2)
    )
    assert first["validated"] == "validated every epoch on 90 of 204 queries"
    assert validated(first) == validated(again)
    every_third = ft.fit(
        ft.GMFConfig(factors=4),
        SPLIT,
        training=settings.model_copy(update={"validate_queries": "all"}),
        show=False,
    ).log
    assert every_third["validated"] == "validated every 3 epochs on 204 of 204 queries"
    assert list(validated(every_third)) == [3, 6, 7]


def test_popularity_gives_the_level_and_item_knn_is_named_too() -> None:
    found = make_validation(untrained("mf"), SPLIT)
    assert found is not None
    reports = {
        name: ft.evaluate(ft.fit(config, SPLIT, show=False), SPLIT.validation, resamples=0)
        for name, config in (
            ("popularity", PopularityConfig()),
            ("item-kNN", ft.ItemKNNConfig(shrinkage=10)),
        )
    }
    expected = {name: report.metrics["ndcg_at_10"] for name, report in reports.items()}
    assert found.beside() == pytest.approx(expected, abs=1e-12)
    assert found.level == pytest.approx(1.1 * expected["popularity"], abs=1e-12)


@pytest.mark.parametrize(
    ("best", "best_epoch", "named", "todo"),
    [
        (0.9, 3, "", ""),
        (0.0, 3, "item-kNN", "learned little"),
        (0.0, 19, "item-kNN", "epochs"),
        (0.31, 3, "item-kNN", "l2"),  # 1.1 times popularity is .309
    ],
)
def test_a_run_below_counting_gets_advice(
    best: float, best_epoch: int, named: str, todo: str
) -> None:
    found = make_validation(untrained("mf"), SPLIT)
    assert found is not None
    beside, advice = found.advice(best, best_epoch=best_epoch, epochs=20)
    assert beside["popularity"] < 0.31 < beside["item-kNN"] < 0.9
    assert bool(advice) == bool(named)
    assert named in advice
    assert todo in advice


def test_a_fit_logs_its_figure_and_those_of_models_that_only_count() -> None:
    log = untrained("mf").log
    beside, advice = log["beside"], log["advice"]
    assert isinstance(beside, dict)
    assert isinstance(advice, str)
    assert set(beside) == {"popularity", "item-kNN"}
    assert max(beside, key=lambda name: beside[name]) in advice


def test_labelled_rows_are_held_against_counts_of_labels() -> None:
    events = walks()
    liked = (events.item_idx % 3 == 0).astype(np.float32)
    split = ft.temporal_split(replace(events, columns={"liked": liked}), validation=0.3, test=0.1)
    task = ft.Task(name="liked", column="liked")
    training = TrainingConfig(epochs=1, device="cpu")
    trained = ft.fit(ft.GMFConfig(task=task, factors=4), split, training=training, show=False)
    found = make_validation(trained, split)
    assert found is not None
    assert found.level == pytest.approx(0.51)
    beside = found.beside()
    assert beside["counts by item"] == 1.0  # the item decides it
    assert beside["base rate"] == 0.5
    assert trained.log["beside"] == beside
    assert "counts by item" in str(trained.log["advice"])


def test_without_validation_events_nothing_is_said() -> None:
    split = ft.temporal_split(walks(), validation=0.0, test=0.1)
    trained = ft.fit(
        ft.MFConfig(), split, training=TrainingConfig(epochs=1, device="cpu"), show=False
    )
    assert trained.log["validated"] == ""
    assert make_validation(trained, split) is None

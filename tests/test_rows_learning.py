"""From labelled events to a measured ranker: planted tastes, drawn items, early stopping."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import polars as pl
import pytest
import torch
from sklearn.metrics import log_loss, roc_auc_score

import foretaste as ft
from foretaste.data.batch import Queries
from foretaste.data.interactions import Interactions
from foretaste.data.rows import rows_of
from foretaste.data.splits import Split, happened_split
from foretaste.data.tasks import Task
from foretaste.data.vocabulary import Vocabulary
from foretaste.errors import ConfigError, DataError
from foretaste.evaluation.measure_queries import SampledNegatives
from foretaste.evaluation.report import RowsReport
from foretaste.evaluation.rows import evaluate_rows, rows_to_judge
from foretaste.experiment.fit import fit
from foretaste.experiment.learning import make_learning, usual_objective
from foretaste.models.mf import MFConfig
from foretaste.models.neumf import NCF, GMFConfig, NeuMFConfig
from foretaste.models.rankers import SharedBottomConfig
from foretaste.sampling.negatives import RowNegatives, Seen
from foretaste.sampling.samplers import UniformSampler
from foretaste.training.objectives import PairsConfig, RowsConfig
from foretaste.training.settings import TrainingConfig

SHOWN = Task(name="click", column="clicked")


def shown_events(num_users: int = 60, num_items: int = 20, each: int = 30) -> Interactions:
    """Users are shown items; one of an item's own half is clicked with .8, another with .1."""
    draw = np.random.default_rng(0)
    user = np.repeat(np.arange(num_users), each)
    item = draw.integers(0, num_items, len(user))
    same = user % 2 == item % 2
    clicked = draw.random(len(user)) < np.where(same, 0.8, 0.1)
    minutes = np.where(clicked, draw.exponential(np.where(item < 10, 2, 8)), np.nan)
    return Interactions(
        users=Vocabulary(pl.Series(range(num_users), dtype=pl.Int64)),
        items=Vocabulary(pl.Series(range(num_items), dtype=pl.Int64)),
        offsets=np.arange(num_users + 1, dtype=np.int64) * each,
        item_idx=item.astype(np.int32),
        timestamp_s=np.tile(np.arange(each, dtype=np.int64) * 100, num_users) + user,
        columns={
            "clicked": clicked.astype(np.float32),
            "minutes": minutes.astype(np.float32),
        },
    )


EVENTS = shown_events()
SPLIT = ft.temporal_split(EVENTS, validation=0.15, test=0.15)


def settings(**more) -> TrainingConfig:
    return TrainingConfig.model_validate(
        {
            "epochs": 12,
            "batch_events": 256,
            "learning_rate": 0.05,
            "warmup_steps": 0,
            "device": "cpu",
        }
        | more
    )


def trained_on_clicks(**more) -> ft.Trained:
    return fit(
        GMFConfig(task=SHOWN, factors=4),
        SPLIT,
        training=settings(),
        objective=RowsConfig(positive="clicked"),
        show=False,
        **more,
    )


@pytest.fixture(scope="module")
def clicks() -> ft.Trained:
    return trained_on_clicks()


def test_a_ranker_learns_from_labels_what_was_planted(clicks: ft.Trained) -> None:
    # The best prediction of a row is .8 or .1: its AUC is about .85.
    report = evaluate_rows(clicks, SPLIT, resamples=100)
    assert report.metrics["auc"] > 0.75  # chance is .5
    assert report.intervals["auc"].low < report.metrics["auc"] < report.intervals["auc"].high
    assert report.counts["rows"] == (SPLIT.part_E == 2).sum()
    assert report.suffix == ""


def test_the_report_is_scikit_learn_s_of_the_same_rows(clicks: ft.Trained) -> None:
    report = evaluate_rows(clicks, SPLIT, resamples=0)
    test = EVENTS.select(SPLIT.part_E == 2)
    label = test.columns["clicked"]
    np.testing.assert_array_equal(report.label_NT[:, 0], label)
    assert isinstance(clicks.model, NCF)
    queries = Queries(
        user_B=torch.from_numpy(test.user_idx.astype(np.int64)),
        history_N=torch.empty(0, dtype=torch.int64),
        offsets_B1=torch.zeros(len(test) + 1, dtype=torch.int64),
    )
    with torch.inference_mode():
        item_B1 = torch.from_numpy(test.item_idx.astype(np.int64)).unsqueeze(1)
        probability = clicks.model.predict(queries, item_B1)["click"].squeeze(1).numpy()
    np.testing.assert_allclose(report.prediction_NT[:, 0], probability, atol=1e-6)
    found = report.prediction_NT[:, 0]
    assert report.metrics["auc"] == pytest.approx(roc_auc_score(label, found), abs=1e-9)
    assert report.metrics["log_loss"] == pytest.approx(log_loss(label, found), abs=1e-9)


def test_the_auc_of_validation_decides_which_epoch_is_kept(clicks: ft.Trained) -> None:
    values = [epoch["validation"] for epoch in clicks.log["epochs"]]
    best = evaluate_rows(clicks, SPLIT, part="validation", resamples=0)
    assert best.metrics["auc"] == pytest.approx(max(values), abs=1e-12)


def test_histories_and_the_catalogue_hold_only_what_happened(clicks: ft.Trained) -> None:
    assert len(clicks.events) == SPLIT.train.columns["clicked"].sum()
    assert (clicks.events.columns["clicked"] == 1).all()
    happened = happened_split(SPLIT, "clicked")
    assert len(happened.test.target_item) == EVENTS.columns["clicked"][SPLIT.part_E == 2].sum()


def test_one_seed_gives_one_result(clicks: ft.Trained) -> None:
    again = trained_on_clicks()
    for name, value in clicks.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name
    one, two = (evaluate_rows(model, SPLIT, resamples=10) for model in (clicks, again))
    assert one.to_json(per_row=True) == two.to_json(per_row=True)


def happened() -> Split:
    return happened_split(SPLIT, "clicked")


def test_where_only_what_happened_is_known_drawn_zeros_may_decide_instead_of_lists() -> None:
    split = happened()
    asked = RowsConfig(stop_by="rows")
    model = fit(
        GMFConfig(factors=4), split, training=settings(epochs=4), objective=asked, show=False
    )
    best = evaluate_rows(model, split, part="validation", resamples=0).metrics["auc_sampled_4"]
    assert best == pytest.approx(max(e["validation"] for e in model.log["epochs"]), abs=1e-12)


def test_a_quantity_is_judged_by_its_labels_whatever_is_asked() -> None:
    split = happened()
    minutes = Task(name="minutes", kind="regression", column="minutes")
    asked = RowsConfig(stop_by="rows", negatives=0)
    model = fit(
        GMFConfig(task=minutes, factors=4),
        split,
        training=settings(epochs=2),
        objective=asked,
        show=False,
    )
    report = evaluate_rows(model, split, part="validation", resamples=0)
    best = 1 - report.metrics["rmse"] / np.nanstd(report.label_NT)
    assert best == pytest.approx(max(e["validation"] for e in model.log["epochs"]), abs=1e-12)


def test_several_tasks_are_judged_by_their_mean_and_those_of_one_class_have_no_say() -> None:
    tasks = (
        Task(name="minutes", kind="regression", column="minutes"),
        Task(name="clicked", column="clicked"),
        Task(name="there"),
    )

    def judged(stop_by: Literal["usual", "rows"], num: int) -> tuple[RowsReport, float]:
        asked = RowsConfig(stop_by=stop_by, negatives=num)
        model = fit(
            SharedBottomConfig(tasks=tasks, embedding_dim=4),
            SPLIT,
            training=settings(epochs=2),
            objective=asked,
            show=False,
        )
        drawn = SampledNegatives(num=num) if stop_by == "rows" else None
        report = evaluate_rows(model, SPLIT, part="validation", sampled=drawn, resamples=0)
        return report, max(e["validation"] for e in model.log["epochs"])

    def minutes(report: RowsReport) -> float:
        spread = np.nanstd(report.label_NT[:, 0])
        return float(1 - report.metrics[report.name("rmse", "minutes")] / spread)

    report, best = judged("usual", 2)
    two = (minutes(report) + report.metrics["auc_clicked"]) / 2
    assert best == pytest.approx(two, abs=1e-12)
    report, best = judged("rows", 2)
    aucs = sum(report.metrics[f"auc_{name}_sampled_2"] for name in ("clicked", "there"))
    assert best == pytest.approx((minutes(report) + aucs) / 3, abs=1e-12)


def test_where_only_what_happened_is_known_items_are_drawn_and_lists_decide() -> None:
    split = happened()
    model = fit(GMFConfig(factors=4), split, training=settings(epochs=8), show=False)
    assert model.settings["objective"]["kind"] == "rows"
    report = evaluate_rows(model, split, resamples=0)
    assert report.suffix == "_sampled_4"
    assert report.counts["rows"] == 5 * (split.part_E == 2).sum()
    assert report.label_NT.mean() == pytest.approx(0.2, abs=0.03)
    assert report.metrics["auc_sampled_4"] > 0.6
    assert "zeros: 4 items drawn for each row, uniform" in str(report)
    lists = ft.evaluate(model, split.validation, k=(10,), resamples=0)
    best = max(epoch["validation"] for epoch in model.log["epochs"])
    # After training, users are described by their history: similar scores, but not equal ones.
    assert lists.metrics["ndcg_at_10"] == pytest.approx(best, abs=0.03)


def test_zeros_that_training_draws_are_not_drawn_where_the_part_has_its_own() -> None:
    # As in click logs of which only the positives of training were published.
    part_E = np.where((SPLIT.part_E == 0) & (EVENTS.columns["clicked"] == 0), 3, SPLIT.part_E)
    split = Split(kind="given", events=EVENTS, part_E=part_E.astype(np.uint8), rolling=False)
    assert split.train.columns["clicked"].min() == 1
    model = fit(
        GMFConfig(task=SHOWN, factors=4),
        split,
        training=settings(),
        objective=RowsConfig(negatives=2, positive="clicked"),
        show=False,
    )
    report = evaluate_rows(model, split, resamples=0)
    assert report.suffix == ""
    assert report.counts["rows"] == (part_E == 2).sum()
    best = evaluate_rows(model, split, part="validation", resamples=0).metrics["auc"]
    assert best == pytest.approx(max(e["validation"] for e in model.log["epochs"]), abs=1e-12)


def test_more_zeros_are_drawn_on_request_and_named() -> None:
    split = happened()
    model = fit(GMFConfig(factors=4), split, training=settings(epochs=2), show=False)
    sampled = SampledNegatives(num=7, by="popularity")
    report = evaluate_rows(model, split, sampled=sampled, resamples=0)
    assert set(report.metrics) >= {"auc_sampled_7", "gauc_sampled_7"}
    with pytest.raises(ConfigError, match="set sampled_by to uniform"):
        evaluate_rows(model, split, sampled=SampledNegatives(num=7, by="listed"))


def test_a_quantity_is_learned_in_its_own_unit_and_decides_by_its_error() -> None:
    # Minutes have the mean 2 or 8, by the item: the best RMSE is that of two exponentials.
    task = Task(name="minutes", kind="regression", column="minutes")
    model = fit(
        GMFConfig(task=task, factors=4),
        SPLIT,
        training=settings(epochs=30, learning_rate=0.02),
        objective=RowsConfig(positive="clicked"),
        show=False,
    )
    report = evaluate_rows(model, SPLIT, resamples=0)
    assert set(report.metrics) == {"rmse", "mae"}
    label = report.label_NT[~np.isnan(report.label_NT)]
    assert report.metrics["rmse"] < np.sqrt(((label - label.mean()) ** 2).mean())
    assert report.counts["labels_minutes"] < report.counts["rows"]
    judged = evaluate_rows(model, SPLIT, part="validation", resamples=0)
    found = 1 - judged.metrics["rmse"] / np.nanstd(judged.label_NT)
    assert found == pytest.approx(max(e["validation"] for e in model.log["epochs"]), abs=1e-12)


class Killed(Exception):
    pass


def test_a_pretrained_run_that_is_broken_off_resumes_to_the_same_bits(tmp_path: Path) -> None:
    config = NeuMFConfig(factors=4, num_layers=2, pretrain=True)
    split = happened()

    def run(folder: Path | None, *, resume: bool = False, kill_at: int = 0) -> ft.Trained:
        def kill(epoch: ft.training.fit.Epoch) -> None:
            if epoch.epoch == kill_at:
                raise Killed

        return fit(
            config,
            split,
            training=settings(epochs=3, patience=None),
            folder=folder,
            resume=resume,
            on_epoch=kill,
            show=False,
        )

    whole = run(None)
    assert set(whole.log) >= {"gmf", "mlp"}
    with pytest.raises(Killed):
        run(tmp_path, kill_at=2)
    again = run(tmp_path, resume=True)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name


def test_a_pretrained_model_starts_better_than_one_from_scratch() -> None:
    split, losses = happened().refit(), {}  # without validation, each part learns to its end
    for pretrain in (False, True):
        config = NeuMFConfig(factors=4, num_layers=2, pretrain=pretrain)
        model = fit(config, split, training=settings(epochs=6), show=False)
        losses[pretrain] = model.log["epochs"][0]["loss"]
    assert losses[True] < losses[False] - 0.02


def test_parts_have_their_own_epochs_and_what_comes_after_them_its_own_rate() -> None:
    split = happened().refit()
    config = NeuMFConfig(
        factors=4, num_layers=2, pretrain=True, pretrain_epochs=3, fine_tuning=1e-9, alpha=0.25
    )
    model = fit(config, split, training=settings(epochs=1), show=False)
    assert [len(model.log[kind]["epochs"]) for kind in ("gmf", "mlp")] == [3, 3]
    gmf, mlp = (
        fit(part, split, training=settings(epochs=3), show=False).model for part in config.parts()
    )
    _, first = np.unique(split.test.user_Q, return_index=True)  # nothing was done since training
    queries, item = split.test.queries(first), torch.arange(10).expand(len(first), 10)
    both = [part(queries, item)["click"] for part in (gmf, mlp)]
    found = model.model(queries, item)["click"]
    torch.testing.assert_close(found, 0.25 * both[0] + 0.75 * both[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("negatives_from", ["uniform", "popularity"])
@pytest.mark.parametrize("exclude_known", [True, False])
def test_drawn_items_are_none_that_the_user_has_done(
    negatives_from: str, *, exclude_known: bool
) -> None:
    config = RowsConfig.model_validate(
        {"negatives": 3, "negatives_from": negatives_from, "exclude_known": exclude_known}
    )
    train = happened().train
    model = NCF(GMFConfig(factors=2), num_users=60, num_items=20)
    plan = make_learning(model, config, train, batch_events=200, seed=0).plan(0)
    done = set(zip(train.user_idx.tolist(), train.item_idx.tolist(), strict=True))
    found_known = 0
    for index in range(len(plan)):
        batch = plan.batch(index)
        users = batch.queries.user_B.tolist()
        for user, items in zip(users, batch.item_BC.tolist(), strict=True):
            assert items[0] not in items[1:]
            found_known += sum((user, item) in done for item in items[1:])
        assert (batch.label_BCT[:, 0] == 1).all()
        assert (batch.label_BCT[:, 1:] == 0).all()
    assert (found_known == 0) == exclude_known


def test_a_user_who_has_done_everything_gets_a_row_without_zeros() -> None:
    one = Interactions(
        users=Vocabulary(pl.Series([0, 1])),
        items=Vocabulary(pl.Series([0, 1, 2])),
        offsets=np.array([0, 3, 4]),
        item_idx=np.array([0, 1, 2, 0], np.int32),
    )
    draw = RowNegatives(UniformSampler(3), Seen.of(one))
    user, item = torch.tensor([0, 1]), torch.tensor([1, 0])
    drawn = draw(user, item, 5, generator=torch.Generator().manual_seed(0))
    assert drawn[0].tolist() == [1] * 5
    assert set(drawn[1].tolist()) == {1, 2}
    only = RowNegatives(UniformSampler(1), None)
    drawn = only(torch.tensor([0]), torch.tensor([0]), 2, generator=torch.Generator())
    assert drawn.tolist() == [[0, 0]]


def test_what_cannot_be_learned_or_measured_is_refused() -> None:
    always = Task(name="click", column="one")
    columns = {"one": np.ones(len(EVENTS), np.float32)}
    split = Split(
        kind=SPLIT.kind,
        events=Interactions(
            users=EVENTS.users,
            items=EVENTS.items,
            offsets=EVENTS.offsets,
            item_idx=EVENTS.item_idx,
            timestamp_s=EVENTS.timestamp_s,
            columns=columns,
        ),
        part_E=SPLIT.part_E,
        rolling=True,
    )
    with pytest.raises(DataError, match="'click' has one class only"):
        fit(GMFConfig(task=always), split, training=settings(), show=False)
    with pytest.raises(ConfigError, match=r"negatives_from is 'retriever'.*candidates="):
        fit(
            GMFConfig(),
            happened(),
            training=settings(),
            objective=RowsConfig(negatives_from="retriever"),
            show=False,
        )
    with pytest.raises(ConfigError, match="NCF learns by 'rows'"):
        fit(GMFConfig(), happened(), training=settings(), objective=PairsConfig(), show=False)
    lists = fit(MFConfig(embedding_dim=4), happened(), training=settings(epochs=1), show=False)
    with pytest.raises(ConfigError, match="MF predicts no labels"):
        evaluate_rows(lists, happened())


def test_a_ranker_learns_by_rows_by_default() -> None:
    assert isinstance(usual_objective(GMFConfig()), RowsConfig)


def test_rows_are_judged_from_what_came_before_them(clicks: ft.Trained) -> None:
    rows, notes, suffix = rows_to_judge(clicks, SPLIT, part="test")
    assert suffix == ""
    assert "the weights as training left them" in notes[0]
    same = rows_of(SPLIT, "test", tasks=(SHOWN,), positive="clicked")
    np.testing.assert_array_equal(rows.end_E, same.end_E)
    assert not math.isnan(rows.label_ET.sum())


def test_a_label_in_another_unit_gives_every_user_the_same_list() -> None:
    rows: list[list[list[object]]] = []
    for unit in (1.0, 1 / 60, 60_000.0):  # minutes, hours, milliseconds
        events = shown_events(num_users=30)
        columns = {name: values.copy() for name, values in events.columns.items()}
        columns["minutes"] *= np.float32(unit)
        split = ft.temporal_split(replace(events, columns=columns), validation=0.15, test=0.15)
        watched = Task(name="watched", kind="regression", column="minutes")
        config = SharedBottomConfig(tasks=(SHOWN, watched), embedding_dim=4, bottom_hidden=(8,))
        trained = fit(
            config,
            split,
            training=settings(epochs=3),
            objective=RowsConfig(positive="clicked"),
            show=False,
        )
        recommender = ft.build_recommender(trained)
        rows.append(
            [
                [row.item_id for row in recommender.recommend(user, k=5).rows]
                for user in events.users.ids.to_list()
            ]
        )
    assert rows[0] == rows[1] == rows[2]
    assert len({tuple(items) for items in rows[0]}) > 1

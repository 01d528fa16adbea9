"""Candidates that retrievers find for held-out rows, and a ranker trained on them."""

from dataclasses import replace
from math import log

import numpy as np
import polars as pl
import pytest
import torch
from torch import Tensor

import foretaste as ft
from foretaste.data.batch import Queries, RowBatch
from foretaste.data.plans import Offered
from foretaste.data.splits import TRAIN
from foretaste.data.tasks import Task
from foretaste.errors import ConfigError, DataError
from foretaste.experiment.mining import Fold, fit_folds, offer
from foretaste.losses import listwise_loss
from foretaste.models.base import Ranker
from foretaste.models.layers.heads import Heads
from foretaste.training.objectives import LabelledRows, RowsConfig


def planted_split() -> ft.Split:
    """Users do six of the eight items of one of five groups, one after the other."""
    rng = np.random.default_rng(0)
    rows = [
        (user, 8 * (user % 5) + item, 1_000 * place + user, item % 2)
        for user in range(60)
        for place, item in enumerate(rng.permutation(8)[:6].tolist())
    ]
    events = ft.read_interactions(
        pl.DataFrame(rows, schema=["user", "item", "timestamp", "liked"], orient="row"),
        user="user",
        item="item",
        timestamp="timestamp",
        columns=("liked",),
    )
    return ft.temporal_split(events, validation=0.1, test=0.2)


SPLIT = planted_split()
EASE = ft.EASEConfig(l2=1.0)
FROM_RETRIEVER = RowsConfig(negatives=3, negatives_from="retriever")


@pytest.fixture(scope="module")
def folds() -> tuple[Fold, ...]:
    return fit_folds(lambda part: ft.fit(EASE, part), SPLIT, 3, seed=0)


def test_the_rows_own_item_is_distinguished_from_the_others() -> None:
    # e^ln2 / (e^ln2 + 1 + 1) = 1/2; one of the two hidden: 2/3; a hidden own counts all the same
    logit_BC = torch.tensor([[log(2.0), 0.0, 0.0]])
    none, last, own = (
        torch.tensor([[a, False, b]]) for a, b in ((False, False), (False, True), (True, False))
    )
    assert listwise_loss(logit_BC, none).item() == pytest.approx(log(2))
    assert listwise_loss(logit_BC, last).item() == pytest.approx(log(3 / 2))
    assert listwise_loss(logit_BC, own).item() == pytest.approx(log(2))
    assert listwise_loss(logit_BC + 7, none).item() == pytest.approx(log(2))


class Silent(Ranker):
    """A ranker that scores everything 0."""

    tasks = (Task(name="click"),)
    heads = Heads((Task(name="click"),))

    def forward(self, queries: Queries, item_BC: Tensor) -> dict[str, Tensor]:
        return {"click": torch.zeros(item_BC.shape)}


def test_the_retrievers_say_is_added_to_the_rankers_while_it_learns() -> None:
    batch = RowBatch(
        queries=Queries.of_histories([[]]),
        item_BC=torch.tensor([[1, 2]]),
        label_BCT=torch.tensor([[[1.0], [0.0]]]),
        first_BC=torch.tensor([[log(3.0), 0.0]]),
    )
    objective = LabelledRows(RowsConfig(), Silent.tasks, {})
    assert objective(Silent(), batch).item() == pytest.approx(log(4 / 3))
    # without the retriever's score, each label by itself: ln 2
    assert objective(Silent(), replace(batch, first_BC=None)).item() == pytest.approx(log(2))


def test_a_fold_has_every_row_of_its_users_and_its_retriever_none(folds: tuple[Fold, ...]) -> None:
    events = SPLIT.train
    assert sorted(np.concatenate([fold.row_E for fold in folds])) == list(range(len(events)))
    for fold in folds:
        users = np.unique(events.user_idx[fold.row_E])
        assert not np.isin(fold.retriever.events.user_idx, users).any()
        assert len(fold.retriever.events) == len(events) - len(fold.row_E)


def test_no_held_out_event_is_offered_to_anybody_as_training() -> None:
    seen: list[ft.Split] = []

    def remember(part: ft.Split) -> ft.Trained:
        seen.append(part)
        return ft.fit(EASE, part)

    fit_folds(remember, SPLIT, 2, seed=1)
    held_E = SPLIT.part_E != TRAIN
    for part in seen:
        assert (part.part_E[held_E] == SPLIT.part_E[held_E]).all()


def test_each_row_is_offered_what_its_retriever_finds_best_after_its_history(
    folds: tuple[Fold, ...],
) -> None:
    offered = offer(folds, SPLIT, FROM_RETRIEVER, num=10, weight=2.0, seed=0)
    events, asked = SPLIT.train, set(offered.asked.tolist())
    assert 0 < len(asked) < len(events)
    for fold in folds:
        score = fold.retriever.scorer(exclude_seen=True)
        for row in fold.row_E[::5].tolist():
            start = events.offsets[events.user_idx[row]]
            past = events.item_idx[start:row].astype(int).tolist()
            score_I = score(Queries.of_histories([past]))[0]
            own = int(events.item_idx[row])
            best = sorted(range(len(score_I)), key=lambda item: (-float(score_I[item]), item))[:10]
            assert (row in asked) == (own in best)
            expected = {item: 2 * float(score_I[item]) for item in best if item != own}
            real_T = offered.item_ET[row] >= 0
            got = dict(
                zip(
                    offered.item_ET[row][real_T].tolist(),
                    offered.first_ET[row][real_T].tolist(),
                    strict=True,
                )
            )
            assert got == pytest.approx(expected, abs=1e-5)
            if own in best:
                assert float(offered.own_E[row]) == pytest.approx(2 * float(score_I[own]), abs=1e-5)


def test_any_items_are_others_than_the_best_for_the_same_rows(folds: tuple[Fold, ...]) -> None:
    best, anything = (
        offer(folds, SPLIT, FROM_RETRIEVER.model_copy(update=changes), num=10, weight=1.0, seed=0)
        for changes in ({}, {"negatives_from": "uniform"})
    )
    torch.testing.assert_close(best.own_E, anything.own_E, equal_nan=True)
    group_E = torch.from_numpy(SPLIT.train.item_idx // 8)
    later_E = torch.from_numpy(SPLIT.train.timestamp_s >= 3_000)

    def share_of_own_group(offered: Offered) -> float:
        item_ET = offered.item_ET[later_E]
        same_ET = item_ET.div(8, rounding_mode="floor") == group_E[later_E].unsqueeze(1)
        return float((same_ET & (item_ET >= 0)).sum() / (item_ET >= 0).sum())

    # the ten best hold the 2 to 4 of the group that are left beside the own; by chance one in 9 is
    assert share_of_own_group(best) > 2 * share_of_own_group(anything)
    for row in range(0, len(SPLIT.train), 7):
        start = SPLIT.train.offsets[SPLIT.train.user_idx[row]]
        done = set(SPLIT.train.item_idx[start : row + 1].tolist())
        assert not done & set(anything.item_ET[row].tolist())


def test_what_is_drawn_keeps_its_score_and_comes_once() -> None:
    offered = Offered(
        item_ET=torch.tensor([[4, 5, 6, 7], [8, -1, 9, -1]], dtype=torch.int32),
        first_ET=torch.tensor([[4.0, 5.0, 6.0, 7.0], [8.0, 0.0, 9.0, 0.0]]),
        own_E=torch.tensor([1.0, torch.nan]),
    )
    assert offered.asked.tolist() == [0]
    drawn = offered.draw(
        torch.tensor([0, 1]), torch.tensor([1, 2]), 3, generator=torch.Generator().manual_seed(0)
    )
    assert len(set(drawn.item_BN[0].tolist())) == 3
    assert drawn.first_BC[0].tolist() == [1.0, *drawn.item_BN[0].float().tolist()]
    assert sorted(drawn.item_BN[1].tolist()) == [2, 8, 9]  # its own where nothing is left


def test_a_model_in_two_stages_learns_by_folds() -> None:
    config = ft.TwoStageConfig(
        retriever=EASE, ranker=ft.NeuMFConfig(factors=4), candidates=10, retriever_weight=2.0
    )
    training = ft.TrainingConfig(
        epochs=3, batch_events=64, learning_rate=0.01, warmup_steps=5, device="cpu"
    )
    first = ft.FirstStage(folds=2)
    trained, again = (
        ft.fit(config, SPLIT, training=training, first_stage=first, show=False) for _ in range(2)
    )
    # of 40 items a user has 6 done at most, and 2 to 4 of the group are left: .09 by chance
    assert ft.evaluate(trained, SPLIT.test, k=(3,)).metrics["hit_rate_at_3"] > 0.4
    state = again.model.state_dict()
    for name, tensor in trained.model.state_dict().items():
        assert torch.equal(tensor, state[name]), name


@pytest.mark.parametrize(
    "objective", [RowsConfig(negatives_from="popularity"), RowsConfig(positive="liked")]
)
def test_nothing_is_offered_where_it_would_mean_nothing(
    folds: tuple[Fold, ...], objective: RowsConfig
) -> None:
    with pytest.raises(ConfigError, match="folds offers each row"):
        offer(folds, SPLIT, objective, num=10, weight=1.0, seed=0)


def test_a_ranker_of_labels_learns_from_no_offer(folds: tuple[Fold, ...]) -> None:
    offered = offer(folds, SPLIT, FROM_RETRIEVER, num=10, weight=1.0, seed=0)
    candidates = ft.Candidates(retriever=folds[0].retriever, offered=offered)
    ranker = ft.DINConfig(task=Task(name="like", column="liked"))
    with pytest.raises(ConfigError, match="folds is for a ranker of one task"):
        ft.fit(ranker, SPLIT, objective=FROM_RETRIEVER, candidates=candidates, show=False)


def test_one_fold_is_none_and_rows_without_candidates_are_named(folds: tuple[Fold, ...]) -> None:
    with pytest.raises(ConfigError, match="folds"):
        ft.FirstStage(folds=1)
    nobody = tuple(replace(fold, row_E=fold.row_E[:0]) for fold in folds)
    with pytest.raises(DataError, match=r"raise model\.candidates"):
        offer(nobody, SPLIT, FROM_RETRIEVER, num=10, weight=1.0, seed=0)

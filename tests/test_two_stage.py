"""Two stages: a retriever's candidates in a ranker's order, offline and served alike."""

import json
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from torch import Tensor

import foretaste as ft
from foretaste.data.batch import DrawItems, Queries
from foretaste.data.interactions import Interactions
from foretaste.data.rows import rows_of
from foretaste.data.tasks import Task
from foretaste.errors import ConfigError, DataError, NonFiniteError
from foretaste.evaluation.rows import ranker_of
from foretaste.experiment.mining import best_unseen, candidate_negatives
from foretaste.models import catalogue as module
from foretaste.models.base import Model, Ranker, Scorer
from foretaste.models.baselines import EASEConfig, ItemKNNConfig, Popularity
from foretaste.models.catalogue import (
    ModelConfig,
    TwoStage,
    TwoStageConfig,
    below,
    build_model,
    judge,
)
from foretaste.models.layers.heads import Heads
from foretaste.models.neumf import NeuMFConfig
from foretaste.models.sasrec import SASRecConfig
from foretaste.sampling.negatives import MixedNegatives
from foretaste.serving.bundle import Bundle
from foretaste.serving.catalogue_search import Stages
from foretaste.serving.messages import RecommendReply, RecommendRequest
from foretaste.serving.metrics import Metrics
from foretaste.serving.recommender import Recommender
from foretaste.serving.service import Service
from foretaste.serving.settings import ServerSettings
from foretaste.serving.slot import ModelSlot
from foretaste.serving.state import open_live_events
from foretaste.serving.versions import Versions
from foretaste.training.trained import Trained
from tests.worlds import SILENT_USER, make_events, make_trained


class Wanted(Ranker):
    """A ranker with two tasks whose numbers are given for each item."""

    def __init__(self, click_I: list[float], buy_I: list[float]) -> None:
        super().__init__()
        self.tasks = (Task(name="click"), Task(name="buy", column="buy"))
        self.heads = Heads(self.tasks)
        self.raw_TI = torch.tensor([click_I, buy_I])

    def forward(self, queries: Queries, item_BC: Tensor) -> dict[str, Tensor]:
        assert len(queries) == len(item_BC)
        return self.heads({"click": self.raw_TI[0][item_BC], "buy": self.raw_TI[1][item_BC]})


class WantedAlone(Wanted, Scorer):
    """A ranker that can score the whole catalogue, too."""

    def score(self, queries: Queries) -> Tensor:
        item_BI = torch.arange(self.raw_TI.shape[1]).expand(len(queries), -1)
        return self.heads.order(self(queries, item_BI))


class Fixed(Scorer):
    """A catalogue scorer with the same scores for every user."""

    def __init__(self, score_I: list[float]) -> None:
        super().__init__()
        self.score_I = torch.tensor(score_I)

    def score(self, queries: Queries) -> Tensor:
        return self.score_I.expand(len(queries), -1)


def joined(
    first_I: list[float], click_I: list[float], buy_I: list[float], num_candidates: int
) -> TwoStage:
    return TwoStage(Fixed(first_I), Wanted(click_I, buy_I), num_candidates=num_candidates)


NOBODY = Queries.of_histories([[]])
FIRST = [9.0, 8.0, 7.0, 6.0, 5.5]
CLICK = [-3.0, 0.0, 1.0, 2.0, 4.0]
BUY = [3.0, 0.0, -1.0, 0.0, 5.0]


def test_candidates_have_the_rankers_order_and_the_others_below_the_retrievers() -> None:
    # sigmoid(click) + sigmoid(buy): .047 + .953 = 1 for item 0, .5 + .5 = 1 for item 1,
    # .731 + .269 = 1 for item 2; with item 3, .881 + .5, four candidates are enough to tell
    model = joined(FIRST, CLICK, BUY, 4)
    score_1I = model.rerank(NOBODY, torch.tensor([FIRST]))
    torch.testing.assert_close(
        score_1I[0, :4], torch.tensor([1.0, 1.0, 1.0, 1.3808]), rtol=1e-4, atol=1e-4
    )
    assert score_1I[0, 4] < 1.0  # the ranker would have put it first, but was not asked
    only_one = joined(FIRST, CLICK, BUY, 1).rerank(NOBODY, torch.tensor([FIRST]))
    assert only_one.argsort(descending=True).tolist() == [[0, 1, 2, 3, 4]]


def test_with_all_items_as_candidates_the_retriever_has_no_say() -> None:
    one, other = (
        joined(first, CLICK, BUY, 5).rerank(NOBODY, torch.tensor([first]))
        for first in (FIRST, [0.0, 1.0, 0.0, 0.0, 3.0])
    )
    torch.testing.assert_close(one, other)


def test_what_may_not_be_answered_is_no_candidate_and_stays_out() -> None:
    first_1I = torch.tensor([[-torch.inf, 8.0, 7.0, 6.0, 5.5]])
    score_1I = joined(FIRST, CLICK, BUY, 2).rerank(NOBODY, first_1I)
    assert score_1I[0, 0] == -torch.inf
    assert score_1I[0].argsort(descending=True).tolist()[2:] == [3, 4, 0]
    none = joined(FIRST, CLICK, BUY, 2).rerank(NOBODY, torch.full((1, 5), -torch.inf))
    assert none.isneginf().all()


def test_scores_below_keep_the_retrievers_distances() -> None:
    # lowest candidate 2.0: the best of the others gets 1.0, and one 0.25 behind it 0.75
    got = below(torch.tensor([[5.0, 2.0, -torch.inf]]), torch.tensor([[-1.25, -1.0, -torch.inf]]))
    assert got.tolist() == [[0.75, 1.0, -torch.inf]]


def test_a_ranker_asked_in_blocks_says_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    events = make_events()
    ranker = made_ranker(events)
    queries = Queries.of_histories([[0, 1], [], [3, 4, 5], [2]])
    item_BC = torch.randint(20, (4, 7), generator=torch.Generator().manual_seed(0))
    whole = judge(ranker, queries, item_BC)
    for pairs in (1, 3, 7, 15):
        monkeypatch.setattr(module, "_BLOCK_PAIRS", pairs)
        parts = judge(ranker, queries, item_BC)
        torch.testing.assert_close(parts.score_BC, whole.score_BC)
        torch.testing.assert_close(parts.prediction, whole.prediction)


def test_a_broken_ranker_is_named() -> None:
    model = joined(FIRST, [float("nan"), *CLICK[1:]], BUY, 5)
    with pytest.raises(NonFiniteError, match="ranker is broken"):
        model.rerank(NOBODY, torch.tensor([FIRST]))


def test_only_a_ranker_ranks_and_only_what_scores_a_catalogue_finds() -> None:
    with pytest.raises(ConfigError, match="Fixed is not a ranker"):
        TwoStage(Fixed(FIRST), Fixed(FIRST), num_candidates=2)
    with pytest.raises(ConfigError, match="Wanted cannot score a catalogue"):
        TwoStage(Wanted(CLICK, BUY), Wanted(CLICK, BUY), num_candidates=2)


def made_ranker(events: Interactions) -> Model:
    torch.manual_seed(3)
    ranker = build_model(
        NeuMFConfig(factors=4, init_std=0.5), num_users=events.num_users, num_items=events.num_items
    ).eval()
    ranker.begin(events)
    ranker.learn_new_users(events)
    return ranker


RETRIEVERS: dict[str, ModelConfig] = {
    "sasrec, behind an index": SASRecConfig(embedding_dim=8, num_blocks=1, num_heads=2, max_len=10),
    "ease, without vectors": EASEConfig(l2=1.0),
    "item_knn, with many ties": ItemKNNConfig(neighbours=3),
}


@pytest.fixture(params=RETRIEVERS)
def trained(request: pytest.FixtureRequest) -> Trained:
    return make_two_stage(RETRIEVERS[request.param])


def make_two_stage(retriever: ModelConfig, *, retriever_weight: float = 0.0) -> Trained:
    events = make_events()
    config = TwoStageConfig(
        retriever=retriever,
        ranker=NeuMFConfig(factors=4, init_std=0.5),
        candidates=6,
        retriever_weight=retriever_weight,
    )
    torch.manual_seed(0)
    model = build_model(config, num_users=events.num_users, num_items=events.num_items).eval()
    assert isinstance(model, TwoStage)
    model.ranker = made_ranker(events)
    if model.retriever.learns_by == "events":
        model.retriever.learn(events)
    return Trained(config=config, model=model, events=events, seed=0)


@torch.inference_mode()
def offline(trained: Trained, user_idx: int, history: list[int]) -> Tensor:
    queries = replace(Queries.of_histories([history]), user_B=torch.tensor([user_idx]))
    return trained.scorer(exclude_seen=True)(queries)[0]


@pytest.mark.parametrize("k", [3, 10])
def test_with_a_say_of_the_retriever_served_answers_are_the_offline_scores_too(k: int) -> None:
    trained = make_two_stage(EASEConfig(l2=1.0), retriever_weight=2.0)
    assert isinstance(trained.model, TwoStage)
    recommender = ft.build_recommender(trained)
    past = trained.events.history(7).astype(int).tolist()
    expected_I = offline(trained, 7, past)
    got = [row.score for row in recommender.recommend(107, k=k).rows]
    assert got == pytest.approx(expected_I.topk(k).values.tolist(), abs=1e-6)
    # by hand: the ranker's score plus twice the retriever's
    queries = replace(Queries.of_histories([past]), user_B=torch.tensor([7]))
    best = int(expected_I.argmax())
    with torch.inference_mode():
        first = trained.model.retriever.score(queries)[0, best]
        own = judge(trained.model.ranker, queries, torch.tensor([[best]])).score_BC[0, 0]
    assert float(expected_I[best]) == pytest.approx(float(own + 2 * first), abs=1e-6)
    # weights in a request replace the settings
    weighed = recommender.recommend(107, k=k, weights={"click": 3.0}).rows
    for row in weighed[:6]:
        assert row.score == pytest.approx(3 * row.predictions["click"], abs=1e-6)


@pytest.mark.parametrize("k", [3, 6, 10])
def test_served_answers_are_the_offline_scores_of_the_same_bundle(
    trained: Trained, tmp_path: Path, k: int
) -> None:
    ft.build_recommender(trained).save(tmp_path / "bundle")
    recommender = ft.load(tmp_path / "bundle")
    for user in (0, 7, 21):
        past = recommender.trained.events.history(user).astype(int).tolist()
        expected_I = offline(recommender.trained, user, past)
        answer = recommender.recommend(100 + user, k=k)
        got = [(int(row.item_id) - 500, row.score) for row in answer.rows]
        assert len(got) == k
        assert answer.source == "model"
        for item_idx, score in got:
            assert score == pytest.approx(float(expected_I[item_idx]), abs=1e-6)
        assert [score for _, score in got] == pytest.approx(
            expected_I.topk(k).values.tolist(), abs=1e-6
        )
    # a new user, by a given history
    expected_I = offline(recommender.trained, -1, [1, 4])
    answer = recommender.recommend("new", history=[501, 504], k=k)
    assert [row.score for row in answer.rows] == pytest.approx(
        expected_I.topk(k).values.tolist(), abs=1e-6
    )


def test_lists_in_bulk_are_the_single_answers(trained: Trained) -> None:
    recommender = ft.build_recommender(trained)
    table = recommender.recommend_many([100, 107, "nobody"], k=4)
    assert table["source"].to_list() == ["model", "model", "popular"]
    for row, user_id in enumerate([100, 107]):
        single = recommender.recommend(user_id, k=4)
        assert table["item_id"][row].to_list() == [r.item_id for r in single.rows]
        assert table["score"][row].to_list() == pytest.approx(
            [r.score for r in single.rows], abs=1e-6
        )


def test_denied_items_leave_room_for_further_candidates(trained: Trained) -> None:
    # six candidates, and the first list's six items denied: six others are ranked
    recommender = ft.build_recommender(trained)
    first = recommender.recommend(100, k=6)
    again = recommender.recommend(100, k=6, deny=[row.item_id for row in first.rows])
    assert not {row.item_id for row in first.rows} & {row.item_id for row in again.rows}
    assert all(row.predictions for row in again.rows)


def test_rules_come_last_and_rows_keep_what_is_predicted_of_them(
    trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("foretaste.serving.rule_book.FIRST", 2)
    recommender = ft.build_recommender(trained)
    best = recommender.recommend(100, k=1).rows[0]
    told = ft.Condition(none_of=str(best.attributes["title"]))
    asked: list[int] = []
    find = recommender._search._find
    monkeypatch.setattr(recommender._search, "_find", lambda *a: asked.append(a[1]) or find(*a))
    ruled = recommender.recommend(
        100, k=3, rules=ft.Rules(where={"title": told}, caps={"title": 1})
    )
    assert asked == [6]  # as many candidates as ever, and once
    assert ruled.rows == recommender.recommend(100, k=3, deny=[best.item_id]).rows
    assert all(row.predictions for row in ruled.rows)
    assert "rules" in ruled.seconds
    by_title = ft.Rules(diversity=ft.Diversity(relevance=0.5, pool=4, by=("title",)))
    assert (
        recommender.recommend(100, k=12, rules=by_title).rows
        == recommender.recommend(100, k=12).rows
    )


def test_a_row_says_what_is_predicted_and_one_that_was_not_ranked_says_nothing(
    trained: Trained,
) -> None:
    rows = ft.build_recommender(trained).recommend(100, k=8).rows
    for row in rows[:6]:
        assert row.predictions == {"click": pytest.approx(1 / (1 + np.exp(-row.score)), abs=1e-6)}
    assert [row.predictions for row in rows[6:]] == [{}, {}]


def test_an_explanation_is_the_rankers(trained: Trained) -> None:
    recommender = ft.build_recommender(trained)
    history = [500, 503, 507]
    rows = recommender.recommend(history=history, k=3).rows
    item_ids = [int(row.item_id) for row in rows]
    model = recommender.trained.model
    assert isinstance(model, TwoStage)
    item_T = torch.tensor([[item - 500 for item in item_ids]])

    @torch.inference_mode()
    def score(past: list[int]) -> Tensor:
        queries = Queries.of_histories([[item - 500 for item in past]])
        return judge(model.ranker, queries, item_T).score_BC[0]

    drop_CT = torch.stack([score(history) - score([i for i in history if i != h]) for h in history])
    expected = [
        history[int(drop.argmax())] if float(drop.max()) > 0 else None for drop in drop_CT.T
    ]
    assert list(recommender.explain_many(history, item_ids)) == expected


@pytest.mark.parametrize(
    "ranker",
    [
        ft.DINConfig(embedding_dim=4, max_len=4, init_std=1.0),
        ft.MMoEConfig(embedding_dim=4, max_len=4, init_std=1.0, pooling="attention"),
        ft.SharedBottomConfig(embedding_dim=4, max_len=4, init_std=1.0, pooling="attention"),
    ],
    ids=lambda ranker: ranker.kind,
)
def test_the_reason_is_the_event_that_the_ranker_attends_to_most(
    ranker: ft.DINConfig | ft.MMoEConfig | ft.SharedBottomConfig,
) -> None:
    events = make_events()
    torch.manual_seed(0)
    config = TwoStageConfig(retriever=EASEConfig(l2=1.0), ranker=ranker, candidates=6)
    model = build_model(config, num_users=events.num_users, num_items=events.num_items).eval()
    assert isinstance(model, TwoStage)
    model.retriever.learn(events)
    recommender = ft.build_recommender(Trained(config=config, model=model, events=events, seed=0))
    # 501 is there twice, so its weights are added; 509 and 510 are older than the four events read
    history = [509, 510, 501, 502, 503, 501]
    item_ids = [501, 503, 505, 508, 511]
    item_1T = torch.tensor([[item - 500 for item in item_ids]])
    past = Queries.of_histories([[item - 500 for item in history]])
    with torch.inference_mode():
        weight_TL = model.ranker.attention_weights(past, item_1T)[0]
    expected = []
    for item, weight_L in zip(item_ids, weight_TL.tolist(), strict=True):
        by_item = {501: weight_L[0] + weight_L[3], 502: weight_L[1], 503: weight_L[2]}
        by_item.pop(item, None)
        expected.append(max(by_item, key=lambda reason: by_item[reason]))
    assert list(recommender.explain_many(history, item_ids)) == expected
    assert len(set(expected)) > 1


def two_tasks(num_candidates: int | None) -> Recommender:
    """Four items of training, in two stages, or by the ranker alone."""
    trained = make_trained("popularity")
    rng = np.random.default_rng(0)
    num_items = trained.events.num_items
    click_I, buy_I = rng.normal(size=(2, num_items)).tolist()
    model: Model = WantedAlone(click_I, buy_I)
    if num_candidates is not None:
        ranker = Wanted(click_I, buy_I)
        model = TwoStage(trained.model, ranker, num_candidates=num_candidates)
    trained = replace(trained, model=model.eval())
    popular_I = torch.from_numpy(trained.events.item_count).float()
    return Recommender(
        Bundle(trained=trained, popular_I=popular_I.masked_fill(popular_I == 0, -torch.inf))
    )


@pytest.mark.parametrize("num_candidates", [None, 20])
def test_weights_of_a_request_order_the_list_by_the_sum_of_predictions(
    num_candidates: int | None,
) -> None:
    recommender = two_tasks(num_candidates)
    for weights in ({"click": 1.0, "buy": 5.0}, {"buy": 1.0}, {"click": 2.0, "buy": -1.0}):
        rows = recommender.recommend(100, k=30, weights=weights).rows
        sums = [sum(w * row.predictions[n] for n, w in weights.items()) for row in rows]
        assert [row.score for row in rows] == pytest.approx(sums, abs=1e-6)
        assert sums == sorted(sums, reverse=True)
        assert len(rows) == 20 - len(recommender.trained.events.history(0))
    usual = recommender.recommend(100, k=30)
    assert usual.rows == recommender.recommend(100, k=30, weights={"click": 1, "buy": 1}).rows


def test_weights_of_no_task_are_refused_by_name() -> None:
    recommender = two_tasks(4)
    with pytest.raises(DataError, match="'bye' is not a task; this model's are click, buy"):
        recommender.recommend(100, weights={"bye": 1.0})
    with pytest.raises(ft.ConfigError, match="must be a number for 'buy', not nan"):
        recommender.recommend(100, weights={"buy": float("nan")})
    with pytest.raises(DataError, match="all are 0"):
        recommender.recommend(100, weights={"buy": 0})
    one_stage = ft.build_recommender(make_trained("ease"))
    with pytest.raises(DataError, match="this model has none"):
        one_stage.recommend(100, weights={"click": 1})


def test_the_prediction_of_a_held_out_row_is_served_for_its_context(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    num = 900
    events = ft.read_interactions(
        pl.DataFrame(
            {
                "user": rng.integers(30, size=num),
                "item": rng.integers(40, size=num),
                "timestamp": np.arange(num),
                "hour": rng.choice(["morning", "noon", "night"], size=num),
            }
        ),
        user="user",
        item="item",
        timestamp="timestamp",
        context=("hour",),
    )
    split = ft.temporal_split(events, validation=0.1, test=0.1)
    schema = ft.FeatureSchema(context={"hour": ft.CategoricalField()})
    trained = ft.fit(
        TwoStageConfig(
            retriever=ItemKNNConfig(),
            ranker=ft.DINConfig(embedding_dim=4, hidden=(8,), init_std=0.5),
            candidates=40,
        ),
        split,
        features=schema,
        training=SHORT.model_copy(update={"epochs": 2}),
        show=False,
    )
    ft.build_recommender(trained).save(tmp_path / "bundle")
    recommender = ft.load(tmp_path / "bundle")
    ranker = ranker_of(recommender.trained)
    rows = rows_of(split, "test", tasks=ranker.tasks, features=recommender.trained.features)
    batch = rows.batch(rows.every, max_len=10_000)
    with torch.inference_mode():
        expected_B = ranker.predict(batch.queries, batch.item_BC)["click"][:, 0]
    seen = 0
    for row in range(len(rows)):
        past = batch.queries.part(row, row + 1).history_N
        user_idx, item_idx = int(batch.queries.user_B[row]), int(batch.item_BC[row, 0])
        since_training = past[len(recommender.trained.events.history(user_idx)) :]
        answer = recommender.recommend(
            events.users.ids[user_idx],
            history=events.items.ids.gather(since_training.tolist()).to_list(),
            context={"hour": rows.events.context["hour"][row]},
            allow=[events.items.ids[item_idx]],
            exclude_seen=False,
        )
        (found,) = answer.rows
        assert found.predictions["click"] == pytest.approx(float(expected_B[row]), abs=1e-6)
        seen += len(since_training) > 0
    assert seen > 10
    user = events.users.ids[0]
    noon, night = (recommender.recommend(user, context={"hour": h}) for h in ("noon", "night"))
    assert [row.score for row in noon.rows] != [row.score for row in night.rows]
    with pytest.raises(DataError, match=r"'our' is not a feature of the context; .*mean 'hour'"):
        recommender.recommend(user, context={"our": "noon"})


def test_the_time_of_each_stage_is_its_own() -> None:
    ticks = iter([0.0, 1.0, 10.0, 10.5, 20.0, 22.0])
    stages = Stages(clock=lambda: next(ticks))
    with stages.timed("search"):
        pass
    with stages.timed("rank"):
        pass
    with stages.timed("search"):
        pass
    assert stages.seconds == {"search": 3.0, "rank": 0.5}
    answer = two_tasks(4).recommend(100, k=3)
    assert set(answer.seconds) == {"search", "rank"}
    assert not two_tasks(4).recommend(k=3).seconds


def test_a_measured_model_leaves_seen_items_out_before_it_chooses_candidates() -> None:
    # with one candidate, and the retriever's best item seen by everybody, the second best would
    # get no judgement if the seen one took its place
    events = make_events()
    count_I = events.item_count.astype(float)
    best = int(count_I.argmax())
    seen = Queries.of_histories([[best]])
    model = TwoStage(
        Fixed(count_I.tolist()),
        Wanted([100.0] * len(count_I), [0.0] * len(count_I)),
        num_candidates=1,
    )
    trained = Trained(config=EASEConfig(), model=model, events=events, seed=0)
    score_I = trained.scorer(exclude_seen=True)(seen)[0]
    assert score_I[best] == -torch.inf
    assert score_I.max() == pytest.approx(1.5)  # the candidate's sigmoid(100) + sigmoid(0)
    assert trained.scorer()(seen)[0].argmax() == best


def test_a_part_of_a_block_is_the_same_users() -> None:
    queries = Queries.of_histories([[0, 1], [], [3, 4, 5], [2]])
    part = queries.part(1, 3)
    assert part.history_N.tolist() == [3, 4, 5]
    assert part.offsets_B1.tolist() == [0, 0, 3]
    assert len(queries.part(3, 9)) == 1


def planted_split() -> ft.Split:
    """Users do six of the eight items of one of five groups, one after the other."""
    rng = np.random.default_rng(0)
    rows = [
        (user, 8 * (user % 5) + item, 1_000 * user + place)
        for user in range(100)
        for place, item in enumerate(rng.permutation(8)[:6].tolist())
    ]
    events = ft.read_interactions(
        pl.DataFrame(rows, schema=["user", "item", "timestamp"], orient="row"),
        user="user",
        item="item",
        timestamp="timestamp",
    )
    return ft.leave_last_split(events)


SPLIT = planted_split()
PLANTED = TwoStageConfig(
    retriever=ft.MFConfig(embedding_dim=8, init="random"),
    ranker=NeuMFConfig(factors=4),
    candidates=10,
)
SHORT = ft.TrainingConfig(
    epochs=15, batch_events=64, learning_rate=0.05, warmup_steps=5, device="cpu"
)


def fitted(**changes: Any) -> Trained:
    return ft.fit(
        PLANTED,
        SPLIT,
        training=SHORT,
        first_stage=ft.FirstStage(training=SHORT),
        show=False,
        **changes,
    )


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Trained, Path]:
    folder = tmp_path_factory.mktemp("run")
    return fitted(folder=folder), folder


def test_fitting_makes_both_stages_and_says_how(both: tuple[Trained, Path]) -> None:
    trained, folder = both
    # 5 groups of 8: of the 35 items a user has not done, 3 are of the group: .09 by chance
    assert ft.evaluate(trained, SPLIT.test, k=(3,)).metrics["hit_rate_at_3"] > 0.5
    assert (folder / "checkpoint" / "manifest.json").exists()
    assert (folder / "retriever" / "checkpoint" / "manifest.json").exists()
    assert trained.settings["objective"]["negatives_from"] == "retriever"
    assert trained.settings["first_stage"]["objective"]["kind"] == "pairs"
    assert trained.log["retriever"]["best_epoch"] >= 1
    assert 0.5 < ft.evaluate_rows(trained, SPLIT, resamples=0).metrics["auc_sampled_4"] <= 1


def test_a_run_that_is_resumed_ends_the_same(both: tuple[Trained, Path]) -> None:
    trained, folder = both
    again = fitted(folder=folder, resume=True)
    state = again.model.state_dict()
    for name, tensor in trained.model.state_dict().items():
        assert torch.equal(tensor, state[name]), name


def test_a_retrievers_candidates_are_its_best_that_the_user_has_not_done() -> None:
    trained = make_trained("ease")
    drawn = candidate_negatives(trained, 4)
    score_BI = trained.scorer(exclude_seen=True)
    for user in range(0, 30, 7):
        past = trained.events.history(user).astype(int).tolist()
        best = score_BI(Queries.of_histories([past]))[0].topk(4).indices.tolist()
        user_B = torch.full((64,), user)
        found_BN = drawn(user_B, torch.full((64,), past[0]), 5, generator=torch.Generator())
        assert set(found_BN.flatten().tolist()) == set(best)


def test_candidates_of_equal_scores_are_the_first_of_the_catalogue_as_in_answers() -> None:
    trained = make_trained("popularity")
    assert isinstance(trained.model, Popularity)
    trained.model.count_I.fill_(3)
    known = set(trained.known_I.nonzero().flatten().tolist())
    for user, ranked_T in enumerate(best_unseen(trained, 5)[:10].tolist()):
        past = trained.events.history(user).tolist()
        assert ranked_T == (sorted(known - set(past)) if past else [-1])[:5] + [-1] * 4 * (not past)


def test_behind_an_index_the_candidates_are_the_same_as_by_all_scores() -> None:
    events = make_events()
    indexed = make_trained("sasrec", events)
    by_index = best_unseen(indexed, 5)
    score = indexed.scorer(exclude_seen=True)
    for user in range(30):
        past = events.history(user).astype(int).tolist()
        assert (
            by_index[user].tolist()
            == score(Queries.of_histories([past]))[0].topk(5).indices.tolist()
        )
    assert by_index[SILENT_USER].tolist() == [-1] * 5


def test_a_mixture_keeps_its_share() -> None:
    def always(item: int) -> DrawItems:
        return lambda user_B, positive_B, num, *, generator: torch.full((len(user_B), num), item)

    mixed = MixedNegatives(first=always(1), share=0.3, second=always(2))
    user_B = torch.zeros(1000, dtype=torch.int64)
    drawn_BN = mixed(user_B, user_B, 10, generator=torch.Generator().manual_seed(0))
    # a standard deviation is sqrt(.3 x .7 / 10^4) = .005
    assert (drawn_BN == 1).float().mean() == pytest.approx(0.3, abs=0.02)
    assert set(drawn_BN.unique().tolist()) == {1, 2}


def test_two_trained_models_are_joined_unless_their_users_or_items_differ() -> None:
    retriever = ft.fit(ItemKNNConfig(), SPLIT)
    ranker = ft.fit(NeuMFConfig(factors=4), SPLIT, training=SHORT, show=False)
    joined = ft.two_stage(retriever, ranker, candidates=7)
    assert joined.config == TwoStageConfig(
        retriever=retriever.config, ranker=NeuMFConfig(factors=4), candidates=7
    )
    with pytest.raises(ConfigError, match="ItemKNN is not a ranker"):
        ft.two_stage(ranker, retriever)
    with pytest.raises(DataError, match="have different users"):
        ft.two_stage(make_trained("ease"), ranker)


def test_a_recipe_in_two_stages_is_reported_with_the_gain_over_retrieval_alone(
    tmp_path: Path,
) -> None:
    config = ft.ExperimentConfig(
        data={"kind": "public", "name": "ml-100k"},
        split={"kind": "leave_last"},
        model=PLANTED,
        training=SHORT.model_copy(update={"epochs": 2}),
        first_stage=ft.FirstStage(training=SHORT.model_copy(update={"epochs": 3})),
        final="validation",
    )
    run = ft.run_experiment(config, SPLIT, show=False)
    trained, reports = run.final
    gain = reports.metrics["ndcg_at_10"] - reports.metrics["ndcg_at_10_retrieval"]
    assert reports.metrics["ndcg_at_10_gain"] == pytest.approx(gain)
    assert "two stages - retrieval alone, ndcg_at_10" in str(reports)
    assert reports.rows is not None
    document = json.loads(reports.to_json(per_user=False))
    assert (
        document["gain"]["retrieval"]["ndcg_at_10"] == reports.gain.retrieval.metrics["ndcg_at_10"]
    )
    assert (
        len(run.refitted.log["retriever"]["epochs"]) == run.trained.log["retriever"]["best_epoch"]
    )
    ft.to_recommender(trained, reports).save(tmp_path / "bundle")
    assert ft.inspect_bundle(tmp_path / "bundle").facts()["model"] == "two_stage"
    assert ft.recipe_of(ft.load(tmp_path / "bundle").trained) == config


def test_the_first_stage_of_a_recipe_may_be_without_patience(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(
        """
        data = { kind = "public", name = "ml-100k" }
        split = { kind = "leave_last" }
        [model]
        kind = "two_stage"
        retriever = { kind = "mf" }
        ranker = { kind = "neumf" }
        [first_stage]
        training = { patience = "none" }
        """
    )
    config = ft.read_experiment(tmp_path / "recipe.toml", overrides=["model.candidates=9"])
    assert config.first_stage.training.patience is None
    assert config.model.candidates == 9


def test_over_http_a_row_says_what_is_predicted_and_each_stage_is_timed(tmp_path: Path) -> None:
    trained = make_two_stage(EASEConfig(l2=1.0))
    ft.build_recommender(trained).save(tmp_path / "bundle")
    slot = ModelSlot(Versions(tmp_path / "bundle"))
    metrics = Metrics()
    with closing(open_live_events("sqlite://")) as live:
        service = Service(slot, live, ServerSettings(), bundle=tmp_path / "bundle", metrics=metrics)
        asked = RecommendRequest(user_id="100", k=3, weights={"click": 2.0})
        reply = service.recommend(asked)
    for row in reply.items:
        assert row.score == pytest.approx(2 * row.predictions["click"])
    shown = metrics.exposition().decode()
    for stage in ("search", "rank"):
        assert f'foretaste_stage_seconds_count{{stage="{stage}"}} 1.0' in shown
    assert RecommendReply.model_validate(reply.model_dump()) == reply

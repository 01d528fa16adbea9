"""One answer for everybody, whatever the model: ids in, ids out, and where each row came from."""

import inspect
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import polars as pl
import pytest
import torch
from serving_worlds import (
    CONFIGS,
    NUM_ITEMS,
    NUM_USERS,
    SILENT_ITEM,
    SILENT_USER,
    make_events,
    make_trained,
)

from foretaste.data.batch import Queries
from foretaste.errors import ConfigError, DataError
from foretaste.serving import histories as histories_module
from foretaste.serving.answer import Answer
from foretaste.serving.building import build_recommender
from foretaste.serving.recommender import Recommender
from foretaste.training.trained import Trained


@pytest.fixture(scope="module", params=CONFIGS)
def recommender(request: pytest.FixtureRequest) -> Recommender:
    return build_recommender(make_trained(request.param))


def ids(answer: Answer) -> list[int | str]:
    return [row.item_id for row in answer.rows]


def past(recommender: Recommender, user_id: int) -> list[int]:
    return [500 + int(row) for row in recommender.trained.events.history(user_id - 100)]


def oracle(trained: Trained, user_idx: int, history: list[int], banned: set[int]) -> list[int]:
    """Score the catalogue, sort it, walk down; item ids are 500 + row."""
    query = Queries.of_histories([[item - 500 for item in history]])
    query = Queries(
        user_B=torch.tensor([user_idx]), history_N=query.history_N, offsets_B1=query.offsets_B1
    )
    score = trained.score(query)[0].numpy()
    order = np.argsort(-score, kind="stable")
    return [
        500 + int(row) for row in order if score[row] > -np.inf and 500 + int(row) not in banned
    ]


# The five cases of "one answer for everybody"


def test_a_known_user_is_answered_by_the_model(recommender: Recommender) -> None:
    for user_id in (100, 113):
        answer = recommender.recommend(user_id, k=6)
        seen = past(recommender, user_id)
        assert ids(answer) == oracle(recommender.trained, user_id - 100, seen, set(seen))[:6]
        assert (answer.source, answer.user_known, answer.unknown_items) == ("model", True, ())
        assert {row.source for row in answer.rows} == {"model"}
        assert answer.notes == ()


def test_a_stranger_with_a_history_is_folded_in(recommender: Recommender) -> None:
    history = [503, 507, 511]
    for stranger in (None, 9999, "nobody"):
        answer = recommender.recommend(stranger, history=history, k=6)
        assert ids(answer) == oracle(recommender.trained, -1, history, set(history))[:6]
        assert (answer.source, answer.user_known) == ("fold-in", False)


def test_somebody_of_whom_nothing_is_known_gets_what_is_popular(recommender: Recommender) -> None:
    counts = recommender.trained.events.item_count
    expected = [500 + int(row) for row in np.argsort(-counts, kind="stable")[:6]]
    for stranger in (None, "", "nobody", 10**30, -1, float("nan"), 100 + SILENT_USER):
        answer = recommender.recommend(stranger, k=6)
        assert ids(answer) == expected
        assert [row.score for row in answer.rows] == [counts[i - 500] for i in expected]
        assert (answer.source, answer.user_known) == ("popular", False)
        assert any("most popular" in note for note in answer.notes)


def test_a_history_of_unknown_items_is_no_history(recommender: Recommender) -> None:
    strange = ["never", 999, 500 + SILENT_ITEM, "never"]
    answer = recommender.recommend(history=strange, k=4)
    assert answer.rows == recommender.recommend(k=4).rows
    assert answer.unknown_items == ("never", 999, 500 + SILENT_ITEM)
    mixed = recommender.recommend(history=["never", 503], k=4)
    assert mixed.rows == recommender.recommend(history=[503], k=4).rows
    assert mixed.unknown_items == ("never",)
    assert "1 item ids are unknown to training: 'never'" in mixed.notes


def test_an_item_that_training_never_saw_is_never_answered(recommender: Recommender) -> None:
    for answer in (
        recommender.recommend(k=100),
        recommender.recommend(100, k=100, exclude_seen=False),
        recommender.recommend(history=[503], k=100, exclude_seen=False),
        recommender.similar(503, 100),
    ):
        assert 500 + SILENT_ITEM not in ids(answer)


# Live events


def test_live_events_follow_the_history_of_a_known_user(recommender: Recommender) -> None:
    seen = past(recommender, 105)
    live = [item for item in range(500, 500 + NUM_ITEMS) if item not in seen][:2]
    answer = recommender.recommend(105, history=live, k=5)
    assert ids(answer) == oracle(recommender.trained, 5, seen + live, {*seen, *live})[:5]
    assert (answer.source, answer.user_known) == ("model", True)


def test_a_silent_user_with_live_events_is_folded_in(recommender: Recommender) -> None:
    answer = recommender.recommend(100 + SILENT_USER, history=[502, 504], k=5)
    assert answer.rows == recommender.recommend(history=[502, 504], k=5).rows
    assert answer.source == "fold-in"


# Rules


def test_what_was_seen_comes_back_only_when_asked_for(recommender: Recommender) -> None:
    seen = set(past(recommender, 110))
    assert not seen & set(ids(recommender.recommend(110, k=NUM_ITEMS)))
    answer = recommender.recommend(110, k=NUM_ITEMS, exclude_seen=False)
    assert seen <= set(ids(answer))
    assert len(answer.rows) == len(set(ids(answer))) == NUM_ITEMS


def test_allow_and_deny_are_kept_to(recommender: Recommender) -> None:
    for user in (104, None):
        every = ids(recommender.recommend(user, k=NUM_ITEMS, exclude_seen=False))
        allow, deny = [*every[::2], "unheard"], every[:1]
        answer = recommender.recommend(user, k=50, exclude_seen=False, allow=allow, deny=deny)
        assert ids(answer) == every[2::2]
        assert answer.unknown_items == ("unheard",)
        nothing = recommender.recommend(user, allow=[])
        assert nothing.rows == ()
        assert "10 were asked for, and 0 are all that may be answered" in nothing.notes
        assert recommender.recommend(user, k=3, allow=["unheard"]).rows == ()


def test_a_list_longer_than_the_catalogue_holds_all_of_it(recommender: Recommender) -> None:
    for k in (NUM_ITEMS, NUM_ITEMS + 1, 1_000_000):
        answer = recommender.recommend(k=k)
        assert sorted(map(int, ids(answer))) == list(range(500, 500 + NUM_ITEMS))
        left = recommender.recommend(100, k=k)
        assert len(left.rows) == NUM_ITEMS - len(past(recommender, 100))


@pytest.mark.parametrize("k", [0, -1, 1_000_001, True])
def test_an_absurd_k_is_refused(recommender: Recommender, k: int) -> None:
    for ask in (
        lambda: recommender.recommend(k=k),
        lambda: recommender.similar(503, k),
        lambda: recommender.recommend_many([100], k=k),
    ):
        with pytest.raises(DataError, match="ask for 1 to 1000000"):
            ask()


def test_a_text_in_place_of_a_list_is_refused(recommender: Recommender) -> None:
    for name in ("history", "allow", "deny"):
        with pytest.raises(DataError, match=f"{name} is the text '503'"):
            recommender.recommend(**{name: "503"})
    with pytest.raises(DataError, match="user_ids is the text"):
        recommender.recommend_many("100")
    with pytest.raises(DataError, match=r"history holds \[503\]"):
        recommender.recommend(history=[[503]])


def test_since_forgets_what_was_done_before_it(recommender: Recommender) -> None:
    # A user's events are at 1000, 1001, 1002, … seconds.
    seen = past(recommender, 103)
    answer = recommender.recommend(103, since=1002, k=5)
    assert ids(answer) == oracle(recommender.trained, 3, seen[2:], set(seen[2:]))[:5]
    forgotten = recommender.recommend(103, since=10**9, k=5)
    assert forgotten.source == "popular"
    assert forgotten.user_known


def test_since_without_times_is_refused() -> None:
    events = make_events()
    timeless = type(events)(
        users=events.users, items=events.items, offsets=events.offsets, item_idx=events.item_idx
    )
    recommender = build_recommender(make_trained("popularity", timeless))
    with pytest.raises(DataError, match="no times"):
        recommender.recommend(100, since=5)
    assert recommender.recommend(100, k=1).rows[0].attributes == {}


# Ids


def test_ids_are_found_as_number_and_as_text(recommender: Recommender) -> None:
    assert recommender.recommend("107", k=5) == recommender.recommend(107, k=5)
    assert recommender.recommend(np.int64(107), k=5) == recommender.recommend(107, k=5)
    assert recommender.recommend(history=["503"], k=5) == recommender.recommend(history=[503], k=5)
    assert all(type(item_id) is int for item_id in ids(recommender.recommend(107)))


def test_text_ids_come_back_as_text() -> None:
    recommender = build_recommender(make_trained("ease", make_events(text_ids=True)))
    answer = recommender.recommend("u107", k=3)
    assert answer.source == "model"
    assert all(str(item_id).startswith("i5") for item_id in ids(answer))
    assert recommender.recommend(107, k=3).source == "popular"


def test_a_row_carries_its_title_and_no_vectors(recommender: Recommender) -> None:
    for row in recommender.recommend(100, k=3).rows:
        assert row.attributes == {"title": f"Title {int(row.item_id) - 500}"}


def test_a_long_item_table_is_read_row_by_row(
    recommender: Recommender, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = recommender.recommend(100, k=3)
    monkeypatch.setattr("foretaste.serving.items.KEPT_AS_LISTS", 5)
    assert recommender.recommend(100, k=3) == before


# Many users


@pytest.mark.parametrize("exclude_seen", [True, False])
def test_many_users_get_what_each_would_get_alone(
    recommender: Recommender, *, exclude_seen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(histories_module, "BLOCK_EVENTS", 60)
    asked = [129, "nobody", 100, "113", 100, 100 + SILENT_USER, *range(101, 125)]
    table = recommender.recommend_many(asked, k=7, exclude_seen=exclude_seen)
    assert table["user_id"].to_list() == [str(user_id) for user_id in asked]
    for user_id, row in zip(asked, table.iter_rows(named=True), strict=True):
        alone = recommender.recommend(user_id, k=7, exclude_seen=exclude_seen)
        assert row["source"] == alone.source
        assert row["item_id"] == ids(alone)
        assert row["score"] == pytest.approx([r.score for r in alone.rows], rel=1e-4, abs=1e-4)


def test_many_users_keep_integer_ids_and_a_series_will_do(recommender: Recommender) -> None:
    table = recommender.recommend_many([100, 7, 101], k=2)
    assert table.schema == {
        "user_id": pl.Int64,
        "source": pl.String,
        "item_id": pl.List(pl.Int64),
        "score": pl.List(pl.Float32),
    }
    series = pl.Series([100, 7, 101], dtype=pl.Int32)
    assert recommender.recommend_many(series, k=2).equals(table)


def test_no_users_and_too_many_items_are_fine(recommender: Recommender) -> None:
    assert len(recommender.recommend_many([], k=3)) == 0
    table = recommender.recommend_many([100, "x"], k=10**6)
    assert table["item_id"].list.len().to_list() == [
        NUM_ITEMS - len(past(recommender, 100)),
        NUM_ITEMS,
    ]


def test_blocks_hold_every_user_once_and_no_giant_among_dwarfs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(histories_module, "BLOCK_EVENTS", 25)
    events = make_events()
    users = np.arange(NUM_USERS)
    found = list(histories_module.blocks(events, users, scores_per_user=0))
    assert sorted(np.concatenate(found).tolist()) == list(range(NUM_USERS))
    length = np.diff(events.offsets)
    assert all(len(block) * length[block].max() <= 25 or len(block) == 1 for block in found)


# Similar items, reasons


@pytest.mark.parametrize("kind", ["sasrec", "als"])
def test_similar_items_have_the_highest_cosine(kind: str) -> None:
    recommender = build_recommender(make_trained(kind))
    table = recommender.trained.model.item_table().detach()[:NUM_ITEMS].double()
    unit = table / table.norm(dim=1, keepdim=True)
    cosine = unit @ unit[3]
    cosine[3] = -2
    order = cosine.argsort(descending=True)[:5]
    answer = recommender.similar("503", 5)
    assert ids(answer) == [500 + int(row) for row in order]
    assert [row.score for row in answer.rows] == pytest.approx(cosine[order].tolist(), abs=1e-5)
    assert {row.source for row in answer.rows} == {"model"}


@pytest.mark.parametrize("kind", ["ease", "item_knn", "popularity"])
def test_without_vectors_similar_is_what_follows_that_item_alone(kind: str) -> None:
    recommender = build_recommender(make_trained(kind))
    assert ids(recommender.similar(503, 5)) == ids(recommender.recommend(history=[503], k=5))


def test_an_item_is_not_similar_to_itself_and_an_unknown_one_is_said(
    recommender: Recommender,
) -> None:
    everything = recommender.similar(503, 1000)
    assert sorted(map(int, ids(everything))) == [i for i in range(500, 520) if i != 503]
    unknown = recommender.similar("unheard", 4)
    assert unknown.rows == recommender.recommend(k=4).rows
    assert (unknown.source, unknown.unknown_items) == ("popular", ("unheard",))


def test_the_reason_is_the_item_whose_removal_costs_most(recommender: Recommender) -> None:
    trained, history = recommender.trained, [501, 504, 509, 504, 512]

    def score(items: list[int], target: int) -> float:
        query = Queries.of_histories([[item - 500 for item in items]])
        return float(trained.score(query)[0, target - 500])

    targets = [500, 503, 509, 516]
    for target, reason in zip(targets, recommender.explain_many(history, targets), strict=True):
        drops = {
            left_out: score(history, target) - score([i for i in history if i != left_out], target)
            for left_out in dict.fromkeys(history)
            if left_out != target
        }
        best = max(drops.values())
        if best <= 1e-6:
            assert reason is None or drops[int(reason)] == pytest.approx(best, abs=1e-5)
        else:
            assert reason is not None
            assert drops[int(reason)] == pytest.approx(best, abs=1e-5)
        assert recommender.explain(history, target) == reason


def test_popularity_has_no_reasons() -> None:
    recommender = build_recommender(make_trained("popularity"))
    assert recommender.explain_many([501, 502], [503, 504]) == (None, None)


def test_nothing_known_has_no_reason(recommender: Recommender) -> None:
    assert recommender.explain([], 503) is None
    assert recommender.explain(["never"], 503) is None
    assert recommender.explain([501, 502], "never") is None
    assert recommender.explain_many([501], []) == ()


def test_a_known_users_own_history_gives_reasons() -> None:
    recommender = build_recommender(make_trained("ease"))
    seen = past(recommender, 108)
    target = recommender.recommend(108, k=1).rows[0].item_id
    assert recommender.explain([], target, user_id="108") == recommender.explain(seen, target)
    assert recommender.explain([], target, user_id="108") in seen


def test_only_the_last_fifty_events_are_tried() -> None:
    history = np.arange(80) % 70
    removed, without = histories_module.without_each(history, last=50)
    assert sorted(removed.tolist()) == sorted(set((np.arange(30, 80) % 70).tolist()))
    assert all(item not in left for item, left in zip(removed, without, strict=True))


# Building


def test_a_fallback_of_another_window_answers_strangers() -> None:
    events = make_events()
    trained = make_trained("sasrec", events)
    recent = make_trained("popularity", events.select(np.asarray(events.timestamp_s) >= 1005))
    plain, windowed = (build_recommender(trained, fallback=fallback) for fallback in (None, recent))
    counts = recent.events.item_count
    rows = windowed.recommend(k=5).rows
    assert [row.score for row in rows] == sorted(counts[counts > 0].tolist(), reverse=True)[:5]
    assert rows != plain.recommend(k=5).rows


def test_a_fallback_of_another_catalogue_is_refused() -> None:
    other = make_trained("popularity", make_events(text_ids=True))
    with pytest.raises(ConfigError, match="other items"):
        build_recommender(make_trained("sasrec"), fallback=other)


def test_a_model_without_vectors_has_no_index_to_choose() -> None:
    assert build_recommender(make_trained("ease"), index="exact").index is None
    with pytest.raises(ConfigError, match="EASE has no item vectors"):
        build_recommender(make_trained("ease"), index="hnsw")


def test_one_user_and_one_item_are_enough() -> None:
    events = make_events()
    tiny = type(events)(
        users=type(events.users)(pl.Series([1])),
        items=type(events.items)(pl.Series(["only"])),
        offsets=np.array([0, 1]),
        item_idx=np.array([0], dtype=np.int32),
    )
    for kind in CONFIGS:
        recommender = build_recommender(make_trained(kind, tiny))
        assert ids(recommender.recommend(k=3)) == ["only"]
        assert recommender.recommend(1, k=3).rows == ()
        assert ids(recommender.recommend(1, k=3, exclude_seen=False)) == ["only"]
        assert recommender.similar("only", 3).rows == ()


def test_the_surface_reads_as_promised() -> None:
    parameters = inspect.signature(Recommender.recommend).parameters
    assert list(parameters)[1] == "user_id"
    assert all(p.kind == p.KEYWORD_ONLY for p in list(parameters.values())[2:])


def test_answers_from_several_threads_are_those_of_one(recommender: Recommender) -> None:
    def ask(user_id: int) -> object:
        return (
            recommender.recommend(user_id, history=[500 + user_id % NUM_ITEMS], k=5),
            recommender.similar(500 + user_id % NUM_ITEMS, 3),
        )

    fresh = build_recommender(recommender.trained)  # nothing is worked out yet
    expected = [ask(user_id) for user_id in range(100, 130)]
    recommender = fresh
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(ask, [*range(100, 130)] * 2)) == expected * 2


def test_answering_leaves_the_model_as_it_was(recommender: Recommender) -> None:
    before = {
        name: tensor.clone() for name, tensor in recommender.trained.model.state_dict().items()
    }
    first = recommender.recommend(100, deny=[501], k=5)
    recommender.recommend_many(list(range(100, 130)), k=5)
    recommender.similar(501)
    after = recommender.trained.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert recommender.recommend(100, deny=[501], k=5) == first

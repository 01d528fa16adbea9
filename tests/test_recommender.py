"""The recommender: ids in, ids out, for every kind of user, and the source of each row."""

import datetime as dt
import inspect
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from decimal import Decimal
from functools import cache
from uuid import UUID

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
import torch

from foretaste.data.batch import Queries
from foretaste.data.reading import read_interactions
from foretaste.data.vocabulary import Vocabulary
from foretaste.errors import ConfigError, DataError, ForetasteError
from foretaste.retrieval import faiss_index
from foretaste.retrieval.index import IndexChoice
from foretaste.serving import catalogue_search
from foretaste.serving.answer import Answer
from foretaste.serving.recommender import Recommender, build_recommender
from foretaste.training.trained import Trained
from tests.worlds import (
    CONFIGS,
    NUM_ITEMS,
    NUM_USERS,
    SILENT_ITEM,
    SILENT_USER,
    every_vector,
    make_events,
    make_trained,
)


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


# The five kinds of users


def test_a_known_user_is_answered_by_the_model(recommender: Recommender) -> None:
    for user_id in (100, 113):
        answer = recommender.recommend(user_id, k=6)
        seen = past(recommender, user_id)
        assert ids(answer) == oracle(recommender.trained, user_id - 100, seen, set(seen))[:6]
        assert (answer.source, answer.user_known, answer.unknown_items) == ("model", True, ())
        assert {row.source for row in answer.rows} == {"model"}
        assert answer.notes == ()


def test_a_new_user_with_a_history_is_folded_in(recommender: Recommender) -> None:
    history = [503, 507, 511]
    for stranger in (None, 9999, "nobody"):
        answer = recommender.recommend(stranger, history=history, k=6)
        assert ids(answer) == oracle(recommender.trained, -1, history, set(history))[:6]
        assert (answer.source, answer.user_known) == ("fold-in", False)


def test_an_unknown_user_gets_the_most_popular_items(recommender: Recommender) -> None:
    counts = recommender.trained.events.item_count
    expected = [500 + int(row) for row in np.argsort(-counts, kind="stable")[:6]]
    for stranger in (None, "nobody", 10**30, -1, "0100", 100 + SILENT_USER):
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
    assert "1 item id is not in the training data: 'never'" in mixed.notes


def test_an_item_without_training_events_is_never_recommended(recommender: Recommender) -> None:
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


def test_a_user_without_training_events_but_with_live_events_is_folded_in(
    recommender: Recommender,
) -> None:
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


def test_allow_and_deny_are_respected(recommender: Recommender) -> None:
    for user in (104, None):
        every = ids(recommender.recommend(user, k=NUM_ITEMS, exclude_seen=False))
        allow, deny = [*every[::2], "unheard"], every[:1]
        answer = recommender.recommend(user, k=50, exclude_seen=False, allow=allow, deny=deny)
        assert ids(answer) == every[2::2]
        assert answer.unknown_items == ("unheard",)
        nothing = recommender.recommend(user, allow=[])
        assert nothing.rows == ()
        assert "10 items were requested, but only 0 are allowed" in nothing.notes
        assert recommender.recommend(user, k=3, allow=["unheard"]).rows == ()


def test_a_list_longer_than_the_catalogue_holds_all_of_it(recommender: Recommender) -> None:
    for k in (NUM_ITEMS, NUM_ITEMS + 1, 1_000_000):
        answer = recommender.recommend(k=k)
        assert sorted(map(int, ids(answer))) == list(range(500, 500 + NUM_ITEMS))
        left = recommender.recommend(100, k=k)
        assert len(left.rows) == NUM_ITEMS - len(past(recommender, 100))


@pytest.mark.parametrize("k", [0, -1, 1_000_001, True, 10**50, 2.5, "3", None, [3]])
def test_an_absurd_k_is_refused(recommender: Recommender, k: int) -> None:
    for ask in (
        lambda: recommender.recommend(k=k),
        lambda: recommender.similar(503, k),
        lambda: recommender.recommend_many([100], k=k),
    ):
        with pytest.raises(ForetasteError) as caught:
            ask()
        assert (caught.value.name, caught.value.value) == ("k", k)
    assert recommender.recommend(k=np.int64(3)) == recommender.recommend(k=3)


# Lists of ids

LISTS = {
    "list": list,
    "tuple": tuple,
    "dictionary": lambda ids: dict.fromkeys(ids).keys(),
    "generator": iter,
    "NumPy": np.array,
    "NumPy of another size": lambda ids: np.array(ids, dtype=np.int16),
    "NumPy floats": lambda ids: np.array(ids, dtype=np.float32),
    "pandas": pd.Series,
    "pandas with its own type": lambda ids: pd.Series(ids, dtype="Int64"),
    "pandas index": pd.Index,
    "pandas categories": pd.Categorical,
    "Polars": pl.Series,
    "Polars decimals": lambda ids: pl.Series(ids, dtype=pl.Decimal(10, 2)),
    "Arrow": pa.array,
    "Arrow in chunks": lambda ids: pa.chunked_array([ids]),
    "torch": torch.tensor,
}


@pytest.mark.parametrize("kind", LISTS)
@pytest.mark.parametrize("ids_given", [[503], [503, 507, 511], []])
def test_whatever_holds_ids_one_after_the_other_is_a_list_of_ids(
    kind: str, ids_given: list[int]
) -> None:
    recommender = popular()
    make = LISTS[kind]
    for name in ("history", "allow", "deny"):
        expected = recommender.recommend(**{name: ids_given}, k=5)
        assert recommender.recommend(**{name: make(ids_given)}, k=5) == expected
    users = [user - 400 for user in ids_given]
    lists = recommender.recommend_many(make(users), k=3)
    assert lists.equals(recommender.recommend_many(users, k=3))
    assert lists.schema["user_id"] == pl.Int64
    assert recommender.explain_many(make(ids_given), make(ids_given)) == recommender.explain_many(
        ids_given, ids_given
    )


def test_a_set_is_a_list_too() -> None:
    recommender = popular()
    assert recommender.recommend(deny={503}, k=9) == recommender.recommend(deny=[503], k=9)


def test_the_first_item_of_a_catalogue_is_an_item_like_others() -> None:
    # Its id is 0: false to Python, and so is an array of it alone.
    events = make_events()
    zero = replace(events, items=Vocabulary(pl.Series(range(NUM_ITEMS + 1))))
    recommender = build_recommender(make_trained("popularity", zero))
    assert recommender.recommend(k=1).rows[0].item_id == 0
    for deny in ([0], (0,), np.array([0]), pl.Series([0]), {0: None}.keys()):
        assert recommender.recommend(k=1, deny=deny).rows[0].item_id == 1
    assert recommender.recommend(history=np.array([0]), k=1).source == "fold-in"


NO_LISTS = {
    "text": "503",
    "bytes": b"503",
    "number": 503,
    "float": 503.0,
    "truth": True,
    "array of none": np.array(503),
    "dictionary": {503: 1},
    "Polars table": pl.DataFrame({"item_id": [503]}),
    "lazy table": pl.LazyFrame({"item_id": [503]}),
    "pandas table": pd.DataFrame({"item_id": [503]}),
    "Arrow table": pa.table({"item_id": [503]}),
    "object": object(),
    "expression": pl.col("item_id"),
}


@pytest.mark.parametrize("kind", NO_LISTS)
def test_what_is_no_list_of_ids_is_refused_by_its_name(kind: str) -> None:
    given = NO_LISTS[kind]
    for name, ask in DOORS.items():
        with pytest.raises(DataError, match=f"{name} is ") as caught:
            ask(popular(), given)
        assert (caught.value.name, caught.value.value) == (name, given)


NO_IDS = {
    "None": None,
    "NaN": float("nan"),
    "NumPy's NaN": np.float32("nan"),
    "a decimal NaN": Decimal("NaN"),
    "a decimal NaN that signals": Decimal("sNaN"),
    "pandas' NA": pd.NA,
    "NaT": pd.NaT,
    "NumPy's NaT": np.datetime64("NaT"),
    "infinity": float("inf"),
    "truth": True,
    "NumPy's truth": np.bool_(1),
    "fraction": 503.5,
    "empty text": "",
    "list": [503],
    "tuple": (503,),
    "dictionary": {"item_id": 503},
    "array": np.array([503]),
    "bytes": b"503",
    "object": object(),
    "number that cannot be printed": 10**5000,
}


@pytest.mark.parametrize("kind", NO_IDS)
@pytest.mark.parametrize("text_ids", [False, True])
def test_what_is_no_id_is_refused_by_its_position(kind: str, *, text_ids: bool) -> None:
    value, recommender = NO_IDS[kind], popular(text_ids=text_ids)
    for name, ask in DOORS.items():
        with pytest.raises(DataError, match=rf"{name}\[1\] is ") as caught:
            ask(recommender, [503, value])
        assert (caught.value.name, caught.value.row) == (name, 2)
        assert caught.value.value is value
    with pytest.raises(DataError, match="item_id is ") as caught:
        recommender.similar(value)
    assert caught.value.name == "item_id"
    if value is not None:
        with pytest.raises(DataError, match="user_id is ") as caught:
            recommender.recommend(value)
        assert caught.value.name == "user_id"


DOORS = {
    "history": lambda recommender, ids: recommender.recommend(history=ids),
    "allow": lambda recommender, ids: recommender.recommend(allow=ids),
    "deny": lambda recommender, ids: recommender.recommend(deny=ids),
    "user_ids": lambda recommender, ids: recommender.recommend_many(ids),
    "item_ids": lambda recommender, ids: recommender.explain_many([], ids),
}


@cache
def popular(*, text_ids: bool = False) -> Recommender:
    return build_recommender(make_trained("popularity", make_events(text_ids=text_ids)))


# Every kind of id that can be read


def _times(*texts: str) -> list[dt.datetime]:
    return [dt.datetime.fromisoformat(text) for text in texts]


ID_COLUMNS: dict[str, Callable[[], pl.Series | pd.Series]] = {
    "integers": lambda: pl.Series([3, 0, -7]),
    "small integers": lambda: pl.Series([3, 0, 7], dtype=pl.UInt8),
    "large integers": lambda: pl.Series([2**64 - 1, 0, 7], dtype=pl.UInt64),
    "huge integers": lambda: pl.Series([2**100, 0, -7], dtype=pl.Int128),
    "floats": lambda: pl.Series([3.0, 0.0, 7.0]),
    "small floats": lambda: pl.Series([3.0, 0.0, 7.0], dtype=pl.Float32),
    "decimals": lambda: pl.Series([Decimal(3), Decimal(0), Decimal(7)]),
    "decimals with places": lambda: pl.Series([Decimal("3.00"), Decimal("0.00"), Decimal("7.00")]),
    "text": lambda: pl.Series(["3", "03", " 3"]),
    "text of any sort": lambda: pl.Series(["a,b", "\u00e4/1", "\U0001f600"]),
    "categories": lambda: pl.Series(["a", "B", "b"], dtype=pl.Categorical),
    "enumeration": lambda: pl.Series(["a", "B", "b"], dtype=pl.Enum(["a", "B", "b"])),
    "truth": lambda: pl.Series([True, False, True]),
    "dates": lambda: pl.Series([dt.date(2024, 5, day) for day in (1, 2, 3)]),
    "times": lambda: pl.Series(_times("2024-05-01", "2024-05-01T10:00:00.5", "2024-05-02")),
    "times in nanoseconds": lambda: pl.Series(
        _times("2024-05-01", "2024-05-01T10:00:00.5"), dtype=pl.Datetime("ns")
    ),
    "times of a zone": lambda: pl.Series(
        _times("2024-05-01T10:00+00:00", "2024-07-01T10:00+00:00")
    ).dt.convert_time_zone("Europe/Berlin"),
    "hours": lambda: pl.Series([dt.time(10), dt.time(11, 30)]),
    "uuids": lambda: pl.Series([UUID(int=n) for n in (1, 2, 3)], dtype=pl.Object),
    "a mixture": lambda: pl.Series([1, "one", 2.5, 4.0, dt.date(2024, 5, 1)], dtype=pl.Object),
    "pandas integers": lambda: pd.Series([3, 0, 7], dtype="Int64"),
    "pandas categories": lambda: pd.Series(pd.Categorical([3, 0, 7])),
    "pandas times": lambda: pd.Series(
        pd.to_datetime(["2024-05-01T00:00:00.5", "2024-05-02T10:00:00.0"])
    ),
    "pandas times of a zone": lambda: pd.Series(
        pd.to_datetime(["2024-05-01T10:00:00+02:00", "2024-05-02T10:00:00+02:00"])
    ),
    "pandas uuids": lambda: pd.Series([UUID(int=n) for n in (1, 2, 3)]),
    "pandas mixture": lambda: pd.Series([1, "one", 4.0, UUID(int=1)], dtype=object),
    "pandas floats": lambda: pd.Series([3.0, 0.0, 7.0]),
    "pandas text": lambda: pd.Series(["3", "03"], dtype="string"),
}


@pytest.mark.parametrize("kind", ID_COLUMNS)
def test_an_id_is_found_by_what_the_table_holds_and_by_what_answers_show(kind: str) -> None:
    column = ID_COLUMNS[kind]()
    values = column.to_list()
    twice = [*range(len(values))] * 2
    if isinstance(column, pl.Series):
        table = pl.DataFrame(
            {"user_id": column.gather(twice), "item_id": column.gather(sorted(twice))}
        )
    else:
        taken = [column.iloc[order].reset_index(drop=True) for order in (twice, sorted(twice))]
        table = pd.DataFrame({"user_id": taken[0], "item_id": taken[1]})
    events = read_interactions(table, duplicates="first")
    recommender = build_recommender(make_trained("popularity", events))
    known = events.items.ids.to_list()
    found = set()
    for value in values:
        answer = recommender.recommend(value, history=[value], k=10, exclude_seen=False)
        assert (answer.user_known, answer.unknown_items) == (True, ()), value
        only = recommender.recommend(allow=[value]).rows[0].item_id
        assert only in known
        assert recommender.recommend(deny=[value], k=10) == recommender.recommend(deny=[only], k=10)
        assert (
            recommender.similar(value)
            == recommender.similar(only)
            == recommender.similar(str(only))
        )
        assert recommender.recommend(history=[str(only)]).unknown_items == ()
        found.add(only)
    assert found == set(known)
    lists = recommender.recommend_many(column)
    assert set(lists["source"]) == {"model"}
    assert set(lists["user_id"]) == set(events.users.ids)


@pytest.mark.parametrize(
    "asked", ["0103", "+103", " 103", "103 ", "103.0", "1_03", "\u0661\u0660\u0663"]
)
def test_a_text_is_no_integer_but_for_the_one_that_prints_it(asked: str) -> None:
    recommender = popular()
    assert recommender.recommend("103").user_known
    assert not recommender.recommend(asked).user_known
    assert recommender.recommend(history=[asked]).unknown_items == (asked,)


def test_the_lists_of_many_users_are_named_so_that_they_can_be_joined() -> None:
    recommender = popular()
    for asked in ([103, 9], [103.0, 9.0], [Decimal(103), np.int8(9)], pd.Series([103.0, 9])):
        lists = recommender.recommend_many(asked, k=1)
        assert lists.select("user_id", "source").rows() == [(103, "model"), (9, "popular")]
    assert recommender.recommend_many([103, "9"])["user_id"].to_list() == ["103", "9"]
    assert recommender.recommend_many([2**64])["user_id"].to_list() == [str(2**64)]
    assert recommender.recommend_many([]).schema["user_id"] == pl.Int64
    assert popular(text_ids=True).recommend_many([]).schema["user_id"] == pl.String


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
    monkeypatch.setattr("foretaste.serving.profiles.KEPT_AS_LISTS", 5)
    assert recommender.recommend(100, k=3) == before


# Many users


@pytest.mark.parametrize("exclude_seen", [True, False])
def test_many_users_get_what_each_would_get_alone(
    recommender: Recommender, *, exclude_seen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalogue_search, "BLOCK_EVENTS", 60)
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


def test_blocks_hold_every_user_once_and_histories_of_similar_length(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(catalogue_search, "BLOCK_EVENTS", 25)
    events = make_events()
    users = np.arange(NUM_USERS)
    found = list(catalogue_search.blocks(events, users, scores_per_user=0))
    assert sorted(np.concatenate(found).tolist()) == list(range(NUM_USERS))
    length = np.diff(events.offsets)
    assert all(len(block) * length[block].max() <= 25 or len(block) == 1 for block in found)


# Similar items, reasons


@pytest.mark.parametrize("index", ["exact", "ivf_sq8"])
@pytest.mark.parametrize("kind", ["sasrec", "als"])
def test_similar_items_have_the_highest_cosine(
    kind: str, index: IndexChoice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(faiss_index, "FEW_LISTS", 0)  # lists are read however few there are
    recommender = build_recommender(make_trained(kind), index=index)
    table = every_vector(recommender.trained.model).detach()[:NUM_ITEMS].double()
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


def test_an_item_is_not_similar_to_itself_and_an_unknown_one_is_an_error(
    recommender: Recommender,
) -> None:
    everything = recommender.similar(503, 1000)
    assert sorted(map(int, ids(everything))) == [i for i in range(500, 520) if i != 503]
    silent = recommender.similar(500 + SILENT_ITEM)  # in the item table, and of no event
    assert (silent.rows, silent.unknown_items) == ((), (500 + SILENT_ITEM,))
    with pytest.raises(DataError, match="no item has the id 'unheard': give an item") as caught:
        recommender.similar("unheard", 4)
    assert (caught.value.name, caught.value.value) == ("item_id", "unheard")


@pytest.mark.parametrize(
    ("asked", "text_ids", "near"),
    [
        ("I503", True, "'i503'"),
        (" i503 ", True, "'i503'"),
        ("0503", False, "503"),
        ("503.0", False, "503"),
    ],
)
def test_an_unknown_item_gets_the_nearest_id_suggested(
    asked: str, near: str, *, text_ids: bool
) -> None:
    with pytest.raises(DataError, match=f"did you mean {near}"):
        popular(text_ids=text_ids).similar(asked)


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
    removed, without = catalogue_search.without_each(history, last=50)
    assert sorted(removed.tolist()) == sorted(set((np.arange(30, 80) % 70).tolist()))
    assert all(item not in left for item, left in zip(removed, without, strict=True))


# Building


def test_a_fallback_with_another_window_answers_unknown_users() -> None:
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

"""Splits: by hand, against a slow oracle, by laws, and refused input."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from foretaste.data import interactions as interactions_of_data
from foretaste.data import splits, splitting
from foretaste.data.arrays import user_blocks
from foretaste.data.interactions import Interactions
from foretaste.data.splits import (
    TEST,
    TRAIN,
    UNUSED,
    VALIDATION,
    Split,
    SplitConfig,
    TemporalSplitConfig,
)
from foretaste.data.splitting import (
    cold_items_split,
    cold_users_split,
    given_split,
    given_split_by_column,
    leave_last_split,
    leave_last_within_training,
    make_split,
    random_split,
    ratio_split,
    temporal_split,
)
from foretaste.data.vocabulary import Vocabulary
from foretaste.errors import ConfigError, DataError

Event = tuple[str, str, int]
"""(user, item, second)"""


def interactions(rows: list[Event], *, timed: bool = True, **columns: list[object]) -> Interactions:
    """Events in the form that reading gives them; users and items numbered as they appear."""
    users, items = list(dict.fromkeys(r[0] for r in rows)), list(dict.fromkeys(r[1] for r in rows))
    order = sorted(
        range(len(rows)), key=lambda i: (users.index(rows[i][0]), rows[i][2] if timed else 0)
    )
    counts = [sum(r[0] == user for r in rows) for user in users]
    return Interactions(
        users=Vocabulary(pl.Series(users, dtype=pl.String)),
        items=Vocabulary(pl.Series(items, dtype=pl.String)),
        offsets=np.cumsum([0, *counts], dtype=np.int64),
        item_idx=np.array([items.index(rows[i][1]) for i in order], dtype=np.int32),
        timestamp_s=np.array([rows[i][2] for i in order], dtype=np.int64) if timed else None,
        columns={n: np.array([values[i] for i in order]) for n, values in columns.items()},
    )


TEN: list[Event] = [
    ("a", "p", 1),
    ("a", "q", 2),
    ("b", "p", 3),
    ("a", "r", 4),
    ("b", "q", 5),
    ("b", "r", 6),
    ("a", "s", 7),
    ("c", "p", 8),
    ("c", "s", 9),
    ("a", "p", 10),
]


def named(split: Split, part: int) -> list[tuple[str, str]]:
    """(user, item) of a part, by their ids."""
    events = split.events.select(split.part_E == part)
    users, items = events.users.ids.to_list(), events.items.ids.to_list()
    return [(users[u], items[i]) for u, i in zip(events.user_idx, events.item_idx, strict=True)]


def asked(split: Split, part: str) -> list[tuple[str, str, str]]:
    """(user, history, targets) of each query, by their ids."""
    holdout = getattr(split, part)
    queries = holdout.queries(np.arange(len(holdout)))
    items = split.events.items.ids.to_list()
    rows = []
    for q in range(len(holdout)):
        history = queries.history_N[queries.offsets_B1[q] : queries.offsets_B1[q + 1]].tolist()
        targets = holdout.target_item[holdout.target_offsets[q] : holdout.target_offsets[q + 1]]
        user = split.events.users.ids[int(queries.user_B[q])]
        rows.append((user, "".join(items[i] for i in history), "".join(items[i] for i in targets)))
    return rows


# --- by hand ---------------------------------------------------------------------------------


def test_a_temporal_split_cuts_all_users_at_the_same_times() -> None:
    # Ten events: 60 % are those before second 7, 20 % are seconds 7 and 8, then 9 and 10.
    split = temporal_split(interactions(TEN), validation=0.2, test=0.2)
    assert named(split, VALIDATION) == [("a", "s"), ("c", "p")]
    assert named(split, TEST) == [("a", "p"), ("c", "s")]
    assert len(split.train) == 6
    assert split.leaks == ()


def test_a_split_and_its_parts_show_themselves_in_a_line() -> None:
    split = temporal_split(interactions(TEN), validation=0.2, test=0.2)
    assert repr(split) == "Split('temporal', 6 events to train, 2 to validate, 2 to test)"
    assert repr(split.test) == "Holdout('test', 2 queries, 2 targets)"
    assert repr(split.train) == "Interactions(6 events, 3 users, 4 items)"


def test_a_rolling_query_knows_everything_its_user_did_before() -> None:
    split = temporal_split(interactions(TEN), validation=0.2, test=0.4)
    # Test: seconds 7 to 10. c has done nothing before 8, and then p before s.
    assert asked(split, "test") == [
        ("a", "pqr", "s"),
        ("a", "pqrs", "p"),
        ("c", "", "p"),
        ("c", "p", "s"),
    ]
    assert split.test.has_history_Q.tolist() == [True, True, False, True]
    assert asked(split, "validation") == [("b", "p", "q"), ("b", "pq", "r")]


def test_the_sizes_count_apart_what_training_cannot_know() -> None:
    train, _, test = temporal_split(interactions(TEN), validation=0.2, test=0.4).sizes()
    assert (train.events, train.users) == (4, 2)
    # a and c are in the test; c is new, with one query before which c did nothing; s is new.
    assert (test.events, test.users, test.users_in_training, test.queries) == (4, 2, 1, 4)
    assert (test.queries_without_history, test.events_of_new_items) == (1, 2)


def test_events_of_one_second_stay_on_one_side() -> None:
    rows = [
        ("a", "p", 1),
        ("b", "p", 1),
        ("a", "q", 5),
        ("b", "q", 5),
        ("b", "r", 5),
        ("a", "r", 9),
    ]
    # Half of six falls within second 5; two events before it are nearer to three than five are.
    split = temporal_split(interactions(rows), validation=0.0, test=0.5)
    assert split.part_E.tolist() == [TRAIN, TEST, TEST, TRAIN, TEST, TEST]


def test_leave_last_holds_out_the_last_and_the_last_but_one() -> None:
    rows = [*TEN, ("d", "p", 11), ("d", "q", 12)]
    split = leave_last_split(interactions(rows))
    assert named(split, TEST) == [("a", "p"), ("b", "r")]
    assert named(split, VALIDATION) == [("a", "s"), ("b", "q")]
    assert split.notes == ("2 users have fewer than 3 events, all of which stay in training",)
    assert asked(split, "test") == [("a", "pqrs", "p"), ("b", "pq", "r")]
    assert asked(split, "validation") == [("a", "pqr", "s"), ("b", "p", "q")]
    without = leave_last_split(interactions(rows), validation=False)
    assert named(without, TEST) == [("a", "p"), ("b", "r"), ("c", "s"), ("d", "q")]
    assert without.notes == ()


def test_a_ratio_split_takes_the_last_share_of_each_user_rounded_down() -> None:
    # a has 5 events: 1 for the test and 2 (.4 of 5) for validation; b has 3: .2 of 3 is none.
    split = ratio_split(interactions(TEN), validation=0.4, test=0.2)
    assert split.part_E.tolist() == [0, 0, 1, 1, 2, 0, 0, 1, 0, 0]
    assert split.notes == ("2 users have too few events for a test share of 0.2",)
    assert asked(split, "test") == [("a", "pqrs", "p")]
    assert asked(split, "validation") == [("a", "pq", "rs"), ("b", "pq", "r")]


def test_a_share_that_binary_cannot_write_is_not_rounded_away() -> None:
    rows = [("a", f"i{n}", n) for n in range(100)]
    split = ratio_split(interactions(rows), validation=0.29, test=0.57)
    assert np.bincount(split.part_E).tolist() == [14, 29, 57]


def test_a_random_split_has_its_shares_and_its_seed() -> None:
    events = interactions([("a", f"i{n}", n) for n in range(100)])
    split = random_split(events, validation=0.2, test=0.3, seed=1)
    assert np.bincount(split.part_E).tolist() == [50, 20, 30]
    assert (split.part_E == random_split(events, validation=0.2, test=0.3, seed=1).part_E).all()
    assert (split.part_E != random_split(events, validation=0.2, test=0.3, seed=2).part_E).any()


def test_given_parts_are_brought_under_one_vocabulary() -> None:
    train = interactions([("a", "p", 1), ("b", "q", 2)], rating=[1.0, 2.0])
    test = interactions([("c", "q", 3), ("a", "r", 4)], rating=[3.0, 4.0])
    split = given_split(train, test=test)
    assert split.events.users.ids.to_list() == ["a", "b", "c"]
    assert split.events.items.ids.to_list() == ["p", "q", "r"]
    assert asked(split, "test") == [("a", "p", "r"), ("c", "", "q")]
    assert split.events.columns["rating"].tolist() == [1.0, 4.0, 2.0, 3.0]


def test_integer_ids_meeting_text_ids_become_text() -> None:
    def numbered(ids: pl.Series) -> Interactions:
        return Interactions(
            users=Vocabulary(ids),
            items=Vocabulary(pl.Series(["p"])),
            offsets=np.array([0, 1], dtype=np.int64),
            item_idx=np.array([0], dtype=np.int32),
        )

    split = given_split(numbered(pl.Series([7])), test=numbered(pl.Series(["7"])))
    assert split.events.users.ids.to_list() == ["7"]
    assert asked(split, "test") == [("7", "p", "p")]


def test_side_tables_of_given_parts_are_joined_by_id() -> None:
    def with_table(rows: list[Event], titles: list[str]) -> Interactions:
        bare = interactions(rows)
        return Interactions(
            users=bare.users,
            items=bare.items,
            offsets=bare.offsets,
            item_idx=bare.item_idx,
            item_table=pl.DataFrame({"title": titles}),
        )

    train = with_table([("a", "p", 1), ("a", "q", 2)], ["P", "Q"])
    test = with_table([("a", "r", 1), ("a", "q", 2)], ["R", "other"])
    table = given_split(train, test=test).events.item_table
    assert table is not None
    assert table["title"].to_list() == ["P", "Q", "R"]


def test_contexts_of_given_parts_stay_with_their_events() -> None:
    train = interactions([("a", "p", 1), ("b", "q", 2)])
    test = interactions([("a", "r", 4), ("c", "q", 3)])
    train = replace(train, context=pl.DataFrame({"hour": [1, 2], "old": ["x", "y"]}))
    test = replace(test, context=pl.DataFrame({"hour": [4.5, 3.5]}))
    events = given_split(train, test=test).events
    assert events.context is not None
    assert events.context.columns == ["hour"]
    assert events.context["hour"].to_list() == [1, 4.5, 2, 3.5]  # a, a, b, c
    assert "context 'old' is not in all parts and is left out" in events.notes
    assert given_split(replace(train, context=None), test=test).events.context is None


def test_parts_are_read_from_the_context_too() -> None:
    events = interactions([("a", i, t) for t, i in enumerate("pqr")])
    events = replace(events, context=pl.DataFrame({"set": ["train", "valid", "test"]}))
    split = given_split_by_column(events, column="set")
    assert split.part_E.tolist() == [TRAIN, VALIDATION, TEST]
    broken = replace(events, context=pl.DataFrame({"set": ["train", None, "test"]}))
    with pytest.raises(DataError, match="holds 'nothing', which is not a part"):
        given_split_by_column(broken, column="set")


@pytest.mark.parametrize(
    "parts",
    [
        ["train", "valid", "test", "unused"],
        [0, 1, 2, 3],
        [0.0, 1.0, 2.0, 3.0],
        ["Train", "VAL", " test", "unused"],
    ],
)
def test_parts_are_read_from_a_column(parts: list[object]) -> None:
    events = interactions([("a", i, t) for t, i in enumerate("pqrs")], part=parts)
    split = given_split_by_column(events)
    assert split.part_E.tolist() == [TRAIN, VALIDATION, TEST, UNUSED]
    assert asked(split, "test") == [("a", "pq", "r")]


def test_a_share_of_given_training_events_is_held_out_by_a_seed() -> None:
    rows = [("a", f"i{n}", n) for n in range(20)] + [("b", "x", 0), ("b", "y", 1)]
    events = interactions(rows, part=[*[0] * 16, *[2] * 4, 0, 2])
    whole, held = given_split_by_column(events), given_split_by_column(events, validation=0.2)
    # 17 training events: a fifth is 3
    assert np.bincount(held.part_E).tolist() == [14, 3, 5]
    assert (held.refit().part_E == whole.part_E).all()
    again, other = (
        given_split_by_column(events, validation=0.2, seed=seed).part_E for seed in (0, 1)
    )
    assert (again == held.part_E).all()
    assert (other != held.part_E).any()
    validated = interactions(rows[:3], part=[0, 1, 2])
    with pytest.raises(ConfigError, match=r"split\.validation is 0\.2.*leave the share out"):
        given_split_by_column(validated, validation=0.2)


def test_cold_items_are_in_one_part_with_all_their_events() -> None:
    rng = np.random.default_rng(0)
    rows = [(f"u{u}", f"i{i}", t) for u in range(30) for t, i in enumerate(rng.permutation(10)[:6])]
    events = interactions(rows)
    split = cold_items_split(events, validation=0.2, test=0.3, seed=1)
    parts = [set(events.item_idx[split.part_E == part].tolist()) for part in range(3)]
    assert [len(part) for part in parts] == [5, 2, 3]
    assert not parts[0] & parts[1]
    assert not (parts[0] | parts[1]) & parts[2]
    # a user's cold items are asked for together, from everything else that the user did
    user = int(split.test.user_Q[0])
    asked_for = split.test.target_item[: split.test.target_offsets[1]]
    assert sorted(asked_for) == sorted(set(events.history(user).tolist()) & parts[2])
    history = split.test.queries(np.array([0])).history_N.tolist()
    assert sorted(history) == sorted(set(events.history(user).tolist()) - parts[2])
    assert split.sizes()[2].events_of_new_items == split.sizes()[2].events
    assert (cold_items_split(events, validation=0.2, test=0.3, seed=1).part_E == split.part_E).all()
    assert (cold_items_split(events, validation=0.2, test=0.3, seed=2).part_E != split.part_E).any()


def test_cold_users_are_in_one_part_and_asked_for_from_no_history() -> None:
    events = interactions([(f"u{u}", f"i{i}", i) for u in range(10) for i in range(u % 3 + 1)])
    split = cold_users_split(events, validation=0.2, test=0.3, seed=1)
    parts = [set(events.user_idx[split.part_E == part].tolist()) for part in range(3)]
    assert [len(part) for part in parts] == [5, 2, 3]
    assert sum(map(len, parts)) == len(set.union(*parts))
    for holdout, users in zip((split.validation, split.test), parts[1:], strict=True):
        assert set(holdout.user_Q.tolist()) == users
        assert not holdout.has_history_Q.any()
        asked_for = np.diff(holdout.target_offsets)
        assert (asked_for == np.diff(events.offsets)[holdout.user_Q]).all()
    assert (cold_users_split(events, validation=0.2, test=0.3, seed=1).part_E == split.part_E).all()
    with pytest.raises(DataError, match="the validation part of this cold_users split is empty"):
        cold_users_split(interactions(TEN))
    three = interactions([(u, "i", 0) for u in "abc"], timed=False)
    untimed = cold_users_split(three, validation=0.0, test=0.4)
    assert "users were held out" in untimed.leaks[-1]


def test_too_few_items_cannot_be_cold() -> None:
    with pytest.raises(DataError, match="the validation part of this cold_items split is empty"):
        cold_items_split(interactions(TEN))
    with pytest.raises(ConfigError, match="leave nothing to train on"):
        cold_items_split(interactions(TEN), validation=0.5, test=0.5)
    untimed = cold_items_split(interactions(TEN, timed=False), validation=0.0, test=0.3)
    assert any("items were held out whatever their order" in leak for leak in untimed.leaks)


def test_validation_within_training_leaves_the_test_what_it_was() -> None:
    rows = [
        ("a", "p", 1),
        ("a", "q", 2),
        ("a", "r", 3),
        ("b", "p", 4),
        ("a", "s", 8),
        ("b", "q", 9),
    ]
    split = temporal_split(interactions([*rows, ("a", "t", 10)]), validation=0.2, test=0.2)
    inner = leave_last_within_training(split)
    assert named(inner, TEST) == named(split, TEST)
    assert asked(inner, "test") == asked(split, "test")
    # Before the test a did p q r s: s is now predicted from p q r; b, with fewer than three
    # events there, is not validated on.
    assert asked(inner, "validation") == [("a", "pqr", "s")]
    assert any("fewer than 3" in note for note in inner.notes)
    assert (inner.refit().part_E == split.refit().part_E).all()


# --- what leaks ------------------------------------------------------------------------------


def test_leave_last_says_how_much_of_the_test_is_older_than_training() -> None:
    # Test: a at 10 and b at 6. Training (a: 1 2 4, b: 3, c: 8 9) ends at 9: b's one of two is
    # older. Newer than 10 is nothing, newer than 6 are two of six: (0 + 1/3) / 2 = 16.7 %.
    first, second = leave_last_split(interactions(TEN)).leaks
    assert first.startswith("50.0% (1 of 2) of the test events are older than the newest training")
    assert "on average 16.7% of training is newer than a test event" in first
    # Validation: a at 7, b at 5: both older; newer than 7 are 2 of 6, than 5 the same.
    assert second.startswith("100.0% (2 of 2) of the validation events")
    assert "33.3%" in second


def test_a_split_against_the_order_says_how_much_of_training_is_newer_than_its_users_test() -> None:
    rows = [("a", "p", 1), ("a", "q", 2), ("a", "r", 3), ("b", "p", 9)]
    split = given_split_by_column(interactions(rows, part=["train", "test", "train", "train"]))
    # Of three training events, a's at 3 came after a's test event at 2; b's at 9 is b's own.
    assert "33.3% (1 of 3) of the training events came after a test event of the same" in " ".join(
        split.leaks
    )


def test_test_events_of_the_second_before_them_are_counted() -> None:
    rows = [("a", "p", 1), ("b", "p", 2), ("a", "q", 5), ("a", "r", 5), ("b", "q", 5)]
    split = temporal_split(interactions(rows), validation=0.0, test=0.6)
    # Test: a's q and r, b's q, all at 5; only a's r follows an event of its own user's second.
    assert len(split.leaks) == 1
    assert split.leaks[0].startswith("33.3% (1 of 3) of the test events share a second")


def test_tables_without_times_note_that_their_order_is_used() -> None:
    events = interactions(TEN, timed=False)
    assert "the order of rows is the order in time" in " ".join(leave_last_split(events).leaks)
    assert "came after a test event" in " ".join(random_split(events, test=0.3).leaks)


def test_moving_validation_into_training_counts_the_leaks_again() -> None:
    refit = leave_last_split(interactions(TEN)).refit()
    # Newer than b's 6 are now 7, 8 and 9 of eight training events: (0 + 3/8) / 2 = 18.75 %.
    assert "18.8%" in refit.leaks[0]
    assert len(refit.leaks) == 1


# --- laws and the oracle ---------------------------------------------------------------------

TABLES = st.lists(
    st.tuples(st.sampled_from("abcde"), st.sampled_from("pqrst"), st.integers(0, 30)),
    min_size=4,
    max_size=40,
)
KINDS = {
    "temporal": lambda events: temporal_split(events, validation=0.2, test=0.3),
    "leave_last": leave_last_split,
    "ratio": lambda events: ratio_split(events, validation=0.2, test=0.3),
    "random": lambda events: random_split(events, validation=0.2, test=0.3, seed=3),
    "within": lambda events: leave_last_within_training(
        temporal_split(events, validation=0.0, test=0.3)
    ),
}


def slow_queries(split: Split, part: int) -> list[tuple[str, str, str]]:
    """The double loop that `Holdout` must equal."""
    found = []
    users, items = split.events.users.ids.to_list(), split.events.items.ids.to_list()
    for u, user in enumerate(users):
        rows = range(split.events.offsets[u], split.events.offsets[u + 1])
        done = [(items[split.events.item_idx[e]], split.part_E[e]) for e in rows]
        if split.rolling:
            for e, (item, its) in enumerate(done):
                if its == part:
                    found.append((user, "".join(i for i, p in done[:e] if p <= part), item))
        elif any(p == part for _, p in done):
            past, wanted = (i for i, p in done if p < part), (i for i, p in done if p == part)
            found.append((user, "".join(past), "".join(wanted)))
    return found


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, derandomize=True, max_examples=30)
@given(rows=TABLES)
def test_queries_equal_the_double_loop(kind: str, rows: list[Event]) -> None:
    try:
        split = KINDS[kind](interactions(rows))
    except DataError:  # too few of something: the doors below
        return
    for part, name in ((VALIDATION, "validation"), (TEST, "test")):
        if (split.part_E == part).any():
            assert asked(split, name) == slow_queries(split, part)


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, derandomize=True, max_examples=30)
@given(rows=TABLES)
def test_parts_are_disjoint_complete_and_in_order(kind: str, rows: list[Event]) -> None:
    events = interactions(rows)
    try:
        split = KINDS[kind](events)
    except DataError:
        return
    held = len(split.validation.target_item) + len(split.test.target_item)
    assert len(split.train) + held == len(events)
    assert len(split.train) > 0
    assert events.timestamp_s is not None
    before, after = split.part_E < TEST, split.part_E == TEST
    if kind in ("temporal", "within"):
        assert events.timestamp_s[before].max() < events.timestamp_s[after].min()
    if kind in ("temporal", "leave_last", "ratio", "within"):
        for u in range(events.num_users):
            assert (np.diff(split.part_E[events.offsets[u] : events.offsets[u + 1]]) >= 0).all()


@settings(deadline=None, derandomize=True, max_examples=30)
@given(rows=TABLES)
def test_no_other_cut_in_time_meets_the_share_better(rows: list[Event]) -> None:
    events = interactions(rows)
    try:
        split = temporal_split(events, validation=0.0, test=0.3)
    except DataError:
        return
    times = sorted(row[2] for row in rows)
    wanted = round(len(rows) * 0.7)
    off = [abs(sum(t < cut for t in times) - wanted) for cut in set(times)]
    assert abs(len(split.train) - wanted) == min(off)


# --- doors -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("validation", "test"), [(0.1, -0.1), (0.1, 1.0), (-0.1, 0.1), (0.5, 0.5)])
def test_shares_that_leave_nothing_are_refused(validation: float, test: float) -> None:
    wrong = "test" if not 0 <= test < 1 else "validation" if validation < 0 else None
    for split in (temporal_split, ratio_split, random_split):
        with pytest.raises(ConfigError) as caught:
            split(interactions(TEN), validation=validation, test=test)
        assert caught.value.name == wrong  # None: their sum leaves nothing to train on
    with pytest.raises(ConfigError):
        TemporalSplitConfig(validation=validation, test=test)


def test_a_temporal_split_without_times_says_what_to_do() -> None:
    with pytest.raises(DataError, match="timestamp"):
        temporal_split(interactions(TEN, timed=False))


def test_times_that_are_all_one_are_refused() -> None:
    rows = [(user, item, 5) for user, item, _ in TEN]
    with pytest.raises(DataError, match="1 different times"):
        temporal_split(interactions(rows))


@pytest.mark.parametrize("kind", KINDS)
def test_events_too_few_are_refused_with_a_word(kind: str) -> None:
    for rows in ([], [("a", "p", 1)]):
        with pytest.raises(DataError, match=r"empty: \d events"):
            KINDS[kind](interactions(rows))


@pytest.mark.parametrize("kind", KINDS)
def test_one_user_can_be_split(kind: str) -> None:
    split = KINDS[kind](interactions([("a", f"i{n}", n) for n in range(10)]))
    assert len(split.test) > 0


def test_a_part_column_that_is_missing_or_wrong_is_named() -> None:
    with pytest.raises(DataError, match="'part'"):
        given_split_by_column(interactions(TEN))
    with pytest.raises(DataError, match="'tset'"):
        given_split_by_column(interactions(TEN, part=["train"] * 9 + ["tset"]))


# --- settings --------------------------------------------------------------------------------


def test_a_recipe_says_its_split_by_kind() -> None:
    adapter: TypeAdapter[SplitConfig] = TypeAdapter(SplitConfig)
    events = interactions(TEN, part=["train"] * 8 + ["validation", "test"])
    for written, same in [
        ({"kind": "temporal", "test": 0.3}, temporal_split(events, test=0.3)),
        ({"kind": "leave_last", "validation": False}, leave_last_split(events, validation=False)),
        ({"kind": "ratio", "validation": 0.0}, ratio_split(events, validation=0.0)),
        ({"kind": "random", "seed": 4}, random_split(events, seed=4)),
        ({"kind": "given"}, given_split_by_column(events)),
        (
            {"kind": "temporal", "stop_on": "leave_last"},
            leave_last_within_training(temporal_split(events)),
        ),
    ]:
        split = make_split(adapter.validate_python(written), events)
        assert (split.kind, split.rolling) == (same.kind, same.rolling)
        assert split.part_E.tolist() == same.part_E.tolist()


def test_a_misspelt_setting_is_refused() -> None:
    with pytest.raises(ValidationError, match="tset"):
        TypeAdapter(SplitConfig).validate_python({"kind": "temporal", "tset": 0.1})


# --- real data -------------------------------------------------------------------------------


def test_movielens_cut_in_time_leaves_few_users_that_training_knows(shared_data: Path) -> None:
    table = pl.read_csv(
        shared_data / "ml-100k" / "u.data.gz",
        separator="\t",
        has_header=False,
        new_columns=["user", "item", "rating", "timestamp"],
    )
    order = table.with_row_index().sort("user", "timestamp", "index")
    users, items = (Vocabulary(order[name].unique().sort()) for name in ("user", "item"))
    events = Interactions(
        users=users,
        items=items,
        offsets=np.concatenate([[0], np.cumsum(np.bincount(order["user"] - 1))]).astype(np.int64),
        item_idx=(order["item"] - 1).to_numpy().astype(np.int32),
        timestamp_s=order["timestamp"].to_numpy(),
    )
    split = temporal_split(events)
    _, validation, test = split.sizes()
    assert test.users_in_training == 69
    assert abs(test.events - 10_000) < 50
    inner = leave_last_within_training(split).sizes()[1]
    assert inner.users_in_training > 5 * validation.users_in_training


@pytest.mark.parametrize("block", [1, 3, 7])
@pytest.mark.parametrize("positive", ["", "liked"])
@pytest.mark.parametrize("split_of", [leave_last_split, ratio_split, temporal_split])
def test_users_looked_at_in_blocks_give_the_split_and_the_leaks_of_all_at_once(
    split_of: Callable[[Interactions], Split],
    positive: str,
    block: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rng = np.random.default_rng(block)
    rows = [
        (f"u{rng.integers(5)}", f"i{rng.integers(5)}", int(rng.integers(99))) for _ in range(150)
    ]
    events = interactions(rows, liked=list(rng.integers(0, 2, 150)))
    events = replace(events, positive=positive)
    whole = split_of(events)
    for module in (splits, splitting):
        monkeypatch.setattr(module, "user_blocks", partial(user_blocks, most=block))
    monkeypatch.setattr(interactions_of_data, "_BLOCK", block)
    again = split_of(replace(events))
    assert again.part_E.tolist() == whole.part_E.tolist()
    assert again.leaks == whole.leaks
    assert again.train.item_count.tolist() == whole.train.item_count.tolist()


def test_blocks_hold_all_users_once_and_no_more_events_than_one_user_or_the_bound() -> None:
    offsets = np.array([0, 0, 3, 3, 10, 11, 12, 12])
    assert list(user_blocks(offsets, 3)) == [(0, 3), (3, 4), (4, 7)]
    assert list(user_blocks(offsets, 100)) == [(0, 7)]
    assert list(user_blocks(offsets[:1], 100)) == []

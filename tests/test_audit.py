"""The audit finds every planted leak, and has no findings in clean data."""

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
from scipy import stats

from foretaste.data.audit import (
    Finding,
    audit_events,
    audit_split,
    explained_share,
    rank_correlation,
    separation,
)
from foretaste.data.interactions import Interactions
from foretaste.data.splits import TEST, TRAIN, VALIDATION, Split
from foretaste.data.splitting import leave_last_split, random_split, temporal_split
from foretaste.data.vocabulary import Vocabulary
from foretaste.errors import ConfigError

NUM_USERS, NUM_ITEMS, DAY_S = 120, 80, 86_400


def clean(seed: int = 0, **columns: np.ndarray) -> Interactions:
    """120 users, 80 items of unequal popularity, no pair twice, a year of distinct seconds."""
    generator = np.random.default_rng(seed)
    weight = 1 / np.arange(1, NUM_ITEMS + 1) ** 0.5
    weight = generator.permutation(weight / weight.sum())
    per_user = generator.integers(8, 30, NUM_USERS)
    item = [generator.choice(NUM_ITEMS, n, replace=False, p=weight) for n in per_user]
    seconds = [np.sort(generator.choice(365 * DAY_S, n, replace=False)) for n in per_user]
    total = int(per_user.sum())
    return Interactions(
        users=Vocabulary(pl.Series(generator.permutation(NUM_USERS) + 1000)),
        items=Vocabulary(pl.Series(generator.permutation(NUM_ITEMS) + 5000)),
        offsets=np.concatenate([[0], np.cumsum(per_user)]).astype(np.int64),
        item_idx=np.concatenate(item).astype(np.int32),
        timestamp_s=np.concatenate(seconds) + 1_500_000_000,
        columns={"rating": generator.integers(1, 6, total).astype(np.float32), **columns},
        user_table=pl.DataFrame({"age": generator.integers(15, 80, NUM_USERS)}),
        item_table=pl.DataFrame({"price": generator.random(NUM_ITEMS)}),
    )


def whats(findings: tuple[Finding, ...], severity: str = "") -> set[str]:
    return {f.what for f in findings if not severity or f.severity == severity}


def the(findings: tuple[Finding, ...], what: str) -> Finding:
    (found,) = (finding for finding in findings if finding.what == what)
    return found


@pytest.mark.parametrize("seed", range(5))
def test_clean_events_and_a_clean_split_raise_no_alarm(seed: int) -> None:
    events = clean(seed)
    assert audit_events(events) == ()
    assert audit_split(temporal_split(events)) == ()


# --- duplicates ------------------------------------------------------------------------------


def doubled(events: Interactions, rows: list[int], *, later_s: int) -> Interactions:
    """Repeat some events `later_s` seconds later; each user's order stays that of time."""
    assert events.timestamp_s is not None
    user = np.concatenate([events.user_idx, events.user_idx[rows]])
    time = np.concatenate([events.timestamp_s, events.timestamp_s[rows] + later_s])
    order = np.lexsort((time, user))
    return replace(
        events,
        offsets=np.concatenate([[0], np.cumsum(np.bincount(user))]).astype(np.int64),
        item_idx=np.concatenate([events.item_idx, events.item_idx[rows]])[order],
        timestamp_s=time[order],
        columns={n: np.concatenate([c, c[rows]])[order] for n, c in events.columns.items()},
    )


def test_events_that_are_there_twice_are_counted() -> None:
    assert the(audit_events(doubled(clean(), [3, 50, 400], later_s=0)), "repeated_event").count == 3


def test_an_item_had_before_is_only_a_note() -> None:
    found = the(audit_events(doubled(clean(), [3, 50, 400], later_s=7)), "repeated_pair")
    assert (found.severity, found.count) == ("note", 3)


@pytest.mark.parametrize(
    ("later_s", "what", "severity"),
    [(0, "event_in_two_parts", "leak"), (1, "pair_in_two_parts", "warning")],
)
def test_an_event_planted_in_two_parts_is_found(later_s: int, what: str, severity: str) -> None:
    events = doubled(clean(), [3, 50, 400], later_s=later_s)
    pair = events.user_idx.astype(np.int64) * NUM_ITEMS + events.item_idx
    twice = np.isin(pair, [p for p in pair if (pair == p).sum() == 2])
    _, first = np.unique(pair, return_index=True)
    second = twice & ~np.isin(np.arange(len(events)), first)
    part = np.where(second, TEST, TRAIN).astype(np.uint8)
    part[-1] = VALIDATION
    split = Split(kind="given", events=events, part_E=part, rolling=False)
    found = the(audit_split(split), what)
    assert (found.severity, found.count) == (severity, 3)


def test_without_times_a_repeated_pair_across_given_parts_is_a_leak() -> None:
    events = replace(doubled(clean(), [3], later_s=0), timestamp_s=None)
    part = np.zeros(len(events), dtype=np.uint8)
    part[4] = TEST
    split = Split(kind="given", events=events, part_E=part, rolling=False)
    assert the(audit_split(split), "event_in_two_parts").count == 1


# --- order in time ---------------------------------------------------------------------------


def test_training_events_newer_than_the_test_are_counted() -> None:
    events = clean()
    split = temporal_split(events)
    part = split.part_E.copy()
    assert events.timestamp_s is not None
    # One test event becomes training: newer than the test events before it, of whatever user.
    moved = int(np.flatnonzero(part == TEST)[0])
    part[moved] = TRAIN
    meddled = replace(split, part_E=part)
    older = int((events.timestamp_s[part == TEST] < events.timestamp_s[moved]).sum())
    assert older > 0
    assert the(audit_split(meddled), "test_older_than_training").count == older


def test_a_random_split_is_found_to_train_on_its_users_future() -> None:
    split = random_split(clean(), test=0.2)
    events, found = split.events, the(audit_split(split), "own_future_in_training")
    slow = 0
    for u in range(events.num_users):
        parts = split.part_E[events.offsets[u] : events.offsets[u + 1]].tolist()
        slow += parts[parts.index(TEST) :].count(TRAIN) if TEST in parts else 0
    assert (found.severity, found.count) == ("leak", slow)


def test_leave_last_is_found_to_test_on_the_past() -> None:
    split = leave_last_split(clean())
    assert whats(audit_split(split)) == {"test_older_than_training"}


# --- features of the future ------------------------------------------------------------------


def planted_tables(events: Interactions) -> Mapping[str, Interactions]:
    count = events.item_count.astype(np.float64)
    rating = events.columns["rating"]
    assert events.timestamp_s is not None
    last = [events.timestamp_s[events.offsets[u + 1] - 1] for u in range(NUM_USERS)]
    mean = np.bincount(events.item_idx, rating, NUM_ITEMS) / events.item_count
    with_item = {
        "count": replace(events, item_table=pl.DataFrame({"price": count})),
        "log_count": replace(events, item_table=pl.DataFrame({"trend": np.log1p(count)})),
        "mean": replace(events, item_table=pl.DataFrame({"stars": mean})),
        "last": replace(events, user_table=pl.DataFrame({"seen": np.array(last)})),
    }
    columns = {**events.columns, "n": np.diff(events.offsets)[events.user_idx]}
    context = pl.DataFrame({"n": columns["n"], "hour": np.arange(len(events)) % 24})
    beside = {
        "column": replace(events, columns=columns),
        "context": replace(events, context=context),
    }
    return {**with_item, **beside}


@pytest.mark.parametrize("name", ["count", "log_count", "mean", "last", "column", "context"])
def test_a_feature_made_from_the_whole_period_is_found(name: str) -> None:
    events = planted_tables(clean())[name]
    assert the(audit_events(events), "feature_of_the_future").severity == "warning"
    assert the(audit_split(temporal_split(events)), "feature_of_the_future").severity == "leak"


def test_a_feature_made_from_training_alone_is_no_leak() -> None:
    split = temporal_split(clean())
    table = pl.DataFrame({"popularity": split.train.item_count})
    events = replace(split.events, item_table=table)
    assert audit_split(replace(split, events=events)) == ()


@pytest.mark.parametrize("kind", ["value", "absence", "growing"])
def test_a_column_that_is_the_label_in_disguise_is_found(kind: str) -> None:
    rating = clean().columns["rating"]
    disguise = {
        "value": (rating * 7) % 6,  # 1 2 3 4 5 -> 1 2 3 4 5 in another order
        "growing": np.exp(rating.astype(np.float64)),
        "absence": np.where(rating > 3, np.random.default_rng(0).random(len(rating)), np.nan),
    }
    columns = {"seen": disguise[kind]}
    if kind == "absence":
        columns["rating"] = (rating > 3).astype(np.float32)
    found = the(audit_events(clean(**columns)), "column_tells_label")
    assert "'seen'" in found.sentence


# --- labels of tasks -------------------------------------------------------------------------


def told(**context: Callable[[np.ndarray], object]) -> Interactions:
    """Clicks and minutes watched, independent of their context but for the given columns."""
    events, draw = clean(), np.random.default_rng(5)
    click = (draw.random(len(events)) < 0.3).astype(np.int64)
    minutes = np.where(click == 1, draw.exponential(20, len(events)), np.nan)
    frame = pl.DataFrame(
        {
            "hour": draw.integers(0, 24, len(events)),
            "place": draw.choice(["a", "b"], len(events)),
            **{name: make(click) for name, make in context.items()},
        }
    )
    return replace(events, columns={"click": click, "minutes": minutes}, context=frame)


def test_a_context_that_knows_nothing_of_the_labels_raises_no_alarm() -> None:
    # the minutes of what was not clicked are missing, but one label is not a feature of another
    assert "column_tells_label" not in whats(audit_events(told()))


@pytest.mark.parametrize(
    "disguise",
    [
        lambda click: np.array(["no", "yes"])[click],
        lambda click: [None if clicked else "shown" for clicked in click],
        lambda click: click * np.random.default_rng(0).exponential(20, len(click)),
        lambda click: pl.Series(click).cast(pl.Datetime("us")),
    ],
    ids=["another text", "absence", "a quantity that only clicks have", "a time"],
)
def test_a_context_that_tells_the_label_is_named(
    disguise: Callable[[np.ndarray], object],
) -> None:
    found = [f for f in audit_events(told(after=disguise)) if f.what == "column_tells_label"]
    assert any("context 'after' tells 'click'" in f.sentence for f in found)
    assert {f.severity for f in found} == {"leak"}
    assert not any("'hour'" in f.sentence or "'place'" in f.sentence for f in found)


def test_a_feature_of_items_that_tells_the_label_is_named() -> None:
    events = clean()
    good_I = np.random.default_rng(1).random(NUM_ITEMS) < 0.5
    table = pl.DataFrame(
        {"shelf": np.where(good_I, "sold", "left"), "title": [str(n) for n in good_I.cumsum()]}
    )
    events = replace(
        events, columns={"label": good_I[events.item_idx].astype(np.int64)}, item_table=table
    )
    sentences = [f.sentence for f in audit_events(events) if f.what == "column_tells_label"]
    assert len(sentences) == 1
    assert sentences[0].startswith("item feature 'shelf' tells 'label' (100.0% of it)")


def test_labels_may_be_named_and_the_others_are_then_looked_at() -> None:
    events = told()
    found = audit_events(events, labels=["click"])
    assert "column 'minutes' tells 'click'" in the(found, "column_tells_label").sentence
    with pytest.raises(ConfigError, match=r"no column 'clicks'.*did you mean 'click'"):
        audit_events(events, labels=["clicks"])
    with pytest.raises(ConfigError, match="no column 'x'"):
        audit_split(temporal_split(events), labels=["x"])


def test_separation_is_one_for_what_parts_the_label_and_none_for_chance() -> None:
    # against counting the pairs that are in order, ties half
    x = np.concatenate([np.arange(10), np.arange(5, 15)]).astype(np.float64)
    label = np.repeat([0, 1], 10)
    pairs = (x[10:, None] > x[:10]).sum() + 0.5 * (x[10:, None] == x[:10]).sum()
    assert separation(x, label) == pytest.approx(2 * pairs / 100 - 1)
    assert separation(-x, label) == pytest.approx(2 * pairs / 100 - 1)
    assert separation(np.arange(20), label) == 1
    assert separation(np.arange(19), label[:19]) == 0
    assert separation(np.ones(20), label) == 0
    assert separation(np.arange(20), np.arange(20) % 3) == 0


# --- ids -------------------------------------------------------------------------------------


def with_item_ids(events: Interactions, ids: pl.Series) -> Interactions:
    return replace(events, items=Vocabulary(ids))


def test_item_ids_given_in_the_order_of_their_label_are_found() -> None:
    events = clean()
    good = events.item_idx % 3 == 0
    labelled = replace(events, columns={"label": good.astype(np.int8)})
    assert "id_tells_label" not in whats(audit_events(labelled))
    by_label = np.argsort(np.argsort(np.arange(NUM_ITEMS) % 3 == 0, kind="stable"))
    told = with_item_ids(labelled, pl.Series(by_label.astype(np.int64)))
    assert "order of item ids" in the(audit_events(told), "id_tells_label").sentence


def test_a_label_written_before_user_ids_is_found() -> None:
    events = clean()
    numbers = np.random.default_rng(1).permutation(NUM_USERS)
    good_U = np.random.default_rng(2).random(NUM_USERS) < 0.4
    ids = [f"{'yn'[int(g)]}-{n}" for g, n in zip(good_U, numbers, strict=True)]
    events = replace(
        events,
        users=Vocabulary(pl.Series(ids)),
        columns={"label": good_U[events.user_idx].astype(np.float32)},
    )
    assert "order of user ids" in the(audit_events(events), "id_tells_label").sentence


def test_item_ids_that_tell_which_events_are_the_test_are_found() -> None:
    split = temporal_split(clean())
    late = (np.arange(NUM_ITEMS) * 10 // NUM_ITEMS)[split.events.item_idx] >= 8
    part = np.where(late, TEST, TRAIN).astype(np.uint8)
    events = with_item_ids(split.events, pl.Series(np.arange(NUM_ITEMS)))
    meddled = Split(kind="given", events=events, part_E=part, rolling=False)
    assert the(audit_split(meddled), "id_tells_part").severity == "leak"


def test_item_ids_that_run_with_time_are_found() -> None:
    events = clean()
    assert events.timestamp_s is not None
    item = ((events.timestamp_s - 1_500_000_000) * NUM_ITEMS // (365 * DAY_S)).astype(np.int32)
    events = with_item_ids(replace(events, item_idx=item), pl.Series(np.arange(NUM_ITEMS)))
    assert "id_tells_next" in whats(audit_events(events), "warning")


def test_histories_sorted_by_item_are_found() -> None:
    events = clean()
    order = np.lexsort((events.items.ids.to_numpy()[events.item_idx], events.user_idx))
    sorted_by_item = replace(events, item_idx=events.item_idx[order], timestamp_s=None)
    assert whats(audit_events(sorted_by_item)) == {"id_tells_next", "no_times"}


# --- odd data --------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", ["YYYYMMDD", "days"])
def test_times_that_are_no_seconds_are_found_and_called_so(unit: str) -> None:
    events = clean()
    assert events.timestamp_s is not None
    days = events.timestamp_s // DAY_S
    time = days if unit == "days" else 2023_01_01 + days - days.min()
    found = audit_events(replace(events, timestamp_s=time))
    assert the(found, "times_before_1990").count == len(events)


def test_times_of_1970_among_those_of_today_are_counted() -> None:
    events = clean()
    assert events.timestamp_s is not None
    time = events.timestamp_s.copy()
    time[events.offsets[:-1]] = 0
    found = audit_events(replace(events, timestamp_s=time))
    assert the(found, "times_of_1970").count == NUM_USERS


def test_times_without_hours_are_noted() -> None:
    events = clean()
    assert events.timestamp_s is not None
    weeks = events.timestamp_s // (30 * DAY_S) * (30 * DAY_S)
    found = the(audit_events(replace(events, timestamp_s=weeks)), "same_second")
    assert "whole days" in found.sentence


def test_an_empty_table_and_one_event_raise_no_error() -> None:
    one = clean().select(np.arange(len(clean())) == 0)
    assert audit_events(one.select(np.array([False]))) == ()
    assert whats(audit_events(one), "leak") == set()
    split = Split(kind="given", events=one, part_E=np.array([0], dtype=np.uint8), rolling=False)
    assert audit_split(split) == ()


# --- the two measures ------------------------------------------------------------------------


def test_rank_correlation_equals_scipy() -> None:
    generator = np.random.default_rng(0)
    x = generator.integers(0, 5, 200).astype(np.float64)
    y = x + generator.normal(size=200)
    assert rank_correlation(x, y) == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-12)
    x[3], y[8] = np.nan, np.inf
    assert np.isfinite(rank_correlation(x, y))
    assert rank_correlation(x[:10], y[:10]) == 0


def test_the_explained_share_is_one_for_a_function_of_the_groups_and_zero_for_chance() -> None:
    # Two groups of ten: 0 0 … 1 1 …, told whole. By hand for one value swapped in each group:
    # SS within = 2 · (9 · 0.01 + 0.81) = 1.8, / 18; total = 20 · 0.25 = 5, / 19: 1 - 0.1 · 19/5.
    group = np.repeat([0, 1], 10)
    value = group.astype(np.float64)
    assert explained_share(group, value) == 1
    value[0], value[10] = 1, 0
    assert explained_share(group, value) == pytest.approx(1 - 0.1 * 19 / 5)
    generator = np.random.default_rng(0)
    chance = [
        explained_share(generator.integers(0, 30, 100), generator.random(100)) for _ in range(200)
    ]
    assert abs(np.mean(chance)) < 0.02

"""Labelled rows: histories before the row, labels beside it, items drawn for it."""

from collections.abc import Callable
from itertools import chain

import hypothesis.strategies as st
import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from foretaste.data.batch import DrawItems, PairBatch, Reads, RowBatch, SequenceBatch
from foretaste.data.draws import Share
from foretaste.data.features import fit_features
from foretaste.data.features_schema import CategoricalField, FeatureSchema, NumericField
from foretaste.data.interactions import Interactions, positives_of
from foretaste.data.plans import (
    PairPlan,
    RowPlan,
    SequencePlan,
    plan_pairs,
    plan_rows,
    plan_sequences,
)
from foretaste.data.reading import read_interactions
from foretaste.data.rows import Rows, rows_of, training_rows
from foretaste.data.splits import TEST, TRAIN, VALIDATION
from foretaste.data.splitting import (
    given_split_by_column,
    leave_last_split,
    temporal_split,
)
from foretaste.data.tasks import Task
from foretaste.errors import ConfigError, DataError
from foretaste.sampling.negatives import Seen, draw_unseen
from foretaste.sampling.samplers import UniformSampler

CLICK = (Task(name="click", column="click"),)
SCHEMA = FeatureSchema(context={"hour": NumericField(), "place": CategoricalField()})

# User 1: a click on 11 at second 10, three items shown at 20 of which 12 was clicked, 15 at 30.
# User 2: one click.
LOG = pl.DataFrame(
    {
        "user_id": [1, 1, 1, 1, 1, 2],
        "item_id": [11, 12, 13, 14, 15, 11],
        "time": [10, 20, 20, 20, 30, 5],
        "click": [1, 1, 0, 0, 0, 1],
        "hour": [1, 2, 2, 2, 3, 0],
        "place": ["home", "bus", "bus", "bus", "home", "bus"],
    }
)


def read(frame: pl.DataFrame, *, timed: bool = True) -> Interactions:
    return read_interactions(
        frame,
        timestamp="time" if timed else None,
        columns=["click"],
        context=["hour", "place"],
    )


def histories(rows: Rows, *, reads: Reads = "before", max_len: int = 50) -> list[list[int]]:
    """The history of each row, as the caller's item ids."""
    batch = rows.batch(np.arange(len(rows)), reads=reads, max_len=max_len)
    return decoded(rows.events, batch)


def decoded(events: Interactions, batch: RowBatch) -> list[list[int]]:
    queries = batch.queries
    ids = events.items.ids.to_numpy()[queries.history_N.numpy()]
    return [part.tolist() for part in np.split(ids, queries.offsets_B1.numpy()[1:-1])]


# --- histories -----------------------------------------------------------------------------------


def test_a_history_ends_before_the_row_and_holds_every_event_by_default() -> None:
    rows = training_rows(read(LOG), tasks=CLICK)
    assert histories(rows) == [[], [11], [11, 12], [11, 12, 13], [11, 12, 13, 14], []]
    assert histories(rows, max_len=2) == [[], [11], [11, 12], [12, 13], [13, 14], []]
    assert histories(rows, reads="nothing") == [[]] * 6


def test_what_was_shown_at_one_second_does_not_tell_of_what_was_clicked_then() -> None:
    # 13 and 14 were shown with 12: its click is not in their history, but in that of 15
    rows = training_rows(read(LOG), tasks=CLICK, positive="click")
    assert histories(rows) == [[], [11], [11], [11], [11, 12], []]


def test_without_times_the_order_of_the_table_decides() -> None:
    rows = training_rows(read(LOG, timed=False), tasks=CLICK, positive="click")
    assert histories(rows) == [[], [11], [11, 12], [11, 12], [11, 12], []]


def test_a_missing_label_makes_no_history() -> None:
    frame = LOG.with_columns(click=pl.Series([1, None, 0, 0, 0, 1], dtype=pl.Int64))
    assert histories(training_rows(read(frame), tasks=CLICK, positive="click"))[4] == [11]


def test_others_are_the_other_positives_of_the_user() -> None:
    rows = training_rows(read(LOG), tasks=CLICK, positive="click")
    found = histories(rows, reads="others")
    # clicked rows have all other clicks, the rest all clicks; no row has its own
    assert [sorted(h) for h in found] == [[12], [11], [11, 12], [11, 12], [11, 12], []]
    short = histories(rows, reads="others", max_len=1)
    assert [len(h) for h in short] == [1, 1, 1, 1, 1, 0]


@settings(deadline=None, derandomize=True, max_examples=40)
@given(
    rows=st.lists(
        st.tuples(st.integers(0, 3), st.integers(0, 5), st.integers(0, 6), st.booleans()),
        min_size=1,
        max_size=30,
    ),
    max_len=st.integers(1, 4),
    positive=st.sampled_from(["", "click"]),
)
def test_histories_are_those_of_a_loop(
    rows: list[tuple[int, int, int, bool]], max_len: int, positive: str
) -> None:
    frame = pl.DataFrame(rows, schema=["user_id", "item_id", "time", "click"], orient="row")
    events = read(frame.with_columns(hour=0, place=pl.lit("x")))
    found = histories(training_rows(events, tasks=CLICK, positive=positive), max_len=max_len)
    assert events.timestamp_s is not None
    users, times = events.user_idx, events.timestamp_s
    clicks, ids = events.columns["click"], events.items.ids.to_list()
    for row, history in enumerate(found):
        expected = [
            ids[events.item_idx[e]]
            for e in range(len(events))
            if users[e] == users[row]
            and (times[e] < times[row] if positive else e < row)
            and (clicks[e] > 0 or not positive)
        ]
        assert history == expected[-max_len:], row


def test_later_events_do_not_change_the_states_before_them() -> None:
    later = pl.DataFrame(
        {"user_id": 1, "item_id": 12, "time": 40, "click": 1, "hour": 4, "place": "home"}
    )
    frame = pl.concat([LOG, later])
    before = histories(training_rows(read(LOG), tasks=CLICK, positive="click"))
    after = histories(training_rows(read(frame), tasks=CLICK, positive="click"))
    assert after[:5] == before[:5]


# --- batches -------------------------------------------------------------------------------------


def uniform(events: Interactions, num_calls: list[int] | None = None) -> DrawItems:
    sampler, seen = UniformSampler(events.num_items), Seen.of(events)

    def draw(user_B: Tensor, item_B: Tensor, num: int, *, generator: torch.Generator) -> Tensor:
        if num_calls is not None:
            num_calls.append(len(item_B))
        return draw_unseen(sampler, user_B, num, seen=seen, generator=generator)

    return draw


def many(count: int = 500, *, seed: int = 0) -> Interactions:
    draw = np.random.default_rng(seed)
    return read(
        pl.DataFrame(
            {
                "user_id": draw.integers(0, 20, count),
                "item_id": draw.integers(0, 100, count),
                "time": draw.integers(0, 10**6, count),
                "click": draw.integers(0, 2, count),
                "hour": draw.integers(0, 24, count),
                "place": [f"p{n}" for n in draw.integers(0, 4, count)],
            }
        )
    )


def test_an_epoch_holds_every_row_once_with_its_own_labels_and_context() -> None:
    events = many()
    features = fit_features(SCHEMA, events)
    table = features.context_table
    assert table is not None
    plan = plan_rows(
        training_rows(events, tasks=CLICK, context=table),
        batch_events=64,
        generator=np.random.default_rng(3),
    )
    assert (len(plan), plan.num_events) == (8, 500)
    assert sorted(plan.order_E.tolist()) == list(range(500))
    for index in range(len(plan)):
        batch, rows = plan.batch(index), plan.order_E[index * 64 : (index + 1) * 64]
        assert batch.item_BC.tolist() == events.item_idx[rows][:, None].tolist()
        assert batch.queries.user_B.tolist() == events.user_idx[rows].tolist()
        assert batch.label_BCT[:, 0, 0].tolist() == events.columns["click"][rows].tolist()
        assert batch.queries.context is not None
        expected = table.rows(torch.from_numpy(rows))
        for name, tensor in batch.queries.context.tensors().items():
            assert torch.equal(tensor, expected.tensors()[name]), name


def test_one_seed_gives_one_epoch_and_a_batch_does_not_depend_on_those_before_it() -> None:
    events = many()

    def plan(seed: int) -> RowPlan:
        return plan_rows(
            training_rows(events, tasks=CLICK),
            batch_events=64,
            generator=np.random.default_rng(seed),
            reads="others",
            num_drawn=3,
            draw=uniform(events),
        )

    first, second, other = plan(1), plan(1), plan(2)
    last = second.batch(7)
    for index in range(8):
        one, two = first.batch(index), second.batch(index)
        assert torch.equal(one.item_BC, two.item_BC)
        assert torch.equal(one.queries.history_N, two.queries.history_N)
    assert torch.equal(last.item_BC, second.batch(7).item_BC)
    assert not torch.equal(first.batch(0).item_BC, other.batch(0).item_BC)


def test_drawn_items_are_zeros_of_binary_tasks_and_say_nothing_of_others() -> None:
    events = many()
    tasks = (
        Task(name="click", column="click"),
        Task(name="hours", kind="regression", column="click"),
        Task(name="level", kind="ordinal", column="click", levels=(0, 1)),
        Task(name="seen"),
    )
    plan = plan_rows(
        training_rows(events, tasks=tasks),
        batch_events=100,
        generator=np.random.default_rng(0),
        num_drawn=2,
        draw=uniform(events),
    )
    batch = plan.batch(0)
    assert batch.item_BC.shape == (100, 3)
    assert batch.label_BCT.shape == (100, 3, 4)
    own, drawn = batch.label_BCT[:, 0], batch.label_BCT[:, 1:]
    click = torch.from_numpy(events.columns["click"][plan.order_E[:100]]).float()
    assert torch.equal(own, torch.stack([click, click, click, torch.ones(100)], dim=1))
    assert (drawn[..., [0, 3]] == 0).all()
    assert drawn[..., [1, 2]].isnan().all()
    done = {(int(u), int(i)) for u, i in zip(events.user_idx, events.item_idx, strict=True)}
    users = batch.queries.user_B.tolist()
    assert not any(
        (u, i) in done
        for u, items in zip(users, batch.item_BC[:, 1:].tolist(), strict=True)
        for i in items
    )


def test_a_place_where_nothing_was_found_has_no_label() -> None:
    events = many(50)
    plan = plan_rows(
        training_rows(events, tasks=CLICK),
        batch_events=50,
        generator=np.random.default_rng(0),
        num_drawn=2,
        draw=lambda user_B, item_B, num, *, generator: torch.stack(
            [item_B, (item_B + 1) % events.num_items], dim=1
        ),
    )
    label_BCT = plan.batch(0).label_BCT
    assert label_BCT[:, 1].isnan().all()
    assert (label_BCT[:, 2] == 0).all()


def test_positives_are_what_drawn_items_must_not_be() -> None:
    assert positives_of(read(LOG), "click").item_idx.tolist() == [0, 1, 0]
    assert len(positives_of(read(LOG))) == 6
    with pytest.raises(ConfigError, match=r"^positive is column 'clicks'.*did you mean 'click'"):
        positives_of(read(LOG), "clicks")


def test_what_cannot_be_planned_is_refused() -> None:
    events = many(50)
    rows, generator = training_rows(events, tasks=CLICK), np.random.default_rng(0)
    with pytest.raises(ConfigError, match=r"4 items are to be drawn.*set how"):
        plan_rows(rows, batch_events=8, generator=generator, num_drawn=4)
    table = fit_features(SCHEMA, events).context_table
    with pytest.raises(DataError, match="the context has 50 rows for 49 events"):
        training_rows(events.select(np.arange(50) > 0), tasks=CLICK, context=table)


# --- parts of a split ----------------------------------------------------------------------------


def test_rows_of_a_rolling_test_know_all_that_came_before_them() -> None:
    frame = LOG.with_columns(time=pl.Series([10, 20, 30, 40, 50, 5]))
    split = temporal_split(read(frame), validation=0.0, test=0.4)
    assert split.part_E.tolist() == [TRAIN, TRAIN, TRAIN, TEST, TEST, TRAIN]
    rows = rows_of(split, "test", tasks=CLICK)
    assert rows.events.items.ids.to_numpy()[rows.events.item_idx].tolist() == [14, 15]
    assert histories(rows) == [[11, 12, 13], [11, 12, 13, 14]]
    assert histories(rows_of(split, "test", tasks=CLICK, positive="click")) == [[11, 12]] * 2
    assert rows.label_ET.tolist() == [[0], [0]]
    assert len(rows_of(split, "validation", tasks=CLICK)) == 0
    assert histories(rows_of(split, "train", tasks=CLICK)) == [[], [11], [11, 12], []]


def test_held_out_rows_never_read_what_came_later_whatever_a_model_reads() -> None:
    frame = LOG.with_columns(time=pl.Series([10, 20, 30, 40, 50, 5]))
    rows = rows_of(temporal_split(read(frame), validation=0.0, test=0.4), "test", tasks=CLICK)
    assert histories(rows, reads="others") == [[11, 12, 13], [11, 12, 13, 14]]


def test_rows_of_a_test_that_does_not_roll_know_the_parts_before() -> None:
    frame = LOG.with_columns(time=pl.Series([10, 20, 30, 40, 50, 5]))
    split = leave_last_split(read(frame))
    assert split.part_E.tolist() == [TRAIN, TRAIN, TRAIN, VALIDATION, TEST, TRAIN]
    assert histories(rows_of(split, "validation", tasks=CLICK)) == [[11, 12, 13]]
    assert histories(rows_of(split, "test", tasks=CLICK)) == [[11, 12, 13, 14]]
    assert histories(rows_of(split, "test", tasks=CLICK, positive="click")) == [[11, 12]]


def test_listed_negatives_and_unused_events_are_in_no_history() -> None:
    frame = LOG.with_columns(part=pl.Series([0, 3, 4, 0, 2, 0]))
    events = read_interactions(frame, columns=["click", "part"])
    rows = rows_of(given_split_by_column(events), "test", tasks=CLICK)
    assert histories(rows) == [[11, 14]]


def test_the_context_of_a_part_is_encoded_by_what_training_fitted() -> None:
    events = many()
    split = temporal_split(events, test=0.2)
    features = fit_features(SCHEMA, split.train)
    rows = rows_of(split, "test", tasks=CLICK, features=features)
    assert rows.context is not None
    assert features.context is not None
    assert rows.events.context is not None
    expected = features.context.encode(rows.events.context)
    batch = rows.batch(np.array([3, 1]))
    assert batch.queries.context is not None
    assert torch.equal(batch.queries.context.code_RC, expected.code_RC[[3, 1]])
    assert rows_of(split, "test", tasks=CLICK).context is None


def test_histories_of_a_part_agree_with_the_queries_of_its_holdout() -> None:
    events = many()
    for split in (temporal_split(events), leave_last_split(events)):
        rows, holdout = rows_of(split, "test", tasks=CLICK), split.test
        queries = holdout.queries(np.arange(len(holdout)))
        items = events.items.ids.to_numpy()[queries.history_N.numpy()]
        parts = np.split(items, queries.offsets_B1.numpy()[1:-1])
        assert histories(rows, max_len=1000) == [part.tolist() for part in parts]


def test_drawn_rows_of_a_part_are_the_same_for_one_seed_however_they_are_gathered() -> None:
    events = many()
    split = temporal_split(events, test=0.2)
    rows = rows_of(split, "test", tasks=[Task(name="seen")])
    calls: list[int] = []
    drawn = rows.draw(5, uniform(events, calls), seed=1)
    again = rows.draw(5, uniform(events), seed=1)
    assert calls == [len(rows)]
    assert drawn.drawn_EN.shape == (len(rows), 5)
    assert (drawn.drawn_EN == again.drawn_EN).all()
    assert (drawn.drawn_EN != rows.draw(5, uniform(events), seed=2).drawn_EN).any()
    whole, some = drawn.batch(np.arange(len(rows))), drawn.batch(np.array([7, 2]))
    assert torch.equal(some.item_BC, whole.item_BC[[7, 2]])
    assert whole.label_BCT[:, 0].eq(1).all()
    assert whole.label_BCT[:, 1:].eq(0).all()


def test_a_batch_moves_as_one() -> None:
    events = many(30)
    table = fit_features(SCHEMA, events).context_table
    batch = training_rows(events, tasks=CLICK, context=table).batch(np.arange(4))
    moved = batch.to(torch.device("cpu"))
    assert len(moved) == 4
    assert moved.queries.context is not None
    assert torch.equal(moved.label_BCT, batch.label_BCT)


# --- several processes ---------------------------------------------------------------------------


def rows_plan(events: Interactions, reads: Reads, share: Share) -> RowPlan:
    features = fit_features(SCHEMA, events)
    return plan_rows(
        training_rows(events, tasks=CLICK, context=features.context_table),
        batch_events=64,
        generator=np.random.default_rng(1),
        reads=reads,
        max_len=3,
        num_drawn=3,
        draw=uniform(events),
        share=share,
    )


def pairs_plan(events: Interactions, reads: Reads, share: Share) -> PairPlan:
    sampler = UniformSampler(events.num_items)
    return plan_pairs(
        events,
        batch_events=64,
        generator=np.random.default_rng(1),
        reads=reads,
        max_len=3,
        find_hard=lambda user_B, _, __, generator: draw_unseen(
            sampler, user_B, 2, seen=Seen.of(events), generator=generator
        ),
        share=share,
    )


def sequences_plan(events: Interactions, reads: Reads, share: Share) -> SequencePlan:
    return plan_sequences(
        events,
        max_len=5 if reads == "before" else 200,
        batch_events=64,
        windows="all" if reads == "others" else "last",
        generator=np.random.default_rng(1),
        share=share,
    )


def row_by_row(batch: PairBatch | RowBatch | SequenceBatch) -> list[list[object]]:
    """All that each row of a batch holds."""
    if isinstance(batch, SequenceBatch):
        columns = [batch.user_B, batch.item_BL, batch.valid_BL]
        return [[column[b].tolist() for column in columns] for b in range(len(batch))]
    queries = batch.queries
    history = [part.tolist() for part in queries.history_N.tensor_split(queries.offsets_B1[1:-1])]
    columns = [queries.user_B, *(part for part in vars(batch).values() if isinstance(part, Tensor))]
    context = queries.context
    return [
        [
            *(column[b].tolist() for column in columns),
            history[b],
            {} if context is None else str(context.rows(torch.tensor([b])).tensors()),
        ]
        for b in range(len(batch))
    ]


@pytest.mark.parametrize("reads", ["nothing", "before", "others"])
@pytest.mark.parametrize("plan", [rows_plan, pairs_plan, sequences_plan])
def test_what_several_processes_read_of_a_batch_is_the_batch(
    plan: Callable[[Interactions, Reads, Share], RowPlan | PairPlan | SequencePlan], reads: Reads
) -> None:
    events = many()
    whole = plan(events, reads, Share())
    for world in (2, 3, 70):  # 70 are more than a batch has rows
        parts = [plan(events, reads, Share(rank, world)) for rank in range(world)]
        assert {(len(part), part.num_events) for part in parts} == {(len(whole), whole.num_events)}
        for index in (0, len(whole) - 1):
            rows = [row_by_row(part.batch(index)) for part in parts]
            assert list(chain.from_iterable(rows)) == row_by_row(whole.batch(index))
            sizes = [len(part) for part in rows]
            assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(("rank", "world"), [(2, 2), (-1, 2), (0, 0)])
def test_a_rank_that_no_process_has_is_refused(rank: int, world: int) -> None:
    with pytest.raises(ConfigError) as caught:
        Share(rank, world)
    assert (caught.value.name, caught.value.value) == ("rank", rank)

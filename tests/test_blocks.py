"""Blocks of related events: planted trips, a slow oracle, and expected counts."""

from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from foretaste.data.batch import ranges
from foretaste.data.interactions import Interactions
from foretaste.data.sources.load import get_dataset
from foretaste.data.splits import TEST, VALIDATION, GivenSplitConfig, Holdout
from foretaste.data.splitting import draw_blocks, make_split, similarity
from foretaste.data.vocabulary import Vocabulary
from foretaste.evaluation.protocol import evaluate
from foretaste.experiment.fit import fit
from foretaste.models.baselines import ItemKNNConfig


def events_of(lists: list[list[int]], num_items: int, **columns: np.ndarray) -> Interactions:
    return Interactions(
        users=Vocabulary(pl.Series([str(u) for u in range(len(lists))], dtype=pl.String)),
        items=Vocabulary(pl.Series([str(i) for i in range(num_items)], dtype=pl.String)),
        offsets=np.cumsum([0, *map(len, lists)]).astype(np.int64),
        item_idx=np.array([i for done in lists for i in done], np.int32),
        timestamp_s=None,
        columns=columns,
    )


def trips(num_users: int = 40, num_places: int = 6, each: int = 5) -> Interactions:
    """Every user made two trips of five stops each, to two of six places."""
    draw = np.random.default_rng(0)
    lists = []
    for _ in range(num_users):
        places = draw.choice(num_places, 2, replace=False)
        lists.append(draw.permutation([p * each + s for p in places for s in range(each)]).tolist())
    return events_of(lists, num_places * each)


def test_half_of_two_trips_is_one_whole_trip() -> None:
    events = trips()
    for seed in range(5):
        held_E = draw_blocks(events, 0.5, seed)
        place_U5 = events.item_idx[held_E].reshape(-1, 5) // 5
        assert (place_U5 == place_U5[:, :1]).all()


def test_similarity_is_right_for_items_with_fifty_thousand_users() -> None:
    # 50,000 squared is beyond 32 bits. Of the two items' users half are in common.
    events = events_of([[0]] * 25_000 + [[0, 1]] * 25_000 + [[1]] * 25_000, 2)
    alike_P = similarity(events, np.array([0, 0]), np.array([0, 1]))
    np.testing.assert_allclose(alike_P, [1.0, 0.5])


@given(
    st.lists(st.lists(st.integers(0, 8), max_size=9), min_size=1, max_size=9),
    st.floats(0.05, 0.95),
    st.integers(0, 99),
)
def test_a_block_is_an_event_and_those_most_similar_to_it(
    lists: list[list[int]], share: float, seed: int
) -> None:
    events = events_of(lists, 9)
    held_E = draw_blocks(events, share, seed)
    assert (held_E == draw_blocks(events, share, seed)).all()
    users = [{u for u, done in enumerate(lists) if i in done} for i in range(9)]

    def alike(a: int, b: int) -> float:
        return float(len(users[a] & users[b]) / np.sqrt(len(users[a]) * len(users[b])))

    for user, done in enumerate(lists):
        held = held_E[events.offsets[user] : events.offsets[user + 1]]
        assert held.sum() == np.rint(share * len(done))
        inside = [item for item, out in zip(done, held, strict=True) if out]
        outside = [item for item, out in zip(done, held, strict=True) if not out]
        # Some one of the block is the one that was drawn: none outside is nearer to it.
        assert not inside or any(
            min(alike(one, item) for item in inside)
            >= max((alike(one, item) for item in outside), default=-1) - 1e-9
            for one in inside
        )


def test_a_given_split_holds_blocks_out_of_training_alone() -> None:
    events = trips()
    part = np.tile([0, 0, 0, 0, 0, 0, 0, 0, 2, 2], 40)
    told = events_of([events.history(u).tolist() for u in range(40)], events.num_items, part=part)
    split = make_split(GivenSplitConfig(validation=0.25, validation_by="blocks"), told)
    assert (np.flatnonzero(split.part_E == TEST) == np.flatnonzero(part == 2)).all()
    assert (split.part_E == VALIDATION).sum() == 40 * 2
    assert np.diff(split.validation.target_offsets).tolist() == [2] * 40
    by_events = make_split(GivenSplitConfig(validation=0.25), told)
    assert not (by_events.part_E == split.part_E).all()


def every_fourth(part: Holdout) -> Holdout:
    """A quarter of the queries: enough for two digits."""
    query_Q = np.arange(0, len(part), 4)
    index_N, offsets_Q1 = ranges(
        part.target_offsets[query_Q], np.diff(part.target_offsets)[query_Q]
    )
    return replace(
        part,
        user_Q=part.user_Q[query_Q],
        end_Q=part.end_Q[query_Q],
        target_offsets=offsets_Q1,
        target_item=part.target_item[index_N],
    )


def test_on_gowalla_neighbours_tell_a_block_as_badly_as_the_given_test(shared_data: Path) -> None:
    events = get_dataset("gowalla", data_dir=shared_data).events

    def recalls(by: Literal["events", "blocks"], *parts: str) -> list[float]:
        split = make_split(GivenSplitConfig(validation=0.2, validation_by=by), events)
        model = fit(ItemKNNConfig(), split, show=False)
        measured = [every_fourth(getattr(split, part)) for part in parts]
        reports = [evaluate(model, part, k=(20,), resamples=0) for part in measured]
        return [report.metrics["recall_at_20"] for report in reports]

    block, test = recalls("blocks", "validation", "test")
    assert block == pytest.approx(test, abs=0.01)
    assert recalls("events", "validation")[0] > test + 0.02  # .190 and .157 with all queries

"""Training windows: every event once, little padding, and the seed decides the order."""

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foretaste.data.interactions import Interactions
from foretaste.data.plans import Windows, plan_sequences
from foretaste.data.vocabulary import Vocabulary


def events_of_lengths(lengths: list[int]) -> Interactions:
    """Each event is an item of its own, numbered in order."""
    total = sum(lengths)
    return Interactions(
        users=Vocabulary(pl.Series(range(len(lengths)), dtype=pl.Int64)),
        items=Vocabulary(pl.Series(range(total), dtype=pl.Int64)),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        item_idx=np.arange(total, dtype=np.int32),
    )


def windows_of(
    lengths: list[int], *, max_len: int, batch_events: int, windows: Windows, seed: int = 0
) -> list[list[list[int]]]:
    plan = plan_sequences(
        events_of_lengths(lengths),
        max_len=max_len,
        batch_events=batch_events,
        windows=windows,
        generator=np.random.default_rng(seed),
    )
    batches = [plan.batch(index) for index in range(len(plan))]
    assert sum(int(batch.valid_BL.sum()) for batch in batches) == plan.num_events
    return [
        [row[valid].tolist() for row, valid in zip(b.item_BL, b.valid_BL, strict=True)]
        for b in batches
    ]


@settings(deadline=None, derandomize=True)
@given(
    st.lists(st.integers(0, 30), min_size=1, max_size=20).filter(any),
    st.integers(1, 12),
    st.integers(1, 60),
    st.integers(0, 3),
)
def test_all_windows_hold_every_event_once(
    lengths: list[int], max_len: int, batch_events: int, seed: int
) -> None:
    batches = windows_of(
        lengths, max_len=max_len, batch_events=batch_events, windows="all", seed=seed
    )
    found = [window for batch in batches for window in batch]
    assert sorted(item for window in found for item in window) == list(range(sum(lengths)))
    owner = np.repeat(np.arange(len(lengths)), lengths)
    for window in found:
        assert 1 <= len(window) <= max_len
        assert window == list(range(window[0], window[0] + len(window)))
        assert len(set(owner[window])) == 1
    for batch in batches:
        width = max(len(window) for window in batch)
        assert len(batch) == 1 or len(batch) * width <= batch_events


def test_last_windows_are_the_ends_of_histories() -> None:
    batches = windows_of([5, 0, 2], max_len=3, batch_events=100, windows="last")
    assert sorted(window for batch in batches for window in batch) == [[2, 3, 4], [5, 6]]


def test_a_seed_decides_everything_and_another_changes_it() -> None:
    def plan(seed: int) -> list[list[list[int]]]:
        return windows_of([50] * 10, max_len=7, batch_events=21, windows="all", seed=seed)

    assert plan(1) == plan(1)
    assert plan(1) != plan(2)


def test_batches_of_like_length_waste_little() -> None:
    lengths = np.random.default_rng(0).integers(1, 200, 2000).tolist()
    plan = plan_sequences(
        events_of_lengths(lengths),
        max_len=200,
        batch_events=2000,
        windows="all",
        generator=np.random.default_rng(0),
    )
    padded = sum(plan.batch(b).valid_BL.numel() for b in range(len(plan)))
    assert padded / plan.num_events < 1.03  # batches in random order would be near 2


@pytest.mark.parametrize("length", [7, 8, 14, 15])
def test_cuts_fall_everywhere(length: int) -> None:
    starts = {
        window[0]
        for seed in range(200)
        for batch in windows_of([length], max_len=7, batch_events=100, windows="all", seed=seed)
        for window in batch
    }
    assert starts == ({0} if length <= 7 else set(range(length)))

"""Popularity: counts, the same for every user, within a window of time."""

import numpy as np
import polars as pl
import pytest
import torch

from foretaste.data.batch import Queries
from foretaste.data.interactions import Interactions
from foretaste.data.vocabulary import Vocabulary
from foretaste.errors import ConfigError, DataError
from foretaste.models.baselines import Popularity, PopularityConfig

DAY_S = 86_400


def events(
    items: list[int], days: list[float] | None = None, *, num_items: int = 4
) -> Interactions:
    return Interactions(
        users=Vocabulary(pl.Series(["ann"])),
        items=Vocabulary(pl.Series(range(num_items), dtype=pl.Int64)),
        offsets=np.array([0, len(items)]),
        item_idx=np.array(items, dtype=np.int32),
        timestamp_s=None if days is None else (np.array(days) * DAY_S).astype(np.int64),
    )


def learned(config: PopularityConfig, of: Interactions) -> list[float]:
    model = Popularity(config, num_items=of.num_items)
    model.learn(of)
    rows = model.score(Queries.of_histories([[], [0, 1]]))
    assert torch.equal(rows[0], rows[1])
    return rows[0].tolist()


def test_an_item_scores_its_number_of_events() -> None:
    assert learned(PopularityConfig(), events([0, 2, 2, 0, 2])) == [2, 0, 3, 0]


def test_the_window_counts_back_from_the_newest_event() -> None:
    # newest on day 10, so a window of 3 days holds days 7 to 10, day 7 itself included
    of = events([0, 0, 0, 1, 2, 3], [1, 2, 6.9, 7, 8, 10])
    assert learned(PopularityConfig(window_days=3), of) == [0, 1, 1, 1]
    assert learned(PopularityConfig(window_days=100), of) == [3, 1, 1, 1]


def test_a_window_over_events_without_times_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"window_days is 3, .* no timestamps"):
        learned(PopularityConfig(window_days=3), events([0, 1]))


def test_large_counts_are_kept_to_the_last_event() -> None:
    # float32 cannot tell 2^24 from 2^24 + 1: counts are whole numbers until they are scores
    model = Popularity(PopularityConfig(), num_items=1)
    model.count_I.fill_(2**24 + 1)
    assert model.state_dict()["count_I"].item() == 2**24 + 1


def test_nothing_to_learn_from_is_said() -> None:
    with pytest.raises(DataError, match="no training event"):
        learned(PopularityConfig(), events([]))
    with pytest.raises(DataError, match="made for 3 items and the events have 4"):
        Popularity(PopularityConfig(), num_items=3).learn(events([0]))

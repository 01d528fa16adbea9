"""Every maker of batches keeps the times of events, which are gathered on demand."""

from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import polars as pl
import pytest
import torch
from torch import Tensor

import foretaste as ft
from foretaste.config import Config
from foretaste.data.batch import NO_TIME, Queries, SequenceBatch, Times, last_events
from foretaste.data.interactions import Interactions
from foretaste.data.plans import plan_pairs, plan_sequences
from foretaste.data.rows import rows_of
from foretaste.data.vocabulary import Vocabulary
from foretaste.models.base import Scorer
from foretaste.serving.catalogue_search import training_histories
from foretaste.training.trained import Trained, Translation

LENGTHS = (4, 0, 7, 1, 12)
TOTAL = sum(LENGTHS)


def time_of(item: Tensor) -> Tensor:
    """Return the time of an item's only event: each item has one event in these data."""
    return 1000 + 7 * item


class Untouched(np.ndarray):
    """Times that raise an error if they are read."""

    def __getitem__(self, index: Any) -> Any:
        raise AssertionError("a time was read")


def events_of() -> Interactions:
    return Interactions(
        users=Vocabulary(pl.Series(range(len(LENGTHS)), dtype=pl.Int64)),
        items=Vocabulary(pl.Series(range(TOTAL), dtype=pl.Int64)),
        offsets=np.cumsum([0, *LENGTHS]),
        item_idx=np.arange(TOTAL, dtype=np.int32),
        timestamp_s=1000 + 7 * np.arange(TOTAL),
    )


def batches_of(
    events: Interactions, *, untouched: bool = False
) -> dict[str, Queries | SequenceBatch]:
    """Return a batch of every maker; after they are split, nothing may read a time, if so said."""
    split = ft.leave_last_split(events)
    holdout, rows = split.test, rows_of(split, "test", tasks=())
    for one in (events, holdout.events, rows.past) if untouched else ():
        object.__setattr__(one, "timestamp_s", np.asarray(one.timestamp_s).view(Untouched))
    source = np.random.default_rng(0)
    users = np.arange(len(LENGTHS))
    queries, _ = training_histories(events, users)
    sizes: dict[str, Any] = {"batch_events": 9, "max_len": 5, "generator": source}
    return {
        "windows": plan_sequences(events, windows="all", **sizes).batch(1),
        "pairs before": plan_pairs(events, reads="before", **sizes).batch(0).queries,
        "pairs of others": plan_pairs(events, reads="others", **sizes).batch(1).queries,
        "pairs without": plan_pairs(events, reads="nothing", **sizes).batch(1).queries,
        "rows": rows.batch(np.array([1, 0])).queries,
        "holdout": holdout.queries(np.array([2, 0])),
        "training histories": queries,
        "a part": queries.part(2, 5),
        "a part of a part": queries.part(1, 5).part(1, 3),
        "the last events": last_events(queries, 3),
        "the last events of some": last_events(queries, 6, rows=torch.tensor([4, 1, 0])),
        "on a device": queries.to(torch.device("cpu")),
        "a sequence on a device": last_events(queries, 3).to(torch.device("cpu")),
        "translated": Translation(
            user_U=users, item_X=np.where(np.arange(TOTAL) % 3, np.arange(TOTAL), -1)
        ).queries(queries),
    }


@pytest.mark.parametrize("name", batches_of(events_of()))
def test_each_event_keeps_its_time(name: str) -> None:
    batch = batches_of(events_of())[name]
    assert batch.times is not None
    times = batch.times()
    assert times.dtype == torch.int64
    if isinstance(batch, Queries):
        assert torch.equal(times, time_of(batch.history_N))
    else:
        assert torch.equal(times[batch.valid_BL], time_of(batch.item_BL[batch.valid_BL]))


def test_no_time_is_read_if_it_is_not_requested() -> None:
    batches = batches_of(events_of(), untouched=True)
    times = batches["windows"].times
    assert times is not None
    with pytest.raises(AssertionError, match="a time was read"):
        times()


def test_events_without_times_give_none() -> None:
    batches = batches_of(replace(events_of(), timestamp_s=None))
    assert all(batch.times is None for batch in batches.values())
    assert Queries.of_histories([[1, 2]]).times is None


class Listening(Scorer):
    """Gives every item the same score and stores the queries."""

    asked: ClassVar[list[Times | None]] = []

    def score(self, queries: Queries) -> Tensor:
        self.asked.append(queries.times)
        return torch.zeros(len(queries), TOTAL)


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({"user_id": 0}, [1000, 1007, 1014, 1021]),
        ({"user_id": 0, "since": 1010}, [1014, 1021]),
        ({"user_id": 0, "since": 1010, "history": [9]}, [1014, 1021, NO_TIME]),
        ({"user_id": 99, "history": [9]}, None),
    ],
)
def test_a_recommender_gives_times_of_training_and_none_of_what_a_request_brings(
    asked: dict[str, Any], expected: list[int] | None
) -> None:
    trained = Trained(config=Config(), model=Listening().eval(), events=events_of(), seed=0)
    recommender = ft.build_recommender(trained)
    Listening.asked.clear()
    recommender.recommend(k=2, **asked)
    times = Listening.asked[-1]
    assert (times and times().tolist()) == expected

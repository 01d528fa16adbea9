"""Synthetic tasks have the requested correlation, and synthetic logs the planted effect."""

import numpy as np
import polars as pl
import pytest

from benchmarks.multitask_synthetic import correlated_tasks
from foretaste.data.tasks import MediaLog, media_log
from foretaste.errors import ConfigError


def first_order(label: np.ndarray, inputs: np.ndarray) -> np.ndarray:
    """The direction in which a label rises, found by least squares."""
    weights, *_ = np.linalg.lstsq(inputs, label, rcond=None)
    return weights


@pytest.mark.parametrize("correlation", [-0.7, 0.0, 0.5, 1.0])
def test_the_cosine_between_the_tasks_is_the_one_asked_for(correlation: float) -> None:
    events = correlated_tasks(20_000, correlation=correlation, dim=20, frequencies=(), phases=())
    assert events.context is not None
    inputs = np.array(events.context["x"].to_list())
    one, two = (first_order(events.columns[name], inputs) for name in ("first", "second"))
    cosine = one @ two / np.linalg.norm(one) / np.linalg.norm(two)
    assert cosine == pytest.approx(correlation, abs=0.02)
    assert np.linalg.norm(one) == pytest.approx(1, abs=0.02)


def test_without_noise_equal_tasks_are_one() -> None:
    events = correlated_tasks(100, correlation=1.0, dim=5, noise=0.0)
    np.testing.assert_array_equal(events.columns["first"], events.columns["second"])


def test_the_label_by_hand() -> None:
    events = correlated_tasks(
        50, correlation=0.0, dim=2, frequencies=(2.0,), phases=(1.0,), noise=0.0
    )
    assert events.context is not None
    x = np.array(events.context["x"].to_list())
    # Orthogonal and of length 1 in the plane: the two lines hold all of x.
    for name in ("first", "second"):
        line = np.linspace(-4, 4, 20_001)
        at = np.abs(line + np.sin(2 * line + 1) - events.columns[name][:, None]).min(axis=1)
        assert at.max() < 1e-2, name
    assert x.shape == (50, 2)
    again = correlated_tasks(
        50, correlation=0.0, dim=2, frequencies=(2.0,), phases=(1.0,), noise=0.0
    )
    assert again.fingerprint() == events.fingerprint()


def test_numbers_out_of_range_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"a cosine lies in \[-1, 1\]"):
        correlated_tasks(10, correlation=1.5)
    with pytest.raises(ConfigError, match="a width of 2 or more"):
        correlated_tasks(10, correlation=0.5, dim=1)


def repeated_topics(log: MediaLog) -> float:
    """How much more often an impression after a click is clicked where its topic is the same."""
    rows = log.events.join(log.items, on="item").sort("user", "time")
    after = rows.with_columns(pl.col("topic", "click").shift().over("user").name.prefix("last_"))
    after = after.filter(pl.col("last_click") == 1)
    same = pl.col("topic") == pl.col("last_topic")
    return after.filter(same)["click"].mean() - after.filter(~same)["click"].mean()


@pytest.mark.parametrize("seed", [0, 1])
def test_a_media_log_s_clicks_follow_the_last_click_only_where_that_is_planted(seed: int) -> None:
    planted, absent = (media_log(history=h, num_users=500, seed=seed) for h in (True, False))
    assert repeated_topics(planted) > 0.1
    assert abs(repeated_topics(absent)) < 0.04
    for name in ("click", "minutes", "like"):  # else the two could be told apart without histories
        means = [log.events[name].drop_nulls().mean() for log in (planted, absent)]
        assert means[0] == pytest.approx(means[1], rel=0.1), name


def test_a_media_log_has_minutes_and_likes_of_clicks_alone_and_times_in_order() -> None:
    log = media_log(history=True, num_users=50, num_items=24, impressions=7)
    assert log.events.height == 350
    labelled = log.events.select(pl.col("minutes", "like").is_not_null() == (pl.col("click") == 1))
    assert labelled["minutes"].all()
    assert labelled["like"].all()
    assert log.events.sort("user", "time", maintain_order=True).equals(log.events)
    assert log.items["topic"].value_counts()["count"].to_list() == [4] * 6
    assert media_log(history=True, num_users=50, num_items=24, impressions=7).events.equals(
        log.events
    )
    with pytest.raises(ConfigError, match="an item for each topic"):
        media_log(history=True, num_items=5)

"""Bootstrap confidence intervals of a mean."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foretaste.evaluation import list_metrics
from foretaste.evaluation.compare import holm, sign_flip_p_value
from foretaste.evaluation.list_metrics import bootstrap_intervals, bootstrap_means


def test_the_interval_is_the_normal_one_where_users_are_many() -> None:
    values = np.random.default_rng(0).exponential(size=(5000, 1))
    interval = bootstrap_intervals(values, resamples=4000, seed=0)[0]
    half = 1.96 * values.std() / np.sqrt(len(values))
    # An end of the interval wavers by about 2 % of its width with 4000 resamples.
    assert interval.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_the_interval_holds_the_truth_95_times_in_100() -> None:
    generator, held = np.random.default_rng(1), 0
    for trial in range(400):
        sample = generator.normal(size=(60, 1))
        interval = bootstrap_intervals(sample, resamples=300, seed=trial)[0]
        held += interval.low <= 0 <= interval.high
    assert 0.90 < held / 400 < 0.98  # s.d. of the share is 1.1 %; small samples fall a bit short


def test_every_resample_takes_as_many_users_as_there_are() -> None:
    means = bootstrap_means(np.ones((7, 2)), resamples=50, seed=0)
    np.testing.assert_allclose(means, 1.0, rtol=1e-15)


def test_columns_stay_paired() -> None:
    values = np.random.default_rng(0).normal(size=(30, 1))
    means = bootstrap_means(np.hstack([values, values + 2]), resamples=100, seed=0)
    np.testing.assert_allclose(means[:, 1] - means[:, 0], 2.0)


def test_one_seed_gives_one_answer() -> None:
    values = np.random.default_rng(0).normal(size=(30, 1))
    first, again, other = (bootstrap_means(values, resamples=9, seed=s) for s in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_the_draw_does_not_know_its_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).integers(0, 2, size=(31, 2)).astype(np.float64)
    whole = bootstrap_means(values, resamples=100, seed=1)
    monkeypatch.setattr(list_metrics, "_CHUNK_ELEMENTS", 31 * 7)
    assert np.array_equal(whole, bootstrap_means(values, resamples=100, seed=1))


def test_one_user_has_an_interval_of_no_width() -> None:
    assert bootstrap_intervals(np.array([[0.25]]), resamples=20, seed=0) == [(0.25, 0.25)]


def test_the_p_value_is_that_of_all_signs() -> None:
    difference = np.array([0.3, 0.1, 0.25, -0.1, 0.2, 0.05, 0.0])
    sums = [np.dot(signs, difference) for signs in itertools.product([-1, 1], repeat=7)]
    exact = np.mean(np.abs(sums) >= difference.sum() - 1e-12)
    got = sign_flip_p_value(difference, resamples=40_000, seed=0)
    assert got == pytest.approx(exact, abs=4 * np.sqrt(exact / 40_000))


def test_no_difference_is_no_evidence() -> None:
    assert sign_flip_p_value(np.zeros(5), resamples=100, seed=0) == 1.0


def test_p_values_of_equal_models_are_spread_evenly() -> None:
    generator = np.random.default_rng(0)
    values = [
        sign_flip_p_value(generator.normal(size=40), resamples=199, seed=s) for s in range(300)
    ]
    assert np.mean(np.array(values) < 0.05) < 0.05 + 3 * np.sqrt(0.05 * 0.95 / 300)
    assert np.mean(values) == pytest.approx(0.5, abs=4 * np.sqrt(1 / 12 / 300))


def test_holm_by_hand() -> None:
    # smallest of four times 4, the next times 3, 2, 1; none below the one before it, none above 1
    assert holm([0.03, 0.01, 0.04, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.9, 0.5]) == [1.0, 1.0]
    assert holm([0.02]) == [0.02]
    assert holm([]) == []


@settings(deadline=None, derandomize=True)
@given(p_values=st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_lies_between_the_p_value_and_its_multiple(p_values: list[float]) -> None:
    found = holm(p_values)
    pairs = list(zip(p_values, found, strict=True))
    assert all(p <= q <= min(1, p * len(p_values)) + 1e-12 for p, q in pairs)
    rising = [q for _, q in sorted(pairs)]
    assert rising == sorted(rising)

"""Made-up tasks have the correlation that they were told to have."""

import numpy as np
import pytest

from foretaste.data.synthetic import correlated_tasks
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

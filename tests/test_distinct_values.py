"""Distinct values of many numbers."""

import numpy as np
import pytest

from foretaste.data.arrays import distinct


@pytest.mark.parametrize("num_values", [0, 1, 2, 50])
def test_each_value_is_given_once_and_rising(num_values: int) -> None:
    value_N = np.random.default_rng(0).integers(-20, 20, size=num_values)
    before_N = value_N.copy()
    assert distinct(value_N).tolist() == sorted(set(value_N.tolist()))
    np.testing.assert_array_equal(value_N, before_N)

"""Ranges of rows, laid one after the other.

Shape legend: B ranges, H rows of all of them.
"""

import numpy as np
from jaxtyping import Int64


def ranges(
    first_B: Int64[np.ndarray, " B"], length_B: Int64[np.ndarray, " B"]
) -> tuple[Int64[np.ndarray, " H"], Int64[np.ndarray, " B1"]]:
    """Return `first, first + 1, …` of each range, and where each begins and ends among them."""
    offsets_B1 = np.concatenate([[0], np.cumsum(length_B)])
    index_H = np.arange(offsets_B1[-1]) + np.repeat(first_B - offsets_B1[:-1], length_B)
    return index_H, offsets_B1

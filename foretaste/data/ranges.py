"""Ranges of rows, laid one after the other.

Shape legend: B ranges, H rows of all of them.
"""

import numpy as np
from jaxtyping import Int64

from foretaste.errors import DataError


def check_rows(row_B: Int64[np.ndarray, " B"], num: int, *, name: str) -> None:
    """Refuse rows that are not there.

    Args:
        row_B: What a caller asks for.
        num: How many there are.
        name: The argument's, for the message.

    Raises:
        DataError: One is not in `[0, num)`.
    """
    outside_B = (row_B < 0) | (row_B >= num)
    if outside_B.any():
        value = int(row_B[outside_B.argmax()])
        raise DataError(
            f"{name}: there is no row {value}: rows are counted from 0, and there are {num:,}",
            name=name,
            value=value,
        )


def ranges(
    first_B: Int64[np.ndarray, " B"], length_B: Int64[np.ndarray, " B"]
) -> tuple[Int64[np.ndarray, " H"], Int64[np.ndarray, " B1"]]:
    """Return `first, first + 1, …` of each range, and where each begins and ends among them."""
    offsets_B1 = np.concatenate([[0], np.cumsum(length_B)])
    index_H = np.arange(offsets_B1[-1]) + np.repeat(first_B - offsets_B1[:-1], length_B)
    return index_H, offsets_B1

"""The mean of a property of items over what a list holds."""

import numpy as np
from jaxtyping import Float64, Int64


def list_mean(
    item_BK: Int64[np.ndarray, "B K"], value_I: Float64[np.ndarray, " I"], k: int
) -> Float64[np.ndarray, " B"]:
    """Return the mean of `value_I` over the first `k` places of each list.

    Args:
        item_BK: Best first; -1 where the list ran out, left out of the mean.
        value_I: A property of each item.
        k: At least 1.

    Returns:
        0 for an empty list.
    """
    filled_BK = item_BK[:, :k] >= 0
    value_BK = np.where(filled_BK, value_I[item_BK[:, :k]], 0.0)
    num_B = filled_BK.sum(axis=1)
    mean_B: np.ndarray = value_BK.sum(axis=1) / np.maximum(num_B, 1)
    return mean_B

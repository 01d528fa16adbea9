"""Coverage: how much of the catalogue anybody is shown."""

import numpy as np
from jaxtyping import Bool


def coverage(shown_I: Bool[np.ndarray, " I"], known_I: Bool[np.ndarray, " I"]) -> float:
    """Return the share of the catalogue that stands in at least one list, in [0, 1].

    Args:
        shown_I: Items in some list.
        known_I: The catalogue: items that can be recommended.
    """
    return float(shown_I[known_I].mean())

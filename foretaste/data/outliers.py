"""Few values so far away that all others become nearly equal, once numbers are standardised.

Shape legend: N values.
"""

import math

import numpy as np
from jaxtyping import Float

_FEW = 0.01
"""The share of values that may be outliers; one at least."""
_FLAT = 0.05
"""Without them, the others have less than this share of the standard deviation."""


def flattening(number_N: Float[np.ndarray, " N"]) -> int | None:
    """Return the place of the furthest number, if the few furthest make the others nearly equal.

    Args:
        number_N: None is missing; there may be none.
    """
    num_rest = len(number_N) - math.ceil(_FEW * len(number_N))
    if not num_rest:
        return None
    far_N = np.abs(number_N - np.median(number_N))
    rest = number_N[np.argpartition(far_N, num_rest)[:num_rest]]
    is_flat = 0 < rest.std() < _FLAT * number_N.std()
    return int(far_N.argmax()) if is_flat else None

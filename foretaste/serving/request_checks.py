"""The numbers of a request, refused at the door."""

import math
from collections.abc import Sequence

from foretaste.data.tasks import Weights
from foretaste.errors import DataError, did_you_mean

MAX_K = 1_000_000


def check_k(k: int) -> None:
    """Refuse a list length that is no whole number in [1, 10^6].

    Raises:
        DataError: It is none.
    """
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= MAX_K:
        raise DataError(f"k is {k!r}: ask for 1 to {MAX_K} items")


def check_weights(weights: Weights | None, tasks: Sequence[str]) -> None:
    """Refuse weights of tasks that a model has not, and such as order nothing.

    Raises:
        DataError: A name is none of the tasks, or a weight is not finite, or all are 0.
    """
    if weights is None:
        return
    for name, weight in weights.items():
        if name not in tasks:
            known = f"this model's are {', '.join(tasks)}" if tasks else "this model has none"
            advice = did_you_mean(name, tasks)
            raise DataError(f"weights: {name!r} is no task; {known}{advice}")
        if isinstance(weight, bool) or not math.isfinite(weight):
            raise DataError(f"weights: {name!r} is {weight!r}: give a finite number")
    if not any(weights.values()):
        raise DataError("weights: all are 0, which orders nothing: give one that is not")

"""The numbers of a request, refused at the door."""

import math
from collections.abc import Sequence

from foretaste.config import shown
from foretaste.data.tasks import Weights
from foretaste.errors import DataError, did_you_mean

MAX_K = 1_000_000


def check_k(k: int) -> None:
    """Refuse a list length outside of [1, 10^6].

    Raises:
        DataError: It is.
    """
    if not 1 <= k <= MAX_K:
        raise DataError(f"k is {shown(k)}: ask for 1 to {MAX_K} items", name="k", value=k)


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
            raise DataError(
                f"weights: {name!r} is no task; {known}{advice}", name="weights", value=name
            )
        if isinstance(weight, bool) or not math.isfinite(weight):
            raise DataError(
                f"weights: {name!r} is {weight!r}: give a finite number",
                name=f"weights.{name}",
                value=weight,
            )
    if not any(weights.values()):
        raise DataError(
            "weights: all are 0, which orders nothing: give one that is not", name="weights"
        )

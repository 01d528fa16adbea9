"""Area under the ROC curve: are rows that are a 1 scored above rows that are a 0.

Shape legend: N rows, G distinct scores.
"""

from typing import final

import numpy as np
from jaxtyping import Float, Float64

from foretaste.errors import DataError
from foretaste.evaluation.metrics.labels import checked_labels, checked_predictions


@final
class RankedRows:
    """Rows in the order of their scores: sorted once, weighed as often as a bootstrap asks."""

    def __init__(self, label_N: Float[np.ndarray, " N"], score_N: Float[np.ndarray, " N"]) -> None:
        """Sort.

        Args:
            label_N: 0 or 1.
            score_N: Any real numbers, higher is better.

        Raises:
            DataError: A label is something else.
            NonFiniteError: A score is NaN or infinite.
        """
        self.label_N = checked_labels(label_N)
        _, self.place_N = np.unique(checked_predictions(score_N), return_inverse=True)

    def auc(self, weight_N: Float[np.ndarray, " N"] | None = None) -> float:
        """Return the area, NaN where the weights leave one class only."""
        positive_N = self.label_N if weight_N is None else self.label_N * weight_N
        all_N = np.ones(len(self.label_N)) if weight_N is None else weight_N
        positive_G = np.bincount(self.place_N, positive_N)
        negative_G = np.bincount(self.place_N, all_N - positive_N)
        pairs = positive_G.sum() * negative_G.sum()
        if not pairs > 0:
            return float("nan")
        below_G = np.cumsum(negative_G) - negative_G / 2
        return float(positive_G @ below_G / pairs)


def auc(
    label_N: Float[np.ndarray, " N"],
    score_N: Float[np.ndarray, " N"],
    weight_N: Float64[np.ndarray, " N"] | None = None,
) -> float:
    r"""Return the probability that a 1 is scored above a 0, ties counted as half, in [0, 1].

    .. math:: \frac{\sum_{i: y_i = 1} \sum_{j: y_j = 0} w_i w_j
                    \big([s_i > s_j] + \tfrac{1}{2} [s_i = s_j]\big)}
                   {\sum_{i: y_i = 1} w_i \sum_{j: y_j = 0} w_j}

    Args:
        label_N: 0 or 1.
        score_N: Any real numbers, higher is better.
        weight_N: Of each row, 0 or more; none: all alike.

    Returns:
        0.5 where the scores say nothing.

    Raises:
        DataError: There are no rows of one of the classes, or a label is neither.
        NonFiniteError: A score is NaN or infinite.

    References:
        Hanley and McNeil, "The meaning and use of the area under a receiver operating
        characteristic (ROC) curve", Radiology 1982.
    """
    found = RankedRows(label_N, score_N).auc(weight_N)
    if np.isnan(found):
        raise DataError(
            f"AUC compares rows that are a 1 with rows that are a 0, and of {len(label_N)} rows "
            f"{int(np.sum(label_N))} are a 1 (with weights above 0, only one class is left): "
            "measure on rows of both"
        )
    return found

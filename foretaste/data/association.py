"""How well one column tells another: rank correlation, and the variance that groups explain.

Shape legend: N rows.
"""

import numpy as np
import polars as pl
from jaxtyping import Float64, Shaped

_MIN_ROWS = 20


def rank_correlation(x_N: Shaped[np.ndarray, " N"], y_N: Shaped[np.ndarray, " N"]) -> float:
    """Return Spearman's correlation in [-1, 1]; 0 for fewer than 20 rows or a constant.

    Rows in which either is not finite are left out.
    """
    x_N, y_N = x_N.astype(np.float64), y_N.astype(np.float64)
    both = np.isfinite(x_N) & np.isfinite(y_N)
    x_N, y_N = _ranks(x_N[both]), _ranks(y_N[both])
    if len(x_N) < _MIN_ROWS or x_N.std() == 0 or y_N.std() == 0:
        return 0.0
    return float(np.corrcoef(x_N, y_N)[0, 1])


def explained_share(group_N: Shaped[np.ndarray, " N"], value_N: Shaped[np.ndarray, " N"]) -> float:
    r"""Return the share of the variance of a value that lies between groups, at most 1.

    .. math:: \epsilon^2 = 1 - \frac{SS_{within} / (N - G)}{SS_{total} / (N - 1)}

    Around 0 for groups that say nothing, however many there are; 0 for fewer than 20 rows, a
    constant value, or groups of fewer than two rows on average.
    """
    value_N = value_N.astype(np.float64)
    _, group_of = np.unique(group_N, return_inverse=True)
    num_groups = int(group_of.max(initial=-1)) + 1
    total = float(((value_N - value_N.mean()) ** 2).sum()) if len(value_N) else 0.0
    if len(value_N) < max(_MIN_ROWS, 2 * num_groups) or num_groups < 2 or total == 0:
        return 0.0
    mean_G = np.bincount(group_of, value_N) / np.bincount(group_of)
    within = float(((value_N - mean_G[group_of]) ** 2).sum())
    return 1 - (within / (len(value_N) - num_groups)) / (total / (len(value_N) - 1))


def separation(x_N: Shaped[np.ndarray, " N"], label_N: Shaped[np.ndarray, " N"]) -> float:
    r"""Return how well a number parts the two values of a label: :math:`|2\,\mathrm{AUC} - 1|`.

    0 for chance, 1 where one value always stands above the other; 0 for fewer than 20 rows, or a
    label of other than two values. Rows in which either is not finite are left out.
    """
    x_N, label_N = x_N.astype(np.float64), label_N.astype(np.float64)
    both = np.isfinite(x_N) & np.isfinite(label_N)
    values = np.unique(label_N[both])
    if both.sum() < _MIN_ROWS or len(values) != 2:
        return 0.0
    rank_N, high_N = _ranks(x_N[both]), label_N[both] == values[1]
    num_high, num_low = int(high_N.sum()), int((~high_N).sum())
    above = rank_N[high_N].sum() - num_high * (num_high + 1) / 2
    return float(abs(2 * above / (num_high * num_low) - 1))


def _ranks(x_N: Float64[np.ndarray, " N"]) -> Float64[np.ndarray, " N"]:
    return pl.Series(x_N).rank("average").to_numpy().astype(np.float64)

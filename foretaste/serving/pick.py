"""Choosing a list from ranked candidates, one place after the other: caps and diversity.

Carbonell and Goldstein, "The Use of MMR, Diversity-Based Reranking for Reordering Documents and
Producing Summaries", SIGIR 1998, https://doi.org/10.1145/290941.291025

Departures: scores are brought to [0, 1] by the best and the worst of the pool, so that they and
likeness are of one size; what stands outside the pool is looked at only once it gives no more.

Shape legend: C candidates, K list length, E labels of all candidates.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int64

WIDER = 4
"""Each window of candidates is so many times the one before."""


@dataclass(frozen=True, kw_only=True)
class Cap:
    """How many of a list's items may share a label."""

    most: int
    row_E: Int64[np.ndarray, " E"]
    """Which candidate carries each label, never falling."""
    code_E: Int64[np.ndarray, " E"]
    """The labels; no candidate carries one twice."""


@dataclass(frozen=True, kw_only=True)
class Spread:
    """How much unlike those above an item shall be."""

    relevance: float
    """Weight of the score, in [0, 1]."""
    pool: int
    """Candidates of the first window."""
    likeness: Callable[[int], Float[np.ndarray, " C"]]
    """From a candidate to how alike it and each candidate are, at most 1."""


def pick(
    score_C: Float[np.ndarray, " C"],
    k: int,
    *,
    caps: Sequence[Cap] = (),
    spread: Spread | None = None,
) -> Int64[np.ndarray, " K"]:
    r"""Choose at most k candidates, and return their positions in the order of the list.

    .. math:: \arg\max_c \lambda r_c - (1 - \lambda) \max_{s \in S} \mathrm{like}(c, s)

    over the candidates that no cap forbids, S being those chosen before; ties go to the better
    score. A longer list begins with the shorter one, and that of a ranking which goes on for
    whole windows with that of the first.

    Args:
        score_C: Best first; -inf is no candidate.
        k: List length; fewer are chosen when no candidate is left.
        caps: Each holds for itself.
        spread: None: the score alone orders.
    """
    open_C, chosen = score_C > -np.inf, list[int]()
    counts = [np.zeros(1 + cap.code_E.max(initial=-1), np.int64) for cap in caps]
    relevance_C = None if spread is None else spread.relevance * _scaled(score_C, spread.pool)
    alike_C = np.zeros(len(score_C))
    end = len(score_C) if spread is None else min(spread.pool, len(score_C))
    while len(chosen) < k:
        while end < len(score_C) and not open_C[:end].any():
            end = min(WIDER * end, len(score_C))
        if not open_C[:end].any():
            break
        if spread is None or relevance_C is None:
            best = int(open_C.argmax())
        else:
            gain = relevance_C[:end] - (1 - spread.relevance) * alike_C[:end]
            best = int(np.where(open_C[:end], gain, -np.inf).argmax())
            likeness_C = spread.likeness(best)
            alike_C = np.maximum(alike_C, likeness_C) if chosen else likeness_C
        chosen.append(best)
        open_C[best] = False
        for cap, count in zip(caps, counts, strict=True):
            open_C[_filled(cap, count, best)] = False
    return np.array(chosen, dtype=np.int64)


def _filled(cap: Cap, count: Int64[np.ndarray, " V"], best: int) -> Int64[np.ndarray, " N"]:
    """Count a choice's labels, and return the candidates that carry one which is now used up."""
    first, last = np.searchsorted(cap.row_E, [best, best + 1])
    own = cap.code_E[first:last]
    count[own] += 1
    full = own[count[own] >= cap.most]
    filled: np.ndarray = cap.row_E[np.isin(cap.code_E, full)] if len(full) else full
    return filled


def _scaled(score_C: Float[np.ndarray, " C"], pool: int) -> Float[np.ndarray, " C"]:
    """Return scores such that the best of the pool is 1 and its worst 0; no candidate is 0."""
    real_C = score_C > -np.inf
    pooled = score_C[:pool][real_C[:pool]].astype(np.float64)
    if not len(pooled):
        return np.zeros(len(score_C))
    span = pooled[0] - pooled[-1] or 1.0
    height_C = np.where(real_C, score_C, pooled[-1]).astype(np.float64) - pooled[-1]
    scaled_C: np.ndarray = height_C / span
    return scaled_C

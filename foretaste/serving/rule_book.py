"""Application of a request's rules to the candidates of a model, in one or two stages.

Shape legend: B = 1 query, C candidates, K list length, I items, D width, N labels,
R new items.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import final

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from foretaste.errors import DataError
from foretaste.models.base import TopK
from foretaste.serving.catalogue_search import Best, Stages
from foretaste.serving.profiles import NewItems
from foretaste.serving.rules import (
    Carried,
    Diversity,
    ItemLabels,
    Rules,
    carried_beside,
    labels_of_new,
)

LONGEST = 1000
"""The maximum length of lists with caps or diversity."""
FIRST = 100
"""Size of the first window of candidates for a list with caps only."""


WIDER = 4
"""Each window of candidates is this many times as large as the previous one."""


@dataclass(frozen=True, kw_only=True)
class Cap:
    """A cap: how many items of a list may share a label."""

    most: int
    row_E: Int64[np.ndarray, " E"]
    """The candidate of each label, in non-decreasing order."""
    code_E: Int64[np.ndarray, " E"]
    """The labels; each label occurs at most once per candidate."""


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Diversity: how much an item should differ from those above it."""

    relevance: float
    """Weight of the score, in [0, 1]."""
    pool: int
    """Number of candidates in the first window."""
    likeness: Callable[[int], Float[np.ndarray, " C"]]
    """Returns the similarity of a candidate to each candidate, at most 1."""


@final
class RuleBook:
    """Applies rules, with the item table and the similarity of items."""

    def __init__(
        self,
        labels: ItemLabels,
        *,
        vectors_of: Callable[[Int64[Tensor, " C"]], Float[Tensor, "C D"]] | None,
        num_items: int,
        at_once: int = 0,
        no_vectors: str = "this model has no item vectors",
        carried: Callable[[str, Int64[np.ndarray, " C"]], Carried] | None = None,
    ) -> None:
        """Store the data about a catalogue's items.

        Args:
            labels: The item table.
            vectors_of: Returns item vectors, if the model has them.
            num_items: Maximum length of a ranking.
            at_once: This many candidates are found in the same time as fewer.
            no_vectors: Why there are no vectors, if there are none.
            carried: Returns the labels of items in a column; None: those of the table.
        """
        self._labels, self._vectors_of, self._no_vectors = labels, vectors_of, no_vectors
        self._num_items, self._at_once = num_items, at_once
        self._carried = carried or (lambda name, item_C: labels.labels(name).of(item_C))

    def beside(
        self, new: NewItems, rules: Rules, vector_RD: Float[Tensor, "R D"] | None, *, first: int
    ) -> tuple[NewItems | None, "RuleBook"]:
        """Return the new items of a request that satisfy `where`, and a rule book that includes
        them.

        Args:
            new: Items that are not in the catalogue.
            rules: Rules, whose columns are read.
            vector_RD: The new items' vectors; None if the model cannot embed them.
            first: The row of the first new item; the catalogue's rows come before it.

        Raises:
            DataError: A new item has an invalid value for a column.
        """
        said = labels_of_new(self._labels, new.sent, rules.columns)
        keep_R = said.matching(rules.where)
        if not keep_R.all():
            if not keep_R.any():
                return None, self
            vector_RD = None if vector_RD is None else vector_RD[torch.from_numpy(keep_R)]
            return self.beside(new.only(keep_R), rules, vector_RD, first=first)
        labels, of_catalogue, vectors_of = self._labels, self._vectors_of, None
        no_vectors = self._no_vectors
        if of_catalogue is not None and vector_RD is None:
            no_vectors = "this model's retriever cannot embed new_items"
        elif of_catalogue is not None and vector_RD is not None:
            vectors_of = partial(_vectors_beside, of_catalogue, vector_RD, first)
        return new, RuleBook(
            labels,
            vectors_of=vectors_of,
            num_items=self._num_items + len(new.sent),
            at_once=self._at_once,
            no_vectors=no_vectors,
            carried=lambda name, item_M: carried_beside(
                labels.labels(name), said.labels(name), item_M, first
            ),
        )

    def check(self, rules: Rules, *, k: int) -> None:
        """Raise an error for rules that cannot be satisfied for any candidates.

        Raises:
            DataError: A column is unknown or has another type, the model has no vectors for
                diversity by vectors, or k is above the limit for caps and diversity.
        """
        if not rules.reorder:
            return
        if k > LONGEST:
            raise DataError(
                f"k is {k}: caps and diversity allow lists of 1 to {LONGEST}", name="k", value=k
            )
        nothing = TopK(torch.empty(1, 0, dtype=torch.int64), torch.empty(1, 0))
        self._arranged(rules, k, nothing, 0)

    def allowed(self, rules: Rules, allow_I: Bool[Tensor, " I"] | None) -> Tensor | None:
        """Return which of the allowed items satisfy `where`; None for all.

        Raises:
            DataError: A column is unknown, or a condition does not fit its type.
        """
        if not rules.where:
            return allow_I
        matching_I = torch.from_numpy(self._labels.matching(rules.where))
        return matching_I if allow_I is None else matching_I & allow_I

    def choose(
        self,
        rules: Rules,
        k: int,
        find: Callable[[int], Best],
        stages: Stages | None = None,
    ) -> Best:
        """Choose k items of a ranking, which is extended while too few are left.

        Args:
            rules: Caps and diversity are applied here; the ranking satisfies `where` already.
            k: List length.
            find: Returns a given number of best items, in one row, padded with -1. A longer
                ranking begins with the shorter one.
            stages: Receives the time of the choice.
        """
        best = find(self.at_first(rules, k))
        if not rules.reorder:
            return best
        num_items, stages = self._num_items, stages or Stages()
        width = _first_width(rules, k)
        while True:
            with stages.timed("rules"):
                place_K = self._arranged(rules, k, best.top, width)
            has_more = width < num_items and bool((best.top.item_BK[0, -1:] >= 0).all())
            has_more |= width < best.top.item_BK.shape[1]
            if len(place_K) >= k or not has_more:
                return best.at(torch.from_numpy(place_K))
            width *= WIDER
            if width > best.top.item_BK.shape[1]:
                best = find(min(width, num_items))

    def at_first(self, rules: Rules, k: int) -> int:
        """Return the size of the first window of candidates, for a list of k."""
        if not rules.reorder:
            return k
        return min(max(_first_width(rules, k), self._at_once), self._num_items)

    def _arranged(self, rules: Rules, k: int, top: TopK, width: int) -> Int64[np.ndarray, " K"]:
        """Return the positions of the chosen items among the first `width` of a ranking."""
        item_C = top.item_BK[0, :width]
        item_C, caps = item_C[item_C >= 0], []
        for name, most in rules.caps.items():
            carried = self._carried(name, item_C.numpy())
            caps.append(Cap(most=most, row_E=carried.row_N, code_E=carried.code_N))
        spread = None if rules.diversity is None else self._spread(rules.diversity, item_C)
        score_C = top.score_BK[0, : len(item_C)].numpy()
        return pick(score_C, k, caps=caps, spread=spread)

    def _spread(self, diversity: Diversity, item_C: Int64[Tensor, " C"]) -> Spread:
        if diversity.by != "vectors":
            parts = [self._carried(name, item_C.numpy()) for name in diversity.by]
            likeness = _shared(parts, len(item_C))
        elif self._vectors_of is None:
            raise DataError(
                f"rules: {self._no_vectors} for diversity: name columns of the item "
                'table in diversity.by, such as ["genres"]',
                name="diversity",
            )
        else:
            likeness = _cosine(self._vectors_of(item_C).float().numpy())
        return Spread(relevance=diversity.relevance, pool=diversity.pool, likeness=likeness)


def _vectors_beside(
    vectors_of: Callable[[Int64[Tensor, " C"]], Float[Tensor, "C D"]],
    vector_RD: Float[Tensor, "R D"],
    first: int,
    item_C: Int64[Tensor, " C"],
) -> Float[Tensor, "C D"]:
    """Return vectors of items of the catalogue and, from row `first` on, of new items."""
    is_new_C = item_C >= first
    vector_CD = vectors_of(item_C.where(~is_new_C, 0))
    vector_CD[is_new_C] = vector_RD[item_C[is_new_C] - first]
    return vector_CD


def _first_width(rules: Rules, k: int) -> int:
    width = max(FIRST, 2 * k) if rules.diversity is None else rules.diversity.pool
    while width < k:
        width *= WIDER
    return width


def _cosine(vector_CD: Float[np.ndarray, "C D"]) -> Callable[[int], Float[np.ndarray, " C"]]:
    length_C1 = np.linalg.norm(vector_CD, axis=1, keepdims=True)
    unit_CD = vector_CD / np.maximum(length_C1, 1e-12)

    def likeness(place: int) -> Float[np.ndarray, " C"]:
        alike_C: np.ndarray = unit_CD @ unit_CD[place]
        return alike_C

    return likeness


def _shared(parts: Sequence[Carried], num: int) -> Callable[[int], Float[np.ndarray, " C"]]:
    """Return the Jaccard similarity of label sets: common labels over all labels; 0 if both are
    empty.
    """
    row_N = np.concatenate([part.row_N for part in parts])
    first, codes = 0, []
    for part in parts:  # labels of different columns are different
        codes.append(part.code_N + first)
        first += int(part.code_N.max(initial=-1)) + 1
    code_N = np.concatenate(codes)
    size_C = np.bincount(row_N, minlength=num)

    def likeness(place: int) -> Float[np.ndarray, " C"]:
        held = np.isin(code_N, code_N[row_N == place])
        both_C = np.bincount(row_N[held], minlength=num)
        either_C = size_C + size_C[place] - both_C
        share_C: np.ndarray = both_C / np.maximum(either_C, 1)
        return share_C

    return likeness


def pick(
    score_C: Float[np.ndarray, " C"],
    k: int,
    *,
    caps: Sequence[Cap] = (),
    spread: Spread | None = None,
) -> Int64[np.ndarray, " K"]:
    r"""Choose at most k candidates, and return their positions in the order of the list.

    .. math:: \arg\max_c \lambda r_c - (1 - \lambda) \max_{s \in S} \mathrm{like}(c, s)

    over the candidates that no cap forbids, where S are the items chosen before; ties go to the
    better score. A longer list begins with the shorter one, also if the ranking is extended by
    whole windows.

    Args:
        score_C: Scores, best first; -inf is not a candidate.
        k: List length; fewer items are chosen if no candidate is left.
        caps: Caps, each of which must be satisfied.
        spread: The diversity; None: the score alone determines the order.
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
    """Count the labels of a chosen item, and return the candidates with a label that reached its
    cap.
    """
    first, last = np.searchsorted(cap.row_E, [best, best + 1])
    own = cap.code_E[first:last]
    count[own] += 1
    full = own[count[own] >= cap.most]
    filled: np.ndarray = cap.row_E[np.isin(cap.code_E, full)] if len(full) else full
    return filled


def _scaled(score_C: Float[np.ndarray, " C"], pool: int) -> Float[np.ndarray, " C"]:
    """Return scores scaled to 1 for the best and 0 for the worst of the pool; missing ones are
    0.
    """
    real_C = score_C > -np.inf
    pooled = score_C[:pool][real_C[:pool]].astype(np.float64)
    if not len(pooled):
        return np.zeros(len(score_C))
    span = pooled[0] - pooled[-1] or 1.0
    height_C = np.where(real_C, score_C, pooled[-1]).astype(np.float64) - pooled[-1]
    scaled_C: np.ndarray = height_C / span
    return scaled_C

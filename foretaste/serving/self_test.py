"""Self-test of a bundle: the model must give the answers that were stored when it was saved."""

import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Bool
from pydantic import Field
from torch import Tensor

from foretaste.config import Config
from foretaste.errors import BundleError, ForetasteError
from foretaste.models.base import Retriever
from foretaste.retrieval.choose import exact_of
from foretaste.retrieval.faiss_index import FaissIndex
from foretaste.retrieval.index import CodeIndex, WholeIndex

if TYPE_CHECKING:
    from foretaste.serving.answer import Answer
    from foretaste.serving.recommender import Recommender

_USERS, _LONG, _SHORT, _DIGITS = 4, 200, 10, 6
_TOLERANCE = 1e-3
"""Tolerance relative to the largest score: machines differ in the order of summation."""
_REASONS = 0.5
"""Share of reasons that must be equal: two items may be almost equally good reasons."""
_SPARE = 0.1
"""Allowed decrease of the index's recall: ties may be broken differently on another machine."""
Id = int | str


class Asked(Config):
    """A query and its answer: for a user, a history or a new user, or for items similar to one."""

    user_id: Id | None = None
    """The user; None: a new user."""
    history: tuple[Id, ...] = ()
    """The history of a new user, oldest first."""
    similar_to: Id | None = None
    """The item for which similar items are requested."""
    item_ids: tuple[Id, ...] = ()
    """The items of the answer, best first."""
    scores: tuple[float, ...] = ()
    """The score of each item."""
    reasons: tuple[Id | None, ...] = ()
    """The reason for each row, an item of the history, if reasons were requested."""


class StoredAnswers(Config):
    """The contents of a bundle's `answers.json`."""

    asked: tuple[Asked, ...] = Field(min_length=1)
    """Queries with their answers."""
    recall: float | None = Field(default=None, ge=0, le=1)
    """The share of items that an approximate index finds with their own vectors as queries."""


def answers_of(recommender: "Recommender") -> StoredAnswers | None:
    """Return answers for some users, a new one, no user and an item; None if it cannot answer.

    A model that cannot answer can be saved and inspected, but `check_answers` rejects it.
    """
    try:
        asked = [_ask(recommender, question) for question in _questions(recommender)]
    except ForetasteError:
        return None
    return StoredAnswers(asked=tuple(asked), recall=_recall(recommender)) if asked else None


def check_answers(
    recommender: "Recommender",
    stored: StoredAnswers | None,
    *,
    within_s: float | None = None,
    clock: Callable[[], float] = time.process_time,
) -> None:
    """Repeat the stored queries and compare the answers; compare the index with the vectors.

    Args:
        recommender: The loaded recommender.
        stored: The stored answers; None for older bundles, whose answers must contain items of
            the catalogue with finite scores.
        within_s: Time limit for each answer, at its second computation; None: no limit.
        clock: Returns the time in seconds; by default processor time, so that a busy machine
            refuses no sound bundle.

    Raises:
        ForetasteError: The recommender cannot answer, or its answers differ, or they take too long.
    """
    _check_index(recommender)
    for question in stored.asked if stored else _questions(recommender):
        answer = _ask(recommender, question)
        if stored is not None:
            _check_same(question, answer)
        started = clock()
        _find(recommender, question, k=_SHORT)
        seconds = clock() - started
        if within_s is not None and seconds > within_s:
            raise _wrong(f"one answer takes {seconds:.2g} s, but {within_s:g} s are allowed")
    recall, before = _recall(recommender), stored.recall if stored else None
    if recall is not None and before is not None and recall < before - _SPARE:
        raise _wrong(
            f"its index finds {recall:.0%} of its items, but found {before:.0%} when it was saved"
        )


def _wrong(what: str) -> BundleError:
    return BundleError(
        f"the model's answers differ from the stored ones: {what}; save it again", name="answers"
    )


def _questions(recommender: "Recommender") -> Iterator[Asked]:
    events = recommender.trained.events
    popular = [row.item_id for row in recommender.recommend(k=3).rows]
    user_U = np.flatnonzero(np.diff(events.offsets))
    chosen = user_U[np.linspace(0, len(user_U) - 1, min(_USERS, len(user_U))).astype(int)]
    for user_id in events.users.ids[chosen.tolist()]:
        yield Asked(user_id=user_id)
    yield Asked()
    if popular:
        yield Asked(history=tuple(popular))
        yield Asked(similar_to=popular[0])


def _find(recommender: "Recommender", asked: Asked, *, k: int) -> "Answer":
    if asked.similar_to is not None:
        return recommender.similar(asked.similar_to, k)
    return recommender.recommend(asked.user_id, history=list(asked.history) or None, k=k)


def _ask(recommender: "Recommender", asked: Asked) -> Asked:
    """Return a query with its current answer, which must have valid items and finite scores."""
    rows = _find(recommender, asked, k=_LONG).rows
    for row in rows:
        numbers = [row.score, *row.predictions.values()]
        if not np.isfinite(numbers).all() or not recommender.ranks(row.item_id):
            raise _wrong(f"item {row.item_id!r} of its catalogue scores {row.score}")
    if len({row.item_id for row in rows}) < len(rows):
        raise _wrong("an item occurs twice in one answer")
    ids: list[Id] = [row.item_id for row in rows[:_SHORT]]
    reasons: tuple[Id | None, ...] = ()
    if asked.similar_to is None and (asked.user_id is not None or asked.history):
        reasons = recommender.explain_many(list(asked.history), ids, user_id=asked.user_id)
    scores = tuple(float(f"{row.score:.{_DIGITS}g}") for row in rows[:_SHORT])
    update = {"item_ids": tuple(ids), "scores": scores, "reasons": reasons}
    return asked.model_copy(update=update)


def _check_same(then: Asked, now: Asked) -> None:
    """Compare two answers; items whose scores are nearly equal may change places."""
    near = _TOLERANCE * max([1e-6, *(abs(score) for score in then.scores)])
    of = then.similar_to or then.user_id or then.history or "a new user"
    if len(then.scores) != len(now.scores):
        raise _wrong(f"{len(now.scores)} items for {of!r}, but there were {len(then.scores)}")
    pairs = zip(then.scores, now.scores, strict=True)
    if any(abs(one - other) > near for one, other in pairs):
        raise _wrong(f"the scores for {of!r} differ")
    score_of = dict(zip(now.item_ids, now.scores, strict=True))
    last = min(now.scores, default=0.0)
    for item_id, score in zip(then.item_ids, then.scores, strict=True):
        if abs(score_of.get(item_id, last) - score) > 2 * near:
            raise _wrong(f"item {item_id!r} is missing for {of!r}, or has another score")
    by_item = dict(zip(now.item_ids, now.reasons, strict=False))
    known = [
        (one, by_item[i])
        for i, one in zip(then.item_ids, then.reasons, strict=False)
        if i in by_item
    ]
    if sum(one == other for one, other in known) < _REASONS * len(known):
        raise _wrong(f"the reasons for {of!r} differ")


@torch.inference_mode()
def _check_index(recommender: "Recommender") -> None:
    """Raise an error if the items or vectors of an index differ from those of the model.

    Shape legend: I items.

    Raises:
        BundleError: They differ.
    """
    index, retriever = recommender.index, recommender.trained.model.first_stage
    if isinstance(retriever, Retriever) != (index is not None):
        raise _wrong("there is an index without item vectors, or item vectors without an index")
    if index is None or not isinstance(retriever, Retriever):
        return
    exact, known_I = exact_of(index), recommender.trained.known_I
    facts, item_N = index.facts, known_I.nonzero().flatten()
    width = exact.vectors_at(torch.arange(min(1, len(exact.item_N)))).shape[-1]
    sizes = (len(item_N), len(known_I), width)
    if (facts.num_items, facts.catalogue_size, facts.embedding_dim) != sizes:
        raise _wrong("its index has another size")
    if exact.item_N.dtype != item_N.dtype or not torch.equal(exact.item_N, item_N):
        raise _wrong("its index has other items")
    if isinstance(exact, CodeIndex) and retriever.item_codes() is None:
        return  # its vectors approximate the model's; the stored answers test how well
    _check_vectors(exact, retriever, known_I)
    if isinstance(index, FaissIndex):
        index.check()


def _check_vectors(exact: WholeIndex, retriever: Retriever, known_I: Bool[Tensor, " I"]) -> None:
    for first, vector_VD in retriever.item_blocks():
        known_V = known_I[first : first + len(vector_VD)]
        start = int(known_I[:first].sum())
        own_VD = vector_VD[known_V].float()
        kept_VD = exact.vectors_at(torch.arange(start, start + len(own_VD)))
        near = 1e-4 * float(own_VD.abs().max()) if own_VD.numel() else 0.0
        same = own_VD.shape == kept_VD.shape
        if not same or not torch.allclose(own_VD, kept_VD, rtol=_TOLERANCE, atol=near):
            raise _wrong("its index has other vectors")


def _recall(recommender: "Recommender") -> float | None:
    """Return the share of items that an approximate index finds with their own vectors as
    queries.
    """
    index = recommender.index
    if not isinstance(index, FaissIndex):
        return None
    exact = index.exact
    row_Q = torch.linspace(0, len(exact.item_N) - 1, min(64, len(exact.item_N))).long()
    query_QD, k = exact.vectors_ND[row_Q].float(), min(_SHORT, len(exact.item_N))
    none = torch.full((len(row_Q), 0), -1)
    true_QK = exact.search(query_QD, k, exclude_BX=none).item_BK
    found_QK = index.candidates(query_QD, k)
    shares = [torch.isin(t, f).float().mean() for t, f in zip(true_QK, found_QK, strict=True)]
    return round(float(torch.stack(shares).mean()), _DIGITS)

"""Search in the catalogue: histories as model inputs, retrieval, ranking, and reasons.

Shape legend: B users, N events of all their histories, X exclusions, L events, C left-out items.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from typing import Literal, NamedTuple, final

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from foretaste.data.batch import NO_TIME, Queries, Times, ranges, times_at
from foretaste.data.features import FieldTable
from foretaste.data.interactions import Interactions
from foretaste.data.tasks import Weights
from foretaste.errors import ConfigError, DataError
from foretaste.models.base import Model, Ranker, Retriever, TopK, padded, top_k
from foretaste.models.catalogue import (
    Judged,
    TwoStage,
    below,
    judge,
    judge_new,
    placer,
)
from foretaste.retrieval.choose import exact_of
from foretaste.retrieval.faiss_index import FaissIndex
from foretaste.retrieval.index import ItemIndex, WholeIndex
from foretaste.serving.profiles import beside, best_of, both
from foretaste.training.trained import Trained

BLOCK_USERS = 1024
BLOCK_EVENTS = 2**15
"""Bound on the number of users in a block times their longest history, padding included."""
BLOCK_SCORES = 2**25
"""Bound on the scores in a block, for a model that scores the whole catalogue: 128 MiB."""


def one_query(
    user_idx: int, history_L: Int64[np.ndarray, " L"], times: Times | None = None
) -> Queries:
    """Return a block of one user; user_idx is -1 for a new user."""
    return Queries(
        user_B=torch.tensor([user_idx]),
        history_N=torch.from_numpy(history_L),
        offsets_B1=torch.tensor([0, len(history_L)]),
        times=times,
    )


def training_history(
    events: Interactions, user_idx: int, *, since: int | None = None
) -> Int64[np.ndarray, " L"]:
    """Return a user's history in training, oldest first; it is empty for a new user, -1.

    Raises:
        DataError: `since`, in Unix seconds, was given, but the events have no times.
    """
    if since is not None and events.timestamp_s is None:
        raise DataError(
            f"since is {since}, but the training events have no times: omit it",
            name="since",
            value=since,
        )
    if user_idx < 0:
        return np.empty(0, dtype=np.int64)
    past = events.history(user_idx).astype(np.int64)
    if since is None or events.timestamp_s is None:
        return past
    start, end = events.offsets[user_idx], events.offsets[user_idx + 1]
    return past[events.timestamp_s[start:end] >= since]


def training_times(
    events: Interactions, user_idx: int, *, since: int | None = None, more: int = 0
) -> Times | None:
    """Return a function that gathers the times of `training_history`, and of `more` events without
    a time.
    """
    timestamp_s = events.timestamp_s
    if timestamp_s is None or user_idx < 0:
        return None
    past_s = timestamp_s[events.offsets[user_idx] : events.offsets[user_idx + 1]]

    def gather() -> Tensor:
        kept_s = past_s if since is None else past_s[past_s >= since]
        return torch.from_numpy(np.concatenate([kept_s, np.full(more, NO_TIME)]))

    return gather


def training_histories(
    events: Interactions, user_B: Int64[np.ndarray, " B"]
) -> tuple[Queries, Int64[Tensor, "B X"]]:
    """Return users with their training histories, and the histories padded with -1, for
    exclusion.
    """
    start_B, end_B = events.offsets[user_B], events.offsets[user_B + 1]
    length_B = end_B - start_B
    index_N, offsets_B1 = ranges(start_B, length_B)
    history_N = events.item_idx[index_N].astype(np.int64)
    seen_BX = np.full((len(user_B), int(length_B.max(initial=0))), -1, dtype=np.int64)
    seen_BX[np.arange(seen_BX.shape[1]) < length_B[:, None]] = history_N
    queries = Queries(
        user_B=torch.from_numpy(user_B),
        history_N=torch.from_numpy(history_N),
        offsets_B1=torch.from_numpy(offsets_B1),
        times=times_at(events.timestamp_s, index_N),
    )
    return queries, torch.from_numpy(seen_BX)


def blocks(
    events: Interactions, user_B: Int64[np.ndarray, " B"], *, scores_per_user: int
) -> Iterator[Int64[np.ndarray, " b"]]:
    """Group users into blocks of similar history length; yield rows of `user_B`, each once.

    Args:
        events: The training events.
        user_B: user_idx.
        scores_per_user: Number of items that the model scores for each user; 0 with an index.
    """
    length_B = events.offsets[user_B + 1] - events.offsets[user_B]
    order_B = np.argsort(length_B, kind="stable")
    most = min(BLOCK_USERS, BLOCK_SCORES // max(1, scores_per_user)) or 1
    start = 0
    while start < len(order_B):
        end = min(start + most, len(order_B))
        while end - start > 1 and (end - start) * length_B[order_B[end - 1]] > BLOCK_EVENTS:
            end = start + (end - start + 1) // 2
        yield order_B[start:end]
        start = end


def without_each(
    history_L: Int64[np.ndarray, " L"], *, last: int
) -> tuple[Int64[np.ndarray, " C"], list[np.ndarray]]:
    """Remove, in turn, each distinct item of the last events, at all its positions."""
    removed_C = np.unique(history_L[-last:])
    return removed_C, [history_L[history_L != item] for item in removed_C]


Stage = Literal["encode", "search", "rank", "rules"]
"""The stages of an answer: encoding a history; retrieving the best items; ranking them by the
second model; applying the rules of the request."""


@final
class Stages:
    """The seconds of one answer by stage, without stages that were not needed."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.seconds: dict[Stage, float] = {}
        self._clock = clock

    @contextmanager
    def timed(self, stage: Stage) -> Iterator[None]:
        """Add the time spent inside the context to a stage."""
        begun = self._clock()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + self._clock() - begun


class Best(NamedTuple):
    """The best items of each query, with their predictions."""

    top: TopK
    prediction: Mapping[str, Float[Tensor, "B K"]]
    """Predictions of each task, NaN for items that were not ranked; empty for a model without
    tasks."""

    def at(self, place_K: Int64[Tensor, " K"]) -> "Best":
        """Return some columns, in this order."""
        return Best(
            TopK(self.top.item_BK[:, place_K], self.top.score_BK[:, place_K]),
            {name: value_BK[:, place_K] for name, value_BK in self.prediction.items()},
        )


@final
class CatalogueSearch:
    """Finds the best items, as item_idx; lists are padded with -1 and -inf."""

    def __init__(
        self, trained: Trained, *, index: ItemIndex | None, popular_I: Float[Tensor, " I"]
    ) -> None:
        self._trained, self._index, self._popular_I = trained, index, popular_I
        self._first = trained.model.first_stage
        self._retriever = self._first if isinstance(self._first, Retriever) else None
        self._placer = placer(trained.model)
        second = trained.model.second_stage
        self._ranker = second if isinstance(second, Ranker) else None
        self._norm_N: Tensor | None = None

    @property
    def scores_per_user(self) -> int:
        """Number of scores that the model computes per user; 0 with an index."""
        return 0 if self._index is not None else self._trained.events.num_items

    @property
    def at_once(self) -> int:
        """The least number of items that are found for each user, even if fewer are requested."""
        model = self._trained.model
        return model.num_candidates if isinstance(model, TwoStage) else 0

    @cached_property
    def _score(self) -> Callable[[Queries], Tensor]:
        return replace(self._trained, model=self._first).scorer()

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks of the model's ranker, if it has one."""
        return () if self._ranker is None else tuple(task.name for task in self._ranker.tasks)

    def knows(self, user_B: Int64[np.ndarray, " B"]) -> Bool[np.ndarray, " B"]:
        """Return which users the model knows by id, with or without a history; -1 is a new user."""
        known_B: np.ndarray = self.finds_for(user_B) | _known(self._ranker, user_B)
        return known_B

    def finds_for(self, user_B: Int64[np.ndarray, " B"]) -> Bool[np.ndarray, " B"]:
        """Return which users the first stage knows by id."""
        return _known(self._first, user_B)

    def best(
        self,
        queries: Queries,
        k: int,
        *,
        exclude_BX: Int64[Tensor, "B X"],
        allow_I: Bool[Tensor, " I"] | None,
        new: FieldTable | None = None,
        weights: Weights | None = None,
        stages: Stages | None = None,
    ) -> Best:
        """Return the model's K best items for each query, none of them excluded (-1 pads X).

        Args:
            queries: Users and histories.
            k: List length.
            exclude_BX: item_idx that are excluded for each row.
            allow_I: Items of the catalogue that are allowed; None: all.
            new: Features of new items, which are ranked too, as rows after the catalogue's.
            weights: Weights of the model's tasks; None: the model's own.
            stages: Receives the time of each stage.
        """
        model, stages = self._trained.model, stages or Stages()
        num = model.num_candidates if isinstance(model, TwoStage) else k
        if self._ranker is not None and not isinstance(model, TwoStage) and weights is not None:
            num = self._trained.events.num_items  # other weights: rank all again
        found = self._find(queries, max(k, num), exclude_BX, allow_I, stages)
        first_BR = None if new is None else self._first_of_new(queries, new, found)
        if first_BR is not None:
            found = beside(found, first_BR, num_items=self._trained.events.num_items, at=num)
        if self._ranker is None:
            return Best(found if first_BR is None else best_of(found, k), {})
        with stages.timed("rank"):
            judged = judge(
                self._ranker, queries, found.item_BK[:, :num].clamp(min=0), weights=weights
            )
            if new is not None:
                judged = both(judged, judge_new(self._ranker, queries, new, weights=weights))
                num += len(new)
            if isinstance(model, TwoStage) and weights is None and not self._is_nobody(queries):
                judged = model.heard(judged, found.score_BK[:, :num])
            best = _ranked(judged, found, k, num=num)
            return best._replace(prediction=self._trained.calibrated(best.prediction))

    def _first_of_new(self, queries: Queries, new: FieldTable, found: TopK) -> Float[Tensor, "B R"]:
        """Return the first stage's scores of new items; items that it cannot score get the lowest
        score found.
        """
        if self._retriever is not None and self._placer is not None:
            vector_RD = self._placer.item_from_features(new).float()
            score_BR: Tensor = self._retriever.encode(queries).float() @ vector_RD.T
            return score_BR
        lowest_B = found.score_BK.where(found.item_BK >= 0, torch.inf).amin(dim=1, keepdim=True)
        return lowest_B.where(lowest_B.isfinite(), 0.0).expand(-1, len(new))

    def _find(
        self,
        queries: Queries,
        k: int,
        exclude_BX: Tensor,
        allow_I: Tensor | None,
        stages: Stages,
    ) -> TopK:
        """Return the best items by the model, or by the first of its stages."""
        if self._is_nobody(queries):
            # Without histories, all rows of a block exclude the same items.
            exclude = exclude_BX[0][exclude_BX[0] >= 0].numpy()
            one = self.most_popular(k, exclude=exclude, allow_I=allow_I)
            size = (len(queries), -1)
            return TopK(one.item_BK.expand(size), one.score_BK.expand(size))
        if self._index is not None and self._retriever is not None:
            with stages.timed("encode"):
                query_BD = self._retriever.encode(queries).float()
            with stages.timed("search"):
                return self._index.search(query_BD, k, exclude_BX=exclude_BX, allow_I=allow_I)
        with stages.timed("search"):
            score_BI = self._score(queries)
            row_BX = torch.arange(len(queries)).unsqueeze(1).expand_as(exclude_BX)
            real_BX = exclude_BX >= 0
            score_BI[row_BX[real_BX], exclude_BX[real_BX]] = -torch.inf
            if allow_I is not None:
                score_BI.masked_fill_(~allow_I, -torch.inf)
            return _answer(*top_k(score_BI, k), k)

    def _is_nobody(self, queries: Queries) -> bool:
        """Return whether only the ranker, but not the retriever, knows something about the user."""
        if len(queries.history_N) or isinstance(self._first, Ranker):
            return False
        if self.finds_for(queries.user_B.numpy()).all():
            return False
        return queries.profile is None or not self._first.reads_profiles

    def scores(
        self, histories: list[np.ndarray], item_T: Int64[Tensor, " T"]
    ) -> Float[Tensor, "H T"]:
        """Score a few items for several histories of a new user."""
        queries = Queries.of_histories([history.tolist() for history in histories])
        if self._ranker is not None:
            item_HT = item_T.expand(len(queries), -1)
            return judge(self._ranker, queries, item_HT).score_BC
        if self._index is not None and self._retriever is not None:
            score_HT: Tensor = self._retriever.encode(queries).float() @ self.vectors_of(item_T).T
            return score_HT
        rows = max(1, BLOCK_SCORES // self.scores_per_user)
        blocks = [histories[start : start + rows] for start in range(0, len(histories), rows)]
        return torch.cat(
            [self._score(Queries.of_histories([h.tolist() for h in b]))[:, item_T] for b in blocks]
        )

    def attention(
        self, history_L: Int64[np.ndarray, " L"], item_T: Int64[Tensor, " T"]
    ) -> Float[Tensor, "T L"] | None:
        """Return the attention weight of each event of a history for each item, if the ranker has
        attention.

        Events that the ranker does not read have weight 0. None if the model has no such ranker.
        """
        ranker = self._ranker
        if ranker is None or not ranker.attends:
            return None
        read_TM = ranker.attention_weights(one_query(-1, history_L), item_T.unsqueeze(0))[0]
        return F.pad(read_TM, (len(history_L) - read_TM.shape[1], 0))

    def vectors_of(self, item_T: Int64[Tensor, " T"]) -> Float[Tensor, "T D"]:
        """Return the vectors of items in the index, zeros for others.

        Raises:
            ConfigError: The model has no item vectors.
        """
        if self._index is None:
            raise ConfigError("this model has no item vectors")
        whole = exact_of(self._index)
        at_T = whole.positions(item_T.unsqueeze(0))[0]
        return whole.vectors_at(at_T.clamp(min=0)) * (at_T >= 0).unsqueeze(1)

    def vectors_of_new(self, new: FieldTable) -> Float[Tensor, "R D"] | None:
        """Return the vectors of new items; None if the model cannot embed them."""
        return None if self._placer is None else self._placer.item_from_features(new).float()

    def similar(self, item_idx: int, k: int) -> TopK:
        """Return the items nearest to one by cosine, or the recommendations for a history of it
        alone.
        """
        own_1X = torch.tensor([[item_idx]])
        if self._index is None:
            query = one_query(-1, np.array([item_idx], dtype=np.int64))
            return self._find(query, k, own_1X, None, Stages())
        whole = exact_of(self._index)
        own = whole.positions(own_1X)[0, 0]
        return self._nearest(self._index, whole.vectors_at(own), int(own), k)

    def near(self, vector_D: Float[Tensor, " D"], k: int) -> TopK:
        """Return the items nearest by cosine to a vector that need not be an item's.

        Raises:
            ConfigError: The model has no item vectors.
        """
        if self._index is None:
            raise ConfigError(
                "this model has no item vectors, so similar items cannot be computed for a new item"
            )
        return self._nearest(self._index, vector_D.float(), -1, k)

    def _nearest(self, index: ItemIndex, vector_D: Float[Tensor, " D"], own: int, k: int) -> TopK:
        """Return the k items of largest cosine; an index with lists compares those of few lists."""
        whole = exact_of(index)
        near_N = index.near(vector_D, k + 1) if isinstance(index, FaissIndex) else None
        if near_N is None:
            near_N, norm_N = torch.arange(len(whole.item_N)), self._norms(whole)
            product_N = whole.products(vector_D)
        else:
            near_ND = whole.vectors_at(near_N)
            norm_N, product_N = near_ND.norm(dim=1), near_ND @ vector_D
        cosine_N = product_N / (norm_N * vector_D.norm()).clamp(min=1e-12)
        cosine_N[near_N == own] = -torch.inf
        best = _answer(*top_k(cosine_N.unsqueeze(0), k), k)
        item_BK = whole.item_N[near_N[best.item_BK.clamp(min=0)]].where(best.item_BK >= 0, -1)
        return TopK(item_BK=item_BK, score_BK=best.score_BK)

    def _norms(self, whole: WholeIndex) -> Float[Tensor, " N"]:
        if self._norm_N is None:
            self._norm_N = torch.cat([block_nD.norm(dim=1) for block_nD in whole.blocks()])
        return self._norm_N

    def most_popular(
        self, k: int, *, exclude: Int64[np.ndarray, " X"], allow_I: Bool[Tensor, " I"] | None
    ) -> TopK:
        """Return the k most popular items, in one row; ties are broken by the lower item_idx."""
        order = self._by_popularity
        order = order[: k + len(exclude)] if allow_I is None else order[allow_I.numpy()[order]]
        item_K = torch.from_numpy(order[~np.isin(order, exclude)][:k])
        return _answer(self._popular_I[item_K].unsqueeze(0), item_K.unsqueeze(0), k)

    @cached_property
    def _by_popularity(self) -> Int64[np.ndarray, " N"]:
        popular_I = self._popular_I.numpy()
        order_N: np.ndarray = np.argsort(-popular_I, kind="stable")[: np.isfinite(popular_I).sum()]
        return order_N


def _known(model: Model | None, user_B: Int64[np.ndarray, " B"]) -> Bool[np.ndarray, " B"]:
    known_U = None if model is None else model.known_users()
    if known_U is None:
        return np.zeros(len(user_B), dtype=bool)
    known_B: np.ndarray = known_U.cpu().numpy()[user_B] & (user_B >= 0)
    return known_B


def _ranked(judged: Judged, found: TopK, k: int, *, num: int) -> Best:
    """Sort the first `num` items of each query in the ranker's order; the others follow."""
    item_BC, rest_BR = found.item_BK[:, :num], found.score_BK[:, num:]
    score_BC = judged.score_BC.where(item_BC >= 0, -torch.inf)
    rest_BR = below(score_BC, rest_BR) if rest_BR.shape[1] else rest_BR
    score_BK, order_BK = torch.cat([score_BC, rest_BR], dim=1).sort(
        dim=1, descending=True, stable=True
    )
    order_BK = order_BK[:, :k]
    prediction = {
        name: torch.cat([value_BC, torch.full_like(rest_BR, torch.nan)], dim=1).gather(1, order_BK)
        for name, value_BC in judged.prediction.items()
    }
    return Best(TopK(found.item_BK.gather(1, order_BK), score_BK[:, :k]), prediction)


def _answer(score_BF: Tensor, item_BF: Tensor, k: int) -> TopK:
    """Replace missing items by -1, and pad answers to length k."""
    found_BF = score_BF > -torch.inf
    return padded(TopK(item_BK=item_BF.where(found_BF, -1), score_BK=score_BF), k)


EXPLAINED_EVENTS = 50
"""Number of last events of a history that are considered as reasons."""


def reasons(
    search: CatalogueSearch, history_L: Int64[np.ndarray, " L"], item_T: Int64[np.ndarray, " T"]
) -> Int64[np.ndarray, " T"]:
    """Return the item of the history that contributes most to each item's score, -1 for none.

    With a ranker with attention, this is the item with the largest attention weight. Otherwise it
    is the item, among the distinct items of the last `EXPLAINED_EVENTS` events, whose removal
    lowers the score most. An item is never a reason for itself.
    """
    if len(history_L) == 0 or len(item_T) == 0:
        return np.full(len(item_T), -1)
    attention_TL = search.attention(history_L, torch.from_numpy(item_T))
    if attention_TL is None:
        reason_C, without = without_each(history_L, last=EXPLAINED_EVENTS)
        score_CT = search.scores([history_L, *without], torch.from_numpy(item_T))
        weight_CT = (score_CT[0] - score_CT[1:]).numpy()
    else:
        reason_C, place_L = np.unique(history_L, return_inverse=True)
        weight_CT = np.zeros((len(reason_C), len(item_T)), dtype=np.float32)
        np.add.at(weight_CT, place_L, attention_TL.T.numpy())
    weight_CT[reason_C[:, None] == item_T] = -np.inf
    return np.where(weight_CT.max(axis=0) > 0, reason_C[weight_CT.argmax(axis=0)], -1)

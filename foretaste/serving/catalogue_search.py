"""A trained model's answers over its catalogue, in rows: an index where it has vectors, all its
scores where it has none, and popularity for those of whom nothing is known.

Shape legend: B users, I items, N items in the index, D width, X exclusions, K list length,
C histories, T items.
"""

from collections.abc import Callable
from functools import cached_property
from typing import final

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from foretaste.data.batch import Queries
from foretaste.errors import ConfigError
from foretaste.models.interface import Retriever
from foretaste.retrieval.choose import exact_of
from foretaste.retrieval.exact import ExactIndex, padded, top_k
from foretaste.retrieval.index import ItemIndex, TopK
from foretaste.serving.histories import BLOCK_SCORES, one_query
from foretaste.training.trained import Trained


@final
class CatalogueSearch:
    """Finds the best items; item_idx in and out, -1 and -inf where the catalogue runs out."""

    def __init__(
        self, trained: Trained, *, index: ItemIndex | None, popular_I: Float[Tensor, " I"]
    ) -> None:
        self._trained, self._index, self._popular_I = trained, index, popular_I
        self._retriever = trained.model if isinstance(trained.model, Retriever) else None
        self._norm_N: Tensor | None = None

    @property
    def scores_per_user(self) -> int:
        """How many scores the model computes per user; 0 where an index answers."""
        return 0 if self._index is not None else self._trained.events.num_items

    @cached_property
    def _score(self) -> Callable[[Queries], Tensor]:
        return self._trained.scorer()

    def best(
        self,
        queries: Queries,
        k: int,
        *,
        exclude_BX: Int64[Tensor, "B X"],
        allow_I: Bool[Tensor, " I"] | None,
    ) -> TopK:
        """Return the model's K best items for each query, none of them excluded (-1 pads X)."""
        if self._index is not None and self._retriever is not None:
            query_BD = self._retriever.encode(queries).float()
            return self._index.search(query_BD, k, exclude_BX=exclude_BX, allow_I=allow_I)
        score_BI = self._score(queries)
        row_BX = torch.arange(len(queries)).unsqueeze(1).expand_as(exclude_BX)
        real_BX = exclude_BX >= 0
        score_BI[row_BX[real_BX], exclude_BX[real_BX]] = -torch.inf
        if allow_I is not None:
            score_BI.masked_fill_(~allow_I, -torch.inf)
        return _answer(*top_k(score_BI, k), k)

    def scores(
        self, histories: list[np.ndarray], item_T: Int64[Tensor, " T"]
    ) -> Float[Tensor, "C T"]:
        """Score a few items for several histories of somebody whom training never saw."""
        queries = Queries.of_histories([history.tolist() for history in histories])
        if self._index is not None and self._retriever is not None:
            exact = exact_of(self._index)
            vectors_TD = exact.vectors_ND[exact.positions(item_T.unsqueeze(0))[0]].float()
            score_CT: Tensor = self._retriever.encode(queries).float() @ vectors_TD.T
            return score_CT
        rows = max(1, BLOCK_SCORES // self.scores_per_user)
        blocks = [histories[start : start + rows] for start in range(0, len(histories), rows)]
        return torch.cat(
            [self._score(Queries.of_histories([h.tolist() for h in b]))[:, item_T] for b in blocks]
        )

    def similar(self, item_idx: int, k: int) -> TopK:
        """Return the items nearest to one by cosine, or what a history of it alone would get."""
        own_1X = torch.tensor([[item_idx]])
        if self._index is None:
            query = one_query(-1, np.array([item_idx], dtype=np.int64))
            return self.best(query, k, exclude_BX=own_1X, allow_I=None)
        exact = exact_of(self._index)
        own = int(exact.positions(own_1X)[0, 0])
        return self._nearest(exact, exact.vectors_ND[own].float(), own, k)

    def near(self, vector_D: Float[Tensor, " D"], k: int) -> TopK:
        """Return the items nearest by cosine to a vector that is no item's.

        Raises:
            ConfigError: The model has no item vectors.
        """
        if self._index is None:
            raise ConfigError("this model has no item vectors: nothing is near to a new item")
        return self._nearest(exact_of(self._index), vector_D.float(), None, k)

    def _nearest(
        self, exact: ExactIndex, vector_D: Float[Tensor, " D"], own: int | None, k: int
    ) -> TopK:
        length_N = (self._norms(exact) * vector_D.norm()).clamp(min=1e-12)
        cosine_N = exact.vectors_ND.float() @ vector_D / length_N
        if own is not None:
            cosine_N[own] = -torch.inf
        best = _answer(*top_k(cosine_N.unsqueeze(0), k), k)
        item_BK = exact.item_N[best.item_BK.clamp(min=0)].where(best.item_BK >= 0, -1)
        return TopK(item_BK=item_BK, score_BK=best.score_BK)

    def _norms(self, exact: ExactIndex) -> Float[Tensor, " N"]:
        if self._norm_N is None:
            self._norm_N = exact.vectors_ND.float().norm(dim=1)
        return self._norm_N

    def most_popular(
        self, k: int, *, exclude: Int64[np.ndarray, " X"], allow_I: Bool[Tensor, " I"] | None
    ) -> TopK:
        """Return the k most popular items, one row; ties go to the lower item_idx."""
        order = self._by_popularity
        order = order[: k + len(exclude)] if allow_I is None else order[allow_I.numpy()[order]]
        item_K = torch.from_numpy(order[~np.isin(order, exclude)][:k])
        return _answer(self._popular_I[item_K].unsqueeze(0), item_K.unsqueeze(0), k)

    @cached_property
    def _by_popularity(self) -> Int64[np.ndarray, " N"]:
        popular_I = self._popular_I.numpy()
        order_N: np.ndarray = np.argsort(-popular_I, kind="stable")[: np.isfinite(popular_I).sum()]
        return order_N


def _answer(score_BF: Tensor, item_BF: Tensor, k: int) -> TopK:
    """Put -1 where there is no item, and make answers k long."""
    found_BF = score_BF > -torch.inf
    return padded(TopK(item_BK=item_BF.where(found_BF, -1), score_BK=score_BF), k)

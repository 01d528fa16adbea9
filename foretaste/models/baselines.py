"""Models without gradient descent: popularity, item-kNN, EASE and implicit ALS.

They read a history as a set of items, without order and repetition.

Shape legend: B queries, I items, U users, K neighbours, M distinct (query, item) pairs, R rows of a
block, W length of the longest row, L positions, D factors.
"""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, final

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from foretaste.config import (
    ChoiceConfig,
    Config,
    Count,
    Positive,
    RangeConfig,
    Rounds,
    Space,
    Usual,
    Weight,
)
from foretaste.data.arrays import available_bytes, check_fits
from foretaste.data.batch import Queries
from foretaste.data.interactions import Interactions
from foretaste.errors import ConfigError, DataError, NonFiniteError
from foretaste.later import later
from foretaste.models.base import Retriever, Scorer, StrengthConfig

implicit_als, sparse = later("implicit.cpu.als"), later("scipy.sparse")
threadpoolctl = later("threadpoolctl")

Strength = Weight | Literal["auto"]
"""The strength of a model's regularisation; "auto" lets validation choose it."""


class ItemSets(NamedTuple):
    """The distinct items of each query, concatenated, in ascending order within each query."""

    item_M: Int64[Tensor, " M"]
    offsets_B1: Int64[Tensor, " B1"]


def distinct_items(queries: Queries, *, num_items: int) -> ItemSets:
    """Remove order and repetition from histories."""
    row_N = torch.repeat_interleave(queries.offsets_B1.diff())
    key_M = torch.unique(row_N * num_items + queries.history_N)
    bounds_B1 = torch.arange(len(queries) + 1) * num_items
    return ItemSets(item_M=key_M % num_items, offsets_B1=torch.searchsorted(key_M, bounds_B1))


def interaction_matrix(events: Interactions) -> Any:
    """Return the (U, I) matrix with ones (float32) where a user has interacted with an item."""
    matrix = sparse.csr_array(
        (np.ones(len(events), np.float32), events.item_idx, events.offsets),
        shape=(events.num_users, events.num_items),
        copy=True,
    )
    matrix.sum_duplicates()
    matrix.data.fill(1)
    return matrix


def check_events(events: Interactions, *, num_items: int) -> None:
    """Raise an error for events that a model of `num_items` items cannot be trained on.

    Raises:
        DataError: There are no events, or their catalogue has another size.
    """
    if len(events) == 0:
        raise DataError("there is no training event: nothing can be learned")
    if events.num_items != num_items:
        raise DataError(
            f"the model was made for {num_items} items and the events have "
            f"{events.num_items}: build it with num_items={events.num_items}",
            name="num_items",
            value=num_items,
        )


DAY_S = 86_400


class PopularityConfig(Config):
    """Settings of popularity."""

    kind: Literal["popularity"] = "popularity"
    tuning: ClassVar[Space] = {"window_days": RangeConfig(low=1.0, high=365.0, log=True)}
    usual: ClassVar[Usual] = Usual()
    window_days: PositiveFloat | None = None
    """Count only events within this many days before the newest one. None: all events."""


@final
class Popularity(Scorer):
    """Scores an item by its number of training events, recent or all, equally for every query.

    It does not use the user's history, so every other model should be better.
    """

    learns_by = "events"

    def __init__(self, config: PopularityConfig, *, num_items: int) -> None:
        super().__init__()
        self.config = config
        self.count_I: Tensor
        self.register_buffer("count_I", torch.zeros(num_items, dtype=torch.int64))

    def learn(self, events: Interactions) -> None:
        """Count each item's events within the window, including repeated ones.

        Raises:
            ConfigError: A window is set, and the events have no times.
            DataError: There are no events, or the catalogue's size differs from the model's.
        """
        check_events(events, num_items=len(self.count_I))
        self.count_I.copy_(torch.from_numpy(self._counts(events)))

    def _counts(self, events: Interactions) -> np.ndarray:
        if self.config.window_days is None:
            return events.item_count
        if events.timestamp_s is None:
            raise ConfigError(
                f"popularity.window_days is {self.config.window_days:g}, but these events have no "
                "timestamps: read them with a timestamp column, or leave window_days out",
                name="window_days",
                value=self.config.window_days,
            )
        oldest_s = events.timestamp_s.max() - self.config.window_days * DAY_S
        recent = events.item_idx[events.timestamp_s >= oldest_s]
        return np.bincount(recent, minlength=events.num_items)

    @torch.no_grad()
    def score(self, queries: Queries) -> Float[Tensor, "B I"]:
        """Return each item's number of events, once per query."""
        return self.count_I.float().expand(len(queries), -1)


_BLOCK_PAIRS = 2**23
_BLOCK_EVENTS = 2**14
_LEAST_PAIRS, _PAIRS_OF_EVENT = 2**31, 500
"""Limits on the pairs of items in histories that item-kNN reads: in total, and per event."""


class ItemKNNConfig(StrengthConfig):
    """Settings of item-kNN."""

    kind: Literal["item_knn"] = "item_knn"
    tuning: ClassVar[Space] = {
        "neighbours": RangeConfig(low=10, high=500, log=True),
        "asymmetry": RangeConfig(low=0.0, high=1.0),
        "damping": RangeConfig(low=0.0, high=1.0),
    }
    usual: ClassVar[Usual] = Usual()
    strengths: ClassVar[Mapping[str, tuple[float, ...]]] = {"shrinkage": (10.0, 0.0, 100.0)}
    neighbours: Count = 100
    """Number of most similar items that are kept for each item."""
    asymmetry: float = Field(default=0.5, ge=0, le=1)
    """0.5 is the cosine; 1 is the share of an item's users who also have the other item. In
    between, larger values favour popular items."""
    shrinkage: Strength = "auto"
    """Added to the denominator, so that a similarity from few users counts less. "auto": chosen by
    validation from 0 to 100."""
    damping: float = Field(default=0.5, ge=0, le=10)
    """Down-weighting of users with long histories: each is weighted by length^-damping."""


@final
class ItemKNN(Scorer):
    r"""Scores an item by its similarity to the items of the history.

    .. math:: s_{uj} = \sum_{i \in u,\ j \in N_K(i)} \mathrm{sim}(i, j), \quad
              \mathrm{sim}(i, j) = \frac{\sum_{u \ni i, j} |u|^{-d}}{n_i^{a} n_j^{1 - a} + h}

    n is the number of an item's users, K `neighbours`, a `asymmetry`, d `damping`, h `shrinkage`.

    References:
        Deshpande and Karypis, "Item-Based Top-N Recommendation Algorithms", TOIS 2004,
        https://doi.org/10.1145/963770.963776; asymmetric cosine: Aiolli, "Efficient Top-N
        Recommendation for Very Large Scale Binary Rated Datasets", RecSys 2013; few items of the
        longest histories: Schelter, Boden and Markl, "Scalable Similarity-Based Neighborhood
        Methods with MapReduce", RecSys 2012. **Departure**: a history counts as a set.
    """

    learns_by = "events"

    def __init__(self, config: ItemKNNConfig, *, num_items: int) -> None:
        super().__init__()
        self.config = config
        self.num_items = num_items
        shape = num_items, min(config.neighbours, num_items)
        self.neighbour_IK: Tensor
        self.similarity_IK: Tensor
        self.register_buffer("neighbour_IK", torch.zeros(shape, dtype=torch.int64))
        self.register_buffer("similarity_IK", torch.zeros(shape))

    @torch.no_grad()
    def learn(self, events: Interactions) -> None:
        """Find each item's neighbours, a block of items at a time.

        Raises:
            DataError: There are no events, or the catalogue's size differs from the model's.
        """
        check_events(events, num_items=self.num_items)
        matrix = self._shortened(interaction_matrix(events))
        length_U = np.maximum(np.diff(matrix.indptr), 1).astype(np.float32)
        damped = sparse.diags_array(length_U**-self.config.damping) @ matrix
        transposed = matrix.T.tocsr()
        count_I = np.diff(transposed.indptr)
        pairs_I = np.minimum(transposed @ np.diff(matrix.indptr), self.num_items)
        order_I = np.argsort(pairs_I, kind="stable")
        block_I = np.cumsum(pairs_I[order_I]) // _BLOCK_PAIRS
        width_I = np.floor(np.log2(np.maximum(pairs_I[order_I], 1)))  # share by width
        for item_R in np.split(order_I, np.flatnonzero(np.diff(block_I + width_I)) + 1):
            shared = (transposed[item_R] @ damped).tocsr()
            self._keep_best(item_R, shared, np.maximum(count_I, 1))

    def _shortened(self, matrix: Any) -> Any:
        """Sample the longest histories: all pairs of a million items would take days."""
        length_U = np.diff(matrix.indptr).astype(np.int64)
        limit, most = max(_LEAST_PAIRS, _PAIRS_OF_EVENT * matrix.nnz), int(length_U.max())
        while (np.minimum(length_U, most) ** 2).sum() > limit:
            most //= 2
        if num_long := int((length_U > most).sum()):
            self.note = (
                f"{num_long:,} of {len(length_U):,} users have more than {most:,} items: item-kNN "
                f"takes {most:,} of them, drawn at random"
            )
            user_M = np.repeat(np.arange(len(length_U)), length_U)
            order_M = np.lexsort((np.random.default_rng(0).random(matrix.nnz), user_M))
            place_M = np.arange(matrix.nnz) - matrix.indptr[user_M]
            matrix.data[order_M[place_M >= most]] = 0
            matrix.eliminate_zeros()
        return matrix

    def _keep_best(self, item_R: np.ndarray, shared: Any, count_I: np.ndarray) -> None:
        length_R = np.diff(shared.indptr)
        row_P = np.repeat(np.arange(len(item_R)), length_R)
        own_P, other_P, a = item_R[row_P], shared.indices, self.config.asymmetry
        below_P = count_I[own_P] ** a * count_I[other_P] ** (1 - a) + self.config.strength(
            "shrinkage"
        )
        similarity_P = np.where(own_P == other_P, 0, shared.data / below_P)
        place_P = np.arange(len(row_P)) - shared.indptr[row_P]
        width = max(int(length_R.max()), self.neighbour_IK.shape[1])
        similarity_RW = torch.zeros(len(item_R), width)
        other_RW = torch.zeros(len(item_R), width, dtype=torch.int64)
        at = torch.from_numpy(row_P), torch.from_numpy(place_P)
        similarity_RW[at] = torch.from_numpy(similarity_P).float()
        other_RW[at] = torch.from_numpy(other_P).long()
        best = similarity_RW.topk(self.neighbour_IK.shape[1], dim=1)
        self.similarity_IK[torch.from_numpy(item_R)] = best.values
        self.neighbour_IK[torch.from_numpy(item_R)] = other_RW.gather(1, best.indices)

    @torch.no_grad()
    def score(self, queries: Queries) -> Float[Tensor, "B I"]:
        """Return each item's score; all are 0 if the history is empty."""
        item_M, offsets_B1 = distinct_items(queries, num_items=self.num_items)
        start_M = torch.repeat_interleave(offsets_B1.diff()) * self.num_items
        score = torch.zeros(len(queries) * self.num_items)
        for item, start in zip(
            item_M.split(_BLOCK_EVENTS), start_M.split(_BLOCK_EVENTS), strict=True
        ):
            place = self.neighbour_IK[item] + start.unsqueeze(1)
            score.index_add_(0, place.flatten(), self.similarity_IK[item].flatten())
        return score.view(len(queries), self.num_items)


_BLOCK_ITEMS = 1024
_MATRICES = 3
"""Number of item × item matrices in memory at once during training."""


class EASEConfig(StrengthConfig):
    """Settings of EASE."""

    kind: Literal["ease"] = "ease"
    tuning: ClassVar[Space] = {"l2": RangeConfig(low=1.0, high=5000.0, log=True)}
    usual: ClassVar[Usual] = Usual()
    strengths: ClassVar[Mapping[str, tuple[float, ...]]] = {
        "l2": (200.0, 50.0, 100.0, 500.0, 1000.0)
    }
    most_items: ClassVar[int] = 4_000
    l2: Annotated[float, Field(gt=0, le=1e12)] | Literal["auto"] = "auto"
    """Weight of the squared weights in the loss. "auto": chosen by validation from 50 to 1000."""
    max_bytes: PositiveInt | Literal["auto"] = "auto"
    """Maximum memory of training (12 bytes times items squared). "auto": three quarters of the free
    memory."""


@final
class EASE(Scorer):
    r"""A linear model from items to items, in closed form.

    .. math:: P = (X^\top X + \lambda I)^{-1}, \quad B = I - P\,\mathrm{diag}(1 / \mathrm{diag}(P))

    References:
        Steck, "Embarrassingly Shallow Autoencoders for Sparse Data", WWW 2019,
        https://arxiv.org/abs/1905.03375. **Departures**: X is 0 or 1, even for repeated events; all
        numbers are float32.
    """

    learns_by = "events"

    def __init__(self, config: EASEConfig, *, num_items: int) -> None:
        """Allocate the weights.

        Raises:
            TooLargeError: The weights alone would not fit.
        """
        super().__init__()
        self.config = config
        self.num_items = num_items
        self._refuse_beyond_limit(matrices=1)
        self.weight_II: Tensor
        lazily_zero = np.zeros((num_items, num_items), np.float32)  # no memory until written
        self.register_buffer("weight_II", torch.from_numpy(lazily_zero))

    def _refuse_beyond_limit(self, *, matrices: int) -> None:
        limit = self.config.max_bytes
        check_fits(
            matrices * 4 * self.num_items**2,
            f"EASE over {self.num_items:,} items",
            "leave rare items out, raise model.max_bytes, or take item_knn",
            name="max_bytes",
            value=limit,
            limit_bytes=available_bytes() * 3 // 4 if limit == "auto" else limit,
        )

    @torch.no_grad()
    def learn(self, events: Interactions) -> None:
        """Solve for the weights.

        Raises:
            DataError: There are no events, or the catalogue's size differs from the model's.
            NonFiniteError: l2 is too small for float32.
            TooLargeError: Training would not fit in memory; raised before it is tried.
        """
        check_events(events, num_items=self.num_items)
        self._refuse_beyond_limit(matrices=_MATRICES)
        factor_II, broken = torch.linalg.cholesky_ex(self._gram(events))
        if broken:
            raise NonFiniteError(
                f"EASE has no solution with l2 {self.config.strength('l2'):g}: raise model.l2",
                name="l2",
                value=self.config.strength("l2"),
            )
        inverse_II = torch.cholesky_inverse(factor_II)
        del factor_II
        self.weight_II.copy_(inverse_II.div_(-inverse_II.diagonal().clone()))
        self.weight_II.fill_diagonal_(0)

    def _gram(self, events: Interactions) -> Tensor:
        matrix = interaction_matrix(events)
        transposed = matrix.T.tocsr()
        gram_II = torch.empty(self.num_items, self.num_items)
        for start in range(0, self.num_items, _BLOCK_ITEMS):
            block = (transposed[start : start + _BLOCK_ITEMS] @ matrix).toarray()
            gram_II[start : start + _BLOCK_ITEMS] = torch.from_numpy(block)
        gram_II.diagonal().add_(self.config.strength("l2"))
        return gram_II

    @torch.no_grad()
    def score(self, queries: Queries) -> Float[Tensor, "B I"]:
        """Return each item's score; all are 0 if the history is empty."""
        item_M, offsets_B1 = distinct_items(queries, num_items=self.num_items)
        return F.embedding_bag(
            item_M, self.weight_II, offsets_B1, mode="sum", include_last_offset=True
        )


_BLOCK_QUERIES = 64
_START_SCALE = 0.01


class ImplicitALSConfig(StrengthConfig):
    """Settings of implicit ALS."""

    kind: Literal["als"] = "als"
    tuning: ClassVar[Space] = {
        "factors": ChoiceConfig(choices=(16, 32, 64, 128)),
        "regularization": RangeConfig(low=0.001, high=10.0, log=True),
        "alpha": RangeConfig(low=1.0, high=100.0, log=True),
    }
    usual: ClassVar[Usual] = Usual()
    strengths: ClassVar[Mapping[str, tuple[float, ...]]] = {
        "alpha": (10.0, 2.0, 40.0),
        "regularization": (10.0, 1.0, 0.1, 50.0),
    }
    factors: Count = 64
    """Width of the vectors."""
    regularization: Positive | Literal["auto"] = "auto"
    """λ: weight of the squared factors in the loss. "auto": chosen by validation from 0.1 to 50."""
    alpha: Strength = "auto"
    """Additional weight of an observed pair, compared with an unobserved one. "auto": chosen by
    validation from 2 to 40."""
    iterations: Rounds = 15
    """Number of iterations, each of which solves for all users and all items."""


@final
class ImplicitALS(Retriever):
    r"""Weighted matrix factorisation by alternating least squares.

    .. math:: \min_{X,Y} \sum_{u,i} c_{ui} (p_{ui} - x_u \cdot y_i)^2
              + \lambda \big(\sum_u |x_u|^2 + \sum_i |y_i|^2\big), \quad c_{ui} = 1 + \alpha p_{ui}

    References:
        Hu, Koren and Volinsky, "Collaborative Filtering for Implicit Feedback Datasets", ICDM
        2008, https://doi.org/10.1109/ICDM.2008.22. Item factors are learned by the `implicit`
        package (conjugate gradients: Takács et al., RecSys 2011). **Departures**: p is 0 or 1, even
        for repeated events; a query's vector is the closed-form solution for its history, for
        training users too.
    """

    learns_by = "events"

    def __init__(self, config: ImplicitALSConfig, *, num_items: int) -> None:
        """Draw the initial factors from torch's global generator."""
        super().__init__()
        self.config, self.num_items = config, num_items
        self.item_ID: Tensor
        self.gram_DD: Tensor
        start_ID = torch.rand(num_items, config.factors) * _START_SCALE
        self.register_buffer("item_ID", start_ID)
        self.register_buffer("gram_DD", _gram(start_ID))

    def learn(self, events: Interactions) -> None:
        """Alternate between users and items, starting from the current factors.

        Raises:
            DataError: There are no events, or the catalogue's size differs from the model's.
        """
        num_items, factors = self.item_ID.shape
        check_events(events, num_items=num_items)
        pairs = sparse.csr_matrix(interaction_matrix(events))
        with threadpoolctl.threadpool_limits(limits=1, user_api="blas"):  # it has own threads
            als = implicit_als.AlternatingLeastSquares(
                factors=factors,
                regularization=self.config.strength("regularization"),
                alpha=1 + self.config.strength("alpha"),  # implicit's alpha is the whole confidence
                iterations=self.config.iterations,
            )
            als.item_factors = self.item_ID.numpy().copy()
            als.user_factors = np.zeros((events.num_users, factors), np.float32)
            als.fit(pairs, show_progress=False)
        self.item_ID.copy_(torch.from_numpy(als.item_factors))
        self.gram_DD.copy_(_gram(self.item_ID))

    @torch.no_grad()
    def encode(self, queries: Queries) -> Float[Tensor, "B D"]:
        """Solve for each query's factors; zeros if the history is empty."""
        sets = distinct_items(queries, num_items=len(self.item_ID))
        query_BD = self.item_ID.new_zeros(len(queries), self.config.factors)
        if len(sets.item_M) == 0:
            return query_BD
        of_like_length_B = sets.offsets_B1.diff().argsort(stable=True)
        for row_b in of_like_length_B.split(_BLOCK_QUERIES):
            query_BD[row_b] = self._fold_in(sets, row_b).float()
        return query_BD

    def _fold_in(self, sets: ItemSets, row_B: Tensor) -> Tensor:
        start_B = sets.offsets_B1[row_B]
        length_B = sets.offsets_B1[row_B + 1] - start_B
        position_L = torch.arange(int(length_B.max()))
        index_BL = (start_B.unsqueeze(1) + position_L).clamp(max=len(sets.item_M) - 1)
        valid_BL = position_L < length_B.unsqueeze(1)
        y_BLD = self.item_ID[sets.item_M[index_BL]].double() * valid_BL.unsqueeze(2)
        alpha = self.config.strength("alpha")
        left_BDD = self.gram_DD + alpha * y_BLD.mT @ y_BLD
        left_BDD.diagonal(dim1=1, dim2=2).add_(self.config.strength("regularization"))
        right_BD = (1 + alpha) * y_BLD.sum(dim=1)
        solved_BD: Tensor = torch.linalg.solve(left_BDD, right_BD)
        return solved_BD

    def items(self, item_V: Int64[Tensor, " V"]) -> Float[Tensor, "V D"]:
        """Return some items' factors, zeros for items without a training event."""
        return self.item_ID[item_V]

    def item_blocks(self) -> Iterator[tuple[int, Float[Tensor, "V D"]]]:
        yield 0, self.item_ID


def _gram(item_ID: Tensor) -> Tensor:
    return item_ID.double().T @ item_ID.double()

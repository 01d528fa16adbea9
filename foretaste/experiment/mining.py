"""Negatives from retrievers: hard ones from a model's own index, and a ranker's candidates.

A retriever scores the items of its training events higher than those of later events, so a ranker
that is trained on such scores would trust them too much. Therefore users are divided into folds,
each fold's rows get scores from a retriever that was fitted to the other folds, and the ranker
learns to correct these out-of-sample scores.

Wolpert, "Stacked generalization", Neural Networks 1992,
https://doi.org/10.1016/S0893-6080(05)80023-1

Shape legend: U users, E rows, B rows, pairs or users of a block, N hard negatives of a pair, T
ranks or candidates of each row, I items.
"""

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from typing import final

import numpy as np
import torch
from jaxtyping import Float, Int32, Int64
from torch import Tensor

from foretaste.data.batch import DrawItems, Queries
from foretaste.data.interactions import Interactions
from foretaste.data.plans import Offered
from foretaste.data.splits import TRAIN, UNUSED, Holdout, Split
from foretaste.errors import ConfigError, DataError
from foretaste.evaluation.asked import block_rows
from foretaste.models.base import Model, Retriever, top_k
from foretaste.retrieval.choose import build_index, kind_by_size
from foretaste.retrieval.index import ItemIndex
from foretaste.sampling.negatives import RankedNegatives, Seen, check_ranks
from foretaste.serving.catalogue_search import training_histories
from foretaste.training.fit import Refreshed
from foretaste.training.objectives import PairsConfig, RowsConfig
from foretaste.training.trained import Trained

_BLOCK_USERS = 256


@final
class IndexNegatives(Refreshed):
    """Ranks, for each user, the new items with the highest scores of the model.

    The ranks are used until the next search and are stored in checkpoints, so a resumed run draws
    from the same ranks. With `hard_refresh_steps`, a search runs in a thread during a period of
    that many steps, and its ranks are used in the next period; producers of its batches wait for
    them, so a run depends only on its seed.

    References:
        Xiong et al., "Approximate Nearest Neighbor Negative Contrastive Learning for Dense Text
        Retrieval", ICLR 2021, https://arxiv.org/abs/2007.00808. Departure: results of a search are
        used from a fixed step on, not as soon as they are found.
    """

    def __init__(self, config: PairsConfig, events: Interactions, *, seed: int) -> None:
        """Prepare without searching.

        Args:
            config: Decides the number of ranks, the first epoch, and the frequency of searches.
            events: The training events; items without events are not negatives.
            seed: The seed of an approximate index.

        Raises:
            TooLargeError: The ranks would not fit in memory.
        """
        check_ranks(events.num_users, config.hard_ranks[1])
        self.config, self.events, self.seed = config, events, seed
        self.seen = Seen.of(events)
        self._found: dict[int, Future[Int32[Tensor, "U T"]]] = {}
        """The ranks by period of the epoch; only 0 if a search is for an epoch."""
        self._turn = threading.Condition()

    @property
    def ranked(self) -> RankedNegatives:
        """The ranks at the start of the epoch; rank 0 has the highest score."""
        return self.ranked_at(0)

    def ranked_at(self, batch: int) -> RankedNegatives:
        """Return the ranks for a batch of the epoch; wait until they are found.

        Raises:
            ConfigError: There was no search yet.
        """
        if not self._found:
            raise ConfigError("no hard negatives are mined yet: refresh them with a model first")
        stretch = batch // (self.config.hard_refresh_steps or batch + 1)
        with self._turn:
            self._turn.wait_for(lambda: stretch in self._found)
            found = self._found[stretch]
        return RankedNegatives(found.result(), self.seen)

    def refresh(self, model: Model, epoch: int) -> None:
        """Search again with a model in evaluation mode, if this epoch (from 0) requires it.

        With `hard_refresh_steps`, only the first epoch requires it; later ones start with the ranks
        of the last search in the previous epoch.

        Raises:
            ConfigError: The model is not a retriever.
            NonFiniteError: A vector of an item or a user is NaN or infinite.
        """
        since = epoch + 1 - self.config.hard_from_epoch
        if self.config.hard_refresh_steps and self._found:
            self._found = {0: self._found[max(self._found)]}
        elif since >= 0 and since % self.config.hard_refresh == 0:
            self._found = {0: _done(self._search(model))}

    def is_due(self, epoch: int, batch: int) -> bool:
        every = self.config.hard_refresh_steps
        return bool(every) and bool(self._found) and batch % every == 0

    def start(self, model: Model, batch: int) -> None:
        """Search in a thread, for the next period."""
        stretch = batch // self.config.hard_refresh_steps
        found: Future[Tensor] = Future()

        def search() -> None:
            try:
                found.set_result(self._search(model))
            except Exception as error:  # noqa: BLE001  raised where the result is read
                found.set_exception(error)

        threading.Thread(target=search, daemon=True).start()
        with self._turn:
            kept = {stretch: self._found[stretch]} if stretch in self._found else {}
            self._found = {**kept, stretch + 1: found}
            self._turn.notify_all()

    def _search(self, model: Model) -> Int32[Tensor, "U T"]:
        if not isinstance(model, Retriever):
            raise ConfigError(
                f"{type(model).__name__} is not a retriever, so its items have no index",
                name="retriever",
                value=type(model).__name__,
            )
        known_I = torch.from_numpy(self.events.item_count > 0)
        index = build_index(
            model.item_blocks(),
            kind=kind_by_size(int(known_I.sum())),
            known_I=known_I,
            seed=self.seed,
        )
        with torch.no_grad():
            return _search_all(model, index, self.events, self.config.hard_ranks[1])

    def state(self) -> Mapping[str, Tensor]:
        """Return the state for a checkpoint; wait for a running search."""
        names = {key: f"ranked_UT.{key}" if key else "ranked_UT" for key in self._found}
        return {names[key]: found.result() for key, found in self._found.items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Restore a result of `state`."""
        keys = {name: int(name.partition(".")[2] or 0) for name in state}
        self._found = {keys[name]: _done(ranked_UT) for name, ranked_UT in state.items()}


def _done(ranked_UT: Int32[Tensor, "U T"]) -> "Future[Tensor]":
    found: Future[Tensor] = Future()
    found.set_result(ranked_UT)
    return found


def candidate_negatives(retriever: Trained, num: int) -> DrawItems:
    """Return a source that draws uniformly from a trained retriever's candidates of each user.

    These are the items that the ranker will score, without the user's own items; without
    candidates, the row's own item is returned.

    Args:
        retriever: A trained retriever, whose events are the users' histories. All users are
            searched once.
        num: Number of best items kept per user.

    Raises:
        NonFiniteError: A score is NaN or infinite.
    """
    ranked_UT = best_unseen(retriever, num)
    found = RankedNegatives(ranked_UT, Seen.of(retriever.events))
    return partial(found.draw, ranks=(0, ranked_UT.shape[1]))


@torch.no_grad()
def best_unseen(trained: Trained, num: int) -> Int32[Tensor, "U T"]:
    """Rank, for each user with an event, the new items with the highest scores of a model.

    Args:
        trained: A model with item vectors, which are indexed, or one that scores all items.
        num: T, limited to the size of the catalogue.

    Returns:
        item_idx, best first, padded with -1.

    Raises:
        NonFiniteError: A score is NaN or infinite.
    """
    events, model = trained.events, trained.model
    num = min(num, events.num_items)
    if isinstance(model, Retriever):
        known_I = trained.known_I
        kind = kind_by_size(int(known_I.sum()))
        index = build_index(model.item_blocks(), kind=kind, known_I=known_I, seed=trained.seed)
        return _search_all(model, index, events, num)
    score = trained.scorer(exclude_seen=True)
    ranked_UT = torch.full((events.num_users, num), -1, dtype=torch.int32)
    for user_B in _by_length(events):
        queries, _ = training_histories(events, user_B.numpy())
        value_BK, item_BK = top_k(score(queries).cpu(), num)
        ranked_UT[user_B, : item_BK.shape[1]] = item_BK.where(value_BK > -torch.inf, -1).int()
    return ranked_UT


def _search_all(
    model: Retriever, index: ItemIndex, events: Interactions, num: int
) -> Int32[Tensor, "U T"]:
    ranked_UT = torch.full((events.num_users, num), -1, dtype=torch.int32)
    device = model.every_item.device
    for user_B in _by_length(events):
        queries, done_BX = training_histories(events, user_B.numpy())
        query_BD = model.encode(queries.to(device)).float().cpu()
        found = index.search(query_BD, num, exclude_BX=done_BX)
        ranked_UT[user_B] = found.item_BK.int()
    return ranked_UT


def _by_length(events: Interactions) -> tuple[Int64[Tensor, " B"], ...]:
    """Return users with events in blocks of similar length, which need little padding."""
    length_U = torch.from_numpy(events.offsets).diff()
    order_U = length_U.argsort(stable=True)
    blocks: tuple[Tensor, ...] = order_U[length_U[order_U] > 0].split(_BLOCK_USERS)
    return blocks


_MOST_ROWS = 256


@dataclass(frozen=True, eq=False)
class Fold:
    """Some training rows, and a retriever that was trained without their users."""

    row_E: Int64[np.ndarray, " E"]
    """Positions in the training events."""
    retriever: Trained


def fit_folds(
    fit_retriever: Callable[[Split], Trained], split: Split, folds: int, *, seed: int
) -> tuple[Fold, ...]:
    """Divide users into folds, and fit a retriever without each fold.

    Args:
        fit_retriever: Fits a retriever to the training part of a split.
        split: The split, whose training events are the rows.
        folds: Number of folds, 2 or more.
        seed: Decides the assignment of users.
    """
    fold_U = np.random.default_rng(seed).permutation(split.events.num_users) % folds
    fold_E = fold_U[split.events.user_idx]
    here_E = fold_E[split.part_E == TRAIN]
    return tuple(
        Fold(
            np.flatnonzero(here_E == fold),
            fit_retriever(_without(split, (split.part_E == TRAIN) & (fold_E == fold))),
        )
        for fold in range(folds)
        if (here_E == fold).any()
    )


def _without(split: Split, left_out_E: np.ndarray) -> Split:
    return replace(split, part_E=np.where(left_out_E, UNUSED, split.part_E).astype(np.uint8))


@torch.no_grad()
def offer(
    folds: tuple[Fold, ...],
    split: Split,
    objective: RowsConfig,
    *,
    num: int,
    weight: float,
    seed: int,
) -> Offered:
    """Return the candidates that each row's retriever finds from the history before the row.

    `objective` decides what is drawn: the retriever's best items, any items without an earlier
    event of the user, or a mixture. Items of the user's later events are allowed, as in answers.

    Args:
        folds: The result of `fit_folds`.
        split: The same split.
        objective: The ranker's objective.
        num: T, the number of candidates.
        weight: Weight of the retriever's score, added to the ranker's.
        seed: Decides the draws.

    Raises:
        ConfigError: The objective draws by popularity, or reads labels.
        DataError: No row's own item was a candidate.
    """
    if objective.positive or objective.negatives_from == "popularity":
        raise ConfigError(
            "first_stage.folds offers each row its retriever's candidates or any items: leave "
            'objective.positive empty, and negatives_from "retriever" or "uniform"',
            name="objective.negatives",
        )
    share = objective.retriever_share if objective.negatives_from == "retriever" else 0.0
    events, generator = split.train, torch.Generator().manual_seed(seed)
    offered = Offered(
        item_ET=torch.full((len(events), num), -1, dtype=torch.int32),
        first_ET=torch.zeros(len(events), num),
        own_E=torch.full((len(events),), torch.nan),
    )
    for fold in folds:
        score = fold.retriever.scorer(exclude_seen=True)
        step = min(_MOST_ROWS, block_rows(events.num_items))
        for start in range(0, len(fold.row_E), step):
            row_B = fold.row_E[start : start + step]
            score_BI = score(_asked(split, row_B)).cpu()
            own_B1 = torch.from_numpy(events.item_idx[row_B].astype(np.int64)).unsqueeze(1)
            best_BT = top_k(score_BI, num)[1]
            own_B = score_BI.gather(1, own_B1).where(
                (best_BT == own_B1).any(dim=1, keepdim=True), torch.nan
            )
            item_BT = _mixed(best_BT, score_BI, share, generator)
            first_BT = score_BI.gather(1, item_BT)
            good_BT = first_BT.isfinite() & (item_BT != own_B1)
            width = item_BT.shape[1]
            offered.item_ET[row_B, :width] = item_BT.where(good_BT, -1).int()
            offered.first_ET[row_B, :width] = weight * first_BT.where(good_BT, 0.0)
            offered.own_E[row_B] = weight * own_B.where(own_B.isfinite(), torch.nan).squeeze(1)
    if not len(offered.asked):
        raise DataError(
            f"no row's own item was among its retriever's best {num}: there is nothing to rank, "
            "raise model.candidates",
            name="candidates",
            value=num,
        )
    return offered


def _asked(split: Split, row_B: Int64[np.ndarray, " B"]) -> Queries:
    """Return the history of each row's user before the row."""
    events = split.train
    return Holdout(
        name="train",
        events=events,
        user_Q=events.user_idx.astype(np.int64)[row_B],
        end_Q=row_B,
        target_offsets=np.arange(len(row_B) + 1),
        target_item=events.item_idx[row_B],
    ).queries(np.arange(len(row_B)))


def _mixed(
    best_BT: Int64[Tensor, "B T"],
    score_BI: Float[Tensor, "B I"],
    share: float,
    generator: torch.Generator,
) -> Int64[Tensor, "B T"]:
    """Keep a share of the best items, and replace the others by any items."""
    if share == 1:
        return best_BT
    any_BI = torch.rand(score_BI.shape, generator=generator).masked_fill(score_BI.isneginf(), -1.0)
    any_BT = any_BI.topk(best_BT.shape[1]).indices
    return best_BT.where(torch.rand(best_BT.shape, generator=generator) < share, any_BT)

"""Negatives that retrievers find: hard ones of a model's own index, and a ranker's candidates.

A retriever that learned from an event scores its item higher than it will ever score what is still
to come: a ranker that reads such scores would trust them too much. So the users are dealt into
folds, each fold's rows are answered by a retriever fitted to all others, and what the ranker learns
is what must be added to an honest score.

Wolpert, "Stacked generalization", Neural Networks 1992,
https://doi.org/10.1016/S0893-6080(05)80023-1

Shape legend: U users, E rows, B rows, pairs or users of a block, N hard negatives of a pair, T
ranks or items offered for each row, I items.
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
    """Ranks, for each user, the items that the model scores highest of those not done.

    What the weights of an earlier step found stays good until the next search; it is kept in
    checkpoints, so a resumed run draws from the same ranks. With `hard_refresh_steps`, a search
    runs in a thread for a stretch of so many steps, and its ranks hold for the next stretch: who
    makes a batch of that one waits for them, so a run is a function of its seed.

    References:
        Xiong et al., "Approximate Nearest Neighbor Negative Contrastive Learning for Dense Text
        Retrieval", ICLR 2021, https://arxiv.org/abs/2007.00808. Departure: results of a search are
        used from a fixed step on, not as soon as they are found.
    """

    def __init__(self, config: PairsConfig, events: Interactions, *, seed: int) -> None:
        """Prepare; nothing is searched yet.

        Args:
            config: Says how many ranks are kept, from which epoch on, and how often they are
                searched for.
            events: Those of training; items without any are not negatives.
            seed: Decides how an approximate index is built.

        Raises:
            TooLargeError: The ranks would not fit in memory.
        """
        check_ranks(events.num_users, config.hard_ranks[1])
        self.config, self.events, self.seed = config, events, seed
        self.seen = Seen.of(events)
        self._found: dict[int, Future[Int32[Tensor, "U T"]]] = {}
        """By the stretch of the epoch that it is for; 0 alone where a search is for an epoch."""
        self._turn = threading.Condition()

    @property
    def ranked(self) -> RankedNegatives:
        """What holds at the beginning of the epoch: rank 0 is scored highest."""
        return self.ranked_at(0)

    def ranked_at(self, batch: int) -> RankedNegatives:
        """Return what holds for a batch of the epoch; wait until it is found.

        Raises:
            ConfigError: Nothing was searched yet.
        """
        if not self._found:
            raise ConfigError("no hard negatives are mined yet: refresh them with a model first")
        stretch = batch // (self.config.hard_refresh_steps or batch + 1)
        with self._turn:
            self._turn.wait_for(lambda: stretch in self._found)
            found = self._found[stretch]
        return RankedNegatives(found.result(), self.seen)

    def refresh(self, model: Model, epoch: int) -> None:
        """Search again with a model in evaluation mode, if it is the turn of this epoch, from 0.

        With `hard_refresh_steps` it is the turn of the first epoch alone; later ones begin with
        what the last search of the epoch before found.

        Raises:
            ConfigError: The model is not a retriever.
            NonFiniteError: An item's vector, or a user's, is NaN or infinite.
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
        """Search in a thread; what is found is for the next stretch."""
        stretch = batch // self.config.hard_refresh_steps
        found: Future[Tensor] = Future()

        def search() -> None:
            try:
                found.set_result(self._search(model))
            except Exception as error:  # noqa: BLE001  whoever asks for the result gets it
                found.set_exception(error)

        threading.Thread(target=search, daemon=True).start()
        with self._turn:
            kept = {stretch: self._found[stretch]} if stretch in self._found else {}
            self._found = {**kept, stretch + 1: found}
            self._turn.notify_all()

    def _search(self, model: Model) -> Int32[Tensor, "U T"]:
        if not isinstance(model, Retriever):
            raise ConfigError(
                f"{type(model).__name__} is no retriever: its items have no index",
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
        """Return what a checkpoint keeps; wait for a search that runs."""
        names = {key: f"ranked_UT.{key}" if key else "ranked_UT" for key in self._found}
        return {names[key]: found.result() for key, found in self._found.items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take what `state` gave."""
        keys = {name: int(name.partition(".")[2] or 0) for name in state}
        self._found = {keys[name]: _done(ranked_UT) for name, ranked_UT in state.items()}


def _done(ranked_UT: Int32[Tensor, "U T"]) -> "Future[Tensor]":
    found: Future[Tensor] = Future()
    found.set_result(ranked_UT)
    return found


def candidate_negatives(retriever: Trained, num: int) -> DrawItems:
    """Return what draws uniformly from the items that a trained retriever gives each user.

    These are the items that the ranker will be asked about, less what the user has done; the row's
    own item where there are none.

    Args:
        retriever: Trained; its events are the users' histories. All users are searched for once.
        num: How many items of each user are kept, the best ones.

    Raises:
        NonFiniteError: A score is NaN or infinite.
    """
    ranked_UT = best_unseen(retriever, num)
    found = RankedNegatives(ranked_UT, Seen.of(retriever.events))
    return partial(found.draw, ranks=(0, ranked_UT.shape[1]))


@torch.no_grad()
def best_unseen(trained: Trained, num: int) -> Int32[Tensor, "U T"]:
    """Rank, for each user with an event, the items that a model scores highest of those not done.

    Args:
        trained: A model with vectors, whose items are indexed, or one that scores them all.
        num: T, cut to the size of the catalogue.

    Returns:
        item_idx, best first, -1 where the catalogue ran out.

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
    """Return users with events in blocks of like length, which need little padding."""
    length_U = torch.from_numpy(events.offsets).diff()
    order_U = length_U.argsort(stable=True)
    blocks: tuple[Tensor, ...] = order_U[length_U[order_U] > 0].split(_BLOCK_USERS)
    return blocks


_MOST_ROWS = 256


@dataclass(frozen=True, eq=False)
class Fold:
    """Some training rows, and a retriever that knows nothing of their users."""

    row_E: Int64[np.ndarray, " E"]
    """Positions in the training events."""
    retriever: Trained


def fit_folds(
    fit_retriever: Callable[[Split], Trained], split: Split, folds: int, *, seed: int
) -> tuple[Fold, ...]:
    """Deal users into folds, and fit a retriever without each.

    Args:
        fit_retriever: Fits one to the training part of a split.
        split: Whose training events are the rows.
        folds: How many, 2 or more.
        seed: Decides which user is in which.
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
    """Ask each row's retriever what it would have offered before the row.

    `objective` decides what is drawn: the best of the retriever, any items that the user had not
    done, or a mixture. What the user did only later may be among them, as when answers are given.

    Args:
        folds: Of `fit_folds`.
        split: The same.
        objective: The ranker's.
        num: T, and how many of the best are candidates.
        weight: Of the retriever's score beside the ranker's.
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
    """Return the history of each row's user before it."""
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
    """Keep a share of the best, and put any items in place of the others."""
    if share == 1:
        return best_BT
    any_BI = torch.rand(score_BI.shape, generator=generator).masked_fill(score_BI.isneginf(), -1.0)
    any_BT = any_BI.topk(best_BT.shape[1]).indices
    return best_BT.where(torch.rand(best_BT.shape, generator=generator) < share, any_BT)

"""Candidates for training rows, by retrievers that did not learn from them.

A retriever that learned from an event scores its item higher than it will ever score what is still
to come: a ranker that reads such scores would trust them too much. So the users are dealt into
folds, each fold's rows are answered by a retriever fitted to all others, and what the ranker learns
is what must be added to an honest score.

Wolpert, "Stacked generalization", Neural Networks 1992,
https://doi.org/10.1016/S0893-6080(05)80023-1

Shape legend: E rows, B rows of a block, I items, T items offered for each row.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from foretaste.data.batch import Queries
from foretaste.data.plans import Offered
from foretaste.data.splits import TRAIN, UNUSED, Holdout, Split
from foretaste.errors import ConfigError, DataError
from foretaste.evaluation.asked import block_rows
from foretaste.models.layers.top_k import top_k
from foretaste.training.objectives.rows import RowsConfig
from foretaste.training.trained import Trained

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
        seed: Decides who is in which.
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

    Who is offered, `objective` says: the best of the retriever, any items that the user had not
    done, or a mixture. What the user did only later may be among them, as when answers are given.

    Args:
        folds: Of `fit_folds`.
        split: The same.
        objective: The ranker's.
        num: T, and how many of the best are candidates.
        weight: Of the retriever's score beside the ranker's.
        seed: Decides the draws.

    Raises:
        ConfigError: The objective tells rows apart, or draws by popularity.
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
    """Return what whoever did these rows had done before each."""
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

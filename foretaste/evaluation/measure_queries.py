"""What a model's lists are worth, query by query, block by block.

Shape legend: Q queries, N targets of all queries, B queries of a block, I items.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from foretaste.data.batch import Queries
from foretaste.data.splits import Holdout
from foretaste.evaluation.cold import Among, among_cold
from foretaste.evaluation.list_metrics import (
    average_precision,
    head_membership,
    hit_rate,
    list_mean,
    mrr,
    ndcg,
    precision,
    recall,
    self_information,
)
from foretaste.evaluation.rank import Hits, all_equal, best, draw_lists, place, settle
from foretaste.evaluation.sampled import SampledNegatives, kept_items, score_kept
from foretaste.evaluation.slices import mean_by_user
from foretaste.evaluation.task import Task, block_rows
from foretaste.training.trained import Trained

ACCURACY: Mapping[str, Callable[[Hits, int], Float64[np.ndarray, " B"]]] = {
    "hit_rate": hit_rate,
    "recall": recall,
    "precision": precision,
    "ndcg": ndcg,
    "mrr": mrr,
    "map": average_precision,
}
"""What is asked of the targets' places."""


_SHORT_BLOCK = 64


@dataclass(frozen=True, eq=False, kw_only=True)
class Measured:
    """Of each query and target, in the order of their task."""

    values: dict[str, Float64[np.ndarray, " Q"]]
    """Name to each query's value."""
    chance: dict[str, Float64[np.ndarray, " Q"]]
    """Name of a metric of accuracy to its expectation under a random order of the same candidates;
    empty where it was not asked for."""
    shown: dict[int, Bool[np.ndarray, " I"]]
    """K to the items in the first K of a list; of the queries in the headline."""
    better_N: Int64[np.ndarray, " N"]
    equal_N: Int64[np.ndarray, " N"]
    cold_2N: Int64[np.ndarray, "2 N"] | None
    """Better and equal ones among cold items; None where no target is cold."""
    sampled_Q: Int64[np.ndarray, " Q"]
    """Sampled items beside the targets; 0 where the catalogue is ranked."""


@torch.inference_mode()
def measure_queries(
    model: Trained,
    holdout: Holdout,
    task: Task,
    *,
    k: tuple[int, ...],
    exclude_seen: bool,
    seed: int,
    sampled: SampledNegatives | None,
    among: Among,
    asked_Q: Bool[np.ndarray, " Q"],
    with_chance: bool = False,
) -> Measured:
    """Rank what is to be found, a block of queries at a time.

    Arguments are those of `evaluate`, `task` is what `holdout` leaves to be found, and `asked_Q`
    are the queries whose lists count in what is shown. `with_chance` works out what a random order
    gets, too.

    Raises:
        ConfigError: Listed items are asked for, and the data list none.
        NonFiniteError: The model scores an item with NaN or infinity.
    """
    score, count_I = model.scorer(exclude_seen=exclude_seen), model.item_count
    properties = {
        "novelty": self_information(count_I),
        "popularity_share": head_membership(count_I),
    }
    names = [f"{family}_at_{n}" for family in (*ACCURACY, *properties) for n in k]
    values = {name: np.empty(len(task.row_Q)) for name in names}
    of_accuracy = names[: len(ACCURACY) * len(k)] if with_chance else ()
    chance = {name: np.empty(len(task.row_Q)) for name in of_accuracy}
    shown = {n: np.zeros(len(count_I), dtype=bool) for n in k}
    better_N = np.empty(len(task.target_N), dtype=np.int64)
    equal_N = np.empty(len(task.target_N), dtype=np.int64)
    sampled_Q = np.zeros(len(task.row_Q), dtype=np.int64)
    cold_I = count_I == 0
    only_cold = partial(among_cold, cold_I=torch.from_numpy(cold_I), placed_I=model.known_I)
    leave_out_seen = partial(_without_seen, excluded=exclude_seen)
    cold_2N = None
    if among == "all" and sampled is None and cold_I[task.target_N].any():
        cold_2N = np.empty((2, len(task.target_N)), dtype=np.int64)
    step = block_rows(len(count_I))
    for begin in range(0, len(task.row_Q), step):
        rows = slice(begin, min(begin + step, len(task.row_Q)))
        queries = holdout.queries(task.row_Q[rows], model.moment)
        targets, row_N = task.targets(rows)
        item_N = torch.from_numpy(task.target_N[targets])
        if sampled is None:
            score_BI = score(queries)
        else:
            keep_BI = kept_items(
                sampled,
                queries,
                task.key_Q[rows],
                torch.stack([torch.from_numpy(row_N), item_N]),
                count_I=count_I,
                listed=holdout.listed,
            )
            sampled_Q[rows] = keep_BI.sum(dim=1).numpy() - np.bincount(
                row_N, minlength=len(queries)
            )
            score_BI = leave_out_seen(score_kept(model, score, queries, keep_BI), queries)
        if among == "cold":
            score_BI = leave_out_seen(only_cold(score_BI), queries)
        score_N = score_BI[torch.from_numpy(row_N), item_N].cpu().numpy()
        top = best(score_BI, max(k))
        hits = settle(top, row_N, score_N)
        better_N[targets], equal_N[targets] = place(top, row_N, score_N)
        if cold_2N is not None:
            cold_BI = leave_out_seen(only_cold(score_BI), queries)
            cold_N = cold_BI[torch.from_numpy(row_N), item_N].cpu().numpy()
            cold_2N[:, targets] = place(best(cold_BI, max(k)), row_N, cold_N)
        list_BK = draw_lists(score_BI, top, task.key_Q[rows], seed=seed)
        for n in k:
            items = list_BK[asked_Q[rows], :n]
            shown[n][items[items >= 0]] = True
        _put(values, rows, _accuracy(hits, k))
        _put(values, rows, _of_lists(list_BK, properties, k))
        if with_chance:
            _put(chance, rows, _accuracy(_by_chance(score_BI, row_N, score_N, max(k)), k))
    return Measured(
        values=values,
        chance=chance,
        shown=shown,
        better_N=better_N,
        equal_N=equal_N,
        cold_2N=cold_2N,
        sampled_Q=sampled_Q,
    )


@torch.inference_mode()
def mean_ndcg(model: Trained, holdout: Holdout, task: Task, *, k: int, exclude_seen: bool) -> float:
    """Return NDCG as `evaluate` would of a task's queries, and nothing else: what stops a run.

    Arguments are those of `evaluate`; every query of `task` counts.

    Raises:
        NonFiniteError: The model scores an item with NaN or infinity.
    """
    score, ndcg_Q = model.scorer(exclude_seen=exclude_seen), np.empty(len(task.row_Q))
    short = max(_SHORT_BLOCK, len(ndcg_Q) // 8)  # few queries in one block would be padded much
    step = min(block_rows(len(model.item_count)), short)
    for begin in range(0, len(ndcg_Q), step):
        rows = slice(begin, min(begin + step, len(ndcg_Q)))
        score_BI = score(holdout.queries(task.row_Q[rows], model.moment))
        targets, row_N = task.targets(rows)
        item_N = torch.from_numpy(task.target_N[targets])
        score_N = score_BI[torch.from_numpy(row_N), item_N].cpu().numpy()
        ndcg_Q[rows] = ndcg(settle(best(score_BI, k), row_N, score_N), k)
    _, mean_U1 = mean_by_user(task.user_Q, ndcg_Q[:, None])
    return float(mean_U1.mean())


def _accuracy(hits: Hits, k: tuple[int, ...]) -> dict[str, Float64[np.ndarray, " B"]]:
    return {f"{name}_at_{n}": metric(hits, n) for name, metric in ACCURACY.items() for n in k}


def _of_lists(
    list_BK: Int64[np.ndarray, "B K"],
    properties: Mapping[str, Float64[np.ndarray, " I"]],
    k: tuple[int, ...],
) -> dict[str, Float64[np.ndarray, " B"]]:
    return {
        f"{name}_at_{n}": list_mean(list_BK, value_I, n)
        for name, value_I in properties.items()
        for n in k
    }


def _put(
    values: Mapping[str, Float64[np.ndarray, " Q"]],
    rows: slice,
    found: Mapping[str, Float64[np.ndarray, " B"]],
) -> None:
    for name, value_B in found.items():
        values[name][rows] = value_B


def _by_chance(
    score_BI: Float[Tensor, "B I"],
    row_N: Int64[np.ndarray, " N"],
    score_N: Float[np.ndarray, " N"],
    k: int,
) -> Hits:
    """Return where the targets stand if all candidates have one score; -inf is no candidate."""
    num_B = np.count_nonzero((score_BI > -torch.inf).cpu().numpy(), axis=1)
    flat_N = np.where(np.isneginf(score_N), -np.inf, 0.0)
    return settle(all_equal(num_B, min(k, score_BI.shape[1])), row_N, flat_N)


def _without_seen(
    score_BI: Float[Tensor, "B I"], queries: Queries, *, excluded: bool
) -> Float[Tensor, "B I"]:
    """Return the scores, those of histories -inf if they are excluded."""
    if excluded:
        seen_N = torch.arange(len(queries)).repeat_interleave(queries.offsets_B1.diff())
        score_BI[seen_N, queries.history_N] = -torch.inf
    return score_BI

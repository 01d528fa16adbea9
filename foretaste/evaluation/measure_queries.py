"""The metrics of a model's lists, computed per query and in blocks.

The whole catalogue is ranked, or only cold items: in the whole catalogue, a cold item competes with
trained items, and here only with other cold items. On request, as in some papers, a few sampled
items are ranked, and metric names show it: such metrics may order models differently from those
over the whole catalogue (Krichene and Rendle, "On Sampled Metrics for Item Recommendation", KDD
2020, https://doi.org/10.1145/3394486.3403226).

Shape legend: Q queries, N targets of all queries, B queries of a block, I items, P pairs, S sampled
items, C kept items, R rows of a block, K items with training events.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Literal

import numpy as np
import torch
from annotated_types import Ge, Le
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from foretaste.arguments import checked, checked_class
from foretaste.config import Count, Seed
from foretaste.data.batch import Queries, ranges
from foretaste.data.draws import fill_blocks, own_blocks
from foretaste.data.interactions import Interactions
from foretaste.data.splits import Holdout
from foretaste.errors import ConfigError
from foretaste.evaluation.asked import Task, block_rows
from foretaste.evaluation.list_metrics import (
    Hits,
    all_equal,
    average_precision,
    best,
    draw_lists,
    head_membership,
    hit_rate,
    list_mean,
    mean_by_user,
    mrr,
    ndcg,
    noise,
    place,
    precision,
    recall,
    self_information,
    settle,
)
from foretaste.models.base import Ranker
from foretaste.models.catalogue import judge
from foretaste.training.trained import Trained

Among = Literal["all", "cold"]
"""The ranked items: all that the model can score, or only cold ones."""
COLD_SUFFIX = "_among_cold"
"""Suffix of metric names if only cold items are ranked."""
Whose = Literal["known", "new"]
"""The measured users: those with a history, or only new users, who have at most features."""
NEW_SUFFIX = "_of_new_users"
"""Suffix of metric names if only new users are measured."""


def among_cold(
    score_BI: Float[Tensor, "B I"], *, cold_I: Bool[Tensor, " I"], placed_I: Bool[Tensor, " I"]
) -> Float[Tensor, "B I"]:
    """Return the scores with all but cold items left out.

    Cold items that the model cannot score are candidates too, with one score below all others, so a
    model that scores none gets the figure of chance, not 0.

    Args:
        score_BI: Over the whole catalogue.
        cold_I: Items without a training event.
        placed_I: Items that the model can score.
    """
    on, lowest = score_BI.device, score_BI.new_tensor(torch.finfo(score_BI.dtype).min)
    other_I = torch.where(cold_I.to(on), lowest, -torch.inf)
    return torch.where((cold_I & placed_I).to(on), score_BI, other_I)


_BLOCK_ELEMENTS = 2**18
"""Number of items in a block of the draw, small enough for the processor's caches."""


_By = Literal["listed", "uniform", "popularity"]


@checked_class
@dataclass(frozen=True, kw_only=True)
class SampledNegatives:
    """How the candidates of a query, besides its targets, are sampled."""

    num: Count = 99
    """Number of distinct items; for "listed", the data decide the number."""
    by: _By = "uniform"
    """"listed": the items that the data list for the user. Otherwise, items outside the query's
    history and targets are drawn for each query: uniformly, or by popularity (each next one with
    probability ~ count^power among the remaining ones)."""
    power: Annotated[float, Ge(-100), Le(100)] = 0.75
    seed: Seed = 0

    @checked
    def check(self, num_known: int) -> None:
        """Raise an error if there are fewer items than requested.

        Args:
            num_known: Number of items with a training event, which can be drawn.

        Raises:
            ConfigError: No query has this many items to draw.
        """
        if self.by != "listed" and self.num >= num_known:
            raise ConfigError(
                f"{self.num} sampled items, but only {num_known} items have a training event, and "
                f"the targets are among them: give {num_known - 1} or fewer, or rank the whole "
                "catalogue (no sampled items)",
                name="num",
                value=self.num,
            )

    @property
    def suffix(self) -> str:
        """The suffix of metric names."""
        return f"_sampled_{self.num}"

    @checked
    def as_done(self, num_Q: Int64[np.ndarray, " Q"]) -> "SampledNegatives":
        """Return the settings with the number of items actually drawn.

        Args:
            num_Q: The number of each query.

        Raises:
            ConfigError: Items are drawn, and no query has this many items to draw.
        """
        most = int(num_Q.max(initial=0))
        if self.by != "listed" and most < self.num:
            raise ConfigError(
                f"{self.num} sampled items, but after its history and targets no query has more "
                f"than {most} left: give {most} or fewer, or rank the whole catalogue",
                name="num",
                value=self.num,
            )
        return replace(self, num=max(1, most))

    @checked
    def note(self, num_Q: Int64[np.ndarray, " Q"]) -> str:
        """Return the sentence for the report; `num_Q` is the argument of `as_done`."""
        how = {
            "listed": "the items that the data list for the user",
            "uniform": f"drawn uniformly for each query (seed {self.seed})",
            "popularity": f"drawn ~ count^{self.power:g} for each query (seed {self.seed})",
        }[self.by]
        few_Q = num_Q < self.num
        fewer = (
            f" (fewer for {int(few_Q.sum()):,} of {len(num_Q):,} queries, {int(num_Q.min()):,} at "
            "least: no more are left)"
            if few_Q.any()
            else ""
        )
        return (
            f"candidates: NOT the full catalogue but each query's targets and {self.num} sampled "
            f"items{fewer}, {how}; not comparable with metrics over the catalogue"
        )


def no_list() -> ConfigError:
    """Return the error for data without listed negatives."""
    return ConfigError(
        'the data list no negatives: draw them (sampled_by = "uniform"), or give a part column '
        "with the value 'negative'",
        name="sampled_by",
        value="listed",
    )


def kept_items(
    sampled: SampledNegatives,
    queries: Queries,
    key_B: Int64[np.ndarray, " B"],
    target_2P: Int64[Tensor, "2 P"],
    *,
    count_I: Int64[np.ndarray, " I"],
    listed: Interactions | None,
) -> Bool[Tensor, "B I"]:
    """Return a mask of each query's candidates: the sampled items and the targets.

    Args:
        sampled: The sampling settings.
        queries: Users and histories.
        key_B: A number for each query that is its own wherever it stands.
        target_2P: (row, item) of the targets.
        count_I: Number of training events of each item; items without any are not drawn.
        listed: The items that the data list for each user.

    Raises:
        ConfigError: Listed items are requested, and the data list none.
    """
    keep_BI = torch.zeros(len(queries), len(count_I), dtype=torch.bool)
    if sampled.by == "listed":
        if listed is None:
            raise no_list()
        user_B = queries.user_B.numpy()
        start_B, end_B = listed.offsets[user_B], listed.offsets[user_B + 1]
        row_P = np.repeat(np.arange(len(user_B)), end_B - start_B)
        place_P, _ = ranges(start_B, end_B - start_B)
        keep_BI[torch.from_numpy(row_P), torch.from_numpy(listed.item_idx[place_P]).long()] = True
    else:
        free_BI = torch.ones_like(keep_BI)
        row_N = torch.arange(len(queries)).repeat_interleave(queries.offsets_B1.diff())
        free_BI[row_N, queries.history_N] = False
        free_BI[target_2P[0], target_2P[1]] = False
        chosen_BS = torch.from_numpy(_draw(sampled, free_BI.numpy(), key_B, count_I))
        keep_BI.scatter_(1, chosen_BS, value=True).logical_and_(free_BI)
    keep_BI[target_2P[0], target_2P[1]] = True
    return keep_BI


def score_kept(
    model: Trained,
    score: Callable[[Queries], Float[Tensor, "B I"]],
    queries: Queries,
    keep_BI: Bool[Tensor, "B I"],
) -> Float[Tensor, "B I"]:
    """Return the scores of some items of each query, and -inf for the others.

    A ranker that scores pair by pair scores only these items; other models score the catalogue.

    Args:
        model: The model.
        score: Its `scorer`.
        queries: Users and histories.
        keep_BI: The items to score, at least one per query.

    Raises:
        NonFiniteError: The model's score of an item is NaN or infinite.
    """
    ranker = model.model
    if not isinstance(ranker, Ranker):
        score_BI = score(queries)
        return score_BI.masked_fill_(~keep_BI.to(score_BI.device), -torch.inf)
    item_BC = keep_BI.byte().topk(int(keep_BI.sum(dim=1).max()), dim=1).indices
    asked, own_BC = queries, item_BC
    if model.translation is not None:
        asked, own_BC = model.translation.queries(queries), model.translation.items(item_BC)
    score_BC = judge(ranker, asked, own_BC).score_BC
    score_BI = score_BC.new_full(keep_BI.shape, -torch.inf).scatter_(1, item_BC, score_BC)
    return score_BI.masked_fill_(~(keep_BI & model.known_I), -torch.inf)


def _draw(
    sampled: SampledNegatives,
    free_BI: Bool[np.ndarray, "B I"],
    key_B: Int64[np.ndarray, " B"],
    count_I: Int64[np.ndarray, " I"],
) -> Int64[np.ndarray, "B S"]:
    """Let items race with exponential times; the first to arrive are the sample.

    If fewer items are available than requested, unavailable ones arrive last.
    """
    known = np.flatnonzero(count_I)
    power = sampled.power if sampled.by == "popularity" else 0.0
    num = min(sampled.num, len(known))
    chosen_BS = np.empty((len(key_B), num), np.int64)
    step = max(1, _BLOCK_ELEMENTS // len(known))
    for rows in (slice(start, start + step) for start in range(0, len(key_B), step)):
        free_RK = free_BI[rows][:, known]
        item_RK = np.broadcast_to(known, free_RK.shape)
        bits_RK = noise(key_B[rows, None], item_RK, sampled.seed + 1)
        time_RK = -np.log((bits_RK + 0.5) / 2.0**63) / count_I[known] ** power
        time_RK[~free_RK] = np.inf
        chosen_BS[rows] = known[np.argpartition(time_RK, num - 1, axis=1)[:, :num]]
    return chosen_BS


ACCURACY: Mapping[str, Callable[[Hits, int], Float64[np.ndarray, " B"]]] = {
    "hit_rate": hit_rate,
    "recall": recall,
    "precision": precision,
    "ndcg": ndcg,
    "mrr": mrr,
    "map": average_precision,
}
"""The metrics of the targets' positions."""


_SHORT_BLOCK = 64


@dataclass(frozen=True, eq=False, kw_only=True)
class Measured:
    """The measured values of queries and targets, in the order of their task."""

    values: dict[str, Float64[np.ndarray, " Q"]]
    """Name to each query's value."""
    chance: dict[str, Float64[np.ndarray, " Q"]]
    """Name of an accuracy metric to its expectation under a random order of the same candidates;
    empty if it was not requested."""
    shown: dict[int, Bool[np.ndarray, " I"]]
    """K to the items in the first K of a list, over the queries in the headline."""
    better_N: Int64[np.ndarray, " N"]
    equal_N: Int64[np.ndarray, " N"]
    cold_2N: Int64[np.ndarray, "2 N"] | None
    """Numbers of better and of equal cold items; None if no target is cold."""
    sampled_Q: Int64[np.ndarray, " Q"]
    """Number of sampled items besides the targets; 0 if the catalogue is ranked."""


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
    """Rank the targets, one block of queries at a time.

    Arguments are those of `evaluate`; `task` has the targets of `holdout`, and `asked_Q` the
    queries whose lists count for coverage and novelty. `with_chance` also computes the expectation
    of a random order.

    Raises:
        ConfigError: Listed items are requested, and the data list none.
        NonFiniteError: The model's score of an item is NaN or infinite.
    """
    score, count_I = model.scorer(exclude_seen=exclude_seen), model.item_count
    properties = {
        "novelty": self_information(count_I),
        "popularity_share": head_membership(count_I),
    }
    names = [f"{family}_at_{n}" for family in (*ACCURACY, *properties) for n in k]
    values = {name: np.zeros(len(task.row_Q)) for name in names}
    of_accuracy = names[: len(ACCURACY) * len(k)] if with_chance else ()
    chance = {name: np.zeros(len(task.row_Q)) for name in of_accuracy}
    shown = {n: np.zeros(len(count_I), dtype=bool) for n in k}
    better_N = np.zeros(len(task.target_N), dtype=np.int64)
    equal_N = np.zeros(len(task.target_N), dtype=np.int64)
    sampled_Q = np.zeros(len(task.row_Q), dtype=np.int64)
    cold_I = count_I == 0
    only_cold = partial(among_cold, cold_I=torch.from_numpy(cold_I), placed_I=model.known_I)
    leave_out_seen = partial(_without_seen, excluded=exclude_seen)
    cold_2N = None
    if among == "all" and sampled is None and cold_I[task.target_N].any():
        cold_2N = np.zeros((2, len(task.target_N)), dtype=np.int64)
    for rows in own_blocks(len(task.row_Q), block_rows(len(count_I))):
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
    fill_blocks(*values.values(), *chance.values(), *shown.values(), better_N, equal_N, sampled_Q)
    fill_blocks(*(() if cold_2N is None else (cold_2N,)))
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
    """Return only the NDCG of a task's queries, as `evaluate` would; early stopping uses it.

    Arguments are those of `evaluate`; every query of `task` counts.

    Raises:
        NonFiniteError: The model's score of an item is NaN or infinite.
    """
    score, ndcg_Q = model.scorer(exclude_seen=exclude_seen), np.zeros(len(task.row_Q))
    short = max(_SHORT_BLOCK, len(ndcg_Q) // 8)  # few queries in one block would need much padding
    step = min(block_rows(len(model.item_count)), short)
    for rows in own_blocks(len(ndcg_Q), step):
        score_BI = score(holdout.queries(task.row_Q[rows], model.moment))
        targets, row_N = task.targets(rows)
        item_N = torch.from_numpy(task.target_N[targets])
        score_N = score_BI[torch.from_numpy(row_N), item_N].cpu().numpy()
        ndcg_Q[rows] = ndcg(settle(best(score_BI, k), row_N, score_N), k)
    fill_blocks(ndcg_Q)
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
    """Return the targets' positions if all candidates have one score; -inf is not a candidate."""
    num_B = np.count_nonzero((score_BI > -torch.inf).cpu().numpy(), axis=1)
    flat_N = np.where(np.isneginf(score_N), -np.inf, 0.0)
    return settle(all_equal(num_B, min(k, score_BI.shape[1])), row_N, flat_N)


def _without_seen(
    score_BI: Float[Tensor, "B I"], queries: Queries, *, excluded: bool
) -> Float[Tensor, "B I"]:
    """Return the scores, with -inf for items of the history if they are excluded."""
    if excluded:
        seen_N = torch.arange(len(queries)).repeat_interleave(queries.offsets_B1.diff())
        score_BI[seen_N, queries.history_N] = -torch.inf
    return score_BI

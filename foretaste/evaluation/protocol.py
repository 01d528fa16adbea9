"""How a model is measured: against the full catalogue, averaged over users, every choice said.

Shape legend: Q queries, N targets of all queries, B queries of a block, I items, U users.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Float64, Int64
from torch import Tensor

from foretaste.data.batch import Queries
from foretaste.data.splits import Holdout
from foretaste.errors import ConfigError, DataError
from foretaste.evaluation.bootstrap import bootstrap_intervals
from foretaste.evaluation.cold import COLD_SUFFIX, Among, among_cold
from foretaste.evaluation.metrics.average_precision import average_precision
from foretaste.evaluation.metrics.coverage import coverage
from foretaste.evaluation.metrics.hit_rate import hit_rate
from foretaste.evaluation.metrics.list_mean import list_mean
from foretaste.evaluation.metrics.mrr import mrr
from foretaste.evaluation.metrics.ndcg import ndcg
from foretaste.evaluation.metrics.novelty import self_information
from foretaste.evaluation.metrics.popularity import head_membership
from foretaste.evaluation.metrics.precision import precision
from foretaste.evaluation.metrics.recall import recall
from foretaste.evaluation.rank import Hits, best, chance_within, draw_lists, place, settle
from foretaste.evaluation.report import Report
from foretaste.evaluation.sampled import SampledNegatives, kept_items, score_kept
from foretaste.evaluation.slices import mean_by_user, query_slices, target_slices
from foretaste.evaluation.task import Task, block_rows, digest, make_task
from foretaste.training.trained import Trained

V = TypeVar("V")
ACCURACY: Mapping[str, Callable[[Hits, int], Float64[np.ndarray, " B"]]] = {
    "hit_rate": hit_rate,
    "recall": recall,
    "precision": precision,
    "ndcg": ndcg,
    "mrr": mrr,
    "map": average_precision,
}
"""What is asked of the targets' places."""


@dataclass(frozen=True, eq=False, kw_only=True)
class _Measured:
    values: dict[str, Float64[np.ndarray, " Q"]]
    """Name to each query's value."""
    shown: dict[int, Bool[np.ndarray, " I"]]
    """K to the items in the first K of a list; of queries with a history."""
    better_N: Int64[np.ndarray, " N"]
    equal_N: Int64[np.ndarray, " N"]
    cold_2N: Int64[np.ndarray, "2 N"] | None
    """Better and equal ones among cold items; None where no target is cold."""


def evaluate(
    model: Trained,
    holdout: Holdout,
    *,
    k: tuple[int, ...] = (10,),
    exclude_seen: bool = True,
    resamples: int = 1000,
    seed: int = 0,
    sampled: SampledNegatives | None = None,
    among: Among = "all",
) -> Report:
    """Measure what a model recommends against what its users then did.

    Every item with a training event is ranked for every query, and every other that the model
    places by its features or edges. A user's value is the mean over
    its queries, the headline the mean over users that have a history and something to find;
    users without history are a slice of their own.

    Args:
        model: Gives the scores. Equal ones are settled as by chance.
        holdout: What is to be predicted, from which histories.
        k: List lengths, each at least 1.
        exclude_seen: True leaves the items of a query's history out of its list; a target that
            stands there cannot be found and is no target, which the report counts.
        resamples: Of the bootstrap over users; 0 gives no intervals.
        seed: Decides the resamples, and the order of equal scores where a list must be drawn
            (coverage, novelty, popularity share).
        sampled: Rank the targets among a few sampled items only, as some papers did; the names
            of the metrics say so.
        among: "cold" ranks items without a training event among themselves, and the names of
            the metrics say so; those that the model does not place stand at the end, as equals.

    Raises:
        ConfigError: `k` or `resamples` is out of range, or both `sampled` and `among` are asked.
        DataError: The model was trained on another catalogue, or nothing can be measured.
        NonFiniteError: The model scores an item with NaN or infinity.
    """
    if not k or min(k) < 1 or len(set(k)) < len(k):
        raise ConfigError(f"k is {k}: give list lengths of at least 1, no two alike")
    if resamples < 0:
        raise ConfigError(f"resamples is {resamples}: give 0 or more")
    if sampled is not None and among != "all":
        raise ConfigError(f"rank among sampled items or among {among!r} ones, not both")
    count_I, known_I = model.events.item_count, model.known_I.numpy()
    ranked_I = known_I if among == "all" else count_I == 0
    _check_catalogue(model, holdout, count_I)
    task = make_task(holdout, without_repeats=exclude_seen)
    warm_Q = task.length_Q > 0
    if not warm_Q.any():
        raise DataError(
            f"no query of {holdout.name!r} has both a history and something to find "
            f"({len(holdout)} queries, {int((~warm_Q).sum())} without history, {task.idle} with "
            "nothing to find but what was seen): hold out more, or split with leave_last_split"
        )
    measured = _measure(
        model,
        holdout,
        task,
        k=k,
        exclude_seen=exclude_seen,
        seed=seed,
        sampled=sampled,
        among=among,
    )
    user_idx, means_UM = mean_by_user(
        task.user_Q[warm_Q], np.stack([v[warm_Q] for v in measured.values.values()], axis=1)
    )
    metrics = dict(zip(measured.values, means_UM.mean(axis=0).tolist(), strict=True))
    metrics |= {f"coverage_at_{n}": coverage(measured.shown[n], ranked_I) for n in k}
    intervals = bootstrap_intervals(means_UM, resamples=resamples, seed=seed) if resamples else []
    found = {f"recall_at_{n}": chance_within(measured.better_N, measured.equal_N, n) for n in k}
    cold = {}
    if measured.cold_2N is not None:
        better_N, equal_N = measured.cold_2N
        cold = {f"recall_at_{n}": chance_within(better_N, equal_N, n) for n in k}
    targets = target_slices(
        task,
        found,
        cold,
        count_I=count_I,
        in_headline_N=warm_Q[task.query_N],
    )
    plain = "" if among == "all" else COLD_SUFFIX
    suffix = plain if sampled is None else sampled.suffix
    slices = (*query_slices(task, measured.values), *targets)
    return Report(
        model=type(model.model).__name__,
        holdout=holdout.name,
        holdout_digest=digest(holdout),
        k=k,
        metrics=_named(metrics, suffix),
        intervals=_named(dict(zip(measured.values, intervals, strict=False)), suffix),
        user_idx=user_idx,
        per_user=_named(dict(zip(measured.values, means_UM.T, strict=True)), suffix),
        counts=_counts(task, count_I, ranked_I, num_users=len(user_idx)),
        notes=(
            *_notes(
                task,
                _candidates(int((known_I & (count_I == 0)).sum()), ranked_I, sampled, among),
                exclude_seen=exclude_seen,
                resamples=resamples,
                seed=seed,
            ),
            *_of_moments(model, holdout),
        ),
        slices=tuple(replace(part, metrics=_named(part.metrics, suffix)) for part in slices),
        settings=model.settings,
        seed=model.seed,
        suffix=suffix,
    )


def _named(values: Mapping[str, V], suffix: str) -> dict[str, V]:
    return {f"{name}{suffix}": value for name, value in values.items()}


@torch.inference_mode()
def _measure(
    model: Trained,
    holdout: Holdout,
    task: Task,
    *,
    k: tuple[int, ...],
    exclude_seen: bool,
    seed: int,
    sampled: SampledNegatives | None,
    among: Among,
) -> _Measured:
    score, count_I = model.scorer(exclude_seen=exclude_seen), model.events.item_count
    properties = {
        "novelty": self_information(count_I),
        "popularity_share": head_membership(count_I),
    }
    names = [f"{family}_at_{n}" for family in (*ACCURACY, *properties) for n in k]
    values = {name: np.empty(len(task.row_Q)) for name in names}
    shown = {n: np.zeros(len(count_I), dtype=bool) for n in k}
    better_N = np.empty(len(task.target_N), dtype=np.int64)
    equal_N = np.empty(len(task.target_N), dtype=np.int64)
    cold_I = count_I == 0
    only_cold = partial(among_cold, cold_I=torch.from_numpy(cold_I), placed_I=model.known_I)
    leave_out_seen = _without_seen if exclude_seen else _as_it_is
    cold_2N = None
    if among == "all" and sampled is None and cold_I[task.target_N].any():
        cold_2N = np.empty((2, len(task.target_N)), dtype=np.int64)
    step = block_rows(len(count_I))
    for begin in range(0, len(task.row_Q), step):
        rows = slice(begin, min(begin + step, len(task.row_Q)))
        queries = holdout.queries(task.row_Q[rows], model.moment)
        targets = slice(*task.offsets_Q1[[rows.start, rows.stop]])
        row_N = np.repeat(
            np.arange(len(queries)), np.diff(task.offsets_Q1[rows.start : rows.stop + 1])
        )
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
            found = {family: accuracy(hits, n) for family, accuracy in ACCURACY.items()}
            found |= {name: list_mean(list_BK, value_I, n) for name, value_I in properties.items()}
            for family, value_B in found.items():
                values[f"{family}_at_{n}"][rows] = value_B
            items = list_BK[task.length_Q[rows] > 0, :n]
            shown[n][items[items >= 0]] = True
    return _Measured(
        values=values,
        shown=shown,
        better_N=better_N,
        equal_N=equal_N,
        cold_2N=cold_2N,
    )


def _without_seen(score_BI: Tensor, queries: Queries) -> Tensor:
    seen_N = torch.arange(len(queries)).repeat_interleave(queries.offsets_B1.diff())
    score_BI[seen_N, queries.history_N] = -torch.inf
    return score_BI


def _as_it_is(score_BI: Tensor, queries: Queries) -> Tensor:
    del queries  # what they have seen competes
    return score_BI


def _check_catalogue(model: Trained, holdout: Holdout, count_I: Int64[np.ndarray, " I"]) -> None:
    same = model.events.items is holdout.events.items or model.events.items.ids.equals(
        holdout.events.items.ids
    )
    if not same:
        raise DataError(
            f"the model was trained on a catalogue of {model.events.num_items} items, the holdout "
            f"has another of {holdout.events.num_items}: evaluate on a part of the same split"
        )
    if not count_I.any():
        raise DataError("the model's training events are empty: there is nothing to recommend")


def _counts(
    task: Task, count_I: Int64[np.ndarray, " I"], known_I: Bool[np.ndarray, " I"], *, num_users: int
) -> dict[str, int]:
    cold_Q = task.length_Q == 0
    return {
        "users": num_users,
        "queries": int((~cold_Q).sum()),
        "targets": len(task.target_N) - int(cold_Q[task.query_N].sum()),
        "catalogue": int(known_I.sum()),
        "cold_users": len(np.unique(task.user_Q[cold_Q])),
        "cold_queries": int(cold_Q.sum()),
        "cold_targets": int((count_I[task.target_N] == 0).sum()),
        "repeated_targets": task.repeats,
        "doubled_targets": task.doubles,
        "idle_queries": task.idle,
    }


def _candidates(
    num_placed: int,
    ranked_I: Bool[np.ndarray, " I"],
    sampled: SampledNegatives | None,
    among: Among,
) -> tuple[str, str]:
    """Return which items are ranked, and which targets are never found."""
    if among == "cold":
        return (
            f"candidates: NOT the full catalogue but its {int(ranked_I.sum())} items without a "
            f"training event; {num_placed} of them are placed by the model, the others stand "
            "behind these as equals",
            "targets that a training event has are no candidates and count as misses",
        )
    placed = f" and {num_placed} others that the model places" if num_placed else ""
    whole = f"candidates: the full catalogue, every item with a training event{placed}"
    misses = "targets that no training event has" + (
        " and the model does not place" if num_placed else ""
    )
    return (
        f"{whole}; none sampled" if sampled is None else sampled.note(),
        f"{misses} are never found and count as misses",
    )


def _of_moments(model: Trained, holdout: Holdout) -> tuple[str, ...]:
    """Say what a model with features of the moment was told of it."""
    if model.moment is None:
        return ()
    if holdout.context is None:
        return ("context: the events have none, so nothing is known of any moment",)
    return ("context: each query is asked at the moment of its first target",)


def _notes(
    task: Task,
    candidates: tuple[str, str],
    *,
    exclude_seen: bool,
    resamples: int,
    seed: int,
) -> tuple[str, ...]:
    seen = (
        f"seen items are excluded: what a query's history holds is not in its list; left out are "
        f"{task.repeats} targets that stand there, and {task.idle} queries that had no other"
        if exclude_seen
        else "seen items are not excluded: they compete, and may be targets again"
    )
    which, misses = candidates
    return (
        which,
        seen,
        misses,
        "mean over users of the mean over the user's queries; users without history are not in "
        "it, but a slice of their own",
        "equal scores are settled as by chance: accuracy is the exact expectation over their "
        f"orders; for coverage, novelty and popularity share one order is drawn (seed {seed})",
        "ndcg: the ideal list has min(k, targets) hits, as in ranx, trec_eval and scikit-learn",
        "map: divided by min(k, targets); ranx and trec_eval divide by the number of targets",
        "recall: divided by the number of targets; precision: by k",
        "novelty: mean of -log2 of an item's share of training events, in bits; popularity share: "
        "places taken by the most popular fifth of the catalogue, 0.2 if blind",
        f"intervals: 95 %, percentile bootstrap over users, {resamples} resamples, seed {seed}"
        if resamples
        else "intervals: none asked for",
    )

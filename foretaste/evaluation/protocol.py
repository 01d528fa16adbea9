"""The evaluation protocol: full catalogue, averages over users, and notes on every choice.

Shape legend: I items, U users, Q queries, N targets of all queries, M metrics.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np
from jaxtyping import Bool, Float64, Int64

from foretaste.arguments import checked
from foretaste.config import Count, Resamples, Seed
from foretaste.data.splits import Holdout
from foretaste.errors import ConfigError, DataError
from foretaste.evaluation.asked import Asked, Task, check_new, digest, make_task, overlap
from foretaste.evaluation.list_metrics import (
    bootstrap_intervals,
    chance_within,
    coverage,
    mean_by_user,
    popularity_rank,
)
from foretaste.evaluation.measure_queries import (
    COLD_SUFFIX,
    NEW_SUFFIX,
    Among,
    SampledNegatives,
    Whose,
    measure_queries,
)
from foretaste.evaluation.report import Report, Slice
from foretaste.training.trained import Trained

V = TypeVar("V")


@checked
def evaluate(
    model: Trained,
    holdout: Holdout,
    *,
    k: Count | Sequence[Count] = (10,),
    exclude_seen: bool = True,
    resamples: Resamples = 1000,
    seed: Seed = 0,
    sampled: SampledNegatives | None = None,
    among: Among = "all",
    users: Whose = "known",
) -> Report:
    """Measure a model's recommendations against the later events of its users.

    For every query, all items with a training event are ranked, and those that the model scores by
    their features or edges. A user's value is the mean over its queries; the headline is the mean
    over users with a history and targets; users without history are a separate slice.

    Args:
        model: The model; equal scores count as their expectation under a random order.
        holdout: The targets and histories. In other events than the model's own, users and items
            are matched by their ids: an unknown user is a new user, represented by the history; a
            target with an unknown item is a miss. The report counts both.
        k: List lengths, each at least 1.
        exclude_seen: True leaves the items of a query's history out of its list; targets in the
            history are left out too, and the report counts them.
        resamples: Number of bootstrap resamples of users; 0 gives no intervals and no chance
            levels.
        seed: Decides the resamples, and the order of equal scores for metrics that need one list
            (coverage, novelty, popularity share).
        sampled: Rank the targets only among a few sampled items, as in some papers; the names of
            the metrics show it.
        among: "cold" ranks only items without a training event, and the names of the metrics show
            it; items that the model cannot score are tied at the end.
        users: "new" computes the headline only over users without history, and the names of the
            metrics show it.

    Raises:
        ConfigError: `k` or `resamples` is out of range, both `sampled` and `among` are set, or
            there are fewer items than sampled ones.
        DataError: The model knows few items of the holdout, was trained on most of it, or there are
            no targets.
        NonFiniteError: The model's score of an item is NaN or infinite.
    """
    k = (k,) if isinstance(k, int) else tuple(k)
    _check_asked(k, resamples, sampled, among)
    if not len(model.events):
        raise DataError(
            "the model's training events are empty: there is nothing to recommend", name="trained"
        )
    model = model.asked_by(holdout.events)
    count_I, known_I = model.item_count, model.known_I.numpy()
    ranked_I = known_I if among == "all" else count_I == 0
    if sampled is not None:
        sampled.check(int((count_I > 0).sum()))
    known = overlap(model, Asked.of_holdout(holdout))
    task, asked_Q = to_find(holdout, exclude_seen=exclude_seen, users=users)
    measured = measure_queries(
        model,
        holdout,
        task,
        k=k,
        exclude_seen=exclude_seen,
        seed=seed,
        sampled=sampled,
        among=among,
        asked_Q=asked_Q,
        with_chance=resamples > 0,
    )
    user_idx, means_UM = _user_means(task, measured.values, asked_Q)
    chance: dict[str, float] = {}
    if measured.chance:
        _, chance_UM = _user_means(task, measured.chance, asked_Q)
        chance = dict(zip(measured.chance, chance_UM.mean(axis=0).tolist(), strict=True))
    sampled_note = None
    if sampled is not None:
        sampled = sampled.as_done(measured.sampled_Q[asked_Q])
        sampled_note = sampled.note(measured.sampled_Q[asked_Q])
    metrics = dict(zip(measured.values, means_UM.mean(axis=0).tolist(), strict=True))
    metrics |= {f"coverage_at_{n}": coverage(measured.shown[n], ranked_I) for n in k}
    intervals = bootstrap_intervals(means_UM, resamples=resamples, seed=seed) if resamples else []
    found = {f"recall_at_{n}": chance_within(measured.better_N, measured.equal_N, n) for n in k}
    cold = {}
    if measured.cold_2N is not None:
        better_N, equal_N = measured.cold_2N
        cold = {f"recall_at_{n}": chance_within(better_N, equal_N, n) for n in k}
    targets = target_slices(task, found, cold, count_I=count_I, in_headline_N=asked_Q[task.query_N])
    plain = "" if among == "all" else COLD_SUFFIX
    suffix = plain if sampled is None else sampled.suffix
    suffix += "" if users == "known" else NEW_SUFFIX
    slices = (*query_slices(task, measured.values), *targets)
    return Report(
        model=type(model.model).__name__,
        holdout=holdout.name,
        holdout_digest=digest(holdout),
        k=k,
        metrics=_named(metrics, suffix),
        intervals=_named(dict(zip(measured.values, intervals, strict=False)), suffix),
        chance=_named(chance, suffix),
        user_idx=user_idx,
        per_user=_named(dict(zip(measured.values, means_UM.T, strict=True)), suffix),
        counts=_counts(task, count_I, ranked_I, asked_Q=asked_Q, num_users=len(user_idx))
        | known.counts,
        notes=(
            *known.notes,
            *(check_new(model, holdout, user_idx) if users == "new" else ()),
            *protocol_notes(
                model,
                holdout,
                task,
                exclude_seen=exclude_seen,
                resamples=resamples,
                seed=seed,
                sampled=sampled_note,
                among=among,
                users=users,
            ),
        ),
        slices=tuple(replace(part, metrics=_named(part.metrics, suffix)) for part in slices),
        settings=model.settings,
        seed=model.seed,
        suffix=suffix,
    )


def to_find(
    holdout: Holdout, *, exclude_seen: bool = True, users: Whose = "known"
) -> tuple[Task, Bool[np.ndarray, " Q"]]:
    """Return the targets that `evaluate` ranks, and the queries of the headline.

    Raises:
        DataError: There are no targets.
    """
    task = make_task(holdout, without_repeats=exclude_seen)
    asked_Q: Bool[np.ndarray, " Q"] = (task.length_Q > 0) == (users == "known")
    if not asked_Q.any():
        raise DataError(_nothing_to_find(holdout, task, users), name="holdout")
    return task, asked_Q


def _user_means(
    task: Task, values: Mapping[str, Float64[np.ndarray, " Q"]], asked_Q: Bool[np.ndarray, " Q"]
) -> tuple[Int64[np.ndarray, " U"], Float64[np.ndarray, "U M"]]:
    asked = np.stack([value_Q[asked_Q] for value_Q in values.values()], axis=1)
    return mean_by_user(task.user_Q[asked_Q], asked)


def _check_asked(
    k: tuple[int, ...], resamples: int, sampled: SampledNegatives | None, among: Among
) -> None:
    if not k or min(k) < 1 or len(set(k)) < len(k):
        raise ConfigError(
            f"k is {k}: give list lengths of at least 1, each once", name="k", value=k
        )
    if resamples < 0:
        raise ConfigError(
            f"resamples is {resamples}: give 0 or more", name="resamples", value=resamples
        )
    if sampled is not None and among != "all":
        raise ConfigError(
            f"rank among sampled items or among {among!r} ones, not both", name="among", value=among
        )


def _named(values: Mapping[str, V], suffix: str) -> dict[str, V]:
    return {f"{name}{suffix}": value for name, value in values.items()}


def _nothing_to_find(holdout: Holdout, task: Task, users: Whose) -> str:
    sizes = (
        f"({len(holdout)} queries, {int((~holdout.has_history_Q).sum())} without history, "
        f"{task.idle} whose targets were all seen before)"
    )
    if users == "new":
        return (
            f'users is "new", and no query of {holdout.name!r} without history has something to '
            f"find {sizes}: split with cold_users_split"
        )
    fix = (
        "rank seen items too (exclude_seen=False)"
        if task.idle and not len(task.length_Q)
        else 'split with leave_last_split, or measure users="new"'
    )
    return f"no query of {holdout.name!r} has a history and a target {sizes}: hold out more, {fix}"


def _counts(
    task: Task,
    count_I: Int64[np.ndarray, " I"],
    known_I: Bool[np.ndarray, " I"],
    *,
    asked_Q: Bool[np.ndarray, " Q"],
    num_users: int,
) -> dict[str, int]:
    cold_Q = task.length_Q == 0
    return {
        "users": num_users,
        "queries": int(asked_Q.sum()),
        "targets": int(asked_Q[task.query_N].sum()),
        "catalogue": int(known_I.sum()),
        "cold_users": len(np.unique(task.user_Q[cold_Q])),
        "cold_queries": int(cold_Q.sum()),
        "cold_targets": int((count_I[task.target_N] == 0).sum()),
        "repeated_targets": task.repeats,
        "doubled_targets": task.doubles,
        "idle_queries": task.idle,
    }


def protocol_notes(
    model: Trained,
    holdout: Holdout,
    task: Task,
    *,
    exclude_seen: bool,
    resamples: int,
    seed: int,
    sampled: str | None,
    among: Among,
    users: Whose,
) -> tuple[str, ...]:
    """Return notes on candidates, means and divisors; `sampled` is the note on sampled items."""
    seen = (
        f"seen items are excluded: items of a query's history are not in its list; "
        f"{task.repeats} such targets, and {task.idle} queries without others, are left out"
        if exclude_seen
        else "seen items are not excluded: they compete, and may be targets again"
    )
    which, misses = _candidates(model, sampled, among)
    return (
        which,
        seen,
        misses,
        "mean over users of the mean over the user's queries; users "
        + (
            "without history are left out of the mean, and shown as a slice"
            if users == "known"
            else "with a history are not in it"
        ),
        "ties: accuracy is the exact expectation over the orders of equal scores; for coverage, "
        f"novelty and popularity share one order is drawn (seed {seed})",
        "ndcg: the ideal list has min(k, targets) hits, as in ranx, trec_eval and scikit-learn",
        "map: divided by min(k, targets); ranx and trec_eval divide by the number of targets",
        "recall: divided by the number of targets; precision: by k",
        "novelty: mean of -log2 of an item's share of training events, in bits; popularity share: "
        "places taken by the most popular fifth of the catalogue, 0.2 for random lists",
        f"intervals: 95 %, percentile bootstrap over users, {resamples} resamples, seed {seed}"
        if resamples
        else "intervals: none asked for",
        *_of_moments(model, holdout),
    )


def _candidates(model: Trained, sampled: str | None, among: Among) -> tuple[str, str]:
    """Return notes on the ranked items and on the targets that are never found."""
    cold_I = model.item_count == 0
    num_placed = int((model.known_I.numpy() & cold_I).sum())
    if among == "cold":
        return (
            f"candidates: NOT the full catalogue but its {int(cold_I.sum())} items without a "
            f"training event; {num_placed} of them are scored by the model; the others are tied "
            "behind them",
            "targets with a training event are not candidates and count as misses",
        )
    placed = f" and {num_placed} others that the model scores by features" if num_placed else ""
    whole = f"candidates: the full catalogue, every item with a training event{placed}"
    misses = "targets that no training event has" + (
        " and the model does not place" if num_placed else ""
    )
    return (
        f"{whole}; none sampled" if sampled is None else sampled,
        f"{misses} are never found and count as misses",
    )


def _of_moments(model: Trained, holdout: Holdout) -> tuple[str, ...]:
    """Return a note on the context of queries, for models that read context features."""
    if model.moment is None:
        return ()
    if holdout.context is None:
        return ("context: the events have none, so it is missing in every query",)
    return ("context: each query has the context of its first target",)


HISTORY_EDGES = (1, 5, 10, 20, 50, 100)
"""Start of each bucket of history lengths."""


def query_slices(task: Task, values: Mapping[str, Float64[np.ndarray, " Q"]]) -> Iterator[Slice]:
    """Yield slices by length of history, from users without history on; empty ones are left out."""
    targets_Q = np.diff(task.offsets_Q1)
    parts: list[tuple[str, str, np.ndarray]] = [("cold users", "no history", task.length_Q == 0)]
    for low, high in zip(HISTORY_EDGES, (*HISTORY_EDGES[1:], None), strict=True):
        label = f"{low} events or more" if high is None else f"{low} to {high - 1} events"
        below = True if high is None else task.length_Q < high
        parts.append(("history length", label, (task.length_Q >= low) & below))
    for group, label, in_Q in parts:
        if in_Q.any():
            masked = {name: value[in_Q] for name, value in values.items()}
            targets = int(targets_Q[in_Q].sum())
            yield _slice(group, label, task, np.flatnonzero(in_Q), masked, targets=targets)


def _slice(
    group: str,
    label: str,
    task: Task,
    query_N: Int64[np.ndarray, " N"],
    values: Mapping[str, Float64[np.ndarray, " N"]],
    *,
    targets: int,
) -> Slice:
    """Return the means over users of values of queries or of targets."""
    columns_NM = np.stack(list(values.values()), axis=1)
    user_U, means_UM = mean_by_user(task.user_Q[query_N], columns_NM)
    return Slice(
        group=group,
        label=label,
        users=len(user_U),
        queries=len(np.unique(query_N)),
        targets=targets,
        metrics=dict(zip(values, means_UM.mean(axis=0).tolist(), strict=True)),
    )


def target_slices(
    task: Task,
    found: Mapping[str, Float64[np.ndarray, " N"]],
    found_among_cold: Mapping[str, Float64[np.ndarray, " N"]],
    *,
    count_I: Int64[np.ndarray, " I"],
    in_headline_N: Bool[np.ndarray, " N"],
) -> Iterator[Slice]:
    """Yield slices of targets by tenths of the catalogue, most popular first, then cold ones.

    Args:
        task: The queries.
        found: Name of a recall to each target's probability of being found.
        found_among_cold: The same if only items without a training event are ranked; empty gives no
            such slice.
        count_I: Training events of each item.
        in_headline_N: Targets of queries with a history.
    """
    query_N, num_known = task.query_N, int((count_I > 0).sum())
    tenth_N = 10 * popularity_rank(count_I)[task.target_N] // num_known
    tenth_N[count_I[task.target_N] == 0] = 10
    parts = [("target popularity", _tenth_label(tenth), tenth, found) for tenth in range(10)]
    parts.append(("cold items", "no training event", 10, found))
    if found_among_cold:
        parts.append(("cold items among themselves", "no training event", 10, found_among_cold))
    for group, label, tenth, recalls in parts:
        in_N = in_headline_N & (tenth_N == tenth)
        if in_N.any():
            masked = {name: value[in_N] for name, value in recalls.items()}
            targets = int(in_N.sum())
            yield _slice(group, label, task, query_N[in_N], masked, targets=targets)


def _tenth_label(tenth: int) -> str:
    end = {0: " (most popular)", 9: " (least popular)"}.get(tenth, "")
    return f"tenth {tenth + 1}{end}"

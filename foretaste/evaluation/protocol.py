"""How a model is measured: against the full catalogue, averaged over users, every choice said.

Shape legend: I items, U users, Q queries, M metrics.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np
from jaxtyping import Bool, Float64, Int64

from foretaste.arguments import checked
from foretaste.config import Count, Resamples, Seed
from foretaste.data.splits import Holdout
from foretaste.errors import ConfigError, DataError
from foretaste.evaluation.bootstrap import bootstrap_intervals
from foretaste.evaluation.cold import COLD_SUFFIX, NEW_SUFFIX, Among, Whose
from foretaste.evaluation.list_metrics import coverage
from foretaste.evaluation.measure_queries import measure_queries
from foretaste.evaluation.overlap import Asked, check_new, overlap
from foretaste.evaluation.protocol_notes import protocol_notes
from foretaste.evaluation.rank import chance_within
from foretaste.evaluation.report import Report
from foretaste.evaluation.sampled import SampledNegatives
from foretaste.evaluation.slices import mean_by_user, query_slices, target_slices
from foretaste.evaluation.task import Task, digest, make_task
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
    """Measure what a model recommends against what its users then did.

    Every item with a training event is ranked for every query, and every other that the model
    places by its features or edges. A user's value is the mean over its queries, the headline the
    mean over users that have a history and something to find; users without history are a slice
    of their own.

    Args:
        model: Gives the scores. Equal ones are settled as by chance.
        holdout: What is to be predicted, from which histories. Of other events than the model's own
            users and items are found by their ids: an unknown user is a new one, told by the
            history; a target of an unknown item is a miss. The report counts both.
        k: List lengths, each at least 1.
        exclude_seen: True leaves the items of a query's history out of its list; a target that
            stands there cannot be found and is no target, which the report counts.
        resamples: Of the bootstrap over users; 0 gives no intervals, and no chance levels.
        seed: Decides the resamples, and the order of equal scores where a list must be drawn
            (coverage, novelty, popularity share).
        sampled: Rank the targets among a few sampled items only, as some papers did; the names
            of the metrics say so.
        among: "cold" ranks items without a training event among themselves, and the names of
            the metrics say so; those that the model does not place stand at the end, as equals.
        users: "new" takes the headline from the users without history, and from no others, and the
            names of the metrics say so.

    Raises:
        ConfigError: `k` or `resamples` is out of range, both `sampled` and `among` are asked, or
            more sampled items than there are.
        DataError: The model knows hardly an item of the holdout, was trained on most of it, or
            nothing can be measured.
        NonFiniteError: The model scores an item with NaN or infinity.
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
    """Return what `evaluate` will look for, and which queries the headline is of.

    Raises:
        DataError: Nothing: no list could be right.
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
            f"k is {k}: give list lengths of at least 1, no two the same", name="k", value=k
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
        f"{task.idle} with nothing to find but what was seen)"
    )
    if users == "new":
        return (
            f'users is "new", and no query of {holdout.name!r} without history has something to '
            f"find {sizes}: split with cold_users_split"
        )
    mend = (
        "rank what was seen too (exclude_seen=False)"
        if task.idle and not len(task.length_Q)
        else 'split with leave_last_split, or measure users="new"'
    )
    return (
        f"no query of {holdout.name!r} has both a history and something to find {sizes}: hold out "
        f"more, {mend}"
    )


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

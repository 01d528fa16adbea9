"""Every choice behind a report, in sentences.

Shape legend: I items.
"""

from foretaste.data.splits import Holdout
from foretaste.evaluation.cold import Among, Whose
from foretaste.evaluation.task import Task
from foretaste.training.trained import Trained


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
    """Say what was ranked, averaged and divided by what; arguments are those of `evaluate`, and
    `sampled` is the note of the sampled items.
    """
    seen = (
        f"seen items are excluded: what a query's history holds is not in its list; left out are "
        f"{task.repeats} targets that stand there, and {task.idle} queries that had no other"
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
            "without history are not in it, but a slice of their own"
            if users == "known"
            else "with a history are not in it"
        ),
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
        *_of_moments(model, holdout),
    )


def _candidates(model: Trained, sampled: str | None, among: Among) -> tuple[str, str]:
    """Return which items are ranked, and which targets are never found."""
    cold_I = model.item_count == 0
    num_placed = int((model.known_I.numpy() & cold_I).sum())
    if among == "cold":
        return (
            f"candidates: NOT the full catalogue but its {int(cold_I.sum())} items without a "
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
        f"{whole}; none sampled" if sampled is None else sampled,
        f"{misses} are never found and count as misses",
    )


def _of_moments(model: Trained, holdout: Holdout) -> tuple[str, ...]:
    """Say what a model with features of the moment was given of it."""
    if model.moment is None:
        return ()
    if holdout.context is None:
        return ("context: the events have none, so nothing is known of any moment",)
    return ("context: each query is asked at the moment of its first target",)

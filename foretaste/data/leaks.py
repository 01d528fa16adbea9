"""What a split lets into training that would not be known yet when the test happens.

Shape legend: E events, N training events, T held-out events.
"""

import numpy as np
from jaxtyping import Bool, Int64, UInt8

from foretaste.data.interactions import Interactions
from foretaste.data.parts import TEST, TRAIN, VALIDATION, SplitKind


def find_leaks(
    kind: SplitKind, events: Interactions, part_E: UInt8[np.ndarray, " E"]
) -> tuple[str, ...]:
    """Return one sentence, with its numbers, for each way in which the future leaks.

    Nothing leaks from a temporal split of events that never share a second.
    """
    train_E, test_E = part_E == TRAIN, part_E == TEST
    if not (train_E.any() and test_E.any()):
        return ()
    found = [_own_future(events, train_E, test_E)]
    if events.timestamp_s is None:
        return (*filter(None, found), _UNTIMED[kind])
    train_N = np.sort(events.timestamp_s[train_E])
    found = [
        _older_than_training("test", train_N, events.timestamp_s[test_E]),
        _older_than_training("validation", train_N, events.timestamp_s[part_E == VALIDATION]),
        *found,
        "" if kind in ("random", "cold_items", "cold_users") else _same_second(events, test_E),
    ]
    return tuple(filter(None, found))


def newer_than_own(
    events: Interactions, newer_E: Bool[np.ndarray, " E"], older_E: Bool[np.ndarray, " E"]
) -> Bool[np.ndarray, " E"]:
    """Mark the `newer_E` events that came after the first `older_E` event of their user.

    Without times a user's order stands for time; with them, the same second is not after.
    """
    time_E = events.timestamp_s if events.timestamp_s is not None else np.arange(len(events))
    first_U = np.full(events.num_users, np.iinfo(np.int64).max)
    np.minimum.at(first_U, events.user_idx[older_E], time_E[older_E])
    after_E: Bool[np.ndarray, " E"] = newer_E & (time_E > first_U[events.user_idx])
    return after_E


_UNTIMED: dict[SplitKind, str] = {
    "temporal": "no times: how much of training is newer than the test cannot be said",
    "leave_last": "no times: order stands for time within a user, and how much of training is "
    "newer than other users' test events cannot be said",
    "ratio": "no times: order stands for time within a user, and how much of training is "
    "newer than other users' test events cannot be said",
    "random": "no times: order stands for time, and events were held out whatever their order",
    "given": "no times: what was known when cannot be said of parts that came as they are",
    "cold_items": "no times: order stands for time, and items were held out whatever their order",
    "cold_users": "no times: users were held out whatever was known when",
}


def _older_than_training(
    name: str, train_N: Int64[np.ndarray, " N"], held_T: Int64[np.ndarray, " T"]
) -> str:
    """Compare all held-out events with all training events, `train_N` sorted."""
    older = int((held_T < train_N[-1]).sum())
    if not older:
        return ""
    newer_T = len(train_N) - np.searchsorted(train_N, held_T, side="right")
    return (
        f"{_share(older, len(held_T))} of the {name} events are older than the newest training "
        f"event; on average {newer_T.mean() / len(train_N):.1%} of training is newer than a "
        f"{name} event"
    )


def _own_future(
    events: Interactions, train_E: Bool[np.ndarray, " E"], test_E: Bool[np.ndarray, " E"]
) -> str:
    newer = int(newer_than_own(events, train_E, test_E).sum())
    if not newer:
        return ""
    return (
        f"{_share(newer, int(train_E.sum()))} of the training events came after a test event of "
        "the same user"
    )


def _same_second(events: Interactions, test_E: Bool[np.ndarray, " E"]) -> str:
    """Count test events whose place after the one before them is only the order of the file."""
    if events.timestamp_s is None:
        return ""
    same_E = np.zeros(len(events), dtype=bool)
    same_E[1:] = (np.diff(events.timestamp_s) == 0) & (np.diff(events.user_idx) == 0)
    tied = int((same_E & test_E).sum())
    if not tied:
        return ""
    return (
        f"{_share(tied, int(test_E.sum()))} of the test events share a second with the event of "
        "their user before them: which came first is the order of the file"
    )


def _share(count: int, total: int) -> str:
    return f"{count / total:.1%} ({count:,} of {total:,})"

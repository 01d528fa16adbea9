"""What in a table of events, or in a split of it, would make a measured figure untrue.

Each finding counts what it saw; no finding means that nothing of the kind was seen. Pairs are
found by sorting values, not positions: ten times as fast; few that occur twice are looked at again.

Shape legend: E events, P pairs.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Bool, Int64

from foretaste.arguments import checked
from foretaste.data.arrays import distinct
from foretaste.data.audit import (
    Finding,
    columns_that_tell,
    features_of_the_future,
    ids_in_order,
    ids_that_tell,
    label_names,
    worst_first,
)
from foretaste.data.interactions import Interactions
from foretaste.data.splits import TEST, TRAIN, VALIDATION, Split, newer_than_own


def repeats(events: Interactions) -> Iterator[Finding]:
    """Find events that repeat another's user and item, and those that repeat its second too."""
    pair_E = _pairs(events)
    sorted_E = np.sort(pair_E)
    twice_P = distinct(sorted_E[1:][np.diff(sorted_E) == 0])
    rows = np.flatnonzero(_among(twice_P, pair_E))
    again = len(rows) - len(twice_P)
    same = 0
    if events.timestamp_s is not None:
        pair, time = pair_E[rows], events.timestamp_s[rows]
        order = np.lexsort((time, pair))
        same = int(((np.diff(pair[order]) == 0) & (np.diff(time[order]) == 0)).sum())
    if same:
        yield Finding(
            severity="warning",
            what="repeated_event",
            count=same,
            sentence=f"{same:,} events repeat another of the same user, item and second: drop "
            "them when reading",
        )
    if again > same:
        yield Finding(
            severity="note",
            what="repeated_pair",
            count=again - same,
            sentence=f"{again - same:,} events are of an item that their user had before: fit "
            "for repeated use only, such as visits or plays",
        )


def pairs_across_parts(split: Split) -> Iterator[Finding]:
    """Find held-out events whose user and item, or even second, stand in training too."""
    train_E = split.part_E == TRAIN
    held_E = (split.part_E == TEST) | (split.part_E == VALIDATION)
    pair_E, time_E = _pairs(split.events), split.events.timestamp_s
    held_P = np.sort(pair_E[held_E])
    both_P = distinct(pair_E[train_E & _among(held_P, pair_E)])
    rows = np.flatnonzero((train_E | held_E) & _among(both_P, pair_E))
    held = held_E[rows]
    both = int(held.sum())
    if time_E is not None:
        same = _with_equal_time(pair_E[rows], time_E[rows], held)
    else:
        same = both if split.kind in ("given", "random") else 0
    if same:
        yield Finding(
            severity="leak",
            what="event_in_two_parts",
            count=same,
            sentence=f"{same:,} held-out events stand in training too: drop repeated events "
            "before splitting",
        )
    if both > same:
        yield Finding(
            severity="warning",
            what="pair_in_two_parts",
            count=both - same,
            sentence=f"{both - same:,} held-out events are of an item that their user has in "
            "training: they are lost where seen items are excluded, and easy where not",
        )


def _pairs(events: Interactions) -> Int64[np.ndarray, " E"]:
    """Return one number for each (user, item)."""
    pair_E: Int64[np.ndarray, " E"] = (
        events.user_idx.astype(np.int64) * events.num_items + events.item_idx
    )
    return pair_E


def _among(
    sorted_P: Int64[np.ndarray, " P"], pair_E: Int64[np.ndarray, " E"]
) -> Bool[np.ndarray, " E"]:
    """Mark the pairs that are among some, which are sorted."""
    if not len(sorted_P):
        return np.zeros(len(pair_E), dtype=bool)
    place_E = np.searchsorted(sorted_P, pair_E).clip(max=len(sorted_P) - 1)
    found_E: Bool[np.ndarray, " E"] = sorted_P[place_E] == pair_E
    return found_E


def _with_equal_time(
    pair_E: Int64[np.ndarray, " E"], time_E: Int64[np.ndarray, " E"], held_E: Bool[np.ndarray, " E"]
) -> int:
    """Count the held-out events for which a training event has the same pair and time."""
    order_E = np.lexsort((held_E, time_E, pair_E))  # training first among equals
    pair_E, time_E, held_E = pair_E[order_E], time_E[order_E], held_E[order_E]
    first_E = np.ones(len(pair_E), dtype=bool)
    first_E[1:] = (np.diff(pair_E) != 0) | (np.diff(time_E) != 0)
    of_first_E = np.flatnonzero(first_E)[np.cumsum(first_E) - 1]
    return int((held_E & ~held_E[of_first_E]).sum())


_DAY_S = 86_400
_YEAR_1971_S, _YEAR_1990_S = 31_536_000, 631_152_000
_CROWD = 100  # events that one second or one day of an item needs to be noticed


@checked
def audit_events(events: Interactions, *, labels: Sequence[str] = ()) -> tuple[Finding, ...]:
    """Look at a table before it is split; leaks first, then warnings, then notes.

    Args:
        events: Any.
        labels: Columns that are to be predicted, which nothing may tell; none: all columns of
            events with a context; else those called `label` or `rating`.

    Raises:
        ConfigError: A column of labels is not there.
    """
    names = label_names(events, labels)
    if not len(events):
        return ()
    found = [
        finding
        for look in (repeats, _heavy_user, _years, _times, _spikes, ids_in_order)
        for finding in look(events)
    ]
    for look in (columns_that_tell, features_of_the_future, ids_that_tell):
        found += look(events, names)
    return worst_first(found)


@checked
def audit_split(split: Split, *, labels: Sequence[str] = ()) -> tuple[Finding, ...]:
    """Look at what training knows of the test; leaks first, then warnings, then notes.

    That test events are older than training is counted here for every split, also for those
    that are made so.

    Args:
        split: Any.
        labels: Columns that are to be predicted; none: as for `audit_events`.

    Raises:
        ConfigError: A column of labels is not there.
    """
    names = label_names(split.events, labels)
    if not len(split.events):
        return ()
    train_E, test_E = split.part_E == TRAIN, split.part_E == TEST
    return worst_first(
        [
            *pairs_across_parts(split),
            *_against_time(split.events, train_E, test_E),
            *features_of_the_future(split.events, names, train_E),
            *ids_that_tell(split.events, names, test_E),
        ]
    )


def _heavy_user(events: Interactions) -> Iterator[Finding]:
    count_U = np.diff(events.offsets)
    heaviest, share = int(count_U.argmax()), count_U.max() / len(events)
    active = count_U[count_U > 0]
    if len(active) > 1 and share > 0.02 and count_U.max() > 20 * np.median(active):
        yield Finding(
            severity="warning",
            what="heavy_user",
            count=int(count_U.max()),
            sentence=f"user {events.users.ids[heaviest]!r} has {share:.1%} of all events, "
            f"{count_U.max() / np.median(active):,.0f} times the median: a robot or a shared "
            "account? Leave it out of training if so",
        )


def _times(events: Interactions) -> Iterator[Finding]:
    if events.timestamp_s is None:
        yield Finding("note", "no_times", len(events), "no times: order stands for time")
        return
    second, users_of = _most_crowded_second(events)
    is_today = events.timestamp_s.max() >= _YEAR_1990_S
    if is_today and users_of >= _CROWD and users_of > 0.01 * (np.diff(events.offsets) > 0).sum():
        yield Finding(
            severity="warning",
            what="one_second",
            count=users_of,
            sentence=f"{users_of:,} users have an event in second {second}: a default, or the "
            "time of an import? Their order cannot be trusted",
        )
    same = (np.diff(events.timestamp_s) == 0) & (np.diff(events.user_idx) == 0)
    if same.sum() > 0.05 * len(events):
        days = "; times are whole days" if not (events.timestamp_s % _DAY_S).any() else ""
        yield Finding(
            severity="note",
            what="same_second",
            count=int(same.sum()),
            sentence=f"{same.mean():.1%} of events share a second with the one before them of "
            f"their user{days}: which came first is the order of the file",
        )


def _years(events: Interactions) -> Iterator[Finding]:
    """Find times that are no times of today: a mere count, another unit, or unknown ones."""
    if events.timestamp_s is None:
        return
    low, high = int(events.timestamp_s.min()), int(events.timestamp_s.max())
    early = int((events.timestamp_s < _YEAR_1971_S).sum())
    if high < _YEAR_1990_S:
        yield Finding(
            severity="warning",
            what="times_before_1990",
            count=len(events),
            sentence=f"all times lie before 1990 if they are seconds, from {low} to {high}: a mere "
            "count, or read with the wrong timestamp_unit? Days and windows of time mean nothing "
            "then",
        )
    elif early:
        yield Finding(
            severity="warning",
            what="times_of_1970",
            count=early,
            sentence=f"{early:,} of {len(events):,} times lie in 1970, while others are of today: "
            "unknown times, or another unit? They are the oldest events of their users",
        )


def _most_crowded_second(events: Interactions) -> tuple[int, int]:
    """Return the second in which most users did something, and how many they were."""
    if events.timestamp_s is None:
        return 0, 0
    again = np.zeros(len(events), dtype=bool)
    again[1:] = (np.diff(events.timestamp_s) == 0) & (np.diff(events.user_idx) == 0)
    seconds, counts = np.unique(events.timestamp_s[~again], return_counts=True)
    return int(seconds[counts.argmax()]), int(counts.max())


def _spikes(events: Interactions) -> Iterator[Finding]:
    """Find items with most of their events on one day, ten times what the day explains."""
    if events.timestamp_s is None:
        return
    day_E = events.timestamp_s // _DAY_S
    day_E = day_E - day_E.min()
    num_days = int(day_E.max()) + 1
    key, count = np.unique(events.item_idx.astype(np.int64) * num_days + day_E, return_counts=True)
    item, day = key // num_days, key % num_days
    total = events.item_count[item]
    expected = total * np.bincount(day_E, minlength=num_days)[day] / len(events)
    spike = (count >= _CROWD) & (count > 0.5 * total) & (count > 10 * expected)
    if spike.any():
        most = int(item[spike][count[spike].argmax()])
        yield Finding(
            severity="warning",
            what="popularity_spike",
            count=int(spike.sum()),
            sentence=f"{spike.sum():,} items have most of their events on one day, as "
            f"{events.items.ids[most]!r} with {count[spike].max():,}: a campaign or a fault? "
            "Popularity over a window will follow it",
        )


def _against_time(
    events: Interactions, train_E: Bool[np.ndarray, " E"], test_E: Bool[np.ndarray, " E"]
) -> Iterator[Finding]:
    own = int(newer_than_own(events, train_E, test_E).sum())
    if own:
        yield Finding(
            severity="leak",
            what="own_future_in_training",
            count=own,
            sentence=f"{own:,} training events came after a test event of the same user: split "
            "by time, or by each user's order",
        )
    if events.timestamp_s is None or not (train_E.any() and test_E.any()):
        return
    older = int((events.timestamp_s[test_E] < events.timestamp_s[train_E].max()).sum())
    if older:
        yield Finding(
            severity="leak",
            what="test_older_than_training",
            count=older,
            sentence=f"{older:,} of {test_E.sum():,} test events are older than the newest "
            "training event: split by time to know what tomorrow will bring",
        )

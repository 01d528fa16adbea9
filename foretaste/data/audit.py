"""What in a table of events, or in a split of it, would make a measured figure untrue.

Each finding counts what it saw; no finding means that nothing of the kind was seen.

Shape legend: E events.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Bool

from foretaste.arguments import checked
from foretaste.data.audit_features import features_of_the_future
from foretaste.data.audit_ids import ids_in_order, ids_that_tell
from foretaste.data.audit_labels import columns_that_tell, label_names
from foretaste.data.audit_pairs import pairs_across_parts, repeats
from foretaste.data.finding import Finding, worst_first
from foretaste.data.interactions import Interactions
from foretaste.data.leaks import newer_than_own
from foretaste.data.parts import TEST, TRAIN
from foretaste.data.splits import Split

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

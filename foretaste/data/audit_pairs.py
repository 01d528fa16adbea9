"""Events that repeat each other, within a table and across the parts of a split.

Values are sorted, not positions: that is ten times as fast, and the few pairs that stand twice
are looked at again.

Shape legend: E events, P pairs.
"""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Bool, Int64

from foretaste.data.distinct import distinct
from foretaste.data.finding import Finding
from foretaste.data.interactions import Interactions
from foretaste.data.parts import TEST, TRAIN, VALIDATION
from foretaste.data.splits import Split


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

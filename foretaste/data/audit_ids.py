"""Ids that say what they should not: the label, the time, or the part of a split.

Shape legend: E events, R rows of one side (users or items).
"""

from collections.abc import Iterator, Sequence

import numpy as np
import polars as pl
from jaxtyping import Bool, Int64, Shaped

from foretaste.data.association import explained_share, rank_correlation
from foretaste.data.audit_features import mean_of, sides
from foretaste.data.audit_labels import labels, some_rows
from foretaste.data.finding import Finding
from foretaste.data.interactions import Interactions
from foretaste.data.vocabulary import Vocabulary

_TELLS = 0.8  # share of the variance between ids that a property of the id explains
_IN_ORDER = 0.95  # rank correlation of item ids with time
_RISING = 0.9  # share of a user's steps that lead to a higher item id; chance is about half
_BLOCKS = 20


def ids_that_tell(
    events: Interactions, names: Sequence[str], test_E: Bool[np.ndarray, " E"] | None = None
) -> Iterator[Finding]:
    """Find ids whose order, first or last character tells the label, or which events are the test.

    Args:
        events: Any; those with label columns are looked at for these.
        names: Columns that are labels.
        test_E: The test of a split, looked at instead of the labels. None: labels.
    """
    values = labels(events, np.arange(len(events)), names)
    if test_E is not None:
        values = {"part of the split": test_E.astype(np.float64)}
    for side, vocabulary in zip(sides(events), (events.users, events.items), strict=True):
        for name, value_E in values.items():
            mean_R = mean_of(side, value_E)
            here_R = np.isfinite(mean_R)
            shares = {
                what: explained_share(property_R[here_R], mean_R[here_R])
                for what, property_R in _properties(vocabulary).items()
            }
            what = max(shares, key=lambda key: shares[key])
            if shares[what] >= _TELLS:
                yield Finding(
                    severity="leak",
                    what="id_tells_label" if test_E is None else "id_tells_part",
                    count=int(here_R.sum()),
                    sentence=f"the {what} of {side.name} ids tells the {name} "
                    f"({shares[what]:.0%} of what differs between {side.name}s): give ids that "
                    "mean nothing",
                )


def ids_in_order(events: Interactions) -> Iterator[Finding]:
    """Find item ids that were given in the order of the events, so that the next one is told."""
    order_R = _order(events.items)
    order_E = order_R[events.item_idx]
    if events.timestamp_s is not None:
        rows_N = some_rows(len(events))
        told = abs(rank_correlation(order_E[rows_N], events.timestamp_s[rows_N]))
        if told >= _IN_ORDER:
            yield Finding(
                severity="warning",
                what="id_tells_time",
                count=events.num_items,
                sentence=f"item ids go with time (rank correlation {told:.2f}): a feature made "
                "of the id would know when an event happened",
            )
    same_user_E = np.diff(events.user_idx) == 0
    steps_E = np.diff(order_E)[same_user_E]
    moved = int((steps_E != 0).sum())
    rising = int((steps_E > 0).sum())
    if moved >= 2 * _BLOCKS and rising >= _RISING * moved:
        yield Finding(
            severity="warning",
            what="id_tells_next",
            count=rising,
            sentence=f"{rising:,} of {moved:,} steps of a user lead to an item of a higher id: "
            "events were sorted by item, or ids given in the order of events",
        )


def _properties(vocabulary: Vocabulary) -> dict[str, Shaped[np.ndarray, " R"]]:
    text = vocabulary.ids.cast(pl.String)
    order_R = _order(vocabulary)
    return {
        "order": order_R * _BLOCKS // max(1, len(order_R)),
        "first character": text.str.slice(0, 1).to_numpy(),
        "last character": text.str.slice(-1).to_numpy(),
    }


def _order(vocabulary: Vocabulary) -> Int64[np.ndarray, " R"]:
    """Return the place of each id among the sorted ids: by number, or by alphabet."""
    return vocabulary.ids.rank("ordinal").to_numpy().astype(np.int64) - 1

"""Features that could only be known afterwards: counts, means and last times of the whole period.

Shape legend: E events, R rows of one side (users or items), N rows looked at.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
from jaxtyping import Bool, Float64, Int32, Shaped

from foretaste.data.association import rank_correlation
from foretaste.data.audit_labels import labels
from foretaste.data.finding import Finding
from foretaste.data.interactions import Interactions

_SAME = 0.98  # rank correlation with a whole-period figure from which a feature is that figure


@dataclass(frozen=True, eq=False, kw_only=True)
class Side:
    """Users or items, and what each event says about them."""

    name: str
    """"user" or "item"."""
    idx_E: Int32[np.ndarray, " E"]
    size: int
    table: pl.DataFrame | None


def sides(events: Interactions) -> tuple[Side, Side]:
    """Return users and items."""
    return (
        Side(name="user", idx_E=events.user_idx, size=events.num_users, table=events.user_table),
        Side(name="item", idx_E=events.item_idx, size=events.num_items, table=events.item_table),
    )


def mean_of(side: Side, value_E: Shaped[np.ndarray, " E"]) -> Float64[np.ndarray, " R"]:
    """Return the mean of a value over each row's events, NaN where it has none."""
    value_E = value_E.astype(np.float64)
    known_E = np.isfinite(value_E)
    count = np.bincount(side.idx_E[known_E], minlength=side.size)
    total = np.bincount(side.idx_E[known_E], value_E[known_E], minlength=side.size)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def features_of_the_future(
    events: Interactions,
    names: Sequence[str],
    known_E: Bool[np.ndarray, " E"] | None = None,
) -> Iterator[Finding]:
    """Find features that equal, up to a growing function, a figure over all events.

    Args:
        events: With side tables or columns.
        names: Columns that are labels.
        known_E: Events that were known when features were made, such as training; a feature
            that fits their figures as well or better was made from them, and is no leak. None:
            whatever fits is a warning, as nobody said what was known.
    """
    for side in sides(events):
        whole = _figures(events, side, names, np.ones(len(events), dtype=bool))
        part = {} if known_E is None else _figures(events, side, names, known_E)
        for name, feature_R in _features(events, side, names):
            fits = {what: abs(rank_correlation(feature_R, whole[what])) for what in whole}
            what = max(fits, key=lambda key: fits[key])
            fit_of_part = abs(rank_correlation(feature_R, part[what])) if part else 0.0
            if fits[what] >= _SAME and fits[what] > fit_of_part:
                yield Finding(
                    severity="warning" if known_E is None else "leak",
                    what="feature_of_the_future",
                    count=side.size,
                    sentence=f"{side.name} feature {name!r} goes with the {what} of a {side.name} "
                    f"over the whole period (rank correlation {fits[what]:.3f}"
                    + ("" if known_E is None else f", {fit_of_part:.3f} over training alone")
                    + "): leave it out, or make it from what was known at the time",
                )


def _figures(
    events: Interactions, side: Side, names: Sequence[str], known_E: Bool[np.ndarray, " E"]
) -> dict[str, Float64[np.ndarray, " R"]]:
    """Return what is only known when the period is over; NaN for rows without an event at all."""
    any_R = np.bincount(side.idx_E, minlength=side.size) > 0
    count_R = np.bincount(side.idx_E[known_E], minlength=side.size)
    figures = {"number of events": np.where(any_R, count_R, np.nan).astype(np.float64)}
    for label, label_E in labels(events, np.arange(len(events)), names).items():
        figures[f"mean {label}"] = mean_of(side, np.where(known_E, label_E, np.nan))
    if events.timestamp_s is not None:
        last_R = np.full(side.size, np.iinfo(np.int64).min)
        np.maximum.at(last_R, side.idx_E[known_E], events.timestamp_s[known_E])
        figures["last time"] = np.where(count_R > 0, last_R, np.nan).astype(np.float64)
    return figures


def _features(
    events: Interactions, side: Side, names: Sequence[str]
) -> Iterator[tuple[str, Float64[np.ndarray, " R"]]]:
    """Give the numeric columns of a side's table, and those of events that are fixed per row."""
    yield from _numeric(side.table)
    columns = [
        (name, column_E)
        for name, column_E in events.columns.items()
        if name not in names and column_E.dtype.kind in "biuf"
    ]
    for name, column_E in (*columns, *_numeric(events.context)):
        mean_R = mean_of(side, column_E)
        if np.allclose(mean_R[side.idx_E], column_E, equal_nan=True):
            yield name, mean_R


def _numeric(table: pl.DataFrame | None) -> Iterator[tuple[str, Float64[np.ndarray, " N"]]]:
    for column in () if table is None else table.iter_columns():
        if column.dtype.is_numeric():
            yield column.name, column.cast(pl.Float64).fill_null(np.nan).to_numpy()

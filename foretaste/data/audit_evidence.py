"""What columns and features give away: a label, a time, a part, or a figure over all events.

Shape legend: E events, R rows of one side (users or items), N rows looked at.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import polars as pl
from jaxtyping import Bool, Float64, Int32, Int64, Shaped

from foretaste.data.interactions import Interactions
from foretaste.data.vocabulary import Vocabulary
from foretaste.errors import ConfigError, nearest

Severity = Literal["leak", "warning", "note"]
_ORDER: tuple[Severity, ...] = ("leak", "warning", "note")


@dataclass(frozen=True)
class Finding:
    """What was seen, how often, and what it means."""

    severity: Severity
    """"leak": the future or the label is known where it must not be; "warning": likely a fault
    of the data; "note": true, and good to know."""
    what: str
    """A short name, the same for all findings of the kind."""
    count: int
    """How many events, pairs, ids or columns."""
    sentence: str
    """For people: with numbers and what to do."""


def worst_first(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """Return leaks, then warnings, then notes, each in the order given."""
    return tuple(sorted(findings, key=lambda finding: _ORDER.index(finding.severity)))


_MIN_ROWS = 20


def rank_correlation(x_N: Shaped[np.ndarray, " N"], y_N: Shaped[np.ndarray, " N"]) -> float:
    """Return Spearman's correlation in [-1, 1]; 0 for fewer than 20 rows or a constant.

    Rows in which either is not finite are left out.
    """
    x_N, y_N = x_N.astype(np.float64), y_N.astype(np.float64)
    both = np.isfinite(x_N) & np.isfinite(y_N)
    x_N, y_N = _ranks(x_N[both]), _ranks(y_N[both])
    if len(x_N) < _MIN_ROWS or x_N.std() == 0 or y_N.std() == 0:
        return 0.0
    return float(np.corrcoef(x_N, y_N)[0, 1])


def explained_share(group_N: Shaped[np.ndarray, " N"], value_N: Shaped[np.ndarray, " N"]) -> float:
    r"""Return the share of the variance of a value that lies between groups, at most 1.

    .. math:: \epsilon^2 = 1 - \frac{SS_{within} / (N - G)}{SS_{total} / (N - 1)}

    Around 0 for groups that say nothing, however many there are; 0 for fewer than 20 rows, a
    constant value, or groups of fewer than two rows on average.
    """
    value_N = value_N.astype(np.float64)
    _, group_of = np.unique(group_N, return_inverse=True)
    num_groups = int(group_of.max(initial=-1)) + 1
    total = float(((value_N - value_N.mean()) ** 2).sum()) if len(value_N) else 0.0
    if len(value_N) < max(_MIN_ROWS, 2 * num_groups) or num_groups < 2 or total == 0:
        return 0.0
    mean_G = np.bincount(group_of, value_N) / np.bincount(group_of)
    within = float(((value_N - mean_G[group_of]) ** 2).sum())
    return 1 - (within / (len(value_N) - num_groups)) / (total / (len(value_N) - 1))


def separation(x_N: Shaped[np.ndarray, " N"], label_N: Shaped[np.ndarray, " N"]) -> float:
    r"""Return how well a number parts the two values of a label: :math:`|2\,\mathrm{AUC} - 1|`.

    0 for chance, 1 where one value always stands above the other; 0 for fewer than 20 rows, or a
    label of other than two values. Rows in which either is not finite are left out.
    """
    x_N, label_N = x_N.astype(np.float64), label_N.astype(np.float64)
    both = np.isfinite(x_N) & np.isfinite(label_N)
    values = np.unique(label_N[both])
    if both.sum() < _MIN_ROWS or len(values) != 2:
        return 0.0
    rank_N, high_N = _ranks(x_N[both]), label_N[both] == values[1]
    num_high, num_low = int(high_N.sum()), int((~high_N).sum())
    above = rank_N[high_N].sum() - num_high * (num_high + 1) / 2
    return float(abs(2 * above / (num_high * num_low) - 1))


def _ranks(x_N: Float64[np.ndarray, " N"]) -> Float64[np.ndarray, " N"]:
    return pl.Series(x_N).rank("average").to_numpy().astype(np.float64)


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


_ID_TELLS = 0.8  # share of the variance between ids that a property of the id explains
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
            if shares[what] >= _ID_TELLS:
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


_USUAL = ("label", "rating")
_COLUMN_TELLS = 0.99  # share of a label that a column explains from which it is the label
_LOOKED_AT = 200_000


def label_names(events: Interactions, wanted: Sequence[str] = ()) -> tuple[str, ...]:
    """Return which columns of the events are to be predicted.

    Args:
        events: Any.
        wanted: Their names; none: all columns of events with a context, which holds what is known
            beforehand; else those called `label` or `rating`.

    Raises:
        ConfigError: A column is not there.
    """
    for name in wanted:
        if name not in events.columns:
            near = nearest(name, events.columns)
            advice = f"did you mean {near!r}?" if near else "name a column of numbers"
            raise ConfigError(
                f"there is no column {name!r} with labels to audit: {advice}",
                column=name,
                name="labels",
                value=name,
            )
    if wanted:
        return tuple(wanted)
    usual = [name for name in events.columns if events.context is not None or name in _USUAL]
    return tuple(name for name in usual if name != "part")


def labels(
    events: Interactions, rows_N: Int64[np.ndarray, " N"], names: Sequence[str]
) -> Mapping[str, Float64[np.ndarray, " N"]]:
    """Return the numeric labels of some events, NaN where missing."""
    return {
        name: events.columns[name][rows_N].astype(np.float64)
        for name in names
        if events.columns[name].dtype.kind in "biuf"
    }


def some_rows(size: int) -> Int64[np.ndarray, " N"]:
    """Return all rows, or 200,000 of them, evenly spread."""
    return np.unique(np.linspace(0, size - 1, min(size, _LOOKED_AT)).astype(np.int64))


def columns_that_tell(events: Interactions, names: Sequence[str]) -> Iterator[Finding]:
    """Find what says what a label is: by its value, by its order, or by being missing.

    Columns beside the events, their context, and what is known of users and items are looked at.
    Of two tasks' labels neither is a feature of the other.
    """
    rows_N = some_rows(len(events))
    for label, label_N in labels(events, rows_N, names).items():
        known_N = np.isfinite(label_N)
        for what, name, column_N in _beside(events, rows_N[known_N], names):
            share = _told(column_N, label_N[known_N])
            if share >= _COLUMN_TELLS:
                yield Finding(
                    severity="leak",
                    what="column_tells_label",
                    count=len(events),
                    sentence=f"{what} {name!r} tells {label!r} ({share:.1%} of it): it cannot be "
                    "known before; leave it out of the features",
                )


def _beside(
    events: Interactions, rows_N: Int64[np.ndarray, " N"], names: Sequence[str]
) -> Iterator[tuple[str, str, pl.Series]]:
    """Give everything but labels that stands beside some events, with what it is."""
    for name, column_E in events.columns.items():
        if name not in (*_USUAL, *names):
            yield "column", name, pl.Series(name, column_E[rows_N])
    tables = (
        ("context", events.context, rows_N),
        ("user feature", events.user_table, events.user_idx[rows_N]),
        ("item feature", events.item_table, events.item_idx[rows_N]),
    )
    for what, table, row_N in tables:
        for column in () if table is None else table.iter_columns():
            if column.dtype.is_nested() or column.dtype in (pl.Object, pl.Binary):
                continue
            if what == "context" or 2 * column.n_unique() < len(column):  # else it is an id
                yield what, column.name, column.gather(row_N)


def _told(column: pl.Series, label_N: Float64[np.ndarray, " N"]) -> float:
    missing_N = column.is_null().to_numpy()
    if column.dtype.is_float():
        missing_N = missing_N | column.is_nan().fill_null(value=False).to_numpy()
    shares = [
        explained_share(_groups(column), label_N),
        explained_share(missing_N, label_N),
    ]
    if column.dtype.is_numeric() or column.dtype.is_temporal():
        number_N = column.to_physical().cast(pl.Float64).fill_null(np.nan).to_numpy()
        shares.append(rank_correlation(number_N, label_N) ** 2)
        shares.append(separation(number_N, label_N))
    return max(shares)


def _groups(column: pl.Series) -> Shaped[np.ndarray, " N"]:
    """Return a number for each value, alike for equal ones; a missing value is one too."""
    return column.rank("dense").fill_null(0).to_numpy()

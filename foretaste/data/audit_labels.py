"""What tells a label that is to be predicted: columns beside events, context, tables of features.

Shape legend: E events, N rows looked at.
"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import polars as pl
from jaxtyping import Float64, Int64, Shaped

from foretaste.data.association import explained_share, rank_correlation, separation
from foretaste.data.finding import Finding
from foretaste.data.interactions import Interactions
from foretaste.errors import ConfigError, nearest

_USUAL = ("label", "rating")
_TELLS = 0.99  # share of a label that a column explains from which it is the label
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
            raise ConfigError(f"there is no column {name!r} with labels to audit: {advice}")
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
            if share >= _TELLS:
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

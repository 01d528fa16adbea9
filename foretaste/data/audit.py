"""The audit: problems in events or in a split that would make measured figures wrong.

It looks for repeated events, invalid times, and columns that reveal a label, a time, a part of the
split or a statistic over all events. Each finding has a count; no finding means that no such
problem was found.

Shape legend: E events, R rows of one side (users or items), N rows looked at.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import polars as pl
from jaxtyping import Bool, Float64, Int32, Int64, Shaped

from foretaste.arguments import checked
from foretaste.data.arrays import explained_share, rank_correlation, separation
from foretaste.data.interactions import Interactions
from foretaste.data.splits import TEST, TRAIN, VALIDATION, Split, newer_than_own
from foretaste.errors import ConfigError, did_you_mean

Severity = Literal["leak", "warning", "note"]
_ORDER: tuple[Severity, ...] = ("leak", "warning", "note")


@dataclass(frozen=True)
class Finding:
    """A finding: the problem, its count, and its meaning."""

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


_SAME = 0.98  # rank correlation with a whole-period figure from which a feature is that figure


class Side(NamedTuple):
    """Users or items, and the row of each event in them."""

    name: str
    ids: pl.Series
    idx_E: Int32[np.ndarray, " E"]
    table: pl.DataFrame | None


def sides(events: Interactions) -> tuple[Side, Side]:
    """Return users and items."""
    return (
        Side("user", events.users.ids, events.user_idx, events.user_table),
        Side("item", events.items.ids, events.item_idx, events.item_table),
    )


def mean_of(side: Side, value_E: Shaped[np.ndarray, " E"]) -> Float64[np.ndarray, " R"]:
    """Return the mean of a value over each row's events, NaN where it has none."""
    value_E = value_E.astype(np.float64)
    known_E = np.isfinite(value_E)
    count = np.bincount(side.idx_E[known_E], minlength=len(side.ids))
    total = np.bincount(side.idx_E[known_E], value_E[known_E], minlength=len(side.ids))
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def features_of_the_future(
    events: Interactions,
    names: Sequence[str],
    known_E: Bool[np.ndarray, " E"] | None = None,
) -> Iterator[Finding]:
    """Find features that are a monotone function of a statistic over all events.

    Args:
        events: With side tables or columns.
        names: Columns that are labels.
        known_E: Events that were known when features were made, such as training; a feature
            that fits their figures as well or better was made from them, and is not a leak. None:
            each feature that fits is a warning, because it is unknown which events were known.
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
                    "warning" if known_E is None else "leak",
                    "feature_of_the_future",
                    len(side.ids),
                    f"{side.name} feature {name!r} goes with the {what} of a {side.name} "
                    f"over the whole period (rank correlation {fits[what]:.3f}"
                    + ("" if known_E is None else f", {fit_of_part:.3f} over training alone")
                    + "): leave it out, or make it from what was known at the time",
                )


def _figures(
    events: Interactions, side: Side, names: Sequence[str], known_E: Bool[np.ndarray, " E"]
) -> dict[str, Float64[np.ndarray, " R"]]:
    """Return statistics that are known only after the whole period; NaN for rows without events."""
    any_R = np.bincount(side.idx_E, minlength=len(side.ids)) > 0
    count_R = np.bincount(side.idx_E[known_E], minlength=len(side.ids))
    figures = {"number of events": np.where(any_R, count_R, np.nan).astype(np.float64)}
    for label, label_E in labels(events, names).items():
        figures[f"mean {label}"] = mean_of(side, np.where(known_E, label_E, np.nan))
    if events.timestamp_s is not None:
        last_R = np.full(len(side.ids), np.iinfo(np.int64).min)
        np.maximum.at(last_R, side.idx_E[known_E], events.timestamp_s[known_E])
        figures["last time"] = np.where(count_R > 0, last_R, np.nan).astype(np.float64)
    return figures


def _features(
    events: Interactions, side: Side, names: Sequence[str]
) -> Iterator[tuple[str, Float64[np.ndarray, " R"]]]:
    """Give the numeric columns of a side's table, and those of events that are fixed per row."""
    yield from _numeric(side.table)
    columns = [(name, column) for name, column in events.columns.items() if name not in names]
    for name, column_E in (*columns, *_numeric(events.context)):
        mean_R = mean_of(side, column_E)
        if np.allclose(mean_R[side.idx_E], column_E, equal_nan=True):
            yield name, mean_R


def _numeric(table: pl.DataFrame | None) -> Iterator[tuple[str, Float64[np.ndarray, " N"]]]:
    for column in () if table is None else table.iter_columns():
        if column.dtype.is_numeric():
            yield column.name, column.cast(pl.Float64).fill_null(np.nan).to_numpy()


_ID_TELLS = 0.8  # share of the variance between ids that their order explains
_RISING = 0.9  # share of a user's steps that lead to a higher item id; chance is about half
_BLOCKS = 20


def ids_that_tell(
    events: Interactions, names: Sequence[str], test_E: Bool[np.ndarray, " E"] | None = None
) -> Iterator[Finding]:
    """Find ids whose order predicts the label, or which events are the test.

    Args:
        events: Any events.
        names: Columns that are labels.
        test_E: The test of a split, looked at instead of the labels. None: labels.
    """
    values = labels(events, names)
    if test_E is not None:
        values = {"part of the split": test_E.astype(np.float64)}
    for side in sides(events):
        block_R = _order(side.ids) * _BLOCKS // max(1, len(side.ids))
        for name, value_E in values.items():
            mean_R = mean_of(side, value_E)
            here_R = np.isfinite(mean_R)
            share = explained_share(block_R[here_R], mean_R[here_R])
            if share >= _ID_TELLS:
                yield Finding(
                    "leak",
                    "id_tells_label" if test_E is None else "id_tells_part",
                    int(here_R.sum()),
                    f"the order of {side.name} ids tells the {name} ({share:.0%} of what differs "
                    f"between {side.name}s): give ids without meaning",
                )


def ids_in_order(events: Interactions) -> Iterator[Finding]:
    """Find item ids that increase along histories, so that the next one is predictable."""
    order_E = _order(events.items.ids)[events.item_idx]
    same_user_E = np.diff(events.user_idx) == 0
    steps_E = np.diff(order_E)[same_user_E]
    moved = int((steps_E != 0).sum())
    rising = int((steps_E > 0).sum())
    if moved >= 2 * _BLOCKS and rising >= _RISING * moved:
        yield Finding(
            "warning",
            "id_tells_next",
            rising,
            f"{rising:,} of {moved:,} steps of a user lead to an item of a higher id: "
            "events were sorted by item, or ids given in the order of events",
        )


def _order(ids: pl.Series) -> Int64[np.ndarray, " R"]:
    """Return the place of each id among the sorted ids: by number, or by alphabet."""
    return ids.rank("ordinal").to_numpy().astype(np.int64) - 1


_USUAL = ("label", "rating")
_COLUMN_TELLS = 0.99  # share of a label that a column explains from which it is the label
_LOOKED_AT = 200_000


def label_names(events: Interactions, wanted: Sequence[str] = ()) -> tuple[str, ...]:
    """Return the names of the columns to be predicted.

    Args:
        events: Any.
        wanted: Their names; none: all columns of events with a context, which holds what is known
            beforehand; else those called `label` or `rating`.

    Raises:
        ConfigError: A column is not there.
    """
    for name in wanted:
        if name not in events.columns:
            advice = did_you_mean(name, events.columns) or ": name a column of numbers"
            raise ConfigError(
                f"there is no column {name!r} with labels to audit{advice}",
                column=name,
                name="labels",
                value=name,
            )
    if wanted:
        return tuple(wanted)
    usual = [name for name in events.columns if events.context is not None or name in _USUAL]
    return tuple(name for name in usual if name != "part")


def labels(events: Interactions, names: Sequence[str]) -> dict[str, Float64[np.ndarray, " E"]]:
    """Return the labels of all events, NaN where missing."""
    return {name: events.columns[name].astype(np.float64) for name in names}


def columns_that_tell(events: Interactions, names: Sequence[str]) -> Iterator[Finding]:
    """Find what reveals a label: by its value, by its order, or by being missing.

    This checks further columns of the events, their context, and the tables of users and items. A
    label of one task is not a feature of another.
    """
    num_rows = min(len(events), _LOOKED_AT)  # evenly spread
    rows_N = np.unique(np.linspace(0, len(events) - 1, num_rows).astype(np.int64))
    for label, label_E in labels(events, names).items():
        label_N = label_E[rows_N]
        known_N = np.isfinite(label_N)
        for what, name, column_N in _beside(events, rows_N[known_N], names):
            share = _sent(column_N, label_N[known_N])
            if share >= _COLUMN_TELLS:
                yield Finding(
                    "leak",
                    "column_tells_label",
                    len(events),
                    f"{what} {name!r} tells {label!r} ({share:.1%} of it): it cannot be known "
                    "before the event; leave it out of the features",
                )


def _beside(
    events: Interactions, rows_N: Int64[np.ndarray, " N"], names: Sequence[str]
) -> Iterator[tuple[str, str, pl.Series]]:
    """Yield every column about some events that is not a label, with its origin."""
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


def _sent(column: pl.Series, label_N: Float64[np.ndarray, " N"]) -> float:
    missing_N = column.is_null().to_numpy()
    if column.dtype.is_float():
        missing_N = missing_N | column.is_nan().fill_null(value=False).to_numpy()
    shares = [
        explained_share(column.rank("dense").fill_null(0).to_numpy(), label_N),
        explained_share(missing_N, label_N),
    ]
    if column.dtype.is_numeric() or column.dtype.is_temporal():
        number_N = column.to_physical().cast(pl.Float64).fill_null(np.nan).to_numpy()
        shares.append(rank_correlation(number_N, label_N) ** 2)
        shares.append(separation(number_N, label_N))
    return max(shares)


def repeats(events: Interactions) -> Iterator[Finding]:
    """Find events that repeat another's user and item, and those that repeat its second too."""
    pairs = _pairs(events)
    again = len(pairs) - pairs["pair"].n_unique()
    same = 0
    if again and events.timestamp_s is not None:
        same = len(pairs) - pairs.n_unique()
    if same:
        yield Finding(
            "warning",
            "repeated_event",
            same,
            f"{same:,} events repeat another event of the same user, item and second: drop "
            "them when reading",
        )
    if again > same:
        yield Finding(
            "note",
            "repeated_pair",
            again - same,
            f"{again - same:,} events are of an item that their user had before: fit "
            "for repeated use only, such as visits or plays",
        )


def pairs_across_parts(split: Split) -> Iterator[Finding]:
    """Find held-out events whose user and item, or even second, are in training too."""
    pairs, part_E = _pairs(split.events), split.part_E
    train = pairs.filter(part_E == TRAIN)
    held = pairs.filter((part_E == TEST) | (part_E == VALIDATION))
    both = held.join(train, on="pair", how="semi").height
    if split.events.timestamp_s is not None:
        same = held.join(train, on=["pair", "time"], how="semi").height
    else:
        same = both if split.kind in ("given", "random") else 0
    if same:
        yield Finding(
            "leak",
            "event_in_two_parts",
            same,
            f"{same:,} held-out events are also in training: drop repeated events before splitting",
        )
    if both > same:
        yield Finding(
            "warning",
            "pair_in_two_parts",
            both - same,
            f"{both - same:,} held-out events are of an item that their user has in "
            "training: they are misses if seen items are excluded, and easy hits otherwise",
        )


def _pairs(events: Interactions) -> pl.DataFrame:
    """Return one number for each event's user and item, and its time if there is one."""
    pair_E = events.user_idx.astype(np.int64) * events.num_items + events.item_idx
    time = {} if events.timestamp_s is None else {"time": events.timestamp_s}
    return pl.DataFrame({"pair": pair_E, **time})


_DAY_S = 86_400
_YEAR_1971_S, _YEAR_1990_S = 31_536_000, 631_152_000


@checked
def audit_events(events: Interactions, *, labels: Sequence[str] = ()) -> tuple[Finding, ...]:
    """Check a table before it is split; leaks come first, then warnings, then notes.

    Args:
        events: Any.
        labels: Columns that are to be predicted, which no input may reveal; none: all columns of
            events with a context; else those called `label` or `rating`.

    Raises:
        ConfigError: A column of labels is not there.
    """
    names = label_names(events, labels)
    if not len(events):
        return ()
    found = [finding for look in (repeats, _times, ids_in_order) for finding in look(events)]
    for look in (columns_that_tell, features_of_the_future, ids_that_tell):
        found += look(events, names)
    return worst_first(found)


@checked
def audit_split(split: Split, *, labels: Sequence[str] = ()) -> tuple[Finding, ...]:
    """Check what training reveals about the test; leaks come first, then warnings, then notes.

    Test events older than training are counted for every split, even if the split intends them.

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


def _times(events: Interactions) -> Iterator[Finding]:
    if events.timestamp_s is None:
        yield Finding(
            "note", "no_times", len(events), "no times: the order of rows is the order in time"
        )
        return
    yield from _years(events.timestamp_s)
    same = (np.diff(events.timestamp_s) == 0) & (np.diff(events.user_idx) == 0)
    if same.sum() > 0.05 * len(events):
        days = "; times are whole days" if not (events.timestamp_s % _DAY_S).any() else ""
        yield Finding(
            "note",
            "same_second",
            int(same.sum()),
            f"{same.mean():.1%} of events share a second with the one before them of "
            f"their user{days}: which came first is the order of the file",
        )


def _years(time_E: Int64[np.ndarray, " E"]) -> Iterator[Finding]:
    """Find implausible times: a mere count, another unit, or unknown times."""
    low, high = int(time_E.min()), int(time_E.max())
    early = int((time_E < _YEAR_1971_S).sum())
    if high < _YEAR_1990_S:
        yield Finding(
            "warning",
            "times_before_1990",
            len(time_E),
            f"all times lie before 1990 if they are seconds, from {low} to {high}: a mere "
            "count, or read with the wrong timestamp_unit? Days and windows of time mean nothing "
            "then",
        )
    elif early:
        yield Finding(
            "warning",
            "times_of_1970",
            early,
            f"{early:,} of {len(time_E):,} times lie in 1970, while others are of today: if "
            "they are unknown times, leave them empty; they count as the oldest events of their "
            "users",
        )


def _against_time(
    events: Interactions, train_E: Bool[np.ndarray, " E"], test_E: Bool[np.ndarray, " E"]
) -> Iterator[Finding]:
    own = newer_than_own(events, train_E, test_E)
    if own:
        yield Finding(
            "leak",
            "own_future_in_training",
            own,
            f"{own:,} training events came after a test event of the same user: split "
            "by time, or by each user's order",
        )
    if events.timestamp_s is None or not (train_E.any() and test_E.any()):
        return
    older = int((events.timestamp_s[test_E] < events.timestamp_s[train_E].max()).sum())
    if older:
        yield Finding(
            "leak",
            "test_older_than_training",
            older,
            f"{older:,} of {test_E.sum():,} test events are older than the newest "
            "training event: split by time to measure how future events are predicted",
        )

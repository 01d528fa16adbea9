"""Baselines of counts for labelled rows: GROUP BY user, item, category, or user and category.

Each predicts the mean training label of the rows with the same key, shrunk towards the base rate;
fewer rows are shrunk more.

Shape legend: E training rows, N measured rows, A both, T tasks, V rows of a table, I items, G
groups.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import polars as pl
from jaxtyping import Bool, Float64, Int64

from foretaste.data.interactions import Interactions
from foretaste.data.rows import Rows, rows_of
from foretaste.data.splits import TEST, TRAIN, VALIDATION, Split
from foretaste.data.tasks import Task

BASE_RATE = "base rate"
"""The name of the baseline that predicts the mean training label for every row."""
_MOST_COLUMNS = 6
"""Maximum number of category columns; those that explain least of training are left out."""
_QUANTITY = 1000
"""A column of numbers or times with more distinct values is a quantity, not a category."""


class Counted(NamedTuple):
    """A baseline and its predictions."""

    name: str
    prediction_NT: Float64[np.ndarray, "N T"]


class Column(NamedTuple):
    """A column of categories: a code for each row of its table."""

    name: str
    side: str
    """"user", "item" or "context", with a row for each user, item or event."""
    code_V: Int64[np.ndarray, " V"]


def count_baselines(
    split: Split, rows: Rows, tasks: Sequence[Task]
) -> tuple[list[Counted], list[str]]:
    """Return predictions by counting for a part's rows, the base rate last; and notes.

    Args:
        split: The training part is counted; tables and context have the categories.
        rows: Rows of validation or test, with drawn items as zeros of binary tasks.
        tasks: The tasks, each with its own mean.
    """
    counting = _Counting.of(split, rows, tasks)
    base_AT = counting.base_rate()
    columns, notes = category_columns(split.events)
    keys = {column.name: counting.key(column.side, column.code_V) for column in columns}
    if len(columns) > _MOST_COLUMNS:
        columns.sort(key=lambda column: -counting.explained(keys[column.name], base_AT))
        left_out = ", ".join(column.name for column in columns[_MOST_COLUMNS:])
        notes.append(f"columns without counts, because others explain more of training: {left_out}")
        columns = columns[:_MOST_COLUMNS]
    users = counting.key("user", np.arange(split.events.num_users))
    items = counting.key("item", np.arange(split.events.num_items))
    by_user_AT = counting.means(users, towards=base_AT)
    found = {"user": by_user_AT, "item": counting.means(items, towards=base_AT)}
    for column in columns:
        key = keys[column.name]
        found[column.name] = counting.means(key, towards=base_AT)
        if column.side != "user":
            pair = counting.crossed(users, key)
            found[f"user, {column.name}"] = counting.means(pair, towards=by_user_AT)
    counted = [Counted(f"counts by {by}", counting.judged(means)) for by, means in found.items()]
    base_NT = counting.judged(base_AT)
    given = [one for one in counted if not np.array_equal(one.prediction_NT, base_NT)]
    return [*given, Counted(BASE_RATE, base_NT)], notes


def category_columns(events: Interactions) -> tuple[list[Column], list[str]]:
    """Return the category columns of all tables, and a note on the other columns."""
    found, left_out = [], []
    tables = (("item", events.item_table), ("user", events.user_table), ("context", events.context))
    names = [column for _, table in tables if table is not None for column in table.columns]
    for side, table in tables:
        for column in () if table is None else table.iter_columns():
            name = column.name if names.count(column.name) == 1 else f"{side} {column.name}"
            why = _no_category(column)
            if why:
                left_out.append(f"{name} ({why})")
            else:
                found.append(Column(name, side, _codes(column)))
    return found, [f"columns without counts: {', '.join(left_out)}"] if left_out else []


def _no_category(column: pl.Series) -> str:
    """Return the reason why a column has no categories; "" if it has some."""
    if column.dtype.is_nested() or column.dtype in (pl.Binary, pl.Object, pl.Null):
        return "no single values"
    distinct = column.n_unique()
    if distinct < 2:
        return "one value"
    if (column.dtype.is_numeric() or column.dtype.is_temporal()) and distinct > _QUANTITY:
        return f"a quantity of {distinct:,} values"
    if distinct > 0.9 * len(column) and distinct > 10:
        return f"{distinct:,} values in {len(column):,} rows"
    return ""


def _codes(column: pl.Series) -> Int64[np.ndarray, " V"]:
    """Return a number for each value, including missing ones."""
    rank = column.cast(pl.String).rank("dense").fill_null(0)
    return rank.to_numpy().astype(np.int64)


class _Key(NamedTuple):
    """The key by which rows are grouped."""

    code_A: Int64[np.ndarray, " A"]
    rows_A: Float64[np.ndarray, " A"]
    """The expected number of training rows with this row's code if items were drawn at random."""


@dataclass(frozen=True, eq=False, kw_only=True)
class _Counting:
    """The training rows with their labels, followed by the rows to measure."""

    tasks: Sequence[Task]
    label_ET: Float64[np.ndarray, "E T"]
    known_I: Bool[np.ndarray, " I"]
    """Number of items with a training event, which are drawn."""
    event_A: Int64[np.ndarray, " A"]
    """Index of each row's event among all."""
    user_A: Int64[np.ndarray, " A"]
    item_A: Int64[np.ndarray, " A"]
    num_drawn: int
    """Number of items that training draws for each row as zeros."""

    @staticmethod
    def of(split: Split, rows: Rows, tasks: Sequence[Task]) -> "_Counting":
        train, each = rows_of(split, "train", tasks=tuple(tasks)), 1 + rows.drawn_EN.shape[1]
        item_NC = np.concatenate([rows.item_E.numpy()[:, None], rows.drawn_EN], axis=1)
        part = VALIDATION if rows.name == "validation" else TEST
        trained_E, judged_N = (np.flatnonzero(split.part_E == code) for code in (TRAIN, part))
        return _Counting(
            tasks=tasks,
            label_ET=train.label_ET.astype(np.float64),
            known_I=train.events.item_count > 0,
            event_A=np.concatenate([trained_E, judged_N.repeat(each)]),
            user_A=np.concatenate([train.user_E, rows.user_E.repeat(each)]),
            item_A=np.concatenate([train.item_E.numpy(), item_NC.reshape(-1)]),
            num_drawn=each - 1,
        )

    def judged(self, mean_AT: Float64[np.ndarray, "A T"]) -> Float64[np.ndarray, "N T"]:
        """Return the predictions for the measured rows."""
        return mean_AT[len(self.label_ET) :]

    def key(self, side: str, code_V: Int64[np.ndarray, " V"]) -> _Key:
        """Return the key by a column; `code_V` has a code for each row of its table."""
        num_rows = len(self.label_ET)
        at_A = {"user": self.user_A, "item": self.item_A, "context": self.event_A}[side]
        code_A, num_codes = code_V[at_A], 1 + int(code_V.max(initial=0))
        if side == "item":
            share_V = np.bincount(code_V[self.known_I], minlength=num_codes) / self.known_I.sum()
            return _Key(code_A, share_V[code_A] * num_rows)
        count_V = np.bincount(code_A[:num_rows], minlength=num_codes)
        return _Key(code_A, count_V[code_A].astype(np.float64))

    def crossed(self, first: _Key, second: _Key) -> _Key:
        """Return the key of pairs."""
        code_A = first.code_A * (1 + int(second.code_A.max(initial=0))) + second.code_A
        return _Key(code_A, first.rows_A * second.rows_A / len(self.label_ET))

    def base_rate(self) -> Float64[np.ndarray, "A T"]:
        """Return the mean label of training for every row."""
        labelled_T = (~np.isnan(self.label_ET)).sum(axis=0)
        drawn_T = [self._drawn(task) * len(self.label_ET) for task in self.tasks]
        mean_T = np.nansum(self.label_ET, axis=0) / (labelled_T + np.array(drawn_T))
        return np.broadcast_to(mean_T, (len(self.user_A), len(self.tasks)))

    def _drawn(self, task: Task) -> int:
        return self.num_drawn if task.kind == "binary" else 0

    def means(
        self, key: _Key, *, towards: Float64[np.ndarray, "A T"]
    ) -> Float64[np.ndarray, "A T"]:
        """Return each row's mean training label by key, shrunk towards another mean.

        The weight of the other mean in rows is the ratio of the variance within groups to that
        between their true means, both estimated from the labels (Bühlmann, "Experience rating and
        credibility", ASTIN Bulletin 1967).
        """
        _, first_G, group_A = np.unique(key.code_A, return_index=True, return_inverse=True)
        mean_AT = np.empty(towards.shape)
        for number, task in enumerate(self.tasks):
            has_E = ~np.isnan(self.label_ET[:, number])
            label_E, group_E = self.label_ET[has_E, number], group_A[: len(has_E)][has_E]
            prior_G = towards[first_G, number]
            count_G = np.bincount(group_E, minlength=len(first_G)).astype(np.float64)
            drawn_G = self._drawn(task) * key.rows_A[first_G]
            sum_G, squares = np.bincount(group_E, label_E, len(first_G)), (label_E**2).sum()
            weight = _weight(count_G + drawn_G, sum_G, prior_G, squares=squares)
            mean_G = (sum_G + weight * prior_G) / (count_G + drawn_G + weight)
            mean_AT[:, number] = mean_G[group_A]
        return mean_AT

    def explained(self, key: _Key, base_AT: Float64[np.ndarray, "A T"]) -> float:
        """Return the variance in training of a key's means of the first task."""
        num_rows = len(self.label_ET)
        return float(np.var(self.means(key, towards=base_AT)[:num_rows, 0]))


def _weight(
    count_G: Float64[np.ndarray, " G"],
    sum_G: Float64[np.ndarray, " G"],
    prior_G: Float64[np.ndarray, " G"],
    *,
    squares: float,
) -> float:
    """Return the weight of the prior in rows, at least 1: the variance within groups over that
    between groups.
    """
    seen_G = count_G > 0
    count_G, sum_G, prior_G = count_G[seen_G], sum_G[seen_G], prior_G[seen_G]
    total, mean_G = count_G.sum(), sum_G / count_G
    if total <= len(count_G):
        return max(1.0, float(total))  # every row is its own group
    within = (squares - (count_G * mean_G**2).sum()) / (total - len(count_G))
    between = ((count_G * (mean_G - prior_G) ** 2).sum() - len(count_G) * within) / total
    return float(np.clip(within / between, 1.0, total)) if between > 0 else float(total)

"""The targets of a test, and which of them the model knows or was trained on.

The targets of a holdout are sorted, without duplicates and repeats.

Shape legend: Q queries, N targets of all queries or events of a test, U users, I items.
"""

import hashlib
from dataclasses import dataclass, replace

import numpy as np
import polars as pl
from jaxtyping import Bool, Int64

from foretaste.data.arrays import distinct
from foretaste.data.interactions import Interactions
from foretaste.data.rows import Rows
from foretaste.data.splits import Holdout
from foretaste.data.vocabulary import Vocabulary
from foretaste.errors import DataError
from foretaste.later import later
from foretaste.training.trained import Trained

loops = later("foretaste.data.loops")

_BLOCK_ELEMENTS = 2**22
"""16 MB of scores, so that a block's scores stay in the cache."""
_MOST_ROWS = 1024
_FEW_ROWS, _MOST_ELEMENTS = 32, 2**27
"""With fewer queries per block, reading the items' vectors takes longer than working on scores
outside the cache, which may take 512 MB."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Task:
    """The queries with targets, sorted by length of history, then user, then time.

    Nothing else affects the order and the blocks, so results do not depend on the order of the
    holdout. Histories of equal length are adjacent, so that sequence models need little padding.
    """

    row_Q: Int64[np.ndarray, " Q"]
    """Row of each query in the holdout."""
    user_Q: Int64[np.ndarray, " Q"]
    length_Q: Int64[np.ndarray, " Q"]
    """Number of events in its history."""
    key_Q: Int64[np.ndarray, " Q"]
    """A unique number for each query, which does not depend on its position."""
    offsets_Q1: Int64[np.ndarray, " Q1"]
    """Query q has targets `offsets_Q1[q]` to `offsets_Q1[q + 1]`, at least one."""
    target_N: Int64[np.ndarray, " N"]
    """item_idx."""
    doubles: int
    """Number of duplicate targets of a query, which are left out."""
    repeats: int
    """Number of targets left out because they are in the query's history, which is excluded."""
    idle: int
    """Number of queries left out because they had no other target."""

    @property
    def query_N(self) -> Int64[np.ndarray, " N"]:
        """The query of each target."""
        return np.repeat(np.arange(len(self.row_Q)), np.diff(self.offsets_Q1))

    def targets(self, rows: slice) -> tuple[slice, Int64[np.ndarray, " N"]]:
        """Return the queries of targets, and the number of each target within its query."""
        offsets_B1 = self.offsets_Q1[rows.start : rows.stop + 1]
        return slice(*offsets_B1[[0, -1]]), np.repeat(
            np.arange(len(offsets_B1) - 1), np.diff(offsets_B1)
        )

    def select(self, wanted_Q: Bool[np.ndarray, " Q"]) -> "Task":
        """Return some of the queries, with their targets."""
        counts_Q = np.diff(self.offsets_Q1)
        return replace(
            self,
            row_Q=self.row_Q[wanted_Q],
            user_Q=self.user_Q[wanted_Q],
            length_Q=self.length_Q[wanted_Q],
            key_Q=self.key_Q[wanted_Q],
            offsets_Q1=np.concatenate([[0], np.cumsum(counts_Q[wanted_Q])]),
            target_N=self.target_N[np.repeat(wanted_Q, counts_Q)],
        )

    def sample(self, num: int, *, seed: int = 0) -> "Task":
        """Return at most `num` queries, spread over users as evenly as possible.

        A user's mean over some queries is close to the mean over all, so this changes the mean over
        users little.

        Args:
            num: Number of queries, 1 or more.
            seed: Decides the sample.
        """
        if num >= len(self.row_Q):
            return self
        lot_Q = np.random.default_rng(seed).permutation(len(self.row_Q))
        order_Q = np.lexsort((lot_Q, self.user_Q))
        first_Q = np.r_[True, np.diff(self.user_Q[order_Q]) != 0]
        place_Q = np.arange(len(order_Q))
        turn_Q = place_Q - np.maximum.accumulate(np.where(first_Q, place_Q, 0))
        kept_Q = np.zeros(len(order_Q), dtype=bool)
        kept_Q[order_Q[np.lexsort((lot_Q[order_Q], turn_Q))[:num]]] = True
        return self.select(kept_Q)


def block_rows(num_items: int) -> int:
    """Return the number of queries scored together, which depends only on the catalogue's size."""
    few = min(_FEW_ROWS, _MOST_ELEMENTS // num_items)
    return max(1, min(_MOST_ROWS, max(few, _BLOCK_ELEMENTS // num_items)))


def make_task(holdout: Holdout, *, without_repeats: bool) -> Task:
    """Arrange the targets of a holdout.

    Args:
        holdout: Queries with their histories and targets.
        without_repeats: Leave out targets that are in their query's own history.
    """
    start_Q = holdout.events.offsets[holdout.user_Q]
    length_Q = holdout.end_Q - start_Q
    order = np.lexsort((holdout.end_Q, holdout.user_Q, length_Q))
    place_Q = np.empty(len(order), dtype=np.int64)
    place_Q[order] = np.arange(len(order))
    num_items = holdout.events.num_items
    target_query = np.repeat(place_Q, np.diff(holdout.target_offsets))
    pair_N = distinct(target_query * num_items + holdout.target_item)
    doubles = len(target_query) - len(pair_N)
    query_N, target_N = np.divmod(pair_N, num_items)
    kept_N = np.ones(len(pair_N), dtype=bool)
    if without_repeats:
        kept_N = ~_is_repeat(holdout, order, query_N, target_N)
    counts_Q = np.bincount(query_N[kept_N], minlength=len(order))
    wanted = np.flatnonzero(counts_Q)
    row_Q = order[wanted]
    return Task(
        row_Q=row_Q,
        user_Q=holdout.user_Q[row_Q],
        length_Q=length_Q[row_Q],
        key_Q=holdout.user_Q[row_Q] * (len(holdout.events) + 1) + holdout.end_Q[row_Q],
        offsets_Q1=np.concatenate([[0], np.cumsum(counts_Q[wanted])]),
        target_N=target_N[kept_N],
        doubles=doubles,
        repeats=int((~kept_N).sum()),
        idle=len(order) - len(wanted),
    )


def digest(holdout: Holdout) -> str:
    """Return a SHA-256 of a holdout's queries and targets, independent of their order."""
    task = make_task(holdout, without_repeats=False)
    events = holdout.events
    sha = hashlib.sha256(f"{events.users.digest} {events.items.digest}".encode())
    for column in (task.user_Q, task.key_Q, task.offsets_Q1, task.target_N):
        sha.update(np.ascontiguousarray(column).data)
    return sha.hexdigest()


def _is_repeat(
    holdout: Holdout,
    order: Int64[np.ndarray, " Q"],
    query_N: Int64[np.ndarray, " N"],
    target_N: Int64[np.ndarray, " N"],
) -> Bool[np.ndarray, " N"]:
    num_items = holdout.events.num_items
    step = block_rows(num_items)
    repeat_N = np.zeros(len(query_N), dtype=bool)
    for begin in range(0, len(order), step):
        queries = holdout.queries(order[begin : begin + step])
        length_B = np.diff(queries.offsets_B1.numpy())
        seen = np.repeat(np.arange(len(queries)), length_B) * num_items + queries.history_N.numpy()
        first, last = np.searchsorted(query_N, [begin, begin + step])
        pair = (query_N[first:last] - begin) * num_items + target_N[first:last]
        repeat_N[first:last] = np.isin(pair, seen, kind="table" if len(seen) else None)
    return repeat_N


_MOST_TRAINED_ON = 0.5
"""Maximum share of a test's events that training may have; with more, a figure measures
memorisation."""
_FEWEST_KNOWN = 0.1
"""Minimum share of a test's events with items that the model knows; with less, equal ids are
probably a coincidence."""
_LEARNED = {"train and validation": ("validation",), "all events": ("validation", "test")}
"""The held-out parts that a model was trained on, by its recorded parts."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Asked:
    """The events of a test, and the history before each of them."""

    name: str
    past: Interactions
    """The earlier events of all users."""
    user_N: Int64[np.ndarray, " N"]
    """user_idx in `past`."""
    end_N: Int64[np.ndarray, " N"]
    """Position in `past` where the history of each event ends."""
    item_N: Int64[np.ndarray, " N"]
    time_N: Int64[np.ndarray, " N"] | None
    """Unix seconds; None without times."""
    context: pl.DataFrame | None
    """The contexts."""

    @staticmethod
    def of_holdout(holdout: Holdout) -> "Asked":
        """Return a holdout's targets."""
        num_Q = np.diff(holdout.target_offsets)
        return Asked(
            name=holdout.name,
            past=holdout.events,
            user_N=np.repeat(holdout.user_Q, num_Q),
            end_N=np.repeat(holdout.end_Q, num_Q),
            item_N=holdout.target_item.astype(np.int64),
            time_N=holdout.target_timestamp_s,
            context=holdout.context,
        )

    @staticmethod
    def of_rows(rows: Rows) -> "Asked":
        """Return the events of labelled rows."""
        return Asked(
            name=rows.name,
            past=rows.past,
            user_N=rows.user_E,
            end_N=rows.end_E,
            item_N=rows.item_E.numpy(),
            time_N=rows.events.timestamp_s,
            context=rows.events.context,
        )


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """The parts of a test that a model knows or was trained on."""

    events: int
    users: int
    unknown_users: int
    unknown_items: int
    """Number of test events whose item the model does not know."""
    trained_on: int
    """Number of test events that were in the model's training."""
    timed: bool
    """Whether events are distinguished by their times."""
    missing: tuple[str, ...]
    """Columns about users that the model reads and the test's table lacks."""
    own_rows: bool
    """Whether users and items have the rows of the model's own events."""

    @property
    def counts(self) -> dict[str, int]:
        """The counts for a report; empty for the test of the model's own split."""
        found = {} if not self.trained_on else {"trained_on": self.trained_on}
        if self.own_rows:
            return found
        unknown = {"unknown_users": self.unknown_users, "unknown_items": self.unknown_items}
        return {**unknown, "trained_on": self.trained_on}

    @property
    def notes(self) -> tuple[str, ...]:
        """The notes for a report."""
        seen = "user, item and time" if self.timed else "user and item, as there are no times"
        trained_on = (
            f"trained on: {self.trained_on:,} of {self.events:,} events of the test were in the "
            f"model's training too, by {seen}"
        )
        if self.own_rows:
            return (trained_on,) if self.trained_on else ()
        return (
            "other events than the model's own: users and items are found by their ids; the model "
            f"knows {self.users - self.unknown_users:,} of {self.users:,} users of the test, and "
            f"the items of {self.events - self.unknown_items:,} of {self.events:,} of its events; "
            "other users are treated as new users, with their history",
            trained_on,
            *(
                (f"of users that the model does not know, {', '.join(self.missing)} is missing",)
                if self.missing and self.unknown_users
                else ()
            ),
        )


def overlap(model: Trained, test: Asked) -> Overlap:
    """Count the parts of a test that a model knows, and raise an error if too little is known.

    A test event was trained on if training has its user, item and time more often than the events
    before it. Without times, only user and item are compared.

    Args:
        model: A model for queries in the rows of `test.past`.
        test: The events to predict. The part "train" is allowed to be in training.

    Raises:
        DataError: Users and items of the test are not the model's, or most of it was in training.
    """
    translation, users = model.translation, np.unique(test.user_N)
    unknown_N, unknown_U = np.zeros(len(test.item_N), np.bool_), np.zeros(len(users), np.bool_)
    if translation is not None:
        unknown_N = translation.item_X[test.item_N] < 0
        unknown_U = translation.user_U[users] < 0
    trained_on = 0 if test.name == "train" else int(trained_on_events(model, test).sum())
    found = Overlap(
        events=len(test.item_N),
        users=len(users),
        unknown_users=int(unknown_U.sum()),
        unknown_items=int(unknown_N.sum()),
        trained_on=trained_on,
        timed=_timed(model, test),
        missing=_missing_columns(model, test),
        own_rows=translation is None,
    )
    _check_known(model, test, found)
    _check_context(model, test)
    _check_not_trained_on(model, test, found)
    return found


def _check_not_trained_on(model: Trained, test: Asked, found: Overlap) -> None:
    """Raise an error for a test that was mostly in training.

    A model of labelled rows keeps only the positive ones, so if it was trained on a part of this
    name, a single shared event shows that the test is its own split's.
    """
    most = _MOST_TRAINED_ON * found.events
    advice = "give it the test of the split that it was trained on, or events after its training"
    if found.own_rows and test.name in _LEARNED.get(model.learned_from, ()):
        most = 0
    if model.learned_from == "all events":
        advice = (
            'it was made with final = "all": give it events after its training, or measure a model '
            'of the same recipe with final = "none"'
        )
    if found.trained_on > most:
        raise DataError(
            f"the model was trained on {found.trained_on:,} of the {found.events:,} events of "
            f"{test.name!r}: figures on events that it memorised mean nothing; {advice}",
            name=test.name,
            value=found.trained_on,
        )


def check_new(
    model: Trained, holdout: Holdout, user_idx: Int64[np.ndarray, " U"]
) -> tuple[str, ...]:
    """Return notes on users without history in a holdout who are not new to the model.

    Args:
        model: A model for queries in the rows of the holdout's events.
        holdout: The holdout.
        user_idx: Users that are measured as new users.

    Raises:
        DataError: All these users have events in the model's training.
    """
    known_U = np.diff(model.events.offsets) > 0
    own_U = user_idx if model.translation is None else model.translation.user_U[user_idx]
    num = int((known_U[own_U] & (own_U >= 0)).sum())
    if num and num == len(user_idx):
        raise DataError(
            f'users is "new", and the model was trained on events of all {num:,} users of '
            f'{holdout.name!r} that have no history there: measure users="known"',
            name="users",
            value="new",
        )
    if not num:
        return ()
    return (
        f"new users: {num:,} of {len(user_idx):,} users without history here have events in the "
        "model's training, and are not new to it",
    )


def trained_on_events(model: Trained, test: Asked) -> Bool[np.ndarray, " N"]:
    """Return a mask of test events that were in the model's training."""
    own, past, translation = model.events, test.past, model.translation
    user_N, item_N = test.user_N, test.item_N
    if translation is not None:
        user_N, item_N = translation.user_U[user_N], translation.item_X[item_N]
    start_N = own.offsets[user_N]
    end_N = np.where((user_N < 0) | (item_N < 0), start_N, own.offsets[user_N + 1])
    none_E, timed = np.empty(0, np.int64), _timed(model, test)
    seen_N = np.zeros(len(item_N), np.bool_)
    loops.mark_trained_on(
        (own.item_idx, own.timestamp_s if timed else none_E, start_N, end_N, item_N),
        (
            past.item_idx,
            past.timestamp_s if timed else none_E,
            past.offsets[test.user_N],
            np.minimum(test.end_N, len(past)),
            test.item_N,
        ),
        test.time_N if timed else np.zeros_like(item_N),
        seen_N,
    )
    return seen_N


def _timed(model: Trained, test: Asked) -> bool:
    times = (model.events.timestamp_s, test.past.timestamp_s, test.time_N)
    return all(time is not None for time in times)


def _check_known(model: Trained, test: Asked, found: Overlap) -> None:
    if found.own_rows or not found.events:
        return
    own, past = model.events, test.past
    sides = (("item", own.items, past.items), ("user", own.users, past.users))
    for what, mine, other in sides:
        if mine.is_integer != other.is_integer and _in_common(found, what) == 0:
            raise DataError(
                f"the model's {what} ids are {_kind(mine)}, those of {test.name!r} are "
                f"{_kind(other)}, and none is equal: read the ids of both from the same "
                "column, as the same type",
                name=test.name,
                column=what,
                value=_first(other),
            )
    if found.events - found.unknown_items < _FEWEST_KNOWN * found.events:
        raise DataError(
            f"the model knows the items of {found.events - found.unknown_items:,} of the "
            f"{found.events:,} events of {test.name!r}: it was trained on another catalogue of "
            f"{own.num_items:,} items, such as {_first(own.items)!r}, and this one has "
            f"{past.num_items:,}, such as {_first(past.items)!r}; evaluate on events of its own "
            "catalogue, or train it on these",
            name=test.name,
            column="item",
            value=_first(past.items),
        )


def _check_context(model: Trained, test: Asked) -> None:
    """Raise an error if other events lack a context column that the model reads."""
    moment = model.moment if model.model.reads_context else None
    there = () if test.context is None else test.context.columns
    for name in () if moment is None else moment.columns:
        if name not in there:
            raise DataError(
                f"the model reads {name!r} of the context, which the events of {test.name!r} have "
                "not: read it with context=",
                name=test.name,
                column=name,
            )


def _missing_columns(model: Trained, test: Asked) -> tuple[str, ...]:
    known = None if model.features is None else model.features.user
    if known is None or not model.model.reads_profiles:
        return ()
    there = () if test.past.user_table is None else test.past.user_table.columns
    return tuple(name for name in known.columns if name not in there)


def _in_common(found: Overlap, what: str) -> int:
    if what == "item":
        return found.events - found.unknown_items
    return found.users - found.unknown_users


def _kind(vocabulary: Vocabulary) -> str:
    kind = "integers" if vocabulary.is_integer else "texts"
    return f"{kind} such as {_first(vocabulary)!r}"


def _first(vocabulary: Vocabulary) -> object:
    return vocabulary.ids[0] if len(vocabulary) else None

"""What is to be found: a holdout with doubles and repeats taken out, in an order of its own.

Shape legend: Q queries, N targets of all queries.
"""

import hashlib
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Int64

from foretaste.data.arrays import distinct
from foretaste.data.splits import Holdout

_BLOCK_ELEMENTS = 2**22
"""16 MB of scores: all that is asked of a block is answered from the cache."""
_MOST_ROWS = 1024
_FEW_ROWS, _MOST_ELEMENTS = 32, 2**27
"""With fewer queries a block reading the items' vectors takes longer than all that is asked of
scores outside the cache, which may take 512 MB."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Task:
    """The queries that have something to find, by length of history, then user, then time.

    The order depends on nothing else, so neither do the blocks, and no digit depends on how the
    holdout was put together. Histories of one length stand side by side, which spares sequence
    models their padding.
    """

    row_Q: Int64[np.ndarray, " Q"]
    """Row of each query in the holdout."""
    user_Q: Int64[np.ndarray, " Q"]
    length_Q: Int64[np.ndarray, " Q"]
    """Events in its history."""
    key_Q: Int64[np.ndarray, " Q"]
    """A number of its own for each query, the same wherever it stands."""
    offsets_Q1: Int64[np.ndarray, " Q1"]
    """Query q has targets `offsets_Q1[q]` to `offsets_Q1[q + 1]`, at least one."""
    target_N: Int64[np.ndarray, " N"]
    """item_idx."""
    doubles: int
    """Targets that stood twice in one query, left out."""
    repeats: int
    """Targets left out because they stand in the query's own history, which is excluded."""
    idle: int
    """Queries left out because they had no other target."""

    @property
    def query_N(self) -> Int64[np.ndarray, " N"]:
        """The query of each target."""
        return np.repeat(np.arange(len(self.row_Q)), np.diff(self.offsets_Q1))

    def targets(self, rows: slice) -> tuple[slice, Int64[np.ndarray, " N"]]:
        """Return where the targets of neighbouring queries stand, and each one's place there."""
        offsets_B1 = self.offsets_Q1[rows.start : rows.stop + 1]
        return slice(*offsets_B1[[0, -1]]), np.repeat(
            np.arange(len(offsets_B1) - 1), np.diff(offsets_B1)
        )

    def select(self, wanted_Q: Bool[np.ndarray, " Q"]) -> "Task":
        """Return some of the queries, with what they are to find."""
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
        """Return at most so many queries, spread over users as evenly as can be.

        A user's mean over some queries is near the mean over all: the fewer users lose a query,
        the less the mean over users changes.

        Args:
            num: Queries, 1 or more.
            seed: Decides which.
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
    """Return how many queries are scored together: a function of the catalogue's size alone."""
    few = min(_FEW_ROWS, _MOST_ELEMENTS // num_items)
    return max(1, min(_MOST_ROWS, max(few, _BLOCK_ELEMENTS // num_items)))


def make_task(holdout: Holdout, *, without_repeats: bool) -> Task:
    """Lay out what is to be found.

    Args:
        holdout: Queries with their histories and targets.
        without_repeats: Leave out targets that stand in their query's own history.
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
    """Return a SHA-256 of what a holdout asks, whatever order it asks in."""
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

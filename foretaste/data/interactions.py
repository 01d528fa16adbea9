"""Who did what with which item, and when: the one data object of foretaste."""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import polars as pl
from jaxtyping import Bool, Int32, Int64, Shaped

from foretaste.arguments import checked, checked_class
from foretaste.data.arrays import check_rows, count_before, pick
from foretaste.data.columns import kept
from foretaste.data.vocabulary import Vocabulary, text_buffers
from foretaste.errors import DataError
from foretaste.shown import Shown


@checked_class
@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Interactions(Shown):
    """Events in columns, sorted by user and, within a user, oldest first (CSR).

    User `u` owns rows `offsets[u]` to `offsets[u + 1]` of every column. Columns may be memory
    maps. Both vocabularies may hold ids without an event here: the parts of a split share them.

    Shape legend: E events, U users, I items, P links of users, Q of items.
    """

    users: Vocabulary
    items: Vocabulary
    offsets: Int64[np.ndarray, " U1"]
    """U + 1 positions, from 0 to E, never falling."""
    item_idx: Int32[np.ndarray, " E"]
    """In [0, I)."""
    timestamp_s: Int64[np.ndarray, " E"] | None = None
    """Unix seconds; None where the table has no times and file order stands for time."""
    columns: Mapping[str, Shaped[np.ndarray, " E"]] = field(default_factory=dict)
    """Further columns of numbers, such as `rating` (float32): what is to be predicted."""
    context: pl.DataFrame | None = None
    """One row per event; the caller's other columns of the moment, such as the hour or the
    place: what is known when somebody asks. Columns here and in the two tables below are brought
    into the types of `column_types`."""
    user_table: pl.DataFrame | None = None
    """One row per user_idx; the caller's other columns about users."""
    item_table: pl.DataFrame | None = None
    """One row per item_idx; the caller's other columns about items (a `title`, say)."""
    user_links: Int32[np.ndarray, "2 P"] | None = None
    """Pairs of user_idx, who trusts whom; they do not belong to any event, so parts keep all."""
    item_links: Int32[np.ndarray, "2 Q"] | None = None
    """Pairs of item_idx that go together, likewise."""
    positive: str = ""
    """The column whose values above 0 make an event positive: what models recommend from, what is
    to be found, what histories hold. "": every event is positive."""
    notes: tuple[str, ...] = ()
    """What reading dropped, merged or assumed, with counts."""

    def __post_init__(self) -> None:
        self._check_lengths()
        told = list(self.notes)
        for name in ("context", "user_table", "item_table"):
            table = getattr(self, name)
            if table is not None:
                brought = kept(table, name.replace("_table", " table"))
                told += brought.notes
                object.__setattr__(self, name, brought.frame if brought.frame.width else None)
        object.__setattr__(self, "notes", tuple(told))

    def _check_lengths(self) -> None:
        """Refuse parts that are not of one table.

        Raises:
            DataError: They differ in length.
        """
        num = len(self.item_idx)
        parts: list[tuple[str, np.ndarray | pl.DataFrame | None, int]] = [
            ("offsets", self.offsets, self.num_users + 1),
            ("timestamp_s", self.timestamp_s, num),
            ("context", self.context, num),
            ("user_table", self.user_table, self.num_users),
            ("item_table", self.item_table, self.num_items),
            *((f"columns[{name!r}]", column, num) for name, column in self.columns.items()),
        ]
        for name, part, length in parts:
            if part is not None and len(part) != length:
                raise DataError(
                    f"{name} has {len(part):,} rows where {num:,} events of {self.num_users:,} "
                    f"users and {self.num_items:,} items need {length:,}",
                    name=name,
                    value=len(part),
                )

    def __len__(self) -> int:
        return len(self.item_idx)

    @property
    def num_users(self) -> int:
        return len(self.users)

    @property
    def num_items(self) -> int:
        return len(self.items)

    @cached_property
    def user_idx(self) -> Int32[np.ndarray, " E"]:
        """The user of each event, in [0, U)."""
        return np.repeat(np.arange(self.num_users, dtype=np.int32), np.diff(self.offsets))

    @cached_property
    def item_count(self) -> Int64[np.ndarray, " I"]:
        """How many events each item has here."""
        return np.bincount(self.item_idx, minlength=self.num_items)

    @checked
    def select(self, keep: Bool[np.ndarray, " E"]) -> "Interactions":
        """Return the events where `keep` is true, under the same vocabularies and tables.

        Columns that are maps of files stay maps, of temporary files: memory does not grow.

        Raises:
            DataError: It does not say so of each event, or the temporary files find no room.
        """
        if len(keep) != len(self):
            raise DataError(
                f"keep says of {len(keep):,} events whether they are kept, and there are "
                f"{len(self):,}",
                name="keep",
                value=len(keep),
            )
        return replace(
            self,
            offsets=count_before(keep, self.offsets),
            item_idx=pick(self.item_idx, keep),
            timestamp_s=None if self.timestamp_s is None else pick(self.timestamp_s, keep),
            columns={name: pick(column, keep) for name, column in self.columns.items()},
            context=None if self.context is None else self.context.filter(pl.Series(keep)),
        )

    @cached_property
    def positive_E(self) -> Bool[np.ndarray, " E"]:
        """Which events are positive."""
        if not self.positive:
            return np.ones(len(self), np.bool_)
        positive_E: Bool[np.ndarray, " E"] = np.asarray(self.columns[self.positive] > 0)
        return positive_E

    @checked
    def history(self, user_idx: int) -> Int32[np.ndarray, " L"]:
        """Return one user's items, oldest first.

        Raises:
            DataError: There is no such row; `users.find(user_id)` gives that of an id.
        """
        check_rows(np.array([user_idx]), self.num_users, name="user_idx")
        return self.item_idx[self.offsets[user_idx] : self.offsets[user_idx + 1]]

    @checked
    def fingerprint(self) -> str:
        """Return a SHA-256 of ids, order, times, columns, context and links.

        Equal events have equal ones: the file that they came from, the tables about users and
        items, and the notes do not count.
        """
        digest = hashlib.sha256()
        for part in (*_id_parts(self.users), *_id_parts(self.items)):
            digest.update(part)
        for column in (self.offsets, self.item_idx, self.timestamp_s):
            digest.update(b"-" if column is None else np.ascontiguousarray(column).data)
        for name in sorted(self.columns):
            digest.update(f"{name} {self.columns[name].dtype}\0".encode())
            digest.update(np.ascontiguousarray(self.columns[name]).data)
        for part in () if self.context is None else _context_parts(self.context):
            digest.update(part)
        if self.positive:
            digest.update(f"positive {self.positive}\0".encode())
        for side, links in (("user", self.user_links), ("item", self.item_links)):
            if links is not None:
                digest.update(f"{side}_links {links.shape[1]}\0".encode())
                digest.update(np.ascontiguousarray(links, np.int32).data)
        return digest.hexdigest()

    def _facts(self) -> dict[str, object]:
        columns = [*self.columns, *([] if self.context is None else self.context.columns)]
        counts = {"events": len(self), "users": self.num_users, "items": self.num_items}
        return counts | ({"columns": ", ".join(columns)} if columns else {})


def _id_parts(vocabulary: Vocabulary) -> Iterator[bytes | memoryview]:
    yield f"{vocabulary.ids.dtype} {len(vocabulary)}\0".encode()
    if vocabulary.is_integer:
        yield np.ascontiguousarray(vocabulary.ids.to_numpy()).data
    else:
        yield from (buffer.data for buffer in text_buffers(vocabulary.ids))


def _context_parts(context: pl.DataFrame) -> Iterator[bytes]:
    for column in context.iter_columns():
        yield f"context {column.name} {column.dtype}\0".encode()
        yield from _parts(column)


def _parts(column: pl.Series) -> Iterator[bytes]:
    """Yield what a column of any type holds, the same however Polars keeps it in memory."""
    yield column.is_null().to_numpy().tobytes()
    if isinstance(column.dtype, pl.Array):
        column = column.arr.to_list()
    if isinstance(column.dtype, pl.List):
        yield column.list.len().fill_null(0).to_numpy().tobytes()
        yield from _parts(column.drop_nulls().explode())
    elif column.dtype.is_numeric():
        yield column.fill_null(0).to_numpy().tobytes()
    elif column.dtype in (pl.Duration, pl.Time):
        yield column.cast(pl.Int64).fill_null(0).to_numpy().tobytes()
    else:
        for buffer in text_buffers(column.cast(pl.String).fill_null("")):
            yield buffer.tobytes()

"""A public data set as its files have it, in columns of one naming."""

import hashlib
from dataclasses import dataclass

import polars as pl


@dataclass(frozen=True, eq=False, kw_only=True)
class Tables:
    """Events in the order of their file, and what is known of users and items."""

    events: pl.DataFrame
    """`user`, `item`, and what there is of `rating`, `timestamp` (seconds) and `part`, of labels
    and of the context; rows without users or items lack these columns."""
    users: pl.DataFrame | None = None
    """`user` and further columns."""
    items: pl.DataFrame | None = None
    """`item` and further columns."""
    user_links: pl.DataFrame | None = None
    """Two columns of user ids: who trusts whom."""
    labels: tuple[str, ...] = ()
    """Further columns of numbers: what is to be predicted."""
    context: tuple[str, ...] = ()
    """Columns of the moment, of any type."""

    def has(self, column: str) -> bool:
        """Whether events have this column."""
        return column in self.events.columns

    def counts(self) -> tuple[int, int, int]:
        """Return the numbers of users, items and events."""
        events = self.events
        users = events["user"].n_unique() if self.has("user") else len(events)
        items = events["item"].n_unique() if self.has("item") else 1
        return users, items, len(events)

    def sha256(self) -> str:
        """Return the checksum of the events as tab-separated lines, one decimal to a rating.

        Equal for equal events in equal order, whatever form their file had.
        """
        plain = [c for c in ("user", "item", "rating", "timestamp", "part") if self.has(c)]
        lines = self.events.select(*plain, *self.labels, *self.context).write_csv(
            separator="\t", include_header=False, float_precision=1, quote_style="never"
        )
        return hashlib.sha256(lines.encode()).hexdigest()

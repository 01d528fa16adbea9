"""Titles and histories for people: the users and items that a model was trained on."""

from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from typing import final

import numpy as np
import polars as pl

from foretaste.data.interactions import Interactions
from foretaste.serving.answer import title_column
from foretaste.serving.messages import Item, PastEvent
from foretaste.serving.state import LiveEvent
from foretaste.shown import json_value

KEPT_ITEMS = 65_536
"""Number of items whose displayed form is cached: most answers contain the same items."""


@final
class Catalogue:
    """Searches users and items by text, and describes items by title."""

    def __init__(self, events: Interactions) -> None:
        self._events = events
        self._table = events.item_table
        columns = [] if self._table is None else self._table.columns
        self._title = title_column(name for name in columns if not self._is_list(name))
        self._attributes = [
            name
            for name in columns
            if name != self._title and self._can_show(name) and not self._is_id(name)
        ]
        read = partial(_read_item, events, self._title, tuple(self._attributes))
        self._known_item = lru_cache(KEPT_ITEMS)(read)  # a method would keep the object alive
        self._item_text = self._searchable()
        has_past = pl.Series(np.diff(events.offsets) > 0)
        self._user_text = events.users.ids.cast(pl.String).filter(has_past)

    @property
    def num_users(self) -> int:
        """Number of users with a training event."""
        return len(self._user_text)

    @property
    def num_items(self) -> int:
        return self._events.num_items

    def user_id(self, text: str) -> str:
        """Return a user's id as answers show it; an unknown id is returned as given."""
        return _spelled(self._events.users.find(text), self._events.users.ids, text)

    def item_id(self, text: str) -> str:
        """Return an item's id as answers show it; an unknown id is returned as given."""
        return _spelled(self._events.items.find(text), self._events.items.ids, text)

    def knows_user(self, user_id: object) -> bool:
        """Return whether the user has a training event."""
        idx = self._events.users.find(user_id)
        return idx >= 0 and len(self._events.history(idx)) > 0

    def describe(self, item_id: object, sent: Mapping[str, object] | None = None) -> Item:
        """Return an item with its title and attributes; for an unknown item, with the given
        ones.
        """
        idx = self._events.items.find(item_id)
        if idx < 0:
            sent = sent or {}
            title = sent.get(self._title or "") or item_id
            attributes = {name: json_value(sent[name]) for name in self._attributes if name in sent}
            return Item(item_id=str(item_id), title=str(title), attributes=attributes)
        return self._known_item(idx)

    def find_items(self, query: str, *, limit: int) -> list[Item]:
        """Return items whose title contains all words or whose id equals the text, most popular
        first.
        """
        found = pl.lit(value=True)
        for word in query.casefold().split():
            found &= pl.col("text").str.contains(word, literal=True)
        rows = (
            self._item_text.filter(found | (pl.col("id") == query.strip()))
            .sort(pl.col("id") != query.strip(), pl.col("count"), descending=[False, True])
            .head(limit)
        )
        return [self.describe(item_id) for item_id in rows["id"]]

    def find_users(self, prefix: str, *, limit: int) -> list[str]:
        """Return users with events whose id begins with `prefix`; an exact match comes first."""
        ids = self._user_text.filter(self._user_text.str.starts_with(prefix))
        exact = [prefix] if (ids == prefix).any() else []
        return [*exact, *(one for one in ids.head(limit) if one != prefix)][:limit]

    def past(self, user_id: str, live: Sequence[LiveEvent], *, limit: int) -> list[PastEvent]:
        """Return the newest `limit` events of a user, in training and since, newest first."""
        events = [
            self._past_event(event.item_id, event.timestamp_s, live=True)
            for event in reversed(live[-limit:])
        ]
        idx, times = self._events.users.find(user_id), self._events.timestamp_s
        if idx < 0:
            return events
        start, end = self._events.offsets[idx : idx + 2].tolist()
        for row in range(end - 1, max(start - 1, end - 1 - limit + len(events)), -1):
            item_id = self._events.items.ids[int(self._events.item_idx[row])]
            at = None if times is None else int(times[row])
            events.append(self._past_event(item_id, at, live=False))
        return events

    def num_past(self, user_id: str) -> int:
        """Return the number of a user's training events."""
        idx = self._events.users.find(user_id)
        return 0 if idx < 0 else len(self._events.history(idx))

    def since_training(self, user_id: str, live: Sequence[LiveEvent]) -> list[LiveEvent]:
        """Leave out live events that the training data contain: those with equal item and
        second.
        """
        idx = self._events.users.find(user_id)
        if not live or idx < 0 or self._events.timestamp_s is None:
            return list(live)
        start, end = self._events.offsets[idx : idx + 2].tolist()
        items, times = self._events.item_idx[start:end], self._events.timestamp_s[start:end]
        trained = set(zip(items.tolist(), times.tolist(), strict=True))
        return [
            event
            for event in live
            if (self._events.items.find(event.item_id), event.timestamp_s) not in trained
        ]

    def _is_list(self, column: str) -> bool:
        return self._table is not None and self._table.schema[column].is_nested()

    def _can_show(self, column: str) -> bool:
        """Return whether a column can be shown, which excludes vectors."""
        dtype = pl.Null() if self._table is None else self._table.schema[column]
        return dtype == pl.List(pl.String) or not dtype.is_nested()

    def _is_id(self, column: str) -> bool:
        """Return whether a column of the item table repeats the id."""
        dtype = pl.Null() if self._table is None else self._table.schema[column]
        if self._table is None or not (dtype.is_integer() or dtype == pl.String):
            return False
        ids = self._events.items.ids.cast(pl.String)
        return bool((self._table[column].cast(pl.String) == ids).all())

    def _past_event(self, item_id: object, timestamp_s: int | None, *, live: bool) -> PastEvent:
        item = self.describe(item_id)
        return PastEvent(**vars(item), timestamp_s=timestamp_s, live=live)

    def _searchable(self) -> pl.DataFrame:
        ids = self._events.items.ids.cast(pl.String)
        titles = ids
        if self._table is not None and self._title is not None:
            titles = self._table[self._title].cast(pl.String).fill_null(ids)
        return pl.DataFrame(
            {"id": ids, "text": titles.str.to_lowercase(), "count": self._events.item_count}
        )


def _read_item(
    events: Interactions, title_column: str | None, attributes: tuple[str, ...], idx: int
) -> Item:
    item_id = str(events.items.ids[idx])
    row = {} if events.item_table is None else events.item_table.row(idx, named=True)
    title = None if title_column is None else row[title_column]
    return Item(
        item_id=item_id,
        title=item_id if title is None else str(title),
        attributes={name: json_value(row[name]) for name in attributes},
    )


def _spelled(idx: int, ids: pl.Series, text: str) -> str:
    return text if idx < 0 else str(ids[idx])

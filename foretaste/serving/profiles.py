"""What a caller tells of a user or an item that training never saw, as the model reads it."""

from collections.abc import Collection, Mapping
from typing import Literal, final

import numpy as np
import polars as pl
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from foretaste.data.features import FieldSide, FieldTable, concat_rows
from foretaste.data.features_values import cell_of
from foretaste.errors import DataError, did_you_mean
from foretaste.models.catalogue import placer
from foretaste.serving.items import NewItems, Told
from foretaste.training.trained import Trained

Role = Literal["user", "item", "place", "context"]
"""Whose features: `place` is an item that is given a vector, `item` one that is ranked."""
_WHOSE: dict[Role, str] = {
    "user": "users",
    "item": "items",
    "place": "items",
    "context": "the context",
}
_SHOWN = 5
"""Notes on new items in an answer."""


@final
class Profiles:
    """Encodes features by what training fitted: the same code, so the same bytes."""

    def __init__(self, trained: Trained) -> None:
        self._model, self._features = trained.model, trained.features
        events = trained.events
        tables = {"user": events.user_table, "item": events.item_table, "context": events.context}
        self._columns = {
            role: () if table is None else table.columns for role, table in tables.items()
        }

    def of_user(self, told: Mapping[str, object] | None, user_idx: int) -> FieldTable | None:
        """Return a user's features as one row; None if the model reads none or none says anything.

        Args:
            told: By the caller; without any, what the table of users says counts.
            user_idx: Row of that table; -1 for none.

        Raises:
            DataError: A feature is unknown, or its value of another kind.
        """
        features = self._features
        if features is None or features.user is None or not self._model.reads_profiles:
            return None
        if told:
            return self._row(features.user, told, "user")
        row = np.array([user_idx])
        return self.of_rows(row) if self.known(row)[0] else None

    def known(self, user_B: Int64[np.ndarray, " B"]) -> Bool[np.ndarray, " B"]:
        """Return of whom the table of users says something that the model reads; -1 is nobody."""
        table = None if self._features is None else self._features.user_table
        if table is None or not self._model.reads_profiles:
            return np.zeros(len(user_B), dtype=bool)
        told_B: np.ndarray = table.known_R.numpy()[user_B] & (user_B >= 0)
        return told_B

    def of_rows(self, user_B: Int64[np.ndarray, " B"]) -> FieldTable | None:
        """Return what the table of users says of some of its rows; None without a table."""
        table = None if self._features is None else self._features.user_table
        return None if table is None else table.rows(torch.from_numpy(user_B))

    def of_moment(self, told: Mapping[str, object] | None) -> FieldTable | None:
        """Return features of the moment as one row; None if none are read or none says anything.

        Raises:
            DataError: A feature is unknown, or its value of another kind.
        """
        features = self._features
        if not told or features is None or features.context is None:
            return None
        row = self._row(features.context, told, "context")
        return row if self._model.reads_context else None

    def item_vector(self, told: Mapping[str, object] | None) -> Float[Tensor, " D"] | None:
        """Return a new item's vector; None if the model cannot place it, or nothing is told.

        Raises:
            DataError: A feature is unknown, or its value of another kind.
        """
        model, side = placer(self._model), self._read_side("place")
        if not told or model is None or side is None:
            return None
        row = self._row(side, told, "item")
        return None if row is None else model.item_from_features(row)[0]

    def of_items(self, told: Told) -> NewItems | None:
        """Return new items that the model can rank by what is told; None if there are none.

        Args:
            told: What is known of each.

        Raises:
            DataError: A feature is unknown, or its value of another kind.
        """
        side = self._read_side("item")
        if not told or side is None:
            return None
        rows = {item_id: self._row(side, said, "item") for item_id, said in told.items()}
        found = {item_id: row for item_id, row in rows.items() if row is not None}
        if not found:
            return None
        return NewItems(
            {item_id: told[item_id] for item_id in found}, concat_rows([*found.values()])
        )

    def without_influence(
        self,
        role: Role,
        given: Mapping[str, object] | None,
        *,
        known: str = "",
        may_be_unread: bool = False,
    ) -> tuple[str, ...]:
        """Say which of the features given had no influence on an answer, and why.

        Args:
            role: Whose they are.
            given: From column to value.
            known: The user or item, if training knows it: then its own are read.
            may_be_unread: Whether columns that the model does not read have another use.
        """
        if not given:
            return ()
        side, whose = self._read_side(role), _WHOSE[role]
        if side is None:
            return (f"the features given had no influence: this model reads none of {whose} here",)
        if known:
            return (
                f"the features given had no influence: training knows {known} by its own features",
            )
        if all(_is_missing(cell_of(*feature)) for feature in given.items()):
            return (f"the features given of {whose} had no influence: all are missing",)
        said = [_unknown(side, *feature) for feature in given.items() if feature[0] in side.columns]
        unread = [name for name in given if name not in side.columns]
        if unread and not may_be_unread:
            said.append(
                f"{', '.join(unread)} had no influence: of {whose} this model reads "
                f"{', '.join(side.columns)}"
            )
        return tuple(filter(None, said))

    def about_new_items(
        self, given: Told, unknown: Collection[object], placed: Told
    ) -> tuple[str, ...]:
        """Say which new items, or features of theirs, had no influence on an answer, and why.

        Args:
            given: All of the request.
            unknown: Those that the answer leaves out.
            placed: Those of which a feature says something.
        """
        said: list[str] = []
        known = [
            repr(item_id) for item_id in given if item_id not in unknown and item_id not in placed
        ]
        if known:
            said.append(
                f"the features given had no influence: training knows the new items "
                f"{', '.join(known[:_SHOWN])}{', …' * (len(known) > _SHOWN)} by their own features"
            )
        if any(item_id in unknown for item_id in placed):
            said.append("the features given had no influence: the answer is the most popular items")
        for item_id, features in given.items():
            if item_id in unknown or item_id in placed:
                about = self.without_influence("item", features, may_be_unread=item_id in placed)
                said += [f"new item {item_id!r}: {sentence}" for sentence in about]
        more = [f"{len(said) - _SHOWN} more notes on new items"] if len(said) > _SHOWN else []
        return (*said[:_SHOWN], *more)

    def _read_side(self, role: Role) -> FieldSide | None:
        """Return the features of a role that the model reads of what is new to it."""
        features = self._features
        if features is None:
            return None
        match role:
            case "user":
                return features.user if self._model.reads_profiles else None
            case "context":
                return features.context if self._model.reads_context else None
            case "place":
                return features.item if placer(self._model) is not None else None
        return features.item if self._scores_new_items else None

    @property
    def _scores_new_items(self) -> bool:
        return self._model.second_stage.scores_new_items

    def _row(self, side: FieldSide, told: Mapping[str, object], role: str) -> FieldTable | None:
        """Encode what the model reads; other columns of the same table may be told too."""
        for name in told:
            if name not in side.columns and name not in self._columns[role]:
                whose = "the context" if role == "context" else f"{role}s"
                raise DataError(
                    f"{name!r} is not a feature of {whose}; the model reads "
                    f"{', '.join(side.columns)}"
                    f"{did_you_mean(name, side.columns)}",
                    name=name,
                )
        read = [cell_of(name, value) for name, value in told.items() if name in side.columns]
        row = side.encode(pl.DataFrame(read)) if read else None
        return row if row is not None and bool(row.present_RF.any()) else None


def _unknown(side: FieldSide, name: str, value: object) -> str:
    """Say why a feature says nothing to the model; empty if it does, or is missing."""
    cell = cell_of(name, value)
    if _is_missing(cell) or name in side.columns_read(side.encode(pl.DataFrame([cell]))):
        return ""
    parts = value if isinstance(value, list | tuple) else [value]
    near = side.nearest_value(name, str(parts[0])) if parts else None
    hint = f" (text must be equal: it has {near!r})" if near else ""
    return f"{name} = {value!r} had no influence: training has no such value{hint}"


def _is_missing(cell: pl.Series) -> bool:
    """Return whether a value says nothing to any model: null, an empty list, a vector of zeros."""
    if not isinstance(cell.dtype, pl.List):
        return bool(cell.null_count())
    parts = cell.explode().drop_nulls()
    return not len(parts) or (parts.dtype.is_float() and bool((parts == 0).all()))

"""What a caller tells of a user or an item that training never saw, as the model reads it."""

from collections.abc import Mapping
from typing import final

import numpy as np
import polars as pl
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from foretaste.data.features import FieldSide, FieldTable, concat_rows
from foretaste.data.features_values import cell_of
from foretaste.errors import DataError, did_you_mean
from foretaste.models.interface import JudgesNewItems, Ranker
from foretaste.models.two_stage import placer, reads_moments, reads_profiles, second_stage
from foretaste.serving.new_items import NewItems, Told
from foretaste.training.trained import Trained


@final
class Profiles:
    """Encodes features by what training fitted: the same code, so the same bytes."""

    def __init__(self, trained: Trained) -> None:
        self._model, self._features = trained.model, trained.features
        events = trained.events
        self._columns = {
            "user": () if events.user_table is None else events.user_table.columns,
            "item": () if events.item_table is None else events.item_table.columns,
            "moment": () if events.context is None else events.context.columns,
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
        if features is None or features.user is None or not reads_profiles(self._model):
            return None
        if told:
            return self._row(features.user, told, "user")
        row = np.array([user_idx])
        return self.of_rows(row) if self.known(row)[0] else None

    def known(self, user_B: Int64[np.ndarray, " B"]) -> Bool[np.ndarray, " B"]:
        """Return of whom the table of users says something that the model reads; -1 is nobody."""
        table = None if self._features is None else self._features.user_table
        if table is None or not reads_profiles(self._model):
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
        row = self._row(features.context, told, "moment")
        return row if reads_moments(self._model) else None

    def item_vector(self, told: Mapping[str, object] | None) -> Float[Tensor, " D"] | None:
        """Return a new item's vector; None if the model cannot place it, or nothing is told.

        Raises:
            DataError: A feature is unknown, or its value of another kind.
        """
        model, features = placer(self._model), self._features
        if not told or model is None or features is None or features.item is None:
            return None
        row = self._row(features.item, told, "item")
        return None if row is None else model.item_from_features(row)[0]

    def of_items(self, told: Told) -> NewItems | None:
        """Return new items that the model can rank by what is told; None if there are none.

        Args:
            told: What is known of each.

        Raises:
            DataError: A feature is unknown, or its value of another kind.
        """
        features, ranker = self._features, second_stage(self._model)
        if isinstance(ranker, Ranker):
            can = isinstance(ranker, JudgesNewItems) and ranker.judges_new_items
        else:
            can = placer(self._model) is not None
        if not told or not can or features is None or features.item is None:
            return None
        side = features.item
        rows = {item_id: self._row(side, said, "item") for item_id, said in told.items()}
        found = {item_id: row for item_id, row in rows.items() if row is not None}
        if not found:
            return None
        return NewItems(
            {item_id: told[item_id] for item_id in found}, concat_rows([*found.values()])
        )

    def _row(self, side: FieldSide, told: Mapping[str, object], role: str) -> FieldTable | None:
        """Encode what the model reads; other columns of the same table may be told too."""
        for name in told:
            if name not in side.columns and name not in self._columns[role]:
                raise DataError(
                    f"{name!r} is no feature of {role}s; the model reads {', '.join(side.columns)}"
                    f"{did_you_mean(name, side.columns)}"
                )
        read = [cell_of(name, value) for name, value in told.items() if name in side.columns]
        row = side.encode(pl.DataFrame(read)) if read else None
        return row if row is not None and bool(row.present_RF.any()) else None

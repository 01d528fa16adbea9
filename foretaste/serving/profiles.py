"""Users and items of a request: mapping between ids and rows, and given features of new users and
items.
"""

from collections.abc import Collection, Mapping
from functools import cached_property
from typing import Any, Literal, NamedTuple, final

import numpy as np
import polars as pl
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from foretaste.data.features import FieldSide, FieldTable, concat_rows
from foretaste.data.features_values import cell_of
from foretaste.data.interactions import Interactions
from foretaste.errors import DataError, did_you_mean
from foretaste.models.base import TopK
from foretaste.models.catalogue import Judged, placer
from foretaste.training.trained import Trained

KEPT_AS_LISTS = 200_000
"""Item tables up to this length are stored as Python lists, from which rows are read ten times
faster."""


@final
class KnownItems:
    """The catalogue that a model ranks; an id outside of it is an unknown id."""

    def __init__(self, events: Interactions, known_I: Bool[np.ndarray, " I"]) -> None:
        """Read ids and attributes from events, and store which items are ranked."""
        self._events, self._known_I = events, known_I

    @cached_property
    def num_known(self) -> int:
        """Number of ranked items."""
        return int(self._known_I.sum())

    @property
    def num_items(self) -> int:
        """Number of items in the catalogue, ranked or not."""
        return self._events.num_items

    def mask_of(
        self, name: str, item_ids: object, unknown: dict[int | str, None]
    ) -> Bool[Tensor, " I"]:
        """Return a mask of the known ids; arguments and errors are those of `rows_of`."""
        mask_I = torch.zeros(self.num_items, dtype=torch.bool)
        mask_I[torch.from_numpy(self.rows_of(name, item_ids, unknown))] = True
        return mask_I

    def rows_of(
        self, name: str, item_ids: object, unknown: dict[int | str, None]
    ) -> Int64[np.ndarray, " N"]:
        """Return the item_idx of known ids, and add the unknown ids to `unknown`, without
        duplicates.

        Args:
            name: Name of the ids in the request, for errors.
            item_ids: The given ids; see `Ids`. None means no ids.
            unknown: Receives the unknown ids.

        Raises:
            DataError: The value is not a sequence of ids, or one of them is not an id.
        """
        if item_ids is None:
            return np.empty(0, dtype=np.int64)
        plain, row_N = self.find(name, item_ids)
        unknown.update({plain[at]: None for at in np.flatnonzero(row_N < 0)})
        return row_N[row_N >= 0]

    def find(self, name: str, item_ids: object) -> tuple[list[int | str], Int64[np.ndarray, " N"]]:
        """Return ids as answers show them, and their item_idx, -1 for items that are not ranked.

        Arguments and errors are those of `rows_of`.
        """
        plain, row_N = self._events.items.find_all_given(item_ids, name=name)
        row_N[(row_N >= 0) & ~self._known_I[row_N]] = -1
        return plain, row_N

    def row_of(self, name: str, item_id: object) -> int:
        """Return the item_idx of one id, ranked or not; -1 if it is not in the catalogue.

        Raises:
            DataError: The value is not an id.
        """
        return self._events.items.find_given(item_id, name=name)

    def ranks(self, row: int) -> bool:
        """Return whether an item_idx (-1 for none) is a ranked item's."""
        return row >= 0 and bool(self._known_I[row])

    def ids_of(self, item_idx: list[int]) -> list[int | str]:
        """Return the external ids of rows."""
        ids = self._ids
        return [ids[row] for row in item_idx]

    def attributes(self, item_idx: list[int]) -> list[Mapping[str, object]]:
        """Return each row's values in the item table; empty mappings without a table."""
        table = self._flat_table
        if table is None:
            return [{} for _ in item_idx]
        if len(table) > KEPT_AS_LISTS:
            return list(table[item_idx].to_dicts())
        columns = self._columns
        return [{name: column[row] for name, column in columns.items()} for row in item_idx]

    @cached_property
    def _ids(self) -> list[int | str]:
        ids: list[int | str] = self._events.items.ids.to_list()
        return ids

    @cached_property
    def _flat_table(self) -> pl.DataFrame | None:
        """Return the columns that an answer can show: without vectors and nested values."""
        table = self._events.item_table
        if table is None:
            return None
        flat = [
            name
            for name, dtype in table.schema.items()
            if not dtype.is_nested() and dtype != pl.Binary
        ]
        return table.select(flat) if flat else None

    @cached_property
    def _columns(self) -> dict[str, list[object]]:
        table = self._flat_table
        return {} if table is None else {name: table[name].to_list() for name in table.columns}


Sent = Mapping[Any, Mapping[str, object]]
"""Features of new items: item id (text or number) to a mapping from columns of the item table to
values."""


class NewItems(NamedTuple):
    """The new items of a request that have an informative feature, in the order of the request."""

    sent: Sent
    """The features as given in the request."""
    table: FieldTable
    """The encoded features; R rows."""

    def only(self, keep_R: Bool[np.ndarray, " R"]) -> "NewItems":
        """Return some of the new items."""
        kept = zip(self.sent.items(), keep_R.tolist(), strict=True)
        return NewItems(
            {item_id: said for (item_id, said), keep in kept if keep},
            self.table.rows(torch.from_numpy(np.flatnonzero(keep_R))),
        )


def beside(
    found: TopK, score_BR: Float[Tensor, "B R"], *, num_items: int, at: int | None = None
) -> TopK:
    """Insert new items into a ranking after its first `at` items; None: at the end."""
    at = found.item_BK.shape[1] if at is None else at
    item_BR = torch.arange(num_items, num_items + score_BR.shape[1]).expand_as(score_BR)
    return TopK(
        item_BK=_into(found.item_BK, item_BR, at), score_BK=_into(found.score_BK, score_BR, at)
    )


def both(judged: Judged, new: Judged) -> Judged:
    """Append the predictions of new items to those of the others."""
    return Judged(
        torch.cat([judged.score_BC, new.score_BC], dim=1),
        {
            name: torch.cat([value_BC, new.prediction[name]], dim=1)
            for name, value_BC in judged.prediction.items()
        },
    )


def best_of(found: TopK, k: int) -> TopK:
    """Return the K best items of a ranking; ties keep its order."""
    score_BK, order_BK = found.score_BK.sort(dim=1, descending=True, stable=True)
    return TopK(item_BK=found.item_BK.gather(1, order_BK[:, :k]), score_BK=score_BK[:, :k])


def _into(first_BC: Tensor, new_BR: Tensor, at: int) -> Tensor:
    return torch.cat([first_BC[:, :at], new_BR, first_BC[:, at:]], dim=1)


Role = Literal["user", "item", "place", "context"]
"""The owner of given features: `place` means an item that gets a vector, `item` one that is
ranked."""
_WHOSE: dict[Role, str] = {
    "user": "users",
    "item": "items",
    "place": "items",
    "context": "the context",
}
_SHOWN = 5
"""Maximum number of notes on new items in an answer."""


@final
class Profiles:
    """Encodes given features with the encoders that were fitted in training."""

    def __init__(self, trained: Trained) -> None:
        self._model, self._features = trained.model, trained.features
        events = trained.events
        tables = {"user": events.user_table, "item": events.item_table, "context": events.context}
        self._columns = {
            role: () if table is None else table.columns for role, table in tables.items()
        }

    def of_user(self, sent: Mapping[str, object] | None, user_idx: int) -> FieldTable | None:
        """Return a user's features as one row; None if the model reads none or all are missing.

        Args:
            sent: Features given by the caller; without any, those in the user table are used.
            user_idx: Row of the user table; -1 for none.

        Raises:
            DataError: A feature is unknown, or its value has another type.
        """
        features = self._features
        if features is None or features.user is None or not self._model.reads_profiles:
            return None
        if sent:
            return self._row(features.user, sent, "user")
        row = np.array([user_idx])
        return self.of_rows(row) if self.known(row)[0] else None

    def known(self, user_B: Int64[np.ndarray, " B"]) -> Bool[np.ndarray, " B"]:
        """Return which users have features in the user table that the model reads; -1 has none."""
        table = None if self._features is None else self._features.user_table
        if table is None or not self._model.reads_profiles:
            return np.zeros(len(user_B), dtype=bool)
        told_B: np.ndarray = table.known_R.numpy()[user_B] & (user_B >= 0)
        return told_B

    def of_rows(self, user_B: Int64[np.ndarray, " B"]) -> FieldTable | None:
        """Return the features of some rows of the user table; None without a table."""
        table = None if self._features is None else self._features.user_table
        return None if table is None else table.rows(torch.from_numpy(user_B))

    def of_moment(self, sent: Mapping[str, object] | None) -> FieldTable | None:
        """Return context features as one row; None if the model reads none or all are missing.

        Raises:
            DataError: A feature is unknown, or its value has another type.
        """
        features = self._features
        if not sent or features is None or features.context is None:
            return None
        row = self._row(features.context, sent, "context")
        return row if self._model.reads_context else None

    def item_vector(self, sent: Mapping[str, object] | None) -> Float[Tensor, " D"] | None:
        """Return a new item's vector; None if the model cannot embed it, or it has no features.

        Raises:
            DataError: A feature is unknown, or its value has another type.
        """
        model, side = placer(self._model), self._read_side("place")
        if not sent or model is None or side is None:
            return None
        row = self._row(side, sent, "item")
        return None if row is None else model.item_from_features(row)[0]

    def of_items(self, sent: Sent) -> NewItems | None:
        """Return new items that the model can rank by their features; None if there are none.

        Args:
            sent: The features of each new item.

        Raises:
            DataError: A feature is unknown, or its value has another type.
        """
        side = self._read_side("item")
        if not sent or side is None:
            return None
        rows = {item_id: self._row(side, said, "item") for item_id, said in sent.items()}
        found = {item_id: row for item_id, row in rows.items() if row is not None}
        if not found:
            return None
        return NewItems(
            {item_id: sent[item_id] for item_id in found}, concat_rows([*found.values()])
        )

    def without_influence(
        self,
        role: Role,
        given: Mapping[str, object] | None,
        *,
        known: str = "",
        may_be_unread: bool = False,
    ) -> tuple[str, ...]:
        """Return notes on the given features that had no influence on an answer, with reasons.

        Args:
            role: Whose features they are.
            given: Column to value.
            known: The user or item, if it is in the training data, whose features are then used.
            may_be_unread: Whether columns that the model does not read have another use.
        """
        if not given:
            return ()
        side, whose = self._read_side(role), _WHOSE[role]
        if side is None:
            return (f"the features given had no influence: this model reads none of {whose} here",)
        if known:
            return (f"the features given had no influence: {known} is in training",)
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
        self, given: Sent, unknown: Collection[object], placed: Sent
    ) -> tuple[str, ...]:
        """Return notes on new items and their features that had no influence, with reasons.

        Args:
            given: All new items of the request.
            unknown: New items that the answer leaves out.
            placed: New items with an informative feature.
        """
        said: list[str] = []
        known = [
            repr(item_id) for item_id in given if item_id not in unknown and item_id not in placed
        ]
        if known:
            said.append(
                f"the features given had no influence: the new items "
                f"{', '.join(known[:_SHOWN])}{', …' * (len(known) > _SHOWN)} are in training"
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
        """Return the feature encoders that the model uses for a new user or item of this role."""
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

    def _row(self, side: FieldSide, sent: Mapping[str, object], role: str) -> FieldTable | None:
        """Encode the features that the model reads; other columns of the table may be given too."""
        for name in sent:
            if name not in side.columns and name not in self._columns[role]:
                whose = "the context" if role == "context" else f"{role}s"
                raise DataError(
                    f"{name!r} is not a feature of {whose}; the model reads "
                    f"{', '.join(side.columns)}"
                    f"{did_you_mean(name, side.columns)}",
                    name=name,
                )
        read = [cell_of(name, value) for name, value in sent.items() if name in side.columns]
        row = side.encode(pl.DataFrame(read)) if read else None
        return row if row is not None and bool(row.present_RF.any()) else None


def _unknown(side: FieldSide, name: str, value: object) -> str:
    """Return why a feature has no influence; empty if it has some, or is missing."""
    cell = cell_of(name, value)
    if _is_missing(cell) or name in side.columns_read(side.encode(pl.DataFrame([cell]))):
        return ""
    parts = value if isinstance(value, list | tuple) else [value]
    near = side.nearest_value(name, str(parts[0])) if parts else None
    hint = f" (text must be equal: it has {near!r})" if near else ""
    return f"{name} = {value!r} had no influence: training has no such value{hint}"


def _is_missing(cell: pl.Series) -> bool:
    """Return whether a value is missing for any model: null, an empty list, a vector of zeros."""
    if not isinstance(cell.dtype, pl.List):
        return bool(cell.null_count())
    parts = cell.explode().drop_nulls()
    return not len(parts) or (parts.dtype.is_float() and bool((parts == 0).all()))

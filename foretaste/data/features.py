"""Features of users, items and contexts: fitted on training once, encoded once, looked up by row.

Shape legend: R rows.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import polars as pl
from jaxtyping import Bool
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from foretaste.arguments import checked
from foretaste.config import Config
from foretaste.data.batch import FieldTable, concat_rows, of_tensors
from foretaste.data.features_fit import FieldSide, columns_of, fit_field
from foretaste.data.features_fitted import (
    Bag,
    Buckets,
    Categories,
    Cross,
    Number,
    Sentence,
    Vector,
)
from foretaste.data.features_schema import FeatureSchema, FieldConfig
from foretaste.data.features_values import moved
from foretaste.data.folder import check_place, whole_file
from foretaste.data.interactions import Interactions
from foretaste.errors import BundleError, ConfigError, DataError, nearest
from foretaste.shown import Shown

__all__ = ["Features", "FieldSide", "FieldTable", "concat_rows", "fit_features"]

_JSON, _TENSORS = "features.json", "features.safetensors"


class _Stored(Config):
    """The content of `features.json`."""

    format: Literal["foretaste-features"] = "foretaste-features"
    """Identifies the folder as features."""
    version: Literal[1] = 1
    """Version of the folder's format."""
    user: FieldSide | None
    """The fitted fields of users; None without any."""
    item: FieldSide | None
    """The fitted fields of items; None without any."""
    context: FieldSide | None = None
    """The fitted fields of the context; None without any."""
    notes: tuple[str, ...]
    """What fitting left out or merged."""


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Features(Shown):
    """The fitted encoders, and the encoded rows of all users, items and events."""

    user: FieldSide | None
    """None if nothing is known about users."""
    item: FieldSide | None
    user_table: FieldTable | None = None
    """One row per user_idx."""
    item_table: FieldTable | None = None
    """One row per item_idx."""
    context: FieldSide | None = None
    """None if nothing is known about the context of an event."""
    context_table: FieldTable | None = None
    """One row for each event that was used in fitting or given to `of`; it is not saved, because no
    other event has these rows."""
    notes: tuple[str, ...] = ()
    """What fitting left out, merged or found, with counts."""
    events: Interactions | None = None
    """The events whose users, items and context the rows describe; it is not saved."""

    @checked
    def of(self, events: Interactions) -> "Features":
        """Return the tables of other events, encoded by the fitted fields.

        Raises:
            DataError: A column does not have its field's kind.
        """
        return replace(
            self,
            user_table=_encode("user", self.user, events),
            item_table=_encode("item", self.item, events),
            context_table=self.context_of(events),
            events=events,
        )

    @checked
    def for_training(self, events: Interactions) -> "Features":
        """Return the encoded tables of events to train on, which may differ from the fitted ones.

        Raises:
            ConfigError: The events lack a column of a fitted field.
            DataError: A column does not have its field's kind.
        """
        if self.events is events:
            return self
        _check_columns("user", self.user, events.user_table)
        _check_columns("item", self.item, events.item_table)
        _check_columns("context", self.context, events.context)
        own = self.events
        if own is None or not (own.users.same_as(events.users) and own.items.same_as(events.items)):
            return self.of(events)
        return replace(self, context_table=self.context_of(events), events=events)

    @checked
    def context_of(self, events: Interactions) -> FieldTable | None:
        """Return only the encoded context of other events; None without context features.

        Raises:
            DataError: A column does not have its field's kind.
        """
        return _encode("context", self.context, events)

    @checked
    def save(self, folder: Path | str, *, replace: bool = False) -> None:
        """Write `features.json` and `features.safetensors` into a folder.

        Args:
            folder: It is made if it is missing.
            replace: Replace existing files.

        Raises:
            DataError: The files exist and `replace` is false, or they cannot be written.
        """
        folder = Path(folder)
        for name in (_JSON, _TENSORS):
            check_place(folder / name, replace=replace)
        stored = _Stored(user=self.user, item=self.item, context=self.context, notes=self.notes)
        tensors = {
            f"{role}.{name}": tensor.contiguous()
            for role, table in (("user", self.user_table), ("item", self.item_table))
            if table is not None
            for name, tensor in table.tensors().items()
        }
        with whole_file(folder / _TENSORS, replace=replace) as part:
            save_file(tensors, part)
        with whole_file(folder / _JSON, replace=replace) as part:
            part.write_text(stored.model_dump_json(), encoding="utf-8")

    @staticmethod
    @checked
    def load(folder: Path | str) -> "Features":
        """Read what `save` wrote.

        Raises:
            BundleError: A file is missing or broken, or was written by a later foretaste.
        """
        folder = Path(folder)
        try:
            text = (folder / _JSON).read_text(encoding="utf-8")
            stored = _Stored.model_validate_json(text)
            tensors = load_file(folder / _TENSORS)
            return Features(
                user=stored.user,
                item=stored.item,
                user_table=_load_table("user", stored.user, tensors),
                item_table=_load_table("item", stored.item, tensors),
                context=stored.context,
                notes=stored.notes,
            )
        except (OSError, ValidationError, SafetensorError, KeyError) as error:
            reason = str(error).strip().splitlines()[0]
            raise BundleError(
                f"the features in {folder} cannot be read ({reason}): the files are damaged or "
                "were written by a newer version",
                name=str(folder),
                value=str(folder),
            ) from error

    def _facts(self) -> dict[str, object]:
        sides = {"user": self.user, "item": self.item, "context": self.context}
        return {
            f"{name}:": ", ".join(side.names) for name, side in sides.items() if side is not None
        }


@checked
def fit_features(schema: FeatureSchema, events: Interactions) -> Features:
    """Fit the fields of a schema to training, and encode users, items and training's context.

    Only rows of users and items with an event are used in fitting; a value that only other rows
    have is encoded as unseen. A field without a value on such a row is left out, with a note.

    Args:
        schema: Which columns are features.
        events: The training events, with the tables of all users and items.

    Raises:
        ConfigError: The schema names a column that does not exist.
        DataError: A column does not have its field's kind; the message names the value and its user
            or item.
    """
    notes: list[str] = []
    _refuse_left_out(schema.user, events.user_table, events.notes)
    _refuse_left_out(schema.item, events.item_table, events.notes)
    sides = {}
    for role, fields, frame, trained_R in (
        ("user", schema.user, events.user_table, np.diff(events.offsets) > 0),
        ("item", schema.item, events.item_table, events.item_count > 0),
        ("context", schema.context, events.context, np.ones(len(events), np.bool_)),
    ):
        with _named_by_id(role, events):
            sides[role] = _fit_side(role, fields, frame, trained_R, notes)
    user, item, context = sides.values()
    return Features(user=user, item=item, context=context, notes=tuple(notes)).of(events)


_ABSENT = {
    "user": "and there is no table of users: read one with users=, or leave the fields out",
    "item": "and there is no table of items: read one with items=, or leave the fields out",
    "context": "and the events have no context: read its columns with context=, or leave the "
    "fields out",
}
_TABLE = {"user": "table of users", "item": "table of items", "context": "events' context"}


def _fit_side(
    role: str,
    schema: Mapping[str, FieldConfig],
    frame: pl.DataFrame | None,
    trained_R: Bool[np.ndarray, " R"],
    notes: list[str],
) -> FieldSide | None:
    if not schema:
        return None
    if frame is None:
        raise ConfigError(
            f"the schema has {role} fields ({', '.join(schema)}), {_ABSENT[role]}", name=role
        )
    kinds: dict[type, list[object]] = {}
    for name, field in schema.items():
        columns = [_column(role, column, frame) for column in columns_of(name, field)]
        fitted, note = fit_field(name, field, columns, trained_R)
        if note:
            notes.append(f"{role} field {name!r} {note}")
        if fitted is not None:
            kinds.setdefault(type(fitted), []).append(fitted)
    if not kinds:
        return None
    return FieldSide.model_validate(
        {
            "codes": tuple(f for k in (Categories, Buckets, Cross) for f in kinds.get(k, ())),
            "bags": tuple(kinds.get(Bag, ())),
            "numbers": tuple(kinds.get(Number, ())),
            "vectors": (*kinds.get(Vector, ()), *kinds.get(Sentence, ())),
        }
    )


def _check_columns(role: str, side: FieldSide | None, frame: pl.DataFrame | None) -> None:
    if side is not None and frame is None:
        raise ConfigError(
            f"the features have {role} fields ({', '.join(side.columns)}), {_ABSENT[role]}",
            name=role,
        )
    if side is not None and frame is not None:
        for name in side.columns:
            _column(role, name, frame)


def _column(role: str, name: str, frame: pl.DataFrame) -> pl.Series:
    if name not in frame.columns:
        raise ConfigError(_no_column(role, name, frame.columns), name=name, column=name)
    return frame[name]


def _no_column(role: str, name: str, columns: Sequence[str]) -> str:
    near = nearest(name, columns)
    advice = f"did you mean {near!r}?" if near else "name one of them, or leave the field out"
    return (
        f"the schema names {role} column {name!r}, but the {_TABLE[role]} has "
        f"{', '.join(map(repr, columns))}: {advice}"
    )


def _encode(role: str, side: FieldSide | None, events: Interactions) -> FieldTable | None:
    if side is None:
        return None
    frame, num_rows = {
        "user": (events.user_table, events.num_users),
        "item": (events.item_table, events.num_items),
        "context": (events.context, len(events)),
    }[role]
    with _named_by_id(role, events):
        return side.unknown(num_rows) if frame is None else side.encode(frame)


@contextmanager
def _named_by_id(role: str, events: Interactions) -> Iterator[None]:
    """Name the user or item of an invalid value: rows here are not in the caller's order."""
    try:
        yield
    except DataError as error:
        if error.row is None:
            raise
        raise moved(error, _whose(role, events, error.row - 1)) from error


def _whose(role: str, events: Interactions, row: int) -> str:
    if role != "context":
        ids = events.users.ids if role == "user" else events.items.ids
        return f"{role} {ids[row]!r}"
    user = events.users.ids[int(np.searchsorted(events.offsets, row, side="right")) - 1]
    return f"the event of user {user!r} and item {events.items.ids[int(events.item_idx[row])]!r}"


def _refuse_left_out(
    fields: Iterable[str], table: pl.DataFrame | None, notes: Sequence[str]
) -> None:
    """Raise an error, with the reason, for a column that was left out when its table was read."""
    there = () if table is None else table.columns
    for name in (field for field in fields if field not in there):
        for note in notes:
            if f"column {name!r} " in note and "left out" in note:
                raise DataError(f"the schema names a column that is not there: {note}", column=name)


def _load_table(
    role: str, side: FieldSide | None, tensors: Mapping[str, Tensor]
) -> FieldTable | None:
    if side is None:
        return None
    own = {
        name.removeprefix(f"{role}."): tensor
        for name, tensor in tensors.items()
        if name.startswith(f"{role}.")
    }
    return of_tensors(own, len(side.vectors))

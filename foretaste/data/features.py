"""Features of users and items: fitted on training once, encoded once, looked up by row.

All categories of a side share one space of codes, so that a model keeps one table and looks a
batch up in one pass. Training and serving encode by the same `FieldSide`, row by row.

Shape legend: R rows, B picked rows, C single-valued fields (codes), G bags, N values of all bags,
M numbers, F fields of all kinds, W width of a vector field.
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path

import numpy as np
import polars as pl
import torch
from jaxtyping import Bool, Float32, Int64
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from foretaste.config import Config
from foretaste.data.features_fitted import (
    Bag,
    Buckets,
    Categories,
    Codes,
    Number,
    Sentence,
    Vector,
    Vectorised,
    fit_field,
)
from foretaste.data.fields import FeatureSchema, FieldConfig
from foretaste.data.interactions import Interactions
from foretaste.errors import BundleError, ConfigError


@dataclass(frozen=True, eq=False, kw_only=True)
class FieldTable:
    """Rows of encoded features. Fields stand in the order codes, bags, numbers, vectors."""

    code_RC: Int64[Tensor, "R C"]
    """One code of the side's space for each single-valued field."""
    bag_N: Int64[Tensor, " N"]
    """Codes of all bags, row by row and, within a row, bag by bag; no bag is empty."""
    bag_offsets_RG1: Int64[Tensor, "R G1"]
    """Bag g of row r: `bag_N[bag_offsets_RG1[r, g] : bag_offsets_RG1[r, g + 1]]`."""
    number_RM: Float32[Tensor, "R M"]
    """Standardised; 0 where missing."""
    vectors: tuple[Float32[Tensor, "R _"], ...]
    """One matrix a vector field; zeros where missing."""
    present_RF: Bool[Tensor, "R F"]
    """Which fields say something: neither missing nor a value of which training taught nothing."""

    def __len__(self) -> int:
        return len(self.code_RC)

    @property
    def known_R(self) -> Bool[Tensor, " R"]:
        """Which rows have a feature that says something."""
        return self.present_RF.any(dim=1)

    def rows(self, row_B: Int64[Tensor, " B"]) -> "FieldTable":
        """Return some rows, in the order given; each in `[0, R)`."""
        offsets_BG1 = self.bag_offsets_RG1.index_select(0, row_B)
        start_B = offsets_BG1[:, 0]
        length_B = offsets_BG1[:, -1] - start_B
        first_B = length_B.cumsum(0) - length_B
        shift_B = start_B - first_B
        place_N = torch.arange(int(length_B.sum()), device=row_B.device)
        return FieldTable(
            code_RC=self.code_RC.index_select(0, row_B),
            bag_N=self.bag_N[place_N + shift_B.repeat_interleave(length_B)],
            bag_offsets_RG1=offsets_BG1 - shift_B.unsqueeze(1),
            number_RM=self.number_RM.index_select(0, row_B),
            vectors=tuple(vector.index_select(0, row_B) for vector in self.vectors),
            present_RF=self.present_RF.index_select(0, row_B),
        )

    def to(self, device: torch.device) -> "FieldTable":
        """Return the table on a device."""
        tensors = {name: tensor.to(device) for name, tensor in self._tensors().items()}
        return _of_tensors(tensors, len(self.vectors))

    def _tensors(self) -> dict[str, Tensor]:
        """Return every tensor by a name of its own."""
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "vectors"}
        return plain | {f"vector-{n}": vector for n, vector in enumerate(self.vectors)}


def concat_rows(tables: Sequence[FieldTable]) -> FieldTable:
    """Put tables of one side one below the other; there is at least one."""
    parts = [table._tensors() for table in tables]
    before = 0
    for part in parts:
        part["bag_offsets_RG1"] = part["bag_offsets_RG1"] + before
        before += len(part["bag_N"])
    together = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return _of_tensors(together, len(tables[0].vectors))


def _of_tensors(tensors: Mapping[str, Tensor], num_vectors: int) -> FieldTable:
    return FieldTable(
        code_RC=tensors["code_RC"],
        bag_N=tensors["bag_N"],
        bag_offsets_RG1=tensors["bag_offsets_RG1"],
        number_RM=tensors["number_RM"],
        vectors=tuple(tensors[f"vector-{n}"] for n in range(num_vectors)),
        present_RF=tensors["present_RF"],
    )


class FieldSide(Config):
    """The fitted fields of users or of items: from the caller's columns to a `FieldTable`."""

    codes: tuple[Codes, ...] = ()
    """Single-valued fields: categories and bucketised numbers."""
    bags: tuple[Bag, ...] = ()
    numbers: tuple[Number, ...] = ()
    vectors: tuple[Vectorised, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The fields' columns, in the order of `FieldTable.present_RF`."""
        return tuple(field.name for field in self._fields)

    @property
    def num_fields(self) -> int:
        """Fields of all kinds."""
        return len(self._fields)

    @property
    def num_codes(self) -> int:
        """Codes of all fields together."""
        return self._starts[-1]

    @property
    def num_numbers(self) -> int:
        """Standardised numbers."""
        return len(self.numbers)

    @property
    def vector_widths(self) -> tuple[int, ...]:
        """The width of each vector field."""
        return tuple(vector.width for vector in self.vectors)

    @property
    def untaught_codes(self) -> tuple[int, ...]:
        """Codes that stand for no value: missing, and unseen or rare."""
        codes = [
            start + code
            for field, start in zip(self.codes, self._starts, strict=False)
            for code in field.untaught
        ]
        bags = [start + code for start in self._starts[len(self.codes) : -1] for code in (0, 1)]
        return (*codes, *bags)

    @property
    def _fields(self) -> tuple[Categories | Buckets | Bag | Number | Vector | Sentence, ...]:
        return (*self.codes, *self.bags, *self.numbers, *self.vectors)

    @cached_property
    def _starts(self) -> list[int]:
        """The first code of each single-valued field and of each bag, and the end."""
        sizes = [field.num_codes for field in self.codes]
        sizes += [bag.values.num_codes for bag in self.bags]
        return [0, *np.cumsum(sizes, dtype=np.int64).tolist()]

    def encode(self, frame: pl.DataFrame) -> FieldTable:
        """Encode rows; a row's result does not depend on the others.

        A column that the frame lacks is missing in every row; further columns do not matter.

        Raises:
            DataError: A column is not of its field's kind; the message names row and value.
            ConfigError: A text needs an encoder that is not there.
        """
        num_rows = frame.height
        columns = {
            name: frame[name] if name in frame.columns else _missing(name, num_rows)
            for name in self.names
        }
        present = np.zeros((num_rows, self.num_fields), np.bool_)
        code_RC = np.zeros((num_rows, len(self.codes)), np.int64)
        for place, field in enumerate(self.codes):
            local_R = field.encode(columns[field.name])
            present[:, place] = field.says(local_R)
            code_RC[:, place] = local_R + self._starts[place]
        bag_N, offsets_RG1 = self._encode_bags(columns, present)
        number_RM = np.zeros((num_rows, len(self.numbers)), np.float32)
        after = len(self.codes) + len(self.bags)
        for place, number in enumerate(self.numbers):
            number_RM[:, place], present[:, after + place] = number.encode(columns[number.name])
        after += len(self.numbers)
        vectors = []
        for place, vector in enumerate(self.vectors):
            value_RW, present[:, after + place] = vector.encode(columns[vector.name])
            vectors.append(torch.from_numpy(value_RW))
        return FieldTable(
            code_RC=torch.from_numpy(code_RC),
            bag_N=torch.from_numpy(bag_N),
            bag_offsets_RG1=torch.from_numpy(offsets_RG1),
            number_RM=torch.from_numpy(number_RM),
            vectors=tuple(vectors),
            present_RF=torch.from_numpy(present),
        )

    def unknown(self, num_rows: int) -> FieldTable:
        """Return rows of which nothing is known."""
        name = self.names[0] if self._fields else "nothing"
        return self.encode(pl.DataFrame([_missing(name, num_rows)]))

    def _encode_bags(
        self, columns: Mapping[str, pl.Series], present: Bool[np.ndarray, "R F"]
    ) -> tuple[Int64[np.ndarray, " N"], Int64[np.ndarray, "R G1"]]:
        """Encode all bags, laid out row by row, and mark the present ones."""
        num_rows, num_bags = len(present), len(self.bags)
        codes, places = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        for g, bag in enumerate(self.bags):
            local_N, row_N = bag.encode(columns[bag.name])
            says_N = bag.values.says(local_N)
            present[row_N[says_N], len(self.codes) + g] = True
            codes.append(local_N + self._starts[len(self.codes) + g])
            places.append(row_N * num_bags + g)
        place_N = np.concatenate(places)
        length_P = np.bincount(place_N, minlength=num_rows * num_bags)
        end_RG = np.cumsum(length_P).reshape(num_rows, num_bags)
        offsets_RG1 = np.zeros((num_rows, num_bags + 1), np.int64)
        offsets_RG1[:, 1:] = end_RG
        if num_bags and num_rows:
            offsets_RG1[1:, 0] = end_RG[:-1, -1]
        return np.concatenate(codes)[np.argsort(place_N, kind="stable")], offsets_RG1


class _Stored(Config):
    """What `features.json` says."""

    format: str = "foretaste-features"
    version: int = 1
    user: FieldSide | None
    item: FieldSide | None
    notes: tuple[str, ...]


@dataclass(frozen=True, eq=False, kw_only=True)
class Features:
    """What was fitted, and the encoded rows of all users and items."""

    user: FieldSide | None
    """None where nothing is known about users."""
    item: FieldSide | None
    user_table: FieldTable | None
    """One row per user_idx."""
    item_table: FieldTable | None
    """One row per item_idx."""
    notes: tuple[str, ...] = ()
    """What fitting left out, merged or found, with counts."""

    def of(self, events: Interactions) -> "Features":
        """Return the tables of other events, encoded by what was fitted before.

        Raises:
            DataError: A column is not of its field's kind.
        """
        return Features(
            user=self.user,
            item=self.item,
            user_table=_encode(self.user, events.user_table, events.num_users),
            item_table=_encode(self.item, events.item_table, events.num_items),
            notes=self.notes,
        )

    def save(self, folder: Path) -> None:
        """Write `features.json` and `features.safetensors` into a folder.

        Raises:
            BundleError: They cannot be written.
        """
        stored = _Stored(user=self.user, item=self.item, notes=self.notes)
        tensors = {
            f"{role}.{name}": tensor.contiguous()
            for role, table in (("user", self.user_table), ("item", self.item_table))
            if table is not None
            for name, tensor in table._tensors().items()
        }
        try:
            (folder / _JSON).write_text(stored.model_dump_json(), encoding="utf-8")
            save_file(tensors, folder / _TENSORS)
        except (OSError, SafetensorError) as error:
            raise BundleError(f"features cannot be written into {folder} ({error})") from error

    @staticmethod
    def load(folder: Path) -> "Features":
        """Read what `save` wrote.

        Raises:
            BundleError: A file is missing or broken, or of a later foretaste.
        """
        try:
            text = (folder / _JSON).read_text(encoding="utf-8")
            stored = _Stored.model_validate_json(text)
            tensors = load_file(folder / _TENSORS)
            return Features(
                user=stored.user,
                item=stored.item,
                user_table=_load_table("user", stored.user, tensors),
                item_table=_load_table("item", stored.item, tensors),
                notes=stored.notes,
            )
        except (OSError, ValidationError, SafetensorError, KeyError) as error:
            reason = str(error).strip().splitlines()[0]
            raise BundleError(
                f"the features in {folder} cannot be read ({reason}): they are broken, or of a "
                "later foretaste"
            ) from error


_JSON, _TENSORS = "features.json", "features.safetensors"


def fit_features(schema: FeatureSchema, events: Interactions) -> Features:
    """Fit the fields of a schema to training, and encode the tables of users and items.

    Only rows of users and items with an event are fitted to; a value that only others have is
    encoded as unseen. A field without a value on such a row is left out, and `notes` say so.

    Args:
        schema: Which columns are features.
        events: The training events, with the tables of all users and items.

    Raises:
        ConfigError: The schema names a column that is not there.
        DataError: A column is not of its field's kind; the message names row and value.
    """
    notes: list[str] = []
    trained_U, trained_I = np.diff(events.offsets) > 0, events.item_count > 0
    user = _fit_side("user", schema.user, events.user_table, trained_U, notes)
    item = _fit_side("item", schema.item, events.item_table, trained_I, notes)
    fitted = Features(user=user, item=item, user_table=None, item_table=None, notes=tuple(notes))
    return fitted.of(events)


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
            f"the schema has {role} fields ({', '.join(schema)}), and there is no table of "
            f"{role}s: read one with {role}s=, or leave the fields out"
        )
    kinds: dict[type, list[object]] = {}
    for name, field in schema.items():
        if name not in frame.columns:
            raise ConfigError(_no_column(role, name, frame.columns))
        fitted, note = fit_field(name, field, frame[name], trained_R)
        if note:
            notes.append(f"{role} field {name!r} {note}")
        if fitted is not None:
            kinds.setdefault(type(fitted), []).append(fitted)
    if not kinds:
        return None
    return FieldSide.model_validate(
        {
            "codes": (*kinds.get(Categories, ()), *kinds.get(Buckets, ())),
            "bags": tuple(kinds.get(Bag, ())),
            "numbers": tuple(kinds.get(Number, ())),
            "vectors": (*kinds.get(Vector, ()), *kinds.get(Sentence, ())),
        }
    )


def _no_column(role: str, name: str, columns: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, columns, n=1)
    advice = f"did you mean {near[0]!r}?" if near else "name one of them, or leave the field out"
    return (
        f"the schema names {role} column {name!r}, but the table of {role}s has "
        f"{', '.join(map(repr, columns))}: {advice}"
    )


def _missing(name: str, num_rows: int) -> pl.Series:
    return pl.Series(name, [None], dtype=pl.Null).new_from_index(0, num_rows)


def _encode(side: FieldSide | None, frame: pl.DataFrame | None, num_rows: int) -> FieldTable | None:
    if side is None:
        return None
    return side.unknown(num_rows) if frame is None else side.encode(frame)


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
    return _of_tensors(own, len(side.vectors))

"""The event store: `Interactions` in a folder, opened in milliseconds at any size.

Columns are `.npy` files that are mapped, not read; ids and tables are Arrow files that are mapped
too, and ids become a Polars column when first asked for. `manifest.json` names every file with its
size and SHA-256. A store is written to a temporary folder and renamed: the write is atomic.
"""

import os
import struct
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl
import pyarrow as pa
from jaxtyping import Int32, Shaped
from pydantic import NonNegativeInt

from foretaste.arguments import checked
from foretaste.config import Config
from foretaste.data.folder import (
    MANIFEST_FILE,
    FolderManifest,
    read_manifest,
    seal,
    verify_files,
    whole_folder,
)
from foretaste.data.interactions import Interactions
from foretaste.data.vocabulary import Vocabulary
from foretaste.errors import BundleError, DataError

_CONTEXT = "context.arrow"
_BLOCK = 1 << 23
_FAR_S = 2**52
"""Times outside these limits are invalid; differences of larger times could overflow 64 bits."""
_AGAIN = "import the events again"
_DICTIONARY = 2
"""Arrow's number of a dictionary message."""
_LARGEST_HEADER = 128
"""Size of NumPy's header for a column; a larger file holds values."""


class StoredIds(Config):
    """One vocabulary of a store."""

    count: NonNegativeInt
    """Number of ids."""
    is_integer: bool
    """Whether the ids are integers; otherwise they are texts."""


class StoreManifest(FolderManifest):
    """The content of `manifest.json`."""

    kind = "event store"
    latest = 2
    sealed_since = 2
    remedy = _AGAIN

    format: Literal["foretaste-event-store"] = "foretaste-event-store"
    """What kind of folder it is."""
    format_version: int = 2
    """Version of the folder's format."""
    events: NonNegativeInt
    """Number of events."""
    users: StoredIds
    """The vocabulary of users."""
    items: StoredIds
    """The vocabulary of items."""
    columns: Mapping[str, str]
    """The file of each further column."""
    positive: str = ""
    """The column that marks positive events."""
    notes: tuple[str, ...] = ()
    """Notes on what reading dropped, merged or assumed."""

    @classmethod
    def upgraded(cls, document: dict[str, Any]) -> dict[str, Any]:
        """Read format 1, which calls sizes `bytes` and has no checksum of the manifest."""
        if "version" not in document:
            return document
        files = {
            name: {"size": file.get("bytes"), "sha256": file.get("sha256")}
            for name, file in document.get("files", {}).items()
        }
        others = {name: value for name, value in document.items() if name != "version"}
        return others | {"format_version": document["version"], "files": files}


@checked
def write_store(
    events: Interactions, path: str | os.PathLike[str], *, replace: bool = False
) -> None:
    """Write events into a folder, atomically; see `whole_folder`.

    Args:
        events: The events to write.
        path: The folder; missing parent folders are created.
        replace: Replace an existing store; a failure leaves it unchanged.

    Raises:
        BundleError: `path` exists and `replace` is false, or it is not a store, or the disk is full
            or refuses.
    """
    with whole_folder(path, "event store", replace=replace) as folder:
        fill_files(events, folder)


def fill_store(events: Interactions, folder: Path) -> None:
    """Write events into a new folder of a bundle that is being written."""
    folder.mkdir()
    fill_files(events, folder)


@checked
def open_store(
    path: str | os.PathLike[str], *, verify: bool = False, trusted: bool = True
) -> Interactions:
    """Open a store that `write_store` wrote. Its columns are read-only maps of its files.

    Args:
        path: The folder.
        verify: Read every file completely and compare checksums; otherwise only sizes are compared.
        trusted: False also checks every value and refuses those that `write_store` cannot have
            written, such as rows out of range, because anybody can compute checksums.

    Raises:
        BundleError: It is not a store, or one of its files is missing, truncated or changed.
    """
    folder = Path(path)
    manifest = read_manifest(folder, StoreManifest)
    needed = {"users.arrow", "items.arrow", "offsets.npy", "item_idx.npy"}
    for name in needed | set(manifest.columns.values()):
        if name not in manifest.files:
            raise BundleError(
                f"{folder / MANIFEST_FILE} does not list {name!r}: {_AGAIN}",
                name=str(folder / MANIFEST_FILE),
                value=name,
            )
    verify_files(folder, manifest, checksums=verify)
    has = manifest.files.keys()
    opened = partial(_map_array, folder, length=manifest.events)
    read = partial(_read_table, whole=not trusted)
    events = Interactions(
        users=_open_ids(folder, "users.arrow", manifest.users),
        items=_open_ids(folder, "items.arrow", manifest.items),
        offsets=_map_array(folder, "offsets.npy", length=manifest.users.count + 1),
        item_idx=opened("item_idx.npy"),
        timestamp_s=opened("timestamp_s.npy") if "timestamp_s.npy" in has else None,
        columns={name: opened(file) for name, file in manifest.columns.items()},
        context=read(folder / _CONTEXT, height=manifest.events) if _CONTEXT in has else None,
        user_table=read(folder / "user_table.arrow") if "user_table.arrow" in has else None,
        item_table=read(folder / "item_table.arrow") if "item_table.arrow" in has else None,
        user_links=_map_links(folder, "user_links.npy") if "user_links.npy" in has else None,
        item_links=_map_links(folder, "item_links.npy") if "item_links.npy" in has else None,
        positive=manifest.positive,
        notes=manifest.notes,
    )
    if not trusted:
        _check_values(folder, events)
    return events


def fill_files(events: Interactions, folder: Path) -> None:
    """Write events into an empty folder."""
    columns = {name: f"column-{n}.npy" for n, name in enumerate(sorted(events.columns))}
    arrays = {
        "offsets.npy": events.offsets,
        "item_idx.npy": events.item_idx,
        "timestamp_s.npy": events.timestamp_s,
        **{file: events.columns[name] for name, file in columns.items()},
        # a reader without links and context finds further files in the manifest
        "user_links.npy": _flat(events.user_links),
        "item_links.npy": _flat(events.item_links),
    }
    tables = {
        "users.arrow": events.users.ids.to_frame(),
        "items.arrow": events.items.ids.to_frame(),
        "user_table.arrow": events.user_table,
        "item_table.arrow": events.item_table,
        _CONTEXT: events.context,
    }
    for name, array in arrays.items():
        if array is not None:
            _write_array(folder / name, array)
    for name, table in tables.items():
        if table is not None:
            _write_table(folder / name, table)
    manifest = StoreManifest(
        events=len(events),
        users=StoredIds(count=len(events.users), is_integer=events.users.is_integer),
        items=StoredIds(count=len(events.items), is_integer=events.items.is_integer),
        columns=columns,
        positive=events.positive,
        notes=events.notes,
    )
    seal(folder, manifest)


def _check_values(folder: Path, events: Interactions) -> None:
    """Raise an error for values that no store can hold: compiled code reads them unchecked."""
    inside = [
        ("offsets.npy", np.diff(events.offsets, prepend=0), 0, len(events)),
        ("offsets.npy", events.offsets[-1:] - len(events), 0, 0),
        ("item_idx.npy", events.item_idx, 0, events.num_items - 1),
        ("timestamp_s.npy", events.timestamp_s, -_FAR_S, _FAR_S),
        ("user_links.npy", events.user_links, 0, events.num_users - 1),
        ("item_links.npy", events.item_links, 0, events.num_items - 1),
    ]
    for name, array, least, most in inside:
        if array is None or not array.size:
            continue
        for found in (int(array.min()), int(array.max())):
            if not least <= found <= most:
                raise BundleError(
                    f"{folder / name} holds {found}, which is not in [{least}, {most}]: {_AGAIN}",
                    name=str(folder / name),
                    value=found,
                )
    for name, vocabulary in (("users.arrow", events.users), ("items.arrow", events.items)):
        try:
            whole = Vocabulary(vocabulary.ids)
            same = (len(whole), whole.is_integer) == (len(vocabulary), vocabulary.is_integer)
        except DataError:
            same = False
        if not same:
            raise BundleError(
                f"{folder / name} does not hold {len(vocabulary)} distinct ids of the manifest's "
                f"type: {_AGAIN}",
                name=str(folder / name),
            )


def _flat(links: Int32[np.ndarray, "2 P"] | None) -> Int32[np.ndarray, " P2"] | None:
    return None if links is None else np.ascontiguousarray(links).reshape(-1)


def _write_array(path: Path, array: Shaped[np.ndarray, " N"]) -> None:
    with path.open("xb") as file:
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
        step = _BLOCK // array.itemsize
        for start in range(0, len(array), step):
            file.write(np.ascontiguousarray(array[start : start + step]).data)


def _write_table(path: Path, table: pl.DataFrame) -> None:
    # texts of contexts have the layout of Polars in memory, so that opening need not read every row
    level = pl.CompatLevel.newest() if path.name == _CONTEXT else pl.CompatLevel.oldest()
    with path.open("xb") as file:
        table.write_ipc(file, compression="uncompressed", compat_level=level)


def _map_array(folder: Path, name: str, *, length: int) -> Shaped[np.ndarray, " N"]:
    path = folder / name
    array = _load_array(path, is_mapped=length > 0)
    if array.shape != (length,):
        raise BundleError(
            f"{path} has shape {array.shape}, not ({length},): {_AGAIN}", name=str(path)
        )
    return np.asarray(array)  # a plain array over the same map


def _map_links(folder: Path, name: str) -> Int32[np.ndarray, "2 P"]:
    """Return pairs, which are stored as all first ends, then all second ends."""
    array = _load_array(folder / name, is_mapped=False)
    if array.ndim != 1 or array.dtype != np.int32 or len(array) % 2:
        raise BundleError(
            f"{folder / name} holds no pairs of rows: {_AGAIN}", name=str(folder / name)
        )
    return array.reshape(2, -1)


def _load_array(path: Path, *, is_mapped: bool) -> Shaped[np.ndarray, " N"]:
    try:
        is_mapped = is_mapped or path.stat().st_size > _LARGEST_HEADER  # a map takes no memory
        array: Shaped[np.ndarray, " N"] = np.load(
            path, mmap_mode="r" if is_mapped else None, allow_pickle=False
        )
    except ValueError as error:
        raise BundleError(
            f"{path} is not a column of numbers ({error}): {_AGAIN}", name=str(path)
        ) from error
    return array


def _open_ids(folder: Path, name: str, stored: StoredIds) -> Vocabulary:
    return Vocabulary.trusted(
        partial(_read_ids, folder / name), length=stored.count, is_integer=stored.is_integer
    )


def _read_ids(path: Path) -> pl.Series:
    return _read_table(path, whole=True).to_series()


def _read_table(path: Path, *, height: int | None = None, whole: bool = False) -> pl.DataFrame:
    """Map a table's file; with `whole`, check every value first."""
    try:
        with pa.memory_map(str(path)) as source:
            content = source.read_buffer()
        if any(_is_compressed(content, at) for at in _batches(content)):
            raise pa.ArrowInvalid("it is compressed, and a store's tables are not")
        found = pa.ipc.open_file(content).read_all()
        found.validate(full=whole)
        table = pl.DataFrame(found)
    except (OSError, struct.error, pa.ArrowException) as error:
        raise BundleError(f"{path} cannot be read ({error}): {_AGAIN}", name=str(path)) from error
    if height not in (None, table.height):
        raise BundleError(f"{path} has {table.height} rows, not {height}: {_AGAIN}", name=str(path))
    return table


def _batches(file: pa.Buffer) -> Iterator[int]:
    """Yield the start of each batch of an Arrow file from its footer.

    Arrow reports a compressed batch only after unpacking it, to any size that its writer chose.
    The layout is https://github.com/apache/arrow/blob/main/format/File.fbs, in Flatbuffers.
    """
    (length,) = struct.unpack_from("<i", file, file.size - 10)
    start = file.size - 10 - length
    footer = start + _uint(file, start)
    for dictionaries_or_batches in (2, 3):
        if at := _field(file, footer, dictionaries_or_batches):
            first = at + _uint(file, at)
            for number in range(_uint(file, first)):
                yield struct.unpack_from("<q", file, first + 4 + 24 * number)[0]


def _is_compressed(file: pa.Buffer, batch: int) -> bool:
    batch += 8 if _uint(file, batch) == 0xFFFFFFFF else 4
    message = batch + _uint(file, batch)
    header = _field(file, message, 2)
    if not header:
        return False
    record = header + _uint(file, header)
    if file[_field(file, message, 1)] == _DICTIONARY:
        data = _field(file, record, 1)
        record = data + _uint(file, data)
    return bool(_field(file, record, 3))


def _field(file: pa.Buffer, table: int, number: int) -> int:
    """Return the position of a field in a Flatbuffers table, 0 if it is left out."""
    (down,) = struct.unpack_from("<i", file, table)
    (size,) = struct.unpack_from("<H", file, table - down)
    if 4 + 2 * number >= size:
        return 0
    (offset,) = struct.unpack_from("<H", file, table - down + 4 + 2 * number)
    return table + offset if offset else 0


def _uint(file: pa.Buffer, at: int) -> int:
    return int(struct.unpack_from("<I", file, at)[0])

"""The event store: `Interactions` in a folder, opened in milliseconds whatever its size.

Columns are `.npy` files that are mapped, not read; ids and tables are Arrow files that are mapped
too, and ids become a Polars column when first asked for. `manifest.json` names every file with its
size and SHA-256. A store is written beside its place and renamed into it: whole or not at all.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import polars as pl
import pyarrow as pa
from jaxtyping import Int32, Shaped
from pydantic import NonNegativeInt, ValidationError

from foretaste.arguments import checked
from foretaste.config import Config, config_error
from foretaste.data.disk import sha256_of, whole_folder
from foretaste.data.interactions import Interactions
from foretaste.data.vocabulary import Vocabulary
from foretaste.errors import BundleError

_MANIFEST = "manifest.json"
_CONTEXT = "context.arrow"
_BLOCK = 1 << 23
_PLAIN_NAME = re.compile(r"[a-z0-9_-]+\.(npy|arrow)")


class StoredFile(Config):
    """One file of a store."""

    bytes: NonNegativeInt
    sha256: str


class StoredIds(Config):
    """One vocabulary of a store."""

    count: NonNegativeInt
    is_integer: bool


class StoreManifest(Config):
    """What `manifest.json` says."""

    format: Literal["foretaste-event-store"] = "foretaste-event-store"
    version: Literal[1] = 1
    events: NonNegativeInt
    users: StoredIds
    items: StoredIds
    columns: Mapping[str, str]
    """The file of each further column."""
    positive: str = ""
    """The column that says which events are positive."""
    notes: tuple[str, ...] = ()
    files: dict[str, StoredFile]


@checked
def write_store(
    events: Interactions, path: str | os.PathLike[str], *, replace: bool = False
) -> None:
    """Write events into a folder, whole or not at all; see `whole_folder`.

    Args:
        events: What to write.
        path: The folder; folders above it that are missing are made.
        replace: A store that is there is replaced; a failure leaves it as it was.

    Raises:
        BundleError: `path` exists and `replace` is false, or it is something else than a store,
            or the disk is full or refuses.
    """
    with whole_folder(path, "event store", replace=replace) as folder:
        _write_files(events, folder)


def fill_store(events: Interactions, folder: Path) -> None:
    """Write events into a new folder of a bundle that is being written."""
    folder.mkdir()
    _write_files(events, folder)


@checked
def open_store(path: str | os.PathLike[str], *, verify: bool = False) -> Interactions:
    """Open a store that `write_store` wrote. Its columns are read-only maps of its files.

    Args:
        path: The folder.
        verify: Read every file through and compare its checksum; otherwise sizes are compared.

    Raises:
        BundleError: It is no store, or a file of it is missing, cut short or changed.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    for name, stored in manifest.files.items():
        _check_file(folder, name, stored, verify=verify)
    has = manifest.files.keys()
    opened = partial(_map_array, folder, length=manifest.events)
    return Interactions(
        users=_open_ids(folder, "users.arrow", manifest.users),
        items=_open_ids(folder, "items.arrow", manifest.items),
        offsets=_map_array(folder, "offsets.npy", length=manifest.users.count + 1),
        item_idx=opened("item_idx.npy"),
        timestamp_s=opened("timestamp_s.npy") if "timestamp_s.npy" in has else None,
        columns={name: opened(file) for name, file in manifest.columns.items()},
        context=_read_table(folder / _CONTEXT, height=manifest.events) if _CONTEXT in has else None,
        user_table=_read_table(folder / "user_table.arrow") if "user_table.arrow" in has else None,
        item_table=_read_table(folder / "item_table.arrow") if "item_table.arrow" in has else None,
        user_links=_map_links(folder, "user_links.npy") if "user_links.npy" in has else None,
        item_links=_map_links(folder, "item_links.npy") if "item_links.npy" in has else None,
        positive=manifest.positive,
        notes=manifest.notes,
    )


def read_manifest(folder: Path) -> StoreManifest:
    """Read what a store says of itself.

    Raises:
        BundleError: There is no manifest, or it is broken, or of a later format.
    """
    try:
        text = (folder / _MANIFEST).read_bytes()
    except OSError as error:
        raise BundleError(
            f"{folder} is not an event store: {_MANIFEST} cannot be read ({error.strerror})"
        ) from error
    if b'"foretaste-bundle"' in text[:1000] and (folder / "events" / _MANIFEST).is_file():
        raise BundleError(
            f"{folder} is a bundle, not an event store: its events are in {folder / 'events'}"
        )
    broken = f"{folder / _MANIFEST} is broken, or of a later foretaste"
    try:
        document = json.loads(text)
    except ValueError as error:
        raise BundleError(f"{broken}: it is not JSON: import the events again") from error
    try:
        manifest = StoreManifest.model_validate(document)
    except ValidationError as error:
        wrong = config_error(error, StoreManifest, document, source=broken)
        raise BundleError(f"{wrong}: import the events again") from error
    needed = {"users.arrow", "items.arrow", "offsets.npy", "item_idx.npy"}
    for name in needed | set(manifest.columns.values()) | manifest.files.keys():
        if name not in manifest.files or not _PLAIN_NAME.fullmatch(name):
            raise BundleError(f"{folder / _MANIFEST} is broken: it does not vouch for {name!r}")
    return manifest


def _write_files(events: Interactions, folder: Path) -> None:
    columns = {name: f"column-{n}.npy" for n, name in enumerate(sorted(events.columns))}
    arrays = {"offsets.npy": events.offsets, "item_idx.npy": events.item_idx}
    if events.timestamp_s is not None:
        arrays["timestamp_s.npy"] = events.timestamp_s
    arrays |= {file: events.columns[name] for name, file in columns.items()}
    # a reader that knows no links or context finds more files that the manifest vouches for
    for name, links in (
        ("user_links.npy", events.user_links),
        ("item_links.npy", events.item_links),
    ):
        if links is not None:
            arrays[name] = np.ascontiguousarray(links).reshape(-1)
    tables = {
        "users.arrow": events.users.ids.to_frame(),
        "items.arrow": events.items.ids.to_frame(),
    }
    if events.user_table is not None:
        tables["user_table.arrow"] = events.user_table
    if events.item_table is not None:
        tables["item_table.arrow"] = events.item_table
    files = {name: _write_array(folder / name, array) for name, array in arrays.items()}
    files |= {name: _write_table(folder / name, table) for name, table in tables.items()}
    if events.context is not None:
        # texts as Polars keeps them in memory, so that opening need not go through every row
        files[_CONTEXT] = _write_table(
            folder / _CONTEXT, events.context, level=pl.CompatLevel.newest()
        )
    manifest = StoreManifest(
        events=len(events),
        users=StoredIds(count=len(events.users), is_integer=events.users.is_integer),
        items=StoredIds(count=len(events.items), is_integer=events.items.is_integer),
        columns=columns,
        positive=events.positive,
        notes=events.notes,
        files=files,
    )
    (folder / _MANIFEST).write_bytes(manifest.model_dump_json(indent=2).encode())


def _write_array(path: Path, array: Shaped[np.ndarray, " N"]) -> StoredFile:
    digest = hashlib.sha256()
    with path.open("w+b") as file:
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
        file.seek(0)
        digest.update(file.read())
        step = _BLOCK // array.itemsize
        for start in range(0, len(array), step):
            block = np.ascontiguousarray(array[start : start + step]).data
            digest.update(block)
            file.write(block)
        size = file.tell()
    return StoredFile(bytes=size, sha256=digest.hexdigest())


def _write_table(
    path: Path, table: pl.DataFrame, *, level: pl.CompatLevel | None = None
) -> StoredFile:
    with path.open("w+b") as file:
        table.write_ipc(
            file,
            compression="uncompressed",
            compat_level=pl.CompatLevel.oldest() if level is None else level,
        )
    return StoredFile(bytes=path.stat().st_size, sha256=sha256_of(path))


def _check_file(folder: Path, name: str, stored: StoredFile, *, verify: bool) -> None:
    path = folder / name
    try:
        size = path.stat().st_size
        if size != stored.bytes:
            raise BundleError(
                f"{path} holds {size} bytes, not {stored.bytes}: it was changed or cut short; "
                "import the events anew"
            )
        if verify and sha256_of(path) != stored.sha256:
            raise BundleError(
                f"{path} was changed: its SHA-256 is not the manifest's; import the events anew"
            )
    except OSError as error:
        raise BundleError(
            f"{path} cannot be read ({error.strerror}): import the events anew"
        ) from error


def _map_array(folder: Path, name: str, *, length: int) -> Shaped[np.ndarray, " N"]:
    path = folder / name
    array = _load_array(path, is_mapped=length > 0)
    if array.shape != (length,):
        raise BundleError(
            f"{path} has shape {array.shape}, not ({length},): import the events anew"
        )
    return np.asarray(array)  # a plain array over the same map


def _map_links(folder: Path, name: str) -> Int32[np.ndarray, "2 P"]:
    """Return pairs that are stored as all first ends, then all second ends."""
    array = _load_array(folder / name, is_mapped=False)
    if array.ndim != 1 or array.dtype != np.int32 or len(array) % 2:
        raise BundleError(f"{folder / name} holds no pairs of rows: import the events anew")
    return array.reshape(2, -1)


def _load_array(path: Path, *, is_mapped: bool) -> Shaped[np.ndarray, " N"]:
    try:
        array: Shaped[np.ndarray, " N"] = np.load(
            path, mmap_mode="r" if is_mapped else None, allow_pickle=False
        )
    except ValueError as error:
        raise BundleError(
            f"{path} is not a column of numbers ({error}): import the events anew"
        ) from error
    return array


def _open_ids(folder: Path, name: str, stored: StoredIds) -> Vocabulary:
    return Vocabulary.trusted(
        partial(_read_ids, folder / name), length=stored.count, is_integer=stored.is_integer
    )


def _read_ids(path: Path) -> pl.Series:
    return _read_table(path).to_series()


def _read_table(path: Path, *, height: int | None = None) -> pl.DataFrame:
    try:
        with pa.memory_map(str(path)) as source:
            table = pl.DataFrame(pa.ipc.open_file(source).read_all())
    except (OSError, pa.ArrowException) as error:
        raise BundleError(f"{path} cannot be read ({error}): import the events anew") from error
    if height not in (None, table.height):
        raise BundleError(f"{path} has {table.height} rows, not {height}: import the events anew")
    return table

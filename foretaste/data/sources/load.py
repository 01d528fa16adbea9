"""Loads a public data set by name, from a folder, from the cache, or from its publisher."""

import logging
import os
import shutil
import tempfile
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import platformdirs
import polars as pl
from jaxtyping import UInt8

from foretaste.arguments import checked
from foretaste.data.interactions import Interactions
from foretaste.data.reading import read_interactions
from foretaste.data.sources import readers
from foretaste.data.sources.files import Address, Files, Tables, Wheel
from foretaste.errors import ConfigError, SourceError, did_you_mean

_ORIGIN = "ORIGIN.txt"
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Source:
    """Sources of a data set, its reader, and its checksums."""

    name: str
    folder: str
    """Its folder in a folder of several data sets."""
    ways: tuple[tuple[Address | Wheel, ...], ...] = ()
    """Sources, tried in order; each has all files of the data set. Empty if it is published only in
    files that are never read, such as pickles, or if no address is known."""
    marks: tuple[str, ...]
    """A folder with the data set has at least one of these files."""
    read: Callable[[Files], Tables]
    """A function of readers.py; it gets `file` if it reads one of several files."""
    licence: str
    counts: tuple[int, int, int] | None = None
    """Users, items, events; None if the publisher changes them."""
    sha256: str | None = None
    """The expected `Tables.sha256`; None if no complete copy was available to compute it."""
    why_no_way: str = "it is published only in files that are not read (pickles)"


def _known_sources() -> Mapping[str, Source]:
    """Return the data sets of registry.toml by their names."""
    known = tomllib.loads(Path(__file__).with_name("registry.toml").read_text(encoding="utf-8"))
    licences, sources = known["licences"], {}
    for name, entry in known["sets"].items():
        read, file = vars(readers)[entry.pop("reader")], entry.pop("file", None)
        entry["read"] = read if file is None else partial(read, name=file)
        entry["licence"] = licences[entry["licence"]]
        entry["ways"] = tuple(_way(way) for way in entry.get("ways", ()))
        entry["marks"] = tuple(entry["marks"])
        entry["counts"] = tuple(entry["counts"]) if "counts" in entry else None
        sources[name] = Source(name=name, **entry)
    return MappingProxyType(sources)


def _way(way: Mapping[str, Any]) -> tuple[Address | Wheel, ...]:
    """Return the files at an address, or a wheel of the package index."""
    if "wheel" in way:
        return (Wheel(requirement=way["wheel"], prefix=way["prefix"]),)
    return tuple(
        Address(url=f"{way['address']}/{file}", md5=way.get("md5")) for file in way["files"]
    )


SOURCES = _known_sources()
"""Every known data set by its name."""


def find_source(name: str) -> Source:
    """Return the source of that name.

    Raises:
        ConfigError: It does not exist.
    """
    if name not in SOURCES:
        advice = did_you_mean(name, SOURCES) or f"; there are {', '.join(SOURCES)}"
        raise ConfigError(f"no data set {name!r} is known{advice}", name="name", value=name)
    return SOURCES[name]


@dataclass(frozen=True, eq=False, kw_only=True)
class Dataset:
    """A public data set, read and checked.

    Shape legend: E events.
    """

    name: str
    events: Interactions
    origin: str
    """The folder, address or wheel of the files."""
    licence: str
    """The licence, which is shown before a download."""

    @property
    def part_E(self) -> UInt8[np.ndarray, " E"] | None:
        """The published split, which `make_split` with kind "given" follows; None without one."""
        part_E = self.events.columns.get("part")
        return None if part_E is None else part_E.astype(np.uint8)


@checked
def get_dataset(
    name: str, *, data_dir: Path | str | None = None, cache_dir: Path | str | None = None
) -> Dataset:
    """Read a public data set; download it first if necessary.

    Args:
        name: One of `SOURCES`.
        data_dir: A folder with its files, or the parent of that folder; nothing is downloaded then.
            None: the cache, then the publisher.
        cache_dir: Folder of downloaded files. None: the platform's cache folder for foretaste.

    Raises:
        ConfigError: No data set of this name is known.
        SourceError: It cannot be downloaded or has wrong content; the message has the reason for
            each source, and the fix.
    """
    source = find_source(name)
    if data_dir is not None:
        return from_folder(source, Path(data_dir))
    cache = platformdirs.user_cache_path("foretaste") if cache_dir is None else Path(cache_dir)
    return from_cache(source, cache)


def from_folder(source: Source, data_dir: Path) -> Dataset:
    """Read a data set with files in `data_dir` or in its own folder there.

    Raises:
        SourceError: The files are missing, or have wrong content.
    """
    folders = [data_dir / source.folder, data_dir / source.name, data_dir]
    for folder in dict.fromkeys(folders):
        files = Files(folder)
        if any(files.has(mark) for mark in source.marks):
            return _read(source, files, origin=str(folder))
    broken = "".join(f"; {path} is not a complete archive" for path in Files(data_dir).broken())
    raise SourceError(
        f"{source.name} is not in {data_dir}: neither there nor in {source.folder}/ below it is "
        f"{' or '.join(source.marks)}, plain, gzipped or in a zip archive{broken}",
        name=source.name,
        value=str(data_dir),
    )


def from_cache(source: Source, cache: Path) -> Dataset:
    """Read a data set from the cache; if it is not there, download it first, atomically.

    Files are downloaded into a temporary folder, which is read, checked and then renamed. A cached
    copy with wrong content is downloaded again.

    Raises:
        SourceError: No source has it, or the cache cannot be written.
    """
    kept = cache / source.name
    if kept.is_dir():
        try:
            return _read(source, Files(kept), origin=_origin(kept))
        except SourceError as error:
            _log.warning("getting %s again: %s", source.name, error)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix=f".{source.name}-") as temporary:
            folder, dataset = _fetch(source, Path(temporary))
            _keep(folder, kept)
    except OSError as error:
        raise SourceError(
            f"{source.name} cannot be kept in {cache} ({error}): name a folder that can be "
            "written with --cache-dir",
            name=source.name,
            value=str(cache),
        ) from error
    return dataset


def _fetch(source: Source, temporary: Path) -> tuple[Path, Dataset]:
    """Try each source in turn, and return the first with the right content."""
    failures = []
    for number, way in enumerate(source.ways):
        folder = temporary / str(number)
        folder.mkdir()
        try:
            return folder, _fetch_one(source, way, folder)
        except SourceError as error:
            _log.warning("%s", error)
            failures.append(str(error))
    reasons = "; ".join(failures) or source.why_no_way
    raise SourceError(
        f"{source.name} could not be downloaded: {reasons}. Get its files in another "
        "way and name their folder with --data-dir",
        name=source.name,
    )


def _fetch_one(source: Source, way: tuple[Address | Wheel, ...], folder: Path) -> Dataset:
    for file in way:
        file.fetch(folder)
    origin = ", ".join(str(file) for file in way)
    dataset = _read(source, Files(folder), origin=origin)
    (folder / _ORIGIN).write_text(f"{origin}\n{source.licence}\n", encoding="utf-8")
    return dataset


def _keep(folder: Path, kept: Path) -> None:
    """Rename a checked folder; another process may have done so meanwhile."""
    shutil.rmtree(kept, ignore_errors=True)
    try:
        os.replace(folder, kept)
    except OSError:
        if not kept.is_dir():
            raise


def _origin(kept: Path) -> str:
    note = kept / _ORIGIN
    return note.read_text(encoding="utf-8").splitlines()[0] if note.is_file() else str(kept)


def _read(source: Source, files: Files, *, origin: str) -> Dataset:
    try:
        tables = source.read(files)
    except (pl.exceptions.PolarsError, ValueError, KeyError, IndexError) as error:
        raise SourceError(
            f"{source.name} from {origin} cannot be read as its files should: {error}",
            name=source.name,
        ) from error
    _check(source, tables, origin)
    events = read_interactions(
        tables.events,
        user="user" if tables.has("user") else None,
        item="item" if tables.has("item") else None,
        timestamp="timestamp" if tables.has("timestamp") else None,
        rating="rating" if tables.has("rating") else None,
        columns=("part", *tables.labels) if tables.has("part") else tables.labels,
        context=tables.context,
        users=tables.users,
        items=tables.items,
        user_links=tables.user_links,
    )
    return Dataset(name=source.name, events=events, origin=origin, licence=source.licence)


def _check(source: Source, tables: Tables, origin: str) -> None:
    """Raise an error if the data differ from the published ones."""
    if source.counts is not None and tables.counts() != source.counts:
        raise SourceError(
            f"{source.name} from {origin} has (users, items, events) {tables.counts()}, not "
            f"{source.counts}: it is another version, or damaged",
            name=source.name,
        )
    if source.sha256 is not None and tables.sha256() != source.sha256:
        raise SourceError(
            f"{source.name} from {origin} has events of SHA-256 {tables.sha256()}, not "
            f"{source.sha256}: it is another version, or was changed",
            name=source.name,
        )

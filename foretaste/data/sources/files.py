"""Files of a public data set: plain, gzipped, or in a zip archive."""

import gzip
import hashlib
import http.client
import logging
import queue
import subprocess
import sys
import tempfile
import threading
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import final
from urllib.parse import urlsplit

import polars as pl

from foretaste.errors import SourceError
from foretaste.later import installed


@final
class Files:
    """The files of one folder, and of the zip archives in it, by their bare names."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def has(self, name: str) -> bool:
        """Whether `read(name)` would find a file."""
        return self._plain(name) is not None or self._member(name) is not None

    def read(self, name: str) -> bytes:
        """Return the content of `name`, of `name.gz`, or of the member `…/name` of an archive.

        Raises:
            SourceError: None of them exists, or the file is broken.
        """
        try:
            if path := self._plain(name):
                content = path.read_bytes()
                return gzip.decompress(content) if path.suffix == ".gz" else content
            if found := self._member(name):
                archive, member = found
                with zipfile.ZipFile(archive) as opened:
                    return opened.read(member)
        except (OSError, EOFError, zlib.error, zipfile.BadZipFile) as error:
            raise SourceError(
                f"{name} in {self.folder} is broken ({error}): delete it and get it again",
                name=name,
                value=str(self.folder),
            ) from error
        broken = "".join(f"; {path.name} is not a complete archive" for path in self.broken())
        raise SourceError(
            f"{self.folder} has no {name}, {name}.gz or archive that holds it{broken}",
            name=str(self.folder),
            value=name,
        )

    def text(self, name: str) -> str:
        """Return the content of `name` as text: UTF-8, or Latin-1 as in the older data sets."""
        content = self.read(name)
        try:
            return content.decode("utf-8")
        except UnicodeDecodeError:
            return content.decode("latin-1")

    def _plain(self, name: str) -> Path | None:
        paths = (self.folder / name, self.folder / f"{name}.gz")
        return next((path for path in paths if path.is_file()), None)

    def broken(self) -> list[Path]:
        """Return files that are named like zip archives but are broken or incomplete."""
        return [path for path in self._archives() if not zipfile.is_zipfile(path)]

    def _archives(self) -> list[Path]:
        return sorted(path for path in self.folder.glob("*.zip") if path.is_file())

    def _member(self, name: str) -> tuple[Path, str] | None:
        for archive in self._archives():
            if zipfile.is_zipfile(archive):
                with zipfile.ZipFile(archive) as opened:
                    for member in opened.namelist():
                        if PurePosixPath(member).name == name:
                            return archive, member
        return None


@dataclass(frozen=True, eq=False, kw_only=True)
class Tables:
    """Events in the order of their file, and the tables of users and items."""

    events: pl.DataFrame
    """`user`, `item`, and any of `rating`, `timestamp` (seconds), `part`, labels and context; rows
    without users or items lack these columns."""
    users: pl.DataFrame | None = None
    """`user` and further columns."""
    items: pl.DataFrame | None = None
    """`item` and further columns."""
    user_links: pl.DataFrame | None = None
    """Two columns of user ids, such as users and those they trust."""
    labels: tuple[str, ...] = ()
    """Further columns of numbers, which are labels."""
    context: tuple[str, ...] = ()
    """Columns of the context, of any type."""

    def has(self, column: str) -> bool:
        """Return whether events have this column."""
        return column in self.events.columns

    def counts(self) -> tuple[int, int, int]:
        """Return the numbers of users, items and events."""
        events = self.events
        users = events["user"].n_unique() if self.has("user") else len(events)
        items = events["item"].n_unique() if self.has("item") else 1
        return users, items, len(events)

    def sha256(self) -> str:
        """Return the checksum of the events as tab-separated lines, with one decimal for ratings.

        Equal events in equal order have equal checksums, whatever the format of the file.
        """
        plain = [c for c in ("user", "item", "rating", "timestamp", "part") if self.has(c)]
        lines = self.events.select(*plain, *self.labels, *self.context).write_csv(
            separator="\t", include_header=False, float_precision=1, quote_style="never"
        )
        return hashlib.sha256(lines.encode()).hexdigest()


TIMEOUT_S = 5.0
"""Seconds to wait for an address before the next source is tried."""

_PIP_TIMEOUT_S = 300.0
_CHUNK_BYTES = 1 << 20
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Address:
    """A file at a public address."""

    url: str
    md5: str | None = None
    """The checksum that the publisher states; None without one."""

    def __str__(self) -> str:
        return self.url

    def fetch(self, folder: Path) -> None:
        """Put the file into `folder` under the last part of its address.

        Raises:
            SourceError: The address does not answer, the transfer breaks off, or the file has a
                wrong checksum.
        """
        _log.info("getting %s", self.url)
        digest, received = hashlib.md5(usedforsecurity=False), 0
        try:
            with _open(self.url) as answer, (folder / self._name).open("wb") as file:
                for chunk in _chunks(answer):
                    file.write(chunk)
                    digest.update(chunk)
                    received += len(chunk)
                promised = answer.headers.get("Content-Length")
        except (OSError, http.client.HTTPException) as error:
            raise SourceError(f"{self.url} broke off: {error}", name=self.url) from error
        if promised is not None and received != int(promised):
            raise SourceError(
                f"{self.url} broke off after {received:,} of {promised} bytes", name=self.url
            )
        if self.md5 not in (None, digest.hexdigest()):
            raise SourceError(
                f"{self.url} has MD5 {digest.hexdigest()}, not {self.md5}", name=self.url
            )

    @property
    def _name(self) -> str:
        return PurePosixPath(urlsplit(self.url).path).name


@dataclass(frozen=True, kw_only=True)
class Wheel:
    """Files inside a wheel of the package index: fetched by pip, never installed or imported."""

    requirement: str
    """Name and version, as in "recbole==1.2.1"."""
    prefix: str
    """The folder in the wheel."""

    def __str__(self) -> str:
        return f"the wheel {self.requirement} of the package index"

    def fetch(self, folder: Path) -> None:
        """Put the wheel's files under `prefix` into `folder`.

        Raises:
            SourceError: pip could not get it, or the wheel has no file under `prefix`.
        """
        _log.info("getting %s", self)
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            self._download(Path(temporary))
            wheel = next(Path(temporary).glob("*.whl"), None)
            if wheel is None:
                raise SourceError(
                    f"pip brought no wheel of {self.requirement}", name=self.requirement
                )
            self._unpack(wheel, folder)

    def _download(self, into: Path) -> None:
        if not installed("pip"):
            raise SourceError(
                f"{self} is downloaded by pip, which is not installed: install pip", name="pip"
            )
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input"]
        command += ["--disable-pip-version-check", "--no-deps", "--only-binary=:all:"]
        command += ["--dest", str(into), self.requirement]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=_PIP_TIMEOUT_S, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise SourceError(
                f"pip could not be asked for {self.requirement}: {error}", name=self.requirement
            ) from error
        if done.returncode:
            said = done.stderr.strip().splitlines() or ["nothing"]
            raise SourceError(
                f"pip could not get {self.requirement}: {said[-1]}", name=self.requirement
            )

    def _unpack(self, wheel: Path, folder: Path) -> None:
        found = 0
        try:
            with zipfile.ZipFile(wheel) as archive:
                for member in archive.namelist():
                    if member.startswith(self.prefix) and not member.endswith("/"):
                        (folder / PurePosixPath(member).name).write_bytes(archive.read(member))
                        found += 1
        except (OSError, zipfile.BadZipFile) as error:
            raise SourceError(
                f"{wheel.name} cannot be unpacked: {error}", name=wheel.name
            ) from error
        if not found:
            raise SourceError(f"{wheel.name} holds nothing under {self.prefix}", name=wheel.name)


def _open(url: str) -> http.client.HTTPResponse:
    """Ask for `url`; name look-up, connection and first answer share one time limit."""
    if urlsplit(url).scheme not in ("http", "https"):
        raise SourceError(f"{url} is not an http or https address", name="url", value=url)
    answers: queue.Queue[http.client.HTTPResponse | Exception] = queue.Queue(1)

    def ask() -> None:
        try:
            answers.put(urllib.request.urlopen(url, timeout=TIMEOUT_S))
        except (OSError, http.client.HTTPException) as error:
            answers.put(error)

    threading.Thread(target=ask, daemon=True).start()
    try:
        answer = answers.get(timeout=TIMEOUT_S)
    except queue.Empty:
        raise SourceError(
            f"{url} did not answer within {TIMEOUT_S:g} s", name="url", value=url
        ) from None
    if isinstance(answer, Exception):
        raise SourceError(f"{url} cannot be reached: {answer}", name="url", value=url) from answer
    return answer


def _chunks(answer: http.client.HTTPResponse) -> Iterator[bytes]:
    while chunk := answer.read(_CHUNK_BYTES):
        yield chunk

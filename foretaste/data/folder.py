"""Atomic writing of files and folders, which are replaced only on request.

All writers of foretaste use this file. A file or folder is written under a hidden name next to its
destination; once it is complete and on disk, it is renamed. It gets the permissions that the
process's umask gives to a new file.

A bundle, an event store and a checkpoint are folders with a `manifest.json`: the kind of the
folder, the size and SHA-256 of every other file, and, at its end, the SHA-256 of the manifest
itself.
"""

import errno
import fcntl
import glob
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, Literal, TypeVar

import polars as pl
from pydantic import Field, NonNegativeInt, ValidationError, field_validator
from safetensors import SafetensorError

from foretaste.arguments import checked
from foretaste.config import Config, config_error
from foretaste.errors import BundleError, DataError, ForetasteError

Kind = Literal["file", "bundle", "event store", "checkpoint"]
MANIFEST_FILE = "manifest.json"
SIGNATURE_FILE = "signature.json"
"""May be next to a manifest, which cannot list its own signature."""
_OS_ERROR = re.compile(r"os error (\d+)")
M = TypeVar("M", bound="FolderManifest")


class FileEntry(Config):
    """Expected size and checksum of a file."""

    size: NonNegativeInt
    """Bytes of the file."""
    sha256: str
    """SHA-256 of the file, in hexadecimal."""


class FolderManifest(Config):
    """Common content of all manifests; each kind of folder adds its own fields."""

    kind: ClassVar[Kind]
    latest: ClassVar[int]
    """The newest format; it increases when an older foretaste could not read the folder."""
    sealed_since: ClassVar[int] = 1
    """The first format whose manifest ends with its own checksum."""
    remedy: ClassVar[str]
    """The advice for a broken folder."""

    format: str
    """What kind of folder it is."""
    format_version: int
    """Version of the folder's format."""
    files: dict[str, FileEntry] = Field(default_factory=dict)
    """Every other file of the folder, by its path with forward slashes."""

    @field_validator("files")
    @classmethod
    def _inside(cls, files: dict[str, FileEntry]) -> dict[str, FileEntry]:
        for name in files:
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                raise ValueError(f"{name!r} is outside the folder")
        return files

    @classmethod
    def upgraded(cls, document: dict[str, Any]) -> dict[str, Any]:
        """Convert the content of an earlier format to this one."""
        return document

    def render(self) -> str:
        """Return the manifest's text, with its own checksum at the end."""
        return _render(self.model_dump())


def _render(document: Mapping[str, object]) -> str:
    own = hashlib.sha256(json.dumps(document, indent=2).encode()).hexdigest()
    return json.dumps({**document, "checksum": own}, indent=2) + "\n"


def seal(folder: Path, manifest: FolderManifest) -> None:
    """Write the manifest of a complete folder, with an entry for every file."""
    listed = manifest.model_copy(update={"files": list_files(folder)})
    (folder / MANIFEST_FILE).write_text(listed.render(), encoding="utf-8")


def list_files(folder: Path) -> dict[str, FileEntry]:
    """Return the entry of every file below a folder except the manifest."""
    names = [name for name in files_below(folder) if name != MANIFEST_FILE]
    return {name: entry_of(folder / name) for name in names}


def entry_of(path: Path) -> FileEntry:
    """Return a file's entry for a manifest."""
    return FileEntry(size=path.stat().st_size, sha256=sha256_of(path))


def read_manifest(folder: Path, kind: type[M]) -> M:
    """Read a folder's manifest, without looking at the other files.

    Raises:
        BundleError: It is missing, broken or changed by hand, has a newer format or another kind,
            or names files outside the folder.
    """
    path, what = folder / MANIFEST_FILE, _a(kind.kind)
    try:
        text = regular_bytes(path).decode()
        document = json.loads(text)
    except OSError as error:
        raise _broken(
            f"{folder} is not {what}: its {MANIFEST_FILE} cannot be read ({error.strerror}); name "
            f"the folder of {what}",
            folder,
        ) from error
    except ValueError as error:
        raise _broken(f"{path} is broken, it is not JSON: {kind.remedy}", path) from error
    expected = kind.model_fields["format"].get_default()
    if not isinstance(document, dict) or document.get("format") != expected:
        found = document.get("format") if isinstance(document, dict) else None
        raise _broken(
            f"{path} is not the manifest of {what}, but that of {_instead(found, folder)}", path
        )
    _check_version(path, document, kind)
    sealed = document.pop("checksum", None)
    if document.get("format_version", 0) >= kind.sealed_since and (
        sealed is None or _render(document) != text
    ):
        raise _broken(
            f"{path} was changed after it was written, because its checksum differs: restore it, "
            f"or {kind.remedy}",
            path,
        )
    try:
        return kind.model_validate(kind.upgraded(document))
    except (ValidationError, AttributeError, TypeError) as error:
        said: object = f"{path} is broken"
        if isinstance(error, ValidationError):
            said = config_error(error, kind, document, source=f"{path} is broken")
        raise _broken(f"{said}: {kind.remedy}", path) from error


def _instead(found: object, folder: Path) -> str:
    known = {
        "foretaste-event-store": "an event store: train on it first",
        "foretaste-bundle": f"a bundle: its events are in {folder / 'events'}",
        "foretaste-checkpoint": "a checkpoint: --resume continues it",
    }
    return known.get(str(found), "something else: name another folder")


def _check_version(path: Path, document: Mapping[str, object], kind: type[M]) -> None:
    version = document.get("format_version", document.get("version"))
    if not isinstance(version, int) or version < 1:
        raise _broken(f"{path}: format_version is {version!r}: {kind.remedy}", path)
    if version > kind.latest:
        by = document.get("foretaste", "of a later version")
        raise _broken(
            f"{path}: format {version} was written by foretaste {by}, and this version reads "
            f"formats up to {kind.latest}: install that version or a newer one",
            path,
            value=version,
        )


def verify_files(folder: Path, manifest: FolderManifest, *, checksums: bool = True) -> None:
    """Compare every listed file with its size and checksum. Files not listed are never opened.

    Args:
        folder: The folder with the files.
        manifest: The expected sizes and checksums.
        checksums: Read every file completely; otherwise only sizes are compared.

    Raises:
        BundleError: A file is missing or changed.
    """
    for name, entry in manifest.files.items():
        path = folder / name
        try:
            check_regular(folder, name)
            size = path.stat().st_size
            same = size == entry.size and (not checksums or sha256_of(path) == entry.sha256)
        except OSError as error:
            raise _broken(
                f"{path} cannot be read ({error.strerror}): restore it, or {manifest.remedy}", path
            ) from error
        if not same:
            what = "another checksum" if size == entry.size else f"{size} bytes"
            raise _broken(
                f"{path} holds {what}, and {entry.size} bytes with the manifest's checksum were "
                f"written: restore it, or {manifest.remedy}",
                path,
            )


def check_regular(folder: Path, name: str) -> None:
    """Raise an error for a link, or anything else that is not a regular file.

    Raises:
        OSError: It is not a regular file, or is missing.
    """
    for part in [folder / name, *(folder / above for above in PurePosixPath(name).parents[:-1])]:
        if part.is_symlink():
            raise OSError(errno.ELOOP, "it is a link; a folder of foretaste's holds files alone")
    if not (folder / name).is_file():
        if (folder / name).exists():
            raise OSError(errno.EINVAL, "it is not a regular file")
        raise FileNotFoundError(errno.ENOENT, "there is no such file")


def regular_bytes(path: Path) -> bytes:
    """Read a regular file, not a link, and not a pipe, whose reader could wait forever.

    Raises:
        OSError: It is not a regular file, or cannot be read.
    """
    check_regular(path.parent, path.name)
    return path.read_bytes()


def _broken(message: str, path: Path, *, value: object = None) -> BundleError:
    return BundleError(message, name=str(path), value=str(path) if value is None else value)


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Force a file, or a folder's list of names, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@checked
def check_place(
    path: str | os.PathLike[str], kind: Kind = "file", *, replace: bool = False
) -> None:
    """Check, before hours of work, that the result can be written.

    Args:
        path: The destination. Missing parent folders are created when it is written.
        kind: A "file", a "bundle", an "event store" or a "checkpoint".
        replace: Something of the same kind may exist there, and is replaced.

    Raises:
        DataError: A file exists and `replace` is false, it is not a regular file, or its folder
            cannot be made or written.
        BundleError: The same for a bundle, a store or a checkpoint; even with `replace`, something
            else is not replaced, nor a folder with other files.
    """
    with _in_our_words(path, kind):
        place = _resolved(path)
        if place.exists():
            _check_replaceable(path, place, kind, replace=replace)
        _check_folder(path, place.parent, kind)


@contextmanager
def whole_file(path: str | os.PathLike[str], *, replace: bool = False) -> Iterator[Path]:
    """Give a temporary path; if the block succeeds, the file there is renamed to `path`.

    Raises:
        DataError: `path` exists, or the disk is full or refuses; nothing is left behind.
    """
    check_place(path, "file", replace=replace)
    with _in_our_words(path, "file"):
        place = _resolved(path)
        place.parent.mkdir(parents=True, exist_ok=True)
        part = _beside(place, "writing")
        try:
            part.open("xb").close()
            mode = part.stat().st_mode
            yield part
            part.chmod(stat.S_IMODE(mode))  # some libraries write files for their owner alone
            sync(part)
            part.replace(place)
        finally:
            part.unlink(missing_ok=True)
        sync(place.parent)


@contextmanager
def whole_folder(
    path: str | os.PathLike[str], kind: Kind, *, replace: bool = False
) -> Iterator[Path]:
    """Give a new folder to fill; if the block succeeds, it is renamed to `path`.

    An existing folder is moved away first and deleted last; a failure puts it back. The remains of
    a killed process are deleted, with all folders whose names begin with that of its new folder.

    Raises:
        BundleError: `path` exists, or the disk is full or refuses; nothing is left behind.
    """
    check_place(path, kind, replace=replace)
    with _in_our_words(path, kind), ExitStack() as stack:
        place = _resolved(path)
        place.parent.mkdir(parents=True, exist_ok=True)
        _delete_remains(place)
        part = _beside(place, "writing")
        try:
            part.mkdir()
            with suppress(OSError):  # some network file systems have no locks
                stack.enter_context(_locked(part))
            mode = part.stat().st_mode
            yield part
            for made in [*part.rglob("*"), part]:
                made.chmod(stat.S_IMODE(mode if made.is_dir() else mode & 0o666))
                sync(made)
            _put_in_place(part, place)
        finally:
            shutil.rmtree(part, ignore_errors=True)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Lock a folder; the lock ends with the process at the latest.

    Raises:
        OSError: Another process has locked it, or the file system has no locks.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


def _delete_remains(place: Path) -> None:
    """Delete the folders of writers that were killed: those that no process has locked."""
    for part in place.parent.glob(f".{glob.escape(place.name[:100])}.*.writing"):
        with suppress(OSError), _locked(part):
            for remains in place.parent.glob(f"{glob.escape(part.name)}*"):
                shutil.rmtree(remains, ignore_errors=True)


def leftover(path: Path) -> str:
    """Return the place of the older folder if a replacement stopped between its two renames."""
    place = path.absolute()
    found = sorted(place.parent.glob(f".{place.name[:100]}.*.replaced/{place.name}"))
    return f"; {found[-1]} was left there by an interrupted save: rename it" if found else ""


def reason_of(error: BaseException) -> str:
    """Return the system's message without the text of the library that passed it on."""
    if isinstance(error, ForetasteError) and error.__cause__ is not None:
        return reason_of(error.__cause__)
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    number = _OS_ERROR.search(str(error))
    return os.strerror(int(number[1])) if number else str(error).partition("\n")[0]


def _resolved(path: str | os.PathLike[str]) -> Path:
    """Follow links, so that the target of a link is replaced and not the link."""
    return Path(os.path.realpath(path))


def _error(message: str, path: str | os.PathLike[str], kind: Kind) -> ForetasteError:
    made = DataError if kind == "file" else BundleError
    return made(message, name=str(path), value=str(path))


@contextmanager
def _in_our_words(path: str | os.PathLike[str], kind: Kind) -> Iterator[None]:
    try:
        yield
    except BundleError as error:
        if error.__cause__ is None:  # already our own error
            raise
        raise _unwritten(path, kind, error) from error
    except (OSError, pl.exceptions.PolarsError, SafetensorError) as error:
        raise _unwritten(path, kind, error) from error


def _unwritten(path: str | os.PathLike[str], kind: Kind, error: Exception) -> ForetasteError:
    what = "" if kind == "file" else f"the {kind} "
    return _error(
        f"{what}{path} cannot be written: {reason_of(error)}: no part of it was kept; make room or "
        "choose another place",
        path,
        kind,
    )


def _check_replaceable(
    path: str | os.PathLike[str], place: Path, kind: Kind, *, replace: bool
) -> None:
    if kind == "file":
        if not place.is_file():
            what = "a folder" if place.is_dir() else "no regular file"
            raise _error(f"{path} is {what}: name another file to write", path, kind)
    elif place.is_dir() and not any(place.iterdir()):
        return
    else:
        listed = _listed_files(place, kind)
        if listed is None:
            raise _error(
                f"{path} exists and is not {_a(kind)}: it is left alone; choose another place",
                path,
                kind,
            )
        foreign = [found for found in files_below(place) if found not in listed]
        if kind == "checkpoint":  # a killed run leaves parts that are not listed yet
            foreign = [found for found in foreign if ".safetensors" not in found]
        if foreign:
            raise _error(
                f"{path} holds {foreign[0]}, which is not of the {kind}: move it away, or choose "
                "another place",
                path,
                kind,
            )
    if not replace:
        raise _error(
            f"{path} exists already: give --replace (in Python replace=True) to replace it, or "
            "choose another place",
            path,
            kind,
        )


def _listed_files(place: Path, kind: Kind) -> set[str] | None:
    """Return the files of a folder of a kind; None if it is not of this kind."""
    try:
        document = json.loads((place / MANIFEST_FILE).read_bytes())
        if document["format"] != f"foretaste-{kind.replace(' ', '-')}":
            return None
        return {MANIFEST_FILE, SIGNATURE_FILE, *document["files"]}
    except (OSError, ValueError, TypeError, KeyError):
        return None


def files_below(place: Path) -> list[str]:
    """Return the paths of all files below a folder, relative to it; none if there is no folder."""
    found = (path for path in place.rglob("*") if not path.is_dir())
    return sorted(path.relative_to(place).as_posix() for path in found)


def _a(kind: Kind) -> str:
    return f"an {kind}" if kind[0] in "aeiou" else f"a {kind}"


def _check_folder(path: str | os.PathLike[str], folder: Path, kind: Kind) -> None:
    """Try to write in the folder, or in its first existing parent."""
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise _error(
            f"{path} cannot be written: {folder} is not a folder; choose another place", path, kind
        )
    trial = _beside(folder / Path(path).name, "trial")
    try:
        trial.open("xb").close()
    finally:
        trial.unlink(missing_ok=True)


def _beside(place: Path, purpose: str) -> Path:
    """Return an unused hidden name next to a path, shortened if the name is long."""
    return place.with_name(f".{place.name[:100]}.{secrets.token_hex(4)}.{purpose}")


def _put_in_place(folder: Path, place: Path) -> None:
    """Rename `folder` to `place`; an existing folder moves away first, and back on failure."""
    if not place.exists() or not any(place.iterdir()):
        folder.replace(place)
    else:
        aside = _beside(place, "replaced")
        aside.mkdir()
        try:
            place.rename(aside / place.name)
            folder.rename(place)
        except OSError:
            if not place.exists():
                (aside / place.name).rename(place)
            aside.rmdir()
            raise
        shutil.rmtree(aside, ignore_errors=True)
    sync(place.parent)

"""Stored versions of a bundle: private copies that only the server writes.

While it answers, a server never reads the folder that bundles are delivered to: a change under a
memory map would change the model, and a truncated file would end the process. A version is named by
the checksum of its manifest, which covers all its files.
"""

import errno
import hashlib
import hmac
import json
import os
import shutil
import stat
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import final

from foretaste.arguments import checked
from foretaste.data.folder import (
    MANIFEST_FILE,
    SIGNATURE_FILE,
    check_regular,
    read_manifest,
    regular_bytes,
    whole_file,
    whole_folder,
)
from foretaste.errors import BundleError, ConfigError
from foretaste.serving.bundle import BundleManifest

_LARGEST = 2**26
"""Maximum size in bytes of a manifest or a signature."""


@dataclass(frozen=True, kw_only=True)
class Kept:
    """A stored version."""

    version: str
    size: int
    """Size in bytes."""
    used_at_s: float
    """Unix seconds: when the version was stored, or last activated."""


@final
class Versions:
    """A folder of stored versions, shared by all servers of a bundle on one machine."""

    def __init__(
        self,
        bundle: Path,
        folder: Path | None = None,
        *,
        key: bytes | None = None,
        most: int = 5,
        most_bytes: int | None = None,
    ) -> None:
        """Store the settings; nothing is read yet.

        Args:
            bundle: The folder to which new versions are delivered.
            folder: The folder of copies; None: next to the bundle.
            key: If given, a version must be signed with this key.
            most: Maximum number of stored versions.
            most_bytes: Maximum total size in bytes; active versions are never deleted.
        """
        self.bundle = bundle
        self._folder = folder or versions_beside(bundle)
        self._key, self._most, self._most_bytes = key, most, most_bytes

    def delivered(self) -> str:
        """Return the version in the bundle's folder.

        Raises:
            BundleError: There is no readable manifest.
        """
        return _version_of(_manifest_bytes(self.bundle))

    def path(self, version: str) -> Path:
        """Return the folder of a version, which need not exist."""
        return self._folder / version

    def has(self, version: str) -> bool:
        """Return whether a version is stored."""
        return bool(version) and (self.path(version) / MANIFEST_FILE).is_file()

    def take(self) -> str:
        """Copy the bundle's folder, unless its version is already stored; return the version.

        Raises:
            BundleError: The folder is not a bundle, has links or pipes, its files differ in size
                from the manifest, its signature is missing or wrong, or there is no room for a
                copy.
        """
        version = self.delivered()
        self._check_signature(self.bundle)
        if not self.has(version):
            manifest = read_manifest(self.bundle, BundleManifest)
            try:
                self._copy(version, manifest)
            except BundleError:
                if not self.has(version):  # otherwise another server was faster
                    raise
        elif self._key is not None:  # it may have been signed after the copy
            with whole_file(self.path(version) / SIGNATURE_FILE, replace=True) as part:
                part.write_bytes(_bounded(self.bundle / SIGNATURE_FILE))
        return version

    def _copy(self, version: str, manifest: BundleManifest) -> None:
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        names = [MANIFEST_FILE, *manifest.files]
        if (self.bundle / SIGNATURE_FILE).exists():
            names.append(SIGNATURE_FILE)
        with whole_folder(self.path(version), "bundle") as part:
            for name in names:
                entry = manifest.files.get(name)
                _copy(self.bundle, name, part, None if entry is None else entry.size)
            if _version_of(_manifest_bytes(part)) != version:
                raise _refused(self.bundle, "it changed while it was copied; try again")
        with suppress(FileNotFoundError):  # another server dropped it
            for name in names:  # a write to a file that a server maps could end the server
                (self.path(version) / name).chmod(0o400)

    def check_signature(self, version: str) -> None:
        """If there is a key, raise an error for a version that is not signed with it.

        Raises:
            BundleError: The signature is missing or wrong.
        """
        self._check_signature(self.path(version))

    def _check_signature(self, folder: Path) -> None:
        if self._key is None:
            return
        try:
            given = _bounded(folder / SIGNATURE_FILE)
        except OSError as error:
            raise _refused(
                self.bundle,
                "it has no signature, but this server requires one: `foretaste sign`",
            ) from error
        if not hmac.compare_digest(given, _signature(_manifest_bytes(folder), self._key)):
            raise _refused(self.bundle, "its signature was not made with this server's key")

    def kept(self) -> list[Kept]:
        """Return the stored versions, most recently used first."""
        found = []
        for path in self._folder.glob("[0-9a-f]*"):
            try:
                size = sum(one.lstat().st_size for one in path.rglob("*") if one.is_file())
                found.append(Kept(version=path.name, size=size, used_at_s=path.stat().st_mtime))
            except OSError:  # another server deletes it
                continue
        return sorted(found, key=lambda one: one.used_at_s, reverse=True)

    def used(self, version: str) -> None:
        """Record that a version is active from now on."""
        os.utime(self.path(version))

    def drop(self, version: str) -> None:
        """Delete a copy; a server that has it in memory keeps it there."""
        shutil.rmtree(self.path(version), ignore_errors=True)

    def drop_oldest(self, *, but: set[str]) -> None:
        """Delete versions beyond the limits, least recently used first."""
        number = size = 0
        for kept in self.kept():
            number, size = number + 1, size + kept.size
            full = self._most_bytes is not None and size > self._most_bytes
            if kept.version not in but and (number > self._most or full):
                self.drop(kept.version)


def versions_beside(bundle: Path) -> Path:
    """Return the folder of stored versions of a bundle."""
    place = bundle.absolute()
    return place.with_name(f"{place.name}.versions")


@checked
def sign_bundle(bundle: Path | str, key_file: Path | str) -> None:
    """Sign a bundle with a key, so that a server with the same key serves it.

    The signature, `signature.json` next to the manifest, is an HMAC-SHA256 of the manifest, which
    has the checksum of every other file.

    Args:
        bundle: The bundle's folder.
        key_file: A file of at least 32 random bytes, shared with all who may deliver bundles.

    Raises:
        BundleError: The folder is not a bundle.
        ConfigError: The key cannot be read, or is too short.
    """
    bundle = Path(bundle)
    read_manifest(bundle, BundleManifest)
    signed = _signature(_manifest_bytes(bundle), read_key(Path(key_file)))
    with whole_file(bundle / SIGNATURE_FILE, replace=True) as part:
        part.write_bytes(signed)


def read_key(path: Path) -> bytes:
    """Read a key for signing bundles.

    Raises:
        ConfigError: The file cannot be read, or is shorter than 32 bytes.
    """
    try:
        key = path.read_bytes().strip()
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read as a key: {error.strerror}; create one with `openssl rand -hex "
            f"32 > {path}`",
            name="signature_key",
            value=path,
        ) from error
    if len(key) < 32:
        raise ConfigError(
            f"{path} has {len(key)} bytes, but a key needs 32: create one with `openssl rand -hex "
            f"32 > {path}`",
            name="signature_key",
            value=path,
        )
    return key


def _signature(manifest: bytes, key: bytes) -> bytes:
    """Return the content of a signature file; any other content is refused."""
    signed = hmac.new(key, manifest, hashlib.sha256).hexdigest()
    return json.dumps({"hmac_sha256": signed}).encode() + b"\n"


def _version_of(manifest: bytes) -> str:
    return hashlib.sha256(manifest).hexdigest()[:12]


def _manifest_bytes(folder: Path) -> bytes:
    try:
        return _bounded(folder / MANIFEST_FILE)
    except OSError as error:
        raise BundleError(
            f"{folder} has no readable {MANIFEST_FILE} ({error.strerror}): give the folder of a "
            "bundle",
            name=str(folder),
            value=str(folder),
        ) from error


def _bounded(path: Path) -> bytes:
    check_regular(path.parent, path.name)
    if path.stat().st_size > _LARGEST:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
    return regular_bytes(path)


def _copy(bundle: Path, name: str, into: Path, size: int | None) -> None:
    """Copy the bytes of a file; the copy is verified when it is loaded."""
    target = into / name
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        check_regular(bundle, name)
        handle = os.open(bundle / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with open(handle, "rb") as source:
            found = os.fstat(handle)
            if not stat.S_ISREG(found.st_mode) or size not in (None, found.st_size):
                raise OSError(errno.EINVAL, f"{found.st_size} bytes, but {size} were written")
            with target.open("xb") as copy:
                shutil.copyfileobj(source, copy, 2**22)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            raise
        # without a cause, or `whole_folder` would call it an error of writing
        raise _refused(bundle, f"{name} cannot be copied: {error.strerror}") from None


def _refused(bundle: Path, why: str) -> BundleError:
    return BundleError(f"{bundle} is refused: {why}", name=str(bundle), value=str(bundle))

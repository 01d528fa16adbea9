"""The first file of a bundle: what it holds, what made it, and the checksum of every other file."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Literal

from pydantic import Field, NonNegativeInt, ValidationError

from foretaste.config import Config, config_error
from foretaste.data.disk import sha256_of
from foretaste.errors import BundleError

MANIFEST_FILE = "manifest.json"
FORMAT = "foretaste-bundle"
FORMAT_VERSION = 1
"""Raised when an older foretaste could not read what is written; earlier ones stay readable."""


class FileEntry(Config):
    """What a file must be."""

    size: NonNegativeInt
    """Bytes."""
    sha256: str


class DataFacts(Config):
    """What was trained on."""

    fingerprint: str
    """`Interactions.fingerprint` of the training events."""
    num_users: NonNegativeInt
    num_items: NonNegativeInt
    num_events: NonNegativeInt


class Manifest(Config):
    """Everything about a bundle but its numbers."""

    format: Literal["foretaste-bundle"] = "foretaste-bundle"
    format_version: int = FORMAT_VERSION
    foretaste: str
    """Version of foretaste that wrote it."""
    versions: dict[str, str]
    """Versions of python and of the libraries that shaped the numbers."""
    model: dict[str, object]
    """The model's settings; `kind` says which model."""
    seed: int
    train_seconds: float
    settings: dict[str, object]
    """Everything that decided the run."""
    log: dict[str, object]
    """What training saw."""
    data: DataFacts
    index: dict[str, object] | None
    """Facts of the item index, with its measured recall; None for a model without vectors."""
    files: dict[str, FileEntry] = Field(default_factory=dict)
    """Every other file of the bundle, by its path with forward slashes."""

    def render(self) -> str:
        """Return the one text that stands for this manifest, its own checksum at the end."""
        return _render(self.model_dump(mode="json"))


def _render(document: Mapping[str, object]) -> str:
    own = hashlib.sha256(json.dumps(document, indent=2).encode()).hexdigest()
    return json.dumps({**document, "checksum": own}, indent=2) + "\n"


def list_files(folder: Path) -> dict[str, FileEntry]:
    """Return the entry of every file below a folder, the manifest left out."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): FileEntry(
            size=path.stat().st_size, sha256=sha256_of(path)
        )
        for path in paths
        if path != folder / MANIFEST_FILE
    }


def read_manifest(folder: Path) -> Manifest:
    """Read a bundle's manifest, without looking at the other files.

    Raises:
        BundleError: It is missing, broken, changed by hand, or of a newer format.
    """
    path = folder / MANIFEST_FILE
    if not path.is_file():
        raise BundleError(f"{folder} is not a bundle: it holds no {MANIFEST_FILE}; name its folder")
    try:
        text = path.read_bytes().decode()
        document = json.loads(text)
    except (OSError, ValueError) as error:
        raise BundleError(f"{path} cannot be read: {error}: save the bundle anew") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        is_store = isinstance(document, dict) and document.get("format") == "foretaste-event-store"
        what = (
            "an event store: train on it first" if is_store else "something else: name its folder"
        )
        raise BundleError(f"{path} is not the manifest of a bundle, but of {what}")
    version = document.get("format_version")
    if not isinstance(version, int) or version < 1:
        raise BundleError(f"{path}: format_version is {version!r}: save the bundle anew")
    if version > FORMAT_VERSION:
        raise BundleError(
            f"{path}: format {version} was written by foretaste {document.get('foretaste')}, and "
            f"this one reads formats up to {FORMAT_VERSION}: install that version or a newer one"
        )
    document.pop("checksum", None)
    if _render(document) != text:
        raise BundleError(
            f"{path} was changed after it was written, its checksum is another: restore it, or "
            "save the bundle anew"
        )
    try:
        return Manifest.model_validate(document)
    except ValidationError as error:
        wrong = config_error(error, Manifest, document, source=f"{path} is broken")
        raise BundleError(f"{wrong}: save the bundle again") from error


def verify_files(folder: Path, manifest: Manifest) -> None:
    """Compare every listed file with its size and checksum. Files not listed are never opened.

    Raises:
        BundleError: One is missing, changed, or lies outside the folder.
    """
    for name, entry in manifest.files.items():
        relative = PurePosixPath(name)
        if relative.is_absolute() or ".." in relative.parts:
            raise BundleError(f"{folder}: the manifest names {name!r}, outside the bundle")
        path = folder / relative
        if not path.is_file():
            raise BundleError(f"{path} is missing: restore it, or save the bundle anew")
        try:
            size = path.stat().st_size
            same = size == entry.size and sha256_of(path) == entry.sha256
        except OSError as error:
            raise BundleError(f"{path} cannot be read: {error}") from error
        if not same:
            what = "its checksum is another" if size == entry.size else f"it has {size} bytes"
            raise BundleError(
                f"{path} is not what was written ({what}, {entry.size} bytes were written): "
                "restore it, or save the bundle anew"
            )

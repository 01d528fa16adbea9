"""The model that serves, and how another takes its place between two requests."""

import hashlib
import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import final

from pydantic import JsonValue, TypeAdapter

from foretaste.errors import BundleError, ForetasteError
from foretaste.plain_values import json_value
from foretaste.serving.building import load
from foretaste.serving.catalogue import Catalogue
from foretaste.serving.recommender import Recommender

_JSON: TypeAdapter[JsonValue] = TypeAdapter(JsonValue)


@dataclass(frozen=True, eq=False, kw_only=True)
class Loaded:
    """One version of a bundle, in memory. A request works with one from beginning to end."""

    recommender: Recommender
    catalogue: Catalogue
    version: str
    manifest: dict[str, JsonValue]
    report: JsonValue
    loaded_at_s: float


def load_version(bundle: Path) -> Loaded:
    """Read a bundle and have it answer a stranger without and with a history.

    So a broken one is known before it serves, and what is worked out once is worked out.

    Raises:
        ForetasteError: The bundle is missing, broken or tampered with, or cannot answer.
    """
    try:
        manifest_bytes = (bundle / "manifest.json").read_bytes()
    except OSError as error:
        raise BundleError(
            f"{bundle} holds no manifest.json that can be read: name a bundle's folder",
            name=str(bundle),
            value=str(bundle),
        ) from error
    try:
        return _load_and_ask(bundle, manifest_bytes)
    except (ForetasteError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of native code is no Exception
        raise BundleError(
            f"{bundle} cannot serve although its checksums are right: {type(error).__name__} while "
            "it was loaded or asked; save it again from a model that answers",
            name=str(bundle),
            value=str(bundle),
        ) from error


def _load_and_ask(bundle: Path, manifest_bytes: bytes) -> Loaded:
    recommender = load(bundle)
    popular = recommender.recommend(k=1)
    recommender.recommend(history=[row.item_id for row in popular.rows], k=1)
    return Loaded(
        recommender=recommender,
        catalogue=Catalogue(recommender.trained.events),
        version=hashlib.sha256(manifest_bytes).hexdigest()[:12],
        manifest=json.loads(manifest_bytes),
        report=_JSON.validate_python(json_value(recommender.report)),
        loaded_at_s=time.time(),
    )


@final
class ModelSlot:
    """Holds the version that serves. Reading `current` is atomic; a swap never waits for it."""

    def __init__(self, read: Callable[[], Loaded]) -> None:
        """Load the first version.

        Raises:
            ForetasteError: There is none that can serve.
        """
        self._read = read
        self._loading = threading.Lock()
        self.current = read()
        self.last_error = ""
        """Why the newest try to load was refused; empty if it was not."""

    def reload(self) -> tuple[Loaded, Loaded]:
        """Load the bundle again beside the old version, then swap; give the old and the new.

        The same version is kept as it is.

        Raises:
            ForetasteError: It was refused; the old version serves on.
        """
        with self._loading:
            old = self.current
            try:
                new = self._read()
            except ForetasteError as error:
                self.last_error = str(error)
                raise
            self.last_error = ""
            if new.version != old.version:
                self.current = new
            return old, self.current

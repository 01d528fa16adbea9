"""The active model and the canary, and how versions are tried and switched between requests.

A bundle is loaded and tested in a separate process before it becomes active, because native code
reads its files, and a fault there ends the process. A warm process forks a child for each trial,
with limits on memory and time; any failure, including a crash, becomes the reason for refusing the
bundle. `python -m foretaste.serving.slot` is the warm process: it reads and writes one line of JSON
per trial.
"""

import contextlib
import hashlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import final

import torch
from pydantic import JsonValue, TypeAdapter

from foretaste.data.folder import regular_bytes
from foretaste.errors import BundleError, ForetasteError
from foretaste.serving.catalogue import Catalogue
from foretaste.serving.recommender import Recommender, load
from foretaste.serving.self_test import check_answers
from foretaste.serving.state import Choice
from foretaste.serving.versions import Versions
from foretaste.shown import json_value

_JSON: TypeAdapter[JsonValue] = TypeAdapter(JsonValue)


@dataclass(frozen=True, eq=False, kw_only=True)
class Loaded:
    """A version of a bundle in memory. A request uses the same version from beginning to end."""

    recommender: Recommender
    catalogue: Catalogue
    version: str
    manifest: dict[str, JsonValue]
    report: JsonValue
    loaded_at_s: float


def load_version(bundle: Path, *, within_s: float | None = None) -> Loaded:
    """Read a bundle, and check its answers to the queries that were stored when it was saved.

    This finds a damaged bundle before it becomes active, and fills its caches.

    Args:
        bundle: The bundle's folder, which must not change meanwhile.
        within_s: Limit of processor time for each answer in seconds; None: no limit.

    Raises:
        ForetasteError: The bundle is missing, damaged or modified, or cannot answer.
    """
    try:
        recommender = load(bundle)
        check_answers(recommender, recommender.bundle.answers, within_s=within_s)
        manifest_bytes = regular_bytes(bundle / "manifest.json")
        return Loaded(
            recommender=recommender,
            catalogue=Catalogue(recommender.trained.events),
            version=hashlib.sha256(manifest_bytes).hexdigest()[:12],
            manifest=json.loads(manifest_bytes),
            report=_JSON.validate_python(json_value(recommender.report)),
            loaded_at_s=time.time(),
        )
    except (ForetasteError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of native code is not an Exception
        raise BundleError(
            f"{bundle} cannot be served although its checksums match: {type(error).__name__} while "
            "it was loaded or tested; save it again from a model that answers",
            name=str(bundle),
            value=str(bundle),
        ) from error


@final
class ModelSlot:
    """Holds the active version and, if there is one, the canary. Reading them never waits for a
    swap.

    Every switch makes a private copy, tries it in another process, loads it, publishes the switch,
    and swaps. A failure before the swap refuses the version, and the active version stays.
    """

    def __init__(
        self,
        versions: Versions,
        *,
        try_bundle: Callable[[Path], None] | None = None,
        read: Callable[[Path], Loaded] = load_version,
        chosen: Choice | None = None,
    ) -> None:
        """Load the first version: the one in the bundle's folder, or else the chosen one.

        If the version in the folder was stored before, it is not new, and the chosen one is used: a
        restart does not undo a roll back.

        Args:
            versions: The stored versions, and the folder that new ones come from.
            try_bundle: Loads a version in another process; raises an error if it is invalid.
            read: Loads a version in this process.
            chosen: The choice that the servers on one database agreed on, if there is one.

        Raises:
            ForetasteError: No version can be served.
        """
        self.versions, self._try, self._read = versions, try_bundle, read
        self._loading = threading.Lock()
        self.last_error = ""
        """The reason why the latest attempt to load was refused; empty if it was not refused."""
        self._canary: tuple[Loaded, float] | None = None
        self.previous = "" if chosen is None else chosen.previous
        self._unfit = ""
        agreed = "" if chosen is None or not versions.has(chosen.version) else chosen.version
        self.current = self._first(agreed)

    @property
    def canary(self) -> Loaded | None:
        """The version that answers a share of the users."""
        return None if self._canary is None else self._canary[0]

    @property
    def choice(self) -> Choice:
        """The active version and canary of this server."""
        canary, share = (None, 0.0) if self._canary is None else self._canary
        return Choice(
            version=self.current.version,
            previous=self.previous,
            canary="" if canary is None else canary.version,
            share=share,
        )

    def of_user(self, user_id: str | None) -> Loaded:
        """Return the version that answers a user, which is the same until the next switch."""
        if self._canary is None or user_id is None:
            return self.current
        canary, share = self._canary
        drawn = hashlib.sha256(f"{canary.version}\0{user_id}".encode()).digest()[:8]
        return canary if int.from_bytes(drawn) < share * 2**64 else self.current

    def reload(self, publish: Callable[[Choice], None] = lambda _: None) -> tuple[Loaded, Loaded]:
        """Activate the version in the bundle's folder; return the old version and the new one.

        A version that is already active is not loaded again.

        Args:
            publish: Called with the switch just before the swap; may refuse it.

        Raises:
            ForetasteError: The version was refused; the old one stays active.
        """
        with self._switching():
            old = self.current
            if self.versions.delivered() != old.version:
                version = self.versions.take()
                try:
                    new = self._tried(version)
                except ForetasteError:
                    self.versions.drop(version)  # the folder is copied again when it is complete
                    raise
                publish(Choice(version=version, previous=old.version))
                self._swap(new)
            return old, self.current

    def activate(
        self, version: str, publish: Callable[[Choice], None] = lambda _: None
    ) -> tuple[Loaded, Loaded]:
        """Activate a stored version; see `reload`. "" means the previous one: a roll back.

        Raises:
            ForetasteError: The version is not stored, or was refused; the old one stays active.
        """
        with self._switching():
            old, version = self.current, version or self.previous
            if version != old.version:
                new = self._kept(version)
                publish(Choice(version=version, previous=old.version))
                self._swap(new)
            return old, self.current

    def try_out(
        self, version: str, share: float, publish: Callable[[Choice], None] = lambda _: None
    ) -> None:
        """Let a stored version answer a share of the users; a share of 0 ends this.

        Raises:
            ForetasteError: The version is not stored, or was refused; nothing has changed.
        """
        with self._switching():
            canary = None if share == 0 else (self._kept(version), share)
            name = "" if canary is None else canary[0].version
            publish(replace(self.choice, canary=name, share=share))
            self._canary = canary

    def follow(self, chosen: Choice) -> bool:
        """Switch to the version that another server chose, if it is stored or delivered here too.

        Returns:
            Whether anything changed.

        Raises:
            ForetasteError: The version was refused here; it is not tried again until the choice
                changes.
        """
        if chosen == self.choice or self._unfit == repr(chosen):
            return False
        with self._switching():
            try:
                if chosen.version != self.current.version:
                    self._swap(self._arrived(chosen.version))
                same = self.choice.canary == chosen.canary
                if chosen.canary and not (same and self.canary):
                    self._canary = (self._arrived(chosen.canary), chosen.share)
                elif self.canary is not None:
                    self._canary = (self.canary, chosen.share) if chosen.canary else None
                self.previous, self._unfit = chosen.previous, ""
            except ForetasteError:
                self._unfit = repr(chosen)
                raise
            return True

    def _first(self, agreed: str) -> Loaded:
        try:
            known = self.versions.has(self.versions.delivered())
            if agreed and known:
                return self._agreed(agreed)
            version = self.versions.take()
            return self._tried(version, alone=not agreed)
        except ForetasteError as error:
            if not agreed:
                raise
            self.last_error = str(error)
            return self._agreed(agreed)

    def _agreed(self, version: str) -> Loaded:
        self.versions.check_signature(version)
        return self._read(self.versions.path(version))

    def _arrived(self, version: str) -> Loaded:
        if not self.versions.has(version) and self.versions.delivered() == version:
            self.versions.take()
        return self._kept(version)

    def _kept(self, version: str) -> Loaded:
        for here in (self.current, self.canary):
            if here is not None and here.version == version:
                return here
        if not self.versions.has(version):
            what = f"version {version!r} is not kept" if version else "there is no previous version"
            raise BundleError(f"{what}: GET /v1/models lists those that are", name="version")
        self.versions.check_signature(version)
        return self._tried(version)

    def _tried(self, version: str, *, alone: bool = False) -> Loaded:
        """Load a version after a trial in another process, which is omitted if `alone` and nothing
        needs protection.
        """
        path = self.versions.path(version)
        try:
            if self._try is not None and not alone:
                self._try(path)
            return self._read(path)
        except ForetasteError as error:
            bundle = self.versions.bundle  # the folder that readers of the message know by name
            said = str(error).replace(str(path), str(bundle))
            raise BundleError(said, name=str(bundle), value=str(bundle)) from error

    def _swap(self, new: Loaded) -> None:
        if self.canary is not None and self.canary.version == new.version:
            self._canary = None
        self.previous, self.current = self.current.version, new
        self.versions.used(new.version)
        in_use = {new.version, self.previous, "" if self.canary is None else self.canary.version}
        self.versions.drop_oldest(but=in_use)

    @contextmanager
    def _switching(self) -> Iterator[None]:
        with self._loading:
            try:
                yield
            except ForetasteError as error:
                self.last_error = str(error)
                raise
            self.last_error = ""


if sys.platform != "win32":
    import resource

SPARE_BYTES, TIMES = 2**30, 6
"""A trial may use a GiB plus this many times the bundle's size, in addition to its memory at the
start."""


@final
class Trials:
    """Tries bundles, each in a child of a process that is started for the first trial."""

    def __init__(
        self,
        *,
        timeout_s: float,
        within_s: float,
        program: Sequence[str] = ("-m", "foretaste.serving.slot"),
    ) -> None:
        """Set the time limits.

        Args:
            timeout_s: Time limit for a whole trial, in seconds.
            within_s: Limit of processor time for one answer in a trial, in seconds.
            program: The Python code of the warm process, which calls `main`.
        """
        self._timeout_s, self._within_s, self._program = timeout_s, within_s, program
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()

    def try_bundle(self, bundle: Path) -> None:
        """Load a bundle and check its answers, in a child process.

        Raises:
            BundleError: The bundle is invalid, or its process died or took too long.
        """
        asked = {"bundle": str(bundle), "timeout_s": self._timeout_s, "within_s": self._within_s}
        with self._lock:
            process = self._process = self._process or _start(self._program)
            try:
                if process.stdin is None or process.stdout is None:
                    raise BrokenPipeError
                process.stdin.write(json.dumps(asked) + "\n")
                process.stdin.flush()
                refused = json.loads(process.stdout.readline())
            except (OSError, ValueError) as error:
                self._end()
                raise _refusal(bundle, "the process for trials ended") from error
        if refused is not None:
            raise _refusal(bundle, refused)

    def try_once(self, bundle: Path) -> None:
        """Do the same as `try_bundle`, but end the warm process, which needs 200 MiB.

        Raises:
            BundleError: The bundle is refused.
        """
        try:
            self.try_bundle(bundle)
        finally:
            self.close()

    def close(self) -> None:
        """End the warm process; a later trial starts a new one."""
        with self._lock:
            self._end()

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


def _start(program: Sequence[str]) -> subprocess.Popen[str]:
    own = {
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "OMP_NUM_THREADS": "1",
        "POLARS_MAX_THREADS": "1",
        "ARROW_DEFAULT_MEMORY_POOL": "system",  # its default would reserve the whole limit at once
    }
    return subprocess.Popen(
        [sys.executable, *program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,  # the last output of native code before a crash
        text=True,
        env=os.environ | own,
    )


def _refusal(bundle: Path, why: str) -> BundleError:
    return BundleError(why, name=str(bundle), value=str(bundle))


def main() -> None:
    """Fork a child for each line of the standard input, and write the result."""
    torch.set_num_threads(1)
    for line in sys.stdin:
        asked = json.loads(line)
        sys.stdout.write(json.dumps(_fork(Path(asked.pop("bundle")), **asked)) + "\n")
        sys.stdout.flush()


def _fork(bundle: Path, *, timeout_s: float, within_s: float) -> str | None:
    """Try a bundle in a child process; return why it is refused, None if it is valid."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        _in_child(bundle, writer, within_s)
    os.close(writer)
    said, deadline = b"", time.monotonic() + timeout_s
    with open(reader, "rb", buffering=0) as pipe:
        while select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))[0]:
            part = pipe.read(65536)
            if not part:
                break
            said += part
        else:
            os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if time.monotonic() >= deadline:
        return f"{bundle} was not loaded and tested within {timeout_s:g} s"
    if os.WIFSIGNALED(status):
        name = signal.Signals(os.WTERMSIG(status)).name
        return f"{bundle} ended the process that loaded it ({name}): save it again"
    with contextlib.suppress(ValueError):
        found: str | None = json.loads(said)
        return found
    return f"{bundle} ended the process that loaded it: save it again"


def _in_child(bundle: Path, writer: int, within_s: float) -> None:
    refused: str | None = None
    try:
        _bound_memory(bundle)
        load_version(bundle, within_s=within_s)
    except ForetasteError as error:
        refused = str(error)
    except BaseException as error:  # noqa: BLE001 - a panic of native code is not an Exception
        refused = f"{bundle} cannot be loaded ({type(error).__name__}): save it again"
    finally:
        with open(writer, "wb") as pipe:
            pipe.write(json.dumps(refused).encode())
        os._exit(0)  # without the cleanup of a normal exit


def _bound_memory(bundle: Path) -> None:
    """Limit the writable memory of the process, not counting read-only maps of files."""
    if sys.platform != "linux":
        return
    fields = Path("/proc/self/status").read_text().split()
    now = int(fields[fields.index("VmData:") + 1]) * 1024
    size = sum(path.lstat().st_size for path in bundle.rglob("*"))
    most = now + SPARE_BYTES + TIMES * size
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))


if __name__ == "__main__":
    main()

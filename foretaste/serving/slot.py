"""The model that serves, how another takes its place between two requests, and one on trial.

A bundle is loaded and asked in a process of its own before it serves: native code reads its files,
and a fault in it ends the process. So a warm process forks a child for each trial, with bounds on
its memory and its time; whatever happens there, dying included, is a sentence that says why the
bundle is refused. `python -m foretaste.serving.slot` is that warm process: it reads one line of
JSON for each trial and writes one.
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
    """One version of a bundle, in memory. A request works with one from beginning to end."""

    recommender: Recommender
    catalogue: Catalogue
    version: str
    manifest: dict[str, JsonValue]
    report: JsonValue
    loaded_at_s: float


def load_version(bundle: Path, *, within_s: float | None = None) -> Loaded:
    """Read a bundle and have it answer what it was asked when it was saved.

    So a broken one is known before it serves, and what is worked out once is worked out.

    Args:
        bundle: Its folder, which does not change meanwhile.
        within_s: Each answer may take so long; None: any time.

    Raises:
        ForetasteError: The bundle is missing, broken or tampered with, or cannot answer.
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
    except BaseException as error:  # a panic of native code is no Exception
        raise BundleError(
            f"{bundle} cannot serve although its checksums are right: {type(error).__name__} while "
            "it was loaded or asked; save it again from a model that answers",
            name=str(bundle),
            value=str(bundle),
        ) from error


@final
class ModelSlot:
    """Holds the version that serves and, at times, a canary. Reading them never waits for a swap.

    Every switch is: a private copy, a trial in another process, loading, publishing, the swap. What
    fails before the swap is a refusal, and what served serves on.
    """

    def __init__(
        self,
        versions: Versions,
        *,
        try_bundle: Callable[[Path], None] | None = None,
        read: Callable[[Path], Loaded] = load_version,
        chosen: Choice | None = None,
    ) -> None:
        """Load the first version: what lies in the bundle's folder, or else what was chosen.

        A version that was kept before is old, and then the choice holds: a restart does not undo
        a roll back.

        Args:
            versions: Where versions come from and are kept.
            try_bundle: Loads a version elsewhere and raises what is wrong with it.
            read: Loads a version here.
            chosen: What the servers on one database have agreed on, if anything.

        Raises:
            ForetasteError: There is none that can serve.
        """
        self.versions, self._try, self._read = versions, try_bundle, read
        self._loading = threading.Lock()
        self.last_error = ""
        """Why the newest try to load was refused; empty if it was not."""
        self._canary: tuple[Loaded, float] | None = None
        self.previous = "" if chosen is None else chosen.previous
        self._unfit = ""
        agreed = "" if chosen is None or not versions.has(chosen.version) else chosen.version
        self.current = self._first(agreed)

    @property
    def canary(self) -> Loaded | None:
        """The version that a share of the users gets."""
        return None if self._canary is None else self._canary[0]

    @property
    def choice(self) -> Choice:
        """What serves here."""
        canary, share = (None, 0.0) if self._canary is None else self._canary
        return Choice(
            version=self.current.version,
            previous=self.previous,
            canary="" if canary is None else canary.version,
            share=share,
        )

    def of_user(self, user_id: str | None) -> Loaded:
        """Return the version that answers a user: always the same one for as long as it serves."""
        if self._canary is None or user_id is None:
            return self.current
        canary, share = self._canary
        drawn = hashlib.sha256(f"{canary.version}\0{user_id}".encode()).digest()[:8]
        return canary if int.from_bytes(drawn) < share * 2**64 else self.current

    def reload(self, publish: Callable[[Choice], None] = lambda _: None) -> tuple[Loaded, Loaded]:
        """Take what lies in the bundle's folder and swap; give the old version and the new.

        One that serves already is not loaded again.

        Args:
            publish: Told of the switch when nothing but the swap is left; may refuse it.

        Raises:
            ForetasteError: It was refused; the old version serves on.
        """
        with self._switching():
            old = self.current
            if self.versions.delivered() != old.version:
                version = self.versions.take()
                try:
                    new = self._tried(version)
                except ForetasteError:
                    self.versions.drop(version)  # it is copied again when it is whole
                    raise
                publish(Choice(version=version, previous=old.version))
                self._swap(new)
            return old, self.current

    def activate(
        self, version: str, publish: Callable[[Choice], None] = lambda _: None
    ) -> tuple[Loaded, Loaded]:
        """Have a kept version serve; see `reload`. "" is the previous one: a roll back.

        Raises:
            ForetasteError: It is not kept, or was refused; the old version serves on.
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
        """Have a kept version answer a share of the users; a share of 0 ends that.

        Raises:
            ForetasteError: It is not kept, or was refused; nothing has changed.
        """
        with self._switching():
            canary = None if share == 0 else (self._kept(version), share)
            name = "" if canary is None else canary[0].version
            publish(replace(self.choice, canary=name, share=share))
            self._canary = canary

    def follow(self, chosen: Choice) -> bool:
        """Switch to what another server chose, where it is kept or delivered here too.

        Returns:
            Whether anything changed.

        Raises:
            ForetasteError: It was refused here; it is not tried again until the choice is another.
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
        """Load a version, and before that elsewhere, unless nothing `alone` would be protected."""
        path = self.versions.path(version)
        try:
            if self._try is not None and not alone:
                self._try(path)
            return self._read(path)
        except ForetasteError as error:
            bundle = self.versions.bundle  # where whoever reads the message looks
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
"""A trial may take a GiB, and this many times the bundle's size, more than it has at its start."""


@final
class Trials:
    """Tries bundles, each in a child of a process that is started at the first of them."""

    def __init__(
        self,
        *,
        timeout_s: float,
        within_s: float,
        program: Sequence[str] = ("-m", "foretaste.serving.slot"),
    ) -> None:
        """Set the bounds: of a whole trial, and of one answer in it, in seconds.

        Args:
            timeout_s: Of a whole trial.
            within_s: Of one answer in it.
            program: What Python runs as the warm process; it calls `main`.
        """
        self._timeout_s, self._within_s, self._program = timeout_s, within_s, program
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()

    def try_bundle(self, bundle: Path) -> None:
        """Load a bundle and have it answer.

        Raises:
            BundleError: It cannot, or its process died or took too long.
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
                raise _refusal(bundle, "the process that tries bundles ended") from error
        if refused is not None:
            raise _refusal(bundle, refused)

    def try_once(self, bundle: Path) -> None:
        """Do as `try_bundle`, and keep no warm process: it holds 200 MiB for a trial a day.

        Raises:
            BundleError: The bundle is refused.
        """
        try:
            self.try_bundle(bundle)
        finally:
            self.close()

    def close(self) -> None:
        """End the warm process; a later trial starts another."""
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
        "ARROW_DEFAULT_MEMORY_POOL": "system",  # its own would reserve the whole bound at once
    }
    return subprocess.Popen(
        [sys.executable, *program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,  # what native code writes as it dies
        text=True,
        env=os.environ | own,
    )


def _refusal(bundle: Path, why: str) -> BundleError:
    return BundleError(why, name=str(bundle), value=str(bundle))


def main() -> None:
    """Fork a child for each line of the standard input, and write what came of it."""
    torch.set_num_threads(1)
    for line in sys.stdin:
        asked = json.loads(line)
        sys.stdout.write(json.dumps(_fork(Path(asked.pop("bundle")), **asked)) + "\n")
        sys.stdout.flush()


def _fork(bundle: Path, *, timeout_s: float, within_s: float) -> str | None:
    """Try a bundle in a child; return why it is refused, None if it is sound."""
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
        return f"{bundle} was not loaded and asked within {timeout_s:g} s"
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
    except BaseException as error:  # noqa: BLE001 - a panic of native code is no Exception
        refused = f"{bundle} cannot be loaded ({type(error).__name__}): save it again"
    finally:
        with open(writer, "wb") as pipe:
            pipe.write(json.dumps(refused).encode())
        os._exit(0)  # without what a whole program would end first


def _bound_memory(bundle: Path) -> None:
    """Bound what the process may write to, its maps of files for reading left out."""
    if sys.platform != "linux":
        return
    fields = Path("/proc/self/status").read_text().split()
    now = int(fields[fields.index("VmData:") + 1]) * 1024
    size = sum(path.lstat().st_size for path in bundle.rglob("*"))
    most = now + SPARE_BYTES + TIMES * size
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))


if __name__ == "__main__":
    main()

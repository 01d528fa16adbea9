"""A bundle is loaded and asked in a process of its own before it serves.

Native code reads a bundle's files, and a fault in it ends the process. So a warm process forks a
child for each trial, with bounds on its memory and its time; whatever happens there, dying
included, is a sentence that says why the bundle is refused.

Run as a program, `python -m foretaste.serving.trial`, this is that warm process: it reads one line
of JSON for each trial and writes one.
"""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import final

import torch

from foretaste.errors import BundleError, ForetasteError
from foretaste.serving.slot import load_version

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
        program: Sequence[str] = ("-m", "foretaste.serving.trial"),
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

    def __enter__(self) -> "Trials":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

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

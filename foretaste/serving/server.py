"""The server process: load a bundle, listen, answer, drain."""

import ctypes
import errno
import gc
import json
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TypeVar, final

import torch
import uvicorn
from sqlalchemy.exc import SQLAlchemyError
from starlette.types import ASGIApp

from foretaste.arguments import checked
from foretaste.errors import ConfigError, ForetasteError
from foretaste.serving.api import create_app
from foretaste.serving.connection import limited
from foretaste.serving.metrics import Admission, Metrics
from foretaste.serving.service import Service
from foretaste.serving.settings import ServerSettings, access_of
from foretaste.serving.slot import Loaded, ModelSlot, Trials, load_version
from foretaste.serving.state import cause_of, open_live_events, state_beside
from foretaste.serving.versions import Versions, read_key

T = TypeVar("T")
ACCEPTED = 16
"""Number of connections accepted per turn of the event loop; hundreds at once would delay every
answer."""
RETIRE_S = 3600.0
"""Seconds between two deletions of old events."""
TRIM_S = 60.0
"""Seconds between two returns of free memory to the system."""
DRAINED = 0.9
"""Share of `drain_s` that requests in progress may take; the rest is for closing."""


@checked
def serve(
    bundle: Path | str,
    *,
    settings: ServerSettings,
    announce: Callable[[str], object] = sys.stdout.write,
    write_log: Callable[[str], object] = sys.stderr.write,
) -> None:
    """Serve a bundle over HTTP until SIGTERM or SIGINT; requests in progress are completed first.

    SIGHUP reads the bundle again, as `POST /v1/model/reload` does.

    Args:
        bundle: The bundle's folder.
        settings: The address, the place of live events, and the limits.
        announce: Called with one line that has the address, including its newline.
        write_log: Called with one line of JSON per request.

    Raises:
        ForetasteError: The bundle cannot be served, the address is in use, live events cannot be
            stored at `settings.state`, tokens cannot be read, or there are no tokens although other
            machines can reach the server.
    """
    bundle, access = Path(bundle), access_of(settings)
    opened = partial(open_live_events, timeout_s=settings.store_timeout_s)
    state = state_beside(bundle) if settings.state == "beside" else settings.state
    versions = _versions(bundle, settings)
    if not versions.kept():
        versions.delivered()  # an invalid bundle is reported before anything is opened
    with (
        _rare_collections(),
        closing(_trials(settings)) as trials,
        closing(opened(state)) as events,
    ):
        chosen = _if_it_answers(lambda: events.chosen(bundle.name), write_log)
        slot = ModelSlot(versions, try_bundle=trials.try_once, read=_load, chosen=chosen)
        torch.set_num_threads(1)  # the thread of each request computes on one core
        metrics = Metrics()
        service = Service(
            slot,
            events,
            settings,
            bundle=bundle,
            metrics=metrics,
            report=partial(_log_store, write_log),
        )
        if chosen is None or slot.current.version != chosen.version:
            _if_it_answers(lambda: service.publish(chosen), write_log)
        admission = Admission(settings, metrics, write_log)
        app = create_app(service, settings=settings, access=access, admission=admission)
        with (
            _listen(settings) as listener,
            _signals(lambda: _reload(service, write_log)),
            _keeper(service, settings, write_log),
        ):
            announce(f"foretaste serves {bundle.name} at {_address(listener)}\n")
            sys.stdout.flush()
            http_server(app, settings, admission).run(sockets=[listener])


def _versions(bundle: Path, settings: ServerSettings) -> Versions:
    return Versions(
        bundle,
        settings.versions,
        key=None if settings.signature_key is None else read_key(settings.signature_key),
        most=settings.keep_versions,
        most_bytes=settings.keep_versions_bytes,
    )


def _trials(settings: ServerSettings) -> Trials:
    return Trials(timeout_s=settings.load_timeout_s, within_s=settings.answer_timeout_s)


def http_server(app: ASGIApp, settings: ServerSettings, admission: Admission) -> uvicorn.Server:
    """Return a server of the application, without uvicorn's log and with the settings' limits."""
    config = uvicorn.Config(
        app,
        http=limited(settings, admission),
        ws="none",
        access_log=False,
        log_config=None,
        log_level="error",  # clients could trigger its warnings as often as they like
        server_header=False,
        proxy_headers=False,
        backlog=ACCEPTED,
        timeout_keep_alive=settings.keep_alive_s,
        timeout_graceful_shutdown=DRAINED * settings.drain_s,  # type: ignore[arg-type]  # seconds
    )
    return _Server(config, settings, admission)


@final
class _Server(uvicorn.Server):
    """Reports at SIGTERM that it is not ready, and stops listening some time later."""

    def __init__(
        self, config: uvicorn.Config, settings: ServerSettings, admission: Admission
    ) -> None:
        super().__init__(config)
        self._settings, self._admission, self._leaves_at = settings, admission, math.inf
        self._end = threading.Timer(0.0, os._exit)

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until the end; after a signal, also wait for threads that wait for the store."""
        before = threading.enumerate()
        super().run(sockets)
        for thread in threading.enumerate() if self._end.is_alive() else ():
            if thread not in before and not thread.daemon:
                thread.join()
        self._end.cancel()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, with a longer queue of connections than are accepted in one turn."""
        await super().startup(sockets)
        for listener in sockets or []:
            listener.listen(self._settings.max_connections)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Wait at the first SIGTERM; end immediately at any other signal.

        The process ends in time even if a call to the store hangs, whose events are not
        acknowledged.
        """
        wait_s = 0.0
        if sig == signal.SIGTERM and not self._admission.leaving:
            self._admission.leaving, wait_s = True, self._settings.unready_s
            self._leaves_at = time.monotonic() + wait_s
        else:
            super().handle_exit(sig, frame)
        self._end.cancel()
        self._end = threading.Timer(wait_s + self._settings.drain_s, os._exit, (0,))
        self._end.daemon = True
        self._end.start()

    async def on_tick(self, counter: int) -> bool:
        """Return whether the server should end now."""
        return await super().on_tick(counter) or time.monotonic() >= self._leaves_at


def _load(bundle: Path) -> Loaded:
    """Load a version, and exclude all existing objects from garbage collection.

    A collection over a model and its tables would delay every request by 100 ms or more and free
    nothing: these objects live until a swap, and are then freed by reference counting.
    """
    loaded = load_version(bundle)
    gc.collect()
    gc.freeze()
    gc.collect()  # of nothing: else the next one waits for a quarter as many new objects
    return loaded


@contextmanager
def _rare_collections() -> Iterator[None]:
    """Make the objects that `_load` excluded collectable again, at the end."""
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def _listen(settings: ServerSettings) -> Iterator[socket.socket]:
    try:
        family = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server(
            (settings.host, settings.port), family=family, backlog=settings.max_connections
        )
    except OSError as error:
        wrong_host = isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL
        raise ConfigError(
            f"cannot listen on port {settings.port} of {settings.host}: {error.strerror}; "
            + (
                "give an address of this machine as host: 127.0.0.1 for it alone, 0.0.0.0 for all"
                if wrong_host
                else "choose another port (0 takes any that is free)"
            ),
            name="host" if wrong_host else "port",
            value=settings.host if wrong_host else settings.port,
        ) from error
    with listener:
        # Each connection inherits this option. An answer is sent in two parts, head and body;
        # without the option, the second part waits until the client acknowledges the first, which
        # may take 40 ms.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        yield listener


def _address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    if host in ("0.0.0.0", "::"):
        host = "127.0.0.1"
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"


@contextmanager
def _signals(reload: Callable[[], None]) -> Iterator[None]:
    """Reload at SIGHUP; let the process exit normally after uvicorn has drained."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def at_hangup(_: int, __: FrameType | None) -> None:
        threading.Thread(target=reload, name="reload").start()

    def nothing(_: int, __: FrameType | None) -> None:
        """Ignore the signal that uvicorn raises again after it has drained."""

    handlers = {signal.SIGTERM: nothing, signal.SIGINT: nothing}
    if sys.platform != "win32":
        handlers[signal.SIGHUP] = at_hangup
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _keeper(
    service: Service, settings: ServerSettings, write_log: Callable[[str], object]
) -> Iterator[None]:
    """Follow the version switches of other servers, and delete old events, in a separate thread."""
    ended = threading.Event()

    def work() -> None:
        retired_at, trimmed_at = -math.inf, time.monotonic()
        while not ended.wait(settings.follow_s):
            _if_it_answers(lambda: _follow(service, write_log), write_log)
            if time.monotonic() - retired_at > RETIRE_S:
                retired_at = time.monotonic()
                _if_it_answers(service.retire, write_log)
            if time.monotonic() - trimmed_at > TRIM_S:
                trimmed_at = time.monotonic()
                _give_back_memory()

    threading.Thread(target=work, name="keeper", daemon=True).start()
    try:
        yield
    finally:
        ended.set()


def _give_back_memory() -> None:
    """Return free memory of the C library's heaps, one per thread, to the system."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
        if trim is not None:
            trim(0)


def _if_it_answers(ask: Callable[[], T], write_log: Callable[[str], object]) -> T | None:
    """Query the store; return None and log a line while it does not answer."""
    try:
        return ask()
    except SQLAlchemyError as error:
        _log_store(write_log, error)
        return None


def _log_store(write_log: Callable[[str], object], error: SQLAlchemyError) -> None:
    line = {"time": time.time(), "event": "store", "cause": cause_of(error)}
    write_log(json.dumps(line) + "\n")


def _follow(service: Service, write_log: Callable[[str], object]) -> None:
    line: dict[str, object] = {"time": time.time(), "event": "follow"}
    try:
        if not service.follow():
            return
        line |= {"result": "swapped", "version": service.slot.current.version}
    except ForetasteError as error:
        line |= {"result": "refused", "reason": str(error)}
    write_log(json.dumps(line) + "\n")


def _reload(service: Service, write_log: Callable[[str], object]) -> None:
    line: dict[str, object] = {"time": time.time(), "event": "reload"}
    try:
        reply = service.reload()
    except (ForetasteError, SQLAlchemyError) as error:
        line |= {"result": "refused", "reason": str(error)}
    else:
        line |= {"result": "swapped" if reply.changed else "same", "version": reply.version}
    write_log(json.dumps(line) + "\n")

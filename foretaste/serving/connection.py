"""What one connection may take of the server before any request of it is whole.

On uvicorn's protocol: bounds on the request line, on headers and on connections, and a time for
each thing that a client could let the server wait for. Who goes beyond is answered in one write,
and is gone.
"""

import asyncio
import json
import sys
from collections import Counter
from collections.abc import Callable
from http import HTTPStatus
from typing import ClassVar

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from foretaste.serving.metrics import Metrics
from foretaste.serving.settings import ServerSettings

if sys.platform != "win32":
    import resource

SPARE_FILES = 64
"""Of the files that the process may have open, so many are kept for others than connections."""
_HEADER_COST = 32
"""Bytes that a header counts beside its name and value, so that empty ones are bounded too."""


class Connection(HttpToolsProtocol):
    """A connection within the bounds of `limited`, which makes the class that a server uses."""

    settings: ClassVar[ServerSettings]
    metrics: ClassVar[Metrics]
    most: ClassVar[int]
    by_address: ClassVar[Counter[str]]

    def __init__(
        self,
        config: uvicorn.Config,
        server_state: ServerState,
        app_state: dict[str, object],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._in_head, self._heads = False, 0
        """Whether a request line and headers have begun and are not whole, and how many began."""
        self._waiting_bytes, self._header_bytes = 0, 0
        """Of a head that is not whole: what came since its first part, and its headers so far."""
        self._why = (HTTPStatus.BAD_REQUEST, "this is no HTTP request")
        self._timer: asyncio.TimerHandle | None = None
        """Until a head is whole, or until a client has read what was written."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take a connection on, or say that there are too many."""
        super().connection_made(transport)  # type: ignore[arg-type]  # as uvicorn narrows it
        self.by_address[self._address] += 1
        self.metrics.connections.set(len(self.connections))
        if len(self.connections) > self.most:
            self._refuse("connections", HTTPStatus.SERVICE_UNAVAILABLE, "no room: try again")
        elif self.by_address[self._address] > self.settings.max_connections_per_address:
            said = "your address has reached its limit of connections: use one for many requests"
            self._refuse("address", HTTPStatus.SERVICE_UNAVAILABLE, said)
        else:
            self._within(self.settings.header_timeout_s, self._too_slow)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        super().connection_lost(exc)
        self._stop_timer()
        self.metrics.connections.set(len(self.connections))
        self.by_address[self._address] -= 1
        if not self.by_address[self._address]:
            del self.by_address[self._address]

    def data_received(self, data: bytes) -> None:
        """Read on, unless the connection was given up or its head grows too long."""
        head = self._heads if self._in_head else 0
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self._in_head and self._heads == head:  # the parser keeps a header until it is whole
            self._waiting_bytes += len(data)
            if self._waiting_bytes > self.settings.max_header_bytes + self.settings.max_url_bytes:
                said = "the headers are too long"
                self._refuse("header", HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, said)
                return
        at_work = self.cycle is not None and not self.cycle.response_complete
        if self._timer is None and (self._in_head or not at_work):
            self._within(self.settings.header_timeout_s, self._too_slow)

    def on_message_begin(self) -> None:
        """Begin to count a head."""
        super().on_message_begin()
        self._in_head, self._heads = True, self._heads + 1
        self._waiting_bytes = self._header_bytes = 0

    def on_url(self, url: bytes) -> None:
        """Take a part of the URL."""
        super().on_url(url)
        if len(self.url) > self.settings.max_url_bytes:
            self._why = HTTPStatus.REQUEST_URI_TOO_LONG, "the URL is too long"
            raise ValueError("url")  # the parser ends, and `send_400_response` says why

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header."""
        super().on_header(name, value)
        self._header_bytes += len(name) + len(value) + _HEADER_COST
        if self._header_bytes > self.settings.max_header_bytes:
            self._why = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "the headers are too long"
            raise ValueError("header")

    def on_headers_complete(self) -> None:
        """Hand the request on: from here on the guard counts and times it."""
        self._in_head = False
        self._stop_timer()
        super().on_headers_complete()

    def on_response_complete(self) -> None:
        """Wait for the next request, as long as the client reads what it was answered."""
        super().on_response_complete()
        if self.transport.is_closing():
            self._within(self.settings.write_timeout_s, self.transport.abort)

    def pause_writing(self) -> None:
        """Give a client some time to read: an answer that waits holds a place."""
        super().pause_writing()
        self._within(self.settings.write_timeout_s, self.transport.abort)

    def resume_writing(self) -> None:
        """Go on."""
        super().resume_writing()
        if not self.transport.is_closing():
            self._stop_timer()

    def timeout_keep_alive_handler(self) -> None:
        """End an idle connection, whether or not the client has read all."""
        self.transport.abort()

    def send_400_response(self, msg: str) -> None:
        """Say why the parser gave up."""
        status, said = self._why
        reason = {HTTPStatus.REQUEST_URI_TOO_LONG: "url", HTTPStatus.BAD_REQUEST: "malformed"}
        self._refuse(reason.get(status, "header"), status, said)

    @property
    def _address(self) -> str:
        return self.client[0] if self.client else ""

    def _too_slow(self) -> None:
        said = f"no complete head of a request arrived within {self.settings.header_timeout_s:g} s"
        self._refuse("slow", HTTPStatus.REQUEST_TIMEOUT, said)

    def _refuse(self, reason: str, status: HTTPStatus, sentence: str) -> None:
        """Answer in one write and close; a client that does not read it is cut off."""
        self.metrics.refused_connections.labels(reason).inc()
        body = json.dumps({"error": sentence}).encode()
        head = (
            f"HTTP/1.1 {status.value} {status.phrase}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n"
        )
        if status is HTTPStatus.SERVICE_UNAVAILABLE:
            head += "retry-after: 1\r\n"
        if self._in_head or status is not HTTPStatus.REQUEST_TIMEOUT:  # else nothing was asked
            self.transport.write(head.encode() + b"\r\n" + body)
        self.transport.close()
        self._within(self.settings.write_timeout_s, self.transport.abort)

    def _within(self, seconds: float, act: Callable[[], object]) -> None:
        self._stop_timer()
        self._timer = self.loop.call_later(seconds, act)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def limited(settings: ServerSettings, metrics: Metrics) -> type[Connection]:
    """Return the protocol of a server: its bounds, its counters, and its connections by address."""

    class Limited(Connection):
        """Its class holds what its connections share."""

    Limited.settings, Limited.metrics, Limited.by_address = settings, metrics, Counter()
    Limited.most = settings.max_connections
    if sys.platform != "win32":
        files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        if files != resource.RLIM_INFINITY:
            Limited.most = max(1, min(Limited.most, files - SPARE_FILES))
    return Limited

"""A client's connection: limits on what it sends and how long it takes, and early refusals.

`Connection`, a uvicorn protocol, receives bytes and limits the request line, the headers, the
number of connections, and each time that a client could make the server wait. A client that exceeds
a limit gets a short reply, and its connection is closed. A request for a list for which there is no
room is answered here, most of them before they are parsed; all other requests go on to the guard.
"""

import asyncio
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from http import HTTPStatus
from typing import ClassVar

import uvicorn
from starlette.datastructures import Headers
from uvicorn._types import ASGI3Application
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from foretaste.serving.metrics import Admission, answer_route
from foretaste.serving.settings import ServerSettings

if sys.platform != "win32":
    import resource

SPARE_FILES = 64
"""Number of file descriptors that connections leave to other uses."""
TICK_S, PER_TICK, SLOWED_S = 0.02, 10, 1.0
"""Once in so many seconds, this many requests without room are answered, the oldest first, and all
that have waited for so many seconds: a client that ignores Retry-After sends the next one only
then."""
_HEADER_COST = 32
"""Bytes that a header counts beyond its name and value, so that empty ones are limited too."""
PIPELINED = 64
"""Maximum number of requests of a connection that wait for answers to earlier ones, 9 kB each."""
_CLOSES = b"\r\nconnection: close\r\n"
_PLAIN_BYTES = 4_096
"""Longer requests are parsed before they are refused."""
_PLAIN_HEAD = re.compile(  # without headers that change what follows the head, or its connection
    rb"(GET|POST) (/[^ ?#%\x00-\x1f\x7f-\xff]*)(?:\?[!-~]*)? HTTP/1\.1\r\n"
    rb"((?:(?:connection: keep-alive|(?!connection:|expect:|proxy-|transfer-|upgrade:)"
    rb"[a-z0-9-]+:[ -~]*)\r\n)*)\r\n",
    re.IGNORECASE,
)
_LENGTH = re.compile(rb"^content-length:(.*)\r$", re.IGNORECASE | re.MULTILINE)
_ID = re.compile(rb"^x-request-id:(.*)\r$", re.IGNORECASE | re.MULTILINE)


class Connection(HttpToolsProtocol):
    """A connection with limits; `limited` creates the class that a server uses."""

    settings: ClassVar[ServerSettings]
    admission: ClassVar[Admission]
    most: ClassVar[int]
    by_address: ClassVar[Counter[str]]
    refused: ClassVar[dict["Connection", tuple[float, RequestResponseCycle | None, bytes]]]
    """Connections with a request for which there was no room, the oldest first: when it came, the
    request if it was parsed, and the reply, which is still to be sent."""
    turn: ClassVar[asyncio.TimerHandle | None] = None
    """Runs until the next of these replies are sent."""

    def __init__(
        self,
        config: uvicorn.Config,
        server_state: ServerState,
        app_state: dict[str, object],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._is_between = True
        """Whether the parser has read the whole of each request so far."""
        self._in_head = False
        """Whether a head (request line and headers) is incomplete."""
        self._waiting_bytes, self._header_bytes = 0, 0
        """The bytes since the parser's last result, and the size of the request's headers so far,
        which may also follow a body in chunks."""
        self._is_read = True
        """Whether incoming bytes are processed."""
        self._why = (HTTPStatus.BAD_REQUEST, "this is not an HTTP request")
        self._timer: asyncio.TimerHandle | None = None
        """Runs until a head is complete, or until the client has read the reply."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Accept a connection, or reply that there are too many."""
        super().connection_made(transport)  # type: ignore[arg-type]  # as uvicorn narrows it
        self.by_address[self._address] += 1
        beyond = self.by_address[self._address] - self.settings.max_connections_per_address
        self.admission.metrics.connections.set(len(self.connections))
        if len(self.connections) > self.most:
            self._refuse("connections", HTTPStatus.SERVICE_UNAVAILABLE, "no room: try again")
        elif beyond > 0:
            said = "your address has reached its limit of connections: use one for many requests"
            self._is_read = False
            refusal = partial(self._refuse, "address", HTTPStatus.SERVICE_UNAVAILABLE, said)
            is_flood = 4 * beyond > self.settings.max_connections_per_address
            self._within(0.0 if is_flood else SLOWED_S, refusal)  # slow it down
        else:
            self._within(self.settings.header_timeout_s, self._too_slow)

    def connection_lost(self, exc: Exception | None) -> None:
        """Remove the connection."""
        super().connection_lost(exc)
        self._stop_timer()
        self.admission.metrics.connections.set(len(self.connections))
        self.refused.pop(self, None)
        self.by_address[self._address] -= 1
        if not self.by_address[self._address]:
            del self.by_address[self._address]

    def data_received(self, data: bytes) -> None:
        """Process bytes, unless the connection was closed or its head is too long."""
        if not self._is_read:
            return
        self._answer_unparsed()  # before another request of this connection
        refusal = self._early_refusal(data)
        if refusal is not None:
            self._stop_timer()
            self._unset_keepalive_if_required()
            self._wait_for_turn(None, refusal)
            return
        self._waiting_bytes += len(data)
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self._waiting_bytes > self.settings.max_header_bytes + self.settings.max_url_bytes:
            said = "the headers are too long"  # the parser buffers an incomplete one
            self._refuse("header", HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, said)
            return
        at_work = self.cycle is not None and not self.cycle.response_complete
        if self._timer is None and (self._in_head or not at_work):
            self._within(self.settings.header_timeout_s, self._too_slow)

    def on_message_begin(self) -> None:
        """Start to measure a head, unless too many requests of this connection wait."""
        if len(self.pipeline) >= PIPELINED:
            said = f"more than {PIPELINED} requests came before the first was answered"
            self._why = HTTPStatus.TOO_MANY_REQUESTS, said
            raise ValueError("pipeline")
        super().on_message_begin()
        self._is_between = False
        self._in_head = True
        self._waiting_bytes = self._header_bytes = 0

    def on_url(self, url: bytes) -> None:
        """Receive a part of the URL."""
        super().on_url(url)
        self._waiting_bytes = 0
        if len(self.url) > self.settings.max_url_bytes:
            self._why = HTTPStatus.REQUEST_URI_TOO_LONG, "the URL is too long"
            raise ValueError("url")  # the parser stops, and `send_400_response` replies

    def on_header(self, name: bytes, value: bytes) -> None:
        """Receive a header."""
        super().on_header(name, value)
        self._waiting_bytes = 0
        self._header_bytes += len(name) + len(value) + _HEADER_COST
        if self._header_bytes > self.settings.max_header_bytes:
            self._why = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "the headers are too long"
            raise ValueError("header")

    def on_headers_complete(self) -> None:
        """Pass the request on; from here on the guard counts and times it."""
        self._in_head = False
        self._stop_timer()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Receive a part of the body."""
        super().on_body(body)
        self._waiting_bytes = 0

    def on_message_complete(self) -> None:
        """Note the end of a request and its body."""
        super().on_message_complete()
        self._is_between, self._waiting_bytes = True, 0

    def shutdown(self) -> None:
        """Answer a refused request before the server closes the connection."""
        self._answer_unparsed()
        super().shutdown()

    def _early_refusal(self, data: bytes) -> bytes | None:
        """Return the reply to one whole, plain request for a list if there is no room for it.

        The parser would take longer than all the rest of a refusal. It reads whatever is not plain.
        """
        is_idle = self._is_between and (self.cycle is None or self.cycle.response_complete)
        if not is_idle or self.admission.leaving or not self.admission.is_full("/v1/recommend"):
            return None
        head = _PLAIN_HEAD.match(data, 0, _PLAIN_BYTES)
        if head is None:
            return None
        size, path = len(data) - head.end(), head[2].decode()
        lengths = [length.strip() for length in _LENGTH.findall(head[3])]
        if lengths != ([b"%d" % size] if lengths or size else []) or not answer_route(path):
            return None
        given = _ID.search(head[3])
        own_id = given[1].strip().decode() if given else ""
        return self.admission.turned_away(head[1].decode().upper(), path, own_id)

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        scope, headers = cycle.scope, Headers(raw=list(cycle.scope["headers"]))
        if self.admission.leaving:
            cycle.keep_alive = False  # the client should send its next request to another server
        own_id = headers.get("x-request-id", "")
        refusal = self.admission.turned_away(scope["method"], scope["path"], own_id)
        if refusal is None:
            super()._start_asgi_task(cycle, self.admission.expected(scope["path"], app))
        else:
            self._wait_for_turn(cycle, refusal)

    def _wait_for_turn(self, cycle: RequestResponseCycle | None, refusal: bytes) -> None:
        if self.turn is None:
            type(self).turn = self.loop.call_later(TICK_S, self._turn_away, self.loop)
        self.refused[self] = self.loop.time(), cycle, refusal

    def _answer_unparsed(self) -> None:
        """Send the reply to a request that was refused before it was parsed, if it still waits."""
        _, cycle, refusal = self.refused.get(self, (0.0, self.cycle, b""))
        if refusal and cycle is None:
            del self.refused[self]
            self._turned_away(None, refusal)

    @classmethod
    def _turn_away(cls, loop: asyncio.AbstractEventLoop) -> None:
        """Reply to the oldest requests without room, again and again until there are none."""
        came_s, number = loop.time() - SLOWED_S, 0
        most = min(cls.most, cls.settings.max_connections_per_address) * 7 // 8  # leave some free
        while cls.refused:
            connection, (since_s, cycle, refusal) = next(iter(cls.refused.items()))
            if number >= PER_TICK and since_s > came_s and len(cls.refused) <= most:
                cls.turn = loop.call_later(TICK_S, cls._turn_away, loop)
                return
            del cls.refused[connection]
            connection._turned_away(cycle, refusal)
            number += 1
        cls.turn = None

    def _turned_away(self, cycle: RequestResponseCycle | None, refusal: bytes) -> None:
        if self.transport.is_closing():
            return
        stays = cycle is None or (cycle.keep_alive and not cycle.waiting_for_100_continue)
        self.transport.write(refusal if stays else refusal.replace(b"\r\n", _CLOSES, 1))
        if cycle is not None:
            cycle.response_complete = True
        if not stays:
            self.transport.close()
        self.on_response_complete()

    def on_response_complete(self) -> None:
        """Wait for the next request, provided that the client reads its reply."""
        super().on_response_complete()
        if self.transport.is_closing():
            self._within(self.settings.write_timeout_s, self.transport.abort)

    def pause_writing(self) -> None:
        """Limit the time for reading a reply: a pending reply occupies a connection."""
        super().pause_writing()
        self._within(self.settings.write_timeout_s, self.transport.abort)

    def resume_writing(self) -> None:
        """Stop the timer."""
        super().resume_writing()
        if not self.transport.is_closing():
            self._stop_timer()

    def timeout_keep_alive_handler(self) -> None:
        """Close an idle connection, even if the client has not read everything."""
        self.transport.abort()

    def send_400_response(self, msg: str) -> None:
        """Reply with the reason why the parser failed."""
        status, said = self._why
        reason = {
            HTTPStatus.REQUEST_URI_TOO_LONG: "url",
            HTTPStatus.BAD_REQUEST: "malformed",
            HTTPStatus.TOO_MANY_REQUESTS: "pipeline",
        }
        self._refuse(reason.get(status, "header"), status, said)

    @property
    def _address(self) -> str:
        return self.client[0] if self.client else ""

    def _too_slow(self) -> None:
        said = f"no complete request head arrived within {self.settings.header_timeout_s:g} s"
        self._refuse("slow", HTTPStatus.REQUEST_TIMEOUT, said)

    def _refuse(self, reason: str, status: HTTPStatus, sentence: str) -> None:
        """Reply in one write and close the connection, even if the client does not read the
        reply.
        """
        self.admission.dropped(reason, status.value)
        body = json.dumps({"error": sentence}).encode()
        head = (
            f"HTTP/1.1 {status.value} {status.phrase}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n"
        )
        if status is HTTPStatus.SERVICE_UNAVAILABLE:
            head += "retry-after: 1\r\n"
        if self._in_head or status is not HTTPStatus.REQUEST_TIMEOUT:  # there was a request
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


def _open_files() -> int:
    try:
        return len(os.listdir("/dev/fd"))
    except OSError:
        return 0


def limited(settings: ServerSettings, admission: Admission) -> type[Connection]:
    """Return the protocol class of a server, with its limits, its counters and its connections."""

    class Limited(Connection):
        """The class attributes are shared by its connections."""

    Limited.settings, Limited.admission = settings, admission
    Limited.by_address, Limited.refused = Counter(), {}
    Limited.most = settings.max_connections
    if sys.platform != "win32":
        files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        if files != resource.RLIM_INFINITY:
            Limited.most = max(1, min(Limited.most, files - _open_files() - SPARE_FILES))
    return Limited

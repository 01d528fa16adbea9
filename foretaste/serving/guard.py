"""Checks between a client and the routes: limits of connections, token, body and room.

`Connection`, a uvicorn protocol, receives bytes and limits the request line, the headers, the
number of connections, and each time that a client could make the server wait. A client that exceeds
a limit gets a short reply, and its connection is closed; the same holds for a request for which
there is no room, before it is parsed further.

A complete head goes to `Guard`, plain ASGI, which refuses a body that is too large while it
arrives, and a request without room before any work. It also answers and logs the routes' errors.
"""

import asyncio
import json
import math
import os
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from http import HTTPStatus
from typing import ClassVar, final

import uvicorn
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn._types import ASGI3Application
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from foretaste.serving.metrics import (
    NO_ROOM,
    NO_ROOM_SENTENCE,
    SECURITY_HEADERS,
    Admission,
    request_id,
    route_of,
)
from foretaste.serving.settings import Access, ServerSettings, allowed_hosts, needed_role

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
_CLOSES = b"\r\nconnection: close\r\n"


class Connection(HttpToolsProtocol):
    """A connection with limits; `limited` creates the class that a server uses."""

    settings: ClassVar[ServerSettings]
    admission: ClassVar[Admission]
    most: ClassVar[int]
    by_address: ClassVar[Counter[str]]
    refused: ClassVar[dict["Connection", tuple[float, RequestResponseCycle, bytes]]]
    """Connections with a request for which there was no room, the oldest first: when it came, and
    the reply, which is still to be sent."""

    def __init__(
        self,
        config: uvicorn.Config,
        server_state: ServerState,
        app_state: dict[str, object],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._in_head, self._heads = False, 0
        """Whether a head (request line and headers) is incomplete, and the number of heads so
        far."""
        self._waiting_bytes, self._header_bytes = 0, 0
        """For an incomplete head: the bytes since its first part, and the size of its headers so
        far."""
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
        head = self._heads if self._in_head else 0
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self._in_head and self._heads == head:  # the parser buffers an incomplete header
            self._waiting_bytes += len(data)
            if self._waiting_bytes > self.settings.max_header_bytes + self.settings.max_url_bytes:
                said = "the headers are too long"
                self._refuse("header", HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, said)
                return
        at_work = self.cycle is not None and not self.cycle.response_complete
        if self._timer is None and (self._in_head or not at_work):
            self._within(self.settings.header_timeout_s, self._too_slow)

    def on_message_begin(self) -> None:
        """Start to measure a head."""
        super().on_message_begin()
        self._in_head, self._heads = True, self._heads + 1
        self._waiting_bytes = self._header_bytes = 0

    def on_url(self, url: bytes) -> None:
        """Receive a part of the URL."""
        super().on_url(url)
        if len(self.url) > self.settings.max_url_bytes:
            self._why = HTTPStatus.REQUEST_URI_TOO_LONG, "the URL is too long"
            raise ValueError("url")  # the parser stops, and `send_400_response` replies

    def on_header(self, name: bytes, value: bytes) -> None:
        """Receive a header."""
        super().on_header(name, value)
        self._header_bytes += len(name) + len(value) + _HEADER_COST
        if self._header_bytes > self.settings.max_header_bytes:
            self._why = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "the headers are too long"
            raise ValueError("header")

    def on_headers_complete(self) -> None:
        """Pass the request on; from here on the guard counts and times it."""
        self._in_head = False
        self._stop_timer()
        super().on_headers_complete()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        scope, headers = cycle.scope, Headers(raw=list(cycle.scope["headers"]))
        if self.admission.leaving:
            cycle.keep_alive = False  # the client should send its next request to another server
        refusal = self.admission.turned_away(scope["method"], scope["path"], headers)
        if refusal is None:
            super()._start_asgi_task(cycle, self.admission.expected(scope["path"], app))
            return
        if not self.refused:
            self.loop.call_later(TICK_S, self._turn_away, self.loop)
        self.refused[self] = self.loop.time(), cycle, refusal

    @classmethod
    def _turn_away(cls, loop: asyncio.AbstractEventLoop) -> None:
        """Reply to the oldest requests without room, again and again until there are none."""
        came_s, number = loop.time() - SLOWED_S, 0
        most = min(cls.most, cls.settings.max_connections_per_address) * 7 // 8  # leave some free
        while cls.refused:
            connection, (since_s, cycle, refusal) = next(iter(cls.refused.items()))
            if number >= PER_TICK and since_s > came_s and len(cls.refused) <= most:
                loop.call_later(TICK_S, cls._turn_away, loop)
                return
            del cls.refused[connection]
            connection._turned_away(cycle, refusal)
            number += 1

    def _turned_away(self, cycle: RequestResponseCycle, refusal: bytes) -> None:
        if self.transport.is_closing():
            return
        stays = cycle.keep_alive and not cycle.waiting_for_100_continue
        self.transport.write(refusal if stays else refusal.replace(b"\r\n", _CLOSES, 1))
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
        reason = {HTTPStatus.REQUEST_URI_TOO_LONG: "url", HTTPStatus.BAD_REQUEST: "malformed"}
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


OPEN_PATHS = frozenset({"/health", "/ready"})
DRAIN_BYTES = 8_388_608
"""This much of a body that is too large is read and discarded: a client that is still sending when
the connection is closed would not receive the reply."""


@final
class Guard:
    """The outermost ASGI layer around the routes."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        settings: ServerSettings,
        access: Access,
        admission: Admission,
        open_files: frozenset[str],
    ) -> None:
        self._app = app
        self._settings = settings
        self._access = access
        self._hosts = allowed_hosts(settings)
        self._admission = admission
        self._open, self._bodies = OPEN_PATHS | open_files, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        log: dict[str, object] = {"request_id": request_id(Headers(scope=scope))}
        scope.setdefault("state", {})["log"] = log
        answer = _Answer(send, str(log["request_id"]), keeps=scope["path"] in self._open)
        if scope["method"] == "HEAD":  # uvicorn omits the body
            scope = {**scope, "method": "GET", "asked": "HEAD"}
        try:
            await self._answer(scope, receive, answer)
        except (asyncio.CancelledError, KeyboardInterrupt, SystemExit):
            log["cause"] = "the server stopped before it answered"
            raise
        finally:
            self._admission.record(
                scope.get("asked", scope["method"]),
                route_of(scope),
                answer.status or 500,
                time.perf_counter() - started,
                log,
            )

    async def _answer(self, scope: Scope, receive: Receive, answer: "_Answer") -> None:
        try:
            await self._pass(scope, receive, answer.send)
        except (asyncio.CancelledError, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic of native code is not an Exception
            scope["state"]["log"]["cause"] = "".join(traceback.format_exception(error))
            if answer.status:  # part of another reply was sent: close the connection
                raise
            broken = refuse(500, "the server failed on this request; see its log")
            await broken(scope, receive, answer.send)

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] in self._open:
            await self._app(scope, receive, send)
            return
        taken = (
            self._misdirected(scope)
            or self._without_token(scope)
            or self._without_room(scope)  # before the body is read, and again afterwards
            or await self._body(scope, receive)
        )
        if isinstance(taken, bytes):
            taken = self._without_room(scope) or taken
        if not isinstance(taken, bytes):
            await taken(scope, receive, send)
            return
        with self._admission.place(scope["path"]):
            await self._app(scope, _replay(taken, receive), send)

    def _misdirected(self, scope: Scope) -> Response | None:
        """Refuse requests that a page of another site makes a browser send."""
        headers = Headers(scope=scope)
        host = headers.get("host", "").lower()
        name = host.rpartition(":")[0] if host[-1:].isdigit() and ":" in host else host
        if self._hosts and name not in self._hosts:
            return refuse(
                421,
                f"this server answers as {', '.join(sorted(self._hosts))}, not as "
                f"{name or 'an empty name'}: use one of these names, or add the name to the "
                "server's `hosts`",
            )
        if scope["method"] not in ("GET", "OPTIONS") and _is_cross_site(headers, host):
            return refuse(403, "a page of another site sent this request: it was not executed")
        return None

    def _without_token(self, scope: Scope) -> Response | None:
        if self._access.is_open:
            return None
        scheme, _, given = Headers(scope=scope).get("authorization", "").partition(" ")
        token = self._access.find(given.strip().encode("latin-1"))
        if token is None or scheme.lower() != "bearer":
            said = "this server needs a token: send the header `Authorization: Bearer TOKEN`"
            return refuse(401, said, {"www-authenticate": "Bearer"})
        scope["state"]["log"]["token"] = token.name
        role = needed_role(scope["method"], scope["path"])
        if not token.may(role):
            return refuse(
                403, f"the token {token.name} may not do this: it does not have the role {role}"
            )
        wait_s = token.wait_s()
        if wait_s:
            after = str(math.ceil(wait_s))
            said = f"the token {token.name} has used up its requests of this minute: try again in "
            return refuse(429, f"{said}{after} s", {"retry-after": after})
        return None

    def _without_room(self, scope: Scope) -> Response | None:
        return self._no_room(scope) if self._admission.is_full(scope["path"]) else None

    def _no_room(self, scope: Scope, said: str = NO_ROOM_SENTENCE) -> Response:
        self._admission.metrics.shed.inc()
        scope["state"]["log"]["cause"] = NO_ROOM
        return refuse(503, said, {"retry-after": "1"})

    async def _body(self, scope: Scope, receive: Receive) -> bytes | Response:
        """Return the whole body, or the reply that refuses it."""
        headers, most = Headers(scope=scope), self._settings.max_body_bytes
        encoding = headers.get("content-encoding", "identity")
        if encoding.strip().lower() != "identity":
            said = f"the body is encoded as {encoding}: send it as plain JSON"
            return refuse(415, said, {"accept-encoding": "identity", "connection": "close"})
        length = headers.get("content-length", "0")
        if not length.isdigit() or int(length[:20]) > most + DRAIN_BYTES:
            return self._too_large()
        size = most if "transfer-encoding" in headers else min(most, int(length[:20]))
        if size and self._bodies + size > self._settings.max_bodies_bytes:
            said = f"bodies of {self._bodies} bytes are in transfer: try again in a second"
            return self._no_room(scope, said)
        self._bodies += size
        try:
            async with asyncio.timeout(self._settings.body_timeout_s):
                body = await _read_body(receive, keep=most)
        except ClientDisconnect:
            return refuse(400, "the client disconnected before its body had arrived")
        except TimeoutError:
            said = f"the body did not arrive within {self._settings.body_timeout_s:g} s"
            return refuse(408, said, {"connection": "close"})
        finally:
            self._bodies -= size
        return self._too_large() if len(body) > most else body

    def _too_large(self) -> Response:
        said = f"the body is larger than {self._settings.max_body_bytes} bytes: send it in parts"
        return refuse(413, said, {"connection": "close"})


def _is_cross_site(headers: Headers, host: str) -> bool:
    """Return whether the browser marks a request as sent by a page of another site."""
    site, origin = headers.get("sec-fetch-site"), headers.get("origin")
    if site is not None:
        return site not in ("same-origin", "none")
    return origin is not None and origin.lower().partition("://")[2] != host


def refuse(status: int, sentence: str, headers: Mapping[str, str] | None = None) -> Response:
    """Return an error reply in the format of all routes: `{"error": sentence}`."""
    return JSONResponse({"error": sentence}, status, dict(headers or {}))


@final
class _Answer:
    """A reply to a client, with the headers that all replies have."""

    def __init__(self, send: Send, request_id: str, *, keeps: bool) -> None:
        self.status = 0
        """The status; 0 until the reply has begun."""
        self._send, self._request_id, self._keeps = send, request_id, keeps

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers["x-request-id"] = self._request_id
            for name, value in SECURITY_HEADERS.items():
                headers.setdefault(name, value)
            if not self._keeps:
                headers.setdefault("cache-control", "no-store")
        await self._send(message)


async def _read_body(receive: Receive, *, keep: int) -> bytes:
    """Read a body to its end; keep at most `keep` + 1 bytes."""
    body, size, more = bytearray(), 0, True
    while more and size <= keep + DRAIN_BYTES:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        part = message.get("body", b"")
        size += len(part)
        body += part[: max(0, keep + 1 - len(body))]
        more = message.get("more_body", False)
    return bytes(body)


def _replay(body: bytes, receive: Receive) -> Receive:
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay

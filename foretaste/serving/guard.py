"""What stands between the socket and the routes: token, body size, concurrency, log, headers.

Plain ASGI, so that a body too large is refused while it arrives, and a request that cannot be
taken on is refused before anything is done for it.
"""

import asyncio
import hmac
import json
import time
from collections.abc import Callable, Mapping
from typing import final

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from foretaste.serving.metrics import Metrics
from foretaste.serving.settings import ServerSettings

OPEN_PATHS = frozenset({"/health", "/ready"})
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
DRAIN_BYTES = 8_388_608
"""So much of a body too large is read and thrown away: a client that is still sending when its
connection is closed would lose the answer that says why."""
SECURITY_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}


@final
class Guard:
    """Wraps the routes. It must be the outermost layer."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        settings: ServerSettings,
        metrics: Metrics,
        open_files: frozenset[str],
        write_log: Callable[[str], object],
    ) -> None:
        self._app = app
        self._settings = settings
        self._metrics = metrics
        self._open = OPEN_PATHS | open_files
        self._write_log = write_log
        self._in_flight = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.perf_counter(), 500

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                for name, value in SECURITY_HEADERS.items():
                    headers.setdefault(name, value)
                if scope["path"] not in self._open:
                    headers.setdefault("cache-control", "no-store")
            await send(message)

        try:
            await self._pass(scope, receive, send_with_headers)
        finally:
            self._record(scope, status, time.perf_counter() - started)

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] in self._open:
            await self._app(scope, receive, send)
            return
        taken = self._without_token(scope) or await self._body(scope, receive)
        counted = scope["path"] != "/metrics"  # which is asked for most when all is full
        if isinstance(taken, bytes) and counted:
            taken = self._without_room() or taken
        if not isinstance(taken, bytes):
            await taken(scope, receive, send)
            return
        self._in_flight += counted
        self._metrics.in_flight.set(self._in_flight)
        try:
            await self._app(scope, _replay(taken, receive), send)
        finally:
            self._in_flight -= counted
            self._metrics.in_flight.set(self._in_flight)

    def _without_token(self, scope: Scope) -> Response | None:
        if not self._settings.token:
            return None
        scheme, _, given = Headers(scope=scope).get("authorization", "").partition(" ")
        expected = self._settings.token.encode()
        if scheme.lower() == "bearer" and hmac.compare_digest(
            given.strip().encode("latin-1"), expected
        ):
            return None
        return refuse(
            401,
            "this server wants its token: send the header `Authorization: Bearer TOKEN`",
            {"www-authenticate": "Bearer"},
        )

    def _without_room(self) -> Response | None:
        if self._in_flight < self._settings.max_concurrency:
            return None
        self._metrics.shed.inc()
        return refuse(
            503,
            f"{self._in_flight} requests are at work, the most this server takes on: "
            "try again in a second",
            {"retry-after": "1"},
        )

    async def _body(self, scope: Scope, receive: Receive) -> bytes | Response:
        """Return the whole body, or why it is not taken."""
        length = Headers(scope=scope).get("content-length", "0")
        most = self._settings.max_body_bytes
        if not length.isdigit() or int(length[:20]) > most + DRAIN_BYTES:
            return self._too_large()
        try:
            async with asyncio.timeout(self._settings.body_timeout_s):
                body = await _read_body(receive, keep=most)
        except ClientDisconnect:
            return refuse(400, "the client went away before its body had come")
        except TimeoutError:
            return refuse(
                408,
                f"the body did not arrive within {self._settings.body_timeout_s:g} s",
                {"connection": "close"},
            )
        return self._too_large() if len(body) > most else body

    def _too_large(self) -> Response:
        return refuse(
            413,
            f"the body is larger than {self._settings.max_body_bytes} bytes: send it in parts",
            {"connection": "close"},
        )

    def _record(self, scope: Scope, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path_format", "none")
        method = scope["method"] if scope["method"] in METHODS else "other"
        self._metrics.requests.labels(method, route, str(status)).inc()
        self._metrics.seconds.labels(route).observe(seconds)
        line: dict[str, object] = {
            "time": time.time(),
            "method": method,
            "route": route,
            "status": status,
            "ms": round(seconds * 1000, 3),
        }
        line |= scope.get("state", {}).get("log", {})
        self._write_log(json.dumps(line) + "\n")


def refuse(status: int, sentence: str, headers: Mapping[str, str] | None = None) -> Response:
    """Return an error as every route says it: `{"error": sentence}`."""
    return JSONResponse({"error": sentence}, status, dict(headers or {}))


async def _read_body(receive: Receive, *, keep: int) -> bytes:
    """Read a body to its end; of one larger than `keep`, only that much and one byte is kept."""
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

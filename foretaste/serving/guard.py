"""What stands between the socket and the routes: token, body size, concurrency, log, headers.

Plain ASGI, so that a body too large is refused while it arrives, and a request that cannot be
taken on is refused before anything is done for it. What goes wrong within is answered here, with
its cause in the log.
"""

import asyncio
import json
import math
import re
import time
import traceback
import uuid
from collections.abc import Callable, Mapping
from typing import final

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from foretaste.serving.access import Access, Bucket, is_loopback, needed_role
from foretaste.serving.metrics import Metrics
from foretaste.serving.settings import ServerSettings

REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")
"""What is taken for a client's own `X-Request-ID`; in place of anything else there is a new one."""
UNCOUNTED = "/metrics"
"""It is asked for most when all is full."""
NO_ROOM = "no room"
REFUSED = frozenset({401, 403, 408, 413, 421, 429})
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
        access: Access,
        metrics: Metrics,
        open_files: frozenset[str],
        write_log: Callable[[str], object],
    ) -> None:
        self._app = app
        self._settings = settings
        self._access = access
        self._hosts = _allowed_hosts(settings)
        self._metrics = metrics
        self._open = OPEN_PATHS | open_files
        self._write_log = write_log
        self._in_flight, self._bodies = 0, 0
        self._lines, self._unlogged = Bucket(settings.refusals_logged_per_minute), 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        log: dict[str, object] = {"request_id": _request_id(scope)}
        scope.setdefault("state", {})["log"] = log
        answer = _Answer(send, str(log["request_id"]), keeps=scope["path"] in self._open)
        if scope["method"] == "HEAD":  # the server in front leaves the body out
            scope = {**scope, "method": "GET", "asked": "HEAD"}
        try:
            await self._answer(scope, receive, answer)
        except (asyncio.CancelledError, KeyboardInterrupt, SystemExit):
            log["cause"] = "the server was stopped before it had answered"
            raise
        finally:
            self._record(scope, answer.status or 500, time.perf_counter() - started)

    async def _answer(self, scope: Scope, receive: Receive, answer: "_Answer") -> None:
        try:
            await self._pass(scope, receive, answer.send)
        except (asyncio.CancelledError, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic of native code is no Exception
            scope["state"]["log"]["cause"] = "".join(traceback.format_exception(error))
            if answer.status:  # half of another answer has gone out: end the connection
                raise
            broken = refuse(500, "the server failed on this request; its log says why")
            await broken(scope, receive, answer.send)

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] in self._open:
            await self._app(scope, receive, send)
            return
        taken = (
            self._misdirected(scope)
            or self._without_token(scope)
            or self._without_room(scope)  # before its body, and again after it
            or await self._body(scope, receive)
        )
        if isinstance(taken, bytes):
            taken = self._without_room(scope) or taken
        counted = scope["path"] != UNCOUNTED
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

    def _misdirected(self, scope: Scope) -> Response | None:
        """Refuse what a foreign page makes a browser send."""
        headers = Headers(scope=scope)
        host = headers.get("host", "").lower()
        name = host.rpartition(":")[0] if host[-1:].isdigit() and ":" in host else host
        if self._hosts and name not in self._hosts:
            return refuse(
                421,
                f"this server answers as {', '.join(sorted(self._hosts))}, not as "
                f"{name or 'nobody'}: use one of these names, or add the name to the server's "
                "`hosts`",
            )
        if scope["method"] not in ("GET", "OPTIONS") and _is_cross_site(headers, host):
            return refuse(403, "a page of another site sent this request: it changes nothing here")
        return None

    def _without_token(self, scope: Scope) -> Response | None:
        if self._access.is_open:
            return None
        scheme, _, given = Headers(scope=scope).get("authorization", "").partition(" ")
        token = self._access.find(given.strip().encode("latin-1"))
        if token is None or scheme.lower() != "bearer":
            return refuse(
                401,
                "this server needs a token: send the header `Authorization: Bearer TOKEN`",
                {"www-authenticate": "Bearer"},
            )
        scope["state"]["log"]["token"] = token.name
        role = needed_role(scope["method"], scope["path"])
        if not token.may(role):
            return refuse(
                403, f"the token {token.name} may not do this: it does not have the role {role}"
            )
        wait_s = token.wait_s()
        if wait_s:
            return refuse(
                429,
                f"the token {token.name} has used up its requests of this minute: try again in "
                f"{math.ceil(wait_s)} s",
                {"retry-after": str(math.ceil(wait_s))},
            )
        return None

    def _without_room(self, scope: Scope) -> Response | None:
        if self._in_flight < self._settings.max_concurrency or scope["path"] == UNCOUNTED:
            return None
        return self._no_room(scope, f"{self._in_flight} requests are in progress")

    def _no_room(self, scope: Scope, said: str) -> Response:
        self._metrics.shed.inc()
        scope["state"]["log"]["cause"] = NO_ROOM
        return refuse(
            503,
            f"{said}, the most this server takes on: try again in a second",
            {"retry-after": "1"},
        )

    async def _body(self, scope: Scope, receive: Receive) -> bytes | Response:
        """Return the whole body, or why it is not taken."""
        headers, most = Headers(scope=scope), self._settings.max_body_bytes
        length = headers.get("content-length", "0")
        if not length.isdigit() or int(length[:20]) > most + DRAIN_BYTES:
            return self._too_large()
        size = most if "transfer-encoding" in headers else min(most, int(length[:20]))
        if size and self._bodies + size > self._settings.max_bodies_bytes:
            return self._no_room(scope, f"bodies of {self._bodies} bytes are on their way")
        self._bodies += size
        try:
            async with asyncio.timeout(self._settings.body_timeout_s):
                body = await _read_body(receive, keep=most)
        except ClientDisconnect:
            return refuse(400, "the client disconnected before its body had arrived")
        except TimeoutError:
            return refuse(
                408,
                f"the body did not arrive within {self._settings.body_timeout_s:g} s",
                {"connection": "close"},
            )
        finally:
            self._bodies -= size
        return self._too_large() if len(body) > most else body

    def _too_large(self) -> Response:
        return refuse(
            413,
            f"the body is larger than {self._settings.max_body_bytes} bytes: send it in parts",
            {"connection": "close"},
        )

    def _record(self, scope: Scope, status: int, seconds: float) -> None:
        route, asked = _route(scope), scope.get("asked", scope["method"])
        method = asked if asked in METHODS else "other"
        self._metrics.requests.labels(method, route, str(status)).inc()
        self._metrics.seconds.labels(route).observe(seconds)
        is_refusal = status in REFUSED or scope["state"]["log"].get("cause") == NO_ROOM
        if is_refusal and self._lines.wait_s():
            self._unlogged += 1
            return
        line: dict[str, object] = {
            "time": time.time(),
            "method": method,
            "route": route,
            "status": status,
            "ms": round(seconds * 1000, 3),
        }
        if self._unlogged:
            line["refusals_not_logged"], self._unlogged = self._unlogged, 0
        line |= scope["state"]["log"]
        self._write_log(json.dumps(line) + "\n")


def _allowed_hosts(settings: ServerSettings) -> frozenset[str]:
    """Return the names that a server answers by; none: any."""
    if settings.hosts or not is_loopback(settings.host):
        return frozenset(host.lower() for host in settings.hosts)
    own = f"[{settings.host}]" if ":" in settings.host else settings.host
    return frozenset({"localhost", "127.0.0.1", "[::1]", own})


def _is_cross_site(headers: Headers, host: str) -> bool:
    """Return whether a browser says that a page of another site made it send a request."""
    site, origin = headers.get("sec-fetch-site"), headers.get("origin")
    if site is not None:
        return site not in ("same-origin", "none")
    return origin is not None and origin.lower().partition("://")[2] != host


def _request_id(scope: Scope) -> str:
    given = Headers(scope=scope).get("x-request-id", "")
    return given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex


def _route(scope: Scope) -> str:
    """Return the path of a request's route, also of one that was refused before it got there."""
    routes = [scope["route"]] if "route" in scope else scope["app"].routes
    for route in routes:
        if "route" in scope or route.matches(scope)[0] is not Match.NONE:
            return str(getattr(route, "path_format", "none"))
    return "none"


def refuse(status: int, sentence: str, headers: Mapping[str, str] | None = None) -> Response:
    """Return an error as every route says it: `{"error": sentence}`."""
    return JSONResponse({"error": sentence}, status, dict(headers or {}))


@final
class _Answer:
    """What goes out to a client, with the headers that every answer has."""

    def __init__(self, send: Send, request_id: str, *, keeps: bool) -> None:
        self.status = 0
        """0 until the answer has begun."""
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

"""Checks between a connection and the routes: host, token, body and room.

`Guard`, plain ASGI, receives requests whose head is complete. It refuses a body that is too large
while it arrives, and a request without room before any work. It also answers and logs the routes'
errors.
"""

import asyncio
import math
import time
import traceback
from collections.abc import Mapping
from typing import final
from urllib.parse import unquote_to_bytes

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from foretaste.serving.metrics import (
    NO_ROOM,
    NO_ROOM_SENTENCE,
    SECURITY_HEADERS,
    Admission,
    request_id,
    route_of,
)
from foretaste.serving.settings import Access, ServerSettings, allowed_hosts, needed_role

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
        own_id = Headers(scope=scope).get("x-request-id", "")
        log: dict[str, object] = {"request_id": request_id(own_id)}
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
            or _undecodable(scope)
            or self._without_token(scope)
            or self._without_room(scope)  # before the body is read, and again afterwards
            or await self._body(scope, receive)
        )
        if isinstance(taken, bytes):
            taken = self._without_room(scope) or taken
        if not isinstance(taken, bytes):
            await taken(scope, receive, send)
            return
        with self._admission.place(scope["path"]) as scope["state"]["place"]:
            await self._app(scope, _replay(taken, receive), send)

    def _misdirected(self, scope: Scope) -> Response | None:
        """Refuse requests that a page of another site makes a browser send."""
        headers = Headers(scope=scope)
        host = ", ".join(headers.getlist("host")).lower()
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


def _undecodable(scope: Scope) -> Response | None:
    """Refuse a URL that is not UTF-8: with its bytes replaced, two ids would be one."""
    url = bytes(scope.get("raw_path") or b"") + b"?" + scope["query_string"]
    if b"%" in url:
        try:
            unquote_to_bytes(url).decode()
        except UnicodeDecodeError:
            return refuse(400, "the URL is not UTF-8")
    return None


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

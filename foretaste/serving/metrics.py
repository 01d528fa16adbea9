"""Metrics and admission: Prometheus counters, the log, and whether there is room for a request."""

import asyncio
import json
import math
import random
import re
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from http import HTTPStatus
from typing import Any, final

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from sqlalchemy.exc import SQLAlchemyError
from starlette.routing import Match
from starlette.types import Scope
from uvicorn._types import ASGI3Application

from foretaste.serving.settings import Bucket, ServerSettings

SECONDS = (0.001, 0.002, 0.004, 0.008, 0.015, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)

REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")
"""Valid values of a client's `X-Request-ID`; any other value is replaced by a new id."""
UNCOUNTED = "/metrics"
"""This path is answered even if there is no room, because metrics matter most then."""
WINDOW, OVERLOAD = 20, 1.25
"""The load is averaged over the time that this many lists take. Above this load, requests come
faster than they can be answered for too long to be a burst."""
PLACES = 1.6
"""At a load L above `OVERLOAD`, there is room for one list less than threads plus this number
divided by ln(L), rounded up: for 4 lists and two threads at twice the load that can be answered,
for 2 at five times. So lists wait briefly, and a core is idle for about 3 % of the time."""
BURST = 16
"""Number of lists that may be requested together, however long they take, as by a moved slider."""
NO_ROOM = "no room"
NO_ROOM_SENTENCE = "the server has as many requests in progress as it allows: try again in a second"
ANSWERS = {
    "/v1/recommend": "/v1/recommend",
    "/recommendations": "/v1/users/{user_id}/recommendations",
    "/similar": "/v1/items/{item_id}/similar",
}
"""Path endings of the routes for which a model computes an answer, with the routes."""
REFUSED = frozenset({401, 403, 408, 413, 415, 421, 429})
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
SECURITY_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}


@final
class Metrics:
    """The counters of one server, in their own registry, so that two servers in a process stay
    apart.
    """

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        counter, gauge = partial(Counter, registry=registry), partial(Gauge, registry=registry)
        seconds = partial(Histogram, registry=registry, buckets=SECONDS)
        self.requests = counter(
            "foretaste_requests", "Requests answered.", ("method", "route", "status")
        )
        self.seconds = seconds(
            "foretaste_request_seconds",
            "Time from the first byte of a request to the last byte of its answer.",
            ("route",),
        )
        self.stages = seconds(
            "foretaste_stage_seconds",
            "Time of each stage of a recommendation: encode, search, rank, rules.",
            ("stage",),
        )
        self.shed = counter("foretaste_shed", "Requests answered with 503 for lack of room.")
        self.connections = gauge("foretaste_connections", "Open connections.")
        self.refused_connections = counter(
            "foretaste_refused_connections",
            "Connections dropped before a complete request arrived, by reason.",
            ("reason",),
        )
        self.in_flight = gauge("foretaste_in_flight", "Requests in progress or waiting.")
        self.events = counter("foretaste_events_stored", "Live events stored.")
        self.answers = counter(
            "foretaste_answers",
            "Recommendations, by source and by the model that answered.",
            ("source", "model"),
        )
        self.answer_seconds = seconds(
            "foretaste_answer_seconds",
            "Time of all stages of a recommendation, by the model that answered: active or canary.",
            ("model",),
        )
        self.reloads = counter(
            "foretaste_reloads", "Attempts to load the bundle again.", ("result",)
        )
        self.model = Info("foretaste_model", "The active model.", registry=registry)
        self.store_seconds = seconds(
            "foretaste_store_seconds",
            "Calls to the store of live events, including failed ones.",
            ("operation",),
        )
        self.store_errors = counter(
            "foretaste_store_errors",
            "Calls to the store of live events that failed.",
            ("operation",),
        )
        ProcessCollector(registry=registry)  # memory, CPU seconds, open files, start time

    @contextmanager
    def store(self, operation: str) -> Iterator[None]:
        """Time the call to the store inside the context, and count it if it fails."""
        started = time.perf_counter()
        with self.store_errors.labels(operation).count_exceptions(SQLAlchemyError):
            try:
                yield
            finally:
                seconds = time.perf_counter() - started
                self.store_seconds.labels(operation).observe(seconds)

    def exposition(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self._registry)


@final
class Place:
    """A request in progress or waiting."""

    def __init__(self) -> None:
        self.aside_s = 0.0
        """Seconds for which it waited for something other than a thread."""


@final
class Admission:
    """Decides whether there is room for a request; counts and logs requests."""

    def __init__(
        self, settings: ServerSettings, metrics: Metrics, write_log: Callable[[str], object]
    ) -> None:
        """Start without requests.

        Args:
            settings: The server's settings, with its limits.
            metrics: The counters.
            write_log: Takes one line of JSON per request or fault, its newline included.
        """
        self._settings, self.metrics, self.write_log = settings, metrics, write_log
        self._threads = settings.threads  # a system call
        self.taken, self._answers, self._coming, self._each_s = 0, 0, 0, 0.0
        """Numbers of requests in progress or waiting, of those that a model answers, and of those
        that have not begun; and the seconds that each adds to the wait of the next one."""
        self.aside, self.costly = 0, 0
        """Numbers of lists that wait for the store or for other costly lists, which are not counted
        above, and of costly lists in progress or waiting."""
        self._turns = asyncio.Semaphore(max(1, self._threads // 2))
        self.leaving = False
        """Whether the server is about to stop listening."""
        self._load, self._came_s = 0.0, 0.0
        """How many seconds the lists would take that are requested in a second, and when the latest
        was requested."""
        self._lines, self._unlogged = Bucket(settings.refusals_logged_per_minute), 0

    def is_full(self, path: str) -> bool:
        """Return whether a new request would exceed the limit, or would wait too long."""
        if path == UNCOUNTED:
            return False
        if self.taken + self._coming >= self._settings.max_concurrency:
            return True
        answers = self._answers + self._coming
        if answers < max(2, self._threads) or answer_route(path) is None:
            return False
        if self._load > OVERLOAD:
            return answers >= self._threads - 1 + math.ceil(PLACES / math.log(self._load))
        return answers > BURST and answers * self._each_s > self._settings.max_wait_s

    def expected(self, path: str, app: ASGI3Application) -> ASGI3Application:
        """Count a request for a list until it begins: hundreds may have arrived together."""
        if answer_route(path) is None:
            return app

        async def begin(*asgi: Any) -> None:
            self._coming -= 1
            await app(*asgi)

        self._coming += 1
        return begin

    @contextmanager
    def place(self, path: str) -> Iterator[Place]:
        """Count a request while it waits or runs, and update the expected time of requests."""
        counted, computes = path != UNCOUNTED, answer_route(path) is not None
        self.taken, self._answers = self.taken + counted, self._answers + computes
        self.metrics.in_flight.set(self.taken + self.aside)
        among, started, place = self._answers, time.perf_counter(), Place()
        try:
            yield place
        finally:
            self.taken, self._answers = self.taken - counted, self._answers - computes
            self.metrics.in_flight.set(self.taken + self.aside)
            if computes:
                each_s = (time.perf_counter() - started - place.aside_s) / among
                known_s = self._each_s or each_s  # a single stall must not cause refusals for long
                self._each_s = known_s + (min(each_s, 2 * known_s) - known_s) / 20

    @contextmanager
    def set_aside(self, place: Place) -> Iterator[None]:
        """Leave a list out of all counts while it waits for something other than a thread."""
        began = time.perf_counter()
        self.taken, self._answers, self.aside = self.taken - 1, self._answers - 1, self.aside + 1
        try:
            yield
        finally:
            self.taken, self._answers = self.taken + 1, self._answers + 1
            self.aside, place.aside_s = self.aside - 1, place.aside_s + time.perf_counter() - began

    @asynccontextmanager
    async def turn(self, place: Place) -> AsyncIterator[None]:
        """Let a costly list wait while half of the threads compute others, so that short lists have
        the other half.
        """
        self.costly += 1
        try:
            with self.set_aside(place):
                await self._turns.acquire()
            try:
                yield
            finally:
                self._turns.release()
        finally:
            self.costly -= 1

    def turned_away(self, method: str, path: str, given_id: str) -> bytes | None:
        """Return the complete reply to a request for which there is no room, None if there is room.

        This takes half the time of a refusal by a route, which matters at thousands of requests a
        second.
        """
        route = answer_route(path)
        if route is None:
            return None
        self._count_request()
        if method == "HEAD" or not self.is_full(path):
            return None
        log: dict[str, object] = {"request_id": request_id(given_id), "cause": NO_ROOM}
        self.metrics.shed.inc()
        self.record(method, route, 503, 0.0, log)
        return _REFUSAL.replace(b"ID", str(log["request_id"]).encode(), 1)

    def _count_request(self) -> None:
        if self._each_s:  # else no list was ever computed
            now_s, window_s = time.perf_counter(), WINDOW * self._each_s
            self._load = self._load * math.exp((self._came_s - now_s) / window_s) + 1 / WINDOW
            self._came_s = now_s

    def dropped(self, reason: str, status: int) -> None:
        """Count and log a connection that was closed before a request was complete."""
        self.metrics.refused_connections.labels(reason).inc()
        if self._lines.wait_s():
            self._unlogged += 1
            return
        line = {"time": time.time(), "event": "connection", "status": status, "cause": reason}
        self.write_log(json.dumps(line) + "\n")

    def record(
        self, method: str, route: str, status: int, seconds: float, log: dict[str, object]
    ) -> None:
        """Count an answer, and log it unless the limit for logged refusals is reached."""
        method = method if method in METHODS else "other"
        self.metrics.requests.labels(method, route, str(status)).inc()
        self.metrics.seconds.labels(route).observe(seconds)
        is_refusal = status in REFUSED or log.get("cause") == NO_ROOM
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
        self.write_log(json.dumps(line | log) + "\n")


def _refusal() -> bytes:
    body = json.dumps({"error": NO_ROOM_SENTENCE}).encode()
    headers = {
        "content-type": "application/json",
        "content-length": len(body),
        "retry-after": 1,
        "cache-control": "no-store",
        **SECURITY_HEADERS,
    }
    lines = [f"{name}: {value}\r\n" for name, value in headers.items()]
    head = f"HTTP/1.1 503 {HTTPStatus(503).phrase}\r\nx-request-id: ID\r\n{''.join(lines)}\r\n"
    return head.encode() + body


_REFUSAL = _refusal()


def answer_route(path: str) -> str | None:
    """Return the route of a path for which a model computes an answer, None for other paths."""
    return ANSWERS.get(path if path == "/v1/recommend" else path[path.rfind("/") :])


def route_of(scope: Scope) -> str:
    """Return the path of a request's route, also of one that was refused before it got there."""
    routes = [scope["route"]] if "route" in scope else scope["app"].routes
    for route in routes:
        if "route" in scope or route.matches(scope)[0] is not Match.NONE:
            return str(getattr(route, "path_format", "none"))
    return "none"


def request_id(given: str) -> str:
    """Return the id that the client gave a request, or a new one."""
    return given if REQUEST_ID.fullmatch(given) else f"{random.getrandbits(128):032x}"

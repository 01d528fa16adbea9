"""What the server counts, in Prometheus' terms and in its log, and whether it has room."""

import json
import re
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http import HTTPStatus
from typing import final

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
from starlette.datastructures import Headers

from foretaste.serving.settings import Bucket, ServerSettings

SECONDS = (0.001, 0.002, 0.004, 0.008, 0.015, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)

REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")
"""What is taken for a client's own `X-Request-ID`; in place of anything else there is a new one."""
UNCOUNTED = "/metrics"
"""It is asked for most when all is full."""
NO_ROOM = "no room"
NO_ROOM_SENTENCE = "as many requests as this server takes on are in progress: try again in a second"
ANSWERS = {
    "/v1/recommend": "/v1/recommend",
    "/recommendations": "/v1/users/{user_id}/recommendations",
    "/similar": "/v1/items/{item_id}/similar",
}
"""Ends of the paths that a model computes an answer for, and their routes."""
REFUSED = frozenset({401, 403, 408, 413, 421, 429})
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
    """One server's counters, in a registry of their own: two servers in a process do not mix."""

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
            "From the first byte of a request to the last of its answer.",
            ("route",),
        )
        self.stages = seconds(
            "foretaste_stage_seconds",
            "Of a recommendation: encode, search, rank, rules.",
            ("stage",),
        )
        self.shed = counter("foretaste_shed", "Requests answered 503 because there was no room.")
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
            "Recommendations, by where they came from and which model answered.",
            ("source", "model"),
        )
        self.answer_seconds = seconds(
            "foretaste_answer_seconds",
            "All stages of a recommendation, by which model answered: active or canary.",
            ("model",),
        )
        self.reloads = counter(
            "foretaste_reloads", "Attempts to load the bundle again.", ("result",)
        )
        self.model = Info("foretaste_model", "The model that serves.", registry=registry)
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
        ProcessCollector(registry=registry)  # memory, CPU seconds, open files, start

    @contextmanager
    def store(self, operation: str) -> Iterator[None]:
        """Time what is done inside, a call to the store, and count it if it fails."""
        started = time.perf_counter()
        with self.store_errors.labels(operation).count_exceptions(SQLAlchemyError):
            try:
                yield
            finally:
                seconds = time.perf_counter() - started
                self.store_seconds.labels(operation).observe(seconds)

    def exposition(self) -> bytes:
        """Return everything in Prometheus' text format."""
        return generate_latest(self._registry)


@final
class Admission:
    """Which requests there is room for, and what is counted and logged of them."""

    def __init__(
        self, settings: ServerSettings, metrics: Metrics, write_log: Callable[[str], object]
    ) -> None:
        """Begin with none.

        Args:
            settings: Bounds.
            metrics: What is counted.
            write_log: Takes one line of JSON per request or fault, its newline included.
        """
        self._settings, self.metrics, self.write_log = settings, metrics, write_log
        self.taken, self._answers, self._each_s = 0, 0, 0.0
        """Requests at work or waiting; those of them that a model answers; what each of these adds
        to the time of the next, seconds."""
        self._lines, self._unlogged = Bucket(settings.refusals_logged_per_minute), 0

    def is_full(self, path: str) -> bool:
        """Return whether a request would be one too many, or wait too long for those before it."""
        if path == UNCOUNTED:
            return False
        if self.taken >= self._settings.max_concurrency:
            return True
        if self._answers < 2 * self._settings.num_threads or answer_route(path) is None:
            return False
        return self._answers * self._each_s > self._settings.max_wait_s

    @contextmanager
    def place(self, path: str) -> Iterator[None]:
        """Count a request while it waits and is worked at, and learn from the time it takes."""
        counted, computes = path != UNCOUNTED, answer_route(path) is not None
        self.taken, self._answers = self.taken + counted, self._answers + computes
        self.metrics.in_flight.set(self.taken)
        among, started = self._answers, time.perf_counter()
        try:
            yield
        finally:
            self.taken, self._answers = self.taken - counted, self._answers - computes
            self.metrics.in_flight.set(self.taken)
            if computes:
                each_s = (time.perf_counter() - started) / among
                known_s = self._each_s or each_s  # a stall is no reason to refuse for long
                self._each_s = known_s + (min(each_s, 2 * known_s) - known_s) / 20

    def turned_away(self, method: str, path: str, headers: Headers) -> bytes | None:
        """Return the whole answer to a request that there is no room for, None if there is.

        It takes half the time of a refusal behind the routes, and thousands a second may come.
        """
        route = answer_route(path)
        if route is None or method == "HEAD" or not self.is_full(path):
            return None
        log: dict[str, object] = {"request_id": request_id(headers), "cause": NO_ROOM}
        self.metrics.shed.inc()
        self.record(method, route, 503, 0.0, log)
        return _REFUSAL.replace(b"ID", str(log["request_id"]).encode(), 1)

    def dropped(self, reason: str, status: int) -> None:
        """Count a connection that was given up before a request of it was whole, and log it."""
        self.metrics.refused_connections.labels(reason).inc()
        if self._lines.wait_s():
            self._unlogged += 1
            return
        line = {"time": time.time(), "event": "connection", "status": status, "cause": reason}
        self.write_log(json.dumps(line) + "\n")

    def record(
        self, method: str, route: str, status: int, seconds: float, log: dict[str, object]
    ) -> None:
        """Count an answer, and log it unless it is one of too many refusals."""
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
    """Return the route of a path that a model computes an answer for, None of any other."""
    return ANSWERS.get(path if path == "/v1/recommend" else path[path.rfind("/") :])


def request_id(headers: Headers) -> str:
    """Return the id that the client gave a request, or a new one."""
    given = headers.get("x-request-id", "")
    return given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex

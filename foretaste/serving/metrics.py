"""What the server counts, in Prometheus' terms."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
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

SECONDS = (0.001, 0.002, 0.004, 0.008, 0.015, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)


@final
class Metrics:
    """One server's counters, in a registry of their own: two servers in a process do not mix."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "foretaste_requests",
            "Requests answered.",
            ("method", "route", "status"),
            registry=self._registry,
        )
        self.seconds = Histogram(
            "foretaste_request_seconds",
            "From the first byte of a request to the last of its answer.",
            ("route",),
            buckets=SECONDS,
            registry=self._registry,
        )
        self.stages = Histogram(
            "foretaste_stage_seconds",
            "Of a recommendation: encode, search, rank, rules.",
            ("stage",),
            buckets=SECONDS,
            registry=self._registry,
        )
        self.shed = Counter(
            "foretaste_shed",
            "Requests answered 503 because there was no room.",
            registry=self._registry,
        )
        self.connections = Gauge(
            "foretaste_connections", "Open connections.", registry=self._registry
        )
        self.refused_connections = Counter(
            "foretaste_refused_connections",
            "Connections dropped before a complete request arrived, by reason.",
            ("reason",),
            registry=self._registry,
        )
        self.in_flight = Gauge(
            "foretaste_in_flight", "Requests in progress or waiting.", registry=self._registry
        )
        self.events = Counter(
            "foretaste_events_stored", "Live events stored.", registry=self._registry
        )
        self.answers = Counter(
            "foretaste_answers",
            "Recommendations, by where they came from and which model answered.",
            ("source", "model"),
            registry=self._registry,
        )
        self.answer_seconds = Histogram(
            "foretaste_answer_seconds",
            "All stages of a recommendation, by which model answered: active or canary.",
            ("model",),
            buckets=SECONDS,
            registry=self._registry,
        )
        self.reloads = Counter(
            "foretaste_reloads",
            "Attempts to load the bundle again.",
            ("result",),
            registry=self._registry,
        )
        self.model = Info("foretaste_model", "The model that serves.", registry=self._registry)
        self.store_seconds = Histogram(
            "foretaste_store_seconds",
            "Calls to the store of live events, including failed ones.",
            ("operation",),
            buckets=SECONDS,
            registry=self._registry,
        )
        self.store_errors = Counter(
            "foretaste_store_errors",
            "Calls to the store of live events that failed.",
            ("operation",),
            registry=self._registry,
        )
        ProcessCollector(registry=self._registry)  # memory, CPU seconds, open files, start

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

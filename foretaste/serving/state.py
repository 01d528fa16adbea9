"""Live events in SQL: on disk before they are acknowledged, read back at the next request.

SQLite by default (write-ahead log, synchronous FULL: a commit has reached the disk), PostgreSQL by
its URL, with synchronous_commit on; both through SQLAlchemy Core and the same statements. Whoever
waits for a lock, a statement or a connection gives up after a time that the server chooses.
"""

import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, final

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql
from sqlalchemy.dialects import sqlite as sqlite_dialect
from sqlalchemy.exc import ArgumentError, IntegrityError, SQLAlchemyError

from foretaste.errors import ConfigError, DataError

if TYPE_CHECKING:
    from sqlalchemy.engine.interfaces import DBAPIConnection
else:
    DBAPIConnection = object  # a protocol that cannot be checked while the program runs

_TABLES = sa.MetaData()
_EVENTS = sa.Table(
    "foretaste_live_events",
    _TABLES,
    sa.Column("seq", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True),
    sa.Column("event_id", sa.Text, unique=True),
    sa.Column("user_id", sa.Text, nullable=False),
    sa.Column("item_id", sa.Text, nullable=False),
    sa.Column("timestamp_s", sa.BigInteger, nullable=False),
    sa.Index("foretaste_live_events_of_user", "user_id", "timestamp_s", "seq"),
    sqlite_autoincrement=True,
)
_GIVEN = ("user_id", "item_id", "timestamp_s", "event_id")
"""The columns that an event fills."""
_NEWEST = (  # built once: building it again takes longer than the look-up itself
    sa.select(*(_EVENTS.c[name] for name in _GIVEN))
    .where(_EVENTS.c.user_id == sa.bindparam("user"))
    .order_by(_EVENTS.c.timestamp_s.desc(), _EVENTS.c.seq.desc())
    .limit(sa.bindparam("most"))
)
_ANY = sa.select(_EVENTS.c.seq).limit(1)


@dataclass(frozen=True, kw_only=True)
class LiveEvent:
    """Somebody did something with an item, after training."""

    user_id: str
    item_id: str
    timestamp_s: int
    """Unix seconds."""
    event_id: str | None = None
    """The sender's own id: sent again, the event is stored once."""
    by_clock: bool = False
    """Whether the time is the server's, as the sender gave none; it is not stored."""


@final
class LiveEvents:
    """All live events of all users, shared by every thread and every server on one database."""

    def __init__(self, engine: sa.Engine, *, timeout_s: float) -> None:
        self._engine, self._timeout_s = engine, timeout_s
        self._lock = threading.Lock()

    @property
    def place(self) -> str:
        """Where the events are kept, without a password."""
        return self._engine.url.render_as_string(hide_password=True)

    def add(self, events: Sequence[LiveEvent]) -> int:
        """Store events in the order given, all or none; on return they are on disk.

        Returns:
            How many were stored: not those that had been stored before under the same `event_id`.

        Raises:
            DataError: An `event_id` (the error's name) is that of another event.
        """
        if not events:
            return 0
        insert = (
            sqlite_dialect.insert if self._engine.dialect.name == "sqlite" else postgresql.insert
        )
        statement = (
            insert(_EVENTS)
            .values([{name: getattr(event, name) for name in _GIVEN} for event in events])
            .on_conflict_do_nothing(index_elements=["event_id"])
            .returning(_EVENTS.c.seq)
        )
        with self._writing() as connection:
            stored = len(connection.execute(statement).all())
            if stored < len(events):
                _check_same(connection, events)
            return stored

    @contextmanager
    def _writing(self) -> Iterator[sa.Connection]:
        """Write alone; who waits in a row behind others that wait would wait many times as long."""
        if not self._lock.acquire(timeout=self._timeout_s):
            raise sa.exc.TimeoutError("other writes to the store were still waiting")
        try:
            with self._engine.begin() as connection:
                yield connection
        finally:
            self._lock.release()

    def of_user(self, user_id: str, *, limit: int) -> list[LiveEvent]:
        """Return a user's newest `limit` events, oldest first; those of one second as they came."""
        with self._engine.connect() as connection:
            rows = connection.execute(_NEWEST, {"user": user_id, "most": limit}).all()
        return [LiveEvent(**row._mapping) for row in reversed(rows)]

    def forget(self, user_id: str) -> int:
        """Delete a user's live events and return how many there were."""
        statement = sa.delete(_EVENTS).where(_EVENTS.c.user_id == user_id)
        with self._writing() as connection:
            return connection.execute(statement).rowcount

    def count(self) -> int:
        """Return how many events are stored, by reading all of them."""
        with self._engine.connect() as connection:
            return connection.execute(sa.select(sa.func.count()).select_from(_EVENTS)).scalar_one()

    def check(self) -> None:
        """Read one event, if there is one: the database answers, however many it holds.

        Raises:
            sqlalchemy.exc.SQLAlchemyError: It does not.
        """
        with self._engine.connect() as connection:
            connection.execute(_ANY)

    def close(self) -> None:
        """Give back every connection."""
        self._engine.dispose()


def open_live_events(state: str, *, timeout_s: float = 1.0) -> LiveEvents:
    """Open the events of a server, and make their table if there is none.

    Args:
        state: The path of an SQLite file, or a database URL (sqlite://, postgresql://).
        timeout_s: How long to wait for a lock, a statement or another write. A connection to
            PostgreSQL is waited for in whole seconds, 2 at least, as its library counts.

    Raises:
        ConfigError: The place cannot be reached or written, or is something else.
    """
    url = _url(state)
    shown, is_sqlite = url.render_as_string(hide_password=True), url.get_backend_name() == "sqlite"
    try:
        if is_sqlite:
            engine = sa.create_engine(url)
        else:
            wait = {"connect_timeout": max(2, math.ceil(timeout_s))}
            engine = sa.create_engine(
                url, pool_pre_ping=True, pool_timeout=timeout_s, connect_args=wait
            )
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"live events at {shown} need {error.name}: pip install 'foretaste[postgres]'",
            name="state",
            value=shown,
        ) from error
    settings = _sqlite_session(timeout_s) if is_sqlite else _postgresql_session(timeout_s)
    sa.event.listen(engine, "connect", partial(_set_up, settings=settings))
    try:
        _make_table(engine)
        events = LiveEvents(engine, timeout_s=timeout_s)
        events.check()
    except SQLAlchemyError as error:
        engine.dispose()
        raise ConfigError(
            f"live events cannot be kept at {shown}: {first_line(error)}; give another place, a "
            "path or a URL, as the server's `state`",
            name="state",
            value=shown,
        ) from error
    return events


def state_beside(bundle: Path) -> str:
    """Return the path of the SQLite file that goes with a bundle and outlives its versions."""
    folder = bundle.absolute()
    return str(folder.with_name(f"{folder.name}.events.sqlite"))


def _url(state: str) -> sa.URL:
    if "://" not in state:
        return sa.URL.create("sqlite", database=state)
    try:
        url = sa.make_url(state)
    except (ArgumentError, ValueError) as error:
        raise ConfigError(
            "the server's `state` is no database URL: write it as "
            "postgresql://user:password@host/name, or give the path of an SQLite file",
            name="state",
        ) from error
    if url.drivername in ("postgresql", "postgres"):
        return url.set(drivername="postgresql+psycopg")
    if url.get_backend_name() not in ("sqlite", "postgresql"):
        raise ConfigError(
            f"live events are kept in SQLite or PostgreSQL, not {url.get_backend_name()}",
            name="state",
            value=url.get_backend_name(),
        )
    return url


def _sqlite_session(timeout_s: float) -> tuple[str, ...]:
    return (
        f"PRAGMA busy_timeout = {round(timeout_s * 1000)}",
        "PRAGMA journal_mode = WAL",
        "PRAGMA synchronous = FULL",
    )


def _postgresql_session(timeout_s: float) -> tuple[str, ...]:
    return (
        f"SET statement_timeout = {round(timeout_s * 1000)}",
        f"SET lock_timeout = {round(timeout_s * 1000)}",
        "SET synchronous_commit = on",  # the database's own setting may be off
    )


def _set_up(connection: DBAPIConnection, _: object, *, settings: tuple[str, ...]) -> None:
    with closing(connection.cursor()) as cursor:
        for statement in settings:
            cursor.execute(statement)
    connection.commit()


def _make_table(engine: sa.Engine) -> None:
    try:
        _TABLES.create_all(engine)
    except (IntegrityError, sa.exc.ProgrammingError, sa.exc.OperationalError):
        _TABLES.create_all(engine)  # another server made it between our look and our step


def _check_same(connection: sa.Connection, events: Sequence[LiveEvent]) -> None:
    """Refuse events whose `event_id` another event has in the store, which rolls them all back."""
    sent = [event.event_id for event in events if event.event_id is not None]
    kept = connection.execute(
        sa.select(*(_EVENTS.c[name] for name in _GIVEN)).where(_EVENTS.c.event_id.in_(sent))
    )
    stored = {row.event_id: row for row in kept}
    for position, event in enumerate(events):
        row = stored.get(event.event_id)
        if row is None:
            continue
        is_same = (event.user_id, event.item_id) == (row.user_id, row.item_id)
        if not is_same or not (event.by_clock or event.timestamp_s == row.timestamp_s):
            raise DataError(
                f"event {position} has the event_id {event.event_id!r} of another event, with "
                "another user, item or time: give each event an id of its own; nothing of this "
                "request was stored",
                name="event_id",
                value=event.event_id,
            )


def first_line(error: SQLAlchemyError) -> str:
    """Say what went wrong in the database's own words, without the statement and its values."""
    cause = error.orig if isinstance(error, sa.exc.DBAPIError) and error.orig else error
    return str(cause).strip().partition("\n")[0]

"""The store of live events in SQL: an acknowledged event is on disk, and the next request reads it.

SQLite by default (write-ahead log, synchronous FULL: a commit has reached the disk), PostgreSQL by
its URL, with synchronous_commit on; both through SQLAlchemy Core and the same statements. Waiting
for a lock, a statement or a connection has a time limit, set by the server; calls to PostgreSQL run
in separate threads, because a network failure may block them. After a call that timed out, only one
caller at a time tries the database, until it answers. `_LAYOUTS` has the migrations: the statements
of each run once, in one transaction with the row of the new version.
"""

import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, final

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql
from sqlalchemy.dialects import sqlite as sqlite_dialect
from sqlalchemy.exc import ArgumentError, IntegrityError, SQLAlchemyError

from foretaste.errors import ConfigError, DataError

if TYPE_CHECKING:
    from sqlalchemy.engine.interfaces import DBAPIConnection
else:
    DBAPIConnection = object  # a protocol that cannot be checked at run time

T = TypeVar("T")
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
_CHOICES = sa.Table(
    "foretaste_models",
    _TABLES,
    sa.Column("bundle", sa.Text, primary_key=True),
    sa.Column("version", sa.Text, nullable=False),
    sa.Column("previous", sa.Text, nullable=False),
    sa.Column("canary", sa.Text, nullable=False),
    sa.Column("share", sa.Float, nullable=False),
)
_LAYOUT = sa.Table("foretaste_layout", _TABLES, sa.Column("version", sa.Integer, primary_key=True))
_LAYOUTS: dict[int, tuple[str, ...]] = {1: (), 2: ()}
"""The migration from the previous version to each; version 1 had only events, and no version
row."""
_CHUNK = 5_000
"""Number of events deleted in one transaction, which other writers wait for."""
_GIVEN = ("user_id", "item_id", "timestamp_s", "event_id")
"""The columns that an event sets."""
_NEWEST = (  # built once: building the statement takes longer than the look-up
    sa.select(*(_EVENTS.c[name] for name in _GIVEN))
    .where(_EVENTS.c.user_id == sa.bindparam("user"))
    .order_by(_EVENTS.c.timestamp_s.desc(), _EVENTS.c.seq.desc())
    .limit(sa.bindparam("most"))
)
_ANY = sa.select(_EVENTS.c.seq).limit(1)


@dataclass(frozen=True, kw_only=True)
class LiveEvent:
    """An interaction of a user with an item after training."""

    user_id: str
    item_id: str
    timestamp_s: int
    """Unix seconds."""
    event_id: str | None = None
    """An id given by the sender: an event that is sent again with the same id is stored once."""
    by_clock: bool = False
    """Whether the sender gave no time, so that it is the server's; this field is not stored."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The active versions of a bundle, for all servers on one database."""

    version: str
    previous: str = ""
    """The previous active version, which a roll back activates again."""
    canary: str = ""
    """The version that answers a share of the users; "" if there is none."""
    share: float = 0.0


def _within(seconds: float, call: Callable[[], T]) -> T:
    """Run a call in a separate thread, which may outlive the time limit; return its result.

    Raises:
        sqlalchemy.exc.TimeoutError: The call took longer.
    """
    future: Future[T] = Future()

    def work() -> None:
        try:
            future.set_result(call())
        except BaseException as error:  # noqa: BLE001 - it is the caller's
            future.set_exception(error)

    threading.Thread(target=work, name="store", daemon=True).start()
    try:
        return future.result(seconds)
    except FutureTimeout:
        raise sa.exc.TimeoutError(f"no answer within {seconds:g} s") from None


@final
class LiveEvents:
    """The live events of all users, shared by all threads and servers on one database."""

    def __init__(self, engine: sa.Engine, *, timeout_s: float) -> None:
        self._engine, self._timeout_s = engine, timeout_s
        self._lock = threading.Lock()
        self._is_laid_out = False
        self._file: tuple[int, int] | None = None
        self._most_s = 2 * timeout_s + _connection_s(timeout_s)
        """The sum of the time limits for a lock, a statement and a connection."""
        self.is_sqlite = engine.dialect.name == "sqlite"
        self._ask_again_s = {"read": 0.0, "write": 0.0}
        """After a call that timed out: the time at which another call may be made; else 0."""

    def _run(
        self,
        call: Callable[[sa.Connection], T],
        *,
        writes: bool = False,
        within_s: float | None = None,
    ) -> T:
        def act() -> T:
            self._lay_out()
            self._check_file()
            with self._writing() if writes else self._engine.connect() as connection:
                return call(connection)

        kind, began_s = "write" if writes else "read", time.monotonic()
        if began_s < self._ask_again_s[kind]:
            raise sa.exc.TimeoutError("it did not answer in time; the next attempt follows soon")
        if self._ask_again_s[kind]:  # one caller tests whether it answers again
            self._ask_again_s[kind] = began_s + self._most_s
        hung = False
        try:
            return act() if self.is_sqlite else _within(within_s or self._most_s, act)
        except SQLAlchemyError:
            hung = time.monotonic() - began_s >= 0.9 * self._timeout_s
            raise
        finally:
            self._ask_again_s[kind] = time.monotonic() + self._timeout_s if hung else 0.0

    def _lay_out(self) -> None:
        if not self._is_laid_out:
            _bring_to_layout(self._engine)
            self._is_laid_out, self._file = True, _file_of(self._engine)

    def _check_file(self) -> None:
        """Raise an error if the SQLite file was removed or replaced: events would be lost.

        Raises:
            sqlalchemy.exc.InvalidRequestError: The file was removed or replaced.
        """
        if self._file is not None and _file_of(self._engine) != self._file:
            raise sa.exc.InvalidRequestError(
                f"the file {self._engine.url.database} was removed or replaced while it was in "
                "use: put it back, or start the server again for a new one"
            )

    def add(self, events: Sequence[LiveEvent]) -> int:
        """Store events in the order given, all or none; on return they are on disk.

        Returns:
            The number of stored events, without those whose `event_id` was already stored.

        Raises:
            DataError: An `event_id` (the error's name) belongs to another event.
        """
        if not events:
            return 0
        insert = sqlite_dialect.insert if self.is_sqlite else postgresql.insert

        def store(connection: sa.Connection) -> int:
            rows = [{name: getattr(event, name) for name in _GIVEN} for event in events]
            for row, time_s in zip(rows, _as_they_came(connection, events), strict=True):
                row["timestamp_s"] = time_s
            statement = (
                insert(_EVENTS)
                .values(rows)
                .on_conflict_do_nothing(index_elements=["event_id"])
                .returning(_EVENTS.c.seq)
            )
            stored = len(connection.execute(statement).all())
            if stored < len(events):
                _check_same(connection, events)
            return stored

        return self._run(store, writes=True)

    @contextmanager
    def _writing(self) -> Iterator[sa.Connection]:
        """Allow one writer at a time: in a queue of writers, the waiting times would add up."""
        if not self._lock.acquire(timeout=self._timeout_s):
            raise sa.exc.TimeoutError("other writes to the store were still waiting")
        try:
            with self._engine.begin() as connection:
                yield connection
        finally:
            self._lock.release()

    def of_user(self, user_id: str, *, limit: int) -> list[LiveEvent]:
        """Return a user's newest `limit` events, oldest first; events of one second in order of
        arrival.

        Its time limit is that of one statement, because a list waits for it.
        """
        asked = {"user": user_id, "most": limit}
        rows = self._run(
            lambda connection: connection.execute(_NEWEST, asked).all(), within_s=self._timeout_s
        )
        return [LiveEvent(**row._mapping) for row in reversed(rows)]

    def forget(self, user_id: str) -> int:
        """Delete a user's live events and return how many there were."""
        return self._delete(_EVENTS.c.user_id == user_id)

    def retire(self, before_s: int) -> int:
        """Delete events before a time and return how many there were."""
        return self._delete(_EVENTS.c.timestamp_s < before_s)

    def _delete(self, which: sa.ColumnElement[bool]) -> int:
        """Delete events in small transactions, because others wait for a large one."""
        some = sa.select(_EVENTS.c.seq).where(which).limit(_CHUNK)
        statement, deleted = sa.delete(_EVENTS).where(_EVENTS.c.seq.in_(some)), 0
        while True:
            done = self._run(lambda connection: connection.execute(statement).rowcount, writes=True)
            deleted += done
            if done < _CHUNK:
                return deleted

    def count(self, user_id: str | None = None) -> int:
        """Count the stored events, of all users or of one."""
        counted = sa.select(sa.func.count()).select_from(_EVENTS)
        if user_id is not None:
            counted = counted.where(_EVENTS.c.user_id == user_id)
        return self._run(lambda connection: connection.execute(counted).scalar_one())

    def chosen(self, bundle: str) -> Choice | None:
        """Return the versions that the servers agreed on, None before the first choice."""
        asked = sa.select(*_CHOICES.c).where(_CHOICES.c.bundle == bundle)
        row = self._run(lambda connection: connection.execute(asked).first())
        names = ("version", "previous", "canary", "share")
        return None if row is None else Choice(**{name: row._mapping[name] for name in names})

    def choose(self, bundle: str, choice: Choice) -> None:
        """Make all servers on this database switch; they check every few seconds."""

        def store(connection: sa.Connection) -> None:
            connection.execute(sa.delete(_CHOICES).where(_CHOICES.c.bundle == bundle))
            connection.execute(sa.insert(_CHOICES).values(**vars(choice), bundle=bundle))

        self._run(store, writes=True)

    def newest_s(self) -> int:
        """Return the latest time of the thousand events stored last; 0 without an event."""
        last = sa.select(_EVENTS.c.timestamp_s).order_by(_EVENTS.c.seq.desc()).limit(1000)
        return self._run(lambda at: max(at.execute(last).scalars(), default=0))

    def check(self) -> None:
        """Test that the database answers, by reading one event.

        Raises:
            sqlalchemy.exc.SQLAlchemyError: The database does not answer.
        """
        self._run(lambda connection: connection.execute(_ANY).first())

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()


def open_live_events(state: str, *, timeout_s: float = 1.0) -> LiveEvents:
    """Open the store of a server, and create its tables if they do not exist.

    If PostgreSQL cannot be reached now, every call tries again.

    Args:
        state: The path of an SQLite file, or a database URL (sqlite://, postgresql://).
        timeout_s: Time limit in seconds for a lock, a statement or another write. That for a
            connection to PostgreSQL is rounded to whole seconds, at least 2.

    Raises:
        ConfigError: The place cannot be written, is not a database, or has tables of a later
            version of foretaste or of another program.
    """
    url = _url(state)
    shown, is_sqlite = url.render_as_string(hide_password=True), url.get_backend_name() == "sqlite"
    try:
        if is_sqlite:
            few = {"cached_statements": 8}  # up to 200 kB each
            engine = sa.create_engine(url, connect_args=few)
        else:
            wait = {"connect_timeout": _connection_s(timeout_s)}
            more = {"pool_pre_ping": True, "pool_timeout": timeout_s, "connect_args": wait}
            engine = sa.create_engine(url, **more)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"live events at {shown} need {error.name}: pip install 'foretaste[postgres]'",
            name="state",
            value=shown,
        ) from error
    settings = _session(timeout_s, is_sqlite=is_sqlite)
    sa.event.listen(engine, "connect", partial(_set_up, settings=settings))
    events = LiveEvents(engine, timeout_s=timeout_s)
    try:
        events.check()
    except SQLAlchemyError as error:
        if not is_sqlite and isinstance(error, sa.exc.OperationalError | sa.exc.TimeoutError):
            return events
        engine.dispose()
        raise ConfigError(
            f"live events cannot be stored at {shown}: {first_line(error)}; set the server's "
            "`state` to another path or URL",
            name="state",
            value=shown,
        ) from error
    return events


def state_beside(bundle: Path) -> str:
    """Return the path of the SQLite file that belongs to a bundle, for all its versions."""
    folder = bundle.absolute()
    return str(folder.with_name(f"{folder.name}.events.sqlite"))


def _url(state: str) -> sa.URL:
    if "://" not in state:
        return sa.URL.create("sqlite", database=state)
    try:
        url = sa.make_url(state)
    except (ArgumentError, ValueError) as error:
        raise ConfigError(
            "the server's `state` is not a database URL: write it as "
            "postgresql://user:password@host/name, or set the path of an SQLite file",
            name="state",
        ) from error
    if url.drivername in ("postgresql", "postgres"):
        return url.set(drivername="postgresql+psycopg")
    if url.get_backend_name() not in ("sqlite", "postgresql"):
        raise ConfigError(
            f"live events are stored in SQLite or PostgreSQL, not {url.get_backend_name()}",
            name="state",
            value=url.get_backend_name(),
        )
    return url


def _session(timeout_s: float, *, is_sqlite: bool) -> tuple[str, ...]:
    """Return the statements at the start of each connection."""
    wait_ms = round(timeout_s * 1000)
    if is_sqlite:  # a cache of 256 KiB per connection, one for each thread; the system has its own
        waits = f"PRAGMA busy_timeout = {wait_ms}", "PRAGMA cache_size = -256"
        return *waits, "PRAGMA journal_mode = WAL", "PRAGMA synchronous = FULL"
    waits = f"SET statement_timeout = {wait_ms}", f"SET lock_timeout = {wait_ms}"
    return *waits, "SET synchronous_commit = on"  # the database may have turned it off


def _set_up(connection: DBAPIConnection, _: object, *, settings: tuple[str, ...]) -> None:
    with closing(connection.cursor()) as cursor:
        for statement in settings:
            cursor.execute(statement)
    connection.commit()


def _file_of(engine: sa.Engine) -> tuple[int, int] | None:
    """Return the file of an SQLite database, None in memory or if the file was removed."""
    place = engine.url.database
    if engine.dialect.name != "sqlite" or place in (None, "", ":memory:"):
        return None
    try:
        found = os.stat(str(place))
    except OSError:
        return 0, 0
    return found.st_dev, found.st_ino


def _connection_s(timeout_s: float) -> int:
    """Return the time limit for a connection to PostgreSQL, in whole seconds."""
    return max(2, math.ceil(timeout_s))


def _bring_to_layout(engine: sa.Engine) -> None:
    """Create missing tables, and migrate those of an earlier version to this layout.

    Raises:
        sqlalchemy.exc.InvalidRequestError: The tables are of a later version or of another program.
    """
    found, latest = sa.inspect(engine), max(_LAYOUTS)
    there = set(found.get_table_names())
    version = 1 if _EVENTS.name in there else 0
    if _LAYOUT.name in there:
        with engine.connect() as connection:
            version = connection.execute(sa.select(sa.func.max(_LAYOUT.c.version))).scalar() or 0
    if version > latest:
        said = f"tables have layout {version}, but this version of foretaste knows {latest}"
        raise _foreign(said)
    for table in _TABLES.sorted_tables if version == latest else [_EVENTS]:
        if table.name in there:
            columns = {column["name"] for column in found.get_columns(table.name)}
            lacking = [column.name for column in table.columns if column.name not in columns]
            if lacking:
                raise _foreign(f"table {table.name} is not foretaste's: it has no {lacking[0]}")
    if version == latest:
        return
    try:
        _change_layout(engine, version, latest)
    except (IntegrityError, sa.exc.ProgrammingError, sa.exc.OperationalError):
        _change_layout(engine, latest, latest)  # another server did it in the meantime


def _foreign(what: str) -> SQLAlchemyError:
    return sa.exc.InvalidRequestError(f"its {what}; update foretaste, or give it a new place")


def _change_layout(engine: sa.Engine, version: int, latest: int) -> None:
    with engine.begin() as connection:
        _TABLES.create_all(connection)
        for step in range(version + 1, latest + 1):
            for statement in _LAYOUTS[step]:
                connection.exec_driver_sql(statement)
        known = connection.execute(sa.select(_LAYOUT.c.version)).scalars().all()
        if latest not in known:
            connection.execute(sa.insert(_LAYOUT).values(version=latest))


def _as_they_came(connection: sa.Connection, events: Sequence[LiveEvent]) -> list[int]:
    """Return the times of events; one without a given time follows all events of its user.

    So a server's clock that is set back does not change the order.
    """
    users = {event.user_id for event in events if event.by_clock}
    if not users:
        return [event.timestamp_s for event in events]
    of_users = (
        sa.select(_EVENTS.c.user_id, sa.func.max(_EVENTS.c.timestamp_s))
        .where(_EVENTS.c.user_id.in_(users))
        .group_by(_EVENTS.c.user_id)
    )
    newest: dict[str, int] = {row[0]: row[1] for row in connection.execute(of_users)}
    times = []
    for event in events:
        time_s, last_s = event.timestamp_s, newest.get(event.user_id, event.timestamp_s)
        time_s = max(time_s, last_s) if event.by_clock else time_s
        newest[event.user_id] = max(time_s, last_s)
        times.append(time_s)
    return times


def _check_same(connection: sa.Connection, events: Sequence[LiveEvent]) -> None:
    """Raise an error, which rolls all events back, if another event has the same `event_id`."""
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
                "another user, item or time: give each event its own id; nothing of this request "
                "was stored",
                name="event_id",
                value=event.event_id,
            )


def first_line(error: SQLAlchemyError) -> str:
    """Return the database's error message, without the statement and its values."""
    cause = error.orig if isinstance(error, sa.exc.DBAPIError) and error.orig else error
    return str(cause).strip().partition("\n")[0]


def cause_of(error: SQLAlchemyError) -> str:
    """Return the kind of error and the database's message, for the log."""
    return f"{type(error).__name__}: {first_line(error)}"

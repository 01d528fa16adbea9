"""Live events: on disk when acknowledged, in order, once each, in both databases."""

import gc
import socket
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import SQLAlchemyError

from foretaste.errors import ConfigError
from foretaste.serving.state import (
    Choice,
    LiveEvent,
    LiveEvents,
    _within,
    cause_of,
    open_live_events,
    state_beside,
)

pytest_plugins = ["postgres_server"]


@pytest.fixture
def events(state: str) -> Iterator[LiveEvents]:
    opened = open_live_events(state)
    yield opened
    opened.close()


def did(user: str, item: str, at: int = 100, event_id: str | None = None) -> LiveEvent:
    return LiveEvent(user_id=user, item_id=item, timestamp_s=at, event_id=event_id)


def items(events: LiveEvents, user: str, limit: int = 100) -> list[str]:
    return [event.item_id for event in events.of_user(user, limit=limit)]


def test_what_is_added_is_read_back_oldest_first(events: LiveEvents) -> None:
    events.add([did("u", "late", 300), did("u", "early", 100), did("v", "other", 50)])
    events.add([did("u", "middle", 200)])
    assert items(events, "u") == ["early", "middle", "late"]
    assert items(events, "v") == ["other"]
    assert items(events, "nobody") == []
    assert events.count() == 4


def test_a_check_reads_one_row_at_most(events: LiveEvents) -> None:
    events.add([did("u", str(number)) for number in range(50)])
    asked = []
    sa.event.listen(events._engine, "before_cursor_execute", lambda *given: asked.append(given[2]))
    events.check()
    assert len(asked) == 1
    assert "count" not in asked[0]
    assert "LIMIT" in asked[0]


def test_a_check_of_a_missing_table_is_an_error(events: LiveEvents) -> None:
    with events._engine.begin() as connection:
        connection.exec_driver_sql("DROP TABLE foretaste_live_events")
    with pytest.raises(SQLAlchemyError):
        events.check()


def test_events_of_one_second_stay_as_they_came(events: LiveEvents) -> None:
    events.add([did("u", name) for name in "abc"])
    events.add([did("u", name) for name in "de"])
    assert items(events, "u") == list("abcde")


def test_a_limit_keeps_the_newest(events: LiveEvents) -> None:
    events.add([did("u", str(second), second) for second in range(10)])
    assert items(events, "u", limit=3) == ["7", "8", "9"]


def test_an_event_id_is_stored_once_however_often_it_is_sent(events: LiveEvents) -> None:
    assert events.add([did("u", "a", event_id="e1"), did("u", "b"), did("u", "b")]) == 3
    assert events.add([did("u", "a", event_id="e1"), did("u", "c", event_id="e2")]) == 1
    assert events.add([did("u", "d", event_id="e3"), did("u", "d", event_id="e3")]) == 1
    assert items(events, "u") == ["a", "b", "b", "c", "d"]


def test_nothing_added_is_nothing_stored(events: LiveEvents) -> None:
    assert events.add([]) == 0
    assert events.count() == 0


def test_forgetting_a_user_leaves_the_others(events: LiveEvents) -> None:
    events.add([did("u", "a"), did("v", "a"), did("u", "b")])
    assert events.forget("u") == 2
    assert items(events, "u") == []
    assert items(events, "v") == ["a"]


@pytest.mark.parametrize(
    "odd", ["'; DROP TABLE foretaste_live_events; --", 'a"\nc', "é😀", "%", ""]
)
def test_an_id_is_only_ever_text(events: LiveEvents, odd: str) -> None:
    events.add([did(odd, odd, event_id=odd), did("u", "a")])
    assert items(events, odd) == [odd]
    assert events.count() == 2


def test_events_outlive_the_server_that_stored_them(state: str) -> None:
    with closing(open_live_events(state)) as first:
        first.add([did("u", "a")])
    with closing(open_live_events(state)) as second:
        assert items(second, "u") == ["a"]


def test_two_servers_on_one_database_see_each_other(state: str) -> None:
    with closing(open_live_events(state)) as one, closing(open_live_events(state)) as other:
        one.add([did("u", "a")])
        other.add([did("u", "b")])
        assert items(one, "u") == items(other, "u") == ["a", "b"]


def test_many_threads_lose_nothing(state: str) -> None:
    events = open_live_events(state, timeout_s=60.0)

    def write(thread: int) -> None:
        for step in range(20):
            events.add([did(f"u{thread}", f"i{step}", step)])

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert events.count() == 160
    assert all(items(events, f"u{n}") == [f"i{step}" for step in range(20)] for n in range(8))
    events.close()


def test_a_locked_table_is_waited_for_for_so_long_and_no_longer_by_all_together(state: str) -> None:
    with closing(open_live_events(state, timeout_s=0.5)) as events:
        events.add([did("u", "a")])
        failed: list[float] = []

        def write() -> None:
            began = time.monotonic()
            with pytest.raises(SQLAlchemyError):
                events.add([did("u", "b")])
            failed.append(time.monotonic() - began)

        is_sqlite = events._engine.dialect.name == "sqlite"
        other = sa.create_engine(events._engine.url)
        with other.connect() as holder:
            lock = "BEGIN IMMEDIATE" if is_sqlite else "LOCK foretaste_live_events"
            holder.exec_driver_sql(lock)
            threads = [threading.Thread(target=write) for _ in range(6)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            holder.rollback()
        other.dispose()
        assert len(failed) == 6
        assert min(failed) > 0.4
        assert max(failed) < 10  # 0.5 s each in a row, and once more, would be 3.5; before, 60
        with pytest.raises(SQLAlchemyError, match="the next attempt follows soon"):
            events.add([did("u", "c")])  # refused at once, so that it holds nothing
        assert items(events, "u") == ["a"]
        time.sleep(0.5)
        assert events.add([did("u", "c")]) == 1
        assert items(events, "u") == ["a", "c"]


def test_postgresql_waits_for_its_disk_though_the_database_says_otherwise(state: str) -> None:
    if state.startswith("postgresql"):
        engine = sa.create_engine(state.replace("postgresql://", "postgresql+psycopg://"))
        with engine.begin() as connection:
            name = connection.exec_driver_sql("SELECT current_database()").scalar()
            connection.exec_driver_sql(f'ALTER DATABASE "{name}" SET synchronous_commit = off')
        engine.dispose()
        with (
            closing(open_live_events(state)) as events,
            events._engine.connect() as connection,
        ):
            assert connection.exec_driver_sql("SHOW synchronous_commit").scalar() == "on"
            assert connection.exec_driver_sql("SHOW lock_timeout").scalar() == "1s"


def test_sqlite_is_in_the_mode_that_survives_a_crash(tmp_path: Path) -> None:
    with (
        closing(open_live_events(str(tmp_path / "e.sqlite"))) as events,
        events._engine.connect() as connection,
    ):
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2  # FULL


def test_requests_of_many_sizes_leave_few_statements_in_memory(tmp_path: Path) -> None:
    def kept() -> int:
        return sum(type(one).__name__ == "Statement" for one in gc.get_objects())

    before = kept()
    with closing(open_live_events(str(tmp_path / "e.sqlite"))) as events:
        for number in range(1, 40):
            events.add([did(str(user), "i") for user in range(number)])
        assert before < kept() <= before + 2 * 8  # on the connection, and one more for the layout


def test_the_file_beside_a_bundle_is_not_inside_it(tmp_path: Path) -> None:
    assert Path(state_beside(tmp_path / "films")) == tmp_path / "films.events.sqlite"


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("not a database, but a longer text than one page header " * 40)
    with pytest.raises(ConfigError, match=r"notes\.txt: file is not a database; set the server"):
        open_live_events(str(file))
    assert file.read_text().startswith("not a database")


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unable to open database file"):
        open_live_events(str(tmp_path / "nowhere" / "e.sqlite"))


def test_a_read_only_database_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "e.sqlite"
    sqlite3.connect(file).close()
    with pytest.raises(ConfigError, match="live events cannot be stored at"):
        open_live_events(f"sqlite:///file:{file}?mode=ro&uri=true")


@pytest.mark.parametrize(
    ("state", "says"),
    [
        ("mysql://root@host/x", "SQLite or PostgreSQL, not mysql"),
        ("postgresql://me:secret@host:port/x", "not a database URL"),
    ],
)
def test_a_wrong_url_is_refused_without_showing_its_password(state: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        open_live_events(state)
    assert "secret" not in str(caught.value)


def test_without_a_time_events_stay_as_they_came_though_the_clock_is_set_back(
    events: LiveEvents,
) -> None:
    def now(item: str, at: int) -> LiveEvent:
        return LiveEvent(user_id="u", item_id=item, timestamp_s=at, by_clock=True)

    events.add([now("a", 9000), now("b", 9000)])
    events.add([now("c", 2000), did("u", "sent", 5000), now("d", 1999)])  # two hours back
    events.add([now("e", 9001)])
    assert items(events, "u") == ["sent", "a", "b", "c", "d", "e"]
    events.add([LiveEvent(user_id="v", item_id="x", timestamp_s=2000, by_clock=True)])
    assert events.of_user("v", limit=1)[0].timestamp_s == 2000


def test_old_events_are_retired_some_at_a_time(
    events: LiveEvents, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("foretaste.serving.state._CHUNK", 3)
    events.add([did("u", str(at), at) for at in range(10)])
    assert events.retire(7) == 7
    assert items(events, "u") == ["7", "8", "9"]
    assert events.retire(7) == 0


def test_servers_on_one_database_read_what_one_of_them_chose(state: str) -> None:
    with closing(open_live_events(state)) as one, closing(open_live_events(state)) as other:
        assert one.chosen("films") is None
        first = Choice(version="a" * 12)
        one.choose("films", first)
        second = Choice(version="b" * 12, previous="a" * 12, canary="c" * 12, share=0.25)
        assert other.chosen("films") == first
        other.choose("films", second)
        assert one.chosen("films") == second
        assert one.chosen("books") is None


def engine_of(state: str) -> sa.Engine:
    url = state if "://" in state else f"sqlite:///{state}"
    url = url.replace("postgresql://", "postgresql+psycopg://")
    return sa.create_engine(url, poolclass=sa.NullPool)


def test_events_of_before_layouts_had_versions_are_kept(state: str) -> None:
    with closing(open_live_events(state)) as events:
        events.add([did("u", "old")])
    with closing(engine_of(state).connect()) as connection:
        for table in ("foretaste_layout", "foretaste_models"):
            connection.exec_driver_sql(f"DROP TABLE {table}")
        connection.commit()
    with closing(open_live_events(state)) as events:
        assert items(events, "u") == ["old"]
        events.choose("films", Choice(version="a"))
    with closing(engine_of(state).connect()) as connection:
        assert connection.exec_driver_sql("SELECT * FROM foretaste_layout").all() == [(2,)]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("INSERT INTO foretaste_layout VALUES (3)", "layout 3, but this version"),
        ("ALTER TABLE foretaste_live_events RENAME COLUMN item_id TO thing", "has no item_id"),
    ],
)
def test_tables_of_a_newer_foretaste_or_of_another_program_are_refused(
    state: str, change: str, says: str
) -> None:
    open_live_events(state).close()
    with closing(engine_of(state).connect()) as connection:
        connection.exec_driver_sql(change)
        connection.commit()
    with pytest.raises(ConfigError, match=says):
        open_live_events(state)


def test_a_file_that_is_removed_under_the_server_takes_no_more_events(tmp_path: Path) -> None:
    path = tmp_path / "e.sqlite"
    with closing(open_live_events(str(path))) as events:
        events.add([did("u", "kept")])
        aside = path.rename(tmp_path / "aside")
        for act in (lambda: events.add([did("u", "lost")]), events.check):
            with pytest.raises(SQLAlchemyError, match="was removed or replaced"):
                act()
        aside.rename(path)
        events.add([did("u", "again")])
        assert items(events, "u") == ["kept", "again"]


def test_a_postgresql_that_is_not_there_yet_is_asked_at_each_call() -> None:
    pytest.importorskip("psycopg")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    events = open_live_events(f"postgresql://me:secret@127.0.0.1:{port}/none", timeout_s=0.2)
    with closing(events), pytest.raises(SQLAlchemyError) as caught:
        events.add([did("u", "i")])
    assert "secret" not in cause_of(caught.value)


def test_a_call_that_hangs_is_given_up_and_holds_no_thread_of_the_caller() -> None:
    free = threading.Event()
    with pytest.raises(sa.exc.TimeoutError):
        _within(0.05, lambda: free.wait(60))
    free.set()
    assert _within(60.0, lambda: 7) == 7
    with pytest.raises(KeyError):
        _within(60.0, lambda: {}["its own error"])

"""Faults around a running server: of its store, its disk, its clock and its clients."""

import json
import os
import resource
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import httpx
import pytest
import sqlalchemy as sa

from foretaste.serving.api import COSTLY
from foretaste.serving.messages import RecommendReply, RecommendRequest
from foretaste.serving.service import WITHOUT_STORE
from tests.postgres_server import frozen, stopped
from tests.test_api import NOW_S, Served, served
from tests.worlds import write_film_bundle

pytest_plugins = ["postgres_server"]
ROUNDS = 3
EVENT = {"user_id": 1, "item_id": 130}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_film_bundle(tmp_path_factory.mktemp("faults") / "films")


def eventually(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def stores(films: Served) -> bool:
    return films.http.post("/v1/events", json=EVENT).status_code == 201


def is_whole(films: Served, before: dict) -> bool:
    """Whether answers are as before, live events included."""
    reply = films.recommend(user_id=2, k=3)
    return (reply["items"], reply["notes"]) == (before["items"], before["notes"])


# ---- the store -------------------------------------------------------------------------------


@contextmanager
def removed(state: str) -> Iterator[None]:
    Path(state).rename(f"{state}.aside")
    yield
    Path(f"{state}.aside").rename(state)


@contextmanager
def locked(state: str) -> Iterator[None]:
    engine = sa.create_engine(f"sqlite:///{state}", poolclass=sa.NullPool)
    with engine.connect() as holder:
        holder.exec_driver_sql("BEGIN IMMEDIATE")
        yield
        holder.rollback()


@pytest.mark.parametrize(
    ("fault", "answers_rest_on_events"),
    [(removed, False), (locked, True), (frozen, False)],
)
def test_without_its_store_a_server_answers_says_so_and_goes_on_by_itself(
    bundle: Path, tmp_path: Path, request: pytest.FixtureRequest, fault, answers_rest_on_events
) -> None:
    state = str(tmp_path / "e.sqlite")
    if fault is frozen:  # all its processes are stopped, as behind a network that drops everything
        state = request.getfixturevalue("postgres_database")
    with served(bundle, state, store_timeout_s=0.3) as films:
        assert stores(films)
        before = films.recommend(user_id=2, k=3)
        for _ in range(ROUNDS):
            with fault(state):
                assert films.http.post("/v1/events", json=EVENT).status_code == 503
                began = time.monotonic()
                for _ in range(5):  # by now no thread waits for a store that does not answer
                    assert films.http.post("/v1/events", json=EVENT).status_code == 503
                    reply = films.recommend(user_id=1, k=3)
                    assert reply["items"]
                    assert reply["live_events"] == (1 if answers_rest_on_events else 0)
                    assert (WITHOUT_STORE in reply["notes"]) == (not answers_rest_on_events)
                assert time.monotonic() - began < 30
                ready = films.http.get("/ready").json()["store"]
                assert ready == ("answers" if answers_rest_on_events else "does not answer")
            eventually(lambda: films.http.get("/ready").json()["store"] == "answers")
            eventually(lambda: stores(films))
            with films.service.events._engine.begin() as connection:
                connection.exec_driver_sql("DELETE FROM foretaste_live_events WHERE seq > 1")
            assert is_whole(films, before)
        causes = {line["route"] for line in map(json.loads, films.log) if "cause" in line}
        assert "/v1/events" in causes


@pytest.mark.parametrize("fault", [frozen, stopped])
def test_a_server_starts_without_its_database_and_finds_it_later(
    bundle: Path, postgres_database: str, fault
) -> None:
    with ExitStack() as standstill:
        standstill.enter_context(fault(postgres_database))
        with served(bundle, postgres_database, store_timeout_s=0.3) as films:
            assert films.recommend(user_id=1, k=3)["notes"] == [WITHOUT_STORE]
            assert films.http.post("/v1/events", json=EVENT).status_code == 503
            standstill.close()
            eventually(lambda: stores(films))
            assert films.recommend(user_id=1, k=3)["live_events"] == 1


class Client(threading.Thread):
    """Asks one route until it is ended; keeps the statuses, and the ids that were acknowledged."""

    def __init__(self, films: Served, path: str, user_id: str) -> None:
        super().__init__()
        self.address, self.path, self.user_id = films.http.base_url, path, user_id
        self.statuses: set[int] = set()
        self.acknowledged: list[str] = []
        self.ended = threading.Event()

    def run(self) -> None:
        with httpx.Client(base_url=self.address, timeout=60, trust_env=False) as http:
            while not self.ended.is_set():
                event_id = f"{self.user_id}-{time.monotonic_ns()}"
                event = {"item_id": 101, "event_id": event_id} if "events" in self.path else {}
                status = http.post(self.path, json={"user_id": self.user_id} | event).status_code
                self.statuses.add(status)
                if status == 201:
                    self.acknowledged.append(event_id)

    def stores_on(self) -> None:
        """Wait until more events have been acknowledged."""
        stored = len(self.acknowledged)
        eventually(lambda: len(self.acknowledged) > stored + 10)


def test_a_database_that_ends_and_comes_back_under_load_loses_no_acknowledged_event(
    bundle: Path, postgres_database: str
) -> None:
    with served(bundle, postgres_database, store_timeout_s=0.3) as films:
        writers = [Client(films, "/v1/events", f"u{number}") for number in range(2)]
        reader = Client(films, "/v1/recommend", "u0")
        for one in (*writers, reader):
            one.start()
        for _ in range(ROUNDS):
            for writer in writers:
                writer.stores_on()
                writer.statuses.clear()
            with stopped(postgres_database):
                eventually(lambda: all(503 in writer.statuses for writer in writers))
        for writer in writers:
            writer.stores_on()
        for one in (*writers, reader):
            one.ended.set()
            one.join()
        assert reader.statuses == {200}
        for writer in writers:
            assert writer.statuses == {201, 503}
            events = films.service.events.of_user(writer.user_id, limit=10**6)
            kept = [event.event_id for event in events]
            assert len(kept) == len(set(kept))
            assert set(writer.acknowledged) <= set(kept)


def test_events_that_wait_for_the_store_hold_up_no_answer(bundle: Path, tmp_path: Path) -> None:
    # More of them than there are threads to compute with, each waiting for the lock to its end.
    state = str(tmp_path / "e.sqlite")
    with served(bundle, state, store_timeout_s=3.0, num_threads=2) as films:
        answered: list[float] = []

        def write() -> None:
            films.http.post("/v1/events", json=EVENT)
            answered.append(time.monotonic())

        with locked(state):
            writers = [threading.Thread(target=write) for _ in range(6)]
            for writer in writers:
                writer.start()
            eventually(lambda: "foretaste_in_flight 6.0" in films.http.get("/metrics").text)
            assert films.recommend(history=[101], k=3)["items"]
            assert not answered
        for writer in writers:
            writer.join()


@contextmanager
def asking(films: Served, times: int, **asked: object) -> Iterator[list[httpx.Response]]:
    """Ask for lists from as many threads; yield the replies so far, and all at the end."""
    replies: list[httpx.Response] = []

    def ask() -> None:
        replies.append(films.http.post("/v1/recommend", json=asked))

    threads = [threading.Thread(target=ask) for _ in range(times)]
    for thread in threads:
        thread.start()
    try:
        yield replies
    finally:
        for thread in threads:
            thread.join()


def test_lists_that_wait_for_a_store_that_hangs_hold_up_no_other_list(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # More of them than wait for the store at one time, and than `max_concurrency`.
    settings = {"store_timeout_s": 60.0, "num_threads": 1, "max_concurrency": 10}
    with served(bundle, str(tmp_path / "e.sqlite"), **settings) as films:
        assert stores(films)
        events, ended = films.service.events, threading.Event()

        def connect() -> sa.Connection:
            ended.wait(60)
            raise sa.exc.OperationalError("", {}, OSError("it is gone"))

        monkeypatch.setattr(events, "is_sqlite", False)
        monkeypatch.setattr(events._engine, "connect", connect)
        with ExitStack() as stack:
            stack.callback(ended.set)
            replies = []
            for number in (9, 18):  # fewer than 10 arrive together
                replies.append(stack.enter_context(asking(films, 9, user_id=1, k=3)))
                waiting = f"foretaste_in_flight {number}.0"
                eventually(lambda text=waiting: text in films.http.get("/metrics").text)
            for _ in range(5):
                assert films.recommend(history=[101], k=3)["items"]
            assert replies == [[], []]
            ended.set()
        notes = [reply.json()["notes"] for part in replies for reply in part]
        assert notes == [[WITHOUT_STORE]] * 18


def test_costly_lists_leave_room_and_a_thread_to_the_others(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("foretaste.serving.api.BURST", 4)
    monkeypatch.setattr("foretaste.serving.api.SLOWED_S", 0.01)
    with served(bundle, str(tmp_path / "e.sqlite"), num_threads=2) as films:
        ended, recommend = threading.Event(), films.service.recommend

        def compute(asked: RecommendRequest, *stored: object) -> RecommendReply:
            if asked.k > COSTLY or len(asked.history) > 4 * COSTLY:
                ended.wait(60)
            return recommend(asked, *stored)

        monkeypatch.setattr(films.service, "recommend", compute)
        with ExitStack() as stack:
            many = stack.enter_context(asking(films, 3, k=COSTLY + 1))
            long = stack.enter_context(asking(films, 2, k=5, history=[101] * 4 * COSTLY))
            eventually(lambda: "foretaste_in_flight 5.0" in films.http.get("/metrics").text)
            for _ in range(5):
                assert films.recommend(k=5)["items"]
            assert not many + long
            beyond = films.http.get(f"/v1/users/1/recommendations?k={COSTLY + 1}")
            assert (beyond.status_code, beyond.headers["retry-after"]) == (503, "1")
            ended.set()
        assert [reply.status_code for reply in many + long] == [200] * 5
        assert "foretaste_shed_total 1.0" in films.http.get("/metrics").text


def test_searches_leave_threads_to_lists(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with served(bundle, str(tmp_path / "e.sqlite"), num_threads=2) as films:
        ended, statuses = threading.Event(), []
        for name in ("find_items", "find_users", "columns"):  # slow, as with millions of items
            look = getattr(films.service, name)
            monkeypatch.setattr(
                films.service, name, lambda *a, look=look, **k: (ended.wait(60), look(*a, **k))[1]
            )

        def ask(path: str) -> None:
            statuses.append(films.http.get(path).status_code)

        paths = ["/v1/items?query=a", "/v1/users?prefix=1", "/v1/columns"]
        threads = [threading.Thread(target=ask, args=(path,)) for path in paths]
        for thread in threads:
            thread.start()
        try:
            eventually(lambda: "foretaste_in_flight 3.0" in films.http.get("/metrics").text)
            assert films.recommend(k=5)["items"]
            assert not statuses
        finally:
            ended.set()
            for thread in threads:
                thread.join()
        assert statuses == [200] * 3


def fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        while True:
            file.write(b"x" * 4096)


def test_a_full_disk_takes_no_event_and_answers_go_on(bundle: Path, tmp_path: Path) -> None:
    disk, mount = tmp_path / "disk", shutil.which("mount")
    disk.mkdir()
    words = ["-t", "tmpfs", "-o", "size=400k", "tmpfs", str(disk)]
    if not mount or subprocess.run([mount, *words], capture_output=True, check=False).returncode:
        pytest.skip("a small disk cannot be mounted here: only root can")
    try:
        with served(bundle, str(disk / "e.sqlite")) as films:
            assert stores(films)
            kept = 1
            for _ in range(ROUNDS):
                with pytest.raises(OSError, match="No space"):
                    fill(disk / "filler")
                many = [{"user_id": f"u{n}", "item_id": 101} for n in range(500)]
                refused = films.http.post("/v1/events", json=many)
                assert refused.status_code == 503
                assert "full" in json.loads(films.log[-1])["cause"]
                assert films.recommend(user_id=1, k=3)["live_events"] == kept
                assert films.service.events.count() == kept
                (disk / "filler").unlink()
                eventually(lambda: stores(films))
                kept += 1
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_clock_that_is_set_back_changes_nothing(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with served(bundle, str(tmp_path / "e.sqlite")) as films:

        def post(item: int, **more: object) -> int:
            event = {"user_id": "new", "item_id": item} | more
            return films.http.post("/v1/events", json=event).status_code

        assert post(101) == post(102) == 201
        for hours in (2, 72, 10_000):
            now_s = NOW_S - 3600 * hours
            monkeypatch.setattr(films.service, "_clock", lambda at=now_s: at)
            assert post(103 + hours % 7) == 201
            assert post(110 + hours % 7, timestamp=NOW_S) == 201  # a client whose clock is right
            history = films.http.get("/v1/users/new/history").json()["events"]
            newest = [event["item_id"] for event in history[:2]]
            assert newest == [str(110 + hours % 7), str(103 + hours % 7)]


def test_a_long_history_is_counted_whole_and_deleted_in_parts(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("foretaste.serving.state._CHUNK", 7)
    with served(bundle, str(tmp_path / "e.sqlite"), max_history=10) as films:
        films.http.post("/v1/events", json=[{"user_id": "u", "item_id": 101}] * 25)
        assert films.http.get("/v1/users/u/history").json()["total"] == 25
        assert films.recommend(user_id="u")["live_events"] == 10
        assert films.http.delete("/v1/users/u/events").json() == {"deleted": 25}
        assert films.http.get("/v1/users/u/history").json()["total"] == 0


# ---- clients and descriptors -----------------------------------------------------------------


@pytest.mark.parametrize("path", ["/v1/recommend", "/v1/events", "/v1/models/abcdefabcdef/canary"])
def test_no_body_however_broken_large_or_deep_is_a_fault_of_the_server(
    bundle: Path, tmp_path: Path, path: str
) -> None:
    bodies = [
        *(b"[" * depth for depth in (10, 1000, 100_000)),
        *(b'{"rules":' * depth + b"1" + b"}" * depth for depth in (10, 1000, 30_000)),
        *(b"[" * depth + b"]" * depth for depth in (1000, 100_000)),
        b"9" * 5000,
        b'{"k":' + b"9" * 5000 + b"}",
        b'{"k": 1e400}',
        b'{"share": NaN, "user_id": NaN, "timestamp": -Infinity}',
        b'{"user_id": "\\ud800", "item_id": "\\u0000"}',
        b'{"user_id": 1, "user_id": {}}',
        b'{"user_id": "\xff"}',
        b"\xef\xbb\xbf{}x",
        b"\x00" * 1000,
        b'{"user_id": "' + b"a" * 900_000 + b'"}',
        b"[" + b"{}," * 100_000 + b"{}]",
        b"[" + b'{"user_id": 1, "item_id": 2},' * 1001 + b"1]",
        b'{"history": [' + b"1," * 100_000 + b"1]}",
        b'{"features": ' + b'{"a":' * 500 + b"1" + b"}" * 500 + b"}",
        b"x" * 1_100_000,
    ]
    with served(bundle, str(tmp_path / "e.sqlite")) as films:
        for body in bodies:
            for kind in ("application/json", "text/plain", "application/json; charset=utf-16"):
                reply = films.http.post(path, content=body, headers={"content-type": kind})
                assert 400 <= reply.status_code < 500, (body[:40], reply.text)
                assert reply.json()["error"]
        assert films.recommend(user_id=1)["items"]
        assert films.service.events.count() == 0


CLIENT = """
import socket, sys
address = ("127.0.0.1", int(input()))
open_ = [socket.create_connection(address) for _ in range(int(sys.argv[1]))]
print("open", flush=True)
input()
for one in open_:
    one.close()
said = b""
while not said.startswith(b"HTTP/1.1 200"):  # it may not have noticed yet that the others are gone
    one = socket.create_connection(address, timeout=60)
    one.sendall(b"GET /health HTTP/1.1\\r\\nHost: localhost\\r\\nConnection: close\\r\\n\\r\\n")
    said = one.recv(15)
print(said.decode(), flush=True)
"""


@contextmanager
def connections(number: int) -> Iterator[subprocess.Popen[str]]:
    """Start a process that opens connections to a port, and asks on a new one without them.

    It may open as many files as this process may now.
    """
    words = [sys.executable, "-S", "-c", CLIENT, str(number)]
    with subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    ) as one:
        yield one
        one.kill()


@contextmanager
def few_files(number: int) -> Iterator[None]:
    """Let this process open so many files more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = max(map(int, os.listdir("/proc/self/fd")))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 1 + number, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def num_refused(films: Served) -> float:
    text = films.http.get("/metrics").text
    return float(text.partition('total{reason="connections"} ')[2].partition("\n")[0] or 0)


@pytest.mark.skipif(sys.platform != "linux", reason="counts the files of this process in /proc")
def test_silent_connections_leave_files_for_the_others(bundle: Path, tmp_path: Path) -> None:
    state, settings = str(tmp_path / "e.sqlite"), {"refusals_logged_per_minute": 20}
    with connections(600) as many, few_files(80), served(bundle, state, **settings) as films:
        assert stores(films)  # a client from before, and its files
        many.stdin.write(f"{films.http.base_url.port}\n")
        assert many.stdout.readline() == "open\n"
        for _ in range(ROUNDS):
            assert stores(films)
            assert films.recommend(user_id=1, k=3)["live_events"] > 0
        eventually(lambda: num_refused(films) > 100)
        many.stdin.write("\n")
        assert many.stdout.readline() == "HTTP/1.1 200 OK\n"
        assert sum('"event": "connection"' in line for line in films.log) <= 25


def use_up(taken: list[int]) -> None:
    while True:
        taken.append(os.open("/dev/null", os.O_RDONLY))


@pytest.mark.skipif(sys.platform != "linux", reason="counts the files of this process in /proc")
def test_a_server_without_a_file_left_answers_on_and_takes_connections_again(
    bundle: Path, tmp_path: Path
) -> None:
    with served(bundle, str(tmp_path / "e.sqlite")) as films:
        assert stores(films)
        with connections(1) as other, few_files(2):
            taken = [os.open("/dev/null", os.O_RDONLY)]
            with pytest.raises(OSError, match="Too many open files"):
                use_up(taken)
            other.stdin.write(f"{films.http.base_url.port}\n")
            assert other.stdout.readline() == "open\n"  # the system has it; the server does not
            assert films.recommend(user_id=1, k=3)["items"]
            eventually(lambda: any('"event": "fault"' in line for line in films.log))
            for one in taken:
                os.close(one)
            other.stdin.write("\n")
            assert other.stdout.readline() == "HTTP/1.1 200 OK\n"
        assert len(films.log) < 100  # asyncio reports each of a thousand tries a second


@pytest.mark.parametrize("token", [None, "t"])
def test_a_request_is_refused_before_its_body_is_read(
    bundle: Path, tmp_path: Path, token: str | None
) -> None:
    settings = {"token": token} if token else {"max_concurrency": 1, "num_threads": 1}
    with served(bundle, str(tmp_path / "e.sqlite"), **settings) as films:
        address = (films.http.base_url.host, films.http.base_url.port)
        head = b"POST /v1/%s HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n\r\n"
        films.service.slot._loading.acquire()  # a switch waits, and fills the server
        switch = threading.Thread(target=films.http.post, args=("/v1/model/reload",))
        if token is None:
            switch.start()
            eventually(lambda: "foretaste_in_flight 1.0" in films.http.get("/metrics").text)
        for path in (b"recommend", b"events"):
            with closing(socket.create_connection(address, timeout=60)) as client:
                client.sendall(head % path)
                answer = client.recv(65536)
                assert answer.startswith(b"HTTP/1.1 401" if token else b"HTTP/1.1 503")
                assert b"x-request-id: " in answer
        films.service.slot._loading.release()
        if token is None:
            switch.join()

"""The server as a process: killed, drained, with lost clients, and on a port already in use."""

import gc
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from http.client import HTTPResponse
from pathlib import Path

import httpx
import pytest

from foretaste.errors import BundleError, ConfigError
from foretaste.serving.server import _listen, serve
from foretaste.serving.settings import ServerSettings
from foretaste.serving.state import open_live_events
from tests.postgres_server import frozen
from tests.worlds import write_film_bundle

pytest_plugins = ["postgres_server"]
pytestmark = pytest.mark.slow

PROGRAM = """
import json, sys
from pathlib import Path
from foretaste.serving.server import serve
from foretaste.serving.settings import ServerSettings
serve(Path(sys.argv[1]), settings=ServerSettings(**json.loads(sys.argv[2])))
"""


class Process:
    """A server that runs, its address, and a client."""

    def __init__(self, popen: subprocess.Popen[str], address: str, log: Path) -> None:
        self.popen, self.log = popen, log
        self.http = httpx.Client(base_url=address, timeout=60, trust_env=False)

    def logged(self) -> list[dict]:
        return [json.loads(line) for line in self.log.read_text().splitlines()]


@contextmanager
def running(bundle: Path, tmp_path: Path, **settings: object) -> Iterator[Process]:
    log = tmp_path / f"log{len(list(tmp_path.glob('log*')))}"
    with log.open("w") as stderr:
        popen = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(bundle), json.dumps({"port": 0} | settings)],
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
        )
    try:
        line = popen.stdout.readline()
        assert line.startswith(f"foretaste serves {bundle.name} at http://127.0.0.1:"), (
            log.read_text()
        )
        process = Process(popen, line.split()[-1], log)
        with process.http:
            yield process
    finally:
        popen.kill()
        popen.communicate()


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_film_bundle(tmp_path_factory.mktemp("server") / "films")


def post_until_it_dies(address: httpx.URL, sender: int, acknowledged: list[str]) -> None:
    with httpx.Client(base_url=address, trust_env=False, timeout=60) as http:
        for number in range(10_000):
            event_id = f"{sender}-{number}"
            event = {"user_id": f"u{sender}", "item_id": 101, "event_id": event_id}
            try:
                if http.post("/v1/events", json=event).status_code == 201:
                    acknowledged.append(event_id)
            except httpx.TransportError:
                return


def test_no_acknowledged_event_is_lost_by_kill_9(bundle: Path, tmp_path: Path, state: str) -> None:
    acknowledged: list[list[str]] = [[] for _ in range(4)]
    with running(bundle, tmp_path, state=state) as process:
        threads = [
            threading.Thread(target=post_until_it_dies, args=(process.http.base_url, sender, mine))
            for sender, mine in enumerate(acknowledged)
        ]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + 60
        while sum(map(len, acknowledged)) < 60 and time.monotonic() < deadline:
            time.sleep(0.01)
        process.popen.send_signal(signal.SIGKILL)
        for thread in threads:
            thread.join()
    assert sum(map(len, acknowledged)) >= 60
    with running(bundle, tmp_path, state=state) as process:
        for sender, mine in enumerate(acknowledged):
            again = [
                {"user_id": f"u{sender}", "item_id": 101, "event_id": event_id}
                for event_id in mine[:1000]
            ]
            reply = process.http.post("/v1/events", json=again).json()
            assert (reply["stored"], reply["duplicates"]) == (0, len(again))
            assert process.http.get(f"/v1/users/u{sender}/history").json()["total"] >= len(mine)


STORE_PROGRAM = """
import sys
from foretaste.serving.state import LiveEvent, open_live_events
events = open_live_events(sys.argv[1])
for line in sys.stdin:
    ids = line.split()
    events.add([LiveEvent(user_id="u", item_id="1", timestamp_s=1, event_id=one) for one in ids])
    print(line, end="", flush=True)
"""


def test_the_store_keeps_what_it_acknowledged_in_three_rounds_of_kill_9(state: str) -> None:
    acknowledged: list[str] = []
    for turn in range(3):
        with subprocess.Popen(
            [sys.executable, "-c", STORE_PROGRAM, state],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
        ) as process:
            for number in range(0, 400, 4):  # more than will be read before it is killed
                ids = [f"{turn}-{number + step}" for step in range(4)]
                process.stdin.write(" ".join(ids) + "\n")
            process.stdin.flush()
            for _ in range(20 + turn):
                acknowledged += process.stdout.readline().split()
            process.kill()
            acknowledged += process.stdout.read().split()
            with suppress(BrokenPipeError):
                process.stdin.close()
        with closing(open_live_events(state)) as events:
            kept = [event.event_id for event in events.of_user("u", limit=10_000)]
        assert len(kept) == len(set(kept))
        assert set(acknowledged) <= set(kept)
        assert len(kept) % 4 == 0  # events that were sent together are stored together
    assert len(acknowledged) >= 4 * 63


def test_sigterm_ends_a_server_whose_store_hangs_within_its_time(
    bundle: Path, tmp_path: Path, postgres_database: str
) -> None:
    settings = {"drain_s": 2, "unready_s": 0, "store_timeout_s": 20}  # a call ends after a minute
    settings["state"] = postgres_database
    with running(bundle, tmp_path, **settings) as process, ExitStack() as stack:
        event = {"user_id": 1, "item_id": 101}
        assert process.http.post("/v1/events", json=event).status_code == 201
        stack.enter_context(frozen(postgres_database))
        writers = [
            threading.Thread(target=post_once, args=(process.http.base_url,)) for _ in range(12)
        ]
        for writer in writers:
            writer.start()
        time.sleep(0.5)  # they wait for the store
        began = time.monotonic()
        process.popen.send_signal(signal.SIGTERM)
        assert process.popen.wait(timeout=60) == 0
        assert time.monotonic() - began < 15  # 2 s and the machine's delays
        for writer in writers:
            writer.join()


def post_once(address: httpx.URL) -> None:
    event = {"user_id": 1, "item_id": 101}
    with suppress(httpx.TransportError):
        httpx.post(f"{address}v1/events", json=event, timeout=60, trust_env=False)


def connects(address: tuple[str, int]) -> bool:
    try:
        socket.create_connection(address, timeout=60).close()
    except ConnectionError:
        return False
    return True


def test_sigterm_ends_what_is_at_work_and_then_the_process(bundle: Path, tmp_path: Path) -> None:
    settings = {"state": str(tmp_path / "e.sqlite"), "unready_s": 0}
    with running(bundle, tmp_path, **settings) as process:
        address = (process.http.base_url.host, process.http.base_url.port)
        body = json.dumps({"user_id": 1, "k": 3}).encode()
        with socket.create_connection(address, timeout=60) as slow:
            slow.sendall(
                b"POST /v1/recommend HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\n"
                b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
            )
            assert slow.recv(65536).startswith(b"HTTP/1.1 100 Continue")  # it is at work
            slow.sendall(body[:5])
            process.popen.send_signal(signal.SIGTERM)
            deadline = time.monotonic() + 60
            while connects(address):
                assert time.monotonic() < deadline
                time.sleep(0.01)
            slow.sendall(body[5:])
            assert slow.recv(65536).startswith(b"HTTP/1.1 200 OK")
        assert process.popen.wait(timeout=60) == 0
        assert [line["status"] for line in process.logged()] == [200]


def ask(client: socket.socket, path: bytes) -> HTTPResponse:
    """Ask on an open connection, and read the whole answer."""
    client.sendall(b"GET %s HTTP/1.1\r\nHost: localhost\r\n\r\n" % path)
    answer = HTTPResponse(client)
    answer.begin()
    answer.read()
    return answer


def test_sigterm_makes_a_server_unready_while_it_still_listens(
    bundle: Path, tmp_path: Path
) -> None:
    settings = {"state": str(tmp_path / "e.sqlite"), "unready_s": 600.0}
    with running(bundle, tmp_path, **settings) as process, ExitStack() as stack:
        address = (process.http.base_url.host, process.http.base_url.port)

        def client() -> socket.socket:
            return stack.enter_context(socket.create_connection(address, timeout=60))

        early = client()
        assert ask(early, b"/ready").status == 200
        process.popen.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + 60
        while ask(client(), b"/ready").status != 503:
            assert time.monotonic() < deadline
        for one in (early, client()):  # also a connection from before is answered, and then closed
            answer = ask(one, b"/v1/users/1/recommendations")
            assert (answer.status, answer.headers["connection"]) == (200, "close")
        process.popen.send_signal(signal.SIGTERM)  # a second one ends the wait of ten minutes
        assert process.popen.wait(timeout=60) == 0
        assert not connects(address)


def test_sigterm_ends_a_server_by_itself_and_sigint_at_once(bundle: Path, tmp_path: Path) -> None:
    for number, unready_s in ((signal.SIGTERM, 0.2), (signal.SIGINT, 600.0)):
        settings = {"state": str(tmp_path / "e.sqlite"), "unready_s": unready_s}
        with running(bundle, tmp_path, **settings) as process:
            process.popen.send_signal(number)
            assert process.popen.wait(timeout=60) == 0


def test_sighup_swaps_the_model_under_load_without_a_failed_request(tmp_path: Path) -> None:
    bundle = write_film_bundle(tmp_path / "films")
    with running(bundle, tmp_path, state=str(tmp_path / "e.sqlite")) as process:
        old = process.http.get("/v1/model").json()["version"]
        write_film_bundle(bundle, seed=1)
        process.popen.send_signal(signal.SIGHUP)
        versions, deadline = [], time.monotonic() + 300  # two trials in processes of their own
        while len(set(versions)) < 2:
            reply = process.http.post("/v1/recommend", json={"user_id": 1, "k": 5})
            assert reply.status_code == 200
            versions.append(reply.json()["model_version"])
            assert time.monotonic() < deadline
        assert versions[0] == old
        (bundle / "manifest.json").write_text("{")
        process.popen.send_signal(signal.SIGHUP)
        while not any(line.get("result") == "refused" for line in process.logged()):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        reply = process.http.post("/v1/recommend", json={"user_id": 1})
        assert reply.json()["model_version"] == versions[-1]


def test_a_body_that_never_comes_is_given_up(bundle: Path, tmp_path: Path) -> None:
    settings = {"state": str(tmp_path / "e.sqlite"), "body_timeout_s": 0.3}
    with running(bundle, tmp_path, **settings) as process:
        address = (process.http.base_url.host, process.http.base_url.port)
        with socket.create_connection(address, timeout=60) as idle:
            idle.sendall(
                b"POST /v1/events HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50\r\n\r\n{"
            )
            assert idle.recv(4096).startswith(b"HTTP/1.1 408")


def test_a_body_far_too_large_gets_its_answer_though_it_was_still_sending(
    bundle: Path, tmp_path: Path
) -> None:
    with running(bundle, tmp_path, state=str(tmp_path / "e.sqlite")) as process:
        reply = process.http.post("/v1/events", content=b"x" * 5_000_000)
        assert reply.status_code == 413


def test_a_port_in_use_is_an_error_with_the_fix(bundle: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        settings = ServerSettings(port=taken.getsockname()[1], state=str(tmp_path / "e.sqlite"))
        with pytest.raises(ConfigError, match=r"cannot listen on port \d+ .* choose another"):
            serve(bundle, settings=settings)
    assert gc.get_freeze_count() == 0  # the server's arrangement for itself ends with it


@pytest.mark.parametrize("host", ["192.0.2.7", "nowhere.invalid"])
def test_a_host_that_is_not_of_this_machine_is_no_matter_of_ports(host: str) -> None:
    with (
        pytest.raises(ConfigError, match="give an address of this machine") as caught,
        _listen(ServerSettings(host=host, port=0)),
    ):
        pass
    assert caught.value.name == "host"


def test_the_body_of_an_answer_does_not_wait_for_its_head_to_be_acknowledged() -> None:
    # Head and body are two writes; the second of two small ones waits, unless this is switched off.
    with (
        _listen(ServerSettings(port=0)) as listener,
        socket.create_connection(listener.getsockname()),
    ):
        connection, _ = listener.accept()
        with connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_a_missing_bundle_is_said_before_anything_is_opened(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="give the folder of a bundle"):
        serve(tmp_path / "nowhere", settings=ServerSettings(port=0))
    assert list(tmp_path.iterdir()) == []


def test_live_events_are_next_to_the_bundle_by_default(tmp_path: Path) -> None:
    bundle = write_film_bundle(tmp_path / "films")
    with running(bundle, tmp_path) as process:
        process.http.post("/v1/events", json={"user_id": 1, "item_id": 101})
        assert (tmp_path / "films.events.sqlite").is_file()
        assert process.http.post("/v1/model/reload").status_code == 200

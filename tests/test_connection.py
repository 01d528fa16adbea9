"""Connections, tested by raw sockets: long heads, silent clients, and too many connections."""

import asyncio
import json
import random
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
from starlette.types import Receive, Scope, Send

from foretaste.serving.connection import Connection, limited
from foretaste.serving.metrics import Admission, Metrics
from foretaste.serving.server import http_server
from foretaste.serving.settings import ServerSettings

GET = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"


async def size(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer how many bytes a body has; with `/many`, 8 MB."""
    if scope["type"] != "http":
        return
    total, more = 0, True
    while more:
        message = await receive()
        total += len(message.get("body", b""))
        more = message.get("more_body", False)
    body = b"x" * 8_000_000 if scope["path"] == "/many" else b"%d" % total
    headers = [(b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class Server:
    """Where it listens, and its counters."""

    def __init__(self, address: tuple[str, int], admission: Admission) -> None:
        self.address, self.admission, self.metrics = address, admission, admission.metrics

    def connect(self) -> socket.socket:
        return socket.create_connection(self.address, timeout=30)

    def counted(self, name: str) -> float:
        lines = self.metrics.exposition().decode().splitlines()
        found = [line.rsplit(" ", 1)[1] for line in lines if line.startswith(f"{name} ")]
        return float(found[0]) if found else 0.0

    def refused(self, reason: str) -> float:
        return self.counted(f'foretaste_refused_connections_total{{reason="{reason}"}}')

    def wait_for(self, num: int) -> None:
        """Wait until so many connections are open."""
        deadline = time.monotonic() + 30
        while self.counted("foretaste_connections") != num:
            assert time.monotonic() < deadline
            time.sleep(0.01)


@contextmanager
def serving(**settings: object) -> Iterator[Server]:
    chosen = ServerSettings(**settings)
    admission = Admission(chosen, Metrics(), print)
    listener = socket.create_server(("127.0.0.1", 0))
    server = http_server(size, chosen, admission)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield Server(listener.getsockname(), admission)
    finally:
        server.should_exit = True
        thread.join()


def until_closed(client: socket.socket) -> bytes:
    """Read until the server has closed the connection."""
    parts = []
    while True:
        try:
            part = client.recv(65536)
        except ConnectionResetError:
            part = b""
        if not part:
            return b"".join(parts)
        parts.append(part)


def status_of(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


def asked_on(client: socket.socket) -> int:
    """Send a request on an open connection, read its answer, and return the status."""
    client.sendall(GET)
    answer = b""
    while not answer.endswith(b"\r\n\r\n0"):
        part = client.recv(65536)
        assert part, answer
        answer += part
    return status_of(answer)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    settings = {"header_timeout_s": 0.4, "write_timeout_s": 0.4, "keep_alive_s": 1}
    with serving(max_url_bytes=200, max_header_bytes=1000, **settings) as one:
        yield one


def ask(server: Server, sent: bytes) -> bytes:
    with server.connect() as client:
        client.sendall(sent)
        return until_closed(client)


LAST = b"GET / HTTP/1.1\r\nConnection: close\r\n\r\n"


@pytest.mark.parametrize(
    ("head", "status", "reason"),
    [
        (b"GET /" + b"a" * 199 + b" HTTP/1.1\r\nConnection: close\r\n\r\n", 200, None),
        (b"GET /" + b"a" * 200 + b" HTTP/1.1\r\nConnection: close\r\n\r\n", 414, "url"),
        (b"GET / HTTP/1.1\r\nConnection: close\r\nX: " + b"a" * 920 + b"\r\n\r\n", 200, None),
        (b"GET / HTTP/1.1\r\nConnection: close\r\nX: " + b"a" * 921 + b"\r\n\r\n", 431, "header"),
        (b"GET / HTTP/1.1\r\n" + b"X:\r\n" * 30 + b"Connection: close\r\n\r\n", 431, "header"),
        (b"GET / HTTP/1.1\r\n\r\n" * 64 + LAST, 200, None),
        (b"GET / HTTP/1.1\r\n\r\n" * 65 + LAST, 429, "pipeline"),
        (b"GET\r\n\r\n", 400, "malformed"),
        (b"\x16\x03\x01\x02\x00\x01", 400, "malformed"),  # as TLS begins
    ],
)
def test_a_head_beyond_its_bound_is_refused_and_one_at_it_is_not(
    server: Server, head: bytes, status: int, reason: str | None
) -> None:
    before = server.refused(reason or "")
    answer = ask(server, head)
    assert status_of(answer) == status
    if reason is not None:
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
        assert server.refused(reason) == before + 1


CHUNKED = b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    "start",
    [
        b"GET /",
        b"GET / HTTP/1.1\r\nX: ",
        b"GET / HTTP/1.1\r\nX",
        CHUNKED + b"5\r\nabcde\r\n0\r\nX: ",  # a header after the body
        CHUNKED + b"5;",  # an extension of a chunk
    ],
)
def test_a_head_that_never_ends_is_ended_after_little_of_it(server: Server, start: bytes) -> None:
    sent, is_open = 0, True
    with server.connect() as client:
        client.sendall(start)
        while is_open and sent < 100_000_000:
            try:
                client.sendall(b"a" * 100_000)
                sent += 100_000
            except OSError:
                is_open = False
    assert sent < 20_000_000  # what buffers on the way hold
    assert status_of(ask(server, GET[:-2] + b"Connection: close\r\n\r\n")) == 200


def test_a_connection_that_says_nothing_is_closed_without_a_word(server: Server) -> None:
    began = time.monotonic()
    with server.connect() as silent, server.connect() as blank:
        blank.sendall(b"\r\n")
        assert until_closed(silent) == until_closed(blank) == b""
    assert 0.3 < time.monotonic() - began < 10
    server.wait_for(0)


@pytest.mark.parametrize("after", [b"", GET])
def test_a_head_that_comes_letter_by_letter_is_given_up(server: Server, after: bytes) -> None:
    with server.connect() as client:
        if after:  # a second request of a connection is timed as the first
            assert asked_on(client) == 200
        client.settimeout(0.05)
        answer = b""
        for letter in [b"G", b"E", b"T", b" ", b"/"] + [b"a"] * 100:
            client.sendall(letter)
            try:
                answer = client.recv(65536)
                break
            except TimeoutError:
                continue
        assert status_of(answer) == 408
        assert b"connection: close" in answer


def test_a_connection_is_kept_between_requests_for_its_time_and_then_closed(
    server: Server,
) -> None:
    with server.connect() as client:
        for pause in (0.6, 0.0):  # longer than a head may take
            assert asked_on(client) == 200
            time.sleep(pause)
        began = time.monotonic()
        assert until_closed(client) == b""
        assert 0.5 < time.monotonic() - began < 20


def test_bodies_and_requests_in_a_row_are_no_long_heads(server: Server) -> None:
    post = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n" + b"b" * 100_000
    last = b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    answer = ask(server, post * 3 + GET * 50 + last)
    assert answer.count(b"HTTP/1.1 200 OK") == 54
    assert answer.count(b"100000") == 3


def test_a_request_is_the_same_in_whatever_pieces_it_comes(server: Server) -> None:
    whole = b"POST /a HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nConnection: close\r\n\r\nabcde"
    draw = random.Random(0)
    for _ in range(20):
        cuts = sorted({0, *draw.sample(range(1, len(whole)), draw.randint(1, 8)), len(whole)})
        with server.connect() as client:
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for low, high in pairwise(cuts):
                client.sendall(whole[low:high])
            answer = until_closed(client)
        assert answer.startswith(b"HTTP/1.1 200 OK")
        assert answer.endswith(b"\r\n\r\n5")


@pytest.mark.parametrize("ending", [b"", b"Connection: close\r\n"])
@pytest.mark.parametrize("times", [1, 3])
def test_an_answer_that_the_client_does_not_read_is_cut_off(
    server: Server, ending: bytes, times: int
) -> None:
    server.wait_for(0)
    with server.connect() as client:
        client.sendall((b"GET /many HTTP/1.1\r\nHost: x\r\n" + ending + b"\r\n") * times)
        server.wait_for(1)
        server.wait_for(0)


@pytest.mark.parametrize("setting", ["max_connections", "max_connections_per_address"])
def test_connections_beyond_their_number_are_refused_until_one_leaves(setting: str) -> None:
    with serving(**{setting: 2}) as server, ExitStack() as stack:
        clients = [stack.enter_context(server.connect()) for _ in range(2)]
        server.wait_for(2)
        with server.connect() as third:
            answer = until_closed(third)
        if setting == "max_connections_per_address":
            with socket.create_connection(server.address, 30, ("127.0.0.2", 0)) as other:
                assert asked_on(other) == 200
            server.wait_for(2)
        assert status_of(answer) == 503
        assert b"retry-after: 1" in answer
        server.wait_for(2)
        clients[0].close()
        server.wait_for(1)
        with server.connect() as third:
            assert asked_on(third) == 200
        assert asked_on(clients[1]) == 200


REFUSED = b"POST /v1/recommend HTTP/1.1\r\nHost: x\r\n%sContent-Length: 5\r\n\r\nabcde"


@contextmanager
def without_room() -> Iterator[Server]:
    with serving(header_timeout_s=0.4) as one:
        one.admission.is_full = lambda path: True
        yield one


@pytest.fixture(scope="module")
def full() -> Iterator[Server]:
    with without_room() as one:
        yield one


def test_a_request_without_room_is_answered_whole_and_its_connection_is_kept(full: Server) -> None:
    labels = 'method="POST",route="/v1/recommend",status="503"'
    counts = ["foretaste_shed_total", f"foretaste_requests_total{{{labels}}}"]
    before = [full.counted(name) for name in counts]
    with full.connect() as client:
        for sent in (REFUSED % b"X-Request-ID: mine\r\n", GET, REFUSED % b"Connection: close\r\n"):
            client.sendall(sent)
            answer = client.recv(65536)
            while sent == GET and not answer.endswith(b"\r\n\r\n0"):
                answer += client.recv(65536)
            if sent == GET:  # it needs no model, and the routes say whether there is room
                assert status_of(answer) == 200
                continue
            assert status_of(answer) == 503
            head, _, body = answer.partition(b"\r\n\r\n")
            assert b"\r\nretry-after: 1\r\n" in head
            assert (b"x-request-id: mine" in head) == (b"mine" in sent)
            assert (b"connection: close" in head) == (b"close" in sent)
            assert b"content-length: %d\r\n" % len(body) in head
            assert "try again" in json.loads(body)["error"]
        assert until_closed(client) == b""
    # two on one connection at once; one whose body waits to be asked for
    last = REFUSED % b"Connection: close\r\n"
    assert ask(full, REFUSED % b"" + last).count(b"HTTP/1.1 503") == 2
    waiting = (REFUSED % b"Expect: 100-continue\r\n").removesuffix(b"abcde")
    assert ask(full, waiting).count(b"HTTP/1.1 503") == 1
    assert [full.counted(name) for name in counts] == [number + 5 for number in before]


LINES = b"POST /v1/recommend HTTP/1.1\r\nX-Request-ID: mine\r\n"


@pytest.mark.parametrize(
    ("sent", "is_parsed"),
    [
        (LINES + b"Content-Length: 5\r\n\r\nabcde", False),
        (LINES + b"Connection: keep-alive\r\ncontent-length:  5 \r\n\r\nabcde", False),
        (LINES + b"\r\n", False),
        (b"GET /v1/users/7/recommendations?k=3 HTTP/1.1\r\nx-request-id:mine\r\n\r\n", False),
        (LINES + b"Content-Length: 0005\r\n\r\nabcde", True),
        (LINES + b"Transfer-Encoding: chunked\r\n\r\n5\r\nabcde\r\n0\r\n\r\n", True),
        (LINES + b"X: \x80\r\nContent-Length: 5\r\n\r\nabcde", True),
        (LINES + b"X: " + b"a" * 4_100 + b"\r\nContent-Length: 5\r\n\r\nabcde", True),
        (b"\r\n" + LINES + b"\r\n", True),
        (b"GET /v1/users/%37/recommendations HTTP/1.1\r\nX-Request-ID: mine\r\n\r\n", True),
    ],
)
def test_a_refusal_is_the_same_whether_or_not_its_request_was_parsed(
    full: Server, monkeypatch: pytest.MonkeyPatch, sent: bytes, *, is_parsed: bool
) -> None:
    parsed: list[bytes] = []
    shed = full.counted("foretaste_shed_total")
    complete = Connection.on_headers_complete
    monkeypatch.setattr(
        Connection, "on_headers_complete", lambda one: (parsed.append(one.url), complete(one))
    )
    with full.connect() as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        answers = []
        for cut in (len(sent), 4):
            client.sendall(sent[:cut])
            time.sleep(0.02)
            client.sendall(sent[cut:])
            answers.append(client.recv(65536))
        assert len(parsed) == (2 if is_parsed else 1)
        assert answers[0] == answers[1]
        assert status_of(answers[0]) == 503
        assert asked_on(client) == 200  # the connection is still in step
    assert full.counted("foretaste_shed_total") == shed + 2


@pytest.mark.parametrize(
    ("parts", "refused"),
    [
        # of a request that was refused by its head, a body that looks like another request
        ([LINES + b"Content-Length: %d\r\n\r\n" % len(LINES + b"\r\n"), LINES + b"\r\n"], 1),
        ([LINES + b"\r\n"] * 3, 3),  # sent without waiting for answers
        ([LINES + b"\r\n" + LINES + b"\r\n", LINES + b"\r\n"], 3),
        ([LINES + b"\r\n" + LINES, b"\r\n"], 2),
        ([GET, LINES + b"\r\n"], 1),
    ],
)
def test_requests_in_a_row_are_refused_one_by_one_and_a_body_is_no_request(
    full: Server, parts: list[bytes], refused: int
) -> None:
    shed = full.counted("foretaste_shed_total")
    with full.connect() as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for part in parts:
            client.sendall(part)
            time.sleep(0.02)
        client.sendall(GET[:-2] + b"Connection: close\r\n\r\n")
        answer = until_closed(client)
    assert answer.count(b"HTTP/1.1 503") == answer.count(b"x-request-id: mine") == refused
    assert answer.count(b"HTTP/1.1 200") == 1 + parts.count(GET)
    assert answer.endswith(b"\r\n\r\n0")
    assert full.counted("foretaste_shed_total") == shed + refused


@pytest.mark.parametrize(
    "lines",
    [
        b"Content-Length: 5\r\nContent-Length: 5\r\n",
        b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n",
        b"Content-Length : 5\r\n",
        b"Content-Length: +5\r\n",
        b"Content-Length: 3\r\n",  # the rest is no request
    ],
)
def test_a_request_whose_end_is_unclear_is_left_to_the_parser(full: Server, lines: bytes) -> None:
    assert status_of(ask(full, LINES + lines + b"\r\nabcde")) == 400


def test_many_refusals_at_once_are_answered_one_after_the_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("foretaste.serving.connection.TICK_S", 0.1)
    monkeypatch.setattr("foretaste.serving.connection.PER_TICK", 2)
    began = time.monotonic()
    with without_room() as full, ExitStack() as stack:
        clients = [stack.enter_context(full.connect()) for _ in range(10)]
        for client in clients:
            client.sendall(REFUSED % b"")
        stack.enter_context(full.connect()).sendall(REFUSED % b"")  # and is gone before its turn
        assert [status_of(client.recv(65536)) for client in clients] == [503] * 10
        assert time.monotonic() - began > 0.49  # two in each tenth of a second
        stack.close()
        full.wait_for(0)


@pytest.mark.parametrize(
    ("came_s", "answered"),
    [
        ([9.9] * 3, 2),  # two at a time
        ([8.9, 8.9, 9.0, 9.0, 9.1], 4),  # and all that came a second ago
        ([9.9] * 20, 6),  # and all beyond 7 of 8 in 16 connections, so that others can connect
        ([9.9], 1),
    ],
)
def test_the_oldest_refusals_are_sent_and_the_others_wait(
    monkeypatch: pytest.MonkeyPatch, came_s: list[float], answered: int
) -> None:
    monkeypatch.setattr("foretaste.serving.connection.PER_TICK", 2)
    settings, sent = ServerSettings(max_connections=16), []
    kind = limited(settings, Admission(settings, Metrics(), print))
    for number, since_s in enumerate(came_s):
        one = Mock(_turned_away=lambda *_, number=number: sent.append(number))
        kind.refused[one] = since_s, None, b""
    loop = Mock(asyncio.AbstractEventLoop, time=lambda: 10.0)
    kind._turn_away(loop)
    assert sent == list(range(answered))
    assert len(kind.refused) == len(came_s) - answered
    assert loop.call_later.called == bool(kind.refused)


class Lists:
    """Requests for lists at times that a test sets; one thread computes the lists."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 0.0
        clock = SimpleNamespace(perf_counter=lambda: self.now_s, time=time.time)
        monkeypatch.setattr("foretaste.serving.metrics.time", clock)
        settings = ServerSettings(num_threads=1, max_wait_s=0.05, max_concurrency=40)
        self.admission = Admission(settings, Metrics(), print)

    def answer(self, seconds: float, *, times: int = 1) -> None:
        for _ in range(times):
            with self.admission.place("/v1/recommend"):
                self.now_s += seconds

    def request(self, number: int, *, per_s: float) -> None:
        for _ in range(number):
            self.now_s += 1 / per_s
            self.admission.turned_away("POST", "/v1/recommend", "")

    def full_beside(self, number: int, path: str = "/v1/recommend", *, each_s: float = 0.0) -> bool:
        with ExitStack() as stack:
            for _ in range(number):
                stack.enter_context(self.admission.place("/v1/users/7/recommendations"))
            self.now_s += each_s * number  # as long as they take one after the other
            return self.admission.is_full(path)


def test_a_list_is_refused_when_those_before_it_would_take_too_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lists = Lists(monkeypatch)
    lists.answer(0.03)
    assert [lists.full_beside(n, "/v1/items/7/similar", each_s=0.03) for n in (1, 16, 17)] == [
        *(False, False),  # a burst, however long it takes
        True,  # 17 x 0.03 s
    ]
    assert not lists.full_beside(39, "/v1/events", each_s=0.03)
    assert lists.full_beside(40, "/v1/events", each_s=0.03)
    assert not lists.full_beside(40, "/metrics", each_s=0.03)
    lists.answer(0.002, times=300)
    lists.answer(1000.0)  # a stall; what each takes is not believed to be more than twice as long
    assert not lists.full_beside(20, each_s=0.002)
    assert lists.full_beside(30, each_s=0.002)


@pytest.mark.parametrize(
    ("per_s", "waits"), [(100, True), (200, True), (400, False), (1000, False)]
)
def test_no_list_waits_while_more_are_requested_than_can_be_answered(
    monkeypatch: pytest.MonkeyPatch, *, per_s: float, waits: bool
) -> None:
    lists = Lists(monkeypatch)
    lists.answer(0.005, times=10)  # 200 per second
    lists.request(100, per_s=per_s)
    places = 3 if per_s == 400 else 2
    assert lists.full_beside(places, each_s=0.005) != waits
    assert not lists.full_beside(places - 1, each_s=0.005)
    lists.request(1, per_s=1)  # it was quiet for a second
    lists.answer(0.005, times=10)
    lists.request(20, per_s=1e6)  # a burst
    assert not lists.full_beside(7, each_s=0.005)


def test_of_many_requests_that_arrive_together_only_those_are_begun_that_there_is_room_for() -> (
    None
):
    # All their heads are read before the first is begun.
    metrics, settings = Metrics(), ServerSettings(num_threads=1, max_concurrency=3)
    admission, begun = Admission(settings, metrics, print), []

    async def app(*asgi: object) -> None:
        begun.append(asgi)

    apps = []
    for _ in range(5):
        if not admission.is_full("/v1/recommend"):
            apps.append(admission.expected("/v1/recommend", app))
    assert len(apps) == 3
    assert admission.is_full("/v1/items/7/similar")
    assert admission.expected("/health", app) is app
    for one in apps:
        asyncio.run(one({}, None, None))
    assert len(begun) == 3
    assert not admission.is_full("/v1/recommend")

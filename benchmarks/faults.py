"""Fault tests of the service: corrupted bundles, kill -9, swaps, and faults under load.

Each selected part replaces its own entry of the record; with `--resume`, rounds of kill -9 and
mutations continue from that entry.

    python benchmarks/faults.py --mutations 1000 --kill9 100 --swaps 12 --out FILE --resume
    python benchmarks/faults.py --overload --bundle BUNDLE --out FILE
    python benchmarks/faults.py --hour --bundle BUNDLE --out FILE

The server of `--overload` is pinned to the first core and the clients to the second, so it needs an
otherwise idle machine; clients send no more than an application that only refuses requests can
handle. `--hour` sends 100 requests a second for an hour, one in ten of which stores an event, and
records the server's resident memory after each minute.
"""

import argparse
import asyncio
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import Any

import numpy as np
from sealed_mutations import Count, mutations, write_film_bundle
from serving import request, start

from foretaste.serving.slot import Trials

Record = dict[str, Any]
SEALED = "sealed_mutations"


def ask(address: str, path: str, body: object = None) -> tuple[int, Any]:
    """Return an answer's status and document, or 0 and None if the connection was lost."""
    data = None if body is None else json.dumps(body).encode()
    asked = urllib.request.Request(
        address.rstrip("/") + path, data, {"content-type": "application/json"}
    )
    try:
        with urllib.request.urlopen(asked, timeout=600) as reply:
            return reply.status, json.loads(reply.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())
    except (OSError, ValueError, HTTPException):  # it ended in the middle of its answer
        return 0, None


@contextmanager
def served(bundle: Path, folder: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    process, address = start(bundle, folder)
    try:
        yield process, address
    finally:
        process.kill()
        process.communicate()


# ---- kill -9 -----------------------------------------------------------------------------


def kill9(rounds: int, folder: Path, before: Record) -> Iterator[Record]:
    """Kill a server that four clients write to; check that the next one has all acknowledged
    events.

    Yield the record after each round; `before` is the record of earlier rounds.
    """
    bundle = write_film_bundle(folder / "films")
    count = {"rounds": 0, "acknowledged": 0, "lost": 0, "doubled": 0} | before
    acknowledged: list[list[str]] = []
    done = count["rounds"]
    for turn in range(done, rounds + 1):
        with served(bundle, folder) as (process, address):
            if turn > done:
                _look_for(address, turn - 1, acknowledged, count)
                yield count
            if turn < rounds:
                acknowledged = _write_until_killed(process, address, turn)


def _write_until_killed(process: subprocess.Popen[str], address: str, turn: int) -> list[list[str]]:
    acknowledged: list[list[str]] = [[] for _ in range(4)]
    writers = [
        threading.Thread(target=_write, args=(address, f"{turn}-{sender}", mine))
        for sender, mine in enumerate(acknowledged)
    ]
    for writer in writers:
        writer.start()
    time.sleep(random.Random(turn).uniform(0.3, 2.0))
    process.kill()
    for writer in writers:
        writer.join()
    return acknowledged


def _look_for(address: str, turn: int, acknowledged: list[list[str]], count: Record) -> None:
    """Send acknowledged events again: all of them must be stored already, each exactly once."""
    for sender, mine in enumerate(acknowledged):
        user = f"{turn}-{sender}"
        for first in range(0, len(mine), 1000):
            again = [event(user, one) for one in mine[first : first + 1000]]
            count["lost"] += ask(address, "/v1/events", again)[1]["stored"]
        _, history = ask(address, f"/v1/users/{user}/history")
        count["acknowledged"] += len(mine)
        # at most one more: stored, and killed before it was acknowledged
        count["doubled"] += max(0, history["total"] - len(mine) - 1)
    count["rounds"] = turn + 1


def event(user: str, event_id: str) -> dict[str, object]:
    return {"user_id": user, "item_id": 101, "event_id": event_id}


def _write(address: str, user: str, acknowledged: list[str]) -> None:
    for number in range(1900):  # a history says how many there are up to 2,000
        status, _ = ask(address, "/v1/events", event(user, f"{user}-{number}"))
        if status == 0:
            return
        if status == 201:
            acknowledged.append(f"{user}-{number}")


# ---- swaps and faults while it answers ---------------------------------------------------


def swaps(number: int, folder: Path) -> dict[str, int]:
    """Swap the model during requests; some of the new bundles are broken."""
    bundle = write_film_bundle(folder / "films")
    counts = {"swaps": 0, "refused": 0, "requests": 0, "failed": 0}
    with served(bundle, folder) as (_, address):
        ended = threading.Event()

        def client() -> None:
            while not ended.is_set():
                status, _ = ask(address, "/v1/recommend", {"user_id": 1, "k": 5})
                counts["requests"] += 1
                counts["failed"] += status != 200

        clients = [threading.Thread(target=client) for _ in range(2)]
        for one in clients:
            one.start()
        for turn in range(number):
            write_film_bundle(bundle, seed=turn + 1)
            if turn % 4 == 3:
                weights = next(bundle.glob("weights*"))
                os.truncate(weights, weights.stat().st_size // 2)
            status, _ = ask(address, "/v1/model/reload", {})
            counts["swaps" if status == 200 else "refused"] += 1
        ended.set()
        for one in clients:
            one.join()
    return counts


# ---- overload ----------------------------------------------------------------------------


class Clients:
    """Sends requests from one thread, and counts the answers with status 200 and their latency."""

    def __init__(self, address: str, users: list[str]) -> None:
        self._host, _, port = address.strip("/").rpartition("/")[2].rpartition(":")
        self._port, self._users = int(port), users
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
        self.good: list[float] = []
        self.answered = 0
        self.events_each = 0
        """One request in this many stores an event; 0: none does."""

    def _request(self, number: int) -> bytes:
        user = self._users[number % len(self._users)]
        if self.events_each and number % self.events_each == 0:
            stored = request(self._host, event(user, f"{time.time()}-{number}"))
            return stored.replace(b"/v1/recommend", b"/v1/events", 1)
        return request(self._host, {"user_id": user, "k": 20})

    async def _ask(self, number: int) -> None:
        begun = time.perf_counter()
        try:
            pair = self._idle.pop() if self._idle else None
            reader, writer = pair or await asyncio.open_connection(self._host, self._port)
            writer.write(self._request(number))
            head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
            size = head.partition("content-length: ")[2].partition("\r\n")[0]
            await reader.readexactly(int(size))
        except (OSError, asyncio.IncompleteReadError):
            return
        self.answered += 1
        if head.startswith("http/1.1 20"):
            self.good.append(time.perf_counter() - begun)
        if "connection: close" in head:
            writer.close()
        else:
            self._idle.append((reader, writer))

    async def open_loop(self, rate: float, seconds: float, late_s: float = float("inf")) -> float:
        """Send requests at a fixed rate, whatever the answers; return the answers per second.

        Requests that are more than `late_s` late, because this process was stopped, are skipped.
        """
        self.good.clear()
        begun, tasks = time.perf_counter(), []
        for number in range(int(rate * seconds)):
            wait_s = begun + number / rate - time.perf_counter()
            if wait_s < -late_s:
                begun -= wait_s
            await asyncio.sleep(max(0.0, wait_s))
            tasks.append(asyncio.create_task(self._ask(number)))
        inside = len(self.good) / (time.perf_counter() - begun)
        await asyncio.wait(tasks, timeout=30)
        return inside

    async def closed_loop(self, clients: int, seconds: float) -> float:
        """Let clients send a new request as soon as they get an answer, 503 or not."""
        self.good.clear()
        begun = time.perf_counter()

        async def one(first: int) -> None:
            number = first
            while time.perf_counter() - begun < seconds:
                await self._ask(number)
                number += clients

        asked = [asyncio.create_task(one(number)) for number in range(clients)]
        await asyncio.sleep(seconds)
        inside = len(self.good) / (time.perf_counter() - begun)
        await asyncio.gather(*asked)
        return inside

    async def capacity(self, seconds: float) -> float:
        """Return the highest rate of good answers to a few clients that wait for each answer."""
        return max([await self.closed_loop(number, seconds / 2) for number in (4, 8)])

    def close(self) -> None:
        """Close the idle connections, which belong to the running loop."""
        for _, writer in self._idle:
            writer.transport.abort()
        self._idle.clear()

    def p99_ms(self) -> float:
        return 1000 * float(np.percentile(self.good, 99)) if self.good else float("nan")


FLOOR = """
import socket, sys, uvicorn
async def refuse(scope, receive, send):
    if scope["type"] == "http":
        headers = [(b"content-length", b"0")]
        await send({"type": "http.response.start", "status": 503, "headers": headers})
        await send({"type": "http.response.body", "body": b""})
listener = socket.create_server(("127.0.0.1", 0), backlog=1000)
print(f"http://127.0.0.1:{listener.getsockname()[1]}/", flush=True)
config = uvicorn.Config(refuse, http="httptools", access_log=False, log_config=None)
uvicorn.Server(config).run(sockets=[listener])
"""


async def refusals_per_s(users: list[str], seconds: float, cores: list[int]) -> float:
    """Return how many requests per second an application can refuse if it does nothing else."""
    words = [sys.executable, "-c", FLOOR]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        os.sched_setaffinity(0, {cores[-1]})  # from here on that of the clients
        try:
            address = process.stdout.readline().strip() if process.stdout else ""
            clients = Clients(address, users)
            await clients.closed_loop(64, seconds)
        finally:
            process.kill()
    return clients.answered / seconds


def overload(bundle: Path, users: list[str], folder: Path, seconds: float) -> dict[str, float]:
    """Send more requests than the server can answer, and count its good answers."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[0]})  # inherited by the server
    process, address = start(bundle, folder)
    try:
        clients = Clients(address, users)

        async def measure() -> dict[str, float]:
            floor = await refusals_per_s(users, seconds, cores)
            await clients.closed_loop(4, 2.0)
            best = await clients.capacity(seconds)
            await clients.open_loop(best / 2, seconds)
            half_ms, before = clients.p99_ms(), resident_mib(process.pid)
            shares, slow_ms = {}, {}
            best = await clients.capacity(seconds)
            for name in ("2x", "5x", "640"):
                if name == "640":
                    good = await clients.closed_loop(640, seconds)
                else:
                    good = await clients.open_loop(min(int(name[0]) * best, floor), seconds)
                slow_ms[name] = clients.p99_ms()
                await asyncio.sleep(1.0)
                # a machine's speed changes with the minute: compare with before and after
                before_it, best = best, await clients.capacity(seconds)
                shares[name] = 2 * good / (before_it + best)
            await clients.open_loop(min(10 * best, floor), seconds / 2)
            await asyncio.sleep(5.0)
            after = await clients.open_loop(best / 2, seconds)
            return {
                "best_per_s": best,
                "floor_refuses_per_s": floor,
                **{f"goodput_share_{name}": share for name, share in shares.items()},
                "half_p99_ms": half_ms,
                **{f"p99_ms_{name}": ms for name, ms in slow_ms.items()},
                "p99_ratio": max(slow_ms.values()) / half_ms,
                "rss_growth_mib": resident_mib(process.pid) - before,
                "after_share": after / (best / 2),
                "after_p99_ms": clients.p99_ms(),
            }

        return {name: round(value, 3) for name, value in asyncio.run(measure()).items()}
    finally:
        process.kill()
        process.communicate()


def hour(bundle: Path, users: list[str], folder: Path, minutes: int) -> Iterator[Record]:
    """Send 100 requests a second and record the server's memory after each minute."""
    with served(bundle, folder) as (process, address):
        clients = Clients(address, users)
        clients.events_each = 10
        sent, failed, resident = 0, 0, [resident_mib(process.pid)]

        async def one_minute() -> None:
            await clients.open_loop(100.0, 60.0, late_s=1.0)
            clients.close()

        for minute in range(minutes):
            asyncio.run(one_minute())
            sent, failed = sent + 6000, failed + 6000 - len(clients.good)
            resident.append(round(resident_mib(process.pid), 2))
            yield {
                "minutes": minute + 1,
                "requests": sent,
                "failed": failed,
                "p99_ms_of_the_last_minute": round(clients.p99_ms(), 2),
                "growth_mib_after_ten_minutes": round(resident[-1] - resident[min(10, minute)], 2),
                "resident_mib": resident,
            }


def resident_mib(pid: int) -> float:
    fields = Path(f"/proc/{pid}/status").read_text().split()
    return int(fields[fields.index("VmRSS:") + 1]) / 1024


# ------------------------------------------------------------------------------------------


def sealed(number: int, seed: int, folder: Path, before: Record) -> Iterator[Record]:
    """Try mutations and print failures, if any; yield the record from time to time."""
    with closing(Trials(timeout_s=600.0, within_s=60.0)) as trials:
        tries = mutations(number, seed=seed, trials=trials, folder=folder, count=Count(**before))
        for count in tries:
            print(count.tried, *count.wrong, sep="\n", file=sys.stderr)
            yield {
                name: value
                for name, value in vars(count).items()
                if name not in ("causes", "wrong")
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mutations", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kill9", type=int, default=0, metavar="ROUNDS")
    parser.add_argument("--swaps", type=int, default=0)
    parser.add_argument("--overload", action="store_true")
    parser.add_argument("--hour", action="store_true")
    parser.add_argument("--minutes", type=int, default=60, help="of --hour")
    parser.add_argument("--bundle", type=Path, help="of --overload and --hour; else a small one")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each load")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--resume", action="store_true", help="go on with rounds and mutations")
    options = parser.parse_args()

    def users_of(folder: Path) -> tuple[Path, list[str]]:
        bundle = options.bundle or write_film_bundle(folder / "films")
        with served(bundle, folder) as (_, address):
            return bundle, ask(address, "/v1/users?limit=200")[1]["users"]

    record = json.loads(options.out.read_text()) if options.out and options.out.exists() else {}
    before = {name: record.get(name, {}) if options.resume else {} for name in ("kill9", SEALED)}
    parts: dict[str, tuple[object, Callable[[Path], Iterable[Record]]]] = {
        SEALED: (
            options.mutations,
            lambda at: sealed(options.mutations, options.seed, at, before[SEALED]),
        ),
        "kill9": (options.kill9, lambda at: kill9(options.kill9, at, before["kill9"])),
        "swap": (options.swaps, lambda at: [swaps(options.swaps, at)]),
        "overload": (
            options.overload,
            lambda at: [overload(*users_of(at), at, options.seconds)],
        ),
        "hour": (options.hour, lambda at: hour(*users_of(at), at, options.minutes)),
    }
    for name, (wanted, measure) in parts.items():
        if not wanted:
            continue
        with tempfile.TemporaryDirectory() as folder:
            for so_far in measure(Path(folder)):
                record[name] = dict(so_far)
                if options.out:
                    options.out.write_text(json.dumps(record, indent=2) + "\n")
        print(name, json.dumps(record.get(name)))


if __name__ == "__main__":
    main()

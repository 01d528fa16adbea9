"""A private PostgreSQL server for tests: started once, deleted at the end."""

import os
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

import pytest


def _binaries() -> Path | None:
    on_path = shutil.which("initdb")
    if on_path:
        return Path(on_path).parent
    installed = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    return installed[-1].parent if installed else None


def _run(program: str, *arguments: str) -> None:
    """Run a program of PostgreSQL as its own user, because it refuses root."""
    as_owner = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
    subprocess.run(
        [*as_owner, str(_binaries() / program), *arguments],
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd="/",
    )


def _start(data: Path) -> None:
    _run("pg_ctl", "-D", str(data), "-w", "-l", str(data.with_name("log")), "start")


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    """The URL of a running server, without a database name."""
    if _binaries() is None:
        pytest.skip("PostgreSQL is not installed here: its half of the tests is left out")
    folder = Path(tempfile.mkdtemp(prefix="foretaste-pg-"))
    if os.geteuid() == 0:  # initdb refuses root
        if shutil.which("runuser") is None:
            pytest.skip("PostgreSQL does not run as root and there is no runuser: left out")
        shutil.chown(folder, "postgres")
    data = folder / "data"
    try:
        _run("initdb", "-D", str(data), "-U", "tester", "--auth=trust", "-E", "UTF8", "--no-sync")
        port = _free_port()  # taken late, so that no other process takes it first
        with (data / "postgresql.conf").open("a") as settings:
            settings.write(f"port = {port}\nlisten_addresses = '127.0.0.1'\n")
            settings.write(f"unix_socket_directories = '{folder}'\n")
        _start(data)
        yield f"postgresql://tester@127.0.0.1:{port}"
        _run("pg_ctl", "-D", str(data), "-w", "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(params=["sqlite", "postgresql"])
def state(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty store of live events, once for each kind of database."""
    if request.param == "sqlite":
        return str(tmp_path / "events.sqlite")
    return str(request.getfixturevalue("postgres_database"))


@pytest.fixture
def postgres_database(postgres_server: str) -> str:
    """An empty database of the running server."""
    psycopg = pytest.importorskip("psycopg")
    name = f"t{uuid4().hex}"
    with psycopg.connect(f"{postgres_server}/postgres", autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    return f"{postgres_server}/{name}"


@contextmanager
def frozen(database: str) -> Iterator[None]:
    """Stop all processes of a PostgreSQL server: it accepts connections and does not answer."""
    first = int((_data_of(database) / "postmaster.pid").read_text().split()[0])
    found = [first, *_children(first)]
    try:
        _send(signal.SIGSTOP, found)
        yield
    finally:
        _send(signal.SIGCONT, found)


@contextmanager
def stopped(database: str) -> Iterator[None]:
    """Kill a PostgreSQL server, as a fault of its machine would, and start it again afterwards."""
    data = _data_of(database)
    _run("pg_ctl", "-D", str(data), "-w", "-m", "immediate", "stop")
    try:
        yield
    finally:
        _start(data)


def _data_of(database: str) -> Path:
    psycopg = pytest.importorskip("psycopg")
    with psycopg.connect(database) as connection:
        return Path(connection.execute("SHOW data_directory").fetchone()[0])


def _send(number: signal.Signals, pids: list[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):  # that of a connection which has just ended
            os.kill(pid, number)


def _children(parent: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            own_parent = int(path.read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError, IndexError):  # it has just ended
            continue
        if own_parent == parent:
            found.append(int(path.parent.name))
    return found

"""Settings of the server, and access tokens: their hashes, roles and request limits.

Tokens are created here, with 256 random bits, and shown once. Only the SHA-256 of a token is
stored, from which the token cannot be recovered.
"""

import hashlib
import ipaddress
import os
import secrets
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Literal, final

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    field_validator,
    model_validator,
)

from foretaste.arguments import checked
from foretaste.config import Config, Count, parse_settings
from foretaste.errors import ConfigError


class ServerSettings(Config):
    """The server's address, its store of live events, and its limits."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 for every interface, which needs a token."""
    port: NonNegativeInt = Field(default=8000, le=65535)
    """Port to listen on; 0 picks a free one. The address is printed."""
    state: str = "beside"
    """Where live events are kept: `beside` is an SQLite file next to the bundle; or the path of an
    SQLite file, or a database URL such as postgresql://user:password@host/name."""
    versions: Path | None = None
    """Folder of stored versions, which are private copies of the bundle. By default, a folder next
    to the bundle. Servers of one bundle on one machine share it."""
    keep_versions: Count = 5
    """Maximum number of stored versions; the least recently used one is deleted first."""
    keep_versions_bytes: Count | None = None
    """Maximum total size of stored versions in bytes; none: no limit. Active versions are never
    deleted."""
    signature_key: Path | None = None
    """A file with the key that every bundle must be signed with (see `foretaste sign`); none: no
    signature is required."""
    load_timeout_s: PositiveFloat = 300.0
    """Seconds that a new version may take to load and to answer its stored queries; a slower
    version is refused."""
    answer_timeout_s: PositiveFloat = 2.0
    """Seconds of processor time that a new version may take for one answer; a slower version is
    refused."""
    store_timeout_s: PositiveFloat = 1.0
    """Seconds to wait for a lock, a statement or a connection of the database, before 503."""
    keep_events_days: Count | None = None
    """Live events older than this many days are deleted, once an hour; none: they are not
    deleted."""
    follow_s: PositiveFloat = 2.0
    """Seconds between two checks of the version that the servers on one database have agreed on."""
    token: str | None = Field(default=None, repr=False)
    """If given, every request for data must have this token, or one of `token_file`, as
    `Authorization: Bearer TOKEN`. It has all roles. Health, readiness and the page's own files need
    no token."""
    token_file: Path | None = None
    """A TOML file of token hashes with roles and request limits; see `foretaste token`."""
    allow_anyone: bool = False
    """Whether a server that other machines can reach may run without tokens."""
    hosts: tuple[str, ...] = ()
    """Names by which requests may call the server (their Host header, without the port). Empty:
    only names of this machine, if only it can reach the server; else any name."""
    max_body_bytes: Count = 1_048_576
    """Maximum size of a request body in bytes; a larger one is refused with 413."""
    max_k: Count = 1000
    """Maximum length of a list."""
    max_history: Count = 2000
    """Maximum length of a history in a request, and maximum number of newest live events that are
    used."""
    max_events: Count = 1000
    """Maximum number of events in one request."""
    max_concurrency: Count = 64
    """Maximum number of requests in progress or waiting; the next one is answered with 503 and
    Retry-After."""
    max_wait_s: PositiveFloat = 0.02
    """Maximum expected waiting time of a request for a list, in seconds. If more than 16 are in
    progress, one that would wait longer is answered with 503. While requests come much faster than
    they can be answered, there is room for few more lists than threads, the fewer the
    faster they come."""
    num_threads: Count | None = Field(default=None, le=1024)
    """Number of threads that compute answers; torch uses one core in each. By default, one more
    than the cores that the process may use, at most 4. Calls to the store have other threads."""
    body_timeout_s: PositiveFloat = 20.0
    """Seconds that a client may take to send its body; then it is answered with 408."""
    max_bodies_bytes: Count = 67_108_864
    """Maximum total size of all bodies in transfer, in bytes; the next request is answered with
    503."""
    max_url_bytes: Count = 8_192
    """Longest path with its query; a longer one is refused with 414."""
    max_header_bytes: Count = 32_768
    """Maximum total size of a request's headers in bytes, with 32 bytes added for each; larger ones
    are refused with 431."""
    header_timeout_s: PositiveFloat = 10.0
    """Seconds within which the head of a request must arrive; then it is answered with 408. A
    connection that sends nothing is closed."""
    keep_alive_s: Count = 75
    """Seconds that an idle connection is kept open between two requests."""
    write_timeout_s: PositiveFloat = 20.0
    """Seconds that a client may leave an answer unread before its connection is closed."""
    max_connections: Count = 1_000
    """Maximum number of connections at one time, limited to 64 fewer than the files that the
    process may still open; the next one is answered with 503."""
    max_connections_per_address: Count = 750
    """Maximum number of connections from one address; behind a proxy, all connections have the same
    address."""
    refusals_logged_per_minute: Count = 600
    """Maximum number of log lines per minute about refused requests (401, 403, 408, 413, 415, 421,
    429, and 503 for lack of room); the next logged line has the number of omitted ones."""
    unready_s: NonNegativeFloat = 2.0
    """Seconds after SIGTERM during which `/ready` answers 503 and all other requests are still
    answered, so that a proxy stops sending them before the server stops listening; a second signal
    ends this time."""
    drain_s: Count = 30
    """Seconds that requests in progress and the process may take to end after that."""

    @property
    def threads(self) -> int:
        """Number of threads that compute answers."""
        cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 4
        return self.num_threads or min(4, cores + 1)

    @field_validator("token")
    @classmethod
    def _not_empty(cls, token: str | None) -> str | None:
        if token is not None and not token.strip():
            raise ValueError("is empty: set a secret, or omit the token to serve without one")
        return token


Role = Literal["read", "write", "admin"]
"""read: answers, the catalogue, histories, the model, metrics. write: storing and deleting live
events. admin: everything, including switching the model."""
_READERS = frozenset({"GET", "HEAD", "OPTIONS"})


class TokenConfig(Config):
    """A token, given by its hash."""

    name: str = Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")
    """Letters, digits, dots, dashes and underscores; the log shows it."""
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$", repr=False)
    """The token's SHA-256, in hexadecimal."""
    roles: tuple[Role, ...] = Field(default=("read",), min_length=1)
    """The roles of the token."""
    requests_per_minute: Count | None = None
    """Maximum number of requests per minute, which may all come at once; None: no limit."""


class TokensConfig(Config):
    """A file of tokens."""

    tokens: tuple[TokenConfig, ...] = ()
    """The tokens, each with its name, hash, roles and limit."""

    @model_validator(mode="after")
    def _each_once(self) -> "TokensConfig":
        for name in ("name", "sha256"):
            values = [getattr(token, name) for token in self.tokens]
            if len(set(values)) < len(values):
                raise ValueError(f"two tokens have the same {name}: remove one of them")
        return self


def needed_role(method: str, path: str) -> Role:
    """Return the role that a request needs; admin for unknown routes."""
    if method in _READERS or path == "/v1/recommend":
        return "read"
    if path == "/v1/events" or (method == "DELETE" and path.endswith("/events")):
        return "write"
    return "admin"


@final
class Bucket:
    """A rate limit per minute: a token bucket that is full at the start."""

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._most, self._clock = per_minute, clock
        self._left, self._counted_at = float(per_minute), clock()

    def wait_s(self) -> float:
        """Take one request and return 0, or return the seconds until the next is allowed."""
        now, most = self._clock(), self._most
        self._left = min(float(most), self._left + (now - self._counted_at) * most / 60)
        self._counted_at = now
        if self._left < 1:
            return (1 - self._left) * 60 / most
        self._left -= 1
        return 0.0


@final
class Token:
    """A token in use: its roles, and its remaining requests."""

    def __init__(self, config: TokenConfig, clock: Callable[[], float]) -> None:
        self.name = config.name
        self._roles, bound = frozenset(config.roles), config.requests_per_minute
        self._bucket = None if bound is None else Bucket(bound, clock)

    def may(self, role: Role) -> bool:
        """Return whether it has a role."""
        return role in self._roles or "admin" in self._roles

    def wait_s(self) -> float:
        """Count one request; return 0, or the seconds until it is allowed."""
        return 0.0 if self._bucket is None else self._bucket.wait_s()


@final
class Access:
    """The tokens of a server; without tokens, everything is allowed."""

    def __init__(
        self, tokens: Iterable[TokenConfig], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._by_hash = {token.sha256: Token(token, clock) for token in tokens}

    @property
    def is_open(self) -> bool:
        """Whether no token is required."""
        return not self._by_hash

    def find(self, given: bytes) -> Token | None:
        """Return the token of a request, None if it is not one of the server's."""
        return self._by_hash.get(hashlib.sha256(given).hexdigest())


def access_of(settings: ServerSettings) -> Access:
    """Return the tokens in a server's settings.

    Raises:
        ConfigError: The file of tokens cannot be read or is invalid, or other machines can reach
            the server although no token is required.
    """
    tokens: list[TokenConfig] = []
    if settings.token is not None:
        digest = hashlib.sha256(settings.token.encode()).hexdigest()
        tokens.append(TokenConfig(name="token", sha256=digest, roles=("admin",)))
    if settings.token_file is not None:
        found = read_tokens(settings.token_file).tokens
        if not found:
            raise ConfigError(
                f"{settings.token_file} has no token: create one with `foretaste token`",
                name="token_file",
                value=settings.token_file,
            )
        tokens.extend(found)
    access = Access(tokens)
    if access.is_open and not (settings.allow_anyone or is_loopback(settings.host)):
        raise ConfigError(
            f"{settings.host} is open to other machines without a token: set `token` or "
            "`token_file`, listen on 127.0.0.1, or set `allow_anyone = true` if others may read, "
            "write and reload",
            name="token",
        )
    return access


def allowed_hosts(settings: ServerSettings) -> frozenset[str]:
    """Return the names that a server answers by; none: any."""
    if settings.hosts or not is_loopback(settings.host):
        return frozenset(host.lower() for host in settings.hosts)
    own = f"[{settings.host}]" if ":" in settings.host else settings.host
    return frozenset({"localhost", "127.0.0.1", "[::1]", own})


def is_loopback(host: str) -> bool:
    """Return whether an address is reachable from this machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def read_tokens(path: Path) -> TokensConfig:
    """Read a file of tokens.

    Raises:
        ConfigError: The file cannot be read, is not TOML, or has an invalid token.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(
            f"{path} cannot be read as a file of tokens: {reason}; create one with `foretaste "
            "token`",
            name="token_file",
            value=path,
        ) from error
    return parse_settings(TokensConfig, values, source=str(path))


@checked
def add_token(
    path: Path | str,
    name: str,
    *,
    roles: Sequence[str] = ("read",),
    requests_per_minute: int | None = None,
) -> str:
    """Create a token, add its hash to a file that only its owner may read, and return the token.

    Args:
        path: The file, which is created if it does not exist.
        name: Name of the token in the log.
        roles: The roles of the token.
        requests_per_minute: The token's limit; None: no limit.

    Raises:
        ConfigError: The file cannot be read or written, or the name is invalid or in use.
    """
    path = Path(path)
    known = read_tokens(path).tokens if path.exists() else ()
    token = secrets.token_urlsafe(32)
    values = {
        "name": name,
        "sha256": hashlib.sha256(token.encode()).hexdigest(),
        "roles": tuple(roles),
        "requests_per_minute": requests_per_minute,
    }
    made = parse_settings(TokenConfig, values, source="the token")
    if made.name in [one.name for one in known]:
        raise ConfigError(
            f"{path} has a token named {name}: choose another name", name="name", value=name
        )
    lines = [f'name = "{made.name}"', f'sha256 = "{made.sha256}"', f"roles = {list(made.roles)}"]
    if made.requests_per_minute is not None:
        lines.append(f"requests_per_minute = {made.requests_per_minute}")
    try:
        text = path.read_text(encoding="utf-8") + "\n" if path.exists() else ""
        _replace(path, text + "[[tokens]]\n" + "\n".join(lines) + "\n")
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written: {error.strerror}; choose another path",
            name="path",
            value=path,
        ) from error
    return token


def _replace(path: Path, text: str) -> None:
    """Write a file atomically, without permissions for other users."""
    handle, name = tempfile.mkstemp(dir=path.absolute().parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise

"""What a person chooses about the server."""

from pathlib import Path

from pydantic import Field, NonNegativeInt, PositiveFloat, field_validator

from foretaste.config import Config, Count


class ServerSettings(Config):
    """Where the server listens, where live events live, and what it refuses."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 for every interface, which needs a token."""
    port: NonNegativeInt = Field(default=8000, le=65535)
    """0 takes any free port; the address is printed."""
    state: str = "beside"
    """Where live events are kept: `beside` is an SQLite file next to the bundle; or the path of an
    SQLite file, or a database URL such as postgresql://user:password@host/name."""
    store_timeout_s: PositiveFloat = 1.0
    """Seconds to wait for a lock, a statement or a connection of the database, before 503."""
    token: str | None = Field(default=None, repr=False)
    """If given, every request for data must carry it, or one of `token_file`, as `Authorization:
    Bearer TOKEN`; it may do everything. Health, readiness and the page's own files are open."""
    token_file: Path | None = None
    """A TOML file of tokens, each by its hash, with roles and a bound on its requests, as
    `foretaste token` writes it."""
    allow_anyone: bool = False
    """Whether a server that other machines can reach may do without tokens."""
    hosts: tuple[str, ...] = ()
    """The names that requests may call the server by (their Host header, without the port). None
    given: names of this machine alone where only it can reach the server, else any."""
    max_body_bytes: Count = 1_048_576
    """A larger request body is refused with 413."""
    max_k: Count = 1000
    """The longest list that may be asked for."""
    max_history: Count = 2000
    """The longest history in a request; of live events, the newest this many are used."""
    max_events: Count = 1000
    """The most events in one request."""
    max_concurrency: Count = 64
    """Requests at work or waiting at one time; the next is answered 503 with Retry-After."""
    num_threads: Count = Field(default=4, le=1024)
    """Threads that compute answers; torch uses one core in each."""
    body_timeout_s: PositiveFloat = 20.0
    """Seconds a client may take to send its body, before 408."""
    max_bodies_bytes: Count = 67_108_864
    """Of all bodies that are on their way; the next is answered 503."""
    max_url_bytes: Count = 8_192
    """A longer path with its query is refused with 414."""
    max_header_bytes: Count = 32_768
    """Of all headers of a request, each counted with 32 bytes beside its own; 431 beyond."""
    header_timeout_s: PositiveFloat = 10.0
    """Seconds until the head of a request must have come, before 408; a connection that sends
    nothing is closed."""
    keep_alive_s: Count = 75
    """Seconds that a connection is kept between two requests."""
    write_timeout_s: PositiveFloat = 20.0
    """Seconds that a client may leave an answer unread before its connection is cut off."""
    max_connections: Count = 1_000
    """At one time, and no more than the files that the process may open, less 64; the next is
    answered 503."""
    max_connections_per_address: Count = 500
    """Of them; behind a proxy all come from one address."""
    refusals_logged_per_minute: Count = 600
    """So many lines of the log are of requests refused at the door (401, 403, 408, 413, 421, 429,
    503 without room); the next line that is logged says how many were left out."""
    drain_s: Count = 30
    """Seconds that requests at work may take to end after SIGTERM."""

    @field_validator("token")
    @classmethod
    def _not_empty(cls, token: str | None) -> str | None:
        if token is not None and not token.strip():
            raise ValueError("is empty: give the secret, or leave it out to serve without one")
        return token

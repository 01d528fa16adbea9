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
    drain_s: Count = 30
    """Seconds that requests at work may take to end after SIGTERM."""

    @field_validator("token")
    @classmethod
    def _not_empty(cls, token: str | None) -> str | None:
        if token is not None and not token.strip():
            raise ValueError("is empty: give the secret, or leave it out to serve without one")
        return token

"""What a person chooses about the server."""

from pathlib import Path

from pydantic import Field, NonNegativeInt, PositiveFloat, field_validator

from foretaste.config import Config, Count


class ServerSettings(Config):
    """Where the server listens, where it keeps live events, and what it refuses."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 for every interface, which needs a token."""
    port: NonNegativeInt = Field(default=8000, le=65535)
    """Port to listen on; 0 picks a free one. The address is printed."""
    state: str = "beside"
    """Where live events are kept: `beside` is an SQLite file next to the bundle; or the path of an
    SQLite file, or a database URL such as postgresql://user:password@host/name."""
    versions: Path | None = None
    """Folder of the versions that are kept, private copies of the bundle; none given: one beside
    it. Servers of one bundle on one machine share it."""
    keep_versions: Count = 5
    """So many versions are kept; the one used longest ago goes first."""
    keep_versions_bytes: Count | None = None
    """And so many bytes of them; none: no bound. Versions that serve stay."""
    signature_key: Path | None = None
    """A file with the key that every bundle must be signed with, as `foretaste sign` does it; none:
    no signature is asked for."""
    load_timeout_s: PositiveFloat = 300.0
    """Seconds that a new version may take to load and to answer its stored questions, before it is
    refused."""
    answer_timeout_s: PositiveFloat = 2.0
    """Seconds that a new version may take for one answer, before it is refused."""
    store_timeout_s: PositiveFloat = 1.0
    """Seconds to wait for a lock, a statement or a connection of the database, before 503."""
    keep_events_days: Count | None = None
    """Live events older than so many days are deleted, once an hour; none: they are kept."""
    follow_s: PositiveFloat = 2.0
    """Seconds between two looks at which version the servers on one database have agreed on."""
    token: str | None = Field(default=None, repr=False)
    """If given, every request for data must carry it, or one of `token_file`, as `Authorization:
    Bearer TOKEN`; it has all roles. Health, readiness and the page's own files are open."""
    token_file: Path | None = None
    """A TOML file of tokens, each by its hash, with roles and a limit on requests, as `foretaste
    token` writes it."""
    allow_anyone: bool = False
    """Whether a server that other machines can reach may run without tokens."""
    hosts: tuple[str, ...] = ()
    """Names by which requests may call the server (their Host header, without the port). Empty:
    only names of this machine, if only it can reach the server; else any name."""
    max_body_bytes: Count = 1_048_576
    """Largest request body; a larger one is refused with 413."""
    max_k: Count = 1000
    """Longest list that a request may ask for."""
    max_history: Count = 2000
    """Longest history in a request. Of live events, this many of the newest are used."""
    max_events: Count = 1000
    """Most events in one request."""
    max_concurrency: Count = 64
    """Most requests in progress or waiting; the next is answered 503 with Retry-After."""
    num_threads: Count = Field(default=4, le=1024)
    """Threads that compute answers; torch uses one core in each."""
    body_timeout_s: PositiveFloat = 20.0
    """Seconds a client may take to send its body, before 408."""
    max_bodies_bytes: Count = 67_108_864
    """Most bytes of all bodies in transfer; the next request is answered 503."""
    max_url_bytes: Count = 8_192
    """Longest path with its query; a longer one is refused with 414."""
    max_header_bytes: Count = 32_768
    """Largest sum of a request's headers, each with 32 bytes added; a larger one is refused with
    431."""
    header_timeout_s: PositiveFloat = 10.0
    """Seconds in which the head of a request must arrive, before 408; a connection that sends
    nothing is closed."""
    keep_alive_s: Count = 75
    """Seconds that a connection is kept between two requests."""
    write_timeout_s: PositiveFloat = 20.0
    """Seconds that a client may leave an answer unread before its connection is closed."""
    max_connections: Count = 1_000
    """Most connections at one time, and at most 64 fewer than the files that the process may open;
    the next is answered 503."""
    max_connections_per_address: Count = 500
    """Most connections from one address; behind a proxy all come from one."""
    refusals_logged_per_minute: Count = 600
    """Most lines of the log in a minute about refused requests (401, 403, 408, 413, 421, 429, 503
    without room); the next logged line counts those left out."""
    drain_s: Count = 30
    """Seconds that requests in progress may take to end after SIGTERM."""

    @field_validator("token")
    @classmethod
    def _not_empty(cls, token: str | None) -> str | None:
        if token is not None and not token.strip():
            raise ValueError("is empty: give the secret, or leave it out to serve without one")
        return token

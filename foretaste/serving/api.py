"""The HTTP API: the routes, which parse, call the service and answer; and the files of the page."""

import asyncio
import hashlib
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from importlib import resources
from typing import Annotated, TypeVar, final

import anyio.to_thread
from fastapi import Body, Depends, FastAPI, Path, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Discriminator, Field, RootModel, Tag
from pydantic_core import ErrorDetails
from sqlalchemy.exc import SQLAlchemyError
from starlette.convertors import Convertor, register_url_convertor
from starlette.exceptions import HTTPException
from starlette.middleware.gzip import GZipMiddleware

from foretaste.config import findings
from foretaste.errors import DataError, ForetasteError, did_you_mean
from foretaste.serving.connection import SLOWED_S
from foretaste.serving.guard import Guard, refuse
from foretaste.serving.messages import (
    CanaryRequest,
    ColumnsReply,
    ErrorReply,
    EventRequest,
    EventsReply,
    ForgetReply,
    HealthReply,
    HistoryReply,
    ItemsReply,
    ModelReply,
    ModelsReply,
    PathId,
    RecommendReply,
    RecommendRequest,
    ReloadReply,
    SimilarReply,
    UsersReply,
)
from foretaste.serving.metrics import BURST, NO_ROOM, NO_ROOM_SENTENCE, Admission
from foretaste.serving.service import Service, Stored
from foretaste.serving.settings import Access, Bucket, ServerSettings
from foretaste.serving.state import cause_of

T = TypeVar("T")
STORE_THREADS = 8
"""Maximum number of reads, and of writes, that wait for the store at one time."""
COSTLY = 200
"""A list of more rows than this is costly; every fourth id in the request counts as a row."""
READ_PROBLEMS = 100
"""Number of errors of a request that are read at most: a body of 1 MB may have 800,000."""
COMPRESSED_BYTES = 1_000
"""Shorter answers are not compressed, whatever a client accepts."""


class _Anything(Convertor[str]):
    """An id in a path, which may contain slashes and line ends."""

    regex = r"(?s:.*)"

    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


register_url_convertor("id", _Anything())
OneOrMany = Annotated[
    Annotated[EventRequest, Tag("one")]
    | Annotated[list[EventRequest], Field(fail_fast=True), Tag("many")],
    Discriminator(lambda body: "many" if isinstance(body, list) else "one"),
    Body(),
]
UserId = Annotated[PathId, Path(description="A user's id.")]
ItemId = Annotated[PathId, Path(description="An item's id.")]
AnyId = Annotated[PathId, Query(description="A user's id.")]
Version = Annotated[str, Path(pattern="^[0-9a-f]{12}$", description="A stored version.")]
Length = Annotated[int, Query(description="Length of the list, from 1.")]
Limit = Annotated[int, Query(ge=1, le=200, description="Maximum number of entries in the answer.")]
Words = Annotated[
    str, Query(max_length=200, description="Words of a title, or the start of an id.")
]


def create_app(
    service: Service,
    *,
    settings: ServerSettings,
    access: Access,
    admission: Admission,
) -> FastAPI:
    """Create the application with its routes, its page and its guard.

    Args:
        service: The service that answers.
        settings: The server's settings, with its limits.
        access: The tokens, as `access_of` reads them from the settings.
        admission: Decides whether there is room for a request, and counts requests.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        anyio.to_thread.current_default_thread_limiter().total_tokens = settings.threads
        asyncio.get_running_loop().set_exception_handler(_fault_log(settings, admission.write_log))
        yield

    app = FastAPI(
        title="foretaste",
        description="Recommendations over HTTP. All ids are the caller's own.",
        version="1",
        lifespan=lifespan,
        redirect_slashes=False,  # a redirect would use the Host header of the request
        docs_url=None,
        redoc_url=None,
        dependencies=[Depends(_known_parameters)],
        responses={
            status: {"model": ErrorReply, "description": meaning}
            for status, meaning in {
                401: "The token is missing or wrong",
                403: "The token may not do this, or a page of another site sent the request",
                415: "The body is compressed",
                421: "The server does not serve this host name",
                422: "The request is invalid; `error` says why",
                429: "The token has used up its requests: try again after Retry-After seconds",
                503: "No room: try again after Retry-After seconds",
            }.items()
        },
    )
    app.add_middleware(GZipMiddleware, minimum_size=COMPRESSED_BYTES, compresslevel=4)
    app.add_middleware(  # outermost, so that it also handles errors of the routes
        Guard,
        settings=settings,
        access=access,
        admission=admission,
        open_files=FILES,
    )
    _add_errors(app)
    read, write, switch = _Elsewhere(STORE_THREADS), _Elsewhere(STORE_THREADS), _Elsewhere(1)
    look_up = _Elsewhere(max(1, settings.threads // 2))
    _add_answers(app, service, _Lists(service, admission, read))
    _add_catalogue(app, service, look_up)
    _add_people(app, service, read, write)
    _add_models(app, service, switch)
    _add_operations(app, service, read, admission)
    add_page(app)
    return app


class _Elsewhere:
    """Threads for calls that may wait, so that they do not occupy those that compute answers."""

    def __init__(self, number: int) -> None:
        self._limiter = anyio.CapacityLimiter(number)

    async def __call__(self, call: Callable[[], T]) -> T:
        return await anyio.to_thread.run_sync(call, limiter=self._limiter)


@final
class _Lists:
    """Computes lists in threads, of which costly lists and a store that hangs leave some free."""

    def __init__(self, service: Service, admission: Admission, read: _Elsewhere) -> None:
        self._service, self._admission, self._read = service, admission, read

    async def recommend(self, asked: RecommendRequest, request: Request) -> Response:
        stored: Stored | None = None
        if asked.user_id is not None and not self._service.events.is_sqlite:
            with self._admission.set_aside(request.state.place):
                stored = await self._read(lambda: self._service.stored(asked))

        def answer() -> Response:
            reply = self._service.recommend(asked, stored)
            request.state.log |= {"user_known": reply.user_known, "source": reply.source}
            return _sent(reply)

        given = (asked.history, asked.allow, asked.deny, asked.new_items)
        return await self.compute(
            answer, request, asked.k + sum(len(ids or ()) for ids in given) // 4
        )

    async def compute(
        self, answer: Callable[[], Response], request: Request, rows: int
    ) -> Response:
        if rows <= COSTLY:
            return await anyio.to_thread.run_sync(answer)
        if self._admission.costly > BURST:
            with self._admission.set_aside(request.state.place):
                await anyio.sleep(SLOWED_S)  # as other requests without room
            self._admission.metrics.shed.inc()
            request.state.log["cause"] = NO_ROOM
            raise HTTPException(503, NO_ROOM_SENTENCE, {"retry-after": "1"})
        async with self._admission.turn(request.state.place):
            return await anyio.to_thread.run_sync(answer)


def _add_answers(app: FastAPI, service: Service, lists: _Lists) -> None:
    @app.post("/v1/recommend", tags=["answers"], response_model=RecommendReply)
    async def recommend(asked: RecommendRequest, request: Request) -> Response:
        """Recommend for a user, for a history, or for a new user."""
        return await lists.recommend(asked, request)

    @app.get(
        "/v1/users/{user_id:id}/recommendations",
        tags=["answers"],
        response_model=RecommendReply,
    )
    async def recommend_for_user(
        user_id: UserId, request: Request, k: Length = 10, *, explain: bool = False
    ) -> Response:
        """Recommend for a user id, with the user's live events."""
        asked = RecommendRequest.model_construct(user_id=user_id, k=k, explain=explain)
        return await lists.recommend(asked, request)

    @app.get("/v1/items/{item_id:id}/similar", tags=["answers"], response_model=SimilarReply)
    async def similar(item_id: ItemId, request: Request, k: Length = 10) -> Response:
        """Items similar to this one; none, with a note, if the model does not know the item."""
        return await lists.compute(lambda: _sent(service.similar(item_id, k=k)), request, k)


def _add_catalogue(app: FastAPI, service: Service, look_up: _Elsewhere) -> None:
    @app.get("/v1/items", tags=["catalogue"], response_model=ItemsReply)
    async def find_items(query: Words = "", limit: Limit = 20) -> Response:
        """Search items by words of their titles, the most popular first."""
        return await look_up(lambda: _sent(service.find_items(query, limit=limit)))

    @app.get("/v1/columns", tags=["catalogue"], response_model=ColumnsReply)
    async def columns() -> Response:
        """Columns of the item table that rules may name, and their values."""
        return await look_up(lambda: _sent(service.columns()))

    @app.get("/v1/users", tags=["catalogue"], response_model=UsersReply)
    async def find_users(prefix: Words = "", limit: Limit = 20) -> Response:
        """Users of the training data, by the beginning of their id."""
        return await look_up(lambda: _sent(service.find_users(prefix, limit=limit)))


def _add_people(app: FastAPI, service: Service, read: _Elsewhere, write: _Elsewhere) -> None:
    @app.get("/v1/users/{user_id:id}/history", tags=["catalogue"])
    async def history(user_id: UserId, limit: Limit = 50) -> HistoryReply:
        """A user's events, in training and since, newest first."""
        return await read(lambda: service.history(user_id, limit=limit))

    @app.post(
        "/v1/events", status_code=201, tags=["events"], responses={409: {"model": ErrorReply}}
    )
    async def add_events(asked: OneOrMany, request: Request) -> EventsReply:
        """Store an event or a list of events. They are on disk before the reply, and count in the
        next answer.
        """
        events = asked if isinstance(asked, list) else [asked]
        reply = await write(lambda: service.add_events(events))
        request.state.log |= {"events": len(events), "user_known": not reply.unknown_users}
        return reply

    @app.delete("/v1/users/{user_id:id}/events", tags=["events"])
    async def forget(user_id: UserId) -> ForgetReply:
        """Delete a user's live events."""
        return await write(lambda: service.forget(user_id))

    @app.delete("/v1/events", tags=["events"])
    async def forget_any(user_id: AnyId) -> ForgetReply:
        """Delete a user's live events, also for the ids `.` and `..`, which a path cannot
        contain.
        """
        return await write(lambda: service.forget(user_id))


def _add_models(app: FastAPI, service: Service, switch: _Elsewhere) -> None:
    """Add the routes that switch the model; a refusal is answered with 409, and the old model stays
    active.
    """
    post = partial(app.post, tags=["model"], responses={409: {"model": ErrorReply}})

    @app.get("/v1/models", tags=["model"])
    def models() -> ModelsReply:
        """The stored versions, and which of them are active."""
        return service.models()

    @post("/v1/model/reload")
    async def reload() -> ReloadReply:
        """Read the bundle's folder again; a damaged version is refused, and the old one stays
        active.
        """
        with _refusals():
            return await switch(service.reload)

    @post("/v1/model/roll-back")
    async def roll_back() -> ReloadReply:
        """Activate the previous version again."""
        with _refusals():
            return await switch(lambda: service.activate(""))

    @post("/v1/models/{version}/activate")
    async def activate(version: Version) -> ReloadReply:
        """Activate a stored version."""
        with _refusals():
            return await switch(lambda: service.activate(version))

    @post("/v1/models/{version}/canary")
    async def try_out(version: Version, asked: CanaryRequest) -> ModelsReply:
        """Let a stored version answer a share of the users, 0 for none; it has metrics of its
        own.
        """
        with _refusals():
            return await switch(lambda: service.try_out(version, asked.share))


@contextmanager
def _refusals() -> Iterator[None]:
    try:
        yield
    except ForetasteError as error:
        raise HTTPException(409, f"the old version stays active: {error}") from error


def _add_operations(app: FastAPI, service: Service, read: _Elsewhere, admission: Admission) -> None:
    @app.get("/v1/model", tags=["model"])
    def model() -> ModelReply:
        """The active model: its manifest and its report."""
        return service.model()

    @app.get("/health", tags=["operations"])
    async def health() -> HealthReply:
        """Whether the process runs."""
        return HealthReply(status="ok")

    @app.get("/ready", tags=["operations"])
    async def ready(request: Request) -> HealthReply:
        """Whether a model answers. It may answer while the store of live events does not; see the
        body.
        """
        if admission.leaving:
            raise HTTPException(503, "the server is about to stop: ask another one")
        if cause := await read(service.ready):
            request.state.log["cause"] = cause
        return HealthReply(status="ready", store="does not answer" if cause else "answers")

    @app.get("/metrics", tags=["operations"], response_class=Response)
    async def prometheus() -> Response:
        """Counters in Prometheus' text format."""
        return Response(service.metrics.exposition(), media_type=service.metrics.content_type)


async def _known_parameters(request: Request) -> None:
    """Reject query parameters that a route does not have, instead of ignoring them."""
    if not request.url.path.startswith("/v1/"):
        return
    known = [parameter.alias for parameter in request.scope["route"].dependant.query_params]
    for name in request.query_params:
        if name not in known:
            there_are = f"; there are {', '.join(known)}" if known else "; this route has none"
            raise HTTPException(
                422,
                f"{name}: there is no such query parameter{did_you_mean(name, known) or there_are}",
            )


def _fault_log(
    settings: ServerSettings, write_log: Callable[[str], object]
) -> Callable[[asyncio.AbstractEventLoop, dict[str, object]], None]:
    """Return a handler that logs errors outside of requests, such as a lack of file descriptors.

    It writes one line per error, up to a limit per minute; the event loop's own handler could write
    thousands per second.
    """
    lines = Bucket(min(60, settings.refusals_logged_per_minute))

    def write(_: asyncio.AbstractEventLoop, fault: dict[str, object]) -> None:
        if not lines.wait_s():
            cause = f"{fault['message']}: {fault.get('exception')!r}"
            write_log(json.dumps({"time": time.time(), "event": "fault", "cause": cause}) + "\n")

    return write


def _sent(reply: BaseModel) -> Response:
    """Return a reply as JSON, serialised in the current thread.

    Otherwise FastAPI would validate it again, in another thread.
    """
    return Response(reply.model_dump_json(), media_type="application/json")


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(RequestValidationError)
    async def wrong_request(_: Request, error: RequestValidationError) -> Response:
        return refuse(422, _sentence(error))

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> Response:
        sentence = str(error.detail)
        if sentence in ("Not Found", "Method Not Allowed"):  # an error of the framework
            sentence = f"there is no {request.method} {request.url.path}: /docs lists the routes"
        return refuse(error.status_code, sentence, error.headers)

    @app.exception_handler(DataError)
    async def wrong_data(_: Request, error: DataError) -> Response:
        return refuse(_STATUS.get(error.name or "", 422), str(error))

    @app.exception_handler(SQLAlchemyError)
    async def no_events(request: Request, error: SQLAlchemyError) -> Response:
        request.state.log["cause"] = cause_of(error)
        sentence = (
            "the store of live events does not answer: send the request again; events with an "
            "event_id are stored only once"
        )
        return refuse(503, sentence, {"retry-after": "5"})


_STATUS = {"item_id": 404, "event_id": 409}
"""Status codes of errors that name the item of a path, or an event stored with other content."""
_BODIES: dict[object, type[BaseModel]] = {
    "one": EventRequest,
    "many": RootModel[list[EventRequest]],
}
"""The type that a body of `OneOrMany` is validated as, by its tag."""
_AS_JSON = (
    ("no such setting", "no such field"),
    ("a section of names and values", "a JSON object"),
    ("a section of settings", "a JSON object"),
    (", not None", ", not null"),
    (", not True", ", not true"),
    (", not False", ", not false"),
)
"""Replaces words for settings by words for requests."""
_SEND_JSON = "send a JSON object, with the header Content-Type: application/json"


def _sentence(error: RequestValidationError) -> str:
    """Describe what is wrong with a request, in the terms of the request."""
    problems: list[ErrorDetails] = [*error.errors()[:READ_PROBLEMS]]
    place, *path = problems[0]["loc"]
    if problems[0]["type"] == "json_invalid":
        return f"the body is not JSON: see character {path[-1]}"
    if problems[0]["type"] == "missing" and not path:
        return f"the body is empty: {_SEND_JSON}"
    tag = path[0] if path and path[0] in _BODIES else None
    for problem in problems:
        problem["loc"] = problem["loc"][1 if tag is None else 2 :]
    if not problems[0]["loc"]:
        return _SEND_JSON
    kind = RecommendRequest if tag is None else _BODIES[tag]
    parts = {problem["loc"][0]: problem["input"] for problem in problems}
    found = findings(problems, kind, error.body if place == "body" else parts)
    said = "; ".join(f"{name}: {sentence}" for name, sentence, _ in found[:3])
    for words, ours in _AS_JSON:
        said = said.replace(words, ours)
    return said if len(said) <= 2_000 else f"{said[:2_000]}…"  # a name in it may be of a megabyte


_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_NAMES = {"/": "index.html", "/docs": "docs.html", "/favicon.ico": "icon.svg"}


def _paths() -> dict[str, str]:
    folder = resources.files("foretaste.serving") / "web"
    names = sorted(file.name for file in folder.iterdir() if file.name[0] not in "._")
    return _NAMES | {f"/web/{name}": name for name in names}


FILES = frozenset(_paths())
"""The paths of the page; they contain no data, so they need no token."""


def add_page(app: FastAPI) -> None:
    """Serve each file at its path, with an entity tag, so that browsers can reuse their copy."""
    folder = resources.files("foretaste.serving") / "web"
    for path, name in _paths().items():
        _add_file(app, path, (folder / name).read_bytes(), _TYPES["." + name.rpartition(".")[2]])


def _add_file(app: FastAPI, path: str, content: bytes, media_type: str) -> None:
    tag = f'"{hashlib.sha256(content).hexdigest()[:16]}"'
    headers = {"etag": tag, "cache-control": "no-cache"}

    async def file(request: Request) -> Response:
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        return Response(content, media_type=media_type, headers=headers)

    app.add_api_route(
        path, file, methods=["GET", "HEAD"], include_in_schema=False, response_class=Response
    )

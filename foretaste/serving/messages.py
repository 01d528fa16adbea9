"""What goes over HTTP: the bodies of requests and replies."""

from contextlib import suppress
from typing import Annotated

import polars as pl
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    StrictStr,
    WithJsonSchema,
)

from foretaste.config import Config, shown
from foretaste.data.times import canonical_times
from foretaste.data.vocabulary import plain_id
from foretaste.errors import DataError
from foretaste.serving.rules import NO_RULES, Rules

MAX_ID_LENGTH = 512
MAX_SECONDS = 10**11
"""Unix seconds beyond are milliseconds."""


def _id_text(value: object) -> str:
    plain = plain_id(value)
    if not isinstance(plain, int) and not isinstance(value, str):
        raise ValueError(f"an id is a whole number or a text, not {shown(value)}")
    text = str(plain)
    if not text or len(text) > MAX_ID_LENGTH:
        raise ValueError(f"an id has 1 to {MAX_ID_LENGTH} characters, not {len(text)}")
    if "\0" in text or any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ValueError("an id may not contain NUL or lone surrogates")
    return text


def _seconds(value: object) -> int | None:
    """Return a time as reading a table takes it, in whole seconds."""
    match value:
        case None:
            return None
        case bool():
            pass
        case int() | float() if value < 0:
            raise ValueError(f"timestamp {shown(value)} is before 1970: give Unix seconds")
        case int() | float() if value > MAX_SECONDS:
            raise ValueError(f"timestamp {shown(value)} looks like milliseconds: give Unix seconds")
        case int() | float() | str():
            with suppress(DataError):
                found = canonical_times(pl.Series("timestamp", [value]), "s")
                if found.ticks[0] is not None:
                    return int(found.ticks[0]) // found.per_second
    raise ValueError(
        f"a time is Unix seconds or ISO 8601 text such as 2024-05-01T12:30:00Z, not {shown(value)}"
    )


_TEXT, _WHOLE, _NULL = ({"type": kind} for kind in ("string", "integer", "null"))
PathId = Annotated[str, AfterValidator(_id_text)]
"""An id in a path, where all is text."""
Id = Annotated[str, BeforeValidator(_id_text), WithJsonSchema({"anyOf": [_TEXT, _WHOLE]})]
"""An id of the caller's, text or a whole number; within the server it is text."""
_Ids = Annotated[tuple[Id, ...], Field(max_length=100_000, fail_fast=True)]
"""A body of 1 MB may hold 250,000 wrong ones; naming each takes seconds."""
_NewId = Annotated[StrictStr, AfterValidator(_id_text)]
_Time = Annotated[
    int | None, BeforeValidator(_seconds), WithJsonSchema({"anyOf": [_WHOLE, _TEXT, _NULL]})
]


class _Reply(BaseModel):
    model_config = ConfigDict(use_attribute_docstrings=True, frozen=True)


class RecommendRequest(Config):
    """Whom to recommend for: a known user, a history, both, or an unknown user."""

    user_id: Id | None = None
    """A user; the events posted since training count."""
    history: _Ids = ()
    """Items, oldest first; for a user, those after all that the server knows."""
    features: dict[str, JsonValue] | None = Field(default=None, max_length=100)
    """Features of a new user: column of the user table to value."""
    context: dict[str, JsonValue] | None = Field(default=None, max_length=100)
    """Features of the context: column of the events' context to value."""
    k: int = Field(default=10, ge=1)
    """Length of the list."""
    exclude_seen: bool = True
    """Whether items of the history are left out."""
    allow: _Ids | None = None
    """If given, only these items may be in the list."""
    deny: _Ids | None = None
    """Items that may not be in the list."""
    new_items: dict[_NewId, dict[str, JsonValue]] | None = Field(default=None, max_length=100)
    """Items that are not in the catalogue, to be ranked with it: from id to features, column of the
    item table to value. Rules apply to them too."""
    weights: dict[str, float] | None = Field(default=None, min_length=1, max_length=100)
    """How much each task's prediction counts in the score, per unit that the rows show; 0 for tasks
    that are not named."""
    rules: Rules = NO_RULES
    """Filters on attributes, caps on categories, diversity."""
    explain: bool = False
    """Whether each row also names the item of the history that it depends on most."""


class Item(_Reply):
    """An item as a person would name it."""

    item_id: str
    title: str
    """The item's title or name where the catalogue has one, else its id."""
    attributes: dict[str, JsonValue]
    """The other columns of the item table."""


class Row(Item):
    """One recommended item."""

    score: float
    """Higher is better; comparable within one answer only."""
    source: str
    """Where it came from: model, fold-in, features or popular."""
    predictions: dict[str, float] = Field(default_factory=dict)
    """What the model predicts, by the task's name; empty for a model without tasks."""
    because: Item | None = None
    """The item of the history without which this row's score would fall most."""


class RecommendReply(_Reply):
    """A list, best first, and what it was made from."""

    user_id: str | None
    user_known: bool
    """Whether training saw the user."""
    source: str
    """Where the list came from: model, fold-in, features or popular."""
    items: list[Row]
    unknown_items: list[str]
    """Ids in the request or in live events that the model does not know."""
    notes: list[str]
    """What was cut, filled up or left out."""
    live_events: int
    """Events posted since training that this answer rests on."""
    model_version: str


class SimilarReply(_Reply):
    """Items near to one item, nearest first."""

    item: Item
    items: list[Row]
    """None for an item without a training event that the model cannot place."""
    notes: list[str]
    """Why the list is empty or short."""
    model_version: str


class ItemsReply(_Reply):
    """Items whose title or id holds what was asked for."""

    items: list[Item]
    total: int
    """Items of the whole catalogue."""


class Column(_Reply):
    """A column of the item table that rules may name."""

    name: str
    several: bool
    """Whether an item may have several values: ask `contains` of it, not `equals`."""
    ordered: bool
    """Whether it holds numbers or times, of which `at_least` and `at_most` may be asked."""
    distinct: int
    """How many values there are."""
    values: list[str]
    """The most frequent, 200 at most."""


class ColumnsReply(_Reply):
    """What rules may go by."""

    columns: list[Column]
    vectors: bool
    """Whether the model has item vectors for diversity to go by."""


class UsersReply(_Reply):
    """Some of the users that training saw."""

    users: list[str]
    total: int


class PastEvent(Item):
    """One event of a user's history."""

    timestamp_s: int | None
    """Unix seconds, where the event has a time."""
    live: bool
    """Posted since training."""


class HistoryReply(_Reply):
    """What a user did, newest first."""

    user_id: str
    user_known: bool
    events: list[PastEvent]
    total: int
    """Events of this user in training and since."""


class EventRequest(BaseModel):
    """Somebody did something with an item."""

    model_config = Config.model_config

    user_id: Id
    item_id: Id
    timestamp: _Time = None
    """Unix seconds, or a time as ISO 8601 text, of UTC if it names no zone; without it, the
    server's clock."""
    event_id: Id | None = None
    """The sender's own id: sent again, the event is stored once."""


class EventsReply(_Reply):
    """What is now on disk."""

    stored: int
    duplicates: int
    """Events whose `event_id` had been stored before."""
    unknown_items: list[str]
    """Stored, but the model that serves does not know them."""
    unknown_users: list[str]
    """Stored; training has not seen these users, so their live events are all their history."""


class ForgetReply(_Reply):
    """How many live events of a user were deleted."""

    deleted: int


class ModelReply(_Reply):
    """The model that serves."""

    version: str
    """Changes whenever any file of the bundle does."""
    bundle: str
    loaded_at_s: float
    users: int
    items: int
    learned_from: str
    """Which events the model learned from, in words."""
    measured_on: str
    """What the report was measured on, in words."""
    manifest: dict[str, JsonValue]
    report: JsonValue
    """The evaluation that the bundle carries, null if none."""


class ReloadReply(_Reply):
    """The outcome of reading the bundle again."""

    version: str
    previous: str
    changed: bool


class KeptVersion(_Reply):
    """A version of the bundle that the server keeps a copy of."""

    version: str
    bytes: int
    used_at_s: float
    """Unix seconds: when it was kept, or last made the one that serves."""


class ModelsReply(_Reply):
    """The versions that are kept, and which of them serve."""

    active: str
    previous: str
    """What a roll back brings back; empty if there is none."""
    canary: str
    """What answers a share of the users; empty if there is none."""
    canary_share: float
    versions: list[KeptVersion]
    """The one used last first."""
    last_refusal: str
    """Why the newest try to switch was refused; empty if it was not."""


class CanaryRequest(BaseModel):
    """A version to try on a share of the users."""

    model_config = Config.model_config

    share: float = Field(ge=0, le=1)
    """Of users with an id, who always get the same version; 0 ends the canary."""


class ErrorReply(_Reply):
    """Why a request was refused."""

    error: str


class HealthReply(_Reply):
    """The process runs."""

    status: str
    store: str = ""
    """Of `/ready`: whether the store of live events answers, `answers` or `does not answer`."""

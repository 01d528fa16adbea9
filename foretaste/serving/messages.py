"""The HTTP messages: bodies of requests and replies."""

import math
import re
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
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
    model_validator,
)

from foretaste.config import Config, few_unknown, shown
from foretaste.data.times import YEAR_2200_S, canonical_times
from foretaste.data.vocabulary import plain_id
from foretaste.errors import DataError
from foretaste.serving.rules import NO_RULES, Rules

MAX_ID_LENGTH = 512
MAX_SECONDS = 10**11
"""Larger timestamps are taken for milliseconds."""
_ISO = re.compile(
    r"(19[7-9]|20[0-9]|21[0-9])[0-9]-[0-9]{2}-[0-9]{2}"
    r"([T ]([01][0-9]|2[0-3]):[0-9]{2}(:[0-9]{2}(\.[0-9]{3}|\.[0-9]{6})?)?"
    r"(Z|[+-](0[0-9]|1[0-4]):[0-5][0-9])?)?"
)


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
    """Return a time in whole seconds, in the formats that tables may have."""
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
                found = _usual_seconds(value)
                return seconds_of(value) if found is None else found
    raise ValueError(
        f"a time is Unix seconds or ISO 8601 text such as 2024-05-01T12:30:00Z, not {shown(value)}"
    )


def seconds_of(value: int | float | str) -> int:
    """Read a time in any format as tables do, in whole seconds.

    Raises:
        DataError: It cannot be read.
    """
    found = canonical_times(pl.Series("timestamp", [value]), "s")
    if found.ticks[0] is None:
        raise DataError("there is no time", name="timestamp", value=value)
    return int(found.ticks[0]) // found.per_second


def _usual_seconds(value: int | float | str) -> int | None:
    """Return the same for the usual formats, 500 times faster; None for others."""
    if not isinstance(value, str):
        return int(value) if 0 <= value <= YEAR_2200_S else None
    if not _ISO.fullmatch(value):
        return None
    with suppress(ValueError):  # such as the 30th of February
        time = datetime.fromisoformat(value)
        seconds = math.floor((time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp())
        return seconds if seconds >= 0 else None
    return None


_TEXT, _WHOLE, _NULL = ({"type": kind} for kind in ("string", "integer", "null"))
PathId = Annotated[str, AfterValidator(_id_text)]
"""An id in a path, which is always text."""
Id = Annotated[str, BeforeValidator(_id_text), WithJsonSchema({"anyOf": [_TEXT, _WHOLE]})]
"""An id of the caller, text or a whole number; the server uses its text."""
_Ids = Annotated[tuple[Id, ...], Field(max_length=100_000, fail_fast=True)]
"""Stops at the first invalid id: a body of 1 MB may have 250,000, and naming each takes seconds."""
_NewId = Annotated[StrictStr, AfterValidator(_id_text)]
_Time = Annotated[
    int | None, BeforeValidator(_seconds), WithJsonSchema({"anyOf": [_WHOLE, _TEXT, _NULL]})
]


class _Reply(BaseModel):
    model_config = ConfigDict(use_attribute_docstrings=True, frozen=True)


class RecommendRequest(Config):
    """A request for recommendations: for a known user, a history, both, or an unknown user."""

    user_id: Id | None = None
    """A user, whose events since training count."""
    history: _Ids = ()
    """Items, oldest first. They are appended to the user's known history."""
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
    """Weight of each task's prediction in the score, per unit that the rows show; 0 for tasks that
    are not named."""
    rules: Rules = NO_RULES
    """Filters on attributes, caps on categories, diversity."""
    explain: bool = False
    """Whether each row also names the item of the history that it depends on most."""


class Item(_Reply):
    """An item with its title."""

    item_id: str
    title: str
    """The item's title or name if the catalogue has one, else its id."""
    attributes: dict[str, JsonValue]
    """The other columns of the item table."""


class Row(Item):
    """One recommended item."""

    score: float
    """Higher is better; comparable within one answer only."""
    source: str
    """The source of the row: model, fold-in, features or popular."""
    predictions: dict[str, float] = Field(default_factory=dict)
    """The model's predictions by the task's name; empty for a model without tasks."""
    because: Item | None = None
    """The item of the history whose removal would lower this row's score most."""


class RecommendReply(_Reply):
    """A list, best first, with its source."""

    user_id: str | None
    user_known: bool
    """Whether the user is in the training data."""
    source: str
    """The source of the list: model, fold-in, features or popular."""
    items: list[Row]
    unknown_items: list[str]
    """Ids in the request or in live events that the model does not know."""
    notes: list[str]
    """Remarks on items that were left out or added."""
    live_events: int
    """Number of live events that this answer is based on."""
    model_version: str


class SimilarReply(_Reply):
    """Items similar to one item, most similar first."""

    item: Item
    items: list[Row]
    """Empty for an item without a training event that the model cannot embed."""
    notes: list[str]
    """Why the list is empty or short."""
    model_version: str


class ItemsReply(_Reply):
    """Items whose titles or ids match the query."""

    items: list[Item]
    total: int
    """Number of items in the catalogue."""


class Column(_Reply):
    """A column of the item table that rules may name."""

    name: str
    several: bool
    """Whether an item may have several values: use `contains`, not `equals`."""
    ordered: bool
    """Whether it has numbers or times, for `at_least` and `at_most`."""
    distinct: int
    """Number of distinct values."""
    values: list[str]
    """The most frequent values, at most 200."""


class ColumnsReply(_Reply):
    """The columns that rules may use."""

    columns: list[Column]
    vectors: bool
    """Whether the model has item vectors, for diversity by vectors."""


class UsersReply(_Reply):
    """Some users of the training data."""

    users: list[str]
    total: int


class PastEvent(Item):
    """One event of a user's history."""

    timestamp_s: int | None
    """Unix seconds, if the event has a time."""
    live: bool
    """Whether the event was posted since training."""


class HistoryReply(_Reply):
    """A user's events, newest first."""

    user_id: str
    user_known: bool
    events: list[PastEvent]
    total: int
    """Number of events of this user, in training and since."""


class EventRequest(BaseModel):
    """An interaction of a user with an item."""

    model_config = Config.model_config

    user_id: Id
    item_id: Id
    timestamp: _Time = None
    """Unix seconds, or a time as ISO 8601 text, in UTC if it has no zone; without it, the server's
    clock."""
    event_id: Id | None = None
    """An id given by the sender: an event that is sent again with the same id is stored once."""

    @model_validator(mode="before")
    @classmethod
    def _few_unknown(cls, event: object) -> object:
        return few_unknown(cls, event) if isinstance(event, Mapping) else event


class EventsReply(_Reply):
    """The outcome of storing events."""

    stored: int
    duplicates: int
    """Number of events whose `event_id` was already stored."""
    unknown_items: list[str]
    """Items of stored events that the active model does not know."""
    unknown_users: list[str]
    """Users of stored events without training events; their live events are their whole history."""


class ForgetReply(_Reply):
    """Number of deleted live events of a user."""

    deleted: int


class ModelReply(_Reply):
    """The active model."""

    version: str
    """An identifier that changes with any file of the bundle."""
    bundle: str
    loaded_at_s: float
    users: int
    items: int
    learned_from: str
    """The events that the model was trained on, in words."""
    measured_on: str
    """The events that the report was measured on, in words."""
    manifest: dict[str, JsonValue]
    report: JsonValue
    """The evaluation report in the bundle, null if there is none."""


class ReloadReply(_Reply):
    """The outcome of reading the bundle again."""

    version: str
    previous: str
    changed: bool


class KeptVersion(_Reply):
    """A stored version: a copy of the bundle that the server keeps."""

    version: str
    bytes: int
    used_at_s: float
    """Unix seconds: when it was stored, or last activated."""


class ModelsReply(_Reply):
    """The stored versions, and which of them are active."""

    active: str
    previous: str
    """The version that a roll back activates; empty if there is none."""
    canary: str
    """The version that answers a share of the users; empty if there is none."""
    canary_share: float
    versions: list[KeptVersion]
    """The stored versions, most recently used first."""
    last_refusal: str
    """The reason why the latest attempt to switch was refused; empty if it was not refused."""


class CanaryRequest(BaseModel):
    """A canary: a version for a share of the users."""

    model_config = Config.model_config

    share: float = Field(ge=0, le=1)
    """Share of the users with an id; a user always gets the same version; 0 ends the
    canary."""


class ErrorReply(_Reply):
    """An error reply."""

    error: str


class HealthReply(_Reply):
    """The health of the process."""

    status: str
    store: str = ""
    """In the reply of `/ready`: whether the store of live events answers, `answers` or `does not
    answer`."""

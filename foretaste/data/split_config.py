"""The settings of a split, as a recipe writes them, and the split that they describe."""

from collections.abc import Callable, Mapping
from typing import Annotated, Literal

from pydantic import Field, model_validator

from foretaste.arguments import checked
from foretaste.config import Config, Seed
from foretaste.data.interactions import Interactions
from foretaste.data.splits import Split
from foretaste.data.splitting import (
    cold_items_split,
    cold_users_split,
    given_split_by_column,
    leave_last_split,
    leave_last_within_training,
    random_split,
    ratio_split,
    temporal_split,
)

Share = Annotated[float, Field(ge=0, lt=1)]


class _Shares(Config):
    """Two shares of the events that leave something to train on."""

    validation: Share = 0.1
    """Share of the events for validation; 0 for none."""
    test: Share = 0.1
    """Share of the events for the test; 0 for none: then nothing is measured."""

    @model_validator(mode="after")
    def _leave_something(self) -> "_Shares":
        if self.validation + self.test >= 1:
            raise ValueError(
                f"validation {self.validation:g} and test {self.test:g} leave nothing to train on"
            )
        return self


class TemporalSplitConfig(_Shares):
    """All users are cut at the same two times; the test is rolling."""

    kind: Literal["temporal"] = "temporal"
    stop_on: Literal["time", "leave_last"] = "time"
    """What validation is: the events between the two cuts; or each user's last event before the
    test, and then the model also trains on the other events between the cuts."""


class LeaveLastSplitConfig(Config):
    """Each user's last event is the test."""

    kind: Literal["leave_last"] = "leave_last"
    validation: bool = True
    """Whether each user's last event but one is held out for validation."""


class RatioSplitConfig(_Shares):
    """The last share of each user's own events is the test."""

    kind: Literal["ratio"] = "ratio"
    test: Share = 0.2
    """Share of each user's events, the last ones, for the test."""


class RandomSplitConfig(_Shares):
    """Events are held out at random, regardless of user and time."""

    kind: Literal["random"] = "random"
    seed: Seed = 0
    """Decides the draws; equal seeds give equal splits."""


class GivenSplitConfig(Config):
    """A column of the data holds each event's part."""

    kind: Literal["given"] = "given"
    column: str = "part"
    """Column of the part: train, validation, test or unused, or 0, 1, 2 or 3."""
    validation: Share = 0.0
    """Share of the training events that are drawn for validation if the data give none."""
    validation_by: Literal["events", "blocks"] = "events"
    """"events": each event is drawn by itself. "blocks": for each user, a group of items that have
    users in common, which is closer to a test of users' last events if the data have no times."""
    seed: Seed = 0
    """Decides the draws; equal seeds give equal splits."""


class ColdItemsSplitConfig(_Shares):
    """All events of some items are held out, so that training has none of them."""

    kind: Literal["cold_items"] = "cold_items"
    test: Share = 0.2
    """Share of the items, not of the events; the same holds for validation."""
    seed: Seed = 0
    """Decides the draws; equal seeds give equal splits."""


class ColdUsersSplitConfig(_Shares):
    """All events of some users are held out, so that training has none of them."""

    kind: Literal["cold_users"] = "cold_users"
    test: Share = 0.2
    """Share of the users, not of the events; the same holds for validation."""
    seed: Seed = 0
    """Decides the draws; equal seeds give equal splits."""


SplitConfig = Annotated[
    TemporalSplitConfig
    | LeaveLastSplitConfig
    | RatioSplitConfig
    | RandomSplitConfig
    | GivenSplitConfig
    | ColdItemsSplitConfig
    | ColdUsersSplitConfig,
    Field(discriminator="kind"),
]

_CUTS: Mapping[str, Callable[..., Split]] = {
    "temporal": temporal_split,
    "leave_last": leave_last_split,
    "ratio": ratio_split,
    "random": random_split,
    "given": given_split_by_column,
    "cold_items": cold_items_split,
    "cold_users": cold_users_split,
}
"""The function of each kind; its arguments are named as the settings are."""


@checked
def make_split(
    config: TemporalSplitConfig
    | LeaveLastSplitConfig
    | RatioSplitConfig
    | RandomSplitConfig
    | GivenSplitConfig
    | ColdItemsSplitConfig
    | ColdUsersSplitConfig,
    events: Interactions,
) -> Split:
    """Cut `events` as `config` describes.

    Raises:
        DataError: The events cannot be cut so; the message says why.
    """
    settings = config.model_dump(exclude={"kind", "stop_on"})
    split = _CUTS[config.kind](events, **settings)
    by_last = isinstance(config, TemporalSplitConfig) and config.stop_on == "leave_last"
    return leave_last_within_training(split) if by_last else split

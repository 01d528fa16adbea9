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
    """Share of the events to choose by; 0 for none."""
    test: Share = 0.1
    """Share of the events to report on; 0 for none: then nothing is measured."""

    @model_validator(mode="after")
    def _leave_something(self) -> "_Shares":
        if self.validation + self.test >= 1:
            raise ValueError(
                f"validation {self.validation:g} and test {self.test:g} leave nothing to train on"
            )
        return self


class TemporalSplitConfig(_Shares):
    """All users are cut at the same moments; the test is rolling."""

    kind: Literal["temporal"] = "temporal"
    stop_on: Literal["time", "leave_last"] = "time"
    """What validation is: the events between the cuts, or each user's last event before the
    test (the events between the cuts are then trained on)."""


class LeaveLastSplitConfig(Config):
    """Each user's last event is the test."""

    kind: Literal["leave_last"] = "leave_last"
    validation: bool = True
    """Whether the last but one is held out to choose by."""


class RatioSplitConfig(_Shares):
    """The last share of each user's own events is the test."""

    kind: Literal["ratio"] = "ratio"
    test: Share = 0.2


class RandomSplitConfig(_Shares):
    """Events are held out whatever their user and time."""

    kind: Literal["random"] = "random"
    seed: Seed = 0
    """Equal seeds give equal splits."""


class GivenSplitConfig(Config):
    """The data say which part an event belongs to."""

    kind: Literal["given"] = "given"
    column: str = "part"
    """Holds train, validation, test or unused, or 0, 1, 2 or 3."""
    validation: Share = 0.0
    """Share of the training events to choose by, drawn at random, where the data give none."""
    validation_by: Literal["events", "blocks"] = "events"
    """Each event is drawn for itself; or of each user a block of items that others did together,
    which is nearer to a test that holds users' last events, in data without times."""
    seed: Seed = 0
    """Equal seeds give equal draws."""


class ColdItemsSplitConfig(_Shares):
    """All events of some items are held out: training sees nothing of them."""

    kind: Literal["cold_items"] = "cold_items"
    test: Share = 0.2
    """Share of the items, not of the events; likewise validation."""
    seed: Seed = 0
    """Equal seeds give equal splits."""


class ColdUsersSplitConfig(_Shares):
    """All events of some users are held out: training sees nothing of them."""

    kind: Literal["cold_users"] = "cold_users"
    test: Share = 0.2
    """Share of the users, not of the events; likewise validation."""
    seed: Seed = 0
    """Equal seeds give equal splits."""


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

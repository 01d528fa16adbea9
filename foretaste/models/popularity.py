"""Popularity, a catalogue scorer: everybody is offered what is done most, of late or ever.

It learns nothing about anybody, and so is the floor that every other model must clear.

Shape legend: B queries, I items.
"""

from typing import ClassVar, Literal, final

import numpy as np
import torch
from jaxtyping import Float
from pydantic import PositiveFloat
from torch import Tensor

from foretaste.config import Config, RangeConfig, Space, Usual
from foretaste.data.batch import Queries
from foretaste.data.interactions import Interactions
from foretaste.errors import ConfigError
from foretaste.models.base import Scorer
from foretaste.models.item_sets import check_events

DAY_S = 86_400


class PopularityConfig(Config):
    """Settings of popularity."""

    kind: Literal["popularity"] = "popularity"
    tuning: ClassVar[Space] = {
        "window_days": RangeConfig(low=1.0, high=365.0, log=True),
    }
    usual: ClassVar[Usual] = Usual()
    window_days: PositiveFloat | None = None
    """Count only events within this many days before the newest one. None: all events."""


@final
class Popularity(Scorer):
    """Scores an item by its number of training events, the same for every query."""

    learns_by = "events"

    def __init__(self, config: PopularityConfig, *, num_items: int) -> None:
        super().__init__()
        self.config = config
        self.count_I: Tensor
        self.register_buffer("count_I", torch.zeros(num_items, dtype=torch.int64))

    def learn(self, events: Interactions) -> None:
        """Count each item's events within the window, repeated ones each time.

        Raises:
            ConfigError: A window is asked for, and the events have no times.
            DataError: There is no event, or the catalogue has another size than the model.
        """
        check_events(events, num_items=len(self.count_I))
        self.count_I.copy_(torch.from_numpy(self._counts(events)))

    def _counts(self, events: Interactions) -> np.ndarray:
        if self.config.window_days is None:
            return events.item_count
        if events.timestamp_s is None:
            raise ConfigError(
                f"popularity.window_days is {self.config.window_days:g}, but these events have no "
                "timestamps: read them with a timestamp column, or leave window_days out",
                name="window_days",
                value=self.config.window_days,
            )
        oldest_s = events.timestamp_s.max() - self.config.window_days * DAY_S
        recent = events.item_idx[events.timestamp_s >= oldest_s]
        return np.bincount(recent, minlength=events.num_items)

    @torch.no_grad()
    def score(self, queries: Queries) -> Float[Tensor, "B I"]:
        """Return each item's number of events, once per query."""
        return self.count_I.float().expand(len(queries), -1)

"""What models in closed form share: histories as sets, and strengths that validation chooses.

A set says which items a user has done, however often and in whatever order.

Shape legend: B queries, M distinct (query, item) pairs, U users, I items.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from foretaste.config import Config, Weight
from foretaste.data.batch import Queries
from foretaste.data.interactions import Interactions
from foretaste.errors import DataError
from foretaste.later import later

if TYPE_CHECKING:
    from scipy import sparse
else:
    sparse = later("scipy.sparse")

Strength = Weight | Literal["auto"]
"""How strongly a model trusts the data, or leaves that to validation."""


class StrengthConfig(Config):
    """Settings of a model whose strengths are chosen by validation if they are "auto"."""

    strengths: ClassVar[Mapping[str, tuple[float, ...]]] = {}
    """By setting, what is tried. The first one is taken where nothing can be tried."""
    most_events: ClassVar[int] = 500_000
    """Nothing is tried on more events than these: they need less of a strength, and cost more."""
    most_items: ClassVar[int] = 1_000_000_000
    """Nothing is tried over more items than these."""

    def strength(self, name: str) -> float:
        """Return what a setting comes to."""
        value = getattr(self, name)
        return self.strengths[name][0] if value == "auto" else float(value)

    @property
    def left_open(self) -> list[str]:
        """The strengths that are to be chosen."""
        return [name for name in self.strengths if getattr(self, name) == "auto"]

    def may_try(self, events: Interactions) -> bool:
        """Return whether several fits take little."""
        return len(events) <= self.most_events and events.num_items <= self.most_items


class ItemSets(NamedTuple):
    """The distinct items of each query, one query after the other, rising within each."""

    item_M: Int64[Tensor, " M"]
    offsets_B1: Int64[Tensor, " B1"]


def distinct_items(queries: Queries, *, num_items: int) -> ItemSets:
    """Drop order and repetition from histories."""
    row_N = torch.repeat_interleave(queries.offsets_B1.diff())
    key_M = torch.unique(row_N * num_items + queries.history_N)
    bounds_B1 = torch.arange(len(queries) + 1) * num_items
    return ItemSets(item_M=key_M % num_items, offsets_B1=torch.searchsorted(key_M, bounds_B1))


def interaction_matrix(events: Interactions) -> "sparse.csr_array":
    """Return the (U, I) matrix of float32 ones where a user has done an item, once or more."""
    matrix = sparse.csr_array(
        (np.ones(len(events), np.float32), events.item_idx, events.offsets),
        shape=(events.num_users, events.num_items),
        copy=True,
    )
    matrix.sum_duplicates()
    matrix.data.fill(1)
    return matrix


def check_events(events: Interactions, *, num_items: int) -> None:
    """Refuse events that cannot teach a model of `num_items` items.

    Raises:
        DataError: There is none, or their catalogue is of another size.
    """
    if len(events) == 0:
        raise DataError("there is no training event: nothing can be learned")
    if events.num_items != num_items:
        raise DataError(
            f"the model was made for {num_items} items and the events speak of "
            f"{events.num_items}: build it with num_items={events.num_items}",
            name="num_items",
            value=num_items,
        )

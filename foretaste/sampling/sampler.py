"""The door to negative samplers: who is drawn, and with which probability."""

from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int64
from torch import Tensor


@runtime_checkable
class Sampler(Protocol):
    """Draws items in bulk, with replacement, from one distribution for all.

    Shape legend: I items.
    """

    probability_I: Float[Tensor, " I"]
    """Chance of each item in one draw, float64; 0 for items that are never drawn."""

    def draw(self, shape: tuple[int, ...], *, generator: torch.Generator) -> Int64[Tensor, "..."]:
        """Return a tensor of `shape`, each entry an item_idx drawn on its own."""
        ...

"""Every known item with the same chance: P(j) = 1 / |I|."""

from typing import final

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from foretaste.errors import DataError


@final
class UniformSampler:
    """Draws from the known items alike.

    Shape legend: I items.
    """

    def __init__(self, num_items: int, *, known_I: Bool[Tensor, " I"] | None = None) -> None:
        """Prepare to draw from `[0, num_items)`.

        Args:
            num_items: Size of the catalogue, 1 or more.
            known_I: True = may be drawn, such as items with a training event; None: all may.

        Raises:
            DataError: No item may be drawn, or `known_I` has another length.
        """
        known_I = torch.ones(num_items, dtype=torch.bool) if known_I is None else known_I
        if len(known_I) != num_items or not known_I.any():
            raise DataError(
                f"{int(known_I.sum())} of {len(known_I)} items may be drawn from a catalogue of "
                f"{num_items}: a sampler needs one flag per item, and one that is true"
            )
        self.probability_I: Float[Tensor, " I"] = known_I.double() / known_I.sum()
        self._num_known = int(known_I.sum())
        self._known = None if known_I.all() else known_I.nonzero().squeeze(1)

    def draw(self, shape: tuple[int, ...], *, generator: torch.Generator) -> Int64[Tensor, "..."]:
        """Return a tensor of `shape`, each entry an item_idx drawn on its own."""
        drawn = torch.randint(self._num_known, shape, generator=generator)
        if self._known is None:
            return drawn
        return self._known.index_select(0, drawn.flatten()).view(shape)

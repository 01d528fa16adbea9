"""What cold items and new users are asked: those that no training event has, and nothing else.

Among the whole catalogue a cold item is held against items that training taught; here only what
places cold items decides.

Shape legend: B queries of a block, I items.
"""

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Among = Literal["all", "cold"]
"""What is ranked: all items that the model knows or places, or the cold ones alone."""
COLD_SUFFIX = "_among_cold"
"""What metric names end in where cold items alone are ranked."""
Whose = Literal["known", "new"]
"""Whose lists are measured: those of users with a history, or of the others alone, who are told by
their features if by anything."""
NEW_SUFFIX = "_of_new_users"
"""What metric names end in where it is the others'."""


def among_cold(
    score_BI: Float[Tensor, "B I"], *, cold_I: Bool[Tensor, " I"], placed_I: Bool[Tensor, " I"]
) -> Float[Tensor, "B I"]:
    """Return the scores with all but cold items left out.

    Cold items that the model does not place are candidates too, with one score below all others:
    a model that places none gets what chance gives, not nothing.

    Args:
        score_BI: Over the whole catalogue.
        cold_I: Items without a training event.
        placed_I: Items that the model gave a score.
    """
    on, lowest = score_BI.device, score_BI.new_tensor(torch.finfo(score_BI.dtype).min)
    other_I = torch.where(cold_I.to(on), lowest, -torch.inf)
    return torch.where((cold_I & placed_I).to(on), score_BI, other_I)

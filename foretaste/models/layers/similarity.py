"""How a query is compared with an item; the score is always a plain dot product.

Shape legend: B queries, V items, D width.
"""

from typing import Literal

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

Similarity = Literal["dot", "cosine"]


def as_query(
    vector_BD: Float[Tensor, "B D"], similarity: Similarity, temperature: float
) -> Float[Tensor, "B D"]:
    """Return query vectors scaled so that a dot product is the similarity over the temperature."""
    return as_item(vector_BD, similarity) / temperature


def as_item(vector_VD: Float[Tensor, "V D"], similarity: Similarity) -> Float[Tensor, "V D"]:
    """Return item vectors, of length 1 for the cosine."""
    return F.normalize(vector_VD, dim=1) if similarity == "cosine" else vector_VD

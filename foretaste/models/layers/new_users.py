"""What a ranker reads of users whose id or features are not given: what their history makes likely.

In evaluation only; in training every row is read as it is given.

Shape legend: B queries, S single-valued fields, the id first, Q fields of a user, W width of a
field.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from foretaste.data.batch import Queries
from foretaste.models.layers.fold_in import FoldIn, Rows


def with_likely_ids(
    fold_in: FoldIn,
    queries: Queries,
    single_BSW: Float[Tensor, "B S W"],
    has_id_B1: Bool[Tensor, "B 1"],
    *,
    users: Rows,
    items: Rows,
    only_new: bool = False,
) -> tuple[Float[Tensor, "B S W"], Bool[Tensor, "B 1"]]:
    """Return the ids of queries with a history by `fold_in`, and which queries have an id then.

    Args:
        fold_in: Knows the regression.
        queries: Users and their histories.
        single_BSW: Single-valued fields.
        has_id_B1: Which users have an id vector.
        users: Gives the users' id vectors.
        items: Gives the items'.
        only_new: Whether known users keep their vectors whatever they have done since.
    """
    told_B1 = (queries.offsets_B1.diff() > 0).unsqueeze(1)
    if only_new:
        told_B1 = told_B1 & ~has_id_B1
    if not told_B1.any():
        return single_BSW, has_id_B1
    id_BW = fold_in(queries, users, items).where(told_B1, single_BSW[:, 0])
    return torch.cat([id_BW.unsqueeze(1), single_BSW[:, 1:]], dim=1), has_id_B1 | told_B1


def with_likely_features(
    fold_features: FoldIn,
    queries: Queries,
    field_BQW: Float[Tensor, "B Q W"],
    *,
    items: Rows,
) -> Float[Tensor, "B Q W"]:
    """Replace all fields but the first, of new users with a history whose features are not told."""
    untold_B = (queries.user_B < 0) & (queries.offsets_B1.diff() > 0)
    if queries.profile is not None:
        untold_B &= ~queries.profile.known_R
    if not untold_B.any():
        return field_BQW
    likely_BX: Tensor = fold_features(queries, None, items)
    likely_BQW = torch.cat([field_BQW[:, :1], likely_BX.view_as(field_BQW[:, 1:])], dim=1)
    return likely_BQW.where(untold_B[:, None, None], field_BQW)

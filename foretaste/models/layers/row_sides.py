"""The sides of a row that a ranker reads, by its settings and by what is known.

All sides share one table: row 0 is nobody, then the ids of users, those of items, and the single
values of users, items and moments.
"""

from typing import NamedTuple

from pydantic import Field

from foretaste.config import Config, Count, Positive, Weight
from foretaste.data.features import Features, FieldSide
from foretaste.errors import ConfigError
from foretaste.models.layers.embedding import Fusion
from foretaste.models.layers.known_fields import told_of_items, told_of_users
from foretaste.models.layers.side_fields import SideFields
from foretaste.models.layers.used_rows_l2 import L2Of


class RowFieldsConfig(Config):
    """Settings of what a ranker reads."""

    embedding_dim: Count = 16
    """Width of each field's vector."""
    user_id: bool = True
    """Whether each user has a vector of their own; nobody has where each row is a user of its
    own."""
    item_id: bool = True
    """Whether each item has a vector of its own."""
    user_features: bool = True
    """Whether the features of users are read, where there are any."""
    item_features: bool = True
    """Whether the features of items are read, where there are any."""
    context_features: bool = True
    """Whether the features of the moment are read, where there are any."""
    fusion: Fusion = "concat"
    """How vectors, of a text or an image, join: each as one more field, or by a gate, which makes
    one field of them and the id."""
    id_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of rows that are told in training without their id, where something else is known:
    features learn to stand alone."""
    init_std: Positive = 0.05
    """Spread of the first vectors."""
    l2: Weight = 0.0
    """Weight of half the squared length of the vectors of ids and single values that a batch
    uses."""
    l2_of: L2Of = "rows"
    """"rows": the mean over the batch's rows of all that they use. "mini_batch_aware": each vector
    once a batch, by 1 over the number of training rows that use it, so that over an epoch rare
    and frequent ones are held alike."""


class RowSides(NamedTuple):
    """Each may have no field at all."""

    user: SideFields
    item: SideFields
    context: SideFields
    num_codes: int
    """Rows of the table."""


def sides_of_rows(
    config: RowFieldsConfig,
    *,
    num_users: int,
    num_items: int,
    features: Features | None,
    width: int,
) -> RowSides:
    """Make the sides, one behind the other in the table.

    Raises:
        ConfigError: There is nothing to tell one of several items by, or nothing at all, or
            features are of others than there are.
    """
    users = told_of_users(features if config.user_features else None, num_users)
    items = told_of_items(features if config.item_features else None, num_items)
    first_item = 1 + (num_users if config.user_id else 0)
    num_codes = first_item + (num_items if config.item_id else 0)
    made = []
    for told, num_rows, first_id in (
        (users, num_users, 1 if config.user_id else None),
        (items, num_items, first_item if config.item_id else None),
        (_told_of_moments(features if config.context_features else None), 0, None),
    ):
        side = SideFields(
            told,
            num_rows=num_rows,
            first_id=first_id,
            first_code=num_codes,
            width=width,
            init_std=config.init_std,
            fusion=config.fusion,
        )
        num_codes += side.num_codes
        made.append(side)
    user, item, context = made
    if not item.num_fields and num_items > 1:
        raise ConfigError(
            "there is nothing to tell an item by: set model.item_id, or give features of items"
        )
    if not any(side.num_fields for side in made):
        raise ConfigError("there is nothing to tell a row by: give features of users or moments")
    return RowSides(user, item, context, num_codes)


def _told_of_moments(features: Features | None) -> tuple[FieldSide, None] | None:
    return None if features is None or features.context is None else (features.context, None)

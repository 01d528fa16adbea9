"""All models by name: from settings to an untrained network.

A new model is one more member of the union and one more arm of the `match`; a forgotten arm
fails the type check.
"""

from typing import assert_never

from torch import nn

from foretaste.models.popularity import Popularity, PopularityConfig

ModelConfig = PopularityConfig


def build_model(config: ModelConfig, *, num_users: int, num_items: int) -> nn.Module:
    """Make the untrained network that `config` describes.

    Args:
        config: A model's settings.
        num_users: Users that training knows, 0 or more.
        num_items: Items of the catalogue, 1 or more.

    Raises:
        TooLargeError: What the model keeps would not fit in memory.
    """
    match config:
        case PopularityConfig():
            return Popularity(config, num_items=num_items)
        case _:
            assert_never(config)

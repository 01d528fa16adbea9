"""All ways of learning by name."""

from typing import Annotated

from pydantic import Field

from foretaste.training.objectives.masked_item import MaskedItemConfig
from foretaste.training.objectives.next_item import NextItemConfig
from foretaste.training.objectives.pairs import PairsConfig

ObjectiveConfig = Annotated[
    NextItemConfig | MaskedItemConfig | PairsConfig, Field(discriminator="kind")
]

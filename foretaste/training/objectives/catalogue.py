"""All ways of learning by name."""

from typing import Annotated

from pydantic import Field

from foretaste.training.objectives.masked_item import MaskedItemConfig
from foretaste.training.objectives.next_item import NextItemConfig
from foretaste.training.objectives.pairs import PairsConfig
from foretaste.training.objectives.rows import RowsConfig

ObjectiveConfig = Annotated[
    NextItemConfig | MaskedItemConfig | PairsConfig | RowsConfig, Field(discriminator="kind")
]

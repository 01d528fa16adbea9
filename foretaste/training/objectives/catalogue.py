"""All training objectives by name."""

from typing import Annotated

from pydantic import Field

from foretaste.training.objectives.pairs import PairsConfig
from foretaste.training.objectives.rows import RowsConfig
from foretaste.training.objectives.sequences import MaskedItemConfig, NextItemConfig

ObjectiveConfig = Annotated[
    NextItemConfig | MaskedItemConfig | PairsConfig | RowsConfig, Field(discriminator="kind")
]

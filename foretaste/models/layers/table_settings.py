"""The kinds of tables by name: one more kind is one more member of the union.

A model takes tables by `make_table` and `make_tables`, and knows of no kind.
"""

from collections.abc import Sequence
from typing import Annotated, Any, get_args

from pydantic import Field

from foretaste.config import Config
from foretaste.models.layers.quantised import QuantisedConfig
from foretaste.models.layers.table import Table
from foretaste.models.layers.tables import (
    CompositionalConfig,
    DenseConfig,
    HashConfig,
    NarrowConfig,
)
from foretaste.models.layers.tables_at_rest import HalfConfig, IntegerConfig, PrunedConfig

TableConfig = Annotated[
    DenseConfig
    | NarrowConfig
    | HashConfig
    | CompositionalConfig
    | QuantisedConfig
    | HalfConfig
    | IntegerConfig
    | PrunedConfig,
    Field(discriminator="kind"),
]


KINDS: Any = get_args(get_args(TableConfig)[0])
"""The settings classes of all kinds."""


class IdConfig(Config):
    """Settings of a model that has a vector for each id."""

    table: TableConfig = DenseConfig()
    """How the vectors of ids and of features' codes are kept."""


def make_table(config: TableConfig, num_rows: int, width: int) -> Table:
    """Make an untrained table; its rows are drawn around 0 with a standard deviation of 1."""
    return config.make(num_rows, width)


def make_tables(
    config: TableConfig, sizes: Sequence[int], width: int, *, std: float
) -> list[Table]:
    """Make tables of one width, of which those of dense ones are drawn as one and cut."""
    return config.make_several(sizes, width, std=std)

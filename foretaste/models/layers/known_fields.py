"""The features of all users, or of all items, encoded by their row.

Shape legend: R rows of the table, B rows asked for, D width.
"""

from typing import final

from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from foretaste.data.features import Features, FieldSide, FieldTable, concat_rows
from foretaste.errors import ConfigError
from foretaste.models.layers.embedding import FieldEncoder, Fusion
from foretaste.models.layers.table_settings import TableConfig


@final
class KnownFields(nn.Module):
    """An encoder with the table that it reads. Row -1 is somebody of whom nothing is known."""

    def __init__(
        self,
        side: FieldSide,
        rows: FieldTable,
        *,
        embedding_dim: int,
        fusion: Fusion,
        table: TableConfig,
    ) -> None:
        """Make untrained weights."""
        super().__init__()
        self.encoder = FieldEncoder(side, embedding_dim=embedding_dim, fusion=fusion, table=table)
        self.rows = KnownRows(side, rows)

    def forward(
        self, row_B: Int64[Tensor, " B"], other: FieldTable | None = None
    ) -> Float[Tensor, "B D"]:
        """Return a vector for each row.

        Args:
            row_B: Rows of the table, or -1.
            other: A row for each of `row_B`, taken where that is -1.
        """
        vector_BD: Tensor = self.encoder(self.rows(row_B))
        if other is None:
            return vector_BD
        other_BD: Tensor = self.encoder(other)
        return vector_BD.where((row_B >= 0).unsqueeze(1), other_BD)

    @property
    def known_R(self) -> Bool[Tensor, " R"]:
        """Which rows have a feature that says something."""
        return self.rows.known_R


@final
class KnownRows(nn.Module):
    """The table itself, and one more row of which nothing is known.

    It moves with the module and is no part of its state: a bundle keeps features in files of their
    own.
    """

    code_RC: Tensor
    bag_N: Tensor
    bag_offsets_RG1: Tensor
    number_RM: Tensor
    present_RF: Tensor

    def __init__(self, side: FieldSide, table: FieldTable) -> None:
        super().__init__()
        self.num_rows = len(table)
        whole = concat_rows([table, side.unknown(1)])
        self.register_buffer("code_RC", whole.code_RC, persistent=False)
        self.register_buffer("bag_N", whole.bag_N, persistent=False)
        self.register_buffer("bag_offsets_RG1", whole.bag_offsets_RG1, persistent=False)
        self.register_buffer("number_RM", whole.number_RM, persistent=False)
        self.register_buffer("present_RF", whole.present_RF, persistent=False)
        self.num_vectors = len(whole.vectors)
        for place, vector_RW in enumerate(whole.vectors):
            self.register_buffer(f"vector_{place}", vector_RW, persistent=False)

    def forward(self, row_B: Int64[Tensor, " B"]) -> FieldTable:
        """Return some rows, -1 being the one of which nothing is known."""
        return self.table().rows(row_B.where(row_B >= 0, self.num_rows))

    @property
    def known_R(self) -> Bool[Tensor, " R"]:
        """Which rows have a feature that says something."""
        return self.present_RF[:-1].any(dim=1)

    def table(self) -> FieldTable:
        """Return the rows, the unknown one last."""
        return FieldTable(
            code_RC=self.code_RC,
            bag_N=self.bag_N,
            bag_offsets_RG1=self.bag_offsets_RG1,
            number_RM=self.number_RM,
            vectors=tuple(self.get_buffer(f"vector_{n}") for n in range(self.num_vectors)),
            present_RF=self.present_RF,
        )


def told_of_users(features: Features | None, num_users: int) -> tuple[FieldSide, FieldTable] | None:
    """Return what is known of users; None where nothing is.

    Raises:
        ConfigError: It is known of other users than there are.
    """
    if features is None or features.user is None or features.user_table is None:
        return None
    return features.user, _a_row_each("users", features.user_table, num_users)


def told_of_items(features: Features | None, num_items: int) -> tuple[FieldSide, FieldTable] | None:
    """Return what is known of items, likewise."""
    if features is None or features.item is None or features.item_table is None:
        return None
    return features.item, _a_row_each("items", features.item_table, num_items)


def known_fields(
    told: tuple[FieldSide, FieldTable] | None,
    *,
    embedding_dim: int,
    fusion: Fusion,
    table: TableConfig,
) -> KnownFields | None:
    """Make what encodes the features of users, or of items; None where none are told."""
    if told is None:
        return None
    return KnownFields(*told, embedding_dim=embedding_dim, fusion=fusion, table=table)


def _a_row_each(what: str, table: FieldTable, num_rows: int) -> FieldTable:
    if len(table) != num_rows:
        raise ConfigError(
            f"there are features of {len(table)} {what} for {num_rows} of them: fit the features "
            "to the events that the model learns from",
            name="features",
            value=len(table),
        )
    return table

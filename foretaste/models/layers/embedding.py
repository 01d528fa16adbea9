"""Turns encoded features into vectors: one table, one look-up, then a layer that fuses the fields.

Codes and bags of all fields are looked up in one pass, a bag as the mean of its codes; a number
becomes :math:`x w + b` with its own vectors w and b; a vector goes through a linear layer. Missing
fields are 0 or, if they are codes, the learned vector of the missing code.

Shape legend: R rows, C single-valued fields, G bags, M numbers, F fields of all kinds, D width,
P = R (C + G) look-ups, N codes of all bags.
"""

from typing import Literal, final

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from foretaste.data.features import Features, FieldSide, FieldTable, concat_rows
from foretaste.errors import ConfigError
from foretaste.models.layers.table import Table
from foretaste.models.layers.table_kinds import TableConfig

Fusion = Literal["concat", "gate"]
"""How a row's fields become one vector: concatenated before a linear layer, or added with weights
from a softmax over the fields."""


@final
class FieldVectors(nn.Module):
    """A vector for each field of each row."""

    def __init__(
        self,
        side: FieldSide,
        *,
        embedding_dim: int,
        table: TableConfig,
        init_std: float | None = None,
    ) -> None:
        """Make untrained weights.

        Args:
            side: The fields.
            embedding_dim: D.
            table: The kind of table for the vectors of codes.
            init_std: Standard deviation of the initial weights; None: 1 / √D.

        Raises:
            ConfigError: There is no field.
        """
        super().__init__()
        if not side.num_fields:
            raise ConfigError("no field to encode: name one in the schema, or do without features")
        std = embedding_dim**-0.5 if init_std is None else init_std
        self.num_bags = len(side.bags)
        self.embedding_dim = embedding_dim
        self.codes = table.make(side.num_codes, embedding_dim) if side.num_codes else None
        if self.codes is not None:
            self.codes.draw(std=std)
            untrained_V = torch.zeros(side.num_codes, dtype=torch.bool)
            untrained_V[list(side.untaught_codes)] = True
            self.codes.zero_rows(untrained_V)
        self.number_weight_MD: nn.Parameter | None = None
        self.number_bias_MD: nn.Parameter | None = None
        if side.num_numbers:
            self.number_weight_MD = nn.Parameter(std * torch.randn(side.num_numbers, embedding_dim))
            self.number_bias_MD = nn.Parameter(torch.zeros(side.num_numbers, embedding_dim))
        self.vectors = nn.ModuleList(nn.Linear(w, embedding_dim) for w in side.vector_widths)
        for layer in self.vectors:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=std)
                nn.init.zeros_(layer.bias)

    def forward(self, table: FieldTable) -> Float[Tensor, "R F D"]:
        """Return the fields' vectors, in the order of the table."""
        present_RF = table.present_RF
        parts = [] if self.codes is None else [self._look_up(table, self.codes)]
        after = table.code_RC.shape[1] + self.num_bags
        if self.number_weight_MD is not None and self.number_bias_MD is not None:
            num_numbers = len(self.number_weight_MD)
            there_RM1 = present_RF[:, after : after + num_numbers].unsqueeze(2)
            number_RMD = table.number_RM.unsqueeze(2) * self.number_weight_MD + self.number_bias_MD
            parts.append(number_RMD * there_RM1)
            after += num_numbers
        for place, (layer, vector_RW) in enumerate(zip(self.vectors, table.vectors, strict=True)):
            there_R1 = present_RF[:, after + place].unsqueeze(1)
            parts.append((layer(vector_RW) * there_R1).unsqueeze(1))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def _look_up(self, table: FieldTable, codes: Table) -> Tensor:
        """Look up codes and the means of bags (R, C + G, D) in one pass, row by row."""
        (num_rows, num_codes), device = table.code_RC.shape, table.code_RC.device
        row_R1 = torch.arange(num_rows, device=device).unsqueeze(1)
        code_C = torch.arange(num_codes, device=device)
        starts_RG1 = table.bag_offsets_RG1 + num_codes * row_R1
        single_RC = starts_RG1[:, :1] + code_C  # a row's codes come before its bags
        bag_RG = starts_RG1[:, :-1] + num_codes
        code_N = table.code_RC.flatten()
        if self.num_bags:
            length_R = table.bag_offsets_RG1[:, -1] - table.bag_offsets_RG1[:, 0]
            before_N = (num_codes * (row_R1.squeeze(1) + 1)).repeat_interleave(length_R)
            code_N = table.bag_N.new_empty(len(table.bag_N) + code_N.numel())
            code_N[single_RC.flatten()] = table.code_RC.flatten()
            code_N[torch.arange(len(table.bag_N), device=device) + before_N] = table.bag_N
        starts_RK = torch.cat([single_RC, bag_RG], dim=1)
        looked_PD = codes.mean_bags(code_N, starts_RK.flatten())
        return looked_PD.view(*starts_RK.shape, self.embedding_dim)


@final
class FieldEncoder(nn.Module):
    r"""One vector for each row of features.

    With `concat` it is :math:`W [v_1; …; v_F] + b`. With `gate` it is :math:`\sum_f g_f v_f` with
    :math:`g = \mathrm{softmax}(W [v_1; …; v_F] + b)`, without missing fields; it is 0 if nothing is
    known.

    References:
        Arevalo et al., "Gated Multimodal Units for Information Fusion", 2017,
        https://arxiv.org/abs/1702.01992. Departures: a softmax over fields replaces a sigmoid for
        each, without tanh, so that the weights sum to 1 for any number of known fields.
    """

    def __init__(
        self, side: FieldSide, *, embedding_dim: int, fusion: Fusion, table: TableConfig
    ) -> None:
        """Make untrained weights.

        Raises:
            ConfigError: There is no field.
        """
        super().__init__()
        self.fields = FieldVectors(side, embedding_dim=embedding_dim, table=table)
        width = side.num_fields * embedding_dim
        self.mix = nn.Linear(width, embedding_dim) if fusion == "concat" else None
        self.gate = (
            nn.Linear(width, side.num_fields) if fusion == "gate" and side.num_fields > 1 else None
        )

    def forward(self, table: FieldTable) -> Float[Tensor, "R D"]:
        """Return a vector for each row."""
        field_RFD: Tensor = self.fields(table)
        if self.mix is not None:
            mixed: Tensor = self.mix(field_RFD.flatten(1))
            return mixed
        if self.gate is None:
            return (field_RFD * table.present_RF.unsqueeze(2)).sum(dim=1)
        return gated_sum(self.gate, field_RFD, table.present_RF)


def gated_sum(
    gate: nn.Linear, field_XFD: Float[Tensor, "*X F D"], says_XF: Bool[Tensor, "*X F"]
) -> Float[Tensor, "*X D"]:
    """Return the sum of known fields, weighted by a softmax of their gate logits.

    Args:
        gate: Maps the concatenated fields to a logit for each.
        field_XFD: The fields.
        says_XF: True for known fields; the sum is 0 if none is known.
    """
    silenced_XFD = field_XFD * says_XF.unsqueeze(-1)
    logit_XF: Tensor = gate(silenced_XFD.flatten(-2))
    lowest = torch.finfo(logit_XF.dtype).min
    weight_XF = logit_XF.masked_fill(~says_XF, lowest).softmax(dim=-1) * says_XF
    return torch.einsum("...f,...fd->...d", weight_XF, silenced_XFD)


@final
class KnownFields(nn.Module):
    """An encoder with its table of features. Row -1 is a user or item without known features."""

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
            other: A row for each of `row_B`, used where that is -1.
        """
        vector_BD: Tensor = self.encoder(self.rows(row_B))
        if other is None:
            return vector_BD
        other_BD: Tensor = self.encoder(other)
        return vector_BD.where((row_B >= 0).unsqueeze(1), other_BD)

    @property
    def known_R(self) -> Bool[Tensor, " R"]:
        """True for rows with a known feature."""
        return self.rows.known_R


@final
class KnownRows(nn.Module):
    """The table, and a last row without known features.

    It moves with the module but is not part of its state, because a bundle keeps features in
    separate files.
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
        """Return some rows; -1 is the row without known features."""
        return self.table().rows(row_B.where(row_B >= 0, self.num_rows))

    @property
    def known_R(self) -> Bool[Tensor, " R"]:
        """True for rows with a known feature."""
        return self.present_RF[:-1].any(dim=1)

    def table(self) -> FieldTable:
        """Return the rows; the one without features is last."""
        return FieldTable(
            code_RC=self.code_RC,
            bag_N=self.bag_N,
            bag_offsets_RG1=self.bag_offsets_RG1,
            number_RM=self.number_RM,
            vectors=tuple(self.get_buffer(f"vector_{n}") for n in range(self.num_vectors)),
            present_RF=self.present_RF,
        )


def fields_of_users(
    features: Features | None, num_users: int
) -> tuple[FieldSide, FieldTable] | None:
    """Return the features of users; None without any.

    Raises:
        ConfigError: The features belong to a different number of users.
    """
    if features is None or features.user is None or features.user_table is None:
        return None
    return features.user, _a_row_each("users", features.user_table, num_users)


def fields_of_items(
    features: Features | None, num_items: int
) -> tuple[FieldSide, FieldTable] | None:
    """Return the features of items; None without any."""
    if features is None or features.item is None or features.item_table is None:
        return None
    return features.item, _a_row_each("items", features.item_table, num_items)


def known_fields(
    given: tuple[FieldSide, FieldTable] | None,
    *,
    embedding_dim: int,
    fusion: Fusion,
    table: TableConfig,
) -> KnownFields | None:
    """Create the encoder for the features of users or of items; None if there are none."""
    if given is None:
        return None
    return KnownFields(*given, embedding_dim=embedding_dim, fusion=fusion, table=table)


def _a_row_each(what: str, table: FieldTable, num_rows: int) -> FieldTable:
    if len(table) != num_rows:
        raise ConfigError(
            f"there are features of {len(table)} {what} for {num_rows} of them: fit the features "
            "to the events that the model learns from",
            name="features",
            value=len(table),
        )
    return table

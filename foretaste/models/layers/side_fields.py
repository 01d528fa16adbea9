"""One side of a row (user, item or context): the id, if it has one, and the features.

Ids and the codes of single-valued fields have separate tables. Bags, numbers and vectors are
computed row by row; a gate may combine a side's id and its vectors into one field.

Shape legend: R rows, X any shape of rows, S single-valued fields including the id, O other fields,
V vectors among them, F fields, N 1 if the side has an id, else 0, W width.
"""

from typing import ClassVar, Literal, NamedTuple, final

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from pydantic import Field
from torch import Tensor, nn

from foretaste.config import ChoiceConfig, Count, Positive, RangeConfig, Space, Usual, Weight
from foretaste.data.features import Features, FieldSide, FieldTable
from foretaste.errors import ConfigError
from foretaste.models.layers.embedding import (
    FieldVectors,
    Fusion,
    KnownRows,
    fields_of_items,
    fields_of_users,
    gated_sum,
)
from foretaste.models.layers.table import Table
from foretaste.models.layers.table_kinds import IdConfig

L2Of = Literal["rows", "mini_batch_aware"]

_BLOCK_ROWS = 2**14


ROWS_USUAL = Usual(
    objective={"kind": "rows"},
    training={"batch_events": 1024, "learning_rate": 5e-3},
)
"""Each row has additional drawn items, so 1024 events are many rows. Five times the usual learning
rate is faster and better on MovieLens-100K and Frappe."""


class RowFieldsConfig(IdConfig):
    """Settings of the fields that a ranker reads."""

    tuning: ClassVar[Space] = {
        "embedding_dim": ChoiceConfig(choices=(8, 16, 32)),
        "dropout": RangeConfig(low=0.0, high=0.5),
        "l2": RangeConfig(low=1e-07, high=0.001, log=True),
    }
    usual: ClassVar[Usual] = ROWS_USUAL
    embedding_dim: Count = 16
    """Width of each field's vector."""
    user_id: bool = True
    """Whether each user has a vector. There is none if each row is its own user."""
    item_id: bool = True
    """Whether each item has a vector."""
    user_features: bool = True
    """Whether the features of users are read, if there are any."""
    item_features: bool = True
    """Whether the features of items are read, if there are any."""
    context_features: bool = True
    """Whether the features of the context are read, if there are any."""
    fusion: Fusion = "concat"
    """How vectors of texts or images are combined: with "concat", each is a separate field; with
    "gate", a gate combines them and the id into one field."""
    id_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of training rows whose id is hidden if there is other information, so that the features
    alone learn to predict."""
    init_std: Positive = 0.05
    """Standard deviation of the initial vectors."""
    l2: Weight = 0.0
    """Weight of the penalty on half the squared length of the vectors of ids and single values that
    a batch uses."""
    l2_of: L2Of = "rows"
    """"rows": the penalty is a mean over the batch's rows of all vectors that they use.
    "mini_batch_aware": each vector counts once per batch, divided by the number of training rows
    that use it, so that rare and frequent vectors get the same penalty in an epoch."""


@final
class UsedRowsL2(nn.Module):
    r"""An l2 penalty on the rows of a table that a batch uses.

    .. math:: \frac{\lambda}{2} \sum_v w_v \lVert e_v \rVert^2

    "rows": w is the number of uses of row v in the batch, divided by the number of the batch's
    rows. "mini_batch_aware": w is 1 divided by the number of training rows that use v: Zhou et al.,
    "Deep Interest Network for Click-Through Rate Prediction", KDD 2018, equation 6. **Departure**:
    a row that reads an item only in a history does not count as using it. Row -1 has no id and adds
    nothing.

    Shape legend: V rows of the table, N uses in a batch.
    """

    times_V: Tensor
    """Number of training rows that use each row of the table; empty if it is not needed."""

    def __init__(self, l2: float, of: L2Of) -> None:
        super().__init__()
        self.weight, self.of = l2, of
        counts_rows_once = l2 and of == "mini_batch_aware"
        self.needs_whole_batch = ("model.l2_of" if counts_rows_once else "", of)
        self.register_buffer("times_V", torch.zeros(0), persistent=False)

    def count(
        self, code_RS: Int64[Tensor, "_ _"], times_R: Int64[Tensor, " _"], *, num_rows: int
    ) -> None:
        """Count the training rows of each row of the table.

        Args:
            code_RS: Codes of users, items or contexts, -1 for none.
            times_R: Number of training rows with each.
            num_rows: V.
        """
        if self.weight and self.of == "mini_batch_aware":
            times_RS = times_R.unsqueeze(1).expand_as(code_RS)
            code_N, times_N = code_RS.flatten().cpu(), times_RS.flatten().float()
            times_V = torch.zeros(num_rows + 1).index_add_(0, code_N + 1, times_N)[1:]
            self.times_V = times_V.to(self.times_V.device)

    def forward(self, code_N: Int64[Tensor, " N"], table: Table, *, num_rows: int) -> Tensor:
        """Return the penalty of a batch of `num_rows` rows that uses `code_N`."""
        used_V, times_V = code_N[code_N >= 0].unique(return_counts=True)
        if self.of == "mini_batch_aware":
            factor_V = self.times_V[used_V].clamp(min=1).reciprocal()
        else:
            factor_V = times_V / num_rows
        square_V: Tensor = table(used_V).square().sum(dim=1)
        return self.weight / 2 * (factor_V @ square_V)


@final
class SideFields(nn.Module):
    """Codes of the id and single-valued fields, if any, and vectors of the others.

    Rows are given by number; -1 is a row with nothing known except `other`.
    """

    def __init__(
        self,
        given: tuple[FieldSide, FieldTable | None] | None,
        *,
        num_rows: int,
        has_id: bool,
        config: RowFieldsConfig,
        width: int,
    ) -> None:
        """Create all untrained weights except those of the tables.

        Args:
            given: The features, and the encoded rows of all users or items (None for the context,
                which has no such rows); None if no features are read.
            num_rows: Number of users or items; 0 for the context.
            has_id: Whether each row has its own vector.
            config: The settings.
            width: W.
        """
        super().__init__()
        side, table = (FieldSide(), None) if given is None else given
        others = FieldSide(bags=side.bags, numbers=side.numbers, vectors=side.vectors)
        self.has_id, self.has_features, self.width = has_id, given is not None, width
        self.num_ids = num_rows if has_id else 0
        self.num_codes = side.num_codes - others.num_codes
        self.num_singles, self.num_others = len(side.codes), others.num_fields
        self.num_vectors = len(side.vectors)
        self.untrained_V = torch.zeros(self.num_codes, dtype=torch.bool)
        self.untrained_V[[code for code in side.untaught_codes if code < self.num_codes]] = True
        self.id_table: Table | None = None
        self.code_table: Table | None = None
        self.id_l2, self.code_l2 = (UsedRowsL2(config.l2, config.l2_of) for _ in range(2))
        self.others = (
            FieldVectors(others, embedding_dim=width, table=config.table, init_std=config.init_std)
            if others.num_fields
            else None
        )
        gates = config.fusion == "gate" and self.num_vectors
        num_gated = self.num_vectors + self.has_id if gates else 0
        self.gate = nn.Linear(num_gated * width, num_gated) if num_gated > 1 else None
        self.known = KnownRows(side, side.unknown(num_rows) if table is None else table)
        self._kept_RX: Tensor | None = None

    @property
    def num_fields(self) -> int:
        """F."""
        num_fields = self.has_id + self.num_singles + self.num_others
        return num_fields if self.gate is None else num_fields + 1 - self.num_vectors - self.has_id

    def take_tables(self, id_table: Table, code_table: Table) -> None:
        """Set the tables of ids and of codes, if there are any."""
        if self.has_id:
            self.id_table = id_table
        if self.num_singles:
            self.code_table = code_table
            code_table.zero_rows(self.untrained_V)

    def codes(
        self,
        row_X: Int64[Tensor, "*X"],
        taught_R: Bool[Tensor, " R"] | None = None,
        other: FieldTable | None = None,
        *,
        dropped_X: Bool[Tensor, "*X"] | None = None,
    ) -> Int64[Tensor, "*X S"]:
        """Return the codes of rows; the id comes first.

        Args:
            row_X: The rows.
            taught_R: True for rows with a trained id; None: all. The others have the id -1.
            other: Given features of rows that are -1.
            dropped_X: True for rows to read without their id.
        """
        if not self.has_id:
            return self._single_codes(row_X, other)
        has_id_X = row_X >= 0
        if taught_R is not None and len(taught_R):
            has_id_X &= taught_R[row_X]
        if dropped_X is not None:
            has_id_X &= ~dropped_X
        id_X1 = row_X.where(has_id_X, -1).unsqueeze(-1)
        if not self.num_singles:
            return id_X1
        return torch.cat([id_X1, self._single_codes(row_X, other)], dim=-1)

    def look_up(self, code_XS: Int64[Tensor, "*X S"]) -> Float[Tensor, "*X S W"]:
        """Return the vectors of codes from `codes`."""
        looked = [table(part_X) for table, part_X, _ in self._by_table(code_XS)]
        if not looked:
            return torch.empty(*code_XS.shape, self.width, device=code_XS.device)
        return looked[0] if len(looked) == 1 else torch.cat(looked, dim=-2)

    def count(self, code_RS: Int64[Tensor, "R S"], times_R: Int64[Tensor, " R"]) -> None:
        """Count the training rows of each id and each code."""
        for table, part_R, l2 in self._by_table(code_RS):
            l2.count(part_R, times_R, num_rows=table.num_rows)

    def penalty(self, code_NS: Int64[Tensor, "N S"], *, num_rows: int) -> list[Tensor]:
        """Return the penalty of the ids and codes that a batch uses."""
        return [
            l2(part_N.flatten(), table, num_rows=num_rows)
            for table, part_N, l2 in self._by_table(code_NS)
        ]

    def _by_table(self, code_XS: Tensor) -> list[tuple[Table, Tensor, UsedRowsL2]]:
        id_X, single_X = code_XS[..., : self.has_id], code_XS[..., self.has_id :]
        both = (self.id_table, id_X, self.id_l2), (self.code_table, single_X, self.code_l2)
        return [(table, part_X, l2) for table, part_X, l2 in both if table is not None]

    def vectors(
        self, row_R: Int64[Tensor, " R"], other: FieldTable | None = None
    ) -> Float[Tensor, "R O W"]:
        """Return the fields that are not single-valued."""
        if self.others is None:
            return torch.empty(len(row_R), 0, self.width, device=row_R.device)
        if other is not None and (row_R < 0).all():
            return self._encode(other)
        own_ROW = self._encode(self.known(row_R))
        if other is None:
            return own_ROW
        return own_ROW.where((row_R >= 0)[:, None, None], self._encode(other))

    def shared_vectors(self, row_R: Int64[Tensor, " R"]) -> Float[Tensor, "R O W"]:
        """Return the same as `vectors`, but compute each distinct row once.

        In evaluation mode, all rows are computed and kept.
        """
        if not self.num_others:
            return torch.empty(len(row_R), 0, self.width, device=row_R.device)
        row_R = row_R.where(row_R >= 0, self.known.num_rows)
        if self.training:
            needed_R, row_R = row_R.unique(return_inverse=True)
            table_RX = self._worked_out(needed_R)
        else:
            table_RX = self._kept()
        return F.embedding(row_R, table_RX).view(len(row_R), self.num_others, self.width)

    def train(self, mode: bool = True) -> "SideFields":  # noqa: FBT001, FBT002 - torch's signature
        """Set the mode, and clear values computed from earlier weights."""
        self._kept_RX = None
        super().train(mode)
        return self

    def joined(
        self,
        row_X: Int64[Tensor, "*X"],
        other: FieldTable | None,
        *,
        single_XSW: Float[Tensor, "*X S W"],
        vector_XOW: Float[Tensor, "*X O W"],
        has_id_XN: Bool[Tensor, "*X N"],
    ) -> Float[Tensor, "*X F W"]:
        """Return all fields; with a gate, the first combines the id and the vectors."""
        field_XFW = side_by_side(single_XSW, vector_XOW)
        if self.gate is None:
            return field_XFW
        num_ids, num_rest = has_id_XN.shape[-1], field_XFW.shape[-2] - self.num_vectors
        gated_XVW = side_by_side(field_XFW[..., :num_ids, :], field_XFW[..., num_rest:, :])
        says_XV = torch.cat([has_id_XN, self._says_vectors(row_X, other)], dim=-1)
        one_XW = gated_sum(self.gate, gated_XVW, says_XV)
        return torch.cat([one_XW.unsqueeze(-2), field_XFW[..., num_ids:num_rest, :]], dim=-2)

    def _single_codes(
        self, row_X: Int64[Tensor, "*X"], other: FieldTable | None
    ) -> Int64[Tensor, "*X S"]:
        if not self.num_singles:
            return row_X.new_empty(*row_X.shape, 0)
        own_XS = self.known.code_RC[row_X]
        if other is not None:
            own_XS = own_XS.where((row_X >= 0).unsqueeze(-1), other.code_RC)
        return own_XS

    def _worked_out(self, row_R: Tensor) -> Float[Tensor, "R X"]:
        return self.vectors(row_R.where(row_R < self.known.num_rows, -1)).flatten(1)

    def _kept(self) -> Float[Tensor, "R X"]:
        if self._kept_RX is None:
            with torch.inference_mode(mode=False), torch.no_grad():
                row_R = torch.arange(self.known.num_rows + 1, device=self.known.code_RC.device)
                blocks = [self._worked_out(some_R) for some_R in row_R.split(_BLOCK_ROWS)]
                self._kept_RX = torch.cat(blocks)
        return self._kept_RX

    def _says_vectors(self, row_X: Tensor, other: FieldTable | None) -> Bool[Tensor, "*X V"]:
        first = self.known.present_RF.shape[1] - self.num_vectors
        own_XV = self.known.present_RF[:, first:][row_X]
        if other is None:
            return own_XV
        return own_XV.where((row_X >= 0).unsqueeze(-1), other.present_RF[:, first:])

    def _encode(self, table: FieldTable) -> Float[Tensor, "R O W"]:
        if self.others is None:
            return torch.empty(len(table), 0, self.width, device=table.code_RC.device)
        other_ROW: Tensor = self.others(
            FieldTable(
                code_RC=table.code_RC[:, :0],
                bag_N=table.bag_N - self.num_codes,
                bag_offsets_RG1=table.bag_offsets_RG1,
                number_RM=table.number_RM,
                vectors=table.vectors,
                present_RF=table.present_RF[:, self.num_singles :],
            )
        )
        return other_ROW


class RowSides(NamedTuple):
    """The three sides; each may have no fields."""

    user: SideFields
    item: SideFields
    context: SideFields


def sides_of_rows(
    config: RowFieldsConfig,
    *,
    num_users: int,
    num_items: int,
    features: Features | None,
    width: int,
) -> RowSides:
    """Make the sides and their tables.

    Raises:
        ConfigError: Items have neither ids nor features, there are no fields at all, or features
            belong to a different number of users or items.
    """
    users = fields_of_users(features if config.user_features else None, num_users)
    items = fields_of_items(features if config.item_features else None, num_items)
    moments = _fields_of_contexts(features if config.context_features else None)
    made = [
        SideFields(given, num_rows=num_rows, has_id=has_id, config=config, width=width)
        for given, num_rows, has_id in (
            (users, num_users, config.user_id),
            (items, num_items, config.item_id),
            (moments, 0, False),
        )
    ]
    user, item, context = made
    if not item.num_fields and num_items > 1:
        raise ConfigError(
            "items have neither ids nor features: set model.item_id, or give features of items",
            name="item_id",
            value=False,
        )
    if not any(side.num_fields for side in made):
        raise ConfigError(
            "rows have neither ids nor features: give features of users or of the context"
        )
    sizes = [1, *(side.num_ids for side in made), *(side.num_codes for side in made)]
    tables = config.table.make_several(sizes, width, std=config.init_std)[1:]  # as drawn
    for side, ids, codes in zip(made, tables[:3], tables[3:], strict=True):
        side.take_tables(ids, codes)
    return RowSides(user, item, context)


def _fields_of_contexts(features: Features | None) -> tuple[FieldSide, None] | None:
    return None if features is None or features.context is None else (features.context, None)


def side_by_side(
    first_XFW: Float[Tensor, "*X _ W"], second_XFW: Float[Tensor, "*X _ W"]
) -> Float[Tensor, "*X _ W"]:
    """Concatenate fields, without a copy if one side has none."""
    if second_XFW.shape[-2] == 0:
        return first_XFW
    return torch.cat([first_XFW, second_XFW], dim=-2) if first_XFW.shape[-2] else second_XFW

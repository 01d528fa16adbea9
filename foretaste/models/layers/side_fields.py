"""One side of a row: its user, its item, or the moment; the id, if it has one, and the features.

The id and single-valued fields are only turned into codes here: all sides share one table of them.
Bags, numbers and vectors are worked out here, and the gate stands here that makes one field of a
side's id and its vectors.

Shape legend: R rows, X any shape of rows, S single-valued fields, the id among them, O other
fields, V vectors among them, F fields, N 1 where the side has an id, else 0, W width.
"""

from typing import final

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from foretaste.data.features import FieldSide, FieldTable
from foretaste.models.layers.embedding import FieldVectors, Fusion, gated_sum
from foretaste.models.layers.known_fields import KnownRows

_BLOCK_ROWS = 2**14


@final
class SideFields(nn.Module):
    """Codes of the id and single-valued fields, and vectors of the others; there may be none.

    Rows are asked for by number; -1 is a row of which nothing is known, or only what `other` says.
    """

    def __init__(
        self,
        told: tuple[FieldSide, FieldTable | None] | None,
        *,
        num_rows: int,
        first_id: int | None,
        first_code: int,
        width: int,
        init_std: float,
        fusion: Fusion,
    ) -> None:
        """Make untrained weights.

        Args:
            told: The features, and the encoded rows of all users or items, None of the moment,
                which has none; None where no features are read.
            num_rows: Users or items; 0 of the moment.
            first_id: Where ids begin in the table that all sides share; None: there are none.
            first_code: Where the codes of features begin in it.
            width: W.
            init_std: Spread of the first weights.
            fusion: How vectors join.
        """
        super().__init__()
        side, table = (FieldSide(), None) if told is None else told
        others = FieldSide(bags=side.bags, numbers=side.numbers, vectors=side.vectors)
        self.has_id, self.has_features = first_id is not None, told is not None
        self.first_id, self.first_code, self.width = first_id, first_code, width
        self._ids = slice(first_id, first_id + num_rows) if first_id is not None else slice(0)
        self.num_codes = side.num_codes - others.num_codes
        self.num_singles, self.num_others = len(side.codes), others.num_fields
        self.num_vectors = len(side.vectors)
        self.untaught_codes = [
            first_code + code for code in side.untaught_codes if code < self.num_codes
        ]
        self.others = (
            FieldVectors(others, embedding_dim=width, init_std=init_std)
            if others.num_fields
            else None
        )
        num_gated = self.num_vectors + self.has_id if fusion == "gate" and self.num_vectors else 0
        self.gate = nn.Linear(num_gated * width, num_gated) if num_gated > 1 else None
        self.known = KnownRows(side, side.unknown(num_rows) if table is None else table)
        self._kept_RX: Tensor | None = None

    @property
    def num_fields(self) -> int:
        """F."""
        num_fields = self.has_id + self.num_singles + self.num_others
        return num_fields if self.gate is None else num_fields + 1 - self.num_vectors - self.has_id

    def codes(
        self,
        row_X: Int64[Tensor, "*X"],
        taught_R: Bool[Tensor, " R"] | None = None,
        other: FieldTable | None = None,
        *,
        dropped_X: Bool[Tensor, "*X"] | None = None,
    ) -> Int64[Tensor, "*X S"]:
        """Return the codes of rows, the id's first.

        Args:
            row_X: The rows.
            taught_R: Whose id was learned, None: everybody's; the others' is 0, nobody's.
            other: What is told of rows that are -1.
            dropped_X: Which are told without their id.
        """
        if self.first_id is None:
            return self._single_codes(row_X, other)
        has_id_X = row_X >= 0
        if taught_R is not None and len(taught_R):
            has_id_X &= taught_R[row_X]
        if dropped_X is not None:
            has_id_X &= ~dropped_X
        id_X1 = (row_X + self.first_id).where(has_id_X, 0).unsqueeze(-1)
        if not self.num_singles:
            return id_X1
        return torch.cat([id_X1, self._single_codes(row_X, other)], dim=-1)

    def ids_of(self, table_VW: Float[Tensor, "V W"]) -> Float[Tensor, "_ W"]:
        """Return the part of the shared table that holds ids; no row where there are none."""
        return table_VW[self._ids]

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
        """Return what `vectors` does, each row worked out once however often it is asked for.

        In evaluation mode all rows are worked out, and kept.
        """
        if not self.num_others:
            return torch.empty(len(row_R), 0, self.width, device=row_R.device)
        row_R = row_R.where(row_R >= 0, self.known.num_rows)
        if self.training:
            is_needed = torch.zeros_like(self.known.present_RF[:, 0])
            is_needed[row_R] = True
            table_RX = self._worked_out(is_needed.nonzero().squeeze(1))
            row_R = (is_needed.cumsum(0) - 1)[row_R]
        else:
            table_RX = self._kept()
        return F.embedding(row_R, table_RX).view(len(row_R), self.num_others, self.width)

    def train(self, mode: bool = True) -> "SideFields":  # noqa: FBT001, FBT002 - torch's signature
        """Forget what was worked out from other weights."""
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
        """Return all fields; behind a gate the id and the vectors are one, the first."""
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
        return own_XS + self.first_code

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


def side_by_side(
    first_XFW: Float[Tensor, "*X _ W"], second_XFW: Float[Tensor, "*X _ W"]
) -> Float[Tensor, "*X _ W"]:
    """Put fields behind one another, without a copy where one side has none."""
    if second_XFW.shape[-2] == 0:
        return first_XFW
    return torch.cat([first_XFW, second_XFW], dim=-2) if first_XFW.shape[-2] else second_XFW

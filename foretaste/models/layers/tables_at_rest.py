"""Kinds of tables that are made from a trained one: fewer bits per number, or fewer rows.

They cannot be trained. A bundle has their settings like those of trainable kinds.

Shape legend: R rows of a table, N requested rows, D width, K kept rows.
"""

import math
from collections.abc import Sequence
from typing import Annotated, Literal, final

import numpy as np
import torch
from jaxtyping import Float, Int64
from pydantic import Field, model_validator
from torch import Tensor, nn

from foretaste.config import Count
from foretaste.errors import ConfigError
from foretaste.later import later
from foretaste.models.layers.table import Dense, FindLinks, Table, TableKind
from foretaste.models.layers.tables import Filled, FilledConfig, finite_blocks, principal_directions

sparse = later("scipy.sparse")

_LINKED_ROWS = 4096
_HIDDEN = 6
_SHARES = (1.0, 0.9, 0.8, 0.7, 0.6)
_LOWEST, _HIGHEST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float16).max


class AtRestConfig(FilledConfig):
    """Settings of tables that cannot be trained."""

    @property
    def trains(self) -> bool:
        """Whether its tables can be trained: they cannot."""
        return False


class HalfConfig(AtRestConfig):
    """Settings of rows with 16 bits per number."""

    kind: Literal["half"] = "half"
    """"half": 16 bits per number, made from a trained table."""
    format: Literal["fp16", "bf16"] = "fp16"
    """fp16 has finer steps, bf16 has the range of fp32."""

    @classmethod
    def tried(cls, width: int) -> Sequence[TableKind]:
        """Return the settings of the finer format."""
        return (cls(),)

    def make_smaller(self, num_rows: int, width: int) -> Table:
        """Make an empty table."""
        dtype = torch.float16 if self.format == "fp16" else torch.bfloat16
        return Half(num_rows, width, dtype=dtype)


class IntegerConfig(AtRestConfig):
    """Settings of rows of small whole numbers with one scale per row."""

    kind: Literal["int8", "int4"] = "int8"
    """"int8" and "int4": whole numbers of 8 or 4 bits and one scale per row, made from a trained
    table."""
    width: Count | None = None
    """Numbers per row: coordinates along this many principal directions of the table. None keeps
    all."""
    scale_bits: Literal[6, 16] = 16
    """Bits of a row's scale. 6 bits, only for int4, select one of 64 scales of the table and are
    stored in the lowest bits of the last six numbers, so that a row needs no further bytes; rows of
    fewer than 12 numbers use 16 bits."""

    @model_validator(mode="after")
    def _only_int4_hides(self) -> "IntegerConfig":
        if self.kind == "int8" and self.scale_bits == 6:
            raise ValueError("scale_bits is 6, but kind is int8: 6 is of int4 alone")
        return self

    @classmethod
    def tried(cls, width: int) -> Sequence[TableKind]:
        """Return the settings of both, and of int4 without bytes for scales."""
        return (cls(), cls(kind="int4"), cls(kind="int4", scale_bits=6))

    @classmethod
    def anchor(cls, times: float, width: int) -> TableKind:
        """Return int8 of the width with this many bytes: one per number, and two for the scale."""
        whole = min(width, max(1, round(4 * width / times) - 2))
        return cls(width=whole if whole < width else None)

    def make_smaller(self, num_rows: int, width: int) -> Table:
        """Make an empty table."""
        inner = width if self.width is None else min(self.width, width)
        hidden = 0 if self.scale_bits == 16 or inner < 2 * _HIDDEN else _HIDDEN
        bits: Literal[4, 8] = 8 if self.kind == "int8" else 4
        return Integers(num_rows, width, bits=bits, inner=inner, hidden=hidden)


class PrunedConfig(AtRestConfig):
    """Settings of a table whose shortest rows are dropped."""

    kind: Literal["pruned"] = "pruned"
    """"pruned": the shortest rows of a trained table are dropped, and other rows replace them."""
    keep: Annotated[float, Field(gt=0, lt=1)] = 0.125
    """Share of the rows that are kept."""
    instead: Literal["mean", "neighbours", "features"] = "mean"
    """The replacement of a dropped row: the mean of all dropped rows, or the kept row that shares
    the most events ("neighbours") or features with it; the mean if none does."""

    @classmethod
    def tried(cls, width: int) -> Sequence[TableKind]:
        """Return settings that keep a half, a quarter and an eighth of the rows."""
        return [cls(keep=keep) for keep in (0.5, 0.25, 0.125)]

    def make_smaller(self, num_rows: int, width: int) -> Table:
        """Make an empty table."""
        return Pruned(num_rows, width, kept=max(1, round(self.keep * num_rows)))

    def fill(self, made: Filled, table: Table, links: FindLinks) -> None:
        """Keep the longest rows, and choose replacements of the others."""
        made.fill(table)
        found = None if self.instead == "mean" else links(self.instead)
        if found is not None and isinstance(made, Pruned):
            made.answer_by(*found)


class AtRest(Filled):
    """Rows that cannot be trained."""

    trains = False

    def draw(self, *, std: float) -> None:
        """Do nothing, because the rows are those of a trained table."""

    def grow(self, num_rows: int) -> None:
        raise ConfigError(
            f"a table of {type(self).__name__} is made from a trained table and cannot grow: grow "
            "the trained table, and compress it",
            name="table.kind",
            value=type(self).__name__,
        )


@final
class Half(AtRest):
    """Rows with 16 bits per number."""

    weight: Tensor

    def __init__(self, num_rows: int, width: int, *, dtype: torch.dtype) -> None:
        super().__init__(num_rows, width)
        self.register_buffer("weight", torch.zeros(num_rows, width, dtype=dtype))

    def rows(self, row_N: Int64[Tensor, " N"]) -> Float[Tensor, "N D"]:
        return _none_is_0(self.weight[row_N.clamp(min=0)].float(), row_N)

    def damage(self) -> str:
        if self.weight.dtype not in (torch.float16, torch.bfloat16):
            return f"rows are {self.weight.dtype}"
        return "" if self.weight.isfinite().all() else "a row is not finite"

    def fill(self, table: Table) -> None:
        for first, block_RD in finite_blocks(table):
            limit = torch.finfo(self.weight.dtype).max
            self.weight[first : first + len(block_RD)] = block_RD.clamp(-limit, limit)


@final
class Integers(AtRest):
    r"""Rows with b bits per number, :math:`e_r = s_r q_r`; a byte holds two 4-bit numbers plus 8.

    The scale :math:`s_r` is :math:`\max_d |e_{rd}| / (2^{b-1} - 1)`, in 16 bits; with 4 bits, it is
    the one of .6 to 1 times this with the smallest squared error, and larger numbers are clipped. A
    hidden scale is the nearest of 64 scales in equal ratios; its index is in the lowest bits of the
    last six numbers, which are read as even.
    """

    weight: Tensor
    scale_R: Tensor
    """The scales, if they are not hidden."""
    scale_S: Tensor
    """The 64 scales, if they are hidden."""
    direction_dD: Tensor | None

    def __init__(
        self, num_rows: int, width: int, *, bits: Literal[4, 8], inner: int, hidden: int
    ) -> None:
        super().__init__(num_rows, width)
        self.inner, self.bits, self.most, self.hidden = inner, bits, 2 ** (bits - 1) - 1, hidden
        kept, dtype = (inner, torch.int8) if bits == 8 else ((inner + 1) // 2, torch.uint8)
        self.register_buffer("weight", torch.zeros(num_rows, kept, dtype=dtype))
        scale_R = None if hidden else torch.zeros(num_rows, dtype=torch.float16)
        self.register_buffer("scale_R", scale_R)
        self.register_buffer("scale_S", torch.zeros(2**hidden) if hidden else None)
        directions = torch.zeros(inner, width) if inner < width else None
        self.register_buffer("direction_dD", directions)

    def rows(self, row_N: Int64[Tensor, " N"]) -> Float[Tensor, "N D"]:
        place_N = row_N.clamp(min=0)
        whole_Nd = self.weight[place_N]
        if self.bits == 4:
            pair_Nd2 = torch.stack([whole_Nd & 15, whole_Nd >> 4], dim=2).flatten(1)
            whole_Nd = pair_Nd2[:, : self.inner].to(torch.int8) - 8
        if self.hidden:
            bit_Nh = whole_Nd[:, -self.hidden :] & 1
            whole_Nd[:, -self.hidden :] -= bit_Nh
            scale_N = self.scale_S[(bit_Nh * self._powers).sum(dim=1)]
        else:
            scale_N = self.scale_R[place_N].float()
        found_ND = whole_Nd.float() * scale_N.unsqueeze(1)
        if self.direction_dD is not None:
            found_ND = found_ND @ self.direction_dD
        return _none_is_0(found_ND, row_N)

    @property
    def _powers(self) -> Tensor:
        return 2 ** torch.arange(self.hidden, device=self.weight.device)

    def damage(self) -> str:
        if self.weight.dtype != (torch.int8 if self.bits == 8 else torch.uint8):
            return f"rows are {self.weight.dtype}"
        scales = self.scale_S if self.hidden else self.scale_R
        if not (scales.isfinite() & (scales >= 0)).all():
            return "a row's scale is negative or not finite"
        broken = self.direction_dD is not None and not self.direction_dD.isfinite().all()
        return "a direction is not finite" if broken else ""

    def fill(self, table: Table) -> None:
        if self.direction_dD is not None:
            self.direction_dD.copy_(principal_directions(table, self.inner))
        blocks = finite_blocks(table)
        if self.hidden:
            self._spread_scales(
                torch.cat([self._largest(self._turned(each)) for _, each in blocks])
            )
        for first, block_RD in blocks:
            self._code(slice(first, first + len(block_RD)), self._turned(block_RD))

    def _turned(self, block_RD: Tensor) -> Tensor:
        turned_Rd: Tensor = (
            block_RD if self.direction_dD is None else block_RD @ self.direction_dD.T
        )
        return turned_Rd

    def _largest(self, block_Rd: Tensor) -> Tensor:
        largest_R: Tensor = block_Rd.abs().amax(dim=1) / self.most
        return largest_R.clamp(max=_HIGHEST)

    def _spread_scales(self, scale_R: Tensor) -> None:
        used_R = scale_R[scale_R > _LOWEST]
        if len(used_R):
            lowest, highest = math.log(used_R.min() * _SHARES[-1]), math.log(used_R.max())
            self.scale_S.copy_(torch.linspace(lowest, highest, 2**self.hidden).exp())

    def _code(self, rows: slice, block_Rd: Tensor) -> None:
        """Write rows, each with the scale of the smallest error."""
        best_R = self._largest(block_Rd)
        least_R, whole_Rd = torch.full_like(best_R, torch.inf), torch.zeros_like(block_Rd)
        for scale_R in [share * best_R for share in (_SHARES if self.bits == 4 else (1.0,))]:
            scale_R = self._kept(scale_R)
            tried_Rd = self._rounded(block_Rd / scale_R.clamp(min=_LOWEST).unsqueeze(1))
            error_R = (tried_Rd * scale_R.unsqueeze(1) - block_Rd).square().sum(dim=1)
            better_R = error_R < least_R
            least_R[better_R], best_R[better_R] = error_R[better_R], scale_R[better_R]
            whole_Rd[better_R] = tried_Rd[better_R]
        code_Rd = whole_Rd.to(torch.int8)
        if self.hidden:
            place_R = torch.searchsorted(self.scale_S, best_R)
            code_Rd[:, -self.hidden :] += (place_R.unsqueeze(1) // self._powers % 2).to(torch.int8)
        else:
            self.scale_R[rows] = best_R
        if self.bits == 4:
            even_Rd = nn.functional.pad((code_Rd + 8).to(torch.uint8), (0, self.inner % 2))
            code_Rd = even_Rd[:, ::2] | even_Rd[:, 1::2] << 4
        self.weight[rows] = code_Rd

    def _kept(self, scale_R: Tensor) -> Tensor:
        """Return scales in their stored precision."""
        if not self.hidden:
            return scale_R.half().float()
        middle_S = (self.scale_S[1:] * self.scale_S[:-1]).sqrt()
        nearest_R: Tensor = self.scale_S[torch.searchsorted(middle_S, scale_R)]
        return nearest_R

    def _rounded(self, number_Rd: Tensor) -> Tensor:
        """Return the nearest representable whole numbers, even ones where a bit is hidden."""
        whole_Rd = number_Rd.round().clamp(-self.most, self.most)
        if self.hidden:
            even_Rh = (number_Rd[:, -self.hidden :] / 2).round() * 2
            whole_Rd[:, -self.hidden :] = even_Rh.clamp(-self.most - 1, self.most - 1)
        return whole_Rd


@final
class Pruned(AtRest):
    """The longest rows; the others are replaced by their mean or by a kept row."""

    place_R: Tensor

    def __init__(self, num_rows: int, width: int, *, kept: int) -> None:
        super().__init__(num_rows, width)
        self.kept = Dense(kept + 1, width)
        self.kept.requires_grad_(requires_grad=False)
        self.register_buffer("place_R", torch.zeros(num_rows, dtype=torch.int32))

    def rows(self, row_N: Int64[Tensor, " N"]) -> Float[Tensor, "N D"]:
        place_N = self.place_R[row_N.clamp(min=0)].long()
        found_ND: Tensor = self.kept(place_N.masked_fill(row_N < 0, -1))
        return found_ND

    def damage(self) -> str:
        lowest, highest = self.place_R.aminmax()
        if self.place_R.dtype != torch.int32 or lowest < 0 or highest >= self.kept.num_rows:
            return f"a row has position {int(highest)} of {self.kept.num_rows}"
        return "" if self.kept.weight.isfinite().all() else "a row is not finite"

    @torch.no_grad()
    def fill(self, table: Table) -> None:
        num = self.kept.num_rows - 1
        length_R = torch.cat([block_RD.norm(dim=1) for _, block_RD in finite_blocks(table)])
        kept_K = length_R.topk(num).indices.sort().values
        self.place_R.fill_(num)
        self.place_R[kept_K] = torch.arange(num, dtype=torch.int32, device=kept_K.device)
        total_D, place_R = torch.zeros(self.width, dtype=torch.float64), self.place_R.long()
        for first, block_RD in table.blocks():
            here_R = place_R[first : first + len(block_RD)]
            self.kept.weight[here_R] = block_RD
            total_D += block_RD[here_R == num].sum(dim=0, dtype=torch.float64).cpu()
        self.kept.weight[num] = total_D / max(1, self.num_rows - num)

    @torch.no_grad()
    def answer_by(self, row_N: Int64[Tensor, " N"], has_N: Int64[Tensor, " N"]) -> None:
        """Replace each dropped row by the kept row with the most in common, by cosine.

        Args:
            row_N: Rows, with repetitions.
            has_N: The link of each.
        """
        num, place_R = self.kept.num_rows - 1, self.place_R.numpy()
        shape = (self.num_rows, 1 + int(has_N.max()) if len(has_N) else 1)
        ones = np.ones(len(row_N), np.float32)
        has_RA = sparse.csr_array((ones, (row_N.numpy(), has_N.numpy())), shape=shape)
        has_RA.data[:] = 1.0  # however often
        length_R = np.sqrt(np.maximum(1.0, has_RA.sum(axis=1)))
        has_RA = (sparse.diags_array(1 / length_R) @ has_RA).tocsr()
        dropped_R = np.flatnonzero(place_R == num)
        has_AK = has_RA[np.flatnonzero(place_R < num)].T.tocsr()
        for first in range(0, len(dropped_R), _LINKED_ROWS):
            row_B = dropped_R[first : first + _LINKED_ROWS]
            common = (has_RA[row_B] @ has_AK).tocoo()
            order = np.lexsort((common.col, -common.data, common.row))
            found_F, at = np.unique(common.row[order], return_index=True)
            place_R[row_B[found_F]] = common.col[order][at]


def _none_is_0(found_ND: Tensor, row_N: Tensor) -> Tensor:
    return found_ND.masked_fill_((row_N < 0).unsqueeze(1), 0.0)

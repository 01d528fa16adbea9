"""All kinds of tables by name, and the kind whose rows are codes.

A model asks its settings for tables (`config.table.make`), and knows of no kind; one more kind is
one more member of the union.

Shape legend: R rows of a table, N requested rows, D width, M sub-spaces, C vectors of a codebook, d
width of the widest of them, S all of these, B queries.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal, final, get_args

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from pydantic import Field
from torch import Tensor

from foretaste.config import Config, Count
from foretaste.data.interactions import Interactions
from foretaste.errors import ConfigError
from foretaste.models.layers.codes import (
    CODES,
    Codes,
    balanced,
    even,
    exact_damage,
    places,
    train_codes,
)
from foretaste.models.layers.table import Dense, DenseConfig, OwnRows, Table, TableKind
from foretaste.models.layers.tables import (
    CompositionalConfig,
    Filled,
    FilledConfig,
    HashConfig,
    NarrowConfig,
    finite_blocks,
    hashed,
)
from foretaste.models.layers.tables_at_rest import HalfConfig, IntegerConfig, PrunedConfig

FEW_EVENTS = 20
"""With fewer events per user and item, vectors start from the events by default."""
_MOST_ROWS = 2**20


class QuantisedConfig(FilledConfig):
    """Settings of rows that are codes: one codebook vector for each part of the width."""

    kind: Literal["quantised"] = "quantised"
    """"quantised": a byte for each part of the width, which selects one of 256 learned vectors.
    Bytes come from k-means on a trained table, or, for users and items, on a singular value
    decomposition of the events before training."""
    sub_spaces: Count = 8
    """Number of parts of the width, and of bytes per row."""
    turned: bool = False
    """Whether a trained table's rows are rotated first, so that all parts have similar variance;
    this is better if few directions have most of the variance. A table that is trained with codes
    is not rotated."""
    exact: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the rows that stay as they are, the longest ones of a trained table. Few items have
    most of the events and fill most lists, and their rows are long. A table that is trained with
    codes has no exact rows."""

    @property
    def trains(self) -> bool:
        """Whether its tables can be trained: without exact rows."""
        return not self.exact

    @classmethod
    def tried(cls, width: int) -> Sequence[TableKind]:
        """Return settings of half as many bytes as numbers, and of fewer."""
        sizes = [n for n in (width // 2, width // 4, width // 8) if n]
        few = cls(sub_spaces=max(1, width // 16), turned=True, exact=0.0025)
        return [*(cls(sub_spaces=n, turned=True) for n in sizes), few]

    @classmethod
    def retrained(cls, times: float, width: int) -> Sequence[TableKind]:
        """Return settings of equally few bytes per row."""
        return (cls(sub_spaces=max(1, min(width, round(4 * width / times)))),)

    def make_smaller(self, num_rows: int, width: int) -> Table:
        """Make an untrained table."""
        num_exact = max(1, round(self.exact * num_rows)) if self.exact else 0
        return Quantised(
            num_rows, width, sub_spaces=self.sub_spaces, turned=self.turned, num_exact=num_exact
        )


@final
class Quantised(Filled):
    r"""Product quantisation: a code for each of M parts of the width, each a vector of a codebook.

    .. math:: e_r = [c^1_{b_{r1}}; \dots; c^M_{b_{rM}}] R, \quad b_{rm} \in \{0, \dots, 255\}

    Codes are fixed while the vectors are trained; they are random unless `start_from_events` is
    called. R is the identity unless a trained table was rotated. The longest rows of a trained
    table may be stored as they are; then it cannot be trained.

    References:
        Petrov and Macdonald, "RecJPQ: Training Large-Catalogue Sequential Recommenders", WSDM 2024,
        https://arxiv.org/abs/2312.06165; Jégou, Douze and Schmid, "Product Quantization for Nearest
        Neighbor Search", TPAMI 2011.
    """

    code_RM: Tensor
    turn_DD: Tensor | None
    exact_L: Tensor | None
    exact_LD: Tensor | None

    def __init__(
        self,
        num_rows: int,
        width: int,
        *,
        sub_spaces: int,
        turned: bool = False,
        num_exact: int = 0,
    ) -> None:
        super().__init__(num_rows, width)
        if sub_spaces > width:
            raise ConfigError(
                f"table.sub_spaces = {sub_spaces} divides a width of {width} into more parts than "
                "it has numbers: set fewer, or a larger width",
                name="table.sub_spaces",
                value=sub_spaces,
            )
        self.sub_spaces = sub_spaces
        self.codebooks = Dense(sub_spaces * CODES, even(width, sub_spaces)[0])
        self.register_buffer("code_RM", _codes_by_chance(0, num_rows, sub_spaces))
        self.register_buffer("turn_DD", torch.eye(width) if turned else None)
        self.register_buffer("exact_L", torch.arange(num_exact) if num_exact else None)
        self.register_buffer("exact_LD", torch.zeros(num_exact, width) if num_exact else None)
        self.trains = not num_exact
        self.draw(std=1.0)

    def rows(self, row_N: Int64[Tensor, " N"]) -> Float[Tensor, "N D"]:
        code_NM = self.code_RM[row_N.clamp(min=0)].long()
        code_NM += torch.arange(0, self.sub_spaces * CODES, CODES, device=row_N.device)
        found_NMd = self.codebooks(code_NM.masked_fill_((row_N < 0).unsqueeze(1), -1))
        found_ND: Tensor = found_NMd.flatten(1)
        if found_ND.shape[1] != self.width:
            found_ND = found_ND[:, places(self.width, self.sub_spaces).to(row_N.device)]
        found_ND = found_ND if self.turn_DD is None else found_ND @ self.turn_DD
        return found_ND if self.exact_L is None else self.codes().with_exact(row_N, found_ND)

    def codes(self) -> Codes:
        """Return the current rows."""
        with torch.no_grad():
            book_SD = self.codebooks.block(0, self.codebooks.num_rows).detach()
        book_MCd = book_SD.view(self.sub_spaces, CODES, -1)
        return Codes(
            code_RM=self.code_RM,
            book_MCd=book_MCd,
            width=self.width,
            turn_DD=self.turn_DD,
            exact_L=self.exact_L,
            exact_LD=self.exact_LD,
        )

    def products(self, query_BD: Float[Tensor, "B D"]) -> Float[Tensor, "B R"]:
        on_cpu = self.code_RM.device.type == "cpu"
        return self.codes().products(query_BD) if on_cpu else super().products(query_BD)

    def damage(self) -> str:
        if self.code_RM.dtype != torch.uint8:
            return f"codes are {self.code_RM.dtype}, beyond codebooks of {CODES} vectors"
        if self.turn_DD is not None and not self.turn_DD.isfinite().all():
            return "its turn is not finite"
        if not self.codebooks.weight.isfinite().all():
            return "a codebook is not finite"
        if self.exact_L is None or self.exact_LD is None:
            return ""
        return exact_damage(self.exact_L, self.exact_LD, num_rows=self.num_rows, width=self.width)

    def draw(self, *, std: float) -> None:
        self.codebooks.draw(std=std)

    @torch.no_grad()
    def fill(self, table: Table) -> None:
        """Take a trained table's rows, coded by k-means in each part (FAISS's trainer)."""
        rows_RD = torch.cat([block_RD for _, block_RD in finite_blocks(table)]).cpu()
        if self.exact_L is not None and self.exact_LD is not None:
            longest_L = rows_RD.norm(dim=1).topk(len(self.exact_L)).indices.sort().values
            self.exact_L.copy_(longest_L)
            self.exact_LD.copy_(rows_RD[longest_L])
            rows_RD[longest_L] = 0.0
            rows_RD[longest_L] = rows_RD.sum(dim=0) / max(1, len(rows_RD) - len(longest_L))
        found = train_codes(rows_RD, self.sub_spaces, turned=self.turn_DD is not None)
        if self.turn_DD is not None and found.turn_DD is not None:
            self.turn_DD.copy_(found.turn_DD)
        self.code_RM.copy_(found.code_RM)
        self.codebooks.weight.copy_(found.book_MCd.flatten(0, 1))

    def grow(self, num_rows: int) -> None:
        before = self.num_rows
        super().grow(num_rows)
        more_RM = _codes_by_chance(before, num_rows, self.sub_spaces)
        self.code_RM = torch.cat([self.code_RM, more_RM.to(self.code_RM.device)])


@torch.no_grad()
def start_from_events(
    events: Interactions, *, users: Quantised | None = None, items: Quantised | None = None
) -> None:
    r"""Fill quantised tables with vectors from the events, so that their codes come from there.

    .. math:: E_U = a \, X_U P, \quad E_I = b \, X_I P

    with X of `spectral_vectors`. P orders the factors so that the parts of the width have similar
    variance; a and b scale the vectors to the deviation of the drawn rows.

    References:
        RecJPQ (see `Quantised`) for codes from a decomposition. Departure: there, a part is coded
        by the bins of one factor, and codebooks are drawn.
    """
    tables = [table for table in (users, items) if table is not None]
    width, sub_spaces = tables[0].width, tables[0].sub_spaces
    sides = spectral_vectors(events, width)
    order_D = balanced(F.pad(sides[0].square().sum(0), (0, width - sides[0].shape[1])), sub_spaces)
    for table, vector_RF in zip((users, items), sides, strict=True):
        if table is not None:
            std = table.codebooks.std
            rows_RD = F.pad(vector_RF, (0, width - vector_RF.shape[1]))[:, order_D]
            table.fill(Dense.of_rows(rows_RD * (std / float(rows_RD.square().mean().sqrt())), std))


@torch.no_grad()
def start_dense(events: Interactions, *tables: Table | None) -> None:
    r"""Set the rows of dense tables of users and of items to vectors from the events.

    The vectors are those of `spectral_vectors`, with each count raised by the mean count. They are
    scaled to the deviation of the drawn rows. Other kinds of tables keep their rows, and so do
    tables of more than a million rows, whose decomposition would take longer than some epochs.

    References:
        Qin and Rohe, "Regularized Spectral Clustering under the Degree-Corrected Stochastic
        Blockmodel", NeurIPS 2013, https://arxiv.org/abs/1309.4111, for the raised counts: without,
        the first factors are small groups that few events connect with the others.
    """
    dense = [table for table in tables if isinstance(table, OwnRows)]
    if not dense or max(events.num_users, events.num_items) > _MOST_ROWS:
        return
    for table, vector_RF in zip(
        tables, spectral_vectors(events, dense[0].width, raised=1.0), strict=True
    ):
        if isinstance(table, OwnRows):
            num_rows, rank = vector_RF.shape
            scale = table.std / float(vector_RF.square().mean().sqrt().clamp(min=1e-12))
            rest_RD = torch.randn(num_rows, table.width - rank) * table.std
            table.take([Dense.of_rows(torch.cat([vector_RF * scale, rest_RD], dim=1), table.std)])


def spectral_vectors(
    events: Interactions, width: int, *, raised: float = 0.0
) -> tuple[Float[Tensor, "U F"], Float[Tensor, "I F"]]:
    r"""Return vectors of users and items from a singular value decomposition of the events.

    .. math:: (D_U + \tau_U)^{-1/2} A (D_I + \tau_I)^{-1/2} \approx U S V^\top, \quad
        X_U = U S^{1/2}, \quad X_I = V S^{1/2}

    with A of 1 for each pair of a user and an item with an event, and their counts D. Their
    products already order the items. For a moment, this takes the memory of a few dense tables.

    Args:
        events: The events.
        width: The largest number of factors F; there are no more than users or items.
        raised: What is added to each count, as a multiple of the mean count of a side.

    References:
        Shen et al., "How Powerful is Graph Convolution for Recommendation?", CIKM 2021,
        https://arxiv.org/abs/2108.07567, for the normalisation.
    """
    shape = (events.num_users, events.num_items)
    pair_2E = torch.from_numpy(np.stack([events.user_idx, events.item_idx]).astype(np.int64))
    done_UI = torch.sparse_coo_tensor(
        pair_2E, torch.ones(len(events)), shape, check_invariants=False
    ).coalesce()
    divisor_P = torch.ones(done_UI.values().shape)  # without repetition
    for row_P, num_rows in zip(done_UI.indices(), shape, strict=True):
        count_R = row_P.bincount(minlength=num_rows).float()
        divisor_P *= (count_R + raised * count_R.mean())[row_P]
    done_UI.values().copy_(divisor_P.rsqrt())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        user_UF, length_F, item_IF = torch.svd_lowrank(done_UI, q=min(width, *shape), niter=4)
    return user_UF * length_F.sqrt(), item_IF * length_F.sqrt()


def _codes_by_chance(first: int, last: int, sub_spaces: int) -> Tensor:
    row_N = torch.arange(first, last)
    codes = [hashed(row_N, 1 + space, CODES) for space in range(sub_spaces)]
    return torch.stack(codes, dim=1).to(torch.uint8)


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
"""The settings classes of all kinds of tables."""


class IdConfig(Config):
    """Settings of a model that has a vector for each id."""

    table: TableConfig = DenseConfig()
    """The kind of table that stores the vectors of ids and of features' codes."""


Init = Literal["random", "svd", "auto"]


class FactorConfig(IdConfig):
    """Settings of a model whose products of users' and items' vectors are its scores."""

    init: Init = "auto"
    """The vectors before training. "random": drawn. "svd": from a singular value decomposition of
    the events, in dense tables of at most a million rows, so that training begins where the
    products already order the items. "auto": "svd" if users and items have few events, fewer than
    20 by the geometric mean of both averages, and no features. On validation, MF has .048 for .043
    with it on Beauty and .085 for .091 on MovieLens-100K, whose users and items have 9 and 78."""
    recency: Annotated[float, Field(ge=1, le=1000)] | Literal["auto"] = "auto"
    """Weight of a history's newest event in an answer, w; each of the 8 newest weighs
    1 + (w - 1) / 2^r, with r newer ones. 1: all events count the same. "auto": 1, 4, 16 or 64,
    chosen by validation after training; 1 if the order of events has no meaning."""

    @property
    def known_recency(self) -> float:
        """The weight, 1 until it is chosen."""
        return 1.0 if self.recency == "auto" else self.recency

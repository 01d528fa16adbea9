"""Ranking among a few sampled items, as some papers did: only on request, and named so.

Krichene and Rendle, "On Sampled Metrics for Item Recommendation", KDD 2020,
https://doi.org/10.1145/3394486.3403226: such metrics may order models otherwise than those over
the whole catalogue do.

Shape legend: Q queries, B of a block, I items, P pairs, S sampled items, C items
that are kept, R rows of a block, K items that training knows.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import numpy as np
import torch
from annotated_types import Ge, Le
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from foretaste.arguments import checked, checked_class
from foretaste.config import Count, Seed
from foretaste.data.arrays import ranges
from foretaste.data.batch import Queries
from foretaste.data.interactions import Interactions
from foretaste.errors import ConfigError
from foretaste.evaluation.rank import noise
from foretaste.models.base import Ranker
from foretaste.models.two_stage import judge
from foretaste.training.trained import Trained

_BLOCK_ELEMENTS = 2**18
"""How many items race at once: few enough that they stay in the processor's caches."""


_By = Literal["listed", "uniform", "popularity"]


@checked_class
@dataclass(frozen=True, kw_only=True)
class SampledNegatives:
    """How the candidates beside a query's targets are found."""

    num: Count = 99
    """How many, no two the same. Of "listed" ones it is the data that say how many."""
    by: _By = "uniform"
    """"listed": those that the data list for the user. The others are drawn for each query among
    the items that neither its history nor its targets hold: uniformly, or in favour of the popular
    (each next one with probability ~ count^power of those that are left)."""
    power: Annotated[float, Ge(-100), Le(100)] = 0.75
    seed: Seed = 0

    @checked
    def check(self, num_known: int) -> None:
        """Refuse to draw more items than there are.

        Args:
            num_known: Items that can be drawn: those with a training event.

        Raises:
            ConfigError: No query could be compared with so many.
        """
        if self.by != "listed" and self.num >= num_known:
            raise ConfigError(
                f"{self.num} sampled items, but only {num_known} items have a training event, and "
                f"the targets are among them: give {num_known - 1} or fewer, or rank the whole "
                "catalogue (no sampled items)",
                name="num",
                value=self.num,
            )

    @property
    def suffix(self) -> str:
        """What metric names end in."""
        return f"_sampled_{self.num}"

    @checked
    def as_done(self, num_Q: Int64[np.ndarray, " Q"]) -> "SampledNegatives":
        """Return it with the number that queries were in fact compared with.

        Args:
            num_Q: That of each query.

        Raises:
            ConfigError: They are drawn, and no query has so many that it may be compared with.
        """
        most = int(num_Q.max(initial=0))
        if self.by != "listed" and most < self.num:
            raise ConfigError(
                f"{self.num} sampled items, but after its history and targets no query has more "
                f"than {most} left: give {most} or fewer, or rank the whole catalogue",
                name="num",
                value=self.num,
            )
        return replace(self, num=max(1, most))

    @checked
    def note(self, num_Q: Int64[np.ndarray, " Q"]) -> str:
        """Return the sentence for the report; `num_Q` is that of `as_done`."""
        how = {
            "listed": "the items that the data list for the user",
            "uniform": f"drawn uniformly for each query (seed {self.seed})",
            "popularity": f"drawn ~ count^{self.power:g} for each query (seed {self.seed})",
        }[self.by]
        few_Q = num_Q < self.num
        fewer = (
            f" (fewer for {int(few_Q.sum()):,} of {len(num_Q):,} queries, {int(num_Q.min()):,} at "
            "the least: no more are left)"
            if few_Q.any()
            else ""
        )
        return (
            f"candidates: NOT the full catalogue but each query's targets and {self.num} sampled "
            f"items{fewer}, {how}; not comparable with metrics over the catalogue"
        )


def no_list() -> ConfigError:
    """Return the error for data that list no negatives where listed ones are asked for."""
    return ConfigError(
        'the data list no negatives: draw them (sampled_by = "uniform"), or give a part column '
        "that says 'negative'",
        name="sampled_by",
        value="listed",
    )


def kept_items(
    sampled: SampledNegatives,
    queries: Queries,
    key_B: Int64[np.ndarray, " B"],
    target_2P: Int64[Tensor, "2 P"],
    *,
    count_I: Int64[np.ndarray, " I"],
    listed: Interactions | None,
) -> Bool[Tensor, "B I"]:
    """Return which items each query's targets stand among: the sampled ones and the targets.

    Args:
        sampled: What to keep.
        queries: Users and histories.
        key_B: A number for each query that is its own wherever it stands.
        target_2P: (row, item) of the targets.
        count_I: Training events of each item; items without any are not drawn.
        listed: What the data list for each user.

    Raises:
        ConfigError: Listed items are asked for, and the data list none.
    """
    keep_BI = torch.zeros(len(queries), len(count_I), dtype=torch.bool)
    if sampled.by == "listed":
        if listed is None:
            raise no_list()
        user_B = queries.user_B.numpy()
        start_B, end_B = listed.offsets[user_B], listed.offsets[user_B + 1]
        row_P = np.repeat(np.arange(len(user_B)), end_B - start_B)
        place_P, _ = ranges(start_B, end_B - start_B)
        keep_BI[torch.from_numpy(row_P), torch.from_numpy(listed.item_idx[place_P]).long()] = True
    else:
        free_BI = torch.ones_like(keep_BI)
        row_N = torch.arange(len(queries)).repeat_interleave(queries.offsets_B1.diff())
        free_BI[row_N, queries.history_N] = False
        free_BI[target_2P[0], target_2P[1]] = False
        chosen_BS = torch.from_numpy(_draw(sampled, free_BI.numpy(), key_B, count_I))
        keep_BI.scatter_(1, chosen_BS, value=True).logical_and_(free_BI)
    keep_BI[target_2P[0], target_2P[1]] = True
    return keep_BI


def score_kept(
    model: Trained,
    score: Callable[[Queries], Float[Tensor, "B I"]],
    queries: Queries,
    keep_BI: Bool[Tensor, "B I"],
) -> Float[Tensor, "B I"]:
    """Return the scores of some items of each query, and -inf for the others.

    A ranker that must be asked pair by pair is asked about these items alone; others score the
    catalogue.

    Args:
        model: Whose scores.
        score: Its `scorer`.
        queries: Users and histories.
        keep_BI: Of which items; of one or more for each query.

    Raises:
        NonFiniteError: The model scores one of them with NaN or infinity.
    """
    ranker = model.model
    if not isinstance(ranker, Ranker):
        score_BI = score(queries)
        return score_BI.masked_fill_(~keep_BI.to(score_BI.device), -torch.inf)
    item_BC = keep_BI.byte().topk(int(keep_BI.sum(dim=1).max()), dim=1).indices
    asked, own_BC = queries, item_BC
    if model.translation is not None:
        asked, own_BC = model.translation.queries(queries), model.translation.items(item_BC)
    score_BC = judge(ranker, asked, own_BC).score_BC
    score_BI = score_BC.new_full(keep_BI.shape, -torch.inf).scatter_(1, item_BC, score_BC)
    return score_BI.masked_fill_(~(keep_BI & model.known_I), -torch.inf)


def _draw(
    sampled: SampledNegatives,
    free_BI: Bool[np.ndarray, "B I"],
    key_B: Int64[np.ndarray, " B"],
    count_I: Int64[np.ndarray, " I"],
) -> Int64[np.ndarray, "B S"]:
    """Let items race with exponential times; the first to arrive are the sample.

    Where fewer are free than are asked for, others arrive last.
    """
    known = np.flatnonzero(count_I)
    power = sampled.power if sampled.by == "popularity" else 0.0
    num = min(sampled.num, len(known))
    chosen_BS = np.empty((len(key_B), num), np.int64)
    step = max(1, _BLOCK_ELEMENTS // len(known))
    for rows in (slice(start, start + step) for start in range(0, len(key_B), step)):
        free_RK = free_BI[rows][:, known]
        item_RK = np.broadcast_to(known, free_RK.shape)
        bits_RK = noise(key_B[rows, None], item_RK, sampled.seed + 1)
        time_RK = -np.log((bits_RK + 0.5) / 2.0**63) / count_I[known] ** power
        time_RK[~free_RK] = np.inf
        chosen_BS[rows] = known[np.argpartition(time_RK, num - 1, axis=1)[:, :num]]
    return chosen_BS

"""Ranking among a few sampled items, as some papers did: only on request, and named so.

Krichene and Rendle, "On Sampled Metrics for Item Recommendation", KDD 2020,
https://doi.org/10.1145/3394486.3403226: such metrics may order models otherwise than those over
the whole catalogue do.

Shape legend: B queries of a block, I items, P pairs, U users.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from foretaste.data.batch import Queries
from foretaste.data.interactions import Interactions
from foretaste.errors import ConfigError
from foretaste.evaluation.rank import noise


@dataclass(frozen=True, kw_only=True)
class SampledNegatives:
    """How the candidates beside a query's targets are found."""

    num: int = 99
    """How many, no two alike."""
    by: Literal["listed", "uniform", "popularity"] = "uniform"
    """"listed": those that the data list for the user. The others are drawn for each query among
    the items that neither its history nor its targets hold: alike, or in favour of the popular
    (each next one with probability ~ count^power of those that are left)."""
    power: float = 0.75
    seed: int = 0

    @property
    def suffix(self) -> str:
        """What metric names end in."""
        return f"_sampled_{self.num}"

    def note(self) -> str:
        """Return the sentence for the report."""
        how = {
            "listed": "the items that the data list for the user",
            "uniform": f"drawn alike for each query (seed {self.seed})",
            "popularity": f"drawn ~ count^{self.power:g} for each query (seed {self.seed})",
        }[self.by]
        return (
            f"candidates: NOT the full catalogue but each query's targets and {self.num} sampled "
            f"items, {how}; not comparable with metrics over the catalogue"
        )


def keep_sampled(
    score_BI: Float[Tensor, "B I"],
    sampled: SampledNegatives,
    queries: Queries,
    key_B: Int64[np.ndarray, " B"],
    target_2P: Int64[Tensor, "2 P"],
    *,
    count_I: Int64[np.ndarray, " I"],
    listed: Interactions | None,
) -> None:
    """Set the scores of all but the targets and the sampled items to -inf.

    Args:
        score_BI: Changed in place.
        sampled: What to keep.
        queries: Users and histories.
        key_B: A number for each query that is its own wherever it stands.
        target_2P: (row, item) of the targets.
        count_I: Training events of each item; items without any are not drawn.
        listed: What the data list for each user.

    Raises:
        ConfigError: Listed items are asked for, and the data list none.
    """
    keep_BI = torch.zeros_like(score_BI, dtype=torch.bool)
    if sampled.by == "listed":
        if listed is None:
            raise ConfigError(
                'the data list no negatives: draw them (sampled_by = "uniform"), or give a '
                "part column that says 'negative'"
            )
        user_B = queries.user_B.numpy()
        start_B, end_B = listed.offsets[user_B], listed.offsets[user_B + 1]
        row_P = np.repeat(np.arange(len(user_B)), end_B - start_B)
        first_B = np.cumsum(end_B - start_B) - (end_B - start_B)
        place_P = np.arange(len(row_P)) + (start_B - first_B)[row_P]
        keep_BI[torch.from_numpy(row_P), torch.from_numpy(listed.item_idx[place_P]).long()] = True
    else:
        chosen_BS = torch.from_numpy(_draw(sampled, queries, key_B, target_2P, count_I))
        keep_BI.scatter_(1, chosen_BS, value=True)
        keep_BI[
            torch.arange(len(queries)).repeat_interleave(queries.offsets_B1.diff()),
            queries.history_N,
        ] = False
    keep_BI[target_2P[0], target_2P[1]] = True
    score_BI.masked_fill_(~keep_BI, -torch.inf)


def _draw(
    sampled: SampledNegatives,
    queries: Queries,
    key_B: Int64[np.ndarray, " B"],
    target_2P: Int64[Tensor, "2 P"],
    count_I: Int64[np.ndarray, " I"],
) -> Int64[np.ndarray, "B S"]:
    """Let items race with exponential times; the first to arrive are the sample."""
    known = np.flatnonzero(count_I)
    power = sampled.power if sampled.by == "popularity" else 0.0
    item_BK = np.broadcast_to(known, (len(key_B), len(known)))
    bits_BK = noise(key_B[:, None], item_BK, sampled.seed + 1)
    time_BK = -np.log((bits_BK + 0.5) / 2.0**63) / count_I[known] ** power
    column_I = np.full(len(count_I), -1)
    column_I[known] = np.arange(len(known))
    history_row_N = np.repeat(np.arange(len(queries)), np.diff(queries.offsets_B1.numpy()))
    taken_2P = np.concatenate(
        [np.stack([history_row_N, queries.history_N.numpy()]), target_2P.numpy()], axis=1
    )
    taken_2P = taken_2P[:, column_I[taken_2P[1]] >= 0]
    time_BK[taken_2P[0], column_I[taken_2P[1]]] = np.inf
    num = min(sampled.num, len(known))
    first_BS = np.argpartition(time_BK, num - 1, axis=1)[:, :num]
    chosen_BS: np.ndarray = known[first_BS]
    return chosen_BS

"""Hard negatives: items that a model could well take for something the user has done.

Where they come from is not this room's business: walks in the graph (`nearby`), an index over the
model's own items, a retriever's candidates. Whoever learns asks through `DrawItems`.

Shape legend: B pairs, N negatives of a pair, R rows of a ranking, T ranks.
"""

import torch
from jaxtyping import Int32, Int64
from torch import Tensor

from foretaste.data.memory import check_fits
from foretaste.errors import ConfigError
from foretaste.sampling.unseen import Seen

_TRIES = 4
"""Draws before a place is left empty."""


def check_ranks(num_rows: int, ranks: int) -> None:
    """Refuse more ranks than fit in memory.

    Raises:
        TooLargeError: They do not.
    """
    check_fits(
        num_rows * ranks * 20,  # while an index answers: ids of 8 bytes, scores, and ids of 4
        f"{ranks:,} ranks of each of {num_rows:,} rows",
        "lower the farthest of objective.hard_ranks",
        name="hard_ranks",
        value=ranks,
    )


def draw_by_rank(
    ranked_RT: Int32[Tensor, "R T"],
    row_B: Int64[Tensor, " B"],
    user_B: Int64[Tensor, " B"],
    positive_B: Int64[Tensor, " B"],
    num: int,
    *,
    ranks: tuple[int, int],
    seen: Seen,
    generator: torch.Generator,
) -> Int64[Tensor, "B N"]:
    """Draw from a window of ranks, and draw again what the user has done.

    Args:
        ranked_RT: item_idx, hardest first; rows may end early, with -1.
        row_B: The row of each pair.
        user_B: user_idx of each pair.
        positive_B: Its observed item_idx.
        num: N, draws per pair, with replacement.
        ranks: First and last-plus-one rank to draw from; a row of fewer gives its last ones.
        seen: What may not be drawn.
        generator: Source of all randomness.

    Returns:
        item_idx; the pair's own where nothing was found that the user has not done.

    Raises:
        ConfigError: The ranks are none, or beyond those kept.
    """
    low, high = ranks
    if not 0 <= low < high <= ranked_RT.shape[1]:
        raise ConfigError(
            f"hard negatives of ranks {low} to {high}, but {ranked_RT.shape[1]} ranks are kept: "
            "give a range within them",
            name="hard_ranks",
            value=(low, high),
        )
    end_B = (ranked_RT[row_B] >= 0).sum(dim=1).clamp(max=high)
    start_B = (end_B - (high - low)).clamp(min=0, max=low)
    width_P, start_P, row_P, user_P, drawn_P = (
        index_B.repeat_interleave(num)
        for index_B in (end_B - start_B, start_B, row_B, user_B, positive_B)
    )
    open_P = width_P.nonzero().squeeze(1)
    for _ in range(_TRIES):
        share_P = torch.rand(len(open_P), generator=generator, dtype=torch.float64)
        rank_P = start_P[open_P] + (share_P * width_P[open_P]).long()
        found_P = ranked_RT[row_P[open_P], rank_P].long()
        is_new_P = ~seen.contains(user_P[open_P], found_P)
        drawn_P[open_P[is_new_P]] = found_P[is_new_P]
        open_P = open_P[~is_new_P]
    return drawn_P.view(len(user_B), num)

"""Holding out what belongs together, as a user's last events do, where no times are known.

Shape legend: E events, U users.
"""

import numpy as np
from jaxtyping import Bool, Float64, Int64

from foretaste.data.interactions import Interactions
from foretaste.later import later

sparse = later("scipy.sparse")

_PAIRS = 2**24
"""Users of the items that are compared at once, of all of them together."""


def draw_blocks(events: Interactions, share: float, seed: int) -> Bool[np.ndarray, " E"]:
    r"""Draw a block of each user's events: one at random and those most alike to it.

    How alike two items are is the cosine of who did them, :math:`|U_i \cap U_j| /
    \sqrt{|U_i| |U_j|}`. A user with n events gives round(share * n) of them, so one with few may
    give none. Held out alone, an event is often betrayed by those that were done beside it; a
    block leaves together, as blocked cross-validation has it (Roberts et al. 2017,
    https://doi.org/10.1111/ecog.02881). The work is the sum over items of their squared counts.

    Args:
        events: All that may be drawn.
        share: Of each user's events, in (0, 1).
        seed: Decides the draw.
    """
    user_E, item_E = events.user_idx, events.item_idx.astype(np.int64)
    count_U = np.diff(events.offsets)
    chosen_U = events.offsets[:-1] + np.floor(
        np.random.default_rng(seed).random(len(count_U)) * count_U
    ).astype(np.int64)
    chosen_E = chosen_U[user_E]
    alike_E = alike(events, item_E, item_E[chosen_E])
    alike_E[chosen_E] = np.inf
    order_E = np.lexsort((-alike_E, user_E))
    rank_E = np.arange(len(events)) - events.offsets[user_E]
    held_E = np.zeros(len(events), bool)
    held_E[order_E] = rank_E < np.rint(share * count_U)[user_E]
    return held_E


def alike(
    events: Interactions, a_E: Int64[np.ndarray, " E"], b_E: Int64[np.ndarray, " E"]
) -> Float64[np.ndarray, " E"]:
    """Return the cosine of two items' users, pair by pair."""
    ones_E = np.ones(len(events), np.float32)
    shape = (events.num_items, events.num_users)
    done_IU = sparse.csr_array((ones_E, (events.item_idx, events.user_idx)), shape=shape)
    done_IU.data[:] = 1  # whoever did it twice counts once
    count_I = np.diff(done_IU.indptr).astype(np.int64)  # of 32 bits, products would wrap round
    block_E = np.cumsum(count_I[a_E] + count_I[b_E]) // _PAIRS
    cuts = np.flatnonzero(np.diff(block_E)) + 1
    both_E = np.concatenate(
        [
            (done_IU[some_a] * done_IU[some_b]).sum(axis=1)
            for some_a, some_b in zip(np.split(a_E, cuts), np.split(b_E, cuts), strict=True)
        ]
    )
    cosine_E: Float64[np.ndarray, " E"] = both_E / np.sqrt(count_I[a_E] * count_I[b_E])
    return cosine_E

"""Hard negatives by personalised PageRank: items near the observed one that the user has not done.

Shape legend: B pairs, N hard negatives of a pair, I items, T ranks.
"""

from typing import final

import numpy as np
import torch
from jaxtyping import Int32, Int64
from torch import Tensor

from foretaste.data.graph import Graph
from foretaste.data.walks import most_visited
from foretaste.sampling.hard import check_ranks, draw_by_rank
from foretaste.sampling.unseen import Seen

_WALKS, _HOPS = 1000, 4
"""From each item: about 2,000 visits to other items, enough to rank a few hundred."""


@final
class NearbyNegatives:
    """Ranks, for each item, the items that random walks from it visit most; draws by rank.

    References:
        Ying et al., "Graph Convolutional Neural Networks for Web-Scale Recommender Systems", KDD
        2018, https://arxiv.org/abs/1806.01973, section 3.3.
    """

    def __init__(self, graph: Graph, seen: Seen, *, ranks: int, seed: int) -> None:
        """Walk from every item.

        Args:
            graph: Users and items.
            seen: What may not be drawn for a user.
            ranks: How many ranks are kept of each item.
            seed: Decides the walks.

        Raises:
            TooLargeError: The ranks would not fit in memory.
        """
        check_ranks(graph.num_items, ranks)
        first, last = graph.num_users, graph.num_users + graph.num_items
        found = most_visited(
            graph,
            top=ranks,
            seed=seed,
            walks=_WALKS,
            hops=_HOPS,
            nodes=np.arange(first, last),
            counted=(first, last),
        )
        item_IT = np.maximum(found.neighbour_VT - np.int32(first), np.int32(-1))
        self.seen = seen
        self._ranked_IT: Int32[Tensor, "I T"] = torch.from_numpy(item_IT)

    def draw(
        self,
        user_B: Int64[Tensor, " B"],
        positive_B: Int64[Tensor, " B"],
        num: int,
        *,
        ranks: tuple[int, int],
        generator: torch.Generator,
    ) -> Int64[Tensor, "B N"]:
        """Draw by rank, 0 is visited most; with the ranks given it is a `DrawItems`.

        Raises:
            ConfigError: The ranks are none, or beyond those kept.
        """
        return draw_by_rank(
            self._ranked_IT,
            positive_B,
            user_B,
            positive_B,
            num,
            ranks=ranks,
            seen=self.seen,
            generator=generator,
        )

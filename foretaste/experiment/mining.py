"""Hard negatives mined from an index over the items of the model that learns from them.

Shape legend: U users, B pairs or users of a block, N hard negatives of a pair, T ranks, I items.
"""

import sys
from collections.abc import Mapping
from typing import final

import torch
import torch.nn.functional as F
from jaxtyping import Int32, Int64
from torch import Tensor, nn

from foretaste.data.batch import Queries, last_events
from foretaste.data.interactions import Interactions
from foretaste.errors import ConfigError
from foretaste.models.interface import Retriever
from foretaste.retrieval.choose import build_index
from foretaste.sampling.hard import draw_by_rank
from foretaste.sampling.unseen import Seen
from foretaste.training.objectives.pairs import PairsConfig

_BLOCK_USERS = 256


@final
class IndexNegatives:
    """Ranks, for each user, the items that the model scores highest of those not done.

    What the weights of an earlier step found stays good until the next search; it is kept in
    checkpoints, so a resumed run draws from the same ranks.

    References:
        Xiong et al., "Approximate Nearest Neighbor Negative Contrastive Learning for Dense Text
        Retrieval", ICLR 2021, https://arxiv.org/abs/2007.00808. Departure: the trainer stands
        still while it searches, so that a run is a function of its seed.
    """

    def __init__(self, config: PairsConfig, events: Interactions, *, seed: int) -> None:
        """Prepare; nothing is searched yet.

        Args:
            config: Says how many ranks are kept, from which epoch on, and how often they are
                searched for.
            events: Those of training; items without any are no negatives.
            seed: Decides how an approximate index is built.
        """
        self.config, self.events, self.seed = config, events, seed
        self.seen = Seen.of(events)
        self._ranked_UT: Int32[Tensor, "U T"] | None = None

    def draw(
        self,
        user_B: Int64[Tensor, " B"],
        positive_B: Int64[Tensor, " B"],
        num: int,
        *,
        ranks: tuple[int, int],
        generator: torch.Generator,
    ) -> Int64[Tensor, "B N"]:
        """Draw by rank, 0 is scored highest; with the ranks given it is a `MineNegatives`.

        Raises:
            ConfigError: Nothing was searched yet, or the ranks are none, or beyond those kept.
        """
        if self._ranked_UT is None:
            raise ConfigError("no hard negatives are mined yet: refresh them with a model first")
        return draw_by_rank(
            self._ranked_UT,
            user_B,
            user_B,
            positive_B,
            num,
            ranks=ranks,
            seen=self.seen,
            generator=generator,
        )

    def refresh(self, model: nn.Module, epoch: int) -> None:
        """Search anew with a model in evaluation mode, if it is the turn of this epoch, from 0.

        Raises:
            ConfigError: The model is no retriever.
            NonFiniteError: An item's vector, or a user's, is NaN or infinite.
        """
        since = epoch + 1 - self.config.hard_from_epoch
        if since < 0 or since % self.config.hard_refresh:
            return
        if not isinstance(model, Retriever):
            raise ConfigError(f"{type(model).__name__} is no retriever: its items have no index")
        self._ranked_UT = self._search(model)

    def state(self) -> Mapping[str, Tensor]:
        """Return what a checkpoint keeps."""
        return {} if self._ranked_UT is None else {"ranked_UT": self._ranked_UT}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take what `state` gave."""
        self._ranked_UT = state.get("ranked_UT")

    @torch.no_grad()
    def _search(self, model: Retriever) -> Int32[Tensor, "U T"]:
        events, num_ranks = self.events, self.config.hard_ranks[1]
        table_ID = model.item_table().float()
        known_I = torch.from_numpy(events.item_count > 0)
        index = build_index(table_ID.cpu(), known_I=known_I, seed=self.seed)
        length_U = torch.from_numpy(events.offsets).diff()
        ranked_UT = torch.full((events.num_users, num_ranks), -1, dtype=torch.int32)
        order_U = length_U.argsort(stable=True)  # blocks of like length need little padding
        for user_B in order_U[length_U[order_U] > 0].split(_BLOCK_USERS):
            queries = _with_histories(user_B, events)
            done = last_events(queries, sys.maxsize)
            found = index.search(
                model.encode(queries.to(table_ID.device)).float().cpu(),
                num_ranks,
                exclude_BX=done.item_BL.where(done.valid_BL, -1),
            )
            ranked_UT[user_B] = found.item_BK.int()
        return ranked_UT


def _with_histories(user_B: Int64[Tensor, " B"], events: Interactions) -> Queries:
    start_B, end_B = (torch.from_numpy(events.offsets)[user_B + n] for n in (0, 1))
    offsets_B1 = F.pad((end_B - start_B).cumsum(0), (1, 0))
    ahead_N = (start_B - offsets_B1[:-1]).repeat_interleave(end_B - start_B)
    index_N = torch.arange(len(ahead_N)) + ahead_N
    return Queries(
        user_B=user_B,
        history_N=torch.from_numpy(events.item_idx)[index_N].long(),
        offsets_B1=offsets_B1,
    )

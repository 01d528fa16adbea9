"""Hard negatives mined from an index: over the items of the model that learns from them, or of a
retriever whose candidates a ranker learns to tell apart.

Shape legend: U users, B pairs or users of a block, N hard negatives of a pair, T ranks, I items.
"""

from collections.abc import Mapping
from typing import final

import torch
from jaxtyping import Int32, Int64
from torch import Tensor

from foretaste.data.interactions import Interactions
from foretaste.errors import ConfigError
from foretaste.models.base import Model, Retriever
from foretaste.models.layers.top_k import top_k
from foretaste.retrieval.choose import build_index
from foretaste.retrieval.index import ItemIndex
from foretaste.sampling.negatives import Seen, check_ranks, draw_by_rank
from foretaste.serving.histories import training_histories
from foretaste.training.objectives.pairs import PairsConfig
from foretaste.training.trained import Trained

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

        Raises:
            TooLargeError: The ranks would not fit in memory.
        """
        check_ranks(events.num_users, config.hard_ranks[1])
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
        """Draw by rank, 0 is scored highest; with the ranks given it is a `DrawItems`.

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

    def refresh(self, model: Model, epoch: int) -> None:
        """Search anew with a model in evaluation mode, if it is the turn of this epoch, from 0.

        Raises:
            ConfigError: The model is no retriever.
            NonFiniteError: An item's vector, or a user's, is NaN or infinite.
        """
        since = epoch + 1 - self.config.hard_from_epoch
        if since < 0 or since % self.config.hard_refresh:
            return
        if not isinstance(model, Retriever):
            raise ConfigError(
                f"{type(model).__name__} is no retriever: its items have no index",
                name="retriever",
                value=type(model).__name__,
            )
        index = build_index(
            model.item_blocks(),
            known_I=torch.from_numpy(self.events.item_count > 0),
            seed=self.seed,
        )
        with torch.no_grad():
            self._ranked_UT = _search_all(model, index, self.events, self.config.hard_ranks[1])

    def state(self) -> Mapping[str, Tensor]:
        """Return what a checkpoint keeps."""
        return {} if self._ranked_UT is None else {"ranked_UT": self._ranked_UT}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take what `state` gave."""
        self._ranked_UT = state.get("ranked_UT")


@final
class CandidateNegatives:
    """What a trained retriever offers each user, as negatives of a ranker: a `DrawItems`.

    These are the items that the ranker will be asked about, less what the user has done.
    """

    def __init__(self, retriever: Trained, num: int) -> None:
        """Search once for all users.

        Args:
            retriever: Trained; its events say what each user has done.
            num: How many items of each user are kept, the best ones.

        Raises:
            NonFiniteError: A score is NaN or infinite.
        """
        self.seen = Seen.of(retriever.events)
        self.ranked_UT = best_unseen(retriever, num)

    def __call__(
        self,
        user_B: Int64[Tensor, " B"],
        positive_B: Int64[Tensor, " B"],
        num: int,
        *,
        generator: torch.Generator,
    ) -> Int64[Tensor, "B N"]:
        """Draw alike from a user's candidates; the row's own item where there are none."""
        return draw_by_rank(
            self.ranked_UT,
            user_B,
            user_B,
            positive_B,
            num,
            ranks=(0, self.ranked_UT.shape[1]),
            seen=self.seen,
            generator=generator,
        )


@torch.no_grad()
def best_unseen(trained: Trained, num: int) -> Int32[Tensor, "U T"]:
    """Rank, for each user with an event, the items that a model scores highest of those not done.

    Args:
        trained: A model with vectors, whose items are indexed, or one that scores them all.
        num: T, cut to the size of the catalogue.

    Returns:
        item_idx, best first, -1 where the catalogue ran out.

    Raises:
        NonFiniteError: A score is NaN or infinite.
    """
    events, model = trained.events, trained.model
    num = min(num, events.num_items)
    if isinstance(model, Retriever):
        known_I = trained.known_I
        index = build_index(model.item_blocks(), known_I=known_I, seed=trained.seed)
        return _search_all(model, index, events, num)
    score = trained.scorer(exclude_seen=True)
    ranked_UT = torch.full((events.num_users, num), -1, dtype=torch.int32)
    for user_B in _by_length(events):
        queries, _ = training_histories(events, user_B.numpy())
        value_BK, item_BK = top_k(score(queries).cpu(), num)
        ranked_UT[user_B, : item_BK.shape[1]] = item_BK.where(value_BK > -torch.inf, -1).int()
    return ranked_UT


def _search_all(
    model: Retriever, index: ItemIndex, events: Interactions, num: int
) -> Int32[Tensor, "U T"]:
    ranked_UT = torch.full((events.num_users, num), -1, dtype=torch.int32)
    device = model.every_item.device
    for user_B in _by_length(events):
        queries, done_BX = training_histories(events, user_B.numpy())
        query_BD = model.encode(queries.to(device)).float().cpu()
        found = index.search(query_BD, num, exclude_BX=done_BX)
        ranked_UT[user_B] = found.item_BK.int()
    return ranked_UT


def _by_length(events: Interactions) -> tuple[Int64[Tensor, " B"], ...]:
    """Return users with events in blocks of like length, which need little padding."""
    length_U = torch.from_numpy(events.offsets).diff()
    order_U = length_U.argsort(stable=True)
    blocks: tuple[Tensor, ...] = order_U[length_U[order_U] > 0].split(_BLOCK_USERS)
    return blocks

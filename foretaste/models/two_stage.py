"""The two-stage recommender: a retriever finds candidates, a ranker judges them.

It is neither a retriever nor a catalogue scorer of its own: whoever asks scores the catalogue by
the retriever, leaves out what may not be answered, and has `rerank` put the best in a new order.
What was no candidate stands below all that were, in the retriever's order.

Covington et al., "Deep Neural Networks for YouTube Recommendations", RecSys 2016,
https://doi.org/10.1145/2959100.2959190

Shape legend: B queries, I items, C candidates of each, R items that were no candidates.
"""

from collections.abc import Mapping
from typing import NamedTuple, final

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from foretaste.data.batch import Queries
from foretaste.data.features import FieldTable
from foretaste.data.tasks import Weights
from foretaste.errors import ConfigError, NonFiniteError
from foretaste.models.base import Model, Ranker, Retriever, Scorer, top_k

_BLOCK_PAIRS = 2**15
"""Pairs of a query and a candidate that are judged at once, about."""


class Judged(NamedTuple):
    """What a ranker says of some items."""

    score_BC: Float[Tensor, "B C"]
    """What orders them, higher is better."""
    prediction: Mapping[str, Float64[Tensor, "B C"]]
    """Each task's: a probability, a value in the label's own unit, or the expected level."""


def judge(
    ranker: Ranker,
    queries: Queries,
    item_BC: Int64[Tensor, "B C"],
    *,
    weights: Weights | None = None,
) -> Judged:
    """Ask a ranker about some items, some queries at a time.

    Args:
        ranker: In evaluation mode.
        queries: Users and moments.
        item_BC: item_idx, of each query its own.
        weights: Of the tasks' predictions, each in its own unit, in the sum that makes the score;
            None: the tasks' own, of answers in [0, 1].

    Raises:
        NonFiniteError: It answers with NaN or infinity.
    """
    columns = item_BC.split(_BLOCK_PAIRS, dim=1)
    size = max(1, _BLOCK_PAIRS // max(1, columns[0].shape[1]))
    rows = []
    for start in range(0, max(1, len(queries)), size):
        part = queries if len(queries) <= size else queries.part(start, start + size)
        outputs = [ranker(part, item_bc[start : start + size]) for item_bc in columns]
        rows.append(
            (
                torch.cat([ranker.heads.order(output, weights) for output in outputs], dim=1),
                [ranker.heads.answers(output) for output in outputs],
            )
        )
    prediction = {
        task.name: torch.cat([torch.cat([p[task.name] for p in found], dim=1) for _, found in rows])
        for task in ranker.tasks
    }
    return Judged(_finite(torch.cat([score_bC for score_bC, _ in rows])), prediction)


def judge_new(
    ranker: Ranker, queries: Queries, table: FieldTable, *, weights: Weights | None = None
) -> Judged:
    """Ask a ranker about items that no table has; they are as many as one request names.

    Args:
        ranker: In evaluation mode.
        queries: Users and moments.
        table: The new items' features, a row each.
        weights: Of the tasks, as in `judge`.

    Raises:
        ConfigError: The ranker reads no features of items.
        NonFiniteError: It answers with NaN or infinity.
    """
    outputs = ranker.of_new_items(queries, table)
    return Judged(_finite(ranker.heads.order(outputs, weights)), ranker.heads.answers(outputs))


def _finite(score_BC: Float[Tensor, "B C"]) -> Float[Tensor, "B C"]:
    if not score_BC.isfinite().all():
        raise NonFiniteError("a score is NaN or infinite: the ranker is broken, train it anew")
    return score_BC.float()


def below(score_BC: Float[Tensor, "B C"], first_BR: Float[Tensor, "B R"]) -> Float[Tensor, "B R"]:
    """Return scores under those of the candidates, in the order that the retriever gave.

    Args:
        score_BC: The candidates' by the ranker, -inf where there is none.
        first_BR: The others' by the retriever, the best of them among them; -inf stays so.
    """
    lowest_B = score_BC.where(score_BC.isfinite(), torch.inf).amin(dim=1, keepdim=True)
    lowest_B = lowest_B.where(lowest_B.isfinite(), 0.0)
    best_B = first_BR.amax(dim=1, keepdim=True)
    return lowest_B - 1 + (first_BR - best_B.where(best_B.isfinite(), 0.0))


@final
class TwoStage(Model):
    """Both networks, and how many candidates go from one to the other."""

    def __init__(
        self,
        retriever: Model,
        ranker: Model,
        *,
        num_candidates: int,
        retriever_weight: float = 0.0,
    ) -> None:
        """Join two networks over one catalogue.

        Args:
            retriever: A `Retriever` or a `Scorer`.
            ranker: A `Ranker`.
            num_candidates: C, 1 or more.
            retriever_weight: Of the retriever's score in the sum with the ranker's.

        Raises:
            ConfigError: They are not of these kinds.
        """
        super().__init__()
        if not isinstance(retriever, Retriever | Scorer):
            raise ConfigError(f"{type(retriever).__name__} cannot score a catalogue")
        if not isinstance(ranker, Ranker):
            raise ConfigError(
                f"{type(ranker).__name__} is no ranker: it cannot be asked about given items"
            )
        self.retriever, self.ranker = retriever, ranker
        self.num_candidates, self.retriever_weight = num_candidates, retriever_weight

    def heard(self, judged: Judged, first_BC: Float[Tensor, "B C"]) -> Judged:
        """Add the retriever's scores of the judged items, -inf where there is none, as weighed."""
        real_BC = first_BC.where(first_BC > -torch.inf, 0.0)
        return judged._replace(score_BC=judged.score_BC + self.retriever_weight * real_BC)

    def rerank(self, queries: Queries, first_BI: Float[Tensor, "B I"]) -> Float[Tensor, "B I"]:
        """Return every item's score: the retriever's best are ranked anew, above all others.

        Args:
            queries: Users and moments.
            first_BI: The retriever's scores, -inf where an item may not be answered.

        Raises:
            NonFiniteError: The ranker answers with NaN or infinity.
        """
        best_BC, item_BC = top_k(first_BI, self.num_candidates)
        judged = self.heard(judge(self.ranker, queries, item_BC), best_BC)
        score_BC = judged.score_BC.where(best_BC > -torch.inf, -torch.inf)
        rest_BI = first_BI.scatter(1, item_BC, -torch.inf)
        return below(score_BC, rest_BI).scatter(1, item_BC, score_BC)

    @property
    def reads_profiles(self) -> bool:
        """Whether users' features are read in either stage."""
        return self.retriever.reads_profiles or self.ranker.reads_profiles

    @property
    def reads_context(self) -> bool:
        """Whether the ranker reads features of the context."""
        return self.ranker.reads_context

    @property
    def first_stage(self) -> Model:
        return self.retriever

    @property
    def second_stage(self) -> Model:
        return self.ranker


def placer(model: Model) -> Retriever | None:
    """Return the first stage if it gives items without a row a vector."""
    first = model.first_stage
    return first if isinstance(first, Retriever) and first.scores_new_items else None

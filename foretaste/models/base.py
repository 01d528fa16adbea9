"""The base of all models: a network whose attributes and methods show what it can do.

A retriever has a vector for each query and each item, a ranker scores given items, and a scorer
gives every item a score. A model overrides the attributes and methods of its capabilities and
inherits the rest; other packages use only these, and never a model's name.

Shape legend: B queries, I items, U users, V items of a batch, C items per query, D width,
E experts, K thresholds of an ordinal task or length of a list, L positions, N scores, R rows.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from foretaste.config import Config
from foretaste.data.batch import Prepared, Queries, Reads
from foretaste.data.features import FieldTable
from foretaste.data.interactions import Interactions
from foretaste.data.tasks import Task
from foretaste.errors import ConfigError
from foretaste.models.layers.codes import Codes
from foretaste.models.layers.heads import Heads
from foretaste.models.layers.table import BLOCK_ROWS, Table
from foretaste.models.layers.table_kinds import Quantised, start_dense, start_from_events

LearnsBy = Literal["pairs", "next_item", "masked_item", "rows", "events"]
"""The kind of training data, which determines the arguments and the result of `forward`.

"pairs": `(queries, item_V)` to `PairVectors`, and a third argument if `prepare` returns one.
"next_item": a `SequenceBatch` to L + 1 states per row, before any event and after each.
"masked_item": a `SequenceBatch` and positions (B, T) to the states of these hidden positions.
"rows": `(queries, item_BC)` to each task's training outputs, by its name.
"events": none; `learn` takes all events at once, without gradient descent.
"""


class StrengthConfig(Config):
    """Settings of a model whose regularisation is chosen by validation if it is "auto"."""

    strengths: ClassVar[Mapping[str, tuple[float, ...]]] = {}
    """The values to try, by setting. The first one is used if nothing can be tried."""
    most_events: ClassVar[int] = 500_000
    """No values are tried on more events: those need less regularisation and cost more time."""
    most_items: ClassVar[int] = 1_000_000_000
    """No values are tried with more items."""

    def strength(self, name: str) -> float:
        """Return the value of a setting."""
        value = getattr(self, name)
        return self.strengths[name][0] if value == "auto" else float(value)

    @property
    def left_open(self) -> list[str]:
        """The settings that validation chooses."""
        return [name for name in self.strengths if getattr(self, name) == "auto"]

    def may_try(self, events: Interactions) -> bool:
        """Return whether several fits are cheap."""
        return len(events) <= self.most_events and events.num_items <= self.most_items


class Model(nn.Module, ABC):
    """The base class of all models; the defaults mean that a capability is missing."""

    learns_by: ClassVar[LearnsBy | None] = None
    """None: the model consists of trained models."""
    reads: Reads = "nothing"
    """The part of a user's history that the model reads in training."""
    max_len: int = 0
    """Maximum number of events of a history."""
    init: str = "random"
    """"svd": `begin` sets the tables of users and items by the events (`FactorConfig`)."""
    recency: float | None = None
    """Weight of a history's newest event in answers (`FactorConfig`); None: it has none."""
    note: str = ""
    """Events that training did not use, with the reason, for the log; empty if all were used."""

    @property
    def reads_profiles(self) -> bool:
        """Whether the model has features of users; `Queries.profile` holds those of a new user."""
        return False

    @property
    def reads_context(self) -> bool:
        """Whether the model has features of the context, which are in `Queries.context`."""
        return False

    @property
    def scores_new_items(self) -> bool:
        """Whether the model has features of items, so that it can score items without a row."""
        return False

    @property
    def first_stage(self) -> "Model":
        """The model that finds items: the first of two stages, or the model itself."""
        return self

    @property
    def second_stage(self) -> "Model":
        """The model that scores items: the second of two stages, or the model itself."""
        return self

    def start_from(self, parts: Mapping[str, "Model"]) -> None:
        """Copy the weights of smaller models that were trained before, by their kinds."""

    def learn(self, events: Interactions) -> None:
        """Learn from all events at once, if `learns_by` is "events".

        Raises:
            TooLargeError: The weights would not fit in memory; nothing is allocated before.
        """
        raise ConfigError(f"{type(self).__name__} does not learn from all events at once")

    def begin(self, events: Interactions) -> None:
        """Compute from the training events what the first step needs."""
        tables = {side: getattr(self, f"{side[:-1]}_table", None) for side in ("users", "items")}
        coded = {side: table for side, table in tables.items() if isinstance(table, Quantised)}
        if coded:
            start_from_events(events, **coded)
        if self.init == "svd":
            start_dense(events, *tables.values())

    def learn_new_users(self, events: Interactions) -> None:
        """Compute from the weights how to represent users without a trained vector.

        This is fast and changes no weight that training reads, so it runs before each validation,
        which then measures the model as it will be served.
        """

    def finish(self) -> None:
        """Compute data that only answers need, such as final tables."""

    def known_users(self) -> Bool[Tensor, " U"] | None:
        """Return a mask of users known by their id, even without a history; None: no user is."""
        return None

    def known_items(self) -> Bool[Tensor, " I"] | None:
        """Return a mask of items known without an event, by features or edges; None: no item is."""
        return None


class PairVectors(NamedTuple):
    """The vectors of a batch of users, and of the items that they are compared with."""

    query_BD: Float[Tensor, "B D"]
    item_VD: Float[Tensor, "V D"]
    base: tuple[Tensor, ...]
    """Tables of rows (R, D) that `l2` penalises, such as the looked-up embeddings."""
    views: tuple[tuple[Tensor, Tensor], ...] = ()
    """Two views (R, D) of the same rows, of users and of items."""


class Retriever(Model, ABC):
    """A model that scores by a dot product, so that its items can be indexed."""

    num_items: int
    """I."""

    @abstractmethod
    def encode(self, queries: Queries) -> Float[Tensor, "B D"]:
        """Return each query's vector, also for a user without history."""

    @abstractmethod
    def items(self, item_V: Int64[Tensor, " V"]) -> Float[Tensor, "V D"]:
        """Return the vectors of some items, with gradients; a score is a dot product."""

    @property
    def item_rows(self) -> Table | None:
        """The table whose rows are the items' vectors; None: the vectors are computed."""
        return None

    def item_codes(self) -> Codes | None:
        """Return the vectors of all items as codes, if their table stores codes."""
        return None if self.item_rows is None else self.item_rows.codes()

    def products(self, query_BD: Float[Tensor, "B D"]) -> Float[Tensor, "B I"]:
        """Return every item's score for each query, without gradient."""
        if self.item_rows is not None:
            return self.item_rows.products(query_BD)
        blocks = [query_BD @ item_VD.float().T for _, item_VD in self.item_blocks()]
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=1)

    def item_blocks(self) -> Iterator[tuple[int, Float[Tensor, "V D"]]]:
        """Yield every item's vector without gradient, in blocks, each with its first item."""
        if self.item_rows is not None:
            yield from self.item_rows.blocks()
            return
        for item_V in self.every_item.split(BLOCK_ROWS):
            with torch.no_grad():
                vector_VD = self.items(item_V)
            yield int(item_V[0]), vector_VD

    @property
    def every_item(self) -> Int64[Tensor, " I"]:
        """All items, on the device of the weights."""
        device = next(chain(self.parameters(), self.buffers())).device
        return torch.arange(self.num_items, device=device)

    def prepare(self, queries: Queries, item_V: Int64[Tensor, " V"]) -> Prepared | None:
        """Do the work on a batch of pairs that needs no weights; None: there is none.

        A producer may call this ahead of the trainer, on the CPU and in several threads at once.
        """
        return None

    def item_from_features(self, table: FieldTable) -> Float[Tensor, "R D"]:
        """Return an item vector for each row of features.

        Raises:
            ConfigError: The model reads no features of items.
        """
        raise _reads_no_items(self)


class Ranker(Model, ABC):
    """A model that scores given items in a context, for one task or several."""

    learns_by: ClassVar[LearnsBy | None] = "rows"
    has_gates: ClassVar[bool] = False
    """Whether its tasks combine experts; `gates` returns the weights."""
    tasks: tuple[Task, ...]
    heads: Heads
    """Turns each task's training outputs into predictions and into the order of a list."""

    @abstractmethod
    def forward(self, queries: Queries, item_BC: Int64[Tensor, "B C"]) -> Mapping[str, Tensor]:
        """Return each task's training outputs, by the task's name.

        These are logits (B, C) for a binary task; standardised values (B, C) for a regression; and,
        for an ordinal task, logits (B, C, K) of lying above each level except the last.
        """

    def predict(
        self, queries: Queries, item_BC: Int64[Tensor, "B C"]
    ) -> Mapping[str, Float[Tensor, "B C"]]:
        """Return each task's prediction: a probability, a value in the label's own unit, or the
        expected level.
        """
        return self.heads.predictions(self(queries, item_BC))

    def penalty(self, queries: Queries, item_BC: Int64[Tensor, "B C"]) -> Float[Tensor, ""] | None:
        """Return the penalty that the model's settings add to the loss of a batch; None for no
        penalty.
        """
        return None

    def of_new_items(self, queries: Queries, table: FieldTable) -> Mapping[str, Tensor]:
        """Return each task's training outputs for every query and every row of features.

        Raises:
            ConfigError: The model reads no features of items.
        """
        raise _reads_no_items(self)

    @property
    def attends(self) -> bool:
        """Whether the weights of a user's events depend on the scored item."""
        return False

    def attention_weights(
        self, queries: Queries, item_BC: Int64[Tensor, "B C"]
    ) -> Float[Tensor, "B C L"]:
        """Return the weight of each of the last `max_len` events for each item, oldest first.

        Raises:
            ConfigError: The model reads no histories.
        """
        raise ConfigError(
            f"{type(self).__name__} reads no histories, so it has no attention weights"
        )

    def gates(
        self, queries: Queries, item_BC: Int64[Tensor, "B C"]
    ) -> Mapping[str, Float[Tensor, "B C E"]]:
        """Return each task's weights of the experts, by name; they sum to 1 for each pair.

        Raises:
            ConfigError: There are no experts.
        """
        raise ConfigError(f"{type(self).__name__} has no gates: MMoE has")


class Scorer(Model, ABC):
    """A model that scores every item for a block of users, without vectors to index."""

    @abstractmethod
    def score(self, queries: Queries) -> Float[Tensor, "B I"]:
        """Return a score for each item, higher is better, all finite."""


def _reads_no_items(model: Model) -> ConfigError:
    return ConfigError(f"{type(model).__name__} reads no features of items, only their ids")


Similarity = Literal["dot", "cosine"]


def as_query(
    vector_BD: Float[Tensor, "B D"], similarity: Similarity, temperature: float
) -> Float[Tensor, "B D"]:
    """Return query vectors scaled so that dot products are similarities over the temperature."""
    return as_item(vector_BD, similarity) / temperature


def as_item(vector_VD: Float[Tensor, "V D"], similarity: Similarity) -> Float[Tensor, "V D"]:
    """Return item vectors, of length 1 for the cosine."""
    return F.normalize(vector_VD, dim=1) if similarity == "cosine" else vector_VD


def top_k(
    score_BN: Float[Tensor, "B N"], k: int
) -> tuple[Float[Tensor, "B K"], Int64[Tensor, "B K"]]:
    """Return the min(k, N) best scores of each row and their positions, best first.

    Ties go to the lower position, so a longer list begins with the shorter one.
    """
    k, num_items = min(k, score_BN.shape[1]), score_BN.shape[1]
    value_BK, position_BK = score_BN.topk(min(k + 1, num_items))  # one more, to find ties
    tie_BK = value_BK[:, 1:] == value_BK[:, :-1]
    value_BK, position_BK = value_BK[:, :k], position_BK[:, :k]
    if not tie_BK.any() or k == 0:
        return value_BK, position_BK
    if k < num_items:
        last_B1 = value_BK[:, -1:]
        goes_on_B = tie_BK[:, -1] & last_B1.squeeze(1).isfinite()
        for row in goes_on_B.nonzero().flatten().tolist():
            above = (score_BN[row] > last_B1[row]).nonzero().flatten()
            equal = (score_BN[row] == last_B1[row]).nonzero().flatten()[: k - len(above)]
            position_BK[row] = torch.cat([above, equal])
            value_BK[row] = score_BN[row, position_BK[row]]
    return best_first(value_BK, position_BK)


def best_first(value_BK: Tensor, position_BK: Tensor) -> tuple[Tensor, Tensor]:
    """Sort rows by value, highest first, and ties by position, lowest first."""
    position_BK, order_BK = position_BK.sort(dim=1)
    value_BK, again_BK = value_BK.gather(1, order_BK).sort(dim=1, descending=True, stable=True)
    return value_BK, position_BK.gather(1, again_BK)


class TopK(NamedTuple):
    """The best items of each query, best first, padded with -1 and -inf.

    Shape legend: B queries, K list length.
    """

    item_BK: Int64[Tensor, "B K"]
    score_BK: Float[Tensor, "B K"]


def padded(best: TopK, k: int) -> TopK:
    """Pad results to length k with -1 and -inf."""
    missing = k - best.item_BK.shape[1]
    if missing == 0:
        return best
    return TopK(
        item_BK=F.pad(best.item_BK, (0, missing), value=-1),
        score_BK=F.pad(best.score_BK, (0, missing), value=-torch.inf),
    )


class _Unfilled(TorchFunctionMode):
    """Leave out random numbers and products with numbers.

    For these, torch's meta device would import its compiler, which takes 1 s of CPU time.
    """

    _SAME_SIZE = frozenset(
        {Tensor.normal_, Tensor.mul, Tensor.__mul__, Tensor.__rmul__}
        | {nn.init.normal_, nn.init.kaiming_normal_, nn.init.eye_}
    )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in self._SAME_SIZE and not any(isinstance(other, Tensor) for other in args[1:]):
            return args[0] if args else kwargs["tensor"]
        if func is torch.eye:
            return torch.empty(args[0], args[-1])
        return (torch.empty if func is torch.randn else func)(*args, **kwargs)


@contextmanager
def sizes_only() -> Iterator[None]:
    """Make tensors on torch's meta device, where they have a size but no memory and no values."""
    with torch.device("meta"), _Unfilled():
        yield

"""Shared-Bottom and MMoE: rankers and catalogue scorers with a tower for each task.

They read the fields of the row; with histories, also what the user's history comes to for the item,
as in DIN (`HistoryRanker`).

Shape legend: B queries, A rows of items (B or 1), C items of each, Q fields of a query, G fields
of an item, W width of a field, E experts, T tasks, H width of an expert's output.
"""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, final

from jaxtyping import Float, Int64
from pydantic import Field
from torch import Tensor

from foretaste.config import ChoiceConfig, Count, RangeConfig, Space, Usual, Widths
from foretaste.data.batch import Queries
from foretaste.data.features import Features
from foretaste.data.tasks import Task
from foretaste.models.layers.field_ranker import HistoryConfig, HistoryRanker
from foretaste.models.layers.heads import Heads
from foretaste.models.layers.mlp import Experts, PairMLP, Towers


class SharedBottomConfig(HistoryConfig):
    """Settings of Shared-Bottom."""

    kind: Literal["shared_bottom"] = "shared_bottom"
    tuning: ClassVar[Space] = {
        "embedding_dim": ChoiceConfig(choices=(8, 16, 32)),
        "dropout": RangeConfig(low=0.0, high=0.5),
        "l2": RangeConfig(low=1e-07, high=0.001, log=True),
    }
    usual: ClassVar[Usual] = Usual(
        objective={"kind": "rows"},
        training={"batch_events": 1024, "learning_rate": 5e-3},
    )
    """Each row brings drawn items, so that 1024 events are many rows; five times the usual rate
    ends sooner and higher on MovieLens-100K and Frappe."""
    tasks: tuple[Task, ...] = (Task(name="click"),)
    """The tasks to predict."""
    bottom_hidden: Widths = Field(default=(128, 64), min_length=1)
    """Widths of the layers that all tasks share."""
    tower_hidden: Widths = (32,)
    """Widths of each task's own hidden layers."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of values dropped after each layer."""


class MMoEConfig(HistoryConfig):
    """Settings of MMoE."""

    kind: Literal["mmoe"] = "mmoe"
    tuning: ClassVar[Space] = {
        "embedding_dim": ChoiceConfig(choices=(8, 16, 32)),
        "num_experts": ChoiceConfig(choices=(2, 4, 8)),
        "dropout": RangeConfig(low=0.0, high=0.5),
        "l2": RangeConfig(low=1e-07, high=0.001, log=True),
    }
    usual: ClassVar[Usual] = Usual(
        objective={"kind": "rows"},
        training={"batch_events": 1024, "learning_rate": 5e-3},
    )
    """Each row brings drawn items, so that 1024 events are many rows; five times the usual rate
    ends sooner and higher on MovieLens-100K and Frappe."""
    tasks: tuple[Task, ...] = (Task(name="click"),)
    """The tasks to predict."""
    num_experts: Count = 4
    """Number of expert networks, which the tasks share."""
    expert_hidden: Widths = Field(default=(64,), min_length=1)
    """Widths of each expert's layers."""
    tower_hidden: Widths = (32,)
    """Widths of each task's own hidden layers."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of values dropped after each layer."""


class _TaskTowers(HistoryRanker):
    """A network below, which each model makes its own, and a tower for each task above."""

    def __init__(
        self,
        config: SharedBottomConfig | MMoEConfig,
        *,
        num_users: int,
        num_items: int,
        features: Features | None = None,
    ) -> None:
        """Make untrained weights.

        Args:
            config: The settings.
            num_users: Users that training knows, 0 or more.
            num_items: Items of the catalogue, 1 or more.
            features: What else is known of them, and of moments.

        Raises:
            ConfigError: Items have neither ids nor features, or the tasks are incomplete.
        """
        super().__init__(config, num_users=num_users, num_items=num_items, features=features)
        self.tasks = config.tasks
        self.heads = Heads(self.tasks)
        width = self.make_trunk(config)
        self.towers = Towers(self.tasks, width, config.tower_hidden, dropout=config.dropout)

    @abstractmethod
    def make_trunk(self, config: Any) -> int:
        """Make the network below the towers, and return its width."""


@final
class SharedBottom(_TaskTowers):
    r"""Shared-Bottom: one network below, a tower for each task above.

    .. math:: s^{(t)} = h^{(t)}(f(x))

    x are the fields of the row.

    References:
        Caruana, "Multitask Learning", Machine Learning 1997,
        https://doi.org/10.1023/A:1007379606734
    """

    def make_trunk(self, config: SharedBottomConfig) -> int:
        self.bottom = PairMLP(
            self.query_dim,
            self.item_dim,
            config.bottom_hidden,
            dropout=config.dropout,
        )
        return config.bottom_hidden[-1]

    def of_fields(
        self, query_BQW: Float[Tensor, "B Q W"], item_ACGW: Float[Tensor, "A C G W"]
    ) -> Mapping[str, Float[Tensor, "B C"]]:
        state_BCH: Tensor = self.bottom(query_BQW.flatten(1), item_ACGW.flatten(2))
        raw: Mapping[str, Tensor] = self.towers([state_BCH] * len(self.tasks))
        return raw


@final
class MMoE(_TaskTowers):
    r"""MMoE: tasks share experts, each task mixes its own blend of them.

    .. math:: g^{(t)} = \mathrm{softmax}(W^{(t)} x), \quad
              s^{(t)} = h^{(t)}\Big(\sum_e g^{(t)}_e f_e(x)\Big)

    x are the fields of the row.

    References:
        Ma et al., "Modeling Task Relationships in Multi-task Learning with Multi-gate
        Mixture-of-Experts", KDD 2018, https://doi.org/10.1145/3219819.3220007. **Departures**:
        gates have a bias; the paper reads no histories.
    """

    has_gates = True

    def make_trunk(self, config: MMoEConfig) -> int:
        self.experts = Experts(
            self.query_dim,
            self.item_dim,
            config.expert_hidden,
            num_experts=config.num_experts,
            num_gates=len(self.tasks),
            dropout=config.dropout,
        )
        return config.expert_hidden[-1]

    def gates(
        self, queries: Queries, item_BC: Int64[Tensor, "B C"]
    ) -> dict[str, Float[Tensor, "B C E"]]:
        """Return how each task weights the experts; the weights of a pair sum to 1."""
        query_BQW, item_BCGW = self.read(queries, item_BC)
        _, gate_BCTE = self.experts(query_BQW.flatten(1), item_BCGW.flatten(2))
        return {task.name: gate_BCTE[:, :, place] for place, task in enumerate(self.tasks)}

    def of_fields(
        self, query_BQW: Float[Tensor, "B Q W"], item_ACGW: Float[Tensor, "A C G W"]
    ) -> Mapping[str, Float[Tensor, "B C"]]:
        expert_BCEH, gate_BCTE = self.experts(query_BQW.flatten(1), item_ACGW.flatten(2))
        mixed_BCTH = gate_BCTE @ expert_BCEH
        raw: Mapping[str, Tensor] = self.towers(mixed_BCTH.unbind(2))
        return raw

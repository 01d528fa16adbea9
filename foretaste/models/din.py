r"""DIN, a ranker and a catalogue scorer: a user's history, as it matters to the item judged.

.. math:: u_t = \sum_j w_j(e_j, e_t)\, e_j, \quad
          s = MLP([x_u; x_c; e_t; u_t; u_t \odot e_t])

An item's vector e is its id and features side by side, for the history as for the item that is
judged; x are the features of the user and of the context.

Zhou et al., "Deep Interest Network for Click-Through Rate Prediction", KDD 2018,
https://arxiv.org/abs/1706.06978

Departures: the activation unit sees the element-wise product in place of the outer one, as in the
authors' code; the MLP is also given :math:`u_t \odot e_t`, as in their later models; a softmax over
the weights is the default, the paper's unnormalised ones a setting.

Shape legend: B queries, A rows of items (B or 1), C items of each, Q fields of a query, G fields
of an item, W width of a field.
"""

from typing import ClassVar, Literal, final

from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from foretaste.config import ChoiceConfig, Count, RangeConfig, Space, Usual, Widths
from foretaste.data.features import Features
from foretaste.data.tasks import Task
from foretaste.models.layers.field_ranker import HistoryConfig, HistoryRanker
from foretaste.models.layers.heads import Heads
from foretaste.models.layers.mlp import PairMLP


class DINConfig(HistoryConfig):
    """Settings of DIN."""

    kind: Literal["din"] = "din"
    tuning: ClassVar[Space] = {
        "embedding_dim": ChoiceConfig(choices=(8, 16, 32)),
        "activation": ChoiceConfig(choices=("prelu", "dice")),
        "dropout": RangeConfig(low=0.0, high=0.5),
        "l2": RangeConfig(low=1e-07, high=0.001, log=True),
    }
    usual: ClassVar[Usual] = Usual(
        objective={"kind": "rows"},
        training={
            "batch_events": 1024,
            "learning_rate": 1e-2,
            "epochs": 8,
            "schedule": "linear",
        },
    )
    """Each row brings drawn items, so that 1024 events are many rows. At ten times the usual rate,
    which falls to 0, eight epochs over 20 events of a history reach .104 on validation of
    MovieLens-100K; thirty at a constant rate over 50 events reached .105 in five times as long."""
    task: Task = Task(name="click")
    """The task to predict."""
    user_id: bool = False
    """Whether each user has a vector, besides the history."""
    pooling: Literal["auto", "attention", "mean", "none"] = "attention"
    """How a history becomes a vector: "attention", weighted by how much each event matters to the
    item that is scored; "mean", the mean of all events; "none", not at all. "auto": "attention" if
    a user has several training events, else "none"; "none" too if some events are negative (a click
    of 0) and no `positive` marks which are positive."""
    max_len: Count = 20
    """How many events of a history are read: the last ones. Training takes as long as there are."""
    hidden: Widths = (200, 80)
    """Widths of the MLP's hidden layers."""
    activation: Literal["prelu", "dice"] = "prelu"
    """The activation after each hidden layer."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of values dropped after each hidden layer of the MLP."""


@final
class DIN(HistoryRanker):
    """The network: fields, the activation unit, an MLP."""

    folds_in = False  # a new user's id vector is 0

    def __init__(
        self,
        config: DINConfig,
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
            ConfigError: Items have neither ids nor features.
        """
        super().__init__(
            config,
            num_users=num_users,
            num_items=num_items,
            features=features,
            activation=config.activation,
        )
        self.tasks = (config.task,)
        self.mlp = PairMLP(
            self.query_dim,
            self.item_dim,
            config.hidden,
            1,
            dropout=config.dropout,
            activation=config.activation,
        )
        self.heads = Heads(self.tasks)

    def of_fields(
        self, query_BQW: Float[Tensor, "B Q W"], item_ACGW: Float[Tensor, "A C G W"]
    ) -> dict[str, Float[Tensor, "B C"]]:
        raw_BC1: Tensor = self.mlp(query_BQW.flatten(1), item_ACGW.flatten(2))
        return {self.tasks[0].name: raw_BC1.squeeze(2)}

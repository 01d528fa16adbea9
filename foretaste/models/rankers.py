"""Rankers and catalogue scorers over fields: DeepFM, DIN, Shared-Bottom and MMoE.

Shape legend: B queries, A rows of items (B or 1), C items per row, Q fields of a query, G fields
of an item, F some fields, D width, W width of a field (D, and 1 more with `linear`), E experts,
T tasks, H width of the output of an expert.
"""

from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar, Literal, TypeVar, final

import torch
from jaxtyping import Float, Int64
from pydantic import Field, model_validator
from torch import Tensor, nn

from foretaste.config import ChoiceConfig, Count, RangeConfig, Space, Usual, Widths
from foretaste.data.batch import Queries
from foretaste.data.tasks import Task
from foretaste.models.layers.dense import Experts, PairMLP, Towers, pair_dot
from foretaste.models.layers.field_ranker import (
    HistoryConfig,
    HistoryRanker,
    MakeFields,
    PairRanker,
)
from foretaste.models.layers.heads import Heads
from foretaste.models.layers.side_fields import RowFieldsConfig


class DeepFMConfig(RowFieldsConfig):
    """Settings of DeepFM."""

    kind: Literal["deepfm"] = "deepfm"
    task: Task = Task(name="click")
    """The task to predict."""
    linear: bool = True
    """Whether the first-order part is used."""
    fm: bool = True
    """Whether the products of pairs of fields are used."""
    deep: bool = True
    """Whether the deep network is used."""
    hidden: Widths = (128, 128, 128)
    """Widths of the deep network's hidden layers."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of values dropped after each hidden layer."""
    batch_norm: bool = False
    """Whether each hidden layer is normalised over the batch."""

    @model_validator(mode="after")
    def _has_a_part(self) -> "DeepFMConfig":
        if not (self.linear or self.fm or self.deep):
            raise ValueError("linear, fm and deep are all off: switch at least one on")
        return self


@final
class DeepFM(PairRanker[DeepFMConfig]):
    r"""DeepFM: a first-order part, pairs of fields, and a deep network.

    .. math:: s = w_0 + \sum_i w_i x_i + \sum_{i<j} \langle v_i, v_j \rangle x_i x_j
                  + DNN([v_1 x_1; …])

    All three parts share the vectors v; w is stored next to v, so that one look-up serves all.
    Pairs are summed in O(kn): :math:`\frac{1}{2} (|\sum_i v_i x_i|^2 - \sum_i |v_i x_i|^2)`, and
    terms that depend only on the query, or only on the item, are computed once. `linear`, `fm` and
    `deep` switch parts off: logistic regression has only the first, a factorisation machine the
    first two.

    References:
        Guo et al., "DeepFM: A Factorization-Machine based Neural Network for CTR Prediction",
        IJCAI 2017, https://arxiv.org/abs/1703.04247; Rendle, "Factorization Machines", ICDM 2010,
        https://doi.org/10.1109/ICDM.2010.127. **Departures**: a field of several values is the mean
        of them; a number has a constant vector in addition to the one that it multiplies; a new
        user is represented by a regression on the history (`FoldIn`).
    """

    def make(self, config: DeepFMConfig, make_fields: MakeFields) -> None:
        self.tasks = (config.task,)
        self.width = config.embedding_dim if config.fm or config.deep else 0
        self.fields = make_fields(config, width=self.width + config.linear)
        self.bias = nn.Parameter(torch.zeros(()))
        self.mlp = (
            PairMLP(
                self.fields.num_query_fields * self.width,
                self.fields.num_item_fields * self.width,
                config.hidden,
                1,
                dropout=config.dropout,
                batch_norm=config.batch_norm,
            )
            if config.deep
            else None
        )
        self.heads = Heads(self.tasks)

    def of_fields(
        self, query_BQW: Float[Tensor, "B Q W"], item_ACGW: Float[Tensor, "A C G W"]
    ) -> dict[str, Float[Tensor, "B C"]]:
        widths = [self.width, int(self.config.linear)]
        query_BQD, first_BQ1 = query_BQW.split(widths, dim=2)
        item_ACGD, first_ACG1 = item_ACGW.split(widths, dim=3)
        raw_BC = self.bias + first_BQ1.sum(dim=(1, 2)).unsqueeze(1) + first_ACG1.sum(dim=(2, 3))
        if self.config.fm:
            raw_BC = raw_BC + pairs_of_fields(query_BQD, item_ACGD)
        if self.mlp is not None:
            deep_BC1: Tensor = self.mlp(query_BQD.flatten(1), item_ACGD.flatten(2))
            raw_BC = raw_BC + deep_BC1.squeeze(2)
        return {self.tasks[0].name: raw_BC}


def pairs_of_fields(
    query_BQD: Float[Tensor, "B Q D"], item_ACGD: Float[Tensor, "A C G D"]
) -> Float[Tensor, "B C"]:
    """Return the sum of the dot products of all pairs of fields of a query and an item."""
    of_query_BD, within_B = _within(query_BQD)
    of_item_ACD, within_AC = _within(item_ACGD)
    return within_B.unsqueeze(1) + within_AC + pair_dot(of_query_BD, of_item_ACD)


def _within(
    field_XFD: Float[Tensor, "*X F D"],
) -> tuple[Float[Tensor, "*X D"], Float[Tensor, "*X"]]:
    """Return the sum of fields, and the sum of the dot products of all pairs of them."""
    sum_XD = field_XFD.sum(dim=-2)
    squares_X = sum_XD.square().sum(dim=-1) - field_XFD.square().sum(dim=(-2, -1))
    return sum_XD, squares_X / 2


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
    """Each row has additional drawn items, so 1024 events are many rows. At ten times the usual
    learning rate, which falls to 0, eight epochs with 20 events of a history reach .104 on
    validation of MovieLens-100K; thirty epochs at a constant rate with 50 events reached .105 in
    five times the time."""
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
    """Number of last events of a history that are read. Training time is proportional to it."""
    hidden: Widths = (200, 80)
    """Widths of the MLP's hidden layers."""
    activation: Literal["prelu", "dice"] = "prelu"
    """The activation after each hidden layer."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of values dropped after each hidden layer of the MLP."""


@final
class DIN(HistoryRanker[DINConfig]):
    r"""DIN: a user's history, weighted by how much each event matters to the item that is scored.

    .. math:: u_t = \sum_j w_j(e_j, e_t)\, e_j, \quad
              s = MLP([x_u; x_c; e_t; u_t; u_t \odot e_t])

    The vector e of an item is its id and features side by side, in the history and for the item
    that is scored; x are the features of the user and of the context.

    References:
        Zhou et al., "Deep Interest Network for Click-Through Rate Prediction", KDD 2018,
        https://arxiv.org/abs/1706.06978. **Departures**: the activation unit reads the element-wise
        product in place of the outer one, as in the authors' code; the MLP also reads
        :math:`u_t \odot e_t`, as in their later models; a softmax over the weights is the default,
        the paper's unnormalised weights are a setting.
    """

    folds_in = False  # a new user's id vector is 0

    def make(self, config: DINConfig, make_fields: MakeFields) -> None:
        self.tasks = (config.task,)
        self.make_histories(config, make_fields, activation=config.activation)
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


class SharedBottomConfig(HistoryConfig):
    """Settings of Shared-Bottom."""

    kind: Literal["shared_bottom"] = "shared_bottom"
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


S = TypeVar("S", SharedBottomConfig, MMoEConfig)


class _TaskTowers(HistoryRanker[S]):
    """A trunk, which each model defines, and a tower for each task above it."""

    def make(self, config: S, make_fields: MakeFields) -> None:
        self.tasks = config.tasks
        self.make_histories(config, make_fields)
        self.heads = Heads(self.tasks)
        width = self.make_trunk(config)
        self.towers = Towers(self.tasks, width, config.tower_hidden, dropout=config.dropout)

    @abstractmethod
    def make_trunk(self, config: S) -> int:
        """Make the trunk, and return its width."""


@final
class SharedBottom(_TaskTowers[SharedBottomConfig]):
    r"""Shared-Bottom: one shared network, and a tower for each task above it.

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
class MMoE(_TaskTowers[MMoEConfig]):
    r"""MMoE: tasks share experts, and each task weights them with its own gate.

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
        """Return each task's weights of the experts, which sum to 1 for each pair."""
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

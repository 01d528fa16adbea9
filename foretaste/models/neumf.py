r"""NCF, a ranker and a catalogue scorer: GMF, MLP, and NeuMF, which has both.

.. math:: h^{GMF} = p_u \odot q_i, \quad h^{MLP} = MLP([p'_u; q'_i]), \quad
          s_{ui} = w \cdot [h^{GMF}; h^{MLP}] + b

Each path has its own vectors, concatenated in one table, so that one look-up serves both. With
`pretrain`, GMF and MLP are trained first, and NeuMF starts from them with :math:`w = [\alpha
w^{GMF}; (1 - \alpha) w^{MLP}]`.

He et al., "Neural Collaborative Filtering", WWW 2017, https://arxiv.org/abs/1708.05031

Departures: a pre-trained NeuMF continues with the same optimizer, not with plain SGD; a new user is
represented by a regression on the history (`FoldIn`).

Shape legend: B queries, A rows of items (B or 1), C items per row, D factors, W width of a vector.
"""

from collections.abc import Mapping
from typing import ClassVar, Literal, final

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from foretaste.arguments import checked
from foretaste.config import (
    ChoiceConfig,
    Count,
    Depth,
    Positive,
    RangeConfig,
    Rounds,
    Space,
    Usual,
)
from foretaste.data.tasks import Task
from foretaste.models.base import Model
from foretaste.models.layers.dense import PairMLP, pair_dot
from foretaste.models.layers.field_ranker import MakeFields, PairRanker
from foretaste.models.layers.heads import Heads
from foretaste.models.layers.side_fields import ROWS_USUAL, RowFieldsConfig
from foretaste.models.layers.table import Table
from foretaste.models.layers.table_kinds import IdConfig


class GMFConfig(IdConfig):
    """Settings of generalised matrix factorisation."""

    kind: Literal["gmf"] = "gmf"
    tuning: ClassVar[Space] = {"factors": ChoiceConfig(choices=(8, 16, 32, 64))}
    usual: ClassVar[Usual] = ROWS_USUAL
    task: Task = Task(name="click")
    """The task to predict."""
    factors: Count = 32
    """Width of the vectors."""
    init_std: Positive = 0.01
    """Standard deviation of the initial vectors."""


class _LayersConfig(IdConfig):
    """Settings of a multi-layer perceptron over a user's and an item's vector."""

    kind: Literal["mlp", "neumf"]
    tuning: ClassVar[Space] = {
        "factors": ChoiceConfig(choices=(8, 16, 32, 64)),
        "num_layers": ChoiceConfig(choices=(1, 2, 3, 4)),
        "dropout": RangeConfig(low=0.0, high=0.5),
    }
    usual: ClassVar[Usual] = ROWS_USUAL
    task: Task = Task(name="click")
    """The task to predict."""
    factors: Count = 32
    """Width of the last hidden layer, and of GMF's vectors. Each layer before it is twice as wide
    as the next, and the user's and the item's vector together are as wide as the first."""
    num_layers: Depth = 3
    """Number of hidden layers."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of values dropped after each hidden layer."""
    init_std: Positive = 0.01
    """Standard deviation of the initial vectors."""


class MLPConfig(_LayersConfig):
    """Settings of the multi-layer perceptron over a user's and an item's vector."""

    kind: Literal["mlp"] = "mlp"


class NeuMFConfig(_LayersConfig):
    """Settings of NeuMF: GMF and MLP under one output layer."""

    kind: Literal["neumf"] = "neumf"
    pretrain: bool = False
    """Whether GMF and MLP are trained first, with the same settings, and NeuMF starts from their
    weights."""
    pretrain_epochs: Rounds | None = None
    """Epochs of each pretraining, in a final run too. None: as many as `training.epochs`."""
    fine_tuning: float = Field(default=1.0, gt=0, le=1000)
    """Learning rate after pretraining, as a share of `training.learning_rate`: the weights need
    only small changes then."""
    alpha: float = Field(default=0.5, gt=0, lt=1)
    """Share of GMF in the output layer with which a pretrained NeuMF starts."""

    @checked
    def parts(self) -> tuple[GMFConfig, MLPConfig]:
        """Return the two models that NeuMF is made of."""
        own = {name: getattr(self, name) for name in MLPConfig.model_fields if name != "kind"}
        mlp = MLPConfig(**own)
        gmf = GMFConfig(**{name: own[name] for name in GMFConfig.model_fields if name in own})
        return gmf, mlp


AnyNCFConfig = GMFConfig | MLPConfig | NeuMFConfig


@final
class NCF(PairRanker[AnyNCFConfig]):
    """The network: vectors, one path or both, an output layer; the settings say which paths."""

    def make(self, config: AnyNCFConfig, make_fields: MakeFields) -> None:
        self.tasks = (config.task,)
        hidden = () if isinstance(config, GMFConfig) else _halving(config)
        self.gmf_dim = 0 if isinstance(config, MLPConfig) else config.factors
        mlp_dim = -(-hidden[0] // 2) if hidden else 0
        own = RowFieldsConfig(table=config.table, init_std=config.init_std)
        self.fields = make_fields(own, width=self.gmf_dim + mlp_dim)
        dropout = 0.0 if isinstance(config, GMFConfig) else config.dropout
        self.mlp = PairMLP(mlp_dim, mlp_dim, hidden, dropout=dropout) if hidden else None
        self.output = nn.Linear(self.gmf_dim + (config.factors if hidden else 0), 1)
        self.heads = Heads(self.tasks)

    @torch.no_grad()
    def start_from(self, parts: Mapping[str, Model]) -> None:
        """Copy the weights of trained GMF and MLP models, if both are given."""
        gmf, mlp = (part for part in (parts["gmf"], parts["mlp"]) if isinstance(part, NCF))
        alpha = self.config.alpha if isinstance(self.config, NeuMFConfig) else 1.0
        width = self.gmf_dim
        for own, first, second in zip(*(ncf.id_tables() for ncf in (self, gmf, mlp)), strict=True):
            own.take((first, second))
        if self.mlp is not None and mlp.mlp is not None:
            self.mlp.load_state_dict(mlp.mlp.state_dict())
        self.output.weight[:, :width] = alpha * gmf.output.weight
        self.output.weight[:, width:] = (1 - alpha) * mlp.output.weight
        self.output.bias.copy_(alpha * gmf.output.bias + (1 - alpha) * mlp.output.bias)
        self.heads.load_state_dict(gmf.heads.state_dict())

    def id_tables(self) -> list[Table]:
        """Return the tables of users and of items."""
        both = self.fields.user.id_table, self.fields.item.id_table
        return [table for table in both if table is not None]

    def of_fields(
        self, query_BQW: Float[Tensor, "B 1 W"], item_ACGW: Float[Tensor, "A C 1 W"]
    ) -> dict[str, Float[Tensor, "B C"]]:
        query_BW, item_ACW = query_BQW.squeeze(1), item_ACGW.squeeze(2)
        widths = [self.gmf_dim, item_ACW.shape[2] - self.gmf_dim]
        asked_BD, query_BH = query_BW.split(widths, dim=1)
        item_ACD, item_ACH = item_ACW.split(widths, dim=2)
        weight_W = self.output.weight.squeeze(0)
        raw_BC: Tensor = self.output.bias
        if self.gmf_dim:
            raw_BC = raw_BC + pair_dot(asked_BD * weight_W[: self.gmf_dim], item_ACD)
        if self.mlp is not None:
            hidden_BCD: Tensor = self.mlp(query_BH, item_ACH)
            raw_BC = raw_BC + hidden_BCD @ weight_W[self.gmf_dim :]
        return {self.tasks[0].name: raw_BC}


def _halving(config: MLPConfig | NeuMFConfig) -> tuple[int, ...]:
    return tuple(config.factors * 2**place for place in reversed(range(config.num_layers)))

r"""DeepFM, a ranker and a catalogue scorer: first order, pairs of fields, and a deep network.

.. math:: s = w_0 + \sum_i w_i x_i + \sum_{i<j} \langle v_i, v_j \rangle x_i x_j + DNN([v_1 x_1; …])

All three parts share the vectors v; w stands beside them, so that one look-up serves all. Pairs
are summed in O(kn): :math:`\frac{1}{2} (|\sum_i v_i x_i|^2 - \sum_i |v_i x_i|^2)`, and what of it
concerns the query alone, or the item alone, is worked out once. `linear`, `fm` and `deep` leave
parts out: logistic regression is the first alone, a factorisation machine the first two.

Guo et al., "DeepFM: A Factorization-Machine based Neural Network for CTR Prediction", IJCAI 2017,
https://arxiv.org/abs/1703.04247; Rendle, "Factorization Machines", ICDM 2010,
https://doi.org/10.1109/ICDM.2010.127

Departures: a field of several values is the mean of them; a number has a constant vector beside
the one that it multiplies; a user whom training never saw is answered by regression on their
history (`FoldIn`).

Shape legend: B queries, A rows of items (B or 1), C items of each, Q fields of a query, G fields
of an item, F some fields, D width, W width of a field: D, and 1 more with `linear`.
"""

from typing import ClassVar, Literal, final

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from foretaste.config import ChoiceConfig, RangeConfig, Space, Usual, Widths
from foretaste.data.features import Features
from foretaste.data.tasks import Task
from foretaste.models.layers.field_ranker import PairRanker
from foretaste.models.layers.heads import Heads
from foretaste.models.layers.mlp import PairMLP, pair_dot
from foretaste.models.layers.row_fields import RowFields
from foretaste.models.layers.side_fields import RowFieldsConfig


class DeepFMConfig(RowFieldsConfig):
    """Settings of DeepFM."""

    kind: Literal["deepfm"] = "deepfm"
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
class DeepFM(PairRanker):
    """The network: fields, and up to three parts over them."""

    def __init__(
        self,
        config: DeepFMConfig,
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
        super().__init__()
        self.config, self.tasks = config, (config.task,)
        self.width = config.embedding_dim if config.fm or config.deep else 0
        self.fields = RowFields(
            config,
            num_users=num_users,
            num_items=num_items,
            features=features,
            width=self.width + config.linear,
        )
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

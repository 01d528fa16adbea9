r"""Encoded features to vectors: one table, one look-up, then a layer that fuses the fields.

Codes and bags of all fields are looked up in one pass, a bag as the mean of its codes; a number is
:math:`x w + b` with vectors w and b of its own; a vector goes through a linear layer. Fields that
say nothing are 0, or, where they are codes, what training learned for a missing one.

Shape legend: R rows, C single-valued fields, G bags, M numbers, F fields of all kinds, D width,
P = R (C + G) things looked up, N codes of all bags.
"""

from typing import Literal, final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from foretaste.data.features import FieldSide, FieldTable
from foretaste.data.memory import available_bytes, refuse_beyond

Fusion = Literal["concat", "gate"]
"""How a row's fields become one vector: all side by side through a linear layer, or their sum,
weighted by a softmax that the fields themselves decide."""

_COPIES = 4
"""A table in training: weights, gradient, and two moments of the optimizer."""


@final
class FieldEncoder(nn.Module):
    r"""One vector for each row of features.

    With `concat` it is :math:`W [v_1; …; v_F] + b`. With `gate` it is :math:`\sum_f g_f v_f` with
    :math:`g = \mathrm{softmax}(W [v_1; …; v_F] + b)`, where fields that say nothing take no part:
    0 if nothing is known.

    References:
        Arevalo et al., "Gated Multimodal Units for Information Fusion", 2017,
        https://arxiv.org/abs/1702.01992. Departures: a softmax over fields in place of a sigmoid
        for each, and no tanh, so that any number of fields, missing ones too, weigh 1 together.
    """

    def __init__(self, side: FieldSide, *, embedding_dim: int, fusion: Fusion) -> None:
        """Make untrained weights.

        Raises:
            TooLargeError: The table of codes would not fit in memory.
        """
        super().__init__()
        refuse_beyond(
            available_bytes(),
            side.num_codes * embedding_dim * 4 * _COPIES,
            f"a table of {side.num_codes:,} codes of features, {embedding_dim} wide,",
            "raise min_count, lower max_values, or leave the largest field out",
        )
        std = embedding_dim**-0.5
        self.num_codes_fields, self.num_bags = len(side.codes), len(side.bags)
        self.num_fields = side.num_fields
        self.embedding_dim = embedding_dim
        self.codes = nn.Embedding(side.num_codes, embedding_dim) if side.num_codes else None
        if self.codes is not None:
            nn.init.normal_(self.codes.weight, std=std)
            with torch.no_grad():
                self.codes.weight[list(side.untaught_codes)] = 0.0
        self.number_weight_MD: nn.Parameter | None = None
        self.number_bias_MD: nn.Parameter | None = None
        if side.num_numbers:
            self.number_weight_MD = nn.Parameter(std * torch.randn(side.num_numbers, embedding_dim))
            self.number_bias_MD = nn.Parameter(torch.zeros(side.num_numbers, embedding_dim))
        self.vectors = nn.ModuleList(nn.Linear(w, embedding_dim) for w in side.vector_widths)
        for layer in self.vectors:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=std)
                nn.init.zeros_(layer.bias)
        width = side.num_fields * embedding_dim
        self.mix = nn.Linear(width, embedding_dim) if fusion == "concat" else None
        self.gate = (
            nn.Linear(width, side.num_fields) if fusion == "gate" and side.num_fields > 1 else None
        )

    def forward(self, table: FieldTable) -> Float[Tensor, "R D"]:
        """Return a vector for each row."""
        field_RFD = self._fields(table)
        if self.mix is not None:
            mixed: Tensor = self.mix(field_RFD.flatten(1))
            return mixed
        present_RF = table.present_RF
        if self.gate is None:
            return (field_RFD * present_RF.unsqueeze(2)).sum(dim=1)
        silenced_RFD = field_RFD * present_RF.unsqueeze(2)
        logit_RF: Tensor = self.gate(silenced_RFD.flatten(1))
        lowest = torch.finfo(logit_RF.dtype).min
        weight_RF = logit_RF.masked_fill(~present_RF, lowest).softmax(dim=1) * present_RF
        return torch.einsum("rf,rfd->rd", weight_RF, silenced_RFD)

    def _fields(self, table: FieldTable) -> Float[Tensor, "R F D"]:
        present_RF = table.present_RF
        parts = [] if self.codes is None else self._look_up(table, self.codes.weight)
        after = self.num_codes_fields + self.num_bags
        if self.number_weight_MD is not None and self.number_bias_MD is not None:
            num_numbers = len(self.number_weight_MD)
            there_RM1 = present_RF[:, after : after + num_numbers].unsqueeze(2)
            number_RMD = table.number_RM.unsqueeze(2) * self.number_weight_MD + self.number_bias_MD
            parts.append(number_RMD * there_RM1)
            after += num_numbers
        for place, (layer, vector_RW) in enumerate(zip(self.vectors, table.vectors, strict=True)):
            there_R1 = present_RF[:, after + place].unsqueeze(1)
            parts.append((layer(vector_RW) * there_R1).unsqueeze(1))
        return torch.cat(parts, dim=1)

    def _look_up(self, table: FieldTable, weight: Tensor) -> list[Tensor]:
        """Look up codes (R, C, D) and the means of bags (R, G, D) in one pass."""
        num_rows, num_codes = table.code_RC.shape
        code_N = torch.cat([table.code_RC.flatten(), table.bag_N])
        single_P = torch.arange(table.code_RC.numel(), device=code_N.device)
        bag_P = table.bag_offsets_RG1[:, :-1].flatten() + table.code_RC.numel()
        looked_PD = F.embedding_bag(code_N, weight, torch.cat([single_P, bag_P]), mode="mean")
        single_PD, mean_PD = looked_PD.split([table.code_RC.numel(), bag_P.numel()])
        return [
            single_PD.view(num_rows, num_codes, self.embedding_dim),
            mean_PD.view(num_rows, self.num_bags, self.embedding_dim),
        ]

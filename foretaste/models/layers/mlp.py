"""A tower of layers, each followed by ReLU but the last.

Shape legend: X rows of any layout, D width of the input, O width of the output.
"""

from collections.abc import Sequence
from typing import final

from jaxtyping import Float
from torch import Tensor, nn

from foretaste.models.layers.dropout import Dropout


@final
class HiddenLinear(nn.Linear):
    r"""A linear layer that ReLU follows: the spread of its input is that of its output's input.

    .. math:: W \sim N(0, 2 / D), \quad b = 0

    References:
        He et al., "Delving Deep into Rectifiers: Surpassing Human-Level Performance on ImageNet
        Classification", ICCV 2015, https://arxiv.org/abs/1502.01852
    """

    def reset_parameters(self) -> None:
        """Draw first weights."""
        nn.init.kaiming_normal_(self.weight, nonlinearity="relu")
        nn.init.zeros_(self.bias)


@final
class MLP(nn.Module):
    """Linear, ReLU and dropout for each hidden layer, then one more linear layer."""

    def __init__(
        self, input_dim: int, hidden: Sequence[int], output_dim: int, *, dropout: float = 0.0
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for width in hidden:
            layers += [HiddenLinear(input_dim, width), nn.ReLU(), Dropout(dropout)]
            input_dim = width
        self.layers = nn.Sequential(*layers, nn.Linear(input_dim, output_dim))

    def forward(self, x_XD: Float[Tensor, "*X D"]) -> Float[Tensor, "*X O"]:
        output: Tensor = self.layers(x_XD)
        return output

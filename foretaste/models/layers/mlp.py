"""A tower of layers, each followed by ReLU but the last."""

from collections.abc import Sequence
from typing import final

from jaxtyping import Float
from torch import Tensor, nn

from foretaste.models.layers.dropout import Dropout


@final
class MLP(nn.Module):
    """Linear, ReLU and dropout for each hidden layer, then one more linear layer."""

    def __init__(
        self, input_dim: int, hidden: Sequence[int], output_dim: int, *, dropout: float = 0.0
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for width in hidden:
            layers += [nn.Linear(input_dim, width), nn.ReLU(), Dropout(dropout)]
            input_dim = width
        self.layers = nn.Sequential(*layers, nn.Linear(input_dim, output_dim))

    def forward(self, x_XD: Float[Tensor, "*X D"]) -> Float[Tensor, "*X O"]:
        output: Tensor = self.layers(x_XD)
        return output

"""Layers over pairs: equal to layers over the concatenated vectors, and activations by hand."""

import pytest
import torch
from torch import nn

from foretaste.models.layers.dense import (
    Activation,
    Dice,
    PairLinear,
    PairMLP,
    RowNorm,
    SlopedReLU,
    pair_dot,
)

B, C, Q, WIDTH = 3, 4, 5, 2


def slow(model: PairMLP, query_BQ: torch.Tensor, item_BCI: torch.Tensor) -> torch.Tensor:
    """Put query and item side by side for each pair."""
    both = torch.cat([query_BQ.unsqueeze(1).expand(-1, item_BCI.shape[1], -1), item_BCI], dim=2)
    return torch.stack([model.layers(model.first.joint(both[b])) for b in range(len(both))])


@pytest.mark.parametrize("hidden", [(), (7,), (7, 3)])
def test_pairs_are_as_if_query_and_item_stood_side_by_side(hidden: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = PairMLP(Q, WIDTH, hidden, 2)
    query_BQ, item_BCI = torch.randn(B, Q), torch.randn(B, C, WIDTH)
    torch.testing.assert_close(model(query_BQ, item_BCI), slow(model, query_BQ, item_BCI))


@pytest.mark.parametrize("shape", [(0, C), (B, 0)])
def test_no_pairs_have_no_outputs(shape: tuple[int, int]) -> None:
    model = PairMLP(Q, WIDTH, (7,), 2)
    assert model(torch.randn(shape[0], Q), torch.randn(*shape, WIDTH)).shape == (*shape, 2)


def test_items_that_all_queries_share_need_to_be_given_once() -> None:
    model = PairMLP(Q, WIDTH, (7,), 2)
    query_BQ, item_1CI = torch.randn(B, Q), torch.randn(1, C, WIDTH)
    torch.testing.assert_close(
        model(query_BQ, item_1CI), model(query_BQ, item_1CI.expand(B, -1, -1).contiguous())
    )
    torch.testing.assert_close(
        pair_dot(query_BQ, torch.ones(1, C, Q)), query_BQ.sum(1, keepdim=True).expand(-1, C)
    )
    item_BCQ = torch.randn(B, C, Q)
    torch.testing.assert_close(
        pair_dot(query_BQ, item_BCQ), (item_BCQ * query_BQ.unsqueeze(1)).sum(2)
    )


@pytest.mark.parametrize(("query_dim", "item_dim"), [(0, WIDTH), (Q, 0)])
def test_one_side_alone_is_enough(query_dim: int, item_dim: int) -> None:
    model = PairMLP(query_dim, item_dim, (7,), 1)
    assert model(torch.randn(B, query_dim), torch.randn(B, C, item_dim)).shape == (B, C, 1)


@torch.no_grad()
def test_first_weights_keep_the_spread_of_their_input_through_the_relu() -> None:
    torch.manual_seed(0)
    query_BQ, item_BCI = torch.randn(500, 300), torch.randn(500, 1, 100)
    output_BCO = PairLinear(300, 100, 400)(query_BQ, item_BCI)
    assert output_BCO.relu().square().mean() == pytest.approx(1, rel=0.05)


def test_dice_by_hand() -> None:
    # 1 and 3: mean 2, variance 1; p = sigma(-1) and sigma(1); slope .5
    dice = Dice(1)
    with torch.no_grad():
        dice.slope_O.fill_(0.5)
    share = torch.tensor([[-1.0], [1.0]]).sigmoid()
    x = torch.tensor([[1.0], [3.0]])
    torch.testing.assert_close(dice(x), x * (share + (1 - share) * 0.5))
    assert dice.mean_O.item() == pytest.approx(0.2)
    assert dice.var_O.item() == pytest.approx(1.0)


def test_the_sloped_relu_and_its_gradient_are_torch_s() -> None:
    layer, theirs = SlopedReLU(3), nn.PReLU(3)
    x, factor = torch.randn(5, 3), torch.randn(5, 3)
    mine, other = (x.clone().requires_grad_() for _ in range(2))
    (layer(mine.view(5, 1, 3)).view(5, 3) * factor).sum().backward()
    (theirs(other) * factor).sum().backward()
    torch.testing.assert_close(mine.grad, other.grad)
    torch.testing.assert_close(layer.slope_O.grad, theirs.weight.grad)
    torch.testing.assert_close(layer(x), theirs(x))


def test_what_is_not_valid_does_not_move_dice() -> None:
    one, other = Dice(2), Dice(2)
    x = torch.randn(3, 4, 2)
    valid = torch.tensor([[True] * 4, [True, False, True, False], [False] * 4])
    meddled = torch.where(valid.unsqueeze(2), x, 99.0)
    torch.testing.assert_close(one(x, valid)[valid], other(meddled, valid)[valid])
    torch.testing.assert_close(one.mean_O, other.mean_O)


@pytest.mark.parametrize("activation", ["relu", "prelu", "dice"])
def test_after_training_a_pair_does_not_see_its_neighbours(activation: Activation) -> None:
    model = PairMLP(Q, WIDTH, (7, 3), 1, activation=activation, batch_norm=True)
    query_BQ, item_BCI = torch.randn(B, Q), torch.randn(B, C, WIDTH)
    model(query_BQ, item_BCI).sum().backward()
    model.eval()
    alone = torch.cat([model(query_BQ[b : b + 1], item_BCI[b : b + 1, :1]) for b in range(B)])
    torch.testing.assert_close(model(query_BQ, item_BCI)[:, :1], alone)


def test_one_row_is_enough_to_train_on() -> None:
    for layer in (RowNorm(2), Dice(2)):
        assert isinstance(layer, nn.Module)
        assert layer(torch.ones(1, 1, 2)).isfinite().all()

"""Losses against arithmetic by hand, autograd on the whole matrix, and laws."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from foretaste.losses import (
    bce_loss_gradient,
    chunked_loss,
    gbce_power,
    softmax_loss_gradient,
)


def test_softmax_by_hand() -> None:
    # Positive logit ln 2, negatives 0 and 0: -ln(2 / 4) = ln 2; probabilities 1/2, 1/4, 1/4.
    loss, positive, negative = softmax_loss_gradient(
        torch.tensor([math.log(2.0)]), torch.zeros(1, 2)
    )
    assert loss.item() == pytest.approx(math.log(2))
    assert positive.tolist() == pytest.approx([-0.5])
    assert negative.tolist() == [pytest.approx([0.25, 0.25])]


def test_softmax_stays_finite_where_exponentials_do_not() -> None:
    loss, positive, negative = softmax_loss_gradient(
        torch.tensor([-1000.0, 1000.0]), torch.tensor([[1000.0], [-torch.inf]])
    )
    assert loss.item() == pytest.approx(2000)
    assert positive.tolist() == [-1, 0]
    assert negative.tolist() == [[1], [0]]


def test_bce_by_hand_and_its_worst_pair_teaches() -> None:
    # ln 2 for the positive and 1/2 of 2 ln 2 for the negatives.
    loss, _, _ = bce_loss_gradient(torch.zeros(1), torch.zeros(1, 2), negative_weight=0.5)
    assert loss.item() == pytest.approx(2 * math.log(2))
    _, positive, negative = bce_loss_gradient(torch.tensor([-30.0]), torch.tensor([[30.0]]))
    assert positive.item() == pytest.approx(-1)
    assert negative.item() == pytest.approx(1)


def test_gbce_power_runs_from_one_to_the_sampling_rate() -> None:
    assert gbce_power(sampling_rate=0.1, calibration=0.0) == pytest.approx(1)
    assert gbce_power(sampling_rate=0.1, calibration=1.0) == pytest.approx(0.1)
    assert gbce_power(sampling_rate=1.0, calibration=0.5) == pytest.approx(1)


def softmax_oracle(positive: Tensor, negative: Tensor) -> Tensor:
    logits = torch.cat([positive.unsqueeze(1), negative], dim=1)
    return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.int64), reduction="sum")


def bce_oracle(positive: Tensor, negative: Tensor) -> Tensor:
    return -0.3 * positive.sigmoid().log().sum() - 0.5 * (1 - negative.sigmoid()).log().sum()


@pytest.mark.parametrize(
    ("loss_gradient", "oracle"),
    [
        (softmax_loss_gradient, softmax_oracle),
        (partial(bce_loss_gradient, positive_power=0.3, negative_weight=0.5), bce_oracle),
    ],
    ids=["softmax", "gbce"],
)
def test_chunks_give_the_loss_and_gradients_of_the_whole(loss_gradient, oracle) -> None:
    # 200 rows of 40,000 candidates are several chunks. Row 0's positive is in column 3.
    generator = torch.Generator().manual_seed(0)
    tables = [
        torch.randn(n, 8, generator=generator, dtype=torch.float64, requires_grad=True)
        for n in (200, 200, 40_000)
    ]
    query, positive, negative = tables
    offset = torch.randn(40_000, generator=generator, dtype=torch.float64)
    hidden = torch.tensor([[0], [3]])
    loss = chunked_loss(query, positive, negative, loss_gradient, offset_M=offset, hidden_2P=hidden)
    (loss * 2).backward()
    found = [table.grad for table in tables]
    for table in tables:
        table.grad = None
    logits = query @ negative.T + offset
    logits = logits.index_put(tuple(hidden), torch.tensor(-torch.inf, dtype=torch.float64))
    expected = oracle((query * positive).sum(1), logits)
    (expected * 2).backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9)
    for got, table in zip(found, tables, strict=True):
        torch.testing.assert_close(got, table.grad, rtol=1e-7, atol=1e-9)


def test_moving_all_logits_together_changes_no_softmax() -> None:
    positive, negative = torch.randn(5), torch.randn(5, 7)
    here, _, _ = softmax_loss_gradient(positive, negative.clone())
    there, _, _ = softmax_loss_gradient(positive + 3, negative + 3)
    assert here.item() == pytest.approx(there.item(), rel=1e-5)

"""Candidates of a loss: any negatives with any loss, by hand and by laws."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from foretaste.data.interactions import Interactions
from foretaste.errors import ConfigError, DataError
from foretaste.losses import (
    bpr_loss_gradient,
    hardest,
    margin_loss_gradient,
    softmax_loss_gradient,
)
from foretaste.training.candidates import CandidateConfig, CandidateLoss, Loss
from tests.worlds import events_of, planted_histories

LOSSES: tuple[Loss, ...] = ("sampled_softmax", "bce", "gbce", "bpr", "margin")
SOURCES: dict[str, dict[str, object]] = {
    "uniform": {"negatives": 6},
    "popular": {"negatives": 6, "popularity_power": 0.75},
    "in batch": {"negatives": 0, "in_batch": True},
    "mixed": {"negatives": 4, "in_batch": True},
    "own": {"negatives": 0, "row_negatives": 3},
    "own and shared": {"negatives": 4, "row_negatives": 2, "popularity_power": 0.5},
    "hardest": {"negatives": 8, "hardest": 2},
}
EVENTS = events_of(planted_histories(num_users=30), num_items=40)


def rows(events: Interactions, num: int = 16, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    place = np.random.default_rng(seed).permutation(len(events))[:num]
    user_N = torch.from_numpy(events.user_idx[place].astype(np.int64))
    return user_N, torch.from_numpy(events.item_idx[place].astype(np.int64))


def tables(num_rows: int, num_items: int = 40) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(num_rows, 6, generator=generator, dtype=torch.float64, requires_grad=True),
        torch.randn(num_items, 6, generator=generator, dtype=torch.float64, requires_grad=True),
    )


def naive(loss: CandidateLoss, drawn, query_ND: Tensor, table_ID: Tensor) -> Tensor:
    """Row by row, over Python lists of negatives."""
    config, found = loss.config, []
    shared = drawn.item_V[drawn.shared_M].tolist()
    hidden = set(map(tuple, drawn.hidden_2P.T.tolist()))
    for n in range(len(query_ND)):
        own = drawn.item_V[drawn.own_NH[n]].tolist()
        counts = [*drawn.log_count_M.tolist(), *drawn.log_count_NH[n].tolist()]
        negatives = [
            query_ND[n] @ table_ID[item]
            - (count if config.loss == "sampled_softmax" and config.log_q else 0.0)
            for column, (item, count) in enumerate(zip([*shared, *own], counts, strict=True))
            if (n, column) not in hidden
        ]
        s = torch.stack(negatives)
        if config.hardest:
            s = s.topk(min(config.hardest, len(s))).values
        p = query_ND[n] @ table_ID[drawn.item_V[drawn.target_N[n]]]
        num = len(shared) + len(own)
        num = min(num, config.hardest) if config.hardest else num
        match config.loss:
            case "bpr":
                found.append(F.softplus(s - p).mean())
            case "margin":
                found.append((s - p + config.margin).clamp(min=0).mean())
            case "bce":
                found.append(F.softplus(-p) + F.softplus(s).sum() / num)
            case "gbce":
                rate = min(1.0, num / (loss.num_known - 1))
                beta = rate * (0.75 * (1 - 1 / rate) + 1 / rate)
                found.append(beta * F.softplus(-p) + F.softplus(s).sum())
            case _:
                found.append(torch.cat([p.view(1), s]).logsumexp(0) - p)
    return torch.stack(found).mean()


@pytest.mark.parametrize(("name", "source"), list(itertools.product(LOSSES, SOURCES)))
def test_any_negatives_go_with_any_loss(name: Loss, source: str) -> None:
    torch.manual_seed(0)
    loss = CandidateLoss(CandidateConfig.model_validate({"loss": name} | SOURCES[source]), EVENTS)
    user_N, target_N = rows(EVENTS)
    drawn = loss.draw(user_N, target_N)
    query_ND, table_ID = tables(len(user_N))
    value = loss(drawn, query_ND, F.embedding(drawn.item_V, table_ID))
    expected = naive(loss, drawn, query_ND, table_ID)
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-7)
    found = torch.autograd.grad(value, (query_ND, table_ID), retain_graph=True)
    wanted = torch.autograd.grad(expected, (query_ND, table_ID))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("source", SOURCES)
def test_a_known_positive_is_never_a_negative_if_known_items_are_excluded(source: str) -> None:
    torch.manual_seed(0)
    settings = {"loss": "bpr", "exclude_known": True} | SOURCES[source]
    loss = CandidateLoss(CandidateConfig.model_validate(settings), EVENTS)
    done = [set(EVENTS.history(user).tolist()) for user in range(EVENTS.num_users)]
    for seed in range(5):
        user_N, target_N = rows(EVENTS, seed=seed)
        drawn = loss.draw(user_N, target_N)
        hidden = set(map(tuple, drawn.hidden_2P.T.tolist()))
        shared = drawn.item_V[drawn.shared_M].tolist()
        for n, user in enumerate(user_N.tolist()):
            own = drawn.item_V[drawn.own_NH[n]].tolist()
            columns = [*shared, *own]
            compared = {item for c, item in enumerate(columns) if (n, c) not in hidden}
            assert not compared & done[user]
            assert {item for item in shared if item not in done[user]} <= compared
        assert (drawn.hidden_2P[0].diff() >= 0).all()


def test_by_default_only_the_rows_own_item_is_hidden() -> None:
    loss = CandidateLoss(CandidateConfig(loss="softmax"), EVENTS)
    user_N, target_N = rows(EVENTS)
    drawn = loss.draw(user_N, target_N)
    assert torch.equal(drawn.hidden_2P[0], torch.arange(len(user_N)))
    assert torch.equal(drawn.item_V[drawn.shared_M][drawn.hidden_2P[1]], target_N)


def test_hard_negatives_are_compared_in_full() -> None:
    loss = CandidateLoss(CandidateConfig(loss="sampled_softmax", negatives=5), EVENTS)
    user_N, target_N = rows(EVENTS)
    hard_NH = (target_N.unsqueeze(1) + torch.tensor([1, 2])) % 40
    drawn = loss.draw(user_N, target_N, hard_NH)
    assert torch.equal(drawn.item_V[drawn.own_NH], hard_NH)
    assert (drawn.log_count_NH == 0).all()


def test_a_user_with_every_item_is_noted() -> None:
    events = events_of([[0, 1, 2], [0]], num_items=3)
    config = CandidateConfig(loss="bpr", negatives=0, row_negatives=1, exclude_known=True)
    with pytest.raises(DataError, match="row 0 has had all 3 items"):
        CandidateLoss(config, events).draw(torch.tensor([0, 1]), torch.tensor([0, 0]))


def test_a_catalogue_of_one_has_no_negatives_and_no_loss() -> None:
    events = events_of([[0], [0]], num_items=1)
    for name in LOSSES:
        loss = CandidateLoss(CandidateConfig(loss=name, negatives=4, hardest=2), events)
        drawn = loss.draw(torch.tensor([0, 1]), torch.tensor([0, 0]))
        value = loss(drawn, torch.randn(2, 3), torch.randn(1, 3))
        assert value.isfinite()


def test_a_loss_without_negatives_is_refused() -> None:
    with pytest.raises(ConfigError, match="needs negatives"):
        CandidateConfig(loss="bpr", negatives=0)
    CandidateConfig(loss="softmax", negatives=0)


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"in_batch": True, "row_negatives": 2}, "omit in_batch, row_negatives"),
        ({"popularity_power": 0.75}, "omit popularity_power"),
        ({"loss": "bce", "frequency": "streamed"}, "set in_batch"),
    ],
)
def test_settings_that_would_do_nothing_are_refused(settings: dict[str, object], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        CandidateConfig(**settings)


def test_bpr_by_hand() -> None:
    # Differences 0 and ln 3: -ln(1/2) and -ln(1/4), their mean is 1.5 ln 2.
    loss, positive, negative = bpr_loss_gradient(
        torch.zeros(1), torch.tensor([[0.0, math.log(3.0)]])
    )
    assert loss.item() == pytest.approx(1.5 * math.log(2))
    assert negative.tolist() == [pytest.approx([0.25, 0.375])]
    assert positive.tolist() == pytest.approx([-0.625])


def test_bpr_leaves_out_what_is_no_candidate() -> None:
    loss, _, negative = bpr_loss_gradient(torch.zeros(1), torch.tensor([[0.0, -torch.inf]]))
    assert loss.item() == pytest.approx(math.log(2))
    assert negative.tolist() == [[0.5, 0.0]]


def test_margin_by_hand() -> None:
    # 0.5 and 3 above, margin 1: hinges 0.5 (of -0.5 + 1) and 0, their mean 0.25.
    loss, positive, negative = margin_loss_gradient(
        torch.tensor([3.0]), torch.tensor([[2.5, 0.0]]), margin=1.0
    )
    assert loss.item() == pytest.approx(0.25)
    assert positive.tolist() == [-0.5]
    assert negative.tolist() == [[0.5, 0.0]]


def test_the_hardest_of_all_are_all() -> None:
    positive_N, negative_NM = torch.zeros(2), torch.tensor([[1.0, 2.0, 3.0], [0.0, -1.0, 4.0]])
    whole = softmax_loss_gradient(positive_N, negative_NM.clone())
    for found, wanted in zip(
        hardest(softmax_loss_gradient, 3)(positive_N, negative_NM.clone()), whole, strict=True
    ):
        assert torch.equal(found, wanted)
    _, _, negative = hardest(softmax_loss_gradient, 1)(positive_N, negative_NM.clone())
    assert (negative != 0).tolist() == [[False, False, True], [False, False, True]]

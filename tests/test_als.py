"""Implicit ALS: the user vector of a history against the equation and against `implicit`."""

import warnings

import numpy as np
import polars as pl
import pytest
import torch
from implicit.cpu.als import AlternatingLeastSquares
from scipy import sparse
from threadpoolctl import threadpool_limits

from foretaste.data.batch import Queries
from foretaste.data.interactions import Interactions
from foretaste.data.vocabulary import Vocabulary
from foretaste.models import baselines as als
from foretaste.models.baselines import ImplicitALS, ImplicitALSConfig
from tests.worlds import every_vector

NUM_ITEMS = 50
CONFIG = ImplicitALSConfig(factors=6, regularization=0.3, alpha=4.0, iterations=10)


def histories(seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, NUM_ITEMS - 1, rng.integers(0, 25)).tolist() for _ in range(70)]


def learned(config: ImplicitALSConfig = CONFIG, seed: int = 0) -> ImplicitALS:
    torch.manual_seed(seed)
    model = ImplicitALS(config, num_items=NUM_ITEMS)
    of = histories()
    model.learn(
        Interactions(
            users=Vocabulary(pl.Series(range(len(of)), dtype=pl.Int64)),
            items=Vocabulary(pl.Series(range(NUM_ITEMS), dtype=pl.Int64)),
            offsets=np.cumsum([0, *map(len, of)]),
            item_idx=np.array([i for h in of for i in h], dtype=np.int32),
        )
    )
    return model


@pytest.mark.parametrize("block", [1, 64])
def test_the_fold_in_is_that_of_implicit(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(als, "_BLOCK_QUERIES", block)
    model, asked = learned(), histories(seed=1)
    with threadpool_limits(limits=1, user_api="blas"):
        oracle = AlternatingLeastSquares(
            factors=6, regularization=0.3, alpha=5.0, use_cg=False, num_threads=1
        )
    oracle.item_factors = every_vector(model).numpy()
    done_BI = np.zeros((len(asked), NUM_ITEMS), np.float32)
    for row, history in enumerate(asked):
        done_BI[row, history] = 1
    expected = oracle.recalculate_user(np.arange(len(asked)), sparse.csr_matrix(done_BI))
    encoded = model.encode(Queries.of_histories(asked))
    np.testing.assert_allclose(encoded, expected, rtol=1e-3, atol=1e-4)


def test_the_fold_in_minimises_the_loss_of_the_paper() -> None:
    # the gradient of sum c_i (p_i - x·y_i)² + l2 |x|² must vanish at x, with c = 1 + alpha p
    model, done = learned(), [3, 9, 27]
    y_ID = every_vector(model).double()
    x_D = model.encode(Queries.of_histories([done]))[0].double().requires_grad_()
    p_I = torch.zeros(NUM_ITEMS, dtype=torch.float64)
    p_I[done] = 1
    loss = ((1 + CONFIG.alpha * p_I) * (p_I - y_ID @ x_D) ** 2).sum()
    (gradient_D,) = torch.autograd.grad(loss + CONFIG.regularization * x_D @ x_D, x_D)
    assert gradient_D.abs().max() < 1e-4


def test_more_iterations_fit_better() -> None:
    def loss(iterations: int) -> float:
        model = learned(CONFIG.model_copy(update={"iterations": iterations}))
        score_BI = model.encode(Queries.of_histories(histories())) @ every_vector(model).T
        p_BI = torch.zeros_like(score_BI)
        for row, history in enumerate(histories()):
            p_BI[row, history] = 1
        return float(((1 + CONFIG.alpha * p_BI) * (p_BI - score_BI) ** 2).sum())

    assert loss(20) < 0.9 * loss(1)


def test_an_empty_history_is_the_origin() -> None:
    encoded = learned().encode(Queries.of_histories([[], [1, 2], []]))
    assert (encoded[[0, 2]] == 0).all()
    assert encoded[1].abs().sum() > 0


def test_an_item_without_events_has_no_factors() -> None:
    assert every_vector(learned())[NUM_ITEMS - 1].abs().max() < 1e-6


def test_another_seed_gives_other_factors() -> None:
    assert torch.equal(every_vector(learned(seed=1)), every_vector(learned(seed=1)))
    assert not torch.equal(every_vector(learned(seed=1)), every_vector(learned(seed=2)))


def test_the_package_does_not_warn_its_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("implicit.utils._checked_blas_config", False)  # it warns once
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        learned()

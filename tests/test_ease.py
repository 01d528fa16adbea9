"""EASE against the formula of the paper in float64, and its limits of memory."""

import numpy as np
import polars as pl
import pytest
import torch

from foretaste.data.arrays import available_bytes
from foretaste.data.batch import Queries
from foretaste.data.interactions import Interactions
from foretaste.data.vocabulary import Vocabulary
from foretaste.errors import ConfigError, TooLargeError
from foretaste.models import baselines
from foretaste.models.baselines import EASE, EASEConfig

NUM_ITEMS = 40


def events_of(matrix_UI: np.ndarray) -> Interactions:
    counts = matrix_UI.sum(axis=1)
    return Interactions(
        users=Vocabulary(pl.Series(range(len(matrix_UI)), dtype=pl.Int64)),
        items=Vocabulary(pl.Series(range(matrix_UI.shape[1]), dtype=pl.Int64)),
        offsets=np.cumsum([0, *counts]),
        item_idx=np.concatenate(
            [np.repeat(np.arange(matrix_UI.shape[1]), row) for row in matrix_UI]
        ).astype(np.int32),
    )


@pytest.mark.parametrize("block", [7, 1024])
@pytest.mark.parametrize("l2", [0.5, 30.0])
def test_weights_and_scores_follow_the_formula(
    l2: float, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(baselines, "_BLOCK_ITEMS", block)
    rng = np.random.default_rng(0)
    times_UI = rng.poisson(0.2, size=(90, NUM_ITEMS))  # some do an item twice: counted once
    model = EASE(EASEConfig(l2=l2), num_items=NUM_ITEMS)
    model.learn(events_of(times_UI))

    x_UI = (times_UI > 0).astype(np.float64)
    inverse = np.linalg.inv(x_UI.T @ x_UI + l2 * np.eye(NUM_ITEMS))
    weight = np.eye(NUM_ITEMS) - inverse @ np.diag(1 / np.diag(inverse))
    np.testing.assert_allclose(model.weight_II, weight, rtol=1e-3, atol=1e-5)
    assert (model.weight_II.diagonal() == 0).all()
    asked = [np.repeat(np.arange(NUM_ITEMS), row).tolist() for row in times_UI]
    np.testing.assert_allclose(model.score(Queries.of_histories(asked)), x_UI @ weight, atol=1e-4)


def test_two_items_by_hand() -> None:
    # both items done by 3 users, together by 2; l2 = 1: G = [[4, 2], [2, 4]], P ∝ [[4, -2],
    # [-2, 4]], so each weight is -P_ij / P_jj = 2 / 4
    model = EASE(EASEConfig(l2=1), num_items=2)
    model.learn(events_of(np.array([[1, 1], [1, 1], [1, 0], [0, 1]])))
    torch.testing.assert_close(model.weight_II, torch.tensor([[0.0, 0.5], [0.5, 0.0]]))


def test_more_memory_than_allowed_is_refused_before_it_is_taken() -> None:
    # 40 items: 40 · 40 · 4 bytes are kept, three times as much to learn
    events = events_of(np.ones((2, NUM_ITEMS), dtype=np.int64))
    kept = 4 * NUM_ITEMS**2
    EASE(EASEConfig(max_bytes=3 * kept), num_items=NUM_ITEMS).learn(events)
    model = EASE(EASEConfig(max_bytes=3 * kept - 1), num_items=NUM_ITEMS)
    with pytest.raises(TooLargeError, match="EASE over 40 items"):
        model.learn(events)
    with pytest.raises(TooLargeError, match="item_knn"):
        EASE(EASEConfig(max_bytes=kept - 1), num_items=NUM_ITEMS)


def test_a_catalogue_of_millions_is_refused_at_once() -> None:
    with pytest.raises(TooLargeError, match=r"EASE over 10,000,000 items needs 372,529\.0 GiB"):
        EASE(EASEConfig(), num_items=10_000_000)


def test_available_memory_is_that_of_a_machine() -> None:
    assert 2**20 < available_bytes() < 2**50


def test_without_l2_there_is_no_inverse_and_so_no_such_setting() -> None:
    with pytest.raises(ConfigError, match="above 0"):
        EASEConfig(l2=0)

"""Places in a list: the exact expectation over random orders of equal scores."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foretaste.evaluation.list_metrics import (
    Hits,
    best,
    chance_within,
    draw_lists,
    place,
    settle,
)


def settled(scores: list[list[float]], targets: list[list[int]], k: int) -> Hits:
    score_BI = torch.tensor(scores)
    row = np.repeat(np.arange(len(targets)), [len(own) for own in targets])
    item = np.array([i for own in targets for i in own], dtype=np.int64)
    return settle(best(score_BI, k), row, score_BI.numpy()[row, item])


def by_all_orders(scores: list[float], targets: list[int], k: int) -> np.ndarray:
    """The oracle: try every order of the items, sort stably, and average the places."""
    width, total = min(k, len(scores)), []
    for order in itertools.permutations(range(len(scores))):
        ranked = sorted(order, key=lambda i: -scores[i])[:width]
        hit = np.array([i in targets and scores[i] > -math.inf for i in ranked], dtype=float)
        first = hit * (hit.cumsum() == 1)
        total.append([hit, first, hit * hit.cumsum()])
    return np.mean(total, axis=0)


def test_places_by_hand() -> None:
    # scores 5 3 3 1, targets the two 3s: both share places 2 and 3, so each holds a target.
    hits = settled([[5.0, 3.0, 3.0, 1.0]], [[1, 2]], k=3)
    assert hits.relevance_BK.tolist() == [[0, 1, 1]]
    assert hits.first_BK.tolist() == [[0, 1, 0]]
    assert hits.so_far_BK.tolist() == [[0, 1, 2]]
    # targets 1 and 3: place 2 holds target 1 with probability 1/2, place 3 otherwise.
    hits = settled([[5.0, 3.0, 3.0, 1.0]], [[1, 3]], k=4)
    assert hits.relevance_BK.tolist() == [[0, 0.5, 0.5, 1]]
    assert hits.first_BK.tolist() == [[0, 0.5, 0.5, 0]]
    assert hits.so_far_BK.tolist() == [[0, 0.5, 0.5, 2]]


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    scores=st.lists(st.sampled_from([-math.inf, 0.0, 1.0, 2.0]), min_size=1, max_size=6),
    data=st.data(),
)
def test_every_order_of_equal_scores_is_as_likely(scores: list[float], data: st.DataObject) -> None:
    items = st.integers(0, len(scores) - 1)
    targets = data.draw(st.lists(items, min_size=1, unique=True))
    k = data.draw(st.integers(1, 7))
    hits = settled([scores], [targets], k)
    expected = by_all_orders(scores, targets, k)
    got = np.stack([hits.relevance_BK[0], hits.first_BK[0], hits.so_far_BK[0]])
    np.testing.assert_allclose(got, expected, atol=1e-12)


def test_places_without_equal_scores_are_those_of_a_sort() -> None:
    generator = np.random.default_rng(0)
    scores = generator.permutation(200 * 50).reshape(200, 50).astype(np.float32)
    targets = [sorted(generator.choice(50, size=3, replace=False).tolist()) for _ in range(200)]
    hits = settled(scores.tolist(), targets, k=10)
    ranked = np.argsort(-scores, axis=1)[:, :10]
    expected = [np.isin(row, own) for row, own in zip(ranked, targets, strict=True)]
    assert np.array_equal(hits.relevance_BK, np.array(expected, dtype=float))


def test_an_excluded_target_is_never_found() -> None:
    hits = settled([[-math.inf, 1.0, -math.inf]], [[0, 1]], k=3)
    assert hits.relevance_BK.tolist() == [[1, 0, 0]]
    assert hits.num_targets_B.tolist() == [2]


def test_the_last_group_reaches_beyond_the_list() -> None:
    # 7 candidates have equal scores, the list has 2 places: a target is on each with 1/7.
    hits = settled([[0.0] * 7], [[6]], k=2)
    np.testing.assert_allclose(hits.relevance_BK, [[1 / 7, 1 / 7]])


def test_the_chance_of_a_target_is_that_of_its_places() -> None:
    # 1 better, 3 equal: places 2, 3, 4.
    better, equal = np.array([1]), np.array([3])
    chances = [chance_within(better, equal, k).item() for k in (1, 2, 3, 4, 9)]
    assert chances == pytest.approx([0, 1 / 3, 2 / 3, 1, 1])


def test_places_are_counted() -> None:
    score_BI = torch.tensor([[3.0, 1.0, 2.0, 2.0, 0.0, -math.inf]])
    scores = score_BI.numpy()[0]
    better, equal = place(best(score_BI, 6), np.zeros(6, np.int64), scores)
    assert better.tolist() == [0, 3, 1, 1, 4, 6]
    assert equal.tolist() == [1, 1, 2, 2, 1, 1]


def drawn(scores: np.ndarray, k: int, seed: int = 0) -> np.ndarray:
    score_BI = torch.from_numpy(scores.astype(np.float32))
    keys = np.arange(len(scores)) * 17
    return draw_lists(score_BI, best(score_BI, k), keys, seed=seed)


def test_lists_hold_the_best_items() -> None:
    scores = np.random.default_rng(0).integers(0, 6, size=(300, 40))
    lists = drawn(scores, 12)
    for row, items in zip(scores, lists, strict=True):
        assert len(set(items.tolist())) == 12
        assert row[items].tolist() == sorted(row.tolist(), reverse=True)[:12]


def test_lists_end_where_the_candidates_end() -> None:
    scores = np.array([[-np.inf, 1.0, -np.inf, 2.0], [-np.inf] * 4])
    assert drawn(scores, 3).tolist() == [[3, 1, -1], [-1, -1, -1]]


def test_a_longer_list_begins_with_the_shorter() -> None:
    scores = np.random.default_rng(0).integers(0, 3, size=(50, 40))
    assert np.array_equal(drawn(scores, 20)[:, :7], drawn(scores, 7))


def test_equal_scores_are_drawn_evenly() -> None:
    # 3 of 10 equal items, 20,000 lists: each place holds each item 2,000 times, s.d. 42.
    lists = drawn(np.zeros((20_000, 10)), 3)
    for place_in_list in range(3):
        counts = np.bincount(lists[:, place_in_list], minlength=10)
        assert np.abs(counts - 2000).max() < 5 * 42


def test_the_seed_decides_the_draw_and_the_block_does_not() -> None:
    scores = np.zeros((40, 30))
    assert np.array_equal(drawn(scores, 5, seed=3), drawn(scores, 5, seed=3))
    assert not np.array_equal(drawn(scores, 5, seed=3), drawn(scores, 5, seed=4))
    assert np.array_equal(drawn(scores, 5)[:10], drawn(scores[:10], 5))

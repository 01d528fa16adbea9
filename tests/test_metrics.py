"""Each metric, by hand, against three libraries, and by its laws."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ir_measures import AP, RR, P, Qrel, R, ScoredDoc, Success, iter_calc, nDCG
from sklearn.metrics import ndcg_score

from foretaste.evaluation.list_metrics import (
    Hits,
    average_precision,
    best,
    coverage,
    head_membership,
    hit_rate,
    list_mean,
    mrr,
    ndcg,
    popularity_rank,
    precision,
    recall,
    self_information,
    settle,
)

ALL = (hit_rate, recall, precision, ndcg, mrr, average_precision)
Metric = Callable[[Hits, int], np.ndarray]


def settled(score_BI: torch.Tensor, targets: list[list[int]], k: int) -> Hits:
    row = np.repeat(np.arange(len(targets)), [len(own) for own in targets])
    item = np.array([i for own in targets for i in own], dtype=np.int64)
    return settle(best(score_BI, k), row, score_BI.numpy()[row, item])


def ranked(num_items: int, places: list[int], k: int) -> Hits:
    """One query with targets at `places`; place 1 is the best."""
    score_BI = -torch.arange(num_items, dtype=torch.float32).unsqueeze(0)
    return settled(score_BI, [[place - 1 for place in places]], k)


def test_metrics_by_hand() -> None:
    # Targets at places 2, 3 and 9 of 10; the list has 4 places.
    hits = ranked(10, [2, 3, 9], k=4)
    assert hit_rate(hits, 4).item() == 1
    assert hit_rate(hits, 1).item() == 0
    assert recall(hits, 4).item() == pytest.approx(2 / 3)
    assert precision(hits, 4).item() == pytest.approx(2 / 4)
    assert mrr(hits, 4).item() == pytest.approx(1 / 2)
    # precision is 1/2 at place 2 and 2/3 at place 3; min(4, 3) = 3 targets could be there
    assert average_precision(hits, 4).item() == pytest.approx((1 / 2 + 2 / 3) / 3)
    # (1/log2 3 + 1/log2 4) / (1/log2 2 + 1/log2 3 + 1/log2 4)
    gain, ideal = 1 / math.log2(3) + 0.5, 1 + 1 / math.log2(3) + 0.5
    assert ndcg(hits, 4).item() == pytest.approx(gain / ideal)


def test_a_list_longer_than_the_catalogue() -> None:
    hits = ranked(3, [2], k=10)
    assert precision(hits, 10).item() == pytest.approx(1 / 10)
    assert recall(hits, 10).item() == 1
    assert ndcg(hits, 10).item() == pytest.approx(1 / math.log2(3))
    assert mrr(hits, 10).item() == pytest.approx(1 / 2)
    assert average_precision(hits, 10).item() == pytest.approx(1 / 2)


def random_run() -> tuple[torch.Tensor, list[list[int]]]:
    """60 queries over 80 items, without equal scores, 1 to 25 targets each."""
    generator = np.random.default_rng(0)
    scores = generator.permuted(np.tile(np.arange(80.0), (60, 1)), axis=1)
    sizes = generator.integers(1, 26, size=60)
    targets = [sorted(generator.choice(80, size=n, replace=False).tolist()) for n in sizes]
    return torch.from_numpy(scores).float(), targets


RANX_NAMES = ("hit_rate", "recall", "precision", "ndcg", "mrr", "map")
RANX_CUTOFFS = (1, 5, 10, 80, 100)
RANX = """
import json, sys, ranx
given = json.load(sys.stdin)
qrels, run = ranx.Qrels(given["qrels"]), ranx.Run(given["run"])
ranx.evaluate(qrels, run, given["names"], return_mean=False)
json.dump({name: [of[q] for q in sorted(of)] for name, of in run.scores.items()}, sys.stdout)
"""


@pytest.fixture(scope="module")
def ranx_scores() -> dict[str, list[float]]:
    """ranx on the random run, in a process of its own.

    There numba compiles nothing: 60 queries need 0.1 s as they are, and minutes to be compiled.
    """
    scores, targets = random_run()
    given = {
        "run": {
            f"q{n:03}": {str(i): score for i, score in enumerate(row)}
            for n, row in enumerate(scores.tolist())
        },
        "qrels": {f"q{n:03}": {str(i): 1 for i in own} for n, own in enumerate(targets)},
        "names": [f"{name}@{k}" for name in RANX_NAMES for k in RANX_CUTOFFS],
    }
    done = subprocess.run(
        [sys.executable, "-c", RANX],
        input=json.dumps(given),
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"NUMBA_DISABLE_JIT": "1"},
    )
    found: dict[str, list[float]] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("k", RANX_CUTOFFS)
def test_metrics_equal_those_of_ranx(k: int, ranx_scores: dict[str, list[float]]) -> None:
    scores, targets = random_run()
    hits = settled(scores, targets, k)
    sizes = np.array([len(own) for own in targets])
    for name, metric in zip(RANX_NAMES, ALL, strict=True):
        ours = metric(hits, k)
        if name == "map":  # ranx divides by the number of targets
            ours = ours * np.minimum(sizes, k) / sizes
        np.testing.assert_allclose(
            ours, ranx_scores[f"{name}@{k}"], atol=1e-9, rtol=0, err_msg=name
        )


@pytest.mark.parametrize("k", [1, 5, 10, 80])
def test_metrics_equal_those_of_trec_eval(k: int) -> None:
    scores, targets = random_run()
    hits = settled(scores, targets, k)
    run = [
        ScoredDoc(f"{n:03}", str(i), score)
        for n, row in enumerate(scores.tolist())
        for i, score in enumerate(row)
    ]
    qrels = [Qrel(f"{n:03}", str(i), 1) for n, own in enumerate(targets) for i in own]
    measures = [Success @ k, R @ k, P @ k, nDCG @ k, RR @ k, AP @ k]
    theirs = {(m.measure, m.query_id): m.value for m in iter_calc(measures, qrels, run)}
    sizes = np.array([len(own) for own in targets])
    for measure, metric in zip(measures, ALL, strict=True):
        ours = metric(hits, k)
        if metric is average_precision:  # trec_eval divides by the number of targets
            ours = ours * np.minimum(sizes, k) / sizes
        expected = [theirs[measure, f"{n:03}"] for n in range(60)]
        np.testing.assert_allclose(ours, expected, atol=1e-9, rtol=0, err_msg=str(measure))


@pytest.mark.parametrize("k", [1, 5, 10, 80])
def test_ndcg_equals_that_of_scikit_learn(k: int) -> None:
    scores, targets = random_run()
    relevant = np.zeros(scores.shape)
    for row, own in zip(relevant, targets, strict=True):
        row[own] = 1
    assert ndcg(settled(scores, targets, k), k).mean() == pytest.approx(
        ndcg_score(relevant, scores.numpy(), k=k), abs=1e-9
    )


@pytest.mark.parametrize("k", [1, 3, 8])
def test_ndcg_of_equal_scores_equals_that_of_scikit_learn(k: int) -> None:
    # scikit-learn averages over equal scores too, the only library here that does.
    generator = np.random.default_rng(0)
    scores = torch.from_numpy(generator.integers(0, 3, size=(40, 8))).float()
    targets = [sorted(generator.choice(8, size=2, replace=False).tolist()) for _ in range(40)]
    relevant = np.zeros(scores.shape)
    for row, own in zip(relevant, targets, strict=True):
        row[own] = 1
    assert ndcg(settled(scores, targets, k), k).mean() == pytest.approx(
        ndcg_score(relevant, scores.numpy(), k=k), abs=1e-9
    )


@pytest.mark.parametrize("num_items", [1, 2, 17, 101, 1000])
@pytest.mark.parametrize("k", [1, 5, 20])
def test_a_constant_scorer_gets_the_score_of_chance(num_items: int, k: int) -> None:
    # One target at a uniformly random place: the mean value of a place.
    hits = settled(torch.zeros(1, num_items), [[num_items - 1]], k)
    width = min(k, num_items)
    place = np.arange(1, width + 1)
    chance = {
        hit_rate: width / num_items,
        recall: width / num_items,
        precision: width / num_items / k,
        ndcg: (1 / np.log2(place + 1)).sum() / num_items,
        mrr: (1 / place).sum() / num_items,
        average_precision: (1 / place).sum() / num_items,
    }
    for metric, expected in chance.items():
        assert metric(hits, k).item() == pytest.approx(expected, rel=1e-12), metric.__name__


@pytest.mark.parametrize("metric", ALL)
@settings(deadline=None, derandomize=True, max_examples=40)
@given(data=st.data())
def test_moving_a_target_up_never_hurts(metric: Metric, data: st.DataObject) -> None:
    places = data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=12, unique=True))
    k = data.draw(st.integers(1, 14))
    moved = data.draw(st.sampled_from(places))
    before = metric(ranked(12, places, k), k).item()
    assert 0 <= before <= 1 + 1e-12
    if moved > 1:
        other = {moved: moved - 1, moved - 1: moved}  # it is swapped with the item above
        after = metric(ranked(12, [other.get(place, place) for place in places], k), k).item()
        assert after >= before - 1e-12


@pytest.mark.parametrize("metric", ALL)
def test_a_perfect_list_gets_1_and_an_empty_one_0(metric: Metric) -> None:
    assert metric(ranked(9, [1, 2, 3], 3), 3).item() == pytest.approx(1)
    assert metric(ranked(9, [7, 8, 9], 3), 3).item() == 0


def test_a_cutoff_does_not_know_of_the_longer_list() -> None:
    scores, targets = random_run()
    short, long = settled(scores, targets, 5), settled(scores, targets, 40)
    for metric in ALL:
        assert np.array_equal(metric(short, 5), metric(long, 5)), metric.__name__


def test_self_information_by_hand() -> None:
    # shares 1/2, 1/4, 1/4 of 8 events: 1, 2 and 2 bits
    assert self_information(np.array([4, 2, 2, 0])).tolist() == [1, 2, 2, 0]


def test_popularity_by_hand() -> None:
    assert popularity_rank(np.array([3, 9, 3, 0])).tolist() == [1, 0, 1, 3]
    # 10 known items: the head has 2 places. One item leads, three share the other place.
    counts = np.array([9, 5, 5, 5, 1, 1, 1, 1, 1, 1, 0])
    expected = [1, 1 / 3, 1 / 3, 1 / 3, 0, 0, 0, 0, 0, 0, 0]
    assert head_membership(counts).tolist() == pytest.approx(expected)


def test_the_head_is_a_fifth_of_the_catalogue_whatever_is_equal() -> None:
    generator = np.random.default_rng(0)
    for high in (2, 3, 10, 1000):
        counts = generator.integers(0, high, size=53)
        assert head_membership(counts).sum() == pytest.approx(0.2 * (counts > 0).sum())


def test_the_mean_over_a_list_leaves_out_what_it_lacks() -> None:
    lists, value = np.array([[2, 0, -1], [-1, -1, -1]]), np.array([1.0, 5.0, 4.0])
    assert list_mean(lists, value, 3).tolist() == [2.5, 0]
    assert list_mean(lists, value, 1)[0] == 4


def test_coverage_by_hand() -> None:
    shown, known = np.array([True, False, True, False]), np.array([True, True, True, False])
    assert coverage(shown, known) == pytest.approx(2 / 3)

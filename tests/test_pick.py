"""Choosing a list from ranked candidates: by hand, against a slow oracle, and by laws."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foretaste.serving.rule_book import Cap, Spread, pick


def cap(most: int, labels: list[list[int]]) -> Cap:
    """From each candidate's labels."""
    row_E = [row for row, own in enumerate(labels) for _ in own]
    code_E = [code for own in labels for code in own]
    return Cap(most=most, row_E=np.array(row_E, np.int64), code_E=np.array(code_E, np.int64))


def spread(alike_CC: np.ndarray, relevance: float, pool: int = 100) -> Spread:
    return Spread(relevance=relevance, pool=pool, likeness=lambda place: alike_CC[place])


def slowly(
    score: list[float],
    k: int,
    caps: list[tuple[int, list[list[int]]]],
    mmr: tuple[np.ndarray, float, int] | None,
) -> list[int]:
    """Try every candidate for every place, as the sentences of the documentation say it."""
    chosen: list[int] = []
    pooled = score[: mmr[2]] if mmr else score

    def may_stand(one: int) -> bool:
        return one not in chosen and all(
            sum(label in labels[other] for other in chosen) < most
            for most, labels in caps
            for label in labels[one]
        )

    def gain(one: int) -> float:
        if mmr is None:
            return score[one]
        alike, relevance, _ = mmr
        height = (score[one] - min(pooled)) / ((max(pooled) - min(pooled)) or 1)
        nearest = max((alike[one, other] for other in chosen), default=0)
        return relevance * height - (1 - relevance) * nearest

    while len(chosen) < k:
        end = mmr[2] if mmr else len(score)
        while not any(may_stand(one) for one in range(min(end, len(score)))):
            if end >= len(score):
                return chosen
            end *= 4
        open_ones = [one for one in range(min(end, len(score))) if may_stand(one)]
        chosen.append(max(open_ones, key=lambda one: (round(gain(one), 9), -one)))
    return chosen


# ---- by hand -----------------------------------------------------------------------------


def test_a_cap_takes_the_best_of_each_label_and_no_more() -> None:
    # Labels a a a b b c: two of a label at most, so the third a stays out.
    labels = [[0], [0], [0], [1], [1], [2]]
    score = np.array([9.0, 8, 7, 6, 5, 4])
    assert pick(score, 4, caps=[cap(2, labels)]).tolist() == [0, 1, 3, 4]
    assert pick(score, 9, caps=[cap(1, labels)]).tolist() == [0, 3, 5]


def test_an_item_of_two_labels_counts_for_both_and_one_of_none_for_none() -> None:
    # 0 carries a and b, so neither 1 (a) nor 2 (b) may follow; 3 and 4 carry nothing.
    labels = [[0, 1], [0], [1], [], []]
    assert pick(np.arange(5, 0, -1.0), 5, caps=[cap(1, labels)]).tolist() == [0, 3, 4]


def test_two_caps_hold_each_for_itself() -> None:
    genre, year = [[0], [0], [1], [1]], [[7], [8], [8], [9]]
    # 0: genre 0, year 7. 1 shares the genre. 2: genre 1, year 8. 3 shares the genre with 2.
    found = pick(np.arange(4, 0, -1.0), 4, caps=[cap(1, genre), cap(1, year)])
    assert found.tolist() == [0, 2]


def test_diversity_puts_what_differs_before_what_is_like_the_first() -> None:
    # Scores 1, .9, .5, 0 over the pool. After 0: item 1 is its twin (likeness 1), 2 and 3 are
    # different (0). Gains at one half each: .45 - .5 < .25 - 0, so 2 is second; then item 1 gets
    # -.05 and item 3 gets 0, so 3 is third.
    alike = np.eye(4)
    alike[0, 1] = alike[1, 0] = 1
    score = np.array([10.0, 9, 5, 0])
    assert pick(score, 4, spread=spread(alike, 0.5)).tolist() == [0, 2, 3, 1]
    # At .9: .81 - .1 > .45, so the twin keeps its place.
    assert pick(score, 4, spread=spread(alike, 0.9)).tolist() == [0, 1, 2, 3]


def test_candidates_outside_the_pool_follow_when_it_is_used_up() -> None:
    # Both items in the pool are equal; the third differs from them, but is outside.
    alike = np.ones((3, 3))
    alike[2, :2] = alike[:2, 2] = -1
    score = np.array([3.0, 2, 1])
    assert pick(score, 3, spread=spread(alike, 0.0, pool=2)).tolist() == [0, 1, 2]
    assert pick(score, 3, spread=spread(alike, 0.0, pool=3)).tolist() == [0, 2, 1]


def test_nothing_to_choose_from_is_an_empty_list() -> None:
    nothing = np.empty(0)
    assert pick(nothing, 3).tolist() == []
    assert pick(nothing, 3, spread=spread(np.empty((0, 0)), 0.5)).tolist() == []
    assert pick(np.full(4, -np.inf), 3, spread=spread(np.eye(4), 0.0)).tolist() == []
    assert pick(np.array([2.0, -np.inf]), 3).tolist() == [0]


# ---- against the slow way, and laws ------------------------------------------------------


@st.composite
def rankings(draw: st.DrawFn) -> tuple[list[float], list[list[int]], np.ndarray]:
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    num = draw(st.integers(1, 24))
    score = np.sort(rng.integers(0, 12, num).astype(float))[::-1].tolist()
    labels = [sorted(rng.choice(4, rng.integers(0, 3), replace=False).tolist()) for _ in score]
    vectors = rng.normal(size=(num, 3))
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return score, labels, unit @ unit.T


@settings(deadline=None, derandomize=True, max_examples=150)
@given(
    ranking=rankings(),
    k=st.integers(1, 12),
    most=st.integers(1, 3),
    relevance=st.sampled_from([0.0, 0.3, 0.7, 1.0, None]),
    pool=st.integers(1, 30),
)
def test_each_place_is_what_trying_every_candidate_gives(
    ranking: tuple, k: int, most: int, relevance: float | None, pool: int
) -> None:
    score, labels, alike = ranking
    mmr = None if relevance is None else (alike, relevance, pool)
    expected = slowly(score, k, [(most, labels)], mmr)
    found = pick(
        np.array(score),
        k,
        caps=[cap(most, labels)],
        spread=None if relevance is None else spread(alike, relevance, pool),
    )
    assert found.tolist() == expected


@settings(deadline=None, derandomize=True, max_examples=60)
@given(ranking=rankings(), relevance=st.floats(0, 1), pool=st.integers(1, 30))
def test_a_longer_list_begins_with_the_shorter(ranking: tuple, relevance: float, pool: int) -> None:
    score, labels, alike = ranking
    lists = [
        pick(
            np.array(score), k, caps=[cap(2, labels)], spread=spread(alike, relevance, pool)
        ).tolist()
        for k in range(1, len(score) + 1)
    ]
    for shorter, longer in pairwise(lists):
        assert longer[: len(shorter)] == shorter
    assert len(set(lists[-1])) == len(lists[-1])


@pytest.mark.parametrize(("factor", "shift"), [(2.0, 0.0), (0.25, 7.0), (8.0, -300.0)])
def test_the_unit_of_the_scores_does_not_matter(factor: float, shift: float) -> None:
    rng = np.random.default_rng(2)
    score = np.sort(rng.integers(0, 40, 30).astype(float))[::-1]
    asked = spread(rng.normal(size=(30, 30)), 0.5, pool=20)
    before = pick(score, 30, spread=asked).tolist()
    assert pick(score * factor + shift, 30, spread=asked).tolist() == before
    assert before != list(range(30))


def test_relevance_of_one_is_the_order_of_scores_and_caps_without_bite_change_nothing() -> None:
    rng = np.random.default_rng(0)
    score = np.sort(rng.normal(size=50))[::-1]
    alike = rng.normal(size=(50, 50))
    assert pick(score, 50, spread=spread(alike, 1.0)).tolist() == list(range(50))
    labels = [[int(code)] for code in rng.integers(0, 5, 50)]
    assert pick(score, 50, caps=[cap(50, labels)]).tolist() == list(range(50))


@pytest.mark.parametrize("relevance", [0.0, 0.5])
def test_a_ranking_that_goes_on_for_a_window_keeps_the_list_it_had(relevance: float) -> None:
    rng = np.random.default_rng(1)
    score = np.sort(rng.normal(size=160))[::-1]
    labels = [[int(code)] for code in rng.integers(0, 6, 160)]
    alike = rng.normal(size=(160, 160))

    def first(num: int) -> list[int]:
        asked = spread(alike[:num, :num], relevance, pool=10)
        return pick(score[:num], 40, caps=[cap(2, labels[:num])], spread=asked).tolist()

    short, longer, whole = first(10), first(40), first(160)
    assert len(short) < len(whole)
    assert longer[: len(short)] == short
    assert whole[: len(longer)] == longer

"""Pointwise metrics: by hand, against scikit-learn, by their laws, and refused input."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.calibration import calibration_curve
from sklearn.metrics import log_loss as sklearn_log_loss
from sklearn.metrics import mean_absolute_error, mean_squared_error, roc_auc_score

from foretaste.data.tasks import Task
from foretaste.errors import DataError, NonFiniteError
from foretaste.evaluation.row_metrics import RankedRows, TaskRows, auc, reliability, user_auc


def value(
    metric: str,
    label: np.ndarray,
    prediction: np.ndarray,
    weight: np.ndarray | None = None,
    *,
    user: np.ndarray | None = None,
) -> float:
    """A metric of a report; without users every row is of a user of its own, which has a weight."""
    is_probability = metric in ("auc", "gauc", "log_loss", "ece")
    task = Task(name="y", kind="binary" if is_probability else "regression", column="y")
    _, user_N = (
        (None, np.arange(len(label))) if user is None else np.unique(user, return_inverse=True)
    )
    num_users = int(user_N.max(initial=-1)) + 1
    found = TaskRows(
        task=task, label_N=label, prediction_N=prediction, user_N=user_N, num_users=num_users
    )
    return found.metrics()[metric](np.ones(num_users) if weight is None else weight)


def rows(num: int, *, distinct: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels, probabilities of few distinct values (many ties) and whole or broken weights."""
    draw = np.random.default_rng(seed)
    label = draw.integers(0, 2, num).astype(np.float64)
    label[:2] = 0, 1
    probability = draw.integers(0, distinct, num) / (distinct - 1)
    weight = draw.integers(0, 4, num) * draw.choice([1.0, 0.37], num)
    weight[:2] = 1
    return label, probability, weight


@pytest.mark.parametrize("distinct", [2, 7, 10_000])
@pytest.mark.parametrize("num", [2, 50, 3000])
def test_the_metrics_are_those_of_scikit_learn(num: int, distinct: int) -> None:
    label, probability, weight = rows(num, distinct=distinct, seed=num + distinct)
    inside = 0.001 + 0.998 * probability
    for w in (None, weight):
        expected = roc_auc_score(label, probability, sample_weight=w)
        assert auc(label, probability, w) == pytest.approx(expected, abs=1e-9)
        assert value("auc", label, probability, w) == pytest.approx(expected, abs=1e-9)
        expected = sklearn_log_loss(label, inside, sample_weight=w, labels=[0, 1])
        assert value("log_loss", label, inside, w) == pytest.approx(expected, abs=1e-9)
        expected = mean_squared_error(label, probability, sample_weight=w) ** 0.5
        assert value("rmse", label, probability, w) == pytest.approx(expected, abs=1e-9)
        expected = mean_absolute_error(label, probability, sample_weight=w)
        assert value("mae", label, probability, w) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_a_sure_error_costs_what_it_costs_in_scikit_learn(probability: float) -> None:
    label, sure = np.array([0.0, 1.0]), np.full(2, probability)
    expected = sklearn_log_loss(label, sure)
    assert value("log_loss", label, sure) == pytest.approx(expected, abs=1e-9)


def test_auc_by_hand() -> None:
    # Ones at .9 and .5, zeros at .5, .1 and .7: of 6 pairs 3 + (1 + half of one) are right.
    label = np.array([1.0, 1, 0, 0, 0])
    score = np.array([0.9, 0.5, 0.5, 0.1, 0.7])
    assert auc(label, score) == pytest.approx(4.5 / 6)
    # The zero at .7 twice: 8 pairs, of which the one at .9 wins one more.
    assert auc(label, score, np.array([1.0, 1, 1, 1, 2])) == pytest.approx(5.5 / 8)


@pytest.mark.parametrize("num", [2, 17, 1000])
def test_a_constant_score_has_an_auc_of_one_half(num: int) -> None:
    label, _, weight = rows(num, distinct=2)
    assert auc(label, np.full(num, 0.3)) == 0.5
    assert auc(label, np.full(num, 0.3), weight) == pytest.approx(0.5)


@settings(deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(st.booleans(), st.integers(-3, 3)), min_size=2, max_size=20).filter(
        lambda found: len({label for label, _ in found}) == 2
    )
)
def test_auc_is_the_share_of_pairs_in_order(found: list[tuple[bool, int]]) -> None:
    pairs = [(one, zero) for y, one in found if y for z, zero in found if not z]
    by_pairs = sum((one > zero) + (one == zero) / 2 for one, zero in pairs) / len(pairs)
    label = np.array([float(y) for y, _ in found])
    score = np.array([float(s) for _, s in found])
    assert auc(label, score) == pytest.approx(by_pairs)
    assert auc(label, -score) == pytest.approx(1 - by_pairs)
    assert auc(label, np.exp(score)) == pytest.approx(by_pairs)


def test_rows_that_are_counted_twice_weigh_twice() -> None:
    label, score, _ = rows(40, distinct=9)
    times = np.random.default_rng(1).integers(0, 3, 40)
    times[:2] = 1
    drawn = np.repeat(np.arange(40), times)
    assert RankedRows(label, score).auc(times.astype(np.float64)) == pytest.approx(
        auc(label[drawn], score[drawn])
    )


def test_one_class_alone_is_refused_also_where_only_weights_leave_it() -> None:
    with pytest.raises(DataError, match=r"of 3 rows 3 have label 1.*rows of both"):
        auc(np.ones(3), np.arange(3.0))
    with pytest.raises(DataError, match="weights above 0 leave one class only"):
        auc(np.array([0.0, 1]), np.arange(2.0), np.array([0.0, 1]))


@pytest.mark.parametrize("metric", ["auc", "log_loss", "ece"])
def test_what_is_no_label_is_refused_by_its_row(metric) -> None:
    for wrong in (0.5, 2.0, math.nan):
        with pytest.raises(DataError, match="of row 1 is neither 0 nor 1"):
            value(metric, np.array([0, wrong, 1]), np.full(3, 0.5))


@pytest.mark.parametrize("metric", ["auc", "log_loss", "ece", "rmse", "mae"])
def test_a_broken_prediction_gets_no_metric(metric) -> None:
    for broken in (math.nan, math.inf):
        with pytest.raises(NonFiniteError, match="of row 2"):
            value(metric, np.array([0.0, 1, 1]), np.array([0.5, 0.5, broken]))


@pytest.mark.parametrize("metric", ["log_loss", "ece"])
def test_a_logit_is_not_taken_for_a_probability(metric) -> None:
    with pytest.raises(DataError, match=r"1.5 of row 1 is not a probability.*no logits"):
        value(metric, np.array([0.0, 1]), np.array([0.2, 1.5]))


def test_gauc_by_hand() -> None:
    # User 3: ones at .9, .2, zeros at .5, .1: 3 of 4 pairs, 4 rows. User 5: a tie, 2 rows.
    # User 8 has only ones and is left out of the mean: (4 * .75 + 2 * .5) / 6.
    user = np.array([5, 3, 3, 8, 3, 3, 5, 8])
    label = np.array([1.0, 1, 0, 1, 1, 0, 0, 1])
    score = np.array([0.4, 0.9, 0.5, 0.9, 0.2, 0.1, 0.4, 0.1])
    assert value("gauc", label, score, user=user) == pytest.approx((4 * 0.75 + 2 * 0.5) / 6)


def test_each_user_s_auc_is_that_of_the_user_s_rows() -> None:
    label, score, _ = rows(600, distinct=9)
    user = np.random.default_rng(1).integers(0, 60, 600)
    found = user_auc(label, score, user, num_users=61)
    for u in range(60):
        own = user == u
        if 0 < label[own].sum() < own.sum():
            expected = roc_auc_score(label[own], score[own])
            assert found[u] == pytest.approx(expected, abs=1e-9), u
        else:
            assert np.isnan(found[u]), u
    assert np.isnan(found[60])


def test_what_is_added_to_a_user_s_scores_changes_no_gauc() -> None:
    label, score, _ = rows(300, distinct=50)
    user = np.random.default_rng(2).integers(0, 20, 300)
    shift = np.random.default_rng(3).normal(size=20)
    score, moved = score / 100 + 0.4, score / 100 + 0.4 + shift[user] / 100
    found = value("gauc", label, score, user=user)
    assert value("gauc", label, moved, user=user) == pytest.approx(found)
    assert auc(label, moved) != pytest.approx(auc(label, score))


def test_the_calibration_error_by_hand() -> None:
    # Bins of a fifteenth: .21 and .25 (mean .23, one of two happened), .75 (happened) and .77 (did
    # not): mean .76, one of two. (2 / 4) * .27 + (2 / 4) * .26.
    label, probability = np.array([0.0, 1, 1, 0]), np.array([0.21, 0.25, 0.75, 0.77])
    assert value("ece", label, probability) == pytest.approx(0.265)
    curve = reliability(label, probability)
    assert curve.count == (2, 2)
    assert curve.predicted == pytest.approx((0.23, 0.76))
    assert curve.happened == pytest.approx((0.5, 0.5))


def test_the_reliability_curve_is_that_of_scikit_learn() -> None:
    label, probability, _ = rows(500, distinct=30)
    happened, predicted = calibration_curve(label, probability, n_bins=15)
    curve = reliability(label, probability)
    assert curve.predicted == pytest.approx(predicted.tolist(), abs=1e-9)
    assert curve.happened == pytest.approx(happened.tolist(), abs=1e-9)
    assert sum(curve.count) == 500


def test_the_base_rate_alone_is_calibrated_and_orders_nothing() -> None:
    label = (np.arange(1000) < 130).astype(np.float64)
    probability = np.full(1000, 0.13)
    assert value("ece", label, probability) == pytest.approx(0)
    assert auc(label, probability) == 0.5
    entropy = -0.13 * math.log(0.13) - 0.87 * math.log(0.87)
    assert value("log_loss", label, probability) == pytest.approx(entropy)


def test_errors_in_the_label_s_unit_by_hand() -> None:
    label, predicted = np.array([1.0, 2, 10]), np.array([1.0, 5, 6])
    assert value("rmse", label, predicted) == pytest.approx(math.sqrt((9 + 16) / 3))
    assert value("mae", label, predicted) == pytest.approx(7 / 3)

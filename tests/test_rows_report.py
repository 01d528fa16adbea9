"""Reports of labelled rows: masks, intervals, comparisons, calibration, and refused input."""

import dataclasses
import json
import math

import numpy as np
import pytest
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss as sklearn_log_loss
from sklearn.metrics import roc_auc_score

from foretaste.data.tasks import Task
from foretaste.errors import ConfigError, DataError, NonFiniteError
from foretaste.evaluation.chart import reliability_svg
from foretaste.evaluation.compare import compare_rows
from foretaste.evaluation.list_metrics import bootstrap_intervals
from foretaste.evaluation.report import RowsReport
from foretaste.evaluation.row_metrics import auc, fit_calibration
from foretaste.evaluation.rows import Predicted, measure_rows
from foretaste.training.trained import IsotonicCalibration, PlattCalibration, calibrated

CLICK = Task(name="click", column="click")
STARS = Task(name="stars", kind="ordinal", column="stars", levels=(1.0, 2.0, 3.0))


def world(*, noise: float = 1.0, seed: int = 0, num: int = 400, users: int = 40) -> Predicted:
    """Clicks with known probabilities, a third of them without a label; stars for some rows."""
    draw = np.random.default_rng(1)
    user, logit = draw.integers(0, users, num), draw.normal(size=num)
    click = (draw.random(num) < 1 / (1 + np.exp(-logit))).astype(float)
    click[draw.random(num) < 0.3] = np.nan
    stars = np.where(draw.random(num) < 0.5, np.nan, draw.integers(1, 4, num))
    guess = logit + noise * np.random.default_rng(seed).normal(size=num)
    return Predicted(
        name="test",
        digest="d" * 64,
        tasks=(CLICK, STARS),
        user_N=10 * user,
        label_NT=np.stack([click, stars], axis=1),
        prediction_NT=np.stack([1 / (1 + np.exp(-guess)), np.full(num, 2.0)], axis=1),
        notes=("rows of a small world",),
    )


def measured(predicted: Predicted, *, resamples: int = 0, calibration=None) -> RowsReport:
    return measure_rows(
        predicted,
        model="Guess",
        resamples=resamples,
        seed=0,
        calibration=calibration or {},
        settings={},
        train_seed=0,
    )


def mean_of_users(label: np.ndarray, score: np.ndarray, user: np.ndarray) -> float:
    """Each user's AUC where there are rows of both classes, weighed by the user's rows."""
    own = [user == one for one in np.unique(user)]
    own = [rows for rows in own if 0 < label[rows].sum() < rows.sum()]
    values = [roc_auc_score(label[rows], score[rows]) for rows in own]
    return float(np.average(values, weights=[rows.sum() for rows in own]))


def by_bins(label: np.ndarray, probability: np.ndarray) -> float:
    """The expected calibration error over 15 bins of equal width."""
    bins = np.ceil(probability * 15).clip(1).astype(int)
    return sum(
        abs(np.sum(probability[bins == bin_] - label[bins == bin_])) / len(label)
        for bin_ in np.unique(bins)
    )


def test_each_task_is_measured_on_the_rows_that_have_its_label() -> None:
    predicted = world()
    report = measured(predicted)
    label, stars = predicted.label_NT.T
    found, probability = ~np.isnan(label), predicted.prediction_NT[:, 0]
    assert report.metrics["auc_click"] == pytest.approx(
        roc_auc_score(label[found], probability[found]), abs=1e-9
    )
    assert report.metrics["log_loss_click"] == pytest.approx(
        sklearn_log_loss(label[found], probability[found]), abs=1e-9
    )
    assert report.metrics["gauc_click"] == pytest.approx(
        mean_of_users(label[found], probability[found], predicted.user_N[found]), abs=1e-12
    )
    assert report.metrics["ece_click"] == pytest.approx(
        by_bins(label[found], probability[found]), abs=1e-12
    )
    rated = ~np.isnan(stars)
    assert report.metrics["rmse_stars"] == pytest.approx(
        math.sqrt(((stars[rated] - 2) ** 2).mean())
    )
    assert report.metrics["mae_stars"] == pytest.approx(np.abs(stars[rated] - 2).mean())
    assert report.counts["labels_click"] == found.sum() < report.counts["rows"] == 400
    assert report.counts["labels_stars"] == rated.sum()


def test_what_is_predicted_where_there_is_no_label_changes_nothing() -> None:
    predicted = world()
    other = np.where(np.isnan(predicted.label_NT), np.nan, predicted.prediction_NT)
    changed = dataclasses.replace(predicted, prediction_NT=other)
    assert measured(changed).metrics == measured(predicted).metrics


def test_one_task_needs_no_suffix_and_drawn_zeros_have_theirs() -> None:
    both = world()
    alone = dataclasses.replace(
        both,
        tasks=(CLICK,),
        label_NT=both.label_NT[:, :1],
        prediction_NT=both.prediction_NT[:, :1],
        suffix="_sampled_4",
    )
    report = measured(alone)
    names = {"auc", "gauc", "log_loss", "ece"}
    assert set(report.metrics) == {f"{name}_sampled_4" for name in names}
    assert "auc_sampled_4" in str(report)
    assert report.metrics["auc_sampled_4"] == measured(both).metrics["auc_click"]


def test_the_interval_of_a_mean_is_that_of_the_mean_over_users() -> None:
    # Every user has ten rows, so the mean over rows is the mean over users of their means.
    predicted = world()
    label, probability = predicted.label_NT[:, 0], predicted.prediction_NT[:, 0]
    kept = np.flatnonzero(~np.isnan(label))[:200]
    even = dataclasses.replace(
        predicted,
        tasks=(CLICK,),
        user_N=np.arange(200) // 10,
        label_NT=label[kept, None],
        prediction_NT=probability[kept, None],
    )
    report = measured(even, resamples=500)
    right = np.where(label[kept] == 1, probability[kept], 1 - probability[kept])
    own = -np.log(right).reshape(20, 10).mean(axis=1)
    (expected,) = bootstrap_intervals(own[:, None], resamples=500, seed=0)
    assert report.intervals["log_loss"] == pytest.approx(expected, abs=1e-12)


def test_the_interval_of_auc_is_computed_again_for_each_draw_of_users() -> None:
    predicted = world(num=60, users=8)
    report = measured(predicted, resamples=50)
    label, probability = predicted.label_NT[:, 0], predicted.prediction_NT[:, 0]
    _, user = np.unique(predicted.user_N, return_inverse=True)
    drawn = np.random.default_rng(0).integers(0, 8, size=(50, 8))
    values = []
    for users in drawn:
        rows = np.concatenate([np.flatnonzero((user == u) & ~np.isnan(label)) for u in users])
        values.append(auc(label[rows], probability[rows]))
    low, high = np.quantile(values, [0.025, 0.975])
    assert report.intervals["auc_click"] == pytest.approx((low, high), abs=1e-12)


def test_the_order_of_rows_and_the_names_of_users_change_no_digit() -> None:
    predicted = world()
    mixed = np.random.default_rng(5).permutation(400)
    other = dataclasses.replace(
        predicted,
        user_N=predicted.user_N[mixed] + 3,
        label_NT=predicted.label_NT[mixed],
        prediction_NT=predicted.prediction_NT[mixed],
    )
    one, two = measured(predicted, resamples=20), measured(other, resamples=20)
    assert two.metrics == pytest.approx(one.metrics, rel=1e-12)
    for name, interval in one.intervals.items():
        assert two.intervals[name] == pytest.approx(interval, rel=1e-12), name


def test_a_report_survives_being_written_and_read() -> None:
    first = world(seed=1)
    scores = fit_calibration("platt", *_click_rows(measured(first)))
    report = measured(world(), resamples=20, calibration={"click": scores})
    again = RowsReport.from_json(report.to_json())
    assert again.metrics == report.metrics
    assert again.intervals == report.intervals
    assert again.calibration == report.calibration
    assert again.reliability == report.reliability
    np.testing.assert_array_equal(again.label_NT, report.label_NT)
    assert str(again) == str(report)
    assert compare_rows(report, again, "auc").difference == 0
    short = RowsReport.from_json(report.to_json(per_row=False))
    assert short.metrics == report.metrics
    with pytest.raises(DataError, match="kept without its rows"):
        compare_rows(report, short, "auc")
    for text in ("{}", "[]", "nonsense", json.dumps({"format": 9})):
        with pytest.raises(DataError, match=r"not a report of rows|update foretaste"):
            RowsReport.from_json(text)


def test_the_table_says_all_that_was_measured() -> None:
    text = str(measured(world(), resamples=20))
    for part in ("Guess on test: 400 rows", "auc", "gauc", "log_loss", "ece", "rmse", "mae"):
        assert part in text, part
    assert "bootstrap over users" in text
    assert "rows of a small world" in text
    assert measured(world()).to_markdown().count("\n| ") == 8  # two of the head


def test_rows_that_are_their_own_users_are_drawn_as_rows() -> None:
    predicted = dataclasses.replace(world(), user_N=np.arange(400))
    report = measured(predicted, resamples=5)
    assert "bootstrap over rows" in str(report)
    assert "gauc_click" not in report.metrics
    assert "gauc of click: not defined, no user has both a 1 and a 0" in report.notes


def test_labels_of_one_class_leave_auc_out_and_say_so() -> None:
    predicted = world()
    label_NT = predicted.label_NT.copy()
    label_NT[label_NT[:, 0] == 0, 0] = np.nan
    report = measured(dataclasses.replace(predicted, label_NT=label_NT))
    assert "auc_click" not in report.metrics
    assert any("auc of click: not defined" in note for note in report.notes)
    assert "log_loss_click" in report.metrics


def test_rows_without_any_label_and_broken_predictions_are_refused() -> None:
    predicted = world()
    with pytest.raises(DataError, match=r"none of the 400 rows of 'test' has a label of click"):
        measured(dataclasses.replace(predicted, label_NT=np.full((400, 2), np.nan)))
    broken = dataclasses.replace(predicted, prediction_NT=np.full((400, 2), np.nan))
    with pytest.raises(NonFiniteError, match=r"a prediction of task 'click'"):
        measured(broken)
    with pytest.raises(ConfigError, match=r"calibration is of 'stars'.*binary tasks are click"):
        measured(predicted, calibration={"stars": PlattCalibration(slope=1, intercept=0)})
    with pytest.raises(ConfigError, match="give 0 or more"):
        measured(predicted, resamples=-1)


def test_a_model_is_better_than_a_noisier_one_and_no_better_than_itself() -> None:
    sharp = measured(world(noise=0.3, num=2000))
    dull = measured(world(noise=2.0, num=2000))
    found = compare_rows(sharp, dull, "auc", resamples=300)
    assert found.metric == "auc_click"
    assert found.difference == pytest.approx(sharp.metrics["auc_click"] - dull.metrics["auc_click"])
    assert found.interval.low > 0
    assert found.p_value < 0.01
    assert compare_rows(dull, sharp, "log_loss", resamples=300).interval.low > 0
    same = compare_rows(sharp, sharp, "auc", resamples=300)
    assert same.interval == (0, 0)
    assert same.p_value == 1


def test_equally_good_models_rarely_differ_significantly() -> None:
    # Two guesses with noise of the same size; chance would say "better" in 1 of 20.
    apart = 0
    for seed in range(20):
        a, b = (measured(world(seed=2 * seed + k + 10)) for k in (0, 1))
        apart += compare_rows(a, b, "auc", resamples=200, seed=seed).p_value < 0.05
    assert apart <= 4


def test_seeds_of_a_model_are_compared_by_their_mean() -> None:
    sharp = [measured(world(noise=0.5, seed=seed)) for seed in (1, 2, 3)]
    dull = [measured(world(noise=2.0, seed=seed)) for seed in (4, 5)]
    found = compare_rows(sharp, dull, "auc", resamples=100)
    assert found.mean_a == pytest.approx(np.mean([r.metrics["auc_click"] for r in sharp]))
    assert found.mean_b == pytest.approx(np.mean([r.metrics["auc_click"] for r in dull]))
    assert found.interval.low < found.difference < found.interval.high


def test_reports_of_other_rows_and_metrics_that_are_not_there_are_refused() -> None:
    report = measured(world())
    other = measured(dataclasses.replace(world(), digest="e" * 64))
    with pytest.raises(DataError, match="of different holdouts"):
        compare_rows(report, other, "auc")
    with pytest.raises(DataError, match=r"'click' of Guess has no 'rmse' here, but auc"):
        compare_rows(report, report, "rmse")
    with pytest.raises(DataError, match=r"no row of 'test' has a label of a task 'buy'"):
        compare_rows(report, report, "auc", task="buy")


def _click_rows(report: RowsReport) -> tuple[np.ndarray, np.ndarray]:
    rows = report.rows("click")
    return rows.label_N, rows.prediction_N


def too_sure(num: int = 3000, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Labels whose true logit is x/2 - 1, and a model that says x."""
    draw = np.random.default_rng(seed)
    x = 3 * draw.normal(size=num)
    return (draw.random(num) < 1 / (1 + np.exp(1 - x / 2))).astype(float), 1 / (1 + np.exp(-x))


@pytest.mark.parametrize("method", ["platt", "isotonic"])
def test_an_overconfident_model_is_corrected_and_keeps_its_order(method) -> None:
    found = fit_calibration(method, *too_sure(seed=0))
    label, probability = too_sure(seed=1)
    better = calibrated(found, probability)
    assert by_bins(label, probability) > 0.15
    assert by_bins(label, better) < 0.04
    before = sklearn_log_loss(label, probability)
    assert sklearn_log_loss(label, better) < before - 0.1
    order = np.argsort(probability)
    assert (np.diff(better[order]) >= 0).all()
    assert auc(label, better) == pytest.approx(auc(label, probability), abs=0.005)


def test_platt_finds_the_line_that_made_the_labels_and_scikit_learn_finds_the_same() -> None:
    label, probability = too_sure(num=20_000)
    found = fit_calibration("platt", label, probability)
    assert isinstance(found, PlattCalibration)
    assert found.slope == pytest.approx(0.5, abs=0.02)
    assert found.intercept == pytest.approx(-1, abs=0.05)
    # A label drawn in from 1 to t is a 1 of weight t and a 0 of weight 1 - t.
    ones = label.sum()
    target = np.where(label == 1, (ones + 1) / (ones + 2), 1 / (20_000 - ones + 2))
    logit = np.log(probability / (1 - probability))[:, None]
    theirs = LogisticRegression(C=np.inf, tol=1e-10).fit(
        np.concatenate([logit, logit]),
        np.repeat([1, 0], 20_000),
        sample_weight=np.concatenate([target, 1 - target]),
    )
    assert found.slope == pytest.approx(theirs.coef_.item(), abs=1e-5)
    assert found.intercept == pytest.approx(theirs.intercept_.item(), abs=1e-5)


def test_platt_has_an_answer_where_a_line_parts_the_classes() -> None:
    label, probability = np.array([0.0, 0, 1, 1]), np.array([0.1, 0.2, 0.8, 0.9])
    found = fit_calibration("platt", label, probability)
    assert isinstance(found, PlattCalibration)
    assert 0 < found.slope < 10
    sure = fit_calibration("platt", label, np.array([0.0, 0, 1, 1]))
    assert np.isfinite(calibrated(sure, np.array([0.0, 0.5, 1]))).all()


def test_isotonic_is_that_of_scikit_learn() -> None:
    label, probability = too_sure(num=5_000)
    probability = (probability * 30).round() / 30  # with ties, and no step that is too steep
    found = fit_calibration("isotonic", label, probability)
    theirs = IsotonicRegression(out_of_bounds="clip", y_min=0, y_max=1).fit(probability, label)
    asked = np.linspace(0, 1, 777)
    assert isinstance(found, IsotonicCalibration)
    # Between the ends that were drawn in: there alone we differ, and there never say 0 or 1.
    inner = [a for a, g in zip(found.at, theirs.predict(found.at), strict=True) if 0 < g < 1]
    asked = asked[(asked >= inner[0]) & (asked <= inner[-1])]
    assert len(asked) > 300
    np.testing.assert_allclose(calibrated(found, asked), theirs.predict(asked), atol=1e-9)
    assert len(found.at) < len(np.unique(probability))


def test_isotonic_makes_no_more_of_a_logit_s_last_digits_than_answers_may_differ() -> None:
    label, probability = too_sure(num=4_000)
    found = fit_calibration("isotonic", label, probability)
    ours = calibrated(found, probability)
    for noise in (1e-6, -1e-6):
        line = np.log(probability / (1 - probability)) + noise
        near = calibrated(found, 1 / (1 + np.exp(-line)))
        np.testing.assert_allclose(near, ours, rtol=0, atol=1.1e-6)
    # A step of 0.6 in no width at all becomes a slope around it that is level again beyond.
    at = np.array([0.2, 0.5, 0.5 + 1e-9, 0.8])
    label = np.array([0.0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 1, 1, 1, 1, 0, 1, 1, 1, 1])
    step = fit_calibration("isotonic", label, at.repeat(5))
    np.testing.assert_allclose(calibrated(step, at), [0.2, 0.5, 0.5, 0.8], atol=1e-8)


def test_isotonic_draws_the_ends_in_by_hand() -> None:
    # Stairs 0 (two rows), 1/2 (two rows), 1 (three rows): 1/4 and 1 - 1/5 at the ends.
    label = np.array([0.0, 0, 1, 0, 1, 1, 1])
    found = fit_calibration("isotonic", label, np.arange(7) / 10)
    np.testing.assert_allclose(
        calibrated(found, np.arange(7) / 10), [0.25, 0.25, 0.5, 0.5, 0.8, 0.8, 0.8]
    )
    # Two stairs, each as low and as high as the other lets it be.
    found = fit_calibration("isotonic", np.array([0.0, 1]), np.array([0.1, 0.9]))
    values = calibrated(found, np.array([0.0, 0.1, 0.9, 1]))
    assert (np.diff(values) >= 0).all()
    assert 0 < values[0] < values[-1] < 1


def test_a_calibration_needs_both_classes() -> None:
    with pytest.raises(DataError, match="all 3 labels are 1"):
        fit_calibration("platt", np.ones(3), np.full(3, 0.5))


def test_the_effect_of_a_calibration_is_reported() -> None:
    label, probability = too_sure(seed=1)
    predicted = Predicted(
        name="test",
        digest="d",
        tasks=(CLICK,),
        user_N=np.arange(len(label)) // 3,
        label_NT=label[:, None],
        prediction_NT=probability[:, None],
    )
    calibration = {"click": fit_calibration("isotonic", *too_sure(seed=0))}
    report = measured(predicted, resamples=20, calibration=calibration)
    assert report.metrics["ece_isotonic"] < report.metrics["ece"] / 4
    assert report.metrics["log_loss_isotonic"] < report.metrics["log_loss"]
    assert report.metrics["ece"] == measured(predicted).metrics["ece"]
    assert "ece_isotonic" in report.intervals
    assert "ece_isotonic" in str(report)
    assert set(report.reliability) == {"click", "click_isotonic"}
    picture = reliability_svg(report)
    assert picture.count("<path") == 2
    assert "click_isotonic: " in picture


def test_an_auc_that_is_no_better_than_chance_is_said_to_be() -> None:
    blind = measured(world(noise=50.0), resamples=200)
    assert blind.at_chance == ("click",)
    frame = blind.to_frame()
    assert dict(zip(frame["metric"], frame["value"], strict=True)) == blind.metrics
    assert set(frame.filter(chance=0.5)["metric"]) == {n for n in blind.metrics if "auc" in n}
    assert "no better than chance, because the interval includes it: click" in blind.to_markdown()
    sighted = measured(world(noise=0.1), resamples=200)
    assert sighted.at_chance == ()
    assert "chance: a random order gets an auc and a gauc of 0.5\n" in sighted.to_markdown()

"""A recipe of a ranker: both kinds of report, calibration, and refused input."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest

import foretaste as ft
from foretaste.cli.main import run
from foretaste.evaluation.row_metrics import Method
from foretaste.evaluation.rows import predict_tasks, ranker_of
from foretaste.experiment.record import metrics_in
from foretaste.training.trained import IsotonicCalibration, PlattCalibration

RECIPE = """
[data]
kind = "files"
files = ["shown.csv"]
timestamp = "time"
columns = ["clicked"]

[split]
kind = "temporal"

[model]
kind = "gmf"
factors = 4
task = { name = "click", column = "clicked" }

[objective]
kind = "rows"
positive = "clicked"

[training]
epochs = 3
batch_events = 256
learning_rate = 0.05
warmup_steps = 0

[evaluation]
k = [5]
calibration = "platt"
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe and a log of what was shown: half of it of the user's own kind."""
    place = tmp_path_factory.mktemp("shown")
    draw = np.random.default_rng(0)
    lines = ["user_id,item_id,time,clicked"]
    for user in range(50):
        for second in range(40):
            item = int(draw.integers(20))
            clicked = int(draw.random() < (0.8 if user % 2 == item % 2 else 0.1))
            lines.append(f"{user},{item},{1_600_000_000 + 100 * second + user},{clicked}")
    (place / "shown.csv").write_text("\n".join(lines))
    (place / "run.toml").write_text(RECIPE)
    return place


@pytest.fixture(scope="module")
def done(folder: Path) -> ft.Run:
    config = ft.read_experiment(folder / "run.toml")
    split = ft.read_split(config, data_dir=folder)
    return ft.run_experiment(config, split, show=False)


def test_a_ranker_s_run_reports_lists_and_rows(done: ft.Run) -> None:
    report = done.report
    assert report.lists is not None
    assert report.rows is not None
    assert set(report.metrics) == set(report.lists.metrics) | set(report.rows.metrics)
    assert {"ndcg_at_5", "auc", "gauc", "log_loss", "ece", "ece_platt"} <= set(report.metrics)
    assert report.intervals["auc"] == report.rows.intervals["auc"]
    assert "NCF on test" in str(report)
    assert "log_loss_platt" in str(report)
    # Lists must find what was clicked; what was only shown is no target.
    clicked = report.rows.label_NT.sum()
    assert report.lists.counts["targets"] + report.lists.counts["repeated_targets"] == clicked
    written = json.loads(report.to_json(per_user=False))
    assert written["rows"]["metrics"] == dict(report.rows.metrics)
    assert written["rows"]["label"] == []
    assert metrics_in(written) == dict(report.metrics)


def test_the_record_holds_the_figures_of_both(done: ft.Run, folder: Path) -> None:
    record = ft.record_run(done, ft.read_experiment(folder / "run.toml"), recipe="run")
    assert record["metrics"] == dict(done.report.metrics)
    json.dumps(record, allow_nan=False)


def test_the_calibration_was_fitted_to_validation_alone(done: ft.Run, folder: Path) -> None:
    config = ft.read_experiment(folder / "run.toml")
    split = ft.read_split(config, data_dir=folder)
    validation = ft.evaluate_rows(done.trained, split, part="validation", resamples=0)
    assert done.report.rows is not None
    assert done.report.rows.calibration == ft.calibrate(validation, "platt")
    assert done.trained.calibration == done.report.rows.calibration


def test_a_refitted_model_keeps_what_was_fitted_before_it_saw_validation(folder: Path) -> None:
    config = ft.read_experiment(folder / "run.toml", overrides=["final=validation"])
    run = ft.run_experiment(config, ft.read_split(config, data_dir=folder), show=False)
    assert run.refitted is not None
    assert run.refitted_report is not None
    assert run.refitted_report.rows is not None
    assert set(run.trained.calibration) == {"click"}
    assert run.refitted.calibration == run.trained.calibration
    assert run.refitted_report.rows.calibration == run.trained.calibration


@pytest.mark.parametrize("method", ["platt", "isotonic"])
def test_a_loaded_bundle_answers_calibrated_probabilities_in_the_order_of_scores(
    done: ft.Run, folder: Path, tmp_path: Path, method: Method
) -> None:
    split = ft.read_split(ft.read_experiment(folder / "run.toml"), data_dir=folder)
    validation = ft.evaluate_rows(done.trained, split, part="validation", resamples=0)
    found = ft.calibrate(validation, method)
    for name, calibration in (("plain", {}), ("kept", found)):
        trained = replace(done.trained, calibration=calibration)
        ft.build_recommender(trained).save(tmp_path / name)
    plain, kept = ft.load(tmp_path / "plain"), ft.load(tmp_path / "kept")
    assert plain.trained.calibration == {}
    assert kept.trained.calibration == found
    moved = 0.0
    for user in range(5):
        before, after = (r.recommend(user, exclude_seen=False, k=20).rows for r in (plain, kept))
        assert [(row.item_id, row.score) for row in before] == [
            (row.item_id, row.score) for row in after
        ]
        given = np.array([row.predictions["click"] for row in before])
        became = np.array([row.predictions["click"] for row in after])
        match found["click"]:
            case PlattCalibration(slope=slope, intercept=intercept):
                line = slope * np.log(given / (1 - given)) + intercept
                expected = 1 / (1 + np.exp(-line))
                assert (np.diff(became) < 0).all()
            case IsotonicCalibration(at=at, gives=gives):
                expected = np.interp(given, at, gives)
                assert (np.diff(became) <= 0).all()  # a stair is level
        np.testing.assert_allclose(became, expected, atol=1e-6)
        moved = max(moved, float(np.abs(became - given).max()))
    assert moved > 0.01
    again = ft.evaluate_rows(kept.trained, split, resamples=0)
    assert again.metrics == pytest.approx(
        ft.evaluate_rows(done.trained, split, calibration=found, resamples=0).metrics, abs=1e-6
    )
    assert f"ece_{method}" in again.metrics


@pytest.mark.parametrize(
    ("override", "has_lists", "has_rows"),
    [("evaluation.catalogue=false", False, True), ("evaluation.rows=false", True, False)],
)
def test_either_report_can_be_left_out(
    done: ft.Run, folder: Path, override: str, *, has_lists: bool, has_rows: bool
) -> None:
    config = ft.read_experiment(folder / "run.toml", overrides=[override])
    report = ft.evaluate_split(done.trained, config, ft.read_split(config, data_dir=folder))
    assert (report.lists is not None, report.rows is not None) == (has_lists, has_rows)
    assert metrics_in(json.loads(report.to_json())) == dict(report.metrics)


def test_a_recipe_that_measures_nothing_is_refused(folder: Path) -> None:
    with pytest.raises(ft.ConfigError, match="neither catalogue nor rows is measured"):
        ft.read_experiment(
            folder / "run.toml", overrides=["evaluation.rows=false", "evaluation.catalogue=false"]
        )
    config = ft.read_experiment(
        folder / "run.toml",
        overrides=[
            'model={ kind = "popularity" }',
            "objective=none",
            "evaluation.catalogue=false",
        ],
    )
    with pytest.raises(ft.ConfigError, match="popularity predicts no labels of rows"):
        ft.run_experiment(config, ft.read_split(config, data_dir=folder), show=False)


def test_the_command_line_fits_and_measures_a_ranker(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = tmp_path / "bundle"
    recipe = str(folder / "run.toml")
    where = ["--data-dir", str(folder), "--json"]
    with pytest.raises(SystemExit) as end:
        run(["fit", recipe, "--out", str(bundle), *where])
    assert end.value.code == 0
    fitted = json.loads(capsys.readouterr().out)
    with pytest.raises(SystemExit) as end:
        run(["evaluate", str(bundle), *where])
    assert end.value.code == 0
    measured = json.loads(capsys.readouterr().out)
    for name, value in metrics_in(fitted).items():
        assert metrics_in(measured)[name] == pytest.approx(value, abs=1e-6), name
    assert ft.inspect_bundle(bundle).metrics == metrics_in(fitted)


VISITS = """
[data]
kind = "files"
files = ["visits.csv"]
user = "none"
timestamp = "time"
columns = ["clicked"]
context = ["device", "shop"]

[split]
kind = "temporal"
test = 0.2

[features.context.device]
kind = "categorical"

[features.context.shop]
kind = "categorical"

[model]
kind = "deepfm"
user_id = false
embedding_dim = 4
hidden = [8]
task = { name = "click", column = "clicked" }

[objective]
kind = "rows"
positive = "clicked"

[training]
epochs = 1
"""


def test_a_log_without_users_is_fitted_measured_and_served_for_a_context(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draw = np.random.default_rng(0)
    lines = ["item_id,time,clicked,device,shop"]
    for second in range(600):
        device = draw.choice(["tv", "phone"])
        lines.append(
            f"{draw.integers(9)},{1_600_000_000 + second},{draw.integers(2)},{device},main"
        )
    (tmp_path / "visits.csv").write_text("\n".join(lines))
    (tmp_path / "run.toml").write_text(VISITS)
    bundle = tmp_path / "bundle"
    call = ["fit", str(tmp_path / "run.toml"), "--out", str(bundle), "--data-dir", str(tmp_path)]
    with pytest.raises(SystemExit) as end:
        run([*call, "--json"])
    told = capsys.readouterr()
    assert end.value.code == 0
    assert "auc" in metrics_in(json.loads(told.out))  # of lists there is nothing to measure
    assert "every row is its own user" in told.err
    assert "'shop' is 'main' on every training row: it contributes nothing" in told.err

    recommender = ft.load(bundle)
    trained = recommender.trained
    split = ft.read_split(ft.recipe_of(trained), data_dir=tmp_path)
    rows = ft.rows_of(
        split, "test", tasks=[trained.config.task], features=trained.features, positive="clicked"
    )
    batch = rows.batch(rows.every)
    expected_NT = predict_tasks(ranker_of(trained), batch)[:, 0]
    for row in range(20):
        moment = rows.events.context.row(row, named=True)
        item_id = rows.events.items.ids[int(rows.events.item_idx[row])]
        answer = recommender.recommend(context=moment, allow=[item_id], k=1)
        assert answer.source == "features"
        assert answer.rows[0].predictions["click"] == pytest.approx(
            float(expected_NT[row, 0]), abs=1e-6
        )
    with pytest.raises(SystemExit):
        run(["recommend", str(bundle), "--context", '{"device": "tv"}', "-k", "1"])
    assert "click" in capsys.readouterr().out
    assert recommender.recommend(k=1).source == "popular"


def test_a_table_of_one_item_needs_no_id_of_it(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    device = draw.choice(["tv", "phone"], size=400)
    clicked = draw.random(400) < np.where(device == "tv", 0.8, 0.2)
    frame = pl.DataFrame({"time": range(400), "clicked": clicked, "device": device, "shop": "main"})
    frame.write_csv(tmp_path / "visits.csv")
    (tmp_path / "run.toml").write_text(VISITS)
    alone = ["data.item=none", "model.item_id=false", "training.epochs=8"]
    config = ft.read_experiment(tmp_path / "run.toml", overrides=alone)
    split = ft.read_split(config, data_dir=tmp_path)
    run = ft.run_experiment(config, split, show=False)
    assert run.report.metrics["auc"] > 0.7
    recommender = ft.build_recommender(run.trained)
    answers = [recommender.recommend(context={"device": d}, k=1) for d in ("tv", "phone")]
    on_tv, on_phone = (answer.rows[0].predictions["click"] for answer in answers)
    assert on_tv > on_phone


def test_features_that_a_model_does_not_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "visits.csv").write_text(
        "item_id,time,clicked,device,shop\n"
        + "".join(f"{n % 3},{n},{n % 2},{'tv' if n % 5 else 'phone'},main\n" for n in range(60))
    )
    (tmp_path / "run.toml").write_text(VISITS)
    config = ft.read_experiment(tmp_path / "run.toml")
    split = ft.read_split(config, data_dir=tmp_path)
    told = ft.fit_features(config.features, split.train)
    assert ft.fit(config.model, split, features=told, show=False).notes == told.notes
    click = ft.Task(name="click", column="clicked")
    for model, name in ((ft.GMFConfig(task=click), "NCF"), (ft.MFConfig(), "MF")):
        trained = ft.fit(model, split, features=told, show=False)
        unread = f"features of the context were given, but {name} reads none"
        assert trained.notes[-1 - len(told.notes) :] == (*told.notes, unread)


def test_a_user_without_clicks_is_served_as_measured(folder: Path) -> None:
    config = ft.read_experiment(folder / "run.toml")
    events = ft.read_split(config, data_dir=folder).events
    clicked_E = events.columns["clicked"].copy()
    clicked_E[events.user_idx == 7] = 0  # no click, and so no history
    events = replace(events, columns={"clicked": clicked_E})
    split = ft.temporal_split(events)
    trained = ft.fit(
        config.model, split, objective=config.objective, training=config.training, show=False
    )
    rows = ft.rows_of(split, "test", tasks=[config.model.task], positive="clicked")
    of_user = np.flatnonzero(rows.user_E == 7)
    expected_NT = predict_tasks(ranker_of(trained), rows.batch(of_user))[:, 0]
    recommender, user_id = ft.build_recommender(trained), events.users.ids[7]
    for place, row in enumerate(of_user):
        item_id = events.items.ids[int(rows.events.item_idx[row])]
        answer = recommender.recommend(user_id, allow=[item_id], k=1)
        assert (answer.source, answer.user_known) == ("model", True)
        assert answer.rows[0].predictions["click"] == pytest.approx(
            float(expected_NT[place, 0]), abs=1e-6
        )
    (alone,) = recommender.recommend_many([user_id], k=3).rows(named=True)
    assert alone["source"] == "model"
    assert alone["item_id"] == [row.item_id for row in recommender.recommend(user_id, k=3).rows]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["split.kind=cold_users"], "set evaluation.catalogue = false"),
        (["evaluation.sampled_negatives=9", "evaluation.sampled_by=listed"], "list no negatives"),
    ],
)
def test_what_cannot_be_measured_is_seen_before_anything_is_trained(
    folder: Path, tmp_path: Path, overrides: list[str], words: str
) -> None:
    config = ft.read_experiment(folder / "run.toml", overrides=overrides)
    split = ft.read_split(config, data_dir=folder)
    with pytest.raises(ft.ForetasteError, match=words):
        ft.run_experiment(config, split, folder=tmp_path / "run", show=False)
    assert not (tmp_path / "run").exists()

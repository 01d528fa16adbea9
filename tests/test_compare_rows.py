"""Comparing rankers by labelled rows: which asks are of rows, figures, baselines, the table."""

import json
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest

import foretaste as ft
from foretaste.data.tasks import Task
from foretaste.evaluation.compare_rows import compare_rows
from foretaste.evaluation.rows_report import RowsReport
from foretaste.experiment.compare_by_rows import BASE_RATE, common_tasks
from foretaste.experiment.compare_picture import comparison_svg
from foretaste.experiment.compare_table import ModelComparison, ModelRow

SHORT = {"epochs": 4, "batch_events": 128, "learning_rate": 0.05, "warmup_steps": 0}
LIKED = Task(name="liked", column="liked")
HOURS = Task(name="hours", kind="regression", column="hours")
WIDE = {"embedding_dim": 4, "bottom_hidden": (8,), "tower_hidden": ()}


def recipe(data: dict[str, object], model: dict[str, object], **more: object) -> dict[str, object]:
    return {
        "data": {"kind": "files", "files": ["rows.csv"]} | data,
        "split": {"kind": "random", "validation": 0.2, "test": 0.3},
        "model": model,
        "objective": {"kind": "rows"},
        "training": SHORT,
    } | more


def parsed(settings: dict[str, object]) -> ft.ExperimentConfig:
    return ft.ExperimentConfig.model_validate(settings)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of 40 users and 12 items: what is alike in parity is liked, and for long."""
    folder, draw = tmp_path_factory.mktemp("rows"), np.random.default_rng(0)
    lines = ["user_id,item_id,colour,liked,hours"]
    for _ in range(1200):
        user, item = int(draw.integers(40)), int(draw.integers(12))
        liked = int(draw.random() < (0.9 if user % 2 == item % 2 else 0.1))
        hours = 5 * liked + draw.exponential()
        lines.append(f"{user},{item},{'rg'[liked ^ (draw.random() < 0.1)]},{liked},{hours:.3f}")
    (folder / "rows.csv").write_text("\n".join(lines))
    return folder


PAIRS = {"columns": ["liked", "hours"]}
TABLE = {"user": None, "item": None, "columns": ["liked", "hours"], "context": ["colour"]}
BY_ROWS = {"evaluation": {"catalogue": False}}
COLOUR = {"features": {"context": {"colour": {"kind": "categorical"}}}}


@pytest.fixture(scope="module")
def pairs(place: Path) -> tuple[dict[str, ft.ExperimentConfig], ft.Split]:
    gmf = {"kind": "gmf", "factors": 4, "task": LIKED.model_dump()}
    both = {"kind": "shared_bottom", "tasks": [HOURS.model_dump(), LIKED.model_dump()], **WIDE}
    recipes = {
        "one <task>": parsed(recipe(PAIRS, gmf, **BY_ROWS)),
        "both": parsed(recipe(PAIRS, both, **BY_ROWS)),
    }
    return recipes, ft.read_split(recipes["both"], data_dir=place)


@pytest.fixture(scope="module")
def found(
    pairs: tuple[dict[str, ft.ExperimentConfig], ft.Split], tmp_path_factory: pytest.TempPathFactory
) -> tuple[ModelComparison, Path]:
    folder = tmp_path_factory.mktemp("compared")
    return ft.compare_models(*pairs, folder=folder), folder


@pytest.fixture(scope="module")
def of_table(place: Path) -> ModelComparison:
    """Two models of two tasks over a table without users and items."""
    tasks = [LIKED.model_dump(), HOURS.model_dump()]
    recipes = {
        "shared": parsed(
            recipe(TABLE, {"kind": "shared_bottom", "tasks": tasks, **WIDE}, **COLOUR)
        ),
        "slow": parsed(
            recipe(
                TABLE,
                {"kind": "shared_bottom", "tasks": tasks, **WIDE},
                training=SHORT | {"epochs": 1, "learning_rate": 1e-3},
                **COLOUR,
            )
        ),
    }
    return ft.compare_models(recipes, ft.read_split(recipes["shared"], data_dir=place))


def row_of(found: ModelComparison, name: str) -> ModelRow:
    (row,) = (row for row in found.rows if row.name == name)
    return row


def test_the_figures_are_those_of_each_model_alone_and_the_test_is_paired(
    found: tuple[ModelComparison, Path],
    pairs: tuple[dict[str, ft.ExperimentConfig], ft.Split],
) -> None:
    comparison, (recipes, split) = found[0], pairs
    reports: dict[str, RowsReport] = {}
    for name, config in recipes.items():
        report = ft.run_experiment(config, split, show=False).report.rows
        assert report is not None
        row, full = row_of(comparison, name), report.name("auc", "liked")
        assert (row.quality, row.interval) == (report.metrics[full], report.intervals[full])
        assert row.train_seconds > 0
        assert 0 < row.answer_ms < 10_000
        reports[name] = report
    assert row_of(comparison, "one <task>").quality > 0.7
    best, other = (row for row in comparison.rows if not row.is_baseline)
    assert best.quality >= other.quality
    expected = compare_rows(reports[best.name], reports[other.name], "auc", task="liked")
    assert other.behind == expected
    assert comparison.metric == "auc_liked"
    assert comparison.judged == len(reports["both"].label_NT) == 360


def test_the_baseline_is_the_base_rate_which_can_order_nothing(
    found: tuple[ModelComparison, Path], of_table: ModelComparison, place: Path
) -> None:
    assert [row.name for row in found[0].rows][2:] == [BASE_RATE]  # and no popularity
    floor = found[0].rows[-1]
    assert (floor.quality, floor.interval) == (0.5, (0.5, 0.5))
    assert floor.behind is not None
    assert floor.behind.interval.low > 0
    assert "nothing was learned" not in found[0].sentence
    # of hours it is the error of saying the mean of training to every row
    config = parsed(recipe(TABLE, {"kind": "deepfm", "task": HOURS.model_dump()}, **COLOUR))
    split = ft.read_split(config, data_dir=place)
    hours, test = split.events.columns["hours"].astype(np.float64), split.part_E == 2
    by_hand = np.sqrt(np.mean((hours[test] - hours[split.part_E == 0].mean()) ** 2))
    (figure,) = of_table.rows[-1].tasks
    assert figure.metric == "rmse_hours"
    assert figure.value == pytest.approx(by_hand)


def test_a_table_without_items_is_compared_by_every_common_task(of_table: ModelComparison) -> None:
    assert [row.name for row in of_table.rows] == ["shared", "slow", BASE_RATE]
    shared, slow, floor = of_table.rows
    assert floor.behind is not None
    assert floor.behind.interval.low > 0
    for row in (slow, floor):  # of an error, more of it is behind
        (own,), (best,) = row.tasks, shared.tasks
        assert own.behind is not None
        assert own.behind.difference == pytest.approx(own.value - best.value)
        assert own.behind.interval.low > 0
    # two colours are easily put in order, so the faster may be taken; then that is said of hours
    more = of_table.sentence.partition("Of hours, shared is better: by")[1]
    assert bool(more) == (of_table.pick == "slow")
    assert of_table.columns == (
        "model",
        *("auc liked", "behind the best", "p"),
        *("rmse hours", "behind the best", "p"),
        *("training s", "bundle MB", "ms a 1,000 rows"),
    )
    assert all(len(cells) == 10 for cells in of_table.cells())
    assert of_table.cells()[-1][-3:] == ("", "", "")


def test_what_is_written_is_the_table_the_picture_and_the_bundle(
    found: tuple[ModelComparison, Path],
) -> None:
    comparison, folder = found
    document = json.loads((folder / "comparison.json").read_text())
    assert document == json.loads(json.dumps(comparison.to_json(), allow_nan=False))
    assert document["judged_rows"] == 360
    text = (folder / "comparison.md").read_text()
    assert text.startswith("# auc liked on the test part (random), 360 rows of 40 users")
    assert comparison.sentence in text
    assert f"| {BASE_RATE} |" in text
    circles = ET.fromstring((folder / "comparison.svg").read_text()).findall(
        "{http://www.w3.org/2000/svg}circle"
    )
    assert len(circles) == 3
    assert comparison_svg(comparison) == (folder / "comparison.svg").read_text()
    loaded = ft.load(folder / "bundle").trained.config.kind
    assert loaded == row_of(comparison, comparison.pick).kind
    assert str(comparison).splitlines()[-1] == comparison.sentence


def test_a_model_that_learned_nothing_is_not_recommended_in_silence(place: Path) -> None:
    blind = parsed(
        recipe(
            TABLE,
            {"kind": "deepfm", "task": LIKED.model_dump(), "deep": False, "fm": False},
            training=SHORT | {"epochs": 1},
            features={"context": {"noise": {"kind": "categorical"}}},
        )
    )
    text = (place / "rows.csv").read_text().splitlines()
    draw = np.random.default_rng(1)
    lines = [f"{line},{draw.integers(3)}" for line in text[1:]]
    (place / "noise.csv").write_text("\n".join([f"{text[0]},noise", *lines]))
    data = blind.data.model_copy(update={"files": ("noise.csv",), "context": ("noise",)})
    blind = blind.model_copy(update={"data": data})
    found = ft.compare_models({"blind": blind}, ft.read_split(blind, data_dir=place))
    assert found.sentence.endswith(
        "Of liked it cannot be told from the base rate: nothing was learned there."
    )


def test_asks_that_do_not_go_together_are_refused_before_anything_is_trained(
    pairs: tuple[dict[str, ft.ExperimentConfig], ft.Split],
) -> None:
    (one, both), split = pairs[0].values(), pairs[1]
    lists = ft.override(both, ["evaluation.catalogue=true"])
    with pytest.raises(ft.ConfigError, match=r"b has evaluation\.catalogue = false and a true"):
        ft.compare_models({"a": lists, "b": one}, split)
    ease = parsed(recipe(PAIRS, {"kind": "ease"}, objective=None, **BY_ROWS))
    with pytest.raises(ft.ConfigError, match=r"catalogue is false.* ease \(ease\) predicts no lab"):
        ft.compare_models({"a": one, "ease": ease}, split)
    hours = one.model_copy(update={"model": one.model.model_copy(update={"task": HOURS})})
    with pytest.raises(ft.ConfigError, match=r"no task is common .*\(a has liked; b has hours\)"):
        ft.compare_models({"a": one, "b": hours}, split)
    assert common_tasks({"a": lists}, split) == ()  # lists are what is asked for
    assert [task.name for task in common_tasks({"a": both, "b": one}, split)] == ["liked"]


def test_models_that_were_asked_about_other_drawn_items_are_not_compared(place: Path) -> None:
    draw = np.random.default_rng(2)  # so few of many items that there are always some to draw
    lines = [f"{cell // 200},{cell % 200}" for cell in draw.permutation(8000)[:400].tolist()]
    (place / "sparse.csv").write_text("\n".join(["user_id,item_id", *lines]))
    gmf, data = {"kind": "gmf", "factors": 4}, {"files": ["sparse.csv"]}
    recipes = {
        str(num): parsed(recipe(data, gmf, objective={"kind": "rows", "negatives": num}, **BY_ROWS))
        for num in (2, 3)
    }
    split = ft.read_split(recipes["2"], data_dir=place)
    found = ft.compare_models(recipes, split)
    assert [row.name for row in found.rows] == ["2", BASE_RATE]
    (failed,) = found.failed
    assert "set objective.negatives alike" in failed.error
    # of a row that happened and two that were drawn, one third happened
    assert found.rows[-1].metrics["log_loss_sampled_2"] == pytest.approx(
        -(np.log(1 / 3) + 2 * np.log(2 / 3)) / 3
    )
    alike = {
        name: ft.override(c, ["evaluation.sampled_negatives=2"]) for name, c in recipes.items()
    }
    assert len(ft.compare_models(alike, split).rows) == 3


def test_families_of_rankers_take_over_what_the_recipe_predicts(
    pairs: tuple[dict[str, ft.ExperimentConfig], ft.Split],
) -> None:
    one, both = pairs[0].values()
    families = ft.family_recipes(one, ["deepfm", "mmoe", "ease"])
    assert common_tasks({n: families[n] for n in ("deepfm", "mmoe")}, pairs[1]) == (LIKED,)
    assert families["deepfm"].objective == one.objective
    assert families["ease"].objective is None
    with pytest.raises(ft.ConfigError, match="the tasks hours, liked, and din learns one"):
        ft.family_recipes(both, ["din"])

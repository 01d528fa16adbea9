"""Comparing rankers by labelled rows: when it applies, its figures, baselines and table."""

import json
import time
import xml.etree.ElementTree as ET
from dataclasses import replace
from datetime import date
from decimal import Decimal
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from sklearn.metrics import roc_auc_score

import foretaste as ft
from foretaste.data.rows import rows_of
from foretaste.data.tasks import Task
from foretaste.evaluation.compare import compare_rows
from foretaste.evaluation.report import RowsReport
from foretaste.experiment.compare_counts import BASE_RATE, count_baselines
from foretaste.experiment.compare_plan import common_tasks
from foretaste.experiment.compare_table import ModelComparison, ModelRow, comparison_svg
from foretaste.sampling.negatives import RowNegatives
from foretaste.sampling.samplers import UniformSampler

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
    """Rows of 40 users and 12 items: users like, and watch longer, items of their parity."""
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


def test_the_last_baseline_is_the_base_rate_which_can_order_nothing(
    found: tuple[ModelComparison, Path], of_table: ModelComparison, place: Path
) -> None:
    assert found[0].rows[-1].name == BASE_RATE
    assert "popularity" not in {row.name for row in found[0].rows}
    floor = found[0].rows[-1]
    assert (floor.quality, floor.interval) == (0.5, (0.5, 0.5))
    assert floor.behind is not None
    assert floor.behind.interval.low > 0
    assert "it learned nothing" not in found[0].sentence
    # of hours it is the error of saying the mean of training to every row
    config = parsed(recipe(TABLE, {"kind": "deepfm", "task": HOURS.model_dump()}, **COLOUR))
    split = ft.read_split(config, data_dir=place)
    hours, test = split.events.columns["hours"].astype(np.float64), split.part_E == 2
    by_hand = np.sqrt(np.mean((hours[test] - hours[split.part_E == 0].mean()) ** 2))
    (figure,) = of_table.rows[-1].tasks
    assert figure.metric == "rmse_hours"
    assert figure.value == pytest.approx(by_hand)


def test_a_table_without_items_is_compared_by_every_common_task(of_table: ModelComparison) -> None:
    # two colours: counting by colour is as good as a model can be at putting them in order
    shared, slow, by_colour, floor = of_table.rows
    assert [shared.name, slow.name] == ["shared", "slow"]
    assert [by_colour.name, floor.name] == ["counts by colour", BASE_RATE]
    assert floor.behind is not None
    assert floor.behind.interval.low > 0
    for row in (slow, floor):  # of an error, more of it is behind
        (own,), (best,) = row.tasks, shared.tasks
        assert own.behind is not None
        assert own.behind.difference == pytest.approx(own.value - best.value)
        assert own.behind.interval.low > 0
    # two colours are easily put in order, so the faster may be taken; then that is said of hours
    assert by_colour.quality == pytest.approx(shared.quality)
    assert of_table.beaten_by == "counts by colour"
    assert of_table.sentence.startswith(
        "No model is worth taking yet: counting by colour, without any training, has an auc of "
    )
    assert "(take it)" not in str(of_table)
    more = of_table.sentence.partition("For hours, shared is better by")[1]
    assert bool(more) == (of_table.pick == "slow")
    assert of_table.columns == (
        "model",
        *("auc liked", "behind the best", "p (Holm)"),
        *("rmse hours", "behind the best", "p (Holm)"),
        *("training s", "bundle MB", "ms a 1,000 rows"),
    )
    assert all(len(cells) == 10 for cells in of_table.cells())
    # printed, it is a table for each task, as one of all would be too wide
    first, second = (of_table.title(), "rmse hours (less is better)")
    lines = str(of_table).splitlines()
    assert lines.index(first) == 0 < lines.index(second)
    assert sum(f"│ {BASE_RATE} " in line for line in lines) == 2
    table = lines[: lines.index("· shared: all epochs done")]
    assert max(map(len, table)) < 140
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
    assert len(circles) == len(comparison.rows)
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
        "For liked, it does not differ from the base rate: it learned nothing there."
    )
    assert found.beaten_by


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


def test_models_that_would_be_asked_about_other_drawn_items_are_refused_before_training(
    place: Path,
) -> None:
    draw = np.random.default_rng(2)  # so few of many items that there are always some to draw
    lines = [f"{cell // 200},{cell % 200}" for cell in draw.permutation(8000)[:400].tolist()]
    (place / "sparse.csv").write_text("\n".join(["user_id,item_id", *lines]))
    gmf, data = {"kind": "gmf", "factors": 4}, {"files": ["sparse.csv"]}
    recipes = {
        str(num): parsed(recipe(data, gmf, objective={"kind": "rows", "negatives": num}, **BY_ROWS))
        for num in (2, 3)
    }
    split = ft.read_split(recipes["2"], data_dir=place)
    told: list[str] = []
    with pytest.raises(ft.ConfigError, match=r"set objective\.negatives to one number") as caught:
        ft.compare_models(recipes, split, say=told.append)
    assert (caught.value.name, caught.value.value) == ("objective.negatives", 3)
    assert not told  # nothing was trained
    found = ft.compare_models({"2": recipes["2"]}, split)
    # of a row that happened and two that were drawn, one third happened
    assert found.rows[-1].metrics["log_loss_sampled_2"] == pytest.approx(
        -(np.log(1 / 3) + 2 * np.log(2 / 3)) / 3
    )
    equal = {
        name: ft.override(c, ["evaluation.sampled_negatives=2"]) for name, c in recipes.items()
    }
    found = ft.compare_models(equal, split)
    assert len([row for row in found.rows if not row.is_baseline]) == 2


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


# --- baselines that count -------------------------------------------------------------------------


def table_split(rows: pl.DataFrame, num_train: int, **more: object) -> ft.Split:
    """Rows in the order of time, the first ones to learn from."""
    rows = rows.with_columns(pl.Series("at", 1_600_000_000 + np.arange(len(rows))))
    labels = [name for name in ("liked", "hours") if name in rows.columns]
    events = ft.read_interactions(rows, timestamp="at", columns=labels, **more)
    part_E = (events.timestamp_s >= 1_600_000_000 + num_train).astype(np.uint8) * 2
    return ft.Split(kind="temporal", events=events, part_E=part_E, rolling=True)


def counted(split: ft.Split, *tasks: Task, num_drawn: int = 0) -> dict[str, np.ndarray]:
    rows = rows_of(split, "test", tasks=tasks)
    if num_drawn:
        sampler = UniformSampler(split.events.num_items)
        rows = rows.draw(num_drawn, RowNegatives(sampler, None), seed=0)
    return {one.name: one.prediction_NT for one in count_baselines(split, rows, tasks)[0]}


def test_counts_by_hand() -> None:
    rows = pl.DataFrame(
        {
            "user_id": [1, 1, 1, 2, 2, 2, 1, 3],
            "item_id": [0, 1, 2, 0, 1, 2, 3, 3],
            "liked": [1.0, 1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0],
        }
    )
    found = counted(table_split(rows, 6), LIKED)
    # The base rate is 1/2. Users' means are 2/3 and 1/3: within them the spread is
    # (3 - 3 * 4/9 - 3 * 1/9) / (6 - 2) = 1/3, so that means of three spread by 1/9 by luck alone;
    # they spread by 1/36: users do not differ, and the base rate counts as all six rows.
    assert found["counts by user"][:, 0] == pytest.approx([(2 + 6 / 2) / (3 + 6), 1 / 2])
    assert found[BASE_RATE][:, 0].tolist() == [0.5, 0.5]
    assert "counts by item" not in found  # item 3 is new: it is the base rate again
    # Where users differ without any exception, the base rate counts as one row, the least.
    sure = rows.with_columns(liked=pl.Series([1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 1.0, 1.0]))
    by_user = counted(table_split(sure, 6), LIKED)["counts by user"]
    assert by_user[:, 0] == pytest.approx([(3 + 1 / 2) / (3 + 1), 1 / 2])


def topical(num: int = 20_000, seed: int = 0) -> tuple[pl.DataFrame, pl.DataFrame]:
    """200 users like some of five topics and not others; items differ in nothing else."""
    draw = np.random.default_rng(seed)
    taste = draw.random((200, 5)) < 0.5
    user, item = draw.integers(0, 200, num), draw.integers(0, 60, num)
    liked = draw.random(num) < np.where(taste[user, item % 5], 0.8, 0.2)
    rows = pl.DataFrame(
        {
            "user_id": user,
            "item_id": item,
            "liked": liked.astype(float),
            "hours": np.where(liked, 2.0, 1.0) + draw.random(num),
            "device": draw.choice(["tv", "phone"], num),
        }
    )
    items = pl.DataFrame({"item_id": range(60), "topic": [f"t{i % 5}" for i in range(60)]})
    return rows, items


def test_what_a_group_by_finds_is_found_by_counting() -> None:
    rows, items = topical()
    split = table_split(rows, 16_000, items=items, context=["device"])
    found = counted(split, LIKED, HOURS)
    assert list(found) == [
        "counts by user",
        "counts by item",
        "counts by topic",
        "counts by user, topic",
        "counts by device",
        "counts by user, device",
        BASE_RATE,
    ]
    keys = ["user_id", "topic"]
    joined = rows.join(items, on="item_id", maintain_order="left")
    by_group = joined[:16_000].group_by(keys).agg(pl.col("liked", "hours").mean().name.suffix("_m"))
    test = joined[16_000:].join(by_group, on=keys, how="left", maintain_order="left")
    order = np.lexsort((np.arange(4000), test["user_id"].to_numpy()))  # as the events are sorted
    told = found["counts by user, topic"]
    # Groups of 16 rows: near their plain means, and better at the test than these.
    means = test["liked_m", "hours_m"].to_numpy()[order]
    assert np.corrcoef(told[:, 0], means[:, 0])[0, 1] > 0.98
    for place, name in enumerate(("liked", "hours")):
        label = test[name].to_numpy()[order]
        plain, ours = (np.mean((p[:, place] - label) ** 2) for p in (means, told))
        assert ours < plain
    auc = {
        name: roc_auc_score(test["liked"].to_numpy()[order], prediction[:, 0])
        for name, prediction in found.items()
    }
    assert auc["counts by user, topic"] > 0.75  # 0.8 is the most: a fifth of labels is noise
    assert all(auc[name] < 0.7 for name in auc if name != "counts by user, topic")


def test_where_zeros_are_drawn_counting_by_item_is_popularity() -> None:
    draw = np.random.default_rng(0)
    item = np.minimum(draw.geometric(0.15, 3000), 30) - 1
    rows = pl.DataFrame({"user_id": draw.integers(0, 100, 3000), "item_id": item})
    split = table_split(rows, 2500)
    task = Task(name="click")
    found = counted(split, task, num_drawn=3)
    judged = rows_of(split, "test", tasks=(task,))
    drawn = judged.draw(3, RowNegatives(UniformSampler(split.events.num_items), None), seed=0)
    item_N = np.concatenate([drawn.item_E.numpy()[:, None], drawn.drawn_EN], axis=1).reshape(-1)
    count_N = split.train.item_count[item_N]
    by_item = found["counts by item"][:, 0]
    assert (by_item[np.argsort(count_N, kind="stable")] == np.sort(by_item)).all()
    # an item of c events stands beside 3 * 2500 / 30 drawn zeros
    popular = count_N == count_N.max()
    zeros = 3 * 2500 / np.count_nonzero(split.train.item_count)
    raw = count_N.max() / (count_N.max() + zeros)
    assert by_item[popular][0] == pytest.approx(raw, abs=0.02)
    assert found[BASE_RATE][:, 0] == pytest.approx(1 / 4)


@pytest.mark.parametrize(
    ("column", "why"),
    [
        (pl.Series(["a", "b", None] * 20), ""),
        (pl.Series([True, False, None] * 20), ""),
        (pl.Series([1, 2, 3] * 20, dtype=pl.UInt8), ""),
        (pl.Series([1.5, 2.5, None] * 20, dtype=pl.Float32), ""),
        (pl.Series(["a", "b", "c"] * 20, dtype=pl.Categorical), ""),
        (pl.Series(["a", "b", "c"] * 20, dtype=pl.Enum(["a", "b", "c", "d"])), ""),
        (pl.Series([date(2026, 1, 1), date(2026, 1, 2), None] * 20), ""),
        (pl.Series([Decimal("1.5"), Decimal("2.5"), None] * 20), ""),
        (pl.Series([["a"], ["b"], []] * 20), "no single values"),
        (pl.Series([None] * 60), "no single values"),
        (pl.Series(["same"] * 60), "one value"),
        (pl.Series([f"title {i}" for i in range(60)]), "60 values in 60 rows"),
    ],
    ids=lambda value: str(value.dtype) if isinstance(value, pl.Series) else "",
)
def test_a_column_of_any_type_is_counted_by_or_said_not_to_be(column: pl.Series, why: str) -> None:
    rows, items = topical(2000)
    split = table_split(rows, 1500, items=items.drop("topic"))
    split = replace(
        split, events=replace(split.events, item_table=pl.DataFrame({"column": column}))
    )
    judged = rows_of(split, "test", tasks=(LIKED,))
    found, notes = count_baselines(split, judged, (LIKED,))
    assert ("counts by column" in {one.name for one in found}) == (why == "")
    assert notes == ([f"columns without counts: column ({why})"] if why else [])


def test_a_column_of_a_million_values_is_counted_or_left_out_quickly() -> None:
    draw, num = np.random.default_rng(0), 1_200_000
    rows = pl.DataFrame(
        {
            "user_id": draw.integers(0, 1000, num),
            "item_id": draw.integers(0, 100, num),
            "liked": draw.integers(0, 2, num).astype(float),
            "trace": np.arange(num).astype(str),
            "session": draw.integers(0, 500_000, num).astype(str),
        }
    )
    split = table_split(rows, 1_100_000, context=["trace", "session"])
    judged = rows_of(split, "test", tasks=(LIKED,))
    started = time.perf_counter()
    found, notes = count_baselines(split, judged, (LIKED,))
    assert time.perf_counter() - started < 60
    assert notes == ["columns without counts: trace (1,200,000 values in 1,200,000 rows)"]
    assert "counts by user, session" in {one.name for one in found}


def test_of_many_columns_those_that_explain_most_are_counted_by() -> None:
    rows, items = topical(4000)
    blind = {f"blind{n}": [f"{(7 * i + n) % 4}" for i in range(60)] for n in range(8)}
    split = table_split(rows, 3000, items=items.with_columns(**map_series(blind)))
    judged = rows_of(split, "test", tasks=(LIKED,))
    found, notes = count_baselines(split, judged, (LIKED,))
    columns = {one.name.rpartition(" ")[2] for one in found} - {"user", "item", "rate"}
    assert len(columns) == 6
    (note,) = notes
    assert note.startswith("columns without counts, because others explain more of training: ")


def map_series(columns: dict[str, list[str]]) -> dict[str, pl.Series]:
    return {name: pl.Series(name, values) for name, values in columns.items()}


def test_a_model_below_a_group_by_is_not_recommended(tmp_path: Path) -> None:
    rows, items = topical(3000)
    rows.with_columns(loved="liked").write_csv(tmp_path / "rows.csv")
    items.write_csv(tmp_path / "items.csv")
    loved = Task(name="loved", column="loved")
    tasks = [LIKED.model_dump(), loved.model_dump()]
    blind = {"kind": "shared_bottom", "tasks": tasks, "pooling": "none", **WIDE}
    data = {"columns": ["liked", "loved"], "items": "items.csv"}
    short = SHORT | {"epochs": 1, "learning_rate": 1e-4}
    config = parsed(recipe(data, blind, training=short, **BY_ROWS))
    found = ft.compare_models({"blind": config}, ft.read_split(config, data_dir=tmp_path))
    assert found.beaten_by == "counts by user, topic"
    assert found.sentence.startswith(
        "No model is worth taking yet: counting by user, topic, without any training, has an auc"
    )
    # said once of the task that leads, and of the other one too
    assert "Of liked" not in found.sentence
    assert "For loved, counting by user, topic is better: its auc is" in found.sentence
    assert found.to_json()["beaten_by"] == "counts by user, topic"
    assert "(take it)" not in str(found)
    best = row_of(found, "counts by user, topic")
    assert best.behind is not None
    assert best.behind.difference < 0
    assert best.metrics["log_loss_liked"] < row_of(found, "blind").metrics["log_loss_liked"]

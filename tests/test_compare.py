"""Comparing models: one holdout for all, the budget, what fails, and which one to take."""

import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import foretaste as ft
from foretaste.data.plans import Plan
from foretaste.evaluation.compare import Comparison, holm
from foretaste.evaluation.list_metrics import Interval
from foretaste.evaluation.report import latex_table
from foretaste.experiment import compare_models
from foretaste.experiment.compare_figures import choose
from foretaste.experiment.compare_plan import BASELINES, FAMILIES
from foretaste.experiment.compare_table import ModelComparison, ModelRow, TaskFigure, comparison_svg
from foretaste.experiment.search_space import ShortSearch
from foretaste.training.fit import OUT_OF_TIME, Fit
from foretaste.training.objectives import PairsConfig

NUM_GROUPS, GROUP_SIZE = 4, 10
RECIPE = """
[data]
kind = "files"
files = ["events.csv"]
user = "who"
item = "what"
timestamp = "at"
[split]
kind = "leave_last"
[model]
kind = "sasrec"
embedding_dim = 8
num_blocks = 1
num_heads = 1
max_len = 10
[training]
epochs = 2
device = "cpu"
[evaluation]
k = [5, 3]
"""
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """80 users, each with seven of the ten items of one of four groups."""
    folder, draw = tmp_path_factory.mktemp("world"), np.random.default_rng(0)
    rows = [
        f"u{user},{user % NUM_GROUPS * GROUP_SIZE + item},{1_600_000_000 + 90 * place + user}"
        for user in range(80)
        for place, item in enumerate(draw.permutation(GROUP_SIZE)[:7].tolist())
    ]
    (folder / "events.csv").write_text("who,what,at\n" + "\n".join(rows))
    (folder / "run.toml").write_text(RECIPE)
    return folder


@pytest.fixture(scope="module")
def recipe(world: Path) -> ft.ExperimentConfig:
    return ft.read_experiment(world / "run.toml")


@pytest.fixture(scope="module")
def split(world: Path, recipe: ft.ExperimentConfig) -> ft.Split:
    return ft.read_split(recipe, data_dir=world)


@pytest.fixture(scope="module")
def found(
    recipe: ft.ExperimentConfig, split: ft.Split, tmp_path_factory: pytest.TempPathFactory
) -> tuple[ModelComparison, Path]:
    """One comparison in which a model is cut short, one fails, and one is given twice."""
    training = ft.TrainingConfig(epochs=100_000, patience=None, device="cpu")
    recipes = {
        "short": recipe,
        "wrong": recipe.model_copy(update={"objective": PairsConfig()}),
        "knn <again> | once": ft.family_recipes(recipe, ["item_knn"])["item_knn"].model_copy(
            update={"model": ft.ItemKNNConfig(neighbours=99)}
        ),
        "item_knn": recipe.model_copy(update={"model": ft.ItemKNNConfig(neighbours=98)}),
        "endless": recipe.model_copy(update={"training": training}),
    }
    folder = tmp_path_factory.mktemp("compared")
    return ft.compare_models(recipes, split, budget_seconds=4.0, folder=folder), folder


def row_of(found: ModelComparison, name: str) -> ModelRow:
    (row,) = (row for row in found.rows if row.name == name)
    return row


def test_the_baselines_are_compared_with_the_given_models(
    found: tuple[ModelComparison, Path],
) -> None:
    names = {row.name for row in found[0].rows}
    assert names == {
        "endless",
        "short",
        "knn <again> | once",
        "item_knn",
        "item_knn (usual)",
        "popularity",
        "ease",
        "als",
    }


def test_a_model_given_as_the_baseline_is_not_trained_twice(
    recipe: ft.ExperimentConfig, split: ft.Split
) -> None:
    knn = recipe.model_copy(update={"model": ft.ItemKNNConfig()})
    found = ft.compare_models({"mine": knn}, split)
    assert sorted(row.name for row in found.rows) == ["als", "ease", "mine", "popularity"]


def test_the_figures_are_those_of_each_model_alone(
    found: tuple[ModelComparison, Path], recipe: ft.ExperimentConfig, split: ft.Split
) -> None:
    comparison, _ = found
    assert comparison.metric == "ndcg_at_5"
    reports = {}
    for name, config in (("ease", ft.EASEConfig()), ("popularity", ft.PopularityConfig())):
        reports[name] = ft.evaluate(ft.fit(config, split), split.test, k=recipe.evaluation.k)
        row = row_of(comparison, name)
        assert row.quality == reports[name].metrics["ndcg_at_5"]
        assert row.interval == reports[name].intervals["ndcg_at_5"]
        assert row.metrics == reports[name].metrics
    ease, popularity = (row_of(comparison, name) for name in ("ease", "popularity"))
    assert popularity.behind is not None
    behind = comparison.rows[0].quality - popularity.quality
    assert popularity.behind.difference == pytest.approx(behind)
    if ease.behind is None:
        assert popularity.behind == ft.compare(reports["ease"], reports["popularity"], "ndcg_at_5")


def test_the_best_comes_first_and_popularity_is_behind_it_beyond_luck(
    found: tuple[ModelComparison, Path],
) -> None:
    comparison, _ = found
    qualities = [row.quality for row in comparison.rows]
    assert qualities == sorted(qualities, reverse=True)
    assert [row.behind is None for row in comparison.rows] == [True] + [False] * 7
    popularity = row_of(comparison, "popularity")
    assert popularity.behind is not None
    assert popularity.behind.interval.low > 0
    assert popularity.behind.p_value < 0.01
    assert comparison.users == 80


def test_a_model_that_fails_is_said_and_ends_nothing(found: tuple[ModelComparison, Path]) -> None:
    comparison, _ = found
    (failed,) = comparison.failed
    assert failed.name == "wrong"
    assert "objective.kind is 'pairs'" in failed.error
    assert comparison.cells()[-1][:2] == ("wrong", "failed")
    assert any(line.startswith("wrong failed: objective.kind") for line in comparison.remarks())


def test_a_training_that_would_overrun_is_cut_at_its_share_and_still_counts(
    found: tuple[ModelComparison, Path],
) -> None:
    comparison, _ = found
    endless, short = row_of(comparison, "endless"), row_of(comparison, "short")
    assert endless.stopped
    assert endless.note.startswith(OUT_OF_TIME)
    # Of 4 s it gets what the others left; all its epochs would take hours.
    assert endless.train_seconds < 60
    assert short.note.startswith(("all epochs done", OUT_OF_TIME))
    cut = ", ".join(row.name for row in comparison.rows if row.stopped)
    assert f"the budget cut {cut} short" in comparison.sentence


def test_the_clock_ends_a_loop_in_good_order() -> None:
    class Line(Plan[Tensor]):
        num_events = 1000

        def __len__(self) -> int:
            return 1000

        def batch(self, index: int) -> Tensor:
            return torch.ones(())

    model, judged = nn.Linear(1, 1), []

    def validate(judged_model: nn.Module) -> float:
        judged.append(judged_model.weight.item())
        return 1.0

    settings = ft.TrainingConfig(epochs=50, validate_every=7, device="cpu")
    run = Fit(
        model,
        settings,
        seed=0,
        plan=lambda _: Line(),
        objective=lambda m, batch, _: (m(batch.view(1, 1)) - 3).square().sum(),
        validate=validate,
    )
    progress = run.run(max_seconds=0.0)
    # The first step is over the time: it is the last, and is validated though 7 does not divide 1.
    assert (progress.step, progress.epoch, len(judged)) == (1, 1, 1)
    assert progress.done.startswith(OUT_OF_TIME)
    assert model.weight.item() == judged[0]
    assert progress.epochs[0]["loss"] > 0


def test_bytes_and_times_are_those_of_the_bundle(found: tuple[ModelComparison, Path]) -> None:
    comparison, folder = found
    recommender = ft.load(folder / "bundle")
    assert recommender.trained.config.kind == row_of(comparison, comparison.pick).kind
    size = ft.inspect_bundle(folder / "bundle").size
    size += (folder / "bundle" / "manifest.json").stat().st_size
    # The table's is of the measured model, whose histories lack each user's last two events.
    assert row_of(comparison, comparison.pick).bundle_bytes == pytest.approx(size, rel=0.2)
    assert all(0 < row.answer_ms < 1000 for row in comparison.rows)
    assert all(row.train_seconds > 0 for row in comparison.rows)


def test_the_model_to_take_learns_from_all_events_after_it_was_measured(
    found: tuple[ModelComparison, Path], split: ft.Split
) -> None:
    comparison, folder = found
    bundle = ft.load(folder / "bundle").bundle
    assert bundle.trained.events.fingerprint() == split.events.fingerprint()
    assert bundle.trained.learned_from == "all events"
    assert bundle.report is not None
    row = row_of(comparison, comparison.pick)
    assert bundle.report["metrics"][comparison.metric] == row.quality
    assert "and was not measured" in bundle.report["notes"][0]
    assert f"bundle: {comparison.pick}, trained again" in comparison.notes[-1]


def test_the_measured_model_is_kept_where_it_cannot_be_trained_once_more(
    recipe: ft.ExperimentConfig, split: ft.Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(compare_models, "fit_final", fails)
    only = {"knn": recipe.model_copy(update={"model": ft.ItemKNNConfig(neighbours=98)})}
    comparison = ft.compare_models(only, split, folder=tmp_path / "out")
    assert "training on all events failed: MemoryError" in comparison.notes[-1]
    assert ft.load(tmp_path / "out" / "bundle").trained.learned_from == "train"


def test_a_split_without_a_test_is_refused_before_training(
    recipe: ft.ExperimentConfig, split: ft.Split
) -> None:
    with pytest.raises(ft.ConfigError, match=r"split\.test is 0") as caught:
        ft.compare_models({"a": recipe}, split.everything())
    assert caught.value.name == "split.test"


def test_what_is_written_is_the_table_the_picture_and_the_bundle(
    found: tuple[ModelComparison, Path],
) -> None:
    comparison, folder = found
    assert sorted(path.name for path in folder.iterdir()) == [
        "bundle",
        "comparison.csv",
        "comparison.json",
        "comparison.md",
        "comparison.svg",
        "comparison.tex",
    ]
    document = json.loads((folder / "comparison.json").read_text())
    assert document == json.loads(json.dumps(comparison.to_json(), allow_nan=False))
    assert document["pick"] == comparison.pick
    text = (folder / "comparison.md").read_text()
    assert comparison.sentence in text
    assert "](comparison.svg)" in text
    lines = [line for line in text.splitlines() if line.startswith("|")]
    # Heads, a rule, eight models and one that failed; a bar in a name is no column.
    assert len(lines) == 11
    assert {line.replace("\\|", "").count("|") for line in lines} == {8}


def test_printed_it_is_a_table_that_ends_with_the_sentence(
    found: tuple[ModelComparison, Path],
) -> None:
    *lines, last = str(found[0]).splitlines()
    assert last == found[0].sentence
    rows = (line for line in lines if not line.startswith("· "))  # remarks name models too
    (row,) = (line for line in rows if "knn <again> | once" in line)
    quality = row_of(found[0], "knn <again> | once").quality
    assert f"{quality:.4f} [" in row
    assert any(line.startswith("· endless: out of time") for line in lines)


def test_the_picture_shows_every_model_higher_where_it_is_better(
    found: tuple[ModelComparison, Path],
) -> None:
    tree = ET.fromstring((found[1] / "comparison.svg").read_text())
    circles = tree.findall("{http://www.w3.org/2000/svg}circle")
    assert len(circles) == 8
    heights = [float(circle.attrib["cy"]) for circle in circles]
    assert heights == sorted(heights)
    texts = [part.text or "" for part in tree.iter("{http://www.w3.org/2000/svg}text")]
    assert any("knn <again> | once" in text for text in texts)
    assert any("wrong  failed" in text for text in texts)


def made_row(
    name: str,
    quality: float,
    seconds: float,
    behind: tuple[float, float] | None,
    *,
    best: float = 0.5,
    p_holm: float = 0.01,
) -> ModelRow:
    comparison = behind and Comparison(
        metric="ndcg_at_10",
        users=100,
        mean_a=best,
        mean_b=quality,
        difference=best - quality,
        interval=Interval(*behind),
        p_value=p_holm / 2,
    )
    return ModelRow(
        name=name,
        kind=name,
        leading=TaskFigure(
            metric="ndcg_at_10",
            value=quality,
            interval=Interval(quality - 0.1, quality + 0.1),
            behind=comparison or None,
            p_holm=p_holm if comparison else None,
        ),
        train_seconds=seconds,
        bundle_bytes=1_500_000,
        answer_ms=1.25,
        stopped=False,
        note="",
        metrics={},
        settings={},
    )


BEST = made_row("best", 0.5, 100.0, None)
# A tenth of what the best gains over chance, 0.5, is 0.05: so much makes no difference.


@pytest.mark.parametrize(
    ("rows", "users", "pick", "words"),
    [
        ([BEST], 1000, "best", "its ndcg@10 is 0.5000, and there is no other model to compare"),
        # Clear of 0: the best, though it costs more.
        (
            [BEST, made_row("near", 0.4, 1.0, (0.01, 0.2))],
            1000,
            "best",
            "near comes next, behind by 0.1",
        ),
        # The interval holds 0 and ends below 0.05: as good, and the cheaper one.
        (
            [BEST, made_row("near", 0.49, 1.0, (-0.01, 0.04))],
            1000,
            "near",
            "ndcg@10 of 0.4900 is as good as the 0.5000 of best",
        ),
        # As good but dearer: the best.
        (
            [BEST, made_row("dear", 0.49, 200.0, (-0.01, 0.04))],
            1000,
            "best",
            "dear comes next",
        ),
        # Of several that are as good the cheapest, not the next best.
        (
            [
                BEST,
                made_row("near", 0.49, 20.0, (-0.02, 0.04)),
                made_row("far", 0.48, 5.0, (-0.01, 0.049)),
                made_row("free", 0.1, 0.0, (0.3, 0.5)),
            ],
            1000,
            "far",
            "trains in 5.00 s instead of 100.00 s",
        ),
        # The interval holds 0 and reaches beyond 0.05: half its width, 0.1, is what would show;
        # 0.05 would show on 100 * (0.1 / 0.05)^2 users.
        (
            [BEST, made_row("near", 0.48, 1.0, (-0.08, 0.12))],
            1000,
            "best",
            "the test cannot detect differences below about 0.1. Stay with best, whose ndcg@10 of "
            "0.5000 is the best figure, or measure about 4,000 users.",
        ),
        # No test tells them apart after Holm, though the interval is clear of 0.
        (
            [BEST, made_row("near", 0.4, 1.0, (0.01, 0.2), p_holm=0.06)],
            1000,
            "best",
            "luck may explain that near is behind best",
        ),
        # On 20 users without any difference, 3 in 20 may still have one.
        (
            [BEST, made_row("near", 0.5, 1.0, (0.0, 0.0), p_holm=1.0)],
            20,
            "best",
            "on 20 test users luck may explain",
        ),
        # 34 times lower, on 22 users: the fault that was seen in the field.
        (
            [
                made_row("s", 0.0741, 20.0, None),
                made_row("popularity", 0.0022, 0.01, (0.0, 0.1893), best=0.0741, p_holm=0.5),
            ],
            22,
            "s",
            "Too few users to decide which is best: on 22 test users luck may explain that "
            "popularity "
            "is behind s (popularity by 0.0719 [0.0000, 0.1893])",
        ),
        (
            [BEST, made_row("near", 0.1, 1.0, (0.4, 0.4), p_holm=1.0)],
            1,
            "best",
            "Too few users to decide which is best: on 1 test user",
        ),
    ],
)
def test_a_cheaper_model_is_taken_only_where_it_is_shown_to_be_as_good(
    rows: list[ModelRow], users: int, pick: str, words: str
) -> None:
    name, sentence = choose(rows, "ndcg_at_10", users=users, chance=0.0)
    assert name == pick
    assert words in sentence
    assert (f"Take {pick}: " in sentence) != ("Too few users to decide" in sentence)


@settings(deadline=None, derandomize=True, max_examples=200)
@given(data=st.data(), users=st.integers(1, 10**6), chance=st.floats(0, 0.9))
def test_no_advice_is_far_below_the_best_figure(
    data: st.DataObject, users: int, chance: float
) -> None:
    best = data.draw(st.floats(0, 1))
    rows = [made_row("best", best, data.draw(st.floats(0, 100)), None)]
    for name in "abc":
        quality = data.draw(st.floats(0, best))
        apart = best - quality
        ends = (apart - data.draw(st.floats(0, 1)), apart + data.draw(st.floats(0, 1)))
        seconds, p_holm = data.draw(st.floats(0, 100)), data.draw(st.floats(0, 1))
        rows.append(made_row(name, quality, seconds, ends, best=best, p_holm=p_holm))
    pick, sentence = choose(rows, "ndcg_at_10", users=users, chance=chance)
    (taken,) = (row for row in rows if row.name == pick)
    assert best - taken.quality <= 0.1 * abs(best - chance) + 1e-12
    assert pick in sentence


def test_equal_models_tie_and_the_faster_is_taken(
    recipe: ft.ExperimentConfig, split: ft.Split
) -> None:
    ease = recipe.model_copy(update={"model": ft.EASEConfig()})
    found = ft.compare_models({"one": ease, "other": ease}, split)
    one, other = (row_of(found, name) for name in ("one", "other"))
    assert one.quality == other.quality
    behind = one.behind or other.behind
    assert behind is not None
    if None in (one.behind, other.behind):
        assert (behind.difference, behind.interval, behind.p_value) == (0, (0, 0), 1)
    assert one.ties_with_the_best == other.ties_with_the_best


def of_one(row: ModelRow, *, chance: float | None = None) -> ModelComparison:
    return ModelComparison(
        metric="ndcg_at_10",
        rows=(row,),
        failed=(),
        split="random",
        users=1,
        budget_seconds=None,
        pick="best",
        sentence="",
        notes=(),
        chance=chance,
    )


def test_a_picture_of_one_model_can_be_drawn() -> None:
    nothing = replace(BEST.leading, value=0.0, interval=Interval(0.0, 0.0))
    row = replace(BEST, leading=nothing, train_seconds=0.0)
    assert comparison_svg(of_one(row)).count("<circle") == 1


@pytest.mark.parametrize(("chance", "takes"), [(None, True), (0.39, True), (0.4, False)])
def test_no_row_of_the_table_is_to_be_taken_where_the_best_may_be_chance(
    chance: float | None,
    takes: bool,  # noqa: FBT001
) -> None:
    # the best model's interval is [.4, .6]
    assert ("best (take it)" in str(of_one(BEST, chance=chance))) == takes


def test_every_model_of_the_catalogue_is_a_family(recipe: ft.ExperimentConfig) -> None:
    found = ft.family_recipes(recipe, FAMILIES)
    assert [config.model.kind for config in found.values()] == list(FAMILIES)
    assert set(BASELINES) <= set(FAMILIES)
    for config in found.values():
        assert (config.data, config.split) == (recipe.data, recipe.split)
        assert (config.evaluation, config.seed) == (recipe.evaluation, recipe.seed)
        assert config.training.device == "cpu"


def test_what_cannot_be_compared_is_refused(recipe: ft.ExperimentConfig, split: ft.Split) -> None:
    with pytest.raises(ft.ConfigError, match="did you mean 'sasrec'"):
        ft.family_recipes(recipe, ["sasrek"])
    with pytest.raises(ft.ConfigError, match="named twice") as caught:
        ft.family_recipes(recipe, ["mf", "ease", "mf"])
    assert (caught.value.name, caught.value.value) == ("families", "mf")
    with pytest.raises(ft.ConfigError, match="no recipe"):
        ft.compare_models({}, split)
    with pytest.raises(ft.ConfigError, match=r"budget_seconds is 0\.0"):
        ft.compare_models({"a": recipe}, split, budget_seconds=0.0)
    other = ft.override(recipe, ["split.validation=false"])
    with pytest.raises(ft.ConfigError, match=r"b has another \[split\] than a") as caught:
        ft.compare_models({"a": recipe, "b": other}, split)
    assert caught.value.name == "split"
    nothing = replace(split, part_E=np.full_like(split.part_E, 2))
    with pytest.raises(ft.ConfigError, match="none of 5 models could be measured: the training"):
        ft.compare_models({"a": recipe}, nothing)


# --- which events are positive --------------------------------------------------------------------


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> tuple[ft.ExperimentConfig, ft.Split]:
    """What was shown to 60 users, of which about half was clicked; a ranker learns the clicks."""
    folder, draw = tmp_path_factory.mktemp("shown"), np.random.default_rng(0)
    rows = [
        f"{user},{item},{1_600_000_000 + 90 * place + user},{int((user + item) % 2 == 0)}"
        for user in range(60)
        for place, item in enumerate(draw.permutation(20)[:9].tolist())
    ]
    (folder / "shown.csv").write_text("user_id,item_id,at,clicked\n" + "\n".join(rows))
    config = ft.ExperimentConfig.model_validate(
        {
            "data": {
                "kind": "files",
                "files": ["shown.csv"],
                "timestamp": "at",
                "columns": ["clicked"],
            },
            "split": {"kind": "random", "validation": 0.1, "test": 0.4},
            "model": {"kind": "gmf", "factors": 4, "task": {"name": "c", "column": "clicked"}},
            "objective": {"kind": "rows", "positive": "clicked"},
            "training": {"epochs": 1},
        }
    )
    return config, ft.read_split(config, data_dir=folder)


def test_baselines_learn_and_are_measured_on_the_positives_that_a_recipe_names(
    shown: tuple[ft.ExperimentConfig, ft.Split],
) -> None:
    config, split = shown
    found = ft.compare_models({"ranker": config}, split)
    assert {row.name for row in found.rows} == {"ranker", *BASELINES}
    assert not found.failed
    clicks = split.events.columns["clicked"] > 0
    happened = replace(split, events=split.events.select(clicks), part_E=split.part_E[clicks])
    by_hand = ft.evaluate(ft.fit(ft.EASEConfig(), happened), happened.test)
    assert row_of(found, "ease").quality == by_hand.metrics["ndcg_at_10"]
    assert found.chance == by_hand.chance["ndcg_at_10"]
    (note,) = (note for note in found.notes if note.startswith("positive: "))
    assert f"{clicks.sum():,} of {len(split.events):,} events with clicked above 0" in note


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"kind": "rows"}, 'b has objective.positive = "" and a "clicked"'),
        (None, 'b has objective.positive = "" and a "clicked"'),
        ({"kind": "rows", "positive": "liked"}, 'b has objective.positive = "liked"'),
    ],
)
def test_recipes_with_other_positives_are_refused_before_anything_is_trained(
    shown: tuple[ft.ExperimentConfig, ft.Split], other: dict[str, str] | None, says: str
) -> None:
    config, split = shown
    second = ft.ExperimentConfig.model_validate(config.model_dump() | {"objective": other})
    told: list[str] = []
    with pytest.raises(ft.ConfigError, match=re.escape(says)) as caught:
        ft.compare_models({"a": config, "b": second}, split, say=told.append)
    assert caught.value.name == "objective.positive"
    assert not told  # nothing was trained


def test_positives_of_no_column_and_without_any_event_are_refused_before_training(
    shown: tuple[ft.ExperimentConfig, ft.Split],
) -> None:
    config, split = shown
    told: list[str] = []
    misspelt = ft.override(config, ["objective.positive=click"])
    with pytest.raises(ft.ConfigError, match="did you mean 'clicked'"):
        ft.compare_models({"a": misspelt}, split, say=told.append)
    never = replace(
        split,
        events=replace(split.events, columns={"clicked": np.zeros(len(split.events), np.float32)}),
    )
    with pytest.raises(ft.DataError, match="a target"):
        ft.compare_models({"a": config}, never, say=told.append)
    assert not told


# --- several seeds --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def of_seeds(recipe: ft.ExperimentConfig, split: ft.Split) -> ModelComparison:
    small = ft.override(recipe, ["training.epochs=1"])
    told: list[str] = []
    knn = recipe.model_copy(update={"model": ft.ItemKNNConfig(neighbours=3)})
    found = ft.compare_models({"deep": small, "knn": knn}, split, seeds=[0, 7], say=told.append)
    # what draws nothing, and the baselines, are trained once
    trained = sorted(line for line in told if line.startswith("training "))
    assert trained == [
        "training als",
        "training deep with seed 0",
        "training deep with seed 7",
        "training ease",
        "training item_knn",
        "training knn",
        "training popularity",
    ]
    return found


def test_figures_of_several_seeds_are_their_mean_and_spread(
    of_seeds: ModelComparison, recipe: ft.ExperimentConfig, split: ft.Split
) -> None:
    small = ft.override(recipe, ["training.epochs=1"])
    reports = [
        ft.evaluate(
            ft.fit(small.model, split, seed=seed, training=small.training, show=False),
            split.test,
            k=small.evaluation.k,
        )
        for seed in (0, 7)
    ]
    one, other = (report.metrics["ndcg_at_5"] for report in reports)
    deep = row_of(of_seeds, "deep")
    assert deep.quality == pytest.approx((one + other) / 2)
    assert deep.leading.spread == pytest.approx(abs(one - other) / 2**0.5)
    assert deep.seeds == (0, 7)
    assert deep.metrics["recall_at_3"] == pytest.approx(
        np.mean([report.metrics["recall_at_3"] for report in reports])
    )
    best = of_seeds.rows[0]
    assert best.behind is None
    if deep is not best:
        alone = ft.fit(ft.EASEConfig(), split) if best.name == "ease" else None
        if alone is not None:
            of_best = ft.evaluate(alone, split.test, k=small.evaluation.k)
            assert deep.behind == ft.compare(of_best, reports, "ndcg_at_5")
    assert f"{deep.quality:.4f} ± {deep.leading.spread:.4f} [" in str(of_seeds)
    assert "Trained once: " in str(of_seeds)
    for name in ("ease", "knn", "als"):
        assert row_of(of_seeds, name).leading.spread is None


def test_seeds_can_be_in_the_recipe_too_and_each_once(
    recipe: ft.ExperimentConfig, split: ft.Split
) -> None:
    told: list[str] = []
    small = ft.override(recipe, ["training.epochs=1", "seeds=[3, 4]"])
    found = ft.compare_models({"deep": small}, split, say=told.append)
    assert row_of(found, "deep").seeds == (3, 4)
    with pytest.raises(ft.ConfigError, match=r"\[3, 3\].* each once") as caught:
        ft.override(recipe, ["seeds=[3, 3]"])
    assert caught.value.name == "seeds"
    told.clear()
    for seeds in ([1, 1], []):
        with pytest.raises(ft.ConfigError, match="each once") as caught:
            ft.compare_models({"deep": small}, split, seeds=seeds, say=told.append)
        assert caught.value.name == "seeds"
    with pytest.raises(ft.ConfigError, match=r"b has seeds = \[\] and a \[3, 4\]"):
        ft.compare_models({"a": small, "b": recipe}, split, say=told.append)
    assert not told


def test_a_model_that_fails_with_one_seed_says_with_which(
    recipe: ft.ExperimentConfig, split: ft.Split
) -> None:
    wrong = recipe.model_copy(update={"objective": PairsConfig()})
    found = ft.compare_models({"wrong": wrong}, split, seeds=[5, 6])
    (failed,) = found.failed
    assert failed.error.endswith("(with seed 5)")


# --- for programs and papers ----------------------------------------------------------------------


def test_the_frame_has_every_figure_and_csv_is_the_frame(
    found: tuple[ModelComparison, Path],
) -> None:
    comparison, folder = found
    frame = comparison.to_frame()
    assert frame["model"].to_list() == [row.name for row in comparison.rows] + ["wrong"]
    for name, row in zip(frame["model"], frame.iter_rows(named=True), strict=True):
        if name == "wrong":
            assert row["value"] is None
            assert "objective.kind" in row["note"]
            continue
        of_table = row_of(comparison, name)
        assert (row["value"], row["low"], row["high"]) == (of_table.quality, *of_table.interval)
        assert row["p_holm"] == of_table.leading.p_holm
        assert row["answer_ms"] == of_table.answer_ms
    read = pl.read_csv(folder / "comparison.csv", schema_overrides=frame.schema)
    assert read["value"].to_list() == frame["value"].to_list()
    assert read.columns == frame.columns


def test_the_latex_table_has_a_line_a_model_and_nothing_that_latex_would_read(
    found: tuple[ModelComparison, Path],
) -> None:
    text = (found[1] / "comparison.tex").read_text()
    assert text == found[0].to_latex()
    lines = text.splitlines()
    assert lines[:2] == [r"\begin{tabular}{lrrrrrr}", r"\toprule"]
    assert lines[-2:] == [r"\bottomrule", r"\end{tabular}"]
    body = [line for line in lines if line.endswith(r"\\")]
    assert len(body) == 10  # heads, eight models, and one that failed
    assert all(line.count(" & ") == 6 for line in body)
    assert latex_table([["a_b", "50 %"], ["x & y {\\} ~^#$", "±1 <2> |3|"]]).splitlines()[2:5] == [
        r"a\_b & 50 \% \\",
        r"\midrule",
        r"x \& y \{\textbackslash{}\} \textasciitilde{}\textasciicircum{}\#\$ & "
        r"$\pm$1 $<$2$>$ $|$3$|$ \\",
    ]


def test_p_values_are_corrected_for_how_many_models_there_are(
    found: tuple[ModelComparison, Path],
) -> None:
    comparison, _ = found
    others = [row for row in comparison.rows if row.behind is not None]
    raw = [row.behind.p_value for row in others if row.behind is not None]
    assert [row.leading.p_holm for row in others] == holm(raw)
    assert comparison.columns[3] == "p (Holm)"
    assert any("corrected for several models by Holm's method" in note for note in comparison.notes)


# --- too little to say ----------------------------------------------------------------------------


@pytest.mark.parametrize("target", [6, 9])
def test_a_comparison_of_one_user_says_that_it_says_nothing(
    recipe: ft.ExperimentConfig, target: int
) -> None:
    # others did all twelve items; only "me" is in the test, with one event
    done = [("me", item) for item in range(6)] + [(f"u{u}", i) for u in range(4) for i in range(12)]
    users, items = zip(*done, ("me", target), strict=True)
    table = pl.DataFrame(
        {"user_id": users, "item_id": items, "at": 1_600_000_000 + np.arange(len(users))}
    )
    events = ft.read_interactions(table, timestamp="at")
    split = ft.temporal_split(events, validation=0.0, test=0.01)
    ease = recipe.model_copy(update={"model": ft.EASEConfig()})
    found = ft.compare_models({"mine": ease}, split)
    assert found.users == 1
    # of one user nothing can be told, so the best figure stays the advice
    assert found.pick == found.rows[0].name
    assert all(row.leading.p_holm in (None, 1.0) for row in found.rows)
    assert "Too few users to decide which is best: on 1 test user " in found.sentence


def test_a_comparison_with_nothing_to_find_is_refused_before_anything_is_trained(
    recipe: ft.ExperimentConfig,
) -> None:
    again = [*range(10), 0, 1]  # the test's two events repeat what the user had before
    table = pl.DataFrame(
        {"user_id": ["me"] * 12, "item_id": again, "at": 1_600_000_000 + np.arange(12)}
    )
    never = ft.temporal_split(ft.read_interactions(table, timestamp="at"), validation=0.0, test=0.2)
    told: list[str] = []
    with pytest.raises(ft.DataError, match="a target"):
        ft.compare_models({"deep": recipe}, never, say=told.append)
    assert not told


def test_a_tiny_budget_reports_what_it_cut_short(
    recipe: ft.ExperimentConfig, split: ft.Split
) -> None:
    long = recipe.model_copy(
        update={"training": ft.TrainingConfig(epochs=10_000, patience=None, device="cpu")}
    )
    found = ft.compare_models({"deep": long}, split, budget_seconds=1e-6)
    assert row_of(found, "deep").stopped
    assert found.sentence.endswith("the budget cut deep short, and what it could reach is unknown.")


def test_recipes_of_one_name_go_by_their_paths(world: Path, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(RECIPE)
    (tmp_path / "more.toml").write_text(RECIPE)
    paths = [world / "run.toml", tmp_path / "run.toml", tmp_path / "more.toml"]
    assert list(ft.read_recipes(paths)) == [str(paths[0]), str(paths[1]), "more"]


def test_the_command_line_answers_with_one_document(
    foretaste: Run, world: Path, tmp_path: Path
) -> None:
    code, out, log = foretaste(
        *("compare", world / "run.toml", "--families", "mf,sasrec", "--budget-seconds", 6),
        *("--out", tmp_path / "out", "--data-dir", world, "--json"),
    )
    assert code == 0, log
    document = json.loads(out)
    assert {row["name"] for row in document["rows"]} == {"mf", "sasrec", *BASELINES}
    assert document["pick"] in document["sentence"]
    assert "training popularity" in log
    assert (tmp_path / "out" / "comparison.svg").exists()
    assert len(ft.load(tmp_path / "out" / "bundle").recommend("u3", k=3).rows) == 3


def test_the_command_line_ends_with_1_where_the_work_fails_and_2_where_the_call_is_wrong(
    foretaste: Run, world: Path
) -> None:
    recipe = world / "run.toml"
    code, out, log = foretaste("compare", recipe, "--families", "sasrek", "--data-dir", world)
    assert (code, out) == (1, "")
    assert log.startswith("foretaste: there is no family 'sasrek'; they are ")
    assert log.endswith("; did you mean 'sasrec'?\n")
    code, out, log = foretaste("compare", recipe, recipe, "--families", "mf")
    assert (code, out) == (2, "")
    assert "one recipe" in log


def test_a_recipe_that_asks_for_a_search_has_it_within_its_share_of_a_budget(
    recipe: ft.ExperimentConfig, split: ft.Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("foretaste.experiment.search_space._ROUNDS", ((1, 2), (1, 1)))
    tried = []
    searched = ShortSearch.run

    def watch(search: ShortSearch) -> object:
        found = searched(search)
        tried.append((search.max_seconds, found[0].training.rate))
        return found

    monkeypatch.setattr(ShortSearch, "run", watch)
    (own,) = ft.family_recipes(recipe, ["mf"]).values()
    own = own.model_copy(update={"model": ft.MFConfig(embedding_dim=4)})
    own = own.model_copy(update={"training": ft.TrainingConfig(epochs=2, device="cpu")})
    searching = ft.TrainingConfig(epochs=2, device="cpu", search=True)
    asked = own.model_copy(update={"training": searching})
    found = ft.compare_models({"own": own, "asked": asked}, split, budget_seconds=60.0)
    ((seconds, rate),) = tried  # without `search` nothing is searched
    assert seconds < 20
    assert row_of(found, "asked").settings["training"]["learning_rate"] == rate

"""Comparing models: one holdout for all, the budget, what fails, and which one to take."""

import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import foretaste as ft
from foretaste.evaluation.bootstrap import Interval
from foretaste.evaluation.compare import Comparison
from foretaste.experiment.compare_families import BASELINES, FAMILIES
from foretaste.experiment.compare_picture import comparison_svg
from foretaste.experiment.compare_table import ModelComparison, ModelRow, choose
from foretaste.training.fit import OUT_OF_TIME, Fit
from foretaste.training.objectives.pairs import PairsConfig

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
ROOT = Path(__file__).parents[1]


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
    """One comparison with all that can happen: a cut, a failure, and a model given twice."""
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


def test_the_baselines_stand_beside_what_was_asked_for(
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
    assert comparison.sentence.endswith(f"the budget cut {cut} short.")


def test_the_clock_ends_a_loop_in_good_order() -> None:
    class Line:
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
        objective=lambda m, batch: (m(batch.view(1, 1)) - 3).square().sum(),
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
    # The seconds of training stand in the manifest, so sizes agree but for some digits.
    assert row_of(comparison, comparison.pick).bundle_bytes == pytest.approx(size, rel=0.01)
    assert all(0 < row.answer_ms < 1000 for row in comparison.rows)
    assert all(row.train_seconds > 0 for row in comparison.rows)


def test_what_is_written_is_the_table_the_picture_and_the_bundle(
    found: tuple[ModelComparison, Path],
) -> None:
    comparison, folder = found
    assert sorted(path.name for path in folder.iterdir()) == [
        "bundle",
        "comparison.json",
        "comparison.md",
        "comparison.svg",
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
    (row,) = (line for line in lines if "knn <again> | once" in line)
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
    name: str, quality: float, seconds: float, behind: tuple[float, float] | None
) -> ModelRow:
    comparison = behind and Comparison(
        metric="ndcg_at_10",
        users=100,
        mean_a=0.5,
        mean_b=quality,
        difference=0.5 - quality,
        interval=Interval(*behind),
        p_value=0.1,
    )
    return ModelRow(
        name=name,
        kind=name,
        quality=quality,
        interval=Interval(quality - 0.1, quality + 0.1),
        behind=comparison or None,
        train_seconds=seconds,
        bundle_bytes=1_500_000,
        answer_ms=1.25,
        stopped=False,
        note="",
        metrics={},
        settings={},
    )


BEST = made_row("best", 0.5, 100.0, None)


@pytest.mark.parametrize(
    ("rows", "pick", "words"),
    [
        ([BEST], "best", "is the best."),
        # Clear of 0: the best, though it costs more.
        ([BEST, made_row("near", 0.4, 1.0, (0.01, 0.2))], "best", "near comes next, behind by 0.1"),
        # The interval touches 0: the cheaper one.
        (
            [BEST, made_row("near", 0.4, 1.0, (0.0, 0.2))],
            "near",
            "ndcg@10 of 0.4000 cannot be told from the 0.5000 of best",
        ),
        ([BEST, made_row("dear", 0.4, 200.0, (-0.1, 0.2))], "best", "dear comes next"),
        # Of several that cannot be told apart the cheapest, not the next best.
        (
            [
                BEST,
                made_row("near", 0.49, 20.0, (-0.1, 0.2)),
                made_row("far", 0.45, 5.0, (-0.01, 0.2)),
                made_row("free", 0.1, 0.0, (0.3, 0.5)),
            ],
            "far",
            "trains in 5.00 s instead of 100.00 s",
        ),
    ],
)
def test_the_cheaper_one_is_taken_where_the_best_is_not_clearly_better(
    rows: list[ModelRow], pick: str, words: str
) -> None:
    name, sentence = choose(rows, "ndcg_at_10")
    assert name == pick
    assert sentence.startswith(f"Take {pick}: ")
    assert words in sentence


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


def test_a_picture_of_one_model_can_be_drawn() -> None:
    comparison = ModelComparison(
        metric="ndcg_at_10",
        rows=(replace(BEST, quality=0.0, interval=Interval(0.0, 0.0), train_seconds=0.0),),
        failed=(),
        split="random",
        users=1,
        budget_seconds=None,
        pick="best",
        sentence="",
        notes=(),
    )
    assert comparison_svg(comparison).count("<circle") == 1


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
    with pytest.raises(ft.ConfigError, match="no recipe"):
        ft.compare_models({}, split)
    with pytest.raises(ft.ConfigError, match=r"budget_seconds is 0\.0"):
        ft.compare_models({"a": recipe}, split, budget_seconds=0.0)
    other = ft.override(recipe, ["split.validation=false"])
    with pytest.raises(ft.ConfigError, match=r"b has another \[split\] than a"):
        ft.compare_models({"a": recipe, "b": other}, split)
    nothing = replace(split, part_E=np.full_like(split.part_E, 2))
    with pytest.raises(ft.ConfigError, match="none of 5 models could be measured: the training"):
        ft.compare_models({"a": recipe}, nothing)


def test_recipes_of_one_name_go_by_their_paths(world: Path, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(RECIPE)
    (tmp_path / "more.toml").write_text(RECIPE)
    paths = [world / "run.toml", tmp_path / "run.toml", tmp_path / "more.toml"]
    assert list(ft.read_recipes(paths)) == [str(paths[0]), str(paths[1]), "more"]


def call(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "foretaste.cli.main", "compare", *map(str, words)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def test_the_command_line_answers_with_one_document(world: Path, tmp_path: Path) -> None:
    done = call(
        world / "run.toml",
        "--families",
        "mf,sasrec",
        "--budget-seconds",
        "60",
        "--out",
        tmp_path / "out",
        "--data-dir",
        world,
        "--json",
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert {row["name"] for row in document["rows"]} == {"mf", "sasrec", *BASELINES}
    assert document["sentence"].startswith(f"Take {document['pick']}: ")
    assert "training popularity" in done.stderr
    assert (tmp_path / "out" / "comparison.svg").exists()
    assert len(ft.load(tmp_path / "out" / "bundle").recommend("u3", k=3).rows) == 3


def test_the_command_line_ends_with_1_where_the_work_fails_and_2_where_the_call_is_wrong(
    world: Path,
) -> None:
    recipe = world / "run.toml"
    failed = call(recipe, "--families", "sasrek", "--data-dir", world)
    assert (failed.returncode, failed.stdout) == (1, "")
    assert failed.stderr.startswith("foretaste: there is no family 'sasrek'; they are ")
    assert failed.stderr.endswith("; did you mean 'sasrec'?\n")
    wrong = call(recipe, recipe, "--families", "mf")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert "one recipe" in wrong.stderr

"""Compressing a trained model's tables: what is measured, what is served, what is refused."""

import json
from pathlib import Path

import polars as pl
import pytest
import torch
from serving_worlds import make_events
from typer.testing import CliRunner

import foretaste as ft
from foretaste.cli.main import app
from foretaste.errors import ConfigError
from foretaste.experiment.compress import compress_tables
from foretaste.models.layers.tables import HashConfig, QuantisedConfig
from foretaste.models.layers.tables_at_rest import HalfConfig, IntegerConfig, PrunedConfig

SPLIT = ft.leave_last_split(make_events())
TRAINING = ft.TrainingConfig(epochs=2, batch_events=64, patience=None)
SMALL = IntegerConfig(from_rows=0)


def fitted(config) -> ft.Trained:
    return ft.fit(config, SPLIT, training=TRAINING, show=False)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of a recipe on a table of 400 users of four groups and 600 items."""
    folder = tmp_path_factory.mktemp("compress")
    generator = torch.Generator().manual_seed(0)
    user = torch.arange(400).repeat_interleave(12)
    item = torch.randint(0, 150, (4800,), generator=generator) + user % 4 * 150
    pl.DataFrame(
        {"user_id": user.numpy(), "item_id": item.numpy(), "timestamp": torch.arange(4800).numpy()}
    ).write_csv(folder / "events.csv")
    (folder / "mf.toml").write_text(
        f'[data]\nkind = "files"\nfiles = ["{folder}/events.csv"]\n[split]\nkind = "leave_last"\n'
        '[model]\nkind = "mf"\nembedding_dim = 16\n'
        "[training]\nepochs = 4\nlearning_rate = 0.05\n"
    )
    recipe = ft.read_experiment(folder / "mf.toml")
    run = ft.run_experiment(recipe, ft.read_split(recipe), show=False)
    ft.to_recommender(run.trained, run.report).save(folder / "bundle")
    return folder / "bundle"


@pytest.mark.parametrize(
    "config",
    [
        ft.MFConfig(),
        ft.TwoTowerConfig(),
        ft.SASRecConfig(),
        ft.BERT4RecConfig(),
        ft.HSTUConfig(),
        ft.DeepFMConfig(),
        ft.DINConfig(),
        ft.NeuMFConfig(),
        ft.MMoEConfig(),
    ],
    ids=lambda config: config.kind,
)
def test_a_compressed_model_answers_as_its_bundle_does_and_nearly_as_before(
    config, tmp_path: Path
) -> None:
    trained = fitted(config)
    before = {name: value.clone() for name, value in trained.model.state_dict().items()}
    smaller = compress_tables(trained, SMALL)
    recommender = ft.build_recommender(smaller)
    recommender.save(tmp_path / "bundle")
    loaded = ft.load(tmp_path / "bundle")
    original = ft.build_recommender(trained)
    for user in range(100, 105):
        mine, its, full = (
            {row.item_id: row.score for row in one.recommend(user, k=20).rows}
            for one in (recommender, loaded, original)
        )
        assert its == pytest.approx(mine, rel=1e-6, abs=1e-6)
        spread = max(full.values()) - min(full.values())
        assert mine == pytest.approx(full, abs=0.1 * spread + 1e-3)
    for name, value in trained.model.state_dict().items():
        assert torch.equal(value, before[name]), name  # the original stays


def test_weights_take_as_many_bytes_as_is_said(bundle: Path, tmp_path: Path) -> None:
    trained = ft.load(bundle).trained
    for table, of_row in [
        (HalfConfig(), 32),
        (IntegerConfig(), 20),
        (IntegerConfig(kind="int4"), 12),
    ]:
        smaller = compress_tables(trained, table)
        state = smaller.model.state_dict()
        tables = [state[n].nbytes for n in state if n.startswith(("user_table", "item_table"))]
        rows = trained.events.num_users + trained.events.num_items
        assert sum(tables) == of_row * rows
        ft.build_recommender(smaller).save(tmp_path / table.kind)
        on_disk = (tmp_path / table.kind / "weights.safetensors").stat().st_size
        assert on_disk < (bundle / "weights.safetensors").stat().st_size


def test_the_frontier_sets_narrow_and_int8_of_as_many_bytes_beside(bundle: Path) -> None:
    found = ft.compress(bundle, tables=[HalfConfig(), QuantisedConfig(sub_spaces=4)])
    kinds = [point.table["kind"] for point in found.points]
    assert sorted(set(kinds)) == ["half", "int8", "narrow", "quantised"]
    asked = {p.table["kind"]: p for p in found.points if p.table["kind"] in ("half", "quantised")}
    assert asked["half"].loss_percent == pytest.approx(0, abs=0.5)
    assert asked["half"].times_smaller == pytest.approx(2)
    assert asked["half"].above_int8 is False  # int8 is as good
    narrow = [p for p in found.points if p.table["kind"] == "narrow"]
    for point in asked.values():
        assert min(abs(n.times_smaller / point.times_smaller - 1) for n in narrow) < 0.35
    for point in found.points:
        assert point.loss_percent == pytest.approx(100 * (1 - point.value / found.original))
        assert point.interval is not None
        assert point.p50_ms > 0
    trained = ft.load(bundle).trained
    recipe = ft.recipe_of(trained)
    report = ft.evaluate_split(trained, recipe, ft.read_split(recipe))
    assert found.original == report.metrics["ndcg_at_10"]
    assert found.to_frame().height == len(found.points)


def test_all_directions_of_narrow_are_the_table_itself(bundle: Path) -> None:
    found = ft.compress(bundle, tables=[IntegerConfig(width=16), IntegerConfig()])
    first, second = found.points
    assert first.value == second.value


@pytest.mark.parametrize(
    ("table", "name"), [(HashConfig(), "table.kind"), (PrunedConfig(), None), (SMALL, None)]
)
def test_only_trained_dense_tables_are_compressed_and_only_once(table, name: str | None) -> None:
    trained = fitted(ft.MFConfig())
    if name is not None:
        with pytest.raises(ConfigError) as caught:
            compress_tables(trained, table)
        assert caught.value.name == name
        return
    once = compress_tables(trained, table)
    with pytest.raises(ConfigError) as caught:
        compress_tables(once, table)
    assert (caught.value.name, caught.value.value) == ("table", table.kind)


@pytest.mark.parametrize("config", [ft.LightGCNConfig(), ft.PinSageConfig()])
def test_models_of_graphs_say_why_they_are_not_compressed(config) -> None:
    with pytest.raises(ConfigError) as caught:
        compress_tables(fitted(config), SMALL)
    assert (caught.value.name, caught.value.value) == ("model.kind", config.kind)


def test_a_kind_may_be_given_as_settings(bundle: Path) -> None:
    trained = ft.load(bundle).trained
    assert compress_tables(trained, {"kind": "int4"}).config.table == IntegerConfig(kind="int4")
    with pytest.raises(ConfigError) as caught:
        compress_tables(trained, {"kind": "int3"})
    assert caught.value.name == "table"


def test_the_command_writes_the_kind_that_it_is_told(bundle: Path, tmp_path: Path) -> None:
    line = ["compress", str(bundle), "--kind", "int8", "--out", str(tmp_path / "small"), "--json"]
    done = CliRunner().invoke(app, line)
    assert done.exit_code == 0, done.output
    assert ft.load(tmp_path / "small").trained.config.table == IntegerConfig()
    assert json.loads(done.stdout)["points"][0]["table"]["kind"] == "int8"


def test_a_model_without_tables_and_a_metric_that_is_not_there_are_named(bundle: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        compress_tables(fitted(ft.PopularityConfig()), SMALL)
    assert (caught.value.name, caught.value.value) == ("table", "none")
    with pytest.raises(ConfigError) as caught:
        ft.compress(bundle, metric="ndcg_at_7")
    assert caught.value.name == "metric"

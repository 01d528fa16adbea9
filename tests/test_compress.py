"""Compressing a trained model's tables: what is measured, what is served, what is refused."""

import json
import math
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest
import torch
from typer.testing import CliRunner

import foretaste as ft
from foretaste.cli.main import app
from foretaste.errors import BundleError, ConfigError
from foretaste.experiment import compress as compressing
from foretaste.experiment.compress import (
    Frontier,
    Point,
    compress_tables,
    frontier_svg,
    recommended,
    table_bytes,
    trained_tables,
    usual_tables,
)
from foretaste.models.catalogue import build_model
from foretaste.models.layers.table_kinds import QuantisedConfig, TableConfig
from foretaste.models.layers.tables import HashConfig
from foretaste.models.layers.tables_at_rest import HalfConfig, IntegerConfig, PrunedConfig
from tests.worlds import make_events

SPLIT = ft.leave_last_split(make_events())
TRAINING = ft.TrainingConfig(epochs=2, batch_events=64, patience=None)
SMALL = IntegerConfig(from_rows=0)


def fitted(config) -> ft.Trained:
    return ft.fit(config, SPLIT, training=TRAINING, show=False)


@pytest.fixture(scope="module")
def mf() -> ft.Trained:
    return fitted(ft.MFConfig())


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
        (IntegerConfig(), 18),
        (IntegerConfig(kind="int4"), 10),
    ]:
        smaller = compress_tables(trained, table)
        state = smaller.model.state_dict()
        tables = [state[n].nbytes for n in state if n.startswith(("user_table", "item_table"))]
        rows = trained.events.num_users + trained.events.num_items
        assert sum(tables) == of_row * rows
        ft.build_recommender(smaller).save(tmp_path / table.kind)
        on_disk = (tmp_path / table.kind / "weights.safetensors").stat().st_size
        assert on_disk < (bundle / "weights.safetensors").stat().st_size


@pytest.mark.parametrize(
    "table", trained_tables(4.0, 16), ids=lambda table: table.model_dump_json()
)
def test_tables_inside_a_table_are_counted_once(mf: ft.Trained, table: TableConfig) -> None:
    config = ft.MFConfig(embedding_dim=16, table=table.model_copy(update={"from_rows": 0}))
    model = build_model(config, num_users=5000, num_items=4000)
    weights = [value for name, value in model.state_dict().items() if "_table." in name]
    assert table_bytes(replace(mf, model=model)) == sum(value.nbytes for value in weights)


def test_all_kinds_but_narrow_and_int8_are_compared_with_both() -> None:
    for table in [*usual_tables(64), *trained_tables(8.0, 64)]:
        beside = set(compressing.anchors(table, 8.0, 64))
        assert beside == (set() if table.kind in ("narrow", "int8") else {"narrow", "int8"})


def test_the_frontier_has_narrow_and_int8_tables_of_as_many_bytes(bundle: Path) -> None:
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
    ("table", "name"),
    [
        (HashConfig(), "table.kind"),
        (PrunedConfig(), "table.from_rows"),  # for 256 rows or more, which this model lacks
        (PrunedConfig(from_rows=1), None),
        (SMALL, None),
    ],
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


def test_the_command_writes_the_given_kind(bundle: Path, tmp_path: Path) -> None:
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


def test_kinds_that_train_are_trained_again_and_are_in_the_picture(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compressing, "trained_tables", lambda times, _: [HashConfig(times=times)])
    picture = tmp_path / "frontier.svg"
    line = ["compress", str(bundle), "--kind", "half", "--retrain", "--json"]
    done = CliRunner().invoke(app, [*line, "--chart", str(picture)])
    assert done.exit_code == 0, done.output
    points = json.loads(done.stdout)["points"]
    again = [point for point in points if point["trained"]]
    assert [p["table"]["times"] for p in again] == [4, 8]
    for point in again:
        assert point["times_smaller"] == pytest.approx(point["table"]["times"], rel=0.2)
        assert point["above_narrow"] is not None
    drawn = ET.fromstring(picture.read_text(encoding="utf-8"))  # our own
    circles = [part for part in drawn.iter() if part.tag.endswith("circle")]
    assert len(circles) == len(points)
    assert CliRunner().invoke(app, [*line, "--chart", str(picture)]).exit_code != 0  # it is there


def test_every_kind_that_can_be_trained_is_trained_again_at_the_size_that_is_asked() -> None:
    for times in (4.0, 8.0):
        tables = trained_tables(times, 64)
        kinds = {table.kind for table in tables}
        assert kinds == {"narrow", "hash", "compositional", "quantised"}
        for table in tables:
            made = table.make(50_000, 64)
            weights = sum(value.nbytes for value in made.state_dict().values())
            assert 4 * 64 * 50_000 / weights == pytest.approx(times, rel=0.15)


def test_the_smallest_is_recommended_that_is_better_than_both_and_loses_one_percent_at_most() -> (
    None
):
    def point(times: float, loss: float, *, above: bool = True) -> Point:
        return Point(
            table={"kind": "int4"},
            weight_bytes=1,
            times_smaller=times,
            value=1.0 - loss / 100,
            loss_percent=loss,
            interval=None,
            p50_ms=1.0,
            above_narrow=True,
            above_int8=above,
        )

    small, lossy, beaten = point(4.0, 0.9), point(8.0, 4.0), point(6.0, 0.1, above=False)
    assert recommended([point(2.0, 0.0), small, lossy, beaten]) == small
    assert recommended([lossy, beaten]) is None


def test_the_picture_is_higher_where_the_metric_is_and_further_where_tables_are_smaller() -> None:
    def point(times: float, value: float) -> Point:
        return Point(
            table={"kind": "half"},
            weight_bytes=1,
            times_smaller=times,
            value=value,
            loss_percent=0.0,
            interval=(value - 0.6, value - 0.4),
            p50_ms=1.0,
        )

    points = (point(2.0, 0.5), point(4.0, 0.3), point(16.0, 0.4))
    frontier = Frontier(
        metric="ndcg_at_10", original=0.5, weight_bytes=4, points=points, recommended=None
    )
    drawn = ET.fromstring(frontier_svg(frontier))  # our own
    circles = [part for part in drawn.iter() if part.tag.endswith("circle")]
    x, y = ([float(circle.get(name, "")) for circle in circles] for name in ("cx", "cy"))
    assert x[1] - x[0] == pytest.approx((x[2] - x[0]) / 3, abs=0.2)  # octaves: 2, 4, 16
    assert y[0] < y[2] < y[1]
    assert y[2] == pytest.approx((y[0] + y[1]) / 2, abs=0.2)


@pytest.mark.parametrize(
    ("table", "weight", "value"),
    [
        (PrunedConfig(from_rows=0), "place_R", 10**6),
        (PrunedConfig(from_rows=0), "place_R", -1),
        (PrunedConfig(from_rows=0), "kept.weight", math.nan),
        (SMALL, "scale_R", math.nan),
        (SMALL, "scale_R", -1.0),
        (IntegerConfig(from_rows=0, width=3), "direction_dD", math.inf),
        (HalfConfig(from_rows=0), "weight", math.inf),
        (QuantisedConfig(from_rows=0, sub_spaces=4), "codebooks.weight", math.nan),
        (QuantisedConfig(from_rows=0, sub_spaces=4, turned=True), "turn_DD", math.nan),
        (QuantisedConfig(from_rows=0, sub_spaces=4, exact=0.1), "exact_L", -1),
        (QuantisedConfig(from_rows=0, sub_spaces=4, exact=0.1), "exact_LD", math.nan),
    ],
)
def test_damaged_tables_in_a_bundle_are_refused(
    mf: ft.Trained, table, weight: str, value: float, tmp_path: Path
) -> None:
    smaller = compress_tables(mf, table)
    recommender = ft.build_recommender(smaller)
    smaller.model.state_dict()[f"item_table.{weight}"].view(-1)[0] = value
    recommender.save(tmp_path / "bundle")
    with pytest.raises(BundleError) as caught:
        ft.load(tmp_path / "bundle")
    assert caught.value.name == type(smaller.model.item_table).__name__


def test_codes_that_are_no_bytes_are_refused(mf: ft.Trained) -> None:
    model = compress_tables(mf, QuantisedConfig(from_rows=0, sub_spaces=4)).model
    state = model.state_dict()
    state["item_table.code_RM"] = state["item_table.code_RM"].short() + 256
    with pytest.raises(BundleError) as caught:
        model.load_state_dict(state, assign=True)
    assert caught.value.name == "Quantised"


def test_what_answers_for_dropped_items_comes_from_their_users_or_their_features(
    mf: ft.Trained,
) -> None:
    kind = {"kind": "pruned", "from_rows": 0, "keep": 0.5, "instead": "neighbours"}
    table = compress_tables(mf, kind).model.item_table
    place_R, num = table.place_R.long(), table.kept.num_rows - 1
    original = mf.model.item_table.weight.detach()
    own_K = [int((original == row).all(dim=1).nonzero()[0]) for row in table.kept.weight[:num]]
    train = SPLIT.train
    users = [set(train.user_idx[train.item_idx == item]) for item in range(len(place_R))]
    dropped = sorted(set(range(len(place_R))) - set(own_K))
    answered = [item for item in dropped if place_R[item] < num]
    assert answered
    for item in answered:
        shared = [len(users[item] & users[k]) / max(1, len(users[k])) ** 0.5 for k in own_K]
        assert shared[int(place_R[item])] == pytest.approx(max(shared))
    with pytest.raises(ConfigError) as caught:
        compress_tables(mf, {**kind, "instead": "features"})
    assert caught.value.name == "table.instead"

"""Plans of a recipe at another size: sizes by hand, and refused input."""

import json
from pathlib import Path

import pytest

import foretaste as ft
from foretaste.cli.main import run
from foretaste.errors import ConfigError

USERS, ITEMS, EVENTS, WIDTH = 1_000_000, 200_000, 10_000_000, 8
BYTES = 4 * WIDTH
RECIPE = """
[data]
kind = "store"
path = "events"
[split]
kind = "leave_last"
[model]
kind = "mf"
embedding_dim = 8
[training]
epochs = 3
batch_events = 1000
tables = "lazy_adamw"
sharded_from = 500_000
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure on few events, for a short time."""
    monkeypatch.setattr("foretaste.experiment.plan._MOST_EVENTS", 2000)
    monkeypatch.setattr("foretaste.experiment.plan._SECONDS", 0.1)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(RECIPE)
    return path


def test_tables_of_many_rows_are_sharded_and_others_are_not(recipe: Path) -> None:
    config = ft.read_experiment(recipe)
    found = ft.plan_size(config, events=EVENTS, users=USERS, items=ITEMS, processes=4)
    users, items = found.tables
    # the weights, their best so far, and two moments of each
    assert (users.rows, users.bytes_in_all) == (USERS, 4 * USERS * BYTES)
    assert users.bytes_of_each == USERS * BYTES
    assert items.bytes_of_each == items.bytes_in_all == 4 * ITEMS * BYTES
    assert found.bytes_of_each == users.bytes_of_each + items.bytes_of_each
    assert found.steps == EVENTS / 1000
    assert found.hours == pytest.approx(3 * EVENTS / (4 * found.events_per_second) / 3600)
    # rows of a quarter of the batch's users and their gradients, and gradients of some items
    assert 2 * 250 * BYTES < found.traffic_bytes < 2 * 250 * BYTES + ITEMS * BYTES


def test_one_process_holds_all_and_sends_nothing(recipe: Path) -> None:
    config = ft.read_experiment(recipe, overrides=["training.tables=row_adagrad"])
    found = ft.plan_size(config, events=EVENTS, users=USERS, items=ITEMS)
    assert found.traffic_bytes == 0
    # the weights, their best so far, and one sum a row
    assert found.tables[0].bytes_of_each == USERS * (2 * BYTES + 4)


def test_the_gradient_of_all_rows_is_sent_where_all_rows_move(recipe: Path) -> None:
    overrides = ["training.tables=adamw", "training.sharded_from=none"]
    config = ft.read_experiment(recipe, overrides=overrides)
    found = ft.plan_size(config, events=EVENTS, users=USERS, items=ITEMS, processes=2)
    assert found.traffic_bytes == 2 * (USERS + ITEMS) * BYTES
    # weights, gradients, two moments, the average and the best so far
    assert found.bytes_of_each == 6 * (USERS + ITEMS) * BYTES


def test_a_model_without_a_training_loop_is_refused(recipe: Path) -> None:
    config = ft.read_experiment(recipe).model_copy(update={"model": ft.EASEConfig()})
    with pytest.raises(ConfigError) as caught:
        ft.plan_size(config, events=10, users=2, items=2)
    assert caught.value.name == "model.kind"


def test_the_command_takes_sizes_as_people_write_them(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ["--events", "1e7", "--users", "1e6", "--items", "2e5"]
    with pytest.raises(SystemExit) as caught:
        run(["plan", str(recipe), *sizes, "--json"])
    assert caught.value.code == 0
    assert json.loads(capsys.readouterr().out)["steps"] == EVENTS / 1000

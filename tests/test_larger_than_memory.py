"""More events than memory holds: imports by ranges of users, and orders by blocks."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import foretaste as ft
from foretaste.data import importing, interactions, plans
from foretaste.data.importing import import_events
from foretaste.data.plans import BlockOrder, plan_pairs
from foretaste.training.checkpoint import Progress
from foretaste.training.fit import Fit
from foretaste.training.trained import Trained
from tests.worlds import events_of


@pytest.fixture(autouse=True)
def in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importing, "IN_MEMORY_BYTES", 0)


def log(num: int = 400, *, seed: int = 0) -> pl.DataFrame:
    rng = np.random.default_rng(seed)
    return pl.DataFrame(
        {
            "user_id": (rng.pareto(1.0, num) * 10).astype(np.int64) % 50,
            "item_id": rng.integers(0, 30, num) * 7,
            "t": rng.integers(1_600_000_000, 1_600_000_200, num),
            "rating": rng.integers(1, 6, num),
            "share": np.where(rng.random(num) < 0.1, np.nan, rng.random(num).round(3)),
            "place": rng.choice(["here", "there, too", ""], num),
        }
    )


def written(table: pl.DataFrame, folder: Path, kind: str, parts: int = 3) -> list[Path]:
    paths = []
    for number, start in enumerate(range(0, table.height, -(-table.height // parts))):
        part = table.slice(start, -(-table.height // parts))
        path = folder / f"part-{number}.{kind}"
        part.write_parquet(path) if kind == "parquet" else part.write_csv(path)
        paths.append(path)
    return paths


SETTINGS: dict[str, dict[str, object]] = {
    "ids alone": {},
    "times, numbers and context": {
        "timestamp": "t",
        "rating": "rating",
        "columns": ["share"],
        "context": ["place"],
    },
    "last of repeats": {"timestamp": "t", "duplicates": "last", "columns": ["rating"]},
}


@pytest.mark.parametrize("kind", ["parquet", "csv"])
@pytest.mark.parametrize("asked", SETTINGS.values(), ids=list(SETTINGS))
@pytest.mark.parametrize("ids", ["whole", "text", "mixed", "decimals"])
def test_an_import_in_blocks_is_the_table_read_as_one(
    kind: str, asked: dict[str, object], ids: str, tmp_path: Path
) -> None:
    table = log()
    if ids == "text":
        table = table.with_columns(pl.format("u{}", "user_id").alias("user_id"))
    if ids == "mixed":  # the last part alone shows that ids of users are no integers
        user = [*table["user_id"].cast(pl.String)[:-1], "someone"]
        table = table.with_columns(user_id=pl.Series(user), item_id=pl.format("0{}", "item_id"))
    if ids == "decimals":
        table = table.with_columns(item_id=pl.format("{}", "item_id"))
    paths = written(table, tmp_path, kind)
    expected = ft.read_interactions(paths, **asked)
    found = import_events(paths, out=tmp_path / "store", block_events=50, **asked)
    assert found.fingerprint() == expected.fingerprint()
    assert {name: c.dtype for name, c in found.columns.items()} == {
        name: c.dtype for name, c in expected.columns.items()
    }
    assert sorted(found.notes) == sorted(expected.notes)
    assert not list(tmp_path.glob(".*"))


def test_incomplete_rows_are_refused_or_counted_once(tmp_path: Path) -> None:
    table = log().with_columns(
        user_id=pl.when(pl.int_range(pl.len()) % 50 == 7).then(None).otherwise("user_id")
    )
    paths = written(table, tmp_path, "parquet")
    with pytest.raises(ft.DataError, match="range of users") as caught:
        import_events(paths, out=tmp_path / "store", block_events=50)
    assert caught.value.column == "user_id"
    assert not (tmp_path / "store").exists()
    found = import_events(paths, out=tmp_path / "store", block_events=50, drop_incomplete=True)
    expected = ft.read_interactions(paths, drop_incomplete=True)
    assert found.fingerprint() == expected.fingerprint()
    assert found.notes == expected.notes


@pytest.mark.parametrize("damage", ["missing", "cut short", "other type", "other column"])
@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_a_damaged_part_is_named_and_nothing_is_left(
    damage: str, kind: str, tmp_path: Path
) -> None:
    paths = written(log(), tmp_path, kind)
    if damage == "missing":
        paths[1].unlink()
    if damage == "cut short":
        whole = paths[1].read_bytes()
        end = whole.index(b"\n", len(whole) // 2) + 3 if kind == "csv" else len(whole) // 2
        paths[1].write_bytes(whole[:end])
    if damage == "other type":
        if kind == "csv":
            pytest.skip("texts have no types")
        log().with_columns(pl.col("item_id").cast(pl.String)).write_parquet(paths[1])
    if damage == "other column":
        renamed = log().rename({"item_id": "product"})
        renamed.write_parquet(paths[1]) if kind == "parquet" else renamed.write_csv(paths[1])
    with pytest.raises(ft.DataError) as caught:
        import_events(paths, out=tmp_path / "store", block_events=50)
    if (damage, kind) != ("cut short", "csv"):  # of its last line no more than a value is missing
        assert "part-1" in str(caught.value)
    assert not (tmp_path / "store").exists()
    assert not list(tmp_path.glob(".*"))


def test_a_disk_that_fills_during_an_import_is_named_and_nothing_is_left(
    small_disk: Path, tmp_path: Path
) -> None:
    paths = written(log(20_000), tmp_path, "parquet")
    with pytest.raises(ft.ForetasteError, match="No space left") as caught:
        import_events(paths, out=small_disk / "store", timestamp="t")
    assert str(small_disk) in str(caught.value)
    assert os.listdir(small_disk) == []


def test_a_file_that_changes_while_it_is_imported_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = written(log(), tmp_path, "parquet")
    arranged = importing._arranged

    def and_touch(*arguments: object) -> object:
        os.utime(paths[2], ns=(1, 1))
        return arranged(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(importing, "_arranged", and_touch)
    with pytest.raises(ft.DataError, match="changed while it was imported") as caught:
        import_events(paths, out=tmp_path / "store")
    assert caught.value.value == str(paths[2])
    assert not (tmp_path / "store").exists()


KILLED = """
import os, signal, sys
from pathlib import Path
from foretaste.data import importing
importing.IN_MEMORY_BYTES = 0
importing.fill_files = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
folder = Path(sys.argv[1])
importing.import_events([folder / "part-0.parquet"], out=folder / "store", replace=True)
"""


def test_an_import_that_is_killed_leaves_the_old_store_and_the_next_import_deletes_its_files(
    tmp_path: Path,
) -> None:
    paths = written(log(), tmp_path, "parquet")
    before = import_events(paths, out=tmp_path / "store", timestamp="t").fingerprint()
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert len(list(tmp_path.glob(".store.*.writing*"))) == 2  # the new store and its ranges
    assert ft.open_store(tmp_path / "store").fingerprint() == before
    found = import_events(paths[:1], out=tmp_path / "store", timestamp="t", replace=True)
    assert found.fingerprint() == ft.read_interactions(paths[:1], timestamp="t").fingerprint()
    assert not list(tmp_path.glob(".*"))


def test_what_needs_the_whole_table_is_read_as_one(tmp_path: Path) -> None:
    paths = written(log(), tmp_path, "parquet")
    for number, asked in enumerate(
        ({"where": "rating > 2"}, {"positive": "rating >= 4"}, {"user": None})
    ):
        out = tmp_path / f"store-{number}"
        found = import_events(paths, out=out, block_events=50, **asked)
        expected = ft.read_interactions(paths, **asked)
        assert found.fingerprint() == expected.fingerprint()
        assert json.loads((out / "manifest.json").read_text())["events"] == len(expected)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(num=st.integers(1, 300), run=st.integers(1, 9), runs=st.integers(1, 5), seed=st.integers(0))
def test_an_order_by_blocks_is_a_permutation_that_can_be_read_from_anywhere(
    num: int, run: int, runs: int, seed: int
) -> None:
    order = BlockOrder(num, seed, run=run, shuffled=run * runs)
    whole = order[0:num]
    assert len(order) == num
    assert sorted(whole.tolist()) == list(range(num))
    resumed = BlockOrder(num, seed, run=run, shuffled=run * runs)
    for start in range(num - 1, -1, -7):
        assert resumed[start : start + 11].tolist() == whole[start : start + 11].tolist()


def test_an_order_by_blocks_mixes_far_events_and_goes_by_its_seed() -> None:
    one, same, other = (BlockOrder(100_000, s, run=10, shuffled=1000)[0:1000] for s in (3, 3, 4))
    assert one.tolist() == same.tolist() != other.tolist()
    # 100 runs of 100,000 events: about as far apart as any 1,000 events, and neighbours are not
    # neighbours: by chance 1 of 1,000 follows its predecessor
    assert np.corrcoef(np.arange(1000), one)[0, 1] < 0.15
    assert (np.diff(one) == 1).sum() < 10
    assert np.diff(np.sort(one // 10_000), prepend=-1).sum() == 10


def test_plans_of_very_many_events_hold_each_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "WHOLE_ORDER", 40)
    monkeypatch.setattr(interactions, "_EACH_USER", 40)
    events = events_of([[0, 1], [], [2] * 70, [], [3]], num_items=4)
    plan = plan_pairs(events, batch_events=9, generator=np.random.default_rng(0))
    batches = [plan.batch(index) for index in range(len(plan))]
    pairs = [
        pair
        for batch in batches
        for pair in zip(batch.queries.user_B.tolist(), batch.item_B.tolist(), strict=True)
    ]
    expected = zip(events.user_idx.tolist(), events.item_idx.tolist(), strict=True)
    assert sorted(pairs) == sorted(expected)
    again = plan_pairs(events, batch_events=9, generator=np.random.default_rng(0))
    assert torch.equal(again.batch(5).item_B, batches[5].item_B)


STREAMED = """\
import os, signal, sys
from foretaste.data import interactions, plans
from tests.test_larger_than_memory import streamed_fit
last = int(sys.argv[2])
def kill(progress, _):
    if progress.step == last:
        os.kill(os.getpid(), signal.SIGKILL)
plans.WHOLE_ORDER = interactions._EACH_USER = 40
streamed_fit(sys.argv[1], kill)
"""


def streamed_fit(folder: str, on_step: Callable[[Progress, int], None] | None = None) -> Trained:
    """Train on a store in an order by blocks, from the last checkpoint of the folder on."""
    split = ft.leave_last_split(ft.open_store(Path(folder).parent / "store"))
    run = Fit._epoch

    def watched(self: Fit, log: Any, on_epoch: Any, _: Any, seconds: Any) -> None:
        run(self, log, on_epoch, on_step, seconds)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Fit, "_epoch", watched)
        training = ft.TrainingConfig(epochs=3, batch_events=32, checkpoint_seconds=0)
        return ft.fit(
            ft.MFConfig(embedding_dim=4),
            split,
            training=training,
            folder=folder,
            resume=Path(folder).exists(),
            show=False,
        )


def test_a_streamed_epoch_that_is_killed_three_times_ends_with_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import_events(written(log(600), tmp_path, "csv"), out=tmp_path / "store", timestamp="t")
    for last in (3, 20, 30):  # in the first epoch, and twice in the second
        call = [sys.executable, "-c", STREAMED, str(tmp_path / "killed"), str(last)]
        killed = subprocess.run(call, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False)
        assert killed.returncode == -signal.SIGKILL
    monkeypatch.setattr(plans, "WHOLE_ORDER", 40)
    monkeypatch.setattr(interactions, "_EACH_USER", 40)
    resumed = streamed_fit(str(tmp_path / "killed")).model.state_dict()
    whole = streamed_fit(str(tmp_path / "whole")).model.state_dict()
    logs = [(tmp_path / name / "steps.jsonl").read_text() for name in ("killed", "whole")]
    assert logs[0] == logs[1]
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name

"""The event store: it opens exactly what was written, completely or not at all."""

import errno
import hashlib
import json
import os
import shutil
import time
import tracemalloc
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from foretaste.data import arrays, store
from foretaste.data.arrays import count_before, pick
from foretaste.data.interactions import Interactions
from foretaste.data.reading import read_interactions
from foretaste.data.splits import TRAIN
from foretaste.data.splitting import leave_last_split
from foretaste.data.store import open_store, write_store
from foretaste.data.vocabulary import Vocabulary
from foretaste.errors import BundleError, DataError


def events(size: int = 500) -> Interactions:
    rng = np.random.default_rng(size)
    frame = pl.DataFrame(
        {
            "user_id": [f"ü{n}" for n in rng.integers(0, 40, size)],
            "item_id": rng.integers(0, 60, size),
            "timestamp": rng.integers(0, 10**9, size),
            "rating": rng.random(size),
            "clicked": rng.random(size) < 0.5,
            "hour": rng.integers(0, 24, size),
            "place": [["here", None, "thére"][n] for n in rng.integers(0, 3, size)],
        }
    )
    items = pl.DataFrame({"item_id": range(70), "title": [f"Title {n}" for n in range(70)]})
    users = pl.DataFrame({"user_id": ["ü1", "new"], "age": [1, None]})
    return read_interactions(
        frame,
        timestamp="timestamp",
        rating="rating",
        columns=["clicked"],
        context=["hour", "place"],
        items=items,
        users=users,
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_store(events(), tmp_path / "store")
    return tmp_path / "store"


def test_what_is_written_is_what_is_opened(folder: Path) -> None:
    first, second = events(), open_store(folder, verify=True)
    assert first.fingerprint() == second.fingerprint()
    for name in ("offsets", "item_idx", "timestamp_s"):
        one, other = getattr(first, name), getattr(second, name)
        assert (one.dtype, one.tolist()) == (other.dtype, other.tolist())
    assert second.columns.keys() == {"rating", "clicked"}
    for name, column in second.columns.items():
        assert (column.dtype, column.tolist()) == (
            first.columns[name].dtype,
            first.columns[name].tolist(),
        )
    assert second.users.ids.to_list() == first.users.ids.to_list()
    assert second.users.find("ü1") == first.users.find("ü1")
    assert second.items.ids.to_list() == first.items.ids.to_list()
    assert second.user_table is not None
    assert second.item_table is not None
    assert first.user_table is not None
    assert first.item_table is not None
    assert second.user_table.equals(first.user_table)
    assert second.item_table.equals(first.item_table)
    assert first.context is not None
    assert second.context is not None
    assert second.context.equals(first.context)
    assert second.notes == first.notes != ()


def test_a_store_without_times_tables_or_events(tmp_path: Path) -> None:
    plain = read_interactions(pl.DataFrame({"user_id": [1, 2], "item_id": ["a", "b"]}))
    none = plain.select(np.zeros(2, np.bool_))
    for name, table in (("plain", plain), ("none", none)):
        write_store(table, tmp_path / name)
        opened = open_store(tmp_path / name, verify=True)
        assert opened.fingerprint() == table.fingerprint()
        assert (opened.timestamp_s, opened.user_table, opened.item_table) == (None, None, None)
        assert opened.context is None


def test_a_context_with_another_number_of_rows_is_refused(tmp_path: Path) -> None:
    table = events(20)
    assert table.context is not None
    object.__setattr__(table, "context", table.context.head(19))  # as a broken file would have it
    write_store(table, tmp_path / "store")
    with pytest.raises(BundleError, match="has 19 rows, not 20"):
        open_store(tmp_path / "store")


def test_columns_are_maps_that_cannot_be_written(folder: Path) -> None:
    opened = open_store(folder)
    assert isinstance(opened.item_idx.base, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        opened.item_idx[0] = 1


def test_every_changed_file_is_named(folder: Path, tmp_path: Path) -> None:
    for name in sorted(path.name for path in folder.iterdir() if path.name != "manifest.json"):
        copy = tmp_path / "copy"
        shutil.copytree(folder, copy)
        content = bytearray((copy / name).read_bytes())
        content[-1] ^= 1
        (copy / name).write_bytes(content)
        with pytest.raises(BundleError, match=name):
            open_store(copy, verify=True)
        (copy / name).write_bytes(content[:-1])
        with pytest.raises(BundleError, match=f"{name} holds"):
            open_store(copy)
        (copy / name).unlink()
        with pytest.raises(BundleError, match=f"{name} cannot be read"):
            open_store(copy)
        shutil.rmtree(copy)


def change_manifest(folder: Path, **fields: object) -> None:
    document = json.loads((folder / "manifest.json").read_text()) | fields
    document.pop("checksum")
    own = hashlib.sha256(json.dumps(document, indent=2).encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(document | {"checksum": own}, indent=2) + "\n")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"format_version": 3}, "formats up to 2"),
        ({"format": "other"}, "something else"),
        ({"surprise": 1}, "surprise"),
        ({"events": 499}, "offsets|item_idx|column|timestamp"),
        ({"columns": {"rating": "../../etc/passwd"}}, "does not list"),
        ({"files": {}}, "does not list"),
    ],
)
def test_a_manifest_that_lies_is_refused(
    folder: Path, fields: dict[str, object], message: str
) -> None:
    change_manifest(folder, **fields)
    with pytest.raises(BundleError, match=message):
        open_store(folder)


def test_what_is_no_store(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(BundleError, match="not an event store"):
        open_store(tmp_path / "nowhere")
    (folder / "manifest.json").write_text("{")
    with pytest.raises(BundleError, match="broken"):
        open_store(folder)


def test_a_store_is_replaced_only_where_that_is_asked(folder: Path, tmp_path: Path) -> None:
    before = sorted(os.listdir(folder))
    with pytest.raises(BundleError, match="--replace"):
        write_store(events(), folder)
    assert sorted(os.listdir(folder)) == before
    write_store(events(60), folder, replace=True)
    assert len(open_store(folder, verify=True)) == 60
    write_store(events(), tmp_path / "no" / "where")
    assert len(open_store(tmp_path / "no" / "where")) == len(events())


def test_a_full_disk_leaves_nothing_behind(small_disk: Path) -> None:
    with pytest.raises(BundleError, match=r"No space left on device.*no part of it was kept"):
        write_store(events(20_000), small_disk / "store")
    assert os.listdir(small_disk) == []


@pytest.mark.parametrize("broken", ["_write_array", "_write_table", "seal"])
def test_a_disk_that_fills_at_any_point_leaves_nothing_behind(
    broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(store, broken, fail)
    with pytest.raises(BundleError, match="No space left"):
        write_store(events(), tmp_path / "store")
    assert os.listdir(tmp_path) == []


def test_opening_does_not_grow_with_size(tmp_path: Path) -> None:
    def seconds_to_open(size: int) -> float:  # of this process alone
        rng = np.random.default_rng(0)
        ids = [f"user {n}" for n in rng.integers(0, size, size)]
        write_store(
            read_interactions(pl.DataFrame({"user_id": ids, "item_id": range(size)})),
            tmp_path / f"{size}",
        )
        taken = []
        for _ in range(5):
            start = time.process_time()
            open_store(tmp_path / f"{size}")
            taken.append(time.process_time() - start)
        return min(taken)

    small, large = seconds_to_open(1_000), seconds_to_open(400_000)
    # 400 times the events and users; reading through what is opened takes 20 times as long
    assert large < 6 * small


def test_a_split_of_a_mapped_store_keeps_its_columns_out_of_memory(tmp_path: Path) -> None:
    """Of 3 million events training would hold 60 MB, and the two holdouts as much each."""
    num = 3_000_000
    rng = np.random.default_rng(0)
    user = np.sort(rng.integers(0, 50_000, num)).astype(np.int32)
    offsets = np.searchsorted(user, np.arange(50_001))
    numbers = [Vocabulary(pl.Series(range(size))) for size in (50_000, 1_000)]
    made = Interactions(
        users=numbers[0],
        items=numbers[1],
        offsets=offsets,
        item_idx=rng.integers(0, 1_000, num).astype(np.int32),
        timestamp_s=np.arange(num),
        columns={"rating": rng.random(num).astype(np.float32)},
    )
    write_store(made, tmp_path / "store")
    split = leave_last_split(open_store(tmp_path / "store"))
    split.events.user_idx  # noqa: B018 - one copy for all parts, not counted here
    tracemalloc.start()
    train, _, _ = split.train, split.validation, split.test
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (kept / 2**20, peak / 2**20) < (8, 40)
    in_memory = made.select(split.part_E == TRAIN)
    assert train.timestamp_s is not None
    assert in_memory.timestamp_s is not None
    for one, other in (
        (train.offsets, in_memory.offsets),
        (train.item_idx, in_memory.item_idx),
        (train.timestamp_s, in_memory.timestamp_s),
        (train.columns["rating"], in_memory.columns["rating"]),
    ):
        assert one.dtype == other.dtype
        assert np.array_equal(one, other)


@pytest.mark.parametrize("block", [1, 3, 7, 100])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_a_part_of_a_mapped_column_is_the_part_of_the_column(
    block: int, share: float, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    keep = rng.random(21) < share
    np.save(tmp_path / "column.npy", rng.integers(0, 99, 21))
    mapped = np.asarray(np.load(tmp_path / "column.npy", mmap_mode="r"))
    assert pick(mapped, keep, block=block).tolist() == mapped[keep].tolist()
    place = np.array([0, 0, 3, 6, 7, 14, 20, 21, 21])
    expected = [int(keep[:end].sum()) for end in place]
    assert count_before(keep, place, block=block).tolist() == expected


def test_no_room_for_a_part_of_a_mapped_column_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    np.save(tmp_path / "column.npy", np.arange(21))
    mapped = np.load(tmp_path / "column.npy", mmap_mode="r")
    monkeypatch.setattr(arrays, "TemporaryFile", full)
    with pytest.raises(DataError, match=r"No space left on device.*TMPDIR") as caught:
        pick(mapped, np.ones(21, np.bool_), block=7)
    assert caught.value.name == "TMPDIR"

"""Folders are written completely or not at all, replaced on request only, readable by others."""

import errno
import os
import shutil
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import polars as pl
import pytest

import foretaste as ft
from foretaste.data.folder import reason_of, whole_file, whole_folder
from foretaste.errors import ConfigError, ForetasteError
from foretaste.training.checkpoint import write_checkpoint
from foretaste.training.progress import StepLog
from tests.worlds import CONFIGS, make_trained

RECOMMENDER = ft.build_recommender(make_trained("popularity"))


def _lists(path: Path, *, replace: bool) -> None:
    users = path.parent / "users.txt"
    if not users.exists():
        users.write_text("100\n101\n")
    ft.write_lists(RECOMMENDER, users, path, k=2, replace=replace)


Write = Callable[..., object]
WRITERS: dict[str, tuple[str, Write]] = {
    "bundle": ("b", lambda path, replace: RECOMMENDER.save(path, replace=replace)),
    "event store": (
        "s",
        lambda path, replace: ft.write_store(RECOMMENDER.trained.events, path, replace=replace),
    ),
    "record": ("r.json", lambda path, replace: ft.write_record({"a": 1}, path, replace=replace)),
    **{
        f"lists{suffix}": (f"l{suffix}", lambda path, replace: _lists(path, replace=replace))
        for suffix in (".parquet", ".csv", ".json", ".jsonl")
    },
}
every_writer = pytest.mark.parametrize(("name", "write"), WRITERS.values(), ids=WRITERS)


def _content(path: Path) -> dict[str, bytes]:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return {str(file): file.read_bytes() for file in files}


@every_writer
def test_what_exists_is_replaced_only_on_request(name: str, write: Write, tmp_path: Path) -> None:
    place = tmp_path / "new" / "folders" / name
    place.parent.mkdir(parents=True)
    write(place, replace=False)
    before = _content(place)
    with pytest.raises(ft.ForetasteError, match="--replace") as caught:
        write(place, replace=False)
    assert (caught.value.name, caught.value.value) == (str(place), str(place))
    assert _content(place) == before
    write(place, replace=True)
    assert _content(place).keys() == before.keys()
    assert {path.name for path in place.parent.iterdir()} <= {name, "users.txt"}


@every_writer
def test_what_is_something_else_is_never_replaced(name: str, write: Write, tmp_path: Path) -> None:
    place = tmp_path / name
    place.mkdir()
    (place / "thesis.txt").write_text("years of work")
    with pytest.raises(ft.ForetasteError) as caught:
        write(place, replace=True)
    assert caught.value.name == str(place)
    assert (place / "thesis.txt").read_text() == "years of work"


@every_writer
def test_a_place_below_a_file_is_refused(name: str, write: Write, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    if name[0] == "l":
        (tmp_path / "users.txt").write_text("100\n")
        write = lambda path, replace: ft.write_lists(  # noqa: E731
            RECOMMENDER, tmp_path / "users.txt", path, replace=replace
        )
    with pytest.raises(ft.ForetasteError, match="is not a folder") as caught:
        write(tmp_path / "file" / "deep" / name, replace=False)
    assert caught.value.value == str(tmp_path / "file" / "deep" / name)


@every_writer
@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_files_get_the_mode_that_the_umask_gives(
    name: str, write: Write, mask: int, mode: int, tmp_path: Path
) -> None:
    before = os.umask(mask)
    try:
        write(tmp_path / name, replace=False)
    finally:
        os.umask(before)
    place = tmp_path / name
    for path in [place, *place.rglob("*")]:
        wanted = mode | (mode & 0o444) >> 2 if path.is_dir() else mode
        assert stat.S_IMODE(path.stat().st_mode) == wanted, path


def test_every_kind_of_bundle_can_be_read_by_another_account(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        for kind in CONFIGS:
            ft.build_recommender(make_trained(kind)).save(tmp_path / kind)
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o644}


def test_a_bundle_with_a_file_that_is_not_its_own_is_left_alone(tmp_path: Path) -> None:
    RECOMMENDER.save(tmp_path / "b")
    (tmp_path / "b" / "events" / "notes.txt").write_text("mine")
    with pytest.raises(ft.BundleError, match=r"holds events/notes\.txt"):
        RECOMMENDER.save(tmp_path / "b", replace=True)
    assert (tmp_path / "b" / "events" / "notes.txt").read_text() == "mine"


def test_a_store_does_not_replace_a_bundle_nor_a_bundle_a_store(tmp_path: Path) -> None:
    RECOMMENDER.save(tmp_path / "b")
    events = RECOMMENDER.trained.events
    ft.write_store(events, tmp_path / "s")
    with pytest.raises(ft.BundleError, match="is not an event store"):
        ft.write_store(events, tmp_path / "b", replace=True)
    with pytest.raises(ft.BundleError, match="is not a bundle"):
        RECOMMENDER.save(tmp_path / "s", replace=True)


def test_what_a_link_points_to_is_replaced_and_the_link_stays(tmp_path: Path) -> None:
    RECOMMENDER.save(tmp_path / "v1")
    (tmp_path / "current").symlink_to(tmp_path / "v1")
    RECOMMENDER.save(tmp_path / "current", replace=True)
    assert (tmp_path / "current").is_symlink()
    assert ft.load(tmp_path / "v1").recommend(k=1).rows


@pytest.mark.parametrize("path", ["/dev/null", "/dev/full"])
def test_a_device_is_never_replaced_by_a_file(path: str) -> None:
    before = os.stat(path).st_rdev
    with pytest.raises(ft.DataError, match="no regular file") as caught:
        ft.write_record({}, path, replace=True)
    assert caught.value.name == path
    assert os.stat(path).st_rdev == before


@pytest.mark.parametrize("name", ["x" * 300, "a\0b"])
def test_a_name_that_no_file_can_have_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises((ft.DataError, ft.ConfigError)):
        ft.check_place(tmp_path / name)


def test_a_long_name_that_a_file_can_have_is_written(tmp_path: Path) -> None:
    place = tmp_path / ("x" * 250)
    ft.write_record({"a": 1}, place)
    ft.write_record({"a": 2}, place, replace=True)
    assert [path.name for path in tmp_path.iterdir()] == [place.name]


def test_checking_a_place_leaves_nothing_behind(tmp_path: Path) -> None:
    ft.check_place(tmp_path / "new" / "b", "bundle")
    assert list(tmp_path.iterdir()) == []


class _Stopped(BaseException):
    """As Ctrl-C raises it."""


@pytest.mark.parametrize("error", [_Stopped, OSError(errno.ENOSPC, "full"), ft.DataError("wrong")])
def test_a_block_that_fails_leaves_what_was_there(error: BaseException, tmp_path: Path) -> None:
    (tmp_path / "f").write_text("old")

    def write_file() -> None:
        with whole_file(tmp_path / "f", replace=True) as part:
            part.write_text("half")
            raise error

    def write_folder() -> None:
        with whole_folder(tmp_path / "d", "bundle") as part:
            (part / "f").write_text("half")
            raise error

    for write in (write_file, write_folder):
        with pytest.raises((_Stopped, ft.ForetasteError)):
            write()
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"f": "old"}


def test_a_folder_that_is_being_written_is_left_alone_and_a_forgotten_one_is_deleted(
    tmp_path: Path,
) -> None:
    (tmp_path / ".d.0123.writing").mkdir()
    (tmp_path / ".other.0123.writing").mkdir()
    with whole_folder(tmp_path / "d", "bundle") as first:
        assert not (tmp_path / ".d.0123.writing").exists()
        with whole_folder(tmp_path / "d", "bundle") as second:
            assert first.is_dir()
            assert second.is_dir()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".other.0123.writing", "d"]


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, check=False).returncode:
        pytest.skip("a small disk cannot be mounted here: only root can")
    (folder / "filler").write_bytes(b"x" * 4096)
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@every_writer
def test_a_full_disk_is_one_sentence_and_nothing_half_written(
    name: str, write: Write, full_disk: Path, tmp_path: Path
) -> None:
    with (full_disk / "filler").open("ab") as filler:
        filler.write(b"x" * 4096)
    if name[0] == "l":
        (tmp_path / "users.txt").write_text("100\n101\n")
        write = lambda path, replace: ft.write_lists(  # noqa: E731
            RECOMMENDER, tmp_path / "users.txt", path, replace=replace
        )
    with pytest.raises(ft.ForetasteError) as caught:
        write(full_disk / name, replace=False)
    assert "No space left on device" in str(caught.value)
    assert not any(word in str(caught.value) for word in ("polars", "parquet:", "os error", "\n"))
    assert os.listdir(full_disk) == ["filler"]


def test_a_full_disk_during_training_is_one_sentence(full_disk: Path) -> None:
    tensors = {"w": make_trained("popularity").known_I.float().repeat(4096)}
    with pytest.raises(ft.DataError, match="No space left on device"):
        write_checkpoint(full_disk / "checkpoint", {"model-1": tensors}, {})

    def log_steps() -> None:
        with StepLog(full_disk, 0) as log:
            for step in range(10_000):
                log.write(step, 0, 0.1)

    with pytest.raises(ft.DataError, match="No space left") as caught:
        log_steps()
    assert str(caught.value.name).endswith("steps.jsonl")


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(errno.EACCES, os.strerror(errno.EACCES), "x"), "Permission denied"),
        (
            pl.exceptions.ComputeError("parquet: underlying IO error: No space … (os error 28)"),
            "No space left on device",
        ),
        (RuntimeError("one\ntwo"), "one"),
    ],
)
def test_a_reason_is_what_the_system_said(error: Exception, says: str) -> None:
    assert reason_of(error) == says


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store, a bundle, and a report of the model in it."""
    folder = tmp_path_factory.mktemp("places")
    events = ft.read_interactions(
        pl.DataFrame(
            {
                "user_id": [f"User{n // 6}" for n in range(60)],
                "item_id": [n % 7 for n in range(60)],
            }
        )
    )
    ft.write_store(events, folder / "store")
    ft.build_recommender(ft.fit(ft.PopularityConfig(), ft.leave_last_split(events))).save(
        folder / "bundle"
    )
    (folder / "binary.toml").write_bytes(b"\x80\x81\xff")
    broken = folder / "broken"
    broken.mkdir()
    (broken / "manifest.json").write_text(
        '{"format": "foretaste-event-store", "version": 1, "users": "many"}'
    )
    return folder


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda at: ft.open_store(at / "bundle"), "of a bundle: its events are in .*events"),
        (lambda at: ft.load(at / "store"), "an event store: train on it first"),
        (lambda at: ft.inspect_bundle(at / "store"), "an event store: train on it first"),
        (lambda at: ft.open_store(at / "broken"), "users: must be .*import the events again"),
        (lambda at: ft.read_experiment(at / "binary.toml"), "is not text in UTF-8"),
        (lambda at: ft.get_dataset("ml-100"), "did you mean 'ml-100k'"),
        (lambda at: ft.load(at / "bundle").recommend(""), "text that is not empty"),
        (lambda at: ft.load(at / "bundle").similar(""), "text that is not empty"),
        (lambda at: ft.start_run("/"), "/ exists and is not a bundle"),
        (lambda at: ft.start_run("."), r"\. exists and is not a bundle"),
        (lambda at: ft.start_run(".."), r"\.\. exists and is not a bundle"),
    ],
)  # fmt: skip
def test_a_wrong_thing_at_a_place_is_named_with_what_helps(
    call: Callable[[Path], object], said: str, places: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(places / "store")
    with pytest.raises(ForetasteError, match=said) as caught:
        call(places)
    for foreign in ("Input should", "codec", "validation error", "pydantic"):
        assert foreign not in str(caught.value)


def test_advice_of_a_store_that_is_a_bundle_can_be_followed(places: Path) -> None:
    assert len(ft.open_store(places / "bundle" / "events")) > 0


def test_settings_by_position_are_refused_with_a_setting_that_takes_a_value() -> None:
    with pytest.raises(ConfigError, match=r"such as SASRecConfig\(embedding_dim=…\), not 16"):
        ft.SASRecConfig(16)  # type: ignore[misc]

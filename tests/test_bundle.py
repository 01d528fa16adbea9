"""A bundle is written completely or not at all, and loading returns what was saved."""

import errno
import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from foretaste.config import Config
from foretaste.data.folder import FileEntry, entry_of, list_files, read_manifest
from foretaste.errors import BundleError
from foretaste.retrieval.index import IndexChoice
from foretaste.serving.bundle import PLACES, BundleManifest, read_bundle
from foretaste.serving.recommender import Recommender, build_recommender, load
from foretaste.shown import json_value
from foretaste.training.objectives import RowsConfig
from foretaste.training.trained import Trained
from tests.worlds import CONFIGS, make_events, make_trained

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    build_recommender(make_trained("sasrec"), report={"ndcg_at_10": 0.5}).save(tmp_path / "bundle")
    return tmp_path / "bundle"


def all_answers(recommender: Recommender) -> list[object]:
    known = recommender.recommend_many(list(range(100, 131)), k=30)
    return [
        known.to_dict(as_series=False),
        recommender.recommend(history=["503", 504], k=9),
        recommender.recommend(k=9),
        recommender.similar(503, 9),
        recommender.explain_many([503, 504, 505], [506, 507]),
    ]


@pytest.mark.parametrize("kind", CONFIGS)
def test_saved_and_loaded_answers_are_equal(kind: str, tmp_path: Path) -> None:
    built = build_recommender(make_trained(kind), report={"auc": 0.5, "per_k": [1, None, "x"]})
    built.save(tmp_path / "bundle")
    loaded = load(tmp_path / "bundle")
    assert all_answers(loaded) == all_answers(built)
    assert loaded.report == built.report
    assert loaded.trained.settings == built.trained.settings
    assert loaded.trained.log == built.trained.log
    assert (loaded.trained.seed, loaded.trained.train_seconds) == (0, 1.5)
    assert loaded.trained.events.fingerprint() == built.trained.events.fingerprint()


@pytest.mark.parametrize("index", ["ivf_flat", "ivf_sq8", "ivf_pq", "hnsw"])
def test_an_approximate_index_travels_with_its_facts(index: IndexChoice, tmp_path: Path) -> None:
    built = build_recommender(make_trained("sasrec"), index=index)
    built.save(tmp_path / "bundle")
    loaded = load(tmp_path / "bundle")
    assert loaded.index is not None
    assert built.index is not None
    assert loaded.index.facts == built.index.facts
    assert loaded.index.facts.recall_queries == "30 the model's queries"
    assert all_answers(loaded) == all_answers(built)
    facts = json.loads((tmp_path / "bundle/manifest.json").read_text())["index"]
    assert facts["recall_at_100"] >= 0.95


def test_a_loaded_bundle_can_be_saved_over_itself(saved: Path) -> None:
    before = list_files(saved)
    loaded = load(saved)
    loaded.save(saved, replace=True)
    assert list_files(saved) == before
    assert all_answers(load(saved)) == all_answers(loaded)


def test_saving_twice_gives_the_same_bytes(saved: Path, tmp_path: Path) -> None:
    build_recommender(make_trained("sasrec"), report={"ndcg_at_10": 0.5}).save(tmp_path / "again")
    assert list_files(saved) == list_files(tmp_path / "again")
    assert (saved / "manifest.json").read_bytes() == (tmp_path / "again/manifest.json").read_bytes()


def test_the_manifest_says_what_it_holds(saved: Path) -> None:
    document = json.loads((saved / "manifest.json").read_text())
    assert document["format_version"] == BundleManifest.latest == 2
    assert document["model"]["kind"] == "sasrec"
    assert set(document["versions"]) >= {"python", "torch", "numpy"}
    assert document["data"]["num_items"] == 21
    on_disk = {str(p.relative_to(saved)) for p in saved.rglob("*") if p.is_file()}
    assert set(document["files"]) == on_disk - {"manifest.json"}
    for name, entry in document["files"].items():
        content = (saved / name).read_bytes()
        assert entry == {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def test_nothing_in_a_bundle_is_a_pickle(saved: Path) -> None:
    endings = {path.suffix for path in saved.rglob("*") if path.is_file()}
    assert endings <= {".json", ".safetensors", ".arrow", ".npy", ".faiss"}
    assert not any(b"numpy.core" in path.read_bytes() for path in saved.rglob("*.npy"))


def test_a_changed_byte_anywhere_is_refused_and_named(saved: Path) -> None:
    for path in [path for path in saved.rglob("*") if path.is_file()]:
        whole = path.read_bytes()
        for place in {0, len(whole) // 3, len(whole) // 2, len(whole) - 1}:
            changed = bytearray(whole)
            changed[place] ^= 1
            path.write_bytes(changed)
            with pytest.raises(BundleError, match=path.name):
                read_bundle(saved)
        path.write_bytes(whole)
    read_bundle(saved)


def test_every_byte_of_the_manifest_counts(saved: Path) -> None:
    path = saved / "manifest.json"
    whole = path.read_bytes()
    for place in range(len(whole)):
        changed = bytearray(whole)
        changed[place] ^= 2
        path.write_bytes(changed)
        with pytest.raises(BundleError, match=r"manifest\.json"):
            read_manifest(saved, BundleManifest)


@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "longer"])
def test_a_file_that_is_not_whole_is_refused_and_named(saved: Path, damage: str) -> None:
    for path in [path for path in saved.rglob("*") if path.is_file()]:
        whole = path.read_bytes()
        path.unlink()
        if damage != "missing":
            ends = {"empty": b"", "cut": whole[: len(whole) // 2], "longer": whole + b"\n"}
            path.write_bytes(ends[damage])
        with pytest.raises(BundleError, match=path.name):
            read_bundle(saved)
        path.write_bytes(whole)


def test_what_is_no_bundle_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("hello")
    (tmp_path / "folder").mkdir()
    with pytest.raises(BundleError, match="is not a folder"):
        read_bundle(tmp_path / "absent")
    with pytest.raises(BundleError, match="is not a folder"):
        read_bundle(tmp_path / "file")
    with pytest.raises(BundleError, match="is not a bundle"):
        read_bundle(tmp_path / "folder")
    for text in ("", "{", "[]", '{"format": "another"}', "null", "\udcff".encode(errors="replace")):
        content = text if isinstance(text, bytes) else text.encode()
        (tmp_path / "folder/manifest.json").write_bytes(content)
        with pytest.raises(BundleError, match=r"manifest\.json"):
            read_bundle(tmp_path / "folder")


def test_a_newer_format_is_refused_with_the_version_that_wrote_it(saved: Path) -> None:
    path = saved / "manifest.json"
    document = json.loads(path.read_text())
    document |= {"format_version": BundleManifest.latest + 1, "foretaste": "9.8.7", "novelty": True}
    path.write_text(json.dumps(document))
    with pytest.raises(BundleError, match=r"format 3 was written by foretaste 9\.8\.7"):
        read_bundle(saved)


def reseal(folder: Path, change: Callable[[dict[str, object]], None]) -> None:
    """Change the manifest and correct its checksum."""
    document = json.loads((folder / "manifest.json").read_text())
    document.pop("checksum")
    change(document)
    own = hashlib.sha256(json.dumps(document, indent=2).encode()).hexdigest()
    text = json.dumps({**document, "checksum": own}, indent=2) + "\n"
    (folder / "manifest.json").write_text(text)


def test_a_manifest_cannot_reach_outside_its_folder(saved: Path) -> None:
    for name in ("../secret", "/etc/hostname", "events/../../secret"):
        reseal(saved, lambda document, name=name: document["files"].update({name: entry}))
        with pytest.raises(BundleError, match="outside the folder"):
            read_bundle(saved)


entry = {"size": 1, "sha256": "0" * 64}


@pytest.mark.parametrize(
    "change",
    [
        lambda document: document["model"].update(embedding_dim=16),
        lambda document: document["model"].update(kind="oracle"),
        lambda document: document["model"].update(kind="popularity"),
        lambda document: document.update(seed="many"),
        lambda document: document.update(surprise=1),
    ],
)
def test_settings_that_do_not_fit_the_weights_are_a_bundle_error(
    saved: Path, change: Callable[[dict[str, object]], None]
) -> None:
    reseal(saved, change)
    with pytest.raises(BundleError, match="save"):
        read_bundle(saved)


@pytest.mark.parametrize("place", sorted({*PLACES, "novelty"} - {"answers"}))
def test_an_optional_place_that_is_filled_changes_no_answer(saved: Path, place: str) -> None:
    before = all_answers(load(saved))
    (saved / f"{place}.json").write_text("{}")
    reseal(
        saved,
        lambda document: (
            document["optional"].update({place: {"of": "later"}}),
            document["files"].update({f"{place}.json": vars(entry_of(saved / f"{place}.json"))}),
        ),
    )
    assert read_manifest(saved, BundleManifest).optional[place] == {"of": "later"}
    assert all_answers(load(saved)) == before
    (saved / f"{place}.json").write_text("[]")
    with pytest.raises(BundleError, match=place):
        load(saved)


@pytest.mark.parametrize("place", ["shards", "novelty"])
def test_a_bundle_that_cannot_be_read_without_an_optional_place_says_which(
    saved: Path, place: str
) -> None:
    reseal(saved, lambda document: document.update(needs=[place]))
    with pytest.raises(BundleError, match="or a newer one") as caught:
        load(saved)
    assert (caught.value.name, caught.value.value) == (place, str(saved))


def test_a_signature_beside_the_manifest_is_of_the_bundle(saved: Path) -> None:
    (saved / "signature.json").write_text("{}")
    load(saved).save(saved, replace=True)
    assert not (saved / "signature.json").exists()


def test_how_a_ranker_learned_is_the_bundle_s_to_say_and_not_its_settings(tmp_path: Path) -> None:
    objective = RowsConfig(negatives=7, positive="rating")
    trained = replace(
        make_trained("sasrec"),
        objective=objective,
        learned_from="all events",
        settings={"objective": {"kind": "pairs"}},
    )
    build_recommender(trained).save(tmp_path / "bundle")
    loaded = load(tmp_path / "bundle").trained
    assert (loaded.objective, loaded.learned_from) == (objective, "all events")
    first_format = {"format_version": 1, "settings": {"objective": None, "refit": True}, "log": {}}
    upgraded = BundleManifest.upgraded(first_format)
    assert (upgraded["objective"], upgraded["learned_from"]) == (None, "train and validation")


def test_files_that_the_manifest_does_not_list_are_ignored(saved: Path) -> None:
    before = all_answers(load(saved))
    (saved / "notes.txt").write_text("mine")
    (saved / "evil.pkl").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    assert all_answers(load(saved)) == before


def test_a_manifest_lists_every_file_that_is_read(saved: Path) -> None:
    listed = read_manifest(saved, BundleManifest).files
    read = [name for name in listed if "/" in name or name.endswith(".safetensors")]
    assert {"weights.safetensors", "events/manifest.json", "index/index.json"} <= set(read)
    for name in read:
        reseal(saved, lambda document, name=name: document["files"].pop(name))
        with pytest.raises(BundleError) as caught:
            read_bundle(saved)
        assert caught.value.value == name
        reseal(saved, lambda document: document.update(files=to_json(listed)))
    read_bundle(saved)
    reseal(saved, lambda document: document.update(files={}))
    with pytest.raises(BundleError) as caught:
        read_bundle(saved)
    assert caught.value.value in read


def to_json(files: dict[str, FileEntry]) -> dict[str, object]:
    return {name: vars(entry) for name, entry in files.items()}


def test_a_folder_that_is_no_bundle_is_never_overwritten(tmp_path: Path) -> None:
    recommender = build_recommender(make_trained("popularity"))
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter.txt").write_text("years of work")
    for name in ("thesis", "thesis/chapter.txt"):
        with pytest.raises(BundleError, match="left alone"):
            recommender.save(tmp_path / name, replace=True)
    assert (tmp_path / "thesis/chapter.txt").read_text() == "years of work"
    (tmp_path / "empty").mkdir()
    recommender.save(tmp_path / "empty")
    recommender.save(tmp_path / "deep/er/bundle")
    assert load(tmp_path / "empty").recommend(k=1).rows


def test_a_newer_bundle_replaces_an_older_one_and_leaves_no_other_file(saved: Path) -> None:
    old = load(saved)
    expected = all_answers(old)
    build_recommender(make_trained("popularity")).save(saved, replace=True)
    assert type(load(saved).trained.model).__name__ == "Popularity"
    assert not (saved / "index").exists()
    assert [path.name for path in saved.parent.iterdir()] == ["bundle"]
    assert all_answers(old) == expected  # its maps outlive its names


@pytest.mark.parametrize(
    ("call", "fails_at"),
    # A save renames twice: the old bundle, and the new one.
    [("fsync", 1), ("fsync", 2), ("fsync", 9), ("rename", 1), ("rename", 2)],
)
def test_a_disk_that_fails_leaves_the_older_bundle_and_nothing_else(
    saved: Path, monkeypatch: pytest.MonkeyPatch, fails_at: int, call: str
) -> None:
    before = all_answers(load(saved))
    calls = 0
    real = getattr(os, call)

    def failing(*args: object, **kwargs: object) -> object:
        nonlocal calls
        calls += 1
        if calls == fails_at:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args, **kwargs)

    monkeypatch.setattr(os, call, failing)
    recommender = build_recommender(make_trained("popularity"))
    with pytest.raises(BundleError, match="No space left on device"):
        recommender.save(saved, replace=True)
    monkeypatch.undo()
    assert [path.name for path in saved.parent.iterdir()] == ["bundle"]
    assert all_answers(load(saved)) == before


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    made = mount and subprocess.run(
        [mount, "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)],
        capture_output=True,
        check=False,
    )
    if not made or made.returncode:
        pytest.skip("a small disk cannot be mounted here: only root can")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_leaves_nothing_half_written(small_disk: Path) -> None:
    # 64 KiB hold one bundle of about 25 KiB, then a file of 30 KiB, and not a second bundle.
    recommender = build_recommender(make_trained("sasrec"))
    recommender.save(small_disk / "bundle")
    before = all_answers(load(small_disk / "bundle"))
    used = sum(path.stat().st_size for path in (small_disk / "bundle").rglob("*"))
    for left in (1000, 6000, 12000):
        (small_disk / "filler").write_bytes(b"")
        free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
        (small_disk / "filler").write_bytes(b"x" * (free - left))
        with pytest.raises(BundleError, match="No space left on device"):
            recommender.save(small_disk / "bundle", replace=True)
        assert {path.name for path in small_disk.iterdir()} == {"bundle", "filler"}
        assert all_answers(load(small_disk / "bundle")) == before
    assert used > 12000


def test_an_interrupted_replacement_is_found_again(saved: Path) -> None:
    aside = saved.parent / ".bundle.abc.replaced"
    aside.mkdir()
    saved.rename(aside / "bundle")
    with pytest.raises(BundleError, match=r"\.bundle\.abc\.replaced/bundle was left there"):
        load(saved)


class ForeignConfig(Config):
    kind: str = "foreign"


def test_a_model_outside_the_catalogue_cannot_be_saved(tmp_path: Path) -> None:
    trained = make_trained("popularity")
    foreign = Trained(config=ForeignConfig(), model=trained.model, events=trained.events, seed=0)
    with pytest.raises(BundleError, match="ForeignConfig is not in foretaste's catalogue"):
        build_recommender(foreign).save(tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


def test_settings_and_logs_become_plain_json() -> None:
    assert json_value({"a": (1, 2.5), "b": {"c": float("nan"), "d": None}, "e": Path("x")}) == {
        "a": [1, 2.5],
        "b": {"c": None, "d": None},
        "e": "x",
    }


def test_ids_with_quotes_and_newlines_survive(tmp_path: Path) -> None:
    events = make_events(text_ids=True)
    odd = events.items.ids.to_list()
    odd[:4] = ['"', "a\nb", "", "é\u2028,;'"]
    strange = type(events)(
        users=events.users,
        items=type(events.items)(events.items.ids.clone().scatter(range(4), odd[:4])),
        offsets=events.offsets,
        item_idx=events.item_idx,
    )
    build_recommender(make_trained("popularity", strange)).save(tmp_path / "bundle")
    rows = load(tmp_path / "bundle").recommend(k=30).rows
    assert {row.item_id for row in rows} >= set(odd[:4])


@pytest.mark.parametrize(
    "name",
    [
        "bundle-v1/sasrec",
        "bundle-v1/popularity",
        "bundle-without-history/mmoe",
        "bundle-without-history/shared_bottom",
        "bundle-without-history/two_stage",
    ],
)
def test_older_bundles_load_and_answer_as_then(name: str) -> None:
    # Made once by the scripts in tests/golden; never to be made again.
    expected = json.loads((GOLDEN / f"{name}.json").read_text())
    recommender = load(GOLDEN / name)
    for asked in expected:
        answer = recommender.recommend(asked["user_id"], history=asked["history"], k=5)
        assert answer.source == asked["source"]
        assert [row.item_id for row in answer.rows] == asked["item_ids"]
        scores = torch.tensor([row.score for row in answer.rows])
        torch.testing.assert_close(scores, torch.tensor(asked["scores"]), rtol=1e-4, atol=1e-5)

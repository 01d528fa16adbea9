"""Versions of a bundle: private copies, trials in another process, swaps, rollbacks, canaries."""

import importlib
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import safetensors.numpy
from test_bundle import reseal

from foretaste.data.folder import entry_of
from foretaste.errors import BundleError, ConfigError
from foretaste.serving import self_test
from foretaste.serving import slot as slots
from foretaste.serving.recommender import build_recommender, load
from foretaste.serving.self_test import StoredAnswers, check_answers
from foretaste.serving.slot import ModelSlot, Trials, load_version
from foretaste.serving.state import Choice
from foretaste.serving.versions import Versions, sign_bundle
from tests.worlds import make_trained, write_film_bundle


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_film_bundle(tmp_path / "films")


def seal_again(bundle: Path, name: str) -> None:
    """Write a right checksum of a file that was changed."""
    reseal(bundle, lambda document: document["files"].update({name: vars(entry_of(bundle / name))}))


# ---- copies ----------------------------------------------------------------------------------


def test_a_copy_shares_nothing_with_what_was_delivered(bundle: Path) -> None:
    versions = Versions(bundle)
    version = versions.take()
    copy = versions.path(version)
    assert copy.parent == bundle.with_name("films.versions")
    assert copy.parent.stat().st_mode & 0o077 == 0
    assert {path.stat().st_mode & 0o777 for path in copy.rglob("*") if path.is_file()} == {0o400}
    for path in (path for path in bundle.rglob("*") if path.is_file()):
        twin = copy / path.relative_to(bundle)
        assert twin.read_bytes() == path.read_bytes()
        assert twin.stat().st_ino != path.stat().st_ino
    for path in bundle.rglob("*.*"):
        path.write_bytes(b"")
    assert load(copy).recommend(1, k=3).rows


def test_a_model_answers_though_its_bundle_is_cut_short_overwritten_and_deleted(
    bundle: Path,
) -> None:
    slot = ModelSlot(Versions(bundle))
    before = slot.current.recommender.recommend(1, k=5)
    for path in bundle.rglob("*.*"):
        os.truncate(path, 0)
    assert slot.current.recommender.recommend(1, k=5) == before
    with pytest.raises(BundleError):
        slot.reload()
    shutil.rmtree(bundle)
    assert slot.current.recommender.recommend(2, k=5).rows
    with pytest.raises(BundleError, match=r"manifest\.json"):
        slot.reload()
    assert slot.last_error


@pytest.mark.parametrize(
    "kind",
    ["link", "pipe", "folder", "missing", "linked folder", "long", "pipe for a manifest"],
)
def test_links_pipes_and_other_sizes_are_refused_at_once(bundle: Path, kind: str) -> None:
    wrong = {"linked folder": r"events[^:]* cannot be copied"}.get(
        kind, "weights.* cannot be copied"
    )
    weights = next(bundle.glob("weights*"))
    aside = bundle.with_name("aside")
    match kind:
        case "link":
            weights.rename(aside)
            weights.symlink_to(aside)
        case "pipe":
            weights.unlink()
            os.mkfifo(weights)
        case "missing" | "folder":
            weights.unlink()
            if kind == "folder":
                weights.mkdir()
        case "linked folder":
            (bundle / "events").rename(aside)
            (bundle / "events").symlink_to(aside)
        case "long":
            weights.write_bytes(weights.read_bytes() + b"\0")
        case _:
            (bundle / "manifest.json").unlink()
            os.mkfifo(bundle / "manifest.json")
            wrong = r"no readable manifest\.json"
    with pytest.raises(BundleError, match=wrong):
        Versions(bundle).take()
    with pytest.raises(BundleError):
        load(bundle)
    assert Versions(bundle).kept() == []


def test_the_version_used_longest_ago_goes_first_and_one_that_serves_never(bundle: Path) -> None:
    versions, names = Versions(bundle, most=2), []
    for seed in range(4):
        write_film_bundle(bundle, seed=seed)
        names.append(versions.take())
        os.utime(versions.path(names[-1]), (1000 + seed, 1000 + seed))
    assert [kept.version for kept in versions.kept()] == names[::-1]
    versions.used(names[0])
    versions.drop_oldest(but={names[1]})
    assert {kept.version for kept in versions.kept()} == {names[0], names[3], names[1]}
    size = versions.kept()[0].size
    Versions(bundle, most=9, most_bytes=size).drop_oldest(but=set())
    assert [kept.version for kept in versions.kept()] == [names[0]]


# ---- signatures ------------------------------------------------------------------------------


def test_with_a_key_only_what_it_signed_is_taken(bundle: Path, tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("k" * 40 + "\n")
    versions = Versions(bundle, key=b"k" * 40)
    with pytest.raises(BundleError, match="has no signature"):
        versions.take()
    sign_bundle(bundle, key)
    version = versions.take()
    assert (versions.path(version) / "signature.json").is_file()
    write_film_bundle(bundle, seed=1)
    (bundle / "signature.json").write_bytes(
        (versions.path(version) / "signature.json").read_bytes()
    )
    with pytest.raises(BundleError, match="not made with this server's key"):
        versions.take()
    with pytest.raises(BundleError, match="not made with this server's key"):
        Versions(bundle, bundle.with_name("v"), key=b"another key, as long as the first one").take()


@pytest.mark.parametrize(
    "change",
    [
        lambda signed: signed.removesuffix(b"\n"),
        lambda signed: signed + b"\n",
        lambda signed: signed.replace(b": ", b":"),
        lambda signed: signed.upper().replace(b"HMAC_SHA", b"hmac_sha"),
        lambda signed: signed.replace(b"}", b', "by": "me"}'),
        lambda signed: b"\xef\xbb\xbf" + signed,
        lambda signed: b"[1]",
        lambda signed: b"",
    ],
)
def test_a_signature_in_any_other_form_is_refused(
    bundle: Path, tmp_path: Path, change: Callable[[bytes], bytes]
) -> None:
    key, signature = tmp_path / "key", bundle / "signature.json"
    key.write_text("k" * 40)
    sign_bundle(bundle, key)
    signature.write_bytes(change(signature.read_bytes()))
    with pytest.raises(BundleError, match="not made with this server's key"):
        Versions(bundle, key=b"k" * 40).take()


def test_a_start_serves_no_kept_version_that_the_key_did_not_sign(bundle: Path) -> None:
    chosen = ModelSlot(Versions(bundle)).choice
    with pytest.raises(BundleError, match="has no signature"):
        ModelSlot(Versions(bundle, key=b"k" * 32), chosen=chosen)


def test_a_key_that_is_missing_or_short_is_refused(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("short")
    for path in (tmp_path / "key", tmp_path / "nowhere"):
        with pytest.raises(ConfigError) as caught:
            sign_bundle(bundle, path)
        assert caught.value.name == "signature_key"


# ---- answers stored with a bundle -------------------------------------------------


def test_a_bundle_holds_answers_of_users_known_and_new_and_of_items(bundle: Path) -> None:
    answers = load(bundle).bundle.answers
    assert [asked.user_id for asked in answers.asked] == [1, 14, 27, 40, None, None, None]
    assert all(asked.item_ids for asked in answers.asked)
    assert answers.asked[5].history == tuple(
        row.item_id for row in load(bundle).recommend(k=3).rows
    )
    assert answers.asked[6].similar_to == answers.asked[5].history[0]
    assert any(answers.asked[5].reasons)
    assert answers.recall is None


@pytest.mark.parametrize("index", ["exact", "codes", "ivf_flat", "ivf_sq8", "ivf_pq", "hnsw"])
def test_a_sound_index_answers_as_it_did(index: str, tmp_path: Path) -> None:
    build_recommender(make_trained("sasrec"), index=index).save(tmp_path / "bundle")
    assert load_version(tmp_path / "bundle").recommender.index.kind == index


def changed(answers: StoredAnswers, **update: object) -> StoredAnswers:
    first, *others = answers.asked
    return answers.model_copy(update={"asked": (first.model_copy(update=update), *others)})


def test_other_items_scores_or_reasons_than_stored_are_refused(bundle: Path) -> None:
    recommender = load(bundle)
    answers, first = recommender.bundle.answers, recommender.bundle.answers.asked[0]
    check_answers(recommender, answers)
    near = tuple(score * 1.0001 for score in first.scores)
    check_answers(recommender, changed(answers, scores=near))
    wrong = {
        "scores": tuple(score * 1.1 for score in first.scores),
        "item_ids": first.item_ids[::-1],
        "reasons": tuple(131 for _ in first.reasons),
    }
    for name, value in wrong.items():
        with pytest.raises(BundleError):
            check_answers(recommender, changed(answers, **{name: value}))
    with pytest.raises(BundleError, match="s are allowed"):
        check_answers(recommender, answers, within_s=0.1, clock=iter(np.arange(100.0)).__next__)


def test_a_slow_answer_is_one_that_computes_long_not_one_that_waits(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recommender = load(bundle)
    find = self_test._find

    def waits(*asked: object, k: int) -> object:
        time.sleep(0.3)  # as on a busy machine
        return find(*asked, k=k)

    def computes(*asked: object, k: int) -> object:
        ends_s = time.process_time() + 0.3
        while time.process_time() < ends_s:
            pass
        return find(*asked, k=k)

    monkeypatch.setattr(self_test, "_find", waits)
    first = recommender.bundle.answers.model_copy(
        update={"asked": recommender.bundle.answers.asked[:1]}
    )
    check_answers(recommender, first, within_s=0.2)
    monkeypatch.setattr(self_test, "_find", computes)
    with pytest.raises(BundleError, match="s are allowed"):
        check_answers(recommender, first, within_s=0.2)


def test_an_index_of_other_vectors_or_items_is_refused(tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    build_recommender(make_trained("sasrec")).save(bundle)
    path = bundle / "index/vectors.safetensors"
    sound = safetensors.numpy.load_file(path)
    for name, row in (("vectors_ND", 3), ("item_N", 0)):
        tensors = {key: value.copy() for key, value in sound.items()}
        tensors[name][row] += 1
        safetensors.numpy.save_file(tensors, path)
        seal_again(bundle, "index/vectors.safetensors")
        with pytest.raises(BundleError, match="its index has other"):
            load_version(bundle)


def test_compressed_arrow_is_refused_before_it_is_unpacked(bundle: Path) -> None:
    table = pl.DataFrame({"title": ["a" * 1000] * 100_000})
    table.write_ipc(bundle / "events/item_table.arrow", compression="zstd")
    seal_again(bundle / "events", "item_table.arrow")
    for name in ("events/item_table.arrow", "events/manifest.json"):
        seal_again(bundle, name)
    with pytest.raises(BundleError, match="is compressed"):
        load(bundle)


# ---- switching -------------------------------------------------------------------------------


class Tries:
    """Replaces trials in another process: counts them, and refuses the given versions."""

    def __init__(self) -> None:
        self.tried: list[str] = []
        self.refuses = ""

    def __call__(self, bundle: Path) -> None:
        self.tried.append(bundle.name)
        if bundle.name == self.refuses or self.refuses == "all":
            raise BundleError(f"{bundle} ended the process that loaded it", name=str(bundle))


def test_nothing_is_swapped_before_a_trial_and_an_unchanged_bundle_is_not_tried(
    bundle: Path,
) -> None:
    tries = Tries()
    slot = ModelSlot(Versions(bundle), try_bundle=tries)
    first = slot.current
    assert slot.reload() == (first, first)
    assert tries.tried == []
    write_film_bundle(bundle, seed=1)
    tries.refuses = "all"
    with pytest.raises(BundleError, match="films ended the process"):
        slot.reload()
    assert slot.current is first
    assert [kept.version for kept in slot.versions.kept()] == [first.version]
    tries.refuses = ""
    published: list[Choice] = []
    _, second = slot.reload(published.append)
    assert slot.current is second
    assert published == [Choice(version=second.version, previous=first.version)]


def test_a_roll_back_brings_the_version_before_and_a_second_one_undoes_it(bundle: Path) -> None:
    slot = ModelSlot(Versions(bundle))
    with pytest.raises(BundleError, match="there is no previous version"):
        slot.activate("")
    first = slot.current.version
    write_film_bundle(bundle, seed=1)
    second = slot.reload()[1].version
    assert slot.activate("")[1].version == first
    assert slot.activate("")[1].version == second
    with pytest.raises(BundleError, match="is not kept"):
        slot.activate("0" * 12)
    assert slot.choice == Choice(version=second, previous=first)


def test_a_start_does_not_undo_a_roll_back_but_takes_a_new_bundle(bundle: Path) -> None:
    slot = ModelSlot(Versions(bundle))
    write_film_bundle(bundle, seed=1)
    slot.reload()
    slot.activate("")
    rolled_back = slot.choice
    assert ModelSlot(Versions(bundle), chosen=rolled_back).current.version == rolled_back.version
    write_film_bundle(bundle, seed=2)
    tries = Tries()
    newest = ModelSlot(Versions(bundle), chosen=rolled_back, try_bundle=tries).current.version
    assert newest == Versions(bundle).delivered() == tries.tried[0]
    write_film_bundle(bundle, seed=3)
    tries.refuses = "all"  # a version that would end the server's process
    slot = ModelSlot(Versions(bundle), chosen=rolled_back, try_bundle=tries)
    assert slot.current.version == rolled_back.version
    assert "ended the process" in slot.last_error
    shutil.rmtree(bundle)
    assert ModelSlot(Versions(bundle), chosen=rolled_back).current.version == rolled_back.version


def test_a_canary_answers_its_share_of_users_and_always_the_same(bundle: Path) -> None:
    slot = ModelSlot(Versions(bundle))
    first = slot.current
    write_film_bundle(bundle, seed=1)
    version = slot.versions.take()
    users = [f"user {number}" for number in range(4000)]
    slot.try_out(version, 0.25)
    gets = [slot.of_user(user).version == version for user in users]
    assert 0.22 < sum(gets) / len(gets) < 0.28
    assert gets == [slot.of_user(user).version == version for user in users]
    assert slot.of_user(None) is first
    slot.try_out(version, 0.5)
    more = [slot.of_user(user).version == version for user in users]
    assert all(now for then, now in zip(gets, more, strict=True) if then)
    slot.try_out(version, 0.0)
    assert slot.canary is None
    slot.try_out(version, 1.0)
    assert slot.activate(version)[1].version == version
    assert slot.canary is None


def test_another_server_follows_a_choice_and_tries_what_it_cannot_load_once(bundle: Path) -> None:
    one, tries = ModelSlot(Versions(bundle)), Tries()
    other = ModelSlot(Versions(bundle), try_bundle=tries)
    assert not other.follow(one.choice)
    write_film_bundle(bundle, seed=1)
    one.reload()
    tries.refuses = one.current.version
    with pytest.raises(BundleError):
        other.follow(one.choice)
    assert not other.follow(one.choice)  # as long as the choice is the same
    tries.refuses = ""
    one.try_out(one.previous, 0.5)
    assert other.follow(one.choice)
    assert other.choice == one.choice
    one.try_out(one.previous, 0.0)
    assert other.follow(one.choice)
    assert other.canary is None


# ---- trials in a process of their own --------------------------------------------------------


@pytest.fixture(scope="module")
def trials() -> Iterator[Trials]:
    with closing(Trials(timeout_s=60.0, within_s=30.0)) as one:
        yield one


@pytest.mark.slow
def test_a_trial_takes_what_is_sound_and_says_why_it_refuses(trials: Trials, bundle: Path) -> None:
    trials.try_bundle(bundle)
    weights = next(bundle.glob("weights*"))
    os.truncate(weights, weights.stat().st_size - 1)
    with pytest.raises(BundleError, match="were written"):
        trials.try_bundle(bundle)
    assert trials._process is not None
    trials._process.kill()
    with pytest.raises(BundleError, match="the process for trials ended"):
        trials.try_bundle(bundle)


@pytest.mark.slow
def test_dying_too_much_memory_and_too_much_time_are_refusals(
    monkeypatch: pytest.MonkeyPatch, bundle: Path
) -> None:
    def die(_: Path, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def eat(_: Path, **__: object) -> None:
        monkeypatch.setattr(slots, "SPARE_BYTES", 0)
        bytearray(2**36)

    def sleep(_: Path, **__: object) -> None:
        while True:
            pass

    for act, why in ((die, "SIGKILL"), (eat, "MemoryError"), (sleep, "within 0.5 s")):
        monkeypatch.setattr(slots, "load_version", act)
        assert why in slots._fork(bundle, timeout_s=0.5 if act is sleep else 60.0, within_s=1.0)


@pytest.mark.slow
def test_bundles_broken_and_sealed_again_are_refused_or_answer_as_before(
    trials: Trials, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    mutations = importlib.import_module("sealed_mutations").mutations
    *_, count = mutations(36, seed=1, trials=trials, folder=tmp_path)
    assert (count.tried, count.crashed, count.tracebacks) == (36, 0, 0)
    assert (count.wrong_accepted, count.signed_accepted, count.wrong) == (0, 0, [])
    assert count.refused > 12

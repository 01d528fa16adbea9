"""Public data sets: fetched completely or not at all, and equal from every source."""

import gzip
import io
import json
import socket
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from typing import ClassVar
from urllib.parse import urlsplit

import numpy as np
import polars as pl
import pytest

from foretaste.data.sources import files as fetch
from foretaste.data.sources.files import Address, Files, Wheel
from foretaste.data.sources.load import (
    SOURCES,
    Dataset,
    Source,
    find_source,
    from_cache,
    from_folder,
    get_dataset,
)
from foretaste.data.splits import GivenSplitConfig
from foretaste.data.splitting import make_split
from foretaste.errors import ConfigError, SourceError

RATINGS = "196\t242\t3\t881250949\n186\t302\t4\t891717742\n196\t302\t5\t881250950\n"
ITEM_TAIL = "||http://x|" + "|".join("0" * 16 + "100") + "\n"
ITEMS = f"242|Kolya (1996)|24-Jan-1997{ITEM_TAIL}302|Amélie|01-Jan-1997{ITEM_TAIL}"
USERS = "186|39|F|executive|00000\n196|49|M|writer|55105\n"


def archive(ratings: str = RATINGS) -> bytes:
    """A zip in the layout of ml-100k, Latin-1 as there."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as opened:
        for name, text in (("u.data", ratings), ("u.item", ITEMS), ("u.user", USERS)):
            opened.writestr(f"ml-100k/{name}", text.encode("latin-1"))
    return content.getvalue()


def tables_sha256(tmp_path: Path) -> str:
    folder = tmp_path / "reference"
    folder.mkdir()
    (folder / "x.zip").write_bytes(archive())
    return SOURCES["ml-100k"].read(Files(folder)).sha256()


class Site(BaseHTTPRequestHandler):
    """A public address: `served` has the content of each path, and how much of it is sent."""

    served: ClassVar[dict[str, tuple[bytes, int]]] = {}
    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        if self.path not in self.served:
            self.send_error(404)
            return
        body, sent = self.served[self.path]
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[:sent])

    def log_message(self, *_: object) -> None:
        """Log nothing."""


@pytest.fixture
def site() -> Iterator[str]:
    Site.served, Site.asked = {}, []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Site)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def serve(content: bytes, *, whole: bool = True, path: str = "/ml-100k.zip") -> None:
    Site.served[path] = (content, len(content) if whole else len(content) // 2)


def at(url: str, tmp_path: Path, *, md5: str | None = None, wheel: Wheel | None = None) -> Source:
    """The small data set, published at `url` and perhaps in a wheel."""
    ways: tuple[tuple[Address | Wheel, ...], ...] = ((Address(url=url, md5=md5),),)
    return replace(
        SOURCES["ml-100k"],
        ways=ways if wheel is None else (*ways, (wheel,)),
        counts=(2, 2, 3),
        sha256=tables_sha256(tmp_path),
    )


def kept(cache: Path) -> list[str]:
    """What a cache holds, hidden folders too."""
    return sorted(path.name for path in cache.iterdir()) if cache.exists() else []


# --- fetching --------------------------------------------------------------------------------


def test_a_data_set_is_fetched_once_and_then_read_from_the_cache(site: str, tmp_path: Path) -> None:
    serve(archive())
    source, cache = at(f"{site}/ml-100k.zip", tmp_path), tmp_path / "cache"
    first, second = from_cache(source, cache), from_cache(source, cache)
    assert Site.asked == ["/ml-100k.zip"]
    assert kept(cache) == ["ml-100k"]
    assert first.events.fingerprint() == second.events.fingerprint()
    assert first.origin == second.origin == f"{site}/ml-100k.zip"
    assert "research only" in first.licence
    assert "research only" in (cache / "ml-100k" / "ORIGIN.txt").read_text()


def test_what_is_known_of_users_and_items_comes_along(site: str, tmp_path: Path) -> None:
    serve(archive())
    events = from_cache(at(f"{site}/ml-100k.zip", tmp_path), tmp_path / "cache").events
    assert events.item_table is not None
    assert events.user_table is not None
    row, user = events.items.find(302), events.users.find(186)
    assert events.item_table["title"][row] == "Amélie"
    assert events.item_table["year"].to_list()[events.items.find(242)] == 1996
    assert events.item_table["genres"][row].to_list() == ["Thriller"]
    assert events.user_table["occupation"][user] == "executive"


@pytest.mark.parametrize("fault", ["truncated", "no zip", "other ratings", "other md5", "missing"])
def test_a_broken_download_is_never_kept(fault: str, site: str, tmp_path: Path) -> None:
    content = {
        "no zip": b"<html>log in</html>",
        "other ratings": archive(RATINGS.replace("\t3\t", "\t1\t")),
    }.get(fault, archive())
    if fault != "missing":
        serve(content, whole=fault != "truncated")
    md5 = "0" * 32 if fault == "other md5" else None
    cache = tmp_path / "cache"
    with pytest.raises(SourceError, match="--data-dir") as caught:
        from_cache(at(f"{site}/ml-100k.zip", tmp_path, md5=md5), cache)
    said = {"truncated": "broke off", "other ratings": "SHA-256", "other md5": "MD5"}
    assert said.get(fault, "") in str(caught.value)
    assert kept(cache) == []


def test_a_damaged_cached_copy_is_downloaded_again(site: str, tmp_path: Path) -> None:
    serve(archive())
    source, cache = at(f"{site}/ml-100k.zip", tmp_path), tmp_path / "cache"
    good = from_cache(source, cache).events.fingerprint()
    spoilt = cache / "ml-100k" / "ml-100k.zip"
    spoilt.write_bytes(spoilt.read_bytes()[:-30])
    assert from_cache(source, cache).events.fingerprint() == good
    assert len(Site.asked) == 2


def test_an_address_that_stays_silent_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "TIMEOUT_S", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/ml-100k.zip"
        with pytest.raises(SourceError, match=r"did not answer|cannot be reached"):
            from_cache(at(url, tmp_path), tmp_path / "cache")


def test_only_http_is_spoken(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="not an http or https address"):
        Address(url=(tmp_path / "x").as_uri()).fetch(tmp_path)


def test_a_cache_that_cannot_be_written_is_named(site: str, tmp_path: Path) -> None:
    serve(archive())
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SourceError, match="--cache-dir"):
        from_cache(at(f"{site}/ml-100k.zip", tmp_path), tmp_path / "file" / "cache")


# --- the wheel of the package index ----------------------------------------------------------


def small_wheel(folder: Path) -> Wheel:
    """A wheel `tinydata` with RecBole's layout of the same ratings, for pip to find."""
    folder.mkdir()
    header = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
    item = "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
    user = "user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token\n"
    members = {
        "tinydata/data/ml-100k.inter": header + RATINGS,
        "tinydata/data/ml-100k.item": item + "242\tKolya\t1996\tComedy\n302\tAmélie\tV\tThriller\n",
        "tinydata/data/ml-100k.user": user + USERS.replace("|", "\t"),
        "tinydata/__init__.py": "raise SystemExit('imported')\n",
        "tinydata-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: tinydata\nVersion: 1.0\n"
        "Requires-Dist: there-is-no-such-thing\n",
        "tinydata-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\n"
        "Tag: py3-none-any\n",
        "tinydata-1.0.dist-info/RECORD": "",
    }
    with zipfile.ZipFile(folder / "tinydata-1.0-py3-none-any.whl", "w") as opened:
        for name, text in members.items():
            opened.writestr(name, text)
    return Wheel(requirement="tinydata==1.0", prefix="tinydata/data/")


def test_where_the_address_cannot_be_reached_the_wheel_gives_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = small_wheel(tmp_path / "index")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    source = at("http://127.0.0.1:9/ml-100k.zip", tmp_path, wheel=wheel)
    dataset = from_cache(source, tmp_path / "cache")
    assert "wheel tinydata==1.0" in dataset.origin
    assert kept(tmp_path / "cache") == ["ml-100k"]
    reference = from_folder(source, tmp_path / "reference")
    assert dataset.events.fingerprint() == reference.events.fingerprint()
    assert dataset.events.item_table is not None
    assert set(dataset.events.item_table["title"]) == {"Kolya", "Amélie"}


def test_if_no_source_works_each_is_named_with_the_fix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    wheel = Wheel(requirement="tinydata==1.0", prefix="tinydata/data/")
    source = at("http://127.0.0.1:9/ml-100k.zip", tmp_path, wheel=wheel)
    with pytest.raises(SourceError, match="--data-dir") as caught:
        from_cache(source, tmp_path / "cache")
    assert "127.0.0.1:9" in str(caught.value)
    assert "pip could not get tinydata==1.0" in str(caught.value)
    assert kept(tmp_path / "cache") == []


def test_without_pip_a_line_says_that_the_wheel_needs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "installed", lambda package: package != "pip")
    wheel = Wheel(requirement="tinydata==1.0", prefix="tinydata/data/")
    with pytest.raises(SourceError) as caught:
        wheel.fetch(tmp_path)
    assert caught.value.name == "pip"
    source = at("http://127.0.0.1:9/ml-100k.zip", tmp_path, wheel=wheel)
    with pytest.raises(SourceError, match=r"install pip.*--data-dir"):
        from_cache(source, tmp_path / "cache")


@pytest.mark.slow
def test_the_wheel_of_the_real_index_holds_the_real_ratings(tmp_path: Path) -> None:
    real = SOURCES["ml-100k"]
    dataset = from_cache(replace(real, ways=real.ways[1:]), tmp_path)
    events = dataset.events
    assert (events.num_users, events.num_items, len(events)) == (943, 1_682, 100_000)
    assert events.item_table is not None
    assert events.item_table["title"][events.items.find(1)] == "Toy Story"


@pytest.mark.slow
def test_the_wheel_and_the_original_files_give_the_same_events(
    tmp_path: Path, shared_data: Path
) -> None:
    real = SOURCES["ml-100k"]
    wheel = from_cache(replace(real, ways=real.ways[1:]), tmp_path)
    original = from_folder(real, shared_data)
    assert wheel.events.fingerprint() == original.events.fingerprint()
    assert wheel.events.user_table is not None
    assert wheel.events.user_table.equals(original.events.user_table)


# --- reading each layout ---------------------------------------------------------------------


def test_ml_1m_and_the_csv_releases_are_read_in_their_layouts(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    for folder in (old, new):
        folder.mkdir()
    (old / "ratings.dat").write_bytes(b"1::1193::5::978300760\n2::661::3::978302109\n")
    (old / "movies.dat").write_bytes(
        "661::James: a Pêche (1996)::Children's|Musical\n1193::Cuckoo (1975)::Drama\n".encode(
            "latin-1"
        )
    )
    (old / "users.dat").write_bytes(b"1::F::1::10::48067\n2::M::56::16::70072\n")
    tables = SOURCES["ml-1m"].read(Files(old))
    assert tables.events.rows() == [(1, 1193, 5.0, 978300760), (2, 661, 3.0, 978302109)]
    assert tables.items is not None
    assert tables.items.rows()[0] == (661, "James: a Pêche", 1996, ["Children's", "Musical"])
    (new / "ratings.csv").write_text("userId,movieId,rating,timestamp\n1,31,2.5,1260759144\n")
    (new / "movies.csv").write_text(
        'movieId,title,genres\n31,"Minds, Dangerous (1995)",Drama\n32,X,(no genres listed)\n'
    )
    tables = SOURCES["ml-20m"].read(Files(new))
    assert tables.events.rows() == [(1, 31, 2.5, 1260759144)]
    assert tables.items is not None
    assert tables.items.rows() == [(31, "Minds, Dangerous", 1995, ["Drama"]), (32, "X", None, [])]


def test_amazon_reviews_are_read_line_by_line(tmp_path: Path) -> None:
    review = {"reviewerID": "A1", "asin": "B00", "overall": 4.0, "unixReviewTime": 1_400_000_000}
    more = {**review, "reviewText": 'said "fine"\n', "helpful": [0, 1], "summary": "so"}
    lines = "\n".join(json.dumps(row) for row in (more, {**review, "asin": "B01"}))
    (tmp_path / "reviews_Beauty_5.json.gz").write_bytes(gzip.compress(lines.encode()))
    tables = SOURCES["amazon-beauty"].read(Files(tmp_path))
    assert tables.events.rows() == [
        ("A1", "B00", 4.0, 1_400_000_000),
        ("A1", "B01", 4.0, 1_400_000_000),
    ]


def test_a_malformed_file_is_no_traceback_of_another_library(tmp_path: Path) -> None:
    for line, source in (("one two", "sasrec-video"), ("{", "amazon-beauty")):
        (tmp_path / SOURCES[source].marks[0]).write_text(line + "\n")
        with pytest.raises(SourceError, match=source):
            get_dataset(source, data_dir=tmp_path)


# --- the registry ----------------------------------------------------------------------------


@pytest.mark.parametrize("source", SOURCES.values(), ids=lambda source: source.name)
def test_each_entry_says_where_it_is_how_it_is_read_and_what_it_must_be(source: Source) -> None:
    assert all((source.name, source.folder, source.marks, source.licence, callable(source.read)))
    for way in source.ways:
        for file in way:
            assert urlsplit(file.url).hostname if isinstance(file, Address) else file.prefix
        names = [PurePosixPath(urlsplit(str(file)).path).name for file in way]
        assert len(set(names)) == len(names)  # no file is written over another of its way
    assert source.counts is None or (len(source.counts) == 3 and min(source.counts) > 0)
    if source.sha256 is not None:
        assert len(bytes.fromhex(source.sha256)) == 32


def test_the_registry_is_in_the_wheel(tmp_path: Path) -> None:
    wheel = pytest.importorskip("hatchling.builders.wheel", reason="hatchling builds the wheel")
    builder = wheel.WheelBuilder(str(Path(__file__).parents[1]))
    (built,) = builder.build(directory=str(tmp_path), versions=["standard"])
    with zipfile.ZipFile(built) as opened:
        assert "foretaste/data/sources/registry.toml" in opened.namelist()


# --- doors -----------------------------------------------------------------------------------


def test_an_unknown_name_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="did you mean 'ml-100k'"):
        find_source("ml-100")
    with pytest.raises(ConfigError, match="ml-100k, ml-1m"):
        find_source("nothing like it")


def test_a_folder_without_the_files_is_an_error_that_names_the_missing_ones(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"u\.data or ml-100k\.inter"):
        get_dataset("ml-100k", data_dir=tmp_path)


def test_a_broken_archive_in_the_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "ml-100k.zip").write_bytes(archive()[:-30])
    with pytest.raises(SourceError, match=r"ml-100k\.zip is not a complete archive"):
        get_dataset("ml-100k", data_dir=tmp_path)


# --- the real files beside the checkout ------------------------------------------------------

HELD = [name for name in SOURCES if name not in ("ml-1m", "ml-20m", "amazon-beauty")]


@pytest.mark.parametrize("name", HELD)
def test_real_files_have_the_published_counts_and_checksum(name: str, shared_data: Path) -> None:
    dataset = get_dataset(name, data_dir=shared_data)
    counts = {"ml-latest-small": (671, 9_066, 100_004)}.get(name, SOURCES[name].counts)
    events = dataset.events
    seen = (events.item_count > 0).sum()
    assert (events.num_users, seen, len(events)) == counts  # reading compared the checksum
    assert dataset.licence


def test_the_folder_itself_does_as_well_as_the_one_above(shared_data: Path) -> None:
    above = get_dataset("ml-100k", data_dir=shared_data)
    itself = get_dataset("ml-100k", data_dir=shared_data / "ml-100k")
    assert above.events.fingerprint() == itself.events.fingerprint()


def titled(dataset: Dataset, item_id: object) -> dict[str, object]:
    table, row = dataset.events.item_table, dataset.events.items.find(item_id)
    assert isinstance(table, pl.DataFrame)
    return table.row(row, named=True)


def test_real_items_have_their_titles_genres_and_attributes(shared_data: Path) -> None:
    ml_100k = get_dataset("ml-100k", data_dir=shared_data)
    assert titled(ml_100k, 543)["title"] == "Misérables, Les"
    sequences = get_dataset("ml-1m-sequences", data_dir=shared_data)
    assert titled(sequences, 1) == {
        "movielens_id": 1198,
        "title": "Raiders of the Lost Ark",
        "year": 1981,
        "genres": ["Action", "Adventure"],
    }
    # The file begins "1 1": the first event of its first user is the first item.
    assert sequences.events.history(sequences.events.users.find(1))[
        0
    ] == sequences.events.items.find(1)
    assert titled(get_dataset("s3rec-beauty", data_dir=shared_data), 4)["attributes"] == [1, 2, 3]


def test_gowalla_comes_with_its_split(shared_data: Path) -> None:
    dataset = get_dataset("gowalla", data_dir=shared_data)
    split = make_split(GivenSplitConfig(), dataset.events)
    assert dataset.part_E is not None
    assert (len(split.train), len(split.test.target_item)) == (810_128, 217_242)
    assert len(split.test) == 29_858


def test_tiktok_comes_with_its_split_and_with_vectors(shared_data: Path) -> None:
    dataset = get_dataset("tiktok-mm", data_dir=shared_data)
    split = make_split(GivenSplitConfig(), dataset.events)
    assert (len(split.train), int((split.part_E == 1).sum())) == (59_541, 3_051)
    assert len(split.test.target_item) == 6_130
    table = dataset.events.item_table
    assert table is not None
    assert table.schema["image"] == pl.Array(pl.Float32, 128)
    audio = np.load(shared_data / "tiktok-mm" / "audio_feat.npy")
    row = dataset.events.items.find(885)
    assert table["audio"][row].to_list() == audio[885].astype(np.float32).tolist()


def test_what_is_published_only_as_pickles_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"pickles.*--data-dir"):
        get_dataset("tiktok-mm", cache_dir=tmp_path)

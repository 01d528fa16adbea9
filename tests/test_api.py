"""The HTTP API in one process: its answers, live events, and every limit."""

import asyncio
import gc
import gzip
import json
import re
import socket
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import quote

import httpx
import polars as pl
import pytest

from foretaste.config import findings
from foretaste.data.features_schema import schema_from_toml
from foretaste.data.reading import read_interactions
from foretaste.data.splitting import leave_last_split
from foretaste.errors import BundleError, DataError
from foretaste.experiment.fit import fit
from foretaste.models.two_tower import TwoTowerConfig
from foretaste.serving.api import READ_PROBLEMS, create_app
from foretaste.serving.messages import EventRequest, RecommendReply, SimilarReply, seconds_of
from foretaste.serving.metrics import Admission, Metrics
from foretaste.serving.recommender import build_recommender
from foretaste.serving.server import http_server
from foretaste.serving.service import WITHOUT_REASONS, WITHOUT_STORE, Service
from foretaste.serving.settings import Access, ServerSettings, access_of, add_token
from foretaste.serving.slot import ModelSlot, load_version
from foretaste.serving.state import cause_of, open_live_events
from foretaste.serving.versions import Versions
from foretaste.training.settings import TrainingConfig
from tests.worlds import HOSTILE, is_space, make_trained, write_film_bundle

pytest_plugins = ["postgres_server"]

NOW_S = 2_000_000_000


class Served:
    """A client, the service behind it, and the lines that were logged."""

    def __init__(self, http: httpx.Client, service: Service, log: list[str]) -> None:
        self.http, self.service, self.log = http, service, log

    def recommend(self, **asked: object) -> dict:
        reply = self.http.post("/v1/recommend", json=asked)
        assert reply.status_code == 200, reply.text
        return reply.json()

    def logged(self, num: int) -> list[dict]:
        """Return the lines of so many requests: a line may be written after its answer has come."""
        deadline = time.monotonic() + 60
        while len(self.log) < num and time.monotonic() < deadline:
            time.sleep(0.001)
        assert len(self.log) == num
        return [json.loads(line) for line in self.log]


@contextmanager
def served(bundle: Path, state: str, *, now_s: int = NOW_S, **settings: object) -> Iterator[Served]:
    """Serve on a free port of this machine, from a thread of this process."""
    chosen, log = ServerSettings(**settings), []
    slot = ModelSlot(Versions(bundle))
    events = open_live_events(state, timeout_s=chosen.store_timeout_s)
    metrics = Metrics()
    service = Service(slot, events, chosen, bundle=bundle, metrics=metrics, clock=lambda: now_s)
    admission = Admission(chosen, metrics, log.append)
    app = create_app(service, settings=chosen, access=access_of(chosen), admission=admission)
    listener = socket.create_server(("127.0.0.1", 0))
    server = http_server(app, chosen, admission)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    address = f"http://127.0.0.1:{listener.getsockname()[1]}"
    try:
        with httpx.Client(base_url=address, timeout=30, trust_env=False) as http:
            yield Served(http, service, log)
    finally:
        server.should_exit = True
        thread.join()
        events.close()


@pytest.fixture(scope="session")
def film_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_film_bundle(tmp_path_factory.mktemp("api") / "films")


@pytest.fixture(scope="session")
def long_lived(film_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(film_bundle, str(tmp_path_factory.mktemp("api") / "e.sqlite")) as one:
        yield one


@pytest.fixture
def films(long_lived: Served) -> Iterator[Served]:
    """One server for many tests, without events and with an empty log."""
    long_lived.log.clear()
    yield long_lived
    with long_lived.service.events._engine.begin() as connection:
        connection.exec_driver_sql("DELETE FROM foretaste_live_events")


@pytest.fixture
def fresh_films(film_bundle: Path, tmp_path: Path) -> Iterator[Served]:
    """A server of the test's own."""
    with served(film_bundle, str(tmp_path / "e.sqlite")) as one:
        yield one


@pytest.fixture
def films_on(film_bundle: Path, state: str) -> Iterator[Served]:
    """A server of the test's own, once on SQLite and once on PostgreSQL."""
    with served(film_bundle, state) as one:
        yield one


def ids(reply: dict) -> list[str]:
    return [row["item_id"] for row in reply["items"]]


# ---- answers -----------------------------------------------------------------------------


def test_a_known_user_gets_unseen_films_of_their_kind_from_the_model(films: Served) -> None:
    seen = {e["item_id"] for e in films.http.get("/v1/users/1/history").json()["events"]}
    reply = films.recommend(user_id=1, k=4)
    assert reply["user_known"] is True
    assert reply["source"] == "model"
    assert len(seen) == 9
    assert len(ids(reply)) == 4
    assert all(is_space(item) and item not in seen for item in ids(reply))
    scores = [row["score"] for row in reply["items"]]
    assert scores == sorted(scores, reverse=True)


@pytest.mark.parametrize("user_id", [1, "1"])
def test_an_id_is_the_same_as_number_and_as_text(films: Served, user_id: object) -> None:
    by_path = films.http.get(f"/v1/users/{user_id}/recommendations?k=5").json()
    assert ids(films.recommend(user_id=user_id, k=5)) == ids(by_path)


def test_a_history_alone_is_folded_in(films: Served) -> None:
    reply = films.recommend(history=[116, "117"], k=5)
    assert reply["source"] == "fold-in"
    assert reply["user_known"] is False
    assert not any(is_space(item) for item in ids(reply))
    assert not {"116", "117"} & set(ids(reply))


def test_an_unknown_user_gets_the_most_popular_items(films: Served) -> None:
    for asked in ({}, {"user_id": "never seen"}, {"user_id": 41}):
        reply = films.recommend(k=2, **asked)
        assert reply["source"] == "popular"
        assert set(ids(reply)) == {"101", "116"}


def test_the_unknown_is_said(films: Served) -> None:
    reply = films.recommend(history=["nope", 101], deny=["neither"])
    assert set(reply["unknown_items"]) == {"nope", "neither"}


def test_allow_and_deny_and_seen_are_obeyed(films: Served) -> None:
    assert set(ids(films.recommend(user_id=1, allow=[120, 121]))) == {"120", "121"}
    best = ids(films.recommend(user_id=1, k=1))[0]
    assert best not in ids(films.recommend(user_id=1, k=30, deny=[best]))
    assert "101" in ids(films.recommend(user_id=1, k=31, exclude_seen=False))
    assert "101" not in ids(films.recommend(user_id=1, k=31))


def test_rules_are_obeyed_and_a_short_list_says_so(films: Served) -> None:
    where = {"genres": {"contains": "Crime"}, "year": {"at_least": 2000, "at_most": 2005}}
    reply = films.recommend(user_id=1, k=20, rules={"where": where})
    assert sorted(ids(reply)) == ["121", "122", "123", "124", "125", "126"]
    assert "20 items were requested, but only 6 are allowed" in reply["notes"]
    capped = films.recommend(user_id=1, k=20, rules={"caps": {"genres": 2}})
    assert [is_space(item) for item in ids(capped)] == [True, True, False, False]
    mixed = {"diversity": {"by": ["genres"], "relevance": 0.1}, "where": where}
    assert set(ids(films.recommend(user_id=1, k=20, rules=mixed))) == set(ids(reply))


@pytest.mark.parametrize(
    ("rules", "says"),
    [
        ({"where": {"yeer": {"equals": 1}}}, "did you mean 'year'?"),
        ({"where": {"year": {"equals": "soon"}}}, "'year' holds numbers, and 'soon' is not one"),
        ({"where": {"year": {}}}, "rules.where.year: a condition is empty"),
        (
            {"where": {"year": {"at_lest": 3}}},
            "rules.where.year.at_lest: there is no such field; did you mean at_least?",
        ),
        ({"caps": {"genres": 0}}, "rules.caps.genres: must be at least 1"),
        ({"diversity": {}}, "this model has no item vectors for diversity"),
    ],
)
def test_rules_that_cannot_be_kept_are_refused(films: Served, rules: dict, says: str) -> None:
    reply = films.http.post("/v1/recommend", json={"rules": rules})
    assert reply.status_code == 422
    assert says in reply.json()["error"]


def test_the_columns_that_rules_may_name_are_listed(films: Served) -> None:
    reply = films.http.get("/v1/columns").json()
    assert reply["vectors"] is False
    columns = {column["name"]: column for column in reply["columns"]}
    assert list(columns) == ["title", "year", "genres"]  # not the vector
    assert columns["genres"] == {
        "name": "genres",
        "several": True,
        "ordered": False,
        "distinct": 3,
        "values": ["Crime", "Drama", "Space"],
    }
    assert (columns["year"]["ordered"], columns["year"]["several"]) == (True, False)


def test_a_reason_is_an_item_of_the_history_and_of_the_same_kind(films: Served) -> None:
    reply = films.recommend(history=[101, 103, 116], k=3, explain=True)
    for row in reply["items"]:
        assert row["because"]["item_id"] in {"101", "103", "116"}
        assert is_space(row["because"]["item_id"]) == is_space(row["item_id"])
    assert films.recommend(history=[101], k=1)["items"][0]["because"] is None


def test_reasons_for_some_hold_up_no_lists_of_others(films: Served) -> None:
    # A reason costs as much as dozens of lists: at most half of the threads compute reasons.
    asked = {"user_id": 1, "k": 3, "explain": True}
    whole = films.recommend(**asked)
    with ExitStack() as stack:
        for _ in range(films.service._settings.threads // 2):
            stack.enter_context(films.service._explaining)
        without = films.recommend(**asked)
    assert all(row["because"] for row in whole["items"])
    assert without == whole | {
        "items": [row | {"because": None} for row in whole["items"]],
        "notes": [*whole["notes"], WITHOUT_REASONS],
    }
    assert films.recommend(**asked) == whole


def test_an_item_carries_its_title_and_what_people_can_read(films: Served) -> None:
    row = films.recommend(allow=[102], k=1)["items"][0]
    assert row["title"] == HOSTILE
    assert row["attributes"] == {"year": 1981, "genres": ["Space"]}  # not the vector


def test_similar_items_are_of_the_same_kind(films: Served) -> None:
    reply = films.http.get("/v1/items/120/similar?k=5").json()
    assert reply["item"]["title"] == "Heist 5"
    assert len(ids(reply)) == 5
    assert "120" not in ids(reply)
    assert not any(is_space(item) for item in ids(reply))


@pytest.mark.parametrize("item", ["zzz", "0120", "120.0"])
def test_an_item_that_the_catalogue_has_not_is_not_found(films: Served, item: str) -> None:
    reply = films.http.get(f"/v1/items/{item}/similar")
    assert reply.status_code == 404
    assert f"no item has the id '{item}'" in reply.json()["error"]
    assert ("did you mean 120?" in reply.json()["error"]) == (item != "zzz")


def test_an_item_that_the_model_places_by_its_features_is_known_to_every_route(
    tmp_path: Path,
) -> None:
    events = read_interactions(
        pl.DataFrame(
            {"user_id": [n // 8 for n in range(80)], "item_id": [n % 9 for n in range(80)]}
        ),
        items=pl.DataFrame({"item_id": range(10), "genre": ["a", "b"] * 5}),
    )
    trained = fit(
        TwoTowerConfig(embedding_dim=4),
        leave_last_split(events),
        features=schema_from_toml('[item.genre]\nkind = "categorical"'),
        training=TrainingConfig(epochs=1),
        show=False,
    )
    recommender = build_recommender(trained)
    recommender.save(tmp_path / "bundle")
    with served(tmp_path / "bundle", str(tmp_path / "e.sqlite")) as one:
        reply = one.http.get("/v1/items/9/similar?k=3")  # of no event
        assert ids(reply.json()) == [str(row.item_id) for row in recommender.similar(9, 3).rows]
        stored = one.http.post("/v1/events", json={"user_id": "new", "item_id": 9}).json()
        assert stored["unknown_items"] == []
        answer = one.recommend(user_id="new")
        assert (answer["source"], answer["unknown_items"]) == ("fold-in", [])


def test_an_item_of_which_the_model_knows_nothing_has_no_similar_ones(films: Served) -> None:
    reply = films.http.get("/v1/items/131/similar")  # in the item table, and of no event
    assert (reply.status_code, reply.json()["items"]) == (200, [])
    assert "131" in reply.json()["notes"][0]


def test_an_id_with_slashes_and_signs_is_found_in_a_path(tmp_path: Path) -> None:
    user, item = "a/b c?#%", "\u00e4/similar/x"
    events = read_interactions(
        pl.DataFrame({"user_id": [user, "o", "o"], "item_id": [item, item, "other"]})
    )
    build_recommender(make_trained("item_knn", events)).save(tmp_path / "bundle")
    with served(tmp_path / "bundle", str(tmp_path / "e.sqlite")) as one:
        for path in (
            f"/v1/users/{quote(user, safe='')}/recommendations?k=1",
            f"/v1/items/{quote(item, safe='')}/similar?k=1",
        ):
            reply = one.http.get(path)
            assert reply.status_code == 200, reply.text
            assert ids(reply.json()) == ["other"]
        path = f"/v1/users/{quote(user, safe='')}"
        assert [e["item_id"] for e in one.http.get(f"{path}/history").json()["events"]] == [item]
        assert one.http.delete(f"{path}/events").status_code == 200
        assert user not in one.http.get("/metrics").text


def test_items_are_found_by_words_and_by_id_the_most_popular_first(films: Served) -> None:
    def find(query: str) -> list[str]:
        return ids(films.http.get("/v1/items", params={"query": query}).json())

    assert find("heist")[0] == "116"
    assert find("HEIST 12") == ["127"]
    assert find("129") == ["129"]
    assert find("(.*") == []
    assert find("script>") == ["102"]
    assert len(find("")) == 20


def test_users_are_found_by_the_beginning_of_their_id(films: Served) -> None:
    def find(prefix: str) -> list[str]:
        return films.http.get("/v1/users", params={"prefix": prefix}).json()["users"]

    assert find("4") == ["4", "40"]  # 41 has no event
    assert find("40") == ["40"]
    assert find("x") == []
    assert len(find("")) == 20


# ---- live events -------------------------------------------------------------------------


def test_a_live_event_is_in_the_next_answer(films_on: Served) -> None:
    before = ids(films_on.recommend(user_id=1, k=6))
    posted = films_on.http.post("/v1/events", json={"user_id": 1, "item_id": before[0]})
    assert posted.status_code == 201
    assert posted.json() == {
        "stored": 1,
        "duplicates": 0,
        "unknown_items": [],
        "unknown_users": [],
    }
    after = films_on.recommend(user_id="1", k=6)
    assert before[0] not in ids(after)
    assert after["live_events"] == 1
    newest = films_on.http.get("/v1/users/1/history?limit=2").json()
    assert [e["live"] for e in newest["events"]] == [True, False]
    assert newest["events"][0]["item_id"] == before[0]
    assert newest["total"] == 10


def test_a_new_user_is_known_by_live_events_alone(films_on: Served) -> None:
    events = [{"user_id": "new", "item_id": item} for item in (117, 118)]
    reply = films_on.http.post("/v1/events", json=events).json()
    assert reply["unknown_users"] == ["new"]
    after = films_on.recommend(user_id="new", k=5)
    assert after["source"] == "fold-in"
    assert not any(is_space(item) for item in ids(after))


def test_an_event_of_an_unknown_item_is_stored_and_said(films_on: Served) -> None:
    posted = films_on.http.post("/v1/events", json={"user_id": 1, "item_id": "new film"})
    assert posted.json()["unknown_items"] == ["new film"]
    assert films_on.service.events.count() == 1
    assert films_on.recommend(user_id=1)["unknown_items"] == ["new film"]


def test_the_same_event_id_counts_once(films_on: Served) -> None:
    event = {"user_id": 1, "item_id": 120, "event_id": "e-1"}
    first, again = (films_on.http.post("/v1/events", json=event) for _ in range(2))
    assert (first.json()["stored"], again.json()["stored"]) == (1, 0)
    assert again.status_code == 201
    assert again.json()["duplicates"] == 1


def test_an_event_id_of_another_event_is_refused_and_nothing_of_the_request_is_stored(
    films_on: Served,
) -> None:
    event = {"user_id": 1, "item_id": 120, "event_id": "e-1", "timestamp": 1_700_000_000}
    assert films_on.http.post("/v1/events", json=event).status_code == 201
    others = [{"user_id": 2}, {"user_id": "01"}, {"item_id": 121}, {"timestamp": 1_700_000_001}]
    for other in others:
        for asked in ([{"user_id": 3, "item_id": 120}, event | other], [event | other, event]):
            reply = films_on.http.post("/v1/events", json=asked)
            assert reply.status_code == 409
            assert "the event_id 'e-1' of another event" in reply.json()["error"]
    assert films_on.service.events.count() == 1
    del event["timestamp"]  # as from a sender without a clock, which cannot repeat the time
    assert films_on.http.post("/v1/events", json=event).json()["duplicates"] == 1


def test_two_events_of_one_request_with_one_event_id_are_the_same_event_or_refused(
    films_on: Served,
) -> None:
    event = {"user_id": 1, "item_id": 120, "event_id": "e-1"}
    refused = films_on.http.post("/v1/events", json=[event, event | {"item_id": 121}])
    assert (refused.status_code, films_on.service.events.count()) == (409, 0)
    stored = films_on.http.post("/v1/events", json=[event, event]).json()
    assert (stored["stored"], stored["duplicates"]) == (1, 1)


@pytest.mark.parametrize(
    "user_id",
    ["mallory\nx", "x\n", "\n", " 42", "042", "a/events", "%0A", "é", ".", "..", "?#", " "],
)
def test_what_was_stored_of_any_id_can_be_read_and_deleted(films: Served, user_id: str) -> None:
    assert films.http.post("/v1/events", json={"user_id": user_id, "item_id": 101}).is_success
    if user_id not in (".", ".."):  # which a client removes from a path
        past = films.http.get(f"/v1/users/{quote(user_id, safe='')}/history").json()
        assert (past["user_id"], past["total"]) == (user_id, 1)
        by_path = films.http.delete(f"/v1/users/{quote(user_id, safe='')}/events")
        assert by_path.json() == {"deleted": 1}
        films.http.post("/v1/events", json={"user_id": user_id, "item_id": 101})
    by_query = films.http.delete("/v1/events", params={"user_id": user_id})
    assert by_query.json() == {"deleted": 1}
    assert films.service.events.count() == 0


def test_live_events_can_be_forgotten(films_on: Served) -> None:
    before = ids(films_on.recommend(user_id=1))
    films_on.http.post("/v1/events", json={"user_id": 1, "item_id": 120})
    assert films_on.http.delete("/v1/users/1/events").json() == {"deleted": 1}
    assert ids(films_on.recommend(user_id=1)) == before


def test_events_that_training_has_since_taken_in_do_not_count_twice(films: Served) -> None:
    trained = films.http.get("/v1/users/1/history?limit=1").json()["events"][0]
    event = {"user_id": 1, "item_id": trained["item_id"], "timestamp": trained["timestamp_s"]}
    films.http.post("/v1/events", json=event)
    assert films.recommend(user_id=1)["live_events"] == 0
    films.http.post("/v1/events", json=event | {"timestamp": NOW_S})
    assert films.recommend(user_id=1)["live_events"] == 1


@pytest.mark.parametrize(
    ("event", "says"),
    [
        ({"user_id": 1}, "item_id: it is missing"),
        ({"user_id": 1, "item_id": 1, "timestamp": -5}, "before 1970"),
        ({"user_id": 1, "item_id": 1, "timestamp": NOW_S * 1000}, "looks like milliseconds"),
        ({"user_id": 1, "item_id": 1, "timestamp": NOW_S + 100_000}, "more than a day after"),
        ({"user_id": 1, "item_id": ""}, "1 to 512 characters"),
        ({"user_id": "a\0b", "item_id": 1}, "may not contain NUL"),
        (
            {"user_id": 1, "item_id": 1, "extra": 1},
            "extra: there is no such field; there are user_id, item_id",
        ),
        (
            [{"user_id": 1, "item_id": 1}, {"user_id": 2.5, "item_id": 1}],
            "1.user_id: an id is a whole",
        ),
        ([{"user_id": 1, "item_id": 1}, {"user": 1, "item_id": 1}], "did you mean user_id?"),
        ([{"user_id": 1, "item_id": 1}] * 1001, "1001 events in one request"),
    ],
)
def test_a_wrong_event_stores_nothing_and_says_why(films: Served, event: object, says: str) -> None:
    reply = films.http.post("/v1/events", json=event)
    assert reply.status_code == 422
    assert says in reply.json()["error"]
    assert films.service.events.count() == 0


def test_a_clock_that_is_set_back_before_a_restart_refuses_no_right_time(
    film_bundle: Path, tmp_path: Path
) -> None:
    state, event = str(tmp_path / "e.sqlite"), {"user_id": 1, "item_id": 101}
    with served(film_bundle, state) as before:
        assert before.http.post("/v1/events", json=event).status_code == 201
    with served(film_bundle, state, now_s=NOW_S - 30 * 86_400) as after:
        for ahead_s, status in ((60, 201), (100_000, 422)):
            reply = after.http.post("/v1/events", json=event | {"timestamp": NOW_S + ahead_s})
            assert reply.status_code == status, reply.text


@pytest.mark.parametrize(
    "value",
    [
        *(0, 5, 631_152_000, 1_700_000_000, 1_700_000_000.75, 7_258_118_400, 7_258_118_401),
        *("2024-05-01T12:30:00Z", "1990-01-01T00:00:00Z", "2024-02-29T23:59:59Z", "1700000000"),
        *("2024-05-01T12:30:00+02:00", "2024-05-01 12:30", "1969-12-31T00:00:00Z", "", "soon"),
        *("2024-05-01", "2024-05-01 12:30:15", "2024-05-01T12:30:15.250", "2024-05-01T12:30-14:00"),
        *("1970-01-01", "1970-01-01T00:00:00+02:00", "1972-12-31T23:59:59.999999Z", "2199-12-31"),
        *("2024-05-01T12:30+15:00", "2024-05-01T12:30:60Z", "2024-05-01T12:60Z", 3.5, 86_400),
        *("2023-02-29T00:00:00Z", "2024-05-01T24:00:00Z", "2024-13-01T00:00:00Z"),
    ],
)
def test_a_time_of_an_event_is_read_as_in_a_table(value: object) -> None:
    try:
        expected = seconds_of(value)
    except DataError:
        with pytest.raises(ValueError, match="Unix seconds"):
            EventRequest(user_id=1, item_id=1, timestamp=value)
        return
    assert EventRequest(user_id=1, item_id=1, timestamp=value).timestamp == expected


MANY = {f"f{number}": 1 for number in range(60_000)}
WORDS = list(MANY)


@pytest.mark.parametrize(
    ("path", "body", "says"),
    [
        ("/v1/recommend", MANY, "f0: there is no such field"),
        ("/v1/recommend", {"rules": MANY}, "rules.f0: there is no such field"),
        ("/v1/recommend", {"rules": {"where": MANY}}, "has 60000 entries, but may have 100"),
        ("/v1/recommend", {"rules": {"caps": MANY}}, "has 60000 entries, but may have 100"),
        ("/v1/recommend", {"context": MANY}, "has 60000 entries, but may have 100"),
        ("/v1/recommend", {"new_items": MANY}, "has 60000 entries, but may have 100"),
        ("/v1/recommend", {"weights": MANY}, "has 60000 entries, but may have 100"),
        ("/v1/recommend", {"rules": {"where": {"genres": {"one_of": WORDS}}}}, "at most 1000"),
        ("/v1/recommend", {"rules": {"where": {"genres": {"contains": WORDS}}}}, "at most 1000"),
        ("/v1/recommend", {"rules": {"diversity": {"by": ["genres"] * 60_000}}}, "at most 100"),
        ("/v1/recommend", {"k" * 900_000: 1}, "kkk"),
        ("/v1/events", MANY, "f0: there is no such field"),
        ("/v1/events", [{"user_id": 1, "item_id": 1} | MANY], "0.f0: there is no such field"),
    ],
)
def test_many_names_in_one_body_are_refused_in_the_time_of_few(
    films: Served, path: str, body: object, says: str
) -> None:
    content = json.dumps(body)
    json.loads(content)
    started = time.process_time()
    json.loads(content)
    parsing_s = time.process_time() - started
    started = time.process_time()
    reply = films.http.post(path, content=content, headers={"content-type": "application/json"})
    took_s = time.process_time() - started
    assert reply.status_code == 422
    assert says in reply.json()["error"]
    assert len(reply.content) < 5_000
    assert took_s < 6 * parsing_s + 0.25  # unbounded ones take .6 s and more


# ---- bounds ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"k": 0}, "k: must be at least 1, not 0"),
        ({"k": 1001}, "k is 1001: this server returns lists of 1 to 1000"),
        ({"k": "many"}, "k: must be a number, not the text 'many'"),
        ({"history": [1] * 2001}, "the history has 2001 items, but this server accepts 2000"),
        ({"history": "abc"}, "history: must be a list, such as ['abc'], not 'abc'"),
        ({"history": [None]}, "history.0"),
        ({"histroy": [1]}, "histroy: there is no such field; did you mean history?"),
        ([1], "send a JSON object"),
    ],
)
def test_a_wrong_question_is_refused_with_a_sentence(
    films: Served, asked: object, says: str
) -> None:
    reply = films.http.post("/v1/recommend", json=asked)
    assert reply.status_code == 422
    assert says in reply.json()["error"]


WORDS_OF_OTHERS = re.compile(
    r"Input|valid|pydantic|pattern|\^|Field required|Extra|tuple|\bstr\b|not None|not True"
)
NO_NUMBERS = (True, "3", [3], {"k": 3}, 2.5)
NO_TRUTHS = ("true", 1, 0, "yes", [True])
NO_IDS = (True, 2.5, "", [1], {"id": 1}, "a\0b", "x" * 513)
NO_TIMES = (True, "yesterday", [1_700_000_000], -5, 2e12, "", "2024-13-01", "1700000000000")
WRONG: dict[str, list[tuple[str, dict]]] = {
    "k": [("k", {"k": value}) for value in (*NO_NUMBERS, None)],
    "exclude_seen": [("exclude_seen", {"exclude_seen": value}) for value in (*NO_TRUTHS, None)],
    "explain": [("explain", {"explain": value}) for value in NO_TRUTHS],
    "user_id": [("user_id", {"user_id": value}) for value in NO_IDS],
    "history": [("history.1", {"history": [101, value]}) for value in (*NO_IDS, None)],
    "allow": [("allow.0", {"allow": [value]}) for value in (*NO_IDS, None)],
    "deny": [("deny.0", {"deny": [value]}) for value in (*NO_IDS, None)],
    "lists": [(name, {name: 101}) for name in ("history", "allow", "deny")],
    "weights": [("weights", {"weights": {"click": value}}) for value in (True, "3", [3], None)],
    "caps": [("rules.caps", {"rules": {"caps": {"genres": value}}}) for value in (True, "3", 1.5)],
    "diversity": [
        ("rules.diversity.relevance", {"rules": {"diversity": {"relevance": value}}})
        for value in (True, "0.5", 2)
    ],
    "objects": [(name, {name: [1]}) for name in ("features", "context", "new_items", "weights")],
    "a rule's name": [("rules.where.genres.equal", {"rules": {"where": {"genres": {"equal": 1}}}})],
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_value_of_another_type_is_refused_by_the_name_of_its_field(
    films: Served, kind: str
) -> None:
    for name, asked in WRONG[kind]:
        reply = films.http.post("/v1/recommend", json=asked)
        said = reply.json()["error"]
        assert reply.status_code == 422, asked
        assert said.startswith(name), (asked, said)
        assert not WORDS_OF_OTHERS.search(said), said


@pytest.mark.parametrize("field", ["timestamp", "user_id", "item_id", "event_id"])
def test_a_wrong_value_of_an_event_is_refused_by_the_name_of_its_field(
    films: Served, field: str
) -> None:
    for value in NO_TIMES if field == "timestamp" else NO_IDS:
        event = {"user_id": 1, "item_id": 101} | {field: value}
        for body, name in ((event, field), ([event], f"0.{field}")):
            reply = films.http.post("/v1/events", json=body)
            said = reply.json()["error"]
            assert (reply.status_code, said.startswith(f"{name}: ")) == (422, True), (value, said)
            assert not WORDS_OF_OTHERS.search(said), said
    assert films.service.events.count() == 0


@pytest.mark.parametrize(
    ("at", "seconds"),
    [
        (1_700_000_000, 1_700_000_000),
        (1_700_000_000.0, 1_700_000_000),
        (1_700_000_000.9, 1_700_000_000),
        ("1700000000", 1_700_000_000),
        ("2023-11-14T22:13:20Z", 1_700_000_000),
        ("2023-11-14T23:13:20.5+01:00", 1_700_000_000),
        ("2023-11-14 22:13:20", 1_700_000_000),
        ("2023-11-14", 1_699_920_000),
    ],
)
def test_an_event_has_the_second_that_reading_a_table_gives_it(
    films: Served, at: object, seconds: int
) -> None:
    event = {"user_id": "new", "item_id": 101, "timestamp": at}
    assert films.http.post("/v1/events", json=event).status_code == 201
    past = films.http.get("/v1/users/new/history").json()["events"]
    assert [one["timestamp_s"] for one in past] == [seconds]
    read = read_interactions(pl.DataFrame([event]), timestamp="timestamp")
    assert read.timestamp_s is not None
    assert read.timestamp_s.tolist() == [seconds]


@pytest.mark.parametrize("user_id", ["1", 1, 1.0, "01", " 1", "1.0", "+1"])
def test_an_id_in_a_body_is_a_whole_number_or_the_text_that_answers_show(
    films: Served, user_id: object
) -> None:
    known = not isinstance(user_id, str) or user_id == "1"
    reply = films.recommend(user_id=user_id, history=[user_id], allow=[user_id], deny=[user_id])
    assert reply["user_known"] == known
    stored = films.http.post("/v1/events", json={"user_id": user_id, "item_id": user_id}).json()
    assert (stored["unknown_users"] == []) == known
    path = quote(str(user_id), safe="")
    if isinstance(user_id, str):
        by_path = films.http.get(f"/v1/users/{path}/recommendations").json()
        assert by_path["user_known"] == known


def test_a_list_length_is_a_whole_number(films: Served) -> None:
    assert len(ids(films.recommend(k=3.0))) == 3
    for k in ("true", "2.5", "", "many"):
        said = films.http.get(f"/v1/users/1/recommendations?k={k}").json()["error"]
        assert said == f"k: must be a whole number, not {k!r}"


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("/v1/users//recommendations", "user_id: an id has 1 to 512 characters, not 0"),
        ("/v1/users/a%00b/recommendations", "user_id: an id may not contain NUL"),
        (f"/v1/users/{'x' * 513}/history", "user_id: an id has 1 to 512 characters, not 513"),
        ("/v1/items//similar", "item_id: an id has 1 to 512 characters, not 0"),
        ("/v1/items?limit=0", "limit: must be at least 1, not '0'"),
        ("/v1/items?limit=many", "limit: must be a whole number, not 'many'"),
        (f"/v1/items?query={'x' * 201}", "query: must be text of at most 200 characters"),
        ("/v1/users/1/recommendations?explain=maybe", "explain: must be true or false"),
    ],
)
def test_a_wrong_path_or_query_is_refused_by_the_name_of_its_part(
    films: Served, path: str, says: str
) -> None:
    reply = films.http.get(path)
    assert reply.status_code == 422
    assert reply.json()["error"].startswith(says)


@pytest.mark.parametrize("path", ["/v1/recommend", "/v1/events"])
@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "the body is empty: send a JSON object"),
        (b"{", "the body is not JSON: see character 1"),
        (b"3", "send a JSON object"),
        (b'"text"', "send a JSON object"),
        (b"null", "send a JSON object"),
    ],
)
def test_a_body_that_is_no_object_is_said_to_be_none(
    films: Served, path: str, body: bytes, says: str
) -> None:
    headers = {"content-type": "application/json"}
    reply = films.http.post(path, content=body, headers=headers)
    assert (reply.status_code, reply.json()["error"][: len(says)]) == (422, says)


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("/v1/users/1/recommendations?exclude_seen=false", "exclude_seen: there is no such"),
        ("/v1/users/1/recommendations?kk=3", "kk: there is no such query parameter; did you"),
        ("/v1/items?qurey=star", "qurey: there is no such query parameter; did you mean 'query'?"),
        ("/v1/items/101/similar?x=", "x: there is no such query parameter; there are k"),
        ("/v1/model?x=1", "x: there is no such query parameter; this route has none"),
    ],
)
def test_a_query_parameter_that_a_route_does_not_have_is_refused(
    films: Served, path: str, says: str
) -> None:
    reply = films.http.get(path)
    assert (reply.status_code, reply.json()["error"][: len(says)]) == (422, says)
    assert films.http.get("/health?probe=1").status_code == 200


@pytest.mark.parametrize("path", ["/health", "/ready", "/metrics", "/v1/model", "/v1/items", "/"])
def test_head_gives_the_head_of_what_get_gives(films: Served, path: str) -> None:
    got, head = films.http.get(path), films.http.head(path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-type"] == got.headers["content-type"]
    assert [line["method"] for line in films.logged(2)] == ["GET", "HEAD"]
    assert films.http.head("/v1/recommend").status_code == 405


def test_the_largest_list_is_given(films: Served) -> None:
    assert len(ids(films.recommend(k=1000))) == 30
    assert films.http.get("/v1/users/1/recommendations?k=0").status_code == 422


@pytest.mark.parametrize("body", [b"{", b"\xff\xfe", b'{"k": 1e999}', b"[" * 20_000, b""])
def test_what_is_no_json_is_refused_with_a_sentence(films: Served, body: bytes) -> None:
    reply = films.http.post(
        "/v1/recommend", content=body, headers={"content-type": "application/json"}
    )
    assert reply.status_code in (400, 422)
    assert reply.json()["error"]


def test_a_wrong_path_is_refused_with_a_sentence(films: Served) -> None:
    reply = films.http.get("/v1/nothing")
    assert reply.status_code == 404
    assert reply.json() == {"error": "there is no GET /v1/nothing: /docs lists the routes"}
    assert films.http.delete("/v1/recommend").status_code == 405
    assert films.http.get("/docs/", headers={"host": "localhost"}).status_code == 404
    assert films.http.get("/web/../settings.py").status_code == 404
    assert films.http.get("/web/%2e%2e/settings.py").status_code == 404


def test_a_large_body_is_refused_whether_or_not_it_says_its_size(
    film_bundle: Path, tmp_path: Path
) -> None:
    with served(film_bundle, str(tmp_path / "e.sqlite"), max_body_bytes=1000) as films:
        headers = {"content-type": "application/json"}
        body = b'{"user_id": "%s"}' % (b"a" * 2000)
        told = films.http.post("/v1/recommend", content=body, headers=headers)
        parts = films.http.post("/v1/recommend", content=iter([body]), headers=headers)
        for reply in (told, parts):
            assert reply.status_code == 413
            assert "larger than 1000 bytes" in reply.json()["error"]
        assert films.http.post("/v1/recommend", json={}).status_code == 200


@pytest.mark.parametrize("encoding", ["gzip", "br", "deflate, gzip"])
@pytest.mark.parametrize("path", ["recommend", "events"])
def test_a_body_that_is_compressed_is_refused_before_it_is_read(
    films: Served, path: str, encoding: str
) -> None:
    head = (
        f"POST /v1/{path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Encoding: {encoding}\r\nContent-Length: 100000\r\n\r\n"
    )
    address = (films.http.base_url.host, films.http.base_url.port)
    with socket.create_connection(address, timeout=60) as client:
        client.sendall(head.encode())
        answer = b"".join(iter(lambda: client.recv(65536), b""))
    assert answer.startswith(b"HTTP/1.1 415")
    assert b"accept-encoding: identity" in answer
    assert encoding in json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
    plain = films.http.post("/v1/recommend", json={}, headers={"content-encoding": "identity"})
    assert plain.status_code == 200


def test_a_long_answer_is_compressed_for_a_client_that_takes_it(films: Served) -> None:
    address = (films.http.base_url.host, films.http.base_url.port)
    body = b'{"k": 1000, "user_id": 1}'

    def answer(accepts: bytes, request: bytes = body) -> tuple[bytes, bytes]:
        with socket.create_connection(address, timeout=60) as client:
            client.sendall(
                b"POST /v1/recommend HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
                b"Content-Type: application/json\r\nAccept-Encoding: %s\r\nContent-Length: %d"
                b"\r\n\r\n%s" % (accepts, len(request), request)
            )
            head, _, content = b"".join(iter(lambda: client.recv(65536), b"")).partition(
                b"\r\n\r\n"
            )
        assert b"content-length: %d" % len(content) in head
        return head, content

    head, plain = answer(b"identity")
    assert b"content-encoding" not in head
    assert b"vary: Accept-Encoding" in head
    head, packed = answer(b"br, gzip")
    assert b"content-encoding: gzip" in head
    assert gzip.decompress(packed) == plain
    assert len(packed) < len(plain) / 2
    head, short = answer(b"gzip", b'{"k": 1}')
    assert b"content-encoding" not in head
    assert json.loads(short)["items"]


def test_without_the_token_only_health_and_the_empty_page_answer(
    film_bundle: Path, tmp_path: Path
) -> None:
    with served(film_bundle, str(tmp_path / "e.sqlite"), token="päss") as films:
        for path in ("/health", "/ready", "/", "/web/app.js", "/docs"):
            assert films.http.get(path).status_code == 200, path
        wrong = [{}, {"authorization": "Bearer nope"}, {"authorization": b"Basic p\xc3\xa4ss"}]
        for headers in wrong:
            for path in ("/metrics", "/v1/model", "/v1/users", "/openapi.json"):
                reply = films.http.get(path, headers=headers)
                assert reply.status_code == 401, path
                assert "token" in reply.json()["error"]
            refused = films.http.post("/v1/events", json={"user_id": 1, "item_id": 1})
            assert refused.status_code == 401
        right = {"authorization": "Bearer päss".encode()}
        assert films.http.get("/v1/model", headers=right).status_code == 200
        assert not any("p\u00e4ss" in line or "p\\u00e4ss" in line for line in films.log)
        assert "päss" not in repr(ServerSettings(token="päss"))


def test_a_token_may_do_what_its_roles_say_and_no_more(film_bundle: Path, tmp_path: Path) -> None:
    file = tmp_path / "tokens.toml"
    tokens = {role: add_token(file, role, roles=(role,)) for role in ("read", "write", "admin")}
    tokens["settings"] = "the one of the settings"
    calls = {
        "read": [("GET", "/v1/model"), ("POST", "/v1/recommend"), ("GET", "/metrics")],
        "write": [("POST", "/v1/events"), ("DELETE", "/v1/users/1/events")],
        "admin": [("POST", "/v1/model/reload")],
    }
    settings = {"token_file": file, "token": tokens["settings"]}
    with served(film_bundle, str(tmp_path / "e.sqlite"), **settings) as films:
        for name, token in tokens.items():
            headers = {"authorization": f"Bearer {token}"}
            for role, routes in calls.items():
                for method, path in routes:
                    body = {"user_id": 1, "item_id": 101} if path == "/v1/events" else {}
                    reply = films.http.request(method, path, json=body, headers=headers)
                    allowed = name in (role, "admin", "settings")
                    assert reply.is_success == allowed, (name, method, path, reply.text)
                    assert allowed or (reply.status_code, role in reply.text) == (403, True)
        assert films.http.get("/v1/model").status_code == 401
        assert {line.get("token") for line in films.logged(25)} == {
            "read",
            "write",
            "admin",
            "token",
            None,
        }
        assert not any(token in line for token in tokens.values() for line in films.log)


def test_a_token_that_has_sent_too_much_waits(film_bundle: Path, tmp_path: Path) -> None:
    file = tmp_path / "tokens.toml"
    slow, other = add_token(file, "slow", requests_per_minute=2), add_token(file, "other")
    with served(film_bundle, str(tmp_path / "e.sqlite"), token_file=file) as films:
        headers = {"authorization": f"Bearer {slow}"}
        replies = [films.http.get("/v1/model", headers=headers) for _ in range(3)]
        assert [reply.status_code for reply in replies] == [200, 200, 429]
        assert 1 <= int(replies[2].headers["retry-after"]) <= 30
        assert "slow has used up its requests" in replies[2].json()["error"]
        headers = {"authorization": f"Bearer {other}"}
        assert films.http.get("/v1/model", headers=headers).status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "localhost.evil.example", ""])
def test_a_server_of_this_machine_alone_answers_by_no_other_name(films: Served, host: str) -> None:
    reply = films.http.get("/v1/model", headers={"host": host})
    assert reply.status_code == 421
    assert "add the name to the server's `hosts`" in reply.json()["error"]
    assert films.http.get("/health", headers={"host": host}).status_code == 200
    for own in ("localhost", "LOCALHOST:8000", "127.0.0.1:80", "127.0.0.1", "[::1]:80", "[::1]"):
        assert films.http.get("/v1/model", headers={"host": own}).status_code == 200, own


def test_a_second_host_is_another_name(films: Served) -> None:
    with closing(HTTPConnection(films.http.base_url.host, films.http.base_url.port)) as client:
        client.putrequest("GET", "/v1/model", skip_host=True)
        for host in ("localhost", "evil.example"):
            client.putheader("host", host)
        client.endheaders()
        assert client.getresponse().status == 421


@pytest.mark.parametrize("text", ["%ff%fe", "%ed%a0%80", "%C3", "%f8%88%80%80%80"])
def test_bytes_of_a_url_that_are_no_text_are_no_id(films: Served, text: str) -> None:
    for path in (f"/v1/users/{text}/history", f"/v1/items?query={text}"):
        assert films.http.get(path).status_code == 400
    assert films.http.get("/v1/users/%C3%A9%EF%BF%BD/history").status_code == 200


def test_a_server_answers_by_the_names_that_it_was_given(film_bundle: Path, tmp_path: Path) -> None:
    state = str(tmp_path / "e.sqlite")
    with served(film_bundle, state, hosts=("Shop.example",)) as films:
        for host, status in (("shop.example:8443", 200), ("127.0.0.1", 421)):
            assert films.http.get("/v1/model", headers={"host": host}).status_code == status
    with served(film_bundle, state, host="0.0.0.0", allow_anyone=True) as films:
        assert films.http.get("/v1/model", headers={"host": "any.example"}).status_code == 200


@pytest.mark.parametrize(
    ("headers", "allowed"),
    [
        ({}, True),
        ({"sec-fetch-site": "same-origin", "origin": "http://other"}, True),
        ({"sec-fetch-site": "none"}, True),
        ({"sec-fetch-site": "cross-site"}, False),
        ({"sec-fetch-site": "same-site"}, False),
        ({"origin": "http://evil.example"}, False),
        ({"origin": "null"}, False),
        ({"origin": "http://127.0.0.1:1"}, False),
        ({"origin": "own"}, True),
    ],
)
def test_a_page_of_another_site_changes_nothing(
    films: Served, headers: dict, *, allowed: bool
) -> None:
    if headers.get("origin") == "own":
        headers = {"origin": str(films.http.base_url).rstrip("/")}
    headers = headers | {"content-type": "text/plain"}  # as a form can send without asking
    for path in ("/v1/model/reload", "/v1/events"):
        reply = films.http.post(path, content="{}", headers=headers)
        assert (reply.status_code == 403) == (not allowed), reply.text
    assert films.http.get("/v1/model", headers=headers).status_code == 200


def test_overload_is_refused_at_once_and_ends_with_the_load(
    film_bundle: Path, tmp_path: Path
) -> None:
    settings = {"max_concurrency": 2, "num_threads": 2}
    with served(film_bundle, str(tmp_path / "e.sqlite"), **settings) as films:
        answers: list[int] = []

        def reload() -> None:
            answers.append(films.http.post("/v1/model/reload").status_code)

        threads = [threading.Thread(target=reload) for _ in range(2)]
        with films.service.slot._loading:  # reloads wait for it: two of them fill the server
            for thread in threads:
                thread.start()
            deadline = time.monotonic() + 60
            while "foretaste_in_flight 2.0" not in films.http.get("/metrics").text:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            refused = films.http.post("/v1/recommend", json={})
            assert refused.status_code == 503
            assert refused.headers["retry-after"] == "1"
            assert refused.headers["x-content-type-options"] == "nosniff"
            assert "try again" in refused.json()["error"]
            assert films.http.get("/health").status_code == 200
        for thread in threads:
            thread.join()
        assert answers == [200, 200]
        assert films.http.post("/v1/recommend", json={}).status_code == 200
        assert "foretaste_shed_total 1.0" in films.http.get("/metrics").text


def test_bodies_on_their_way_are_bounded_all_together(film_bundle: Path, tmp_path: Path) -> None:
    settings = {"max_body_bytes": 1000, "max_bodies_bytes": 1500}
    with served(film_bundle, str(tmp_path / "e.sqlite"), **settings) as films, ExitStack() as stack:
        address = (films.http.base_url.host, films.http.base_url.port)
        for head in (b"Content-Length: 900", b"Transfer-Encoding: chunked"):
            sent = b"POST /v1/events HTTP/1.1\r\nHost: localhost\r\n" + head + b"\r\n\r\n"
            slow = stack.enter_context(socket.create_connection(address, timeout=30))
            slow.sendall(sent)
            time.sleep(0.1 if head == b"Content-Length: 900" else 0)
        answer = slow.recv(65536)  # of unknown length: it may take the bound of one, 1000
        assert answer.startswith(b"HTTP/1.1 503")
        body = b'{"history": [%s101]}' % (b"101, " * 130)
        headers = {"content-type": "application/json"}
        refused = films.http.post("/v1/recommend", content=body, headers=headers)
        assert refused.status_code == 503
        assert "bodies of 900 bytes are in transfer" in refused.json()["error"]
        assert films.http.get("/v1/model").status_code == 200
        assert films.http.post("/v1/recommend", json={}).status_code == 200
        stack.close()
        deadline = time.monotonic() + 30
        while films.http.post("/v1/recommend", content=body, headers=headers).status_code == 503:
            assert time.monotonic() < deadline


def test_refusals_leave_so_many_lines_a_minute_and_the_next_line_counts_the_others(
    film_bundle: Path, tmp_path: Path
) -> None:
    settings = {"token": "t", "refusals_logged_per_minute": 2}
    with served(film_bundle, str(tmp_path / "e.sqlite"), **settings) as films:
        for _ in range(7):
            assert films.http.get("/v1/model").status_code == 401
        assert films.http.get("/health").status_code == 200
        assert films.http.get("/health").status_code == 200
        lines = films.logged(4)
        assert [line["status"] for line in lines] == [401, 401, 200, 200]
        assert [line.get("refusals_not_logged") for line in lines] == [None, None, 5, None]
        text = films.http.get("/metrics", headers={"authorization": "Bearer t"}).text
        assert 'route="/v1/model",status="401"} 7.0' in text


def test_faults_outside_of_requests_leave_few_lines_of_json(films: Served) -> None:
    log: list[str] = []
    settings = ServerSettings(refusals_logged_per_minute=2)
    admission = Admission(settings, Metrics(), log.append)
    app = create_app(films.service, settings=settings, access=Access([]), admission=admission)

    async def fail() -> None:
        async with app.router.lifespan_context(app):
            for _ in range(100):
                fault = {"message": "out of files", "exception": OSError(24, "too many")}
                asyncio.get_running_loop().call_exception_handler(fault)

    asyncio.run(fail())
    causes = [json.loads(line)["cause"] for line in log]
    assert causes == ["out of files: OSError(24, 'too many')"] * 2


def test_a_store_that_fails_is_said_and_nothing_is_acknowledged(fresh_films: Served) -> None:
    with fresh_films.service.events._engine.begin() as connection:
        connection.exec_driver_sql("DROP TABLE foretaste_live_events")
    reply = fresh_films.http.post("/v1/events", json={"user_id": 1, "item_id": 1})
    assert reply.status_code == 503
    assert "does not answer" in reply.json()["error"]
    ready = fresh_films.http.get("/ready")
    assert (ready.status_code, ready.json()["store"]) == (200, "does not answer")
    assert fresh_films.http.get("/health").status_code == 200
    causes = [line.get("cause") for line in fresh_films.logged(3)]
    cause = "OperationalError: no such table: foretaste_live_events"
    assert causes == [cause, cause, None]
    text = fresh_films.http.get("/metrics").text
    for operation in ("add", "ready"):
        labels = f'{{operation="{operation}"}} 1.0'
        assert f"foretaste_store_errors_total{labels}" in text
        assert f"foretaste_store_seconds_count{labels}" in text


def test_answers_go_on_without_the_store_and_say_so(
    fresh_films: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    http, service = fresh_films.http, fresh_films.service
    before = fresh_films.recommend(user_id=1, k=3)
    http.post("/v1/events", json={"user_id": 1, "item_id": 130})
    causes: list[str] = []
    monkeypatch.setattr(service, "_report", lambda error: causes.append(cause_of(error)))
    with service.events._engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE foretaste_live_events RENAME TO aside")
    for _ in range(3):
        without = fresh_films.recommend(user_id=1, k=3)
        assert without["items"] == before["items"]
        assert without["live_events"] == 0
        assert without["notes"] == [*before["notes"], WITHOUT_STORE]
    assert causes == ["OperationalError: no such table: foretaste_live_events"] * 3
    assert http.get("/v1/users/1/recommendations").status_code == 200
    assert http.get("/v1/users/1/history").status_code == 503
    with service.events._engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE aside RENAME TO foretaste_live_events")
    again = fresh_films.recommend(user_id=1, k=3)
    assert (again["live_events"], again["notes"]) == (1, before["notes"])


class Panic(BaseException):
    """An error as native code raises it, which is not an `Exception`."""


@pytest.mark.parametrize("error", [ValueError, Panic])
def test_a_fault_of_the_server_is_answered_as_json_with_its_cause_in_the_log(
    films: Served, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    def fail() -> None:
        raise error("the cause")

    monkeypatch.setattr(films.service, "columns", fail)
    reply = films.http.get("/v1/columns")
    assert reply.status_code == 500
    assert "see its log" in reply.json()["error"]
    assert reply.headers["x-content-type-options"] == "nosniff"
    (line,) = films.logged(1)
    assert (line["route"], line["status"]) == ("/v1/columns", 500)
    assert line["cause"].startswith("Traceback")
    assert line["cause"].endswith(f"{error.__name__}: the cause\n")
    monkeypatch.undo()
    assert films.http.get("/v1/columns").status_code == 200


def test_a_request_has_an_id_in_the_answer_and_in_the_log(films: Served) -> None:
    own = films.http.get("/v1/model", headers={"x-request-id": "shop-1/a:b"})
    none = films.http.get("/v1/model")
    odd = [films.http.get("/", headers={"x-request-id": one}) for one in ('"', "x" * 129, "a b")]
    given = [reply.headers["x-request-id"] for reply in (own, none, *odd)]
    assert given[0] == "shop-1/a:b"
    assert all(re.fullmatch("[0-9a-f]{32}", one) for one in given[1:])
    assert len(set(given)) == 5
    assert [line["request_id"] for line in films.logged(5)] == given


# ---- a new model, and what is seen from outside ------------------------------------------


def test_another_version_takes_over_and_a_broken_one_does_not(tmp_path: Path) -> None:
    bundle = write_film_bundle(tmp_path / "films")
    with served(bundle, str(tmp_path / "e.sqlite")) as films:
        first = films.http.get("/v1/model").json()
        same = films.http.post("/v1/model/reload").json()
        assert same == {"version": first["version"], "previous": first["version"], "changed": False}
        write_film_bundle(bundle, seed=1, popularity=True)
        swapped = films.http.post("/v1/model/reload").json()
        assert swapped["changed"] is True
        assert swapped["previous"] == first["version"]
        assert films.recommend(user_id=1)["model_version"] == swapped["version"]
        write_film_bundle(bundle, seed=2)
        (weights,) = bundle.glob("weights*")
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
        refused = films.http.post("/v1/model/reload")
        assert refused.status_code == 409
        assert "the old version stays active" in refused.json()["error"]
        assert films.recommend(user_id=1)["model_version"] == swapped["version"]
        text = films.http.get("/metrics").text
        assert 'foretaste_reloads_total{result="refused"} 1.0' in text
        assert f'foretaste_model_info{{version="{swapped["version"]}"}} 1.0' in text


def test_versions_are_listed_activated_rolled_back_and_tried_on_some_users(
    tmp_path: Path,
) -> None:
    bundle = write_film_bundle(tmp_path / "films")
    with served(bundle, str(tmp_path / "e.sqlite")) as films:
        first = films.http.get("/v1/model").json()["version"]
        assert films.http.post("/v1/model/roll-back").status_code == 409
        write_film_bundle(bundle, seed=1)
        second = films.http.post("/v1/model/reload").json()["version"]
        listed = films.http.get("/v1/models").json()
        assert (listed["active"], listed["previous"], listed["canary"]) == (second, first, "")
        assert {one["version"] for one in listed["versions"]} == {first, second}
        assert films.http.post("/v1/model/roll-back").json()["version"] == first
        assert films.http.post(f"/v1/models/{second}/activate").json()["previous"] == first
        for wrong, status in (("0" * 12, 409), ("../films", 404), ("nonsense", 422)):
            assert films.http.post(f"/v1/models/{wrong}/activate").status_code == status
        assert films.service.events.chosen("films") == films.service.slot.choice
        tried = films.http.post(f"/v1/models/{first}/canary", json={"share": 0.5}).json()
        assert (tried["canary"], tried["canary_share"]) == (first, 0.5)
        gets = {films.recommend(user_id=user)["model_version"] for user in range(1, 40)}
        assert gets == {first, second}
        assert {films.recommend(user_id=3)["model_version"] for _ in range(5)} < gets
        text = films.http.get("/metrics").text
        counted = re.findall(r'foretaste_answers_total\{model="(\w+)",.*\} (\d+)', text)
        assert {model for model, _ in counted} == {"active", "canary"}
        assert sum(int(number) for _, number in counted) == 44
        assert films.http.post(f"/v1/models/{first}/canary", json={"share": 2}).status_code == 422
        assert (
            films.http.post(f"/v1/models/{first}/canary", json={"share": 0}).json()["canary"] == ""
        )


def test_two_servers_on_one_database_switch_together(tmp_path: Path) -> None:
    bundle, state = write_film_bundle(tmp_path / "films"), str(tmp_path / "e.sqlite")
    with served(bundle, state) as one, served(bundle, state) as other:
        one.service.publish(None)
        assert not other.service.follow()
        write_film_bundle(bundle, seed=1)
        version = one.http.post("/v1/model/reload").json()["version"]
        assert other.service.follow()
        assert other.recommend(user_id=1)["model_version"] == version
        assert f'foretaste_model_info{{version="{version}"}} 1.0' in other.http.get("/metrics").text


def test_a_folder_without_a_bundle_does_not_serve(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"manifest\.json"):
        ModelSlot(Versions(tmp_path))


def test_a_model_that_cannot_answer_a_history_does_not_serve(tmp_path: Path) -> None:
    trained = make_trained("sasrec")
    build_recommender(trained).save(tmp_path / "sound")
    load_version(tmp_path / "sound")
    trained.model.positions.weight.data.fill_(float("nan"))
    build_recommender(trained).save(tmp_path / "broken")
    with pytest.raises(BundleError, match=r"positions\.weight .* NaN"):
        load_version(tmp_path / "broken")


@pytest.mark.parametrize("raised", [IndexError, MemoryError, BaseException])
def test_whatever_a_bundle_raises_while_it_is_loaded_refuses_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raised: type[BaseException]
) -> None:
    bundle = write_film_bundle(tmp_path / "films")
    with served(bundle, str(tmp_path / "e.sqlite")) as films:
        version = films.http.get("/v1/model").json()["version"]

        def fail(_: Path) -> None:
            raise raised

        write_film_bundle(bundle, seed=1)
        monkeypatch.setattr("foretaste.serving.slot.load", fail)
        refused = films.http.post("/v1/model/reload")
        assert refused.status_code == 409
        assert raised.__name__ in refused.json()["error"]
        assert films.recommend(user_id=1)["model_version"] == version
        assert 'foretaste_reloads_total{result="refused"} 1.0' in films.http.get("/metrics").text


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_loading_can_be_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: type[BaseException]
) -> None:
    def fail(_: Path) -> None:
        raise stop

    (tmp_path / "manifest.json").write_text("{}")
    monkeypatch.setattr("foretaste.serving.slot.load", fail)
    with pytest.raises(stop):
        load_version(tmp_path)


def test_an_old_version_is_gone_at_once_and_waits_for_no_collector(tmp_path: Path) -> None:
    # An object that was frozen in the garbage collector is freed only by its last reference.
    bundle = write_film_bundle(tmp_path / "films")
    slot = ModelSlot(Versions(bundle))
    slot.current.catalogue.find_items("space", limit=5)
    slot.current.recommender.recommend(1, k=5)
    old = slot.current.recommender.trained
    parts = [weakref.ref(part) for part in (slot.current, old.model, old.events)]
    del old
    write_film_bundle(bundle, seed=1)
    gc.disable()
    try:
        slot.reload()
        assert [part() for part in parts] == [None, None, None]
    finally:
        gc.enable()


def test_the_model_says_what_it_is(films: Served) -> None:
    model = films.http.get("/v1/model").json()
    assert (model["users"], model["items"], model["bundle"]) == (40, 31, "films")
    assert model["manifest"]["model"]["kind"] == "item_knn"
    assert model["report"]["metrics"]["ndcg_at_10"] == 0.25


def test_each_request_is_one_line_of_json_without_ids(films: Served) -> None:
    films.http.get("/v1/users/17/recommendations")
    films.http.get("/v1/nobody?token=secret")
    known, none = films.logged(2)
    assert known.keys() >= {"time", "method", "route", "status", "ms"}
    assert known["route"] == "/v1/users/{user_id}/recommendations"
    assert known["user_known"] is True
    assert (none["route"], none["status"]) == ("none", 404)
    said = [value for key, value in known.items() if key not in ("time", "ms", "request_id")]
    assert "17" not in str(said)
    assert all(line.endswith("\n") and "secret" not in line for line in films.log)


def test_prometheus_counts_by_route_and_not_by_id(fresh_films: Served) -> None:
    for user in range(1, 6):
        fresh_films.http.get(f"/v1/users/{user}/recommendations")
    fresh_films.http.post("/v1/events", json={"user_id": 1, "item_id": 120})
    text = fresh_films.http.get("/metrics").text
    route = "/v1/users/{user_id}/recommendations"
    assert f'foretaste_requests_total{{method="GET",route="{route}",status="200"}} 5.0' in text
    assert f'foretaste_request_seconds_count{{route="{route}"}} 5.0' in text
    assert "foretaste_events_stored_total 1.0" in text
    assert 'foretaste_answers_total{model="active",source="model"} 5.0' in text


def test_prometheus_counts_refusals_by_route_and_what_the_process_takes(
    film_bundle: Path, tmp_path: Path
) -> None:
    with served(film_bundle, str(tmp_path / "e.sqlite"), token="t", max_body_bytes=99) as films:
        films.http.get("/v1/users/7/history")
        films.http.put("/v1/recommend")
        headers = {"authorization": "Bearer t"}
        films.http.post("/v1/events", content=b"x" * 100, headers=headers)
        text = films.http.get("/metrics", headers=headers).text
        for labels in (
            'method="GET",route="/v1/users/{user_id}/history",status="401"',
            'method="PUT",route="/v1/recommend",status="401"',
            'method="POST",route="/v1/events",status="413"',
        ):
            assert f"foretaste_requests_total{{{labels}}} 1.0" in text
        assert re.search(r"^process_resident_memory_bytes [1-9]", text, re.MULTILINE)
        assert re.search(r"^process_open_fds [1-9]", text, re.MULTILINE)


def test_openapi_describes_every_route_and_its_errors(films: Served) -> None:
    api = films.http.get("/openapi.json").json()
    assert {"/v1/recommend", "/v1/events", "/v1/model/reload", "/health"} <= api["paths"].keys()
    replies = api["paths"]["/v1/recommend"]["post"]["responses"]
    for status, name in {"200": "RecommendReply", "503": "ErrorReply"}.items():
        schema = replies[status]["content"]["application/json"]["schema"]
        assert schema["$ref"].endswith(f"/{name}")


def test_answers_are_what_the_description_promises(films: Served) -> None:
    for asked in ({"user_id": 1, "explain": True}, {"history": ["nope", 101]}, {}):
        reply = films.http.post("/v1/recommend", json=asked)
        assert reply.headers["content-type"] == "application/json"
        assert RecommendReply.model_validate(reply.json()).model_dump(mode="json") == reply.json()
    similar = films.http.get("/v1/items/120/similar").json()
    assert SimilarReply.model_validate(similar).model_dump(mode="json") == similar


def test_the_page_is_served_under_a_policy_that_allows_no_foreign_code(films: Served) -> None:
    page = films.http.get("/")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "http" not in page.text.replace("http-equiv", "")
    again = films.http.get("/", headers={"if-none-match": page.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert films.http.get("/v1/model").headers["cache-control"] == "no-store"


def test_two_servers_in_one_process_do_not_mix(film_bundle: Path, tmp_path: Path) -> None:
    with ExitStack() as stack:
        one, two = (
            stack.enter_context(served(film_bundle, str(tmp_path / f"{n}.sqlite"))) for n in "ab"
        )
        one.http.post("/v1/events", json={"user_id": 1, "item_id": 120})
        assert two.recommend(user_id=1)["live_events"] == 0
        assert "foretaste_events_stored_total 0.0" in two.http.get("/metrics").text


def test_of_an_invalid_body_no_more_errors_are_read_than_a_sentence_needs(
    films: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A body of 1 MB may have 800,000 of them, and no other request is answered meanwhile.
    read: list[int] = []

    def count(problems: list, *more: object) -> list[tuple[str, str, object]]:
        read.append(len(problems))
        return findings(problems, *more)

    monkeypatch.setattr("foretaste.serving.api.findings", count)
    for body in (
        dict.fromkeys(map(str, range(5_000)), 1),
        {"rules": {"where": {"year": {"one_of": [{}] * 5_000}}}},
        {"rules": {"where": {str(n): {"is": 1} for n in range(5_000)}}},
    ):
        assert films.http.post("/v1/recommend", json=body).status_code == 422
    assert read == [10, 5, 1]  # of ten unknown names, the first value with four types, the length
    assert max(read) <= READ_PROBLEMS

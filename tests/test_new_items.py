"""New items: given by their features, they are ranked as if the catalogue had them."""

import math
import re
from contextlib import closing
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Literal

import numpy as np
import polars as pl
import pytest
import torch

import foretaste as ft
from foretaste.data.batch import Queries
from foretaste.data.features import fit_features
from foretaste.data.interactions import Interactions
from foretaste.data.tasks import Task
from foretaste.models.catalogue import ModelConfig, TwoStage, TwoStageConfig, build_model, judge_new
from foretaste.models.layers.field_ranker import FieldRanker
from foretaste.models.two_tower import TwoTower
from foretaste.serving.answer import Answer, Recommendation
from foretaste.serving.catalogue import Catalogue
from foretaste.serving.messages import Item, RecommendRequest
from foretaste.serving.metrics import Metrics
from foretaste.serving.recommender import Recommender
from foretaste.serving.rules import Condition, Diversity, ItemLabels, Rules, labels_of_new
from foretaste.serving.service import Service
from foretaste.serving.settings import ServerSettings
from foretaste.serving.slot import ModelSlot
from foretaste.serving.state import open_live_events
from foretaste.serving.versions import Versions
from foretaste.training.trained import Trained
from tests.worlds import every_vector

NUM_ITEMS = 12
COLD = {"genre": "g2", "tags": "t0|t2", "year": 7.0, "image": [0.5, -1.0]}
"""Of item 11, which the catalogue has without an event."""
OTHER = {"genre": "g0", "tags": "t1", "year": 1.0, "image": [1.0, 1.0]}
SCHEMA = ft.FeatureSchema(
    user={"taste": ft.CategoricalField()},
    item={
        "genre": ft.CategoricalField(),
        "tags": ft.MultiField(separator="|"),
        "year": ft.NumericField(transform="standardise"),
        "image": ft.VectorField(),
    },
)
CLICK, BUY = Task(name="click"), Task(name="buy", column="buy")
WIDE = {"embedding_dim": 4, "init_std": 0.7}
RANKERS: dict[str, ModelConfig] = {
    "deepfm": ft.DeepFMConfig(hidden=(8,), **WIDE),
    "din": ft.DINConfig(hidden=(8,), **WIDE),
    "din, behind a gate": ft.DINConfig(hidden=(8,), fusion="gate", **WIDE),
    "shared bottom": ft.SharedBottomConfig(tasks=(CLICK, BUY), **WIDE),
    "mmoe, without ids": ft.MMoEConfig(tasks=(CLICK, BUY), item_id=False, **WIDE),
}
TOWERS = ft.TwoTowerConfig(embedding_dim=4)


def make_events() -> Interactions:
    draw = np.random.default_rng(0)
    num = 160
    frame = pl.DataFrame(
        {
            "user_id": draw.integers(10, size=num),
            "item_id": draw.integers(NUM_ITEMS - 1, size=num),
            "buy": draw.integers(2, size=num),
        }
    )
    return ft.read_interactions(
        frame,
        columns=("buy",),
        users=pl.DataFrame({"user_id": range(10), "taste": [f"u{user % 2}" for user in range(10)]}),
        items=pl.DataFrame(
            {
                "item_id": range(NUM_ITEMS),
                "genre": [f"g{item % 3}" for item in range(NUM_ITEMS)],
                "tags": [f"t{item % 2}|t{item % 4}" for item in range(NUM_ITEMS - 1)] + ["t0|t2"],
                "year": [float(item % 5) for item in range(NUM_ITEMS - 1)] + [7.0],
                "image": [*draw.normal(size=(NUM_ITEMS - 1, 2)).tolist(), [0.5, -1.0]],
            }
        ),
    )


def make(config: ModelConfig, schema: ft.FeatureSchema = SCHEMA) -> Recommender:
    """Make a model with wide first weights answer."""
    events = make_events()
    features = fit_features(schema, events)
    torch.manual_seed(0)
    model = build_model(
        config, num_users=events.num_users, num_items=events.num_items, features=features
    ).eval()
    for part in {model.first_stage, model.second_stage}:
        if part.learns_by == "events":
            part.learn(events)
        if isinstance(part, FieldRanker | TwoTower):
            part.begin(events)
            part.learn_new_users(events)
    return ft.build_recommender(
        Trained(config=config, model=model, events=events, features=features, seed=0)
    )


def row_of(answer: Answer, item_id: object) -> Recommendation:
    (row,) = [row for row in answer.rows if row.item_id == item_id]
    return row


def same(one: Recommendation, other: Recommendation) -> bool:
    return (one.score, dict(one.predictions)) == (
        pytest.approx(other.score, abs=1e-5),
        pytest.approx(dict(other.predictions), abs=1e-5),
    )


@pytest.mark.parametrize("config", [*RANKERS.values(), TOWERS], ids=[*RANKERS, "two towers"])
@pytest.mark.parametrize(
    "who",
    [{"user_id": 3}, {"history": [1, 4]}, {"features": {"taste": "u1"}}],
    ids=["user", "history", "profile"],
)
def test_a_new_item_is_ranked_like_one_of_the_catalogue_that_has_its_features(
    config: ModelConfig, who: dict
) -> None:
    answer = make(config).recommend(
        **who, k=30, exclude_seen=False, new_items={"twin": COLD, "other": OTHER}
    )
    assert len(answer.rows) == NUM_ITEMS + 2
    score = [row.score for row in answer.rows]
    assert score == sorted(score, reverse=True)
    twin, cold, other = (row_of(answer, item) for item in ("twin", 11, "other"))
    assert same(twin, cold)
    assert not same(other, cold)
    assert (twin.source, twin.attributes, answer.unknown_items) == ("features", COLD, ())
    assert cold.source == answer.source


@pytest.mark.parametrize("config", RANKERS.values(), ids=RANKERS)
def test_behind_a_retriever_that_knows_ids_alone_the_ranker_judges_new_items(
    config: ModelConfig,
) -> None:
    two_stage = TwoStageConfig(retriever=ft.ItemKNNConfig(), ranker=config, candidates=3)
    recommender = make(two_stage)
    answer = recommender.recommend(3, k=30, exclude_seen=False, new_items={"twin": COLD})
    model = recommender.trained.model
    assert isinstance(model, TwoStage)
    alone = ft.build_recommender(
        Trained(
            config=config,
            model=model.ranker,
            events=recommender.trained.events,
            features=recommender.trained.features,
            seed=0,
        )
    ).recommend(3, k=30, exclude_seen=False)
    assert same(row_of(answer, "twin"), row_of(alone, 11))
    judged = [row for row in answer.rows if row.predictions]
    assert len(judged) == 4
    assert [row.score for row in judged] == sorted((row.score for row in judged), reverse=True)
    assert answer.rows[:4] == tuple(judged)
    assert {row.item_id for row in answer.rows} == {*range(11), "twin"}


@pytest.mark.parametrize("retriever", [TOWERS, ft.ItemKNNConfig()], ids=["places", "cannot"])
def test_a_retriever_with_a_say_has_it_of_new_items_too(retriever: ModelConfig) -> None:
    recommender = make(
        TwoStageConfig(
            retriever=retriever, ranker=RANKERS["deepfm"], candidates=4, retriever_weight=3.0
        )
    )
    row = row_of(recommender.recommend(history=[1, 4], k=1000, new_items={"n": OTHER}), "n")
    trained, queries = recommender.trained, Queries.of_histories([[1, 4]])
    model = trained.model
    assert isinstance(model, TwoStage)
    assert trained.features is not None
    assert trained.features.item is not None
    table = trained.features.item.encode(pl.DataFrame({n: [v] for n, v in OTHER.items()}))
    with torch.inference_mode():
        own = float(judge_new(model.ranker, queries, table).score_BC[0, 0])
        if isinstance(model.retriever, TwoTower):
            first = model.retriever.item_from_features(table) @ model.retriever.encode(queries)[0]
        else:
            first_I = model.retriever.score(queries)[0, trained.known_I]
            first = first_I[[i for i in range(len(first_I)) if i not in (1, 4)]].min()
    assert row.score == pytest.approx(own + 3 * float(first), abs=1e-5)


def test_new_items_are_ranked_with_the_allowed_ones_and_known_ones_as_the_catalogue_has_them() -> (
    None
):
    recommender = make(RANKERS["din"])
    new = {"a": COLD, "b": OTHER, 5: COLD, "c": {"genre": None}}
    answer = recommender.recommend(3, allow=[], new_items=new)
    assert {row.item_id for row in answer.rows} == {"a", "b"}
    assert answer.unknown_items == ("c",)
    with pytest.raises(ft.DataError, match=r"'gender' is not a feature of items; .*mean 'genre'"):
        recommender.recommend(3, new_items={"a": {"gender": "g1"}})


WHERES: dict[str, dict[str, dict[str, object]]] = {
    "equals": {"genre": {"equals": "g2"}},
    "another": {"genre": {"equals": "g0"}},
    "several": {"tags": {"contains": ["t0", "t2"]}, "genre": {"one_of": ["g1", "g2"]}},
    "none of": {"tags": {"none_of": ["t2"]}},
    "at least": {"year": {"at_least": 5}},
    "at most": {"year": {"at_most": 5}},
}


@pytest.mark.parametrize("where", WHERES.values(), ids=WHERES)
@pytest.mark.parametrize("config", [RANKERS["deepfm"], TOWERS], ids=["ranker", "towers"])
def test_a_filter_treats_a_new_item_as_one_of_the_catalogue_that_says_the_same(
    config: ModelConfig, where: dict[str, dict[str, object]]
) -> None:
    asked = {"user_id": 3, "k": 30, "exclude_seen": False, "new_items": {"twin": COLD, "o": OTHER}}
    recommender = make(config)
    everything = recommender.recommend(**asked)
    answer = recommender.recommend(**asked, rules=Rules.model_validate({"where": where}))
    found = {row.item_id for row in answer.rows}
    assert ("twin" in found) == (11 in found)
    assert ("o" in found) != ("twin" in found)
    kept = [row for row in everything.rows if row.item_id in found]
    assert [row.item_id for row in answer.rows] == [row.item_id for row in kept]
    assert all(map(same, answer.rows, kept))
    assert answer.unknown_items == ()


ITEMS = make_events().item_table
assert ITEMS is not None


def labels_by_hand(row: Recommendation, names: tuple[str, ...]) -> set[tuple[str, str]]:
    said = row.attributes if isinstance(row.item_id, str) else ITEMS.row(row.item_id, named=True)
    return {(name, part) for name in names for part in str(said[name]).split("|")}


NEW = {"twin": COLD, "o": OTHER, "p": {"genre": "g9", "tags": "t9|t1"}}
"""g9 and t9 are of no item of the catalogue."""


@pytest.mark.parametrize("caps", [{"genre": 1}, {"tags": 1}, {"genre": 2, "tags": 2}])
@pytest.mark.parametrize("config", [RANKERS["din"], TOWERS], ids=["ranker", "towers"])
def test_caps_count_new_items_and_those_of_the_catalogue_together(
    config: ModelConfig, caps: dict[str, int]
) -> None:
    recommender = make(config)
    asked = {"history": [1, 4], "exclude_seen": False, "new_items": NEW}
    used: dict[tuple[str, str], int] = {}
    expected = []
    for row in recommender.recommend(**asked, k=30).rows:
        labels = labels_by_hand(row, tuple(caps))
        if all(used.get(label, 0) < caps[label[0]] for label in labels):
            expected.append(row)
            used |= {label: used.get(label, 0) + 1 for label in labels}
    for k in (1, 3, 30):
        answer = recommender.recommend(**asked, k=k, rules=Rules(caps=caps))
        assert [row.item_id for row in answer.rows] == [row.item_id for row in expected[:k]]
        assert all(map(same, answer.rows, expected))


@pytest.mark.parametrize("by", ["vectors", ("genre", "tags")], ids=["vectors", "columns"])
def test_diversity_of_new_items_equals_the_slow_computation(
    by: Literal["vectors"] | tuple[str, ...],
) -> None:
    recommender = make(TOWERS)
    new = {"o": OTHER, "p": NEW["p"]}  # a copy of item 11 would tie with it but for rounding
    asked = {"history": [1, 4], "exclude_seen": False, "new_items": new}
    rows = recommender.recommend(**asked, k=30).rows
    score = np.array([row.score for row in rows])
    features, model = recommender.trained.features, recommender.trained.model
    assert isinstance(model, TwoTower)
    assert features is not None
    assert features.item is not None

    def vector(row: Recommendation) -> np.ndarray:
        if isinstance(row.item_id, int):
            return every_vector(model)[row.item_id].detach().numpy()
        table = features.item.encode(pl.DataFrame({n: [v] for n, v in row.attributes.items()}))
        return model.item_from_features(table)[0].detach().numpy()

    def alike(one: Recommendation, other: Recommendation) -> float:
        if by == "vectors":
            a, b = vector(one), vector(other)
            return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
        own, its = (labels_by_hand(row, ("genre", "tags")) for row in (one, other))
        return len(own & its) / len(own | its)

    height = (score - score[-1]) / (score[0] - score[-1])
    chosen: list[int] = []
    while len(chosen) < 8:
        gain = [
            0.3 * height[at] - 0.7 * max((alike(row, rows[other]) for other in chosen), default=0.0)
            for at, row in enumerate(rows)
        ]
        left = [at for at in range(len(rows)) if at not in chosen]
        chosen.append(max(left, key=lambda at: gain[at]))
    rules = Rules(diversity=Diversity(relevance=0.3, by=by))
    answer = recommender.recommend(**asked, k=8, rules=rules)
    assert [row.item_id for row in answer.rows] == [rows[at].item_id for at in chosen]
    assert chosen != sorted(chosen)


def test_vectors_that_new_items_have_not_are_refused_and_columns_named_instead() -> None:
    recommender = make(
        TwoStageConfig(retriever=ft.MFConfig(), ranker=RANKERS["deepfm"], candidates=4)
    )
    spread = Rules(diversity=Diversity())
    assert len(recommender.recommend(history=[1], k=3, rules=spread).rows) == 3
    with pytest.raises(ft.DataError, match=r"retriever cannot embed new_items.*name columns"):
        recommender.recommend(history=[1], k=3, rules=spread, new_items=NEW)
    with pytest.raises(ft.DataError, match="this model has no item vectors"):
        make(RANKERS["deepfm"]).recommend(history=[1], k=3, rules=spread, new_items=NEW)
    by_genre = Rules(diversity=Diversity(by=("genre",)))
    assert len(recommender.recommend(history=[1], k=3, rules=by_genre, new_items=NEW).rows) == 3
    # none of them is left by the filter, so none needs a vector
    other = spread.model_copy(update={"where": {"genre": Condition(equals="g1")}})
    assert recommender.recommend(history=[1], k=3, rules=other, new_items=NEW).rows


def test_any_column_of_the_items_may_be_given_even_if_the_model_does_not_read_it() -> None:
    schema = ft.FeatureSchema(item={"genre": ft.CategoricalField()})
    recommender = make(ft.DeepFMConfig(hidden=(8,), **WIDE), schema)
    told = {"a": {"genre": "g1", "year": 9}, "b": {"genre": "g1", "year": 1}, "c": {"genre": "g1"}}
    rules = Rules(where={"year": Condition(at_least=7)})
    answer = recommender.recommend(3, k=30, new_items=told, rules=rules, exclude_seen=False)
    assert {row.item_id for row in answer.rows} == {11, "a"}  # whose year is 7
    assert row_of(answer, "a").attributes == told["a"]
    answer = recommender.recommend(3, k=30, new_items=told, exclude_seen=False)
    assert row_of(answer, "a").attributes == told["a"]
    assert row_of(answer, "a").score == row_of(answer, "c").score
    mute = recommender.recommend(3, new_items={"a": {"year": 9}})
    assert mute.unknown_items == ("a",)
    assert any("of items this model reads genre" in note for note in mute.notes)
    with pytest.raises(ft.DataError, match=r"column 'year', which holds .*; the new item 'd' has"):
        recommender.recommend(3, new_items={"d": {"genre": "g1", "year": "new"}}, rules=rules)
    told = {"a": {"genre": "g1"}}
    where = {"genre": Condition(equals="g2")}
    nobody = recommender.recommend(history=[1], k=30, new_items=told, rules=Rules(where=where))
    assert nobody.rows
    assert nobody.unknown_items == ()
    assert not any("had no influence" in note for note in nobody.notes)


@pytest.mark.parametrize(
    ("column", "told", "asked"),
    [
        (pl.Series([date(2024, 1, 1), None]), "2024-02-29", {"at_least": "2024-02-01"}),
        (pl.Series([date(2024, 1, 1), None]), date(2024, 2, 29), {"equals": "2024-02-29"}),
        (
            pl.Series([datetime(2024, 1, 1, tzinfo=UTC)] * 2),
            "2024-02-29T13:00:00+02:00",
            {"at_least": "2024-02-29T11:00:00", "at_most": "2024-02-29T11:00:00"},
        ),
        (pl.Series([True, False]), False, {"equals": False}),
        (pl.Series([1994, 1995]), 1994.0, {"equals": "1994"}),
        (pl.Series([1994, 1995]), "1994", {"one_of": [1994]}),
        (pl.Series([[1, 2], [3]]), [2, 5], {"contains": [2, 5]}),
        (pl.Series([["a"], []]), "b", {"contains": "b"}),
        (pl.Series(["a|b", "b|a"]), ["c", "a"], {"contains": ["c", "a"]}),
        (pl.Series(["x", "y"], dtype=pl.Categorical), "z", {"equals": "z"}),
        (pl.Series([1.5, None]), None, {"none_of": [1.5]}),
        (pl.Series([1.5, None]), math.nan, {"none_of": [1.5]}),
    ],
    ids=str,
)
def test_a_value_is_accepted_in_any_common_spelling(
    column: pl.Series, told: object, asked: dict[str, object]
) -> None:
    labels = ItemLabels(pl.DataFrame({"c": column}), num_items=2)
    where = {"c": Condition.model_validate(asked)}
    new = labels_of_new(labels, {"n": {"c": told}}, ("c",))
    assert new.matching(where).tolist() == [True]


@pytest.mark.parametrize(
    ("column", "told"),
    [
        (pl.Series([True, False]), "maybe"),
        (pl.Series([1, 2]), "many"),
        (pl.Series([1, 2]), [1]),
        (pl.Series([date(2024, 1, 1)] * 2), "yesterday"),
        (pl.Series(["x", "y"]), {"a": 1}),
        (pl.Series([[1, 2], [3]]), ["one"]),
        (pl.Series(["x", "y"]), b"x"),
    ],
    ids=str,
)
def test_a_value_that_the_column_cannot_hold_is_refused_by_name(
    column: pl.Series, told: object
) -> None:
    labels = ItemLabels(pl.DataFrame({"c": column}), num_items=2)
    with pytest.raises(ft.DataError, match=r"column 'c', which holds .* new item 'n' has"):
        labels_of_new(labels, {"n": {"c": told}}, ("c",))


@pytest.mark.parametrize(
    ("config", "user", "why"),
    [
        (ft.NeuMFConfig(factors=4), 3, "reads none of items"),
        (RANKERS["din"], None, "the answer is the most popular items"),
    ],
)
def test_where_nothing_can_be_said_of_a_new_item_the_answer_says_so(
    config: ModelConfig, user: int | None, why: str
) -> None:
    answer = make(config).recommend(user, k=3, new_items={"a": COLD})
    assert answer.unknown_items == ("a",)
    assert any("had no influence" in note and why in note for note in answer.notes)
    assert all(isinstance(row.item_id, int) for row in answer.rows)


def test_a_new_item_shows_its_given_values_in_the_columns_that_items_show() -> None:
    events = ft.read_interactions(
        pl.DataFrame({"user_id": [1], "item_id": [1]}),
        items=pl.DataFrame({"item_id": [1], "title": ["One"], "genre": ["g0"]}),
    )
    catalogue = Catalogue(events)
    told = {"title": "New", "genre": "g1", "image": [1.0]}
    assert catalogue.describe("n", told) == Item(
        item_id="n", title="New", attributes={"genre": "g1"}
    )
    assert catalogue.describe("n") == Item(item_id="n", title="n", attributes={})
    assert catalogue.describe(1, told).title == "One"


def test_over_http_new_items_have_their_features_in_a_saved_model_too(tmp_path: Path) -> None:
    recommender = make(RANKERS["mmoe, without ids"])
    recommender.save(tmp_path / "bundle")
    slot = ModelSlot(Versions(tmp_path / "bundle"))
    with closing(open_live_events("sqlite://")) as live:
        service = Service(
            slot, live, ServerSettings(), bundle=tmp_path / "bundle", metrics=Metrics()
        )
        asked = {"user_id": "3", "k": 20, "new_items": {"a": COLD, "b": OTHER}, "explain": True}
        reply = service.recommend(RecommendRequest.model_validate(asked))
        rules = {"where": {"genre": {"none_of": "g0"}}, "caps": {"genre": 1}}
        ruled = service.recommend(RecommendRequest.model_validate(asked | {"rules": rules}))
    assert [item.attributes["genre"] for item in ruled.items if item.item_id == "a"] in ([], ["g2"])
    assert sorted(str(item.attributes["genre"]) for item in ruled.items) == ["g1", "g2"]
    expected = recommender.recommend(3, k=20, new_items={"a": COLD, "b": OTHER})
    # by item, as two are level but for rounding
    scores = {str(row.item_id): row.score for row in expected.rows}
    assert {row.item_id: row.score for row in reply.items} == pytest.approx(scores, abs=1e-6)
    (found,) = [row for row in reply.items if row.item_id == "a"]
    assert found.source == "features"
    assert found.attributes["genre"] == "g2"
    assert found.predictions == pytest.approx(dict(row_of(expected, "a").predictions), abs=1e-6)


def notes_of(answer: ft.Answer) -> str:
    return " ".join(note for note in answer.notes if "no influence" in note)


@pytest.fixture(scope="module")
def tower() -> ft.Recommender:
    schema = ft.FeatureSchema(item={"genre": ft.CategoricalField()})
    return make(TOWERS, schema)


@pytest.mark.parametrize(
    ("item_id", "features", "said"),
    [
        ("new", {"genre": "g1"}, ""),
        ("new", {"genre": "g1", "year": None}, "year had no influence: of items this model reads"),
        ("new", {"genre": "G1 "}, "genre = 'G1 ' had no influence: .* no such value .*has 'g1'"),
        ("new", {"genre": "opera"}, "genre = 'opera' had no influence: training has no such value"),
        ("new", {"genre": None}, "of items had no influence: all are missing"),
        ("new", {"genre": math.nan, "year": ""}, "of items had no influence: all are missing"),
        ("new", {"year": 9}, "year had no influence: of items this model reads genre"),
        (3, {"genre": "g1"}, "item 3 is in training"),
    ],
)
def test_each_reason_why_a_feature_had_no_influence_is_said(
    tower: ft.Recommender, item_id: object, features: dict[str, object], said: str
) -> None:
    try:
        notes = notes_of(tower.similar(item_id, 3, features=features))
    except ft.DataError as error:  # nothing is known of it
        notes = str(error)
    assert re.search(said, notes) if said else not notes
    asked = tower.recommend(history=[1], k=3, new_items={item_id: features})
    if "year" not in features or "of items had" in said:  # rules may read other columns
        assert re.search(said.replace("item 3 is", "new items 3 are"), notes_of(asked))


def test_a_model_that_reads_no_features_says_that() -> None:
    recommender = make(ft.MFConfig(embedding_dim=4))
    with pytest.raises(ft.DataError, match="this model reads none of items here"):
        recommender.similar("new", 3, features={"genre": "g1"})
    told = recommender.recommend(history=[1], k=3, new_items={"new": {"genre": "g1"}})
    assert "this model reads none of items here" in notes_of(told)
    assert "none of users here" in notes_of(recommender.recommend("u", features={"age": 3}))
    assert "none of the context here" in notes_of(recommender.recommend(3, context={"hour": 3}))

"""Items that no table has: told by their features, they are ranked as if the catalogue had them."""

from contextlib import closing
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

import foretaste as ft
from foretaste.data.batch import Queries
from foretaste.data.features import fit_features
from foretaste.data.interactions import Interactions
from foretaste.data.tasks import Task
from foretaste.models.catalogue import ModelConfig, TwoStageConfig, build_model
from foretaste.models.interface import ClosedForm
from foretaste.models.layers.field_ranker import FieldRanker
from foretaste.models.two_stage import TwoStage, first_stage, judge_new, second_stage
from foretaste.models.two_tower import TwoTower
from foretaste.serving.answer import Answer, Recommendation
from foretaste.serving.messages import RecommendRequest
from foretaste.serving.metrics import Metrics
from foretaste.serving.recommender import Recommender
from foretaste.serving.rules import Rules
from foretaste.serving.service import Service
from foretaste.serving.settings import ServerSettings
from foretaste.serving.slot import ModelSlot, load_version
from foretaste.serving.state import open_live_events
from foretaste.training.trained import Trained

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


def make(config: ModelConfig) -> Recommender:
    """Make a model with wide first weights answer."""
    events = make_events()
    features = fit_features(SCHEMA, events)
    torch.manual_seed(0)
    model = build_model(
        config, num_users=events.num_users, num_items=events.num_items, features=features
    ).eval()
    for part in {first_stage(model), second_stage(model)}:
        if isinstance(part, ClosedForm):
            part.learn(events)
        if isinstance(part, FieldRanker | TwoTower):
            part.begin(events)
            part.learn_newcomers(events)
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


def test_who_is_ranked_beside_what_is_allowed_and_what_the_catalogue_has_is_left_to_it() -> None:
    recommender = make(RANKERS["din"])
    new = {"a": COLD, "b": OTHER, 5: COLD, "c": {"genre": None}}
    answer = recommender.recommend(3, allow=[], new_items=new)
    assert {row.item_id for row in answer.rows} == {"a", "b"}
    assert answer.unknown_items == ("c",)
    with pytest.raises(ft.DataError, match=r"'gender' is no feature of items; .*mean 'genre'"):
        recommender.recommend(3, new_items={"a": {"gender": "g1"}})
    with pytest.raises(ft.DataError, match="rules look at the item table"):
        recommender.recommend(3, new_items=new, rules=Rules(caps={"genre": 1}))


@pytest.mark.parametrize(
    ("config", "user"), [(ft.NeuMFConfig(factors=4), 3), (RANKERS["din"], None)]
)
def test_where_nothing_can_be_said_of_a_new_item_the_answer_says_so(
    config: ModelConfig, user: int | None
) -> None:
    answer = make(config).recommend(user, k=3, new_items={"a": COLD})
    assert answer.unknown_items == ("a",)
    assert any("had no influence" in note for note in answer.notes)
    assert all(isinstance(row.item_id, int) for row in answer.rows)


def test_over_http_new_items_have_their_features_in_a_saved_model_too(tmp_path: Path) -> None:
    recommender = make(RANKERS["mmoe, without ids"])
    recommender.save(tmp_path / "bundle")
    slot = ModelSlot(lambda: load_version(tmp_path / "bundle"))
    with closing(open_live_events("sqlite://")) as live:
        service = Service(
            slot, live, ServerSettings(), bundle=tmp_path / "bundle", metrics=Metrics()
        )
        asked = {"user_id": "3", "k": 20, "new_items": {"a": COLD, "b": OTHER}, "explain": True}
        reply = service.recommend(RecommendRequest.model_validate(asked))
    expected = recommender.recommend(3, k=20, new_items={"a": COLD, "b": OTHER})
    assert [row.item_id for row in reply.items] == [str(row.item_id) for row in expected.rows]
    (found,) = [row for row in reply.items if row.item_id == "a"]
    assert found.source == "features"
    assert found.predictions == pytest.approx(dict(row_of(expected, "a").predictions), abs=1e-6)

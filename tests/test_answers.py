"""Every model answers known users, new users and given histories, and none raises an error."""

import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest

import foretaste as ft
from foretaste.data.features_schema import FeatureSchema, MultiField, NumericField
from foretaste.models.bert4rec import BERT4RecConfig
from foretaste.models.catalogue import ModelConfig
from foretaste.models.lightgcn import LightGCNConfig
from foretaste.models.mf import MFConfig
from foretaste.models.pinsage import PinSageConfig
from foretaste.models.sasrec import SASRecConfig
from foretaste.models.two_tower import TwoTowerConfig
from foretaste.training.settings import TrainingConfig

SCHEMA = FeatureSchema(
    user={"age": NumericField()}, item={"genres": MultiField(), "length": NumericField()}
)
PLACES = {"two_tower", "two_tower with history", "pinsage", "two_stage"}
"""Models that give an item a vector by its features."""
READS = {*PLACES, "deepfm", "din", "shared_bottom", "mmoe"}
"""Models that read features of items."""
READS_USERS = READS | {"two_stage behind sasrec"}
MODELS: dict[str, ModelConfig] = {
    "mf": MFConfig(embedding_dim=16),
    "two_tower": TwoTowerConfig(embedding_dim=16),
    "two_tower with history": TwoTowerConfig(embedding_dim=16, history="mean"),
    "sasrec": SASRecConfig(embedding_dim=16, num_blocks=1, max_len=10),
    "bert4rec": BERT4RecConfig(embedding_dim=16, num_blocks=1, max_len=10),
    "lightgcn": LightGCNConfig(embedding_dim=16),
    "pinsage": PinSageConfig(embedding_dim=16, id_dropout=0.3, cold_share=0.3),
    "neumf": ft.NeuMFConfig(factors=8),
    "deepfm": ft.DeepFMConfig(hidden=(16,), id_dropout=0.3),
    "din": ft.DINConfig(hidden=(16,), id_dropout=0.3, init_std=0.3),
    "shared_bottom": ft.SharedBottomConfig(bottom_hidden=(32,), tower_hidden=(), id_dropout=0.3),
    "mmoe": ft.MMoEConfig(expert_hidden=(16,), id_dropout=0.3),
    "als": ft.ImplicitALSConfig(factors=8),
    "ease": ft.EASEConfig(l2=10),
    "item_knn": ft.ItemKNNConfig(neighbours=10),
    "popularity": ft.PopularityConfig(),
    "two_stage": ft.TwoStageConfig(
        retriever=TwoTowerConfig(embedding_dim=16, history="mean"),
        ranker=ft.DINConfig(embedding_dim=8, hidden=(16,), id_dropout=0.2, init_std=0.3),
        candidates=12,
    ),
    "two_stage behind sasrec": ft.TwoStageConfig(
        retriever=SASRecConfig(embedding_dim=16, num_blocks=1, max_len=10),
        ranker=ft.DINConfig(embedding_dim=8, hidden=(16,), id_dropout=0.2, init_std=0.3),
        candidates=24,
    ),
}
TRAINING = TrainingConfig(
    epochs=30, batch_events=64, learning_rate=0.02, warmup_steps=5, device="cpu"
)
GENRES, ITEMS_EACH, USERS = ("Comedy", "Drama", "Horror"), 8, 60
SILENT = "film-2-7"
"""It is in the item table and has no event."""


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> ft.Split:
    """Young users see comedies, old ones horror, the others dramas: five films of one genre."""
    rng = np.random.default_rng(0)
    rows = [
        (f"user-{user}", f"film-{user % 3}-{film}", 1_000 * user + place)
        for user in range(USERS)
        for place, film in enumerate(rng.permutation(ITEMS_EACH)[:6].tolist())
    ]
    rows = [row for row in rows if row[1] != SILENT]
    ages = [20.0 + 20 * (user % 3) + float(rng.normal()) for user in range(USERS)]
    films = [(genre, film) for genre in range(3) for film in range(ITEMS_EACH)]
    events = ft.read_interactions(
        pl.DataFrame(rows, schema=["user", "item", "timestamp"], orient="row"),
        user="user",
        item="item",
        timestamp="timestamp",
        users=pl.DataFrame({"user": [f"user-{user}" for user in range(USERS)], "age": ages}),
        items=pl.DataFrame(
            {
                "item": [f"film-{genre}-{film}" for genre, film in films],
                "genres": [[GENRES[genre]] for genre, _ in films],
                "length": [90.0 + film for _, film in films],
            }
        ),
    )
    return ft.leave_last_split(events)


@pytest.fixture(scope="module", params=MODELS, ids=str)
def served(
    request: pytest.FixtureRequest, split: ft.Split, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, ft.Recommender]:
    """A model that was trained, saved and loaded again."""
    trained = ft.fit(
        MODELS[request.param],
        split,
        features=SCHEMA,
        training=TRAINING,
        first_stage=ft.FirstStage(training=TRAINING),
        show=False,
    )
    folder: Path = tmp_path_factory.mktemp("bundles") / "bundle"
    ft.build_recommender(trained).save(folder)
    return request.param, ft.load(folder)


def share(answer: ft.Answer, genre: int) -> float:
    return sum(f"film-{genre}-" in str(row.item_id) for row in answer.rows) / len(answer.rows)


def test_a_known_user_is_answered_by_the_model(served: tuple[str, ft.Recommender]) -> None:
    name, recommender = served
    answer = recommender.recommend("user-3", k=2)
    assert (answer.source, answer.user_known, len(answer.rows)) == ("model", True, 2)
    if name != "popularity":
        assert share(answer, 0) == 1


def test_an_unseen_user_with_a_history_is_folded_in(served: tuple[str, ft.Recommender]) -> None:
    name, recommender = served
    answer = recommender.recommend("new", history=["film-2-0", "film-2-1", "film-2-2"], k=3)
    assert (answer.source, answer.user_known, len(answer.rows)) == ("fold-in", False, 3)
    if name != "popularity":
        assert share(answer, 2) >= 2 / 3


def test_a_known_user_with_new_events_gets_another_answer(
    served: tuple[str, ft.Recommender],
) -> None:
    name, recommender = served
    before = recommender.recommend("user-3", k=10)
    after = recommender.recommend("user-3", history=["film-1-0", "film-1-1", "film-1-2"], k=10)
    assert after.source == "model"
    assert not {"film-1-0", "film-1-1", "film-1-2"} & {row.item_id for row in after.rows}
    if name != "popularity":
        assert [row.score for row in before.rows] != [row.score for row in after.rows]


def test_features_given_for_a_known_user_are_noted_as_without_influence(
    served: tuple[str, ft.Recommender],
) -> None:
    _, recommender = served
    plain, told = (recommender.recommend("user-3", features=f) for f in (None, {"age": 60.0}))
    assert plain.rows == told.rows
    why = "is in training" if recommender.trained.model.reads_profiles else "reads none of users"
    assert "the features given had no influence: " in (said := " ".join(told.notes))
    assert why in said


def test_an_unseen_user_with_features_only(served: tuple[str, ft.Recommender]) -> None:
    name, recommender = served
    young, old = (recommender.recommend("new", features={"age": a}, k=4) for a in (20.0, 60.0))
    if name in READS_USERS:
        assert {young.source, old.source} == {"features"}
        assert share(young, 0) >= 0.75
        assert share(old, 2) >= 0.75
    else:
        assert (young.source, len(young.rows)) == ("popular", 4)
        assert "the features given had no influence" in " ".join(young.notes)


@pytest.mark.parametrize("name", ["two_tower", "pinsage", "din", "two_stage behind sasrec", "ease"])
def test_a_user_of_the_table_without_an_event_is_represented_by_it(
    name: str, split: ft.Split
) -> None:
    first = split.events.offsets[1]
    silent = replace(split, part_E=np.where(np.arange(len(split.part_E)) < first, 3, split.part_E))
    few = TRAINING.model_copy(update={"epochs": 2})
    recommender = ft.build_recommender(
        ft.fit(
            MODELS[name],
            silent,
            features=SCHEMA,
            training=few,
            first_stage=ft.FirstStage(training=few),
            show=False,
        )
    )
    (age,) = split.events.user_table["age"][:1]
    told = recommender.recommend("new", features={"age": age}, k=4)
    answer = recommender.recommend("user-0", k=4)
    assert told.source == ("features" if name in READS_USERS else "popular")
    assert (answer.source, answer.rows, answer.user_known) == (told.source, told.rows, False)
    lists = recommender.recommend_many(["user-0", "user-3", "nobody", "user-0"], k=4)
    assert lists["source"].to_list() == [told.source, "model", "popular", told.source]
    for row in (0, 3):
        assert lists["item_id"][row].to_list() == [row.item_id for row in told.rows]
    other = recommender.recommend("user-0", features={"age": 60.0}, k=4)
    assert (other.rows != answer.rows) == (name in READS_USERS)


def test_a_pickle_of_a_recommender_answers_as_it_does(served: tuple[str, ft.Recommender]) -> None:
    _, recommender = served
    again = pickle.loads(pickle.dumps(recommender))  # noqa: S301  # our own
    asked = {"history": ["film-2-0"], "features": {"age": 20.0}, "k": 5}
    for ask in (
        lambda of: of.recommend("user-3", **asked),
        lambda of: of.recommend("new", **asked),
        lambda of: of.similar("film-2-1"),
    ):
        first, second = ask(recommender).rows, ask(again).rows
        assert [row.item_id for row in first] == [row.item_id for row in second]
        # tensors lie elsewhere in memory, so sums may be taken in another order
        assert [row.score for row in first] == pytest.approx([r.score for r in second], abs=1e-5)


def test_an_unknown_user_gets_the_most_popular_items(served: tuple[str, ft.Recommender]) -> None:
    _, recommender = served
    for answer in (recommender.recommend(k=5), recommender.recommend("new", k=5)):
        assert (answer.source, len(answer.rows)) == ("popular", 5)


def test_an_unseen_item_with_features(served: tuple[str, ft.Recommender]) -> None:
    name, recommender = served
    told = {"genres": ["Horror"], "length": 94.0}
    if name not in PLACES:
        with pytest.raises(ft.DataError, match="its features have no value that this model reads"):
            recommender.similar("film-new", k=4, features=told)
        return
    answer = recommender.similar("film-new", k=4, features=told)
    assert (answer.source, answer.unknown_items) == ("features", ("film-new",))
    assert len(answer.rows) == 4
    assert share(answer, 2) >= 0.75


def test_an_item_of_the_table_without_events_is_ranked_if_features_are_read(
    served: tuple[str, ft.Recommender],
) -> None:
    name, recommender = served
    ranked = {row.item_id for row in recommender.recommend("user-2", k=30).rows}
    assert (SILENT in ranked) == (name in READS)
    assert len(ranked) <= len(GENRES) * ITEMS_EACH


def test_a_feature_that_does_not_exist_is_named(served: tuple[str, ft.Recommender]) -> None:
    name, recommender = served
    if name in READS:
        with pytest.raises(ft.DataError, match="'age' cannot hold"):
            recommender.recommend(features={"age": [1, [2]]})
        with pytest.raises(ft.DataError, match=r"'agee' is not a feature of users.*mean 'age'"):
            recommender.recommend("new", features={"agee": 20.0})
        with pytest.raises(ft.DataError, match="age"):
            recommender.recommend("new", features={"age": "twenty"})
    if name in PLACES:
        with pytest.raises(ft.DataError, match="'genre' is not a feature of items"):
            recommender.similar("film-new", features={"genre": ["Drama"]})

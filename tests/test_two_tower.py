"""Two-Tower: its parts by hand, its histories against oracles, and items without events."""

import copy
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch
from torch import Tensor

from foretaste.data.batch import Queries
from foretaste.data.features import Features, fit_features
from foretaste.data.features_schema import CategoricalField, FeatureSchema, MultiField, VectorField
from foretaste.data.interactions import Interactions
from foretaste.data.splitting import cold_items_split
from foretaste.data.vocabulary import Vocabulary
from foretaste.errors import ConfigError
from foretaste.evaluation.protocol import evaluate
from foretaste.experiment.fit import fit
from foretaste.models.baselines import PopularityConfig
from foretaste.models.sasrec import SASRec, SASRecConfig
from foretaste.models.two_tower import TwoTower, TwoTowerConfig
from foretaste.training.objectives import PairsConfig
from foretaste.training.settings import TrainingConfig
from foretaste.training.trained import Trained
from tests.worlds import every_vector

NUM_GROUPS, GROUP_SIZE = 4, 10
NUM_ITEMS = NUM_GROUPS * GROUP_SIZE
HISTORIES = [[0, 1, 2], [], [9], [30, 30, 12, 7, 0, 39]]
QUERIES = Queries.of_histories(HISTORIES)
HISTORY_KINDS = ("none", "mean", "attention", "sasrec")


def world(num_users: int = 120, per_user: int = 6, seed: int = 0) -> Interactions:
    """Users do items of one group; an item's group is in its features."""
    rng = np.random.default_rng(seed)
    done = [
        user % NUM_GROUPS * GROUP_SIZE + rng.permutation(GROUP_SIZE)[:per_user]
        for user in range(num_users)
    ]
    group_I = np.arange(NUM_ITEMS) // GROUP_SIZE
    look_IW = np.eye(NUM_GROUPS)[group_I] + 0.1 * rng.normal(size=(NUM_ITEMS, NUM_GROUPS))
    items = pl.DataFrame(
        {
            "group": [f"g{g}" for g in group_I],
            "tags": [[f"t{g}", "all"] for g in group_I],
            "look": pl.Series(look_IW.tolist(), dtype=pl.List(pl.Float32)),
        }
    )
    return Interactions(
        users=Vocabulary(pl.Series(range(num_users), dtype=pl.Int64)),
        items=Vocabulary(pl.Series(range(NUM_ITEMS), dtype=pl.Int64)),
        offsets=np.arange(num_users + 1) * per_user,
        item_idx=np.concatenate(done).astype(np.int32),
        user_table=pl.DataFrame({"taste": [f"g{u % NUM_GROUPS}" for u in range(num_users)]}),
        item_table=items,
    )


WORLD = world()
SCHEMA = FeatureSchema(
    user={"taste": CategoricalField()},
    item={"group": CategoricalField(), "tags": MultiField(), "look": VectorField()},
)
FEATURES = fit_features(SCHEMA, WORLD)


def towers(features: Features | None = None, **settings: object) -> TwoTower:
    torch.manual_seed(0)
    config = TwoTowerConfig.model_validate({"embedding_dim": 8, "init_std": 0.5} | settings)
    return TwoTower(config, num_users=WORLD.num_users, num_items=NUM_ITEMS, features=features)


def one_by_one(model: TwoTower, queries: Queries) -> Tensor:
    starts = queries.offsets_B1.tolist()
    rows = []
    for row in range(len(queries)):
        history = queries.history_N[starts[row] : starts[row + 1]]
        rows.append(
            model.encode(
                Queries(
                    user_B=queries.user_B[row : row + 1],
                    history_N=history,
                    offsets_B1=torch.tensor([0, len(history)]),
                )
            )
        )
    return torch.cat(rows)


# --- parts by hand -----------------------------------------------------------------------------


def test_without_hidden_layers_a_tower_is_the_sum_of_its_parts() -> None:
    model = towers(history="mean", embedding_dim=2)
    assert model.user_table is not None
    assert model.item_table is not None
    assert model.everybody is not None
    with torch.no_grad():
        model.user_table.weight[5] = torch.tensor([1.0, 2.0])
        model.item_table.weight[:3] = torch.tensor([[3.0, 0.0], [0.0, 6.0], [3.0, 0.0]])
        model.everybody.copy_(torch.tensor([0.5, -0.5]))
    query = replace(Queries.of_histories([[0, 1, 2]]), user_B=torch.tensor([5]))
    # id (1, 2) + mean of (3, 0) (0, 6) (3, 0) = (2, 2) + the common vector (.5, -.5)
    assert model.eval().encode(query).tolist() == [[3.5, 3.5]]
    assert every_vector(model)[1].tolist() == [0, 6]


def test_the_cosine_of_vectors_of_length_1_is_divided_by_the_temperature() -> None:
    model = towers(history="mean", similarity="cosine", temperature=0.1).eval()
    assert every_vector(model).norm(dim=1).tolist() == pytest.approx([1] * NUM_ITEMS)
    assert model.encode(QUERIES).norm(dim=1).tolist() == pytest.approx([10] * 4)


@pytest.mark.parametrize("history", HISTORY_KINDS)
@pytest.mark.parametrize("hidden", [(), (16, 12)])
def test_training_and_answering_give_the_same_vectors(
    history: str, hidden: tuple[int, ...]
) -> None:
    model = towers(FEATURES, history=history, query_hidden=hidden, item_hidden=hidden)
    item_V = torch.tensor([3, 0, 39, 12])
    queries = replace(QUERIES, user_B=torch.tensor([0, 7, 3, 3]))
    learned = model(queries, item_V)
    model.eval()
    torch.testing.assert_close(model.encode(queries), learned.query_BD)
    torch.testing.assert_close(every_vector(model)[item_V], learned.item_VD)


def test_features_of_an_item_are_encoded_once_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    model = towers(FEATURES, history="mean")
    assert model.item_fields is not None
    encoded: list[int] = []
    fields = model.item_fields.forward

    def counted(row_B: Tensor, *more: object) -> Tensor:
        encoded.extend(row_B.tolist())
        return fields(row_B, *more)

    monkeypatch.setattr(model.item_fields, "forward", counted)
    item_V = torch.tensor([3, 0, 39, 12])
    model(replace(QUERIES, user_B=torch.tensor([0, 7, 3, 3])), item_V)
    history = set(QUERIES.history_N.tolist())
    assert sorted(encoded) == sorted({0, *history, *item_V.tolist()})


# --- histories ---------------------------------------------------------------------------------


@pytest.mark.parametrize("features", [None, FEATURES])
def test_a_mean_history_is_the_mean_of_its_last_items(features: Features | None) -> None:
    model = towers(features, history="mean", user_id=False, user_features=False, max_len=4).eval()
    base_ID = model._base_vectors(torch.arange(NUM_ITEMS))
    expected = [base_ID[h[-4:]].mean(dim=0) if h else torch.zeros(8) for h in HISTORIES]
    assert model.everybody is not None
    torch.testing.assert_close(model.encode(QUERIES), torch.stack(expected) + model.everybody)


def test_where_order_means_nothing_all_of_a_history_is_read() -> None:
    settings = {"history": "mean", "user_id": False, "max_len": 2}
    model = towers(reads="others", **settings).eval()
    assert model.item_table is not None
    assert model.everybody is not None
    expected = model.item_table.weight[HISTORIES[3]].mean(dim=0) + model.everybody
    torch.testing.assert_close(model.encode(QUERIES)[3], expected)


def test_attention_pools_as_the_formula_says() -> None:
    model = towers(history="attention", user_id=False, num_heads=2, max_len=4).eval()
    pool = model.history
    assert model.item_table is not None
    assert model.everybody is not None
    attention = pool.get_submodule("attention")
    question = pool.get_parameter("question")
    x_LD = model.item_table.weight[HISTORIES[3][-4:]]
    query_D = attention.get_submodule("query")(question)
    key_LD, value_LD = attention.get_submodule("key_value")(x_LD).chunk(2, dim=-1)
    heads = []
    for head in range(2):
        part = slice(4 * head, 4 * head + 4)
        weight_L = (key_LD[:, part] @ query_D[part] / 4**0.5).softmax(dim=0)
        heads.append(weight_L @ value_LD[:, part])
    expected = attention.get_submodule("output")(torch.cat(heads)) + model.everybody
    torch.testing.assert_close(model.encode(QUERIES)[3], expected)


def test_a_sasrec_history_is_what_sasrec_says_of_it() -> None:
    torch.manual_seed(1)
    sasrec = SASRec(
        SASRecConfig(embedding_dim=8, max_len=5, dropout=0, block="original"), num_items=NUM_ITEMS
    )
    model = towers(history="sasrec", user_id=False, max_len=5)
    assert model.history is not None
    assert model.everybody is not None
    state = sasrec.state_dict()
    model.load_state_dict(
        {"item_table.weight": state.pop("item_table.weight"), "everybody": torch.zeros(8)}
        | {f"history.{name}": value for name, value in state.items()}
    )
    expected = sasrec.eval().encode(QUERIES)
    torch.testing.assert_close(model.eval().encode(QUERIES), expected)


def test_the_names_of_sasrec_weights_are_those_of_saved_bundles() -> None:
    names = SASRec(SASRecConfig(num_blocks=1), num_items=3).state_dict().keys()
    assert {name for name in names if not name.startswith("blocks.0.")} == {
        "item_table.weight",
        "positions.weight",
        "start",
        "norm.weight",
        "norm.bias",
    }
    assert "blocks.0.attention.key_value.weight" in names


@pytest.mark.parametrize("history", HISTORY_KINDS)
def test_histories_read_in_chunks_of_like_length_are_those_read_alone(history: str) -> None:
    rng = np.random.default_rng(0)
    histories = [rng.integers(NUM_ITEMS, size=rng.integers(20)).tolist() for _ in range(260)]
    queries = replace(Queries.of_histories(histories), user_B=torch.arange(260) % 120)
    model = towers(FEATURES, history=history, max_len=10).eval()
    torch.testing.assert_close(model.encode(queries), one_by_one(model, queries))


def test_a_block_without_users_has_an_empty_answer() -> None:
    for history in HISTORY_KINDS:
        assert towers(history=history).eval().encode(Queries.of_histories([])).shape == (0, 8)


# --- the towers apart --------------------------------------------------------------------------


@pytest.mark.parametrize("history", ["none", "mean", "sasrec"])
def test_the_query_tower_serves_without_the_item_tower(history: str) -> None:
    model = towers(FEATURES, history=history, query_hidden=(8,), item_hidden=(8,)).eval()
    before, table_ID = model.encode(QUERIES), every_vector(model).clone()
    assert model.item_mlp is not None
    with torch.no_grad():
        for parameter in model.item_mlp.parameters():
            parameter.fill_(torch.nan)
    model.eval()
    assert torch.equal(model.encode(QUERIES), before)
    assert table_ID.isfinite().all()
    assert every_vector(model).isnan().all()


def test_the_item_table_is_worked_out_once_and_forgotten_with_the_weights() -> None:
    model = towers(FEATURES, item_hidden=(8,)).eval()
    assert next(model.item_blocks())[1] is next(model.item_blocks())[1]
    with torch.inference_mode():
        first = next(model.train().eval().item_blocks())[1]
    assert not first.is_inference()  # so that a copy of the model may be trained
    with torch.no_grad():
        model.get_submodule("item_table").get_parameter("weight").add_(1)
    assert torch.equal(every_vector(model), first)
    assert not torch.equal(every_vector(model.eval()), first)
    copied = copy.deepcopy(model)
    assert torch.equal(every_vector(copied), every_vector(model))


def test_blocks_of_items_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = every_vector(towers(FEATURES, item_hidden=(8,)).eval())
    monkeypatch.setattr("foretaste.models.two_tower._BLOCK_ITEMS", 7)
    torch.testing.assert_close(every_vector(towers(FEATURES, item_hidden=(8,)).eval()), whole)


# --- new users and items -----------------------------------------------------------


def test_a_new_user_with_a_profile_is_represented_by_it() -> None:
    model = towers(FEATURES, history="mean", user_id=False).eval()
    assert FEATURES.user is not None
    profile = FEATURES.user.encode(pl.DataFrame({"taste": ["g1", "g2", None, "unheard of"]}))
    nobody = Queries.of_histories([[], [], [], []])
    told = model.encode(replace(nobody, profile=profile))
    known = model.encode(replace(nobody, user_B=torch.tensor([1, 2, -1, -1])))
    torch.testing.assert_close(told[:3], known[:3])
    assert not torch.equal(told[0], told[1])
    # a profile changes nothing for a known user
    both = replace(nobody, user_B=torch.tensor([3, 2, -1, -1]), profile=profile)
    torch.testing.assert_close(model.encode(both)[0], model.encode(both)[0])
    torch.testing.assert_close(model.encode(both)[1], known[1])
    assert not torch.equal(model.encode(both)[0], told[0])


def test_ids_without_an_event_are_0() -> None:
    events = WORLD.select((WORLD.item_idx % 10 < 7) & (WORLD.user_idx < 100))
    model = towers(history="mean")
    model.begin(events)
    assert model.user_table is not None
    assert model.item_table is not None
    sides = (model.user_table, np.diff(events.offsets)), (model.item_table, events.item_count)
    for table, count in sides:
        is_zero_R = (table.block(0, table.num_rows) == 0).all(dim=1).numpy()
        assert (is_zero_R == (count == 0)).all()
        assert 0 < is_zero_R.sum() < len(is_zero_R)


def test_items_are_placed_by_a_feature_that_says_something() -> None:
    assert WORLD.item_table is not None
    blank = pl.int_range(NUM_ITEMS, eager=True) < 5
    table = WORLD.item_table.with_columns(
        pl.when(blank).then(None).otherwise(pl.col(name)).alias(name)
        for name in WORLD.item_table.columns
    )
    features = fit_features(SCHEMA, replace(WORLD, item_table=table))
    assert towers(features).known_items().tolist() == [False] * 5 + [True] * (NUM_ITEMS - 5)
    assert not towers(features, item_features=False).known_items().any()
    assert not towers().known_items().any()
    # of the items without a feature, those with an event are ranked all the same
    events = WORLD.select(WORLD.item_idx > 1)
    trained = Trained(config=TwoTowerConfig(), model=towers(features), events=events, seed=0)
    assert trained.known_I.tolist() == [False] * 2 + [True] * (NUM_ITEMS - 2)


def test_an_id_is_dropped_only_where_something_else_tells() -> None:
    model = towers(FEATURES, history="mean", id_dropout=0.5, item_hidden=())
    item_V = torch.arange(NUM_ITEMS)
    assert model.item_table is not None
    told_VD = model._without_some_items(model.item_table.weight, item_V)
    assert told_VD is not None
    dropped = (told_VD == 0).all(dim=1)
    assert 8 < int(dropped.sum()) < 32  # 20 expected, standard deviation 3.2
    kept = ~dropped
    assert torch.equal(told_VD[kept], model.item_table.weight[kept])
    bare = towers(id_dropout=0.5)
    assert bare.item_table is not None
    assert bare._without_some_items(bare.item_table.weight, item_V) is bare.item_table.weight
    assert (
        model.eval()._without_some_items(model.item_table.weight, item_V) is model.item_table.weight
    )


COLD = cold_items_split(world(num_users=400), validation=0.1, test=0.2, seed=3)
TRAINING = TrainingConfig(
    epochs=12, batch_events=256, learning_rate=0.02, warmup_steps=5, device="cpu", patience=None
)


@pytest.mark.parametrize(
    "settings",
    [
        {"history": "mean", "user_id": False, "id_dropout": 0.3},
        {"history": "attention", "item_id": False, "item_hidden": (16,), "query_hidden": (16,)},
        {"history": "none", "id_dropout": 0.3, "fusion": "concat"},
    ],
)
def test_items_without_events_are_found_by_their_features(
    settings: dict[str, object],
) -> None:
    # of the about 35 items that a user has not done, the first 10 hold a given one with .29
    config = TwoTowerConfig.model_validate({"embedding_dim": 16} | settings)
    objective = PairsConfig(negatives=16)
    recall = {}
    for name, features in (("with", SCHEMA), ("without", None)):
        if features is None and not config.item_id:
            continue
        trained = fit(
            config, COLD, training=TRAINING, objective=objective, features=features, show=False
        )
        report = evaluate(trained, COLD.test, k=(10,), resamples=0)
        recall[name] = report.metrics["recall_at_10"]
        assert report.counts["catalogue"] == (NUM_ITEMS if features else 28)
        assert any("others that the model scores by features" in n for n in report.notes) == bool(
            features
        )
    popular = fit(PopularityConfig(), COLD, show=False)
    assert evaluate(popular, COLD.test, k=(10,), resamples=0).metrics["recall_at_10"] == 0
    assert recall["with"] > 0.9
    assert recall.get("without", 0) == 0


# --- doors -------------------------------------------------------------------------------------


def test_a_tower_with_nothing_to_read_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"tower of users.*model\.user_id"):
        towers(user_id=False)
    with pytest.raises(ConfigError, match=r"tower of items.*features of items"):
        towers(item_id=False)
    with pytest.raises(ConfigError, match="tower of items"):
        towers(FEATURES, item_id=False, item_features=False)


def test_features_of_another_catalogue_are_refused() -> None:
    with pytest.raises(ConfigError, match="features of 40 items for 41"):
        TwoTower(TwoTowerConfig(), num_users=WORLD.num_users, num_items=41, features=FEATURES)


def test_an_order_cannot_be_minded_where_there_is_none() -> None:
    with pytest.raises(ConfigError, match='reads "others" has none'):
        TwoTowerConfig(history="sasrec", reads="others")

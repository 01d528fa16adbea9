"""Item-kNN against a double loop over items."""

import numpy as np
import polars as pl
import pytest
import torch

from foretaste.data.batch import Queries
from foretaste.data.interactions import Interactions
from foretaste.data.vocabulary import Vocabulary
from foretaste.models import baselines
from foretaste.models.baselines import ItemKNN, ItemKNNConfig

NUM_ITEMS = 30


def histories(seed: int = 0, num_users: int = 60) -> list[list[int]]:
    """Repeated items, empty histories and items that nobody does are among them."""
    rng = np.random.default_rng(seed)
    chance = 1 / np.arange(1, NUM_ITEMS) ** 0.7
    return [
        rng.choice(NUM_ITEMS - 1, size=rng.integers(0, 12), p=chance / chance.sum()).tolist()
        for _ in range(num_users)
    ]


def events_of(histories: list[list[int]], num_items: int = NUM_ITEMS) -> Interactions:
    return Interactions(
        users=Vocabulary(pl.Series(range(len(histories)), dtype=pl.Int64)),
        items=Vocabulary(pl.Series(range(num_items), dtype=pl.Int64)),
        offsets=np.cumsum([0, *map(len, histories)]),
        item_idx=np.array([i for h in histories for i in h], dtype=np.int32),
    )


def learned(config: ItemKNNConfig, of: list[list[int]], num_items: int = NUM_ITEMS) -> ItemKNN:
    model = ItemKNN(config, num_items=num_items)
    model.learn(events_of(of, num_items))
    return model


def likeness(config: ItemKNNConfig, of: list[list[int]], i: int, j: int) -> float:
    sets = [set(history) for history in of]
    shared = sum(len(s) ** -config.damping for s in sets if i in s and j in s)
    n_i, n_j = (max(1, sum(item in s for s in sets)) for item in (i, j))
    below = n_i**config.asymmetry * n_j ** (1 - config.asymmetry) + config.strength("shrinkage")
    return 0.0 if i == j else shared / below


CONFIGS = [
    ItemKNNConfig(),
    ItemKNNConfig(neighbours=4),
    ItemKNNConfig(neighbours=7, asymmetry=0.5, damping=0, shrinkage=3),
    ItemKNNConfig(neighbours=1, asymmetry=1, damping=1, shrinkage=0),
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("block", [1, 100, 2**23])
def test_scores_are_those_of_a_double_loop(
    config: ItemKNNConfig, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(baselines, "_BLOCK_PAIRS", block)
    monkeypatch.setattr(baselines, "_BLOCK_EVENTS", max(1, block // 10))
    of, asked = histories(), histories(seed=1)
    model = learned(config, of)
    expected = np.zeros((len(asked), NUM_ITEMS))
    for i in range(NUM_ITEMS):
        row = np.array([likeness(config, of, i, j) for j in range(NUM_ITEMS)])
        kept = np.sort(row)[::-1][: config.neighbours]
        np.testing.assert_allclose(model.similarity_IK[i], kept, rtol=1e-5)
        # which of equally good neighbours is kept is free: take the model's, at its true likeness
        neighbours = model.neighbour_IK[i][model.similarity_IK[i] > 0].tolist()
        assert len(set(neighbours)) == len(neighbours)
        for user, history in enumerate(asked):
            if i in history:
                expected[user, neighbours] += row[neighbours]
    scored = model.score(Queries.of_histories(asked))
    np.testing.assert_allclose(scored, expected, rtol=1e-5, atol=1e-6)


def test_the_cosine_by_hand() -> None:
    # items 0 and 1 share 2 users of 2 and 4: 2 / √8. Items 1 and 2 share 1 of 4 and 1: 1 / 2.
    of = [[0, 1], [1, 0, 0], [1, 2], [1]]
    model = learned(ItemKNNConfig(asymmetry=0.5, damping=0, shrinkage=0), of, num_items=3)
    score_BI = model.score(Queries.of_histories([[1], [0, 2]]))
    expected = [[2 / 8**0.5, 0, 0.5], [0, 2 / 8**0.5 + 0.5, 0]]
    torch.testing.assert_close(score_BI, torch.tensor(expected))


def test_an_item_is_not_its_own_neighbour() -> None:
    model = learned(ItemKNNConfig(neighbours=NUM_ITEMS), histories())
    own = model.neighbour_IK == torch.arange(NUM_ITEMS).unsqueeze(1)
    assert (model.similarity_IK[own] == 0).all()


def test_what_is_kept_has_a_shape_known_beforehand() -> None:
    untrained = ItemKNN(ItemKNNConfig(neighbours=5), num_items=NUM_ITEMS)
    trained = learned(ItemKNNConfig(neighbours=5), [[0, 1]])
    for name, tensor in trained.state_dict().items():
        assert tensor.shape == untrained.state_dict()[name].shape == (NUM_ITEMS, 5)


def test_longest_histories_are_shortened_until_all_pairs_are_few(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    of = [[0, 1, 2, 3], [4, 5], list(range(NUM_ITEMS)), list(range(20))]
    monkeypatch.setattr(baselines, "_PAIRS_OF_EVENT", 0)
    monkeypatch.setattr(baselines, "_LEAST_PAIRS", 16 + 4 + 2 * 7**2)  # 30, 15 and 7 at most
    model = learned(ItemKNNConfig(damping=0, shrinkage=0, neighbours=NUM_ITEMS), of)
    assert model.note == (
        "2 of 4 users have more than 7 items: item-kNN takes 7 of them, drawn at random"
    )
    other_of_4 = model.neighbour_IK[4][model.similarity_IK[4] > 0].tolist()
    assert 5 in other_of_4  # of the short history, whole
    together = model.similarity_IK[29] > 0  # the last item is of the longest history alone
    assert int(together.sum()) in (0, 6)


def test_no_history_is_shortened_where_the_work_is_little() -> None:
    assert learned(ItemKNNConfig(), histories()).note == ""

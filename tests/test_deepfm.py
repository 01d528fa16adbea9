"""DeepFM: pairs of fields against the double sum, its parts by hand, blocks against pairs."""

import itertools

import pytest
import torch
from torch import Tensor

from foretaste.data.batch import Queries
from foretaste.errors import ConfigError
from foretaste.models.layers import field_ranker
from foretaste.models.rankers import DeepFM, DeepFMConfig, pairs_of_fields
from tests.test_row_fields import EVENTS, FEATURES, ITEMS, NUM_ITEMS, NUM_USERS, QUERIES

WHOLE = DeepFMConfig(embedding_dim=4, hidden=(7, 3))


def network(config: DeepFMConfig = WHOLE) -> DeepFM:
    torch.manual_seed(0)
    model = DeepFM(config, num_users=NUM_USERS, num_items=NUM_ITEMS, features=FEATURES)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    model.begin(EVENTS)
    model.learn_new_users(EVENTS)
    return model.eval()


def fields_of(model: DeepFM, row: int, place: int) -> Tensor:
    parts = model.fields(QUERIES, ITEMS)
    return torch.cat([parts.query_BQW[row], parts.item_ACGW[row, place]])


@pytest.mark.parametrize("rows", ["own items", "the same items"])
def test_pairs_of_fields_are_the_double_sum(rows: str) -> None:
    torch.manual_seed(0)
    query_BQD = torch.randn(3, 4, 5, dtype=torch.float64)
    item_ACGD = torch.randn(3 if rows == "own items" else 1, 2, 3, 5, dtype=torch.float64)
    got_BC = pairs_of_fields(query_BQD, item_ACGD)
    for b, c in itertools.product(range(3), range(2)):
        field_FD = torch.cat([query_BQD[b], item_ACGD[b % len(item_ACGD), c]])
        slow = torch.zeros((), dtype=torch.float64)
        for one, other in itertools.combinations(field_FD, 2):
            slow = slow + one @ other
        torch.testing.assert_close(got_BC[b, c], slow)


def test_the_score_is_the_sum_of_its_three_parts() -> None:
    model = network()
    got_BC = model(QUERIES, ITEMS)["click"]
    assert model.mlp is not None
    for row, place in itertools.product(range(4), range(2)):
        field_FW = fields_of(model, row, place)
        v_FD, w_F = field_FW[:, :4], field_FW[:, 4]
        pairs = sum((a @ b for a, b in itertools.combinations(v_FD, 2)), torch.zeros(()))
        deep = model.mlp.layers(model.mlp.first.joint(v_FD.flatten()))
        expected = model.bias + w_F.sum() + pairs + deep.squeeze()
        torch.testing.assert_close(got_BC[row, place], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("parts", "width"),
    [({"linear"}, 1), ({"linear", "fm"}, 5), ({"deep"}, 4), ({"fm"}, 4), ({"fm", "deep"}, 4)],
)
def test_parts_that_are_off_have_no_weights(parts: set[str], width: int) -> None:
    model = network(WHOLE.model_copy(update={p: p in parts for p in ("linear", "fm", "deep")}))
    assert model.fields.item.id_table is not None
    assert model.fields.item.id_table.width == width
    assert (model.mlp is not None) == ("deep" in parts)
    assert model(QUERIES, ITEMS)["click"].isfinite().all()


def test_a_logistic_regression_is_a_sum_of_weights() -> None:
    model = network(WHOLE.model_copy(update={"fm": False, "deep": False}))
    expected = model.bias + fields_of(model, 1, 0).sum()
    torch.testing.assert_close(model(QUERIES, ITEMS)["click"][1, 0], expected)
    with pytest.raises(ConfigError, match="all off"):
        DeepFMConfig(linear=False, fm=False, deep=False)


@pytest.mark.parametrize("fusion", ["concat", "gate"])
def test_the_catalogue_in_blocks_is_every_pair(
    fusion: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = network(WHOLE.model_copy(update={"fusion": fusion}))
    monkeypatch.setattr(field_ranker, "_BLOCK_PAIRS", 7)
    every_BI = torch.arange(NUM_ITEMS).expand(len(QUERIES), -1)
    torch.testing.assert_close(model.score(QUERIES), model(QUERIES, every_BI)["click"])


def test_context_and_profile_move_the_score() -> None:
    model, moved = network(), []
    for row in range(len(QUERIES)):
        alone = Queries(
            user_B=QUERIES.user_B[row : row + 1],
            history_N=torch.empty(0, dtype=torch.int64),
            offsets_B1=torch.zeros(2, dtype=torch.int64),
        )
        moved.append(not torch.allclose(model.score(alone), model.score(QUERIES)[row]))
    assert all(moved)


@pytest.mark.parametrize("l2_of", ["rows", "mini_batch_aware"])
def test_the_penalty_by_hand(l2_of: str) -> None:
    model = network(WHOLE.model_copy(update={"l2": 0.1, "l2_of": l2_of}))
    # Without features: user 0 twice, user 2, an unknown one; items 0 (twice), 1 (twice), 2, 3 (no
    # event). In training users 0 and 2 have two events each, item 1 two, items 0 and 2 one.
    bare = DeepFM(model.config, num_users=NUM_USERS, num_items=NUM_ITEMS)
    bare.begin(EVENTS)
    tables = bare.fields.user.id_table, bare.fields.item.id_table
    square_V = torch.cat([t.block(0, t.num_rows) for t in tables if t]).square().sum(dim=1)
    queries = Queries(
        user_B=torch.tensor([0, 0, 2, -1]),
        history_N=torch.empty(0, dtype=torch.int64),
        offsets_B1=torch.zeros(5, dtype=torch.int64),
    )
    item_BC = torch.tensor([[0], [1], [1], [3]])
    user, item = 0, NUM_USERS
    if l2_of == "rows":
        times = {user: 2 / 4, user + 2: 1 / 4, item: 1 / 4, item + 1: 2 / 4}
    else:
        times = {user: 1 / 2, user + 2: 1 / 2, item: 1 / 1, item + 1: 1 / 2}
    expected = sum(0.1 / 2 * share * square_V[code] for code, share in times.items())
    torch.testing.assert_close(bare.penalty(queries, item_BC), expected)


def test_frequencies_count_the_codes_of_features_too() -> None:
    model = network(WHOLE.model_copy(update={"l2": 0.1, "l2_of": "mini_batch_aware"}))
    # brands of items 0 to 3: x, nothing, y, nothing; events of them: 1, 2, 1, 0
    assert model.fields.item.code_l2.times_V[:4].tolist() == [2, 0, 1, 1]


def test_without_l2_nothing_is_added() -> None:
    assert network().penalty(QUERIES, ITEMS).item() == 0

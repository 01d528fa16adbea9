"""NCF: the equations by hand, blocks against pairs, and the start of a pre-trained NeuMF."""

import numpy as np
import polars as pl
import pytest
import torch
from torch import Tensor

from foretaste.data.batch import Queries
from foretaste.data.interactions import Interactions
from foretaste.data.vocabulary import Vocabulary
from foretaste.models.layers import field_ranker
from foretaste.models.neumf import NCF, GMFConfig, MLPConfig, NeuMFConfig

NUM_USERS, NUM_ITEMS = 6, 11
CONFIGS = [GMFConfig(factors=4), MLPConfig(factors=4), NeuMFConfig(factors=4)]


def network(config: GMFConfig | MLPConfig | NeuMFConfig, seed: int = 0) -> NCF:
    torch.manual_seed(seed)
    model = NCF(config, num_users=NUM_USERS, num_items=NUM_ITEMS)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


def asked(user: list[int]) -> Queries:
    return Queries(
        user_B=torch.tensor(user),
        history_N=torch.empty(0, dtype=torch.int64),
        offsets_B1=torch.zeros(len(user) + 1, dtype=torch.int64),
    )


def vectors(model: NCF, user: int, item: int) -> tuple[Tensor, Tensor]:
    users, items = (table.block(0, table.num_rows) for table in model.id_tables())
    return users[user], items[item]


def test_gmf_is_a_weighted_product() -> None:
    model = network(GMFConfig(factors=4))
    user_D, item_D = vectors(model, 2, 7)
    expected = model.output.bias + (model.output.weight[0] * user_D * item_D).sum()
    got = model(asked([2]), torch.tensor([[7]]))["click"]
    torch.testing.assert_close(got[0], expected)


def test_mlp_is_a_halving_tower_over_both_vectors() -> None:
    model = network(MLPConfig(factors=4, num_layers=3))
    user_D, item_D = vectors(model, 2, 7)
    state, widths = torch.cat([user_D, item_D]), []
    assert model.mlp is not None
    linear = [model.mlp.first.joint, *model.mlp.layers]
    for layer in linear:
        if isinstance(layer, torch.nn.Linear):
            state = torch.relu(layer(state))
            widths.append(len(state))
    assert (2 * len(user_D), widths) == (16, [16, 8, 4])
    got = model(asked([2]), torch.tensor([[7]]))["click"]
    torch.testing.assert_close(got[0, 0], model.output(state).squeeze())


def test_neumf_adds_both_and_shares_no_vector_between_them() -> None:
    model = network(NeuMFConfig(factors=4))
    item = torch.tensor([[7]])
    before = model(asked([2]), item)["click"]
    gmf = model.output.weight[0, :4] * torch.stack(vectors(model, 2, 7))[:, :4].prod(dim=0)
    with torch.no_grad():
        for table in model.id_tables():
            table.block(0, table.num_rows)[:, :4] = 0.0  # those of GMF
    torch.testing.assert_close(model(asked([2]), item)["click"], before - gmf.sum())


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.kind)
def test_the_catalogue_in_blocks_is_every_pair(
    config: GMFConfig | MLPConfig | NeuMFConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = network(config).eval()
    monkeypatch.setattr(field_ranker, "_BLOCK_PAIRS", 7)
    queries = asked([0, 5, -1])
    every_BI = torch.arange(NUM_ITEMS).expand(3, -1)
    torch.testing.assert_close(model.score(queries), model(queries, every_BI)["click"])
    pairs = [
        model(asked([user]), torch.tensor([[item]]))["click"]
        for user in (0, 5, -1)
        for item in range(NUM_ITEMS)
    ]
    pair_BI = torch.cat(pairs).view(3, NUM_ITEMS)
    torch.testing.assert_close(model.score(queries), pair_BI, rtol=1e-4, atol=1e-4)


def test_a_probability_is_predicted() -> None:
    model = network(NeuMFConfig(factors=4)).eval()
    item = torch.tensor([[7, 1]])
    logit = model(asked([2]), item)["click"]
    torch.testing.assert_close(model.predict(asked([2]), item)["click"], logit.sigmoid())


@pytest.mark.parametrize("alpha", [0.5, 0.2])
def test_a_pre_trained_neumf_starts_as_the_weighted_sum_of_its_parts(alpha: float) -> None:
    config = NeuMFConfig(factors=4, pretrain=True, alpha=alpha)
    gmf, mlp = (network(part, seed).eval() for seed, part in enumerate(config.parts(), 1))
    model = network(config).eval()
    model.start_from({"gmf": gmf, "mlp": mlp})
    queries, item = asked([0, 3]), torch.tensor([[1, 2], [10, 0]])
    expected = alpha * gmf(queries, item)["click"] + (1 - alpha) * mlp(queries, item)["click"]
    torch.testing.assert_close(model(queries, item)["click"], expected)


def test_a_user_without_events_is_unknown_and_not_trained() -> None:
    # user 1 and item 1 have none
    events = Interactions(
        users=Vocabulary(pl.Series(range(3))),
        items=Vocabulary(pl.Series(range(3))),
        offsets=np.array([0, 2, 2, 3]),
        item_idx=np.array([0, 2, 2], dtype=np.int32),
    )
    model = NCF(NeuMFConfig(factors=4), num_users=3, num_items=3)
    model.begin(events)
    item = torch.tensor([[1, 0]])
    model.train()
    score_BC = model(asked([1]), item)["click"]
    score_BC.sum().backward()
    users, items = (table.get_parameter("weight").grad for table in model.id_tables())
    assert not users.any()
    assert items.abs().sum(dim=1).nonzero().flatten().tolist() == [0]
    model.eval()
    torch.testing.assert_close(model(asked([1]), item), model(asked([-1]), item))


def test_a_new_user_is_represented_by_the_history() -> None:
    events = Interactions(
        users=Vocabulary(pl.Series(range(NUM_USERS))),
        items=Vocabulary(pl.Series(range(NUM_ITEMS))),
        offsets=np.arange(NUM_USERS + 1) * 2,
        item_idx=np.arange(2 * NUM_USERS, dtype=np.int32) % NUM_ITEMS,
    )
    model = network(NeuMFConfig(factors=4))
    model.begin(events)
    model.learn_new_users(events)
    model.eval()
    first, second, nothing = (model.score(Queries.of_histories([h])) for h in ([0, 1], [4], []))
    assert not torch.equal(first, second)
    torch.testing.assert_close(nothing, model.score(asked([-1])))

"""Vectors of users and items that start from a decomposition of the events."""

from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch
from torch import Tensor

import foretaste as ft
from foretaste.data.batch import Queries
from foretaste.data.features_schema import NumericField
from foretaste.data.interactions import Interactions
from foretaste.experiment.learning import settled_init
from foretaste.models.base import Retriever
from foretaste.models.catalogue import build_model, graph_for
from foretaste.models.layers.table import Dense
from foretaste.models.layers.table_kinds import FactorConfig, spectral_vectors
from foretaste.models.layers.tables import HashConfig
from tests.worlds import events_of

MODELS = (ft.MFConfig, ft.TwoTowerConfig, ft.LightGCNConfig)


def groups(num_items: int = 42, each: int = 6) -> Interactions:
    """60 users of five groups, who do some of their group's eight items; two items have none."""
    rng = np.random.default_rng(0)
    histories = [(user % 5 * 8 + rng.permutation(8)[:each]).tolist() for user in range(60)]
    return events_of(histories, num_items=num_items)


def begun(config: FactorConfig, events: Interactions) -> Retriever:
    torch.manual_seed(0)
    model = build_model(
        config,  # type: ignore[arg-type]  # one of MODELS
        num_users=events.num_users,
        num_items=events.num_items,
        graph=graph_for(config, events),  # type: ignore[arg-type]
    )
    model.begin(events)
    assert isinstance(model, Retriever)
    return model.eval()


def share_in_group(model: Retriever, events: Interactions) -> float:
    """Return the share of each user's eight best items that are of the group."""
    users = torch.arange(events.num_users)
    queries = Queries.of_histories([events.history(user).tolist() for user in users.tolist()])
    queries = replace(queries, user_B=users)
    with torch.no_grad():
        found = model(queries, torch.arange(40))
        score_UI = found.query_BD @ found.item_VD.T
    return float((score_UI.topk(8).indices // 8 == (users % 5).unsqueeze(1)).float().mean())


@pytest.mark.parametrize("make", MODELS)
def test_products_order_the_items_before_the_first_step(make: type[FactorConfig]) -> None:
    events = groups()
    model = begun(make(init="svd", embedding_dim=8, init_std=0.2), events)
    assert share_in_group(model, events) > 0.9
    assert share_in_group(begun(make(init="random", embedding_dim=8), events), events) < 0.6
    for table in (model.user_table, model.item_table):
        assert table.weight.square().mean().sqrt().item() == pytest.approx(0.2)
    assert model.item_table.weight[40:].abs().max() < 1e-6  # without events
    again = begun(make(init="svd", embedding_dim=8, init_std=0.2), events)
    assert torch.equal(model.user_table.weight, again.user_table.weight)


@pytest.mark.parametrize("raised", [0.0, 1.0])
def test_all_factors_give_the_matrix_back(raised: float) -> None:
    events = groups(num_items=40)
    done_UI = np.zeros((60, 40))
    done_UI[events.user_idx, events.item_idx] = 1
    for axis in (0, 1):
        count = done_UI.astype(bool).sum(axis=axis, keepdims=True)
        done_UI = done_UI / np.sqrt(count + raised * count.mean())
    user_UF, item_IF = spectral_vectors(events, 64, raised=raised)
    np.testing.assert_allclose(user_UF @ item_IF.T, done_UI, atol=1e-5)


def test_events_done_twice_count_once() -> None:
    once = events_of([[0, 1], [1, 2], [0, 2]], num_items=3)
    twice = events_of([[0, 1, 0], [1, 2, 2], [0, 2, 2]], num_items=3)

    def product(events: Interactions) -> Tensor:
        user_UF, item_IF = spectral_vectors(events, 3)
        return user_UF @ item_IF.T

    torch.testing.assert_close(product(once), product(twice))


def test_columns_beyond_the_rank_are_drawn_so_that_they_can_learn() -> None:
    model = begun(ft.MFConfig(init="svd", embedding_dim=64, init_std=0.1), groups())
    assert isinstance(model.user_table, Dense)
    assert model.user_table.weight[:, 42:].std().item() == pytest.approx(0.1, rel=0.1)


def test_other_kinds_of_tables_keep_their_rows() -> None:
    table, events = HashConfig(from_rows=0), groups()
    drawn, begun_ = (begun(ft.MFConfig(init=i, table=table), events) for i in ("random", "svd"))
    assert torch.equal(drawn.user_table(torch.arange(60)), begun_.user_table(torch.arange(60)))


@pytest.mark.parametrize(("each", "repeat", "init"), [(6, 1, "svd"), (8, 4, "random")])
def test_few_events_decide_for_the_decomposition(each: int, repeat: int, init: str) -> None:
    rng = np.random.default_rng(0)
    histories = [rng.permutation(8)[:each].tolist() * repeat for _ in range(8)]
    events = events_of(histories, num_items=8)
    for make in MODELS:
        found = settled_init(make(init="auto"), events, None)
        assert found.init == init
        assert settled_init(make(init="random"), events, None) == make(init="random")


def test_with_features_vectors_are_drawn_by_default() -> None:
    rows = [(user, item, user + item) for user in range(8) for item in range(user % 3 + 2)]
    events = ft.read_interactions(
        pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row"),
        items=pl.DataFrame({"item_id": range(4), "length": [1.0, 2.0, 3.0, 4.0]}),
    )
    features = ft.fit_features(ft.FeatureSchema(item={"length": NumericField()}), events)
    for given, init in ((None, "svd"), (features, "random")):
        assert settled_init(ft.TwoTowerConfig(), events, given).init == init

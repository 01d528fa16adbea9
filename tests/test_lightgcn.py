"""LightGCN: propagation against a dense matrix, and vectors of new users and items."""

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from torch import Tensor

import foretaste as ft
from foretaste.data.batch import Queries
from foretaste.data.draws import epoch_generator
from foretaste.data.graph import Graph, GraphConfig, graph_of, make_graph
from foretaste.data.interactions import Interactions
from foretaste.data.plans import plan_pairs
from foretaste.errors import ConfigError
from foretaste.models import lightgcn
from foretaste.models.layers.graph_conv import GraphConv, Perturbation
from foretaste.models.lightgcn import LightGCN, LightGCNConfig, Send, propagate
from foretaste.models.pinsage import PinSageConfig
from foretaste.training.fit import Fit
from foretaste.training.objectives import Pairs, PairsConfig
from foretaste.training.settings import TrainingConfig
from tests.worlds import events_of, every_vector

GROUPS, SIZE = 4, 6


def random_events(seed: int = 0) -> Interactions:
    """Twelve users and nine items; user 11 and item 8 have nothing."""
    rng = np.random.default_rng(seed)
    histories = [rng.choice(8, rng.integers(1, 6)).tolist() for _ in range(11)]
    return events_of([*histories, []], num_items=9)


def dense(graph: Graph) -> Tensor:
    """D^-1/2 A D^-1/2, entry by entry."""
    a_VV = torch.zeros(graph.num_nodes, graph.num_nodes, dtype=torch.float64)
    weight_E = np.ones(len(graph.neighbour_E)) if graph.weight_E is None else graph.weight_E
    for one, other, weight in zip(graph.node_E, graph.neighbour_E, weight_E, strict=True):
        a_VV[one, other] = float(weight)
    degree_V = a_VV.sum(1)
    for one, other in a_VV.nonzero().tolist():
        a_VV[one, other] /= (degree_V[one] * degree_V[other]) ** 0.5
    return a_VV


def graphs() -> dict[str, Graph]:
    events = random_events()
    ties = np.array([[0, 1, 11], [3, 2, 4]])
    return {
        "events": make_graph(events),
        "links": make_graph(events, ties=(ties,)),
        "weighted": make_graph(events, ties=(ties, ties[::-1] + 1), weights=(0.5, 3.0)),
        "attributes": make_graph(
            events, ties=(np.array([[12, 13, 20], [21, 21, 22]]),), num_nodes=23
        ),
        "no ties": make_graph(events_of([[], []], num_items=1)),
        "one node": make_graph(events_of([], num_items=1)),
        "one tie": make_graph(events_of([[0]], num_items=1)),
    }


@pytest.fixture(params=graphs().values(), ids=graphs())
def graph(request: pytest.FixtureRequest) -> Graph:
    assert isinstance(request.param, Graph)
    return request.param


@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_the_propagation_is_the_mean_of_the_powers_of_a_dense_matrix(
    graph: Graph, num_layers: int
) -> None:
    torch.manual_seed(0)
    a_VV = dense(graph)
    powers = [torch.linalg.matrix_power(a_VV, layer) for layer in range(num_layers + 1)]
    x_VD = torch.randn(graph.num_nodes, 3, dtype=torch.float64)
    node_R = torch.randint(graph.num_nodes, (7,))  # some twice, some never
    found = GraphConv(graph)(x_VD, node_R, num_layers=num_layers, view_layer=num_layers)
    expected_VD = torch.stack([power @ x_VD for power in powers]).mean(0)
    torch.testing.assert_close(found.mean_RD, expected_VD[node_R], rtol=1e-12, atol=1e-12)
    reference_VD = propagate(x_VD, GraphConv(graph).product, num_layers=num_layers)
    torch.testing.assert_close(reference_VD, expected_VD, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.view_RD, (powers[-1] @ x_VD)[node_R], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.layer_0_RD, x_VD[node_R])


def test_its_gradient_is_right_to_every_node_and_from_every_output(graph: Graph) -> None:
    torch.manual_seed(0)
    conv = GraphConv(graph)
    x_VD = torch.randn(graph.num_nodes, 2, dtype=torch.float64, requires_grad=True)
    node_R = torch.randint(graph.num_nodes, (5,))
    for view_layer in (0, 1, 2, 3):
        assert torch.autograd.gradcheck(
            lambda x_VD, view=view_layer: tuple(conv(x_VD, node_R, num_layers=3, view_layer=view)),
            (x_VD,),
        )
    assert torch.autograd.gradcheck(conv.product, (x_VD,))


@pytest.mark.parametrize("num_layers", [1, 2, 4])
def test_the_fast_path_has_the_values_and_gradients_of_the_reference(
    graph: Graph, num_layers: int
) -> None:
    torch.manual_seed(0)
    conv = GraphConv(graph)
    x_VD = torch.randn(graph.num_nodes, 3, dtype=torch.float64, requires_grad=True)
    node_R = torch.randint(graph.num_nodes, (9,))
    grad_RD = torch.randn(9, 3, dtype=torch.float64)
    fast_RD = conv(x_VD, node_R, num_layers=num_layers).mean_RD
    reference_RD = propagate(x_VD, conv.product, num_layers=num_layers)[node_R]
    torch.testing.assert_close(fast_RD, reference_RD, rtol=1e-12, atol=1e-12)
    (of_fast,), (of_reference,) = (
        torch.autograd.grad(found, x_VD, grad_RD) for found in (fast_RD, reference_RD)
    )
    torch.testing.assert_close(of_fast, of_reference, rtol=1e-12, atol=1e-12)


def test_an_isolated_node_gives_nothing_and_gets_nothing() -> None:
    graph = make_graph(random_events())
    conv, every = GraphConv(graph), torch.arange(graph.num_nodes)
    x_VD = torch.randn(graph.num_nodes, 4)
    other_VD = x_VD.clone()
    other_VD[[11, 20]] += 1  # the user and the item without events
    before, after = (conv(x, every, num_layers=3).mean_RD for x in (x_VD, other_VD))
    torch.testing.assert_close(after[[11, 20]] - before[[11, 20]], torch.full((2, 4), 0.25))
    rest = [node for node in range(21) if node not in (11, 20)]
    assert torch.equal(after[rest], before[rest])


def test_the_order_of_nodes_inside_does_not_show() -> None:
    torch.manual_seed(0)
    events = random_events()
    shuffle_I = torch.randperm(9)
    moved = replace(events, item_idx=shuffle_I.numpy().astype(np.int32)[events.item_idx])
    x_UD, x_ID = torch.randn(12, 3), torch.randn(9, 3)
    moved_ID = torch.empty_like(x_ID)
    moved_ID[shuffle_I] = x_ID
    one = GraphConv(make_graph(events)).product(torch.cat([x_UD, x_ID]))
    other = GraphConv(make_graph(moved)).product(torch.cat([x_UD, moved_ID]))
    torch.testing.assert_close(other[:12], one[:12])
    torch.testing.assert_close(other[12:][shuffle_I], one[12:])


def test_dropped_edges_are_dropped_in_both_directions_and_the_rest_is_scaled() -> None:
    torch.manual_seed(0)
    graph = make_graph(random_events())
    conv, every = GraphConv(graph), torch.arange(graph.num_nodes)
    x_VD = torch.eye(graph.num_nodes)
    change = Perturbation(edge_dropout=0.25)
    drawn = [2 * conv(x_VD, every, num_layers=1, change=change).mean_RD - x_VD for _ in range(2000)]
    for one_VV in drawn[:20]:
        assert torch.equal(one_VV, one_VV.T)
    a_VV = dense(graph).float()
    ratio = torch.stack(drawn)[:, a_VV > 0] / a_VV[a_VV > 0]
    assert set(ratio.flatten().mul(1000).round().unique().tolist()) == {0.0, 1333.0}
    # 2,000 draws of a mean of 1 and a standard deviation of .58: within five errors of .013
    torch.testing.assert_close(ratio.mean(0), torch.ones(ratio.shape[1]), rtol=0, atol=0.065)


def test_noise_has_its_length_and_stays_in_the_orthant() -> None:
    torch.manual_seed(0)
    graph = make_graph(random_events())
    conv, every = GraphConv(graph), torch.arange(graph.num_nodes)
    x_VD = torch.randn(graph.num_nodes, 16)
    kwargs = {"num_layers": 1, "view_layer": 1}
    clean_VD = conv(x_VD, every, **kwargs).view_RD
    noisy_VD = conv(x_VD, every, **kwargs, change=Perturbation(noise=0.3)).view_RD
    noise_VD = noisy_VD - clean_VD
    tied = graph.degree_V > 0
    torch.testing.assert_close(noise_VD.norm(dim=1)[tied], torch.full((int(tied.sum()),), 0.3))
    assert (noise_VD * clean_VD >= 0).all()
    assert not noise_VD[~tied].any()
    again_VD = conv(x_VD, every, **kwargs, change=Perturbation(noise=0.3)).view_RD
    assert not torch.equal(again_VD, noisy_VD)


def model_of(events: Interactions, config: LightGCNConfig | None = None, seed: int = 0) -> LightGCN:
    config = config or LightGCNConfig(embedding_dim=8)
    torch.manual_seed(seed)
    graph = graph_of(events, config.graph)
    return LightGCN(config, num_users=events.num_users, num_items=events.num_items, graph=graph)


def all_queries(events: Interactions) -> Queries:
    return Queries(
        user_B=torch.arange(events.num_users),
        history_N=torch.from_numpy(events.item_idx).long(),
        offsets_B1=torch.from_numpy(events.offsets),
    )


BOTH = pytest.mark.parametrize(
    "config",
    [
        LightGCNConfig(embedding_dim=8),
        LightGCNConfig(embedding_dim=8, num_layers=2, transform=True),
        LightGCNConfig(embedding_dim=8, similarity="cosine", temperature=0.2, num_layers=1),
        LightGCNConfig(embedding_dim=8, propagation="reference"),
    ],
    ids=["light", "transformed", "cosine", "reference"],
)


@BOTH
def test_what_is_learned_from_is_what_is_answered(config: LightGCNConfig) -> None:
    events = random_events()
    model = model_of(events, config).eval()
    vectors = model(all_queries(events), torch.arange(9))
    encoded = model.encode(all_queries(events))
    # in training, isolated nodes have an untrained vector too; answers have none
    torch.testing.assert_close(encoded[:11], vectors.query_BD[:11])
    torch.testing.assert_close(every_vector(model)[:8], vectors.item_VD[:8])
    assert not encoded[11].any()
    assert not every_vector(model)[8].any()


def test_a_new_user_is_what_the_graph_would_give_a_node_of_its_own_degree() -> None:
    # e = 1/(L+1) sum_l sum_i (n d_i)^-1/2 e_i^(l), n = 3 items, layers 0 to L - 1
    events = random_events()
    model = model_of(events).eval()
    graph = graph_of(events)
    a_VV = dense(graph)
    layer_VD = model._layer_0().detach().double()
    sent_VD = torch.zeros_like(layer_VD)
    for _ in range(3):
        sent_VD += layer_VD
        layer_VD = a_VV @ layer_VD
    history = [0, 3, 5]
    expected_D = sum(
        sent_VD[12 + item] / (3 * int(graph.degree_V[12 + item])) ** 0.5 for item in history
    )
    found_BD = model.encode(Queries.of_histories([history, [5, 3, 0, 0, 8]]))
    torch.testing.assert_close(found_BD[0].double(), expected_D / 4, rtol=1e-5, atol=1e-7)
    assert torch.equal(found_BD[1], found_BD[0])  # repeats, and items without a tie, do not count


@BOTH
def test_a_known_user_with_more_events_is_what_a_graph_with_them_would_give(
    config: LightGCNConfig,
) -> None:
    # one layer: then neighbours have nothing to learn from the new tie but their degree, and that
    # is put back by hand
    config = config.model_copy(update={"num_layers": 1})
    events = events_of([[0, 1], [1, 2], [2, 3]], num_items=4)
    model = model_of(events, config).eval()
    grown = model_of(events_of([[0, 1, 2], [1, 2], [2, 3]], num_items=4), config).eval()
    grown.load_state_dict(model.state_dict())
    assert grown.conv is not None
    assert model.conv is not None
    grown.conv.scale_V[3:] = model.conv.scale_V[3:]
    query = Queries(
        user_B=torch.tensor([0]),
        history_N=torch.tensor([0, 1, 2]),
        offsets_B1=torch.tensor([0, 3]),
    )
    torch.testing.assert_close(model.encode(query), grown.encode(query))
    short = replace(query, history_N=torch.tensor([0]), offsets_B1=torch.tensor([0, 1]))
    torch.testing.assert_close(
        model.encode(short), model.encode(Queries.of_histories([[0]]))
    )  # a user with fewer links is placed by these alone


def test_a_run_by_the_reference_is_the_fast_run() -> None:
    events, queries = planted(), Queries.of_histories([[0, 1], [7], [], [23, 2, 8]])
    fast, slow = (
        trained(events, LightGCNConfig(embedding_dim=8, propagation=name), epochs=3)
        for name in ("fast", "reference")
    )
    for ask in (all_queries(events), queries):
        torch.testing.assert_close(slow.encode(ask), fast.encode(ask), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(every_vector(slow), every_vector(fast), rtol=1e-3, atol=1e-4)


def test_another_equation_in_place_of_the_reference_is_learned_and_answered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The last layer alone, as a student might try: known and new users, items, and training."""

    def last_layer(layer_0_ND: Tensor, send: Send, *, num_layers: int) -> Tensor:
        for _ in range(num_layers):
            layer_0_ND = send(layer_0_ND)
        return layer_0_ND

    events = random_events()
    config = LightGCNConfig(embedding_dim=8, num_layers=2, propagation="reference")
    before = model_of(events, config).eval()
    history = Queries.of_histories([[0, 3, 5]])
    a_VV, layer_VD = dense(graph_of(events)).float(), before._layer_0().detach()
    of_item_ID = (a_VV @ a_VV @ layer_VD)[12:]
    means = before.encode(history), every_vector(before)
    monkeypatch.setattr(lightgcn, "propagate", last_layer)
    model = model_of(events, config).eval()
    vectors = model(all_queries(events), torch.arange(9))
    torch.testing.assert_close(vectors.item_VD, of_item_ID)
    torch.testing.assert_close(every_vector(model), of_item_ID)
    torch.testing.assert_close(model.encode(all_queries(events)), vectors.query_BD)
    # a new user is the sum of (n d_i)^-1/2 times the first layer of the items
    degree_I = torch.from_numpy(graph_of(events).degree_V[12:])
    one_ID = (a_VV @ layer_VD)[12:]
    new_D = sum(one_ID[item] / (3 * degree_I[item]) ** 0.5 for item in (0, 3, 5))
    torch.testing.assert_close(model.encode(history)[0], new_D)
    assert not torch.allclose(means[0], model.encode(history))
    assert not torch.allclose(means[1], every_vector(model))


def planted(num_users: int = 80, *, extra_items: int = 0) -> Interactions:
    """Each user does four of the six items of one of four groups."""
    rng = np.random.default_rng(0)
    histories = [
        (user % GROUPS * SIZE + rng.permutation(SIZE)[:4]).tolist() for user in range(num_users)
    ]
    return events_of(histories, num_items=GROUPS * SIZE + extra_items)


def trained(
    events: Interactions, config: LightGCNConfig, *, epochs: int = 20, **objective: object
) -> LightGCN:
    model = model_of(events, config)
    Fit(
        model,
        TrainingConfig(epochs=epochs, learning_rate=0.03, warmup_steps=5, device="cpu"),
        seed=0,
        plan=lambda epoch: plan_pairs(
            events, batch_events=100, generator=epoch_generator(0, epoch)
        ),
        objective=Pairs(PairsConfig(**objective), events),  # type: ignore[arg-type]
    ).run()
    model.finish()
    return model.eval()


def groups_of(score_BI: Tensor, best: int = 4) -> Tensor:
    """The group of each of the best items."""
    return score_BI[:, : GROUPS * SIZE].topk(best).indices // SIZE


@BOTH
def test_cold_users_are_near_their_group(config: LightGCNConfig) -> None:
    events = planted()
    model = trained(events, config)
    table_ID = every_vector(model)
    histories = [[group * SIZE, group * SIZE + 1] for group in range(GROUPS)]
    user_BD = model.encode(Queries.of_histories(histories))
    # by chance a quarter of the best are of the right group
    assert (groups_of(user_BD @ table_ID.T) == torch.arange(GROUPS).unsqueeze(1)).all()


def with_friends_alone() -> tuple[Interactions, Interactions]:
    """The first four users lose their events: without and with links to three of their group."""
    events = planted()
    cold = events.select(events.user_idx >= GROUPS)
    friends = np.array([[user, user + 4 * step] for user in range(4) for step in (1, 2, 3)])
    return cold, replace(cold, user_links=friends.T.astype(np.int32))


@pytest.mark.parametrize("config", [LightGCNConfig(embedding_dim=8), PinSageConfig()])
def test_a_user_known_by_friends_alone_is_answered_by_the_model(
    config: LightGCNConfig | PinSageConfig, tmp_path: Path
) -> None:
    cold, linked = with_friends_alone()
    training = TrainingConfig(epochs=20, batch_events=100, learning_rate=0.03, warmup_steps=5)
    for events, source in ((linked, "model"), (cold, "popular")):
        split = ft.leave_last_split(events, validation=False)
        trained = ft.fit(config, split, training=training, show=False)
        ft.build_recommender(trained).save(tmp_path / source)
        recommender = ft.load(tmp_path / source)
        answers = [recommender.recommend(user, k=4) for user in range(GROUPS)]
        many = recommender.recommend_many(range(GROUPS), k=4)
        assert {answer.source for answer in answers} == set(many["source"]) == {source}
        lists = [[row.item_id for row in answer.rows] for answer in answers]
        assert many["item_id"].to_list() == lists
        if source == "model":  # by chance a quarter of the best are of the right group
            assert [[item // SIZE for item in found] for found in lists] == [
                [group] * 4 for group in range(GROUPS)
            ]


def test_a_user_with_only_links_is_near_the_group_of_the_linked() -> None:
    cold, linked = with_friends_alone()
    model = trained(linked, LightGCNConfig(embedding_dim=8))
    query = Queries(
        user_B=torch.arange(GROUPS),
        history_N=torch.empty(0, dtype=torch.int64),
        offsets_B1=torch.zeros(GROUPS + 1, dtype=torch.int64),
    )
    best = groups_of(model.encode(query) @ every_vector(model).T)
    assert (best == torch.arange(GROUPS).unsqueeze(1)).all()
    alone = trained(cold, LightGCNConfig(embedding_dim=8))
    assert not alone.encode(query).any()


@pytest.mark.parametrize("kind", ["attribute", "link"])
def test_an_item_known_by_attributes_or_links_alone_is_placed(kind: str) -> None:
    events = planted(
        extra_items=GROUPS + 1
    )  # 24 to 27 are new, one a group; of 28 nothing is known
    genre = [*(item // SIZE for item in range(GROUPS * SIZE)), *range(GROUPS), None]
    links = [[24 + group, group * SIZE + step] for group in range(GROUPS) for step in range(3)]
    if kind == "attribute":
        events = replace(events, item_table=pl.DataFrame({"genre": genre}))
    else:
        events = replace(events, item_links=np.array(links, np.int32).T.copy())
    attributes = ("genre",) if kind == "attribute" else ()
    config = LightGCNConfig(embedding_dim=8, graph=GraphConfig(attributes=attributes))
    model = trained(events, config)
    assert model.known_items().tolist() == [False] * 24 + [True] * 4 + [False]
    score_UI = model.encode(all_queries(events)) @ every_vector(model).T
    assert (score_UI[:, 24:28].argmax(1) == torch.arange(80) % GROUPS).all()
    fresh = LightGCN(config, num_users=80, num_items=events.num_items)
    fresh.load_state_dict(model.state_dict())  # it does not know how many attributes there were
    assert torch.equal(every_vector(fresh.eval()), every_vector(model))
    assert torch.equal(fresh.known_items(), model.known_items())


def test_noise_contrast_and_dropped_edges_still_find_the_planted_groups() -> None:
    events = planted()
    config = LightGCNConfig(
        embedding_dim=8, noise=0.1, contrast_layer=1, contrast_rows=30, edge_dropout=0.2
    )
    model = trained(events, config, contrast=0.1)
    best = groups_of(model.encode(all_queries(events)) @ every_vector(model).T)
    assert (best == (torch.arange(80) % GROUPS).unsqueeze(1)).float().mean() > 0.95


def test_contrast_without_two_views_is_refused() -> None:
    with pytest.raises(ConfigError, match="contrast_layer"):
        trained(planted(), LightGCNConfig(embedding_dim=8), contrast=0.1)


def test_views_are_the_final_and_one_layers_vectors_of_different_rows() -> None:
    events = planted()
    model = model_of(events, LightGCNConfig(embedding_dim=8, contrast_layer=2, contrast_rows=5))
    query = Queries(
        user_B=torch.tensor([3, 3, 7]),
        history_N=torch.empty(0, dtype=torch.int64),
        offsets_B1=torch.zeros(4, dtype=torch.int64),
    )
    users, items = model(query, torch.arange(20)).views
    assert users[0].shape == users[1].shape == (2, 8)  # user 3 once
    assert items[0].shape == items[1].shape == (5, 8)
    a_VV = dense(graph_of(events)).float()
    layer_VD = a_VV @ a_VV @ model._layer_0()
    rows = {tuple(row) for row in users[1].mul(1e4).round().int().tolist()}
    wanted = {tuple(row) for row in layer_VD[[3, 7]].mul(1e4).round().int().tolist()}
    assert rows == wanted


def test_what_was_propagated_is_kept_in_evaluation_and_forgotten_after() -> None:
    events = random_events()
    model = model_of(events).eval()
    before = every_vector(model)
    with torch.no_grad():
        for table in model._node_tables():
            table.block(0, table.num_rows).mul_(2)
    assert torch.equal(every_vector(model), before)
    torch.testing.assert_close(every_vector(model.eval()), 2 * before)
    torch.testing.assert_close(every_vector(model.train()), 2 * before)


def test_a_copy_learns_apart_and_a_loaded_model_needs_no_graph() -> None:
    events = random_events()
    model = model_of(events).eval()
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for table in copied._node_tables():
            table.block(0, table.num_rows).zero_()
    assert every_vector(model.eval()).any()
    assert not every_vector(copied.eval()).any()
    model.finish()
    loaded = LightGCN(model.config, num_users=12, num_items=9)
    loaded.load_state_dict(model.state_dict(), assign=True)
    query = Queries.of_histories([[0, 1], [], [8]])
    assert torch.equal(loaded.eval().encode(query), model.encode(query))
    assert torch.equal(loaded.encode(all_queries(events)), model.encode(all_queries(events)))
    with pytest.raises(ConfigError, match="graph"):
        loaded(all_queries(events), torch.arange(9))
    assert not any("conv" in name for name in model.state_dict())


@pytest.mark.parametrize(
    "settings",
    [{"contrast_layer": 4}, {"transform": True, "noise": 0.1}, {"noise": float("nan")}],
)
def test_settings_that_do_not_go_together_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        LightGCNConfig(**settings)  # type: ignore[arg-type]

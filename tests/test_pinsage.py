"""PinSage: the frontier against a recursion, generation in blocks, and its switches."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from torch import Tensor

from foretaste.data.batch import Queries
from foretaste.data.features import fit_features
from foretaste.data.features_schema import CategoricalField, FeatureSchema
from foretaste.data.graph import GraphConfig, graph_of
from foretaste.data.interactions import Interactions
from foretaste.data.walks import Neighbourhoods, make_frontier
from foretaste.errors import ConfigError
from foretaste.models.layers.pooling import Convolve, generate, pool
from foretaste.models.pinsage import PinSage, PinSageConfig
from foretaste.training.objectives import PairsConfig
from tests.worlds import events_of, every_vector, learn

NUM_USERS, NUM_ITEMS = 12, 9


def world(seed: int = 0) -> Interactions:
    """Users of one to five items; user 11 has no event, and neither has item 8."""
    rng = np.random.default_rng(seed)
    histories = [rng.permutation(8)[: rng.integers(1, 6)].tolist() for _ in range(11)]
    return events_of([*histories, []], num_items=NUM_ITEMS)


def model_of(events: Interactions, **settings: object) -> PinSage:
    torch.manual_seed(0)
    config = PinSageConfig.model_validate(
        {"embedding_dim": 8, "num_neighbours": 3, "id_dropout": 0.0} | settings
    )
    model = PinSage(
        config,
        num_users=events.num_users,
        num_items=events.num_items,
        graph=graph_of(events, config.graph),
    )
    with torch.no_grad():  # away from the identity, or matrices could be swapped unnoticed
        for parameter in model.convolutions.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def queries_of(users: list[int], histories: list[list[int]] | None = None) -> Queries:
    queries = Queries.of_histories(histories or [[] for _ in users])
    return replace(queries, user_B=torch.tensor(users, dtype=torch.int64))


def ids(model: PinSage) -> Tensor:
    """Return the vectors of users, of items, and the one of unknown users."""
    users, items = model.inputs.user_table, model.inputs.item_table
    assert users is not None
    assert items is not None
    assert model.inputs.everybody_1D is not None
    rows = users.block(0, users.num_rows), items.block(0, items.num_rows)
    return torch.cat([*rows, model.inputs.everybody_1D])


def vector_of(model: PinSage, node: int, layer: int) -> Tensor:
    """The definition, one node at a time, in 64 bits."""
    if layer == 0:
        linked = bool(model.inputs.linked_X[node])
        return ids(model)[node if linked else -1].double()
    convolve, table = model.convolutions[layer - 1], model.neighbourhoods
    assert isinstance(convolve, Convolve)
    assert table is not None
    said = torch.zeros(convolve.message_width, dtype=torch.float64)
    for neighbour, weight in zip(table.neighbour_VT[node], table.weight_VT[node], strict=True):
        if neighbour >= 0:
            h = vector_of(model, int(neighbour), layer - 1)
            message = convolve.message.weight.double() @ h + convolve.message.bias.double()
            said += float(weight) * message.clamp(min=0)
    own = torch.cat([vector_of(model, node, layer - 1), said])
    x = convolve.update.weight.double() @ own + convolve.update.bias.double()
    return x / x.norm()


@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_a_batch_equals_the_recursion(num_layers: int) -> None:
    model = model_of(world(), num_layers=num_layers, similarity="dot", temperature=1.0)
    users, items = [3, 0, 3, 11, 7], [8, 2, 5]
    vectors = model(queries_of(users), torch.tensor(items))
    for row, user in enumerate(users):
        torch.testing.assert_close(
            vectors.query_BD[row].double(), vector_of(model, user, num_layers), rtol=1e-5, atol=1e-6
        )
    for row, item in enumerate(items):
        exact = vector_of(model, NUM_USERS + item, num_layers)
        torch.testing.assert_close(vectors.item_VD[row].double(), exact, rtol=1e-5, atol=1e-6)


def test_all_nodes_layer_by_layer_are_those_of_a_batch() -> None:
    model = model_of(world())
    users, items = torch.arange(NUM_USERS), torch.arange(NUM_ITEMS)
    vectors = model(queries_of(users.tolist()), items)
    model.eval()
    torch.testing.assert_close(every_vector(model), vectors.item_VD)
    torch.testing.assert_close(model.encode(queries_of(users.tolist())), vectors.query_BD)


def test_gradients_are_those_of_the_definition() -> None:
    torch.manual_seed(0)
    table = random_table(num_nodes=20, top=4)
    layer = make_frontier(table, np.array([1, 5, 6, 19]), num_layers=1).layers[0]
    message_SH = torch.randn(len(layer.back_S1) - 1, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda message: pool(message, layer), (message_SH,))


def random_table(*, num_nodes: int, top: int, seed: int = 0) -> Neighbourhoods:
    rng = np.random.default_rng(seed)
    table = Neighbourhoods.empty(num_nodes, top)
    for node in range(num_nodes - 1):  # the last one has no events
        others = rng.permutation(num_nodes)[: rng.integers(1, top + 1)]
        weight = np.sort(rng.random(len(others)))[::-1]
        table.neighbour_VT[node, : len(others)] = others
        table.weight_VT[node, : len(others)] = weight / weight.sum()
    return table


def test_a_frontier_holds_no_node_twice_and_none_too_many() -> None:
    table = random_table(num_nodes=60, top=3)
    wanted = np.array([2, 3, 31, 59])
    frontier = make_frontier(table, wanted, num_layers=3)
    needed = [set(wanted.tolist())]
    for _ in range(3):
        nobody_yet = needed[-1]
        rows = table.neighbour_VT[sorted(nobody_yet)]
        needed.append(nobody_yet | set(rows[rows >= 0].tolist()))
    sizes = [len(layer.self_R) for layer in frontier.layers]
    assert sizes == [len(nodes) for nodes in needed[2::-1]]
    assert frontier.input_S.tolist() == sorted(needed[3])
    assert frontier.layers[0].back_S1.shape == (len(needed[3]) + 1,)


def test_each_node_is_worked_out_once_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    worked: list[int] = []
    original = Convolve.messages

    def counting(self: Convolve, h_SD: Tensor, columns: slice = slice(None)) -> Tensor:
        worked.append(len(h_SD))
        return original(self, h_SD, columns)

    monkeypatch.setattr(Convolve, "messages", counting)
    table, layers = random_table(num_nodes=100, top=5), [Convolve(4, 6, 4), Convolve(4, 6, 4)]
    generate(layers, table, lambda low, high: torch.randn(high - low, 4), block_nodes=13)
    assert sum(worked) == 2 * 100
    worked.clear()
    model = model_of(world())
    frontier = model.prepare(queries_of([0, 0, 1]), torch.tensor([3])).frontier
    model(queries_of([0, 0, 1]), torch.tensor([3]))
    assert worked == [len(layer.back_S1) - 1 for layer in frontier.layers]


@pytest.mark.parametrize(
    "sizes", [{"block_nodes": 7}, {"gathered_bytes": 100 * 4 * 2}, {"gathered_bytes": 1}]
)
@pytest.mark.parametrize("in_files", [False, True])
def test_blocks_slices_and_files_change_nothing(
    sizes: dict[str, int], tmp_path: Path, *, in_files: bool
) -> None:
    torch.manual_seed(0)
    table, layers = random_table(num_nodes=100, top=5), [Convolve(4, 6, 5), Convolve(5, 3, 4)]
    input_VD = torch.randn(100, 4)
    whole = generate(layers, table, lambda low, high: input_VD[low:high])
    parts = generate(
        layers,
        table,
        lambda low, high: input_VD[low:high],
        folder=tmp_path if in_files else None,
        **sizes,  # type: ignore[arg-type]
    )
    torch.testing.assert_close(parts.read(0, 100), whole.read(0, 100), rtol=1e-6, atol=1e-6)
    assert [file.name for file in tmp_path.iterdir()] == ["layer-2.f32"] * in_files


def test_uniform_neighbours_really_switch() -> None:
    by_walks, uniform = (model_of(world(), neighbours=kind) for kind in ("ppr", "uniform"))
    assert by_walks.neighbourhoods is not None
    assert uniform.neighbourhoods is not None
    users = uniform.neighbourhoods.neighbour_VT[:NUM_USERS]
    assert ((users == -1) | (users >= NUM_USERS)).all()  # users have edges to items only
    weight_VT = uniform.neighbourhoods.weight_VT
    assert all(len(set(row[row > 0].tolist())) <= 1 for row in weight_VT)
    reached = by_walks.neighbourhoods.neighbour_VT[:NUM_USERS]
    assert ((reached >= 0) & (reached < NUM_USERS)).any()  # walks come to other users too
    assert not torch.equal(every_vector(by_walks.eval()), every_vector(uniform.eval()))


def test_dropout_of_ids_and_neighbours_happens_in_training_only() -> None:
    for settings in ({"id_dropout": 0.5}, {"cold_share": 0.5}):
        model = model_of(world(), **settings)
        queries, items = queries_of([0, 1, 2, 3]), torch.arange(5)
        one, other = (model(queries, items).item_VD for _ in range(2))
        assert not torch.equal(one, other)
        model.eval()
        one, other = (model(queries, items).item_VD for _ in range(2))
        assert torch.equal(one, other)


def test_all_cold_users_and_items_get_the_same_vector() -> None:
    model = model_of(world(), cold_share=0.999999)
    vectors = model(queries_of([0, 1, 2]), torch.arange(8))
    assert (vectors.item_VD - vectors.item_VD[0]).abs().max() < 1e-6


def test_a_new_user_is_a_new_node() -> None:
    # by hand: one layer, so the vector is W [newcomer ; mean of the items' messages]
    events = world()
    model = model_of(events, num_layers=1, similarity="dot", temperature=1.0)
    model.finish()
    model.eval()
    convolve = model.convolutions[0]
    assert isinstance(convolve, Convolve)
    item_2D = ids(model)[NUM_USERS + torch.tensor([2, 6])]
    said = torch.relu(convolve.message(item_2D)).mean(dim=0)
    expected = convolve.update(torch.cat([ids(model)[-1], said]))
    queries = Queries.of_histories([[6, 2, 6], []])
    encoded_BD = model.encode(queries)
    torch.testing.assert_close(encoded_BD[0], expected / expected.norm())
    assert encoded_BD[1].isfinite().all()


def test_a_known_user_is_their_own_vector_until_they_do_more() -> None:
    events = world()
    model = model_of(events)
    model.begin(events)
    model.finish()
    model.eval()
    history = events.history(4).tolist()
    own, again = model.encode(queries_of([4, 4], [history, [*history, history[0]]]))
    torch.testing.assert_close(own, again)
    fresh = next(item for item in range(8) if item not in history)
    moved = model.encode(queries_of([4], [[*history, fresh]]))[0]
    assert not torch.allclose(own, moved)


def test_without_a_graph_it_answers_but_does_not_learn() -> None:
    events = world()
    trained = model_of(events)
    trained.finish()
    loaded = PinSage(trained.config, num_users=NUM_USERS, num_items=NUM_ITEMS)
    loaded.load_state_dict(trained.state_dict())
    queries = Queries.of_histories([[1, 2], []])
    assert torch.equal(loaded.eval().encode(queries), trained.eval().encode(queries))
    assert torch.equal(every_vector(loaded), every_vector(trained))
    with pytest.raises(ConfigError, match="without a graph"):
        loaded(queries_of([0]), torch.tensor([0]))


def test_what_was_worked_out_is_forgotten_when_weights_change() -> None:
    model = model_of(world()).eval()
    before = every_vector(model)
    with torch.no_grad():
        model.convolutions[0].get_parameter("update.bias").add_(1.0)
    torch.testing.assert_close(every_vector(model), before)  # kept while in evaluation
    assert not torch.allclose(every_vector(model.eval()), before)


def two_groups(num_items: int = 40) -> Interactions:
    """Users do five items of one of four groups; the last two items of a group have no events."""
    rng = np.random.default_rng(0)
    group = [[4 * place + number for place in range(num_items // 4)] for number in range(4)]
    histories = [rng.permutation(group[user % 4][:-2])[:5].tolist() for user in range(160)]
    events = events_of(histories, num_items=num_items)
    names = [["red", "green", "blue", "grey"][item % 4] for item in range(num_items)]
    return replace(events, item_table=pl.DataFrame({"colour": names}))


@pytest.mark.parametrize("settings", [{}, {"ids": False}])
def test_items_without_events_are_placed_by_their_features(settings: dict[str, object]) -> None:
    # of 8 items without events, 2 are of the user's group: by chance a quarter
    events = two_groups()
    schema = FeatureSchema(item={"colour": CategoricalField()})
    config = PinSageConfig.model_validate(
        {"embedding_dim": 16, "id_dropout": 0.3, "cold_share": 0.3} | settings
    )
    torch.manual_seed(0)
    model = PinSage(
        config,
        num_users=events.num_users,
        num_items=events.num_items,
        graph=graph_of(events),
        features=fit_features(schema, events),
    )
    learn(model, events, PairsConfig())
    assert model.known_items().all()
    score_BI = (
        model.encode(Queries.of_histories([[4], [1, 5], [2], [3, 7]])) @ every_vector(model).T
    )
    cold = torch.arange(32, 40)
    best_B2 = cold[score_BI[:, cold].topk(2).indices]
    assert (best_B2 % 4 == torch.arange(4).unsqueeze(1)).all()


def test_features_of_another_number_of_items_are_refused() -> None:
    events = two_groups()
    features = fit_features(FeatureSchema(item={"colour": CategoricalField()}), events)
    with pytest.raises(ConfigError, match="features of 40 items for 41"):
        PinSage(PinSageConfig(), num_users=events.num_users, num_items=41, features=features)


def test_items_without_events_are_placed_by_shared_attributes() -> None:
    events = two_groups()
    config = PinSageConfig(embedding_dim=16, graph=GraphConfig(attributes=("colour",)))
    torch.manual_seed(0)
    model = PinSage(
        config,
        num_users=events.num_users,
        num_items=events.num_items,
        graph=graph_of(events, config.graph),
    )
    assert model.neighbourhoods is not None
    assert model.neighbourhoods.neighbour_VT.max() < events.num_users + events.num_items
    learn(model, events, PairsConfig())
    assert model.known_items().all()
    score_BI = (
        model.encode(Queries.of_histories([[4], [1, 5], [2], [3, 7]])) @ every_vector(model).T
    )
    cold = torch.arange(32, 40)
    best_B2 = cold[score_BI[:, cold].topk(2).indices]
    assert (best_B2 % 4 == torch.arange(4).unsqueeze(1)).float().mean() > 0.7


def test_an_item_without_edges_and_features_has_no_vector() -> None:
    model = model_of(world())
    assert model.known_items().tolist() == [True] * 8 + [False]


def test_neither_ids_nor_features_is_an_error() -> None:
    with pytest.raises(ConfigError, match="leave the model without input"):
        model_of(world(), ids=False)

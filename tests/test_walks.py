"""Random walks: which nodes they visit, how often, and what does not change them."""

import numpy as np
import pytest

from foretaste.data.graph import Graph
from foretaste.data.walks import Neighbourhoods, most_visited, uniform_neighbours
from foretaste.errors import ConfigError, DataError


def graph_of_ties(
    ties: list[tuple[int, int]], *, num_nodes: int, weights: list[float] | None = None
) -> Graph:
    weights = weights or [1.0] * len(ties)
    rows = list(zip(ties, weights, strict=True))
    both = sorted([(a, b, w) for (a, b), w in rows] + [(b, a, w) for (a, b), w in rows])
    start = np.searchsorted([a for a, _, _ in both], np.arange(num_nodes + 1))
    return Graph(
        num_users=0,
        num_items=num_nodes,
        offsets_V1=start.astype(np.int64),
        neighbour_E=np.array([b for _, b, _ in both], dtype=np.int32),
        weight_E=None
        if set(weights) <= {1.0}
        else np.array([w for _, _, w in both], dtype=np.float32),
    )


def random_graph(
    seed: int = 0, num_nodes: int = 30, num_ties: int = 60, *, weighted: bool = False
) -> Graph:
    rng = np.random.default_rng(seed)
    pairs = rng.integers(0, num_nodes - 1, (num_ties, 2))  # the last node stays isolated
    ties = sorted({(min(a, b), max(a, b)) for a, b in pairs.tolist() if a != b})
    weights = rng.uniform(0.1, 3, len(ties)).tolist() if weighted else None
    return graph_of_ties(ties, num_nodes=num_nodes, weights=weights)


def transition(graph: Graph) -> np.ndarray:
    """The dense matrix of one hop, row by row."""
    hop_VV = np.zeros((graph.num_nodes, graph.num_nodes))
    weight_E = np.ones(len(graph.neighbour_E)) if graph.weight_E is None else graph.weight_E
    for node in range(graph.num_nodes):
        edges = slice(graph.offsets_V1[node], graph.offsets_V1[node + 1])
        hop_VV[node, graph.neighbour_E[edges]] = weight_E[edges] / weight_E[edges].sum()
    return hop_VV


def expected_shares(graph: Graph, *, hops: int, restart: float) -> np.ndarray:
    """Where walks are after each hop, added up, without the start, a share each."""
    hop_VV, start_VV = transition(graph), np.eye(graph.num_nodes)
    here_VV, visits_VV = start_VV, np.zeros_like(start_VV)
    for _ in range(hops):
        here_VV = (restart * start_VV + (1 - restart) * here_VV) @ hop_VV
        visits_VV += here_VV
    np.fill_diagonal(visits_VV, 0)
    return visits_VV / np.maximum(visits_VV.sum(axis=1, keepdims=True), 1e-12)


def dense(found: Neighbourhoods, num_nodes: int) -> np.ndarray:
    share = np.zeros((len(found), num_nodes + 1))
    np.put_along_axis(share, found.neighbour_VT.astype(np.int64), found.weight_VT, axis=1)
    return share[:, :num_nodes]


@pytest.mark.parametrize("restart", [0.0, 0.3])
@pytest.mark.parametrize("weighted", [False, True])
def test_visits_are_those_of_the_dense_matrix(*, restart: float, weighted: bool) -> None:
    # 200,000 walks: a share of p is off by sqrt(p (1 - p) / 200,000) < .0012, times 5
    graph = random_graph(weighted=weighted)
    found = most_visited(graph, top=30, seed=1, walks=200_000, hops=3, restart=restart)
    exact = expected_shares(graph, hops=3, restart=restart)
    assert np.abs(dense(found, 30) - exact).max() < 0.006


def test_visits_pass_a_chi_squared_test() -> None:
    # from the hub of a star one hop goes to 20 leaves uniformly: chi-squared of 19 degrees of
    # freedom is above 45 with chance .0007
    star = graph_of_ties([(0, leaf) for leaf in range(1, 21)], num_nodes=21)
    found = most_visited(star, top=20, seed=3, walks=20_000, hops=1, nodes=np.array([0]))
    count = found.weight_VT[0] * 20_000
    assert len(set(found.neighbour_VT[0].tolist())) == 20
    assert ((count - 1000) ** 2 / 1000).sum() < 45


def test_long_walks_tend_to_personalised_pagerank() -> None:
    # total variation is half the sum of differences; with 400,000 visits of about 20 nodes it is
    # .003 by chance alone
    graph, alpha = random_graph(seed=2), 0.25
    found = most_visited(graph, top=30, seed=0, walks=1000, hops=400, restart=alpha)
    pagerank = alpha * np.linalg.inv(np.eye(30) - (1 - alpha) * transition(graph))
    np.fill_diagonal(pagerank, 0)
    exact = pagerank / np.maximum(pagerank.sum(axis=1, keepdims=True), 1e-12)
    linked = graph.degree_V > 0
    distance = 0.5 * np.abs(dense(found, 30) - exact)[linked].sum(axis=1)
    assert distance.max() < 0.02


def test_the_most_visited_come_first_and_weights_add_up() -> None:
    graph = random_graph()
    few, all_of_them = (most_visited(graph, top=top, seed=5) for top in (4, 30))
    assert np.array_equal(few.neighbour_VT, all_of_them.neighbour_VT[:, :4])
    assert (np.diff(all_of_them.weight_VT, axis=1) <= 0).all()
    np.testing.assert_allclose(few.weight_VT.sum(axis=1), graph.degree_V > 0, atol=1e-6)
    assert ((few.neighbour_VT >= 0) == (few.weight_VT > 0)).all()


def test_threads_and_company_change_nothing() -> None:
    rng = np.random.default_rng(0)
    ties = sorted({(int(a), int(b)) for a, b in rng.integers(0, 6000, (9000, 2)) if a < b})
    graph = graph_of_ties(ties, num_nodes=6000)
    one, three = (most_visited(graph, top=5, seed=7, walks=20, threads=t) for t in (1, 3))
    assert np.array_equal(one.neighbour_VT, three.neighbour_VT)
    assert np.array_equal(one.weight_VT, three.weight_VT)
    some = np.array([5999, 3, 4000])
    alone = most_visited(graph, top=5, seed=7, walks=20, nodes=some)
    assert np.array_equal(alone.neighbour_VT, one.neighbour_VT[some])
    other = most_visited(graph, top=5, seed=8, walks=20)
    assert not np.array_equal(other.neighbour_VT, one.neighbour_VT)


def test_uniform_neighbours_are_direct_and_have_equal_weights() -> None:
    # each of 2,000 hubs has the same 20 neighbours, and 5 are drawn: each with chance 1/4, so a
    # leaf is drawn 500 +- 19 times
    ties = [(hub, leaf) for hub in range(20, 2020) for leaf in range(20)]
    both = graph_of_ties(ties, num_nodes=2020)
    found = uniform_neighbours(both, top=5, seed=0)
    assert all(len(set(row)) == 5 for row in found.neighbour_VT[20:].tolist())
    drawn = np.bincount(found.neighbour_VT[20:].ravel(), minlength=20)
    assert (np.abs(drawn - 500) < 5 * 19.4).all()
    np.testing.assert_allclose(found.weight_VT, 0.2)
    other = uniform_neighbours(both, top=5, seed=1)
    assert not np.array_equal(other.neighbour_VT, found.neighbour_VT)
    few = uniform_neighbours(graph_of_ties([(0, 1), (0, 2)], num_nodes=4), top=3, seed=0)
    assert few.neighbour_VT.tolist() == [[1, 2, -1], [0, -1, -1], [0, -1, -1], [-1, -1, -1]]


def test_a_window_of_nodes_is_walked_through_but_only_it_counts() -> None:
    # 0 - 2 - 1: with 2 out of the window, 0 and 1 are each other's only neighbour
    path = graph_of_ties([(0, 2), (1, 2)], num_nodes=3)
    found = most_visited(path, top=3, seed=0, counted=(0, 2))
    assert found.neighbour_VT.tolist() == [[1, -1, -1], [0, -1, -1], [0, 1, -1]] or (
        found.neighbour_VT.tolist() == [[1, -1, -1], [0, -1, -1], [1, 0, -1]]
    )
    assert uniform_neighbours(path, top=3, seed=0, counted=(0, 2)).neighbour_VT[0, 0] == -1


def test_isolated_nodes_and_graphs_of_one_node_have_no_neighbours() -> None:
    alone = graph_of_ties([], num_nodes=1)
    for found in (most_visited(alone, top=3, seed=0), uniform_neighbours(alone, top=3, seed=0)):
        assert (found.neighbour_VT == -1).all()
        assert (found.weight_VT == 0).all()
    assert (most_visited(random_graph(), top=3, seed=0).neighbour_VT[-1] == -1).all()
    empty = graph_of_ties([], num_nodes=0)
    assert most_visited(empty, top=3, seed=0).neighbour_VT.shape == (0, 3)


def test_two_nodes_know_each_other_only() -> None:
    pair = graph_of_ties([(0, 1)], num_nodes=2)
    found = most_visited(pair, top=2, seed=0)
    assert found.neighbour_VT.tolist() == [[1, -1], [0, -1]]
    assert found.weight_VT.tolist() == [[1, 0], [1, 0]]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"top": 0}, "top 0"),
        ({"walks": 0}, "walks 0"),
        ({"hops": 0}, "hops 0"),
        ({"restart": 1.0}, "restart 1.0"),
        ({"walks": 2**20, "hops": 2**10}, "visits a node"),
    ],
)
def test_numbers_out_of_range_are_named(settings: dict[str, float], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        most_visited(random_graph(), **({"top": 3, "seed": 0} | settings))  # type: ignore[arg-type]


def test_an_unknown_node_is_named() -> None:
    with pytest.raises(DataError, match="node 30"):
        most_visited(random_graph(), top=3, seed=0, nodes=np.array([2, 30]))
    with pytest.raises(ConfigError, match="top 0"):
        uniform_neighbours(random_graph(), top=0, seed=0)

"""Graphs of events, links and attributes: which edges they have, and which they leave out."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from foretaste.data.graph import (
    Graph,
    GraphConfig,
    Ties,
    attribute_ties,
    cache_order,
    graph_of,
    make_graph,
)
from foretaste.data.interactions import Interactions
from foretaste.data.merging import concatenate
from foretaste.data.read_config import ReadConfig
from foretaste.data.reading import read_interactions
from foretaste.data.side_tables import read_links
from foretaste.data.sources.load import get_dataset
from foretaste.data.splits import GivenSplitConfig
from foretaste.data.splitting import leave_last_split, make_split
from foretaste.data.store import open_store, write_store
from foretaste.data.vocabulary import Vocabulary
from foretaste.errors import BundleError, ConfigError, DataError

EVENTS = pl.DataFrame({"user": [1, 1, 2, 3, 1], "item": ["a", "b", "b", "c", "a"]})


def read(**links: object) -> Interactions:
    return read_interactions(EVENTS, user="user", item="item", **links)  # type: ignore[arg-type]


def edges(graph: Graph) -> set[tuple[int, int]]:
    return set(zip(graph.node_E.tolist(), graph.neighbour_E.tolist(), strict=True))


def test_events_tie_users_to_items_once_and_both_ways() -> None:
    # users 1, 2, 3 are nodes 0 to 2, items a, b, c nodes 3 to 5; user 1 did a twice
    graph = make_graph(read())
    ties = {(0, 3), (0, 4), (1, 4), (2, 5)}
    assert edges(graph) == ties | {(b, a) for a, b in ties}
    assert graph.degree_V.tolist() == [2, 1, 1, 1, 2, 1]
    assert graph.neighbour_E[graph.offsets_V1[4] : graph.offsets_V1[5]].tolist() == [0, 1]
    assert graph.weight_E is None


def test_double_edges_count_once_and_no_node_has_an_edge_to_itself() -> None:
    ties = np.array([[0, 1, 0, 2, 0], [1, 0, 1, 2, 3]])  # 0-1 thrice, 2-2, an event's edge again
    graph = make_graph(read(), ties=(ties,))
    assert edges(graph) == edges(make_graph(read())) | {(0, 1), (1, 0)}


def test_a_tie_to_a_node_that_does_not_exist_is_refused() -> None:
    for ties in ([[0], [6]], [[-1], [2]]):
        with pytest.raises(DataError, match="graph of 6"):
            make_graph(read(), ties=(np.array(ties),))
    with pytest.raises(DataError, match="of 3"):
        graph_of(replace(read(), user_links=np.array([[0], [3]], np.int32)))
    with pytest.raises(DataError, match="below 0"):
        graph_of(replace(read(), item_links=np.array([[0], [-2]], np.int32)))


@pytest.mark.parametrize("weight", [-1.0, 0.0, float("nan"), float("inf")])
def test_weights_that_are_no_weights_are_refused(weight: float) -> None:
    with pytest.raises(DataError, match="weights"):
        make_graph(read(), ties=(np.array([[0], [1]]),), weights=(weight,))
    if weight != 0:
        with pytest.raises(ConfigError, match="user_links"):
            GraphConfig(user_links=weight)
    with pytest.raises(ConfigError, match="attribute_weight"):
        GraphConfig(attribute_weight=weight)


def test_a_weight_holds_in_both_directions_and_the_heaviest_of_double_edges_counts() -> None:
    links = (np.array([[0, 1], [1, 2]]), np.array([[1, 0], [0, 3]]))
    graph = make_graph(read(), ties=links, weights=(0.5, 2.0))
    assert graph.weight_E is not None
    weight = dict(
        zip(
            zip(graph.node_E.tolist(), graph.neighbour_E.tolist(), strict=True),
            graph.weight_E.tolist(),
            strict=True,
        )
    )
    assert weight[0, 1] == weight[1, 0] == 2.0
    assert weight[1, 2] == weight[2, 1] == 0.5
    assert weight[0, 3] == weight[3, 0] == 2.0  # an event's edge of weight 1, given again with 2
    assert weight[0, 4] == weight[4, 0] == 1.0


def test_links_become_edges_of_the_given_weight_or_none() -> None:
    events = read(
        user_links=pl.DataFrame({"user": [1], "friend": [3]}),
        item_links=pl.DataFrame({"one": ["a"], "other": ["c"]}),
    )
    assert edges(graph_of(events)) == edges(make_graph(events)) | {(0, 2), (2, 0), (3, 5), (5, 3)}
    without = graph_of(events, GraphConfig(user_links=0, item_links=0))
    assert edges(without) == edges(make_graph(events))
    assert graph_of(events, GraphConfig(user_links=0.5)).weight_E is not None


def test_values_that_items_share_become_nodes() -> None:
    items = pl.DataFrame(
        {
            "item": ["a", "b", "c", "d"],
            "genre": [["x", "y"], ["x", "x"], None, ["z"]],
            "maker": ["m", None, "", "m"],
        }
    )
    events = read(items=items)
    graph = graph_of(events, GraphConfig(attributes=("genre", "maker")))
    # nodes: 3 users, 4 items (3 to 6), then x (7) and m (8); y and z are one item's alone
    assert graph.num_nodes == 9
    new = {(a, b) for a, b in edges(graph) - edges(make_graph(events)) if a < b}
    assert new == {(3, 7), (4, 7), (3, 8), (6, 8)}


def test_a_column_that_cannot_be_nodes_is_refused() -> None:
    events = read(items=pl.DataFrame({"item": ["a", "b"], "price": [1.5, 2.0]}))
    with pytest.raises(DataError, match="Float64"):
        attribute_ties(events, "price")
    with pytest.raises(DataError, match=r"\['price'\]"):
        attribute_ties(events, "genre")
    with pytest.raises(DataError, match="no column"):
        attribute_ties(read(), "genre")


def test_a_graph_without_events_or_links_is_isolated_nodes() -> None:
    events = read().select(np.zeros(5, bool))
    graph = graph_of(events)
    assert (graph.num_nodes, len(graph.neighbour_E)) == (6, 0)
    assert sorted(cache_order(graph).tolist()) == list(range(6))


def test_the_cache_order_holds_each_node_once_users_before_items_before_others() -> None:
    rng = np.random.default_rng(0)
    events = replace(read(), item_idx=rng.integers(0, 3, 5).astype(np.int32))
    graph = make_graph(events, ties=(np.array([[3, 5], [6, 7]]),), num_nodes=9)
    order = cache_order(graph).tolist()
    assert sorted(order) == list(range(9))
    assert sorted(order[:3]) == [0, 1, 2]
    assert sorted(order[3:6]) == [3, 4, 5]


def test_links_to_unknown_ids_to_oneself_and_twice_are_left_out_and_counted() -> None:
    links = pl.DataFrame({"user": [1, 1, 9, 2, 3, 3, 1], "friend": [2, 2, 1, 8, 3, 1, 3]})
    events = read(user_links=links)
    assert events.user_links is not None
    assert events.user_links.T.tolist() == [[0, 1], [0, 2], [2, 0]]
    said = "\n".join(events.notes)
    assert "2 links of users name an unknown id" in said
    assert "1 links of users link an id to itself" in said
    assert "1 links of users are repeated" in said
    assert read(user_links=links.head(1)).notes == read().notes


def test_a_weight_of_a_link_is_not_read_and_a_note_says_so() -> None:
    links = pl.DataFrame({"user": [1], "friend": [2], "trust": [float("nan")]})
    assert "of the links of users 'trust' is not read" in " ".join(read(user_links=links).notes)


def test_an_attribute_without_edges_is_refused() -> None:
    items = pl.DataFrame({"item": ["a", "b"], "title": ["One", "Two"], "gone": [None, None]})
    for name in ("title", "gone"):
        with pytest.raises(DataError, match=f"no two items share a value of column '{name}'"):
            attribute_ties(read(items=items), name)


def test_links_are_read_from_files_and_find_ids_of_either_type(tmp_path: Path) -> None:
    (tmp_path / "trust.csv").write_text("truster,trusted\n1,2\n3,1\n7,1\n")
    events = read(user_links=tmp_path / "trust.csv")
    assert events.user_links is not None
    assert events.user_links.tolist() == [[0, 2], [1, 0]]
    as_text = pl.DataFrame({"a": ["1", "3"], "b": ["2", "1"]})
    vocabulary = Vocabulary(pl.Series([1, 2, 3]))
    assert read_links(as_text, vocabulary, role="users", read=ReadConfig())[0].tolist() == [
        [0, 2],
        [1, 0],
    ]


def test_a_missing_end_is_an_unknown_one() -> None:
    links = pl.DataFrame({"a": [1, None], "b": [2, 3]})
    events = read(user_links=links)
    assert events.user_links is not None
    assert events.user_links.tolist() == [[0], [1]]
    assert any("1 links of users name an unknown id" in note for note in events.notes)


def test_a_table_of_one_column_holds_no_links() -> None:
    with pytest.raises(DataError, match="one column"):
        read(item_links=pl.DataFrame({"item": ["a"]}))


def test_parts_of_a_split_keep_all_links_and_sets_put_together_share_them() -> None:
    events = read(user_links=pl.DataFrame({"user": [1, 2], "friend": [2, 3]}))
    train = leave_last_split(events, validation=False).train
    assert train.user_links is events.user_links
    others = read_interactions(
        pl.DataFrame({"user": [7, 2], "item": ["b", "z"]}),
        user="user",
        item="item",
        user_links=pl.DataFrame({"user": [7], "friend": [2]}),
    )
    both, _ = concatenate([events, others])
    assert both.user_links is not None
    ends = [both.users.decode(end.astype(np.int64)) for end in both.user_links]
    assert set(zip(*ends, strict=True)) == {(1, 2), (2, 3), (7, 2)}
    assert both.item_links is None


def test_links_count_in_the_fingerprint_only_where_there_are_any() -> None:
    plain = read()
    linked = read(user_links=pl.DataFrame({"user": [1], "friend": [2]}))
    other = read(user_links=pl.DataFrame({"user": [1], "friend": [3]}))
    of_items = replace(plain, item_links=linked.user_links)
    prints = [events.fingerprint() for events in (plain, linked, other, of_items)]
    assert len(set(prints)) == 4
    # the fingerprint of these events before links existed
    assert prints[0] == "26204bcc5d6527def54a2911624de9d9139dd385c61dbe0f7b15b4a64ced8382"


def test_a_store_keeps_links_and_has_no_files_for_none(tmp_path: Path) -> None:
    events = read(
        user_links=pl.DataFrame({"user": [1, 3], "friend": [2, 1]}),
        item_links=pl.DataFrame({"one": ["a"], "other": ["q"]}),
    )
    write_store(events, tmp_path / "linked")
    opened = open_store(tmp_path / "linked", verify=True)
    assert opened.user_links is not None
    assert opened.user_links.tolist() == [[0, 2], [1, 0]]
    assert opened.item_links is not None
    assert opened.item_links.shape == (2, 0)
    assert opened.fingerprint() == events.fingerprint()
    write_store(read(), tmp_path / "plain")
    assert not list((tmp_path / "plain").glob("*links*"))
    assert open_store(tmp_path / "plain").user_links is None


def test_a_store_whose_links_are_no_pairs_is_refused(tmp_path: Path) -> None:
    write_store(read(user_links=pl.DataFrame({"a": [1, 3], "b": [2, 1]})), tmp_path / "store")
    path = tmp_path / "store" / "user_links.npy"
    size = path.stat().st_size
    np.save(path, np.zeros(2, np.float64))
    assert path.stat().st_size == size  # so that only what it holds can tell
    with pytest.raises(BundleError, match="no pairs"):
        open_store(tmp_path / "store")


@pytest.mark.parametrize(
    ("name", "links", "users_with_links"),
    [("social-lastfm", 25_434, 1_892), ("social-ciao", 57_544, 2_342)],
)
def test_social_data_come_with_their_links_and_split(
    shared_data: Path, name: str, links: int, users_with_links: int
) -> None:
    events = get_dataset(name, data_dir=shared_data).events
    assert events.user_links is not None
    split = make_split(GivenSplitConfig(), events)
    assert split.train.user_links is events.user_links
    graph = graph_of(split.train)
    linked = np.unique(events.user_links)
    assert len(linked) == users_with_links
    assert events.user_links.shape[1] <= links
    assert graph.degree_V[: events.num_users][linked].min() > 0
    assert len(graph.neighbour_E) > len(make_graph(split.train).neighbour_E)


def test_edges_weigh_one_by_default() -> None:
    assert Ties(np.zeros((2, 0), np.int64)).weight == 1

"""Business rules in complete answers: filters, caps and order, for every kind of user."""

import numpy as np
import polars as pl
import pytest
import torch

from foretaste.errors import DataError
from foretaste.models.base import TopK
from foretaste.serving import rule_book
from foretaste.serving.answer import Answer
from foretaste.serving.catalogue_search import Best
from foretaste.serving.recommender import Recommender, build_recommender
from foretaste.serving.rule_book import RuleBook
from foretaste.serving.rules import Condition, Diversity, ItemLabels, Rules
from tests.worlds import CONFIGS, NUM_ITEMS, NUM_USERS, every_vector, make_events, make_trained

COLOURS, SHAPES = ("red", "green", "blue"), ("round", "flat", "long", "thin")


def colours(row: int) -> list[str]:
    """Every fourth item has none, every third two."""
    own = [] if row % 4 == 3 else [COLOURS[row % 3]]
    return [*own, COLOURS[(row + 1) % 3]] if own and row % 3 == 0 else own


def made(kind: str) -> Recommender:
    events = make_events()
    table = pl.DataFrame(
        {
            "colours": [colours(row) for row in range(NUM_ITEMS + 1)],
            "shape": [SHAPES[row % 4] for row in range(NUM_ITEMS + 1)],
            "size": list(range(NUM_ITEMS + 1)),
        }
    )
    parts = {
        name: getattr(events, name)
        for name in ("users", "items", "offsets", "item_idx", "timestamp_s")
    }
    return build_recommender(make_trained(kind, type(events)(**parts, item_table=table)))


@pytest.fixture(scope="module", params=CONFIGS)
def recommender(request: pytest.FixtureRequest) -> Recommender:
    return made(request.param)


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few candidates at first, so that the small catalogue is widened into."""
    monkeypatch.setattr(rule_book, "FIRST", 2)


def rows_of(answer: Answer) -> list[int]:
    return [int(row.item_id) - 500 for row in answer.rows]


def kept_by_hand(ranking: list[int], k: int, caps: dict[str, int]) -> list[int]:
    """Walk down the ranking, and take what no cap forbids."""
    used: dict[tuple[str, str], int] = {}
    kept: list[int] = []
    for row in ranking:
        said = {"colours": colours(row), "shape": [SHAPES[row % 4]]}
        labels = [(name, value) for name in caps for value in said[name]]
        if len(kept) < k and all(used.get(label, 0) < caps[label[0]] for label in labels):
            kept.append(row)
            used |= {label: used.get(label, 0) + 1 for label in labels}
    return kept


WHO = (
    {"user_id": 104},
    {"user_id": 117, "history": [503]},
    {"history": [500, 507, 511]},
    {},
)


@pytest.mark.parametrize("who", WHO, ids=["user", "live", "fold-in", "nobody"])
def test_a_filter_leaves_the_ranking_of_those_that_meet_it(
    recommender: Recommender, who: dict
) -> None:
    everything = rows_of(recommender.recommend(**who, k=NUM_ITEMS))
    rules = Rules(where={"colours": Condition(one_of=["red"]), "size": Condition(at_least=5)})
    answer = recommender.recommend(**who, k=NUM_ITEMS, rules=rules)
    expected = [row for row in everything if "red" in colours(row) and row >= 5]
    assert rows_of(answer) == expected
    assert len(expected) > 1
    assert any(f"but only {len(expected)} are allowed" in n for n in answer.notes)
    first = recommender.recommend(**who, k=1, rules=rules)
    assert rows_of(first) == expected[:1]


@pytest.mark.parametrize("who", WHO, ids=["user", "live", "fold-in", "nobody"])
@pytest.mark.parametrize("caps", [{"colours": 1}, {"shape": 2}, {"colours": 2, "shape": 1}])
def test_caps_keep_what_a_walk_down_the_ranking_keeps(
    recommender: Recommender, who: dict, caps: dict[str, int]
) -> None:
    everything = rows_of(recommender.recommend(**who, k=NUM_ITEMS))
    for k in (1, 3, NUM_ITEMS):
        answer = recommender.recommend(**who, k=k, rules=Rules(caps=caps))
        expected = kept_by_hand(everything, k, caps)
        assert rows_of(answer) == expected
        short = any("are allowed" in note for note in answer.notes)
        assert short == (len(expected) < k)


def test_diversity_by_columns_agrees_with_the_slow_way(recommender: Recommender) -> None:
    ranking = recommender.recommend(104, k=NUM_ITEMS)
    rows, score = rows_of(ranking), [row.score for row in ranking.rows]
    rules = Rules(diversity=Diversity(relevance=0.4, pool=6, by=("colours", "shape")))
    answer = recommender.recommend(104, k=6, rules=rules)

    def said(row: int) -> set[str]:
        return {*colours(row), SHAPES[row % 4]}

    height = (np.array(score[:6]) - score[5]) / (score[0] - score[5])
    chosen: list[int] = []
    while len(chosen) < 6:
        gain = [
            0.4 * height[at]
            - 0.6
            * max(
                (
                    len(said(rows[at]) & said(rows[other]))
                    / len(said(rows[at]) | said(rows[other]))
                    for other in chosen
                ),
                default=0,
            )
            for at in range(6)
        ]
        chosen.append(max((at for at in range(6) if at not in chosen), key=lambda at: gain[at]))
    assert rows_of(answer) == [rows[at] for at in chosen]
    assert [row.score for row in answer.rows] == [score[at] for at in chosen]


@pytest.mark.parametrize("kind", ["sasrec", "als"])
def test_diversity_by_vectors_agrees_with_the_slow_way(kind: str) -> None:
    recommender = made(kind)
    ranking = recommender.recommend(history=[503, 508], k=10)
    rows, score = rows_of(ranking), np.array([row.score for row in ranking.rows])
    table = every_vector(recommender.trained.model).detach().double()[rows].numpy()
    unit = table / np.linalg.norm(table, axis=1, keepdims=True)
    height = (score - score[-1]) / (score[0] - score[-1])
    chosen = [0]
    while len(chosen) < 10:
        gain = 0.3 * height - 0.7 * (unit @ unit[chosen].T).max(axis=1)
        gain[chosen] = -np.inf
        chosen.append(int(gain.argmax()))
    rules = Rules(diversity=Diversity(relevance=0.3, pool=10))
    found = rows_of(recommender.recommend(history=[503, 508], k=10, rules=rules))
    assert found == [rows[at] for at in chosen]
    assert found != rows


def test_diversity_looks_past_its_pool_when_the_pool_is_used_up(recommender: Recommender) -> None:
    rules = Rules(diversity=Diversity(relevance=0.5, pool=2, by=("shape",)), caps={"shape": 1})
    answer = recommender.recommend(k=10, rules=rules)
    assert sorted(SHAPES[row % 4] for row in rows_of(answer)) == sorted(SHAPES)
    ranking = rows_of(recommender.recommend(k=NUM_ITEMS))
    assert rows_of(answer)[0] == ranking[0]


def test_rules_that_change_nothing_change_nothing(recommender: Recommender) -> None:
    plain = recommender.recommend(104, k=7)
    for rules in (
        Rules(),
        Rules(where={"size": Condition(at_least=-1)}),
        Rules(caps={"colours": 1000}),
        Rules(diversity=Diversity(relevance=1, by=("colours",))),
    ):
        assert recommender.recommend(104, k=7, rules=rules) == plain


def test_all_rules_hold_at_once(recommender: Recommender) -> None:
    rules = Rules(
        where={"size": Condition(at_least=4)},
        caps={"shape": 1},
        diversity=Diversity(relevance=0.2, by=("colours",)),
    )
    answer = recommender.recommend(k=9, deny=[504], allow=range(500, 518), rules=rules)
    assert len(answer.rows) == 4
    assert all(4 < row < 18 for row in rows_of(answer))
    assert len({SHAPES[row % 4] for row in rows_of(answer)}) == 4


@pytest.mark.parametrize("exclude_seen", [True, False])
@pytest.mark.parametrize(
    "rules",
    [
        Rules(where={"size": Condition(at_most=12)}),
        Rules(caps={"shape": 2}),
        Rules(diversity=Diversity(relevance=0.3, pool=3, by=("colours",)), caps={"colours": 2}),
    ],
    ids=["where", "caps", "diversity"],
)
def test_many_users_get_what_each_would_get_alone(
    recommender: Recommender, rules: Rules, *, exclude_seen: bool
) -> None:
    asked = [100, "nobody", *range(103, 100 + NUM_USERS, 5)]
    table = recommender.recommend_many(asked, k=6, exclude_seen=exclude_seen, rules=rules)
    for user_id, row in zip(asked, table.iter_rows(named=True), strict=True):
        alone = recommender.recommend(user_id, k=6, exclude_seen=exclude_seen, rules=rules)
        assert row["item_id"] == [one.item_id for one in alone.rows]
        assert row["score"] == pytest.approx([r.score for r in alone.rows], rel=1e-4, abs=1e-4)


# ---- what is refused ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rules", "says"),
    [
        (Rules(where={"sise": Condition(equals=1)}), "did you mean 'size'"),
        (Rules(caps={"color": 1}), "did you mean 'colours'"),
        (Rules(diversity=Diversity(by=("shapes",))), "did you mean 'shape'"),
    ],
)
def test_an_unknown_column_is_refused_even_when_nothing_would_be_found(
    recommender: Recommender, rules: Rules, says: str
) -> None:
    for ask in (
        lambda: recommender.recommend(allow=[], rules=rules),
        lambda: recommender.recommend_many([], rules=rules),
    ):
        with pytest.raises(DataError, match=says):
            ask()


def test_vectors_are_not_asked_of_a_model_that_has_none() -> None:
    with pytest.raises(DataError, match=r"no item vectors .* name columns of the item table"):
        made("ease").recommend(rules=Rules(diversity=Diversity()))


def test_a_list_too_long_to_arrange_is_refused(recommender: Recommender) -> None:
    with pytest.raises(DataError, match="k is 1001: caps and diversity allow lists of 1 to 1000"):
        recommender.recommend(k=1001, rules=Rules(caps={"shape": 1}))
    filtered = Rules(where={"size": Condition(at_least=19)})
    assert len(recommender.recommend(k=1001, rules=filtered).rows) == 1


# ---- behind any source of candidates -----------------------------------------------------


def test_a_ranking_is_asked_for_more_only_as_long_as_the_list_is_short() -> None:
    # 90 candidates of one shape come before the others; a cap of 2 has to look past them.
    shapes = ["round"] * 90 + ["flat", "long"] * 5
    labels = ItemLabels(pl.DataFrame({"shape": shapes}), num_items=100)
    asked: list[int] = []

    def find(num: int) -> Best:
        asked.append(num)
        item_BK = torch.arange(100)[None, :num]
        return Best(TopK(item_BK=item_BK, score_BK=-item_BK.float()), {"buy": item_BK / 100})

    def choose(k: int, **also: int) -> Best:
        book = RuleBook(labels, vectors_of=None, num_items=100, **also)
        return book.choose(Rules(caps={"shape": 2}), k, find)

    assert choose(2).top.item_BK.tolist() == [[0, 1]]
    assert asked == [4]
    asked.clear()
    more = choose(5)
    assert more.top.item_BK.tolist() == [[0, 1, 90, 91, 92]]
    assert more.prediction["buy"][0].tolist() == pytest.approx([0, 0.01, 0.9, 0.91, 0.92])
    assert asked == [10, 40, 100]
    asked.clear()
    assert choose(50).top.item_BK.tolist() == [[0, 1, 90, 91, 92, 93]]
    assert asked == [100]
    asked.clear()  # the first candidates are used before more are searched
    assert choose(3, at_once=96).top.item_BK.tolist() == [[0, 1, 90]]
    assert asked == [96]


def test_the_padding_of_a_ranking_is_never_chosen() -> None:
    labels = ItemLabels(pl.DataFrame({"a": ["x", "y"]}), num_items=2)
    book = RuleBook(labels, vectors_of=None, num_items=9)
    item_BK = torch.tensor([[1, -1, -1]])
    found = Best(TopK(item_BK=item_BK, score_BK=torch.tensor([[2.0, -9e9, -9e9]])), {})
    for rules in (Rules(caps={"a": 1}), Rules(diversity=Diversity(by=("a",), relevance=0))):
        chosen = book.choose(rules, 3, lambda _: found)
        assert chosen.top.item_BK.tolist() == [[1]]

"""Item tables of rules: items that meet a condition or share a label, and refused input."""

from datetime import date, datetime

import numpy as np
import polars as pl
import pytest

from foretaste.errors import ConfigError, DataError
from foretaste.serving.rules import Condition, ItemLabels, Rules

TABLE = pl.DataFrame(
    {
        "title": ["Alien", "Brazil", "Casino", "Dune", "Eve"],
        "year": [1979, 1985, 1995, 2021, None],
        "price": [1.5, 2.0, float("nan"), 4.0, 2.0],
        "genres": [["Horror", "Space"], ["Comedy"], [], ["Space", "Space"], None],
        "tags": ["old|dark", "old | odd", "dark|old", None, ""],
        "ours": [True, False, True, None, False],
        "shown": [date(1979, 9, 6), date(1985, 2, 20), None, date(2021, 9, 15), date(1950, 1, 1)],
        "added": [datetime(2024, 1, 1, hour) for hour in (0, 6, 12, 18, 23)],
        "kind": pl.Series(["film", "film", "show", "film", None], dtype=pl.Categorical),
        "vector": [[0.5, 1.0]] * 5,
        "blob": [b"x"] * 5,
    }
)


def labels() -> ItemLabels:
    return ItemLabels(TABLE, num_items=len(TABLE))


def meeting(column: str, **asked: object) -> list[int]:
    found = labels().matching({column: Condition(**asked)})
    return np.flatnonzero(found).tolist()


# ---- conditions, by hand -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("column", "asked", "rows"),
    [
        ("year", {"equals": 1985}, [1]),
        ("year", {"equals": "1985"}, [1]),
        ("year", {"equals": 1985.0}, [1]),
        ("year", {"equals": 1986}, []),
        ("year", {"one_of": [1979, 2021, 3000]}, [0, 3]),
        ("year", {"none_of": [1979]}, [1, 2, 3, 4]),
        ("year", {"at_least": 1985}, [1, 2, 3]),
        ("year", {"at_least": 1985, "at_most": 1995}, [1, 2]),
        ("year", {"at_least": 1979, "none_of": 1985}, [0, 2, 3]),
        ("price", {"equals": 2}, [1, 4]),
        ("price", {"at_most": 2.5}, [0, 1, 4]),
        ("title", {"equals": "Dune"}, [3]),
        ("title", {"one_of": "Dune"}, [3]),
        ("genres", {"contains": "Space"}, [0, 3]),
        ("genres", {"contains": ["Space", "Horror"]}, [0]),
        ("genres", {"one_of": ["Comedy", "Horror"]}, [0, 1]),
        ("genres", {"none_of": ["Space"]}, [1, 2, 4]),
        ("genres", {"contains": "Western"}, []),
        ("tags", {"contains": "old"}, [0, 1, 2]),
        ("tags", {"contains": ["old", "dark"]}, [0, 2]),
        ("tags", {"none_of": "dark"}, [1, 3, 4]),
        ("ours", {"equals": True}, [0, 2]),
        ("ours", {"equals": "false"}, [1, 4]),
        ("shown", {"at_least": "1979-09-06"}, [0, 1, 3]),
        ("shown", {"at_most": "1979-09-05T23:59:59"}, [4]),
        ("shown", {"equals": "2021-09-15"}, [3]),
        ("added", {"at_least": "2024-01-01T12:00:00"}, [2, 3, 4]),
        ("added", {"at_most": "2024-01-01T08:00:00+02:00"}, [0, 1]),
        ("kind", {"equals": "film"}, [0, 1, 3]),
    ],
)
def test_a_condition_is_met_by_these_rows_and_no_others(
    column: str, asked: dict[str, object], rows: list[int]
) -> None:
    assert meeting(column, **asked) == rows


def test_all_conditions_must_hold() -> None:
    where = {"genres": Condition(contains="Space"), "year": Condition(at_least=2000)}
    assert np.flatnonzero(labels().matching(where)).tolist() == [3]
    assert labels().matching({}).all()


def test_conditions_agree_with_a_loop_over_a_large_table() -> None:
    rng = np.random.default_rng(0)
    bags = [rng.choice(9, rng.integers(0, 4), replace=False).tolist() for _ in range(700)]
    number = rng.integers(-5, 50, 700)
    table = pl.DataFrame({"bag": pl.Series(bags, dtype=pl.List(pl.Int64)), "number": number})
    many = ItemLabels(table, num_items=700)
    for _ in range(20):
        low, high = sorted(rng.integers(-5, 50, 2).tolist())
        wanted = rng.choice(12, 2, replace=False).tolist()
        found = many.matching(
            {
                "bag": Condition(one_of=wanted, none_of=3),
                "number": Condition(at_least=low, at_most=high),
            }
        )
        assert found.tolist() == [
            bool(set(bag) & set(wanted)) and 3 not in bag and low <= value <= high
            for bag, value in zip(bags, number, strict=True)
        ]


# ---- labels of chosen items --------------------------------------------------------------


def test_items_carry_each_of_their_labels_once() -> None:
    genres = labels().labels("genres")
    row, code = genres.of(np.array([3, 4, 0]))
    names = genres.texts.decode(code)
    assert list(zip(row.tolist(), names, strict=True)) == [
        (0, "Space"),
        (2, "Horror"),
        (2, "Space"),
    ]
    assert genres.most_frequent(2) == ["Space", "Comedy"]


def test_rules_may_name_what_people_can_read() -> None:
    readable = labels().readable
    assert set(TABLE.columns) - set(readable) == {"vector", "blob"}
    assert [n for n in readable if labels().labels(n).several] == ["genres", "tags"]
    ordered = [n for n in readable if labels().labels(n).ordered]
    assert ordered == ["year", "price", "shown", "added"]
    assert ItemLabels(None, num_items=3).readable == ()


# ---- what is refused ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("column", "asked", "says"),
    [
        ("yeer", {"equals": 1}, r"'yeer'.* did you mean 'year'\?"),
        ("vector", {"equals": 1}, "'vector' holds lists: rules cannot use such a column"),
        ("blob", {"equals": 1}, "'blob' holds bytes: rules cannot use such a column"),
        ("year", {"equals": "old"}, "'year' holds numbers, and 'old' is not one"),
        ("price", {"one_of": [2, "cheap"]}, "'price' holds numbers, and 'cheap' is not one"),
        ("ours", {"equals": 1}, "'ours' holds truth values, and 1 is not one"),
        ("shown", {"equals": "soon"}, "'shown' holds dates, and 'soon' is not one"),
        ("year", {"contains": 1979}, "'year' holds one value per item: use equals or one_of"),
        ("genres", {"equals": "Space"}, "'genres' holds several values per item: use contains"),
        ("title", {"at_least": 3}, "'title' holds text: at_least and at_most need"),
        ("genres", {"at_most": 3}, "'genres' holds lists: at_least and at_most need"),
        ("year", {"at_least": "1990"}, "'year' holds numbers: a bound is a number, not '1990'"),
        ("shown", {"at_least": 1990}, "'shown' holds dates: a bound is an ISO date or time"),
        (
            "shown",
            {"at_least": "soon"},
            "'shown' holds times, but 'soon' is not a time: write it as",
        ),
    ],
)
def test_a_condition_that_does_not_fit_a_column_is_refused_with_the_fix(
    column: str, asked: dict[str, object], says: str
) -> None:
    with pytest.raises(DataError, match=says):
        meeting(column, **asked)


def test_without_an_item_table_no_column_can_be_named() -> None:
    with pytest.raises(DataError, match="this model has no item table"):
        ItemLabels(None, num_items=3).matching({"year": Condition(equals=1)})
    assert ItemLabels(None, num_items=3).matching({}).tolist() == [True] * 3


def test_a_column_without_any_value_has_no_labels() -> None:
    empty = ItemLabels(pl.DataFrame({"a": [None, None], "b": pl.Series([[], []])}), num_items=2)
    for name in ("a", "b"):
        assert empty.labels(name).of(np.array([0, 1])).row_N.tolist() == []
    assert empty.matching({"a": Condition(none_of="x")}).tolist() == [True, True]
    assert empty.matching({"a": Condition(equals="x")}).tolist() == [False, False]


@pytest.mark.parametrize(
    "asked",
    [
        {"where": {"year": {}}},
        {"where": {"year": {"equals": [1, 2]}}},
        {"where": {"year": {"equal": 1}}},
        {"where": {"year": {"one_of": []}}},
        {"where": {"year": {"at_least": float("inf")}}},
        {"where": {"year": {"equals": {"a": 1}}}},
        {"caps": {"genres": 0}},
        {"caps": {"genres": 1.5}},
        {"diversity": {"relevance": 1.01}},
        {"diversity": {"pool": 0}},
        {"diversity": {"by": []}},
        {"diversity": {"by": "genres"}},
        {"filters": {}},
    ],
)
def test_rules_of_a_wrong_form_are_refused(asked: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        Rules(**asked)  # type: ignore[arg-type]


def test_rules_survive_json() -> None:
    rules = Rules(
        where={"year": Condition(one_of=[1, "b", True, 2.5], at_least="2020-01-01")},
        caps={"genres": 2},
        diversity={"by": ["genres"]},
    )
    again = Rules.model_validate_json(rules.model_dump_json())
    assert repr(again) == repr(rules)

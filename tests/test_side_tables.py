"""Tables of users and items: which column is the key, and messages about the rest."""

from pathlib import Path

import pandas as pd
import polars as pl
import pytest

import foretaste as ft
from foretaste.data.interactions import Interactions

EVENTS = pl.DataFrame({"user_id": [1, 2, 1, 3], "item_id": [10, 11, 11, 12]})


def read(**settings: object) -> Interactions:
    return ft.read_interactions(EVENTS, **settings)  # type: ignore[arg-type]  # of many types


def test_the_column_named_like_the_events_ids_is_the_key() -> None:
    events = read(items=pl.DataFrame({"id": [1, 2, 3], "item_id": [10, 11, 12]}))
    assert events.item_table is not None
    assert events.item_table["id"].to_list() == [1, 2, 3]
    assert events.notes == ()


@pytest.mark.parametrize("role", ["user", "item"])
@pytest.mark.parametrize("form", ["file", "frame"])
def test_the_column_that_holds_the_ids_is_the_key_and_that_is_said(
    role: str, form: str, tmp_path: Path
) -> None:
    ids = {"user": [1, 2, 3], "item": [10, 11, 12]}[role]
    table = pl.DataFrame({"title": ["A", "B", "C"], "year": [1999, 1999, 1999], "id": ids})
    table.write_csv(tmp_path / "side.csv")
    events = read(**{f"{role}s": tmp_path / "side.csv" if form == "file" else table})
    known = events.user_table if role == "user" else events.item_table
    assert known is not None
    assert known["title"].to_list() == ["A", "B", "C"]
    assert [note for note in events.notes if "'id'" in note and "the key" in note]


def test_a_named_index_of_pandas_is_a_column() -> None:
    frame = pd.DataFrame({"title": ["A", "B"]}, index=pd.Index([10, 11], name="item_id"))
    events = read(items=frame)
    assert events.items.ids.to_list() == [10, 11, 12]
    assert events.item_table is not None
    assert events.item_table.to_dict(as_series=False) == {"title": ["A", "B", None]}


def test_levels_of_an_index_are_columns_after_the_others() -> None:
    index = pd.MultiIndex.from_arrays([[10, 11], [5, 6]], names=["item_id", "shop"])
    events = read(items=pd.DataFrame({"title": ["A", "B"]}, index=index))
    assert events.item_table is not None
    assert events.item_table.columns == ["title", "shop"]


@pytest.mark.parametrize("role", ["user", "item"])
def test_a_table_that_holds_none_of_the_ids_is_refused(role: str) -> None:
    table = pl.DataFrame({f"{role}_id": [110, 111], "title": ["A", "B"]})
    with pytest.raises(ft.DataError) as caught:
        read(**{f"{role}s": table})
    assert caught.value.name == f"{role}_key"
    assert caught.value.column == f"{role}_id"
    assert caught.value.value == 110


@pytest.mark.parametrize("key", [None, "title", 1])
def test_a_table_without_a_key_is_refused_whatever_is_called_one(key: str | int | None) -> None:
    table = pl.DataFrame({"name": ["x", "y"], "title": ["A", "B"]})
    with pytest.raises(ft.DataError) as caught:
        read(items=table, item_key=key)
    assert caught.value.name == "item_key"


def test_the_error_names_the_column_that_fits_and_the_advice_works() -> None:
    table = pl.DataFrame({"item_id": [110, 111], "id": [10, 11]})
    with pytest.raises(ft.DataError, match="set item_key='id'"):
        read(items=table)
    known = read(items=table, item_key="id").item_table
    assert known is not None
    assert known["item_id"].to_list() == [110, 111, None]


def test_a_few_ids_by_chance_do_not_make_a_key_where_another_column_has_them_all() -> None:
    table = pl.DataFrame({"item_id": [12, 13, 14], "id": [10, 11, 12]})
    with pytest.raises(ft.DataError, match=r"set item_key='id'.*or item_key='item_id'"):
        read(items=table)
    assert read(items=table, item_key="item_id").items.ids.to_list() == [10, 11, 12, 13, 14]


def test_two_columns_that_hold_the_ids_are_for_the_caller_to_choose_from() -> None:
    table = pl.DataFrame({"t": ["a", "b", "c"], "a": [10, 11, 12], "b": [12, 11, 10]})
    with pytest.raises(ft.DataError, match="'a' and 'b'") as caught:
        read(items=table)
    assert caught.value.name == "item_key"
    known = read(items=table, item_key="b").item_table
    assert known is not None
    assert known["t"].to_list() == ["c", "b", "a"]


def test_the_first_column_is_the_key_where_it_holds_the_ids_like_another() -> None:
    table = pl.DataFrame({"a": [10, 11, 12], "b": [12, 11, 10], "t": ["a", "b", "c"]})
    known = read(items=table).item_table
    assert known is not None
    assert known["t"].to_list() == ["a", "b", "c"]


def test_a_file_without_a_header_has_its_key_by_position_or_by_its_values(tmp_path: Path) -> None:
    (tmp_path / "ev.csv").write_text("1,10\n2,11\n")
    (tmp_path / "items.csv").write_text("A,10\nB,11\n")
    settings = {"user": 0, "item": 1, "header": False, "items": tmp_path / "items.csv"}
    for key in (None, 1, "1"):
        known = ft.read_interactions(tmp_path / "ev.csv", item_key=key, **settings).item_table
        assert known is not None
        assert known.to_dict(as_series=False) == {"0": ["A", "B"]}


def test_a_table_of_few_of_the_ids_is_taken_and_the_share_is_said() -> None:
    events = read(items=pl.DataFrame({"item_id": [10], "title": ["A"]}))
    assert "2 of 3 items with events are not in the table of items" in events.notes


def test_rows_that_repeat_an_id_are_counted_and_so_are_those_that_differ() -> None:
    table = pl.DataFrame(
        {"item_id": [10, 10, 10, 11, 12], "title": ["A", "A", "Z", "B", "C"], "t": [["x"]] * 5}
    )
    notes = read(items=table).notes
    assert notes == (
        "2 rows of the table of items repeat an id: its first row was taken, and 1 of them "
        "differ from it",
    )


def test_ids_that_become_text_are_said_to() -> None:
    events = read(items=pl.DataFrame({"item_id": ["10", "11", "x"]}))
    assert events.items.ids.to_list() == ["10", "11", "12", "x"]
    assert [note for note in events.notes if "kept as text" in note and "'x'" in note]


def test_a_key_that_is_missing_in_a_row_is_refused_by_its_row() -> None:
    with pytest.raises(ft.DataError) as caught:
        read(items=pl.DataFrame({"item_id": [10, None], "title": ["A", "B"]}))
    assert (caught.value.column, caught.value.row) == ("item_id", 2)


def test_links_that_name_no_known_id_are_refused() -> None:
    with pytest.raises(ft.DataError) as caught:
        read(user_links=pl.DataFrame({"one": [101, 102], "other": [103, 104]}))
    assert (caught.value.column, caught.value.value) == ("one", 101)


@pytest.mark.parametrize("role", ["users", "items"])
def test_a_table_without_rows_or_columns_and_a_key_without_a_table_are_refused(role: str) -> None:
    key = role[:-1]
    events = pl.DataFrame({"user_id": [1, 2], "item_id": [3, 4]})
    for columns in ({f"{key}_id": [], "x": []}, {}):
        with pytest.raises(ft.DataError, match=rf"^the table of {role} has no (rows|columns)"):
            ft.read_interactions(events, **{role: pl.DataFrame(columns)})
    for column in ("x", 0):
        with pytest.raises(ft.ConfigError) as caught:
            ft.read_interactions(events, **{f"{key}_key": column})
        assert (caught.value.name, caught.value.value) == (f"{key}_key", column)

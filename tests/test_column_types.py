"""Every type of column that Polars, pandas and Arrow have, from reading to serving."""

import datetime as dt
import decimal
import json
import uuid
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest

import foretaste as ft
from foretaste.cli.main import run
from foretaste.data.interactions import Interactions
from foretaste.serving.catalogue import Catalogue
from foretaste.serving.service import _column

BERLIN = "Europe/Berlin"
NOON = dt.datetime(2024, 7, 1, 12)


def polars_columns() -> dict[str, pl.Series]:
    """Return two rows of every type of Polars."""
    whole = (pl.Int8, pl.Int16, pl.Int32, pl.Int64, pl.UInt8, pl.UInt16, pl.UInt32, pl.UInt64)
    columns = {f"{t}": pl.Series([1, None], dtype=t) for t in (*whole, pl.Int128, pl.UInt128)}
    columns |= {f"{t}": pl.Series([1.5, None], dtype=t) for t in (pl.Float16, pl.Float32)}
    columns |= {
        "Float64": pl.Series([2.5, -0.5]),
        "UInt64_large": pl.Series([2**64 - 1, 1], dtype=pl.UInt64),
        "Int128_large": pl.Series([2**100, 1], dtype=pl.Int128),
        "UInt128_large": pl.Series([2**127, 1], dtype=pl.UInt128),
        "Decimal": pl.Series(["9.99", "3.10"]).cast(pl.Decimal(10, 2)),
        "Decimal_whole": pl.Series(["7", None]).cast(pl.Decimal(38, 0)),
        "Decimal_large": pl.Series(["12345678901234567890.12", "1"]).cast(pl.Decimal(30, 2)),
        "Boolean": pl.Series([True, None]),
        "String": pl.Series(["a", None]),
        "Categorical": pl.Series(["a", "b"], dtype=pl.Categorical),
        "Enum": pl.Series(["a", "b"], dtype=pl.Enum(["b", "a"])),
        "Binary": pl.Series([b"\xff", b"a"]),
        "Date": pl.Series([NOON.date(), None]),
        "Datetime_ms": pl.Series([NOON, None], dtype=pl.Datetime("ms")),
        "Datetime_ns": pl.Series([NOON, None], dtype=pl.Datetime("ns")),
        "Datetime_zone": pl.Series([NOON, None]).dt.replace_time_zone(BERLIN),
        "Duration_ms": pl.Series([dt.timedelta(minutes=90), None], dtype=pl.Duration("ms")),
        "Duration_ns": pl.Series([dt.timedelta(minutes=90), None], dtype=pl.Duration("ns")),
        "Time": pl.Series([dt.time(12, 30, 0, 5), None]),
        "Null": pl.Series([None, None]),
        "Object": pl.Series([1, "a"], dtype=pl.Object),
        "Object_arrays": pl.Series([np.array([1, 2]), None], dtype=pl.Object),
        "Struct": pl.Series([{"a": 1}, {"a": 2}]),
        "List_String": pl.Series([["a", "b"], None]),
        "List_Int64": pl.Series([[1, 2], []]),
        "List_Float64": pl.Series([[1.0, 2.0], [2.0, 3.0]]),
        "List_Null": pl.Series([[None], []]),
        "List_Boolean": pl.Series([[True], [False, None]]),
        "List_Date": pl.Series([[NOON.date()], []]),
        "List_Duration": pl.Series([[dt.timedelta(1), None], None]),
        "List_zone": pl.Series([[NOON], []]).list.eval(pl.element().dt.replace_time_zone(BERLIN)),
        "List_Categorical": pl.Series([["a"], [None]], dtype=pl.List(pl.Categorical)),
        "List_Decimal": pl.Series([["1.5"], []]).cast(pl.List(pl.Decimal(5, 1))),
        "List_Int128": pl.Series([[1], [None]], dtype=pl.List(pl.Int128)),
        "List_Binary": pl.Series([[b"\xff"], []]),
        "List_Struct": pl.Series([[{"a": 1}], []]),
        "List_List": pl.Series([[["a"], []], []]),
        "List_Array": pl.Series([[[1, 2]], []], dtype=pl.List(pl.Array(pl.Int128, 2))),
        "Array_Float32": pl.Series([[1.0, 2.0], [2.0, 3.0]], dtype=pl.Array(pl.Float32, 2)),
        "Array_Enum": pl.Series([["a", "b"]] * 2, dtype=pl.Array(pl.Enum(["a", "b"]), 2)),
        "Array_two": pl.Series(np.ones((2, 2, 2), np.float32)),
        "Array_empty": pl.Series([[], []], dtype=pl.Array(pl.Int64, 0)),
    }
    return columns


def arrow_columns() -> dict[str, pa.Array]:
    """Return two rows of every type of Arrow that Polars lacks, and some that it has."""
    union = [pa.array([1, 2]), pa.array(["a", "b"])]
    extension = pa.ExtensionArray.from_storage
    uuids = extension(pa.uuid(), pa.array([b"0" * 16, b"1" * 16], pa.binary(16)))
    pairs = pa.array([[1.0, 2.0], [3.0, 4.0]], pa.list_(pa.float32(), 2))
    return {
        "dictionary": pa.array(["a", "b"]).dictionary_encode(),
        "dictionary_int": pa.array([5, 6]).dictionary_encode(),
        "list_view": pa.array([["a"], ["b", "c"]], pa.list_view(pa.string())),
        "large_list_view": pa.array([[1, 2], None], pa.large_list_view(pa.int64())),
        "sparse_union": pa.UnionArray.from_sparse(pa.array([0, 1], pa.int8()), union),
        "dense_union": pa.UnionArray.from_dense(
            pa.array([0, 1], pa.int8()), pa.array([0, 0], pa.int32()), union
        ),
        "list_union": pa.ListArray.from_arrays(
            [0, 1, 2], pa.UnionArray.from_sparse(pa.array([0, 1], pa.int8()), union)
        ),
        "run_end_encoded": pa.RunEndEncodedArray.from_arrays([1, 2], ["a", "b"]),
        "month_day_nano": pa.array([(1, 2, 3), None], pa.month_day_nano_interval()),
        "list_interval": pa.array([[(1, 2, 3)], []], pa.list_(pa.month_day_nano_interval())),
        "decimal256": pa.array([1, None], pa.decimal256(50, 2)),
        "decimal256_large": pa.array([10**45, 1], pa.decimal256(60, 2)),
        "bool8": extension(pa.bool8(), pa.array([1, 0], pa.int8())),
        "json": extension(pa.json_(), pa.array(['{"a": 1}', "1"])),
        "uuid": uuids,
        "list_uuid": pa.ListArray.from_arrays([0, 1, 2], uuids),
        "tensor": extension(pa.fixed_shape_tensor(pa.float32(), [2]), pairs),
        "opaque": extension(pa.opaque(pa.binary(), "bignum", "DuckDB"), pa.array([b"a", b"b"])),
        "map": pa.array([[("a", 1)], []], pa.map_(pa.string(), pa.int64())),
        "fixed_binary": pa.array([b"ab", b"cd"], pa.binary(2)),
        "binary_view": pa.array([b"a", b"\xff"], pa.binary_view()),
        "string_view": pa.array(["a", "b"], pa.string_view()),
        "duration": pa.array([1, 2], pa.duration("s")),
        "time32": pa.array([1, 2], pa.time32("s")),
        "date64": pa.array([86_400_000, 0], pa.date64()),
        "timestamp_offset": pa.array([1, 2], pa.timestamp("s", "+02:00")),
        "half": pa.array([np.float16(1), np.float16(2)]),
    }


def pandas_columns() -> dict[str, pd.Series]:
    """Return two rows of every type of pandas."""
    months = pd.Series(pd.period_range("2024-01", periods=2, freq="M"))
    arrow = arrow_columns()
    return {
        "period": months,
        "period_category": months.astype("category"),
        "interval": pd.Series(pd.interval_range(0, 2)),
        "timedelta": pd.Series(pd.to_timedelta([90, 91], unit="m")),
        "category": pd.Series(["a", "b"], dtype="category"),
        "category_int": pd.Series([5, 6], dtype="category"),
        "sparse": pd.Series(pd.arrays.SparseArray([1, 0])),
        "complex": pd.Series([1j, 2j]),
        "longdouble": pd.Series([1, 2], dtype=np.longdouble),
        "nullable": pd.Series([1, None], dtype="Int64"),
        "boolean": pd.Series([True, None], dtype="boolean"),
        "string": pd.Series(["a", None], dtype="string"),
        "zone": pd.Series(pd.to_datetime(["2024-07-01", "2024-07-02"]).tz_localize(BERLIN)),
        "mixed": pd.Series([1, "a"]),
        "lists": pd.Series([["a"], ["b"]]),
        "mixed_lists": pd.Series([[1], ["a"]]),
        "arrays": pd.Series([np.array([1.0, 2.0]), np.array([3.0, 4.0])]),
        "mixed_arrays": pd.Series([np.array([1.0, 2.0]), "a"]),
        "sets": pd.Series([{1}, {2}]),
        "bytes": pd.Series([b"\xff", b"a"]),
        "records": pd.Series([{"a": 1}, {"b": 2}]),
        "dates": pd.Series([NOON.date(), None]),
        "decimals": pd.Series([decimal.Decimal("1.5"), None]),
        "uuids": pd.Series([uuid.UUID(int=1), None]),
    } | {
        f"arrow_{name}": pd.Series(pd.arrays.ArrowExtensionArray(pa.chunked_array([arrow[name]])))
        for name in (
            "json",
            "bool8",
            "sparse_union",
            "month_day_nano",
            "list_view",
            "duration",
            "tensor",
        )
    }


TABLES = {
    "polars": lambda: pl.DataFrame({"item_id": [0, 1], **polars_columns()}),
    "arrow": lambda: pa.table({"item_id": [0, 1], **arrow_columns()}),
    "pandas": lambda: pd.DataFrame({"item_id": [0, 1], **pandas_columns()}),
}
LEFT_OUT = {
    *("Binary", "Struct", "List_Binary", "List_Struct", "opaque", "list_uuid", "map"),
    *("fixed_binary", "binary_view", "bytes", "records"),
    *("sparse_union", "dense_union", "list_union", "month_day_nano", "list_interval"),
    "decimal256_large",
}
AS_TEXT = {
    *("Int128_large", "UInt128_large", "Decimal_large", "Object", "Object_arrays"),
    *("period", "period_category", "complex", "mixed", "mixed_lists"),
    *("mixed_arrays", "arrow_sparse_union", "arrow_month_day_nano"),
}
"""Pandas' own columns are read as text before their types are looked at: no note says so."""
COLUMNS = [
    *(("polars", name) for name in polars_columns()),
    *(("arrow", name) for name in arrow_columns()),
    *(("pandas", name) for name in pandas_columns()),
]


def events_of(items: object, context: pl.DataFrame | None = None) -> Interactions:
    """Return events of two items, with a table of them."""
    rows = {
        "user_id": [1, 1, 2, 3],
        "item_id": [0, 1, 0, 0],
        "t": [1_700_000_000 + n for n in range(4)],
    }
    frame = pl.DataFrame(rows)
    if context is not None:
        frame = frame.with_columns(context.select(pl.all().gather([0, 1, 0, 1])))
    names = [] if context is None else context.columns
    return ft.read_interactions(frame, timestamp="t", items=items, context=names)


@pytest.fixture(scope="module")
def tables() -> dict[str, Interactions]:
    """Return events whose items have a column of every type, by the library of the table."""
    return {name: events_of(make()) for name, make in TABLES.items()}


@pytest.mark.parametrize(("table", "name"), COLUMNS)
def test_a_column_is_kept_or_left_out_by_name(
    tables: dict[str, Interactions], table: str, name: str
) -> None:
    events = tables[table]
    assert events.item_table is not None
    noted = [note for note in events.notes if f"column {name!r} " in note]
    assert (name in events.item_table.columns) == (name not in LEFT_OUT)
    if name in LEFT_OUT:
        assert noted
        assert "left out" in noted[0]
    elif name in AS_TEXT:
        assert noted or table == "pandas"
        assert events.item_table[name].dtype == pl.String
        assert events.item_table[name][0] is not None


@pytest.mark.parametrize(
    ("table", "name", "values"),
    [
        ("polars", "Int128", [1, None]),
        ("polars", "Int128_large", [str(2**100), "1"]),
        ("polars", "Decimal", [9.99, 3.1]),
        ("polars", "Decimal_whole", [7, None]),
        ("polars", "Decimal_large", ["12345678901234567890.12", "1.00"]),
        ("polars", "Enum", ["a", "b"]),
        ("polars", "Datetime_zone", [dt.datetime(2024, 7, 1, 10), None]),
        ("polars", "Duration_ms", [dt.timedelta(minutes=90), None]),
        ("polars", "Time", [dt.time(12, 30, 0, 5), None]),
        ("polars", "Object_arrays", ["[1 2]", None]),
        ("polars", "List_Decimal", [[1.5], []]),
        ("polars", "List_Duration", [[dt.timedelta(1), None], None]),
        ("polars", "List_Array", [[[1, 2]], []]),
        ("arrow", "list_view", [["a"], ["b", "c"]]),
        ("arrow", "large_list_view", [[1, 2], None]),
        ("arrow", "run_end_encoded", ["a", "b"]),
        ("arrow", "decimal256", [1.0, None]),
        ("arrow", "bool8", [True, False]),
        ("arrow", "tensor", [[1.0, 2.0], [3.0, 4.0]]),
        (
            "arrow",
            "uuid",
            ["30303030-3030-3030-3030-303030303030", "31313131-3131-3131-3131-313131313131"],
        ),
        ("pandas", "period", ["2024-01", "2024-02"]),
        ("pandas", "period_category", ["2024-01", "2024-02"]),
        ("pandas", "interval", ["(0, 1]", "(1, 2]"]),
        ("pandas", "sparse", [1, 0]),
        ("pandas", "longdouble", [1.0, 2.0]),
        ("pandas", "timedelta", [dt.timedelta(minutes=90), dt.timedelta(minutes=91)]),
    ],
)
def test_what_is_kept_is_what_was_given(
    tables: dict[str, Interactions], table: str, name: str, values: list[object]
) -> None:
    kept = tables[table].item_table
    assert kept is not None
    assert kept[name].to_list() == values


@pytest.mark.parametrize("name", [n for t, n in COLUMNS if t == "polars"])
def test_a_context_is_kept_or_refused_by_name(name: str, tmp_path: Path) -> None:
    context = pl.DataFrame({name: polars_columns()[name]})
    if name in LEFT_OUT:
        with pytest.raises(ft.DataError) as caught:
            events_of(None, context)
        assert caught.value.column == name
        return
    events = events_of(None, context)
    ft.write_store(events, tmp_path / "store")
    opened = ft.open_store(tmp_path / "store")
    assert opened.context is not None
    assert opened.context.equals(events.context)
    assert opened.fingerprint() == events.fingerprint()


@pytest.mark.parametrize("table", TABLES)
def test_what_is_stored_is_opened(
    tables: dict[str, Interactions], table: str, tmp_path: Path
) -> None:
    ft.write_store(tables[table], tmp_path / "store")
    opened = ft.open_store(tmp_path / "store").item_table
    assert opened is not None
    assert opened.equals(tables[table].item_table)


@pytest.mark.parametrize(("table", "name"), [c for c in COLUMNS if c[1] not in LEFT_OUT])
def test_a_column_is_a_feature_or_is_refused_by_name(
    tables: dict[str, Interactions], table: str, name: str
) -> None:
    for kind in ("categorical", "multi", "numeric", "vector"):
        schema = ft.schema_from_toml(f'[item.{name}]\nkind = "{kind}"')
        refused = ""
        try:
            ft.fit_features(schema, tables[table])
        except ft.DataError as error:
            refused = str(error)
        assert not refused or repr(name) in refused


@pytest.mark.parametrize("table", TABLES)
def test_a_schema_is_proposed_of_any_columns(tables: dict[str, Interactions], table: str) -> None:
    events = tables[table]
    assert ft.fit_features(ft.inspect_schema(events), events).item_table is not None
    ft.audit_events(events)


@pytest.mark.parametrize("table", TABLES)
def test_what_trains_is_served(
    tables: dict[str, Interactions], table: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    split = ft.leave_last_split(tables[table], validation=False)
    ft.build_recommender(ft.fit(ft.PopularityConfig(), split)).save(tmp_path / "bundle")
    recommender = ft.load(tmp_path / "bundle")
    shown = Catalogue(recommender.trained.events).describe(0)
    json.dumps(shown.model_dump(mode="json"), allow_nan=False)
    for name in recommender.item_labels.readable:
        told = _column(recommender.item_labels, name)
        if told.values:
            rules = ft.Rules(where={name: {"one_of": told.values}}, caps={name: 1})
            assert recommender.recommend(user_id=9, k=2, rules=rules).rows
    with pytest.raises(SystemExit) as ended:
        run(["recommend", str(tmp_path / "bundle"), "--user", "1", "--json"])
    assert ended.value.code in (0, None)
    assert json.loads(capsys.readouterr().out)


def test_a_title_of_several_values_is_no_title() -> None:
    events = events_of(pl.DataFrame({"item_id": [0, 1], "title": [["a", "b"], ["c"]]}))
    shown = Catalogue(events).describe(0)
    assert (shown.title, shown.attributes) == ("0", {"title": ["a", "b"]})


def test_events_made_by_hand_keep_the_same_types() -> None:
    events = events_of(None)
    by_hand = replace(
        events, item_table=pl.DataFrame({"x": pl.Series([2**100, 1], dtype=pl.Int128)})
    )
    assert by_hand.item_table is not None
    assert by_hand.item_table.dtypes == [pl.String]
    assert len(by_hand.notes) == len(replace(by_hand).notes) == len(events.notes) + 1

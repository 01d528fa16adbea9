"""Reading: any library's table gives the same events, and errors name the column."""

import datetime as dt
import gzip
import re
import uuid
from decimal import Decimal
from pathlib import Path
from typing import Any, get_args

import duckdb
import hypothesis.strategies as st
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings

import foretaste
from foretaste.data.audit import audit_events
from foretaste.data.interactions import Interactions, find_repeats, group_events, sort_by_time
from foretaste.data.read_config import MISSING, TimestampUnit
from foretaste.data.reading import read_interactions
from foretaste.data.store import write_store
from foretaste.errors import ConfigError, DataError

NOW = 1_600_000_000
ID_4, ID_5 = uuid.UUID(int=4), uuid.UUID(int=5)
EVENTS = pl.DataFrame(
    {
        "user_id": [7, 3, 7, 3, 7],
        "item_id": ["b", "a", "a", "c", "c"],
        "timestamp": [NOW + 5, NOW + 1, NOW + 2, NOW, NOW + 5],
        "rating": [4.0, 3.5, 1.0, 5.0, 2.0],
        "label": [1, 0, 1, 1, 0],
    }
)
# User 3: c at +0, a at +1. User 7: a at +2, then b and c at +5 in the order of the table.


def read(source: object, **more: object) -> Interactions:
    named = {"timestamp": "timestamp", "rating": "rating", "columns": ["label"]}
    return read_interactions(source, **(named | more))  # type: ignore[arg-type]


def as_rows(events: Interactions) -> list[tuple[object, ...]]:
    """The events as external ids, in the order kept."""
    users = events.users.decode(events.user_idx.astype(np.int64))
    items = events.items.decode(events.item_idx.astype(np.int64))
    times = [] if events.timestamp_s is None else [events.timestamp_s.tolist()]
    columns = [events.columns[name].tolist() for name in sorted(events.columns)]
    return list(zip(users, items, *times, *columns, strict=True))


EXPECTED = [
    (3, "c", NOW, 1, 5.0),
    (3, "a", NOW + 1, 0, 3.5),
    (7, "a", NOW + 2, 1, 1.0),
    (7, "b", NOW + 5, 1, 4.0),
    (7, "c", NOW + 5, 0, 2.0),
]


def written(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def sources(folder: Path) -> dict[str, object]:
    csv = EVENTS.write_csv()
    EVENTS.write_parquet(folder / "e.parquet")
    EVENTS.write_ipc(folder / "e.arrow")
    arrow = EVENTS.to_arrow()
    return {
        "csv": written(folder / "e.csv", csv),
        "csv text path": str(folder / "e.csv"),
        "tsv": written(folder / "e.tsv", csv.replace(",", "\t")),
        "semicolons": written(folder / "semi.txt", csv.replace(",", ";")),
        "double colons": written(folder / "e.dat", csv.replace(",", "::")),
        "gzip": written(folder / "e.csv.gz", gzip.compress(csv.encode())),
        "crlf and mark": written(folder / "crlf.csv", "\ufeff" + csv.replace("\n", "\r\n")),
        "parquet": folder / "e.parquet",
        "arrow file": folder / "e.arrow",
        "polars": EVENTS,
        "polars lazy": EVENTS.lazy(),
        "arrow": arrow,
        "arrow batches": arrow.to_reader(max_chunksize=2),
        "pandas": EVENTS.to_pandas(),
        "pandas with an index": EVENTS.to_pandas().set_index(pd.Index(list("vwxyz"), name="at")),
        "duckdb": duckdb.sql("select * from arrow"),
    }


def test_every_source_gives_the_same_events(tmp_path: Path) -> None:
    prints = set()
    for name, source in sources(tmp_path).items():
        events = read(source)
        assert as_rows(events) == EXPECTED, name
        assert events.offsets.tolist() == [0, 2, 5], name
        assert (events.users.is_integer, events.items.is_integer) == (True, False), name
        assert events.columns["rating"].dtype == np.float32, name
        prints.add(events.fingerprint())
    assert len(prints) == 1


def test_without_a_header_columns_go_by_position(tmp_path: Path) -> None:
    text = EVENTS.write_csv(include_header=False)
    plain, colons = (
        written(tmp_path / "e.csv", text),
        written(tmp_path / "e.dat", text.replace(",", "::")),
    )
    for path in (plain, colons):
        by_name = read(
            path, header=False, user="0", item="1", timestamp="2", rating="3", columns=["4"]
        )
        by_place = read(path, header=False, user=0, item=1, timestamp=2, rating=3, columns=[4])
        assert as_rows(by_name) == as_rows(by_place) == EXPECTED


def test_several_files_are_one_table(tmp_path: Path) -> None:
    first, second = tmp_path / "1.csv", tmp_path / "2.parquet"
    EVENTS[:2].write_csv(first)
    EVENTS[2:].write_parquet(second)
    assert as_rows(read([first, second])) == EXPECTED
    EVENTS[2:].with_columns(pl.lit("x").alias("user_id")).write_csv(tmp_path / "3.csv")
    mixed = read([first, tmp_path / "3.csv"])
    assert mixed.users.ids.to_list() == ["3", "7", "x"]


def test_without_times_the_order_of_the_table_is_kept() -> None:
    events = read_interactions(EVENTS)
    assert events.timestamp_s is None
    assert as_rows(events) == [(3, "a"), (3, "c"), (7, "b"), (7, "a"), (7, "c")]


# Ids


@pytest.mark.parametrize(
    ("ids", "kept"),
    [
        ([2, 10, 1], [1, 2, 10]),
        ([2.0, 10.0, 1.0], [1, 2, 10]),
        (["2", "10", "1"], ["1", "10", "2"]),
        ([True, False, True], ["false", "true"]),
        ([dt.date(2024, 5, 1), dt.date(2023, 5, 1), None], ["2023-05-01", "2024-05-01"]),
        ([ID_5, ID_4, ID_5], [str(ID_4), str(ID_5)]),
        (pl.Series([2**64 - 1, 3, 3], dtype=pl.UInt64), ["18446744073709551615", "3"]),
        (pl.Series(["b", "a", "b"], dtype=pl.Categorical), ["a", "b"]),
        (pl.Series(["12", "7", "12"]).cast(pl.Decimal(10, 0)), [7, 12]),
        ([-(2**62), 2**62, 0], [-(2**62), 0, 2**62]),
    ],
)  # fmt: skip
def test_ids_of_any_type(ids: object, kept: list[object]) -> None:
    frame = pl.DataFrame({"user_id": ids, "item_id": [1, 2, 3]})
    events = read_interactions(frame, drop_incomplete=True)
    assert events.users.ids.to_list() == kept
    for value in frame["user_id"].drop_nulls().to_list():
        assert events.users.find(value) >= 0, value


def test_pandas_ids_of_mixed_types_and_uuids_become_text() -> None:
    ids = [uuid.UUID(int=n) for n in range(3)]
    frame = pd.DataFrame({"user_id": [1, "b", True], "item_id": ids, "odd": [1, "x", None]})
    events = read_interactions(frame)
    assert as_rows(events) == [
        ("1", str(ids[0])),
        ("b", str(ids[1])),
        ("true", str(ids[2])),
    ]
    missing = pd.DataFrame({"user_id": [1, "b", None], "item_id": [1, 2, 3]})
    with pytest.raises(DataError, match="'user_id', row 3"):
        read_interactions(missing)


@pytest.mark.parametrize("library", [pd.DataFrame, pl.DataFrame])
def test_an_id_of_any_type_in_a_mixed_column_is_found_again(library: type) -> None:
    ids = [dt.datetime(2024, 5, 1, 12), dt.date(2024, 5, 1), True, np.True_, 2.5, ID_4, "x"]
    column = ids if library is pd.DataFrame else pl.Series(ids, dtype=pl.Object)
    events = read_interactions(library({"user_id": column, "item_id": [1] * len(ids)}))
    assert [events.users.find(one) >= 0 for one in ids] == [True] * len(ids)


def test_text_ids_that_look_like_numbers_at_first_stay_whole(tmp_path: Path) -> None:
    rows = "".join(f"{n},1\n" for n in range(20_000))
    late = written(tmp_path / "late.csv", f"user_id,item_id\n{rows}x9,1\n")
    events = read_interactions(late)
    assert not events.users.is_integer
    assert events.users.find("19999") >= 0
    assert events.users.find("x9") >= 0
    zeros = written(tmp_path / "zeros.csv", "user_id,item_id\n007,1\n7,1\n1e5,1\n")
    assert read_interactions(zeros).users.ids.to_list() == ["007", "1e5", "7"]


def test_quotes_separators_and_line_ends_in_ids(tmp_path: Path) -> None:
    ids = ['say "hi"', "a,b", "two\nlines", "cr\r\nlf", "ü", " lead", "'", "tab\there"] * 4_000
    frame = pl.DataFrame({"user_id": ids, "item_id": range(len(ids))})
    frame.write_csv(tmp_path / "q.csv")
    events = read_interactions(tmp_path / "q.csv")
    assert events.users.ids.to_list() == sorted(set(ids))
    assert as_rows(events) == as_rows(read_interactions(frame))


def test_latin_1_is_read_and_said(tmp_path: Path) -> None:
    path = written(tmp_path / "l.csv", "user_id,item_id\nzoë,1\n".encode("latin-1"))
    events = read_interactions(path)
    assert events.users.ids.to_list() == ["zoë"]
    assert "read as cp1252" in events.notes[0]
    assert "encoding=" in events.notes[0]


def test_a_fraction_is_no_id() -> None:
    frame = pl.DataFrame({"user_id": [1.0, 2.5], "item_id": [1, 2]})
    with pytest.raises(DataError, match=r"'user_id', row 2: 2\.5 is not a whole number"):
        read_interactions(frame)


def test_lists_are_no_ids() -> None:
    frame = pl.DataFrame({"user_id": [[1], [2]], "item_id": [1, 2]})
    with pytest.raises(DataError, match="'user_id' holds lists"):
        read_interactions(frame)


@pytest.mark.parametrize(
    "late",
    ["007", "+7", " 7", "7 ", "-0", "00", "7.0", "7.5", "1e3", "0x7", "1_000", "9" * 20, "x"],
)
@pytest.mark.parametrize("before", [3, 12_000])
def test_one_id_that_is_no_plain_integer_makes_all_text_wherever_it_is(
    late: str, before: int, tmp_path: Path
) -> None:
    rows = "".join(f"{n},1\n" for n in range(before))
    events = read_interactions(written(tmp_path / "e.csv", f"user_id,item_id\n{rows}{late},1\n"))
    assert not events.users.is_integer
    assert events.num_users == before + 1
    assert late in set(events.users.ids)


def test_quoted_and_whole_floating_ids_are_integers_and_all_of_their_digits_count(
    tmp_path: Path,
) -> None:
    quoted = written(tmp_path / "q.csv", 'user_id,item_id\n"7",-5\n8,0\n')
    assert read_interactions(quoted).users.ids.to_list() == [7, 8]
    text = "user_id,item_id\n9007199254740993.0,1\n9007199254740992.0,1\n"
    floats = read_interactions(written(tmp_path / "f.csv", text))
    assert floats.users.ids.to_list() == [2**53, 2**53 + 1]
    mixed = read_interactions(written(tmp_path / "m.csv", text + "007,1\n"))
    assert "9007199254740993.0" in mixed.users.ids.to_list()


@pytest.mark.parametrize(
    ("dtype", "limit"), [(pl.Float16, 2**11), (pl.Float32, 2**24), (pl.Float64, 2**53)]
)
def test_ids_in_floats_are_refused_from_where_neighbours_become_one(
    dtype: pl.DataType, limit: int
) -> None:
    def frame(value: int) -> pl.DataFrame:
        return pl.DataFrame({"user_id": pl.Series([1, value]).cast(dtype), "item_id": [1, 2]})

    assert read_interactions(frame(limit - 1)).users.ids.to_list() == [1, limit - 1]
    with pytest.raises(DataError) as caught:
        read_interactions(frame(limit))
    assert (caught.value.column, caught.value.row, caught.value.value) == ("user_id", 2, limit)


# Missing values


@pytest.mark.parametrize("marker", [*MISSING, " NA", "NULL ", "  "])
@pytest.mark.parametrize("kind", ["csv", "polars", "pandas", "categorical", "object"])
def test_a_text_that_means_a_missing_value_is_missing_in_every_column(
    marker: str, kind: str, tmp_path: Path
) -> None:
    columns = {
        "user_id": ["1", marker, "3", "4", "5"],
        "item_id": ["a", "b", marker, "d", "e"],
        "t": ["2020-01-05", "2020-01-05", "2020-01-05", marker, "2020-01-05"],
        "rating": ["1", "2", "3", "4", marker],
    }
    frame = pl.DataFrame(columns)
    source = {
        "csv": lambda: written(tmp_path / "e.csv", frame.write_csv()),
        "polars": lambda: frame,
        "pandas": frame.to_pandas,
        "categorical": lambda: frame.cast(pl.Categorical),
        "object": lambda: pl.DataFrame(
            [pl.Series(name, values, dtype=pl.Object) for name, values in columns.items()]
        ),
    }[kind]()  # fmt: skip
    with pytest.raises(DataError) as caught:
        read_interactions(source, timestamp="t", rating="rating")
    assert (caught.value.column, caught.value.row) == ("user_id", 2)
    events = read_interactions(source, timestamp="t", rating="rating", drop_incomplete=True)
    assert [str(one) for one in events.users.ids] == ["1"]
    assert events.users.is_integer == (kind == "csv")
    assert events.columns["rating"].tolist() == [1]
    said = [note for note in events.notes if "taken as missing" in note]
    parsed = kind == "csv" and marker == "NaN"  # the parser's own missing number
    assert len(said) == (4 - parsed if marker.strip() else 0)


def test_what_means_a_missing_value_can_be_said(tmp_path: Path) -> None:
    path = written(tmp_path / "e.csv", "user_id,item_id\nNA,1\n-,2\nb,3\n,4\n")
    kept = read_interactions(path, missing=(), drop_incomplete=True)
    assert kept.users.ids.to_list() == ["-", "NA", "b"]
    other = read_interactions(path, missing=["-"], drop_incomplete=True)
    assert other.users.ids.to_list() == ["NA", "b"]


@pytest.mark.parametrize("dtype", [pl.Int8, pl.UInt64, pl.Int128, pl.Float32, pl.Decimal(10, 1)])
@pytest.mark.parametrize("kind", ["csv", "polars"])
def test_a_number_that_means_a_missing_value_is_missing_in_columns_of_numbers(
    dtype: pl.DataType, kind: str, tmp_path: Path
) -> None:
    number = pl.Series([7, 9, 3, 9], dtype=dtype)
    frame = pl.DataFrame({"user_id": number, "item_id": [1, 2, 3, 9], "r": number, "x": number})
    source: object = frame
    if kind == "csv":
        source = written(tmp_path / "e.csv", frame.with_columns(pl.all().cast(int)).write_csv())
    settings: Any = {"columns": ["x"], "rating": "r", "missing": ["9"]}
    events = read_interactions(source, drop_incomplete=True, **settings)
    assert events.users.ids.to_list() == [3, 7]
    assert events.columns["rating"].tolist() == events.columns["x"].tolist() == [3, 7]
    said = [note for note in events.notes if "taken as missing" in note]
    assert len(said) == 4
    with pytest.raises(DataError) as caught:
        read_interactions(source, **settings)
    assert (caught.value.column, caught.value.row) == ("user_id", 2)


def test_a_late_marker_among_numbers_leaves_them_numbers(tmp_path: Path) -> None:
    rows = "".join(f"{n},1,{n},{n}\n" for n in range(12_000))
    text = f"user_id,item_id,label,code\n{rows}NULL,1,1,2\n7,1,NA,NULL\n"
    path = written(tmp_path / "e.csv", text)
    events = read_interactions(path, columns=["label"], context=["code"], drop_incomplete=True)
    assert events.users.is_integer
    assert int(np.isnan(events.columns["label"]).sum()) == 1
    assert events.context is not None
    assert (events.context["code"].dtype, events.context["code"].null_count()) == (pl.Int64, 1)


# Times


def timed(times: object, **more: object) -> list[int]:
    frame = pl.DataFrame({"user_id": 1, "item_id": range(len(times)), "timestamp": times})  # type: ignore[arg-type]
    events = read_interactions(frame, timestamp="timestamp", **more)  # type: ignore[arg-type]
    assert events.timestamp_s is not None
    return events.timestamp_s.tolist()


def test_times_of_any_kind() -> None:
    utc = dt.datetime(2020, 1, 5, 10, 0, 0, tzinfo=dt.UTC)
    moment = int(utc.timestamp())
    early = 700_000_000
    assert timed([moment, early]) == [early, moment]
    assert timed([moment + 0.75, early + 0.0]) == [early, moment]
    assert timed([utc]) == timed([utc.replace(tzinfo=None)]) == [moment]
    assert timed([utc.astimezone(dt.timezone(dt.timedelta(hours=2)))]) == [moment]
    assert timed([dt.date(1970, 1, 2)]) == [86_400]
    assert timed([moment * 1_000 + 1], timestamp_unit="ms") == [moment]
    assert timed([moment * 10**6 + 1], timestamp_unit="us") == [moment]
    assert timed([moment * 10**9 + 1], timestamp_unit="ns") == [moment]
    assert timed([f"{moment}", f"{early}"]) == [early, moment]


@pytest.mark.parametrize(
    "text",
    [
        "2020-01-05T10:00:00Z",
        "2020-01-05T12:00:00+02:00",
        "2020-01-05 10:00:00",
        "2020-01-05 10:00:00.000",
        "2020-01-05T10:00",
        "2020-01-05T10:00Z",
    ],
)
def test_iso_text_is_a_time(text: str, tmp_path: Path) -> None:
    moment = int(dt.datetime(2020, 1, 5, 10, tzinfo=dt.UTC).timestamp())
    assert timed([text, "1990-01-02"]) == [631_238_400, moment]
    path = written(tmp_path / "t.csv", f"user_id,item_id,t\n1,1,{text}\n")
    events = read_interactions(path, timestamp="t")
    assert events.timestamp_s is not None
    assert events.timestamp_s.tolist() == [moment]


@pytest.mark.parametrize(
    ("times", "step"),
    [
        (pl.Series([NOW, NOW + 1], dtype=pl.Float32), 128),
        (pl.Series([5_000, 5_001], dtype=pl.Float16), 4),
    ],
)
def test_times_in_small_floats_are_noted_with_what_they_cannot_tell_apart(
    times: pl.Series, step: int
) -> None:
    frame = pl.DataFrame({"user_id": [1, 1], "item_id": [1, 2], "t": times})
    events = read_interactions(frame, timestamp="t", timestamp_unit="order" if step == 4 else "s")
    assert events.timestamp_s is not None
    assert len(set(events.timestamp_s.tolist())) == 1
    assert f"to {step} only" in " ".join(events.notes)
    exact = pl.Series([19_662.5, 19_663], dtype=pl.Float32)
    days = read_interactions(frame.with_columns(t=exact), timestamp="t", timestamp_unit="days")
    assert days.notes == ()


def test_times_that_mix_units_are_refused_without_the_advice_of_one_unit() -> None:
    assert "the column mixes units" in told([NOW] * 20_000 + [NOW * 1_000])


def test_the_unit_that_an_error_advises_reads_the_column() -> None:
    said = told(["01/05/24"])  # the year 24 is none of today
    assert "timestamp_unit" not in said


def test_fractions_of_a_second_decide_the_order() -> None:
    frame = pl.DataFrame({"user_id": [1, 1], "item_id": [1, 2], "t": [5.9, 5.1]})
    events = read_interactions(frame, timestamp="t")
    assert events.items.decode(events.item_idx.astype(np.int64)) == [2, 1]
    assert "fractions of a second" in " ".join(events.notes)


def test_seconds_mixed_with_milliseconds_are_refused_by_their_row() -> None:
    frame = pl.DataFrame({"user_id": [1, 1, 1], "item_id": [2, 3, 4], "time": [NOW * 1000, NOW, 0]})
    with pytest.raises(DataError, match=rf"'time', row 2: {NOW} lies before 1990 in ms, .* in s"):
        read_interactions(frame, timestamp="time", timestamp_unit="ms")


@pytest.mark.parametrize(
    ("time", "unit", "coarser"),
    [(NOW, "ms", "s"), (NOW, "ns", "s"), (NOW * 1_000, "us", "ms"), (NOW * 10**6, "ns", "us")],
)
def test_seconds_given_as_finer_units_are_refused_with_the_fix(
    time: int, unit: str, coarser: str
) -> None:
    frame = pl.DataFrame({"user_id": [1, 1], "item_id": [2, 3], "time": [time, time + 5]})
    with pytest.raises(DataError, match=f'before 1990 in {unit}.*timestamp_unit="{coarser}"'):
        read_interactions(frame, timestamp="time", timestamp_unit=unit)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("times", "message"),
    [
        ([1, -5], r"row 2: -5 is a negative time"),
        ([1, NOW * 1_000], 'row 2: 1600000000000 is after .* in s, but .* timestamp_unit="ms"'),
        ([NOW * 10**6], 'timestamp_unit="us"'),
        ([NOW * 10**9], 'timestamp_unit="ns"'),
        ([float(NOW * 1_000)], 'timestamp_unit="ms"'),
        ([8_000_000_000], "row 1: 8000000000 is after the year 2200 in s"),
        ([1.0, float("inf")], "row 2: inf"),
        ([1.0, float("-inf")], "row 2: -inf"),
        ([1.0, float("nan")], "row 2: the value is missing"),
        ([1, None], "row 2: the value is missing"),
        (["2020-01-05", "yesterday"], "row 2: 'yesterday' is not a time"),
        (["05/01/2020"], "row 1: '05/01/2020' is not a time"),
        ([dt.date(1960, 1, 1)], "row 1: .* before 1970 or after 2200"),
        ([dt.datetime(2300, 1, 1)], "row 1: .* before 1970 or after 2200"),
        ([[1]], "holds lists"),
    ],
)  # fmt: skip
def test_times_that_cannot_be_are_refused(times: list[object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        timed(times)


def told(times: list[object], **more: object) -> str:
    with pytest.raises(DataError) as caught:
        timed(times, **more)
    assert caught.value.column == "timestamp"
    return str(caught.value)


NOON = 1_698_840_000  # 2023-11-01 12:00
DAY = 1_698_796_800


@pytest.mark.parametrize(
    ("times", "unit", "seconds"),
    [
        ([2023_11_01, 2023_11_03], "YYYYMMDD", [DAY, DAY + 172_800]),
        ([2023_11_01.0, 2023_11_03.0], "YYYYMMDD", [DAY, DAY + 172_800]),
        (["20231101", "20231103"], "YYYYMMDD", [DAY, DAY + 172_800]),
        ([2023_11, 2023_12], "YYYYMM", [DAY, 1_701_388_800]),
        ([2023_11_01_12_00], "YYYYMMDDHHMM", [NOON]),
        ([2023_11_01_12_00_01], "YYYYMMDDHHMMSS", [NOON + 1]),
        ([45_231, 45_231.5], "excel", [DAY, NOON]),
        ([19_662, 19_662.5], "days", [DAY, NOON]),
        ([2023, 2024], "years", [1_672_531_200, 1_704_067_200]),
        ([2023.5, 2024], "years", [1_672_531_200 + 365 * 43_200, 1_704_067_200]),
        ([NOON // 3_600], "hours", [NOON]),
        ([NOON // 60], "minutes", [NOON]),
        (["01.11.2023 12:00", "02.11.2023"], "DD.MM.YYYY", [NOON, DAY + 86_400]),
        (["13/11/2023", "01/11/2023"], "DD/MM/YYYY", [DAY, DAY + 12 * 86_400]),
        (["11/01/2023 12:00:00"], "MM/DD/YYYY", [NOON]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("said", ["s", "ms", "ns"])
def test_times_of_another_unit_are_refused_with_the_unit_that_reads_them(
    times: list[object], unit: str, seconds: list[int], said: str
) -> None:
    times = [float(time) if isinstance(times[-1], float) else time for time in times]  # type: ignore[arg-type]
    if said == "s" or max(len(str(time)) for time in times) < 12:
        assert f'"{unit}"' in told(times, timestamp_unit=said)
    assert timed(times, timestamp_unit=unit) == seconds


@pytest.mark.parametrize("unit", get_args(TimestampUnit))
def test_every_unit_refuses_infinity_and_text_and_negative_numbers(unit: str) -> None:
    for times in ([1.5, float("inf")], ["x", "y"], [-7, -8], [2.0**80], [2**63 - 1]):
        told(times, timestamp_unit=unit)


@pytest.mark.parametrize(
    ("known", "unknown"),
    [
        (NOW, 0), (NOW, -1), (NOW + 0.5, 0.0), (2023_11_01, 0), (45_231, 0), (2023, -1),
        (dt.datetime(2023, 1, 1), dt.datetime(1970, 1, 1)),
        (dt.date(2023, 1, 1), dt.date(1900, 1, 1)),
        (dt.datetime(2023, 1, 1), dt.datetime(9999, 12, 31, 23, 59, 59)),
        ("2023-01-01", "0001-01-01"), ("2023-01-01T10:00Z", "1970-01-01"), (NOW, 2023_11_01),
    ],
)  # fmt: skip
def test_an_unknown_time_among_times_of_today_is_refused_or_left_out(
    known: object, unknown: object
) -> None:
    unit = {2023_11_01: "YYYYMMDD", 45_231: "excel", 2023: "years"}.get(known, "s")  # type: ignore[call-overload]
    assert "drop_incomplete=True" in told([known, unknown, known], timestamp_unit=unit)
    frame = pl.DataFrame({"user_id": 1, "item_id": [1, 2, 3], "t": [known, unknown, known]})
    more = {"timestamp": "t", "timestamp_unit": unit, "drop_incomplete": True}
    events = read_interactions(frame, **more)  # type: ignore[arg-type]
    assert events.items.ids.to_list() == [1, 3]
    assert "1 incomplete rows were left out" in events.notes
    assert any("column 't': 1 times such as" in note for note in events.notes)


def test_numbers_that_only_count_are_taken_as_an_order_and_said() -> None:
    frame = pl.DataFrame({"user_id": 1, "item_id": range(5), "t": range(5)})
    assert "taken as an order" in " ".join(read_interactions(frame, timestamp="t").notes)
    said = read_interactions(frame, timestamp="t", timestamp_unit="order")
    assert said.notes == ()
    assert timed([2023, 2024], timestamp_unit="order") == [2023, 2024]
    spread = list(range(0, NOW, NOW // 200))  # from 1970 to today, with the years between
    assert timed(spread[1:]) == spread[1:]


@pytest.mark.parametrize(
    ("times", "said"),
    [
        ([dt.datetime(2020, 1, 1, 9)], True),
        ([dt.datetime(2020, 1, 1)], False),
        ([dt.datetime(2020, 1, 1, 9, tzinfo=dt.UTC)], False),
        (["2020-01-01 09:00", "2020-01-01T09:00Z"], True),
        (["2020-01-01 09:00:00 UTC", "2020/01/01 09:00:00+02:00"], False),
        (["2020-01-01"], False),
    ],
)  # fmt: skip
def test_times_of_day_without_a_zone_are_taken_as_utc_and_said(
    times: list[object],
    said: bool,  # noqa: FBT001 - one of the table's columns
) -> None:
    frame = pl.DataFrame({"user_id": 1, "item_id": range(len(times)), "t": times})
    notes = read_interactions(frame, timestamp="t").notes
    assert any("UTC" in note for note in notes) == said


# Numbers and gaps


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 1e300, None])
def test_ratings_that_are_no_numbers_are_refused_by_row(value: float | None) -> None:
    frame = EVENTS.with_columns(rating=pl.Series([1.0, 2.0, value, 3.0, 3.0]))
    with pytest.raises(DataError, match="'rating', row 3"):
        read(frame)


@pytest.mark.parametrize(("value", "row"), [("x", 2), ("inf", 2), ("nan", 2), ("", 2), ("1e99", 2)])
def test_ratings_in_text_that_are_no_numbers_are_refused_by_row(
    value: str, row: int, tmp_path: Path
) -> None:
    path = written(tmp_path / "r.csv", f"user_id,item_id,rating\n1,1,4\n1,2,{value}\n")
    with pytest.raises(DataError, match=f"'rating', row {row}"):
        read_interactions(path, rating="rating")


def test_incomplete_rows_are_refused_or_dropped_and_counted(tmp_path: Path) -> None:
    text = "user_id,item_id,timestamp\n1,1,5\n,2,6\n3,,7\n4,4,\n\n5,5,8\n\n"
    path = written(tmp_path / "gaps.csv", text)
    with pytest.raises(
        DataError, match=r"'user_id', row 2: the value is missing.*drop_incomplete=True"
    ):
        read_interactions(path, timestamp="timestamp")
    events = read_interactions(path, timestamp="timestamp", drop_incomplete=True)
    assert as_rows(events) == [(1, 1, 5), (5, 5, 8)]
    assert events.notes[:2] == ("2 empty rows were left out", "3 incomplete rows were left out")


def test_an_empty_text_is_a_missing_value_however_it_is_written(tmp_path: Path) -> None:
    text = 'user_id,item_id,at,n\na,1,2020-01-01,2\n"",2,2020-01-01,2\nb,3,"",2\nc,4,2020-01-01,""'
    path = written(tmp_path / "quoted.csv", text)
    with pytest.raises(DataError, match=r"'user_id', row 2: the value is missing: fix it"):
        read_interactions(path, timestamp="at")
    events = read_interactions(path, timestamp="at", columns=["n"], drop_incomplete=True)
    assert events.users.ids.to_list() == ["a", "c"]
    assert np.isnan(events.columns["n"]).tolist() == [False, True]
    mixed = pl.DataFrame({"user_id": pl.Series(["", 7], dtype=pl.Object), "item_id": ["", "x"]})
    events = read_interactions(mixed, drop_incomplete=True)
    assert (events.users.ids.to_list(), events.items.ids.to_list()) == (["7"], ["x"])


def test_blank_lines_are_no_error_but_counted(tmp_path: Path) -> None:
    path = written(tmp_path / "blank.csv", "user_id,item_id\n1,1\n\n2,2\n\n")
    events = read_interactions(path)
    assert as_rows(events) == [(1, 1), (2, 2)]
    assert events.notes == ("2 empty rows were left out",)


def test_a_missing_label_is_nan_and_text_is_refused() -> None:
    events = read(EVENTS.with_columns(label=pl.Series([1, None, 0, 0, 0])))
    assert np.isnan(events.columns["label"]).sum() == 1
    with pytest.raises(DataError, match="'label', row 1: 'x' is not a number"):
        read(EVENTS.with_columns(label=pl.lit("x")))


def test_repeated_events_are_counted_and_dropped_on_request() -> None:
    frame = pl.DataFrame(
        {
            "user_id": [1, 1, 1, 1, 2],
            "item_id": [5, 6, 5, 5, 5],
            "timestamp": [9, 9, 9, 8, 9],
            "rating": [1.0, 2.0, 3.0, 4.0, 5.0],
        }
    )
    # User 1 at time 9: item 5 twice, with item 6 between. All else differs in user or time.
    kept = read(frame, columns=())
    assert len(kept) == 5
    assert kept.notes[1:] == ("1 events repeat the user, item and second of another: kept",)
    first = read(frame, columns=(), duplicates="first")
    assert as_rows(first) == [(1, 5, 8, 4.0), (1, 5, 9, 1.0), (1, 6, 9, 2.0), (2, 5, 9, 5.0)]
    last = read(frame, columns=(), duplicates="last")
    assert as_rows(last) == [(1, 5, 8, 4.0), (1, 6, 9, 2.0), (1, 5, 9, 3.0), (2, 5, 9, 5.0)]
    assert "left out, the last of each kept" in last.notes[1]
    timeless = read_interactions(frame, duplicates="first")
    assert as_rows(timeless) == [(1, 5), (1, 6), (2, 5)]


def test_events_of_one_second_repeat_each_other_as_the_audit_says() -> None:
    frame = pl.DataFrame(
        {
            "user_id": [1, 1, 1],
            "item_id": [5, 5, 5],
            "timestamp": [9.5, 9.25, 10.0],
            "rating": [1.0, 2.0, 3.0],
        }
    )
    assert audit_events(read(frame, columns=()))[0].what == "repeated_event"
    first = read(frame, columns=(), duplicates="first")
    assert as_rows(first) == [(1, 5, 9, 2.0), (1, 5, 10, 3.0)]
    assert "repeated_event" not in [finding.what for finding in audit_events(first)]


# Columns of every type

ONE = pa.array([1, 2])
TYPES = {
    "null": pa.nulls(2), "bool": pa.array([True, None]), "int8": pa.array([1, 2], pa.int8()),
    "uint64": pa.array([2**64 - 1, 1], pa.uint64()), "float16": pa.array([1, 2]).cast(pa.float16()),
    "decimal32": pa.array([Decimal("1.5"), None], pa.decimal32(5, 1)),
    "decimal256": pa.array([Decimal("2"), None], pa.decimal256(60, 1)),
    "large_string": pa.array(["a", "b"], pa.large_string()),
    "string_view": pa.array(["a", "b"], pa.string_view()), "bytes": pa.array([b"a", b"b"]),
    "binary_view": pa.array([b"a", b"b"], pa.binary_view()),
    "dictionary": pa.array(["a", "b"]).dictionary_encode(),
    "run_end": pa.RunEndEncodedArray.from_arrays(pa.array([1, 2], pa.int32()), ONE),
    "date32": pa.array([1, 2], pa.date32()), "date64": pa.array([0, 86_400_000], pa.date64()),
    "time64": pa.array([1, 2], pa.time64("us")), "seconds": pa.array([1, 2], pa.timestamp("s")),
    "zoned": pa.array([1, 2], pa.timestamp("ns", "Europe/Paris")),
    "no such zone": pa.array([1, 2], pa.timestamp("us", "Mars/One")),
    "duration": pa.array([1, 2], pa.duration("s")),
    "interval": pa.array([(1, 2, 3), None], pa.month_day_nano_interval()),
    "list": pa.array([[1], [2]]), "list_view": pa.array([[1], [2]], pa.list_view(pa.int64())),
    "struct": pa.array([{"a": 1}, {"a": 2}]),
    "map": pa.array([[("a", 1)], [("b", 2)]], pa.map_(pa.string(), pa.int64())),
    "union": pa.UnionArray.from_sparse(pa.array([0, 1], pa.int8()), [ONE, pa.array(["a", "b"])]),
    "uuid": pa.array([b"0" * 16, b"1" * 16], pa.uuid()), "json": pa.array(["1", "{}"], pa.json_()),
}  # fmt: skip
PANDAS = {
    "period": pd.period_range("2020", periods=2, freq="Y"), "range": pd.interval_range(0, 2),
    "complex": [1j, 2j], "sparse": pd.arrays.SparseArray([1, 0]), "delta": pd.to_timedelta([1, 2]),
    "nullable": pd.array([1, None], dtype="Int64"), "categories": pd.Categorical(["a", None]),
}  # fmt: skip


def refused(source: object, **more: object) -> DataError | None:
    """Return the error of reading, or None; an error that is not ours fails the test."""
    try:
        read_interactions(source, **more)  # type: ignore[arg-type]
    except DataError as error:
        return error
    return None


@pytest.mark.parametrize("name", [*TYPES, *PANDAS])
@pytest.mark.parametrize("part", ["user", "timestamp", "rating", "columns", "context", "items"])
def test_a_column_of_any_type_is_read_or_refused_by_its_name(name: str, part: str) -> None:
    if name in TYPES:
        source: object = pa.table({"user_id": ONE, "item_id": ONE, "odd": TYPES[name]})
    else:
        source = pd.DataFrame({"user_id": [1, 2], "item_id": [1, 2], "odd": PANDAS[name]})
    assert len(read_interactions(source)) == 2  # it was not asked for
    listed = {"columns": ["odd"], "context": ["odd"], "items": source}
    more = {part: listed.get(part, "odd"), "drop_incomplete": True}
    error = refused(source, **more)
    if error is not None:
        assert part != "items"
        assert error.column == "odd" or "holds no events" in str(error)


@pytest.mark.parametrize("name", ["no such zone", "list_view", "decimal256", "json"])
def test_a_type_that_one_library_lacks_does_not_stop_a_file(name: str, tmp_path: Path) -> None:
    table = pa.table({"user_id": ONE, "item_id": ONE, "odd": TYPES[name]})
    pq.write_table(table, tmp_path / "e.parquet")
    assert read_interactions(tmp_path / "e.parquet").users.ids.to_list() == [1, 2]


def test_a_period_is_its_text_and_no_number() -> None:
    frame = pd.DataFrame({"user_id": PANDAS["period"], "item_id": [1, 2]})
    assert read_interactions(frame).users.ids.to_list() == ["2020", "2021"]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (dt.date(2024, 1, 1), dt.datetime(2024, 1, 1, 5)),
        (dt.datetime(2024, 1, 1), dt.datetime(2024, 1, 1, 5, tzinfo=dt.UTC)),
        (dt.datetime(2024, 1, 1, tzinfo=dt.UTC), "2024-01-01T05:00Z"),
        (dt.date(2024, 1, 1), "2024-01-01T05:00Z"),
        (1_704_067_200, "1704085200"),
        (1_704_067_200, 1_704_085_200.0),
    ],
)
def test_files_of_unlike_types_are_brought_together(
    first: object, second: object, tmp_path: Path
) -> None:
    for name, time, user in (("a", first, 2**53 + 1), ("b", second, 7.0)):
        frame = pl.DataFrame({"user_id": [user], "item_id": ["x"], "t": [time]})
        frame.cast({"item_id": pl.Categorical if name == "a" else pl.String}).write_parquet(
            tmp_path / f"{name}.parquet"
        )
    events = read_interactions([tmp_path / "a.parquet", tmp_path / "b.parquet"], timestamp="t")
    assert events.users.ids.to_list() == [7, 2**53 + 1]
    assert events.items.ids.to_list() == ["x"]
    assert events.timestamp_s is not None
    assert events.timestamp_s.tolist() == [1_704_085_200, 1_704_067_200]


def test_files_whose_types_do_not_go_together_are_named(tmp_path: Path) -> None:
    for name, tags in (("a", [["x"]]), ("b", [1])):
        frame = pl.DataFrame({"user_id": [1], "item_id": [1], "tags": tags})
        frame.write_parquet(tmp_path / f"{name}.parquet")
    files = [tmp_path / "a.parquet", tmp_path / "b.parquet"]
    with pytest.raises(DataError, match="do not go together") as caught:
        read_interactions(files, context=["tags"])
    assert caught.value.column == "tags"


# Text of every layout and encoding


@pytest.mark.parametrize(
    ("text", "more"),
    [
        (" user_id item_id  n\n 00001 10  1\r\n   2  7 12.5\n", {}),
        (" 00001 10\n 2  7\n", {"header": False, "user": 0, "item": 1}),
        ("user_id \t item_id\n00001 \t 10\n2\t\t7\n", {"separator": "\\s+"}),
        ("user_id  item_id\n00001  10\n2  7\n", {"separator": " +"}),
        ("sep=;\nuser_id;item_id\n00001;10\n2;7\n", {}),
        ('"sep=\t"\r\nuser_id\titem_id\r\n00001\t10\r\n2\t7\r\n', {}),
        ("# made by x\n# in 2020\nuser_id,item_id\n00001,10\n2,7\n", {}),
        ("% sym\n00001 10\n2 7\n", {"header": False, "user": 0, "item": 1}),
        ("# user_id item_id\n00001 10\n2 7\n", {}),
        ("#user_id,item_id\n00001,10\n2,7\n", {}),
        ("\n\nuser_id,item_id\n00001,10\n2,7\n", {}),
        ("user_id,item_id\r00001,10\r2,7\r", {}),
        ("user_id\titem_id\n00001\t10\n2\t7\n", {"separator": "\\t"}),
        ("user_id\x01item_id\n00001\x0110\n2\x017\n", {}),
        ("user_id¦item_id\n00001¦10\n2¦7\n", {"separator": "¦"}),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_text_of_any_layout_is_read(
    text: str, more: dict[str, object], encoding: str, tmp_path: Path
) -> None:
    path = written(tmp_path / "e.txt", text.encode(encoding))
    events = read_interactions(path, **more)  # type: ignore[arg-type]
    assert as_rows(events) == [("00001", 10), ("2", 7)]
    path = written(tmp_path / "e.txt.gz", gzip.compress(text.encode(encoding)))
    assert as_rows(read_interactions(path, **more)) == [("00001", 10), ("2", 7)]  # type: ignore[arg-type]


def test_lines_that_were_left_out_before_a_table_are_counted(tmp_path: Path) -> None:
    path = written(tmp_path / "e.csv", "# made by x\n# in 2020\nuser_id,item_id\n1,2\n")
    assert "the first 2 lines, which start with '#'" in read_interactions(path).notes[0]
    ids = written(tmp_path / "ids.csv", "#a,#b\n#c,#d\n")
    kept = read_interactions(ids, header=False, user=0, item=1)
    assert as_rows(kept) == [("#a", "#b"), ("#c", "#d")]


@pytest.mark.parametrize(
    ("word", "encoding"),
    [("田中", "gbk"), ("テスト", "shift_jis"), ("Привет", "cp1251"), ("Привет", "koi8-r"),
     ("한국어", "euc-kr"), ("مرحبا", "cp1256"), ("“5 €”", "cp1252"), ("zoë", "latin-1")],
)  # fmt: skip
def test_an_encoding_is_read_as_it_is_said_and_not_misread_in_silence(
    word: str, encoding: str, tmp_path: Path
) -> None:
    path = written(tmp_path / "e.csv", f"user_id,item_id\n{word},1\n".encode(encoding))
    events = read_interactions(path, encoding=encoding)
    assert events.users.find(word) == 0
    error = refused(path)
    said = read_interactions(path).notes[0] if error is None else str(error)
    assert "encoding=" in said


@pytest.mark.parametrize("encoding", ["klingon", "rot13", "base64", ""])
def test_an_encoding_that_is_none_is_refused(encoding: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read_interactions(written(tmp_path / "e.csv", "user_id,item_id\n1,2\n"), encoding=encoding)
    assert (caught.value.name, caught.value.value) == ("encoding", encoding)


def test_text_that_is_not_of_the_encoding_said_is_refused_by_its_line(tmp_path: Path) -> None:
    path = written(tmp_path / "e.csv", "user_id,item_id\n1,2\né,3\n".encode("cp1252"))
    with pytest.raises(DataError, match="line 3 is not utf-8"):
        read_interactions(path, encoding="utf8")


@pytest.mark.parametrize("separator", ["\n", '"', "a\r"])
def test_a_separator_that_cannot_be_one_is_refused(separator: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read_interactions(written(tmp_path / "e.csv", "user_id,item_id\n"), separator=separator)
    assert caught.value.name == "separator"


@pytest.mark.parametrize(
    "text", ["user_id,item_id,item_id\n1,2,3\n", "item_id,user_id,user_id\n1,2,3\n"]
)
def test_a_column_that_is_there_twice_is_refused_in_text_as_in_frames(
    text: str, tmp_path: Path
) -> None:
    path = written(tmp_path / "e.csv", text)
    for source in (path, pd.DataFrame([[1, 2, 3]], columns=text.split("\n")[0].split(","))):
        for user in ("user_id", 1 if text.startswith("item") else "user_id"):
            with pytest.raises(DataError, match="more than one column") as caught:
                read_interactions(source, user=user)
            assert caught.value.column in ("user_id", "item_id")
        with pytest.raises(DataError, match="more than one column"):
            read_interactions(EVENTS, items=source)


def test_a_folder_of_parquet_files_is_read_with_its_partitions(tmp_path: Path) -> None:
    for day in ("2024-05-01", "2024-05-02"):
        (tmp_path / f"day={day}").mkdir()
        pl.DataFrame({"user_id": [1], "item_id": [2]}).write_parquet(
            tmp_path / f"day={day}/a.parquet"
        )
    events = read_interactions(tmp_path, timestamp="day")
    assert events.timestamp_s is not None
    assert events.timestamp_s.tolist() == [1_714_521_600, 1_714_608_000]


# Tables about users and items


def test_side_tables_are_aligned_and_cold_ids_join(tmp_path: Path) -> None:
    items = written(tmp_path / "items.csv", "item_id,title\nc,Sea\nz,Zed\na,Aye\na,Again\n")
    users = pl.DataFrame({"who": ["7", "9"], "age": [30, 40]})
    events = read(EVENTS, items=items, users=users)
    assert events.items.ids.to_list() == ["a", "b", "c", "z"]
    assert events.item_table is not None
    assert events.item_table["title"].to_list() == ["Aye", None, "Sea", "Zed"]
    assert events.users.ids.to_list() == [3, 7, 9]
    assert events.user_table is not None
    assert events.user_table["age"].to_list() == [None, 30, 40]
    assert as_rows(events) == EXPECTED
    assert "1 rows of" in " ".join(events.notes)
    assert "1 items of the table of items have no event" in events.notes
    assert "1 of 3 items with events are not in the table of items" in events.notes
    assert "1 users of the table of users have no event" in events.notes
    assert events.offsets.tolist() == [0, 2, 5, 5]


def test_a_side_table_keeps_its_numbers_whatever_comes_late(tmp_path: Path) -> None:
    rows = "".join(f"{n},{n}.5,{n}\n" for n in range(12_000))
    path = written(tmp_path / "items.csv", f"item_id,price,zip\n{rows}c,1.5,AB1\n")
    table = read(EVENTS, items=path).item_table
    assert table is not None
    assert table.schema == {"price": pl.Float64, "zip": pl.String}


def test_a_side_table_of_mixed_values_becomes_text(tmp_path: Path) -> None:
    items = pl.DataFrame({"item_id": ["a"], "odd": pl.Series([ID_4], dtype=pl.Object)})
    events = read(EVENTS, items=items)
    write_store(events, tmp_path / "store")
    assert events.item_table is not None
    assert events.item_table["odd"].to_list() == [str(ID_4), None, None]


def test_a_side_table_without_an_id_is_refused() -> None:
    items = pl.DataFrame({"item_id": ["a", None], "title": ["x", "y"]})
    with pytest.raises(DataError, match="'item_id', row 2: the value is missing"):
        read(EVENTS, items=items)
    assert len(read(EVENTS, items=items, drop_incomplete=True).items) == 3


def test_movielens_layouts(shared_data: Path, tmp_path: Path) -> None:
    folder = shared_data / "ml-100k"
    ratings, titles = next(folder.glob("u.data*")), next(folder.glob("u.item*"))
    events = read_interactions(
        ratings, header=False, user=0, item=1, rating=2, timestamp=3, items=titles
    )
    assert (len(events), events.num_users, events.num_items) == (100_000, 943, 1_682)
    assert events.item_table is not None
    assert events.item_table["1"][events.items.find(1)] == "Toy Story (1995)"


# Values that are no table


def test_a_misspelt_column_is_named_with_the_nearest() -> None:
    with pytest.raises(
        DataError, match=r"no column 'userid' \(user\).*did you mean user='user_id'"
    ):
        read(EVENTS, user="userid")
    with pytest.raises(
        DataError, match=r"no column 'price' \(columns\); it has 'user_id', 'item_id'"
    ):
        read(EVENTS, columns=["price"])
    with pytest.raises(DataError, match="no column at position 9"):
        read(EVENTS, user=9)
    with pytest.raises(DataError, match="must be three columns"):
        read(EVENTS, user="item_id")


def test_a_missing_header_is_guessed_at(tmp_path: Path) -> None:
    path = written(tmp_path / "m.csv", "1,2\n3,4\n")
    with pytest.raises(DataError, match="header=False"):
        read_interactions(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("e.csv", "", "empty"),
        ("e.csv", "\n\n", "empty"),
        ("e.csv", "user_id,item_id\n", "holds no events"),
        ("e.csv", "user_id,item_id\n\n\n", "holds no events"),
        ("e.csv", "user_id,item_id\n1,2\n1,2,3\n", "line 3 has 3 fields, the first line 2"),
        ("e.csv", 'user_id,item_id\n1,"2\n1,2\n', "cannot be read"),
        ("e.parquet", "", "empty"),
        ("e.parquet", b"PAR1" + b"x" * 100, "broken or cut short"),
        ("e.arrow", b"ARROW1" + b"x" * 100, "broken or cut short"),
        (
            "e.csv.gz",
            gzip.compress(b"user_id,item_id\n" + b"1,2\n" * 999, mtime=0)[:-12],
            "broken gzip",
        ),
        ("e.csv.gz", gzip.compress(b"", mtime=0), "empty"),
        (
            "e.csv",
            'user_id,item_id\n1,"a \\"b\\" c"\n',
            "line 2 has .* inside a quoted field: write",
        ),
        ("e.csv", '{"user_id":1,"item_id":2}\n', "is JSON, .* read it with pandas or Polars"),
        ("e.csv", '[\n{"user_id":1}]', "is JSON"),
        ("e.csv", "<!DOCTYPE html>", "is a web page"),
        ("e.csv", b"user_id,item_id\na\x00\x01\x02,1\n", "is not text"),
        ("e.xz", b"\xfd7zXZ\x00rest", "is an xz archive: unpack it"),
        ("e.db", b"SQLite format 3\x00", "is an SQLite database: give the result of"),
        ("e.duckdb", b"12345678DUCK", "is a DuckDB database: give the result of a query"),
        ("e.xls", b"\xd0\xcf\x11\xe0", "is a spreadsheet: save it as CSV"),
        ("e.zip", b"PK\x03\x04rest", "is a zip archive or a spreadsheet: unpack it"),
    ],
)
def test_files_that_are_no_tables(
    name: str, content: str | bytes, message: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=message):
        read_interactions(written(tmp_path / name, content))


def test_a_parquet_file_cut_short_anywhere_is_refused(tmp_path: Path) -> None:
    EVENTS.write_parquet(tmp_path / "whole.parquet")
    whole = (tmp_path / "whole.parquet").read_bytes()
    for length in (0, 1, 5, len(whole) // 2, len(whole) - 1):
        with pytest.raises(DataError):
            read(written(tmp_path / "cut.parquet", whole[:length]))


def test_what_is_no_table_at_all(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No such file"):
        read_interactions(tmp_path / "none.csv")
    with pytest.raises(DataError, match="is a folder"):
        read_interactions(tmp_path)
    with pytest.raises(DataError, match="postgresql:// is not a path") as caught:
        read_interactions("postgresql://me:secret@host/db")
    assert "secret" not in str(caught.value)
    with pytest.raises(DataError, match="cannot be a dict"):
        read_interactions({"user_id": [1]})
    with pytest.raises(DataError, match="holds no events"):
        read(EVENTS[:0])


def test_one_user_one_item_one_event() -> None:
    events = read_interactions(pl.DataFrame({"user_id": ["me"], "item_id": ["it"]}))
    assert (len(events), events.num_users, events.num_items) == (1, 1, 1)
    assert events.offsets.tolist() == [0, 1]


# The sort, against an oracle


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3), st.integers(0, 6)), max_size=60),
    st.sampled_from(["first", "last", "keep"]),
)
def test_the_counting_sort_is_pythons_sort(rows: list[tuple[int, int, int]], keep: str) -> None:
    user, item, time = (np.array([row[n] for row in rows], np.int64) for n in range(3))
    ordered = sorted(range(len(rows)), key=lambda n: (rows[n][0], rows[n][2]))
    sorting = sort_by_time(group_events(user.astype(np.int32), num_users=6), time)
    assert sorting.order_E.tolist() == ordered
    assert sorting.time_E is not None
    assert sorting.time_E.tolist() == [rows[n][2] for n in ordered]
    assert sorting.offsets_U1.tolist() == [sum(r[0] < u for r in rows) for u in range(7)]

    found, repeat = find_repeats(sorting, item[ordered].astype(np.int32), num_items=4, keep=keep)  # type: ignore[arg-type]
    assert found == len(rows) - len(set(rows))
    if repeat is not None:
        survivors = [rows[n] for n, gone in zip(ordered, repeat, strict=True) if not gone]
        wanted = {rows[n]: n for n in (ordered if keep == "last" else reversed(ordered))}
        assert survivors == [rows[n] for n in ordered if n in set(wanted.values())]


@pytest.mark.parametrize("length", [255, 256, 257, 3_000])
def test_long_histories_are_sorted_stably_too(length: int) -> None:
    rng = np.random.default_rng(0)
    user = rng.integers(0, 2, 2 * length).astype(np.int32)
    time = rng.integers(0, 50, 2 * length)
    sorting = sort_by_time(group_events(user, num_users=2), time)
    assert sorting.order_E.tolist() == np.lexsort((np.arange(2 * length), time, user)).tolist()


# The context of an event


def test_context_columns_of_any_type_stay_with_their_events() -> None:
    frame = EVENTS.with_columns(
        pl.Series("place", ["p0", "p1", None, "p3", "p4"]),
        pl.Series("tags", [["x"], [], ["y", "z"], None, ["x"]]),
        pl.Series("who", [1, "one", None, True, 2.5], dtype=pl.Object),
    )
    frame = pl.concat([frame, frame[:1]])  # the first event twice
    events = read(frame, context=["place", "tags", "who", "timestamp"], duplicates="first")
    assert as_rows(events) == EXPECTED
    assert events.context is not None
    assert events.context["place"].to_list() == ["p3", "p1", None, "p0", "p4"]
    assert events.context["tags"].to_list() == [None, [], ["y", "z"], ["x"], ["x"]]
    assert events.context["who"].to_list() == ["true", "one", None, "1", "2.5"]
    assert events.timestamp_s is not None
    assert events.context["timestamp"].to_list() == events.timestamp_s.tolist()


def test_leading_zeros_of_a_code_are_kept_and_numbers_stay_numbers(tmp_path: Path) -> None:
    # what training reads as 1234 could not be found by a request that says "01234"
    lines = ["user_id,item_id,post,hour,rating", "1,2,01234,9,04", "2,2,90210,10,5"]
    path = written(tmp_path / "e.csv", "\n".join(lines))
    events = read_interactions(path, context=["post", "hour"], rating="rating")
    assert events.context is not None
    assert events.context["post"].to_list() == ["01234", "90210"]
    assert events.context["hour"].to_list() == [9, 10]
    assert events.columns["rating"].tolist() == [4, 5]
    late = "\n".join(lines + ["3,4,x,11.5,3"] * 3 + ["x,5,1,1,1"])
    again = read_interactions(
        written(tmp_path / "late.csv", late), context=["post", "hour"], rating="rating"
    )
    assert again.context is not None
    assert again.context["post"].to_list()[:2] == ["01234", "90210"]
    assert again.context["hour"].to_list()[:2] == [9, 10]


def test_a_row_that_is_left_out_takes_its_context_along() -> None:
    frame = pl.DataFrame(
        {"user_id": [2, None, 1, None], "item_id": ["a", "b", "c", None], "hour": [9, 8, 7, None]}
    )
    events = read_interactions(frame, context=["hour"], drop_incomplete=True)
    assert events.context is not None
    assert events.context["hour"].to_list() == [7, 9]
    assert "1 empty rows were left out" in events.notes


def test_a_context_column_that_is_not_there_is_named() -> None:
    with pytest.raises(DataError, match=r"no column 'hours' \(context\).*context='hour'"):
        read_interactions(EVENTS.with_columns(hour=1), context=["hours"])


# Tables without users or items


def test_a_table_without_users_or_items_is_rows_of_their_own() -> None:
    frame = pl.DataFrame({"age": [39, 50, 38], "income": [0.0, 1.0, None]})
    events = read_interactions(frame, user=None, item=None, columns=["income"], context=["age"])
    assert events.users.ids.to_list() == [0, 1, 2]
    assert events.items.ids.to_list() == ["row"]
    assert events.user_idx.tolist() == [0, 1, 2]
    assert events.context is not None
    assert events.context["age"].to_list() == [39, 50, 38]
    assert events.columns["income"][:2].tolist() == [0, 1]
    assert np.isnan(events.columns["income"][2])
    assert events.notes == (
        "there is no column of users: every row is its own user",
        "there is no column of items: all rows belong to one item, 'row'",
    )


def test_rows_of_known_users_or_items_need_only_the_one_column() -> None:
    users = read_interactions(EVENTS, item=None, timestamp="timestamp")
    assert users.users.ids.to_list() == [3, 7]
    assert np.diff(users.offsets).tolist() == [2, 3]
    items = read_interactions(EVENTS, user=None)
    assert items.items.ids.to_list() == ["a", "b", "c"]
    assert items.item_idx.tolist() == [1, 0, 0, 2, 2]  # the table's own order


def test_a_table_of_which_nothing_is_named_is_refused() -> None:
    with pytest.raises(DataError, match="no column is named"):
        read_interactions(EVENTS, user=None, item=None)


@pytest.mark.parametrize(
    ("source", "fix"),
    [
        ({"user_id": [1], "item_id": [2]}, "polars.DataFrame"),
        ([(1, 2)], "polars.DataFrame"),
        (np.array([[1, 2]]), "name its columns"),
        (pl.Series([1]), "one column"),
        (pd.Series([1]), "one column"),
        (pd.Index([1]), "one column"),
        (pa.array([1]), "one column"),
        (None, "give a path"),
        (3, "give a path"),
        ([], "give a path"),
    ],
)  # fmt: skip
def test_what_is_no_table_is_refused_with_what_makes_one(source: object, fix: str) -> None:
    with pytest.raises(DataError, match=rf"^the event table cannot be a .*{fix}"):
        read_interactions(source)
    good = pl.DataFrame({"user_id": [1], "item_id": [2]})
    if source is not None and not isinstance(source, np.ndarray):  # settings take it for a list
        with pytest.raises(DataError, match=rf"^the table of items cannot be a .*{fix}"):
            read_interactions(good, items=source)


def test_no_message_has_the_name_of_a_column_type() -> None:
    for path in sorted(Path(foretaste.__file__).parent.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"holds? \{[^}]*(dtype|schema\[)", text), path

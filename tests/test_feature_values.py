"""A value gives the same feature from a table, from JSON, from text and from Python."""

import json
import warnings
from collections.abc import Callable
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from enum import Enum
from pathlib import Path
from uuid import UUID

import numpy as np
import pandas as pd
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foretaste.data.features import Features, FieldSide, FieldTable, fit_features
from foretaste.data.features_schema import (
    CategoricalField,
    CrossField,
    FeatureSchema,
    FieldConfig,
    MultiField,
    NumericField,
    VectorField,
)
from foretaste.data.features_values import cell_of
from foretaste.data.interactions import Interactions
from foretaste.data.vocabulary import Vocabulary
from foretaste.errors import DataError

CATEGORY, LOG = CategoricalField(), NumericField(transform="log1p_standardise")
NUMBER, BUCKET = NumericField(), NumericField(transform="bucketise", num_buckets=4)
BERLIN = pl.Datetime("us", "Europe/Berlin")
DAYS = st.dates(date(1950, 1, 1), date(2090, 1, 1))
MOMENTS = st.datetimes(datetime(1950, 1, 1), datetime(2090, 1, 1))
SPANS = st.timedeltas(timedelta(0), timedelta(days=900))
WORDS = st.text(st.characters(exclude_characters="\0|\x1f", exclude_categories=["Cs"]), min_size=1)


def fit(column: pl.Series, field: FieldConfig) -> Features:
    """One user has had every item but the last, which is held out of training."""
    num = len(column)
    events = Interactions(
        users=Vocabulary(pl.Series([0])),
        items=Vocabulary(pl.Series(range(num), dtype=pl.Int64)),
        offsets=np.array([0, num]),
        item_idx=np.arange(num, dtype=np.int32),
        item_table=column.alias("x").to_frame(),
    )
    return fit_features(FeatureSchema(item={"x": field}), events)


def parts(features: Features) -> tuple[FieldSide, FieldTable]:
    assert features.item is not None
    assert features.item_table is not None
    return features.item, features.item_table


def same(one: FieldTable, other: FieldTable) -> bool:
    first, second = one.tensors(), other.tensors()
    return all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def alone(side: FieldSide, value: object) -> FieldTable:
    """Encode one value as a request does."""
    return side.encode(pl.DataFrame([cell_of("x", value)]))


def in_json(value: object) -> object:
    """Return the form of a value in a JSON request."""
    match value:
        case timedelta():
            return pl.Series([value]).dt.to_string("iso")[0]
        case date() | time():
            return value.isoformat()
        case Decimal():
            return float(value)
        case list():
            return [in_json(part) for part in value]
    return value


def as_json(value: object) -> object:
    return json.loads(json.dumps(in_json(value)))


def as_text(value: object) -> object:
    """Return a value as the text of its JSON; of lists, the text of each part."""
    if isinstance(value, list):
        return [as_text(part) for part in value]
    said = in_json(value)
    return said if isinstance(said, str) or said is None else json.dumps(said)


WAYS: dict[str, Callable[[object], object]] = {
    "as it is": lambda value: value,
    "json": as_json,
    "text": as_text,
}
TYPES: dict[str, tuple[pl.DataType, st.SearchStrategy[object], tuple[FieldConfig, ...]]] = {
    "int8": (pl.Int8(), st.integers(-99, 99), (CATEGORY, NUMBER, BUCKET, LOG)),
    "int64": (pl.Int64(), st.integers(-(2**60), 2**60), (CATEGORY,)),
    "uint64": (pl.UInt64(), st.integers(2**63, 2**64 - 1), (CATEGORY,)),
    "int128": (pl.Int128(), st.integers(-(2**100), 2**100), (CATEGORY,)),
    "small": (pl.UInt32(), st.integers(0, 2**30), (CATEGORY, NUMBER, BUCKET, LOG)),
    "float64": (pl.Float64(), st.floats(-1e9, 1e9), (CATEGORY, NUMBER, BUCKET, LOG)),
    "decimal": (
        pl.Decimal(20, 3),
        st.decimals(-(10**6), 10**6, places=3),
        (CATEGORY, NUMBER, BUCKET),
    ),
    "truth": (pl.Boolean(), st.booleans(), (CATEGORY, NUMBER, BUCKET)),
    "text": (pl.String(), WORDS, (CATEGORY,)),
    "category": (pl.Categorical(), WORDS, (CATEGORY,)),
    "enum": (pl.Enum(["a", " A", "b "]), st.sampled_from(["a", " A", "b "]), (CATEGORY,)),
    "date": (pl.Date(), DAYS, (CATEGORY, NUMBER, BUCKET, LOG)),
    "datetime": (pl.Datetime("us"), MOMENTS, (CATEGORY, NUMBER, BUCKET)),
    "ms": (
        pl.Datetime("ms"),
        MOMENTS.map(lambda at: at.replace(microsecond=0)),
        (CATEGORY, NUMBER),
    ),
    "zone": (
        BERLIN,
        st.datetimes(datetime(1990, 1, 1), datetime(2030, 1, 1), timezones=st.just(UTC)),
        (CATEGORY, NUMBER, BUCKET),
    ),
    "clock": (pl.Time(), st.times(), (CATEGORY, NUMBER, BUCKET)),
    "duration": (pl.Duration("us"), SPANS, (CATEGORY, NUMBER, BUCKET, LOG)),
    "words": (pl.List(pl.String), st.lists(WORDS, max_size=4), (MultiField(),)),
    "years": (pl.List(pl.Int16), st.lists(st.integers(1900, 2030), max_size=4), (MultiField(),)),
    "days": (pl.List(pl.Date), st.lists(DAYS, max_size=4), (MultiField(),)),
    "vector": (
        pl.List(pl.Float64),
        st.lists(st.floats(-9, 9, width=16), min_size=3, max_size=3),
        (VectorField(), VectorField(normalise=False, centre=True)),
    ),
}
"""A column's type, its values, and the kinds of field that may be made of it."""


@settings(deadline=None, derandomize=True, max_examples=5)
@given(data=st.data())
@pytest.mark.parametrize("name", TYPES)
def test_a_value_is_the_same_feature_in_a_table_as_json_and_as_text(
    name: str, data: st.DataObject
) -> None:
    dtype, values, kinds = TYPES[name]
    drawn = data.draw(st.lists(values, min_size=2, max_size=6))
    column = pl.Series("x", [*drawn, None], dtype=dtype)
    for field in kinds:
        features = fit(column, field)
        if features.item is None:  # of empty lists and zeros there is no feature
            continue
        side, table = parts(features)
        for row, value in enumerate([*drawn, None]):
            expected = table.rows(torch.tensor([row]))
            for way, said in WAYS.items():
                if way == "text" and isinstance(field, VectorField):
                    continue
                assert same(alone(side, said(value)), expected), (way, field, value)


@pytest.mark.parametrize("name", ["date", "datetime", "clock", "duration", "small", "decimal"])
def test_a_column_of_text_is_the_same_feature_as_one_of_its_own_type(name: str) -> None:
    # a table read from CSV has text where the same table in Parquet has dates
    dtype = TYPES[name][0]
    values = pl.Series("x", [20, 3, 3, 80_000, None], dtype=pl.Int64)
    own = values.cast(pl.Int64 if name == "clock" else dtype)
    own = (own * 1_000_000_000).cast(dtype) if name == "clock" else own
    text = pl.Series("x", [as_text(value) for value in own], dtype=pl.String)
    for field in (NUMBER, BUCKET):
        (_, typed), (side, read) = parts(fit(own, field)), parts(fit(text, field))
        assert same(typed, read)
        assert same(side.encode(own.to_frame()), typed)


@pytest.mark.parametrize(
    "said",
    [
        "2024-02-29",
        "2024-02-29T00:00:00",
        "2024-02-29 00:00",
        "2024-02-29T00:00:00Z",
        "2024-02-29T01:00:00+01:00",
        "2024-02-29 00:00:00.000000",
        "20240229",
        date(2024, 2, 29),
        datetime(2024, 2, 29),
        datetime(2024, 2, 29, 2, tzinfo=timezone(timedelta(hours=2))),
        np.datetime64("2024-02-29"),
        np.datetime64("2024-02-29T00:00:00", "ns"),
        pd.Timestamp("2024-02-29"),
        pd.Timestamp("2024-02-29", tz="UTC"),
    ],
)
@pytest.mark.parametrize("dtype", [pl.Date, pl.Datetime("us"), pl.Datetime("ns", "UTC"), pl.String])
@pytest.mark.parametrize("field", [CATEGORY, NUMBER, BUCKET], ids=["category", "number", "bucket"])
def test_every_way_to_write_a_day_means_that_day(
    said: object, dtype: pl.DataType, field: FieldConfig
) -> None:
    days = pl.Series("x", [date(2024, 2, 29), date(1999, 1, 1), date(2001, 5, 6)]).cast(dtype)
    side, table = parts(fit(days, field))
    assert same(alone(side, said), table.rows(torch.tensor([0])))


class Colour(Enum):
    RED = "red"


@pytest.mark.parametrize(
    ("column", "said"),
    [
        ([7, 8], ["7", 7.0, np.int8(7), np.float32(7), Decimal("7.00"), "7.0", "007"]),
        ([1, 0], [True, np.bool_(1), "1"]),
        ([True, False], ["true", "True", "TRUE", 1, 1.0, "1"]),
        ([2.5, 7.0], ["2.5", "2.50", np.float32(2.5), Decimal("2.5"), 2.5]),
        (["red", "Red"], ["red", np.str_("red"), Colour.RED]),
        ([str(UUID(int=5)), "b"], [UUID(int=5)]),
        (
            [timedelta(minutes=90), timedelta(1)],
            ["PT1H30M", "PT90M", "1:30:00", pd.Timedelta("90m"), np.timedelta64(90, "m")],
        ),
        ([time(9, 30), time(1)], ["09:30", "09:30:00", time(9, 30)]),
    ],
)
def test_a_category_has_one_spelling_whatever_its_type(
    column: list[object], said: list[object]
) -> None:
    side, table = parts(fit(pl.Series("x", column), CATEGORY))
    for value in said:
        assert same(alone(side, value), table.rows(torch.tensor([0]))), value


@pytest.mark.parametrize("said", ["berlin", " Berlin", "Berlin ", "BERLIN", "07", 7])
def test_text_must_be_equal_in_blanks_and_case_and_leading_zeros(said: object) -> None:
    side, _ = parts(fit(pl.Series("x", ["Berlin", "007", "Rome"]), CATEGORY))
    assert alone(side, said).code_RC.tolist() == [[1]]


@pytest.mark.parametrize(
    "said",
    [None, float("nan"), np.nan, pd.NA, pd.NaT, np.datetime64("NaT"), Decimal("NaN"), ""],
    ids=repr,
)
def test_every_word_for_missing_is_missing(said: object) -> None:
    for column, field in (
        (["a", "b"], CATEGORY),
        ([1.5, 2.0], NUMBER),
        ([date(2024, 1, 1), date(2025, 1, 1)], CATEGORY),
        ([date(2024, 1, 1), date(2025, 1, 1)], BUCKET),
        (["a|b", "c"], MultiField(separator="|")),
    ):
        side, _ = parts(fit(pl.Series("x", column), field))
        assert alone(side, said).known_R.tolist() == [False]


@pytest.mark.parametrize(
    "said",
    [
        [0.5, 2],
        (0.5, 2.0),
        np.array([0.5, 2.0]),
        np.array([0.5, 2.0], np.float32),
        torch.tensor([0.5, 2.0]),
        pl.Series([0.5, 2.0]),
        pd.Series([0.5, 2.0]),
        [np.float32(0.5), np.float64(2.0)],
        [Decimal("0.5"), Decimal(2)],
    ],
    ids=lambda said: type(said).__name__,
)
def test_a_vector_may_be_any_row_of_numbers(said: object) -> None:
    side, table = parts(fit(pl.Series("x", [[0.5, 2.0], [1.0, 0.0]]), VectorField()))
    assert same(alone(side, said), table.rows(torch.tensor([0])))


@pytest.mark.parametrize(
    "said",
    [
        ["a", "b"],
        ("a", "b"),
        {"a", "b"},
        "a|b",
        " a | b ",
        np.array(["a", "b"]),
        pl.Series(["a", "b"]),
    ],
    ids=lambda said: type(said).__name__,
)
def test_a_bag_may_be_any_list_or_its_text(said: object) -> None:
    side, table = parts(fit(pl.Series("x", ["a|b", "a", "c"]), MultiField(separator="|")))
    assert same(alone(side, said), table.rows(torch.tensor([0])))


def test_a_number_is_a_bag_of_one() -> None:
    side, table = parts(fit(pl.Series("x", ["7", "8|9"]), MultiField(separator="|")))
    assert same(alone(side, 7), table.rows(torch.tensor([0])))
    years, table = parts(fit(pl.Series("x", [[1999], [2001, 2002]]), MultiField()))
    assert same(alone(years, "1999"), alone(years, [1999.0]))
    assert alone(years, 1999).known_R.tolist() == [True]


def test_single_precision_is_the_number_that_was_written() -> None:
    # 2.1 of 32 bits is 2.0999999046: below 2.1, and so in another bucket, and another category
    column = pl.Series("x", [2.1, 1.0, 3.0, 4.0], dtype=pl.Float32)
    for field in (CATEGORY, NUMBER, BUCKET):
        side, table = parts(fit(column, field))
        assert same(alone(side, 2.1), table.rows(torch.tensor([0])))


def test_a_cross_reads_each_of_its_columns_as_training_did() -> None:
    frame = pl.DataFrame({"day": [date(2024, 1, 1), date(2024, 1, 2)], "hour": [9, 10]})
    events = Interactions(
        users=Vocabulary(pl.Series([0])),
        items=Vocabulary(pl.Series([0, 1])),
        offsets=np.array([0, 2]),
        item_idx=np.arange(2, dtype=np.int32),
        item_table=frame,
    )
    both = CrossField(of=("day", "hour"))
    side, table = parts(fit_features(FeatureSchema(item={"both": both}), events))
    said = pl.DataFrame([cell_of("day", "2024-01-02T00:00Z"), cell_of("hour", "10")])
    assert same(side.encode(said), table.rows(torch.tensor([1])))


@pytest.mark.parametrize(
    ("column", "said", "why"),
    [
        ([1.5, 2.0], "2024-01-01", "a number"),
        ([1.5, 2.0], date(2024, 1, 1), "a number"),
        ([1.5, 2.0], "1,5", "a number"),
        ([date(2024, 1, 1)], 20_240_101, "a date or time"),
        ([date(2024, 1, 1)], 1_704_067_200, "a date or time"),
        ([date(2024, 1, 1)], "2024", "a date or time"),
        ([date(2024, 1, 1)], "01.03.2024", "a date or time"),
        ([date(2024, 1, 1)], timedelta(1), "a date or time"),
        ([timedelta(1)], "soon", "a duration"),
        ([time(9)], "9 o'clock", "a time of day"),
        ([True, False], "yes", "true or false"),
    ],
)
def test_a_number_that_is_none_is_refused_by_name_and_value(
    column: list[object], said: object, why: str
) -> None:
    for field in (NUMBER, BUCKET):
        side, _ = parts(fit(pl.Series("x", column), field))
        with pytest.raises(DataError, match=why) as caught:
            alone(side, said)
        assert (caught.value.column, caught.value.value) == ("x", said)


@pytest.mark.parametrize(
    "said",
    [
        b"a",
        {"a": 1},
        object(),
        1 + 2j,
        [1, "a"],
        [True, 1],
        2**200,
        pd.Period("2024-01"),
        time(1, tzinfo=UTC),
        int,
    ],
    ids=lambda said: type(said).__name__,
)
def test_a_value_of_no_kind_is_refused_by_name(said: object) -> None:
    side, _ = parts(fit(pl.Series("x", ["a", "b"]), CATEGORY))
    with pytest.raises(DataError, match="column 'x'") as caught:
        alone(side, said)
    assert caught.value.column == "x"


@pytest.mark.parametrize("column", [["3", "4", "x"], ["2024-01-01", "2024-01-02", "x"]])
def test_the_row_that_is_unlike_the_others_is_the_one_refused(column: list[str]) -> None:
    with pytest.raises(DataError) as caught:
        fit(pl.Series("x", column), NUMBER)
    assert (caught.value.column, caught.value.value) == ("x", "x")
    assert "item 2" in str(caught.value)  # the third of 0, 1, 2


def test_any_table_is_encoded() -> None:
    side, table = parts(fit(pl.Series("x", [date(2024, 1, 1), date(2024, 1, 2)]), CATEGORY))
    frame = pd.DataFrame({"other": [1, 2], "x": pd.to_datetime(["2024-01-01", "2024-01-02"])})
    assert same(side.encode(frame), table)
    assert same(side.encode(pl.from_pandas(frame).to_arrow()), table)


# --- outliers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("outlier", [1e12, -1e12, 1e30, 1e150])
@pytest.mark.parametrize("num_rows", [3, 30, 3000])
def test_an_outlier_that_makes_the_others_equal_is_said_with_a_fix_that_works(
    outlier: float, num_rows: int
) -> None:
    column = pl.Series("x", [outlier, *map(float, range(1, num_rows))])
    notes = fit(column, NUMBER).notes
    assert len(notes) == 1
    assert all(part in notes[0] for part in ("'x'", repr(outlier), "bucketise"))
    assert fit(column, BUCKET).notes == ()
    if abs(outlier) <= 1e12 and num_rows > 3:
        assert "log1p_standardise" in notes[0]
        assert fit(column, LOG).notes == ()


@pytest.mark.parametrize(
    "column",
    [
        [0.0] * 99 + [1.0],
        list(np.random.default_rng(0).normal(size=500)),
        list(np.random.default_rng(0).exponential(size=500)),
        list(np.random.default_rng(0).lognormal(size=500)),
        [1.0, 2.0],
        [5.0],
    ],
)
def test_no_outlier_is_seen_where_there_is_none(column: list[float]) -> None:
    assert not any("equal" in note for note in fit(pl.Series("x", column), NUMBER).notes)


@pytest.mark.parametrize("column", [[1.0, 1e308, 3.0], [1.0, -1.7e308, 1.7e308], [1e200, 1.0]])
def test_numbers_too_large_to_standardise_are_refused_by_row_and_no_warning_leaks(
    column: list[float],
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(DataError, match="too large") as caught:
            fit(pl.Series("x", column), NUMBER)
        row = int(np.abs(column).argmax())
        assert (caught.value.column, caught.value.value) == ("x", column[row])
        assert f"item {row}" in str(caught.value)
        for field in (LOG, BUCKET):
            side, _ = parts(fit(pl.Series("x", column), field))
            assert alone(side, -1.7e308).known_R.tolist() == [True]
        side, _ = parts(fit(pl.Series("x", [1e-300, 2e-300]), NUMBER))
        assert alone(side, 1e308).number_RM.tolist() == [[10.0]]


# --- older bundles ----------------------------------------------------------------------


def test_features_written_before_are_read_and_times_may_then_be_iso_text(tmp_path: Path) -> None:
    moments = pl.Series("x", [datetime(2024, 1, 1), datetime(2024, 1, 1, 12, 30)])
    features = fit(moments, CATEGORY)
    features.save(tmp_path)
    stored = json.loads((tmp_path / "features.json").read_text())
    values = stored["item"]["codes"][0]["values"]
    assert values["texts"] == ["2024-01-01", "2024-01-01T12:30:00"]
    values["texts"] = ["2024-01-01 00:00:00.000000", "2024-01-01 12:30:00.000000"]
    del values["holds"]
    (tmp_path / "features.json").write_text(json.dumps(stored))
    (side, _), (_, table) = parts(Features.load(tmp_path)), parts(features)
    assert same(side.encode(moments.to_frame()), table)
    for said in ("2024-01-01 12:30:00.000000", "2024-01-01T12:30:00Z"):
        assert same(alone(side, said), table.rows(torch.tensor([1])))


def test_numbers_written_before_take_numbers_and_times(tmp_path: Path) -> None:
    features = fit(pl.Series("x", [date(2024, 1, 1), date(2024, 2, 1)]), NUMBER)
    features.save(tmp_path)
    stored = json.loads((tmp_path / "features.json").read_text())
    del stored["item"]["numbers"][0]["holds"]
    (tmp_path / "features.json").write_text(json.dumps(stored))
    (side, _), (_, table) = parts(Features.load(tmp_path)), parts(features)
    days = (date(2024, 2, 1) - date(1970, 1, 1)).days
    for said in (days, str(days), "2024-02-01", date(2024, 2, 1)):
        assert same(alone(side, said), table.rows(torch.tensor([1])))


def test_a_cross_written_before_is_read(tmp_path: Path) -> None:
    frame = pl.DataFrame({"at": [datetime(2024, 1, 1), datetime(2024, 1, 2, 9)], "n": ["a", "b"]})
    events = Interactions(
        users=Vocabulary(pl.Series([0])),
        items=Vocabulary(pl.Series([0, 1])),
        offsets=np.array([0, 2]),
        item_idx=np.arange(2, dtype=np.int32),
        item_table=frame,
    )
    features = fit_features(FeatureSchema(item={"both": CrossField(of=("at", "n"))}), events)
    features.save(tmp_path)
    stored = json.loads((tmp_path / "features.json").read_text())
    field = stored["item"]["codes"][0]
    field["values"]["texts"] = [
        "2024-01-01 00:00:00.000000\x1fa",
        "2024-01-02 09:00:00.000000\x1fb",
    ]
    del field["values"]["holds"], field["holds"]
    (tmp_path / "features.json").write_text(json.dumps(stored))
    side, _ = parts(Features.load(tmp_path))
    assert same(side.encode(frame), parts(features)[1])


ODD: dict[str, tuple[pl.Series, FieldConfig, object, FieldConfig]] = {
    "a text for a number": (pl.Series([1.5, 2.0, 3.5]), NUMBER, "red", CATEGORY),
    "a list for a number": (pl.Series([1.5, 2.0, 3.5]), NUMBER, [1.0, 2.0], VectorField()),
    "a list for a category": (pl.Series(["a", "b", "a"]), CATEGORY, ["a", "b"], MultiField()),
    "a text for a list": (pl.Series([["a"], ["b"]]), MultiField(), "red", CATEGORY),
    "a text for a vector": (pl.Series([[1.0, 2.0], [0.5, 1.0]]), VectorField(), "red", CATEGORY),
}
"""A column, its field, a value that is none of it, and a field that the value would be of."""


@pytest.mark.parametrize("name", ODD)
def test_advice_about_settings_is_given_while_they_can_be_changed_and_no_later(name: str) -> None:
    column, field, said, other = ODD[name]
    side, _ = parts(fit(column, field))
    with pytest.raises(DataError) as served:
        alone(side, said)
    assert not any(word in str(served.value) for word in ("kind =", "set ", "leave the column"))
    assert served.value.column == "x"
    wrong = pl.Series([said, said])
    with pytest.raises(DataError) as fitted:
        fit(wrong, field)
    assert "or leave the column out" in str(fitted.value)
    assert fitted.value.column == "x"
    fit(wrong, other)  # as the message advises

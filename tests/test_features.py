"""Features: what is fitted to training data, the code of each value, and refused input."""

import datetime
import json
import sys
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foretaste.data.features import Features, FieldSide, FieldTable, concat_rows, fit_features
from foretaste.data.features_schema import (
    CategoricalField,
    CrossField,
    FeatureSchema,
    FieldConfig,
    MultiField,
    NumericField,
    TextField,
    VectorField,
    inspect_schema,
    schema_from_toml,
    schema_to_toml,
)
from foretaste.data.features_values import load_encoder
from foretaste.data.interactions import Interactions
from foretaste.data.reading import read_interactions
from foretaste.data.sources.load import get_dataset
from foretaste.data.vocabulary import Vocabulary
from foretaste.errors import BundleError, ConfigError, DataError


def events_about(
    items: pl.DataFrame, *, held_out: int = 0, users: pl.DataFrame | None = None
) -> Interactions:
    """One user has done every item but the last `held_out`; further users none."""
    done = items.height - held_out
    num_users = 1 if users is None else users.height
    return Interactions(
        users=Vocabulary(pl.Series(range(num_users), dtype=pl.Int64)),
        items=Vocabulary(pl.Series(range(items.height), dtype=pl.Int64)),
        offsets=np.array([0, *([done] * num_users)]),
        item_idx=np.arange(done, dtype=np.int32),
        item_table=items,
        user_table=users,
    )


def fit_item(frame: pl.DataFrame, *, held_out: int = 0, **fields: FieldConfig) -> Features:
    return fit_features(FeatureSchema(item=fields), events_about(frame, held_out=held_out))


def side_and_table(features: Features) -> tuple[FieldSide, FieldTable]:
    assert features.item is not None
    assert features.item_table is not None
    return features.item, features.item_table


def bags(table: FieldTable, bag: int = 0) -> list[list[int]]:
    return [
        table.bag_N[offsets[bag] : offsets[bag + 1]].tolist()
        for offsets in table.bag_offsets_RG1.tolist()
    ]


def assert_same(one: FieldTable, other: FieldTable) -> None:
    """Equal to the last bit."""
    first, second = one.tensors(), other.tensors()
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype, name
        assert tensor.numpy().tobytes() == second[name].numpy().tobytes(), name
        assert tensor.shape == second[name].shape, name


# --- encodings by hand ---------------------------------------------------------------------------


def test_categories_are_numbered_by_frequency_after_missing_and_unseen() -> None:
    # b twice, a and c once each: b = 2, a = 3, c = 4; missing = 0, unseen = 1
    frame = pl.DataFrame({"x": ["b", "a", None, "b", "c", ""]})
    side, table = side_and_table(fit_item(frame, x=CategoricalField()))
    assert table.code_RC.squeeze(1).tolist() == [2, 3, 0, 2, 4, 0]
    assert side.num_codes == 5
    assert side.encode(pl.DataFrame({"x": ["d", "c"]})).code_RC.tolist() == [[1], [4]]


def test_rare_categories_share_the_bucket_of_the_unseen() -> None:
    frame = pl.DataFrame({"x": ["b", "a", "b", "c"]})
    side, table = side_and_table(fit_item(frame, x=CategoricalField(min_count=2)))
    assert table.code_RC.squeeze(1).tolist() == [2, 1, 2, 1]
    assert side.untaught_codes == (0, 1)


def test_a_bucket_that_training_filled_says_something_and_an_empty_one_does_not() -> None:
    frame, unseen = pl.DataFrame({"x": ["a", "b", "b"]}), pl.DataFrame({"x": ["z"]})
    filled, _ = side_and_table(fit_item(frame, x=CategoricalField(min_count=2)))
    empty, _ = side_and_table(fit_item(frame, x=CategoricalField()))
    assert filled.encode(unseen).known_R.tolist() == [True]
    assert empty.encode(unseen).known_R.tolist() == [False]


@pytest.mark.parametrize(
    ("column", "same"),
    [
        (pl.Series("x", [42, 7]), ["42", "7"]),
        (pl.Series("x", [42.0, 7.0]), ["42", "7"]),
        (pl.Series("x", [2.5, float("nan")]), ["2.5", None]),
        (pl.Series("x", [True, False]), ["true", "false"]),
        (pl.Series("x", [datetime.date(2024, 5, 1), None]), ["2024-05-01", None]),
        (pl.Series("x", ["a", "b"], dtype=pl.Categorical), ["a", "b"]),
    ],
)
def test_a_category_is_its_text_whatever_its_type(
    column: pl.Series, same: list[str | None]
) -> None:
    side, table = side_and_table(fit_item(column.to_frame(), x=CategoricalField()))
    assert_same(side.encode(pl.DataFrame({"x": same})), table)


def test_bags_hold_codes_in_order_and_an_empty_one_is_missing() -> None:
    # b three times, a twice, c once: b = 2, a = 3, c = 4
    frame = pl.DataFrame({"x": [["a", "b"], ["b"], [], None, ["b", None, "c", "a"]]})
    side, table = side_and_table(fit_item(frame, x=MultiField()))
    assert bags(table) == [[3, 2], [2], [0], [0], [2, 4, 3]]
    assert table.known_R.tolist() == [True, True, False, False, True]
    text = pl.DataFrame({"x": ["a|b", " b |", "", None, "b||c|a"]})
    cut, from_text = side_and_table(fit_item(text, x=MultiField(separator="|")))
    assert_same(from_text, table)
    assert_same(cut.encode(frame), table)  # lists need no separator
    assert bags(side.encode(pl.DataFrame({"x": [["z", "c"]]}))) == [[1, 4]]


def test_codes_of_all_fields_share_one_space_and_bags_lie_row_by_row() -> None:
    frame = pl.DataFrame({"g": [["a"], ["a", "b"]], "c": ["p", "q"], "h": [["s", "t"], None]})
    side, table = side_and_table(
        fit_item(frame, g=MultiField(), c=CategoricalField(), h=MultiField())
    )
    assert side.names == ("c", "g", "h")
    # c: missing 0, unseen 1, p 2, q 3; g: 4, 5, a 6, b 7; h: 8, 9, s 10, t 11
    assert table.code_RC.tolist() == [[2], [3]]
    assert table.bag_N.tolist() == [6, 10, 11, 6, 7, 8]
    assert table.bag_offsets_RG1.tolist() == [[0, 1, 3], [3, 5, 6]]
    assert (side.num_codes, side.untaught_codes) == (12, (0, 1, 4, 5, 8, 9))
    assert table.present_RF.tolist() == [[True, True, True], [True, True, False]]


def test_numbers_are_standardised_by_training() -> None:
    # mean 4, variance ((1-4)^2 + (3-4)^2 + (8-4)^2) / 3 = 26 / 3
    frame = pl.DataFrame({"x": [1, 3, None, 8]})
    side, table = side_and_table(fit_item(frame, x=NumericField()))
    std = (26 / 3) ** 0.5
    expected = [[-3 / std], [-1 / std], [0.0], [4 / std]]
    assert table.number_RM.numpy() == pytest.approx(np.array(expected), rel=1e-6)
    assert table.present_RF.squeeze(1).tolist() == [True, True, False, True]
    assert side.encode(pl.DataFrame({"x": [1e300]})).number_RM.tolist() == [[10.0]]  # held there


def test_a_logarithm_comes_first_where_it_is_asked_for_and_keeps_the_sign() -> None:
    # ln(1 + x) of e - 1 and of its negative: 1 and -1, mean 0, deviation 1
    frame = pl.DataFrame({"x": [np.e - 1, 1 - np.e, 0.0]})
    _, table = side_and_table(
        fit_item(frame, held_out=1, x=NumericField(transform="log1p_standardise"))
    )
    assert table.number_RM.squeeze(1).tolist() == pytest.approx([1.0, -1.0, 0.0])


def test_buckets_hold_as_many_rows_each_and_their_upper_edge() -> None:
    frame = pl.DataFrame({"x": [10.0, 20, 30, 40, None, 19.9, 20.1, -1e9, 1e9]})
    field = NumericField(transform="bucketise", num_buckets=4)
    side, table = side_and_table(fit_item(frame, held_out=5, x=field))
    # of 10, 20, 30, 40 the quartiles are 10, 20, 30: up to 10, up to 20, up to 30, above
    assert table.code_RC.squeeze(1).tolist() == [1, 2, 3, 4, 0, 2, 3, 1, 4]
    assert side.num_codes == 5


def test_equal_numbers_share_a_bucket_and_no_bucket_is_empty() -> None:
    # 8 of 10 rows are 1: of the quartiles only 1 is left, and what is above it
    frame = pl.DataFrame({"x": [1] * 8 + [2, 3]})
    field = NumericField(transform="bucketise", num_buckets=4)
    side, table = side_and_table(fit_item(frame, x=field))
    assert table.code_RC.squeeze(1).bincount().tolist() == [0, 8, 2]
    assert side.num_codes == 3


def test_dates_count_as_days() -> None:
    days = [datetime.date(1970, 1, 1), datetime.date(1970, 1, 3), None]
    _, table = side_and_table(fit_item(pl.DataFrame({"x": days}), x=NumericField()))
    assert table.number_RM.squeeze(1).tolist() == [-1.0, 1.0, 0.0]
    moments = [datetime.datetime(1970, 1, 1), datetime.datetime(1970, 1, 3), None]
    _, same = side_and_table(fit_item(pl.DataFrame({"x": moments}), x=NumericField()))
    assert_same(same, table)


def test_vectors_get_length_one_or_the_length_of_training_as_their_unit() -> None:
    frame = pl.DataFrame({"x": [[3.0, 4.0], [0.0, 1.0], None, [], [0.0, 0.0], [0.0, 26.0]]})
    _, one = side_and_table(fit_item(frame, held_out=1, x=VectorField()))
    np.testing.assert_allclose(
        one.vectors[0], [[0.6, 0.8], [0, 1], [0, 0], [0, 0], [0, 0], [0, 1]], rtol=1e-6
    )
    assert one.known_R.tolist() == [True, True, False, False, False, True]
    # squared lengths 25 and 1: their root mean square is the root of 13
    _, other = side_and_table(fit_item(frame, held_out=1, x=VectorField(normalise=False)))
    assert other.vectors[0][5].tolist() == pytest.approx([0.0, 26 / 13**0.5])
    array = frame.head(2).with_columns(pl.col("x").list.to_array(2))
    _, same = side_and_table(fit_item(array, x=VectorField()))
    assert_same(same, one.rows(torch.arange(2)))


def test_centred_vectors_lose_what_all_of_training_have_in_common() -> None:
    # of length 1: (1, 0) and (0, 1), their mean (.5, .5); what is left points to (1, -1), (-1, 1)
    frame = pl.DataFrame({"x": [[3.0, 0.0], [0.0, 5.0], None, [0.5, 0.5], [7.0, 0.0]]})
    _, one = side_and_table(fit_item(frame, held_out=3, x=VectorField(centre=True)))
    half = 0.5**0.5
    expected = [[half, -half], [-half, half], [0, 0], [half, half], [half, -half]]
    np.testing.assert_allclose(one.vectors[0], expected, rtol=1e-6, atol=1e-7)
    assert one.known_R.tolist() == [True, True, False, True, True]
    # not normalised: the mean is (1.5, 2.5), what is left (1.5, -2.5) and (-1.5, 2.5)
    field = VectorField(centre=True, normalise=False)
    _, other = side_and_table(fit_item(frame, held_out=3, x=field))
    unit = 8.5**0.5
    expected = [[1.5 / unit, -2.5 / unit], [-1.5 / unit, 2.5 / unit], [0, 0]]
    np.testing.assert_allclose(other.vectors[0][:3], expected, rtol=1e-6, atol=1e-7)


# --- fitted on training only ---------------------------------------------------------------------

KINDS: dict[str, FieldConfig] = {
    "c": CategoricalField(),
    "m": MultiField(),
    "n": NumericField(),
    "b": NumericField(transform="bucketise", num_buckets=3),
    "v": VectorField(normalise=False, centre=True),
}


def rows_of_all_kinds(num_rows: int, seed: int) -> pl.DataFrame:
    rng = np.random.default_rng(seed)
    return pl.DataFrame(
        {
            "c": rng.choice(["p", "q", None], num_rows).tolist(),
            "m": [
                rng.choice(["r", "s", "t"], rng.integers(0, 4)).tolist() for _ in range(num_rows)
            ],
            "n": [None if x > 2 else x for x in rng.normal(size=num_rows).tolist()],
            "b": rng.integers(0, 30, num_rows),
            "v": [rng.normal(size=3).tolist() for _ in range(num_rows)],
        },
        schema_overrides={"m": pl.List(pl.String)},
    )


def test_a_held_out_row_changes_nothing_that_is_fitted() -> None:
    frame = rows_of_all_kinds(20, seed=0)
    strange = pl.DataFrame(
        {
            "c": ["only here"],
            "m": [["only here", "r"]],
            "n": [1e6],
            "b": [10**6],
            "v": [[1e3, 1e3, 1e3]],
        }
    )
    before, table = side_and_table(fit_item(frame, held_out=1, **KINDS))
    after, meddled = side_and_table(fit_item(pl.concat([frame[:-1], strange]), held_out=1, **KINDS))
    assert after == before
    assert_same(meddled.rows(torch.arange(19)), table.rows(torch.arange(19)))
    assert meddled.code_RC[19, 0] == 1  # a value that only a held-out row has is unseen


def test_users_without_a_training_event_are_held_out_too() -> None:
    users = pl.DataFrame({"job": ["a", "b"]})  # only the first has an event
    features = fit_features(
        FeatureSchema(user={"job": CategoricalField()}),
        events_about(pl.DataFrame({"x": [1]}), users=users),
    )
    assert features.item is None
    assert features.user is not None
    assert features.user_table is not None
    assert features.user.num_codes == 3
    assert features.user_table.code_RC.tolist() == [[2], [1]]


# --- crosses -------------------------------------------------------------------------------------


CROSSED = pl.DataFrame(
    {
        "city": ["x", "x", "y", "x", None, "y"],
        "hour": [1.0, 1.0, 1.0, 2.0, 1.0, None],
    }
)


def test_a_cross_is_the_category_of_both_values_together() -> None:
    # (x, 1) twice is 2; (x, 2) and (y, 1) once each, by their text; one missing, all missing
    side, table = side_and_table(fit_item(CROSSED, both=CrossField(of=("city", "hour"))))
    assert table.code_RC.squeeze(1).tolist() == [2, 2, 4, 3, 0, 0]
    assert table.present_RF.squeeze(1).tolist() == [True] * 4 + [False] * 2
    assert (side.names, side.columns, side.num_codes) == (("both",), ("city", "hour"), 5)
    # each value is known, the two together are not
    assert side.encode(pl.DataFrame({"city": ["y"], "hour": [2]})).code_RC.tolist() == [[1]]
    assert side.encode(pl.DataFrame({"city": ["y"]})).code_RC.tolist() == [[0]]


def test_a_cross_is_added_to_the_fields_it_crosses_and_changes_none_of_them() -> None:
    plain = {"city": CategoricalField(), "hour": NumericField(transform="bucketise")}
    alone, alone_table = side_and_table(fit_item(CROSSED, **plain))
    side, table = side_and_table(fit_item(CROSSED, both=CrossField(of=("city", "hour")), **plain))
    assert side.names == ("city", "hour", "both")
    assert torch.equal(table.code_RC[:, :2], alone_table.code_RC)
    assert (table.code_RC[:, 2] >= alone.num_codes).all()


def test_crossed_texts_cannot_be_confused() -> None:
    frame = pl.DataFrame({"a": ["ab", "a"], "b": ["c", "bc"]})
    _, table = side_and_table(fit_item(frame, x=CrossField(of=("a", "b"))))
    assert table.code_RC[0] != table.code_RC[1]


def test_rare_pairs_share_a_bucket_and_a_cross_is_saved(tmp_path: Path) -> None:
    features = fit_item(CROSSED, x=CrossField(of=("city", "hour"), min_count=2))
    side, table = side_and_table(features)
    assert table.code_RC.squeeze(1).tolist() == [2, 2, 1, 1, 0, 0]
    features.save(tmp_path)
    again, _ = side_and_table(Features.load(tmp_path))
    assert again == side
    assert_same(again.encode(CROSSED), table)


def test_a_cross_of_a_column_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match="item column 'town'"):
        fit_item(CROSSED, x=CrossField(of=("town", "hour")))
    with pytest.raises(ConfigError, match="of"):
        schema_from_toml('[item.x]\nkind = "cross"\nof = ["city"]')


# --- bounds --------------------------------------------------------------------------------------


def test_a_million_values_are_bounded_and_it_is_said() -> None:
    count = 1_000_000
    frame = pl.DataFrame({"x": pl.int_range(count, eager=True)})
    frame = pl.concat([frame, frame.head(50_000)])  # these are there twice
    features = fit_item(frame, x=CategoricalField())
    side, table = side_and_table(features)
    assert side.num_codes == 100_002
    assert features.notes == (
        "item field 'x' has 1,000,000 values, more than max_values: the 100,000 most frequent "
        "were kept, the others share a bucket",
    )
    code_R = table.code_RC[:, 0]
    assert (code_R[:50_000] > 1).all()
    assert int((code_R == 1).sum()) == count - 100_000
    assert int(code_R.max()) < side.num_codes


def test_a_column_that_is_the_same_or_another_everywhere_is_said() -> None:
    letters = ["a", "b", "c"]
    frame = pl.DataFrame({"x": ["film"] * 3, "n": [7] * 3, "rare": letters, "own": letters})
    features = fit_item(
        frame,
        x=CategoricalField(),
        n=NumericField(transform="bucketise"),
        rare=CategoricalField(min_count=2),
        own=CategoricalField(),
    )
    assert features.notes == (
        "item field 'x' is 'film' on every training row: it contributes nothing",
        "item field 'n' is 7 wherever it is known in training: it contributes little",
        "item field 'rare' has no value on 2 training rows: all share one bucket",
        "item field 'own' has another value on every training row: no two rows have anything "
        "in common",
    )


# --- one code for training and serving -----------------------------------------------------------


OTHER_KINDS = KINDS | {
    "n": NumericField(transform="log1p_standardise"),
    "v": VectorField(normalise=True),
}


@settings(deadline=None, derandomize=True, max_examples=15)
@given(
    seed=st.integers(0, 10**6),
    num_rows=st.integers(1, 9),
    kinds=st.sampled_from([KINDS, OTHER_KINDS]),
)
def test_a_row_alone_has_the_bytes_it_has_in_the_table(
    seed: int, num_rows: int, kinds: dict[str, FieldConfig]
) -> None:
    frame = rows_of_all_kinds(num_rows, seed)
    side, table = side_and_table(fit_item(frame, **kinds))
    for row in range(num_rows):
        alone = side.encode(frame[row : row + 1])
        assert_same(alone, table.rows(torch.tensor([row])))


def test_wide_vectors_alone_have_the_bytes_they_have_in_the_table() -> None:
    rng = np.random.default_rng(0)
    frame = pl.DataFrame({"v": rng.normal(size=(50, 517)).astype(np.float32)})
    side, table = side_and_table(fit_item(frame, v=VectorField()))
    for row in (0, 7, 49):
        assert_same(side.encode(frame[row : row + 1]), table.rows(torch.tensor([row])))


def test_many_rows_at_once_are_encoded_as_one_by_one() -> None:
    frame = rows_of_all_kinds(700, seed=6)
    side, table = side_and_table(fit_item(frame, **KINDS))
    parts = [side.encode(frame[row : row + 1]) for row in range(0, 700, 50)]
    assert_same(concat_rows(parts), table.rows(torch.arange(0, 700, 50)))


@pytest.mark.parametrize("held_out", [0, 5])
def test_saved_and_loaded_features_encode_to_equal_bytes(tmp_path: Path, held_out: int) -> None:
    frame = rows_of_all_kinds(30, seed=3)
    features = fit_item(frame, held_out=held_out, **KINDS)
    features.save(tmp_path)
    loaded = Features.load(tmp_path)
    side, table = side_and_table(features)
    again, same = side_and_table(loaded)
    assert (again, loaded.user, loaded.user_table) == (side, None, None)
    assert_same(same, table)
    fresh = rows_of_all_kinds(9, seed=4)
    assert_same(again.encode(fresh), side.encode(fresh))
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".safetensors"]


def test_saved_features_are_replaced_only_on_request_and_have_the_usual_permissions(
    tmp_path: Path,
) -> None:
    first, second = (fit_item(rows_of_all_kinds(30, seed=seed), **KINDS) for seed in (3, 4))
    folder = tmp_path / "new"
    first.save(folder)
    with pytest.raises(DataError) as refused:
        second.save(folder)
    assert refused.value.name is not None
    assert Path(refused.value.name).parent == folder
    assert_same(*(side_and_table(one)[1] for one in (Features.load(folder), first)))
    second.save(folder, replace=True)
    assert_same(*(side_and_table(one)[1] for one in (Features.load(folder), second)))
    (tmp_path / "usual").touch()
    usual = (tmp_path / "usual").stat().st_mode
    assert {path.stat().st_mode for path in folder.iterdir()} == {usual}


@pytest.mark.parametrize("broken", ["features.json", "features.safetensors"])
@pytest.mark.parametrize("how", ["missing", "cut", "later"])
def test_broken_files_are_refused(tmp_path: Path, broken: str, how: str) -> None:
    fit_item(rows_of_all_kinds(5, seed=0), **KINDS).save(tmp_path)
    path = tmp_path / broken
    match how:
        case "missing":
            path.unlink()
        case "cut":
            path.write_bytes(path.read_bytes()[:-3])
        case "later":
            stored = json.loads((tmp_path / "features.json").read_text())
            (tmp_path / "features.json").write_text(json.dumps(stored | {"version": 2}))
    with pytest.raises(BundleError, match="features"):
        Features.load(tmp_path)


def test_new_tables_are_encoded_by_what_was_fitted_before() -> None:
    frame = rows_of_all_kinds(10, seed=0)
    features = fit_item(frame, **KINDS)
    longer = pl.concat([frame, rows_of_all_kinds(4, seed=9)])
    _, table = side_and_table(features.of(events_about(longer)))
    _, before = side_and_table(features)
    assert len(table) == 14
    assert_same(table.rows(torch.arange(10)), before)


# --- tables --------------------------------------------------------------------------------------


@settings(deadline=None, derandomize=True, max_examples=20)
@given(row=st.lists(st.integers(0, 7), max_size=12))
def test_rows_are_those_asked_for(row: list[int]) -> None:
    frame = rows_of_all_kinds(8, seed=1)
    side, table = side_and_table(fit_item(frame, **KINDS))
    picked = table.rows(torch.tensor(row, dtype=torch.int64))
    assert_same(picked, side.encode(frame[row]))


def test_tables_put_together_are_the_table_of_all_rows() -> None:
    frame = rows_of_all_kinds(9, seed=2)
    side, table = side_and_table(fit_item(frame, **KINDS))
    parts = [side.encode(frame[:4]), side.encode(frame[4:4]), side.encode(frame[4:])]
    assert_same(concat_rows(parts), table)


def test_unknown_rows_are_missing_in_every_field() -> None:
    side, _ = side_and_table(fit_item(rows_of_all_kinds(9, seed=2), **KINDS))
    nobody = side.unknown(3)
    empty = pl.DataFrame({name: [None] * 3 for name in KINDS})
    assert_same(nobody, side.encode(empty))
    assert not nobody.known_R.any()
    assert len(side.unknown(0)) == 0
    assert len(nobody.to(torch.device("cpu"))) == 3


def test_a_column_that_a_frame_lacks_is_missing_and_a_further_one_does_not_matter() -> None:
    frame = rows_of_all_kinds(6, seed=5)
    side, table = side_and_table(fit_item(frame, **KINDS))
    part = side.encode(frame.select("n", title=pl.lit("a film")))
    assert part.present_RF.sum(dim=0)[side.names.index("c")] == 0
    assert torch.equal(part.number_RM, table.number_RM)


# --- bad input -----------------------------------------------------------------------------------


def test_a_field_without_a_value_in_training_is_left_out_and_said() -> None:
    frame = pl.DataFrame({"v": [None, None, [1.0, 2.0]], "c": ["a", "b", "c"]})
    features = fit_item(frame, held_out=1, v=VectorField(), c=CategoricalField())
    assert features.item is not None
    assert features.item.names == ("c",)
    assert "item field 'v' has no value on a training row" in features.notes[0]
    nothing = fit_item(frame, held_out=1, v=VectorField())
    assert (nothing.item, nothing.item_table) == (None, None)
    null = fit_item(pl.DataFrame({"v": [None, None]}), v=VectorField())
    assert null.item is None


def test_an_item_without_features_is_distinguished() -> None:
    frame = pl.DataFrame({"g": [["a"], None], "n": [1.0, None]})
    _, table = side_and_table(fit_item(frame, g=MultiField(), n=NumericField()))
    assert table.known_R.tolist() == [True, False]


@pytest.mark.parametrize("transform", ["standardise", "bucketise", "log1p_standardise"])
def test_a_constant_column_is_finite_and_said(transform: str) -> None:
    field = NumericField.model_validate({"transform": transform})
    features = fit_item(pl.DataFrame({"x": [0.1, 0.1, 0.1]}), x=field)
    side, table = side_and_table(features)
    assert "'x' is 0.1 wherever it is known" in features.notes[0]
    assert torch.equal(table.number_RM, torch.zeros_like(table.number_RM))
    assert side.encode(pl.DataFrame({"x": [5.0]})).number_RM.isfinite().all()


def test_too_many_values_keep_the_most_frequent_and_say_so() -> None:
    frame = pl.DataFrame({"x": [str(n) for n in range(1000)] + ["7", "8"]})
    features = fit_item(frame, x=CategoricalField(max_values=2))
    side, table = side_and_table(features)
    assert "has 1,000 values, more than max_values: the 2 most frequent" in features.notes[0]
    assert side.num_codes == 4
    assert sorted(table.code_RC.squeeze(1).bincount().tolist()) == [0, 2, 2, 998]


@pytest.mark.slow
def test_a_million_values_are_cut_to_a_hundred_thousand() -> None:
    frame = pl.DataFrame({"x": np.arange(1_000_000)})
    side, table = side_and_table(fit_item(frame, x=CategoricalField()))
    assert side.num_codes == 100_002
    assert int((table.code_RC == 1).sum()) == 900_000


@pytest.mark.parametrize(
    ("column", "field", "message"),
    [
        ([1.0, float("inf")], NumericField(), "column 'x', item 1: inf is infinite"),
        (["1", "two"], NumericField(), "column 'x', item 1: 'two' is not a number"),
        ([[1.0], [2.0]], NumericField(), "column 'x' holds lists"),
        ([[1.0], [2.0]], CategoricalField(), "column 'x' holds lists.*multi"),
        ([1.0, -float("inf")], CategoricalField(), "column 'x', item 1: -inf is not a category"),
        (["a|b", "c"], MultiField(), "column 'x' holds text, such as.*separator"),
        ([[["a"]], [["b"]]], MultiField(), "column 'x' holds lists"),
        ([[1.0, 2.0], [1.0]], VectorField(), "item 1 holds a vector of 1 numbers, not 2"),
        ([[1.0], [float("nan")]], VectorField(), "item 1 holds a vector with a number that is"),
        ([[1.0], [None]], VectorField(), "item 1 holds a vector with a number that is"),
        ([[1.0], [1e39]], VectorField(), "item 1 holds a vector with a number that is"),
        ([["a"], ["b"]], VectorField(), "column 'x' holds lists"),
        ([1.0, 2.0], VectorField(), "column 'x' holds numbers"),
    ],
)
@pytest.mark.parametrize("held_out", [0, 1])
def test_a_wrong_value_is_refused_by_column_and_item_in_training_or_not(
    column: list[object], field: FieldConfig, message: str, held_out: int
) -> None:
    with pytest.raises(DataError, match=message):
        fit_item(pl.DataFrame({"x": column}), held_out=held_out, x=field)


SHUFFLED = pl.DataFrame({"user_id": [3, 1, 2], "item_id": [30, 10, 20], "at": [5, 6, 7]})


@pytest.mark.parametrize(
    ("kind", "good", "bad", "shown"),
    [
        ("numeric", "2", "x", "'x' is not a number"),
        ("categorical", 1.0, float("inf"), "inf is not a category"),
        ("multi", [1.0, 2.0], [1.0, float("inf")], "inf is not a category"),
        ("vector", [1.0, 2.0], [1.0], "holds a vector of 1 numbers"),
    ],
)
@pytest.mark.parametrize("role", ["user", "item", "context"])
def test_a_wrong_value_is_refused_by_the_id_that_the_caller_knows(
    role: str, kind: str, good: object, bad: object, shown: str
) -> None:
    ids = {"user": [3, 1, 2], "item": [30, 10, 20]}
    values = pl.Series("x", [bad, good, good], strict=False)
    fields = schema_from_toml(f'[{role}.x]\nkind = "{kind}"')
    if role == "context":
        events = read_interactions(SHUFFLED.with_columns(values), context=["x"])
        place = "the event of user 3 and item 30"
    else:
        table = pl.DataFrame({f"{role}_id": ids[role], "x": values})
        events = read_interactions(SHUFFLED, **{f"{role}s": table})
        place = f"{role} {ids[role][0]}"
    with pytest.raises(DataError) as caught:
        fit_features(fields, events)
    assert f"column 'x', {place}" in str(caught.value)
    assert shown in str(caught.value)
    assert (caught.value.column, caught.value.row) == ("x", None)


def test_a_column_that_reading_left_out_is_refused_by_what_it_held() -> None:
    items = pl.DataFrame({"item_id": [10, 20, 30], "x": [b"a", b"b", b"c"]})
    events = read_interactions(SHUFFLED, items=items)
    with pytest.raises(DataError, match="'x' of the table of items holds bytes") as caught:
        fit_features(FeatureSchema(item={"x": CategoricalField()}), events)
    assert caught.value.column == "x"


def test_serving_refuses_what_training_would_refuse() -> None:
    side, _ = side_and_table(fit_item(rows_of_all_kinds(9, seed=0), **KINDS))
    with pytest.raises(DataError, match="column 'n': 'much' is not a number"):
        side.encode(pl.DataFrame({"n": ["much"]}))
    with pytest.raises(DataError, match="a vector of 2 numbers, not 3"):
        side.encode(pl.DataFrame({"v": [[1.0, 2.0]]}))


def test_nan_is_a_missing_number() -> None:
    _, table = side_and_table(fit_item(pl.DataFrame({"x": [1.0, float("nan")]}), x=NumericField()))
    assert table.known_R.tolist() == [True, False]


def test_a_misnamed_column_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match=r"item column 'genre'.*did you mean 'genres'"):
        fit_item(pl.DataFrame({"genres": [["a"]]}), genre=MultiField())
    with pytest.raises(ConfigError, match=r"user fields \(age\), and there is no table of users"):
        fit_features(
            FeatureSchema(user={"age": NumericField()}), events_about(pl.DataFrame({"x": [1]}))
        )


def test_a_table_without_rows_is_encoded_to_none() -> None:
    side, _ = side_and_table(fit_item(rows_of_all_kinds(4, seed=0), **KINDS))
    assert len(side.encode(rows_of_all_kinds(4, seed=0)[:0])) == 0


# --- text ----------------------------------------------------------------------------------------


class _Counts:
    """Replaces sentence-transformers: counts the letters a and b of a text, to length 1."""

    def __init__(self, name: str, **options: object) -> None:
        if name != "letters":
            raise OSError(f"no folder {name}")

    def encode(self, texts: list[str], **options: object) -> np.ndarray:
        counts = np.array([[text.count("a"), text.count("b")] for text in texts], np.float64)
        return counts / np.linalg.norm(counts, axis=1, keepdims=True)


@pytest.fixture
def encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    library = types.ModuleType("sentence_transformers")
    library.SentenceTransformer = _Counts  # type: ignore[attr-defined]  # a stand-in
    monkeypatch.setitem(sys.modules, "sentence_transformers", library)
    load_encoder.cache_clear()


@pytest.mark.usefixtures("encoder")
def test_texts_become_vectors_and_missing_ones_zeros(tmp_path: Path) -> None:
    frame = pl.DataFrame({"x": ["aaabbbb", None, "b", "", "aaabbbb"]})
    features = fit_item(frame, x=TextField(encoder="letters"))
    side, table = side_and_table(features)
    expected = [[0.6, 0.8], [0, 0], [0, 1], [0, 0], [0.6, 0.8]]
    np.testing.assert_allclose(table.vectors[0], expected, rtol=1e-6)
    assert table.known_R.tolist() == [True, False, True, False, True]
    assert side.vector_widths == (2,)
    features.save(tmp_path)
    again, _ = side_and_table(Features.load(tmp_path))
    assert_same(again.encode(frame), table)


@pytest.mark.usefixtures("encoder")
def test_an_encoder_that_is_not_there_is_named() -> None:
    with pytest.raises(ConfigError, match="'figures' cannot be loaded \\(no folder figures\\)"):
        fit_item(pl.DataFrame({"x": ["a"]}), x=TextField(encoder="figures"))


def test_without_the_extra_the_message_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    load_encoder.cache_clear()
    with pytest.raises(ConfigError, match=r"pip install 'foretaste\[text\]'"):
        fit_item(pl.DataFrame({"x": ["a"]}), x=TextField(encoder="letters"))


# --- the schema ----------------------------------------------------------------------------------

NAMES = st.text(st.characters(codec="utf-8"), min_size=1, max_size=8)
FIELDS: st.SearchStrategy[FieldConfig] = st.one_of(
    st.builds(CategoricalField, min_count=st.integers(1, 9), why=NAMES),
    st.builds(MultiField, separator=st.none() | NAMES, max_values=st.integers(1, 10**9)),
    st.builds(
        NumericField,
        transform=st.sampled_from(["standardise", "bucketise", "log1p_standardise"]),
        num_buckets=st.integers(2, 99),
    ),
    st.builds(VectorField, normalise=st.booleans(), centre=st.booleans()),
    st.builds(TextField, encoder=NAMES),
    st.builds(CrossField, of=st.lists(NAMES, min_size=2, max_size=3).map(tuple)),
)
SIDES = st.dictionaries(NAMES, FIELDS, max_size=3)


@settings(deadline=None, derandomize=True)
@given(user=SIDES, item=SIDES, context=SIDES, left_out=st.dictionaries(NAMES, NAMES, max_size=2))
def test_a_schema_written_as_toml_reads_back_as_it_was(
    user: dict[str, FieldConfig],
    item: dict[str, FieldConfig],
    context: dict[str, FieldConfig],
    left_out: dict[str, str],
) -> None:
    schema = FeatureSchema(user=user, item=item, context=context, left_out=left_out)
    assert schema_from_toml(schema_to_toml(schema)) == schema


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[item.x]\nkind = 'categorial'", "item.x: .*categorial"),
        ("[item.x]\nkind = 'multi'\nmincount = 2", "mincount"),
        ("[item.x]\nkind = 'numeric'\nnum_buckets = 1", "num_buckets"),
        ("[item.x", "not TOML"),
        ('[item.""]\nkind = "vector"', "empty name"),
        ('[item.x]\nkind = "text"', "encoder"),
    ],
)
def test_a_wrong_schema_is_refused_by_name(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        schema_from_toml(text)


def test_inspection_chooses_by_type_and_content_and_says_why() -> None:
    rng = np.random.default_rng(0)
    count = 200
    frame = pl.DataFrame(
        {
            "title": [f"Film {n}" for n in range(count)],
            "imdb": np.arange(count) + 1000,
            "genres": rng.choice(["Action|Comedy", "Drama", "Comedy|Drama|War"], count),
            "tags": [["x", "y"][: n % 3] for n in range(count)],
            "colour": rng.choice(["red", "green", "blue"], count),
            "rating": rng.integers(1, 6, count),
            "price": np.exp(rng.normal(0, 2, count)),
            "score": rng.normal(size=count),
            "year": rng.integers(1900, 2000, count),
            "adult": rng.random(count) < 0.1,
            "image": rng.normal(size=(count, 4)),
            "empty": pl.Series([None] * count, dtype=pl.String),
            "same": ["film"] * count,
            "released": pl.Series([datetime.date(2000, 1, 1 + n % 28) for n in range(count)]),
            "ragged": [[0.5] * (1 + n % 2) for n in range(count)],
        }
    )
    schema = inspect_schema(events_about(frame))
    kinds = {name: field.kind for name, field in schema.item.items()}
    assert kinds == {
        "genres": "multi",
        "tags": "multi",
        "colour": "categorical",
        "rating": "categorical",
        "price": "numeric",
        "score": "numeric",
        "year": "numeric",
        "adult": "categorical",
        "image": "vector",
        "released": "numeric",
    }
    assert schema.item["genres"] == MultiField(
        separator="|", why="4 distinct values, 2.0 a row"
    ) or (isinstance(schema.item["genres"], MultiField) and schema.item["genres"].separator == "|")
    transforms = {
        name: field.transform
        for name, field in schema.item.items()
        if isinstance(field, NumericField)
    }
    assert transforms == {
        "price": "log1p_standardise",
        "score": "standardise",
        "year": "bucketise",
        "released": "bucketise",
    }
    assert all(field.why for field in schema.item.values())
    assert list(schema.left_out) == [
        f"item.{name}" for name in ("title", "imdb", "empty", "same", "ragged")
    ]
    features = fit_features(schema, events_about(frame))
    assert features.item is not None
    assert sorted(features.item.names) == sorted(kinds)


def test_inspection_without_tables_finds_nothing() -> None:
    events = replace(events_about(pl.DataFrame({"x": [1]})), item_table=None)
    assert inspect_schema(events) == FeatureSchema()
    assert fit_features(FeatureSchema(), events).item is None


# --- real tables ---------------------------------------------------------------------------------


def test_movielens_tables_are_inspected_fitted_and_encoded(shared_data: Path) -> None:
    events = get_dataset("ml-100k", data_dir=shared_data).events
    schema = inspect_schema(events)
    assert {name: field.kind for name, field in (schema.user | schema.item).items()} == {
        "age": "numeric",
        "gender": "categorical",
        "occupation": "categorical",
        "year": "numeric",
        "genres": "multi",
    }
    assert sorted(schema.left_out) == ["item.title", "user.zip_code"]
    features = fit_features(schema, events)
    side, table = side_and_table(features)
    assert features.user is not None
    # 2 and 21 values with missing and unseen, 10 buckets with missing; 19 genres with both
    assert features.user.num_codes == 4 + 23 + 11
    assert len(side.bags[0].values.texts) == 19
    assert events.item_table is not None
    toy_story = events.items.find(1)
    told = side.bags[0].values.texts
    first = next(field for field in side.bags).values
    start = side.num_codes - first.num_codes
    codes = bags(table.rows(torch.tensor([toy_story])))[0]
    assert [told[code - start - 2] for code in codes] == ["Animation", "Children's", "Comedy"]
    assert table.known_R.all()


def test_the_image_vectors_of_tiktok_become_rows_of_length_one(shared_data: Path) -> None:
    image = np.load(shared_data / "tiktok-mm" / "image_feat.npy").astype(np.float32)
    frame = pl.DataFrame({"image": image})
    schema = inspect_schema(events_about(frame))
    side, table = side_and_table(fit_features(schema, events_about(frame)))
    assert side.vector_widths == (128,)
    there = table.known_R
    lengths = table.vectors[0].norm(dim=1)
    torch.testing.assert_close(lengths, there.float())
    assert_same(side.encode(frame[17:18]), table.rows(torch.tensor([17])))

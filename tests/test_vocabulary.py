"""Vocabularies: ids to rows and back."""

from collections.abc import Sequence

import hypothesis.strategies as st
import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings

from foretaste.data import vocabulary as vocabulary_module
from foretaste.data.vocabulary import Vocabulary, number_ids, text_buffers
from foretaste.errors import DataError


def vocabulary(*ids: object) -> Vocabulary:
    return Vocabulary(pl.Series(ids))


@pytest.mark.parametrize("ids", [[10, 20, 30], [30, 10, 20], ["a", "b", "é"], ["é", "b", "a"]])
def test_ids_find_their_row_sorted_or_not(ids: list[int | str]) -> None:
    known = vocabulary(*ids)
    assert [known.find(value) for value in ids] == [0, 1, 2]
    assert known.decode(np.array([2, 0])) == [ids[2], ids[0]]
    assert known.find("nobody") == known.find(99) == known.find(None) == -1


def test_text_and_number_of_an_integer_find_the_same() -> None:
    known = vocabulary(42, 7)
    assert known.find("42") == known.find(42) == known.find(42.0) == known.find(np.int32(42)) == 0
    for stranger in ("4_2", "42.5", 42.5, "", "x", 2**80, True, float("nan"), float("inf"), [42]):
        assert known.find(stranger) == -1, stranger
    for other in ("042", "+42", " 42", "42.0", "4" * 5000):
        assert known.find(other) == known.encode(pl.Series([other] * 9))[0] == -1, other
    text = vocabulary("42", "true")
    assert text.find(42) == text.find(42.0) == 0
    assert text.find(True) == 1  # noqa: FBT003


def finds_as_a_dictionary(known: Vocabulary, ids: Sequence[object], wanted: pl.Series) -> None:
    """Small or large, one by one or all at once."""
    rows = {value: row for row, value in enumerate(ids)}
    expected = [rows.get(value, -1) for value in wanted]
    assert known.encode(wanted.to_list()).tolist() == expected
    assert known.encode(wanted).tolist() == expected
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vocabulary_module, "_SMALL", 0)
        assert known.encode(wanted.to_list()).tolist() == expected


@settings(deadline=None, derandomize=True)
@given(
    st.lists(st.text(st.characters(exclude_categories=["Cs"])), unique=True, min_size=1),
    st.lists(st.text(st.characters(exclude_categories=["Cs"]))),
)
def test_any_text_is_found_as_a_dictionary_finds_it(ids: list[str], others: list[str]) -> None:
    finds_as_a_dictionary(vocabulary(*ids), ids, pl.Series([*ids, *others]))


@settings(deadline=None, derandomize=True)
@given(
    st.lists(st.integers(-(2**63), 2**63 - 1), unique=True, min_size=1),
    st.lists(st.integers(-(2**63), 2**63 - 1)),
)
def test_any_integer_is_found_as_a_dictionary_finds_it(ids: list[int], others: list[int]) -> None:
    known = Vocabulary(pl.Series(ids, dtype=pl.Int64))
    finds_as_a_dictionary(known, ids, pl.Series([*ids, *others], dtype=pl.Int64))


def test_many_ids_of_another_type_are_found_too() -> None:
    known = vocabulary(3, 1)
    assert known.encode(pl.Series(["1", "x", None, "3"])).tolist() == [1, -1, -1, 0]
    assert known.encode(pl.Series([1.0, 1.5, None])).tolist() == [1, -1, -1]
    assert vocabulary("3", "1").encode(pl.Series([1, 2, 3])).tolist() == [1, -1, 0]
    assert known.encode([]).tolist() == []


@pytest.mark.parametrize(
    "ids",
    [
        [5, 3, 5, 9],
        [5, -(2**62), 2**62, 5],
        ["b", "a", "b", ""],
    ],
)
def test_numbering_is_ascending_and_complete(ids: list[int | str]) -> None:
    series = pl.concat([pl.Series(ids[:2]), pl.Series(ids[2:])], rechunk=False)
    known, rows = number_ids(series, pl.Series([ids[0]]))
    assert known.ids.to_list() == sorted(set(ids))
    assert known.decode(rows.astype(np.int64)) == ids


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (pl.Series([1, 1]), "id 1 occurs twice"),
        (pl.Series(["a", None]), "1 ids are missing"),
        (pl.Series([1.5]), "are 64-bit integers or text"),
    ],
)
def test_ids_that_are_no_ids_are_refused(ids: pl.Series, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Vocabulary(ids)


@pytest.mark.parametrize("rows", [[3], [-1]])
def test_a_row_outside_is_refused(rows: list[int]) -> None:
    with pytest.raises(DataError, match="there is no row"):
        vocabulary(1, 2, 3).decode(np.array(rows))


def test_a_trusted_vocabulary_loads_its_ids_once_and_only_when_asked() -> None:
    loads = []

    def load() -> pl.Series:
        loads.append(1)
        return pl.Series(["a", "b"])

    known = Vocabulary.trusted(load, length=2, is_integer=False)
    assert (len(known), known.is_integer, loads) == (2, False, [])
    assert (known.find("b"), known.find("a"), loads) == (1, 0, [1])


def test_the_buffers_of_text_do_not_show_how_it_is_cut() -> None:
    whole = pl.Series(["one", "", "drei", "four"])
    cut = pl.concat(
        [pl.Series(["zero", "one", ""])[1:], pl.Series(["drei", "four"])], rechunk=False
    )
    for first, second in zip(text_buffers(whole), text_buffers(cut), strict=True):
        assert first.tobytes() == second.tobytes()
    assert text_buffers(whole)[1].tobytes() == b"onedreifour"
    assert len(text_buffers(pl.Series([], dtype=pl.String))[1]) == 0

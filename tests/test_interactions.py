"""`Interactions`: its columns, selections and fingerprint."""

from dataclasses import replace

import numpy as np
import polars as pl
import pytest

from foretaste.data.interactions import Interactions
from foretaste.data.vocabulary import Vocabulary
from foretaste.errors import DataError


def events() -> Interactions:
    # User 0: items 2, 0. User 1: none. User 2: item 2.
    return Interactions(
        users=Vocabulary(pl.Series(["x", "y", "z"])),
        items=Vocabulary(pl.Series([10, 11, 12])),
        offsets=np.array([0, 2, 2, 3]),
        item_idx=np.array([2, 0, 2], np.int32),
        timestamp_s=np.array([5, 6, 7]),
        columns={"rating": np.array([1, 2, 3], np.float32)},
        context=pl.DataFrame({"place": ["here", None, "there"], "tags": [["a"], ["b", "c"], []]}),
    )


def test_who_did_what() -> None:
    table = events()
    assert table.user_idx.tolist() == [0, 0, 2]
    assert table.item_count.tolist() == [1, 0, 2]
    assert [table.history(user).tolist() for user in range(3)] == [[2, 0], [], [2]]


def test_a_table_shows_itself_in_a_line() -> None:
    shown = "Interactions(3 events, 3 users, 3 items, columns rating, place, tags)"
    assert repr(events()) == shown


def test_a_selection_keeps_every_column_in_step() -> None:
    chosen = events().select(np.array([False, True, True]))
    assert chosen.offsets.tolist() == [0, 1, 1, 2]
    assert chosen.item_idx.tolist() == [0, 2]
    assert chosen.timestamp_s is not None
    assert chosen.timestamp_s.tolist() == [6, 7]
    assert chosen.columns["rating"].tolist() == [2, 3]
    assert chosen.context is not None
    assert chosen.context["place"].to_list() == [None, "there"]
    assert len(events().select(np.zeros(3, np.bool_))) == 0


def test_a_mask_of_another_length_is_refused() -> None:
    with pytest.raises(DataError, match=r"keep has 2 values, but there are 3 events"):
        events().select(np.array([True, False]))


def test_the_fingerprint_is_of_the_events_alone() -> None:
    table = events()
    same = replace(table, notes=("said",), user_table=pl.DataFrame({"age": [1, 2, 3]}))
    assert table.fingerprint() == same.fingerprint() == events().fingerprint()


@pytest.mark.parametrize(
    "change",
    [
        {"users": Vocabulary(pl.Series(["x", "yz", ""]))},  # the same letters, cut elsewhere
        {"items": Vocabulary(pl.Series([10, 11, 13]))},
        {"offsets": np.array([0, 1, 2, 3])},
        {"item_idx": np.array([2, 1, 2], np.int32)},
        {"timestamp_s": np.array([5, 6, 8])},
        {"timestamp_s": None},
        {"columns": {}},
        {"columns": {"rating": np.array([1, 2, 4], np.float32)}},
        {"columns": {"label": np.array([1, 2, 3], np.float32)}},
        {"context": None},
        {
            "context": pl.DataFrame(
                {"place": ["here", "", "there"], "tags": [["a"], ["b", "c"], []]}
            )
        },
        {
            "context": pl.DataFrame(
                {"place": ["here", None, "there"], "tags": [["a"], ["b"], ["c"]]}
            )
        },
        {
            "context": pl.DataFrame(
                {"city": ["here", None, "there"], "tags": [["a"], ["b", "c"], []]}
            )
        },
    ],
)
def test_any_other_event_is_another_fingerprint(change: dict[str, object]) -> None:
    assert replace(events(), **change).fingerprint() != events().fingerprint()  # type: ignore[arg-type]


def test_the_fingerprint_does_not_know_how_a_context_lies_in_memory() -> None:
    table = events()
    assert table.context is not None
    cut = pl.concat([table.context.head(1), table.context.tail(2)], rechunk=False)
    assert replace(table, context=cut).fingerprint() == table.fingerprint()
    times = pl.DataFrame({"at": [1.5, None, 2.5], "code": pl.Series([1, 2, 3], dtype=pl.UInt8)})
    other = times.with_columns(pl.col("code") + 1)
    assert (
        replace(table, context=times).fingerprint() != replace(table, context=other).fingerprint()
    )

"""Parts of a split with different tables, links, contexts, ratings and times."""

from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from foretaste.data.audit import audit_split
from foretaste.data.features import fit_features
from foretaste.data.features_schema import inspect_schema
from foretaste.data.interactions import Interactions
from foretaste.data.merging import concatenate
from foretaste.data.reading import read_interactions
from foretaste.data.splits import Split
from foretaste.data.splitting import given_split
from foretaste.data.store import open_store, write_store
from foretaste.errors import DataError

PIECES = ("users", "items", "user_links", "item_links", "context", "rating", "times")
WHERE = list(product((False, True), repeat=3))


def part(number: int, has: set[str]) -> Interactions:
    """Return two events of a known user and one of a user of this part alone, with some pieces."""
    users, items = [1, 1, 10 + number], [20, 21, 30 + number]
    rows = pl.DataFrame(
        {
            "user_id": users,
            "item_id": items,
            "at": [1_700_000_000 + 100 * number + n for n in range(3)],
            "stars": [1.0, 2.0, 3.0],
            "place": ["home", "work", "home"],
        }
    )
    return read_interactions(
        rows,
        timestamp="at" if "times" in has else None,
        rating="stars" if "rating" in has else None,
        context=["place"] if "context" in has else [],
        users=pl.DataFrame({"user_id": users[1:], "age": [20, 30]}) if "users" in has else None,
        items=pl.DataFrame({"item_id": items, "genre": ["a", "b", "a"]})
        if "items" in has
        else None,
        user_links=pl.DataFrame({"a": users[1:2], "b": users[2:]}) if "user_links" in has else None,
        item_links=pl.DataFrame({"a": items[:1], "b": items[1:2]}) if "item_links" in has else None,
    )


def merged(has: list[set[str]]) -> Split:
    """Return a split of three parts with these pieces."""
    train, validation, test = (part(number, pieces) for number, pieces in enumerate(has))
    return given_split(train, validation=validation, test=test)


def check(split: Split, has: list[set[str]], folder: Path) -> None:
    """Compare the split with its parts, and train and evaluate on it."""
    events = split.events
    some, every = set.union(*has), set.intersection(*has)
    assert (events.user_table is not None) == ("users" in some)
    assert (events.item_table is not None) == ("items" in some)
    assert (events.user_links is not None) == ("user_links" in some)
    assert (events.item_links is not None) == ("item_links" in some)
    assert (events.context is not None) == ("context" in every)
    assert ("rating" in events.columns) == ("rating" in every)
    assert (events.timestamp_s is not None) == ("times" in every)
    lost = {"context", "rating", "times"} & (some - every)
    assert sum("not in all parts" in note for note in events.notes) == len(lost - {"times"})
    assert sum("not all parts have times" in note for note in events.notes) == ("times" in lost)
    assert events.fingerprint()
    fit_features(inspect_schema(split.train), split.train).of(split.test.events)
    audit_split(split)
    write_store(events, folder)
    assert open_store(folder).fingerprint() == events.fingerprint()


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("piece", PIECES)
def test_a_piece_that_some_parts_have_is_kept_or_named(
    piece: str, where: tuple[bool, ...], tmp_path: Path
) -> None:
    has = [{piece} if present else set() for present in where]
    check(merged(has), has, tmp_path / "store")


@pytest.mark.parametrize("seed", range(20))
def test_any_pieces_of_any_parts_make_a_split(seed: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(seed)
    has = [{piece for piece in PIECES if rng.random() < 0.5} for _ in range(3)]
    check(merged(has), has, tmp_path / "store")


def with_items(table: pl.DataFrame, number: int = 0) -> Interactions:
    """Return events whose items are those of a table."""
    items = table["item_id"].to_list()
    rows = pl.DataFrame({"user_id": [number] * len(items), "item_id": items})
    return read_interactions(rows, items=table)


def test_a_value_is_taken_from_the_first_part_that_has_one() -> None:
    train = with_items(pl.DataFrame({"item_id": [10, 11], "genre": ["a", None]}))
    later = pl.DataFrame({"item_id": [10, 11, 12], "genre": ["a", "b", "c"], "price": [1.0, 2, 3]})
    table = given_split(train, test=with_items(later)).events.item_table
    assert table is not None
    assert table.to_dict(as_series=False) == {"genre": ["a", "b", "c"], "price": [1.0, 2.0, 3.0]}


def test_what_parts_say_otherwise_is_counted() -> None:
    train = with_items(
        pl.DataFrame({"item_id": [1, 2, 3], "g": ["a", "b", None], "t": [["x"], ["y"], None]})
    )
    later = with_items(
        pl.DataFrame({"item_id": [1, 2, 3], "g": ["z", "b", "c"], "t": [["x"], ["z"], ["w"]]})
    )
    events = given_split(train, test=later).events
    assert events.item_table is not None
    assert events.item_table["g"].to_list() == ["a", "b", "c"]
    assert events.item_table["t"].to_list() == [["x"], ["y"], ["w"]]
    told = [note for note in events.notes if "another in a later part" in note]
    assert [note.split()[:6] for note in told] == [
        ["1", "items", "have", "one", "'g'", "in"],
        ["1", "items", "have", "one", "'t'", "in"],
    ]


@pytest.mark.parametrize(
    ("one", "other", "together"),
    [
        ([1], [2.5], [1.0, 2.5]),
        ([1], ["x"], ["1", "x"]),
        ([None], [["x"]], [None, ["x"]]),
        ([True], [2], [1, 2]),
        ([7.0], ["7"], ["7", "7"]),
        ([2], pl.Series([2**63], dtype=pl.UInt64), ["2", "9223372036854775808"]),
        ([[1.0]], [[2]], [[1.0], [2.0]]),
        ([float("nan")], [1.0], [None, 1.0]),
    ],
)
def test_a_column_of_two_types_is_brought_to_one(
    one: list[object], other: list[object] | pl.Series, together: list[object], tmp_path: Path
) -> None:
    train = with_items(pl.DataFrame({"item_id": [1], "x": one}))
    later = with_items(pl.DataFrame({"item_id": [2], "x": other}))
    events = given_split(train, test=later).events
    assert events.item_table is not None
    assert events.item_table["x"].to_list() == together
    write_store(events, tmp_path / "store")
    assert open_store(tmp_path / "store").item_table is not None


def test_lists_and_single_values_do_not_make_one_column() -> None:
    train = with_items(pl.DataFrame({"item_id": [1], "tags": [["a", "b"]]}))
    later = with_items(pl.DataFrame({"item_id": [2], "tags": ["a|b"]}))
    with pytest.raises(DataError) as caught:
        given_split(train, test=later)
    assert caught.value.column == "tags"


def test_contexts_of_unlike_types_are_brought_to_one() -> None:
    train, test = part(0, {"context"}), part(1, {"context"})
    test = replace(test, context=pl.DataFrame({"place": [1, 2, 3]}))
    context = given_split(train, test=test).events.context
    assert context is not None
    assert context.dtypes == [pl.String]


def test_ids_that_are_text_in_one_part_are_said_to_become_text() -> None:
    events, _ = concatenate(
        [
            part(0, set()),
            read_interactions(pl.DataFrame({"user_id": ["1", "x"], "item_id": [20, 21]})),
        ]
    )
    assert events.users.ids.to_list() == ["1", "10", "x"]
    assert any(note.startswith("the ids of users are integers in some") for note in events.notes)


def test_notes_say_of_which_part_they_are() -> None:
    holes = pl.DataFrame({"user_id": [1, 1, None], "item_id": [1, 2, 3]})
    parts = [read_interactions(holes, drop_incomplete=True) for _ in range(2)]
    notes = given_split(parts[0], test=parts[1]).events.notes
    assert notes[:2] == (
        "train: 1 incomplete rows were left out",
        "test: 1 incomplete rows were left out",
    )

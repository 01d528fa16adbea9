"""Which events are kept, and which of them are positive, for every model."""

import datetime as dt
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

import foretaste as ft
from foretaste.data.conditions import counted_as_positive, only_where
from foretaste.data.interactions import Interactions
from foretaste.data.merging import concatenate
from foretaste.experiment.recipe import read_experiment

LOG = pl.DataFrame(
    {
        "user_id": [1, 1, 1, 2, 2, 2, 3, 3],
        "item_id": [10, 11, 12, 10, 12, 13, 11, 13],
        "t": [1_700_000_000 + n for n in range(8)],
        "clicked": [1, 0, 1, 0, 1, 1, None, 1],
        "rating": [5.0, 1.0, 4.0, 2.0, 5.0, None, 3.0, 4.0],
        "country": ["DE", "DE", "FR", "FR", "DE", "DE", "DE", None],
    }
)
AT = pl.Series([dt.date(2024, 1, 1)] * 8)


def log(**settings: Any) -> Interactions:
    return ft.read_interactions(LOG, timestamp="t", **settings)


@pytest.mark.parametrize(
    ("condition", "rows"),
    [
        ("clicked", [0, 2, 4, 5, 7]),  # above 0, and a missing one is not
        ("clicked = 0", [1, 3]),
        ("rating >= 4", [0, 2, 4, 7]),
        ("rating >= 4 AND country = 'DE'", [0, 4]),
        ("country IN ('FR') OR rating IS NULL", [2, 3, 5]),
        ("NOT (rating > 2)", [1, 3]),
        ('"rating" > AVG("rating")', [0, 2, 4, 7]),
    ],
)
def test_a_condition_holds_as_sql_says(condition: str, rows: list[int]) -> None:
    kept = log(where=condition)
    items = [LOG["item_id"][row] for row in rows]
    assert sorted(kept.items.ids.gather(pl.Series(kept.item_idx))) == sorted(items)
    assert kept.notes == (f"{8 - len(rows)} of 8 rows were left out by where = {condition!r}",)
    marked = log(positive=condition)
    assert len(marked) == 8
    positive = marked.items.ids.gather(pl.Series(marked.item_idx[marked.positive_E]))
    assert sorted(positive) == sorted(items)
    assert marked.notes == (f"{len(rows)} of 8 events are positive: {condition}",)


@pytest.mark.parametrize("name", ["where", "positive"])
@pytest.mark.parametrize(
    ("condition", "error", "words"),
    [
        ("rating >=", ft.ConfigError, "is not a condition"),
        ("SELECT 1", ft.ConfigError, "is not a condition"),
        ("raiting >= 4", ft.ConfigError, "did you mean 'rating'?"),
        ("Rating >= 4", ft.ConfigError, "did you mean 'rating'?"),
        ('country = "DE"', ft.ConfigError, "write text in 'single' quotes"),
        ("2", ft.ConfigError, "reads no column"),  # not the third one
        ("1 = 1", ft.ConfigError, "reads no column"),
        ("user_id IN (SELECT 1)", ft.ConfigError, "is not a condition"),
        ("country > 3", ft.DataError, "'country' holds text, such as 'DE' in row 1"),
        ("UNNEST(genres)", ft.DataError, "is not true or false for each row"),
        ("at > '2024-01-01'", ft.DataError, "DATE '2024-05-01'"),
        ("rating > 9", ft.DataError, "is true for none of 8 rows"),
        ("country", ft.DataError, "is not true or false for each row"),
    ],
)
def test_a_condition_that_is_none_is_refused_by_its_setting(
    name: str, condition: str, error: type[ft.ForetasteError], words: str
) -> None:
    table = LOG.with_columns(genres=pl.lit([True, False], pl.List(pl.Boolean)), at=AT)
    with pytest.raises(error) as caught:
        ft.read_interactions(table, **{name: condition})
    assert words in str(caught.value)
    assert caught.value.value == condition
    assert "polars" not in str(caught.value).lower()


@pytest.mark.parametrize(
    ("values", "condition", "holds"),
    [
        (pl.Series([1.0, np.nan, None, 5.0]), "x > 2", "3"),  # NaN is missing, not the highest
        (pl.Series([1.0, np.nan, None, 5.0]), "x", "03"),
        (pl.Series([1.0, np.nan, None, 5.0]), "x IS NULL", "12"),
        (pl.Series([1.0, np.nan, None, 5.0], dtype=pl.Float32), "NOT x > 2", "0"),
        (pl.Series([100, 2, 27, 28], dtype=pl.Int8), "x + 100 > 127", "03"),  # no sum overflows
        (pl.Series([1, 2, 10, 9], dtype=pl.UInt8), "x - 5 < 0", "01"),
        (pl.Series([2**64 - 1, 2, 10, 9], dtype=pl.UInt64), "x > 9", "02"),
        (pl.Series([1, 10, 20, 3], dtype=pl.Int128), "x > 5", "12"),
        (pl.Series(["1.50", "2.25", "3", "4"]).cast(pl.Decimal(10, 2)), "x >= 2.25", "123"),
        (pl.Series(["a", "b", "a", "b"], dtype=pl.Categorical), "x > 'a'", "13"),
        (pl.Series(["a", "b", "a", "b"], dtype=pl.Enum(["b", "a"])), "x > 'a'", "13"),
        (pl.Series([dt.timedelta(seconds=n) for n in range(4)]), "x > 1.5", "23"),
        (pl.Series([dt.date(2024, 1, n + 1) for n in range(4)]), "x > DATE '2024-01-02'", "23"),
        (
            pl.Series([dt.datetime(2024, 1, 1, n) for n in range(4)])
            .dt.replace_time_zone("Asia/Tokyo"),
            "x >= TIMESTAMP '2023-12-31 16:00:00'",  # in UTC, nine hours earlier
            "123",
        ),
        (pl.Series([[1], [2], [1, 2], []]), "array_contains(x, 2)", "12"),
        (pl.Series([True, None, False, True]), "x", "03"),
    ],
)  # fmt: skip
def test_columns_of_every_type_compare_as_in_sql(
    values: pl.Series, condition: str, holds: str
) -> None:
    table = pl.DataFrame({"user_id": [1, 1, 2, 2], "item_id": [0, 1, 2, 3], "x": values})
    kept = ft.read_interactions(table, where=condition)
    assert sorted(kept.items.ids.to_list()) == [int(row) for row in holds]
    marked = ft.read_interactions(table, positive=condition)
    assert np.flatnonzero(marked.positive_E).tolist() == [int(row) for row in holds]


def test_a_row_that_where_leaves_out_need_not_be_whole() -> None:
    table = LOG.with_columns(user_id=pl.Series([None, 1, 1, 2, 2, 2, 3, 3]))
    kept = ft.read_interactions(table, where="user_id IS NOT NULL")
    assert len(kept) == 7
    with pytest.raises(ft.DataError, match="among those that where keeps") as caught:
        ft.read_interactions(table, where="clicked = 1")
    assert caught.value.row == 1


def test_stored_events_are_chosen_as_read_ones() -> None:
    plain = log(columns=["clicked"], context=["country", "rating"])
    for condition in ("clicked", "rating >= 4 AND country = 'DE'", "item_id IN (12, 13)"):
        read, chosen = log(where=condition), only_where(plain, condition)
        assert chosen.items.ids.gather(pl.Series(chosen.item_idx)).to_list() == (
            read.items.ids.gather(pl.Series(read.item_idx)).to_list()
        )
        marked = counted_as_positive(plain, condition)
        assert marked.positive_E.tolist() == log(positive=condition).positive_E.tolist()
    with pytest.raises(ft.ConfigError, match="nothing_such"):
        only_where(plain, "nothing_such > 1")


def test_what_is_positive_is_kept_in_a_store(tmp_path: Path) -> None:
    events = log(positive="rating >= 4")
    ft.write_store(events, tmp_path / "store")
    opened = ft.open_store(tmp_path / "store")
    assert opened.positive == "rating >= 4"
    assert opened.positive_E.tolist() == events.positive_E.tolist()
    assert opened.fingerprint() == events.fingerprint() != log().fingerprint()


def test_events_of_unlike_positives_are_not_put_together() -> None:
    with pytest.raises(ft.DataError) as caught:
        concatenate([log(positive="clicked"), log()])
    assert caught.value.name == "positive"
    both, _ = concatenate([log(positive="clicked"), log(positive="clicked")])
    assert both.positive_E.sum() == 10


def test_the_last_positive_event_is_left_out_and_what_follows_it_goes_with_it() -> None:
    # user 1: + - +   user 2: - + +   user 3: ? +
    split = ft.leave_last_split(log(positive="clicked"), validation=False)
    assert split.part_E.tolist() == [0, 0, 2, 0, 0, 2, 0, 0]  # user 3 has one positive event
    late = LOG.with_columns(clicked=pl.Series([1, 1, 0, 1, 1, 0, 1, 1]))
    split = ft.leave_last_split(
        ft.read_interactions(late, timestamp="t", positive="clicked"), validation=False
    )
    assert split.part_E.tolist() == [0, 2, 2, 0, 2, 2, 0, 2]
    assert split.test.target_item.tolist() == [1, 2, 3]  # items 11, 12, 13


def impressions(*, shown: bool) -> pl.DataFrame:
    """Clicks of 40 users, and, if asked, twice as many impressions that were not clicked."""
    rng = np.random.default_rng(0)
    rows = []
    for user in range(40):
        for place, item in enumerate(rng.permutation(12)[:6]):
            rows.append((user, int(item), 1_700_000_000 + 100 * place + user, 1))
            if shown:
                rows += [(user, 99, 1_700_000_000 + 100 * place + user, 0)] * 2
    return pl.DataFrame(rows, schema=["user_id", "item_id", "t", "clicked"], orient="row")


def split_of(*, shown: bool) -> ft.Split:
    items = pl.DataFrame({"item_id": [*range(12), 99]})
    events = ft.read_interactions(
        impressions(shown=shown), timestamp="t", positive="clicked", items=items
    )
    return ft.leave_last_split(events)


@pytest.mark.parametrize(
    "config",
    [
        ft.PopularityConfig(),
        ft.ItemKNNConfig(),
        ft.EASEConfig(),
        ft.ImplicitALSConfig(factors=4),
        ft.MFConfig(embedding_dim=4),
        ft.SASRecConfig(embedding_dim=4, num_heads=1),
        ft.LightGCNConfig(embedding_dim=4),
        ft.TwoTowerConfig(embedding_dim=4),
    ],
    ids=lambda config: config.kind,
)
def test_a_retriever_learns_from_positive_events_alone(config: ft.ModelConfig) -> None:
    training = ft.TrainingConfig(epochs=1)
    fitted = [
        ft.fit(config, split_of(shown=shown), training=training, show=False)
        for shown in (True, False)
    ]
    weights = [model.model.state_dict() for model in fitted]
    assert all(np.array_equal(weights[0][name], weights[1][name]) for name in weights[0])
    reports = [
        ft.evaluate(model, split_of(shown=shown).test, k=3)
        for model, shown in zip(fitted, (True, False), strict=True)
    ]
    assert reports[0].metrics == reports[1].metrics
    rows = ft.build_recommender(fitted[0]).recommend(user_id=1, k=12).rows
    assert 99 not in [row.item_id for row in rows]


def test_a_ranker_learns_from_all_and_reads_the_positives_as_history() -> None:
    split = split_of(shown=True)
    config = ft.DINConfig(embedding_dim=4, task=ft.Task(name="click"))
    model = ft.fit(config, split, training=ft.TrainingConfig(epochs=1), show=False)
    assert len(model.events) == int(split.train.positive_E.sum()) < len(split.train)
    rows = ft.rows_of(split, "test", tasks=(ft.Task(name="click"),))
    assert sorted(set(rows.label_ET.ravel().tolist())) == [0.0, 1.0]


def test_labels_that_no_model_reads_are_noted() -> None:
    split = ft.leave_last_split(
        ft.read_interactions(impressions(shown=True), timestamp="t", columns=["clicked"])
    )
    notes = ft.fit(ft.PopularityConfig(), split, show=False).notes
    zeros, num = int((split.train.columns["clicked"] == 0).sum()), len(split.train)
    assert notes == (
        f"{zeros} of {num} events have 'clicked' = 0 and count as positive: give positive = "
        "'clicked' when reading, if they should not",
    )
    stars = ft.leave_last_split(log(rating="rating", drop_incomplete=True), validation=False)
    (note,) = ft.fit(ft.PopularityConfig(), stars, show=False).notes
    assert "rating >= 4" in note


def test_a_positive_that_a_model_would_not_read_is_refused() -> None:
    objective = ft.RowsConfig(positive="clicked")
    with pytest.raises(ft.ConfigError) as caught:
        ft.fit(ft.ItemKNNConfig(), split_of(shown=True), objective=objective, show=False)
    assert caught.value.name == "objective.positive"


def test_a_recipe_says_which_events_count(tmp_path: Path) -> None:
    LOG.write_csv(tmp_path / "log.csv")
    ft.write_store(log(columns=["clicked"]), tmp_path / "store")
    recipe = tmp_path / "r.toml"
    for data in ('kind = "files"\nfiles = ["log.csv"]', 'kind = "store"\npath = "store"'):
        recipe.write_text(
            f"[data]\n{data}\npositive = 'clicked'\nwhere = 'clicked IS NOT NULL'\n"
            '[split]\nkind = "leave_last"\nvalidation = false\n[model]\nkind = "item_knn"\n'
        )
        split = ft.read_split(read_experiment(recipe), data_dir=tmp_path)
        assert len(split.events) == 7
        assert split.events.positive_E.sum() == 5

"""Public data sets with labels and contexts: their layouts, and published figures."""

import io
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from scipy import sparse
from scipy.io import savemat

from foretaste.data.audit import audit_events
from foretaste.data.interactions import Interactions
from foretaste.data.rows import rows_of
from foretaste.data.sources import readers as frappe
from foretaste.data.sources.files import Files
from foretaste.data.sources.load import get_dataset
from foretaste.data.sources.readers import (
    read_adult,
    read_ciao_ratings,
    read_frappe,
    read_frappe_positives,
    read_frappe_rows,
    read_retailrocket,
    read_retailrocket_buys,
)
from foretaste.data.splits import TEST, TRAIN, VALIDATION, GivenSplitConfig
from foretaste.data.splitting import make_split
from foretaste.data.tasks import Task
from foretaste.errors import SourceError

PEOPLE = (
    "39, State-gov, 77516, Bachelors, 13, Never-married, Adm-clerical, Not-in-family, White, Male,"
    " 2174, 0, 40, United-States, <=50K\n"
    "50, ?, 83311, Bachelors, 13, Married-civ-spouse, Exec-managerial, Husband, White, Male, 0, 0,"
    " 13, ?, >50K\n\n"
)


def test_adult_has_two_labels_and_no_feature_that_gives_one_away(tmp_path: Path) -> None:
    (tmp_path / "adult.data").write_text(PEOPLE)
    test = PEOPLE.replace("50K\n", "50K.\n")
    (tmp_path / "adult.test").write_text(f"|1x3 Cross validator\n{test}")
    tables = read_adult(Files(tmp_path))
    assert tables.events["income"].to_list() == [0, 1, 0, 1]
    assert tables.events["never_married"].to_list() == [1, 0, 1, 0]
    assert tables.events["part"].to_list() == [TRAIN, TRAIN, TEST, TEST]
    assert tables.events["workclass"].to_list() == ["State-gov", None] * 2
    assert tables.events["age"].dtype == pl.Int64
    assert not {"marital_status", "relationship"} & set(tables.events.columns)
    assert tables.counts() == (4, 1, 4)


def libfm(rows: list[tuple[int, int, int]]) -> str:
    """Lines `label user item …` with the first value of every context."""
    rest = " ".join(f"{first}:1" for first in frappe._FIRST[2:])
    return "".join(f"{label} {user}:1 {957 + item}:1 {rest}\n" for label, user, item in rows)


def frappe_folder(folder: Path, *, train: str = "train-positives.derived.libfm") -> Files:
    (folder / train).write_text(libfm([(1, 0, 5), (1, 0, 6), (1, 1, 5)]))
    (folder / "frappe.validation.libfm").write_text(libfm([(1, 0, 7), (-1, 1, 9)]))
    (folder / "frappe.test.libfm").write_text(libfm([(-1, 0, 9), (1, 1, 8)]))
    return Files(folder)


def test_frappe_rows_keep_labels_parts_and_the_numbers_of_their_context(tmp_path: Path) -> None:
    tables = read_frappe_positives(frappe_folder(tmp_path))
    rows = tables.events.select("user", "item", "label", "part").rows()
    assert rows == [
        (0, 5, 1, TRAIN),
        (0, 6, 1, TRAIN),
        (1, 5, 1, TRAIN),
        (0, 7, 1, VALIDATION),
        (1, 9, 0, VALIDATION),
        (0, 9, 0, TEST),
        (1, 8, 1, TEST),
    ]
    assert tables.context[:2] == ("daytime", "weekday")
    assert tables.events.select(tables.context).unique().rows() == [(0,) * 8]


def test_drawn_frappe_negatives_keep_user_and_context_and_were_never_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frappe, "_NUM_NEGATIVES", 5)
    monkeypatch.setattr(frappe, "_FIRST", (0, 957, 957 + 10, *range(2000, 2007)))  # ten apps
    files = frappe_folder(tmp_path)
    train = read_frappe_rows(files).events.filter(pl.col("part") == TRAIN)
    drawn = train.filter(pl.col("label") == 0).select("user", "item")
    assert len(drawn) == 5
    assert drawn["user"].value_counts().filter(pl.col("count") > 4).is_empty()  # two a positive
    used = {(0, 5), (0, 6), (0, 7), (1, 5), (1, 8)}  # of validation and test too
    assert not used & set(drawn.rows())
    assert read_frappe_rows(files).events.equals(read_frappe_rows(files).events)


def test_the_published_negatives_are_taken_where_they_are(tmp_path: Path) -> None:
    files = frappe_folder(tmp_path, train="frappe.train.libfm")
    (tmp_path / "frappe.train.libfm").write_text(libfm([(1, 0, 5), (-1, 0, 4)]))
    assert read_frappe_rows(files).events["label"].to_list()[:2] == [1, 0]
    assert read_frappe_positives(files).events["label"].to_list()[:1] == [1]


def test_raw_frappe_has_its_context_and_its_apps(tmp_path: Path) -> None:
    events = (
        "user\titem\tcnt\tdaytime\tweekday\tisweekend\thomework\tcost\tweather\tcountry\tcity\n"
    )
    events += "0\t3\t12\tnight\tsunday\tweekend\tunknown\tfree\tsunny\tSpain\t0\n"
    head = "item\tpackage\tcategory\tdownloads\tdeveloper\ticon\tlanguage\tdescription\tname\t"
    meta = head + "price\trating\tshort desc\n"
    meta += '3\ta.b\tTools\t10 - 50\tX\thttp://x\ten\tIt "does".\tDo\t$2.99\t4.5\t\n'
    meta += "4" + "\tunknown" * 10 + "\t\n"
    with zipfile.ZipFile(tmp_path / "Mobile_Frappe.zip", "w") as archive:
        archive.writestr("Mobile_Frappe/frappe/frappe.csv", events)
        archive.writestr("Mobile_Frappe/frappe/meta.csv", meta)
    tables = read_frappe(Files(tmp_path))
    assert tables.events["count"].to_list() == [12]
    assert tables.events["homework"].to_list() == ["unknown"]
    assert tables.items is not None
    first, second = tables.items.rows(named=True)
    assert (first["title"], first["price"], first["rating"]) == ("Do", 2.99, 4.5)
    assert set(second.values()) == {4, None}


def save_matrix(path: Path, cells: dict[tuple[int, int], int]) -> None:
    row, column = zip(*cells, strict=True)
    content = io.BytesIO()
    sparse.save_npz(content, sparse.coo_matrix((list(cells.values()), (row, column)), shape=(2, 9)))
    path.write_bytes(content.getvalue())


def test_retailrocket_rows_are_views_at_their_earliest_time(tmp_path: Path) -> None:
    save_matrix(tmp_path / "train_mat_view.derived.npz", {(0, 1): 50, (0, 2): 20, (1, 1): 40})
    save_matrix(tmp_path / "train_mat_cart.derived.npz", {(0, 1): 30, (1, 5): 10})
    save_matrix(tmp_path / "train_mat_buy.derived.npz", {(0, 1): 60})
    tables = read_retailrocket(Files(tmp_path))
    # the pair that was only carted is no row; a cart before the last view moves its row there
    rows = tables.events.select("user", "item", "timestamp", "cart", "buy").rows()
    assert rows == [(0, 2, 20, 0, 0), (0, 1, 30, 1, 1), (1, 1, 40, 0, 0)]


def test_retailrocket_buys_hold_out_the_last_known_purchase_and_the_given_one(
    tmp_path: Path,
) -> None:
    view, cart = {(0, 1): 50, (0, 2): 20, (1, 1): 40}, {(0, 1): 30, (1, 5): 10}
    buy = {(0, 1): 60, (0, 3): 25, (0, 2): 45, (1, 1): 70}
    for name, cells in (("view", view), ("cart", cart), ("buy", buy)):
        save_matrix(tmp_path / f"train_mat_{name}.derived.npz", cells)
    save_matrix(tmp_path / "test_mat.derived.npz", {(0, 7): 1, (1, 8): 1})
    tables = read_retailrocket_buys(Files(tmp_path))
    assert tables.labels == ("cart", "buy")
    assert tables.events.select("user", "item", "part", "cart", "buy").rows() == [
        (1, 5, 0, 1, 0),  # a pair that was only carted is a row
        (0, 2, 0, 1, 1),  # what was bought counts as carted
        (0, 3, 0, 1, 1),
        (0, 1, 1, 1, 1),  # bought at 60, after the others
        (1, 1, 0, 1, 1),  # the only purchase of its user stays in training
        (0, 7, 2, 1, 1),
        (1, 8, 2, 1, 1),
    ]


def test_ciao_ratings_have_stars_helpfulness_and_days(tmp_path: Path) -> None:
    ratings = [[1, 7, 4, 5, 2, 959670000], [1, 8, 4, 0, 1, 959670000], [2, 7, 9, 3, 6, 959756400]]
    savemat(tmp_path / "rating_with_timestamp.mat", {"rating": np.array(ratings, np.int32)})
    savemat(tmp_path / "trust.mat", {"trust": np.array([[1, 2]], np.int32)})
    tables = read_ciao_ratings(Files(tmp_path))
    assert tables.events.rows() == [(1, 7, 5.0, 2, 959670000), (2, 7, 3.0, 6, 959756400)]
    assert tables.items is not None
    assert tables.items.rows() == [(7, 4)]
    assert tables.user_links is not None
    assert tables.user_links.rows() == [(1, 2)]


def test_a_data_set_of_no_known_address_says_so(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"no address of its files is known.*--data-dir"):
        get_dataset("ciao-ratings", cache_dir=tmp_path)


# --- the files themselves ------------------------------------------------------------------------


def events_of(name: str, shared_data: Path) -> Interactions:
    return get_dataset(name, data_dir=shared_data).events


def test_real_adult_has_the_known_shares_of_its_labels(shared_data: Path) -> None:
    events = events_of("adult", shared_data)
    split = make_split(GivenSplitConfig(validation=0.1), events)
    tasks = [Task(name=name, column=name) for name in ("income", "never_married")]
    test = rows_of(split, "test", tasks=tasks)
    assert len(test) == 16_281
    # UCI: 24.08 % of training and 23.62 % of test earn more than 50,000
    assert test.label_ET[:, 0].mean() == pytest.approx(0.2362, abs=5e-5)
    train = events.columns["part"] == TRAIN
    assert events.columns["income"][train].mean() == pytest.approx(0.2408, abs=5e-5)
    assert events.context is not None
    assert events.context["workclass"].null_count() == 2_799  # the known number of "?"


def test_a_feature_that_gives_a_label_away_is_named_when_it_is_put_back(shared_data: Path) -> None:
    events = events_of("adult", shared_data)
    assert {f.severity for f in audit_events(events)} == {"note"}
    status = np.where(events.columns["never_married"] == 1, "Never-married", "Divorced")
    assert events.context is not None
    leaky = replace(events, context=events.context.with_columns(marital_status=status))
    sentences = [f.sentence for f in audit_events(leaky) if f.severity == "leak"]
    assert len(sentences) == 1
    assert "context 'marital_status' tells 'never_married'" in sentences[0]


def test_real_frappe_rows_are_a_third_positive_and_negatives_never_used(shared_data: Path) -> None:
    for name, train_size in (("frappe-ctr", 67_604), ("frappe-ctr-rows", 202_027)):
        events = events_of(name, shared_data)
        split = make_split(GivenSplitConfig(), events)
        assert np.bincount(split.part_E).tolist() == [train_size, 57_722, 28_860]
        label, part = events.columns["label"], split.part_E
        assert label[part == TRAIN].sum() == 67_604
        assert label[part != TRAIN].sum() == 28_599
        key = events.user_idx.astype(np.int64) * events.num_items + events.item_idx
        assert not np.isin(key[label == 0], key[label == 1]).any()
        assert events.context is not None
        assert events.context.width == 8


def test_the_numbered_context_is_that_of_the_raw_file_in_order_of_appearance(
    shared_data: Path,
) -> None:
    raw, rows = events_of("frappe", shared_data), events_of("frappe-ctr", shared_data)
    assert raw.context is not None
    assert rows.context is not None
    for name in ("daytime", "country", "city"):
        of_raw = raw.context[name].value_counts()["count"].sort().to_list()
        used = rows.context.filter(pl.Series(rows.columns["label"] > 0))[name]
        assert used.value_counts()["count"].sort().to_list() == of_raw


def test_real_ciao_and_retailrocket_have_times_and_labels(shared_data: Path) -> None:
    ciao = events_of("ciao-ratings", shared_data)
    assert np.bincount(ciao.columns["rating"].astype(int)).tolist() == [
        0,
        11_049,
        14_317,
        31_294,
        88_499,
        138_893,
    ]
    assert ciao.timestamp_s is not None
    assert ciao.user_links is not None
    assert ciao.user_links.shape == (2, 57_544)
    shop = events_of("retailrocket", shared_data)
    assert (shop.columns["cart"].sum(), shop.columns["buy"].sum()) == (10_860, 8_423)


def test_real_test_purchases_of_retailrocket_were_never_seen_before(shared_data: Path) -> None:
    buys = events_of("retailrocket-buys", shared_data)
    split = make_split(GivenSplitConfig(), buys)
    assert np.bincount(split.part_E).tolist() == [76_345, 885, 2_174]
    assert buys.columns["buy"].sum() == 9_551 + 2_174
    key = buys.user_idx.astype(np.int64) * buys.num_items + buys.item_idx
    assert len(np.unique(key)) == len(key)


def test_movielens_sequences_have_genres_and_who_their_users_are(shared_data: Path) -> None:
    events = events_of("ml-1m-sequences", shared_data)
    assert events.item_table is not None
    assert events.user_table is not None
    assert events.item_table["genres"].list.len().min() == 1
    assert events.user_table["gender"].n_unique() == 2
    assert not events.user_table["occupation"].null_count()

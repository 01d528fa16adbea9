"""Readers of the public data sets: each takes a data set's files and returns its tables."""

import io
import json
from collections.abc import Sequence

import numpy as np
import polars as pl

from foretaste.data.sources.files import Files, Tables
from foretaste.data.splits import NEGATIVE, TEST, TRAIN, VALIDATION
from foretaste.later import later

sparse, scipy_io = later("scipy.sparse"), later("scipy.io")

_TYPES = {
    "user": pl.Int64,
    "item": pl.Int64,
    "rating": pl.Float64,
    "timestamp": pl.Int64,
    "age": pl.Int64,
    "original": pl.Int64,
}
_RATING = ("user", "item", "rating", "timestamp")
_USER_100K = ("user", "age", "gender", "occupation", "zip_code")
_GENRES_100K = (
    "unknown Action Adventure Animation Children's Comedy Crime Documentary Drama Fantasy "
    "Film-Noir Horror Musical Mystery Romance Sci-Fi Thriller War Western"
)


def read_ml_100k(files: Files) -> Tables:
    """Read the archive's `u.data`, `u.item` and `u.user`, or RecBole's files of this data set."""
    if not files.has("u.data"):
        return _read_recbole_100k(files)
    genres = _GENRES_100K.split()
    columns = ("item", "title", "date", "video_date", "address", *genres)
    items = _table(files.text("u.item"), "|", columns).select(
        "item",
        *_title_and_year(),
        genres=pl.concat_list(
            pl.when(pl.col(genre) == "1").then(pl.lit(genre)) for genre in genres
        ).list.drop_nulls(),
    )
    return Tables(
        events=_table(files.text("u.data"), "\t", _RATING),
        users=_table(files.text("u.user"), "|", _USER_100K),
        items=items,
    )


def _read_recbole_100k(files: Files) -> Tables:
    """Read `ml-100k.inter`, `.item` and `.user`: the same, under a header of `name:type`."""
    items = _table(files.text("ml-100k.item"), "\t", ("item", "title", "year", "genres"), 1)
    return Tables(
        events=_table(files.text("ml-100k.inter"), "\t", _RATING, 1),
        users=_table(files.text("ml-100k.user"), "\t", _USER_100K, 1),
        items=items.with_columns(
            pl.col("year").cast(pl.Int64, strict=False), pl.col("genres").str.split(" ")
        ),
    )


def read_ml_1m(files: Files) -> Tables:
    """Read `ratings.dat`, `movies.dat` and `users.dat`, whose fields are separated by `::`."""
    return Tables(
        events=_table(files.text("ratings.dat"), "::", _RATING),
        users=_users_1m(files),
        items=_movies_1m(files),
    )


def read_ml_1m_sequences(files: Files) -> Tables:
    """Read the `ml-1m.txt` of SASRec, with the titles of movies if they are available."""
    events = read_pairs(files, "ml-1m.txt").events
    mapped: dict[str, pl.DataFrame] = {}
    for side, table in (("item", "movies.dat"), ("user", "users.dat")):
        mapping = f"sas_to_original_{side}s.txt"
        if files.has(mapping) and files.has(table):
            named = _movies_1m(files) if side == "item" else _users_1m(files)
            pairs = _table(files.text(mapping), " ", (side, "original"))
            joined = pairs.join(named.rename({side: "original"}), on="original", how="left")
            mapped[side] = joined.rename({"original": "movielens_id"})
    return Tables(events=events, users=mapped.get("user"), items=mapped.get("item"))


def read_ml_csv(files: Files) -> Tables:
    """Read the `ratings.csv` and `movies.csv` of the newer releases."""
    ratings = pl.read_csv(
        files.read("ratings.csv"), new_columns=_RATING, schema_overrides={"rating": pl.Float64}
    )
    movies = pl.read_csv(files.read("movies.csv"), new_columns=("item", "title", "genres"))
    return Tables(events=ratings.select(_RATING), items=_described(movies))


def _movies_1m(files: Files) -> pl.DataFrame:
    return _described(_table(files.text("movies.dat"), "::", ("item", "title", "genres")))


def _users_1m(files: Files) -> pl.DataFrame:
    """Age is the lower end of its group, occupation a number as in the data set's README."""
    columns = ("user", "gender", "age", "occupation", "zip_code")
    users = _table(files.text("users.dat"), "::", columns)
    return users.with_columns(pl.col("occupation").cast(pl.Int64))


def _described(movies: pl.DataFrame) -> pl.DataFrame:
    """Separate titles from years, and split genres."""
    genres = pl.col("genres")
    none = pl.lit([], dtype=pl.List(pl.String))
    return movies.select(
        "item",
        *_title_and_year(),
        genres=pl.when(genres == "(no genres listed)").then(none).otherwise(genres.str.split("|")),
    )


def _title_and_year() -> tuple[pl.Expr, pl.Expr]:
    """Split "Toy Story (1995)" into "Toy Story" and 1995."""
    form = r"^(.*?)\s*\((\d{4})\)\s*$"
    title = pl.col("title")
    return (
        pl.coalesce(title.str.extract(form, 1), title.str.strip_chars()).alias("title"),
        title.str.extract(form, 2).cast(pl.Int64).alias("year"),
    )


def _table(text: str, separator: str, columns: Sequence[str], skip_rows: int = 0) -> pl.DataFrame:
    return pl.read_csv(
        text.replace(separator, "\t").encode(),
        separator="\t",
        has_header=False,
        skip_rows=skip_rows,
        quote_char=None,
        schema={name: _TYPES.get(name, pl.String) for name in columns},
        truncate_ragged_lines=True,
    )


_PAIR = pl.Schema({"user": pl.Int64, "item": pl.Int64})


def read_ncf(files: Files) -> Tables:
    """Read pairs of training and test and lists of negatives, sorted: no order is known.

    156 users have their test item among their negatives too; it is then counted once.
    """
    train = "ml-1m.train.rating"
    train = train if files.has(train) else "ml-1m.train.derived.txt"
    parts = [
        (_pairs(files, train), TRAIN),
        (_pairs(files, "ml-1m.test.rating"), TEST),
        (_negatives(files), NEGATIVE),
    ]
    return Tables(events=_in_parts(parts).sort("part", "user", "item"))


def _pairs(files: Files, name: str) -> pl.DataFrame:
    table = pl.read_csv(files.read(name), separator="\t", has_header=False)
    return table.select(pl.nth(0).alias("user"), pl.nth(1).alias("item")).cast(_PAIR)


def _negatives(files: Files) -> pl.DataFrame:
    """Read lines of `(user,item)` and then items, separated by tabs."""
    lines = pl.DataFrame({"line": files.text("ml-1m.test.negative").splitlines()})
    fields = lines.select(
        user=pl.col("line").str.extract(r"^\((\d+),"),
        item=pl.col("line").str.split("\t").list.slice(1),
    )
    return fields.explode("item").filter(pl.col("item").str.len_chars() > 0).cast(_PAIR)


def read_pairs(files: Files, name: str) -> Tables:
    """Read lines `user item`, each user's oldest first."""
    return Tables(
        events=pl.read_csv(
            files.read(name),
            separator=" ",
            has_header=False,
            schema=_PAIR,
        )
    )


def read_rows(files: Files, name: str) -> Tables:
    """Read lines `user item item …`, oldest first."""
    lines = pl.DataFrame({"line": files.text(name).splitlines()}, schema={"line": pl.String})
    numbers = pl.col("line").str.strip_chars().str.split(" ").cast(pl.List(pl.Int64))
    rows = lines.filter(pl.col("line").str.strip_chars() != "").select(numbers)
    events = rows.select(
        user=pl.col("line").list.first(), item=pl.col("line").list.slice(1)
    ).filter(pl.col("item").list.len() > 0)
    return Tables(events=events.explode("item"))


def read_s3rec(files: Files, name: str) -> Tables:
    """Read `NAME.txt` and, into a list column, `NAME_item2attributes.json` if it exists.

    Zhou et al., "S3-Rec: Self-Supervised Learning for Sequential Recommendation with Mutual
    Information Maximization", CIKM 2020, https://arxiv.org/abs/2008.07873
    """
    events = read_rows(files, f"{name}.txt").events
    attributes = f"{name}_item2attributes.json"
    if not files.has(attributes):
        return Tables(events=events)
    of_item: dict[str, list[int]] = json.loads(files.text(attributes))
    items = pl.DataFrame(
        {"item": [int(item) for item in of_item], "attributes": list(of_item.values())},
        schema={"item": pl.Int64, "attributes": pl.List(pl.Int64)},
    )
    return Tables(events=events, items=items)


def read_gowalla(files: Files) -> Tables:
    """Read LightGCN's `train.txt` and `test.txt` as parts 0 and 2, sorted: no order is known.

    He et al., "LightGCN", SIGIR 2020, https://arxiv.org/abs/2002.02126
    """
    train = "train.txt" if files.has("train.txt") else "train.derived.txt"
    parts = [(read_rows(files, train).events, TRAIN), (read_rows(files, "test.txt").events, TEST)]
    return Tables(events=_in_parts(parts).sort("part", "user", "item"))


def read_amazon(files: Files, name: str) -> Tables:
    """Read a 5-core file of Amazon reviews: one JSON object per line.

    McAuley et al., "Image-based Recommendations on Styles and Substitutes", SIGIR 2015,
    https://arxiv.org/abs/1506.04757
    """
    events = pl.read_ndjson(
        files.read(name),
        schema={
            "reviewerID": pl.String,
            "asin": pl.String,
            "overall": pl.Float64,
            "unixReviewTime": pl.Int64,
        },
    )
    return Tables(
        events=events.select(
            user="reviewerID", item="asin", rating="overall", timestamp="unixReviewTime"
        )
    )


def read_social(files: Files) -> Tables:
    """Read trust, and training and test sets as parts 0 and 2, sorted: no order is known."""
    parts = [
        (pl.read_csv(files.read(name), schema=_PAIR), part)
        for name, part in (("train_set.txt", TRAIN), ("test_set.txt", TEST))
    ]
    trust = pl.read_csv(files.read("trust.txt"), schema={"user": pl.Int64, "friend": pl.Int64})
    return Tables(events=_in_parts(parts).sort("part", "user", "item"), user_links=trust)


def read_ciao_ratings(files: Files) -> Tables:
    """Read Ciao's ratings with their day, the helpfulness of each review, and links of trust.

    34 reviews without a rating (0 of 5 stars) are left out. An item has one category; 101 items
    have several, and the first is taken. Both files are MATLAB matrices.
    """
    table = scipy_io.loadmat(io.BytesIO(files.read("rating_with_timestamp.mat")))["rating"]
    names = ("user", "item", "category", "rating", "helpfulness", "timestamp")
    ratings = pl.DataFrame(table, schema=names).cast(pl.Int64).filter(pl.col("rating") > 0)
    trust = scipy_io.loadmat(io.BytesIO(files.read("trust.mat")))["trust"]
    return Tables(
        events=ratings.drop("category").cast({"rating": pl.Float64}),
        items=ratings.select("item", "category").unique("item", keep="first", maintain_order=True),
        user_links=pl.DataFrame(trust, schema=("user", "friend")).cast(pl.Int64),
        labels=("helpfulness",),
    )


_PARTS = {"trnMat": TRAIN, "valMat": VALIDATION, "tstMat": TEST}


def read_tiktok(files: Files) -> Tables:
    """Read three user-item matrices as parts 0, 1 and 2, sorted because no order is known.

    Items have an `image` and an `audio` vector of 128 numbers; the published text vectors are not
    included. The matrices come from DiffMM's repository, converted from pickles with
    `scipy.sparse.save_npz`.

    Jiang et al., "DiffMM: Multi-Modal Diffusion Model for Recommendation", MM 2024,
    https://arxiv.org/abs/2406.11781
    """
    parts = [(_cells(files, name).select("user", "item"), part) for name, part in _PARTS.items()]
    vectors = {
        name: np.load(io.BytesIO(files.read(f"{name}_feat.npy"))) for name in ("image", "audio")
    }
    items = pl.DataFrame({"item": np.arange(len(vectors["image"]), dtype=np.int64)}).with_columns(
        pl.Series(name, value.astype(np.float32), dtype=pl.Array(pl.Float32, value.shape[1]))
        for name, value in vectors.items()
    )
    return Tables(events=_in_parts(parts).sort("part", "user", "item"), items=items)


def _in_parts(parts: Sequence[tuple[pl.DataFrame, int]]) -> pl.DataFrame:
    """Return the rows of all parts, one after the other, with their part as a column."""
    return pl.concat(rows.with_columns(part=pl.lit(part, dtype=pl.UInt8)) for rows, part in parts)


sparse = later("scipy.sparse")

_NUMBERS = ("age", "fnlwgt", "education_num", "capital_gain", "capital_loss", "hours_per_week")
_COLUMNS = (
    "age workclass fnlwgt education education_num marital_status occupation relationship "
    "race sex capital_gain capital_loss hours_per_week native_country income"
)
_LEFT_OUT = ("marital_status", "relationship", "income")


def read_adult(files: Files) -> Tables:
    """Read training and test as parts 0 and 2, with labels `income` and `never_married`.

    Income is 1 above 50,000 dollars. The marital status and the relationship in the household are
    not features, because both reveal the second label. A question mark is a missing value.
    """
    parts = [(_people(files, "adult.data"), TRAIN), (_people(files, "adult.test"), TEST)]
    context = tuple(name for name in _COLUMNS.split() if name not in _LEFT_OUT)
    return Tables(events=_in_parts(parts), labels=("income", "never_married"), context=context)


def _people(files: Files, name: str) -> pl.DataFrame:
    """Read lines of comma-separated values, except empty lines and the test file's first."""
    lines = [line for line in files.text(name).splitlines() if line.count(",") > 1]
    table = pl.read_csv(
        "\n".join(lines).encode(),
        has_header=False,
        new_columns=_COLUMNS.split(),
        infer_schema=False,
        quote_char=None,
    )
    table = table.with_columns(pl.all().str.strip_chars().replace("?", None))
    return table.with_columns(
        *(pl.col(name).cast(pl.Int64) for name in _NUMBERS),
        income=(pl.col("income").str.strip_suffix(".") == ">50K").cast(pl.Int64),
        never_married=(pl.col("marital_status") == "Never-married").cast(pl.Int64),
    ).drop("marital_status", "relationship")


CTR_FILES = ("frappe.train.libfm", "frappe.validation.libfm", "frappe.test.libfm")
CONTEXT = ("daytime", "weekday", "isweekend", "homework", "cost", "weather", "country", "city")
_FIRST = (0, 957, 5039, 5046, 5053, 5055, 5058, 5060, 5069, 5149)
"""The first feature number of each column of a row: user, item, and the context."""
_DERIVED = "train-positives.derived.libfm"
_NUM_NEGATIVES = 134_423  # of the published training file
_SEED = 0


def read_frappe(files: Files) -> Tables:
    """Read `frappe.csv`, with the number of uses as label `count`, and `meta.csv`.

    Each row is one user and app in one context; there are no times, so the order of the file is
    kept. "unknown" is a value of the context, but means a missing value of an app.
    """
    events = pl.read_csv(files.read("frappe.csv"), separator="\t").rename({"cnt": "count"})
    meta = pl.read_csv(
        files.read("meta.csv"), separator="\t", quote_char=None, infer_schema=False
    ).with_columns(pl.all().replace("unknown", None))
    items = meta.select(
        pl.col("item").cast(pl.Int64),
        pl.col("name").alias("title"),
        "category",
        "downloads",
        "developer",
        "language",
        "description",
        pl.col("price").replace("Free", "0").str.extract(r"(\d+(?:\.\d+)?)").cast(pl.Float64),
        pl.col("rating").cast(pl.Float64, strict=False),
    )
    return Tables(events=events, items=items, labels=("count",), context=CONTEXT)


def read_frappe_positives(files: Files) -> Tables:
    """Read used apps as training, and labelled validation and test rows, a third of which are used.

    The negatives of training are left out: they are drawn again for each epoch. Context values are
    the numbers of the rows' features, in order of first appearance in `frappe.csv`.
    """
    return _tables(_train(files).filter(pl.col("label") == 1), files)


def read_frappe_rows(files: Files) -> Tables:
    """Read labelled rows in all three parts.

    The published training file is complete. If only its positives are available, negatives are
    drawn once, as its authors did: for a positive's user and context, uniformly drawn apps that the
    user never opened, also not in validation and test. Training rows are in random order, so that
    the rows before a row reveal nothing about it.
    """
    train = _train(files)
    if not (train["label"] == 0).any():
        train = pl.concat([train, _drawn(train, files)])
        train = train[np.random.default_rng(_SEED).permutation(len(train))]
    return _tables(train, files)


def _tables(train: pl.DataFrame, files: Files) -> Tables:
    validation, test = (_rows(files, name) for name in CTR_FILES[1:])
    parts = [(train, TRAIN), (validation, VALIDATION), (test, TEST)]
    return Tables(events=_in_parts(parts), labels=("label",), context=CONTEXT)


def _train(files: Files) -> pl.DataFrame:
    return _rows(files, CTR_FILES[0] if files.has(CTR_FILES[0]) else _DERIVED)


def _rows(files: Files, name: str) -> pl.DataFrame:
    """Read lines `label feature:1 feature:1 …`; every feature becomes a column."""
    names = ("label", "user", "item", *CONTEXT)
    table = pl.read_csv(
        files.read(name), separator=" ", has_header=False, new_columns=names, infer_schema=False
    )
    features = [
        pl.col(column).str.strip_suffix(":1").cast(pl.Int64) - first
        for column, first in zip(names[1:], _FIRST, strict=True)
    ]
    return table.select(*features, label=(pl.col("label").cast(pl.Int64) > 0).cast(pl.Int64))


def _drawn(train: pl.DataFrame, files: Files) -> pl.DataFrame:
    """Return negatives for the users and contexts of positives."""
    held_out = pl.concat([_rows(files, name) for name in CTR_FILES[1:]])
    used = pl.concat([train, held_out.filter(pl.col("label") == 1)]).select("user", "item").unique()
    generator = np.random.default_rng(_SEED)
    rows = np.sort(generator.permutation(np.repeat(np.arange(len(train)), 2))[:_NUM_NEGATIVES])
    user, num_items = train["user"].to_numpy()[rows], _FIRST[2] - _FIRST[1]
    used_key = np.sort(used["user"].to_numpy() * num_items + used["item"].to_numpy())
    item = generator.integers(0, num_items, len(rows))
    while (again := np.flatnonzero(np.isin(user * num_items + item, used_key))).size:
        item[again] = generator.integers(0, num_items, len(again))
    return train[rows].with_columns(pl.Series("item", item), label=pl.lit(0, dtype=pl.Int64))


def read_retailrocket(files: Files) -> Tables:
    """Read the pairs that were viewed, with labels `cart` and `buy`, and with times.

    A pair's time is its earliest time in the three training matrices, so a label never precedes its
    row. Pairs that were carted or bought and never viewed are left out, and so are the test's
    purchases, one per user. The matrices come from the published repository, converted from pickles
    with `scipy.sparse.save_npz`.
    """
    viewed, carted, bought = (_acts(files, name) for name in ("view", "cart", "buy"))
    rows = viewed.join(carted, on=("user", "item"), how="left").join(
        bought, on=("user", "item"), how="left"
    )
    events = rows.select(
        "user",
        "item",
        timestamp=pl.min_horizontal("view", "cart", "buy"),
        cart=pl.col("cart").is_not_null().cast(pl.Int64),
        buy=pl.col("buy").is_not_null().cast(pl.Int64),
    )
    return Tables(events=events.sort("timestamp", "user", "item"), labels=("cart", "buy"))


def read_retailrocket_buys(files: Files) -> Tables:
    """Read all pairs as part 0, and each user's last known and published purchase (parts 1, 2).

    Part 2 holds the test's purchases, one per user; no matrix has their pairs, and their times are
    unknown. Part 1 holds, in the same form, the last known purchase of each user with two or more.
    Rows are ordered by their earliest known time, the test last. A pair that was bought counts as
    carted.
    """
    viewed, carted, bought = (_acts(files, name) for name in ("view", "cart", "buy"))
    pairs = viewed.join(carted, on=("user", "item"), how="full", coalesce=True).join(
        bought, on=("user", "item"), how="full", coalesce=True
    )
    times_bought, has_buy = pl.col("buy").count().over("user"), pl.col("buy").is_not_null()
    is_last = has_buy & (pl.col("buy").rank("ordinal", descending=True).over("user") == 1)
    known = pairs.sort(pl.min_horizontal("view", "cart", "buy"), "user", "item").select(
        "user",
        "item",
        part=(is_last & (times_bought > 1)).cast(pl.UInt8),
        cart=(pl.col("cart").is_not_null() | has_buy).cast(pl.Int64),
        buy=has_buy.cast(pl.Int64),
    )
    given = _cells(files, "test_mat").with_columns(
        part=pl.lit(2, pl.UInt8), cart=pl.lit(1, pl.Int64), buy=pl.lit(1, pl.Int64)
    )
    events = pl.concat([known, given.select(known.columns)])
    return Tables(events=events, labels=("cart", "buy"))


def _acts(files: Files, name: str) -> pl.DataFrame:
    return _cells(files, f"train_mat_{name}").rename({"value": name})


def _cells(files: Files, name: str) -> pl.DataFrame:
    """Return the entries of a sparse matrix as `user`, `item` and `value`."""
    matrix = sparse.load_npz(io.BytesIO(files.read(f"{name}.derived.npz"))).tocoo()
    cells = {"user": matrix.row, "item": matrix.col, "value": matrix.data}
    return pl.DataFrame(cells).cast(pl.Int64)

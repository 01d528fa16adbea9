"""Readers of public data sets for ranking items: MovieLens, Amazon, Gowalla, Last.fm, TikTok.

Each takes a set's files and gives its tables; the registry says where the files can be had.
"""

import io
import json
from collections.abc import Sequence

import numpy as np
import polars as pl

from foretaste.data.sources.files import Files, Tables
from foretaste.data.splits import NEGATIVE, TEST, TRAIN
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
    "unknown",
    "Action",
    "Adventure",
    "Animation",
    "Children's",
    "Comedy",
    "Crime",
    "Documentary",
    "Drama",
    "Fantasy",
    "Film-Noir",
    "Horror",
    "Musical",
    "Mystery",
    "Romance",
    "Sci-Fi",
    "Thriller",
    "War",
    "Western",
)


def read_ml_100k(files: Files) -> Tables:
    """Read the archive's `u.data`, `u.item` and `u.user`, or RecBole's files of the same."""
    if not files.has("u.data"):
        return _read_recbole_100k(files)
    columns = ("item", "title", "date", "video_date", "address", *_GENRES_100K)
    items = _table(files.text("u.item"), "|", columns).select(
        "item",
        *_title_and_year(),
        genres=pl.concat_list(
            pl.when(pl.col(genre) == "1").then(pl.lit(genre)) for genre in _GENRES_100K
        ).list.drop_nulls(),
    )
    return Tables(
        events=_table(files.text("u.data"), "\t", _RATING),
        users=_table(files.text("u.user"), "|", _USER_100K),
        items=items,
    )


def _read_recbole_100k(files: Files) -> Tables:
    """Read `ml-100k.inter`, `.item` and `.user`: the same, under a header of `name:type`."""
    items = _table(_body(files.text("ml-100k.item")), "\t", ("item", "title", "year", "genres"))
    return Tables(
        events=_table(_body(files.text("ml-100k.inter")), "\t", _RATING),
        users=_table(_body(files.text("ml-100k.user")), "\t", _USER_100K),
        items=items.with_columns(
            pl.col("year").cast(pl.Int64, strict=False), pl.col("genres").str.split(" ")
        ),
    )


def read_ml_1m(files: Files) -> Tables:
    """Read `ratings.dat`, `movies.dat` and `users.dat`, whose fields stand between `::`."""
    return Tables(
        events=_table(_tabs(files.text("ratings.dat")), "\t", _RATING),
        users=_users_1m(files),
        items=_movies_1m(files),
    )


def read_ml_1m_sequences(files: Files) -> Tables:
    """Read the `ml-1m.txt` of SASRec; what the movies are called is joined where it is there."""
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
    return _described(_table(_tabs(files.text("movies.dat")), "\t", ("item", "title", "genres")))


def _users_1m(files: Files) -> pl.DataFrame:
    """Age is the lower end of its group, occupation a number as in the data set's README."""
    columns = ("user", "gender", "age", "occupation", "zip_code")
    users = _table(_tabs(files.text("users.dat")), "\t", columns)
    return users.with_columns(pl.col("occupation").cast(pl.Int64))


def _described(movies: pl.DataFrame) -> pl.DataFrame:
    """Part titles from years, and genres from each other."""
    genres = pl.col("genres")
    none = pl.lit([], dtype=pl.List(pl.String))
    return movies.select(
        "item",
        *_title_and_year(),
        genres=pl.when(genres == "(no genres listed)").then(none).otherwise(genres.str.split("|")),
    )


def _title_and_year() -> tuple[pl.Expr, pl.Expr]:
    """Part "Toy Story (1995)" into "Toy Story" and 1995."""
    form = r"^(.*?)\s*\((\d{4})\)\s*$"
    title = pl.col("title")
    return (
        pl.coalesce(title.str.extract(form, 1), title.str.strip_chars()).alias("title"),
        title.str.extract(form, 2).cast(pl.Int64).alias("year"),
    )


def _tabs(text: str) -> str:
    return text.replace("::", "\t")


def _body(text: str) -> str:
    return text.split("\n", 1)[1]


def _table(text: str, separator: str, columns: Sequence[str]) -> pl.DataFrame:
    return pl.read_csv(
        io.BytesIO(text.encode()),
        separator=separator,
        has_header=False,
        quote_char=None,
        schema={name: _TYPES.get(name, pl.String) for name in columns},
        truncate_ragged_lines=True,
    )


_PAIR = pl.Schema({"user": pl.Int64, "item": pl.Int64})


def read_ncf(files: Files) -> Tables:
    """Read training pairs, test pairs, and the lists of negatives, sorted: no order is kept.

    156 users have their test item among their negatives too; it is then counted once.
    """
    train = "ml-1m.train.rating"
    train = train if files.has(train) else "ml-1m.train.derived.txt"
    parts = [
        (_pairs(files, train), TRAIN),
        (_pairs(files, "ml-1m.test.rating"), TEST),
        (_negatives(files), NEGATIVE),
    ]
    events = [pairs.with_columns(part=pl.lit(code, dtype=pl.UInt8)) for pairs, code in parts]
    return Tables(events=pl.concat(events).sort("part", "user", "item"))


def _pairs(files: Files, name: str) -> pl.DataFrame:
    table = pl.read_csv(files.read(name), separator="\t", has_header=False)
    return table.select(pl.nth(0).alias("user"), pl.nth(1).alias("item")).cast(_PAIR)


def _negatives(files: Files) -> pl.DataFrame:
    """Read lines `(user,item)`, then items, between tabs."""
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
            schema={"user": pl.Int64, "item": pl.Int64},
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
    """Read `NAME.txt` and, into a list column, `NAME_item2attributes.json` where it is there.

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
    """Read `train.txt` and `test.txt` of LightGCN as parts 0 and 2, sorted: no order is known.

    He et al., "LightGCN", SIGIR 2020, https://arxiv.org/abs/2002.02126
    """
    train = "train.txt" if files.has("train.txt") else "train.derived.txt"
    parts = [
        read_rows(files, name).events.with_columns(part=pl.lit(code, dtype=pl.UInt8))
        for name, code in ((train, 0), ("test.txt", 2))
    ]
    return Tables(events=pl.concat(parts).sort("part", "user", "item"))


def read_amazon(files: Files, name: str) -> Tables:
    """Read a 5-core file of Amazon reviews: one JSON object a line.

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


SOCIAL_FILES = ("train_set.txt", "test_set.txt", "trust.txt")


def read_social(files: Files) -> Tables:
    """Read the training and test sets as parts 0 and 2, sorted as no order is known, and trust."""
    parts = [
        pl.read_csv(files.read(name), schema={"user": pl.Int64, "item": pl.Int64}).with_columns(
            part=pl.lit(code, dtype=pl.UInt8)
        )
        for name, code in (("train_set.txt", 0), ("test_set.txt", 2))
    ]
    trust = pl.read_csv(files.read("trust.txt"), schema={"user": pl.Int64, "friend": pl.Int64})
    return Tables(events=pl.concat(parts).sort("part", "user", "item"), user_links=trust)


def read_ciao_ratings(files: Files) -> Tables:
    """Read Ciao's ratings with their day, how helpful others found each, and who trusts whom.

    34 reviews without a rating (0 of 5 stars) are left out. An item is of one category; 101 stand
    under several, and the first is taken. Both files are matrices of MATLAB.
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


_PARTS = {"trnMat": 0, "valMat": 1, "tstMat": 2}
_VECTORS = ("image", "audio")


def read_tiktok(files: Files) -> Tables:
    """Read three user-item matrices as parts 0, 1 and 2, sorted: no order is known.

    Items have an `image` and an `audio` vector of 128 numbers; the published text vectors are
    not among the files. The matrices are those of DiffMM's repository, saved again by
    `scipy.sparse.save_npz` from the pickles that they are there.

    Jiang et al., "DiffMM: Multi-Modal Diffusion Model for Recommendation", MM 2024,
    https://arxiv.org/abs/2406.11781
    """
    parts = [_events(files, f"{name}.derived.npz", code) for name, code in _PARTS.items()]
    vectors = {name: np.load(io.BytesIO(files.read(f"{name}_feat.npy"))) for name in _VECTORS}
    items = pl.DataFrame({"item": np.arange(len(vectors["image"]), dtype=np.int64)}).with_columns(
        pl.Series(name, value.astype(np.float32), dtype=pl.Array(pl.Float32, value.shape[1]))
        for name, value in vectors.items()
    )
    return Tables(events=pl.concat(parts).sort("part", "user", "item"), items=items)


def _events(files: Files, name: str, code: int) -> pl.DataFrame:
    matrix = sparse.load_npz(io.BytesIO(files.read(name))).tocoo()
    return pl.DataFrame(
        {"user": matrix.row.astype(np.int64), "item": matrix.col.astype(np.int64)}
    ).with_columns(part=pl.lit(code, dtype=pl.UInt8))

"""The MovieLens data sets of GroupLens, and files that others made of them.

Harper and Konstan, "The MovieLens Datasets: History and Context", TiiS 2015,
https://doi.org/10.1145/2827872
"""

import io
from collections.abc import Sequence

import polars as pl

from foretaste.data.sources.files import Files
from foretaste.data.sources.sequences import read_pairs
from foretaste.data.sources.tables import Tables

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

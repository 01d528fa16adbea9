"""Readers of public data sets of labelled rows: Adult, Frappe and Retailrocket."""

import io

import numpy as np
import polars as pl

from foretaste.data.sources.files import Files, Tables
from foretaste.data.splits import TEST, TRAIN, VALIDATION
from foretaste.later import later

sparse = later("scipy.sparse")

ADULT_FILES = ("adult.data", "adult.test")
_NUMBERS = ("age", "fnlwgt", "education_num", "capital_gain", "capital_loss", "hours_per_week")
_COLUMNS = (
    "age",
    "workclass",
    "fnlwgt",
    "education",
    "education_num",
    "marital_status",
    "occupation",
    "relationship",
    "race",
    "sex",
    "capital_gain",
    "capital_loss",
    "hours_per_week",
    "native_country",
    "income",
)
_LEFT_OUT = ("marital_status", "relationship", "income")


def read_adult(files: Files) -> Tables:
    """Read training and test as parts 0 and 2, with labels `income` and `never_married`.

    Income is 1 above 50,000 dollars. The marital status and the relationship in the household are
    no features, as either gives the second label away. A question mark is a missing value.
    """
    parts = [
        _people(files, name).with_columns(part=pl.lit(code, dtype=pl.UInt8))
        for name, code in zip(ADULT_FILES, (TRAIN, TEST), strict=True)
    ]
    context = tuple(name for name in _COLUMNS if name not in _LEFT_OUT)
    return Tables(events=pl.concat(parts), labels=("income", "never_married"), context=context)


def _people(files: Files, name: str) -> pl.DataFrame:
    """Read lines of values between commas, but for empty ones and the test file's first."""
    lines = [line for line in files.text(name).splitlines() if line.count(",") > 1]
    table = pl.read_csv(
        "\n".join(lines).encode(),
        has_header=False,
        new_columns=_COLUMNS,
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
CONTEXT = (
    "daytime",
    "weekday",
    "isweekend",
    "homework",
    "cost",
    "weather",
    "country",
    "city",
)
_FIRST = (0, 957, 5039, 5046, 5053, 5055, 5058, 5060, 5069, 5149)
"""The first feature of each column of a row: user, item, and the context."""
_DERIVED = "train-positives.derived.libfm"
_NUM_NEGATIVES = 134_423  # of the published training file
_SEED = 0


def read_frappe(files: Files) -> Tables:
    """Read `frappe.csv`, with the number of uses as label `count`, and `meta.csv`.

    Each row is one user and app in one context; there are no times, so the file's order stands.
    "unknown" is kept in the context, where it is a place like others, and missing of an app.
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
    """Read what was used as training, and labelled validation and test rows, of which a third was.

    The negatives of training are left to be drawn anew for each epoch. Context values are the
    numbers of the rows' features, in order of first appearance in `frappe.csv`.
    """
    return _tables(_train(files).filter(pl.col("label") == 1), files)


def read_frappe_rows(files: Files) -> Tables:
    """Read labelled rows in all three parts.

    The training file is published whole; where only its positives are at hand, its negatives are
    drawn once, as its authors did: for a positive's user and context, apps that the user never
    opened, all alike. They look at validation and test for that, and so does this. The rows of
    training are put in random order, so that what stands before a row tells nothing of it.
    """
    train = _train(files)
    if not (train["label"] == 0).any():
        train = pl.concat([train, _drawn(train, files)])
        train = train[np.random.default_rng(_SEED).permutation(len(train))]
    return _tables(train, files)


def _tables(train: pl.DataFrame, files: Files) -> Tables:
    validation, test = (_rows(files, name) for name in CTR_FILES[1:])
    parts = ((train, TRAIN), (validation, VALIDATION), (test, TEST))
    events = [rows.with_columns(part=pl.lit(code, dtype=pl.UInt8)) for rows, code in parts]
    return Tables(events=pl.concat(events), labels=("label",), context=CONTEXT)


def _train(files: Files) -> pl.DataFrame:
    return _rows(files, CTR_FILES[0] if files.has(CTR_FILES[0]) else _DERIVED)


def _rows(files: Files, name: str) -> pl.DataFrame:
    """Read lines `label feature:1 feature:1 …`, of which every feature has a column of its own."""
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

    A pair's time is the earliest that the three training matrices have of it, so that a label lies
    at or after its row. Pairs that were carted or bought and never viewed are left out, and so are
    the test's purchases, one of each user, which no row holds. The matrices are those of the
    repository, saved again by `scipy.sparse.save_npz` from the pickles that they are there.
    """
    viewed, carted, bought = (_pairs(files, name) for name in ("view", "cart", "buy"))
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
    """Read all pairs as part 0, and what each user bought last, known (part 1) and given (part 2).

    Part 2 is the test's purchases, one of each user; no matrix has their pairs, and nobody says
    when they were. As if they were the test, part 1 holds the last known purchase of each user with
    two or more. Rows are in the order of the earliest time that is known of them, the test last. A
    pair that was bought counts as carted.
    """
    viewed, carted, bought = (_pairs(files, name) for name in ("view", "cart", "buy"))
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
    given = _cells(files, "test_mat", "buy").with_columns(
        part=pl.lit(2, pl.UInt8), cart=pl.lit(1, pl.Int64), buy=pl.lit(1, pl.Int64)
    )
    events = pl.concat([known, given.select(known.columns)])
    return Tables(events=events, labels=("cart", "buy"))


def _pairs(files: Files, name: str) -> pl.DataFrame:
    return _cells(files, f"train_mat_{name}", name)


def _cells(files: Files, file: str, name: str) -> pl.DataFrame:
    matrix = sparse.load_npz(io.BytesIO(files.read(f"{file}.derived.npz"))).tocoo()
    pairs = {"user": matrix.row, "item": matrix.col, name: matrix.data}
    return pl.DataFrame(pairs).cast(pl.Int64)

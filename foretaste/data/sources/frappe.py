"""Frappe: which app somebody opened, in which context; as published, and as click-through rows.

Baltrunas, Church, Karatzoglou and Oliver, "Frappe: Understanding the Usage and Perception of
Mobile App Recommendations In-The-Wild", 2015, https://arxiv.org/abs/1505.03014. The split and the
form of the rows are those of He and Chua, "Neural Factorization Machines for Sparse Predictive
Analytics", SIGIR 2017, https://arxiv.org/abs/1708.05027.
"""

import numpy as np
import polars as pl

from foretaste.data.parts import TEST, TRAIN, VALIDATION
from foretaste.data.sources.files import Files
from foretaste.data.sources.tables import Tables

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

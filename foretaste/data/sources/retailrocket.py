"""Retailrocket: what somebody viewed in a shop, and whether it went into the cart and was bought.

Retailrocket recommender system dataset, 2015; the users and items are those of Wei et al.,
"Contrastive Meta Learning with Behavior Multiplicity for Recommendation", WSDM 2022,
https://arxiv.org/abs/2202.08523, from the repository of SSLRec.
"""

import io

import polars as pl
from scipy import sparse

from foretaste.data.sources.files import Files
from foretaste.data.sources.tables import Tables


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

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


def _pairs(files: Files, name: str) -> pl.DataFrame:
    matrix = sparse.load_npz(io.BytesIO(files.read(f"train_mat_{name}.derived.npz"))).tocoo()
    pairs = {"user": matrix.row, "item": matrix.col, name: matrix.data}
    return pl.DataFrame(pairs).cast(pl.Int64)

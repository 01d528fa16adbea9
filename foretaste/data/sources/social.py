"""Data sets with trust or friendship between users, in the split of SocialLGN.

Liao, Zhou, Luo et al., "SocialLGN: Light graph convolution network for social recommendation",
Information Sciences 2022, https://doi.org/10.1016/j.ins.2022.01.001
"""

import io

import polars as pl
from scipy.io import loadmat

from foretaste.data.sources.files import Files
from foretaste.data.sources.tables import Tables

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
    table = loadmat(io.BytesIO(files.read("rating_with_timestamp.mat")))["rating"]
    names = ("user", "item", "category", "rating", "helpfulness", "timestamp")
    ratings = pl.DataFrame(table, schema=names).cast(pl.Int64).filter(pl.col("rating") > 0)
    trust = loadmat(io.BytesIO(files.read("trust.mat")))["trust"]
    return Tables(
        events=ratings.drop("category").cast({"rating": pl.Float64}),
        items=ratings.select("item", "category").unique("item", keep="first", maintain_order=True),
        user_links=pl.DataFrame(trust, schema=("user", "friend")).cast(pl.Int64),
        labels=("helpfulness",),
    )

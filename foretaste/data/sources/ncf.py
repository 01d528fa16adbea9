"""MovieLens-1M as the authors of NCF cut it: each user's last item, and 99 listed negatives.

He et al., "Neural Collaborative Filtering", WWW 2017, https://arxiv.org/abs/1708.05031
"""

import polars as pl

from foretaste.data.parts import NEGATIVE, TEST, TRAIN
from foretaste.data.sources.files import Files
from foretaste.data.sources.tables import Tables

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

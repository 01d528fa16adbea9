"""Benchmarks of sequential recommendation: orders per user without times or ratings."""

import json

import polars as pl

from foretaste.data.sources.files import Files
from foretaste.data.sources.tables import Tables


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

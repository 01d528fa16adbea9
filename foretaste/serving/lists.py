"""The answers for many users as one table.

Shape legend: B users, K list length.
"""

from collections.abc import Sequence

import numpy as np
import polars as pl
from jaxtyping import Shaped

from foretaste.data.interactions import Interactions
from foretaste.data.vocabulary import INT64
from foretaste.retrieval.index import TopK


def lists_table(
    events: Interactions,
    user_ids: Sequence[int | str],
    source_B: Shaped[np.ndarray, " B"],
    best: TopK,
) -> pl.DataFrame:
    """Return one row per user, in order: `user_id`, `source`, and the lists `item_id`, `score`.

    Args:
        events: Its vocabulary names the items.
        user_ids: They stay integers if all are, and become text otherwise.
        source_B: Where each list came from, such as "model".
        best: Padded with -1, which the lists leave out.
    """
    item_BK = best.item_BK.numpy()
    found_BK = item_BK >= 0
    rows = pl.DataFrame(
        {
            "row": np.repeat(np.arange(len(item_BK)), found_BK.sum(axis=1)),
            "item_id": events.items.ids.gather(item_BK[found_BK]),
            "score": best.score_BK.numpy()[found_BK],
        }
    )
    lists = rows.group_by("row", maintain_order=True).agg("item_id", "score")
    users = pl.DataFrame(
        {
            "row": np.arange(len(item_BK)),
            "user_id": _series(user_ids, is_integer=events.users.is_integer),
            "source": pl.Series(source_B.tolist(), dtype=pl.String),
        }
    )
    filled = [pl.col(name).fill_null([]) for name in ("item_id", "score")]
    joined = users.join(lists, on="row", how="left", maintain_order="left")
    return joined.with_columns(filled).drop("row")


def _series(user_ids: Sequence[int | str], *, is_integer: bool) -> pl.Series:
    """Return ids as integers if all are; without any, as the vocabulary has them."""
    whole = all(isinstance(user_id, int) and user_id in INT64 for user_id in user_ids)
    if whole and (user_ids or is_integer):
        return pl.Series(user_ids, dtype=pl.Int64)
    return pl.Series([str(user_id) for user_id in user_ids], dtype=pl.String)

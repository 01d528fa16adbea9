"""The answers for many users as one table.

Shape legend: B users, K list length.
"""

from collections.abc import Sequence

import numpy as np
import polars as pl
from jaxtyping import Shaped

from foretaste.data.interactions import Interactions
from foretaste.retrieval.index import TopK


def lists_table(
    events: Interactions,
    user_ids: Sequence[object] | pl.Series,
    source_B: Shaped[np.ndarray, " B"],
    best: TopK,
) -> pl.DataFrame:
    """Return one row per user, in order: `user_id`, `source`, and the lists `item_id`, `score`.

    Args:
        events: Its vocabulary names the items.
        user_ids: As they were asked for; they become integers if all are, and text otherwise.
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
            "user_id": _series(user_ids),
            "source": pl.Series(source_B.tolist(), dtype=pl.String),
        }
    )
    filled = [pl.col(name).fill_null([]) for name in ("item_id", "score")]
    joined = users.join(lists, on="row", how="left", maintain_order="left")
    return joined.with_columns(filled).drop("row")


def _series(user_ids: Sequence[object] | pl.Series) -> pl.Series:
    if isinstance(user_ids, pl.Series):
        return user_ids.cast(pl.Int64 if user_ids.dtype.is_integer() else pl.String)
    if all(isinstance(user_id, int | np.integer) for user_id in user_ids):
        return pl.Series([int(str(user_id)) for user_id in user_ids], dtype=pl.Int64)
    return pl.Series([str(user_id) for user_id in user_ids], dtype=pl.String)

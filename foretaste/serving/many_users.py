"""The best items of many users at once, block by block, and the table of their lists.

Shape legend: B users, b users of a block, K list length, X exclusions.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import polars as pl
import torch
from jaxtyping import Int64, Shaped

from foretaste.data.batch import Queries
from foretaste.data.interactions import Interactions
from foretaste.data.vocabulary import INT64
from foretaste.retrieval.index import TopK, padded
from foretaste.serving.catalogue_search import Best, CatalogueSearch
from foretaste.serving.histories import blocks, training_histories
from foretaste.serving.profiles import Profiles
from foretaste.serving.rule_book import RuleBook
from foretaste.serving.rules import Rules


def best_of_users(
    search: CatalogueSearch,
    book: RuleBook,
    profiles: Profiles,
    events: Interactions,
    user_B: Int64[np.ndarray, " B"],
    k: int,
    *,
    rules: Rules,
    exclude_seen: bool,
) -> tuple[Shaped[np.ndarray, " B"], TopK]:
    """Return where each user's list of k came from, such as "model", and the lists, -1 padded.

    Args:
        search: Finds candidates.
        book: Applies the rules to them.
        profiles: Says who is answered by the table of users, for want of a history.
        events: Histories, as training saw them.
        user_B: user_idx; -1, and those of whom nothing is known, get the most popular items.
        k: At most as many as are ranked.
        rules: Checked already.
        exclude_seen: Leave out what stands in a history.
    """
    allow_I = book.allowed(rules, None)
    nothing = np.empty(0, dtype=np.int64)

    def find_known(user_b: Int64[np.ndarray, " b"], num: int) -> Best:
        queries, seen_bX = training_histories(events, user_b)
        exclude_bX = seen_bX if exclude_seen else seen_bX[:, :0]
        return search.best(queries, num, exclude_BX=exclude_bX, allow_I=allow_I)

    def find_told(user_b: Int64[np.ndarray, " b"], num: int) -> Best:
        nobody = Queries.of_histories([[]] * len(user_b))
        queries = replace(nobody, profile=profiles.of_rows(user_b))
        nothing_bX = torch.empty((len(user_b), 0), dtype=torch.int64)
        return search.best(queries, num, exclude_BX=nothing_bX, allow_I=allow_I)

    def find_popular(num: int) -> Best:
        return Best(search.most_popular(num, exclude=nothing, allow_I=allow_I), {})

    popular = padded(book.choose(rules, k, find_popular).top, k)
    item_BK = popular.item_BK.repeat(len(user_B), 1)
    score_BK = popular.score_BK.repeat(len(user_B), 1)
    is_known_B = (user_B >= 0) & (np.diff(events.offsets)[user_B] > 0)
    is_learned_B = ~is_known_B & search.knows(user_B)
    is_found_B = is_learned_B & search.finds_for(user_B)
    is_told_B = ~is_known_B & ~is_learned_B & profiles.known(user_B)
    width = book.at_first(rules, k)
    for is_asked_B, find in (
        (is_known_B, find_known),
        (is_found_B, find_known),  # apart: no row of a block has a history then
        (is_learned_B & ~is_found_B, find_known),
        (is_told_B, find_told),
    ):
        asked = np.flatnonzero(is_asked_B)
        for block in blocks(events, user_B[asked], scores_per_user=search.scores_per_user):
            rows = asked[block]
            found = find(user_B[rows], width).top
            if rules.reorder:
                found = _choose_each(book, rules, k, user_B[rows], found, find)
            item_BK[torch.from_numpy(rows)], score_BK[torch.from_numpy(rows)] = found
    source_B = np.select([is_known_B | is_learned_B, is_told_B], ["model", "features"], "popular")
    return source_B, TopK(item_BK=item_BK, score_BK=score_BK)


def _choose_each(
    book: RuleBook,
    rules: Rules,
    k: int,
    user_B: Int64[np.ndarray, " B"],
    found: TopK,
    find: Callable[[np.ndarray, int], Best],
) -> TopK:
    """Choose each user's list from their row; where it gives too few, find more for them."""

    def of_one(row: int, num: int) -> Best:
        if num > found.item_BK.shape[1]:
            return find(user_B[row : row + 1], num)
        return Best(TopK(*(part_BC[row : row + 1, :num] for part_BC in found)), {})

    chosen = [
        padded(book.choose(rules, k, partial(of_one, row)).top, k) for row in range(len(user_B))
    ]
    return TopK(*(torch.cat(part) for part in zip(*chosen, strict=True)))


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

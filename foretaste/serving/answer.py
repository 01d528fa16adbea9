"""Answers of a recommender: rows with external ids, their sources and notes; and the lists of many
users, computed in blocks.

Shape legend: B users, b users of a block, K list length, X exclusions.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

import numpy as np
import polars as pl
import torch
from jaxtyping import Int64, Shaped

from foretaste.config import shown
from foretaste.data.batch import Queries
from foretaste.data.interactions import Interactions
from foretaste.data.tasks import Weights
from foretaste.data.vocabulary import INT64, Vocabulary, plain_id
from foretaste.errors import DataError, did_you_mean
from foretaste.models.base import TopK, padded
from foretaste.serving.catalogue_search import (
    Best,
    CatalogueSearch,
    Stage,
    blocks,
    training_histories,
)
from foretaste.serving.profiles import KnownItems, NewItems, Profiles
from foretaste.serving.rule_book import RuleBook
from foretaste.serving.rules import Rules
from foretaste.shown import Shown

Source = Literal["model", "fold-in", "features", "popular"]
"""The source of a row. "model": a user (or, for similar items, an item) in the training data;
"fold-in": the history of a new user; "features": a profile, or the features of a new item;
"popular": the most popular items, for a user without history and profile."""


TITLE_COLUMNS = (
    *("title", "name", "item_title", "item_name", "movie_title", "book_title"),
    *("product_title", "product_name", "track_name", "headline"),
)


def title_column(columns: Iterable[str]) -> str | None:
    """Return the column of titles: the first of `TITLE_COLUMNS` that exists, ignoring case.

    Args:
        columns: Columns of the item table with one value per item.
    """
    by_name = {name.casefold(): name for name in reversed(list(columns))}
    return next((by_name[name] for name in TITLE_COLUMNS if name in by_name), None)


@dataclass(frozen=True, slots=True)
class Recommendation:
    """One row of an answer."""

    item_id: int | str
    score: float
    """Higher is better; scores are comparable within one answer only."""
    source: Source
    attributes: Mapping[str, object] = field(default_factory=dict)
    """The item's row of the item table, such as its `title`; empty if there is no table."""
    predictions: Mapping[str, float] = field(default_factory=dict)
    """A ranker's predictions by the task's name: a probability, a value in the label's own unit, or
    the expected level. Probabilities are calibrated if the model has a calibration, which does not
    affect the order. Empty for a model without tasks, and for items that were not ranked."""

    @property
    def title(self) -> str:
        """The item's title, if its table has one; else empty."""
        one_value = {n: v for n, v in self.attributes.items() if not isinstance(v, list)}
        column = title_column(one_value)
        value = None if column is None else self.attributes[column]
        return "" if value is None else str(value)


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Answer(Shown):
    """The rows for one user or item, best first."""

    rows: tuple[Recommendation, ...]
    source: Source
    unknown_items: tuple[object, ...] = ()
    """Item ids of the request that are not in the training data; they had no influence."""
    user_known: bool = False
    """Whether the user has a training event."""
    notes: tuple[str, ...] = ()
    """Remarks on this answer, in sentences."""
    seconds: Mapping[Stage, float] = field(default_factory=dict, compare=False)
    """The time of each stage."""

    def _facts(self) -> dict[str, object]:
        ids = ", ".join(repr(row.item_id) for row in self.rows[:5])
        more = ", …" if len(self.rows) > 5 else ""
        return {"rows": len(self.rows), "from": self.source, "item_ids": f"[{ids}{more}]"}

    def _rows(self) -> list[tuple[object, ...]]:
        rows = [
            (str(place), str(row.item_id), row.title, row.score, row.source)
            for place, row in enumerate(self.rows, 1)
        ]
        return [("", "item_id", "title", "score", "source"), *rows]


def answer_rows(
    best: Best, source: Source, items: KnownItems, new: NewItems | None = None
) -> tuple[Recommendation, ...]:
    """Return one row for each item found, best first.

    Args:
        best: One list, padded with -1.
        source: The source of items of the catalogue; that of new items is their features.
        items: The catalogue.
        new: The new items, which follow the catalogue's.
    """
    item_idx = [item for item in best.top.item_BK[0].tolist() if item >= 0]
    score = best.top.score_BK[0].tolist()
    old = [item for item in item_idx if item < items.num_items]
    shown: dict[int, tuple[int | str, Mapping[str, object], Source]] = {
        item: (item_id, attributes, source)
        for item, item_id, attributes in zip(
            old, items.ids_of(old), items.attributes(old), strict=True
        )
    }
    for row, (item_id, sent) in enumerate(() if new is None else new.sent.items()):
        shown[items.num_items + row] = item_id, sent, "features"
    predicted = {name: value_BK[0].tolist() for name, value_BK in best.prediction.items()}
    return tuple(
        Recommendation(
            item_id,
            score[row],
            where,
            attributes,
            {n: values[row] for n, values in predicted.items() if math.isfinite(values[row])},
        )
        for row, (item_id, attributes, where) in enumerate(shown[item] for item in item_idx)
    )


def notes(
    source: Source,
    *,
    found: int,
    k: int,
    unknown: Mapping[int | str, None],
    stranger: object = None,
) -> tuple[str, ...]:
    """Return notes on unknown ids, on a list of popular items, and on a short list.

    Args:
        source: The source of the answer.
        found: Number of items in the answer.
        k: Number of items in the request.
        unknown: Unknown ids of items.
        stranger: The id of an unknown user.
    """
    said = [] if stranger is None else [f"user {stranger!r} is not in the training data"]
    if unknown:
        some = ", ".join(repr(item_id) for item_id in list(unknown)[:5])
        more = ", …" if len(unknown) > 5 else ""
        what = "item id is" if len(unknown) == 1 else "item ids are"
        said.append(f"{len(unknown)} {what} not in the training data: {some}{more}")
    if source == "popular":
        said.append("the user has no history and no profile: these are the most popular items")
    if found < k:
        said.append(f"{k} items were requested, but only {found} are allowed")
    return tuple(said)


MAX_K = 1_000_000


def check_k(k: int) -> None:
    """Check a list length.

    Raises:
        DataError: It is outside of [1, 10^6].
    """
    if not 1 <= k <= MAX_K:
        raise DataError(f"k is {shown(k)}: ask for 1 to {MAX_K} items", name="k", value=k)


def check_weights(weights: Weights | None, tasks: Sequence[str]) -> None:
    """Raise an error for weights of unknown tasks, and for weights that give no order.

    Raises:
        DataError: A name is not a task's, a weight is not finite, or all weights are 0.
    """
    if weights is None:
        return
    for name, weight in weights.items():
        if name not in tasks:
            known = f"this model's are {', '.join(tasks)}" if tasks else "this model has none"
            advice = did_you_mean(name, tasks)
            raise DataError(
                f"weights: {name!r} is not a task; {known}{advice}", name="weights", value=name
            )
        if isinstance(weight, bool) or not math.isfinite(weight):
            raise DataError(
                f"weights: {name!r} is {weight!r}: give a finite number",
                name=f"weights.{name}",
                value=weight,
            )
    if not any(weights.values()):
        raise DataError(
            "weights: all are 0, so lists have no order: set one above or below 0", name="weights"
        )


def unknown_item(item_id: object, items: Vocabulary, why: Sequence[str]) -> DataError:
    """Return the error for an unknown item that cannot be embedded.

    Args:
        item_id: The unknown id.
        items: The catalogue.
        why: Why the given features had no influence; empty if none were given.
    """
    near = items.spelled_like(item_id)
    if near is not None:
        fix = f"; did you mean {near!r}?"
    elif why:
        fix = f", and its features have no value that this model reads: {'; '.join(why)}"
    else:
        fix = ": give an item of the catalogue, or the features of a new item"
    said = f"no item has the id {plain_id(item_id)!r}{fix}"
    return DataError(said, name="item_id", value=item_id)


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
    """Return the source of each user's list of k, such as "model", and the lists, padded with -1.

    Args:
        search: Finds candidates.
        book: Applies the rules to them.
        profiles: Determines which users without a history have a profile in the user table.
        events: The training events, which give the histories.
        user_B: user_idx; -1, and users without history and profile, get the most popular items.
        k: List length, at most the number of ranked items.
        rules: Rules, already checked.
        exclude_seen: Leave out the items of a user's history.
    """
    allow_I = book.allowed(rules, None)
    nothing = np.empty(0, dtype=np.int64)

    def find_known(user_b: Int64[np.ndarray, " b"], num: int) -> Best:
        queries, seen_bX = training_histories(events, user_b)
        exclude_bX = seen_bX if exclude_seen else seen_bX[:, :0]
        return search.best(queries, num, exclude_BX=exclude_bX, allow_I=allow_I)

    def find_featured(user_b: Int64[np.ndarray, " b"], num: int) -> Best:
        empty = Queries.of_histories([[]] * len(user_b))
        queries = replace(empty, profile=profiles.of_rows(user_b))
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
    has_features_B = ~is_known_B & ~is_learned_B & profiles.known(user_B)
    width = book.at_first(rules, k)
    for is_asked_B, find in (
        (is_known_B, find_known),
        (is_found_B, find_known),  # in blocks of their own, so that no row of a block has a history
        (is_learned_B & ~is_found_B, find_known),
        (has_features_B, find_featured),
    ):
        asked = np.flatnonzero(is_asked_B)
        for block in blocks(events, user_B[asked], scores_per_user=search.scores_per_user):
            rows = asked[block]
            found = find(user_B[rows], width).top
            if rules.reorder:
                found = _choose_each(book, rules, k, user_B[rows], found, find)
            item_BK[torch.from_numpy(rows)], score_BK[torch.from_numpy(rows)] = found
    source_B = np.select(
        [is_known_B | is_learned_B, has_features_B], ["model", "features"], "popular"
    )
    return source_B, TopK(item_BK=item_BK, score_BK=score_BK)


def _choose_each(
    book: RuleBook,
    rules: Rules,
    k: int,
    user_B: Int64[np.ndarray, " B"],
    found: TopK,
    find: Callable[[np.ndarray, int], Best],
) -> TopK:
    """Choose each user's list from the user's row; if too few items are left, find more."""

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
        events: The training events, whose vocabulary maps rows to item ids.
        user_ids: They stay integers if all of them are; else they become text.
        source_B: The source of each list, such as "model".
        best: The lists, padded with -1; the result omits the padding.
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
    """Return ids as integers if all of them are; without any, with the type of the vocabulary."""
    whole = all(isinstance(user_id, int) and user_id in INT64 for user_id in user_ids)
    if whole and (user_ids or is_integer):
        return pl.Series(user_ids, dtype=pl.Int64)
    return pl.Series([str(user_id) for user_id in user_ids], dtype=pl.String)

"""The recommender: from external ids to external ids, with the source of each row."""

from collections.abc import Mapping
from dataclasses import replace as with_parts
from functools import cached_property
from pathlib import Path
from typing import final

import numpy as np
import polars as pl
import torch
from torch import Tensor

from foretaste.arguments import checked
from foretaste.data.folder import check_place
from foretaste.data.tasks import Weights
from foretaste.data.vocabulary import Ids, plain_id
from foretaste.errors import ConfigError
from foretaste.models.base import Retriever, TopK
from foretaste.retrieval.choose import MEASURED_QUERIES, build_index, may_be_approximate
from foretaste.retrieval.index import IndexChoice, ItemIndex
from foretaste.serving.answer import (
    Answer,
    Source,
    answer_rows,
    best_of_users,
    check_k,
    check_weights,
    lists_table,
    notes,
    unknown_item,
)
from foretaste.serving.bundle import Bundle, read_bundle, write_bundle
from foretaste.serving.catalogue_search import (
    Best,
    CatalogueSearch,
    Stages,
    one_query,
    reasons,
    training_histories,
    training_history,
    training_times,
)
from foretaste.serving.profiles import KnownItems, NewItems, Profiles, Sent
from foretaste.serving.rule_book import RuleBook
from foretaste.serving.rules import NO_RULES, ItemLabels, Rules
from foretaste.serving.self_test import answers_of
from foretaste.shown import Shown
from foretaste.training.trained import Trained

_NONE = np.empty(0, dtype=np.int64)
_NO_ITEMS = TopK(torch.empty((1, 0), dtype=torch.int64), torch.empty((1, 0)))


@final
class Recommender(Shown):
    """A trained model with its index and histories. Thread-safe."""

    def __init__(self, bundle: Bundle) -> None:
        """Create a recommender from the contents of a bundle; see `build_recommender` and
        `load`.
        """
        self.bundle = bundle
        self._items = KnownItems(bundle.trained.events, bundle.trained.known_I.numpy())
        self._profiles = Profiles(bundle.trained)
        self._search = CatalogueSearch(
            bundle.trained, index=bundle.index, popular_I=bundle.popular_I
        )

    def __reduce__(self) -> tuple[type["Recommender"], tuple[Bundle]]:
        """Pickle the contents of the bundle; everything else is computed again."""
        return Recommender, (self.bundle,)

    @cached_property
    def item_labels(self) -> ItemLabels:
        """The item table, as rules read it."""
        events = self.trained.events
        return ItemLabels(events.item_table, num_items=events.num_items)

    @cached_property
    def _rule_book(self) -> RuleBook:
        return RuleBook(
            self.item_labels,
            vectors_of=None if self.index is None else self._search.vectors_of,
            num_items=self._items.num_known,
            at_once=self._search.at_once,
        )

    @property
    def trained(self) -> Trained:
        """The model, its vocabularies and training events."""
        return self.bundle.trained

    @property
    def index(self) -> ItemIndex | None:
        """The index of a retriever's items; None for a model that scores the whole catalogue."""
        return self.bundle.index

    @property
    def report(self) -> Mapping[str, object] | None:
        """The measured figures of the model, as JSON values."""
        return self.bundle.report

    @checked
    def ranks(self, item_id: object) -> bool:
        """Return whether the model ranks an item."""
        return self._items.ranks(self.trained.events.items.find(item_id))

    @checked
    @torch.inference_mode()
    def recommend(
        self,
        user_id: object = None,
        *,
        history: Ids | None = None,
        features: Mapping[str, object] | None = None,
        context: Mapping[str, object] | None = None,
        k: int = 10,
        exclude_seen: bool = True,
        allow: Ids | None = None,
        deny: Ids | None = None,
        new_items: Sent | None = None,
        since: int | None = None,
        weights: Weights | None = None,
        rules: Rules = NO_RULES,
    ) -> Answer:
        """Return the k best items for one user, known or not.

        A user's history is the history in training followed by `history`. Without a history, the
        model uses `features`, or the user's features in the user table, and `context`, if it reads
        any of these. Otherwise the answer is the most popular items.

        Args:
            user_id: An id, known or unknown; None for a new user.
            history: Further item ids, oldest first, such as live events.
            features: Features of a new user: column of the user table to value.
            context: Context features: column of the events' context to value. A ranker that was
                built with context features reads them.
            k: List length, in [1, 10^6]; the list is shorter if the catalogue has fewer items.
            exclude_seen: Leave out the items of the history.
            allow: Only these item ids of the catalogue may be in the list; None allows all.
            deny: Item ids of the catalogue that may not be in the list.
            new_items: Items that are not in the catalogue: id to features (column of the item table
                to value). A model that reads item features ranks them together with the catalogue.
                In a two-stage model, the ranker scores all of them, and new items that the
                retriever cannot embed get its lowest score. Items that are already in the catalogue
                are ranked as such.
            since: Unix seconds; the user's earlier training events are ignored.
            weights: Weight of each task's prediction in the score, per unit that the row shows (a
                probability, a second, a level); 0 for tasks that are not named. None: the weights
                of the model, with each prediction scaled to between 0 and 1.
            rules: Filters on attributes, caps on categories, diversity. If they leave too few
                items, more of the catalogue is searched, up to all of it. They apply to new items
                by their given values, in any column that the rules name; values that are not given
                are missing.

        Raises:
            DataError: k is out of range, a list of ids is a single text, a feature is unknown or
                of another kind, `since` is given but the events have no times, a weight names no
                task of the model, rules name a column that does not exist or has another type, or
                they ask for diversity by vectors with new items that the retriever cannot embed.
        """
        check_k(k)
        check_weights(weights, self._search.tasks)
        rule_book = self._checked_by(rules, k)
        stages = Stages()
        unknown: dict[int | str, None] = {}
        user_idx = self._user(user_id)
        past = training_history(self.trained.events, user_idx, since=since)
        extra = self._items.rows_of("history", history, unknown)
        history_idx = np.concatenate([past, extra])
        banned = self._items.rows_of("deny", deny, unknown)
        if exclude_seen:
            banned = np.concatenate([banned, history_idx])
        allow_I = None if allow is None else self._items.mask_of("allow", allow, unknown)
        if rule_book is not None:
            allow_I = rule_book.allowed(rules, allow_I)
        asker = user_idx if len(past) or self._knows(user_idx, features, since) else -1
        profile = self._profiles.of_user(features, -1 if asker >= 0 else user_idx)
        moment = self._profiles.of_moment(context)
        source: Source = "model" if asker >= 0 else "fold-in" if len(extra) else "popular"
        if source == "popular" and (profile is not None or moment is not None):
            source = "features"
        new = None if new_items is None else self._new_items(new_items, unknown)
        placed = {} if new is None else new.sent
        if source == "popular":
            unknown, new = unknown | dict.fromkeys(placed), None
        if new is not None and rule_book is not None:
            vector_RD = self._search.vectors_of_new(new.table)
            new, rule_book = rule_book.beside(new, rules, vector_RD, first=self._items.num_items)
            rule_book.check(rules, k=k)

        def find(num: int) -> Best:
            if source == "popular":
                return Best(self._search.most_popular(num, exclude=banned, allow_I=allow_I), {})
            times = training_times(self.trained.events, user_idx, since=since, more=len(extra))
            queries = one_query(asker, history_idx, times)
            return self._search.best(
                with_parts(queries, profile=profile, context=moment),
                num,
                exclude_BX=torch.from_numpy(banned).unsqueeze(0),
                allow_I=allow_I,
                new=None if new is None else new.table,
                weights=weights,
                stages=stages,
            )

        num = min(k, self._items.num_known + (0 if new is None else len(new.sent)))
        best = find(num) if rule_book is None else rule_book.choose(rules, num, find, stages)
        rows = answer_rows(best, source, self._items, new)
        user_known = asker >= 0 or len(training_history(self.trained.events, user_idx)) > 0
        stranger = None if user_known else plain_id(user_id)
        return Answer(
            rows=rows,
            source=source,
            unknown_items=tuple(unknown),
            user_known=user_known,
            notes=(
                *notes(source, found=len(rows), k=k, unknown=unknown, stranger=stranger),
                *self._profiles.without_influence(
                    "user", features, known=f"user {plain_id(user_id)!r}" if asker >= 0 else ""
                ),
                *self._profiles.about_new_items(_by_plain_id(new_items), unknown, placed),
                *self._profiles.without_influence("context", context),
            ),
            seconds=stages.seconds,
        )

    @checked
    @torch.inference_mode()
    def recommend_many(
        self,
        user_ids: Ids,
        *,
        k: int = 10,
        exclude_seen: bool = True,
        rules: Rules = NO_RULES,
    ) -> pl.DataFrame:
        """Return the k best items of many users, one row each, in the order given.

        New users are answered as in `recommend`, by their features in the user table or else by the
        most popular items; `source` says which.

        Returns:
            Columns `user_id` (integers if all of these ids are, text otherwise), `source`, and
            the lists `item_id` and `score`, best first.

        Raises:
            DataError: k is out of range, the ids are a single text, or rules name a column that
                does not exist or has another type.
        """
        check_k(k)
        self._rule_book.check(rules, k=k)
        events = self.trained.events
        plain, user_B = events.users.find_all_given(user_ids, name="user_ids")
        source_B, lists = best_of_users(
            self._search,
            self._rule_book,
            self._profiles,
            events,
            user_B,
            min(k, self._items.num_known),
            rules=rules,
            exclude_seen=exclude_seen,
        )
        return lists_table(events, plain, source_B, lists)

    @checked
    @torch.inference_mode()
    def similar(
        self, item_id: object, k: int = 10, *, features: Mapping[str, object] | None = None
    ) -> Answer:
        """Return the k items most similar to one.

        Similarity is the cosine of item vectors; a model without vectors returns its
        recommendations for a history of this item alone. A new item is embedded by its `features`,
        if the model reads any. The list is empty for an item that is only in the item table, if the
        model cannot embed it.

        Args:
            item_id: An id of the catalogue, or a new one with `features`.
            k: List length, in [1, 10^6].
            features: Features of a new item: column of the item table to value.

        Raises:
            DataError: k is out of range, a feature is unknown or has another type, or the id is
                unknown and there are no features to embed the item.
        """
        check_k(k)
        row = self._items.row_of("item_id", item_id)
        wanted = min(k, self._items.num_known)
        is_ranked = self._items.ranks(row)
        vector_D = None if is_ranked else self._profiles.item_vector(features)
        if is_ranked:
            best = self._search.similar(row, wanted)
        elif vector_D is not None:
            best = self._search.near(vector_D, wanted)
        elif row >= 0:
            best = _NO_ITEMS
        else:
            why = self._profiles.without_influence("place", features)
            raise unknown_item(item_id, self.trained.events.items, why)
        source: Source = "model" if vector_D is None else "features"
        rows = answer_rows(Best(best, {}), source, self._items)
        plain = plain_id(item_id)
        unknown = {} if is_ranked or plain is None else {plain: None}
        return Answer(
            rows=rows,
            source=source,
            unknown_items=tuple(unknown),
            notes=(
                *notes(source, found=len(rows), k=k, unknown=unknown),
                *self._profiles.without_influence(
                    "place", features, known=f"item {plain!r}" if is_ranked else ""
                ),
            ),
        )

    @checked
    def explain(self, history: Ids, item_id: object, *, user_id: object = None) -> int | str | None:
        """Return the item of a history whose removal lowers an item's score most.

        `explain_many` takes the same time for a whole list of items.
        """
        return self.explain_many(history, [item_id], user_id=user_id)[0]

    @checked
    @torch.inference_mode()
    def explain_many(
        self, history: Ids, item_ids: Ids, *, user_id: object = None
    ) -> tuple[int | str | None, ...]:
        """Return the item of the history that contributes most to each item ("because you
        watched").

        With a ranker with attention, this is the item with the largest attention weight. Otherwise
        the model scores the history with and without each distinct item of its last 50 events, in
        one batch. None if no item contributes or an id is unknown; an item is never a reason for
        itself.

        Args:
            history: Item ids, oldest first; they follow the history of `user_id` in training.
            item_ids: The items to explain.
            user_id: A user of training, or None.
        """
        extra = self._items.rows_of("history", history, {})
        past = training_history(self.trained.events, self._user(user_id))
        row_M = self._items.find("item_ids", item_ids)[1]
        reason_T = reasons(self._search, np.concatenate([past, extra]), row_M[row_M >= 0])
        reason_M = np.full(len(row_M), -1)
        reason_M[row_M >= 0] = reason_T
        return tuple(None if row < 0 else self._items.ids_of([row])[0] for row in reason_M.tolist())

    @checked
    def save(self, path: Path | str, *, replace: bool = False) -> None:
        """Write everything into a bundle, atomically.

        Args:
            path: The folder; missing parent folders are created.
            replace: Replace an existing bundle; after a failure it is unchanged.

        Raises:
            BundleError: The path exists and `replace` is false, or it is not a bundle, or the disk
                is full or not writable.
        """
        check_place(path, "bundle", replace=replace)  # before the model computes answers
        bundle = with_parts(self.bundle, answers=answers_of(self))
        write_bundle(bundle, Path(path), replace=replace)

    def _checked_by(self, rules: Rules, k: int) -> RuleBook | None:
        """Return the rule book that has checked the rules, if there are any."""
        if rules == NO_RULES:
            return None
        self._rule_book.check(rules, k=k)
        return self._rule_book

    def _user(self, user_id: object) -> int:
        users = self.trained.events.users
        return -1 if user_id is None else users.find_given(user_id, name="user_id")

    def _knows(
        self, user_idx: int, features: Mapping[str, object] | None, since: int | None
    ) -> bool:
        """Return whether a ranker can score for a user without a history; given features
        suffice.
        """
        return not features and since is None and bool(self._search.knows(np.array([user_idx]))[0])

    def _new_items(self, sent: Sent, unknown: dict[int | str, None]) -> NewItems | None:
        """Return the new items with informative features; the others are unknown."""
        plain, row_N = self._items.find("new_items", sent.keys())
        given = zip(plain, sent.values(), row_N, strict=True)
        absent = {item_id: said for item_id, said, row in given if row < 0}
        new = self._profiles.of_items(absent)
        unknown.update({i: None for i in absent if new is None or i not in new.sent})
        return new

    def _facts(self) -> dict[str, object]:
        events = self.trained.events
        return {
            "": type(self.trained.model).__name__,
            "events": len(events),
            "users": events.num_users,
            "items": events.num_items,
            "index": "none" if self.index is None else self.index.facts.kind,
        }


def _by_plain_id(given: Sent | None) -> Sent:
    return {plain_id(item_id): features for item_id, features in (given or {}).items()}


@checked
def build_recommender(
    trained: Trained,
    *,
    index: IndexChoice = "auto",
    report: Mapping[str, object] | None = None,
    fallback: Trained | None = None,
) -> Recommender:
    """Build a recommender from a trained model, with an index of its items.

    An approximate index is tuned on the vectors of training users.

    Args:
        trained: The result of training.
        index: The kind of index for a retriever's items; see `build_index`. A model without
            vectors has no index: with "auto" and "exact" it scores its whole catalogue.
        report: Measured figures to store with the recommender, as JSON values.
        fallback: A model for users without history and profile, such as popularity within a
            window; its scores for an empty history are stored. None: event counts are used.

    Raises:
        ConfigError: An index was requested for a model without vectors, or `fallback` has another
            catalogue.
        DataError: No item has a training event.
    """
    popular_I, retriever = _popularity(trained, fallback), trained.model.first_stage
    if not isinstance(retriever, Retriever):
        if index not in ("auto", "exact"):
            raise ConfigError(
                f"index is {index!r}, but {type(retriever).__name__} has no item vectors to index: "
                "use 'auto'",
                name="index",
                value=index,
            )
        return Recommender(Bundle(trained=trained, popular_I=popular_I, report=report))
    known_I, codes = trained.known_I, retriever.item_codes()
    asked = "codes" if index == "auto" and codes is not None else index
    is_measured = may_be_approximate(asked, num_items=int(known_I.sum()))
    built = build_index(
        retriever.item_blocks() if codes is None else codes,
        kind=index,
        known_I=known_I,
        seed=trained.seed,
        query_QD=_some_queries(trained, retriever) if is_measured else None,
    )
    bundle = Bundle(trained=trained, index=built, popular_I=popular_I, report=report)
    return Recommender(bundle)


@checked
def load(path: Path | str) -> Recommender:
    """Read a recommender that `save` wrote; every checksum is verified.

    Raises:
        BundleError: The bundle is missing, damaged, modified or of a newer format.
    """
    return Recommender(read_bundle(Path(path)))


def _popularity(trained: Trained, fallback: Trained | None) -> Tensor:
    events = trained.events
    if fallback is None:
        count_I = torch.from_numpy(events.item_count).float()
    elif not fallback.events.items.ids.equals(events.items.ids):
        raise ConfigError(
            "the fallback was trained on other items: train it on the same events", name="fallback"
        )
    else:
        count_I = fallback.score(one_query(-1, np.empty(0, dtype=np.int64)))[0]
    return count_I.masked_fill(~trained.known_I, -torch.inf)


@torch.inference_mode()
def _some_queries(trained: Trained, model: Retriever) -> Tensor:
    """Return the vectors of some training users, to tune an index."""
    user_U = np.flatnonzero(np.diff(trained.events.offsets))
    chosen = np.random.default_rng(trained.seed).permutation(user_U)[:MEASURED_QUERIES]
    return model.encode(training_histories(trained.events, chosen)[0]).float()

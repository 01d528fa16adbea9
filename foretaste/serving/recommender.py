"""The answer for everybody: external ids in, external ids out, and where each row came from."""

from collections.abc import Mapping, Sequence
from dataclasses import replace as with_parts
from pathlib import Path
from typing import final

import numpy as np
import polars as pl
import torch
from torch import Tensor

from foretaste.arguments import checked
from foretaste.data.folder import check_place
from foretaste.data.tasks import Weights
from foretaste.data.vocabulary import Ids, Vocabulary, plain_id
from foretaste.errors import ConfigError, DataError
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
from foretaste.serving.profiles import KnownItems, NewItems, Profiles, Told
from foretaste.serving.rule_book import RuleBook
from foretaste.serving.rules import NO_RULES, ItemLabels, Rules
from foretaste.serving.self_test import answers_of
from foretaste.shown import Shown
from foretaste.training.trained import Trained

_NONE = np.empty(0, dtype=np.int64)
_NO_ITEMS = TopK(torch.empty((1, 0), dtype=torch.int64), torch.empty((1, 0)))


@final
class Recommender(Shown):
    """A trained model with its index and histories. Safe to ask from several threads."""

    def __init__(self, bundle: Bundle) -> None:
        """Take what a bundle holds; `build_recommender` and `load` make one."""
        self.bundle = bundle
        self._items = KnownItems(bundle.trained.events, bundle.trained.known_I.numpy())
        self._profiles = Profiles(bundle.trained)
        self._search = CatalogueSearch(
            bundle.trained, index=bundle.index, popular_I=bundle.popular_I
        )
        events = bundle.trained.events
        self.item_labels = ItemLabels(events.item_table, num_items=events.num_items)
        vectors_of = None if bundle.index is None else self._search.vectors_of
        self._rule_book = RuleBook(
            self.item_labels,
            vectors_of=vectors_of,
            num_items=self._items.num_known,
            at_once=self._search.at_once,
        )

    def __reduce__(self) -> tuple[type["Recommender"], tuple[Bundle]]:
        """Pickle what the bundle holds; all else is worked out again."""
        return Recommender, (self.bundle,)

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
        """What was measured about the model, as JSON values."""
        return self.bundle.report

    @checked
    def ranks(self, item_id: object) -> bool:
        """Whether an item is in the catalogue that the model ranks."""
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
        new_items: Told | None = None,
        since: int | None = None,
        weights: Weights | None = None,
        rules: Rules = NO_RULES,
    ) -> Answer:
        """Return the k best items for one user, known or not.

        A user's history is what training saw of them and after it `history`. With a history the
        model answers; without one, it answers by `features`, or by what the table of users says of
        the user, and by `context`, if it reads any, and else the most popular items do.

        Args:
            user_id: An id, known or unknown; None for a new user.
            history: Further item ids, oldest first, such as live events.
            features: What is known of a new user: column of the user table to
                value.
            context: What is known of the moment: column of the events' context to value. A ranker
                made with such features reads it.
            k: In [1, 10^6]; the catalogue may hold fewer, and then all of it is the answer.
            exclude_seen: Leave out what stands in the history.
            allow: Of the catalogue, only these item ids may be answered; None allows all.
            deny: These item ids of the catalogue may not be answered.
            new_items: Items that the catalogue has not, from id to features: column of the item
                table to value. A model that reads features of items ranks them beside the
                catalogue; of two stages, the ranker judges them all, and a retriever that cannot
                place one gives it the lowest score that it gave. Those that the catalogue ranks
                already are left to it.
            since: Unix seconds: training events of the user before it are forgotten.
            weights: How much each task's prediction counts in the score, for each unit that the
                row shows of it (a probability, a second, a level), 0 for tasks that are not named;
                None: as the model was made, each task between 0 and 1.
            rules: Filters on attributes, caps on categories, diversity. As long as they leave too
                few, more of the catalogue is looked at, to its end. They hold for new items by
                what is told of them, which may be in any column that they name; what is not told
                is missing.

        Raises:
            DataError: k is out of range, a list of ids is a single text, a feature is unknown or
                of another kind, `since` is asked of events without times, a weight is of no task
                of the model, rules name a column that is not there or not of their kind, or ask for
                diversity by vectors beside new items that the model's retriever cannot place.
        """
        check_k(k)
        check_weights(weights, self._search.tasks)
        self._rule_book.check(rules, k=k)
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
        allow_I = self._rule_book.allowed(rules, allow_I)
        asker = user_idx if len(past) or self._knows(user_idx, features, since) else -1
        profile = self._profiles.of_user(features, -1 if asker >= 0 else user_idx)
        moment = self._profiles.of_moment(context)
        source: Source = "model" if asker >= 0 else "fold-in" if len(extra) else "popular"
        if source == "popular" and (profile is not None or moment is not None):
            source = "features"
        new = None if new_items is None else self._new_items(new_items, unknown)
        placed = {} if new is None else new.told
        if source == "popular":
            unknown, new = unknown | dict.fromkeys(placed), None
        rule_book = self._rule_book
        if new is not None and rules != NO_RULES:
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

        most = self._items.num_known + (0 if new is None else len(new.told))
        best = rule_book.choose(rules, min(k, most), find, stages)
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

        New users are answered as `recommend` does, and their source says so:
        by what the table of users says of them, or else by the most popular items.

        Returns:
            Columns `user_id` (integers if all of these ids are, text otherwise), `source`, and
            the lists `item_id` and `score`, best first.

        Raises:
            DataError: k is out of range, the ids are a single text, or rules name a column that
                is not there or not of their kind.
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
        """Return the k items most like one.

        By the cosine of their vectors; for a model without vectors, what it recommends for
        a history of this item alone. An item that training never saw is placed by its
        `features`, if the model reads any. The list of an item that stands in the item table alone,
        and that the model cannot place, is empty.

        Args:
            item_id: An id of the catalogue, or a new one with `features`.
            k: In [1, 10^6].
            features: What is known of a new item: column of the item table to value.

        Raises:
            DataError: k is out of range, a feature is unknown or of another kind, or the id is
                unknown and there are no features that place it.
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
            raise _unknown_item(item_id, self.trained.events.items, why)
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

        `explain_many` answers for a whole list of items in the same time.
        """
        return self.explain_many(history, [item_id], user_id=user_id)[0]

    @checked
    @torch.inference_mode()
    def explain_many(
        self, history: Ids, item_ids: Ids, *, user_id: object = None
    ) -> tuple[int | str | None, ...]:
        """Say for each item which item of the history speaks for it most ("because you watched").

        Of a ranker that attends, it is the item that the ranker attends to most. Else one batch of
        the model tells: the history as it is, and without each of the distinct items of its last
        50 events. None where nothing speaks for an item or an id is unknown; an item is no reason
        for itself.

        Args:
            history: Item ids, oldest first; they follow what training saw of `user_id`.
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
        """Write everything into a bundle, whole or not at all.

        Args:
            path: The folder; folders above it that are missing are made.
            replace: A bundle that is there is replaced; a failure leaves it as it was.

        Raises:
            BundleError: The path exists and `replace` is false, or it is something else than a
                bundle, or the disk is full or refuses.
        """
        check_place(path, "bundle", replace=replace)  # before the model is asked
        bundle = with_parts(self.bundle, answers=answers_of(self))
        write_bundle(bundle, Path(path), replace=replace)

    def _user(self, user_id: object) -> int:
        users = self.trained.events.users
        return -1 if user_id is None else users.find_given(user_id, name="user_id")

    def _knows(
        self, user_idx: int, features: Mapping[str, object] | None, since: int | None
    ) -> bool:
        """Return whether a ranker knows a user without a history; features told stand for it."""
        return not features and since is None and bool(self._search.knows(np.array([user_idx]))[0])

    def _new_items(self, told: Told, unknown: dict[int | str, None]) -> NewItems | None:
        """Return those items that the catalogue has not and features tell; the rest is unknown."""
        plain, row_N = self._items.find("new_items", told.keys())
        given = zip(plain, told.values(), row_N, strict=True)
        absent = {item_id: said for item_id, said, row in given if row < 0}
        new = self._profiles.of_items(absent)
        unknown.update({i: None for i in absent if new is None or i not in new.told})
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


def _by_plain_id(given: Told | None) -> Told:
    return {plain_id(item_id): features for item_id, features in (given or {}).items()}


def _unknown_item(item_id: object, items: Vocabulary, why: Sequence[str]) -> DataError:
    """Return the error for an item without a place.

    Args:
        item_id: Which no item has.
        items: The catalogue's.
        why: What the features given did not do; empty without any.
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


@checked
def build_recommender(
    trained: Trained,
    *,
    index: IndexChoice = "auto",
    report: Mapping[str, object] | None = None,
    fallback: Trained | None = None,
) -> Recommender:
    """Index a trained model's items and make it answer.

    An approximate index is tuned on the vectors of users of training.

    Args:
        trained: What training gave.
        index: Which index a retriever's items go into; see `build_index`. A model without
            vectors has none: "auto" and "exact" score its whole catalogue.
        report: Measured figures to keep beside it, as JSON values.
        fallback: What answers a user without history and profile, such as popularity within a
            window; its scores for an empty history are kept. Without it, event counts.

    Raises:
        ConfigError: An index is asked for a model without vectors, or `fallback` has another
            catalogue.
        DataError: Training saw no item.
    """
    popular_I, retriever = _popularity(trained, fallback), trained.model.first_stage
    if not isinstance(retriever, Retriever):
        if index not in ("auto", "exact"):
            raise ConfigError(
                f"index is {index!r}, but {type(retriever).__name__} has no item vectors to "
                "index: leave it at 'auto'",
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
        BundleError: The bundle is missing, broken, tampered with or of a newer format.
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
    """Return the vectors of some users of training, for an index to be tuned on."""
    user_U = np.flatnonzero(np.diff(trained.events.offsets))
    chosen = np.random.default_rng(trained.seed).permutation(user_U)[:MEASURED_QUERIES]
    return model.encode(training_histories(trained.events, chosen)[0]).float()

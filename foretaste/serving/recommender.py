"""The answer for everybody: external ids in, external ids out, and where each row came from.

Shape legend: B users, I items, K list length, C items left out, T explained items.
"""

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import final

import numpy as np
import polars as pl
import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from foretaste.data.batch import Queries
from foretaste.data.tasks import Weights
from foretaste.errors import DataError
from foretaste.retrieval.exact import padded
from foretaste.retrieval.index import ItemIndex, TopK
from foretaste.serving.answer import Answer as Answer
from foretaste.serving.answer import Recommendation as Recommendation
from foretaste.serving.answer import Source as Source
from foretaste.serving.bundle import Bundle, write_bundle
from foretaste.serving.catalogue_search import Best, CatalogueSearch
from foretaste.serving.histories import blocks, one_query, training_histories, without_each
from foretaste.serving.item_labels import ItemLabels
from foretaste.serving.items import KnownItems
from foretaste.serving.lists import lists_table
from foretaste.serving.new_items import NewItems, Told
from foretaste.serving.profiles import Profiles
from foretaste.serving.rule_book import RuleBook, first_width
from foretaste.serving.rules import NO_RULES, Rules
from foretaste.serving.stages import Stages
from foretaste.training.trained import Trained

MAX_K = 1_000_000
EXPLAINED_EVENTS = 50
"""How many of a history's last events are tried as a reason."""
_NONE = np.empty(0, dtype=np.int64)


@final
class Recommender:
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
        self._rule_book = RuleBook(self.item_labels, vectors_of=vectors_of)

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

    @torch.inference_mode()
    def recommend(
        self,
        user_id: object = None,
        *,
        history: Sequence[object] | None = None,
        features: Mapping[str, object] | None = None,
        context: Mapping[str, object] | None = None,
        k: int = 10,
        exclude_seen: bool = True,
        allow: Sequence[object] | None = None,
        deny: Sequence[object] | None = None,
        new_items: Told | None = None,
        since: int | None = None,
        weights: Weights | None = None,
        rules: Rules = NO_RULES,
    ) -> Answer:
        """Return the k best items for one user, known or not.

        A user's history is what training saw of them and after it `history`. With a history the
        model answers; without one, it answers by `features`, or by what the table of users says of
        the user, if it reads any, and else the most popular items do.

        Args:
            user_id: An id, known or unknown; None for nobody in particular.
            history: Further item ids, oldest first, such as live events.
            features: What is known of a user whom training never saw: column of the user table to
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
            weights: How much each task's prediction counts in the score, 0 for tasks that are not
                named; None: as the model was made.
            rules: Filters on attributes, caps on categories, diversity. As long as they leave too
                few, more of the catalogue is looked at, to its end.

        Raises:
            DataError: k is out of range, a list of ids is a single text, a feature is unknown or
                of another kind, `since` is asked of events without times, a weight is of no task
                of the model, rules name a column that is not there or not of their kind, or there
                are rules and new items, of which the item table says nothing.
        """
        _check_k(k)
        check_weights(weights, self._search.tasks)
        self._rule_book.check(rules, k=k)
        stages = Stages()
        unknown: dict[object, None] = {}
        user_idx = self._user(user_id)
        past = self._past(user_idx, since)
        extra = self._items.rows_of("history", history or (), unknown)
        history_idx = np.concatenate([past, extra])
        banned = self._items.rows_of("deny", deny or (), unknown)
        if exclude_seen:
            banned = np.concatenate([banned, history_idx])
        allow_I = None if allow is None else self._mask(allow, unknown)
        allow_I = self._rule_book.allowed(rules, allow_I)
        profile = self._profiles.of_user(features, -1 if len(past) else user_idx)
        moment = self._profiles.of_moment(context)
        source: Source = "model" if len(past) else "fold-in" if len(extra) else "popular"
        if source == "popular" and profile is not None:
            source = "features"
        new = self._new_items(new_items or {}, rules, unknown)
        if source == "popular" and new is not None:
            unknown, new = unknown | dict.fromkeys(new.told), None
        if source == "popular":
            find = self._find_popular(exclude=banned, allow_I=allow_I)
        else:
            queries = one_query(user_idx if len(past) else -1, history_idx)
            find = partial(
                self._search.best,
                replace(queries, profile=profile, context=moment),
                exclude_BX=torch.from_numpy(banned).unsqueeze(0),
                allow_I=allow_I,
                new=None if new is None else new.table,
                weights=weights,
                stages=stages,
            )
        num_new = 0 if new is None else len(new.told)
        best = self._choose(rules, min(k, self._items.num_known + num_new), find, stages)
        user_known = user_idx >= 0 and self._num_past(user_idx) > 0
        rows = self._rows(best, source, new)
        who = "" if user_id is None or user_known else f"user {user_id!r} is unknown to training"
        return Answer(
            rows=rows,
            source=source,
            unknown_items=tuple(unknown),
            user_known=user_known,
            notes=(
                *_notes(who, source, len(rows), k, unknown),
                *self._profiles.notes("users", features, used=profile is not None),
                *self._profiles.notes("items", new_items, used=new is not None),
                *self._profiles.notes(
                    "moments", context, used=moment is not None and source != "popular"
                ),
            ),
            seconds=stages.seconds,
        )

    @torch.inference_mode()
    def recommend_many(
        self,
        user_ids: Sequence[object] | pl.Series,
        *,
        k: int = 10,
        exclude_seen: bool = True,
        rules: Rules = NO_RULES,
    ) -> pl.DataFrame:
        """Return the k best items of many users, one row each, in the order given.

        Users whom training never saw are answered as `recommend` does, and their source says so:
        by what the table of users says of them, or else by the most popular items.

        Returns:
            Columns `user_id` (integers if all of these ids are, text otherwise), `source`, and
            the lists `item_id` and `score`, best first.

        Raises:
            DataError: k is out of range, the ids are a single text, or rules name a column that
                is not there or not of their kind.
        """
        _check_k(k)
        self._rule_book.check(rules, k=k)
        if isinstance(user_ids, str | bytes):
            raise DataError(f"user_ids is the text {user_ids!r}: give a list of ids")
        events, wanted = self.trained.events, min(k, self._items.num_known)
        width = first_width(rules, wanted, at_once=self._search.at_once)
        width = min(width, self._items.num_known)
        allow_I = self._rule_book.allowed(rules, None)
        user_B = events.users.encode(user_ids)
        is_known_B = (user_B >= 0) & (np.diff(events.offsets)[user_B] > 0)
        is_told_B = ~is_known_B & self._profiles.known(user_B)

        def find_known(user_b: np.ndarray, num: int) -> Best:
            queries, seen_BX = training_histories(events, user_b)
            exclude_BX = seen_BX if exclude_seen else seen_BX[:, :0]
            return self._search.best(queries, num, exclude_BX=exclude_BX, allow_I=allow_I)

        def find_told(user_b: np.ndarray, num: int) -> Best:
            queries = replace(
                Queries.of_histories([[]] * len(user_b)), profile=self._profiles.of_rows(user_b)
            )
            nothing_BX = torch.empty((len(user_b), 0), dtype=torch.int64)
            return self._search.best(queries, num, exclude_BX=nothing_BX, allow_I=allow_I)

        find_popular = self._find_popular(exclude=_NONE, allow_I=allow_I)
        popular = padded(self._choose(rules, wanted, find_popular).top, wanted)
        item_BK = popular.item_BK.repeat(len(user_B), 1)
        score_BK = popular.score_BK.repeat(len(user_B), 1)
        per_user = self._search.scores_per_user
        for is_asked_B, find in ((is_known_B, find_known), (is_told_B, find_told)):
            asked_B = np.flatnonzero(is_asked_B)
            for block in blocks(events, user_B[asked_B], scores_per_user=per_user):
                rows = asked_B[block]
                best = find(user_B[rows], width)
                if rules.reorder:
                    best = self._choose_each(rules, wanted, user_B[rows], best, find)
                item_BK[torch.from_numpy(rows)], score_BK[torch.from_numpy(rows)] = best.top
        source_B = np.select([is_known_B, is_told_B], ["model", "features"], "popular")
        return lists_table(events, user_ids, source_B, TopK(item_BK=item_BK, score_BK=score_BK))

    @torch.inference_mode()
    def similar(
        self, item_id: object, k: int = 10, *, features: Mapping[str, object] | None = None
    ) -> Answer:
        """Return the k items most like one.

        By the cosine of their vectors; for a model without vectors, what it offers to somebody
        who did this item alone. An item that training never saw is placed by its `features` if
        the model reads any; else it is reported as unknown, and the most popular items are the
        answer.

        Args:
            item_id: An id, known or unknown.
            k: In [1, 10^6].
            features: What is known of a new item: column of the item table to value.

        Raises:
            DataError: k is out of range, or a feature is unknown or of another kind.
        """
        _check_k(k)
        unknown: dict[object, None] = {}
        own = self._items.rows_of("item_id", [item_id], unknown)
        wanted = min(k, self._items.num_known)
        vector_D = None if len(own) else self._profiles.item_vector(features)
        source: Source = "model" if len(own) else "popular" if vector_D is None else "features"
        if len(own):
            best = self._search.similar(int(own[0]), wanted)
        elif vector_D is not None:
            best = self._search.near(vector_D, wanted)
        else:
            best = self._search.most_popular(wanted, exclude=_NONE, allow_I=None)
        rows = self._rows(Best(best, {}), source)
        return Answer(
            rows=rows,
            source=source,
            unknown_items=tuple(unknown),
            notes=(
                *_notes("", source, len(rows), k, unknown),
                *self._profiles.notes("items", features, used=source == "features"),
            ),
        )

    def explain(
        self, history: Sequence[object], item_id: object, *, user_id: object = None
    ) -> int | str | None:
        """Return the item of a history whose removal lowers an item's score most.

        `explain_many` answers for a whole list of items in the same time.
        """
        return self.explain_many(history, [item_id], user_id=user_id)[0]

    @torch.inference_mode()
    def explain_many(
        self, history: Sequence[object], item_ids: Sequence[object], *, user_id: object = None
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
        past = np.concatenate([self._past(self._user(user_id), None), extra])
        found = [self._items.rows_of("item_ids", [item_id], {}) for item_id in item_ids]
        item_T = np.concatenate([_NONE, *found])
        if len(past) == 0 or len(item_T) == 0:
            return (None,) * len(found)
        attention_TL = self._search.attention(past, torch.from_numpy(item_T))
        if attention_TL is None:
            reason_C, without = without_each(past, last=EXPLAINED_EVENTS)
            score_CT = self._search.scores([past, *without], torch.from_numpy(item_T))
            weight_CT = (score_CT[0] - score_CT[1:]).numpy()
        else:
            reason_C, place_L = np.unique(past, return_inverse=True)
            weight_CT = np.zeros((len(reason_C), len(item_T)), dtype=np.float32)
            np.add.at(weight_CT, place_L, attention_TL.T.numpy())
        weight_CT[reason_C[:, None] == item_T] = -np.inf
        ids_C = self._items.ids_of(reason_C.tolist())
        reasons = iter(
            ids_C[int(weight_C.argmax())] if weight_C.max() > 0 else None
            for weight_C in weight_CT.T
        )
        return tuple(next(reasons) if len(row) else None for row in found)

    def save(self, path: str | Path) -> None:
        """Write everything into a bundle, whole or not at all; see `write_bundle`.

        Raises:
            BundleError: The path is something else than a bundle, or the disk refuses.
        """
        write_bundle(self.bundle, Path(path))

    def _user(self, user_id: object) -> int:
        return -1 if user_id is None else self.trained.events.users.find(user_id)

    def _num_past(self, user_idx: int) -> int:
        offsets = self.trained.events.offsets
        return int(offsets[user_idx + 1] - offsets[user_idx])

    def _past(self, user_idx: int, since: int | None) -> Int64[np.ndarray, " L"]:
        """Return what training saw of a user, oldest first."""
        events = self.trained.events
        if since is not None and events.timestamp_s is None:
            raise DataError(f"since is {since}, but training's events have no times: leave it out")
        if user_idx < 0:
            return _NONE
        past = events.history(user_idx).astype(np.int64)
        if since is None or events.timestamp_s is None:
            return past
        start, end = events.offsets[user_idx], events.offsets[user_idx + 1]
        return past[events.timestamp_s[start:end] >= since]

    def _mask(self, item_ids: Sequence[object], unknown: dict[object, None]) -> Bool[Tensor, " I"]:
        allow_I = torch.zeros(self.trained.events.num_items, dtype=torch.bool)
        allow_I[torch.from_numpy(self._items.rows_of("allow", item_ids, unknown))] = True
        return allow_I

    def _new_items(self, told: Told, rules: Rules, unknown: dict[object, None]) -> NewItems | None:
        """Return those items that the catalogue has not and features tell; the rest is unknown."""
        if told and rules != NO_RULES:
            raise DataError(
                "rules look at the item table, which has no new_items: give one of both"
            )
        absent: dict[object, None] = {}
        self._items.rows_of("new_items", list(told), absent)
        new = self._profiles.of_items({i: said for i, said in told.items() if i in absent})
        unknown.update({i: None for i in absent if new is None or i not in new.told})
        return new

    def _find_popular(
        self, *, exclude: Int64[np.ndarray, " X"], allow_I: Bool[Tensor, " I"] | None
    ) -> Callable[[int], Best]:
        return lambda k: Best(self._search.most_popular(k, exclude=exclude, allow_I=allow_I), {})

    def _choose(
        self, rules: Rules, k: int, find: Callable[[int], Best], stages: Stages | None = None
    ) -> Best:
        return self._rule_book.choose(
            rules,
            k,
            find,
            at_once=self._search.at_once,
            num_items=self._items.num_known,
            stages=stages or Stages(),
        )

    def _choose_each(
        self,
        rules: Rules,
        k: int,
        user_B: Int64[np.ndarray, " B"],
        best: Best,
        find: Callable[[np.ndarray, int], Best],
    ) -> Best:
        """Choose each user's list from their row; where it gives too few, find more for them."""
        width = best.top.item_BK.shape[1]

        def of_one(row: int, num: int) -> Best:
            if num > width:
                return find(user_B[row : row + 1], num)
            one = TopK(best.top.item_BK[row : row + 1], best.top.score_BK[row : row + 1])
            return Best(one, {}).at(torch.arange(num))

        chosen = [
            padded(self._choose(rules, k, partial(of_one, row)).top, k)
            for row in range(len(user_B))
        ]
        top = TopK(
            item_BK=torch.cat([one.item_BK for one in chosen]),
            score_BK=torch.cat([one.score_BK for one in chosen]),
        )
        return Best(top, {})

    def _rows(
        self, best: Best, source: Source, new: NewItems | None = None
    ) -> tuple[Recommendation, ...]:
        item_idx = [item for item in best.top.item_BK[0].tolist() if item >= 0]
        score = best.top.score_BK[0].tolist()
        first_new = self.trained.events.num_items
        old = [item for item in item_idx if item < first_new]
        shown: dict[int, tuple[int | str, Mapping[str, object], Source]] = {
            item: (item_id, attributes, source)
            for item, item_id, attributes in zip(
                old, self._items.ids_of(old), self._items.attributes(old), strict=True
            )
        }
        for row, (item_id, told) in enumerate(() if new is None else new.told.items()):
            shown[first_new + row] = item_id, told, "features"
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


def check_weights(weights: Weights | None, tasks: Sequence[str]) -> None:
    """Refuse weights of tasks that a model has not, and such as order nothing.

    Raises:
        DataError: A name is none of the tasks, or a weight is not finite, or all are 0.
    """
    if weights is None:
        return
    for name, weight in weights.items():
        if name not in tasks:
            near = difflib.get_close_matches(name, tasks, n=1)
            advice = f"; did you mean {near[0]!r}?" if near else ""
            known = f"this model's are {', '.join(tasks)}" if tasks else "this model has none"
            raise DataError(f"weights: {name!r} is no task; {known}{advice}")
        if isinstance(weight, bool) or not math.isfinite(weight):
            raise DataError(f"weights: {name!r} is {weight!r}: give a finite number")
    if not any(weights.values()):
        raise DataError("weights: all are 0, which orders nothing: give one that is not")


def _check_k(k: int) -> None:
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= MAX_K:
        raise DataError(f"k is {k!r}: ask for 1 to {MAX_K} items")


def _notes(
    who: str, source: Source, found: int, k: int, unknown: Mapping[object, None]
) -> tuple[str, ...]:
    notes = [who] if who else []
    if unknown:
        some = ", ".join(repr(item_id) for item_id in list(unknown)[:5])
        more = ", …" if len(unknown) > 5 else ""
        notes.append(f"{len(unknown)} item ids are unknown to training: {some}{more}")
    if source == "popular":
        notes.append("nothing is known to go by: these are the most popular items")
    if found < k:
        notes.append(f"{k} were asked for, and {found} are all that may be answered")
    return tuple(notes)

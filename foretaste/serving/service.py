"""The service behind the HTTP API: from requests to replies."""

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import final

from sqlalchemy.exc import SQLAlchemyError

from foretaste.errors import DataError, ForetasteError
from foretaste.serving.answer import Answer, Recommendation
from foretaste.serving.messages import (
    Column,
    ColumnsReply,
    EventRequest,
    EventsReply,
    ForgetReply,
    HistoryReply,
    Item,
    ItemsReply,
    KeptVersion,
    ModelReply,
    ModelsReply,
    RecommendReply,
    RecommendRequest,
    ReloadReply,
    Row,
    SimilarReply,
    UsersReply,
)
from foretaste.serving.metrics import Metrics
from foretaste.serving.rules import ItemLabels
from foretaste.serving.settings import Bucket, ServerSettings
from foretaste.serving.slot import Loaded, ModelSlot
from foretaste.serving.state import Choice, LiveEvent, LiveEvents, cause_of

SHOWN_VALUES = 200
"""Maximum number of values of a column in a reply."""
WITHOUT_STORE = (
    "the store of live events does not answer: the user's events since training had no influence"
)
Stored = tuple[Sequence[LiveEvent], tuple[str, ...]]
"""Events of a user as the store has them, and a note if it does not answer."""
WITHOUT_REASONS = "reasons were left out: the server is computing as many as it allows at one time"
FUTURE_S = 86_400
"""An event may be this much ahead of the server's clock."""


@final
class Service:
    """Combines the active model with live events. All methods are thread-safe."""

    def __init__(
        self,
        slot: ModelSlot,
        events: LiveEvents,
        settings: ServerSettings,
        *,
        bundle: Path,
        metrics: Metrics,
        clock: Callable[[], float] = time.time,
        report: Callable[[SQLAlchemyError], object] = lambda _: None,
    ) -> None:
        """Create the service.

        Args:
            slot: The slot with the active model.
            events: The store of live events.
            settings: The server's settings, with its limits.
            bundle: The bundle, whose name the servers on one database share.
            metrics: The counters.
            clock: Returns the time in Unix seconds.
            report: Called with the reason if an answer was made without the store.
        """
        self.slot = slot
        self.events = events
        self.metrics = metrics
        self._settings = settings
        self._bundle = bundle
        self._clock, self._report = clock, report
        self._latest_s: int | None = None
        self._reports = Bucket(60)
        self._explaining = threading.Semaphore(max(1, settings.threads // 2))
        metrics.model.info({"version": slot.current.version})

    def recommend(self, asked: RecommendRequest, stored: Stored | None = None) -> RecommendReply:
        """Recommend from all current data about the user.

        Args:
            asked: The request.
            stored: The result of `stored`, if it was called before.

        Raises:
            DataError: `k` or the history is longer than this server allows.
        """
        self._check_k(asked.k)
        if len(asked.history) > self._settings.max_history:
            raise DataError(
                f"the history has {len(asked.history)} items, but this server accepts "
                f"{self._settings.max_history}: send the newest",
                name="history",
                value=len(asked.history),
            )
        user_id = self._user_id(asked)
        loaded = self.slot.of_user(user_id)
        events, missing = stored or self.stored(asked)
        live = [] if user_id is None else loaded.catalogue.since_training(user_id, events)
        history = [*(event.item_id for event in live), *map(str, asked.history)]
        answer = loaded.recommender.recommend(
            user_id,
            history=history or None,
            features=asked.features,
            context=asked.context,
            k=asked.k,
            exclude_seen=asked.exclude_seen,
            allow=None if asked.allow is None else list(asked.allow),
            deny=None if asked.deny is None else list(asked.deny),
            new_items=asked.new_items,
            weights=asked.weights,
            rules=asked.rules,
        )
        for stage, seconds in answer.seconds.items():
            self.metrics.stages.labels(stage).observe(seconds)
        place = "active" if loaded is self.slot.current else "canary"
        self.metrics.answers.labels(answer.source, place).inc()
        self.metrics.answer_seconds.labels(place).observe(sum(answer.seconds.values()))
        because: dict[str, Item] = {}
        if asked.explain and self._explaining.acquire(blocking=False):
            try:
                because = self._because(loaded, user_id, history, answer)
            finally:
                self._explaining.release()
        elif asked.explain:
            missing = (*missing, WITHOUT_REASONS)
        return RecommendReply(
            user_id=user_id,
            user_known=answer.user_known,
            source=answer.source,
            items=[_row(loaded, row, because.get(str(row.item_id))) for row in answer.rows],
            unknown_items=[str(item_id) for item_id in answer.unknown_items],
            notes=[*answer.notes, *missing],
            live_events=len(live),
            model_version=loaded.version,
        )

    def stored(self, asked: RecommendRequest) -> Stored:
        """Read a user's events from the store; none and a note while it does not answer.

        The reason is reported at most once a second, after the first 60 in the first minute.
        """
        user_id = self._user_id(asked)
        try:
            return (() if user_id is None else self._read(user_id)), ()
        except SQLAlchemyError as error:
            if not self._reports.wait_s():
                self._report(error)
            return (), (WITHOUT_STORE,)

    def similar(self, item_id: str, *, k: int) -> SimilarReply:
        """Return the items most similar to one.

        Raises:
            DataError: `k` is above this server's limit or, with the error's name `item_id`, no item
                has the id.
        """
        self._check_k(k)
        loaded = self.slot.current
        answer = loaded.recommender.similar(item_id, k)
        return SimilarReply(
            item=loaded.catalogue.describe(item_id),
            items=[_row(loaded, row, None) for row in answer.rows],
            notes=list(answer.notes),
            model_version=loaded.version,
        )

    def find_items(self, query: str, *, limit: int) -> ItemsReply:
        """Return items by words of their title."""
        catalogue = self.slot.current.catalogue
        return ItemsReply(items=catalogue.find_items(query, limit=limit), total=catalogue.num_items)

    def columns(self) -> ColumnsReply:
        """Return the columns of the item table that rules may name."""
        recommender = self.slot.current.recommender
        labels = recommender.item_labels
        return ColumnsReply(
            columns=[_column(labels, name) for name in labels.readable],
            vectors=recommender.index is not None,
        )

    def find_users(self, prefix: str, *, limit: int) -> UsersReply:
        """Return users of the training data, by the beginning of their id."""
        catalogue = self.slot.current.catalogue
        return UsersReply(
            users=catalogue.find_users(prefix, limit=limit), total=catalogue.num_users
        )

    def history(self, user_id: str, *, limit: int) -> HistoryReply:
        """Return a user's events, newest first."""
        loaded = self.slot.current
        user_id = loaded.catalogue.user_id(user_id)
        live = loaded.catalogue.since_training(user_id, self._read(user_id))
        num_live = len(live)
        if num_live >= self._settings.max_history:  # more may be stored than were read
            num_live = self.events.count(user_id)
        return HistoryReply(
            user_id=user_id,
            user_known=loaded.catalogue.knows_user(user_id),
            events=loaded.catalogue.past(user_id, live, limit=limit),
            total=num_live + loaded.catalogue.num_past(user_id),
        )

    def add_events(self, asked: Sequence[EventRequest]) -> EventsReply:
        """Store events; when this returns, they are on disk and in the next answer.

        Raises:
            DataError: There are more events than this server accepts at once, one is in the future
                or, with the error's name `event_id`, one has the id of another event.
        """
        if len(asked) > self._settings.max_events:
            raise DataError(
                f"{len(asked)} events in one request, but this server accepts "
                f"{self._settings.max_events}: send them in parts",
                name="events",
                value=len(asked),
            )
        now_s = self._now_s()
        loaded = self.slot.current
        catalogue, ranks = loaded.catalogue, loaded.recommender.ranks
        for position, event in enumerate(asked):
            if event.timestamp is not None and event.timestamp > now_s + FUTURE_S:
                raise DataError(
                    f"event {position} has timestamp {event.timestamp}, more than a day after "
                    f"the server's clock, {now_s}: nothing of this request was stored",
                    name="timestamp",
                    value=event.timestamp,
                )
        rows = [
            LiveEvent(
                user_id=catalogue.user_id(str(event.user_id)),
                item_id=catalogue.item_id(str(event.item_id)),
                timestamp_s=now_s if event.timestamp is None else event.timestamp,
                event_id=None if event.event_id is None else str(event.event_id),
                by_clock=event.timestamp is None,
            )
            for event in asked
        ]
        with self.metrics.store("add"):
            stored = self.events.add(rows)
        self.metrics.events.inc(stored)
        return EventsReply(
            stored=stored,
            duplicates=len(rows) - stored,
            unknown_items=_distinct(r.item_id for r in rows if not ranks(r.item_id)),
            unknown_users=_distinct(r.user_id for r in rows if not catalogue.knows_user(r.user_id)),
        )

    def _now_s(self) -> int:
        """Return the time, or that of the latest stored event if the clock was set back."""
        if self._latest_s is None:
            with self.metrics.store("add"):
                self._latest_s = self.events.newest_s()
        self._latest_s = max(self._latest_s, int(self._clock()))
        return self._latest_s

    def forget(self, user_id: str) -> ForgetReply:
        """Delete a user's live events; the training events stay in the model."""
        user_id = self.slot.current.catalogue.user_id(user_id)
        with self.metrics.store("forget"):
            return ForgetReply(deleted=self.events.forget(user_id))

    def ready(self) -> str:
        """Return why the store of live events does not answer, "" if it does."""
        try:
            with self.metrics.store("ready"):
                self.events.check()
        except SQLAlchemyError as error:
            return cause_of(error)
        return ""

    def model(self) -> ModelReply:
        """Describe the active model."""
        loaded = self.slot.current
        return ModelReply(
            version=loaded.version,
            bundle=self._bundle.name,
            loaded_at_s=loaded.loaded_at_s,
            users=loaded.catalogue.num_users,
            items=loaded.catalogue.num_items,
            learned_from=loaded.recommender.bundle.learned_from,
            measured_on=loaded.recommender.bundle.measured_on,
            manifest=loaded.manifest,
            report=loaded.report,
        )

    def reload(self) -> ReloadReply:
        """Read the bundle again and swap if it is another version.

        Raises:
            ForetasteError: The version was refused; the old one stays active.
        """
        return self._switched(lambda: self.slot.reload(self._publish))

    def activate(self, version: str) -> ReloadReply:
        """Activate a stored version; "" means the previous one.

        Raises:
            ForetasteError: The version is not stored or was refused; the old one stays active.
        """
        return self._switched(lambda: self.slot.activate(version, self._publish))

    def try_out(self, version: str, share: float) -> ModelsReply:
        """Let a stored version answer a share of the users; 0 ends this.

        Raises:
            ForetasteError: The version is not stored or was refused; nothing has changed.
        """
        self.slot.try_out(version, share, self._publish)
        return self.models()

    def models(self) -> ModelsReply:
        """Return the stored versions, and which of them are active."""
        choice = self.slot.choice
        return ModelsReply(
            active=choice.version,
            previous=choice.previous,
            canary=choice.canary,
            canary_share=choice.share,
            versions=[
                KeptVersion(version=one.version, bytes=one.size, used_at_s=one.used_at_s)
                for one in self.slot.versions.kept()
            ],
            last_refusal=self.slot.last_error,
        )

    def publish(self, seen: Choice | None) -> None:
        """Publish the active version to the other servers on this database, if they still agree on
        `seen`.

        Otherwise another server has switched in the meantime.
        """
        if self.events.chosen(self._bundle.name) == seen:
            self._publish(self.slot.choice)

    def follow(self) -> bool:
        """Switch to the version that the servers on this database agreed on; return whether it
        changed.

        Raises:
            ForetasteError: This server refused the version.
        """
        chosen = self.events.chosen(self._bundle.name)
        if chosen is None:
            return False
        changed = self.slot.follow(chosen)
        self.metrics.model.info({"version": self.slot.current.version})
        return changed

    def retire(self) -> int:
        """Delete live events older than the settings allow; return their number."""
        days = self._settings.keep_events_days
        return 0 if days is None else self.events.retire(int(self._clock()) - days * 86_400)

    def _publish(self, choice: Choice) -> None:
        with self.metrics.store("choose"):
            self.events.choose(self._bundle.name, choice)

    def _switched(self, switch: Callable[[], tuple[Loaded, Loaded]]) -> ReloadReply:
        try:
            old, new = switch()
        except ForetasteError:
            self.metrics.reloads.labels("refused").inc()
            raise
        changed = new.version != old.version
        self.metrics.reloads.labels("swapped" if changed else "same").inc()
        self.metrics.model.info({"version": new.version})
        return ReloadReply(version=new.version, previous=old.version, changed=changed)

    def _check_k(self, k: int) -> None:
        if not 1 <= k <= self._settings.max_k:
            raise DataError(
                f"k is {k}: this server returns lists of 1 to {self._settings.max_k}",
                name="k",
                value=k,
            )

    def _user_id(self, asked: RecommendRequest) -> str | None:
        """Return the id in the catalogue's spelling, so that a canary treats 3.0 as 3."""
        user_id = None if asked.user_id is None else str(asked.user_id)
        return None if user_id is None else self.slot.current.catalogue.user_id(user_id)

    def _read(self, user_id: str) -> list[LiveEvent]:
        with self.metrics.store("read"):
            return self.events.of_user(user_id, limit=self._settings.max_history)

    def _because(
        self, loaded: Loaded, user_id: str | None, history: list[str], answer: Answer
    ) -> dict[str, Item]:
        item_ids = [row.item_id for row in answer.rows]
        reasons = loaded.recommender.explain_many(history, item_ids, user_id=user_id)
        return {
            str(item_id): loaded.catalogue.describe(reason)
            for item_id, reason in zip(item_ids, reasons, strict=True)
            if reason is not None
        }


def _row(loaded: Loaded, row: Recommendation, because: Item | None) -> Row:
    item = loaded.catalogue.describe(row.item_id, row.attributes)
    return Row.model_construct(  # each part is valid by itself
        **vars(item),
        score=row.score,
        source=row.source,
        predictions=row.predictions,
        because=because,
    )


def _column(labels: ItemLabels, name: str) -> Column:
    own = labels.labels(name)
    return Column(
        name=name,
        several=own.several,
        ordered=own.ordered,
        distinct=len(own.texts),
        values=own.most_frequent(SHOWN_VALUES),
    )


def _distinct(ids: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(ids))

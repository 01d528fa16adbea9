"""What training gives back, and all that evaluation and serving need."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from foretaste.arguments import checked
from foretaste.config import Config
from foretaste.data.batch import Queries
from foretaste.data.conditions import unread_labels
from foretaste.data.features import Features, FieldSide
from foretaste.data.interactions import Interactions
from foretaste.data.merging import Translation
from foretaste.data.splits import LearnedFrom
from foretaste.data.tasks import notes_about_histories, notes_about_labels
from foretaste.errors import ConfigError, DataError, NonFiniteError
from foretaste.models.base import Model, Ranker, Retriever, Scorer
from foretaste.models.catalogue import TwoStage, placer
from foretaste.models.layers.field_ranker import HistoryRanker
from foretaste.shown import Shown
from foretaste.training.calibration import Calibration, calibrated
from foretaste.training.objectives.catalogue import ObjectiveConfig


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Trained(Shown):
    """A model with the vocabularies and histories it was trained on.

    Shape legend: B queries, I items.
    """

    config: Config
    model: Model
    """A `Retriever`, a `Scorer` or a `TwoStage`, in evaluation mode."""
    events: Interactions
    """The training events; its vocabularies say which row is which id."""
    features: Features | None = None
    """What the model was given of users and items."""
    seed: int
    objective: ObjectiveConfig | None = None
    """How it learned; None of a model that learns in closed form."""
    learned_from: LearnedFrom | Literal[""] = ""
    """Which parts of its split it learned from; empty where that was not kept."""
    train_seconds: float = 0.0
    epochs: tuple[int, ...] = (1,)
    """How many epochs validation chose, of the first of two stages and of the second, or of the one
    model; 1 where it learns in closed form. A bundle does not keep it."""
    settings: Mapping[str, object] = field(default_factory=dict)
    """Everything that decided the run, as plain JSON values."""
    log: Mapping[str, object] = field(default_factory=dict)
    """What training saw: epochs, the validation metric of each, why it stopped."""
    calibration: Mapping[str, Calibration] = field(default_factory=dict)
    """By a binary task's name, what its probabilities become before they are answered. Lists are
    ordered by what the model said itself: calibrated probabilities may tie."""
    translation: Translation | None = None
    """From the rows in which users and items are asked about to those of `events`; None where
    these are the same. `known_I`, `item_count` and scores are in the rows of what is asked."""

    @checked
    def asked_by(self, events: Interactions) -> "Trained":
        """Return the model as one that is asked in the rows of other events, by their ids.

        A user that it does not know is a new one, answered by history and features; an item that
        it does not know has no score, and is left out of histories.
        """
        found = Translation.of(self.events, events)
        if found is None:
            return self
        told = None if self.features is None else self.features.user
        if told is not None and events.user_table is not None and self.model.reads_profiles:
            found = replace(found, profile=told.encode(events.user_table))
        return replace(self, translation=found)

    @property
    def item_count(self) -> Int64[np.ndarray, " I"]:
        """How many training events each item has."""
        count_I = self.events.item_count
        return count_I if self.translation is None else self.translation.counts(count_I)

    @property
    def known_I(self) -> Bool[Tensor, " I"]:
        """The catalogue that the model ranks.

        Items with a training event, and others that the model scores without one: by their
        features or their edges.
        """
        known_I = self._own_known_I
        return known_I if self.translation is None else self.translation.known(known_I)

    @property
    def _own_known_I(self) -> Bool[Tensor, " I"]:
        known_I = torch.from_numpy(self.events.item_count > 0)
        others_I = self.model.first_stage.known_items()
        return known_I if others_I is None else known_I | others_I.cpu()

    @property
    def moment(self) -> FieldSide | None:
        """The features of the context that the model was given; None: none."""
        return None if self.features is None else self.features.context

    @property
    def notes(self) -> tuple[str, ...]:
        """What fitting features left out, what the model does not read of them and of labels."""
        told, ranker = self.features, self.model.second_stage
        reads_labels = isinstance(ranker, Ranker) and any(task.column for task in ranker.tasks)
        labels = (
            notes_about_labels(self.events, ranker.tasks)
            if isinstance(ranker, Ranker) and reads_labels
            else unread_labels(self.events)
        )
        if isinstance(ranker, HistoryRanker):
            reads = ranker.reads != "nothing"
            labels += notes_about_histories(self.events, ranker.tasks, reads=reads)
        if told is None:
            return labels
        sides = (
            ("users", told.user, self.model.reads_profiles),
            ("items", told.item, ranker.scores_new_items or placer(self.model) is not None),
            ("the context", told.context, self.model.reads_context),
        )
        unread = (
            f"features of {name} were given, but {type(self.model).__name__} reads none"
            for name, side, is_read in sides
            if side is not None and not is_read
        )
        return (*labels, *told.notes, *unread)

    @checked
    def calibrated(self, prediction: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return a ranker's predictions, by the task's name, calibrated where a task is."""
        return {
            name: torch.from_numpy(calibrated(self.calibration[name], value.cpu().numpy()))
            if name in self.calibration
            else value
            for name, value in prediction.items()
        }

    @checked
    def score(self, queries: Queries) -> Float[Tensor, "B I"]:
        """Score the whole catalogue: higher is better, -inf for items outside of it.

        Raises:
            ConfigError: The model can neither retrieve nor score.
            DataError: The queries have users or items beyond those of the events.
            NonFiniteError: The model gave NaN or infinity for an item of its catalogue.
        """
        asked = self.translation
        num_users = self.events.num_users if asked is None else len(asked.user_U)
        num_items = self.events.num_items if asked is None else len(asked.item_X)
        for row_N, num in ((queries.user_B, num_users), (queries.history_N, num_items)):
            if row_N.numel() and row_N.max() >= num:
                raise DataError(
                    f"the queries have row {int(row_N.max())} of users or items, and there are "
                    f"{num:,}: they belong to other events, so call trained.asked_by(those events)",
                    name="queries",
                    value=int(row_N.max()),
                )
        return self.scorer()(queries)

    @torch.inference_mode()
    @checked
    def scorer(self, *, exclude_seen: bool = False) -> Callable[[Queries], Float[Tensor, "B I"]]:
        """Return `score` for many blocks in a row; models keep what they work out of their items.

        The weights must not change in between. Each block is a tensor of its own, which an
        inference-mode caller may write into.

        Args:
            exclude_seen: Give the items of a query's history -inf; of a model in two stages, they
                are no candidates then.
        """
        model, translation = self.model, self.translation
        find = find_scores(model.first_stage)
        unknown_X = (~self._own_known_I).nonzero().squeeze(1)

        @torch.inference_mode()
        def score(queries: Queries) -> Tensor:
            if translation is not None:
                queries = translation.queries(queries)
            score_BI = find(queries)
            score_BI.index_fill_(1, unknown_X.to(score_BI.device), 0.0)
            if score_BI.numel() and not torch.stack(score_BI.aminmax()).isfinite().all():
                raise NonFiniteError(
                    "a score is NaN or infinite: the model is broken, train it again"
                )
            score_BI.index_fill_(1, unknown_X.to(score_BI.device), -torch.inf)
            if exclude_seen:
                seen_N = torch.arange(len(queries)).repeat_interleave(queries.offsets_B1.diff())
                score_BI[seen_N, queries.history_N] = -torch.inf
            if isinstance(model, TwoStage):
                score_BI = model.rerank(queries, score_BI)
            return score_BI if translation is None else translation.scores(score_BI)

        return score

    def _facts(self) -> dict[str, object]:
        events = self.events
        return {
            "": getattr(self.config, "kind", type(self.config).__name__),
            "events": len(events),
            "users": events.num_users,
            "items": events.num_items,
            "seed": str(self.seed),
            "trained in": f"{self.train_seconds:.1f} s",
        }


def find_scores(model: Model) -> Callable[[Queries], Float[Tensor, "B I"]]:
    """Return what scores a block of queries by one model, in a tensor of its own.

    Raises:
        ConfigError: The model can neither retrieve nor score; when it is asked.
    """

    def find(queries: Queries) -> Tensor:
        if isinstance(model, Retriever):
            return model.products(model.encode(queries).float())
        if isinstance(model, Scorer):
            return model.score(queries).float().clone()
        raise ConfigError(f"{type(model).__name__} can neither retrieve nor score")

    return find

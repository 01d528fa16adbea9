"""The result of training, with everything that evaluation and serving need.

Probabilities may be calibrated after training; the calibrations are here too.

Shape legend: N rows, in any shape.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

import numpy as np
import polars as pl
import torch
from jaxtyping import Bool, Float, Float64, Int64
from pydantic import Field
from torch import Tensor

from foretaste.arguments import checked
from foretaste.config import Config
from foretaste.data.batch import FieldTable, Queries, RowBatch
from foretaste.data.conditions import unread_labels
from foretaste.data.features import Features, FieldSide
from foretaste.data.interactions import Interactions
from foretaste.data.splits import LearnedFrom
from foretaste.data.tasks import notes_about_histories, notes_about_labels
from foretaste.data.vocabulary import Vocabulary
from foretaste.errors import ConfigError, DataError, NonFiniteError
from foretaste.models.base import Model, Ranker, Retriever, Scorer
from foretaste.models.catalogue import TwoStage, placer
from foretaste.models.layers.field_ranker import HistoryRanker
from foretaste.shown import Shown
from foretaste.training.objectives import ObjectiveConfig


class PlattCalibration(Config):
    r"""A line through the logits: :math:`\sigma(a \ln \frac{p}{1 - p} + b)`."""

    kind: Literal["platt"] = "platt"
    slope: float
    """The factor a, above 0. It is below 1 if the model was too confident."""
    intercept: float
    """The constant b."""


class IsotonicCalibration(Config):
    """A non-decreasing piecewise linear function, constant outside its range."""

    kind: Literal["isotonic"] = "isotonic"
    at: tuple[float, ...] = Field(min_length=1)
    """Probabilities at the breakpoints, ascending."""
    gives: tuple[float, ...] = Field(min_length=1)
    """The calibrated probability at each breakpoint, non-decreasing."""


Calibration = Annotated[PlattCalibration | IsotonicCalibration, Field(discriminator="kind")]


def calibrated(
    calibration: PlattCalibration | IsotonicCalibration, probability_N: Float[np.ndarray, "*N"]
) -> Float64[np.ndarray, "*N"]:
    """Return a model's probabilities after calibration; NaN stays NaN."""
    match calibration:
        case PlattCalibration():
            line_N = calibration.slope * logit(probability_N) + calibration.intercept
            return sigmoid(line_N)
        case IsotonicCalibration():
            found_N: np.ndarray = np.interp(probability_N, calibration.at, calibration.gives)
            return found_N


def logit(probability_N: Float[np.ndarray, "*N"]) -> Float64[np.ndarray, "*N"]:
    """Return log odds; probabilities are clipped to [epsilon, 1 - epsilon] first."""
    eps = np.finfo(np.float64).eps
    kept_N = np.clip(probability_N.astype(np.float64), eps, 1 - eps)
    found_N: np.ndarray = np.log(kept_N) - np.log1p(-kept_N)
    return found_N


def sigmoid(line_N: Float64[np.ndarray, "*N"]) -> Float64[np.ndarray, "*N"]:
    """Return the probability of log odds."""
    found_N: np.ndarray = np.exp(-np.logaddexp(0, -line_N))
    return found_N


def rows_in(own: Vocabulary, other: Vocabulary) -> Int64[np.ndarray, " N"]:
    """Return the row in `own` of each id of `other`, -1 if it has none.

    If only one of them holds integers, texts are compared: 7 is "7" and not "07".
    """
    kind = pl.Int64 if own.is_integer and other.is_integer else pl.String
    known = pl.DataFrame({"id": own.ids.cast(kind), "row": np.arange(len(own))})
    asked = other.ids.cast(kind).alias("id").to_frame()
    found = asked.join(known, on="id", how="left", maintain_order="left")["row"]
    rows: Int64[np.ndarray, " N"] = found.fill_null(-1).to_numpy().astype(np.int64)
    return rows


@dataclass(frozen=True, eq=False, kw_only=True)
class Translation:
    """The model's rows of the users and items of other events."""

    user_U: Int64[np.ndarray, " U"]
    """The model's user_idx of each user of the other events, -1 for an unknown user."""
    item_X: Int64[np.ndarray, " X"]
    """The model's item_idx of each item, -1 for an unknown item."""
    profile: FieldTable | None = None
    """Encoded features of each user of the other events, for a model that reads them."""

    @staticmethod
    def of(own: Interactions, other: Interactions) -> "Translation | None":
        """Translate rows of `other` into rows of `own`; None if they are the same."""
        if own.users.same_as(other.users) and own.items.same_as(other.items):
            return None
        item_I = rows_in(own.items, other.items)
        is_other = np.ones(own.num_items, np.bool_)
        is_other[item_I[item_I >= 0]] = False
        return Translation(
            user_U=rows_in(own.users, other.users),
            item_X=np.concatenate([item_I, np.flatnonzero(is_other)]),
        )

    def queries(self, queries: Queries, *, new_users_histories: bool = False) -> Queries:
        """Return queries in the model's rows, without events of items that it does not know.

        Args:
            queries: Users and histories in rows of the other events.
            new_users_histories: Leave out the histories of users that the model knows.
        """
        user_B = self.user_U[queries.user_B.numpy()]
        item_N, offsets_B1 = self.item_X[queries.history_N.numpy()], queries.offsets_B1.numpy()
        keep_N = item_N >= 0
        if new_users_histories:
            keep_N &= np.repeat(user_B < 0, np.diff(offsets_B1))
        before_N1, times = np.concatenate([[0], np.cumsum(keep_N)]), queries.times
        return replace(
            queries,
            user_B=torch.from_numpy(user_B),
            history_N=torch.from_numpy(item_N[keep_N]),
            offsets_B1=torch.from_numpy(before_N1[offsets_B1]),
            profile=None if self.profile is None else self.profile.rows(queries.user_B),
            times=None if times is None else lambda: times()[torch.from_numpy(keep_N)],
        )

    def items(self, item_BC: Int64[Tensor, "B C"]) -> Int64[Tensor, "B C"]:
        """Return items in the model's rows; item 0 replaces unknown ones."""
        return torch.from_numpy(self.item_X)[item_BC].clamp_(min=0)

    def batch(self, batch: RowBatch, *, new_users_histories: bool = False) -> RowBatch:
        """Return labelled rows in the model's rows; the argument is that of `queries`."""
        queries = self.queries(batch.queries, new_users_histories=new_users_histories)
        return replace(batch, queries=queries, item_BC=self.items(batch.item_BC))

    def scores(self, score_BM: Float[Tensor, "B M"]) -> Float[Tensor, "B X"]:
        """Return the model's scores in the other events' order of items, -inf for unknown ones."""
        nowhere_B1 = score_BM.new_full((len(score_BM), 1), -torch.inf)
        item_X = torch.from_numpy(self.item_X).to(score_BM.device)
        place_X = item_X.where(item_X >= 0, score_BM.shape[1])
        return torch.cat([score_BM, nowhere_B1], dim=1).index_select(1, place_X)

    def known(self, known_M: Bool[Tensor, " M"]) -> Bool[Tensor, " X"]:
        """Return a mask of the items that the model ranks."""
        item_X = torch.from_numpy(self.item_X)
        return known_M[item_X.clamp(min=0)] & (item_X >= 0)

    def counts(self, count_M: Int64[np.ndarray, " M"]) -> Int64[np.ndarray, " X"]:
        """Return the number of training events of each item."""
        counts: Int64[np.ndarray, " X"] = np.append(count_M, 0)[self.item_X]
        return counts


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Trained(Shown):
    """A model with the vocabularies and histories it was trained on.

    Shape legend: B queries, I items.
    """

    config: Config
    model: Model
    """A `Retriever`, a `Scorer` or a `TwoStage`, in evaluation mode."""
    events: Interactions
    """The training events; their vocabularies map ids to rows."""
    features: Features | None = None
    """The features of users, items and the context that the model was given."""
    seed: int
    objective: ObjectiveConfig | None = None
    """The training objective; None for a model that is fitted in closed form."""
    learned_from: LearnedFrom | Literal[""] = ""
    """The parts of the split that it was trained on; empty if this was not recorded."""
    train_seconds: float = 0.0
    epochs: tuple[int, ...] = (1,)
    """The number of epochs that validation chose, for each of two stages or for a single model; 1
    for a model that is fitted in closed form. Bundles do not store it."""
    settings: Mapping[str, object] = field(default_factory=dict)
    """Everything that determined the run, as plain JSON values."""
    log: Mapping[str, object] = field(default_factory=dict)
    """The course of training: epochs, the validation metric of each, and why it stopped."""
    calibration: Mapping[str, Calibration] = field(default_factory=dict)
    """The calibration of each binary task's probabilities, by the task's name. Lists are ordered by
    the uncalibrated probabilities, because calibrated ones may tie."""
    translation: Translation | None = None
    """Maps the rows of users and items in queries to the rows of `events`; None if they are the
    same. `known_I`, `item_count` and scores use the rows of the queries."""

    @checked
    def asked_by(self, events: Interactions) -> "Trained":
        """Return a model for queries in the rows of other events, matched by id.

        A user that the model does not know is treated as a new user, with its history and features;
        an item that it does not know has no score and is left out of histories.
        """
        found = Translation.of(self.events, events)
        if found is None:
            return self
        stated = None if self.features is None else self.features.user
        if stated is not None and events.user_table is not None and self.model.reads_profiles:
            found = replace(found, profile=stated.encode(events.user_table))
        return replace(self, translation=found)

    @property
    def item_count(self) -> Int64[np.ndarray, " I"]:
        """The number of training events of each item."""
        count_I = self.events.item_count
        return count_I if self.translation is None else self.translation.counts(count_I)

    @property
    def known_I(self) -> Bool[Tensor, " I"]:
        """The items that the model ranks.

        These are the items with a training event, and items that the model can score by their
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
        """The context features that the model was given; None if there are none."""
        return None if self.features is None else self.features.context

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes on features and labels that were left out, or that the model does not read."""
        stated, ranker = self.features, self.model.second_stage
        reads_labels = isinstance(ranker, Ranker) and any(task.column for task in ranker.tasks)
        labels = (
            notes_about_labels(self.events, ranker.tasks)
            if isinstance(ranker, Ranker) and reads_labels
            else unread_labels(self.events)
        )
        if isinstance(ranker, HistoryRanker):
            reads = ranker.reads != "nothing"
            labels += notes_about_histories(self.events, ranker.tasks, reads=reads)
        if stated is None:
            return labels
        sides = (
            ("users", stated.user, self.model.reads_profiles),
            ("items", stated.item, ranker.scores_new_items or placer(self.model) is not None),
            ("the context", stated.context, self.model.reads_context),
        )
        unread = (
            f"features of {name} were given, but {type(self.model).__name__} reads none"
            for name, side, is_read in sides
            if side is not None and not is_read
        )
        return (*labels, *stated.notes, *unread)

    @checked
    def calibrated(self, prediction: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return a ranker's predictions by the task's name, with calibrated probabilities."""
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
            DataError: The queries have rows of users or items that the events do not have.
            NonFiniteError: The model returned NaN or infinity for an item of its catalogue.
        """
        asked = self.translation
        num_users = self.events.num_users if asked is None else len(asked.user_U)
        num_items = self.events.num_items if asked is None else len(asked.item_X)
        for row_N, num in ((queries.user_B, num_users), (queries.history_N, num_items)):
            if row_N.numel() and row_N.max() >= num:
                raise DataError(
                    f"the queries have row {int(row_N.max())} of users or items, but there are "
                    f"{num:,}: they belong to other events, so call trained.asked_by(those events)",
                    name="queries",
                    value=int(row_N.max()),
                )
        return self.scorer()(queries)

    @torch.inference_mode()
    @checked
    def scorer(self, *, exclude_seen: bool = False) -> Callable[[Queries], Float[Tensor, "B I"]]:
        """Return `score` for many blocks in a row; models compute their item vectors only once.

        The weights must not change between calls. Each call returns a new tensor, which a caller in
        inference mode may write into.

        Args:
            exclude_seen: Set the scores of items in a query's history to -inf; in a two-stage model
                they are not candidates either.
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
    """Return a function that scores a block of queries with one model, in a new tensor.

    Raises:
        ConfigError: The model can neither retrieve nor score; raised by the returned function.
    """

    def find(queries: Queries) -> Tensor:
        if isinstance(model, Retriever):
            return model.products(model.encode(queries).float())
        if isinstance(model, Scorer):
            return model.score(queries).float().clone()
        raise ConfigError(f"{type(model).__name__} can neither retrieve nor score")

    return find

"""All training objectives, which compute a scalar loss from a model and a batch.

With pairs, the positive item should score above other items; with histories, each event is
predicted from earlier events, or masked events are predicted from the others; with labelled rows,
each task learns from the rows that have its label, in one sum.

Shape legend: B pairs or rows, V distinct items, D width, R rows of a table, L positions, T masked
positions of a row, or tasks, N events of the batch or masked positions, X distinct items, C items
per row.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal, final

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from pydantic import Field, model_validator
from torch import Tensor, nn

from foretaste.arguments import checked
from foretaste.config import Config, Count, CountOrZero, Positive, Weight
from foretaste.data.arrays import check_fits
from foretaste.data.batch import PairBatch, Prepared, RowBatch, SequenceBatch
from foretaste.data.interactions import Interactions
from foretaste.data.plans import Windows
from foretaste.data.tasks import LabelScale, Task
from foretaste.errors import ConfigError
from foretaste.losses import listwise_loss, task_loss, uncertain_terms
from foretaste.models.base import PairVectors, Ranker, Retriever
from foretaste.training import processes
from foretaste.training.candidates import (
    CandidateConfig,
    CandidateLoss,
    Candidates,
    Loss,
)


class PairsConfig(CandidateConfig):
    """Settings of learning from pairs."""

    kind: Literal["pairs"] = "pairs"
    loss: Loss = "sampled_softmax"
    """"softmax": cross-entropy over the whole catalogue. The others compare with negatives."""
    l2: Weight = 0.0
    """Weight of half the squared norm of the base vectors that a pair uses: those of its user, of
    its item and, averaged over the batch, of its candidates."""
    contrast: Weight = 0.0
    """Weight of the contrastive loss between a model's two views of the same users and items, for
    models that produce such views."""
    contrast_temperature: Positive = 0.2
    """Divisor of the similarities in the contrastive loss."""
    hard_negatives: CountOrZero = 0
    """Maximum number of hard negatives of each pair: items that its user has not interacted
    with."""
    hard_from: Literal["walks", "index"] = "walks"
    """Where hard negatives come from: "walks", items that random walks from the pair's item visit
    often; "index", items that the current model scores high for the pair's user."""
    hard_refresh: Count = 1
    """Epochs between two searches of the "index", each with the weights at that time."""
    hard_refresh_steps: CountOrZero = 0
    """Steps between two searches of the "index" in a thread alongside training. The results of a
    search are used this many steps after it began, for as many steps, so that a run depends only on
    its seed. 0: the search runs at the start of an epoch, and training waits."""
    hard_from_epoch: Count = 2
    """The first epoch with hard negatives, counted from 1. It has one for each pair, and each later
    epoch has one more."""
    hard_ranks: tuple[CountOrZero, Count] = (10, 100)
    """The nearest and the farthest rank of hard negatives, by visits or by score. A window of half
    this range moves from the farthest ranks to the nearest."""
    hard_epochs: Count = 10
    """Epochs in which the window reaches the nearest ranks."""

    @model_validator(mode="after")
    def _ranks_rise(self) -> "PairsConfig":
        if self.hard_ranks[0] >= self.hard_ranks[1]:
            raise ValueError(
                f"hard_ranks {self.hard_ranks}: the farthest rank must be above the nearest"
            )
        if self.hard_negatives and self.loss == "softmax":
            raise ValueError(
                "the loss softmax uses all items as negatives: leave out hard_negatives"
            )
        return self


@dataclass(frozen=True, kw_only=True)
class Hardness:
    """State of the hard-negative curriculum in one epoch."""

    num: int
    """Number of hard negatives of each pair; 0: none yet."""
    ranks: tuple[int, int]
    """The first rank and the one after the last."""


def hardness(config: PairsConfig, epoch: int) -> Hardness:
    """Return the curriculum's state in an epoch, counted from 0."""
    since = epoch + 1 - config.hard_from_epoch
    nearest, farthest = config.hard_ranks
    width = max(1, (farthest - nearest) // 2)
    way = min(1.0, max(0, since) / max(1, config.hard_epochs - 1))
    low = round(farthest - width + way * (nearest - (farthest - width)))
    num = min(config.hard_negatives, since + 1) if since >= 0 else 0
    return Hardness(num=num, ranks=(low, low + width))


@dataclass(frozen=True, eq=False, kw_only=True)
class DrawnPairs:
    """A batch with everything for its step that needs no weights; producers make it in advance."""

    batch: PairBatch
    candidates: Candidates
    prepared: Prepared | None
    """The result of `Retriever.prepare`."""
    generator_state: Tensor
    """State of the step's generator after the draw."""

    def __len__(self) -> int:
        return len(self.batch)

    def to(self, device: torch.device) -> "DrawnPairs":
        """Return the batch on a device."""
        return DrawnPairs(
            batch=self.batch.to(device),
            candidates=self.candidates.to(device),
            prepared=None if self.prepared is None else self.prepared.to(device),
            generator_state=self.generator_state,
        )


@final
class Pairs(nn.Module):
    """The objective: call it with a model and a batch for the mean loss over the pairs."""

    def __init__(self, config: PairsConfig, events: Interactions) -> None:
        """Prepare to draw.

        Raises:
            DataError: There is no event.
        """
        super().__init__()
        self.config, self.loss = config, CandidateLoss(config, events)

    def draw(self, model: Retriever, batch: PairBatch, *, seed: int) -> DrawnPairs:
        """Draw the candidates of a batch in advance, with the seed of its step.

        The result is the same as if the step drew the candidates itself.
        """
        generator = torch.Generator().manual_seed(seed)
        candidates = self.loss.draw(
            batch.queries.user_B, batch.item_B, batch.hard_BH, generator=generator
        )
        return DrawnPairs(
            batch=batch,
            candidates=candidates,
            prepared=model.prepare(batch.queries, candidates.own_item_X),
            generator_state=generator.get_state(),
        )

    def forward(
        self,
        model: Retriever,
        batch: PairBatch | DrawnPairs,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, ""]:
        """Return the loss; draws use `generator`, or torch's global one if it is None."""
        generator = generator or torch.default_generator
        if isinstance(batch, PairBatch):
            candidates = self.loss.draw(
                batch.queries.user_B, batch.item_B, batch.hard_BH, generator=generator
            )
            queries, prepared = batch.queries, None
        else:
            candidates, queries, prepared = batch.candidates, batch.batch.queries, batch.prepared
            generator.set_state(batch.generator_state)
        ahead = () if prepared is None else (prepared,)
        vectors: PairVectors = model(queries, candidates.own_item_X, *ahead)
        loss: Tensor = self.loss(candidates, vectors.query_BD, vectors.item_VD)
        if self.config.l2:
            squares = [_half_square(base_RD) for base_RD in vectors.base]
            loss = loss + self.config.l2 * torch.stack(squares).sum()
        if self.config.contrast:
            if not vectors.views:
                raise ConfigError(
                    f"objective.contrast is {self.config.contrast:g}, but this model produces no "
                    "contrastive views: set it to 0, or LightGCN's contrast_layer to 1 or more",
                    name="objective.contrast",
                    value=self.config.contrast,
                )
            views = [_agreement(a, b, self.config.contrast_temperature) for a, b in vectors.views]
            loss = loss + self.config.contrast * torch.stack(views).sum()
        return loss


def _half_square(base_RD: Tensor) -> Tensor:
    return processes.mean_of_all(base_RD.square().sum() / 2, len(base_RD))


def _agreement(one_RD: Tensor, other_RD: Tensor, temperature: float) -> Float[Tensor, ""]:
    """Return InfoNCE of two views: each row should match the same row of the other view."""
    one_RD, other_RD = F.normalize(one_RD, dim=1), F.normalize(other_RD, dim=1)
    own_R = torch.arange(len(one_RD), device=one_RD.device)
    return F.cross_entropy(one_RD @ other_RD.T / temperature, own_R)


class NextItemConfig(CandidateConfig):
    """Settings of next-item prediction."""

    kind: Literal["next_item"] = "next_item"
    windows: Windows = "all"
    """"last": a user's last max_len events, as in SASRec's paper. "all": every event; long
    histories are cut into windows."""


@final
class NextItem(nn.Module):
    """The objective: call it with a model and a batch for the mean loss over the events.

    Each event of a history is predicted from the state before it. The batch shares its negatives,
    so one matrix product scores them all. **Departure**: the papers draw the negatives of BCE and
    gBCE for each event (as `row_negatives` does); the expected gradient is the same.
    """

    def __init__(self, config: NextItemConfig, events: Interactions) -> None:
        """Prepare to draw.

        Raises:
            DataError: No item has a training event.
        """
        super().__init__()
        self.loss = CandidateLoss(config, events)

    def forward(
        self, model: Retriever, batch: SequenceBatch, generator: torch.Generator | None = None
    ) -> Float[Tensor, ""]:
        """Return the loss; draws use `generator`, or torch's global one if it is None."""
        state_BLD: Tensor = model(batch)
        user_N = batch.user_B.unsqueeze(1).expand_as(batch.item_BL)[batch.valid_BL]
        candidates = self.loss.draw(user_N, batch.item_BL[batch.valid_BL], generator=generator)
        item_XD = model.items(candidates.own_item_X)
        loss: Tensor = self.loss(candidates, state_BLD[:, :-1][batch.valid_BL], item_XD)
        return loss


class MaskedItemConfig(CandidateConfig):
    """Settings of masked-item prediction."""

    kind: Literal["masked_item"] = "masked_item"
    mask_ratio: float = Field(default=0.2, gt=0, lt=1)
    """Share of a row's events that are masked, rounded; at least one event is masked."""
    last_share: float = Field(default=0.1, ge=0, le=1)
    """Share of rows in which only the last event is masked, as for a recommendation; 1 in 11 in the
    paper."""
    windows: Windows = "all"
    """"last": a user's last max_len events, as in the paper. "all": every event; long histories are
    cut into windows."""


@final
class MaskedItem(nn.Module):
    """The objective: call it with a model and a batch for the mean loss over masked events.

    **Departure** from the paper: the masked events are drawn again at each step, and the rows that
    mask only the last event are mixed with the others instead of following them.
    """

    def __init__(self, config: MaskedItemConfig, events: Interactions) -> None:
        """Prepare to draw.

        Raises:
            DataError: No item has a training event.
        """
        super().__init__()
        self.config, self.loss = config, CandidateLoss(config, events)

    def forward(
        self, model: Retriever, batch: SequenceBatch, generator: torch.Generator | None = None
    ) -> Float[Tensor, ""]:
        """Return the loss; draws use `generator`, or torch's global one if it is None."""
        (length_B,), own = processes.all_rows(batch.valid_BL.sum(dim=1))
        place_BT, real_BT = draw_places(
            length_B,
            mask_ratio=self.config.mask_ratio,
            last_share=self.config.last_share,
            generator=generator,
        )
        place_BT, real_BT = place_BT[own], real_BT[own]
        state_BTD: Tensor = model(batch, place_BT)
        target_N = batch.item_BL.gather(1, place_BT)[real_BT]
        user_N = batch.user_B.unsqueeze(1).expand_as(place_BT)[real_BT]
        candidates = self.loss.draw(user_N, target_N, generator=generator)
        item_XD = model.items(candidates.own_item_X)
        loss: Tensor = self.loss(candidates, state_BTD[real_BT], item_XD)
        return loss


def draw_places(
    length_B: Int64[Tensor, " B"],
    *,
    mask_ratio: float,
    last_share: float,
    generator: torch.Generator | None = None,
) -> tuple[Int64[Tensor, "B T"], Bool[Tensor, "B T"]]:
    """Draw the masked positions of each row, on the CPU.

    Args:
        length_B: Number of events of each row, at least 1.
        mask_ratio: Share of the events that are masked, rounded, at least one event.
        last_share: Probability that only the last event of a row is masked.
        generator: Source of all randomness; None: torch's own.

    Returns:
        Positions in [0, length), distinct within a row, and which of them are real: rows with fewer
        positions than others repeat their first one as padding.
    """
    device, width = length_B.device, int(length_B.max())
    last_B = torch.rand(len(length_B), generator=generator).to(device) < last_share
    num_B = (length_B * mask_ratio).round().long().clamp(min=1).where(~last_B, 1)
    place_L = torch.arange(width, device=device)
    last_BL = place_L == length_B.unsqueeze(1) - 1
    key_BL = torch.rand(len(length_B), width, generator=generator).to(device)
    key_BL[place_L >= length_B.unsqueeze(1)] = 2
    key_BL[last_BL & last_B.unsqueeze(1)] = -1
    most = int(num_B.max())
    place_BT = key_BL.topk(most, dim=1, largest=False).indices
    real_BT = torch.arange(most, device=device) < num_B.unsqueeze(1)
    return place_BT.where(real_BT, place_BT[:, :1]), real_BT


USUAL_NEGATIVES = 4
"""Negatives for each row if the data hold positive events only, as in He et al. 2017."""


class RowsConfig(Config):
    """Settings of learning from labelled rows."""

    kind: Literal["rows"] = "rows"
    weighting: Literal["fixed", "uncertainty"] = "fixed"
    """How the tasks' losses are summed: "fixed", by each task's `weight`; "uncertainty", also by a
    learned uncertainty, so that noisy tasks count less."""
    negatives: CountOrZero | Literal["usual"] = "usual"
    """Items drawn for each row; they have label 0 for every binary task, and no label for the
    others. "usual": 4 if no task has a column, so that the data hold positive events only; else
    0."""
    negatives_from: Literal["uniform", "popularity", "retriever"] = "uniform"
    """Which items are drawn: "uniform", all equally often; "popularity", popular ones more often;
    "retriever", a retriever's candidates."""
    retriever_share: float = Field(default=1.0, ge=0, le=1)
    """With "retriever": the probability that a drawn item is a candidate, and not any item."""
    popularity_power: float = Field(default=0.75, ge=0, le=10)
    """With "popularity": items are drawn with probability ~ count^power."""
    exclude_known: bool = True
    """Whether items of the user's training events are never drawn; otherwise only the row's own
    item is excluded."""
    positive: str = ""
    """Column whose values above 0 mark positive events. Histories contain only positive events, and
    only their items are excluded from draws. Empty: every event is positive."""
    stop_by: Literal["usual", "rows"] = "usual"
    """What validation measures: "usual", the labels, or, if the data hold positive events only,
    lists over the whole catalogue; "rows", the labels, with drawn items as zeros of every binary
    task as in training, which costs less than lists if there are many items."""

    @checked
    def num_negatives(self, tasks: tuple[Task, ...]) -> int:
        """Return how many items are drawn for each row."""
        if self.negatives != "usual":
            return self.negatives
        return 0 if any(task.column for task in tasks) else USUAL_NEGATIVES


@final
class LabelledRows(nn.Module):
    """The objective: call it with a ranker and a batch for the weighted sum of its tasks' losses.

    A task's loss is the mean over the rows that have its label. Missing labels are ignored, never
    treated as 0, and a task without a label in a batch does not contribute to its step. If the rows
    have scores of a retriever, these are added to the logits, and the loss is a softmax over the
    row's own item and the drawn ones (`listwise_loss`).
    """

    def __init__(
        self, config: RowsConfig, tasks: tuple[Task, ...], scales: Mapping[str, LabelScale]
    ) -> None:
        """Prepare.

        Args:
            config: The settings.
            tasks: The ranker's tasks.
            scales: The scale of each regression task's training labels, by the task's name.
        """
        super().__init__()
        self.tasks = tasks
        self.scales = {task.name: scales.get(task.name, LabelScale(0.0, 1.0)) for task in tasks}
        self.log_sigma_T = (
            nn.Parameter(torch.zeros(len(tasks))) if config.weighting == "uncertainty" else None
        )

    def forward(
        self, model: Ranker, batch: RowBatch, _: torch.Generator | None = None
    ) -> Float[Tensor, ""]:
        self._check_judged(model, batch)
        outputs = model(batch.queries, batch.item_BC)
        if batch.first_BC is None:
            loss = self._of_labels(outputs, batch.label_BCT)
        else:
            hidden_BC = batch.label_BCT[:, :, 0].isnan()
            logit_BC = outputs[self.tasks[0].name] + batch.first_BC
            loss = _mean_of_all(listwise_loss(logit_BC, hidden_BC), logit_BC)
        penalty = model.penalty(batch.queries, batch.item_BC)
        return loss if penalty is None else loss + _mean_of_all(penalty, batch.item_BC)

    def _check_judged(self, model: Ranker, batch: RowBatch) -> None:
        """Check the memory for each item's activations, their gradients, and ReLU's inputs."""
        linear = (layer for layer in model.modules() if isinstance(layer, nn.Linear))
        widths = sum(layer.out_features for layer in linear)
        num = batch.item_BC.shape[1] - 1
        check_fits(
            batch.item_BC.numel() * widths * 12,
            f"scoring {num:,} drawn items for each of {len(batch.item_BC):,} rows",
            "lower objective.negatives or training.batch_events",
            name="negatives" if num else "batch_events",
            value=num or len(batch.item_BC),
        )

    def _of_labels(
        self, outputs: Mapping[str, Tensor], label_BCT: Float[Tensor, "B C T"]
    ) -> Float[Tensor, ""]:
        losses = self.losses(outputs, label_BCT)
        if not losses:
            return torch.stack([output.sum() for output in outputs.values()]).sum() * 0.0
        places = [place for place, task in enumerate(self.tasks) if task.name in losses]
        weight_T = outputs[self.tasks[0].name].new_tensor([self.tasks[p].weight for p in places])
        loss_T = torch.stack([losses[self.tasks[p].name] for p in places])
        if self.log_sigma_T is not None:
            loss_T = uncertain_terms(loss_T, self.log_sigma_T[places])
        return (weight_T * loss_T).sum()

    def losses(
        self, outputs: Mapping[str, Tensor], label_BCT: Float[Tensor, "B C T"]
    ) -> dict[str, Float[Tensor, ""]]:
        """Return the mean loss of each task that has a label in the batch."""
        summed, nums = [], []
        for place, task in enumerate(self.tasks):
            label_BC, output = label_BCT[:, :, place], outputs[task.name].float()
            labelled_BC = ~label_BC.isnan()
            nums.append(int(labelled_BC.sum()))
            if nums[-1]:
                label_N, scale = label_BC[labelled_BC], self.scales[task.name]
                summed.append(nums[-1] * task_loss(task, output[labelled_BC], label_N, scale))
            else:
                summed.append(output.sum() * 0.0)
        means, totals = processes.means_of_all(torch.stack(summed), nums)
        found = zip(self.tasks, means, totals, strict=True)
        return {task.name: mean for task, mean, total in found if total}

    def sigmas(self) -> dict[str, float]:
        """Return each task's learned sigma; empty if the weights are fixed."""
        if self.log_sigma_T is None:
            return {}
        sigmas = self.log_sigma_T.detach().exp().tolist()
        return {task.name: sigma for task, sigma in zip(self.tasks, sigmas, strict=True)}


def _mean_of_all(mean: Tensor, row_BC: Tensor) -> Float[Tensor, ""]:
    """Return the mean over the rows of all processes, given the mean over this process's rows.

    Without own rows the given mean is NaN, and it contributes a sum of 0.
    """
    num = len(row_BC)
    return processes.mean_of_all(num * mean if num else row_BC.sum().to(mean) * 0.0, num)


ObjectiveConfig = Annotated[
    NextItemConfig | MaskedItemConfig | PairsConfig | RowsConfig, Field(discriminator="kind")
]

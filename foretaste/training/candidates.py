"""Candidates and losses for retrievers: which items a positive is compared with, and how.

A row is a query with its positive item: the user of a pair, or a position in a history. Its
negatives come from up to three sources: items drawn once for the whole batch, the batch's other
positives, and items drawn for the row alone. Every loss can be combined with every source.

Shape legend: N rows, M shared candidates, H own candidates, V distinct items, X items that this
process encodes, D width, I items, P pairs.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, final

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from pydantic import Field, model_validator
from torch import Tensor, nn

from foretaste.config import Config, CountOrZero, Positive
from foretaste.data.arrays import check_fits
from foretaste.data.interactions import Interactions
from foretaste.losses import (
    LossGradient,
    bce_loss_gradient,
    bpr_loss_gradient,
    chunked_loss,
    gbce_power,
    hardest,
    margin_loss_gradient,
    softmax_loss_gradient,
)
from foretaste.sampling.negatives import Seen, draw_unseen
from foretaste.sampling.samplers import (
    DistinctSampler,
    InBatchSampler,
    PopularitySampler,
    Sampler,
    StreamedFrequency,
    UniformSampler,
)
from foretaste.training import processes

Loss = Literal["softmax", "sampled_softmax", "bce", "gbce", "bpr", "margin"]


class CandidateConfig(Config):
    """Settings of the loss and of the negatives, shared by all objectives."""

    loss: Loss = "softmax"
    """"softmax": cross-entropy over the whole catalogue. The others compare with negatives."""
    negatives: CountOrZero = 512
    """How many distinct items are drawn for a batch; all its rows share them."""
    row_negatives: CountOrZero = 0
    """How many items are drawn separately for each row, as in the BPR paper."""
    in_batch: bool = False
    """Whether the other positives of the batch are negatives too. With `negatives`, both kinds are
    used."""
    frequency: Literal["counted", "streamed"] = "counted"
    """How the probability of an item in a batch is computed: "counted", exactly, from its training
    events; "streamed", estimated from the batches so far."""
    popularity_power: float = Field(default=0.0, ge=0, le=10)
    """Negatives are drawn with probability ~ count^power; 0 is uniform."""
    hardest: CountOrZero = 0
    """Only this many negatives of a row, those with the highest scores, enter the loss; 0: all."""
    exclude_known: bool = False
    """Whether items of the user's training events are excluded from the negatives; otherwise only
    the row's own item is excluded."""
    log_q: bool = True
    """Whether sampled softmax corrects each negative by its expected number of draws."""
    calibration: float = Field(default=0.75, ge=0, le=1)
    """The parameter t of gBCE: 0 is BCE, 1 calibrates probabilities fully."""
    margin: Positive = 1.0
    """For the margin loss: the required distance of the positive's score from a negative's."""

    @model_validator(mode="after")
    def _has_negatives(self) -> "CandidateConfig":
        if self.loss != "softmax" and not (self.negatives or self.row_negatives or self.in_batch):
            raise ValueError(
                f"the loss {self.loss} needs negatives: set negatives, row_negatives or in_batch"
            )
        asked = [n for n in ("in_batch", "row_negatives", "popularity_power") if getattr(self, n)]
        if self.loss == "softmax" and asked:
            raise ValueError(
                f"the loss softmax uses all items as negatives: omit {', '.join(asked)}, or "
                'take another loss, such as "sampled_softmax"'
            )
        if self.frequency == "streamed" and not self.in_batch:
            raise ValueError("frequency is only for in-batch negatives: set in_batch, or omit it")
        return self


@dataclass(frozen=True, eq=False, kw_only=True)
class Candidates:
    """The candidates that the rows of a batch are compared with."""

    item_V: Int64[Tensor, " V"]
    """All items whose vectors are needed, without duplicates."""
    target_N: Int64[Tensor, " N"]
    """Position in `item_V` of each row's positive; likewise for the next two fields."""
    shared_M: Int64[Tensor, " M"]
    own_NH: Int64[Tensor, "N H"]
    hidden_2P: Int64[Tensor, "2 P"]
    """(row, column) of candidates that are not negatives; columns from M on are the row's own
    candidates."""
    log_count_M: Float[Tensor, " M"]
    """Log of the expected number of draws of each shared candidate for a row."""
    log_count_NH: Float[Tensor, "N H"]

    def to(self, device: torch.device) -> "Candidates":
        """Return the candidates on a device."""
        return Candidates(**{name: tensor.to(device) for name, tensor in vars(self).items()})

    @property
    def own_item_X(self) -> Int64[Tensor, " X"]:
        """The items of `item_V` that this process encodes; all of them if there is one process."""
        return self.item_V[processes.share().of(len(self.item_V))]

    def of_rows(self, rows: slice) -> "Candidates":
        """Return the candidates of some of the rows, with the same items and shared candidates."""
        if rows == slice(0, len(self.target_N)):
            return self
        row_P = self.hidden_2P[0]
        hidden_2P = self.hidden_2P[:, (row_P >= rows.start) & (row_P < rows.stop)]
        return replace(
            self,
            target_N=self.target_N[rows],
            own_NH=self.own_NH[rows],
            hidden_2P=hidden_2P - hidden_2P.new_tensor([[rows.start], [0]]),
            log_count_NH=self.log_count_NH[rows],
        )


@final
class CandidateLoss(nn.Module):
    """Draws a batch's candidates and computes the loss.

    It is a module because the item frequencies that it estimates are part of a run's state.
    """

    def __init__(self, config: CandidateConfig, events: Interactions) -> None:
        """Prepare to draw.

        Args:
            config: The settings.
            events: Training events; items without events are not candidates.

        Raises:
            DataError: There are no events.
        """
        super().__init__()
        count_I = torch.from_numpy(events.item_count)
        self.config, self.num_items = config, events.num_items
        self.shared = DistinctSampler(count_I, power=config.popularity_power)
        self.in_batch = _in_batch_sampler(config, count_I) if config.in_batch else None
        self.own = _row_sampler(config, events) if config.row_negatives else None
        self.seen = Seen.of(events) if config.exclude_known else None
        self.num_known = len(self.shared.known)

    @property
    def draws_ahead(self) -> bool:
        """Whether batches may be drawn in advance; not with estimated frequencies."""
        return not isinstance(self.in_batch, StreamedFrequency)

    def draw(
        self,
        user_N: Int64[Tensor, " N"],
        target_N: Int64[Tensor, " N"],
        hard_NH: Int64[Tensor, "N H"] | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> Candidates:
        """Draw the candidates of a batch; each of several processes draws for all rows.

        Args:
            user_N: user_idx of each row.
            target_N: Its observed item_idx.
            hard_NH: Hard negatives of each row, found in advance; they are not corrected for
                sampling.
            generator: Source of all randomness; None: torch's own.

        Raises:
            DataError: Known items are excluded, and a user has interacted with every item.
            TooLargeError: The rows' own negatives would not fit in memory.
        """
        config, device = self.config, target_N.device
        if hard_NH is None or config.loss == "softmax":
            hard_NH = target_N.new_empty(len(target_N), 0)
        (user_N, target_N, hard_NH), own = processes.all_rows(user_N, target_N, hard_NH)
        processes.same_draws(generator or torch.default_generator)
        num = self.num_known if config.loss == "softmax" else config.negatives
        drawn = self.shared.draw(num, device=device, generator=generator)
        item_M, chances = drawn.item_M, [drawn.chance]
        own_NH = target_N.new_empty(len(target_N), 0)
        if config.loss != "softmax":
            if self.in_batch is not None:
                others = self.in_batch.draw(target_N)
                item_M = torch.cat([item_M, others.item_M]).unique()
                chances.append(others.chance)
            if self.own is not None:
                own_NH = self._draw_own(user_N, target_N, generator or torch.default_generator)
        num_drawn = own_NH.shape[1]
        own_NH = torch.cat([own_NH, hard_NH], dim=1)
        named = torch.cat([target_N, item_M, own_NH.flatten()])
        item_V, place = named.unique(return_inverse=True)
        log_count_NH = self._count(own_NH, chances, num_drawn).log()
        log_count_NH[:, num_drawn:] = 0
        return Candidates(
            item_V=item_V,
            target_N=place[: len(target_N)],
            shared_M=place[len(target_N) : len(target_N) + len(item_M)],
            own_NH=place[len(target_N) + len(item_M) :].view(own_NH.shape),
            hidden_2P=self._hidden(user_N, target_N, item_M, own_NH),
            log_count_M=self._count(item_M, chances, num_drawn).log(),
            log_count_NH=log_count_NH,
        ).of_rows(own)

    def forward(
        self,
        candidates: Candidates,
        query_ND: Float[Tensor, "N D"],
        item_XD: Float[Tensor, "X D"],
    ) -> Float[Tensor, ""]:
        """Return the mean loss over all rows, given the vectors of `candidates.own_item_X`."""
        item_VD = processes.joined_vectors(item_XD, len(candidates.item_V))
        corrected = self.config.loss == "sampled_softmax" and self.config.log_q
        has_own = candidates.own_NH.shape[1] > 0
        self._check_own(len(query_ND), bytes_each=12 * query_ND.shape[1])
        loss = chunked_loss(
            query_ND,
            F.embedding(candidates.target_N, item_VD),
            F.embedding(candidates.shared_M, item_VD),
            self._loss_gradient(len(candidates.shared_M) + candidates.own_NH.shape[1]),
            hidden_2P=candidates.hidden_2P,
            offset_M=-candidates.log_count_M if corrected else None,
            own_NHD=F.embedding(candidates.own_NH, item_VD) if has_own else None,
            own_offset_NH=-candidates.log_count_NH if corrected and has_own else None,
        )
        return processes.mean_of_all(loss, len(query_ND))

    def _check_own(self, num_rows: int, *, bytes_each: int) -> None:
        num = self.config.row_negatives
        check_fits(
            num_rows * num * bytes_each,
            f"{num:,} negatives of each of {num_rows:,} rows",
            "lower objective.row_negatives or training.batch_events",
            name="row_negatives",
            value=num,
        )

    def _draw_own(self, user_N: Tensor, target_N: Tensor, generator: torch.Generator) -> Tensor:
        num = self.config.row_negatives
        self._check_own(len(user_N), bytes_each=32)
        if self.own is None or self.seen is None:
            drawn = self.own.draw((len(user_N), num), generator=generator) if self.own else None
            return target_N.new_empty(len(user_N), 0) if drawn is None else drawn.to(target_N)
        user_cpu = user_N.cpu()
        drawn = draw_unseen(self.own, user_cpu, num, seen=self.seen, generator=generator)
        return drawn.to(target_N)

    def _count(
        self, item_X: Tensor, chances: list[Callable[[Tensor], Tensor]], num_own: int
    ) -> Tensor:
        """Return how often each item is expected among the candidates of a row."""
        count_X = chances[0](item_X)
        for chance in chances[1:]:
            count_X = 1 - (1 - count_X) * (1 - chance(item_X))
        if self.own is not None and num_own:
            count_X = count_X + num_own * self.own.probability_I[item_X.cpu()].to(count_X)
        return count_X

    def _hidden(
        self, user_N: Tensor, target_N: Tensor, item_M: Tensor, own_NH: Tensor
    ) -> Int64[Tensor, "2 P"]:
        if self.seen is None:
            row_P, item_P = torch.arange(len(target_N), device=target_N.device), target_N
        else:
            row_P, item_P = self.seen.items_of(user_N.cpu())
            row_P, item_P = row_P.to(target_N.device), item_P.to(target_N.device)
        column_P = _columns(item_P, item_M)
        hidden_2P = torch.stack([row_P, column_P])[:, column_P >= 0]
        if own_NH.shape[1] == 0:
            return hidden_2P
        own_2P = (own_NH == target_N.unsqueeze(1)).nonzero().T
        own_2P[1] += len(item_M)
        both_2P = torch.cat([hidden_2P, own_2P], dim=1)
        return both_2P[:, both_2P[0].argsort(stable=True)]

    def _loss_gradient(self, num_candidates: int) -> LossGradient:
        config = self.config
        num = min(num_candidates, config.hardest) if config.hardest else num_candidates
        match config.loss:
            case "softmax" | "sampled_softmax":
                chosen: LossGradient = softmax_loss_gradient
            case "bce":
                chosen = partial(bce_loss_gradient, negative_weight=1 / max(1, num))
            case "gbce":
                rate = min(1.0, max(1, num) / max(1, self.num_known - 1))
                power = gbce_power(sampling_rate=rate, calibration=config.calibration)
                chosen = partial(bce_loss_gradient, positive_power=power)
            case "bpr":
                chosen = bpr_loss_gradient
            case "margin":
                chosen = partial(margin_loss_gradient, margin=config.margin)
        return hardest(chosen, config.hardest) if config.hardest else chosen


def _columns(item_P: Tensor, item_M: Tensor) -> Int64[Tensor, " P"]:
    """Return the positions of items in `item_M`, -1 for items that are not in it."""
    if not len(item_M):
        return torch.full_like(item_P, -1)
    sorted_M, order_M = item_M.sort()
    place_P = torch.searchsorted(sorted_M, item_P).clamp(max=len(item_M) - 1)
    return order_M[place_P].where(sorted_M[place_P] == item_P, -1)


def _in_batch_sampler(
    config: CandidateConfig, count_I: Int64[Tensor, " I"]
) -> InBatchSampler | StreamedFrequency:
    if config.frequency == "counted":
        return InBatchSampler(count_I)
    return StreamedFrequency(len(count_I), num_cells=len(count_I))


def _row_sampler(config: CandidateConfig, events: Interactions) -> Sampler:
    if config.popularity_power:
        return PopularitySampler(events.item_count, alpha=config.popularity_power)
    return UniformSampler(events.num_items, known_I=torch.from_numpy(events.item_count > 0))

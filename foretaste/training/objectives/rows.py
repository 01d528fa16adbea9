"""Learn from labelled rows: each task learns from the rows with its label; losses are summed.

Shape legend: B rows, C items of each, T tasks.
"""

from collections.abc import Mapping
from typing import Literal, final

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from foretaste.arguments import checked
from foretaste.config import Config, CountOrZero
from foretaste.data.arrays import check_fits
from foretaste.data.batch import RowBatch
from foretaste.data.tasks import LabelScale, Task
from foretaste.losses import listwise_loss, task_loss, uncertain_terms
from foretaste.models.base import Ranker
from foretaste.training import processes

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

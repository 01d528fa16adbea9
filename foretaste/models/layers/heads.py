"""Task heads: turn a network's output into training logits and predictions.

Shape legend: B queries, C items per query, T tasks, K thresholds between an ordinal task's levels.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from typing import final

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Float64, Int64
from torch import Tensor, nn

from foretaste.data.interactions import Interactions
from foretaste.data.tasks import LabelScale, Task, Weights, in_own_unit, label_scale, labels_of
from foretaste.errors import ConfigError


@final
class Heads(nn.Module):
    r"""Task heads: a binary task's number is its logit, a regression's the standardised value.

    An ordinal task's number s is compared with thresholds, and level k is exceeded with probability
    :math:`\sigma(s - \theta_k)`. Thresholds ascend by construction: each is the previous one plus a
    softplus.

    References:
        McCullagh, "Regression Models for Ordinal Data", Journal of the Royal Statistical Society B
        1980.
    """

    scale_T2: Tensor
    """Mean and standard deviation of each regression's training labels, after its transform."""

    def __init__(self, tasks: tuple[Task, ...]) -> None:
        """Make heads with evenly spread thresholds.

        Raises:
            ConfigError: There is no task, two tasks have the same name, or no task has a weight.
        """
        super().__init__()
        times = Counter(task.name for task in tasks)
        doubled = [name for name, count in times.items() if count > 1]
        if not tasks or doubled:
            found = f"two tasks are named {doubled[0]!r}" if doubled else "there is no task"
            raise ConfigError(
                f"{found}: give one or more, each with a name of its own", name="tasks"
            )
        if not any(task.weight for task in tasks):
            raise ConfigError(
                "every task has the weight 0: the model would learn nothing", name="weight", value=0
            )
        self.tasks = tasks
        self.list_weights = {
            task.name: weight
            for task in tasks
            if (weight := task.weight if task.list_weight is None else task.list_weight)
        }
        if not self.list_weights:
            raise ConfigError(
                "every task has the list_weight 0: lists would have no order",
                name="list_weight",
                value=0,
            )
        self.register_buffer("scale_T2", torch.tensor([[0.0, 1.0]] * len(tasks)))
        self.steps = nn.ParameterList(
            nn.Parameter(_steps(torch.arange(len(task.levels) - 1.0) - len(task.levels) / 2 + 1))
            for task in tasks
            if task.kind == "ordinal"
        )

    def forward(self, raw: Mapping[str, Float[Tensor, "B C"]]) -> dict[str, Tensor]:
        """Return the training outputs of each task, given a number for each."""
        outputs, steps = {}, iter(self.steps)
        for task in self.tasks:
            raw_BC = raw[task.name]
            if task.kind == "ordinal":
                outputs[task.name] = raw_BC.unsqueeze(2) - thresholds(next(steps))
            else:
                outputs[task.name] = raw_BC
        return outputs

    def predict(self, raw: Mapping[str, Float[Tensor, "B C"]]) -> dict[str, Float[Tensor, "B C"]]:
        """Return a probability, a value in the label's own unit, or the expected level."""
        return self.predictions(self(raw))

    def predictions(self, outputs: Mapping[str, Tensor]) -> dict[str, Float[Tensor, "B C"]]:
        """Return predictions like `predict`, from the training outputs of each task."""
        return {
            task.name: self._predict(place, task, outputs[task.name])
            for place, task in enumerate(self.tasks)
        }

    def answers(self, outputs: Mapping[str, Tensor]) -> dict[str, Float64[Tensor, "B C"]]:
        """Return predictions in double precision, so that a high probability stays below 1."""
        return self.predictions({name: output.double() for name, output in outputs.items()})

    def rank(self, raw: Mapping[str, Float[Tensor, "B C"]]) -> Float[Tensor, "B C"]:
        """Return the score that orders a list: a single task's number, or a weighted sum."""
        if len(self.list_weights) == 1:
            return raw[next(iter(self.list_weights))]
        return self.order(self(raw))

    def order(
        self, outputs: Mapping[str, Tensor], weights: Weights | None = None
    ) -> Float[Tensor, "B C"]:
        r"""Return the score that orders a list, from the training outputs of each task.

        .. math:: \sum_t w_t a_t

        Without weights of a request, each answer a lies in [0, 1], so that units of labels do not
        matter. For a binary task it is the probability; for an ordinal task, the position of the
        expected level between the lowest and the highest; for a regression, the share of training
        labels below the prediction if labels were (after the transform) normal. A single task is
        ordered by its raw number, which does not saturate near 1 and make two items look equal.

        Args:
            outputs: Training outputs by the task's name.
            weights: Weights of the tasks' predictions, as `predict` returns them, in their own
                units; 0 for tasks that are not named. None: the tasks' own weights of answers in
                [0, 1]; if only one task has a weight, the list is in the order of its numbers.
        """
        if weights is None and len(self.list_weights) == 1:
            (only,) = (task for task in self.tasks if task.name in self.list_weights)
            output = outputs[only.name]
            return output.mean(dim=2) if only.kind == "ordinal" else output
        if weights is None:
            weights = self.list_weights
            answers = {
                task.name: _in_0_to_1(task, outputs[task.name])
                for task in self.tasks
                if task.name in weights
            }
        else:
            answers = self.predictions(outputs)
        return torch.stack([weight * answers[name] for name, weight in weights.items()]).sum(0)

    @torch.no_grad()
    def begin(self, events: Interactions) -> None:
        """Fit the heads to the training labels: a scale for regressions, thresholds for levels.

        Raises:
            ConfigError: A task's column does not exist.
            DataError: A label does not fit its task, or a regression has no label.
        """
        steps, label_ET = iter(self.steps), labels_of(events, self.tasks)
        for place, task in enumerate(self.tasks):
            label_E = label_ET[:, place].astype(np.float64)
            if task.kind == "regression":
                scale = label_scale(task, label_E)
                self.scale_T2[place] = torch.tensor([scale.mean, scale.std])
            if task.kind == "ordinal":
                next(steps).copy_(_steps(_quantiles(task, label_E)))

    def _predict(self, place: int, task: Task, output: Tensor) -> Float[Tensor, "B C"]:
        match task.kind:
            case "binary":
                return output.sigmoid()
            case "regression":
                mean, std = self.scale_T2[place].tolist()
                value_BC = in_own_unit(task, output, LabelScale(mean, std))
                return value_BC.clamp(min=0) if task.transform == "log1p" else value_BC
            case "ordinal":
                level_L = output.new_tensor(task.levels)
                return level_L[0] + output.sigmoid() @ level_L.diff()


def _in_0_to_1(task: Task, output: Tensor) -> Float[Tensor, "B C"]:
    """Return a task's answer on the scale that all tasks share."""
    match task.kind:
        case "binary":
            return output.sigmoid()
        case "regression":
            share_BC: Tensor = torch.special.ndtr(output)
            return share_BC
        case "ordinal":
            gap_K = output.new_tensor(task.levels).diff()
            return output.sigmoid() @ (gap_K / gap_K.sum())


def thresholds(step_K: Float[Tensor, " K"]) -> Float[Tensor, " K"]:
    """Return ascending thresholds from their steps."""
    return torch.cat([step_K[:1], F.softplus(step_K[1:])]).cumsum(0)


def _steps(threshold_K: Tensor) -> Float[Tensor, " K"]:
    """Undo `thresholds`."""
    gap = threshold_K.diff().clamp(min=1e-2)
    return torch.cat([threshold_K[:1], gap + (-(-gap).expm1()).log()])


def _quantiles(task: Task, label_E: Float[np.ndarray, " E"]) -> Float[Tensor, " K"]:
    """Return the thresholds that give each level its share of the labels at s = 0."""
    found_E = torch.from_numpy(label_E[~np.isnan(label_E)]).float()  # the type of labels
    level_K = found_E.new_tensor(task.levels[:-1])
    above_K = (found_E.unsqueeze(1) > level_K).double().mean(dim=0)
    share_K = above_K.nan_to_num(0.5).clamp(0.01, 0.99)
    return -share_K.logit().float()


def score_in_blocks(
    rank: Callable[[Int64[Tensor, "1 C"]], Float[Tensor, "B C"]],
    *,
    num_queries: int,
    item_I: Int64[Tensor, " I"],
    block_pairs: int,
) -> Float[Tensor, "B I"]:
    """Run a ranker over the whole catalogue, some items at a time.

    Args:
        rank: Maps shared items to a score for each pair.
        num_queries: B.
        item_I: The catalogue.
        block_pairs: Approximate number of pairs of a query and an item in memory at once.
    """
    size = max(1, block_pairs // max(1, num_queries))
    return torch.cat([rank(item_C.unsqueeze(0)) for item_C in item_I.split(size)], dim=1)

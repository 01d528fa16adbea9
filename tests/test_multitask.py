"""Losses of labelled rows by hand and against slow sums; what is missing; the learned weighting."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from foretaste.data.batch import Queries, RowBatch
from foretaste.data.plans import Plan
from foretaste.data.tasks import LabelScale, Task, in_own_unit, label_scale, standardised
from foretaste.errors import DataError
from foretaste.losses import (
    binary_loss,
    ordinal_loss,
    regression_loss,
    task_loss,
    uncertain_terms,
)
from foretaste.models.base import Ranker
from foretaste.models.layers.heads import Heads
from foretaste.training.fit import Fit
from foretaste.training.objectives import LabelledRows, RowsConfig
from foretaste.training.settings import TrainingConfig

NAN = math.nan
CLICK = Task(name="click")
MINUTES = Task(name="minutes", kind="regression", column="minutes")
STARS = Task(name="stars", kind="ordinal", column="stars", levels=(1.0, 2.0, 5.0))


def test_the_binary_loss_by_hand_and_its_worst_row_teaches() -> None:
    # A coin's logit costs ln 2 whatever the label; ln 3 of a 1 costs ln(4/3), of a 0 ln 4.
    assert binary_loss(torch.zeros(2), torch.tensor([0.0, 1.0])).item() == pytest.approx(
        math.log(2)
    )
    three = torch.full((2,), math.log(3.0))
    loss = binary_loss(three, torch.tensor([1.0, 0.0]))
    assert loss.item() == pytest.approx((math.log(4 / 3) + math.log(4)) / 2)
    wrong = torch.tensor([-40.0], requires_grad=True)
    binary_loss(wrong, torch.ones(1)).backward()
    assert wrong.grad is not None
    assert wrong.grad.item() == pytest.approx(-1)


def test_the_two_regressions_agree_within_one_deviation_and_part_beyond_it() -> None:
    # Errors 0.5 and 3: squares .25 and 9; Huber's .25 and 2 * 3 - 1 = 5.
    value, target = torch.tensor([0.5, 4.0]), torch.tensor([0.0, 1.0])
    assert regression_loss(value, target, huber=False).item() == pytest.approx((0.25 + 9) / 2)
    assert regression_loss(value, target, huber=True).item() == pytest.approx((0.25 + 5) / 2)


def test_the_ordinal_loss_is_the_mean_over_rows_and_thresholds() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 2, generator=generator)
    labels = [1.0, 2.0, 5.0, 5.0, 1.0, 2.0]
    total = 0.0
    for row, label in enumerate(labels):
        for k, level in enumerate((1, 2)):
            above = 1 / (1 + math.exp(-logits[row, k].item()))
            total -= math.log(above if label > level else 1 - above)
    loss = ordinal_loss(logits, torch.tensor(labels), levels=(1.0, 2.0, 5.0))
    assert loss.item() == pytest.approx(total / 12, rel=1e-6)


def test_an_ordinal_task_of_two_levels_is_a_binary_one() -> None:
    logit, label = torch.randn(9), torch.randint(2, (9,)).float()
    two = ordinal_loss(logit.unsqueeze(1), label, levels=(0.0, 1.0))
    assert two.item() == pytest.approx(binary_loss(logit, label).item())


@pytest.mark.parametrize("transform", ["none", "log1p"])
def test_labels_are_standardised_and_come_back_in_their_own_unit(
    transform: Literal["none", "log1p"],
) -> None:
    task = MINUTES.model_copy(update={"transform": transform})
    labels = np.array([0.0, 3.0, NAN, 80.0], np.float32)
    scale = label_scale(task, labels)
    learned = standardised(task, torch.from_numpy(labels), scale)
    assert learned.isnan().tolist() == [False, False, True, False]
    found = learned[~learned.isnan()]
    assert found.mean().item() == pytest.approx(0, abs=1e-6)
    assert found.square().mean().item() == pytest.approx(1, rel=1e-6)
    back = in_own_unit(task, learned, scale)
    torch.testing.assert_close(back, torch.from_numpy(labels), equal_nan=True, rtol=1e-5, atol=1e-5)


def test_equal_labels_are_learned_without_a_division_by_zero() -> None:
    assert label_scale(MINUTES, np.full(4, 7.0, np.float32)) == LabelScale(7.0, 1.0)
    with pytest.raises(DataError, match=r"'minutes' has no label in training.*leave it out"):
        label_scale(MINUTES, np.full(4, NAN, np.float32))


def test_a_unit_of_the_label_changes_no_loss() -> None:
    # Minutes or seconds: the standardised target is the same, and so is what is learned.
    minutes = torch.tensor([1.0, 2.0, 30.0])
    value = torch.randn(3)
    losses = [
        task_loss(MINUTES, value, label, label_scale(MINUTES, label.numpy()))
        for label in (minutes, minutes * 60)
    ]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-6)


class Table(Ranker):
    """A ranker that knows a number an item and task, and nothing of users."""

    max_len = 1

    def __init__(self, tasks: tuple[Task, ...], num_items: int = 5) -> None:
        super().__init__()
        self.tasks = tasks
        self.heads = Heads(tasks)
        widths = [len(task.levels) - 1 if task.kind == "ordinal" else 1 for task in tasks]
        self.tables = nn.ParameterDict(
            {
                task.name: nn.Parameter(torch.linspace(-1, 1, num_items * w).reshape(num_items, w))
                for task, w in zip(tasks, widths, strict=True)
            }
        )

    def forward(self, queries: Queries, item_BC: Tensor) -> Mapping[str, Tensor]:
        found = {task.name: self.tables[task.name][item_BC] for task in self.tasks}
        return {
            task.name: found[task.name] if task.kind == "ordinal" else found[task.name].squeeze(-1)
            for task in self.tasks
        }

    def predict(self, queries: Queries, item_BC: Tensor) -> Mapping[str, Tensor]:
        return {name: output.sigmoid() for name, output in self(queries, item_BC).items()}


def batch_of(items: list[list[int]], labels: list[list[list[float]]]) -> RowBatch:
    return RowBatch(
        queries=Queries.of_histories([[] for _ in items]),
        item_BC=torch.tensor(items),
        label_BCT=torch.tensor(labels),
    )


def objective_of(tasks: tuple[Task, ...], weighting: str = "fixed") -> LabelledRows:
    config = RowsConfig.model_validate({"weighting": weighting})
    return LabelledRows(config, tasks, {"minutes": LabelScale(10.0, 2.0)})


def test_each_task_is_the_mean_over_its_own_labels_and_the_sum_is_weighted() -> None:
    tasks = (CLICK, MINUTES.model_copy(update={"weight": 3.0}), STARS)
    model, objective = Table(tasks), objective_of(tasks)
    batch = batch_of(
        [[0, 1], [2, 3]],
        [[[1, 12, NAN], [0, NAN, NAN]], [[NAN, 8, 5], [0, NAN, 1]]],
    )
    outputs = model(batch.queries, batch.item_BC)
    click = [(0, 0, 1.0), (0, 1, 0.0), (1, 1, 0.0)]
    by_hand = sum(
        -math.log(p if y else 1 - p)
        for p, y in ((outputs["click"][b, c].sigmoid().item(), y) for b, c, y in click)
    ) / len(click)
    minutes = ((outputs["minutes"][0, 0] - 1) ** 2 + (outputs["minutes"][1, 0] + 1) ** 2) / 2
    by_hand += 3 * minutes.item()
    stars = ordinal_loss(outputs["stars"][1], torch.tensor([5.0, 1.0]), levels=(1.0, 2.0, 5.0))
    by_hand += stars.item()
    assert objective(model, batch).item() == pytest.approx(by_hand, rel=1e-6)


def test_a_missing_label_is_not_a_zero_and_moves_nothing() -> None:
    model, objective = Table((CLICK, MINUTES)), objective_of((CLICK, MINUTES))
    labels = [[[1.0, 12.0]], [[NAN, NAN]], [[0.0, NAN]]]
    whole = objective(model, batch_of([[0], [4], [1]], labels))
    whole.backward()
    without = objective(model, batch_of([[0], [1]], [labels[0], labels[2]]))
    assert whole.item() == pytest.approx(without.item())
    for name, table in model.tables.items():
        assert table.grad is not None, name
        assert table.grad[4].abs().sum() == 0, name
    as_zero = objective(model, batch_of([[0], [4], [1]], [[[1.0, 12.0]], [[0, 0]], [[0.0, NAN]]]))
    assert as_zero.item() != pytest.approx(whole.item())


def test_a_batch_without_a_task_leaves_its_weight_and_its_sigma_alone() -> None:
    model, objective = Table((CLICK, MINUTES)), objective_of((CLICK, MINUTES), "uncertainty")
    objective(model, batch_of([[0], [1]], [[[1.0, NAN]], [[0.0, NAN]]])).backward()
    assert objective.log_sigma_T is not None
    assert objective.log_sigma_T.grad is not None
    assert objective.log_sigma_T.grad[0] != 0
    assert objective.log_sigma_T.grad[1] == 0


def test_a_batch_without_any_label_costs_nothing_and_can_be_stepped_over() -> None:
    model, objective = Table((CLICK,)), objective_of((CLICK,))
    loss = objective(model, batch_of([[0], [1]], [[[NAN]], [[NAN]]]))
    loss.backward()
    assert loss.item() == 0
    assert model.tables["click"].grad is not None
    assert model.tables["click"].grad.abs().sum() == 0


def test_drawn_items_are_learned_as_the_rows_that_they_are() -> None:
    model, objective = Table((CLICK,)), objective_of((CLICK,))
    side = objective(model, batch_of([[0, 1, 2]], [[[1.0], [0.0], [0.0]]]))
    below = objective(model, batch_of([[0], [1], [2]], [[[1.0]], [[0.0]], [[0.0]]]))
    assert side.item() == pytest.approx(below.item())


def test_the_sum_with_uncertainty_is_least_where_sigma_squared_is_the_loss() -> None:
    # d/ds [L e^(-2s) / 2 + s] = 1 - L e^(-2s): 0 at e^(2s) = L, where the term is 1/2 + ln(L) / 2.
    loss = torch.tensor([0.09, 1.0, 6.0])
    best = (loss.log() / 2).requires_grad_()
    terms = uncertain_terms(loss, best)
    assert terms.tolist() == pytest.approx((0.5 + loss.log() / 2).tolist())
    terms.sum().backward()
    assert best.grad is not None
    assert best.grad.tolist() == pytest.approx([0, 0, 0], abs=1e-6)
    for step in (-0.3, 0.2):
        assert (uncertain_terms(loss, best + step) > terms).all()


@dataclass
class Same(Plan[RowBatch]):
    """An epoch of one batch, over and over."""

    rows: RowBatch
    times: int = 100

    @property
    def num_events(self) -> int:
        return self.times

    def __len__(self) -> int:
        return self.times

    def batch(self, index: int) -> RowBatch:
        return self.rows


def noise_fit(folder: Path | None = None, **settings) -> tuple[Table, LabelledRows, Fit]:
    """Two labels that no model can tell apart: what is left of each loss is known."""
    tasks = (
        MINUTES,
        Task(name="seconds", kind="regression", column="seconds"),
        Task(name="click", column="click"),
    )
    model = Table(tasks, num_items=1)
    scales = {"minutes": LabelScale(0.0, 1.0), "seconds": LabelScale(0.0, 1.0)}
    objective = LabelledRows(RowsConfig(weighting="uncertainty"), tasks, scales)
    labels = [[[-0.3, -2.0, 1.0]], [[0.3, 2.0, 0.0]], [[-0.3, 2.0, 1.0]], [[0.3, -2.0, 0.0]]]
    config = TrainingConfig.model_validate(
        {"learning_rate": 0.02, "warmup_steps": 0, "epochs": 10, "device": "cpu"} | settings
    )
    run: Fit = Fit(
        model,
        config,
        seed=0,
        plan=lambda _: Same(batch_of([[0]] * 4, labels)),
        objective=objective,
        folder=folder,
    )
    return model, objective, run


def test_training_finds_the_optimum_that_paper_and_pencil_find() -> None:
    # The best constant for +-.3 is 0 and leaves .09; for +-2 it leaves 4; for a fair coin ln 2.
    model, objective, run = noise_fit(schedule="cosine")
    run.run()
    sigma = objective.sigmas()
    assert sigma["minutes"] ** 2 == pytest.approx(0.09, rel=0.01)
    assert sigma["seconds"] ** 2 == pytest.approx(4, rel=0.01)
    assert sigma["click"] ** 2 == pytest.approx(math.log(2), rel=0.01)
    assert model.tables["minutes"].item() == pytest.approx(0, abs=0.01)


class Killed(Exception):
    pass


@pytest.mark.parametrize("stop_after", [1, 57, 120])
def test_a_run_with_learned_weights_resumes_to_the_same_bits(
    tmp_path: Path, stop_after: int
) -> None:
    _, whole_objective, whole = noise_fit(epochs=2)
    whole.run()
    steps_left = iter(range(stop_after))

    def kill(*_: object) -> None:
        if next(steps_left, None) is None:
            raise Killed

    _, _, broken = noise_fit(tmp_path, checkpoint_seconds=0, epochs=2)
    with pytest.raises(Killed):
        broken.run(on_step=kill)
    model, objective, resumed = noise_fit(tmp_path, checkpoint_seconds=0, epochs=2)
    resumed.run(resume=True)
    assert objective.log_sigma_T is not None
    assert whole_objective.log_sigma_T is not None
    assert torch.equal(objective.log_sigma_T, whole_objective.log_sigma_T)
    assert objective.log_sigma_T.abs().min() > 0
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


def test_weighting_that_is_fixed_has_nothing_to_learn() -> None:
    assert list(objective_of((CLICK,)).parameters()) == []
    assert objective_of((CLICK,)).sigmas() == {}


def test_negatives_are_drawn_where_the_data_hold_only_what_happened() -> None:
    shown = Task(name="click", column="clicked")
    assert RowsConfig().num_negatives((CLICK,)) == 4
    assert RowsConfig().num_negatives((shown,)) == 0
    assert RowsConfig().num_negatives((CLICK, MINUTES)) == 0
    assert RowsConfig(negatives=7).num_negatives((shown,)) == 7

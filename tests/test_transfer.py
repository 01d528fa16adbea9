"""Joint models against single-task ones: gains, losses and gates on tasks of known correlation."""

import dataclasses

import numpy as np
import pytest

import foretaste as ft
from benchmarks.multitask_synthetic import INPUT, correlated_tasks
from foretaste.errors import ConfigError, DataError
from foretaste.evaluation.chart import gates_svg, read_gates
from foretaste.evaluation.compare import transfer
from foretaste.evaluation.report import RowsReport
from foretaste.models.rankers import MMoEConfig, SharedBottomConfig

TASKS = tuple(ft.Task(name=name, kind="regression", column=name) for name in ("first", "second"))
SCHEMA = ft.FeatureSchema(context={INPUT: ft.VectorField(normalise=False)})
EVENTS = correlated_tasks(3000, correlation=0.0, dim=6, frequencies=(), phases=())
SPLIT = ft.random_split(EVENTS, validation=0.1, test=0.3, seed=0)


def trained(config: ft.ModelConfig, *, epochs: int = 4, **more) -> ft.Trained:
    training = ft.TrainingConfig(
        epochs=epochs, batch_events=256, learning_rate=2e-2, warmup_steps=0, device="cpu"
    )
    return ft.fit(config, SPLIT, training=training, features=SCHEMA, show=False, **more)


def bottom(tasks: tuple[ft.Task, ...]) -> SharedBottomConfig:
    return SharedBottomConfig(
        tasks=tasks, embedding_dim=6, user_id=False, bottom_hidden=(16,), tower_hidden=(4,)
    )


@pytest.fixture(scope="module")
def mmoe() -> ft.Trained:
    config = MMoEConfig(
        tasks=TASKS,
        embedding_dim=6,
        user_id=False,
        num_experts=3,
        expert_hidden=(8,),
        tower_hidden=(4,),
    )
    return trained(config, epochs=40, objective=ft.RowsConfig(weighting="uncertainty"))


def measured(model: ft.Trained) -> RowsReport:
    return ft.evaluate_rows(model, SPLIT, resamples=0)


def test_two_quantities_are_learned_together_in_their_own_units(mmoe: ft.Trained) -> None:
    # Each label is a linear function of the input, of variance 1: the mean alone costs 1.
    report = measured(mmoe)
    assert report.metrics["rmse_first"] < 0.4
    assert report.metrics["rmse_second"] < 0.4
    assert set(mmoe.log["sigma"]) == {"first", "second"}
    assert all(0 < sigma < 1 for sigma in mmoe.log["sigma"].values())


def test_a_joint_model_is_compared_with_single_ones_task_by_task(mmoe: ft.Trained) -> None:
    joint = measured(mmoe)
    alone = {task.name: [measured(trained(bottom((task,))))] for task in TASKS}
    found = transfer({"mmoe": [joint]}, alone, resamples=200)
    assert [row.task for row in found.rows] == ["first", "second"]
    for row in found.rows:
        metric = f"rmse_{row.task}"
        assert row.compared.mean_a == pytest.approx(joint.metrics[metric])
        assert row.compared.mean_b == pytest.approx(alone[row.task][0].metrics["rmse"])
        assert metric in str(found)


@pytest.mark.parametrize(("factor", "verdict"), [(0.5, "gain"), (2.0, "loss"), (1.0, "neither")])
def test_less_error_is_a_gain_and_more_a_loss(
    mmoe: ft.Trained, factor: float, verdict: str
) -> None:
    joint = measured(mmoe)
    nearer = joint.label_NT + factor * (joint.prediction_NT - joint.label_NT)
    changed = dataclasses.replace(joint, prediction_NT=nearer)
    found = transfer({"other": [changed]}, {"first": [joint]}, resamples=100)
    assert [row.verdict for row in found.rows] == [verdict]
    assert verdict in str(found)


def test_other_labels_and_other_tasks_are_refused(mmoe: ft.Trained) -> None:
    joint = measured(mmoe)
    other = dataclasses.replace(joint, label_NT=joint.label_NT + 1)
    with pytest.raises(DataError, match="the labels of task 'first' differ"):
        transfer({"other": [other]}, {"first": [joint]})
    with pytest.raises(DataError, match="no joint model has a task of third"):
        transfer({"mmoe": [joint]}, {"third": [joint]})


def test_gates_are_read_as_the_model_gives_them(mmoe: ft.Trained) -> None:
    gates = read_gates(mmoe, SPLIT)
    assert gates.tasks == ("first", "second")
    assert gates.mean_TE.shape == (2, 3)
    np.testing.assert_allclose(gates.mean_TE.sum(axis=1), 1, atol=1e-6)
    assert gates.rows == (SPLIT.part_E == 2).sum()
    assert gates.apart("first", "first") == 0
    assert 0 < gates.apart("first", "second") <= 1
    picture = gates_svg(gates)
    assert picture.count("<rect") == 1 + 6
    assert "second" in picture


def test_a_model_without_gates_has_none_to_read() -> None:
    model = trained(bottom(TASKS), epochs=1)
    with pytest.raises(ConfigError, match="SharedBottom has no gates"):
        read_gates(model, SPLIT)

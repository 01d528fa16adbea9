"""Labels: how columns become tasks, and what is refused."""

import math
from typing import Literal

import numpy as np
import polars as pl
import pytest

from foretaste.data.interactions import Interactions
from foretaste.data.reading import read_interactions
from foretaste.data.tasks import Task, check_learnable, labels_of, notes_about_labels
from foretaste.errors import ConfigError, DataError

FRAME = pl.DataFrame(
    {
        "user_id": [1, 1, 2, 2],
        "item_id": [5, 6, 5, 7],
        "clicked": [1.0, 0.0, None, 1.0],
        "minutes": [0.5, 0.0, None, 90.0],
        "stars": [1, 3, 5, 3],
        "hour": [8, 9, 10, 11],
    }
)


def events(frame: pl.DataFrame = FRAME) -> Interactions:
    return read_interactions(frame, columns=["clicked", "minutes", "stars"], context=["hour"])


def test_every_kind_of_task_takes_its_labels_from_its_column() -> None:
    tasks = [
        Task(name="seen"),
        Task(name="click", column="clicked"),
        Task(name="liked", column="stars", above=2.5),
        Task(name="minutes", kind="regression", column="minutes", transform="log1p"),
        Task(name="stars", kind="ordinal", column="stars", levels=(1, 3, 5)),
    ]
    # a regression's labels stay in their own unit; a missing label is NaN, never 0
    expected = [
        [1, 1, 0, 0.5, 1],
        [1, 0, 1, 0, 3],
        [1, np.nan, 1, np.nan, 5],
        [1, 1, 1, 90, 3],
    ]
    label_ET = labels_of(events(), tasks)
    assert label_ET.dtype == np.float32
    np.testing.assert_array_equal(label_ET, np.array(expected, np.float32))


def test_a_limit_keeps_missing_labels_missing() -> None:
    long = Task(name="long", column="minutes", above=30)
    np.testing.assert_array_equal(labels_of(events(), [long])[:, 0], [0, 0, np.nan, 1])


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (Task(name="x", column="click"), "column 'click'.*did you mean 'clicked'"),
        (Task(name="x", column="hour"), "is in the context.*columns="),
        (
            Task(name="x", column="stars"),
            r"'x': column 'stars' holds 3 \(and 2 more such\).*binary task are 0 or 1: set `above`",
        ),
        (
            Task(name="x", kind="ordinal", column="stars", levels=(1, 2, 5)),
            r"holds 3 \(and 1 more such\).*its levels 1, 2, 5",
        ),
    ],
)
def test_labels_that_no_task_can_have_are_refused(task: Task, message: str) -> None:
    with pytest.raises((ConfigError, DataError), match=message):
        labels_of(events(), [task])


def test_a_negative_label_has_no_logarithm() -> None:
    below = events(FRAME.with_columns(minutes=pl.Series([-2.0, 1.0, None, 3.0])))
    logarithm = Task(name="x", kind="regression", column="minutes", transform="log1p")
    with pytest.raises(DataError, match=r"holds -2 .*0 or more under log1p"):
        labels_of(below, [logarithm])
    plain = Task(name="x", kind="regression", column="minutes")
    assert labels_of(below, [plain])[0, 0] == -2


def test_text_in_a_column_of_labels_is_refused_with_its_row() -> None:
    with pytest.raises(DataError, match=r"'clicked', row 2: 'no' is not a number"):
        events(FRAME.with_columns(clicked=pl.Series(["1", "no", "0", "1"])))


def test_events_without_any_column_say_so() -> None:
    bare = read_interactions(FRAME)
    with pytest.raises(ConfigError, match="the events have none"):
        labels_of(bare, [Task(name="x", column="clicked")])


@pytest.mark.parametrize(
    ("labels", "num_drawn", "message"),
    [
        ([1.0, 1.0, np.nan], 0, "one class only: every label of training is 1.*negatives to draw"),
        ([0.0, 0.0, np.nan], 4, "one class only: every label of training is 0"),
        ([np.nan, np.nan, np.nan], 4, "no label on any of 3 training events"),
        ([1.0, 1.0, np.nan], 4, ""),
        ([1.0, 0.0, np.nan], 0, ""),
    ],
)
def test_a_task_of_one_class_or_of_none_cannot_be_learned(
    labels: list[float], num_drawn: int, message: str
) -> None:
    label_ET = np.array(labels, np.float32)[:, None]
    if not message:
        check_learnable(label_ET, [Task(name="click")], num_drawn=num_drawn)
        return
    with pytest.raises(DataError, match=message):
        check_learnable(label_ET, [Task(name="click")], num_drawn=num_drawn)


def test_equal_labels_of_a_regression_are_no_error() -> None:
    task = Task(name="x", kind="regression", column="minutes")
    check_learnable(np.ones((3, 1), np.float32), [task])


@pytest.mark.parametrize(
    ("kind", "setting"),
    [
        ("regression", {"above": 3.0}),
        ("binary", {"levels": (1, 2)}),
        ("binary", {"transform": "log1p"}),
        ("binary", {"loss": "huber"}),
    ],
)
def test_a_setting_of_another_kind_of_task_is_refused(
    kind: str, setting: dict[str, object]
) -> None:
    (name,) = setting
    with pytest.raises(ValueError, match=f"task 'x' is {kind}, and `{name}` is of .* tasks alone"):
        Task.model_validate({"name": "x", "column": "stars", "kind": kind, **setting})


@pytest.mark.parametrize(
    ("labels", "transform", "said"),
    [
        ([1e30, *range(1, 40)], "none", "1e+30"),
        ([1e30, *range(1, 40)], "log1p", ""),
        ([-1e9, *range(1, 40)], "none", "-1e+09"),
        ([1e6, *range(1, 40)], "none", 'transform = "log1p"'),
        ([math.nan, *range(1, 40)], "none", ""),
        ([5, 5, 5, 5], "none", ""),
    ],
)
def test_a_label_that_makes_the_others_equal_is_said(
    labels: list[float], transform: Literal["none", "log1p"], said: str
) -> None:
    frame = pl.DataFrame(
        {"user_id": range(len(labels)), "item_id": 1, "minutes": [float(x) for x in labels]}
    )
    read = read_interactions(frame, columns=("minutes",))
    task = Task(name="watched", kind="regression", column="minutes", transform=transform)
    notes = notes_about_labels(read, [task])
    if not said:
        assert notes == ()
    else:
        assert all(part in notes[0] for part in ("'watched'", "'minutes'", said))

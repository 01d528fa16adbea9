"""Heads: ordered thresholds, predictions in the label's unit, and the score of a list."""

import math

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foretaste.data.interactions import Interactions
from foretaste.data.tasks import Task
from foretaste.data.vocabulary import Vocabulary
from foretaste.errors import ConfigError, DataError
from foretaste.models.layers.heads import Heads, thresholds

CLICK = Task(name="click")
MINUTES = Task(name="minutes", kind="regression", column="minutes", transform="log1p")
STARS = Task(name="stars", kind="ordinal", column="stars", levels=(1, 2, 3, 4, 5))


def events(**columns: list[float]) -> Interactions:
    size = len(next(iter(columns.values())))
    return Interactions(
        users=Vocabulary(pl.Series([0])),
        items=Vocabulary(pl.Series([0])),
        offsets=np.array([0, size]),
        item_idx=np.zeros(size, np.int32),
        columns={name: np.array(column, np.float32) for name, column in columns.items()},
    )


@given(st.lists(st.floats(-20, 20), min_size=1, max_size=8))
@settings(max_examples=50, deadline=None)
def test_thresholds_ascend_whatever_was_learned(steps: list[float]) -> None:
    assert (thresholds(torch.tensor(steps)).diff() >= 0).all()


def test_a_probability_an_own_unit_and_an_expected_level() -> None:
    heads = Heads((CLICK, MINUTES, STARS))
    # minutes e - 1 and e^3 - 1: their logarithms of 1 + x are 1 and 3, mean 2, spread 1
    minutes = [math.e - 1, math.e**3 - 1, math.nan]
    heads.begin(events(minutes=minutes, stars=[1.0, 5.0, math.nan]))
    raw = {"click": torch.tensor([[0.0]]), "minutes": torch.tensor([[1.0]])}
    predicted = heads.predict(raw | {"stars": torch.tensor([[0.0]])})
    assert predicted["click"].item() == 0.5
    assert predicted["minutes"].item() == pytest.approx(math.e**3 - 1, rel=1e-5)
    # half of the labels lie above 1, 2, 3 and 4: thresholds 0, then .01 apart
    assert predicted["stars"].item() == pytest.approx(1 + 4 * 0.5, abs=0.02)


def test_at_zero_each_level_has_its_share_of_the_training_labels() -> None:
    # of 10 labels 6 lie above 1, 5 above 2, 3 above 3, 2 above 4
    heads = Heads((STARS,))
    heads.begin(events(stars=[1.0] * 4 + [2.0] + [3.0] * 2 + [4.0] + [5.0] * 2))
    share_K = heads({"stars": torch.zeros(1, 1)})["stars"].sigmoid()[0, 0]
    torch.testing.assert_close(share_K, torch.tensor([0.6, 0.5, 0.3, 0.2]))


def test_an_expected_level_stays_between_the_ends_and_rises_with_the_number() -> None:
    heads = Heads((STARS,))
    expected_C = heads.predict({"stars": torch.linspace(-50, 50, 101).unsqueeze(0)})["stars"][0]
    assert expected_C[0].item() == pytest.approx(1)
    assert expected_C[-1].item() == pytest.approx(5)
    assert (expected_C.diff() >= 0).all()


def test_a_quantity_of_log1p_is_never_predicted_below_nothing() -> None:
    heads = Heads((MINUTES,))
    assert heads.predict({"minutes": torch.tensor([[-30.0]])})["minutes"].item() == 0


def test_one_task_orders_by_its_number_and_binary_ones_by_the_sum_of_probabilities() -> None:
    raw = {"click": torch.tensor([[0.0, 2.0]]), "buy": torch.tensor([[1.0, 0.0]])}
    assert torch.equal(Heads((CLICK,)).rank(raw), raw["click"])
    buy = Task(name="buy", column="buy", weight=0.5)
    expected = raw["click"].sigmoid() + 0.5 * raw["buy"].sigmoid()
    assert torch.equal(Heads((CLICK, buy)).rank(raw), expected)


def test_answers_of_several_kinds_are_added_between_0_and_1() -> None:
    heads = Heads((CLICK, MINUTES, STARS))
    # four steps of thresholds 0, 0, 0, 0 or so: stars of 3, in the middle of 1 and 5
    heads.begin(events(minutes=[1.0, 9.0], stars=[1.0, 5.0]))
    # of a normal distribution .5 lie below its mean and .8413 below one deviation more
    minutes = torch.tensor([[0.0, 1.0]])
    raw = {"click": torch.zeros(1, 2), "minutes": minutes, "stars": torch.zeros(1, 2)}
    assert heads.rank(raw)[0].tolist() == pytest.approx([1.5, 0.5 + 0.8413 + 0.5], abs=0.01)
    far = {name: torch.tensor([[-90.0, 90.0]]) for name in raw}
    assert heads.rank(far)[0].tolist() == pytest.approx([0, 3])  # the ends of all three


def test_weights_of_a_request_count_for_each_unit_of_a_label() -> None:
    # labels of 100 and 500: a mean of 300, a deviation of 200; predicted are 300 and 500
    heads = Heads((CLICK, Task(name="seconds", kind="regression", column="seconds")))
    heads.begin(events(seconds=[100.0, 500.0]))
    outputs = heads({"click": torch.zeros(1, 2), "seconds": torch.tensor([[0.0, 1.0]])})
    got = heads.order(outputs, {"click": 2.0, "seconds": 0.01})
    assert got[0].tolist() == pytest.approx([1 + 3, 1 + 5])


@pytest.mark.parametrize("unit", [1e-3, 60.0, 1e3])
@pytest.mark.parametrize("seed", range(5))
def test_a_unit_of_a_label_moves_no_item_of_the_usual_list(unit: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    raw = {name: torch.randn(3, 40, generator=generator) for name in ("click", "seconds", "stars")}
    seconds = (torch.rand(50, generator=generator) * 600).tolist()
    stars = torch.randint(1, 6, (50,), generator=generator).double()
    scores = []
    for size in (1.0, unit):
        levels = tuple(size * level for level in (1, 2, 3, 4, 5))
        heads = Heads(
            (
                CLICK,
                Task(name="seconds", kind="regression", column="seconds"),
                Task(name="stars", kind="ordinal", column="stars", levels=levels),
            )
        )
        labels = {"seconds": [s * size for s in seconds], "stars": (stars * size).tolist()}
        heads.begin(events(**labels))
        scores.append(heads.rank(raw))
    torch.testing.assert_close(*scores)
    assert torch.equal(*(score.argsort(dim=1) for score in scores))


def test_tasks_of_list_weight_0_have_no_say_in_lists_and_their_weight_still_teaches() -> None:
    raw = {"click": torch.tensor([[40.0, 50.0]]), "buy": torch.tensor([[1.0, 0.0]])}
    click, buy = Task(name="click", list_weight=0), Task(name="buy", weight=0.1)
    assert torch.equal(Heads((click, buy)).rank(raw), raw["buy"])
    assert torch.equal(Heads((click, buy)).order(raw), raw["buy"])
    asked = Heads((click, buy)).order(raw, {"click": 1.0})  # the caller's weights take precedence
    torch.testing.assert_close(asked, raw["click"].sigmoid())
    heavier = Heads((click.model_copy(update={"list_weight": 2.0}), buy)).rank(raw)
    torch.testing.assert_close(heavier, 2 * raw["click"].sigmoid() + 0.1 * raw["buy"].sigmoid())


def test_tasks_with_equal_names_or_without_weights_are_refused() -> None:
    with pytest.raises(ConfigError, match="no task"):
        Heads(())
    with pytest.raises(ConfigError, match="two tasks are named 'click'"):
        Heads((CLICK, CLICK))
    with pytest.raises(ConfigError, match="weight 0"):
        Heads((Task(name="click", weight=0),))
    with pytest.raises(ConfigError, match="list_weight 0"):
        Heads((Task(name="click", list_weight=0),))
    with pytest.raises(ConfigError, match="from column 'minutes', and the events have 'stars'"):
        Heads((MINUTES,)).begin(events(stars=[1.0]))


def test_a_label_below_0_is_refused_before_its_logarithm_is_taken() -> None:
    with pytest.raises(DataError, match=r"holds -2 .* 0 or more under log1p"):
        Heads((MINUTES,)).begin(events(minutes=[3.0, -2.0]))

"""Distinct draws: no item twice, the stated probabilities, unbiased sums."""

import pytest
import torch

from foretaste.errors import DataError
from foretaste.sampling.samplers import DistinctSampler

COUNTS = torch.tensor([0, 1, 2, 4, 8, 16, 32, 64])
CPU = torch.device("cpu")


WAYS = pytest.mark.parametrize("shuffled_below", [100, 0], ids=["all shuffled", "as they arrive"])
"""Of 7 known items: all of them race, or only those that arrive are worked out."""


@WAYS
@pytest.mark.parametrize("power", [0.0, 0.75])
def test_draws_are_distinct_known_and_as_many_as_asked(power: float, shuffled_below: int) -> None:
    sampler = DistinctSampler(COUNTS, power=power, shuffled_below=shuffled_below)
    for num in (1, 3, 6):
        item = sampler.draw(num, device=CPU).item_M
        assert len(item.unique()) == num
        assert item.min() >= 1


@pytest.mark.parametrize("power", [0.0, 0.75])
def test_all_items_are_drawn_with_certainty(power: float) -> None:
    drawn = DistinctSampler(COUNTS, power=power).draw(100, device=CPU)
    assert drawn.item_M.tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert drawn.chance(torch.arange(8)).tolist() == [0] + [1] * 7


@WAYS
@pytest.mark.parametrize("power", [0.0, 0.75])
def test_weighted_sums_are_unbiased(power: float, shuffled_below: int) -> None:
    torch.manual_seed(0)
    sampler = DistinctSampler(COUNTS, power=power, shuffled_below=shuffled_below)
    value_I = torch.arange(8.0)
    sums = []
    for _ in range(4000):
        drawn = sampler.draw(3, device=CPU)
        sums.append((value_I[drawn.item_M] / drawn.chance(drawn.item_M)).sum())
    found = torch.stack(sums)
    standard_error = found.std().item() / 4000**0.5
    assert found.mean().item() == pytest.approx(28, abs=4 * standard_error)
    assert standard_error < 1


@WAYS
def test_power_favours_the_popular(shuffled_below: int) -> None:
    torch.manual_seed(0)
    sampler = DistinctSampler(COUNTS, power=1.0, shuffled_below=shuffled_below)
    drawn = (
        torch.stack([sampler.draw(1, device=CPU).item_M for _ in range(5000)]).flatten().bincount()
    )
    # The first to arrive is item j with chance count_j / 127.
    assert (drawn / 5000).tolist() == pytest.approx((COUNTS / 127).tolist(), abs=0.02)


@pytest.mark.parametrize("power", [0.0, 0.5])
def test_those_that_arrive_first_follow_the_law_of_the_race(power: float) -> None:
    # both ways: how often each item is among 2 of 7, and which one is the first of them
    torch.manual_seed(0)
    found = []
    for shuffled_below in (100, 0):
        sampler = DistinctSampler(COUNTS, power=power, shuffled_below=shuffled_below)
        pairs = torch.stack([sampler.draw(2, device=CPU).item_M for _ in range(6000)])
        found.append((pairs.flatten().bincount(minlength=8), pairs[:, 0].bincount(minlength=8)))
    for all_shuffled, as_they_arrive in zip(*found, strict=True):
        # the difference of two counts of 6000 has a standard deviation of at most 55
        assert (all_shuffled - as_they_arrive).abs().max() < 4 * 55


@pytest.mark.parametrize("power", [0.0, 0.75])
def test_a_draw_from_a_million_items_touches_few_of_them(power: float) -> None:
    count_I = torch.arange(10**6) % 1000  # every thousandth has no event
    sampler = DistinctSampler(count_I, power=power)
    sampler.draw(512, device=CPU)
    with torch.profiler.profile(profile_memory=True) as seen:
        drawn = sampler.draw(512, device=CPU)
        drawn.chance(drawn.item_M)
    assert len(drawn.item_M.unique()) == 512
    assert count_I[drawn.item_M].min() > 0
    memory = [event.cpu_memory_usage for event in seen.events()]
    names = {event.name for event in seen.events()}
    assert not names & {"aten::randperm", "aten::topk", "aten::index_fill_"}
    assert max(memory, default=0) < 10**6


def test_nothing_to_draw_from_is_said() -> None:
    with pytest.raises(DataError, match="no item has a training event"):
        DistinctSampler(torch.zeros(3, dtype=torch.int64))

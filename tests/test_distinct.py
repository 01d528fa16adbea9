"""Distinct draws: no two alike, the stated chances, unbiased sums."""

import pytest
import torch

from foretaste.errors import DataError
from foretaste.sampling.distinct import DistinctSampler

COUNTS = torch.tensor([0, 1, 2, 4, 8, 16, 32, 64])
CPU = torch.device("cpu")


@pytest.mark.parametrize("power", [0.0, 0.75])
def test_draws_are_distinct_known_and_as_many_as_asked(power: float) -> None:
    sampler = DistinctSampler(COUNTS, power=power)
    for num in (1, 3, 6):
        item = sampler.draw(num, device=CPU).item_M
        assert len(item.unique()) == num
        assert item.min() >= 1


@pytest.mark.parametrize("power", [0.0, 0.75])
def test_all_items_are_drawn_with_certainty(power: float) -> None:
    drawn = DistinctSampler(COUNTS, power=power).draw(100, device=CPU)
    assert drawn.item_M.tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert drawn.chance_I.tolist() == [0] + [1] * 7


@pytest.mark.parametrize("power", [0.0, 0.75])
def test_weighted_sums_are_unbiased(power: float) -> None:
    torch.manual_seed(0)
    sampler, value_I = DistinctSampler(COUNTS, power=power), torch.arange(8.0)
    sums = []
    for _ in range(4000):
        drawn = sampler.draw(3, device=CPU)
        sums.append((value_I[drawn.item_M] / drawn.chance_I[drawn.item_M]).sum())
    found = torch.stack(sums)
    standard_error = found.std().item() / 4000**0.5
    assert found.mean().item() == pytest.approx(28, abs=4 * standard_error)
    assert standard_error < 1


def test_power_favours_the_popular() -> None:
    torch.manual_seed(0)
    sampler = DistinctSampler(COUNTS, power=1.0)
    drawn = (
        torch.stack([sampler.draw(1, device=CPU).item_M for _ in range(5000)]).flatten().bincount()
    )
    # The first to arrive is item j with chance count_j / 127.
    assert (drawn / 5000).tolist() == pytest.approx((COUNTS / 127).tolist(), abs=0.02)


def test_nothing_to_draw_from_is_said() -> None:
    with pytest.raises(DataError, match="no item has a training event"):
        DistinctSampler(torch.zeros(3, dtype=torch.int64))

"""In-batch negatives: their probabilities, counted and streamed, and the correction's effect."""

from collections.abc import Callable
from functools import cache
from itertools import combinations
from math import comb
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from foretaste.data.draws import epoch_generator
from foretaste.data.interactions import Interactions
from foretaste.data.plans import plan_pairs
from foretaste.errors import DataError
from foretaste.models.mf import MF, MFConfig
from foretaste.sampling.samplers import InBatchSampler, StreamedFrequency
from foretaste.training.candidates import CandidateConfig, CandidateLoss
from foretaste.training.fit import Fit
from foretaste.training.objectives import Pairs, PairsConfig
from foretaste.training.settings import TrainingConfig
from tests.worlds import events_of


def singles(item_idx: list[int], *, num_items: int) -> Interactions:
    """Each event is a user's only one."""
    return events_of([[item] for item in item_idx], num_items=num_items)


TABLE = [0, 0, 0, 0, 1, 1, 2, 3, 3]
"""Nine events: item 0 has four, 1 two, 2 one, 3 two; 4 has none."""


# --- counted frequencies -----------------------------------------------------------------------


@pytest.mark.parametrize("rows", range(1, 10))
def test_chances_are_those_of_all_batches_written_out(rows: int) -> None:
    drawn = InBatchSampler(torch.tensor([4, 2, 1, 2, 0])).draw(torch.arange(rows) % 4)
    chance_I = drawn.chance(torch.arange(5))
    for item in range(5):
        # the row itself is an event of another item; the others are any rows - 1 of the rest
        own = next(place for place, other in enumerate(TABLE) if other != item)
        others = [place for place in range(9) if place != own]
        batches = list(combinations(others, rows - 1))
        holding = sum(any(TABLE[place] == item for place in batch) for batch in batches)
        assert len(batches) == comb(8, rows - 1)
        assert chance_I[item].item() == pytest.approx(holding / len(batches), abs=1e-6)


def test_the_distinct_items_of_a_batch_are_given_once() -> None:
    drawn = InBatchSampler(torch.tensor([4, 2, 1, 2, 0])).draw(torch.tensor([3, 0, 0, 3, 1]))
    assert drawn.item_M.tolist() == [0, 1, 3]


def test_without_any_event_there_is_no_batch() -> None:
    with pytest.raises(DataError, match="no item has a training event"):
        InBatchSampler(torch.zeros(3, dtype=torch.int64))


# --- what a batch is compared with -------------------------------------------------------------


def in_batch_loss(**settings: object) -> CandidateLoss:
    config = CandidateConfig.model_validate(
        {"loss": "sampled_softmax", "negatives": 0, "in_batch": True} | settings
    )
    return CandidateLoss(config, singles(TABLE, num_items=5))


def test_a_row_never_has_its_own_item_for_a_negative_however_often_the_batch_has_it() -> None:
    target_N = torch.tensor([0, 1, 0, 3])
    candidates = in_batch_loss().draw(torch.arange(4), target_N)
    shared = candidates.item_V[candidates.shared_M]
    assert shared.tolist() == [0, 1, 3]
    hidden = {(row, int(shared[column])) for row, column in candidates.hidden_2P.T.tolist()}
    assert hidden == {(0, 0), (1, 1), (2, 0), (3, 3)}


def test_the_chances_of_a_mixture_are_how_often_its_items_are_there() -> None:
    torch.manual_seed(0)
    loss, table = in_batch_loss(negatives=1), torch.tensor(TABLE)
    found_I, stated_I, rounds = torch.zeros(5), torch.full((5,), -1.0), 3000
    for _ in range(rounds):
        # row 0 is the first event of item 0; two others come along
        target_N = table[torch.cat([torch.tensor([0]), 1 + torch.randperm(8)[:2]])]
        candidates = loss.draw(torch.arange(3), target_N)
        item_M = candidates.item_V[candidates.shared_M]
        found_I[item_M] += 1
        stated_I[item_M] = candidates.log_count_M.exp()
    # item 1 has 2 of the 8 others: 1 - C(6, 2) / C(8, 2) = 13 / 28; drawn: 1 of 4 known items
    assert stated_I[1].item() == pytest.approx(1 - (1 - 13 / 28) * (1 - 1 / 4))
    for item in (1, 2, 3):
        assert found_I[item].item() / rounds == pytest.approx(stated_I[item].item(), abs=0.03)
    assert found_I[4] == 0


# --- the correction ----------------------------------------------------------------------------

NUM_ITEMS = 24
COUNTS = np.maximum(1, 120 // (1 + np.arange(NUM_ITEMS)) ** 1.2).astype(int)
SKEWED = singles(np.repeat(np.arange(NUM_ITEMS), COUNTS).tolist(), num_items=NUM_ITEMS)


def item_gradient(config: CandidateConfig, *, rows: int, draws: int) -> Tensor:
    """Return the mean gradient to the items over batches of random pairs, the same every time."""
    pairs = torch.Generator().manual_seed(1)
    torch.manual_seed(0)
    table = torch.from_numpy(SKEWED.item_idx).long()
    user_ED = 1 + 0.3 * torch.randn(len(SKEWED), 4)  # similar, so that gradients add up
    item_ID = (0.2 * torch.randn(NUM_ITEMS, 4)).requires_grad_()
    loss = CandidateLoss(config, SKEWED)
    for _ in range(draws):
        pair = torch.randperm(len(SKEWED), generator=pairs)[:rows]
        candidates = loss.draw(pair, table[pair])
        loss(candidates, user_ED[pair], item_ID[candidates.item_V]).backward()
    assert item_ID.grad is not None
    return item_ID.grad / draws


@cache
def full_gradient(rows: int) -> Tensor:
    """Return the gradient of the softmax over all items, which no source of negatives changes."""
    return item_gradient(CandidateConfig(loss="softmax"), rows=rows, draws=200)


SOURCES: dict[str, Callable[[int], dict[str, object]]] = {
    "uniform": lambda size: {"negatives": 4 * size},
    "popularity": lambda size: {"negatives": 4 * size, "popularity_power": 0.75},
    "in-batch": lambda size: {"negatives": 0, "in_batch": True},
    "mixed": lambda size: {"negatives": 2 * size, "in_batch": True},
    "own": lambda size: {"negatives": 0, "row_negatives": 8 * size, "popularity_power": 0.75},
}


@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES)
def test_the_corrected_gradient_tends_to_the_full_softmax_and_the_uncorrected_does_not(
    source: str,
) -> None:
    # a batch of 8 sees a few of the 24 items, one of 64 sees most
    error: dict[tuple[int, bool], float] = {}
    for size, rows in ((1, 8), (4, 64)):
        full = full_gradient(rows)
        for log_q in (True, False):
            config = CandidateConfig.model_validate(
                {"loss": "sampled_softmax", "log_q": log_q} | SOURCES[source](size)
            )
            found = item_gradient(config, rows=rows, draws=200)
            error[size, log_q] = ((found - full).norm() / full.norm()).item()
    assert error[4, True] < 0.06
    assert error[4, True] < error[1, True] / 2
    assert error[1, False] > 1.25 * error[1, True]
    if source != "uniform":  # which distorts no item against another, only the positive
        assert error[4, False] > 3 * error[4, True]


# --- streamed frequencies ----------------------------------------------------------------------


def stream(num_items: int, **settings: object) -> StreamedFrequency:
    options = {"num_cells": 1000, "num_hashes": 2, "rate": 0.01, "seed": 0} | settings
    return StreamedFrequency(num_items, **options)  # type: ignore[arg-type]  # names are checked


def test_gaps_by_hand() -> None:
    watch = stream(4)
    for step in range(1, 9):
        watch.watch(torch.tensor([i for i, every in ((0, 1), (1, 3), (2, 8)) if step % every == 0]))
    # item 0 at every step; 1 at steps 3 and 6: one gap of 3; 2 at step 8 only: no gap in 8 steps
    assert watch.chance(torch.arange(4)).tolist() == pytest.approx([1, 1 / 3, 1 / 8, 0])


def test_the_average_moves_as_the_paper_says_once_it_is_warm() -> None:
    watch = stream(1, rate=0.25)
    gaps, expected = [4, 4, 4, 4, 10, 2], 4.0
    for gap in [1, *gaps]:
        for _ in range(gap - 1):
            watch.watch(torch.empty(0, dtype=torch.int64))
        watch.watch(torch.tensor([0]))
    for gap in gaps[4:]:
        expected = 0.75 * expected + 0.25 * gap
    assert watch.chance(torch.tensor(0)).item() == pytest.approx(1 / expected)


def test_an_item_present_at_random_gets_its_chance_and_a_change_is_followed() -> None:
    rng, watch = np.random.default_rng(0), stream(3, rate=0.02)
    for chance in ([0.5, 0.1, 0.02], [0.1, 0.5, 0.02]):
        for _ in range(4000):
            watch.watch(torch.from_numpy(np.flatnonzero(rng.random(3) < chance)))
        assert watch.chance(torch.arange(3)).tolist() == pytest.approx(chance, rel=0.35)


def test_items_in_one_cell_look_frequent_and_more_hashes_part_them() -> None:
    rng, errors = np.random.default_rng(0), []
    chance_I = np.full(200, 0.02)
    for num_hashes in (1, 4):
        watch = stream(200, num_cells=100, num_hashes=num_hashes, rate=0.02)
        for _ in range(2000):
            watch.watch(torch.from_numpy(np.flatnonzero(rng.random(200) < chance_I)))
        errors.append(
            (watch.chance(torch.arange(200)).double().log() - np.log(0.02)).abs().mean().item()
        )
    assert errors[1] < errors[0] / 1.5


def test_streamed_and_counted_frequencies_agree_on_a_shuffled_table() -> None:
    torch.manual_seed(0)
    count_I = torch.from_numpy(COUNTS)
    counted, streamed = InBatchSampler(count_I), stream(NUM_ITEMS, rate=0.005)
    table, rows = torch.from_numpy(SKEWED.item_idx).long(), 16
    for _ in range(4000):
        drawn = streamed.draw(table[torch.randperm(len(table))[:rows]])
    expected_I = counted.draw(table[:rows]).chance(torch.arange(NUM_ITEMS))
    assert drawn.chance(torch.arange(NUM_ITEMS)).tolist() == pytest.approx(
        expected_I.tolist(), rel=0.3, abs=0.02
    )


class Killed(Exception):
    pass


def streamed_fit(folder: Path, **training: object) -> tuple[MF, Fit[MF, object]]:
    torch.manual_seed(0)
    model = MF(MFConfig(embedding_dim=4), num_users=len(SKEWED), num_items=NUM_ITEMS)
    settings = {"epochs": 3, "batch_events": 64, "warmup_steps": 0, "device": "cpu"} | training
    config = PairsConfig(negatives=0, in_batch=True, frequency="streamed")
    run: Fit[MF, object] = Fit(
        model,
        TrainingConfig.model_validate(settings),
        seed=0,
        plan=lambda epoch: plan_pairs(SKEWED, batch_events=64, generator=epoch_generator(0, epoch)),
        objective=Pairs(config, SKEWED),
        folder=folder,
    )
    return model, run


@pytest.mark.parametrize("stop_after", [1, 6, 10])
def test_a_run_broken_off_remembers_its_stream(tmp_path: Path, stop_after: int) -> None:
    whole_model, whole = streamed_fit(tmp_path / "whole")
    whole.run()
    steps_left = iter(range(stop_after))

    def kill(*_: object) -> None:
        if next(steps_left, None) is None:
            raise Killed

    _, broken = streamed_fit(tmp_path / "broken", checkpoint_seconds=0)
    with pytest.raises(Killed):
        broken.run(on_step=kill)
    resumed_model, resumed = streamed_fit(tmp_path / "broken", checkpoint_seconds=0)
    resumed.run(resume=True)
    for name, value in whole_model.state_dict().items():
        assert torch.equal(value, resumed_model.state_dict()[name]), name
    logs = [(tmp_path / n / "steps.jsonl").read_text() for n in ("whole", "broken")]
    assert logs[0] == logs[1]

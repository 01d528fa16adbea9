"""Prefetched batches: equal bits, in order, of limited number, and with errors at their batch."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from foretaste.data.graph import graph_of
from foretaste.data.interactions import Interactions
from foretaste.data.plans import Plan
from foretaste.data.splits import Split
from foretaste.data.splitting import random_split
from foretaste.errors import ConfigError, DataError
from foretaste.experiment.fit import fit
from foretaste.experiment.learning import make_learning
from foretaste.models.catalogue import ModelConfig
from foretaste.models.lightgcn import LightGCNConfig
from foretaste.models.mf import MF, MFConfig
from foretaste.models.pinsage import PinSageConfig
from foretaste.models.sasrec import SASRecConfig
from foretaste.sampling.negatives import Seen, nearby_negatives
from foretaste.training.objectives import NextItemConfig, ObjectiveConfig, PairsConfig, hardness
from foretaste.training.progress import Prefetch
from foretaste.training.settings import TrainingConfig
from tests.worlds import events_of


@dataclass
class Squares(Plan[int]):
    """A plan whose batch i is i squared, and which notes what it was asked for."""

    size: int
    work: Callable[[int], None] = lambda index: None

    @property
    def num_events(self) -> int:
        return self.size

    def __len__(self) -> int:
        return self.size

    def batch(self, index: int) -> int:
        self.work(index)
        return index * index


@pytest.mark.parametrize("producers", [0, 1, 3])
@pytest.mark.parametrize("first", [0, 4])
def test_batches_come_in_order(producers: int, first: int) -> None:
    def slow_at_first(index: int) -> None:
        time.sleep(0.02 if index % 3 == 0 else 0)

    with Prefetch(Squares(10, slow_at_first), producers=producers, first=first) as batches:
        assert [batches.next() for _ in range(first, 10)] == [i * i for i in range(first, 10)]
        assert batches.waited_s > 0


def test_no_more_is_made_ahead_than_fits_the_queue() -> None:
    made: list[int] = []
    with Prefetch(Squares(100, made.append), producers=2) as batches:
        batches.next()
        deadline = time.monotonic() + 20
        while len(made) < 1 + 2 * 2 and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.05)  # enough to make the other 95
        assert sorted(made) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("producers", [0, 2])
def test_an_error_in_a_producer_is_the_trainer_s_at_its_turn(producers: int) -> None:
    def fail(index: int) -> None:
        if index == 2:
            raise DataError("batch 2 is broken")

    with Prefetch(Squares(9, fail), producers=producers) as batches:
        assert [batches.next(), batches.next()] == [0, 1]
        with pytest.raises(DataError, match="batch 2 is broken"):
            batches.next()


def test_producers_end_with_the_run_even_if_it_is_broken_off() -> None:
    def at_work() -> list[str]:
        return [thread.name for thread in threading.enumerate() if "producer" in thread.name]

    def broken_off() -> None:
        with Prefetch(Squares(9, lambda index: time.sleep(0.01)), producers=3) as batches:
            batches.next()
            assert at_work()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        broken_off()
    assert at_work() == []


class Clock:
    """A clock that the test sets."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_waiting_is_measured_without_producers() -> None:
    clock = Clock()

    def pass_20_ms(index: int) -> None:
        clock.now_s += 0.02

    with Prefetch(Squares(6, pass_20_ms), producers=0, clock=clock) as batches:
        for _ in range(6):
            batches.next()
            clock.now_s += 0.04  # a step
    assert batches.waited_s == pytest.approx(6 * 0.02)


def test_a_trainer_waits_for_the_first_batch_only_if_others_are_made_while_it_steps() -> None:
    clock, may_make, made = Clock(), threading.Semaphore(0), threading.Semaphore(0)

    def pass_20_ms(index: int) -> None:
        assert may_make.acquire(timeout=20)
        clock.now_s += 0.02
        made.release()

    with Prefetch(Squares(6, pass_20_ms), producers=1, clock=clock) as batches:
        may_make.release()
        batches.next()
        assert made.acquire(timeout=20)
        for _ in range(5):
            clock.now_s += 0.04
            may_make.release()
            assert made.acquire(timeout=20)  # during the step, before it is asked for
            batches.next()
    assert batches.waited_s == pytest.approx(0.02)


def split_of_two_kinds() -> Split:
    rng = np.random.default_rng(0)
    histories = [(user % 2 * 12 + rng.permutation(12)[:7]).tolist() for user in range(80)]
    return random_split(events_of(histories, num_items=24), validation=0.1, test=0.1)


MODELS: dict[str, tuple[ModelConfig, ObjectiveConfig]] = {
    "mf, dropout": (MFConfig(embedding_dim=8, dropout=0.3), PairsConfig(negatives=6)),
    "mf, all kinds of negatives": (
        MFConfig(embedding_dim=8),
        PairsConfig(
            negatives=6, in_batch=True, row_negatives=2, exclude_known=True, popularity_power=0.5
        ),
    ),
    "mf, a stream": (
        MFConfig(embedding_dim=8),
        PairsConfig(negatives=0, in_batch=True, frequency="streamed"),
    ),
    "lightgcn": (LightGCNConfig(embedding_dim=8, noise=0.1), PairsConfig(negatives=6)),
    "pinsage": (
        PinSageConfig(embedding_dim=8, num_neighbours=4, cold_share=0.1),
        PairsConfig(negatives=6, hard_negatives=2, hard_ranks=(0, 6)),
    ),
    "sasrec": (
        SASRecConfig(embedding_dim=8, max_len=10),
        NextItemConfig(loss="sampled_softmax", negatives=6),
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_with_producers_or_without_a_run_is_the_same(name: str) -> None:
    config, objective = MODELS[name]
    states, shares = [], []
    for producers in (0, 2):
        trained = fit(
            config,
            split_of_two_kinds(),
            objective=objective,
            training=TrainingConfig(
                epochs=3, batch_events=64, warmup_steps=0, producers=producers, device="cpu"
            ),
            show=False,
        )
        states.append(trained.model.state_dict())
        epochs = trained.log["epochs"]
        assert isinstance(epochs, list)
        shares += [epoch["waiting_share"] for epoch in epochs]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert all(0 < share < 1 for share in shares)


def learning_batches(producers: int, epoch: int) -> list[Tensor]:
    """The hard negatives of an epoch's batches."""
    events = split_of_two_kinds().train
    torch.manual_seed(0)
    model = MF(MFConfig(embedding_dim=4), num_users=events.num_users, num_items=events.num_items)
    config = PairsConfig(negatives=4, hard_negatives=3, hard_ranks=(0, 8), hard_epochs=4)
    plan = make_learning(model, config, events, batch_events=50, seed=0, producers=producers).plan(
        epoch
    )
    batches = [plan.batch(index) for index in reversed(range(len(plan)))]
    return [getattr(batch, "batch", batch).hard_BH for batch in batches]


def test_hard_negatives_grow_over_the_epochs_and_resume_exactly() -> None:
    widths = [learning_batches(0, epoch)[0].shape[1] for epoch in range(6)]
    assert widths == [0, 1, 2, 3, 3, 3]
    for one, other in zip(learning_batches(0, 3), learning_batches(2, 3), strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(learning_batches(0, 3)[0], learning_batches(0, 4)[0])


def test_the_window_of_ranks_moves_nearer() -> None:
    # ranks 10 to 50, so a window of 20: from 30 ... 49 in the first epoch of hard negatives to
    # 10 ... 29 in the fourth and after
    config = PairsConfig(hard_negatives=2, hard_from_epoch=3, hard_ranks=(10, 50), hard_epochs=4)
    assert [hardness(config, epoch).num for epoch in range(6)] == [0, 0, 1, 2, 2, 2]
    windows = [hardness(config, epoch).ranks for epoch in range(2, 8)]
    assert windows == [(30, 50), (23, 43), (17, 37), (10, 30), (10, 30), (10, 30)]
    assert hardness(PairsConfig(), 7).num == 0


def draw_nearby(
    events: Interactions, user: Tensor, item: Tensor, num: int, ranks: tuple[int, int]
) -> Tensor:
    source = nearby_negatives(graph_of(events), Seen.of(events), ranks=ranks[1], seed=0)
    return source.draw(user, item, num, ranks=ranks, generator=torch.Generator().manual_seed(1))


def test_hard_negatives_are_near_and_never_what_the_user_has() -> None:
    # by chance half of them would be of the other kind, and 7 / 12 of the own kind are the user's
    events = split_of_two_kinds().train
    user_E = torch.from_numpy(events.user_idx).long()
    item_E = torch.from_numpy(events.item_idx).long()
    hard_EH = draw_nearby(events, user_E, item_E, 3, (0, 8))
    none_EH = hard_EH == item_E.unsqueeze(1)
    assert none_EH.float().mean() < 0.2
    assert ((hard_EH < 12) == (item_E < 12).unsqueeze(1)).all()
    seen = Seen.of(events).contains(user_E.unsqueeze(1).expand_as(hard_EH), hard_EH)
    assert not (seen & ~none_EH).any()


def test_near_ranks_are_visited_together_more_than_far_ones() -> None:
    # item 0 is done beside item 1 by ten users, beside item 2 by one: rank 0 is item 1
    events = events_of([[0, 1]] * 10 + [[0, 2], [3]], num_items=4)
    user, item = torch.tensor([11]), torch.tensor([0])
    near, far = (draw_nearby(events, user, item, 1, (rank, rank + 1)) for rank in (0, 1))
    assert (near.item(), far.item()) == (1, 2)


def test_a_user_with_every_item_gets_no_hard_negative() -> None:
    events = events_of([[0, 1, 2], [0, 1], [2]], num_items=4)
    user, item = torch.tensor([0, 2]), torch.tensor([1, 3])
    hard_BH = draw_nearby(events, user, item, 2, (0, 3))
    assert hard_BH.tolist() == [[1, 1], [3, 3]]  # the pair's own item: hidden from the loss


def test_ranks_that_are_not_kept_are_named() -> None:
    events = split_of_two_kinds().train
    source = nearby_negatives(graph_of(events), Seen.of(events), ranks=8, seed=0)
    pair = torch.tensor([0])
    with pytest.raises(ConfigError, match="ranks 2 to 20, but 8 ranks"):
        source.draw(pair, pair, 1, ranks=(2, 20), generator=torch.Generator())
    with pytest.raises(ConfigError, match="farthest"):
        PairsConfig(hard_ranks=(9, 9))
    with pytest.raises(ConfigError, match="hard_negatives"):
        PairsConfig(loss="softmax", hard_negatives=1)


def test_hard_negatives_change_what_is_learned() -> None:
    config, objective = MODELS["pinsage"]
    assert isinstance(objective, PairsConfig)
    training = TrainingConfig(epochs=3, batch_events=64, warmup_steps=0, device="cpu")
    with_hard, without = (
        fit(config, split_of_two_kinds(), objective=chosen, training=training, show=False)
        for chosen in (objective, replace_hard(objective))
    )
    one, other = (t.model.state_dict()["inputs.item_table.weight"] for t in (with_hard, without))
    assert not torch.equal(one, other)


def replace_hard(objective: PairsConfig) -> PairsConfig:
    return objective.model_copy(update={"hard_negatives": 0})

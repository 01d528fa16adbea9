"""Hard negatives from the model's own index: they score high, and a resumed run has the same."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from foretaste.data.batch import DrawItems, Queries
from foretaste.data.graph import graph_of
from foretaste.data.interactions import Interactions
from foretaste.errors import ConfigError
from foretaste.experiment.learning import make_learning
from foretaste.experiment.mining import IndexNegatives
from foretaste.models.baselines import Popularity, PopularityConfig
from foretaste.models.lightgcn import LightGCN, LightGCNConfig
from foretaste.models.mf import MF, MFConfig
from foretaste.models.two_tower import TwoTower, TwoTowerConfig
from foretaste.training.fit import Fit
from foretaste.training.objectives import Pairs, PairsConfig
from foretaste.training.settings import TrainingConfig
from tests.worlds import events_of, every_vector

NUM_USERS, NUM_ITEMS = 300, 30


def some_events() -> Interactions:
    """Two kinds of users; item 29 and the last user have nothing."""
    rng = np.random.default_rng(0)
    histories = [(user % 2 * 14 + rng.permutation(14)[:5]).tolist() for user in range(NUM_USERS)]
    return events_of([*histories, []], num_items=NUM_ITEMS)


EVENTS = some_events()
CONFIG = PairsConfig(
    negatives=6, hard_negatives=2, hard_from="index", hard_from_epoch=2, hard_ranks=(0, 6)
)


def mf(seed: int = 0, events: Interactions = EVENTS) -> MF:
    torch.manual_seed(seed)
    config = MFConfig(embedding_dim=6, init_std=1.0)
    return MF(config, num_users=events.num_users, num_items=events.num_items).eval()


def mined(model: nn.Module, config: PairsConfig = CONFIG, epoch: int = 1) -> IndexNegatives:
    source = IndexNegatives(config, EVENTS, seed=0)
    source.refresh(model, epoch)
    return source


def ranked(source: IndexNegatives) -> Tensor:
    return source.state()["ranked_UT"]


def draw(source: IndexNegatives, num: int = 2, ranks: tuple[int, int] = (0, 6)) -> Tensor:
    mine: DrawItems = partial(source.ranked.draw, ranks=ranks)
    user_E = torch.from_numpy(EVENTS.user_idx).long()
    item_E = torch.from_numpy(EVENTS.item_idx).long()
    return mine(user_E, item_E, num, generator=torch.Generator().manual_seed(1))


def test_the_ranks_are_those_of_a_sort_over_what_the_user_has_not_done() -> None:
    torch.manual_seed(0)
    sizes = {"num_users": EVENTS.num_users, "num_items": NUM_ITEMS}
    towers = TwoTower(TwoTowerConfig(embedding_dim=6, history="mean", init_std=1.0), **sizes)
    for model in (mf(), towers.eval()):
        ranked_UT = ranked(mined(model))
        table_ID = every_vector(model)
        for user in range(NUM_USERS):
            done = EVENTS.history(user).tolist()
            query = Queries.of_histories([done])
            score_I = model.encode(replace(query, user_B=torch.tensor([user])))[0] @ table_ID.T
            may = [i for i in range(NUM_ITEMS) if i not in done and EVENTS.item_count[i]]
            best = sorted(may, key=lambda item: -score_I[item].item())[:6]
            assert ranked_UT[user].tolist() == best
        assert ranked_UT[NUM_USERS].tolist() == [-1] * 6


def test_draws_are_in_the_window_of_the_user_s_ranks() -> None:
    source = mined(mf())
    drawn_EN, ranked_UT = draw(source, 3, (2, 5)), ranked(source)
    window_EW = ranked_UT[torch.from_numpy(EVENTS.user_idx).long(), 2:5]
    assert (drawn_EN.unsqueeze(2) == window_EW.unsqueeze(1)).any(dim=2).all()
    assert set(drawn_EN[:, 0].tolist()) == set(window_EW.flatten().tolist())


def test_a_window_past_the_end_gives_the_last_ranks_there_are() -> None:
    # of 29 items with an event 5 are the user's own: ranks 24 to 40 are empty for everybody
    source = mined(mf(), CONFIG.model_copy(update={"hard_ranks": (0, 40)}))
    last_EN = draw(source, 3, (30, 31))
    assert torch.equal(last_EN, ranked(source)[EVENTS.user_idx, 22:23].long().expand(-1, 3))


def test_a_user_with_every_item_gets_the_pair_s_own_item() -> None:
    events = events_of([[0, 1, 2], [0]], num_items=3)
    source = IndexNegatives(CONFIG, events, seed=0)
    source.refresh(mf(events=events), 1)
    user, item = torch.tensor([0, 0, 1]), torch.tensor([2, 0, 0])
    drawn = source.ranked.draw(
        user, item, 8, ranks=(0, 2), generator=torch.Generator().manual_seed(0)
    )
    assert drawn[:2].tolist() == [[2] * 8, [0] * 8]
    assert set(drawn[2].tolist()) == {1, 2}


def test_the_search_waits_for_its_epoch() -> None:
    source = IndexNegatives(CONFIG.model_copy(update={"hard_refresh": 3}), EVENTS, seed=0)
    changed = []
    for epoch in range(9):
        before = source.state().get("ranked_UT")
        source.refresh(mf(seed=epoch), epoch)
        after = source.state().get("ranked_UT")
        if after is not None and (before is None or not torch.equal(before, after)):
            changed.append(epoch)
    assert changed == [1, 4, 7]


def test_what_was_never_mined_and_what_has_no_index_are_said() -> None:
    source = IndexNegatives(CONFIG, EVENTS, seed=0)
    assert source.state() == {}
    with pytest.raises(ConfigError, match="no hard negatives are mined yet"):
        draw(source)
    with pytest.raises(ConfigError, match="Popularity is not a retriever"):
        source.refresh(Popularity(PopularityConfig(), num_items=2), 1)


class BreakOffError(Exception):
    pass


def run_of(
    folder: Path,
    kind: str,
    *,
    epochs: int = 5,
    producers: int = 0,
    steps: int = 0,
    batch: int = 600,
) -> Fit[Any, Any]:
    torch.manual_seed(3)
    sizes = {"num_users": EVENTS.num_users, "num_items": NUM_ITEMS}
    model: nn.Module = (
        MF(MFConfig(embedding_dim=6, dropout=0.2), **sizes)
        if kind == "mf"
        else LightGCN(LightGCNConfig(embedding_dim=6), **sizes, graph=graph_of(EVENTS))
    )
    config = CONFIG.model_copy(update={"hard_refresh": 2, "hard_refresh_steps": steps})
    learning = make_learning(model, config, EVENTS, batch_events=batch, seed=3, producers=producers)
    assert isinstance(learning.objective, Pairs)
    training = TrainingConfig(
        epochs=epochs,
        warmup_steps=0,
        learning_rate=0.05,
        device="cpu",
        ema_decay=0.5 if kind == "mf" else 0.0,
        checkpoint_seconds=0,
        producers=producers,
    )
    return Fit(
        model,
        training,
        seed=3,
        plan=learning.plan,
        objective=learning.objective,
        folder=folder,
        refreshed=learning.refreshed,
    )


def losses(folder: Path) -> str:
    return (folder / "steps.jsonl").read_text()


@pytest.mark.parametrize("kind", ["mf", "lightgcn"])
def test_a_run_broken_off_anywhere_mines_and_learns_the_same(tmp_path: Path, kind: str) -> None:
    # 3 steps an epoch, searched before epochs 2 and 4: breaks before, between and right after
    whole = run_of(tmp_path / "whole", kind)
    whole.run()

    def at(step: int) -> Any:
        def stop(progress: Any, _: int) -> None:
            if progress.step == step:
                raise BreakOffError

        return stop

    for step in (2, 3, 4, 7, 10):
        folder = tmp_path / f"broken-{step}"
        with pytest.raises(BreakOffError):
            run_of(folder, kind).run(on_step=at(step))
        again = run_of(folder, kind)
        again.run(resume=True)
        assert losses(folder) == losses(tmp_path / "whole")
        state = again.model.state_dict()
        assert all(torch.equal(v, state[n]) for n, v in whole.model.state_dict().items())


def test_a_search_alongside_training_is_used_for_the_stretch_after_it() -> None:
    source = mined(mf(0), CONFIG.model_copy(update={"hard_refresh_steps": 4}))
    assert [source.is_due(1, batch) for batch in range(6)] == [True, *[False] * 3, True, False]
    source.start(mf(1), 0)
    source.start(mf(2), 4)
    for batch, seed in ((4, 1), (7, 1), (8, 2), (11, 2)):
        assert torch.equal(source.ranked_at(batch).ranked_RT, ranked(mined(mf(seed))))
    source.refresh(mf(3), 2)  # the next epoch begins with what the last search found
    assert torch.equal(source.ranked_at(3).ranked_RT, ranked(mined(mf(2))))


def test_a_search_that_fails_ends_the_run_with_its_error() -> None:
    source = mined(mf(0), CONFIG.model_copy(update={"hard_refresh_steps": 4}))
    source.start(Popularity(PopularityConfig(), num_items=2), 0)
    with pytest.raises(ConfigError, match="Popularity is not a retriever"):
        source.ranked_at(4)


@pytest.mark.parametrize("kind", ["mf", "lightgcn"])
def test_a_run_that_searches_alongside_training_is_the_same_after_a_break(
    tmp_path: Path, kind: str
) -> None:
    # 10 steps an epoch, searched every 4 from epoch 2 on; breaks in, at the end and at the start
    # of a stretch
    whole = run_of(tmp_path / "whole", kind, epochs=3, steps=4, batch=150)
    whole.run()
    for step in (9, 13, 14, 21):

        def stop(progress: Any, _: int, step: int = step) -> None:
            if progress.step == step:
                raise BreakOffError

        folder = tmp_path / f"broken-{step}"
        with pytest.raises(BreakOffError):
            run_of(folder, kind, epochs=3, steps=4, batch=150, producers=2).run(on_step=stop)
        run_of(folder, kind, epochs=3, steps=4, batch=150, producers=2).run(resume=True)
        assert losses(folder) == losses(tmp_path / "whole")


def test_producers_draw_the_same_mined_negatives(tmp_path: Path) -> None:
    states = []
    for producers in (0, 2):
        run = run_of(tmp_path / str(producers), "mf", producers=producers)
        run.run()
        states.append(run.model.state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_mined_negatives_enter_the_loss() -> None:
    torch.manual_seed(0)
    model = MF(MFConfig(embedding_dim=6), num_users=EVENTS.num_users, num_items=NUM_ITEMS)
    learning = make_learning(model, CONFIG, EVENTS, batch_events=600, seed=0)
    assert learning.refreshed is not None
    learning.refreshed.refresh(model.eval(), 1)
    widths = [learning.plan(epoch).batch(0).hard_BH.shape[1] for epoch in (0, 1, 2)]
    assert widths == [0, 1, 2]
    hard_BH = learning.plan(2).batch(0).hard_BH
    user_B = learning.plan(2).batch(0).queries.user_B
    stands = (hard_BH.unsqueeze(2) == learning.refreshed.state()["ranked_UT"][user_B, None]).any(2)
    assert stands.all()


def test_mined_negatives_score_above_random_ones() -> None:
    model = mf()
    source = mined(model)
    user_E = torch.from_numpy(EVENTS.user_idx).long()
    score_EN = (
        model.user_table.weight[user_E].unsqueeze(1) * model.item_table.weight[draw(source)]
    ).sum(2)
    other_EN = torch.randint(NUM_ITEMS, score_EN.shape, generator=torch.Generator().manual_seed(0))
    drawn_EN = (
        model.user_table.weight[user_E].unsqueeze(1) * model.item_table.weight[other_EN]
    ).sum(2)
    assert score_EN.min(dim=1).values.mean() > drawn_EN.max(dim=1).values.mean()

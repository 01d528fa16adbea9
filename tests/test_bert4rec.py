"""BERT4Rec: it reads both sides, but no padding or hidden items; hidden shares by counting."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import polars as pl
import pytest
import torch
from torch import Tensor, nn

import foretaste as ft
from foretaste.data.batch import Queries, SequenceBatch
from foretaste.data.draws import epoch_generator
from foretaste.data.interactions import Interactions
from foretaste.data.plans import plan_sequences
from foretaste.data.vocabulary import Vocabulary
from foretaste.errors import ConfigError
from foretaste.experiment.learning import make_learning, usual_objective
from foretaste.models.bert4rec import BERT4Rec, BERT4RecConfig
from foretaste.models.layers.dense import GatedBlock
from foretaste.models.sasrec import SASRec, SASRecConfig
from foretaste.training.checkpoint import Progress
from foretaste.training.fit import Fit
from foretaste.training.objectives import (
    MaskedItem,
    MaskedItemConfig,
    NextItemConfig,
    draw_places,
)
from foretaste.training.settings import TrainingConfig
from tests.worlds import every_vector

B, L, D, NUM_ITEMS = 4, 6, 16, 50
Block = Literal["original", "modern"]
both_blocks = pytest.mark.parametrize("block", ["original", "modern"])


def encoder(block: Block, **settings: object) -> BERT4Rec:
    torch.manual_seed(0)
    config = BERT4RecConfig(embedding_dim=D, max_len=L, block=block, **settings)
    model = BERT4Rec(config, num_items=NUM_ITEMS).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def batch(item_BL: Tensor, valid_BL: Tensor | None = None) -> SequenceBatch:
    if valid_BL is None:
        valid_BL = torch.ones_like(item_BL, dtype=torch.bool)
    user_B = torch.full((len(item_BL),), -1)
    return SequenceBatch(user_B=user_B, item_BL=item_BL, valid_BL=valid_BL)


def ring_events(num_users: int = 60, *, length: int = 12) -> Interactions:
    """Users walk round a ring of 20 items, each from a random start."""
    start = np.arange(num_users) * 7 % 20
    item_idx = (start[:, None] + np.arange(length)) % 20
    return Interactions(
        users=Vocabulary(pl.Series(range(num_users))),
        items=Vocabulary(pl.Series(range(20))),
        offsets=np.arange(num_users + 1, dtype=np.int64) * length,
        item_idx=item_idx.reshape(-1).astype(np.int32),
    )


@both_blocks
def test_a_hidden_place_sees_both_sides_where_sasrec_sees_only_the_past(block: Block) -> None:
    model, history = encoder(block), torch.randint(NUM_ITEMS, (B, L))
    causal = SASRec(SASRecConfig(embedding_dim=D, max_len=L, block=block), num_items=NUM_ITEMS)
    causal = causal.eval()
    hidden_B1 = torch.full((B, 1), 2)
    for place in (0, 1, 3, 5):
        changed = history.clone()
        changed[:, place] = (history[:, place] + 1) % NUM_ITEMS
        before, after = (model(batch(items), hidden_B1) for items in (history, changed))
        assert not torch.isclose(before, after).all(dim=-1).any()
        # State 2 is the one before event 2.
        before, after = (causal(batch(items))[:, 2] for items in (history, changed))
        assert torch.allclose(before, after) == (place > 2)


@both_blocks
def test_what_is_hidden_does_not_leak(block: Block) -> None:
    model, history = encoder(block), torch.randint(NUM_ITEMS, (B, L))
    place_BT = torch.tensor([[1, 4]] * B)
    other = history.scatter(1, place_BT, (history + 1).gather(1, place_BT) % NUM_ITEMS)
    assert torch.equal(model(batch(history), place_BT), model(batch(other), place_BT))


@both_blocks
def test_the_content_of_padding_does_not_matter(block: Block) -> None:
    model, history = encoder(block), torch.randint(NUM_ITEMS, (B, L))
    valid = torch.arange(L) < torch.tensor([[1], [2], [5], [6]])
    other = torch.where(valid, history, torch.randint(NUM_ITEMS, (B, L)))
    place_B1 = valid.sum(dim=1, keepdim=True) - 1
    found, again = (model(batch(items, valid), place_B1) for items in (history, other))
    torch.testing.assert_close(found, again)
    for row in range(B):
        alone = history[row : row + 1, : int(valid[row].sum())]
        torch.testing.assert_close(
            model(batch(alone), place_B1[row : row + 1])[0], found[row], rtol=1e-4, atol=1e-5
        )


@both_blocks
def test_the_states_of_some_places_are_those_of_all(block: Block) -> None:
    # Hidden are the same two; asked for are more of them at once, and in another order.
    model, history = encoder(block), torch.randint(NUM_ITEMS, (B, L))
    forth, back, twice = ([1, 4], [4, 1], [4, 1, 1])
    found = [model(batch(history), torch.tensor([places] * B)) for places in (forth, back, twice)]
    torch.testing.assert_close(found[0].flip(1), found[1])
    torch.testing.assert_close(found[2][:, :2], found[1])
    torch.testing.assert_close(found[2][:, 2], found[1][:, 1])


def test_to_recommend_is_to_fill_the_gap_after_the_last_event() -> None:
    # A training window of max_len whose last event is hidden, and the question what follows the
    # other events, are the same; of a longer history only the last max_len - 1 events are read.
    model, last = encoder("original"), [3, 1, 4, 1, 5]
    window = model(batch(torch.tensor([[*last, 9]])), torch.tensor([[L - 1]]))[:, 0]
    for history in (last, [30, 31, *last]):
        torch.testing.assert_close(model.encode(Queries.of_histories([history])), window)


def test_an_unknown_user_gets_the_state_of_a_single_mask() -> None:
    model = encoder("modern")
    alone = model(batch(torch.tensor([[7]])), torch.tensor([[0]]))[:, 0]
    found = model.encode(Queries.of_histories([[], [1, 2, 3], []]))
    torch.testing.assert_close(found[[0]], alone)
    torch.testing.assert_close(found[[2]], alone)
    assert model.encode(Queries.of_histories([])).shape == (0, D)


@both_blocks
def test_a_longer_neighbour_does_not_change_the_answer(block: Block) -> None:
    model, histories = encoder(block), [[1, 2], list(range(40)), [], [7]]
    together = model.encode(Queries.of_histories(histories))
    alone = torch.cat([model.encode(Queries.of_histories([h])) for h in histories])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


State = dict[str, list]


def linear(state: State, name: str, x: list[float]) -> list[float]:
    rows = zip(state[f"{name}.weight"], state[f"{name}.bias"], strict=True)
    return [sum(w * v for w, v in zip(row, x, strict=True)) + bias for row, bias in rows]


def norm(state: State, name: str, x: list[float]) -> list[float]:
    mean = sum(x) / len(x)
    variance = sum((v - mean) ** 2 for v in x) / len(x)
    scale = zip(x, state[f"{name}.weight"], state[f"{name}.bias"], strict=True)
    return [(v - mean) / math.sqrt(variance + 1e-5) * w + b for v, w, b in scale]


def gelu(x: list[float]) -> list[float]:
    return [v * (1 + math.erf(v / math.sqrt(2))) / 2 for v in x]


def add(x: list[float], y: list[float]) -> list[float]:
    return [a + b for a, b in zip(x, y, strict=True)]


def head(query: list[float], memory: list[list[float]], first: int, width: int) -> list[float]:
    """One head's answer; a memory holds its key, then its value."""
    logits = [
        sum(query[first + d] * m[first + d] for d in range(width)) / math.sqrt(width)
        for m in memory
    ]
    weights = [math.exp(v - max(logits)) for v in logits]
    pairs = list(zip(weights, memory, strict=True))
    return [sum(w * m[D + first + d] for w, m in pairs) / sum(weights) for d in range(width)]


def naive(state: State, items: list[int], hidden: list[int]) -> list[list[float]]:
    """The paper's equations, one number at a time: the states of the hidden places."""
    x = []
    for place, item in enumerate(items):
        read = state["mask"] if place in hidden else state["item_table.weight"][item]
        position = state["positions.weight"][len(items) - 1 - place]
        x.append(add([math.sqrt(D) * v for v in read], position))
    for name in ("blocks.0", "blocks.1"):
        memory = [linear(state, f"{name}.attention.key_value", v) for v in x]
        after = []
        for v in x:
            query = linear(state, f"{name}.attention.query", v)
            mixed = [*head(query, memory, 0, D // 2), *head(query, memory, D // 2, D // 2)]
            attended = linear(state, f"{name}.attention.output", mixed)
            middle = norm(state, f"{name}.attention_norm", add(v, attended))
            fed = linear(state, f"{name}.down", gelu(linear(state, f"{name}.up", middle)))
            after.append(norm(state, f"{name}.feed_norm", add(middle, fed)))
        x = after
    return [gelu(linear(state, "projection", norm(state, "norm", x[place]))) for place in hidden]


def test_the_network_is_the_paper_s_in_float64() -> None:
    model = encoder("original", output_projection=True).double()
    items = [3, 14, 15, 9, 26]
    found = model(batch(torch.tensor([items])), torch.tensor([[1, 4]]))
    state = {name: value.tolist() for name, value in model.state_dict().items()}
    expected = torch.tensor(naive(state, items, [1, 4]), dtype=torch.float64)
    # torch's own GELU is 5e-8 off in float64.
    torch.testing.assert_close(found[0], expected, rtol=1e-6, atol=1e-6)


def test_a_bias_is_one_more_column() -> None:
    model = encoder("original", output_bias=True)
    query_BE = model.encode(Queries.of_histories([[1, 2], []]))
    assert model.bias_table is not None
    torch.testing.assert_close(
        query_BE @ every_vector(model).T,
        query_BE[:, :D] @ model.item_table.weight.T + model.bias_table.weight[:, 0],
    )


def test_how_much_is_hidden() -> None:
    # 20 events at .2: 4 places; 12: 2.4, so 2; 7: 1.4, so 1; 1: .2, but one at least.
    length_B = torch.tensor([20, 12, 7, 1])
    place_BT, real_BT = draw_places(length_B, mask_ratio=0.2, last_share=0.0)
    assert real_BT.sum(dim=1).tolist() == [4, 2, 1, 1]
    for place_T, real_T, length in zip(place_BT, real_BT, length_B.tolist(), strict=True):
        assert len(set(place_T[real_T].tolist())) == real_T.sum()
        assert set(place_T.tolist()) == set(place_T[real_T].tolist())
        assert 0 <= place_T.min() <= place_T.max() < length


def test_every_position_is_masked_equally_often() -> None:
    torch.manual_seed(0)
    place_BT, real_BT = draw_places(torch.full((20_000,), 10), mask_ratio=0.3, last_share=0.0)
    share_L = place_BT[real_BT].bincount(minlength=10) / 20_000
    # The standard error of a share of .3 over 20,000 rows is .0032.
    torch.testing.assert_close(share_L, torch.full((10,), 0.3), rtol=0, atol=0.014)


def test_the_share_of_rows_that_hide_the_last_event_alone() -> None:
    torch.manual_seed(0)
    length_B = torch.randint(10, 21, (20_000,))
    place_BT, real_BT = draw_places(length_B, mask_ratio=0.5, last_share=0.25)
    alone_B = real_BT.sum(dim=1) == 1
    # The standard error of a share of .25 over 20,000 rows is .0031.
    assert alone_B.float().mean().item() == pytest.approx(0.25, abs=0.013)
    assert torch.equal(place_BT[alone_B, 0], length_B[alone_B] - 1)
    all_BT, _ = draw_places(length_B, mask_ratio=0.5, last_share=1.0)
    assert torch.equal(all_BT, length_B.unsqueeze(1) - 1)


def test_the_loss_is_the_softmax_over_hidden_events_alone() -> None:
    events = ring_events()
    model = encoder("original")
    objective = MaskedItem(MaskedItemConfig(mask_ratio=0.3, last_share=0.5), events)
    plan = plan_sequences(
        events,
        max_len=L,
        batch_events=200,
        windows="all",
        generator=np.random.default_rng(0),
    )
    learned = plan.batch(0)
    torch.manual_seed(3)
    place_BT, real_BT = draw_places(learned.valid_BL.sum(dim=1), mask_ratio=0.3, last_share=0.5)
    expected = []
    for row, (place_T, real_T) in enumerate(zip(place_BT, real_BT, strict=True)):
        items = learned.item_BL[row][learned.valid_BL[row]].unsqueeze(0)
        hidden = place_T[real_T].unsqueeze(0)
        logits = model(batch(items), hidden)[0] @ model.item_table.weight[:20].T
        expected.append(-logits.log_softmax(-1).gather(1, items[0, hidden[0]].unsqueeze(1)))
    torch.manual_seed(3)
    loss = objective(model, learned)
    torch.testing.assert_close(loss, torch.cat(expected).mean(), rtol=1e-5, atol=1e-5)


def bert_fit(folder: Path, *, epochs: int = 3) -> tuple[BERT4Rec, Fit]:
    events = ring_events()
    torch.manual_seed(0)
    model = BERT4Rec(BERT4RecConfig(embedding_dim=8, max_len=8), num_items=20)
    run = Fit(
        model,
        TrainingConfig(epochs=epochs, device="cpu", checkpoint_seconds=0, warmup_steps=0),
        seed=0,
        plan=lambda epoch: plan_sequences(
            events,
            max_len=8,
            batch_events=100,
            windows="all",
            generator=epoch_generator(0, epoch),
        ),
        objective=MaskedItem(
            MaskedItemConfig(loss="sampled_softmax", negatives=5, mask_ratio=0.4), events
        ),
        folder=folder,
    )
    return model, run


class Killed(Exception):
    pass


def test_a_resumed_run_is_the_same_run(tmp_path: Path) -> None:
    whole_model, whole = bert_fit(tmp_path / "whole")
    whole.run()

    def stop(progress: Progress, _: int) -> None:
        if progress.step == 11:
            raise Killed

    _, broken = bert_fit(tmp_path / "broken")
    with pytest.raises(Killed):
        broken.run(on_step=stop)
    resumed_model, resumed = bert_fit(tmp_path / "broken")
    resumed.run(resume=True)
    for name, value in whole_model.state_dict().items():
        assert torch.equal(value, resumed_model.state_dict()[name]), name


@pytest.mark.parametrize(
    ("loss", "epochs"), [("softmax", 25), ("sampled_softmax", 25), ("gbce", 60), ("bpr", 25)]
)
def test_any_loss_finds_the_group(loss: str, epochs: int) -> None:
    # Users go round the four items of one of five groups; by chance, the best item is of it with
    # probability 1 / 5.
    events = ring_events()
    item_idx = events.user_idx % 5 * 4 + events.item_idx % 4
    trained = ft.fit(
        BERT4RecConfig(embedding_dim=16, max_len=12, block="modern", hidden_ratio=1),
        ft.leave_last_split(replace(events, item_idx=item_idx), validation=False),
        objective=MaskedItemConfig(loss=loss, negatives=10, mask_ratio=0.3),
        training=TrainingConfig(
            epochs=epochs, batch_events=100, learning_rate=0.01, warmup_steps=10, patience=None
        ),
        show=False,
    )
    group = torch.arange(20) // 4
    score_BI = trained.score(Queries.of_histories([[item] for item in range(20)]))
    assert (group[score_BI.argmax(dim=1)] == group).float().mean() > 0.9


def test_it_learns_by_masking_by_default() -> None:
    model = encoder("original")
    assert isinstance(usual_objective(BERT4RecConfig()), MaskedItemConfig)
    with pytest.raises(ConfigError, match="'next_item', but BERT4Rec learns by 'masked_item'"):
        make_learning(model, NextItemConfig(), ring_events(), batch_events=100, seed=0)
    causal = SASRec(SASRecConfig(embedding_dim=D), num_items=20)
    with pytest.raises(ConfigError, match="'masked_item', but SASRec learns by 'next_item'"):
        make_learning(causal, MaskedItemConfig(), ring_events(), batch_events=100, seed=0)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (MaskedItemConfig, {"mask_ratio": 0.0}),
        (MaskedItemConfig, {"mask_ratio": 1.0}),
        (MaskedItemConfig, {"last_share": 1.1}),
        (BERT4RecConfig, {"max_len": 1}),
    ],
)
def test_settings_out_of_range_are_refused(kind: type, settings: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        kind(**settings)


def test_a_gated_block_that_is_causal_is_the_one_that_is_not_on_each_past() -> None:
    torch.manual_seed(0)
    block = GatedBlock(8, 2, hidden_dim=8, dropout=0.0, causal=True)
    other = GatedBlock(8, 2, hidden_dim=8, dropout=0.0)
    other.load_state_dict(block.state_dict())
    x_BLD = torch.randn(3, 5, 8)
    found = block(x_BLD)
    for place in range(5):
        past = other(x_BLD[:, : place + 1])[:, place]
        torch.testing.assert_close(found[:, place], past, rtol=1e-4, atol=1e-5)

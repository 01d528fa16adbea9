"""HSTU against a loop over pairs of events, and which inputs change a state."""

from dataclasses import replace
from math import log2

import pytest
import torch
from torch import Tensor
from torch.nn.functional import embedding, layer_norm, silu

from foretaste.data.batch import NO_TIME, Queries, SequenceBatch, last_events
from foretaste.errors import ConfigError
from foretaste.models import hstu
from foretaste.models.hstu import HSTU, HSTUConfig, time_buckets

NUM_ITEMS, L = 20, 6
CONFIG = HSTUConfig(embedding_dim=8, num_heads=2, num_blocks=2, max_len=L)


def network(config: HSTUConfig = CONFIG, seed: int = 0) -> HSTU:
    """Return a network whose biases by step and by time are as large as what they are added to."""
    torch.manual_seed(seed)
    model = HSTU(config, num_items=NUM_ITEMS).eval()
    for name, parameter in model.named_parameters():
        if "of_" in name or "start" in name:
            torch.nn.init.normal_(parameter)
    return model


def batch_of(*, times: bool = True, seed: int = 0) -> SequenceBatch:
    """Return four histories of 6, 4, 1 and 0 events, seconds to years apart."""
    generator = torch.Generator().manual_seed(seed)
    item_BL = torch.randint(NUM_ITEMS, (4, L), generator=generator)
    gap_BL = torch.rand(4, L, generator=generator).mul(25).exp2().long()
    time_BL = gap_BL.cumsum(1)
    time_BL[1, 2] = NO_TIME
    return SequenceBatch(
        user_B=torch.full((4,), -1),
        item_BL=item_BL,
        valid_BL=torch.arange(L) < torch.tensor([[6], [4], [1], [0]]),
        times=(lambda: time_BL) if times else None,
    )


def slow_states(model: HSTU, items: list[int], times: list[int | None]) -> Tensor:
    """Return the states of one history, one pair of events after the other."""
    D, H = model.config.embedding_dim, model.config.num_heads
    d, n = D // H, model.max_len + 1
    vectors = [model.start, *(model.item_table.weight[item] for item in items)]
    state = [vector * D**0.5 for vector in vectors]
    when = [None, *times]
    for block in model.blocks:
        normal = [layer_norm(x, (D,), block.norm.weight, block.norm.bias, 1e-6) for x in state]
        gate_query = [silu(block.gate_query(x)) for x in normal]
        key_value = [silu(block.key_value(x)) for x in normal]
        changed = []
        for i in range(len(state)):
            mixed = torch.zeros(D)
            for j in range(i + 1):
                for h in range(H):
                    own = slice(h * d, (h + 1) * d)
                    query, key = gate_query[i][D:][own], key_value[j][:D][own]
                    bucket = 64
                    if when[i] is not None and when[j] is not None:
                        bucket = int(2 * log2(max(1, abs(when[i] - when[j]))))
                    bias = block.of_step.weight[i - j, h] + block.of_time.weight[bucket, h]
                    mixed[own] += silu(query @ key + bias) / n * key_value[j][D:][own]
            mixed = layer_norm(mixed, (D,), block.mixed_norm.weight, block.mixed_norm.bias, 1e-6)
            changed.append(state[i] + block.output(mixed * gate_query[i][:D]))
        state = changed
    return torch.stack([model.norm(x) for x in state])


@pytest.mark.parametrize("times", [True, False])
def test_the_states_are_those_of_a_loop_over_pairs(*, times: bool) -> None:
    model, batch = network(), batch_of(times=times)
    state_BLD = model(batch)
    for row, valid in enumerate(batch.valid_BL):
        items = batch.item_BL[row][valid].tolist()
        when: list[int | None] = [None] * len(items)
        if batch.times is not None:
            when = [None if t == NO_TIME else t for t in batch.times()[row][valid].tolist()]
        with torch.no_grad():
            expected = slow_states(model, items, when)
        torch.testing.assert_close(state_BLD[row, : len(items) + 1], expected)


def queries_of(batch: SequenceBatch) -> Queries:
    length_B = batch.valid_BL.sum(1)
    times = batch.times
    return Queries(
        user_B=batch.user_B,
        history_N=batch.item_BL[batch.valid_BL],
        offsets_B1=torch.cat([length_B.new_zeros(1), length_B.cumsum(0)]),
        times=None if times is None else lambda: times()[batch.valid_BL],
    )


@pytest.mark.parametrize("times", [True, False])
@pytest.mark.parametrize("num_blocks", [1, 3])
def test_a_query_is_the_last_state_of_its_history(num_blocks: int, *, times: bool) -> None:
    model = network(CONFIG.model_copy(update={"num_blocks": num_blocks}))
    batch = batch_of(times=times)
    last_BD = model(batch)[torch.arange(4), batch.valid_BL.sum(1)]
    torch.testing.assert_close(model.encode(queries_of(batch)), last_BD)


def test_queries_in_blocks_are_the_same_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    model, queries = network(), queries_of(batch_of())
    whole = model.encode(queries)
    monkeypatch.setattr(hstu, "_PAIRS_AT_ONCE", 2 * (L + 1) ** 2)
    torch.testing.assert_close(model.encode(queries), whole)


def test_the_future_cannot_change_the_past() -> None:
    model, batch = network(), batch_of()
    whole = replace(batch, valid_BL=torch.ones_like(batch.valid_BL))
    assert batch.times is not None
    for place in range(L):
        item_BL, time_BL = batch.item_BL.clone(), batch.times().clone()
        item_BL[:, place:] = (item_BL[:, place:] + 1) % NUM_ITEMS
        time_BL[:, place:] += 10**6
        other = replace(whole, item_BL=item_BL, times=lambda moved=time_BL: moved)
        before, after = model(whole), model(other)
        assert torch.equal(before[:, : place + 1], after[:, : place + 1])
        assert not torch.allclose(before[:, place + 1], after[:, place + 1])


def test_the_content_of_padding_does_not_matter() -> None:
    model, batch = network(), batch_of()
    assert batch.times is not None
    item_BL = torch.where(batch.valid_BL, batch.item_BL, 7)
    time_BL = torch.where(batch.valid_BL, batch.times(), 5)
    other = replace(batch, item_BL=item_BL, times=lambda: time_BL)
    real_BL = torch.cat([torch.ones(4, 1, dtype=torch.bool), batch.valid_BL], dim=1)
    assert torch.equal(model(batch)[real_BL], model(other)[real_BL])


def test_the_time_between_two_events_counts_and_the_hour_of_the_clock_does_not() -> None:
    model = network()
    query = Queries.of_histories([[3, 5, 8]])
    encoded = [
        model.encode(replace(query, times=None if when is None else lambda t=when: torch.tensor(t)))
        for when in ([0, 60, 7000], [10**9, 10**9 + 60, 10**9 + 7000], [0, 60, 10**6], None)
    ]
    assert torch.equal(encoded[0], encoded[1])
    assert not torch.allclose(encoded[0], encoded[2])
    assert not torch.allclose(encoded[0], encoded[3])
    deaf = network(CONFIG.model_copy(update={"times": False}))
    with_times = replace(query, times=lambda: torch.tensor([0, 60, 7000]))
    assert torch.equal(deaf.encode(with_times), deaf.encode(query))


def test_the_same_events_in_another_order_or_more_often_are_another_state() -> None:
    model = network()
    one, turned, twice = model.encode(Queries.of_histories([[3, 5, 8], [8, 5, 3], [3, 5, 8, 8]]))
    assert not torch.allclose(one, turned)
    assert not torch.allclose(one, twice)


def test_seconds_fall_into_buckets_of_powers_of_the_root_of_two() -> None:
    seconds = [0, 1, 2, 3, 4, 60, 86_400, 10**9, 2**62]
    found = time_buckets(torch.tensor(seconds), torch.zeros(9, dtype=torch.long))
    # 2 log2: 1 -> 0, 2 -> 2, 3 -> 3.17, 4 -> 4, 60 -> 11.8, a day -> 32.8, 10^9 -> 59.8, the last
    assert found.tolist() == [0, 0, 2, 3, 4, 11, 32, 59, 63]
    nobody = torch.tensor([NO_TIME, 5, NO_TIME])
    assert time_buckets(nobody, torch.tensor([5, NO_TIME, NO_TIME])).tolist() == [64] * 3


def test_training_hides_the_times_of_some_rows_alone() -> None:
    half = network(CONFIG.model_copy(update={"time_dropout": 0.5, "dropout": 0.0})).train()
    events = torch.tensor([[3, 5, 8]]).expand(400, -1)
    batch = SequenceBatch(
        user_B=torch.zeros(400, dtype=torch.long),
        item_BL=events,
        valid_BL=torch.ones_like(events, dtype=torch.bool),
        times=lambda: torch.tensor([[0, 60, 7000]]).expand(400, -1),
    )
    told, hidden = half.eval()(batch)[0, -1], half(replace(batch, times=None))[0, -1]
    last_BD = half.train()(batch)[:, -1]
    is_told_B, is_hidden_B = (
        torch.isclose(last_BD, state, atol=1e-6).all(1) for state in (told, hidden)
    )
    assert (is_told_B ^ is_hidden_B).all()
    assert 150 < is_hidden_B.sum() < 250  # 200, and five standard deviations of 10


def test_a_width_that_heads_do_not_divide_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        HSTU(HSTUConfig(embedding_dim=9, num_heads=2), num_items=3)
    assert (caught.value.name, caught.value.value) == ("num_heads", 2)


def test_only_the_last_events_are_read() -> None:
    model = network()
    long = Queries.of_histories([list(range(12))])
    assert torch.equal(model.encode(long), model.encode(Queries.of_histories([[*range(6, 12)]])))
    assert last_events(long, L).item_BL.shape == (1, L)


@pytest.mark.parametrize("shape", [(1, 5, 5), (3, 5, 5), (2, 1, 4), (1, 1, 1)])
def test_the_bias_of_each_head_has_the_values_and_gradients_of_an_embedding(
    shape: tuple[int, ...],
) -> None:
    index_BTL = torch.randint(0, 6, shape)
    one_KH, other_KH = (torch.arange(14.0).view(7, 2).requires_grad_() for _ in range(2))
    weight_BHTL = torch.randn(shape[0], 2, *shape[1:])
    found_BHTL = hstu._of_each_head(one_KH, index_BTL)
    expected_BHTL = embedding(index_BTL, other_KH).movedim(3, 1)
    torch.testing.assert_close(found_BHTL, expected_BHTL, rtol=0, atol=0)
    for bias_BHTL in (found_BHTL, expected_BHTL):
        (bias_BHTL * weight_BHTL).sum().backward()
    torch.testing.assert_close(one_KH.grad, other_KH.grad)

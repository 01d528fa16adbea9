"""SASRec and its attention: causality, padding, a float64 oracle, both blocks."""

import math
from typing import Literal

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from foretaste.data.batch import Queries, SequenceBatch, last_events
from foretaste.errors import ConfigError
from foretaste.models.layers.dense import Dropout, MultiHeadAttention
from foretaste.models.sasrec import SASRec, SASRecConfig

B, L, NUM_ITEMS = 4, 6, 50
Block = Literal["original", "modern"]
both_blocks = pytest.mark.parametrize("block", ["original", "modern"])


def encoder(block: Block) -> SASRec:
    torch.manual_seed(0)
    config = SASRecConfig(embedding_dim=16, max_len=L, block=block)
    model = SASRec(config, num_items=NUM_ITEMS).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def batch(item_BL: torch.Tensor, valid_BL: torch.Tensor | None = None) -> SequenceBatch:
    if valid_BL is None:
        valid_BL = torch.ones_like(item_BL, dtype=torch.bool)
    user_B = torch.full((len(item_BL),), -1)
    return SequenceBatch(user_B=user_B, item_BL=item_BL, valid_BL=valid_BL)


@both_blocks
def test_the_future_cannot_change_the_past(block: Block) -> None:
    model, history = encoder(block), torch.randint(NUM_ITEMS, (B, L))
    for position in range(L):
        changed = history.clone()
        changed[:, position:] = (history[:, position:] + 1) % NUM_ITEMS
        before, after = model(batch(history)), model(batch(changed))
        torch.testing.assert_close(before[:, : position + 1], after[:, : position + 1])
        assert not torch.allclose(before[:, position + 1], after[:, position + 1])


@both_blocks
def test_the_content_of_padding_does_not_matter(block: Block) -> None:
    model, history = encoder(block), torch.randint(NUM_ITEMS, (B, L))
    valid = torch.arange(L) < torch.tensor([[0], [2], [5], [6]])
    other = torch.where(valid, history, torch.randint(NUM_ITEMS, (B, L)))
    seen = torch.cat([torch.ones(B, 1, dtype=torch.bool), valid], dim=1)
    torch.testing.assert_close(model(batch(history, valid))[seen], model(batch(other, valid))[seen])


@both_blocks
def test_a_longer_neighbour_does_not_change_the_answer(block: Block) -> None:
    model = encoder(block)
    together = model.encode(Queries.of_histories([[1, 2], list(range(40)), [], [7]]))
    alone = torch.cat(
        [model.encode(Queries.of_histories([h])) for h in ([1, 2], list(range(40)), [], [7])]
    )
    torch.testing.assert_close(together, alone)


@both_blocks
def test_only_the_last_events_are_read(block: Block) -> None:
    model, last = encoder(block), list(range(L))
    torch.testing.assert_close(
        model.encode(Queries.of_histories([[40, 41, *last]])),
        model.encode(Queries.of_histories([last])),
    )


@both_blocks
def test_order_matters(block: Block) -> None:
    model = encoder(block)
    one, other = model.encode(Queries.of_histories([[1, 2, 3], [2, 1, 3]]))
    assert not torch.allclose(one, other)


def test_last_events_by_hand() -> None:
    found = last_events(Queries.of_histories([[1, 2, 3], [], [4]]), 2)
    assert found.item_BL.tolist() == [[2, 3], [0, 0], [4, 0]]
    assert found.valid_BL.tolist() == [[True, True], [False, False], [True, False]]


@pytest.mark.parametrize("causal", [True, False])
def test_attention_equals_the_formula_in_float64(*, causal: bool) -> None:
    torch.manual_seed(0)
    layer = MultiHeadAttention(12, 3).double().eval()
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    valid = None if causal else torch.tensor([[True] * 5, [True, False, True, False, False]])
    query, (key, value) = layer.query(x), layer.key_value(x).chunk(2, dim=-1)
    heads = []
    for h in range(3):
        part = slice(4 * h, 4 * h + 4)
        logits = query[..., part] @ key[..., part].transpose(1, 2) / math.sqrt(4)
        for row in range(2):
            for i in range(5):
                for j in range(5):
                    if (causal and j > i) or (valid is not None and not valid[row, j]):
                        logits[row, i, j] = -torch.inf
        heads.append(logits.softmax(-1) @ value[..., part])
    expected = layer.output(torch.cat(heads, dim=-1))
    found = layer(x, x, causal=causal, valid_BS=valid)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_in_bf16_on_a_cpu_only_the_attention_itself_stays_in_fp32(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer, x, seen = MultiHeadAttention(12, 3), torch.randn(2, 5, 12), []

    def attention(query: Tensor, key: Tensor, value: Tensor, **_: object) -> Tensor:
        seen.extend([query.dtype, key.dtype, (query @ key.transpose(2, 3)).dtype])
        return value

    monkeypatch.setattr(functional, "scaled_dot_product_attention", attention)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x, x).dtype == torch.bfloat16
    assert seen == [torch.float32] * 3


def test_nothing_to_attend_to_is_not_nan() -> None:
    layer = MultiHeadAttention(4, 1)
    found = layer(torch.randn(1, 3, 4), torch.randn(1, 3, 4), valid_BS=torch.zeros(1, 3).bool())
    torch.testing.assert_close(found, layer.output.bias.expand(1, 3, 4))


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(ConfigError, match="embedding_dim 10 is not a multiple of num_heads 4"):
        MultiHeadAttention(10, 4)


def test_dropout_keeps_the_mean_and_drops_its_share() -> None:
    torch.manual_seed(0)
    layer, ones = Dropout(0.25), torch.ones(1000, 1000)
    dropped = layer(ones)
    # A share of 1,000,000 draws: the standard error is 0.0004.
    assert (dropped == 0).float().mean().item() == pytest.approx(0.25, abs=0.002)
    assert dropped.mean().item() == pytest.approx(1, abs=0.003)
    assert torch.equal(layer.eval()(ones), ones)
    torch.manual_seed(0)
    assert torch.equal(layer.train()(ones), dropped)


@both_blocks
def test_the_last_state_alone_is_the_last_of_all_states(block: Block) -> None:
    model = encoder(block).double()
    for histories in ([[1, 2, 3], [], [4], list(range(9))], [[3, 1], [2, 2]], [[]]):
        queries = Queries.of_histories(histories)
        rows = last_events(queries, L)
        state_BLD = model(rows)
        expected_BD = state_BLD[torch.arange(len(rows)), rows.valid_BL.sum(dim=1)]
        torch.testing.assert_close(model.encode(queries), expected_BD)

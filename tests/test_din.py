"""DIN: attention by hand, padding without weight, histories of any length, blocks against pairs."""

from dataclasses import replace
from typing import Literal

import pytest
import torch
from torch import Tensor

from foretaste.data.batch import Queries
from foretaste.errors import ConfigError
from foretaste.models.layers import field_ranker
from foretaste.models.layers.history import TargetAttention
from foretaste.models.rankers import DIN, DINConfig
from tests.test_row_fields import EVENTS, FEATURES, ITEMS, NUM_ITEMS, NUM_USERS, QUERIES

PLAIN = DINConfig(embedding_dim=4, attention_hidden=(5,), hidden=(6,))
HISTORIES = [[1, 2, 0, 2], [], [0], [2, 3, 1]]


def network(config: DINConfig = PLAIN) -> DIN:
    torch.manual_seed(0)
    model = DIN(config, num_users=NUM_USERS, num_items=NUM_ITEMS, features=FEATURES)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    model.begin(EVENTS)
    return model.eval()


def asked(histories: list[list[int]] = HISTORIES) -> Queries:
    told = Queries.of_histories(histories)
    if len(histories) == len(QUERIES):
        return replace(QUERIES, history_N=told.history_N, offsets_B1=told.offsets_B1)
    return told


def item_vector(model: DIN, item: int) -> Tensor:
    return model.fields.items(torch.tensor([[item]])).flatten()


def slow_weights(model: DIN, history: list[int], item: int) -> Tensor:
    assert model.attention is not None
    target_K, logits = item_vector(model, item), []
    for event in history:
        event_K = item_vector(model, event)
        state = model.attention.joint(torch.cat([event_K, target_K, event_K * target_K]))
        state = torch.where(state > 0, state, model.attention.activations[0].slope_O * state)
        logits.append(model.attention.layers[0](state).squeeze())
    return torch.stack(logits) if logits else torch.zeros(0)


@pytest.mark.parametrize("weights", ["softmax", "unnormalised"])
def test_weights_and_user_vectors_are_the_paper_s(
    weights: Literal["softmax", "unnormalised"],
) -> None:
    model = network(PLAIN.model_copy(update={"weights": weights}))
    weight_BCL = model.attention_weights(asked(), ITEMS)
    vector_BCK = model.user_vectors(asked(), ITEMS)
    assert weight_BCL.shape == (4, 2, 4)
    for row, history in enumerate(HISTORIES):
        for place, item in enumerate(ITEMS[row].tolist()):
            slow_L = slow_weights(model, history, item)
            slow_L = slow_L.softmax(dim=0) if weights == "softmax" else slow_L
            size = len(history)
            torch.testing.assert_close(weight_BCL[row, place, :size], slow_L)
            assert weight_BCL[row, place, size:].abs().sum() == 0
            slow_K = torch.zeros(vector_BCK.shape[2])
            for weight, event in zip(slow_L, history, strict=True):
                slow_K = slow_K + weight * item_vector(model, event)
            torch.testing.assert_close(vector_BCK[row, place], slow_K, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [3, 1])
def test_many_items_of_a_history_are_weighed_like_few(rows: int) -> None:
    torch.manual_seed(0)
    unit = TargetAttention(4, (5, 3), weights="softmax", activation="prelu")
    event_BLK, item_ACK = torch.randn(3, 6, 4), torch.randn(rows, 9, 4)
    valid_BL = torch.arange(6) < torch.tensor([[6], [2], [0]])
    few = [unit(event_BLK, some, valid_BL) for some in item_ACK.split(4, dim=1)]
    torch.testing.assert_close(unit(event_BLK, item_ACK, valid_BL), torch.cat(few, dim=1))


def test_one_past_event_leaves_nothing_to_attend_to() -> None:
    model = network()
    queries = asked([[2]])
    vector_BCK = model.user_vectors(queries, torch.tensor([[0, 1]]))
    torch.testing.assert_close(vector_BCK[0], item_vector(model, 2).expand(2, -1))
    before = model(queries, torch.tensor([[0, 1]]))["click"]
    with torch.no_grad():
        for parameter in model.attention.parameters():  # type: ignore[union-attr]  # is there
            parameter.normal_()
    torch.testing.assert_close(model(queries, torch.tensor([[0, 1]]))["click"], before)


def test_the_user_vector_changes_with_the_item_judged() -> None:
    model = network()
    with torch.no_grad():
        for parameter in model.attention.parameters():  # type: ignore[union-attr]  # is there
            parameter.mul_(0.1)  # large ones leave one event the whole weight, whatever the item
    vector_BCK = model.user_vectors(asked([[1, 2, 0]]), torch.tensor([[0, 1]]))
    assert not torch.allclose(vector_BCK[0, 0], vector_BCK[0, 1])
    mean = PLAIN.model_copy(update={"pooling": "mean"})
    vector_BCK = network(mean).user_vectors(asked([[1, 2, 0]]), torch.tensor([[0, 1]]))
    torch.testing.assert_close(vector_BCK[0, 0], vector_BCK[0, 1])


def test_the_mean_is_the_mean_of_the_last_events() -> None:
    model = network(PLAIN.model_copy(update={"pooling": "mean", "max_len": 2}))
    vector_BCK = model.user_vectors(asked([[3, 1, 2], []]), torch.tensor([[0], [0]]))
    expected = (item_vector(model, 1) + item_vector(model, 2)) / 2
    torch.testing.assert_close(vector_BCK[0, 0], expected)
    assert vector_BCK[1].abs().sum() == 0


@pytest.mark.parametrize("pooling", ["attention", "mean", "none"])
@pytest.mark.parametrize("activation", ["prelu", "dice"])
def test_neighbours_and_their_lengths_change_nothing(
    pooling: str, activation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = network(PLAIN.model_copy(update={"pooling": pooling, "activation": activation}))
    told = Queries.of_histories(HISTORIES)
    together = model(told, ITEMS)["click"]
    for row, history in enumerate(HISTORIES):
        alone = model(Queries.of_histories([history]), ITEMS[row : row + 1])["click"]
        torch.testing.assert_close(alone[0], together[row])
    monkeypatch.setattr("foretaste.models.layers.history._GROUP_ROWS", 1)  # a group for each length
    torch.testing.assert_close(model(told, ITEMS)["click"], together)


@pytest.mark.parametrize("pooling", ["attention", "mean", "none"])
def test_the_catalogue_in_blocks_is_every_pair(
    pooling: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = network(PLAIN.model_copy(update={"pooling": pooling}))
    monkeypatch.setattr(field_ranker, "_HISTORY_PAIRS", 7)
    monkeypatch.setattr(field_ranker, "_HISTORY_QUERIES", 3)
    every_BI = torch.arange(NUM_ITEMS).expand(len(HISTORIES), -1)
    torch.testing.assert_close(model.score(asked()), model(asked(), every_BI)["click"])


def test_only_the_last_events_are_read() -> None:
    model = network(PLAIN.model_copy(update={"max_len": 2}))
    item = torch.tensor([[1]])
    long, short = (model(asked([h]), item)["click"] for h in ([3, 0, 2, 1], [2, 1]))
    torch.testing.assert_close(long, short)
    assert model.attention_weights(asked([[3, 0, 2, 1]]), item).shape == (1, 1, 2)


def test_padding_has_no_gradient_and_dice_does_not_see_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = PLAIN.model_copy(update={"activation": "dice"})
    one, other = network(config).train(), network(config).train()
    told = Queries.of_histories(HISTORIES)
    one(told, ITEMS)["click"].sum().backward()
    # The same with an empty history more, and so with more padding: its rows of the unit are all
    # padding. The statistics of the unit stay, those of the MLP do not.
    other(Queries.of_histories([*HISTORIES, []]), torch.cat([ITEMS, ITEMS[:1]]))
    assert one.attention is not None
    assert other.attention is not None
    torch.testing.assert_close(
        one.attention.activations[0].mean_O, other.attention.activations[0].mean_O
    )


def test_histories_of_one_item_must_tell_it() -> None:
    config = PLAIN.model_copy(update={"item_id": False, "item_features": False, "user_id": True})
    with pytest.raises(ConfigError, match=r'set model\.pooling to "none"'):
        DIN(config, num_users=NUM_USERS, num_items=1)


def test_without_histories_there_are_no_weights() -> None:
    model = network(PLAIN.model_copy(update={"pooling": "none"}))
    assert model.reads == "nothing"
    for ask in (model.attention_weights, model.user_vectors):
        with pytest.raises(ConfigError, match="no history is read"):
            ask(asked(), ITEMS)


def test_the_penalty_counts_what_histories_use() -> None:
    config = PLAIN.model_copy(update={"l2": 1.0, "item_features": False, "user_features": False})
    model = DIN(config, num_users=NUM_USERS, num_items=NUM_ITEMS)
    assert model.fields.item.id_table is not None
    square_I = model.fields.item.id_table.block(0, NUM_ITEMS).square().sum(dim=1)
    got = model.penalty(Queries.of_histories([[2, 1], [2]]), torch.tensor([[0], [1]]))
    expected = (square_I[0] + 2 * square_I[1] + 2 * square_I[2]) / 2 / 2
    torch.testing.assert_close(got, expected)
